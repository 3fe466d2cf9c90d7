"""`pctrain data decontaminate`: records that hold a benchmark's problem, word for word, are dropped.

Prompts are compared as `text.words` (white space, case, punctuation and typesetting do not matter; a paraphrase is another text):

* a benchmark prompt of n words or more is found by any of its n-grams of words;
* a shorter one by the whole of it, where the text around does not go on with its formula (`2+3` is not in `2+3*4`);
* one of fewer than SHORT words only by a question that is equal to it: "2+3=" stands in many a question.

An n-gram that BOILERPLATE of a benchmark's prompts share ("put your final answer within ...") says nothing about a problem: it is not
looked for, and counted. A prompt that has no other n-gram is found by the whole of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.config.tree import FieldsConfig
from pctrain.data.records import Fault, Record
from pctrain.data.sets.options import DecontaminateOptions, Request
from pctrain.data.sets.outputs import Outputs
from pctrain.data.sets.reading import Data
from pctrain.data.sets.text import in_formula, ngram_hashes, word_hashes, words

SHORT = 5
BOILERPLATE, BOILERPLATE_AT_LEAST = 0.1, 3  # share of a benchmark's prompts, and their number


def main(request: Request[DecontaminateOptions]) -> None:
    options, fields = request.options, request.config.data.fields
    data = Data(request.paths, fields)
    benchmarks = [read_benchmark(path, fields, options.n) for path in options.against]
    search = Search(benchmarks, options.n)
    with Outputs(request, [*data.files, *(file for benchmark in benchmarks for file in benchmark.files)]) as outputs:
        counts = Counter()
        outputs.write(_kept(data, search, options, outputs, counts))
        manifest = outputs.finish(counts["read"], benchmarks=[benchmark.summary() for benchmark in benchmarks])
        outputs.report(manifest)
        _print_benchmarks(benchmarks)


@dataclass
class Benchmark:
    """The prompts of one benchmark, as words. `records`: records dropped for it; `found`: which of its prompts they hold."""

    name: str
    files: list[Path]
    ids: list[str]
    prompts: list[list[str]]
    boilerplate: set[int]  # hashes of n-grams not looked for
    records: int
    found: set[int]

    def summary(self) -> dict[str, Any]:
        return {
            "benchmark": self.name,
            "prompts": len(self.prompts),
            "prompts_found": len(self.found),
            "records_dropped": self.records,
            "boilerplate_ngrams": len(self.boilerplate),
        }


def read_benchmark(path: Path, fields: FieldsConfig, n: int) -> Benchmark:
    """Raises UserError where there is no record, or one that cannot be read: it could not be looked for."""
    data = Data([path], fields)
    ids, prompts = [], []
    for item in data.items(f"benchmark {path.name}"):
        if isinstance(item, Fault):
            raise UserError(f"--against={path}: {item}")
        ids.append(item.record.id)
        prompts.append(words(item.record.question))
    data.refuse_empty(len(prompts), None)
    seen = Counter(gram for prompt in prompts for gram in set(ngram_hashes(word_hashes(prompt), n).tolist()))
    limit = max(BOILERPLATE_AT_LEAST, BOILERPLATE * len(prompts))
    return Benchmark(
        str(path), data.files, ids, prompts, {gram for gram, count in seen.items() if count >= limit}, 0, set()
    )


@dataclass(frozen=True)
class Match:
    benchmark: int
    prompt: int
    text: str  # the words that both have


class Search:
    """All prompts of all benchmarks, looked for in one text at a time."""

    def __init__(self, benchmarks: list[Benchmark], n: int):
        self.benchmarks, self.n = benchmarks, n
        grams: dict[int, tuple[int, int]] = {}  # n-gram -> (benchmark, prompt)
        self._whole: dict[int, dict[int, list[tuple[int, int]]]] = {}  # words -> hash of the whole prompt -> prompts
        self._equal: dict[tuple[str, ...], tuple[int, int]] = {}
        for b, benchmark in enumerate(benchmarks):
            for p, prompt in enumerate(benchmark.prompts):
                hashes = word_hashes(prompt)
                own = [gram for gram in ngram_hashes(hashes, n).tolist() if gram not in benchmark.boilerplate]
                for gram in own:
                    grams.setdefault(gram, (b, p))
                if not own and len(prompt) >= SHORT:
                    key = int(ngram_hashes(hashes, len(prompt))[0])
                    self._whole.setdefault(len(prompt), {}).setdefault(key, []).append((b, p))
                elif not own and prompt:
                    self._equal.setdefault(tuple(prompt), (b, p))
        self._grams = np.array(sorted(grams), np.uint64)
        self._owner = grams
        self._wholes = {length: np.array(sorted(keys), np.uint64) for length, keys in self._whole.items()}

    def find(self, text: list[str]) -> Match | None:
        """The first match in the words of a text: by an n-gram, then by a whole prompt."""
        hashes = word_hashes(text)
        for start, gram in _hits(ngram_hashes(hashes, self.n), self._grams):
            shared = text[start : start + self.n]
            b, p = self._owner[gram]
            if _holds(self.benchmarks[b].prompts[p], shared):
                return Match(b, p, " ".join(shared))
        for length, known in self._wholes.items():
            for start, key in _hits(ngram_hashes(hashes, length), known):
                if _goes_on(text, start, length):
                    continue
                for b, p in self._whole[length][key]:
                    if text[start : start + length] == self.benchmarks[b].prompts[p]:
                        return Match(b, p, " ".join(text[start : start + length]))
        return None

    def equal(self, question: list[str]) -> Match | None:
        """The benchmark prompt of fewer than SHORT words that a question is."""
        place = self._equal.get(tuple(question))
        return Match(*place, " ".join(question)) if place is not None else None


def _hits(grams: np.ndarray, known: np.ndarray) -> Iterator[tuple[int, int]]:
    """(index, hash) of those of `grams` that are in `known`, which is sorted."""
    if not len(known) or not len(grams):
        return
    place = np.minimum(np.searchsorted(known, grams), len(known) - 1)
    for index in np.flatnonzero(known[place] == grams).tolist():
        yield index, int(grams[index])


def _holds(prompt: list[str], part: list[str]) -> bool:
    """Whether the words stand in the prompt, in a row: equal hashes are no proof."""
    return any(prompt[start : start + len(part)] == part for start in range(len(prompt) - len(part) + 1))


def _goes_on(text: list[str], start: int, length: int) -> bool:
    """Whether the words around a match belong to its formula, so that the text has another one."""
    first, last = text[start], text[start + length - 1]
    before = text[start - 1] if start else ""
    after = text[start + length] if start + length < len(text) else ""
    return bool(before and in_formula(before) and in_formula(first)) or bool(
        after and in_formula(after) and in_formula(last)
    )


def _kept(
    data: Data, search: Search, options: DecontaminateOptions, outputs: Outputs, counts: Counter
) -> Iterator[dict[str, Any]]:
    for item in data.items("searching"):
        counts["read"] += 1
        if isinstance(item, Fault):
            outputs.drop(item.where, None, f"unusable: {item.cause}", message=item.message)
            continue
        match = _match(item.record, search, options)
        if match is None:
            yield item.value
            continue
        benchmark = search.benchmarks[match.benchmark]
        benchmark.records += 1
        benchmark.found.add(match.prompt)
        outputs.drop(
            item.where,
            item.record.id,
            "contaminated",
            benchmark=benchmark.name,
            prompt=benchmark.ids[match.prompt],
            shared=match.text,
        )


def _match(record: Record, search: Search, options: DecontaminateOptions) -> Match | None:
    question = words(record.question)
    match = search.equal(question) or search.find(question)
    if match is None and options.search == "record" and record.trajectory:
        match = search.find(words(record.trajectory))
    return match


def _print_benchmarks(benchmarks: list[Benchmark]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="benchmarks", title_justify="left")
    for name in ("benchmark", "prompts", "found in the data", "records dropped", "n-grams not looked for"):
        table.add_column(name, justify="left" if name == "benchmark" else "right", overflow="fold")
    for benchmark in benchmarks:
        row = benchmark.summary()
        table.add_row(
            *(
                Text(str(row[key]))
                for key in ("benchmark", "prompts", "prompts_found", "records_dropped", "boilerplate_ngrams")
            )
        )
    make_console().print(table)
