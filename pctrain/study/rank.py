"""`pctrain data rank`: choose between candidate sets with short SFT probes.

Each candidate is trained on for a few seeds, from the same weights, with the same steps and batch size, and validated
on the same held-out set. A lower minimum of the validation loss promises a higher ceiling (arXiv 2512.11470, section
3). Every probe is a run folder, so the same command resumes a stopped ranking.

    OUT/<name>/seed-<s>/        the probes
    OUT/rank.json               the ranking and its numbers
    OUT/validation_loss.png     the curves
    OUT/manifest.json           inputs, arguments, versions
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pctrain.common.errors import UserError
from pctrain.common.progress import make_console, progress
from pctrain.config.tree import ResolvedConfig, SourceConfig
from pctrain.core.session import begin
from pctrain.data.sets.candidates import TAKEN
from pctrain.data.sets.options import CommandCall, RankOptions
from pctrain.data.sets.outputs import MANIFEST, describe_file, versions
from pctrain.data.sources import list_files
from pctrain.distributed import parallel
from pctrain.files.durable import plain, write_atomically
from pctrain.report.looks import flops_text
from pctrain.rollout.worker import RolloutWorker
from pctrain.sft import loop as sft
from pctrain.study.rank_figure import draw
from pctrain.study.ranking import CRITERION, Candidate, as_json, rank, read_probe


def main(request: CommandCall[RankOptions], candidates: dict[str, Path]) -> None:
    """Train the probes and write the ranking.

    `candidates` is {name: path}, from `candidates.read_candidates`. `request.config` is the config of a probe, with the
    first candidate as its `data.train`.
    """
    options, root = request.options, request.options.out
    config = request.config.model_copy(deep=True)
    config.run.dir = root
    _refuse_foreign(root)
    with begin(config) as config, RolloutWorker(config) as worker:
        parallel.from_rank_zero(lambda: _write_manifest(request, config, candidates))
        config.data.cache = config.data.cache or root / "tokens"  # tokenizes a candidate once for all its seeds
        with progress("probes", len(candidates) * len(options.seeds), unit="probe", rank=parallel.rank()) as bar:
            for seed in options.seeds:
                for name, path in candidates.items():
                    sft.train(probe_config(config, root, name, path, seed), worker)
                    bar.advance()
        parallel.from_rank_zero(lambda: _report(options.seeds, root, candidates))


def _refuse_foreign(root: Path) -> None:
    """Refuse a folder that another command made."""
    names = {entry.name for entry in root.iterdir()} if root.is_dir() else set()
    if (root.exists() and not root.is_dir()) or (MANIFEST not in names and names - set(TAKEN)):
        raise UserError(
            f"--out {root} exists and holds something else. Name a new folder, or that of an earlier call to resume it."
        )


def _write_manifest(request: CommandCall[RankOptions], config: ResolvedConfig, candidates: dict[str, Path]) -> None:
    """Write the manifest before the first probe. A folder that has it can be resumed."""

    def inputs(path: Path) -> list[dict[str, Any]]:
        return [describe_file(file, file) for file in list_files(path)]

    manifest = {
        "command": request.command,
        "arguments": request.arguments,
        "versions": versions(),
        "candidates": {name: inputs(path) for name, path in candidates.items()},
        "validation": [entry for source in config.data.validation_sources() for entry in inputs(source.path)],
    }
    write_atomically(request.options.out / MANIFEST, _pretty(plain(manifest)))


def probe_config(config: ResolvedConfig, root: Path, name: str, path: Path, seed: int) -> ResolvedConfig:
    """Return the config of a probe. Its seed decides only the order of the data; model.path has the initial weights."""
    probe = config.model_copy(deep=True)
    probe.run.dir = root / name / f"seed-{seed}"
    probe.run.seed = seed
    probe.run.keep_last = 1
    probe.data.train = [SourceConfig(path=path, name=name)]
    return probe


# ---- the report


def _report(seeds: Sequence[int], root: Path, paths: dict[str, Path]) -> None:
    candidates = [
        Candidate(name, path, [read_probe(root / name / f"seed-{seed}", seed) for seed in seeds])
        for name, path in paths.items()
    ]
    ranked, comparisons = rank(candidates)
    result = plain(as_json(ranked, comparisons))
    write_atomically(root / "validation_loss.png", draw(ranked))
    write_atomically(root / "rank.json", _pretty(result))
    lines = [str(comparison) for comparison in comparisons]
    lines += [f"warning: {warning}" for warning in result["warnings"]]
    _print(ranked, lines, root)


def _print(ranked: Sequence[Candidate], lines: Sequence[str], root: Path) -> None:
    console = make_console()
    table = Table(title="candidates by minimum validation loss (nats per token)", title_justify="left")
    for heading in ("", "candidate", "minimum", "± over seeds", "at step", "compute per probe", "seconds"):
        table.add_column(heading, justify="left" if heading == "candidate" else "right", overflow="fold")
    for place, candidate in enumerate(ranked, 1):
        table.add_row(str(place), Text(candidate.name), *_cells(candidate))
    console.print(table)
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)
    console.print(f"criterion: {CRITERION}", style="dim", markup=False)
    console.print(f"Wrote {root / 'rank.json'} and {root / 'validation_loss.png'}.", markup=False, soft_wrap=True)


def _cells(candidate: Candidate) -> list[str]:
    steps = sorted({probe.step for probe in candidate.probes})
    return [
        f"{candidate.mean:.4f}",
        "one seed" if candidate.spread is None else f"{candidate.spread:.4f}",
        str(steps[0]) if len(steps) == 1 else f"{steps[0]} to {steps[-1]}",
        flops_text(statistics.fmean(probe.eflops for probe in candidate.probes)),
        f"{statistics.fmean(probe.seconds for probe in candidate.probes):.1f}",
    ]


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
