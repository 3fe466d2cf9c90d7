"""`pctrain data decontaminate`: drops records that contain a benchmark's problem word for word.

Prompts are compared as `text.words`: white space, case, punctuation and typesetting do not matter, but a paraphrase is
not detected.

* A benchmark prompt of at least n words matches a text that contains any of its n-grams of words.
* A shorter prompt matches a text that contains all of it, unless the text continues its formula (`2+3` is not in
`2+3*4`).
* A prompt of fewer than SHORT words matches only a question that equals it, because many questions contain "2+3=".

An n-gram that a share BOILERPLATE of a benchmark's prompts have ("put your final answer within ...") says nothing about
a problem. It is not searched for, but counted. A prompt that has no other n-gram matches only as a whole.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console
from pctrain.config.tree import FieldsConfig
from pctrain.data.records import Fault, Record
from pctrain.data.sets.options import CommandCall, DecontaminateOptions
from pctrain.data.sets.outputs import Outputs
from pctrain.data.sets.reading import Data
from pctrain.data.sets.text import in_formula, ngram_hashes, word_hashes, words

SHORT = 5
BOILERPLATE, BOILERPLATE_AT_LEAST = 0.1, 3  # share of a benchmark's prompts, and their minimum number


def main(call: CommandCall[DecontaminateOptions]) -> None:
    """Run the command."""
    options, fields = call.options, call.config.data.fields
    data = Data(call.paths, fields)
    benchmarks = [read_benchmark(path, fields, options.n) for path in options.against]
    search = Search(benchmarks, options.n)
    with Outputs(call, [*data.files, *(file for benchmark in benchmarks for file in benchmark.files)]) as outputs:
        counts: Counter[str] = Counter()
        outputs.write(_keep(data, search, options, outputs, counts))
        manifest = outputs.finish(counts["read"], benchmarks=[benchmark.summary() for benchmark in benchmarks])
        outputs.report(manifest)
        _print_benchmarks(benchmarks)


@dataclass
class BenchmarkText:
    """The prompts of one benchmark, as words, and what was found of it in the data."""

    name: str
    files: list[Path]
    ids: list[str]
    prompts: list[list[str]]
    boilerplate: set[int]  # hashes of n-grams that are not searched for
    records_dropped: int = 0
    prompts_found: set[int] = field(default_factory=set)

    def summary(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return {
            "benchmark": self.name,
            "prompts": len(self.prompts),
            "prompts_found": len(self.prompts_found),
            "records_dropped": self.records_dropped,
            "boilerplate_ngrams": len(self.boilerplate),
        }


def read_benchmark(path: Path, fields: FieldsConfig, n: int) -> BenchmarkText:
    """Read the prompts of a benchmark.

    Raises:
        UserError: there is no record, or a record cannot be read, so it could not be searched for.
    """
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
    boilerplate = {gram for gram, count in seen.items() if count >= limit}
    return BenchmarkText(str(path), data.files, ids, prompts, boilerplate)


@dataclass(frozen=True)
class Match:
    """A benchmark's prompt that a text contains."""

    benchmark: int
    prompt: int
    text: str  # the words that both have


PromptPlace = tuple[int, int]  # a prompt: the number of its benchmark, and its number there


