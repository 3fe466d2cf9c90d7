"""Samples of a model on a benchmark, each with the verdicts of two verifiers, kept one by one in `samples.jsonl`.

While it grows it is `samples.jsonl.partial`; it gets its name when it is whole. Beside it `settings.json` says what decides its bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice, tee
from pathlib import Path
from typing import Any

from pctrain.common.errors import ToBeContinued, UserError
from pctrain.common.progress import Bar
from pctrain.config.tree import Config, RewardConfig
from pctrain.core import session
from pctrain.data.encode import Encoder, Unusable
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.evaluate.benchmarks import Benchmark, Question
from pctrain.evaluate.resumable import append, batches, refuse_other, requests_a_batch
from pctrain.files.durable import cut_torn_line, json_line, write_beside
from pctrain.reward import Verdict, VerifierPool
from pctrain.rollout import Request, RolloutEngine, sampling_seed

SAMPLES, SETTINGS = "samples.jsonl", "settings.json"


@dataclass(frozen=True)
class Prompts:
    """A benchmark as one model reads it: `ids[i]`, the tokens of question i."""

    benchmark: Benchmark
    ids: list[list[int]]

    @property
    def samples(self) -> int:
        return len(self.ids) * self.benchmark.samples


def encode(benchmark: Benchmark, encoder: Encoder, context: int) -> Prompts:
    """UserError where a prompt cannot be written by the model's chat template, or leaves the context no room for an answer."""
    ids = []
    for question in benchmark.questions:
        try:
            tokens = encoder.prompt_ids(question.record)
        except Unusable as error:
            raise UserError(f"{question.where}: {error}") from None
        if len(tokens) >= context:
            raise UserError(
                f"{question.where}: the problem has {len(tokens)} tokens, which leaves no room for an answer in the model's "
                f"context of {context}; remove it from eval.benchmarks.{benchmark.name}, for all models that are compared"
            )
        ids.append(tokens)
    return Prompts(benchmark, ids)


class Verifiers:
    """A pool of worker processes for each verifier, made when it is first asked for. A context manager."""

    def __init__(self, config: RewardConfig):
        self._config = config
        self._pools: dict[str, VerifierPool] = {}

    def start(self, key: str, verifier: str) -> None:
        """UserError that names the key, where it is a function of the user's that cannot be imported."""
        try:
            self.pool(verifier)
        except UserError as error:
            raise UserError(str(error).replace("reward.verifier", key, 1)) from None

    def pool(self, verifier: str) -> VerifierPool:
        if verifier not in self._pools:
            levenshtein = self._config.levenshtein and verifier == self._config.verifier
            self._pools[verifier] = VerifierPool(
                self._config.model_copy(update={"verifier": verifier, "levenshtein": levenshtein})
            )
        return self._pools[verifier]

    def score(self, verifier: str, pairs: list[tuple[str, ...]]) -> list[Verdict]:
        """Collective. A verdict for each (response, answer), or for a judge (response, answer, prompt); the ranks share them out."""
        return parallel.map_over_ranks(self.pool(verifier).score, pairs)

    def both(self, verifier: str, pairs: list[tuple[str, str]]) -> tuple[list[Verdict], list[Verdict]]:
        """Collective. Of the benchmark's verifier and of the lenient one, which is not asked about what strict has found right: it begins
        with strict."""
        strict = self.score(verifier, pairs)
        asked = [not (verifier == "strict" and verdict.cause == "right") for verdict in strict]
        lenient = iter(self.score("lenient", [pair for pair, ask in zip(pairs, asked, strict=True) if ask]))
        return strict, [next(lenient) if ask else verdict for verdict, ask in zip(strict, asked, strict=True)]

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()


