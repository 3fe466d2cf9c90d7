"""The rollouts of a step on the disk, as tokens: what was sampled is not sampled again after a kill, and can be trained on elsewhere."""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.common.errors import UserError
from pctrain.data.problems import Problem
from pctrain.files import npz
from pctrain.files.durable import write_beside
from pctrain.reward import Verdict
from pctrain.rl.sampling import Group, Sampled
from pctrain.rollout import Completion
from pctrain.run.checkpoints import checkpoint_step

FORMAT = 1


def path_of(run: Path, step: int) -> Path:
    return run / "rollouts" / f"step-{step}.replay.npz"


def save(path: Path, step: int, sampled: Sampled, prompts: dict) -> None:
    """`prompts`: the state of the prompt stream after the sampling. Written whole or not at all."""
    completions = [c for group in sampled.groups for c in group.completions]
    why = {id(group): reason for group, reason in sampled.dropped}
    about = {
        "format": FORMAT, "step": step, "prompts": prompts, "rounds": sampled.rounds,
        "rollout_seconds": sampled.rollout_seconds, "reward_seconds": sampled.reward_seconds,
        "groups": [{"problem": group.problem.index, "id": group.problem.id, "why": why.get(id(group)), "prefixes": group.prefixes,
                    "verdicts": [asdict(verdict) for verdict in group.verdicts], "finish": [c.finish for c in group.completions]}
                   for group in sampled.groups],
    }  # fmt: skip
    with_logprobs = bool(completions) and completions[0].logprobs is not None
    arrays = {
        "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
        "lengths": np.array([len(c.token_ids) for c in completions], np.int64),
        "tokens": np.array([t for c in completions for t in c.token_ids], np.int32),
        "logprobs": np.array([x for c in completions for x in c.logprobs] if with_logprobs else [], np.float64),
    }
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    write_beside(path, buffer.getvalue())


def load(path: Path, problems: list[Problem]) -> tuple[int, Sampled, dict]:
    """(step, what was sampled, state of the prompt stream). Raises UserError for a file that is none, or of other problems."""
    try:
        text, lengths, tokens, logprobs = npz.read(path, ("about", "lengths", "tokens", "logprobs"))
        about = json.loads(text.tobytes())
        if isinstance(about, dict) and about.get("format") != FORMAT:
            raise UserError(
                f"{path}: rollouts of format {str(about.get('format')):.40}, expected {FORMAT}; sample them again"
            )
        _check(about, lengths, tokens, logprobs)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; `pctrain rl --debug-rollout-only` writes one into RUN/rollouts"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} holds no rollouts of a step ({error}); `pctrain rl --debug-rollout-only` writes such a file"
        ) from None
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    sampled, at = (
        Sampled(
            rounds=about["rounds"], rollout_seconds=about["rollout_seconds"], reward_seconds=about["reward_seconds"]
        ),
        0,
    )
    for one in about["groups"]:
        if not 0 <= one["problem"] < len(problems) or problems[one["problem"]].id != one["id"]:
            raise UserError(
                f"{path}: its problem {one['id']} is not number {one['problem']} of data.rl; name the set it was sampled from"
            )
        completions = []
        for finish in one["finish"]:
            part = slice(bounds[at], bounds[at + 1])
            completions.append(
                Completion(tokens[part].tolist(), finish, logprobs[part].tolist() if len(logprobs) else None)
            )
            at += 1
        group = Group(
            problems[one["problem"]], completions, [Verdict(**verdict) for verdict in one["verdicts"]], one["prefixes"]
        )
        if one["why"] is None:
            sampled.kept.append(group)
        else:
            sampled.dropped.append((group, one["why"]))
    return about["step"], sampled, about["prompts"]


def _check(about: Any, lengths: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
    """ValueError, in words, where a file is not as `save` writes it."""
    npz.check("lengths", lengths, "iu", (None,))
    npz.check("tokens", tokens, "iu", (None,))
    npz.check("logprobs", logprobs, "f", (None,))
    if (
        (lengths < 0).any()
        or (lengths > len(tokens)).any()
        or lengths.sum() != len(tokens)
        or len(logprobs) not in (0, len(tokens))
    ):
        raise ValueError("its lengths are not those of its tokens")
    try:
        prompts, groups = about["prompts"], about["groups"]
        counts = [
            about["step"],
            about["rounds"],
            prompts["position"],
            *prompts["carried"],
            *(group["problem"] for group in groups),
        ]
        seconds = [about["rollout_seconds"], about["reward_seconds"]]
        prefixes = [token for group in groups for prefix in group["prefixes"] for token in prefix]
        texts = [
            text
            for group in groups
            for text in (group["id"], *([] if group["why"] is None else [group["why"]]), *group["finish"])
        ]
        rewards = [Verdict(**verdict).reward for group in groups for verdict in group["verdicts"]]
        even = all(len(group["finish"]) == len(group["verdicts"]) == len(group["prefixes"]) > 0 for group in groups)
    except (LookupError, TypeError):
        raise ValueError("what it says of its groups is not complete") from None
    whole = all(type(value) is int and 0 <= value < 2**62 for value in counts + prefixes)
    if not whole or not all(isinstance(text, str) for text in texts):
        raise ValueError("one of its counts is no whole number, or one of its names no text")
    if not all(type(value) in (int, float) and 0 <= value < 1e300 for value in seconds + rewards):
        raise ValueError("one of its times or rewards is no number")
    if not even or sum(len(group["finish"]) for group in groups) != len(lengths):
        raise ValueError("its groups have other numbers of rollouts than of lengths")


def forget(run: Path, checkpoint: Path | None) -> None:
    """Deletes what the newest complete checkpoint covers: it is not needed any more. (On a GPU that is not yet the one just begun.)"""
    last = checkpoint_step(checkpoint) if checkpoint else 0
    for path in (run / "rollouts").glob("step-*.replay.npz"):
        step = path.name.removeprefix("step-").removesuffix(".replay.npz")
        if step.isdecimal() and int(step) <= last:
            path.unlink()
