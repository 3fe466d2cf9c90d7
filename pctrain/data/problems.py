"""Problems to sample answers for: what RL and evaluation draw from."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from pctrain.config import FieldsConfig
from pctrain.data.encode import Encoder, Unusable
from pctrain.data.sources import read_records
from pctrain.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A prompt and its gold answer. `index` is its place in the file: sampling seeds derive from it.

    `expert_ids`: the tokens of the expert's trajectory, EOS included, where they were asked for: those SFT trains on after this prompt.
    """

    id: str
    index: int
    prompt: str
    prompt_ids: list[int]
    answer: str
    expert_ids: list[int] = field(default_factory=list)


def read_problems(
    path: Path, fields: FieldsConfig, encoder: Encoder, *, room: int, room_name: str, expert: int | None = None
) -> list[Problem]:
    """The problems of a file, glob or folder, with the prompts that SFT trains answers after.

    Args:
        expert: most tokens of an expert's trajectory (the longest response); None: trajectories are not read.
    Raises:
        UserError: a record without prompt or answer (or response, with `expert`), one whose prompt or response the template cannot write,
            or a prompt longer than `room` tokens (what the context leaves for it).
    """
    problems = []
    for index, record in enumerate(read_records(path, fields, need=("answer",) if expert is None else ("answer", "response"))):
        try:
            ids = encoder.prompt_ids(record)
            sample = None if expert is None else encoder.encode(record)
        except Unusable as error:
            raise UserError(f"{record.id}: {error}") from None
        if len(ids) > room:
            raise UserError(f"{record.id}: the prompt has {len(ids)} tokens, more than {room_name} of {room}; shorten or remove it")
        expert_ids = [] if sample is None else sample.tokens[len(ids) :].tolist()
        if sample is not None and (sample.cut or len(expert_ids) > expert):
            more = " or more" if sample.cut else ""
            raise UserError(f"{record.id}: the expert's response has {len(expert_ids)} tokens with EOS{more}; the longest one that is "
                            f"trained on here has rollout.max_response = {expert}: raise it, or shorten or remove the record")
        problems.append(Problem(record.id, index, record.question, ids, record.answer, expert_ids))
    return problems
