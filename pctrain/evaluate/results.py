"""Output of `pctrain eval`: results.json (complete), results.csv (a row per score), scores.png, curves.json, tables."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
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
from pctrain.files.durable import plain, write_atomically

METHOD = (
    "percent, with 95% intervals whose sampled unit is the problem: Agresti-Coull over problem means (the variance "
    "between problems, z^2 pseudo-problems); paired differences by Agresti-Min; means over benchmarks by MOVER; pass@k "
    "unbiased (Chen et al. 2021)"
)


@dataclass(frozen=True)
class Results:
    """The results of a call: `scores[model][benchmark]`, both in the order of the call."""

    targets: list[Target]
    scores: dict[str, dict[str, Scores]]
    settings: dict[str, Any]

    @property
    def first(self) -> Scores:
        """The scores of the first model on the first benchmark."""
        return next(iter(next(iter(self.scores.values())).values()))

    @property
    def verdicts(self) -> list[str]:
        """The verdicts that every score has: strict, lenient and, with a judge, judged."""
        return [verdict for verdict in VERDICTS if verdict in self.first.rewards]

    def differences(self) -> dict[str, dict[str, Estimate]]:
        """Return {model: its differences to the first model, per benchmark and mean}."""
        first, *others = self.scores
        return {name: differences(self.scores[name], self.scores[first]) for name in others}

    def document(self) -> dict[str, Any]:
        """Return the content of results.json."""
        first = next(iter(self.scores))
        return {
            "method": METHOD,
            "settings": self.settings,
            "models": [self._model_entry(target) for target in self.targets],
            "differences": [
                {"model": name, "against": first, **{key: estimate.percent() for key, estimate in parts.items()}}
                for name, parts in self.differences().items()
            ],
            "versions": {"pctrain": __version__, "math-verify": version("math-verify")},
        }

    def _model_entry(self, target: Target) -> dict[str, Any]:
        scores = self.scores[target.name]
        both = {verdict: means(list(scores.values()), verdict) for verdict in self.verdicts}
        return {
            **{key: getattr(target, key) for key in ("name", "path", "step", "eflops_sft", "eflops_rl")},
            "benchmarks": {name: of_benchmark.document() for name, of_benchmark in scores.items()},
            **{key: {verdict: both[verdict][key].percent() for verdict in self.verdicts} for key in MEANS},
        }


def write(results: Results, out: Path) -> list[str]:
    """Write everything but the samples; return messages for the user."""
    text = json.dumps(plain(results.document()), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomically(out / "results.json", text + "\n")
    write_atomically(out / "results.csv", _csv(results))
    write_atomically(out / "scores.png", score_figure.draw(results.scores))
    overall = {name: means(list(scores.values()))["weighted"] for name, scores in results.scores.items()}
    curves, messages = rl_curves.curves_of(results.targets, overall)
    file = out / "curves.json"
    if curves:
        write_atomically(file, rl_curves.document(curves))
    else:
        file.unlink(missing_ok=True)  # from an earlier call with other models
    return messages


def _csv(results: Results) -> str:
    """Return results.csv: a row for each model and benchmark, and for its two means."""
    ks = sorted({k for by_benchmark in results.scores.values() for s in by_benchmark.values() for k in s.passes()})
    estimates = [*results.verdicts, *(f"pass@{k}" for k in ks)]
    columns = [
        "model",
        "benchmark",
        "problems",
        "samples",
        *(f"{name}{end}" for name in estimates for end in ("", "_low", "_high")),
        *results.first.counts,
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    for model, by_benchmark in results.scores.items():
        writer.writerows(_csv_rows(model, by_benchmark, results.verdicts))
    return text.getvalue()


def _csv_rows(model: str, by_benchmark: Mapping[str, Scores], verdicts: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of one model."""
    for name, scores in by_benchmark.items():
        row: dict[str, Any] = {
            "model": model,
            "benchmark": name,
            "problems": scores.problems,
            "samples": scores.samples,
            **scores.counts,
        }
        for verdict in verdicts:
            row |= _cells(verdict, scores.average(verdict))
        for k, estimate in scores.passes().items():
            row |= _cells(f"pass@{k}", estimate)
        yield row
    problems = sum(scores.problems for scores in by_benchmark.values())
    for key, name in MEANS.items():
        row = {"model": model, "benchmark": name, "problems": problems}
        for verdict in verdicts:
            row |= _cells(verdict, means(list(by_benchmark.values()), verdict)[key])
        yield row


