"""`pctrain data dedup`: keeps the first of several records that say the same, or nearly the same.

A record is a near-duplicate if it is similar to an earlier record that was KEPT. A record is never dropped for being
similar to a dropped one. So a second run over the result finds nothing, and the record that the evidence names is in
the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pctrain.data.records import Fault
from pctrain.data.sets.near import Neighbors, Sketches
from pctrain.data.sets.options import CommandCall, DedupOptions
from pctrain.data.sets.outputs import Outputs
from pctrain.data.sets.reading import Data
from pctrain.data.sets.survey import survey, texts


def main(call: CommandCall[DedupOptions]) -> None:
    """Run the command."""
    options, config = call.options, call.config.data
    data = Data(call.paths, config.fields, need=("response",) if options.by == "trajectory" else ())
    with Outputs(call, data.files) as outputs:
        first_pass = _FirstPass(data, options, config.workers)
        neighbors = Neighbors(first_pass.sketches, options, outputs.folder / "shingles") if options.near else None
        outputs.write(_keep(data, options, first_pass, neighbors, outputs))
        if neighbors is not None:
            neighbors.close()
        outputs.report(outputs.finish(first_pass.read))


class _FirstPass:
    """The first pass over the data.

    Attributes:
        equal_to: for each record that equals an earlier one, the place of the earlier one.
        sketches: sketches of all other records.
        read: the number of records.
    """

    def __init__(self, data: Data, options: DedupOptions, workers: int | None):
        self.equal_to: dict[int, int] = {}
        self.sketches = Sketches()
        self.read = 0
        usable = 0
        first: dict[bytes, int] = {}
        fault = None
        near = options if options.near else None
        for entry in survey(data, options.by, near, workers, "sketching" if near else "comparing"):
            self.read += 1
            if isinstance(entry, Fault):
                fault = fault or entry
                continue
            usable += 1
            earlier = first.setdefault(entry.key, entry.place)
            if earlier != entry.place:
                self.equal_to[entry.place] = earlier
            elif entry.sketch is not None:
                self.sketches.add(entry.place, entry.sketch)
        data.refuse_empty(usable, fault)


def _keep(
    data: Data, options: DedupOptions, first_pass: _FirstPass, neighbors: Neighbors | None, outputs: Outputs
) -> Iterator[dict[str, Any]]:
    """Yield the records to keep in a second pass, and drop the others."""
    originals = set(first_pass.equal_to.values())  # records that the evidence may have to name
    names: dict[int, dict[str, str]] = {}
    kept_instead: dict[int, int] = {}  # for each near-duplicate, the record that was kept
    for item in data.items("writing"):
        if isinstance(item, Fault):
            outputs.drop_unusable(item)
            continue
        place, name = item.place, {"where": item.where, "id": item.record.id}
        if place in first_pass.equal_to:
            first = first_pass.equal_to[place]
            original = names[kept_instead.get(first, first)]
            outputs.drop(item.where, item.record.id, "duplicate", of=original)
            continue
        if neighbors is not None and place in neighbors:
            text = "\n".join(texts(item.record, options.by))
            neighbor = next(neighbors.near(place, text), None)
            if neighbor is not None:
                other, similarity = neighbor
                kept_instead[place] = other
                evidence = {"of": names[other], "similarity": round(similarity, 4)}
                outputs.drop(item.where, item.record.id, "near-duplicate", **evidence)
                continue
            neighbors.keep(place, text)
            names[place] = name
        elif place in originals:
            names[place] = name
        yield item.value
