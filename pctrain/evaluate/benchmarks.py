r"""Published benchmarks as problems to sample. A layout is recognized by its columns, in any case of letters.

| layout | columns | gold answer |
|---|---|---|
| GPQA | Question, Correct Answer, Incorrect Answer 1 to 3 | the right choice's letter; the record decides the order |
| ARC | question, choices {text, label}, answerKey | the letter; choices keep their order, labels 1 to 4 become A to D |
| OlympiadBench | question, context or none, final_answer (a list) | the answers, with commas between |
| GSM8K | question, answer with `#### 72` at its end | the text after #### |
| Minerva, AMC, ... | question, answer | the answer |
| MATH, MATH-500, AIME | problem, answer | the answer, a text or a number |
| MATH, Minerva | problem, solution | the content of the solution's last \boxed{} |
| pctrain's own, RETU's, chats | prompt, answer; extra_info...; messages, answer | the answer |

Anything else is read by `eval.benchmarks.NAME.fields`, or is an error that lists the columns.
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
from pctrain.config.tree import BenchmarkConfig, Config, EvalConfig, FieldsConfig
from pctrain.data.columns import choose_columns, detect_form
from pctrain.data.records import Record, Unreadable, make_record
from pctrain.data.sources import content_hash, iter_raw
from pctrain.reward.boxed import last_boxed

LETTERS = "ABCDEFGHIJ"  # what the verifier `choice` reads
CHOICE_INSTRUCTION = r"Answer with the letter of the right choice in \boxed{}."


@dataclass(frozen=True)
class Question:
    """One problem: its place ("<path>:<line or row>"), its record with the instruction, its gold answer."""

    where: str
    record: Record
    answer: str


@dataclass(frozen=True)
class Benchmark:
    """The problems of a benchmark, with the verifier that scores them. `content` is the sha256 of its files."""

    name: str
    samples: int
    verifier: str
    instruction: str | None
    questions: list[Question]
    content: str


class UnknownLayout(ValueError):
    """A record that is not a problem of a benchmark. The message says why."""


@dataclass(frozen=True)
class _Problem:
    """A record in any layout. `is_choice`: multiple choice."""

    record: Record
    answer: str
    is_choice: bool = False


def read_benchmarks(config: Config) -> list[Benchmark]:
    """Read all of `eval.benchmarks`, in the order of the config.

    Raises:
        UserError: there is none, a file is missing or empty, or a record has no known layout or no answer.
    """
    if not config.eval.benchmarks:
        raise UserError(
            "pctrain eval needs eval.benchmarks, such as --eval.benchmarks='{math500: math500.jsonl, aime24: {path: "
            "aime24.parquet, samples: 16}}', or the same in the --config file"
        )
    return [
        _read_benchmark(name, benchmark, config.eval, config.reward.verifier)
        for name, benchmark in config.eval.benchmarks.items()
    ]


def _read_benchmark(name: str, benchmark: BenchmarkConfig, settings: EvalConfig, verifier: str) -> Benchmark:
    """Read one benchmark. `verifier` is the default for problems that are not multiple choice."""
    problems = _read_problems(name, benchmark)
    is_choice = problems[0][1].is_choice
    if any(problem.is_choice != is_choice for _, problem in problems):
        raise UserError(
            f"{benchmark.path}: eval.benchmarks.{name} mixes multiple choice with other problems; "
            "make two benchmarks of it"
        )
    instruction = benchmark.instruction
    if instruction is None:
        instruction = CHOICE_INSTRUCTION if is_choice else settings.instruction
    return Benchmark(
        name,
        benchmark.samples or settings.samples,
        benchmark.verifier or ("choice" if is_choice else verifier),
        instruction or None,
        [Question(where, _with_instruction(p.record, instruction, where), p.answer) for where, p in problems],
        content_hash(benchmark.path),
    )


def _read_problems(name: str, benchmark: BenchmarkConfig) -> list[tuple[str, _Problem]]:
    """Return ("<path>:<line or row>", problem) for every record of a benchmark."""
    problems = []
    for where, value in iter_raw(benchmark.path):
        try:
            problems.append((where, _read_problem(value, _record_id(value, where), benchmark.fields)))
        except Unreadable as error:
            raise UserError(f"{where}: {error}") from None
        except UnknownLayout as error:
            raise UserError(f"{where}: eval.benchmarks.{name}: {error}") from None
    if not problems:
        raise UserError(f"{benchmark.path}: eval.benchmarks.{name} has no record")
    return problems


def _record_id(value: Mapping[str, Any], where: str) -> str:
    """Return the record's own id, or else "<file name>:<line or row>"."""
    columns = {key.lower(): content for key, content in value.items()}
    for key in ("id", "record id", "unique_id"):
        if isinstance(columns.get(key), (str, int)) and columns[key] != "":
            return str(columns[key])
    return Path(where).name


def _with_instruction(record: Record, instruction: str | None, where: str) -> Record:
    """Return a record whose prompt ends with the instruction."""
    if not instruction:
        return record
    if record.messages:
        raise UserError(
            f"{where}: a chat takes no instruction: leave eval.instruction out for it (instruction: '' of its "
            "benchmark), and write the instruction into the messages"
        )
    return Record(record.id, prompt=f"{record.prompt}\n\n{instruction}", answer=record.answer)


# ---- records -------------------------------------------------------------------------------------------------------


