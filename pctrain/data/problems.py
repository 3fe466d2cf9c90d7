"""Problems to sample answers for: what RL and evaluation draw from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig
from pctrain.data.encode import Encoder, Unusable
from pctrain.data.records import Record
from pctrain.data.sources import read_records


@dataclass(frozen=True)
class Problem:
    """A prompt and its gold answer. `index` is its place among those that were read: sampling seeds derive from it.

    `expert_ids`: the tokens of the expert's trajectory, EOS included, where they were asked for: those SFT trains on after this prompt.
    """

    id: str
    index: int
    prompt: str
    prompt_ids: list[int]
    answer: str
    expert_ids: list[int] = field(default_factory=list)


def read_problems(
    path: Path,
    fields: FieldsConfig,
    encoder: Encoder,
    *,
    room: int,
    room_name: str,
    expert: int | None = None,
    left_out: list[str] | None = None,
) -> list[Problem]:
    """The problems of a file, glob or folder, with the prompts that SFT trains answers after.

    Args:
        room: most tokens of a prompt; room_name: what sets them, for the message.
        expert: most tokens of an expert's trajectory (the longest response); None: trajectories are not read.
        left_out: gets what is wrong with the records that are too long, which are then no error.
    Raises:
        UserError: a record without prompt or answer (or response, with `expert`), one whose prompt or response the template cannot write,
            one that is too long, or nothing but those.
    """
    problems = []
    for record in read_records(path, fields, need=("answer",) if expert is None else ("answer", "response")):
        try:
            ids = encoder.prompt_ids(record)
            if len(ids) > room:
                raise Unusable(
                    "overlong",
                    f"the prompt has {len(ids)} tokens, more than {room_name} of {room}; shorten or remove it",
                )
            expert_ids = [] if expert is None else _expert_ids(record, len(ids), encoder, expert)
        except Unusable as error:
            if left_out is None or error.cause != "overlong":
                raise UserError(f"{record.id}: {error}") from None
            left_out.append(f"{record.id}: {error}")
        else:
            problems.append(Problem(record.id, len(problems), record.question, ids, record.answer, expert_ids))
    if not problems:
        raise UserError(f"{path}: every problem is too long, the last one too: {left_out[-1]}")
    return problems


def _expert_ids(record: Record, prompt: int, encoder: Encoder, longest: int) -> list[int]:
    """Of a record whose prompt has `prompt` tokens."""
    sample = encoder.encode(record)
    ids = sample.tokens[prompt:].tolist()
    if sample.cut or len(ids) > longest:
        more = " or more" if sample.cut else ""
        raise Unusable(
            "overlong",
            f"the expert's response has {len(ids)} tokens with EOS{more}; the longest one that is trained on here "
            f"has rollout.max_response = {longest}: raise it, or shorten or remove the record",
        )
    return ids
