"""Problems to sample answers for: what RL and evaluation draw from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pctrain.config import FieldsConfig
from pctrain.data.encode import Encoder, Unusable
from pctrain.data.sources import read_records
from pctrain.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A prompt and its gold answer. `index` is its place in the file: sampling seeds derive from it."""

    id: str
    index: int
    prompt: str
    prompt_ids: list[int]
    answer: str


def read_problems(path: Path, fields: FieldsConfig, encoder: Encoder, *, room: int, room_name: str) -> list[Problem]:
    """The problems of a file, glob or folder, with the prompts that SFT trains answers after.

    Raises:
        UserError: a record without prompt or answer, one whose prompt the template cannot write, or a prompt longer than `room` tokens
            (what the context leaves for it).
    """
    problems = []
    for index, record in enumerate(read_records(path, fields, need=("answer",))):
        try:
            ids = encoder.prompt_ids(record)
        except Unusable as error:
            raise UserError(f"{record.id}: {error}") from None
        if len(ids) > room:
            raise UserError(f"{record.id}: the prompt has {len(ids)} tokens, more than {room_name} of {room}; shorten or remove it")
        problems.append(Problem(record.id, index, record.question, ids, record.answer))
    return problems
