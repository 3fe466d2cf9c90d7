"""`pctrain data winrate`: how often a model answers each record rightly, in k attempts; written beside the record.

Every attempt is one sample of the rollout engine at `eval.temperature`, judged against the record's answer. What is done is kept record
by record in `<out>.partial/progress.jsonl`: a killed process goes on from there, and the seeds depend on the record alone, so the result
is that of a process that nobody killed.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.common.errors import UserError
from pctrain.common.progress import progress
from pctrain.config.tree import Config, ResolvedConfig
from pctrain.data.encode import Unusable
from pctrain.data.records import Fault, Record
from pctrain.data.sets.options import Request, WinrateOptions
from pctrain.data.sets.outputs import PROGRESS, Outputs
from pctrain.data.sets.reading import Data, Item
from pctrain.data.sources import list_disk_files
from pctrain.distributed import parallel
from pctrain.evaluate.resumable import append, batches, refuse_other, requests_a_batch
from pctrain.files.durable import cut_torn_line, fingerprint, json_line, write_beside
from pctrain.hf.directory import content_digests
from pctrain.reward.boxed import last_boxed
from pctrain.rollout import Completion, sampling_seed
from pctrain.rollout import Request as Sample
from pctrain.rollout.worker import RolloutWorker

COLUMNS = ("win_rate", "attempts", "win_rate_model")


def main(request: Request[WinrateOptions]) -> None:
    config = _resolve(request.config)
    parallel.initialize(config.parallel, config.run.seed)
    data = parallel.agree(lambda: Data(request.paths, config.data.fields))
    outputs = parallel.agree(lambda: Outputs(request, data.files, resumable=True) if parallel.rank() == 0 else None)
    with outputs or nullcontext(), RolloutWorker(config) as worker:
        survey = parallel.from_rank_zero(lambda: _survey(data))
        done = parallel.from_rank_zero(lambda: _begin(outputs.folder / PROGRESS, request.options, config, data))
        _rate(data, request, worker, survey, done, outputs)
        parallel.from_rank_zero(lambda: _write(data, request, survey, outputs))


def _resolve(config: Config) -> ResolvedConfig:
    if config.model.path is None:
        raise UserError(
            "pctrain data winrate needs --model.path=HF, the Hugging Face directory of the model that answers"
        )
    if config.model.checkpoint is not None:
        raise UserError(
            f"model.checkpoint = {config.model.checkpoint}: the attempts are sampled from a Hugging Face directory; "
            "make one by `pctrain convert mcore-to-hf` and give it as model.path"
        )
    return config.with_model(config.model.path)


# ---- what there is to do ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Survey:
    """Counts of the records: `answers` own ones, `boxed` taken from the trajectory, `unanswered` without any."""

    read: int
    answers: int
    boxed: int
    unanswered: int


def _survey(data: Data) -> Survey:
    """Everything that can be wrong with the records, before the first attempt."""
    counts: Counter[str] = Counter()
    fault = None
    for item in data.items("reading"):
        counts["read"] += 1
        if isinstance(item, Fault):
            fault = fault or item
            continue
        there = [column for column in COLUMNS if column in item.value]
        if there:
            raise UserError(
                f"{item.where}: the record has a column {there[0]!r} already; rename or remove it, nothing is written over"
            )
        counts[
            "answers"
            if item.record.answer is not None
            else "boxed"
            if answer_of(item.record) is not None
            else "unanswered"
        ] += 1
    data.refuse_empty(counts["answers"] + counts["boxed"] + counts["unanswered"], fault)
    if not counts["answers"] + counts["boxed"]:
        raise UserError(
            f"{', '.join(map(str, data.files))}: no record has an answer to judge by: neither the field "
            rf"{data.fields.answer or 'answer'!r} nor a \boxed{{}} in its trajectory; name the field by --data.fields.answer"
        )
    return Survey(counts["read"], counts["answers"], counts["boxed"], counts["unanswered"])


def answer_of(record: Record) -> str | None:
    r"""The record's answer, or else what the last \boxed{} of its trajectory holds."""
    return record.answer if record.answer is not None else last_boxed(record.trajectory or "") or None


# ---- progress --------------------------------------------------------------------------------------------------------------


def _begin(file: Path, options: WinrateOptions, config: ResolvedConfig, data: Data) -> np.ndarray:
    """int64, the places that an earlier start rated. UserError where that start sampled something else."""
    about = json.loads(
        json_line(
            {
                "inputs": [fingerprint(part) for file in data.files for part in list_disk_files(file)],
                "model": content_digests(config.model.path),
                "attempts": options.attempts,
                "seed": config.run.seed,
                "temperature": config.eval.temperature,
                "max_response": max_response(config),
                "dtype": config.model.dtype,
                "fields": config.data.fields.model_dump(),
                "template": config.data.template,
            }
        )
    )
    if not file.exists():
        write_beside(file, json_line(about))
        return np.empty(0, np.int64)
    cut_torn_line(file)
    with open(file, encoding="utf-8") as stream:
        refuse_other(json.loads(stream.readline()), about, file.parent, "attempts")
        return np.array([json.loads(line)["place"] for line in stream], np.int64)


def max_response(config: Config) -> int:
    return config.eval.max_response or config.rollout.max_response


