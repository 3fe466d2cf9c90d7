"""Problems to sample answers for: what RL and evaluation draw from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pctrain.config import FieldsConfig
from pctrain.data.sources import read_records
from pctrain.data.tokenizer import Tokenizer
from pctrain.errors import UserError


@dataclass(frozen=True)
class Problem:
    """A prompt and its gold answer. `index` is its place in the file: sampling seeds derive from it."""

    id: str
    index: int
    prompt: str
    prompt_ids: list[int]
    answer: str


def read_problems(path: Path, fields: FieldsConfig, tokenizer: Tokenizer, *, room: int, room_name: str) -> list[Problem]:
    """Problems of a file, glob or folder; of a chat the turns before its answer.

    Raises:
        UserError: a record without a prompt or an answer, or a prompt longer than `room` tokens (what the context leaves for it).
    """
    records = read_records(path, fields, need=("prompt", "answer"))
    problems = []
    for index, (record, ids) in enumerate(zip(records, tokenizer.encode_all([r.question for r in records]), strict=True)):
        if len(ids) > room:
            raise UserError(f"{record.id}: the prompt has {len(ids)} tokens, more than {room_name} of {room}; shorten or remove it")
        problems.append(Problem(record.id, index, record.question, list(ids), record.answer))
    return problems