class SampleFile:
    """The samples of one model on one benchmark. Rank 0 reads and writes; `done` is known to all."""

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.path = folder, folder / SAMPLES
        self._partial = folder / f"{SAMPLES}.partial"
        self.done: int = parallel.from_rank_zero(lambda: self._begin(settings))

    def _begin(self, settings: dict[str, Any]) -> int:
        """How many samples an earlier start left. UserError where that start sampled otherwise."""
        file = self.folder / SETTINGS
        if not file.exists():
            write_beside(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        refuse_other(
            json.loads(file.read_text(encoding="utf-8")), json.loads(json_line(settings)), self.folder, "samples"
        )
        if self.path.exists():
            return sum(1 for _ in open(self.path, "rb"))
        cut_torn_line(self._partial)
        return sum(1 for _ in open(self._partial, "rb")) if self._partial.exists() else 0

    @property
    def complete(self) -> bool:
        """On every rank; rank 0 alone gives the file its name."""
        return parallel.from_rank_zero(self.path.exists)

    def fill(self, lines: Iterator[list[dict[str, Any]]], bar: Bar) -> None:
        """Collective. Appends batch after batch; the file has its name afterwards."""
        with open(self._partial, "a", encoding="utf-8") if parallel.rank() == 0 else nullcontext() as stream:
            for batch in lines:
                if stream is not None:
                    append(stream, batch)
                self.done += len(batch)
                bar.advance(len(batch))
                if session.asked_to_stop():
                    raise ToBeContinued(
                        f"to be continued: {self.folder} was asked to stop and has {self.done} samples; the same command "
                        "goes on from there"
                    )
        parallel.from_rank_zero(lambda: os.replace(self._partial, self.path))


def draw(
    prompts: Prompts,
    done: int,
    engine: RolloutEngine | None,
    verifiers: Verifiers,
    decode: Callable[[Sequence[int]], str],
    config: Config,
    max_response: int,
) -> Iterator[list[dict[str, Any]]]:
    """Collective. The lines of `samples.jsonl` from number `done` on, in batches. engine: None where all are done.

    The seeds are those of the scores in training: they depend on run.seed, the place in the benchmark and the sample, not on the model.
    """
    benchmark = prompts.benchmark
    if engine is None:
        return
    every = ((index, sample) for index in range(len(prompts.ids)) for sample in range(benchmark.samples))
    asked = (
        ((index, sample), Request(prompts.ids[index], sampling_seed(config.run.seed, "eval", 0, index, sample)))
        for index, sample in islice(every, done, None)
    )
    ahead, todo = tee(batches(asked, requests_a_batch(config.rollout)))
    sampled = engine.generate_batches(
        ([request for _, request in batch] for batch in ahead),
        temperature=config.eval.temperature,
        top_p=config.eval.top_p,
        max_response=max_response,
    )
    for batch in todo:
        with watchdog.phase("evaluation"):
            completions = next(sampled)
        questions = [benchmark.questions[index] for (index, _), _ in batch]
        responses = [decode(completion.token_ids) for completion in completions]
        pairs = [(response, question.answer) for response, question in zip(responses, questions, strict=True)]
        with watchdog.phase("reward"):
            verdicts = verifiers.both(benchmark.verifier, pairs)
        yield [
            _line(question, place, request.seed, response, completion, strict, lenient)
            for question, (place, request), response, completion, strict, lenient in zip(
                questions, batch, responses, completions, *verdicts, strict=True
            )
        ]


def _line(
    question: Question, place: tuple[int, int], seed: int, response: str, completion, strict: Verdict, lenient: Verdict
) -> dict:
    return {
        "id": question.record.id,
        "index": place[0],
        "sample": place[1],
        "prompt": question.record.question,
        "response": response,
        "answer": question.answer,
        "strict": verdict_of(strict),
        "lenient": verdict_of(lenient),
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
        "seed": seed,
    }


def verdict_of(verdict: Verdict) -> dict[str, Any]:
    """Reward and cause; what a fault says where there is one."""
    return {key: value for key, value in asdict(verdict).items() if value != ""}


def read(path: Path) -> Iterator[dict[str, Any]]:
    with open(path, encoding="utf-8") as stream:
        yield from map(json.loads, stream)
