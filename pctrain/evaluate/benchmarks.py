r"""Benchmarks as they are published, turned into problems to sample: known by their columns, whatever the case of the names.

| layout | columns | gold answer |
|---|---|---|
| GPQA | Question, Correct Answer, Incorrect Answer 1 to 3 | the letter of the right choice; their order is made from the record itself |
| ARC | question, choices {text, label}, answerKey | the letter; choices keep their order, labels 1 to 4 become A to D |
| OlympiadBench | question, context or none, final_answer (a list) | the answers, with commas between |
| GSM8K | question, answer with `#### 72` at its end | what follows #### |
| Minerva, AMC, ... | question, answer | the answer |
| MATH, MATH-500, AIME | problem, answer | the answer, a text or a number |
| MATH, Minerva | problem, solution | what the last \boxed{} of the solution holds |
| pctrain's own, RETU's, chats | prompt, answer; extra_info...; messages, answer | the answer |

Anything else is read by `eval.benchmarks.NAME.fields`, or is an error that says what columns there are.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pctrain.common.errors import UserError
from pctrain.config.tree import BenchmarkConfig, Config, FieldsConfig
from pctrain.data.columns import choose_columns, detect_form
from pctrain.data.records import Record, Unreadable, make_record
from pctrain.data.sources import content_hash, iter_raw
from pctrain.reward.boxed import last_boxed

LETTERS = "ABCDEFGHIJ"  # what the verifier `choice` reads
CHOICE_INSTRUCTION = r"Answer with the letter of the right choice in \boxed{}."


@dataclass(frozen=True)
class Question:
    """One problem. `where`: "<path>:<line or row>"; `record`: its id, and the prompt (or chat) with the instruction."""

    where: str
    record: Record
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """`verifier`: of its score; `content`: sha256 of the files."""

    name: str
    samples: int
    verifier: str
    instruction: str | None
    questions: list[Question]
    content: str


class Unknown(ValueError):
    """Why a record is no problem of a benchmark."""


@dataclass(frozen=True)
class _Read:
    prompt: str
    answer: str
    choice: bool = False


def read_benchmarks(config: Config) -> list[Benchmark]:
    """All of `eval.benchmarks`, in the order of the config.

    Raises:
        UserError: there is none; a file is missing or empty; a record is not of a known layout, or has no answer.
    """
    if not config.eval.benchmarks:
        raise UserError(
            "pctrain eval needs eval.benchmarks, such as --eval.benchmarks='{math500: math500.jsonl, aime24: {path: "
            "aime24.parquet, samples: 16}}', or the same in the --config file"
        )
    return [_read_benchmark(name, benchmark, config) for name, benchmark in config.eval.benchmarks.items()]


def _read_benchmark(name: str, benchmark: BenchmarkConfig, config: Config) -> Benchmark:
    found, choices = [], set()
    for where, value in iter_raw(benchmark.path):
        identity = _identity(value, where)
        try:
            if any(benchmark.fields.model_dump().values()):
                record, choice = _by_fields(value, identity, benchmark.fields), False
            else:
                record, choice = _by_layout(value, identity)
        except Unreadable as error:
            raise UserError(f"{where}: {error}") from None
        except Unknown as error:
            raise UserError(f"{where}: eval.benchmarks.{name}: {error}") from None
        found.append((where, record))
        choices.add(choice)
    if not found:
        raise UserError(f"{benchmark.path}: eval.benchmarks.{name} has no record")
    if len(choices) > 1:
        raise UserError(
            f"{benchmark.path}: eval.benchmarks.{name} mixes multiple choice with other problems; make two benchmarks of it"
        )
    is_choice = choices.pop()
    instruction = (
        benchmark.instruction
        if benchmark.instruction is not None
        else (CHOICE_INSTRUCTION if is_choice else config.eval.instruction)
    )
    questions = [Question(where, _instructed(record, instruction, where), record.answer) for where, record in found]
    verifier = benchmark.verifier or ("choice" if is_choice else config.reward.verifier)
    return Benchmark(
        name,
        benchmark.samples or config.eval.samples,
        verifier,
        instruction or None,
        questions,
        content_hash(benchmark.path),
    )


def _identity(value: Mapping[str, Any], where: str) -> str:
    own = {key.lower(): content for key, content in value.items()}
    named = next(
        (
            own[key]
            for key in ("id", "record id", "unique_id")
            if isinstance(own.get(key), (str, int)) and own[key] != ""
        ),
        None,
    )
    return Path(where).name if named is None else str(named)


def _instructed(record: Record, instruction: str | None, where: str) -> Record:
    if not instruction:
        return record
    if record.messages:
        raise UserError(
            f"{where}: a chat takes no instruction: leave eval.instruction out for it (instruction: '' of its benchmark), and "
            "write what it says into the messages"
        )
    return Record(record.id, prompt=f"{record.prompt}\n\n{instruction}", answer=record.answer)


# ---- records ---------------------------------------------------------------------------------------------------------------


def _by_fields(value: dict[str, Any], identity: str, fields: FieldsConfig) -> Record:
    return make_record(value, identity, choose_columns(fields, detect_form(value)), ("answer",))


def _by_layout(value: dict[str, Any], identity: str) -> tuple[Record, bool]:
    """The record, and whether it is multiple choice."""
    columns = {key.lower(): content for key, content in value.items()}
    for names, read in LAYOUTS:
        if all(columns.get(name) is not None for name in names):
            problem = read(columns)
            for name, text in (("problem", problem.prompt), ("answer", problem.answer)):
                if not text.strip():
                    raise Unknown(f"its {name} is empty (columns {', '.join(names)})")
            return Record(identity, prompt=problem.prompt, answer=problem.answer), problem.choice
    form = detect_form(value)
    if form == "plain" and not {"prompt", "answer"} <= value.keys():
        raise Unknown(
            f"no layout is known that has the columns {', '.join(sorted(value)) or 'of nothing'}; known are "
            f"{'; '.join(' + '.join(names) for names, _ in LAYOUTS)}; prompt + answer. Name its columns by "
            "fields: {prompt: ..., answer: ...} of the benchmark"
        )
    return make_record(value, identity, choose_columns(FieldsConfig(), form), ("answer",)), False


def _gpqa(columns: Mapping[str, Any]) -> _Read:
    """The order of the choices is that of their hashes: it depends on this record alone, and is the same in every call."""
    question, right = _text(columns, "question"), _text(columns, "correct answer")
    choices = [right, *(_text(columns, f"incorrect answer {number}") for number in (1, 2, 3))]
    order = sorted(range(4), key=lambda i: hashlib.blake2b(f"{question}\0{i}\0{choices[i]}".encode()).digest())
    return _choice(question, [choices[i] for i in order], order.index(0))


def _arc(columns: Mapping[str, Any]) -> _Read:
    question, choices = columns["question"], columns["choices"]
    if isinstance(choices, Mapping) and {"text", "label"} <= choices.keys():
        texts, labels = list(choices["text"]), [str(label) for label in choices["label"]]
    elif isinstance(choices, list) and all(
        isinstance(item, Mapping) and {"text", "label"} <= item.keys() for item in choices
    ):
        texts, labels = [item["text"] for item in choices], [str(item["label"]) for item in choices]
    else:
        raise Unknown("choices: expected {text: [...], label: [...]}")
    key = str(columns["answerkey"])
    if labels.count(key) != 1 or len(texts) != len(labels) or len(texts) > len(LETTERS):
        raise Unknown(f"answerKey {key!r} is not one of the labels {', '.join(labels)} of {len(texts)} choices")
    if not isinstance(question, str) or not all(isinstance(text, str) for text in texts):
        raise Unknown("question and the text of its choices: expected strings")
    return _choice(question, texts, labels.index(key))


def _choice(question: str, choices: list[str], right: int) -> _Read:
    lines = [f"{letter}) {text.strip()}" for letter, text in zip(LETTERS, choices, strict=False)]
    return _Read("\n".join([question.strip(), "", *lines]), LETTERS[right], choice=True)


_PICTURE = re.compile(r"<(img|image)_\d+>")  # of OlympiadBench: its repository's README, its data set's columns image_N


def _olympiad(columns: Mapping[str, Any]) -> _Read:
    answers = columns["final_answer"]
    answers = answers if isinstance(answers, list) else [answers]
    if not answers:
        raise Unknown("its final_answer is empty: a proof cannot be scored; remove it")
    parts = [_as_text(answer, "final_answer").strip() for answer in answers]
    question = _text(columns, "question")
    if columns.get("context"):  # what several questions of one physics problem have in common
        question = f"{_text(columns, 'context')}\n{question}"
    if _PICTURE.search(question):
        raise Unknown(
            "its question shows a picture, which a language model does not see: take the sets whose name has TO (text only)"
        )
    return _Read(question, parts[0] if len(parts) == 1 else ", ".join(part.strip("$") for part in parts))


def _question(columns: Mapping[str, Any]) -> _Read:
    answer = _text(columns, "answer")
    return _Read(_text(columns, "question"), answer.rpartition("####")[2].strip() if "####" in answer else answer)


def _problem(columns: Mapping[str, Any]) -> _Read:
    return _Read(_text(columns, "problem"), _text(columns, "answer"))


def _solution(columns: Mapping[str, Any]) -> _Read:
    answer = last_boxed(_text(columns, "solution"))
    if answer is None:
        raise Unknown(r"its solution has no \boxed{}, and there is no column answer")
    return _Read(_text(columns, "problem"), answer)


def _text(columns: Mapping[str, Any], name: str) -> str:
    return _as_text(columns[name], name)


def _as_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if (
        isinstance(value, float) and value.is_integer()
    ):  # what a table makes of whole numbers where one of them is missing
        return str(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise Unknown(f"column {name!r}: expected a text or a number, got {value!r:.60}")


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], _Read]], ...] = (
    (("question", "correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3"), _gpqa),
    (("question", "choices", "answerkey"), _arc),
    (("question", "final_answer"), _olympiad),
    (("question", "answer"), _question),
    (("problem", "answer"), _problem),
    (("problem", "solution"), _solution),
)
