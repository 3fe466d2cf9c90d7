"""The questions to learner_program.py and its answers. Imports no torch: the shim must be loaded before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
CPU_TENSOR, ITEM = "a CPU tensor in the loss", "an item in the loss"  # planted faults

Table = dict[str, int]  # "kind: place" -> count


@dataclass
class Asked:
    """A model, a layout, and what to do with it."""

    options: list[str]  # --section.key=value
    phases: list[str]  # functions of learner_program.py
    folder: str  # a checkpoint is written there; not there yet
    world: int = 1
    packs: tuple[int, ...] = (1, 2, 4)  # micro-batches of the steps and passes
    fault: str | None = None


@dataclass
class Report:
    """The waits, the memory and the collectives of rank 0."""

    described: str
    parameters: int
    waits: list[tuple[str, str, str, int, list[int]]]  # phase, kind, place, count, lines
    peaks: dict[str, int] = field(repr=False)  # bytes by phase
    collectives: list[tuple[str, str, int]] = field(repr=False)  # phase, name, count

    def waits_in(self, phase: str) -> Counter[str]:
        """Return the waits of one phase."""
        return Counter({f"{kind}: {place}": count for name, kind, place, count, _ in self.waits if name == phase})

    def lines(self, key: str) -> list[int]:
        """Return the lines of the source of a wait."""
        return sorted({line for _, kind, place, _, of in self.waits if f"{kind}: {place}" == key for line in of})

    def per_micro_batch_and_step(self, phase: str, packs: tuple[int, ...], steps: int = 1) -> tuple[Table, Table]:
        """Split the waits of `PHASE 1`, `PHASE 2`, ... into those of a micro-batch and those of a step.

        Every phase has that many micro-batches in each of its `steps` steps. Raises AssertionError if a count is not a
        straight line in the micro-batches.
        """
        counts = {n: self.waits_in(f"{phase} {n}") for n in packs}
        first, last = packs[0], packs[-1]
        slopes, constants = {}, {}
        for key in sorted(set().union(*counts.values())):
            slope, rest = divmod(counts[last][key] - counts[first][key], (last - first) * steps)
            constant, of_rest = divmod(counts[first][key] - slope * first * steps, steps)
            straight = [slope * n * steps + constant * steps == counts[n][key] for n in packs]
            seen = {n: counts[n][key] for n in packs}
            assert not rest and not of_rest and all(straight), f"{phase}: {key}: by micro-batches {seen}"
            slopes[key], constants[key] = slope, constant
        return _without_zeros(slopes), _without_zeros(constants)


def _without_zeros(table: Table) -> Table:
    return {key: count for key, count in table.items() if count}


def difference(name: str, counted: Table, pinned: Table, report: Report) -> list[str]:
    """Return one line for every wait that is not as pinned."""
    lines = []
    for key in sorted({*counted, *pinned}):
        if counted.get(key, 0) != pinned.get(key, 0):
            where = f" (line {', '.join(map(str, report.lines(key)))})" if report.lines(key) else ""
            lines.append(f"{name}: {key}{where}: counted {counted.get(key, 0)}, pinned {pinned.get(key, 0)}")
    return lines


def start(folder: Path, asked: Asked) -> subprocess.CompletedProcess[str]:
    """Run the program in a new process."""
    return run_module("tests.fake_cuda.learner_program", folder, json.dumps(asdict(asked)))


def run_module(name: str, folder: Path, argument: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this folder in a new process, with the path of a file that holds `argument`."""
    file = folder / "asked.json"
    file.write_text(argument)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run(
        [sys.executable, "-m", name, str(file)],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def report(folder: Path, asked: Asked) -> Report:
    """Run the program and return its report; AssertionError with its output if it fails."""
    done = start(folder, asked)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-6000:]}"
    return Report(**json.loads(done.stdout.splitlines()[-1]))
