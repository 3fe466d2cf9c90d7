"""Problems: the prompts with gold answers that RL and evaluation sample responses for."""

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
    """A prompt and its gold answer.

    `index` is the problem's position among those that were read; sampling seeds derive from it. `expert_ids` are the
    tokens of the expert's trajectory, including EOS, if they were asked for: the tokens that SFT trains on after this
    prompt.
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
    """Read the problems of a file, glob or folder. Prompts are tokenized exactly as for SFT.

    Args:
        path: file, glob, or folder of a Hugging Face data set.
        fields: names the columns.
        encoder: tokenizer and chat template.
        room: the maximum number of prompt tokens.
        room_name: the name of what sets `room`, for messages.
        expert: the maximum number of tokens of an expert's trajectory (the longest response). None does not read
            trajectories.
        left_out: if given, records that are too long are not an error; one message for each is appended to this list.

    Raises:
        UserError: a record has no prompt or answer (or no response, with `expert`), the template cannot write it, it is
            too long, or no record is left.
    """
    problems: list[Problem] = []
    reasons: list[str] = []  # why records were left out
    for record in read_records(path, fields, need=("answer",) if expert is None else ("answer", "response")):
        try:
            ids = encoder.prompt_ids(record)
            if len(ids) > room:
                raise Unusable(
                    "overlong",
                    f"the prompt has {len(ids)} tokens, more than {room_name} of {room}. Shorten or remove it.",
                )
            expert_ids = [] if expert is None else _expert_ids(record, len(ids), encoder, expert)
        except Unusable as error:
            if left_out is None or error.cause != "overlong":
                raise UserError(f"{record.id}: {error}") from None
            reasons.append(f"{record.id}: {error}")
        else:
            answer = record.required("answer")
            problems.append(Problem(record.id, len(problems), record.question, ids, answer, expert_ids))
    if left_out is not None:
        left_out.extend(reasons)
    if not problems:
        raise UserError(f"{path}: every problem is too long, for example {reasons[-1]}")
    return problems


def _expert_ids(record: Record, prompt_length: int, encoder: Encoder, longest: int) -> list[int]:
    """Return the tokens of the expert's response to a prompt of `prompt_length` tokens."""
    sample = encoder.encode(record)
    ids = sample.tokens[prompt_length:].tolist()
    if sample.cut or len(ids) > longest:
        more = " or more" if sample.cut else ""
        raise Unusable(
            "overlong",
            f"the expert's response has {len(ids)} tokens with EOS{more}, more than rollout.max_response = {longest}. "
            "Raise that key, or shorten or remove the record.",
        )
    return ids