def _read_problem(value: dict[str, Any], identity: str, fields: FieldsConfig) -> _Problem:
    """Return the problem of a record, by `fields` if they name a column, else by its layout."""
    if any(fields.model_dump().values()):
        return _own_problem(value, identity, fields)
    columns = {key.lower(): content for key, content in value.items()}
    for names, read in LAYOUTS:
        if all(columns.get(name) is not None for name in names):
            texts = read(columns)
            for name, text in (("problem", texts.prompt), ("answer", texts.answer)):
                if not text.strip():
                    raise UnknownLayout(f"its {name} is empty (columns {', '.join(names)})")
            record = Record(identity, prompt=texts.prompt, answer=texts.answer)
            return _Problem(record, texts.answer, texts.is_choice)
    if detect_form(value) == "plain" and not {"prompt", "answer"} <= value.keys():
        raise UnknownLayout(
            f"no layout is known that has the columns {', '.join(sorted(value)) or 'of nothing'}; known are "
            f"{'; '.join(' + '.join(names) for names, _ in LAYOUTS)}; prompt + answer. Name its columns by "
            "fields: {prompt: ..., answer: ...} of the benchmark"
        )
    return _own_problem(value, identity, FieldsConfig())


def _own_problem(value: dict[str, Any], identity: str, fields: FieldsConfig) -> _Problem:
    """Return the problem of a record in one of pctrain's own forms."""
    record = make_record(value, identity, choose_columns(fields, detect_form(value)), ("answer",))
    return _Problem(record, record.required("answer"))


@dataclass(frozen=True)
class _Texts:
    """The prompt and the gold answer that a layout gives."""

    prompt: str
    answer: str
    is_choice: bool = False


def _gpqa(columns: Mapping[str, Any]) -> _Texts:
    """Order the choices by their hashes: the order depends on this record alone, and is the same in every call."""
    question, right = _text(columns, "question"), _text(columns, "correct answer")
    choices = [right, *(_text(columns, f"incorrect answer {number}") for number in (1, 2, 3))]
    order = sorted(range(4), key=lambda i: hashlib.blake2b(f"{question}\0{i}\0{choices[i]}".encode()).digest())
    return _choice(question, [choices[i] for i in order], order.index(0))


def _arc(columns: Mapping[str, Any]) -> _Texts:
    question, (texts, labels) = columns["question"], _labelled_choices(columns["choices"])
    key = str(columns["answerkey"])
    if labels.count(key) != 1 or len(texts) != len(labels) or len(texts) > len(LETTERS):
        raise UnknownLayout(f"answerKey {key!r} is not one of the labels {', '.join(labels)} of {len(texts)} choices")
    if not isinstance(question, str) or not all(isinstance(text, str) for text in texts):
        raise UnknownLayout("question and the text of its choices: expected strings")
    return _choice(question, texts, labels.index(key))


def _labelled_choices(choices: Any) -> tuple[list[Any], list[str]]:
    """Return (texts, labels) of ARC's choices: one object of two lists, or a list of objects."""

    def has_both(item: object) -> bool:
        return isinstance(item, Mapping) and {"text", "label"} <= item.keys()

    if has_both(choices):
        return list(choices["text"]), [str(label) for label in choices["label"]]
    if isinstance(choices, list) and all(map(has_both, choices)):
        return [item["text"] for item in choices], [str(item["label"]) for item in choices]
    raise UnknownLayout("choices: expected {text: [...], label: [...]}")


def _choice(question: str, choices: list[str], right: int) -> _Texts:
    lines = [f"{letter}) {text.strip()}" for letter, text in zip(LETTERS, choices, strict=False)]
    return _Texts("\n".join([question.strip(), "", *lines]), LETTERS[right], is_choice=True)


# OlympiadBench marks pictures so, in its repository's README and in its data set's columns image_N.
_PICTURE = re.compile(r"<(img|image)_\d+>")


def _olympiad(columns: Mapping[str, Any]) -> _Texts:
    answers = columns["final_answer"]
    answers = answers if isinstance(answers, list) else [answers]
    if not answers:
        raise UnknownLayout("its final_answer is empty: a proof cannot be scored; remove it")
    parts = [_as_text(answer, "final_answer").strip() for answer in answers]
    question = _text(columns, "question")
    if columns.get("context"):  # shared by several questions of one physics problem
        question = f"{_text(columns, 'context')}\n{question}"
    if _PICTURE.search(question):
        raise UnknownLayout(
            "its question shows a picture, which a language model does not see: take the sets whose name has TO "
            "(text only)"
        )
    return _Texts(question, parts[0] if len(parts) == 1 else ", ".join(part.strip("$") for part in parts))


def _question(columns: Mapping[str, Any]) -> _Texts:
    answer = _text(columns, "answer")
    if "####" in answer:  # GSM8K
        answer = answer.rpartition("####")[2].strip()
    return _Texts(_text(columns, "question"), answer)


def _problem(columns: Mapping[str, Any]) -> _Texts:
    return _Texts(_text(columns, "problem"), _text(columns, "answer"))


def _solution(columns: Mapping[str, Any]) -> _Texts:
    answer = last_boxed(_text(columns, "solution"))
    if answer is None:
        raise UnknownLayout(r"its solution has no \boxed{}, and there is no column answer")
    return _Texts(_text(columns, "problem"), answer)


def _text(columns: Mapping[str, Any], name: str) -> str:
    return _as_text(columns[name], name)


def _as_text(value: Any, name: str) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, float) and value.is_integer():  # a table with a missing value turns whole numbers into floats
        return str(int(value))
    if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
        return str(value)
    raise UnknownLayout(f"column {name!r}: expected a text or a number, got {value!r:.60}")


LAYOUTS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], _Texts]], ...] = (
    (("question", "correct answer", "incorrect answer 1", "incorrect answer 2", "incorrect answer 3"), _gpqa),
    (("question", "choices", "answerkey"), _arc),
    (("question", "final_answer"), _olympiad),
    (("question", "answer"), _question),
    (("problem", "answer"), _problem),
    (("problem", "solution"), _solution),
)
