"""Each algorithm's loss sample by sample and token by token, as its paper writes it: the reference in the tests."""

import math
from collections.abc import Callable

import torch

from pctrain.rl.groups import Group
from tests.helpers.rl_cases import Tokens


def grpo(
    groups: list[Group],
    tokens: list[Tokens],
    *,
    low: float = 0.2,
    high: float = 0.2,
    std: bool = False,
    entropy_coef: float = 0.001,
    kl: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Return -mean over tokens of min(r A, clip(r) A), sample by sample, token by token."""
    values, count, row = torch.zeros((), dtype=torch.float64), 0, 0
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        spread = math.sqrt(sum((r - mean) ** 2 for r in group.rewards) / (len(group.rewards) - 1))
        for reward in group.rewards:
            advantage = (reward - mean) / (spread + 1e-6) if std else reward - mean
            of_row = tokens[row]
            for t in range(len(of_row.logprob)):
                ratio = torch.exp(of_row.logprob[t] - of_row.old[t])
                clipped = min(max(ratio.item(), 1 - low), 1 + high)
                plain = ratio * advantage
                values = values - (
                    plain if plain.item() <= clipped * advantage else torch.tensor(clipped * advantage).double()
                )
                values = values - entropy_coef * of_row.entropy[t]
                if kl is not None:
                    values = values + kl(of_row.ref[t] - of_row.logprob[t])
                count += 1
            row += 1
    return values / count


def luffy(groups: list[Group], tokens: list[Tokens], *, entropy_coef: float = 0.001) -> torch.Tensor:
    loss, count, rows = torch.zeros((), dtype=torch.float64), 0, iter(tokens)
    for group in groups:
        rewards = [*group.rewards, 1.0]  # the expert's
        mean = sum(rewards) / len(rewards)
        for k, reward in enumerate(rewards):
            of_row = next(rows)
            for t in range(len(of_row.logprob)):
                p = torch.exp(of_row.logprob[t])
                factor = p / (p + 0.1) if k == len(rewards) - 1 else torch.exp(of_row.logprob[t] - of_row.old[t])
                loss = loss - factor * (reward - mean) - entropy_coef * of_row.entropy[t]
                count += 1
    return loss / count


def srft(groups: list[Group], tokens: list[Tokens], *, entropy_coef: float = 0.001) -> torch.Tensor:
    loss, count, rows = torch.zeros((), dtype=torch.float64), 0, iter(tokens)
    for group in groups:
        rewards = [*group.rewards, 1.0]
        mean = sum(rewards) / len(rewards)
        for k, reward in enumerate(rewards):
            of_row = next(rows)
            H = of_row.entropy.detach().mean().item()  # no gradient
            for logprob in of_row.logprob:
                p = torch.exp(logprob)
                if k == len(rewards) - 1:
                    w1 = 0.5 * math.exp(-H)
                    loss = loss + w1 * (-logprob) + w1 * (-(p / (p + 0.1)) * (reward - mean))
                elif reward == 1:
                    loss = loss + 0.1 * math.exp(H) * (-logprob)
                else:
                    loss = loss + logprob
                count += 1
            loss = loss - entropy_coef * of_row.entropy.sum()
    return loss / count


def prefix_rft(
    groups: list[Group],
    tokens: list[Tokens],
    *,
    share: float = 0.2,
    clip: float = 0.2,
    entropy_coef: float = 0.001,
) -> torch.Tensor:
    loss, count, rows = torch.zeros((), dtype=torch.float64), 0, iter(tokens)
    for group in groups:
        mean = sum(group.rewards) / len(group.rewards)
        for reward, prefix in zip(group.rewards, group.prefixes, strict=True):
            of_row, n = next(rows), len(prefix)
            kept = sorted(range(n), key=lambda t: -of_row.entropy[t].item())[: -(-int(100 * share) * n // 100)]
            for t in range(len(of_row.logprob)):
                advantage = reward - mean if t >= n or t in kept else 0.0
                ratio = torch.exp(of_row.logprob[t] - of_row.old[t])
                loss = loss - torch.min(ratio * advantage, torch.clamp(ratio, 1 - clip, 1 + clip) * advantage)
                loss = loss - entropy_coef * of_row.entropy[t]
                count += 1
    return loss / count


def upt(groups: list[Group], tokens: list[Tokens], *, gamma: float, coefficient: float) -> torch.Tensor:
    loss, count, rows = torch.zeros((), dtype=torch.float64), 0, list(tokens)
    for group in groups:
        if sum(group.rewards) <= gamma:
            of_row = rows.pop(0)
            loss, n = loss - coefficient * of_row.logprob.sum(), len(of_row.logprob)
        else:
            own, rows = rows[: len(group.rewards)], rows[len(group.rewards) :]
            n = sum(len(t.logprob) for t in own)
            loss = loss + n * grpo([group], own)
        count += n
    return loss / count
