"""What `pctrain eval` leaves and prints: results.json (all of it), results.csv (a row a score), scores.png, curves.json, tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from pctrain import __version__
from pctrain.common.progress import make_console
from pctrain.config.tree import Config
from pctrain.evaluate import rl_curves, score_figure
from pctrain.evaluate.benchmarks import Benchmark
from pctrain.evaluate.statistics import Estimate
from pctrain.evaluate.summary import MEANS, VERDICTS, Scores, differences, means
from pctrain.evaluate.targets import Target
from pctrain.files.durable import plain, write_beside

METHOD = (
    "percent, with 95 % intervals whose sampled unit is the problem: Agresti-Coull over problem means (the variance between "
    "problems, z^2 pseudo-problems); paired differences by Agresti-Min; means over benchmarks by MOVER; pass@k unbiased (Chen et al. "
    "2021)"
)


@dataclass(frozen=True)
class Results:
    """`scores[model][benchmark]`, both in the order of the call."""

    targets: list[Target]
    scores: dict[str, dict[str, Scores]]
    settings: dict[str, Any]

    @property
    def verdicts(self) -> list[str]:
        first = next(iter(next(iter(self.scores.values())).values()))
        return [verdict for verdict in VERDICTS if verdict in first.rewards]

    def differences(self) -> dict[str, dict[str, Estimate]]:
        """{model: of each benchmark and mean, to the first model}."""
        first, *others = self.scores
        return {name: differences(self.scores[name], self.scores[first]) for name in others}

    def document(self) -> dict[str, Any]:
        first = next(iter(self.scores))
        return {
            "method": METHOD,
            "settings": self.settings,
            "models": [
                {
                    **{key: getattr(target, key) for key in ("name", "path", "step", "eflops_sft", "eflops_rl")},
                    "benchmarks": {name: scores.document() for name, scores in self.scores[target.name].items()},
                    **{
                        key: {
                            verdict: means(list(self.scores[target.name].values()), verdict)[key].percent()
                            for verdict in self.verdicts
                        }
                        for key in MEANS
                    },
                }
                for target in self.targets
            ],
            "differences": [
                {"model": name, "against": first, **{key: estimate.percent() for key, estimate in found.items()}}
                for name, found in self.differences().items()
            ],
            "versions": {"pctrain": __version__, "math-verify": version("math-verify")},
        }


def write(results: Results, out: Path) -> list[str]:
    """Writes everything but the samples; returns what has to be said."""
    write_beside(
        out / "results.json",
        json.dumps(plain(results.document()), indent=1, ensure_ascii=False, allow_nan=False) + "\n",
    )
    write_beside(out / "results.csv", _csv(results))
    write_beside(out / "scores.png", score_figure.draw(results.scores))
    overall = {name: means(list(scores.values()))["weighted"] for name, scores in results.scores.items()}
    curves, said = rl_curves.curves_of(results.targets, overall)
    file = out / "curves.json"
    if curves:
        write_beside(file, rl_curves.document(curves))
    else:
        file.unlink(missing_ok=True)  # of an earlier call with other models
    return said


def _csv(results: Results) -> str:
    """One row for each model and benchmark, and for its two means."""
    ks = sorted({k for scores in results.scores.values() for one in scores.values() for k in one.passes()})
    counts = list(next(iter(next(iter(results.scores.values())).values())).counts)
    estimates = [*results.verdicts, *(f"pass@{k}" for k in ks)]
    columns = [
        "model",
        "benchmark",
        "problems",
        "samples",
        *(f"{name}{end}" for name in estimates for end in ("", "_low", "_high")),
        *counts,
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for model, by_benchmark in results.scores.items():
        for name, scores in by_benchmark.items():
            row = {
                "model": model,
                "benchmark": name,
                "problems": scores.problems,
                "samples": scores.samples,
                **scores.counts,
            }
            for verdict in results.verdicts:
                row |= _cells(verdict, scores.average(verdict))
            for k, estimate in scores.passes().items():
                row |= _cells(f"pass@{k}", estimate)
            writer.writerow(row)
        for key, name in MEANS.items():
            row = {
                "model": model,
                "benchmark": name,
                "problems": sum(scores.problems for scores in by_benchmark.values()),
            }
            for verdict in results.verdicts:
                row |= _cells(verdict, means(list(by_benchmark.values()), verdict)[key])
            writer.writerow(row)
    return text.getvalue()


def _cells(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: 100 * estimate.value, f"{name}_low": 100 * estimate.low, f"{name}_high": 100 * estimate.high}


# ---- the terminal ----------------------------------------------------------------------------------------------------------


def show(results: Results, said: Sequence[str], out: Path, seconds: float) -> None:
    console = make_console()
    console.print(_table(results))
    if len(results.scores) > 1:
        console.print(_difference_table(results))
    for line in said:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    samples = sum(one.problems * one.samples for scores in results.scores.values() for one in scores.values())
    console.print(
        f"{len(results.scores)} model(s), {len(next(iter(results.scores.values())))} benchmark(s), {samples:,} samples in "
        f"{seconds:.0f} s -> {out}/results.json, results.csv, scores.png, MODEL/BENCHMARK/samples.jsonl, disagreements.jsonl",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if (out / "curves.json").exists():
        console.print("Next:", style="bold")
        console.print(
            f"  pctrain fit {out / 'curves.json'} --out {out / 'fits.json'}   # the ceilings of the RL runs",
            markup=False,
            soft_wrap=True,
        )


def _table(results: Results) -> Table:
    """Intervals of the strict score alone: all others stand in results.csv."""
    others = results.verdicts[1:]
    table = Table(
        title="pctrain eval: percent right",
        title_justify="left",
        caption_justify="left",
        caption="strict: the benchmark's own verifier; differ: samples on which the two disagree; cut, no box: share of samples",
    )
    table.add_column("model", overflow="fold")
    table.add_column("benchmark", overflow="fold")
    for name in ("n x k", "avg@k strict [95 %]", *others, "pass@k", "differ", "cut", "no box", "faults"):
        table.add_column(name, justify="right", no_wrap=True)
    for model, by_benchmark in results.scores.items():
        for name, scores in by_benchmark.items():
            counts, best = scores.counts, scores.passes()[scores.samples]
            table.add_row(
                Text(model),
                Text(name),
                f"{scores.problems:,} x {scores.samples}",
                shown(scores.average()),
                *(f"{100 * scores.average(verdict).value:.1f}" for verdict in others),
                f"{100 * best.value:.1f}" if scores.samples > 1 else "",
                f"{counts['disagreements']:,}",
                *(f"{100 * counts[key]:.0f} %" for key in ("truncated_share", "no_box_share")),
                f"{counts['verifier_faults'] + counts.get('judge_faults', 0):,}",
            )
        for key, name in MEANS.items():
            found = {verdict: means(list(by_benchmark.values()), verdict)[key] for verdict in results.verdicts}
            table.add_row(
                Text(model),
                Text(name),
                "",
                shown(found["strict"]),
                *(f"{100 * found[verdict].value:.1f}" for verdict in others),
                style="bold",
                end_section=key == "weighted",
            )
    return table


def _difference_table(results: Results) -> Table:
    first = next(iter(results.scores))
    table = Table(title=f"points more than {first} [95 %], paired over problems", title_justify="left")
    table.add_column("model", overflow="fold")
    found = results.differences()
    for name in next(iter(found.values())):
        table.add_column(MEANS.get(name, name), justify="right", overflow="fold")
    for model, parts in found.items():
        table.add_row(Text(model), *(shown(estimate, signed=True) for estimate in parts.values()))
    return table


def shown(estimate: Estimate, signed: bool = False) -> Text:
    """`62.5 [55.1, 69.3]`."""
    sign = "+" if signed else ""
    return Text(f"{100 * estimate.value:{sign}.1f} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]")


def settings_of(config: Config, benchmarks: Sequence[Benchmark], max_response: int) -> dict[str, Any]:
    """What all models of a call share, for results.json."""
    return {
        "seed": config.run.seed,
        "temperature": config.eval.temperature,
        "top_p": config.eval.top_p,
        "max_response": max_response,
        "dtype": config.model.dtype,
        "judge": config.eval.judge,
        "benchmarks": {
            b.name: {
                "path": str(config.eval.benchmarks[b.name].path),
                "sha256": b.content,
                "samples": b.samples,
                "verifier": b.verifier,
                "instruction": b.instruction,
            }
            for b in benchmarks
        },
    }
