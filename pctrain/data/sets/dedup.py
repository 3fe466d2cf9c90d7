"""`pctrain data dedup`: one record of those that say the same, or nearly the same, stays: the first.

A record is a near-duplicate where it is near to an earlier record that STAYS. Nothing is dropped for being near to something that was
dropped itself, so a second run over the result finds nothing, and the evidence names a record that is there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pctrain.data.records import Fault
from pctrain.data.sets.near import Neighbours, Sketches
from pctrain.data.sets.options import DedupOptions, Request
from pctrain.data.sets.outputs import Outputs
from pctrain.data.sets.reading import Data
from pctrain.data.sets.survey import survey, texts


def main(request: Request[DedupOptions]) -> None:
    options, config = request.options, request.config.data
    data = Data(request.paths, config.fields, need=("response",) if options.by == "trajectory" else ())
    with Outputs(request, data.files) as outputs:
        found = _Survey(data, options, config.workers)
        neighbours = Neighbours(found.sketches, options, outputs.folder / "shingles") if options.near else None
        outputs.write(_kept(data, options, found, neighbours, outputs))
        if neighbours is not None:
            neighbours.close()
        outputs.report(outputs.finish(found.read))


class _Survey:
    """The first reading: which records are equal to an earlier one (`equal_to`: {place: place}), and sketches of the others."""

    def __init__(self, data: Data, options: DedupOptions, workers: int | None):
        self.equal_to: dict[int, int] = {}
        self.sketches = Sketches()
        self.read = usable = 0
        first: dict[bytes, int] = {}
        fault = None
        for entry in survey(
            data, options.by, options if options.near else None, workers, "sketching" if options.near else "comparing"
        ):
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


def _kept(
    data: Data, options: DedupOptions, found: _Survey, neighbours: Neighbours | None, outputs: Outputs
) -> Iterator[dict[str, Any]]:
    """The second reading: what stays; the rest goes to `outputs.drop`."""
    named = set(found.equal_to.values())  # records that evidence may have to name
    names: dict[int, dict[str, str]] = {}
    dropped_for: dict[int, int] = {}  # near-duplicates by the record that stays
    for item in data.items("writing"):
        if isinstance(item, Fault):
            outputs.drop(item.where, None, f"unusable: {item.cause}", message=item.message)
            continue
        place, name = item.place, {"where": item.where, "id": item.record.id}
        if place in found.equal_to:
            first = found.equal_to[place]
            outputs.drop(**_who(name), reason="duplicate", of=names[dropped_for.get(first, first)])
            continue
        if neighbours is not None and place in neighbours:
            text = "\n".join(texts(item.record, options.by))
            other, similarity = next(neighbours.near(place, text), (None, None))
            if other is not None:
                dropped_for[place] = other
                outputs.drop(**_who(name), reason="near-duplicate", of=names[other], similarity=round(similarity, 4))
                continue
            neighbours.keep(place, text)
            names[place] = name
        elif place in named:
            names[place] = name
        yield item.value


def _who(name: dict[str, str]) -> dict[str, str]:
    return {"where": name["where"], "identity": name["id"]}
