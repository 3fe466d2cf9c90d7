"""The rollouts of a step on the disk, as tokens: what was sampled is not sampled again after a kill, and can be trained on elsewhere."""

from __future__ import annotations

import io
import json
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np

from pctrain.checkpoints import checkpoint_step
from pctrain.data.problems import Problem
from pctrain.durable import write_beside
from pctrain.errors import UserError
from pctrain.reward import Verdict
from pctrain.rl.sampling import Group, Sampled
from pctrain.rollout import Completion

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
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            lengths, tokens, logprobs = (arrays[name] for name in ("lengths", "tokens", "logprobs"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; `pctrain rl --debug-rollout-only` writes one into RUN/rollouts") from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} holds no rollouts of a step ({error}); `pctrain rl --debug-rollout-only` writes such a file") from None
    if about.get("format") != FORMAT:
        raise UserError(f"{path}: rollouts of format {about.get('format')}, expected {FORMAT}; sample them again")
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    sampled, at = Sampled(rounds=about["rounds"], rollout_seconds=about["rollout_seconds"], reward_seconds=about["reward_seconds"]), 0
    for one in about["groups"]:
        if one["problem"] >= len(problems) or problems[one["problem"]].id != one["id"]:
            raise UserError(f"{path}: its problem {one['id']} is not number {one['problem']} of data.rl; name the set it was sampled from")
        completions = []
        for finish in one["finish"]:
            part = slice(bounds[at], bounds[at + 1])
            completions.append(Completion(tokens[part].tolist(), finish, logprobs[part].tolist() if len(logprobs) else None))
            at += 1
        group = Group(problems[one["problem"]], completions, [Verdict(**verdict) for verdict in one["verdicts"]], one["prefixes"])
        if one["why"] is None:
            sampled.kept.append(group)
        else:
            sampled.dropped.append((group, one["why"]))
    return about["step"], sampled, about["prompts"]


def forget(run: Path, checkpoint: Path | None) -> None:
    """Deletes what the newest complete checkpoint covers: it is not needed any more. (On a GPU that is not yet the one just begun.)"""
    last = checkpoint_step(checkpoint) if checkpoint else 0
    for path in (run / "rollouts").glob("step-*.replay.npz"):
        if int(path.name.removeprefix("step-").removesuffix(".replay.npz")) <= last:
            path.unlink()
