"""The rollouts of a step on disk, as tokens.

After a kill they are read and not sampled again, and `--debug-train-only` trains on them elsewhere.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pctrain.common.errors import UserError
from pctrain.data.problems import Problem
from pctrain.distributed import parallel
from pctrain.files import npz
from pctrain.files.durable import write_atomically
from pctrain.reward import Verdict
from pctrain.rl.groups import Group, Sampled
from pctrain.rl.prompts import PromptStream
from pctrain.rollout import Completion
from pctrain.run.checkpoints import checkpoint_step
from pctrain.run.folder import RunFolder

FORMAT = 1

Count = Annotated[int, Field(ge=0, lt=2**62)]
Seconds = Annotated[float, Field(ge=0, lt=1e300)]


class _Header(BaseModel):
    format: int


class _PromptState(BaseModel):
    model_config = ConfigDict(strict=True)
    position: Count
    carried: list[Count]


class _GroupRecord(BaseModel):
    """A group without its tokens and log-probs, which are in the arrays of the file. `why` is its rejection."""

    model_config = ConfigDict(strict=True)
    problem: Count
    id: str
    why: str | None
    prefixes: list[list[Count]]
    verdicts: list[Verdict]
    finish: list[Literal["stop", "length"]]


class _StepRecord(BaseModel):
    """The JSON text in a replay file."""

    model_config = ConfigDict(strict=True)
    format: int
    step: Count
    prompts: _PromptState
    rounds: Count
    rollout_seconds: Seconds
    reward_seconds: Seconds
    groups: list[_GroupRecord]


# ---- in the loop ---------------------------------------------------------------------------------------------------


def path_of(run: Path, step: int) -> Path:
    """Return the replay file of a step."""
    return run / "rollouts" / f"step-{step}.replay.npz"


def read_step(run: RunFolder, prompts: PromptStream, step: int) -> Sampled | None:
    """Return what an earlier start sampled for this step, and advance `prompts` past it; or None. Collective."""
    path = path_of(run.path, step)
    if not parallel.from_rank_zero(path.exists):
        return None
    _, sampled, prompt_state = parallel.from_rank_zero(lambda: load(path, prompts.problems))
    prompts.load_state_dict(prompt_state)
    run.log(f"step {step} its rollouts had been sampled before this start: {path.name}")
    return sampled


def write_step(run: RunFolder, prompts: PromptStream, step: int, sampled: Sampled) -> None:
    """Write what was sampled for this step, and the state of `prompts` after it. Collective."""
    parallel.from_rank_zero(lambda: save(path_of(run.path, step), step, sampled, prompts.state_dict()))


def delete_covered(run: Path, checkpoint: Path | None) -> None:
    """Delete the replay files of the steps that the newest complete checkpoint covers.

    On a GPU the checkpoint that was just begun is not yet complete.
    """
    last = checkpoint_step(checkpoint) if checkpoint else 0
    for path in (run / "rollouts").glob("step-*.replay.npz"):
        step = path.name.removeprefix("step-").removesuffix(".replay.npz")
        if step.isdecimal() and int(step) <= last:
            path.unlink()


# ---- one file ------------------------------------------------------------------------------------------------------


def save(path: Path, step: int, sampled: Sampled, prompt_state: dict) -> None:
    """Write a replay file, completely or not at all."""
    record = {
        "format": FORMAT,
        "step": step,
        "prompts": prompt_state,
        "rounds": sampled.rounds,
        "rollout_seconds": sampled.rollout_seconds,
        "reward_seconds": sampled.reward_seconds,
        "groups": [
            {
                "problem": group.problem.index,
                "id": group.problem.id,
                "why": group.rejection,
                "prefixes": group.prefixes,
                "verdicts": [asdict(verdict) for verdict in group.verdicts],
                "finish": [completion.finish for completion in group.completions],
            }
            for group in sampled.groups
        ],
    }
    completions = sampled.completions
    buffer = io.BytesIO()
    np.savez(
        buffer,
        about=np.frombuffer(json.dumps(record).encode(), np.uint8),
        lengths=np.array([len(completion.token_ids) for completion in completions], np.int64),
        tokens=np.array([token for completion in completions for token in completion.token_ids], np.int32),
        logprobs=np.array([value for completion in completions for value in completion.logprobs or ()], np.float64),
    )
    write_atomically(path, buffer.getvalue())


def load(path: Path, problems: list[Problem]) -> tuple[int, Sampled, dict]:
    """Return (step, what was sampled, state of the prompt stream after it) from a replay file.

    UserError if the file is damaged or belongs to other problems.
    """
    try:
        text, lengths, tokens, logprobs = npz.read(path, ("about", "lengths", "tokens", "logprobs"))
        found_format = _Header.model_validate_json(text.tobytes()).format
        if found_format != FORMAT:
            raise UserError(f"{path}: rollouts of format {found_format}, expected {FORMAT}. Sample them again")
        record = _StepRecord.model_validate_json(text.tobytes())
        _check(record, lengths, tokens, logprobs)
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist. `pctrain rl --debug-rollout-only` writes such a file into RUN/rollouts"
        ) from None
    except ValueError as error:
        raise UserError(
            f"{path} holds no rollouts of a step ({_reason(error)}). "
            "`pctrain rl --debug-rollout-only` writes such a file"
        ) from None
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    sampled = Sampled(
        rounds=record.rounds, rollout_seconds=record.rollout_seconds, reward_seconds=record.reward_seconds
    )
    first = 0  # number of the group's first completion
    for stored in record.groups:
        completions = [
            _completion(
                finish, tokens[bounds[number] : bounds[number + 1]], logprobs[bounds[number] : bounds[number + 1]]
            )
            for number, finish in enumerate(stored.finish, start=first)
        ]
        first += len(completions)
        problem = _problem(path, stored, problems)
        sampled.groups.append(Group(problem, completions, stored.verdicts, stored.prefixes, rejection=stored.why))
    return record.step, sampled, record.prompts.model_dump()


def _completion(finish: Literal["stop", "length"], tokens: np.ndarray, logprobs: np.ndarray) -> Completion:
    has_logprobs = len(logprobs) == len(tokens)
    return Completion(tokens.tolist(), finish, logprobs.tolist() if has_logprobs else None)


def _problem(path: Path, stored: _GroupRecord, problems: list[Problem]) -> Problem:
    if stored.problem < len(problems) and problems[stored.problem].id == stored.id:
        return problems[stored.problem]
    raise UserError(
        f"{path}: its problem {stored.id} is not number {stored.problem} of data.rl. Set data.rl to the set that it "
        "was sampled from"
    )


def _check(record: _StepRecord, lengths: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
    """Raise ValueError if the arrays do not fit each other or the record."""
    npz.check("lengths", lengths, "iu", (None,))
    npz.check("tokens", tokens, "iu", (None,))
    npz.check("logprobs", logprobs, "f", (None,))
    in_range = bool(((lengths >= 0) & (lengths <= len(tokens))).all())
    if not in_range or lengths.sum() != len(tokens) or len(logprobs) not in (0, len(tokens)):
        raise ValueError("its lengths do not add up to its tokens")
    if not all(0 <= verdict.reward <= 1 for group in record.groups for verdict in group.verdicts):
        raise ValueError("a reward is not a number from 0 to 1")
    for group in record.groups:
        if not len(group.finish) == len(group.verdicts) == len(group.prefixes) > 0:
            raise ValueError("a group has different numbers of completions, verdicts and prefixes")
    if sum(len(group.finish) for group in record.groups) != len(lengths):
        raise ValueError("its groups have more or fewer rollouts than it has lengths")


def _reason(error: ValueError) -> str:
    """Return what is wrong with a file in one line; pydantic lists every fault on several lines."""
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'its record'}: {first['msg']}"