class Search:
    """A search for all prompts of all benchmarks in one text at a time."""

    def __init__(self, benchmarks: list[BenchmarkText], n: int):
        self.benchmarks, self.n = benchmarks, n
        self._by_gram: dict[int, PromptPlace] = {}
        self._by_whole: dict[
            int, dict[int, list[PromptPlace]]
        ] = {}  # number of words -> hash of the whole prompt -> prompts
        self._by_words: dict[tuple[str, ...], PromptPlace] = {}
        for b, benchmark in enumerate(benchmarks):
            for p, prompt in enumerate(benchmark.prompts):
                self._add((b, p), prompt, benchmark.boilerplate)
        self._grams = np.array(sorted(self._by_gram), np.uint64)
        self._wholes = {length: np.array(sorted(keys), np.uint64) for length, keys in self._by_whole.items()}

    def _add(self, place: PromptPlace, prompt: list[str], boilerplate: set[int]) -> None:
        hashes = word_hashes(prompt)
        grams = [gram for gram in ngram_hashes(hashes, self.n).tolist() if gram not in boilerplate]
        for gram in grams:
            self._by_gram.setdefault(gram, place)
        if not grams and len(prompt) >= SHORT:
            key = int(ngram_hashes(hashes, len(prompt))[0])
            self._by_whole.setdefault(len(prompt), {}).setdefault(key, []).append(place)
        elif not grams and prompt:
            self._by_words.setdefault(tuple(prompt), place)

    def find(self, text: list[str]) -> Match | None:
        """Return the first match in the words of a text: by an n-gram, otherwise by a whole prompt."""
        hashes = word_hashes(text)
        for start, gram in _hits(ngram_hashes(hashes, self.n), self._grams):
            shared = text[start : start + self.n]
            b, p = self._by_gram[gram]
            if _contains(self.benchmarks[b].prompts[p], shared):
                return Match(b, p, " ".join(shared))
        for length, known in self._wholes.items():
            for start, key in _hits(ngram_hashes(hashes, length), known):
                if _formula_continues(text, start, length):
                    continue
                for b, p in self._by_whole[length][key]:
                    if text[start : start + length] == self.benchmarks[b].prompts[p]:
                        return Match(b, p, " ".join(text[start : start + length]))
        return None

    def find_equal(self, question: list[str]) -> Match | None:
        """Return the benchmark prompt of fewer than SHORT words that equals a question."""
        place = self._by_words.get(tuple(question))
        return Match(*place, " ".join(question)) if place is not None else None


def _hits(grams: np.ndarray, known: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield (index, hash) of the `grams` that are in `known`, which is sorted."""
    if not len(known) or not len(grams):
        return
    place = np.minimum(np.searchsorted(known, grams), len(known) - 1)
    for index in np.flatnonzero(known[place] == grams).tolist():
        yield index, int(grams[index])


def _contains(prompt: list[str], part: list[str]) -> bool:
    """Return whether the prompt contains the words in a row: equal hashes are no proof."""
    return any(prompt[start : start + len(part)] == part for start in range(len(prompt) - len(part) + 1))


def _formula_continues(text: list[str], start: int, length: int) -> bool:
    """Return whether the words around a match belong to its formula, so that the text has a different formula."""
    first, last = text[start], text[start + length - 1]
    before = text[start - 1] if start else ""
    after = text[start + length] if start + length < len(text) else ""
    if before and in_formula(before) and in_formula(first):
        return True
    return bool(after) and in_formula(after) and in_formula(last)


def _keep(
    data: Data, search: Search, options: DecontaminateOptions, outputs: Outputs, counts: Counter[str]
) -> Iterator[dict[str, Any]]:
    """Yield the records without a match, and drop the others."""
    for item in data.items("searching"):
        counts["read"] += 1
        if isinstance(item, Fault):
            outputs.drop_unusable(item)
            continue
        match = _find_match(item.record, search, options)
        if match is None:
            yield item.value
            continue
        benchmark = search.benchmarks[match.benchmark]
        benchmark.records_dropped += 1
        benchmark.prompts_found.add(match.prompt)
        outputs.drop(
            item.where,
            item.record.id,
            "contaminated",
            benchmark=benchmark.name,
            prompt=benchmark.ids[match.prompt],
            shared=match.text,
        )


def _find_match(record: Record, search: Search, options: DecontaminateOptions) -> Match | None:
    question = words(record.question)
    match = search.find_equal(question) or search.find(question)
    if match is None and options.search == "record" and record.trajectory:
        match = search.find(words(record.trajectory))
    return match


def _print_benchmarks(benchmarks: list[BenchmarkText]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title="benchmarks", title_justify="left")
    for name in ("benchmark", "prompts", "found in the data", "records dropped", "boilerplate n-grams (ignored)"):
        table.add_column(name, justify="left" if name == "benchmark" else "right", overflow="fold")
    for benchmark in benchmarks:
        table.add_row(*(Text(str(value)) for value in benchmark.summary().values()))
    make_console().print(table)