# ---- the attempts ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    place: int
    prompt_ids: list[int]
    answer: str


def _rate(
    data: Data,
    request: Request[WinrateOptions],
    worker: RolloutWorker,
    survey: Survey,
    done: np.ndarray,
    outputs: Outputs | None,
) -> None:
    """Collective: attempts at every record that is not done yet, a batch at a time."""
    config, attempts = request.config, request.options.attempts
    size = max(1, requests_a_batch(config.rollout) // attempts)
    todo = survey.answers + survey.boxed
    with (
        progress("win rates", total=todo, start=min(todo, len(done)), unit="record", rank=parallel.rank()) as bar,
        open(outputs.folder / PROGRESS, "a", encoding="utf-8") if outputs else nullcontext() as file,
    ):
        ahead, todo = tee(batches(_tasks(data, worker, set(done.tolist())), size))
        sampled = _sampled(ahead, worker, config, attempts)
        for batch in todo:
            rates = _judged([task for task in batch if task.prompt_ids], next(sampled), worker)
            if file is not None:
                append(file, ({"place": task.place, "win_rate": rates.get(task.place)} for task in batch))
            bar.advance(len(batch))


def _tasks(data: Data, worker: RolloutWorker, done: set[int]) -> Iterator[_Task]:
    """The records with an answer, in order. One whose prompt leaves no room for the response has no prompt ids.

    Raises:
        UserError: a prompt that the template cannot write.
    """
    room = worker.context - max_response(worker.config)
    for item in data.usable(None):
        answer = answer_of(item.record)
        if item.place not in done and answer is not None:
            try:
                prompt_ids = worker.encoder.prompt_ids(item.record)
            except Unusable as error:
                raise UserError(f"{item.where}: {error}") from None
            yield _Task(item.place, prompt_ids if len(prompt_ids) <= room else [], answer)


def _sampled(
    batches: Iterator[list[_Task]], worker: RolloutWorker, config: Config, attempts: int
) -> Iterator[list[Completion]]:
    """Of each batch: all attempts at its first task, at its second, ... The engine starts with the first batch that is asked for."""
    yield from worker.engine.generate_batches(
        (
            [
                Sample(task.prompt_ids, sampling_seed(config.run.seed, "winrate", 0, task.place, sample))
                for task in batch
                if task.prompt_ids
                for sample in range(attempts)
            ]
            for batch in batches
        ),
        temperature=config.eval.temperature,
        max_response=max_response(config),
    )


def _judged(tasks: list[_Task], completions: list[Completion], worker: RolloutWorker) -> dict[int, float]:
    """{place: share of right answers}."""
    if not tasks:
        return {}
    attempts = len(completions) // len(tasks)
    answers = [task.answer for task in tasks for _ in range(attempts)]
    pairs = [(worker.tokenizer.decode(c.token_ids), answer) for c, answer in zip(completions, answers, strict=True)]
    right = np.array([v.reward for v in parallel.map_over_ranks(worker.verifier.score, pairs)]).reshape(
        len(tasks), attempts
    )
    return {task.place: float(share) for task, share in zip(tasks, right.mean(1), strict=True)}


# ---- the result ------------------------------------------------------------------------------------------------------------


def _write(data: Data, request: Request[WinrateOptions], survey: Survey, outputs: Outputs) -> None:
    with open(outputs.folder / PROGRESS, encoding="utf-8") as stream:
        about, lines = json.loads(stream.readline()), map(json.loads, stream)
        rates = {line["place"]: line["win_rate"] for line in lines}
    levels: Counter[float] = Counter(rate for rate in rates.values() if rate is not None)
    outputs.write(_rated(data, rates, request, outputs))
    too_long = sum(rate is None for rate in rates.values())
    figures = {
        "answers": {"own": survey.answers, "boxed": survey.boxed, "none": survey.unanswered},
        "prompts_too_long": too_long,
        "model": about["model"],
        "win_rates": {f"{level:g}": levels[level] for level in sorted(levels)},
    }
    outputs.report(outputs.finish(survey.read, **figures), *_rows(survey, too_long, levels))


def _rated(
    data: Data, rates: dict[int, float | None], request: Request[WinrateOptions], outputs: Outputs
) -> Iterator[dict[str, Any]]:
    model = str(request.config.model.path)
    for item in data.items("writing"):
        if isinstance(item, Item):
            rate = rates.get(item.place)
            yield {
                **item.value,
                "win_rate": rate,
                "attempts": request.options.attempts if rate is not None else 0,
                "win_rate_model": model,
            }
        else:
            outputs.drop(item.where, None, f"unusable: {item.cause}", message=item.message)


def _rows(survey: Survey, too_long: int, levels: Counter[float]) -> Iterator[tuple[str, str]]:
    rated = max(1, sum(levels.values()))
    yield "answers", f"{survey.answers:,} of the records, {survey.boxed:,} from the last box of the trajectory"
    if survey.unanswered:
        yield "win_rate null: no answer", f"{survey.unanswered:,}"
    if too_long:
        yield "win_rate null: prompt too long", f"{too_long:,}"
    for level in sorted(levels):
        yield f"win rate {level:g}", f"{levels[level]:,}  ({100 * levels[level] / rated:.0f} %)"
