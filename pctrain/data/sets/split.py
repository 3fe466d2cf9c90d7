"""`pctrain data split`: holds out records for the validation loss. No question of theirs is trained on.

Records with the same normalized question form a group. With `--near`, near-duplicate questions join it, and questions
near to those. Groups are held out in an order that depends only on the seed and the question, until the validation set
has the requested size. So neither the order of the files nor records of other questions change the order. At the end
both sets are read again to count the overlap.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

from pctrain.common.errors import UserError
from pctrain.config.tree import FieldsConfig
from pctrain.data.records import Fault
from pctrain.data.sets.near import Neighbors, Sketches
from pctrain.data.sets.options import CommandCall, SplitOptions
from pctrain.data.sets.outputs import Outputs, suffix_of
from pctrain.data.sets.reading import Data
from pctrain.data.sets.survey import survey
from pctrain.data.sets.text import text_key


def main(call: CommandCall[SplitOptions]) -> None:
    """Run the command."""
    options, fields = call.options, call.config.data.fields
    data = Data(call.paths, fields)
    suffix = suffix_of(data.files[0]) or ".jsonl"
    train, validation = f"train{suffix}", f"validation{suffix}"
    with Outputs(call, data.files, [train, validation]) as outputs:
        groups = _Groups(data, call, outputs)
        held_out = choose_groups(groups.sizes, groups.records, options)
        outputs.write(_select(data, groups, held_out, True), validation)
        outputs.write(_select(data, groups, held_out, False), train)
        overlap = len(_read_questions(outputs, train, fields) & _read_questions(outputs, validation, fields))
        if overlap:  # the purpose of the command; if it ever happens, it is a bug
            raise RuntimeError(f"{overlap} questions are on both sides of the split")
        manifest = outputs.finish(
            groups.read, questions=len(groups.sizes), held_out_questions=len(held_out), overlap=overlap
        )
        rows = [("questions", f"{len(groups.sizes):,}, {len(held_out):,} of them held out")]
        wanted, held_out_records = wanted_records(options, groups.records), outputs.written[validation]
        if held_out_records < wanted:
            reason = "every other question has more records than the difference"
            rows.append(("held out", f"{held_out_records} of {wanted} requested records: {reason}"))
        rows.append(("questions on both sides", f"{overlap} (both sets were read again)"))
        outputs.report(manifest, *rows)


def wanted_records(options: SplitOptions, records: int) -> int:
    """Return the number of records to hold out."""
    size = options.validation
    if size < 1:
        return max(1, round(size * records))
    if size != int(size):
        raise UserError(f"--validation={size}: expected a whole number of records, or a share below 1")
    return int(size)


def choose_groups(sizes: dict[bytes, int], records: int, options: SplitOptions) -> set[bytes]:
    """Return the groups to hold out.

    They have at most the requested number of records, and as close to it as whole groups in the drawn order allow.
    `sizes` is {key of a group: number of records}.

    Raises:
        UserError: nothing would be left to train on, or no group is small enough.
    """
    room = wanted_records(options, records)
    if room >= records:
        raise UserError(
            f"--validation={options.validation:g}: {room} records to hold out, but there are only {records}. "
            "Lower it, so that some records are left to train on."
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
            f"--validation={options.validation:g}: every question has more records (at least {min(sizes.values())}), "
            "and a question is held out with all of them. "
            "Raise --validation, or run `pctrain data dedup --by=question` first."
        )
    return chosen


class _Groups:
    """The groups of questions.

    Attributes:
        sizes: {key of a group: number of records}.
        read: the number of records.
        records: the number of usable records.
    """

    def __init__(self, data: Data, call: CommandCall[SplitOptions], outputs: Outputs):
        options = call.options
        self.sizes: dict[bytes, int] = {}
        self.read = self.records = 0
        self._joined: dict[bytes, bytes] = {}  # from the key of a question towards the key of its group
        places: dict[int, bytes] = {}  # the place of each question's first record
        sketches, fault = Sketches(), None
        near = options if options.near else None
        for entry in survey(data, "question", near, call.config.data.workers, "questions"):
            self.read += 1
            if isinstance(entry, Fault):
                fault = fault or entry
                outputs.drop_unusable(entry)
                continue
            self.records += 1
            if entry.key not in self.sizes and entry.sketch is not None:
                sketches.add(entry.place, entry.sketch)
                places[entry.place] = entry.key
            self.sizes[entry.key] = self.sizes.get(entry.key, 0) + 1
        data.refuse_empty(self.records, fault)
        if options.near:
            scratch = outputs.folder / "shingles"
            self._join(data, Neighbors(sketches, options, scratch), places)
            scratch.unlink()

    def _join(self, data: Data, neighbors: Neighbors, places: dict[int, bytes]) -> None:
        """Join the groups of near-duplicate questions."""
        for item in data.usable("near questions"):
            if item.place in places and item.place in neighbors:
                key = places[item.place]
                for other, _ in neighbors.near(item.place, item.record.question, skip=self._joined_with(key, places)):
                    self._joined[self.root(key)] = self.root(places[other])
                neighbors.keep(item.place, item.record.question)
        neighbors.close()
        sizes: dict[bytes, int] = {}
        for key, size in self.sizes.items():
            root = self.root(key)
            sizes[root] = sizes.get(root, 0) + size
        self.sizes = sizes

    def _joined_with(self, key: bytes, places: dict[int, bytes]) -> Callable[[int], bool]:
        """Return a function that says whether the question at a place is in the group of `key` already."""
        return lambda other: self.root(places[other]) == self.root(key)

    def root(self, key: bytes) -> bytes:
        """Return the key of the group that a question's key belongs to."""
        path = []
        while key in self._joined:
            path.append(key)
            key = self._joined[key]
        for passed in path:
            self._joined[passed] = key
        return key


def _select(data: Data, groups: _Groups, held_out: set[bytes], validation: bool) -> Iterator[dict[str, Any]]:
    """Yield the records of one side of the split."""
    for item in data.usable("writing validation" if validation else "writing train"):
        if (groups.root(text_key(item.record.question)) in held_out) == validation:
            yield item.value


def _read_questions(outputs: Outputs, name: str, fields: FieldsConfig) -> set[bytes]:
    written = Data([outputs.folder / name], fields)
    return {text_key(item.record.question) for item in written.usable(f"checking {name}")}
