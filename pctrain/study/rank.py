"""`pctrain data rank`: which of several candidate sets to train on, told by short SFT probes.

Each candidate is trained on for a few seeds, from the same weights, with the same steps and batch, and validated on the same held-out
set. The lower the minimum of its validation loss, the higher the ceiling it promises (PAPER.md 3). Every probe is a run folder: stopped
at any moment, the same command goes on.

    OUT/<name>/seed-<s>/        the probes
    OUT/rank.json               the ranking and what it rests on
    OUT/validation_loss.png     the curves
    OUT/manifest.json           inputs, arguments, versions
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console, progress
from pctrain.config.tree import ResolvedConfig, SourceConfig
from pctrain.data.sets.candidates import TAKEN
from pctrain.data.sets.options import RankOptions, Request
from pctrain.data.sets.outputs import MANIFEST, described, versions
from pctrain.data.sources import list_files
from pctrain.distributed import parallel
from pctrain.files.durable import plain, write_beside
from pctrain.report.looks import flops_text
from pctrain.rollout.worker import RolloutWorker
from pctrain.run.folder import read_values
from pctrain.run.resume import begin
from pctrain.sft import loop as sft
from pctrain.study.rank_figure import draw

CONFIDENCE = 0.95
CRITERION = (
    "two candidates differ where 0 lies outside the 95 % interval of the difference of their mean minima over seeds "
    "(Welch's t, unequal variances)"
)


def main(request: Request[RankOptions], candidates: dict[str, Path]) -> None:
    """`candidates`: {name: path}, from `candidates.read_candidates`. `request.config`: of a probe, its `data.train` the first candidate."""
    options, root = request.options, request.options.out
    config = request.config.model_copy(deep=True)
    config.run.dir = root
    _refuse_foreign(root)
    with begin(config) as config, RolloutWorker(config) as worker:
        parallel.from_rank_zero(lambda: _write_manifest(request, config, candidates))
        config.data.cache = config.data.cache or root / "tokens"  # a candidate is tokenised once for all its seeds
        with progress("probes", len(candidates) * len(options.seeds), unit="probe", rank=parallel.rank()) as bar:
            for seed in options.seeds:
                for name, path in candidates.items():
                    sft.train(probe_config(config, root, name, path, seed), worker)
                    bar.advance()
        parallel.from_rank_zero(lambda: _report(options.seeds, root, candidates))


def _refuse_foreign(root: Path) -> None:
    """A folder that this command did not make is left alone."""
    names = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    if (root.exists() and not root.is_dir()) or (MANIFEST not in names and names - set(TAKEN)):
        raise UserError(
            f"--out {root} exists and holds something else; name a new folder, or the one of an earlier call to go on with it"
        )


def _write_manifest(request: Request[RankOptions], config: ResolvedConfig, candidates: dict[str, Path]) -> None:
    """Before the first probe: a folder that has it is one to go on in."""

    def inputs(path: Path) -> list[dict[str, Any]]:
        return [described(file, file) for file in list_files(path)]

    write_beside(
        request.options.out / MANIFEST,
        _pretty(
            plain(
                {
                    "command": request.command,
                    "arguments": request.arguments,
                    "versions": versions(),
                    "candidates": {name: inputs(path) for name, path in candidates.items()},
                    "validation": [
                        entry for source in config.data.validation_sources() for entry in inputs(source.path)
                    ],
                }
            )
        ),
    )


def probe_config(config: ResolvedConfig, root: Path, name: str, path: Path, seed: int) -> ResolvedConfig:
    """The seed decides the order of the data alone: model.path holds the start of every probe."""
    probe = config.model_copy(deep=True)
    probe.run.dir, probe.run.seed = root / name / f"seed-{seed}", seed
    probe.data.train = [SourceConfig(path=path, name=name)]
    probe.run.keep_last = 1
    return probe


# ---- what the probes say ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Probe:
    """`losses`: {step: validation loss}; `minimum` at `step`; `steps` trained; `eflops`: of training, by the paper's formula."""

    seed: int
    losses: dict[int, float]
    minimum: float
    step: int
    steps: int
    eflops: float
    seconds: float

    @property
    def too_short(self) -> bool:
        """The loss was lowest at the last validation: the minimum may lie beyond it."""
        return self.step == max(self.losses)


@dataclass(frozen=True)
class Candidate:
    name: str
    path: Path
    probes: list[Probe]

    @property
    def minima(self) -> list[float]:
        return [probe.minimum for probe in self.probes]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.minima)

    @property
    def spread(self) -> float | None:
        """Standard deviation of the minimum over seeds; none of one seed."""
        return statistics.stdev(self.minima) if len(self.probes) > 1 else None


@dataclass(frozen=True)
class Difference:
    """Of the mean minima: `worse` minus `better`, with its interval; `told_apart` is none where one seed gives no interval."""

    better: str
    worse: str
    difference: float
    low: float | None
    high: float | None
    told_apart: bool | None


