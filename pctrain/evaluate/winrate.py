"""`pctrain data winrate`: how often a model answers each record correctly in k attempts, written into the record.

Every attempt is one sample of the rollout engine at `eval.temperature`, judged against the record's answer. Finished
records are kept one by one in `<out>.partial/progress.jsonl`: a killed process resumes there. The seeds depend on the
record alone, so the result is the same as without a kill.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from typing import IO, Any

import numpy as np

from pctrain.common.errors import UserError
from pctrain.common.progress import progress
from pctrain.config.tree import Config, ResolvedConfig
from pctrain.data.encode import Unusable
from pctrain.data.records import Fault, Record
from pctrain.data.sets.options import CommandCall, WinrateOptions
from pctrain.data.sets.outputs import PROGRESS, Outputs
from pctrain.data.sets.reading import Data, Item
from pctrain.data.sources import list_disk_files
from pctrain.distributed import gpu_environment, parallel
from pctrain.evaluate.resumable import append, batches, refuse_other, requests_a_batch
from pctrain.files import json_file
from pctrain.files.durable import cut_torn_line, fingerprint, json_line, write_atomically
from pctrain.hf.directory import content_digests
from pctrain.reward.boxed import last_boxed
from pctrain.rollout import Completion, sampling_seed
from pctrain.rollout import Request as Sample
from pctrain.rollout.worker import RolloutWorker

COLUMNS = ("win_rate", "attempts", "win_rate_model")


def main(request: CommandCall[WinrateOptions]) -> None:
    """Run `pctrain data winrate`."""
    config = _resolve(request.config)
    gpu_environment.prepare(deterministic=config.model.deterministic)
    parallel.initialize(config.parallel, config.run.seed)
    data = parallel.agree(lambda: Data(request.paths, config.data.fields))
    outputs = parallel.agree(lambda: Outputs(request, data.files, resumable=True) if parallel.rank() == 0 else None)
    with outputs or nullcontext(), RolloutWorker(config) as worker:
        counts = parallel.from_rank_zero(lambda: _count(data))
        done = parallel.from_rank_zero(
            lambda: _begin(_on_rank_zero(outputs).folder / PROGRESS, request.options, config, data)
        )
        _rate(data, request.options.attempts, worker, counts.answered, set(done), outputs)
        parallel.from_rank_zero(lambda: _write(data, request, counts, _on_rank_zero(outputs)))


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


def _on_rank_zero(outputs: Outputs | None) -> Outputs:
    """Return the outputs, which rank 0 alone has."""
    if outputs is None:
        raise RuntimeError("the outputs of a data command are on rank 0 alone")
    return outputs


# ---- the records ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AnswerCounts:
    """Counts of records: `read`; with their `own` answer, with one `boxed` in the trajectory, with `none`."""

    read: int
    own: int
    boxed: int
    none: int

    @property
    def answered(self) -> int:
        """Records that can be judged."""
        return self.own + self.boxed


def _count(data: Data) -> AnswerCounts:
    """Count the records by their answers; everything that can be wrong with them is found before the first attempt."""
    counts: Counter[str] = Counter()
    first_fault = None
    for item in data.items("reading"):
        counts["read"] += 1
        if isinstance(item, Fault):
            first_fault = first_fault or item
            continue
        taken = [column for column in COLUMNS if column in item.value]
        if taken:
            raise UserError(
                f"{item.where}: the record has a column {taken[0]!r} already; rename or remove it: nothing is "
                "overwritten"
            )
        if item.record.answer is not None:
            counts["own"] += 1
        elif answer_of(item.record) is not None:
            counts["boxed"] += 1
        else:
            counts["none"] += 1
    result = AnswerCounts(counts["read"], counts["own"], counts["boxed"], counts["none"])
    data.refuse_empty(result.answered + result.none, first_fault)
    if not result.answered:
        raise UserError(
            f"{', '.join(map(str, data.files))}: no record has an answer to judge by: neither the field "
            rf"{data.fields.answer or 'answer'!r} nor a \boxed{{}} in its trajectory; name the field by "
            "--data.fields.answer"
        )
    return result


def answer_of(record: Record) -> str | None:
    r"""Return the record's answer, or else the content of the last \boxed{} of its trajectory."""
    return record.answer if record.answer is not None else last_boxed(record.trajectory or "") or None


# ---- progress ------------------------------------------------------------------------------------------------------


def _begin(file: Path, options: WinrateOptions, config: ResolvedConfig, data: Data) -> list[int]:
    """Return the places of the records that an earlier start rated.

    Raises:
        UserError: that start sampled something else.
    """
    settings = {
        "inputs": [fingerprint(part) for source in data.files for part in list_disk_files(source)],
        "model": content_digests(config.model.path),
        "attempts": options.attempts,
        "seed": config.run.seed,
        "temperature": config.eval.temperature,
        "max_response": max_response(config),
        "dtype": config.model.dtype,
        "fields": config.data.fields.model_dump(),
        "template": config.data.template,
    }
    if not file.exists():
        write_atomically(file, json_line(settings))
        return []
    cut_torn_line(file)
    before, rates = _read_progress(file)
    refuse_other(before, json.loads(json_line(settings)), file.parent, "attempts")
    return list(rates)


