"""Samples of a model on a benchmark, each with the verdicts of two verifiers, kept one by one in `samples.jsonl`.

While the file grows its name is `samples.jsonl.partial`. `settings.json` next to it has everything that decides its
bytes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice, tee
from pathlib import Path
from typing import IO, Any

from pctrain.common.errors import ToBeContinued, UserError
from pctrain.common.progress import Bar
from pctrain.config.tree import Config, RewardConfig
from pctrain.core import session
from pctrain.data.encode import Encoder, Unusable
from pctrain.distributed import parallel
from pctrain.distributed.health import watchdog
from pctrain.evaluate.benchmarks import Benchmark, Question
from pctrain.evaluate.resumable import append, batches, refuse_other, requests_a_batch
from pctrain.files import json_file
from pctrain.files.durable import cut_torn_line, json_line, write_atomically
from pctrain.reward import Verdict, VerifierPool
from pctrain.rollout import Request, RolloutEngine, sampling_seed
from pctrain.rollout.queue import Completion

SAMPLES, SETTINGS = "samples.jsonl", "settings.json"
_ADVICE = "Delete the folder to sample again"


@dataclass(frozen=True)
class Prompts:
    """A benchmark as one model reads it: `ids[i]` are the tokens of question i."""

    benchmark: Benchmark
    ids: list[list[int]]

    @property
    def samples(self) -> int:
        """Number of samples over all questions."""
        return len(self.ids) * self.benchmark.samples


def encode(benchmark: Benchmark, encoder: Encoder, context: int) -> Prompts:
    """Encode the questions of a benchmark for a model.

    Raises:
        UserError: the model's chat template cannot write a prompt, or a prompt leaves the context no room for an
        answer.
    """
    ids = []
    for question in benchmark.questions:
        try:
            tokens = encoder.prompt_ids(question.record)
        except Unusable as error:
            raise UserError(f"{question.where}: {error}") from None
        if len(tokens) >= context:
            raise UserError(
                f"{question.where}: the problem has {len(tokens)} tokens, which leaves no room for an answer in the "
                f"model's context of {context}; remove it from eval.benchmarks.{benchmark.name}, for all models that "
                "are compared"
            )
        ids.append(tokens)
    return Prompts(benchmark, ids)


class Verifiers:
    """Pools of worker processes, one for each verifier, made when it is first asked for. A context manager."""

    def __init__(self, config: RewardConfig) -> None:
        """Make no pool yet."""
        self._config = config
        self._pools: dict[str, VerifierPool] = {}

    def start(self, key: str, verifier: str) -> None:
        """Make the pool of a verifier. Raises UserError that names the config key if it cannot be imported."""
        try:
            self.pool(verifier)
        except UserError as error:
            raise UserError(str(error).replace("reward.verifier", key, 1)) from None

    def pool(self, verifier: str) -> VerifierPool:
        """Return the pool of a verifier."""
        if verifier not in self._pools:
            levenshtein = self._config.levenshtein and verifier == self._config.verifier
            self._pools[verifier] = VerifierPool(
                self._config.model_copy(update={"verifier": verifier, "levenshtein": levenshtein})
            )
        return self._pools[verifier]

    def score(self, verifier: str, pairs: Sequence[tuple[str, ...]]) -> list[Verdict]:
        """Return a verdict for each (response, answer), or for a judge (response, answer, prompt). Collective.

        The ranks share the work.
        """
        return parallel.map_over_ranks(self.pool(verifier).score, list(pairs))

    def score_both(self, verifier: str, pairs: Sequence[tuple[str, str]]) -> tuple[list[Verdict], list[Verdict]]:
        """Return the verdicts of the benchmark's verifier and of the lenient one. Collective.

        The lenient verifier begins with `strict`, so it is not asked about answers that `strict` has accepted.
        """
        verdicts = self.score(verifier, pairs)
        open_cases = [not (verifier == "strict" and verdict.cause == "right") for verdict in verdicts]
        asked = [pair for pair, is_open in zip(pairs, open_cases, strict=True) if is_open]
        lenient = iter(self.score("lenient", asked))
        return verdicts, [
            next(lenient) if is_open else verdict for verdict, is_open in zip(verdicts, open_cases, strict=True)
        ]

    def __enter__(self) -> Verifiers:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()


class SampleFile:
    """The samples of one model on one benchmark. Rank 0 reads and writes; every rank knows `done`."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        """Begin the file, or continue an earlier one. Collective. Raises UserError if that one has other settings."""
        self.folder, self.path = folder, folder / SAMPLES
        self._partial = folder / f"{SAMPLES}.partial"
        self.done: int = parallel.from_rank_zero(lambda: self._begin(settings))

    def _begin(self, settings: dict[str, Any]) -> int:
        """Return the number of samples that an earlier start left."""
        file = self.folder / SETTINGS
        if not file.exists():
            write_atomically(file, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        refuse_other(json_file.read_object(file, _ADVICE), json.loads(json_line(settings)), self.folder, "samples")
        if self.path.exists():
            return _count_lines(self.path)
        cut_torn_line(self._partial)
        return _count_lines(self._partial) if self._partial.exists() else 0

    @property
    def complete(self) -> bool:
        """True once all samples are there. Every rank asks; rank 0 alone gives the file its name."""
        return parallel.from_rank_zero(self.path.exists)

    def fill(self, lines: Iterator[list[dict[str, Any]]], bar: Bar) -> None:
        """Append batch after batch, and give the file its final name. Collective."""
        with self._open() as stream:
            for batch in lines:
                if stream is not None:
                    append(stream, batch)
                self.done += len(batch)
                bar.advance(len(batch))
                if session.asked_to_stop():
                    raise ToBeContinued(
                        f"to be continued: {self.folder} was asked to stop and has {self.done} samples; the same "
                        "command resumes there"
                    )
        parallel.from_rank_zero(lambda: os.replace(self._partial, self.path))

    def _open(self) -> IO[str] | nullcontext[None]:
        return open(self._partial, "a", encoding="utf-8") if parallel.rank() == 0 else nullcontext()


def draw(
    prompts: Prompts,
    done: int,
    engine: RolloutEngine,
    verifiers: Verifiers,
    decode: Callable[[Sequence[int]], str],
    config: Config,
    max_response: int,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the lines of `samples.jsonl` from number `done` on, in batches. Collective.

    The seeds are those of the scores in training: they depend on run.seed, the place in the benchmark and the sample,
    and not on the model.
    """
    benchmark = prompts.benchmark
    places = ((index, sample) for index in range(len(prompts.ids)) for sample in range(benchmark.samples))
    requests = (
        ((index, sample), Request(prompts.ids[index], sampling_seed(config.run.seed, "eval", 0, index, sample)))
        for index, sample in islice(places, done, None)
    )
    ahead, todo = tee(batches(requests, requests_a_batch(config.rollout)))
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
            verdicts = verifiers.score_both(benchmark.verifier, pairs)
        yield [
            _line(question, place, request.seed, response, completion, strict, lenient)
            for question, (place, request), response, completion, strict, lenient in zip(
                questions, batch, responses, completions, *verdicts, strict=True
            )
        ]


def _line(
    question: Question,
    place: tuple[int, int],
    seed: int,
    response: str,
    completion: Completion,
    strict: Verdict,
    lenient: Verdict,
) -> dict[str, Any]:
    index, sample = place
    return {
        "id": question.record.id,
        "index": index,
        "sample": sample,
        "prompt": question.record.question,
        "response": response,
        "answer": question.answer,
        "strict": verdict_fields(strict),
        "lenient": verdict_fields(lenient),
        "tokens": len(completion.token_ids),
        "finish": completion.finish,
        "seed": seed,
    }


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict's reward and cause, and the message of a fault if there is one."""
    return {key: value for key, value in asdict(verdict).items() if value != ""}


def read(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of samples.jsonl or disagreements.jsonl. Raises UserError for a malformed line."""
    return (line for line, _ in json_file.read_lines(path, _ADVICE))


def _count_lines(file: Path) -> int:
    with open(file, "rb") as stream:
        return sum(1 for _ in stream)