def read_probe(folder: Path, seed: int) -> Probe:
    losses = read_values(folder, "val", "val_loss")
    ledger = [json.loads(line) for line in (folder / "ledger.jsonl").read_text().splitlines()]
    step = min(losses, key=losses.get)
    eflops = read_values(folder, "val", "eflops_sft")
    return Probe(
        seed, losses, losses[step], step, max(losses), eflops[max(eflops)], sum(line["seconds"] for line in ledger)
    )


def compare(better: Candidate, worse: Candidate) -> Difference:
    """Welch's interval of the difference of the mean minima."""
    difference, n = worse.mean - better.mean, len(better.probes)
    if n < 2:
        return Difference(better.name, worse.name, difference, None, None, None)
    parts = [candidate.spread**2 / n for candidate in (better, worse)]
    error = math.sqrt(sum(parts))
    freedom = sum(parts) ** 2 / sum(part**2 / (n - 1) for part in parts) if error else n - 1
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, freedom)) * error
    return Difference(better.name, worse.name, difference, difference - half, difference + half, difference > half)


def rank(candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Difference]]:
    """The candidates by mean minimum, the lowest first, and every pair of them compared."""
    ranked = sorted(candidates, key=lambda candidate: candidate.mean)
    return ranked, [compare(one, other) for i, one in enumerate(ranked) for other in ranked[i + 1 :]]


# ---- the report ------------------------------------------------------------------------------------------------------------


def _report(seeds: Sequence[int], root: Path, paths: dict[str, Path]) -> None:
    candidates = [
        Candidate(name, path, [read_probe(root / name / f"seed-{seed}", seed) for seed in seeds])
        for name, path in paths.items()
    ]
    ranked, differences = rank(candidates)
    warnings = _warnings(ranked)
    result = plain(
        {
            "criterion": CRITERION,
            "ranking": [_row(place, candidate) for place, candidate in enumerate(ranked, 1)],
            "differences": [asdict(difference) for difference in differences],
            "warnings": warnings,
            "cost": {
                "eflops": sum(p.eflops for c in ranked for p in c.probes),
                "seconds": sum(p.seconds for c in ranked for p in c.probes),
            },
        }
    )
    write_beside(root / "validation_loss.png", draw(ranked))
    write_beside(root / "rank.json", _pretty(result))
    _print(ranked, differences, warnings, root)


def _row(place: int, candidate: Candidate) -> dict[str, Any]:
    return {
        "rank": place,
        "name": candidate.name,
        "path": candidate.path,
        "min_val_loss": candidate.mean,
        "spread": candidate.spread,
        "probes": [{**asdict(probe), "too_short": probe.too_short} for probe in candidate.probes],
    }


def _warnings(ranked: Sequence[Candidate]) -> list[str]:
    found = []
    for candidate in ranked:
        short = [str(probe.seed) for probe in candidate.probes if probe.too_short]
        if short:
            found.append(
                f"{candidate.name}: the loss is lowest at the last validation (seed {', '.join(short)}): the probe is too short "
                "to reach the minimum; raise --sft.steps"
            )
        if all(probe.step == 0 for probe in candidate.probes):
            found.append(
                f"{candidate.name}: no validation loss is below that of the start: lower --sft.optimizer.lr or --sft.val_every"
            )
    if len({probe.steps for candidate in ranked for probe in candidate.probes}) > 1:
        found.append(
            "the probes ran for different numbers of steps (sft.epochs or sft.stop_after): their compute is not equal"
        )
    if len(ranked[0].probes) < 2:
        found.append("one seed: nothing says how much the seed alone changes; give --seeds=0,1,2")
    return found


def _print(ranked: Sequence[Candidate], differences: Sequence[Difference], warnings: Sequence[str], root: Path) -> None:
    from rich.table import Table
    from rich.text import Text

    console = make_console()
    table = Table(title="candidates by minimum validation loss (nats a token)", title_justify="left")
    for name in ("", "candidate", "minimum", "± over seeds", "at step", "cost of a probe", "seconds"):
        table.add_column(name, justify="left" if name == "candidate" else "right", overflow="fold")
    for place, c in enumerate(ranked, 1):
        steps = sorted({probe.step for probe in c.probes})
        at = str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
        cost, seconds = (
            statistics.fmean(values) for values in ([p.eflops for p in c.probes], [p.seconds for p in c.probes])
        )
        spread = "one seed" if c.spread is None else f"{c.spread:.4f}"
        table.add_row(str(place), Text(c.name), f"{c.mean:.4f}", spread, at, flops_text(cost), f"{seconds:.1f}")
    console.print(table)
    for line in (*map(_sentence, differences), *(f"warning: {warning}" for warning in warnings)):
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"criterion: {CRITERION}", style="dim", markup=False)
    console.print(f"{root / 'rank.json'}, {root / 'validation_loss.png'}", markup=False, soft_wrap=True)


def _sentence(d: Difference) -> str:
    if d.told_apart is None:
        return f"{d.better} before {d.worse}: lower by {d.difference:.4f}, one seed each"
    interval = f"{d.difference:.4f} ({d.low:.4f} to {d.high:.4f})"
    return (
        f"{d.better} before {d.worse}: lower by {interval}"
        if d.told_apart
        else f"{d.better} and {d.worse} cannot be told apart: difference {interval}"
    )


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