def _read_progress(file: Path) -> tuple[dict[str, Any], dict[int, float | None]]:
    """Return (settings, {place: win rate, or None for a prompt that is too long}) of progress.jsonl."""
    lines = json_file.read_lines(file, "Delete the folder to start over")
    settings, _ = next(lines)
    return settings, {line["place"]: line["win_rate"] for line, _ in lines}


def max_response(config: Config) -> int:
    """Return the longest response of an attempt, in tokens."""
    return config.eval.max_response or config.rollout.max_response


# ---- the attempts --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Task:
    """A record to rate. `prompt_ids` is empty if the prompt leaves no room for the response."""

    place: int
    prompt_ids: list[int]
    answer: str


def _rate(
    data: Data, attempts: int, worker: RolloutWorker, total: int, done: set[int], outputs: Outputs | None
) -> None:
    """Make the attempts at every record that is not done yet, batch by batch. Collective."""
    size = max(1, requests_a_batch(worker.config.rollout) // attempts)
    with (
        progress("win rates", total=total, start=min(total, len(done)), unit="record", rank=parallel.rank()) as bar,
        _open_progress(outputs) as file,
    ):
        ahead, todo = tee(batches(_tasks(data, worker, done), size))
        sampled = _sample(ahead, worker, attempts)
        for batch in todo:
            rates = _judge([task for task in batch if task.prompt_ids], next(sampled), worker)
            if file is not None:
                append(file, ({"place": task.place, "win_rate": rates.get(task.place)} for task in batch))
            bar.advance(len(batch))


def _open_progress(outputs: Outputs | None) -> IO[str] | nullcontext[None]:
    return nullcontext() if outputs is None else open(outputs.folder / PROGRESS, "a", encoding="utf-8")


def _tasks(data: Data, worker: RolloutWorker, done: set[int]) -> Iterator[_Task]:
    """Yield the records with an answer, in order.

    Raises:
        UserError: the template cannot write a prompt.
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


def _sample(batched: Iterator[list[_Task]], worker: RolloutWorker, attempts: int) -> Iterator[list[Completion]]:
    """Yield, for each batch, all attempts at its first task, at its second, ... The first batch starts the engine."""
    config = worker.config

    def requests(batch: Sequence[_Task]) -> list[Sample]:
        return [
            Sample(task.prompt_ids, sampling_seed(config.run.seed, "winrate", 0, task.place, sample))
            for task in batch
            if task.prompt_ids
            for sample in range(attempts)
        ]

    yield from worker.engine.generate_batches(
        map(requests, batched), temperature=config.eval.temperature, max_response=max_response(config)
    )


def _judge(tasks: list[_Task], completions: list[Completion], worker: RolloutWorker) -> dict[int, float]:
    """Return {place: share of correct answers}."""
    if not tasks:
        return {}
    attempts = len(completions) // len(tasks)
    answers = [task.answer for task in tasks for _ in range(attempts)]
    pairs = [(worker.tokenizer.decode(c.token_ids), answer) for c, answer in zip(completions, answers, strict=True)]
    verdicts = parallel.map_over_ranks(worker.verifier.score, pairs)
    rewards = np.array([verdict.reward for verdict in verdicts]).reshape(len(tasks), attempts)
    return {task.place: float(share) for task, share in zip(tasks, rewards.mean(1), strict=True)}


# ---- the result ----------------------------------------------------------------------------------------------------


def _write(data: Data, request: CommandCall[WinrateOptions], counts: AnswerCounts, outputs: Outputs) -> None:
    settings, rates = _read_progress(outputs.folder / PROGRESS)
    levels: Counter[float] = Counter(rate for rate in rates.values() if rate is not None)
    outputs.write(_rated_records(data, rates, request, outputs))
    too_long = sum(rate is None for rate in rates.values())
    figures = {
        "answers": {"own": counts.own, "boxed": counts.boxed, "none": counts.none},
        "prompts_too_long": too_long,
        "model": settings["model"],
        "win_rates": {f"{level:g}": levels[level] for level in sorted(levels)},
    }
    outputs.report(outputs.finish(counts.read, **figures), *_report_rows(counts, too_long, levels))


def _rated_records(
    data: Data, rates: dict[int, float | None], request: CommandCall[WinrateOptions], outputs: Outputs
) -> Iterator[dict[str, Any]]:
    """Yield the records with their win rates; `drop` those that cannot be used."""
    model = str(request.config.model.path)
    for item in data.items("writing"):
        if isinstance(item, Item):
            rate = rates.get(item.place)
            attempts = request.options.attempts if rate is not None else 0
            yield {**item.value, "win_rate": rate, "attempts": attempts, "win_rate_model": model}
        else:
            outputs.drop_unusable(item)


def _report_rows(counts: AnswerCounts, too_long: int, levels: Counter[float]) -> Iterator[tuple[str, str]]:
    rated = max(1, sum(levels.values()))
    yield "answers", f"{counts.own:,} of the records, {counts.boxed:,} from the last box of the trajectory"
    if counts.none:
        yield "win_rate null: no answer", f"{counts.none:,}"
    if too_long:
        yield "win_rate null: prompt too long", f"{too_long:,}"
    for level in sorted(levels):
        yield f"win rate {level:g}", f"{levels[level]:,}  ({100 * levels[level] / rated:.0f}%)"