def _cells(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: 100 * estimate.value, f"{name}_low": 100 * estimate.low, f"{name}_high": 100 * estimate.high}


# ---- the terminal --------------------------------------------------------------------------------------------------


def show(results: Results, messages: Sequence[str], out: Path, seconds: float) -> None:
    """Print the tables, the messages and the next command."""
    console = make_console()
    console.print(_score_table(results))
    if len(results.scores) > 1:
        console.print(_difference_table(results))
    for line in messages:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    samples = sum(s.problems * s.samples for by_benchmark in results.scores.values() for s in by_benchmark.values())
    console.print(
        f"{len(results.scores)} model(s), {len(next(iter(results.scores.values())))} benchmark(s), {samples:,} samples "
        f"in {seconds:.0f} s -> {out}/results.json, results.csv, scores.png, MODEL/BENCHMARK/samples.jsonl, "
        "disagreements.jsonl",
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


def _score_table(results: Results) -> Table:
    """Return the table of scores. Only the strict score has its interval here; results.csv has all of them."""
    others = results.verdicts[1:]
    table = Table(
        title="pctrain eval: percent correct",
        title_justify="left",
        caption_justify="left",
        caption="strict: the benchmark's own verifier; differ: samples on which the two verifiers disagree; "
        "cut, no box: share of samples",
    )
    table.add_column("model", overflow="fold")
    table.add_column("benchmark", overflow="fold")
    for name in ("n x k", "avg@k strict [95%]", *others, "pass@k", "differ", "cut", "no box", "faults"):
        table.add_column(name, justify="right", no_wrap=True)
    for model, by_benchmark in results.scores.items():
        for name, scores in by_benchmark.items():
            counts, best = scores.counts, scores.passes()[scores.samples]
            table.add_row(
                Text(model),
                Text(name),
                f"{scores.problems:,} x {scores.samples}",
                _with_interval(scores.average()),
                *(f"{100 * scores.average(verdict).value:.1f}" for verdict in others),
                f"{100 * best.value:.1f}" if scores.samples > 1 else "",
                f"{counts['disagreements']:,}",
                *(f"{100 * counts[key]:.0f}%" for key in ("truncated_share", "no_box_share")),
                f"{counts['verifier_faults'] + counts.get('judge_faults', 0):,}",
            )
        for key, name in MEANS.items():
            of_verdicts = {v: means(list(by_benchmark.values()), v)[key] for v in results.verdicts}
            table.add_row(
                Text(model),
                Text(name),
                "",
                _with_interval(of_verdicts["strict"]),
                *(f"{100 * of_verdicts[verdict].value:.1f}" for verdict in others),
                style="bold",
                end_section=key == "weighted",
            )
    return table


def _difference_table(results: Results) -> Table:
    first = next(iter(results.scores))
    table = Table(title=f"difference to {first} in points [95%], paired over problems", title_justify="left")
    table.add_column("model", overflow="fold")
    rows = results.differences()
    for name in next(iter(rows.values())):
        table.add_column(MEANS.get(name, name), justify="right", overflow="fold")
    for model, parts in rows.items():
        table.add_row(Text(model), *(_with_interval(estimate, signed=True) for estimate in parts.values()))
    return table


def _with_interval(estimate: Estimate, signed: bool = False) -> Text:
    """Return an estimate in percent, such as `62.5 [55.1, 69.3]`."""
    sign = "+" if signed else ""
    return Text(f"{100 * estimate.value:{sign}.1f} [{100 * estimate.low:{sign}.1f}, {100 * estimate.high:{sign}.1f}]")


def shared_settings(config: Config, benchmarks: Sequence[Benchmark], max_response: int) -> dict[str, Any]:
    """Return the settings that all models of a call share, for results.json."""
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
