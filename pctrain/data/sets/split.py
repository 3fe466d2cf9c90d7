"""`pctrain data split`: held-out records for the validation loss, no question of which is trained on.

Records with the same normalised question form a group (with `--near` near-duplicate questions, and those near to these, join it). Groups
are taken in an order drawn by the seed and the question itself until the validation set has the size asked for: neither the order of the
files nor records of other questions change which comes before which. Then both sets are read again and the overlap is counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from pctrain.common.errors import UserError
from pctrain.data.records import Fault
from pctrain.data.sets.near import Neighbours, Sketches
from pctrain.data.sets.options import Request, SplitOptions
from pctrain.data.sets.outputs import Outputs, suffix_of
from pctrain.data.sets.reading import Data
from pctrain.data.sets.survey import survey
from pctrain.data.sets.text import text_key


def main(request: Request[SplitOptions]) -> None:
    options, fields = request.options, request.config.data.fields
    data = Data(request.paths, fields)
    suffix = suffix_of(data.files[0]) or ".jsonl"
    train, validation = f"train{suffix}", f"validation{suffix}"
    with Outputs(request, data.files, [train, validation]) as outputs:
        groups = _Groups(data, request, outputs)
        held_out = choose(groups.sizes, groups.records, options)
        outputs.write(_side(data, groups, held_out, True), validation)
        outputs.write(_side(data, groups, held_out, False), train)
        overlap = len(_questions(outputs, train, fields) & _questions(outputs, validation, fields))
        if overlap:  # what the command is for: if it ever happens, it is a fault of this program
            raise RuntimeError(f"{overlap} questions stand on both sides of the split")
        manifest = outputs.finish(
            groups.read, questions=len(groups.sizes), held_out_questions=len(held_out), overlap=overlap
        )
        asked = wanted(options, groups.records)
        got = outputs.written[validation]
        note = (
            [("held out", f"{got} of {asked} asked for: the other questions left have more records each")]
            if got < asked
            else []
        )
        outputs.report(
            manifest,
            ("questions", f"{len(groups.sizes):,}, {len(held_out):,} of them held out"),
            *note,
            ("questions on both sides", f"{overlap} (both sets read again)"),
        )


def wanted(options: SplitOptions, records: int) -> int:
    """Records to hold out."""
    size = options.validation
    if size < 1:
        return max(1, round(size * records))
    if size != int(size):
        raise UserError(f"--validation={size}: expected a whole number of records, or a share below 1")
    return int(size)


def choose(sizes: dict[bytes, int], records: int, options: SplitOptions) -> set[bytes]:
    """The groups to hold out: at most as many records as asked for, and as near to it as whole groups in the drawn order come.

    sizes: {key of a group: records in it}. Raises UserError where nothing would be left to train on, or no group is small enough.
    """
    room = wanted(options, records)
    if room >= records:
        raise UserError(
            f"--validation={options.validation:g}: {room} records to hold out, but there are {records}; "
            "some have to be left to train on"
        )
    chosen = set()
    seed = options.seed.to_bytes(8, "little")
    for key in sorted(sizes, key=lambda key: hashlib.blake2b(seed + key, digest_size=16).digest()):
        if sizes[key] <= room:
            chosen.add(key)
            room -= sizes[key]
        if not room:
            break
    if not chosen:
        raise UserError(
            f"--validation={options.validation:g}: every question has more records ({min(sizes.values())} and more); "
            "a question is held out with all of them: raise --validation, or `pctrain data dedup --by=question` before"
        )
    return chosen


class _Groups:
    """`sizes`: {key: records}. `key_of(question)`: the group of a question."""

    def __init__(self, data: Data, request: Request[SplitOptions], outputs: Outputs):
        options = request.options
        self.sizes: dict[bytes, int] = {}
        self.read = self.records = 0
        self._joined: dict[bytes, bytes] = {}  # towards the key of the group
        places: dict[int, bytes] = {}  # of a question's first record
        sketches, fault = Sketches(), None
        for entry in survey(
            data, "question", options if options.near else None, request.config.data.workers, "questions"
        ):
            self.read += 1
            if isinstance(entry, Fault):
                fault = fault or entry
                outputs.drop(entry.where, None, f"unusable: {entry.cause}", message=entry.message)
                continue
            self.records += 1
            if entry.key not in self.sizes and entry.sketch is not None:
                sketches.add(entry.place, entry.sketch)
                places[entry.place] = entry.key
            self.sizes[entry.key] = self.sizes.get(entry.key, 0) + 1
        data.refuse_empty(self.records, fault)
        if options.near:
            scratch = outputs.folder / "shingles"
            self._join(data, Neighbours(sketches, options, scratch), places)
            scratch.unlink()

    def _join(self, data: Data, neighbours: Neighbours, places: dict[int, bytes]) -> None:
        for item in data.usable("near questions"):
            if item.place in places and item.place in neighbours:
                mine = places[item.place]
                known = lambda other: self.root(places[other]) == self.root(mine)  # noqa: E731 - a pair that is joined need not be compared
                for other, _ in neighbours.near(item.place, item.record.question, skip=known):
                    self._joined[self.root(mine)] = self.root(places[other])
                neighbours.keep(item.place, item.record.question)
        neighbours.close()
        sizes: dict[bytes, int] = {}
        for key, size in self.sizes.items():
            sizes[self.root(key)] = sizes.get(self.root(key), 0) + size
        self.sizes = sizes

    def root(self, key: bytes) -> bytes:
        """The key of the group that a question's key belongs to."""
        path = []
        while key in self._joined:
            path.append(key)
            key = self._joined[key]
        for passed in path:
            self._joined[passed] = key
        return key


def _side(data: Data, groups: _Groups, held_out: set[bytes], validation: bool) -> Iterator[dict[str, Any]]:
    for item in data.usable("writing validation" if validation else "writing train"):
        if (groups.root(text_key(item.record.question)) in held_out) == validation:
            yield item.value


def _questions(outputs: Outputs, name: str, fields: Any) -> set[bytes]:
    return {text_key(item.record.question) for item in Data([outputs.folder / name], fields).usable(f"proof: {name}")}
