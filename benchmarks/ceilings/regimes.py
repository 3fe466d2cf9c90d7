"""Coverage and verdicts on simulated curves: pooled, by each factor that was varied, and by verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.ceilings.checks import Check, share, width
from benchmarks.ceilings.simulated import Outcome

VERDICTS = ("identified", "lower_bound")
ENOUGH = 50  # curves of one verdict in one regime; fewer are shown but not judged
FACTORS: dict[str, Callable[[Outcome], Any]] = {
    "range/C": lambda o: o.truth.range_c,
    "AR": lambda o: o.truth.ar,
    "noise": lambda o: o.truth.noise,
    "points": lambda o: o.truth.points,
    "tails": lambda o: o.truth.tails,
}


def regimes(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    """Yield (name, outcomes) for every level of every factor."""
    for name, level_of in FACTORS.items():
        for level in sorted({level_of(outcome) for outcome in outcomes}):
            yield f"{name} {level}", [outcome for outcome in outcomes if level_of(outcome) == level]


def with_verdict(outcomes: Sequence[Outcome], verdict: str) -> list[Outcome]:
    """Return the outcomes with this verdict."""
    return [outcome for outcome in outcomes if outcome.verdict == verdict]


def checks(seen: Sequence[Outcome], below: Sequence[Outcome], no_gain: Sequence[Outcome]) -> list[Check]:
    """Return all checks. `seen` has range / C of 1 and more, `below` less than 1, `no_gain` a D below 1 point."""
    return [
        *_pooled_coverage(seen),
        *_lowest_coverage(seen),
        _identified_errors(with_verdict(seen, "identified")),
        Check("verdicts right", share([o.right for o in seen]), low=0.93, form=".3f", note=_verdicts(seen)),
        Check(
            "verdicts right where there is no gain",
            share([o.right for o in no_gain]),
            low=0.93,
            form=".3f",
            note=_verdicts(no_gain),
        ),
        Check(
            "range/C below 1: lower end below A",
            share([o.low <= o.a for o in below]),
            low=0.93,
            form=".3f",
            note=_width(below),
        ),
        Check("range/C below 1: 90% interval covers A", _covered(below), form=".3f", note=_verdicts(below)),
    ]


def _pooled_coverage(seen: Sequence[Outcome]) -> list[Check]:
    pooled = [Check("90% interval covers A, pooled", _covered(seen), 0.86, 0.94, note=_width(seen), form=".3f")]
    for verdict in VERDICTS:
        group = with_verdict(seen, verdict)
        note = f"{_width(group)}; {len(group) / len(seen):.0%} of the curves"
        pooled.append(Check(f"the same, {verdict}", _covered(group), 0.86, 0.94, form=".3f", note=note))
    return pooled


def _lowest_coverage(seen: Sequence[Outcome]) -> list[Check]:
    lowest, regime = _lowest({name: _covered(group) for name, group in regimes(seen)})
    by_verdict = [Check("the lowest of all regimes", lowest, 0.83, note=regime, form=".3f")]
    for verdict in VERDICTS:
        groups = {name: with_verdict(group, verdict) for name, group in regimes(seen)}
        lowest, regime = _lowest({name: _covered(group) for name, group in groups.items() if len(group) >= ENOUGH})
        too_few = [f"{name} ({len(group)})" for name, group in groups.items() if len(group) < ENOUGH]
        note = regime
        if too_few:
            names = ", ".join(too_few) if len(too_few) <= 4 else f"{len(too_few)} regimes"
            note += f"; fewer than {ENOUGH}, not judged: {names}"
        by_verdict.append(Check(f"the same, {verdict}", lowest, 0.83, form=".3f", note=note))
    return by_verdict


def _identified_errors(identified: Sequence[Outcome]) -> Check:
    note = f"median error {np.median([o.error for o in identified]):.2f}" if identified else ""
    far_off = share([o.error > 2 for o in identified])
    return Check("identified off by more than 2 points", far_off, high=0.03, form=".3f", note=note)


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    """Print the coverage by regime as a Markdown table."""
    table = Table(
        title="Simulated curves by regime: coverage of the 90% interval (median width)",
        box=box.MARKDOWN,
        title_justify="left",
    )
    for name in ("regime", "curves", "covered", "identified", "covered", "off > 2", "lower bound", "covered", "right"):
        table.add_column(name, no_wrap=True, justify="left" if name == "regime" else "right")
    for name, group in (("all", list(outcomes)), *regimes(outcomes)):
        known, bounds = (with_verdict(group, verdict) for verdict in VERDICTS)
        table.add_row(
            name,
            str(len(group)),
            _cell(group),
            _percent(len(known) / len(group)),
            _cell(known),
            _percent(share([o.error > 2 for o in known])),
            _percent(len(bounds) / len(group)),
            _cell(bounds),
            _percent(share([o.right for o in group])),
        )
    console.print(table)
    console.print()


def _covered(outcomes: Sequence[Outcome]) -> float:
    return share([outcome.covered for outcome in outcomes])


def _width(outcomes: Sequence[Outcome]) -> str:
    return width([outcome.width for outcome in outcomes])


def _lowest(by_regime: dict[str, float]) -> tuple[float, str]:
    """Return the lowest value and the name of its regime."""
    if not by_regime:
        return float("nan"), "no regime has enough"
    regime = min(by_regime, key=by_regime.__getitem__)
    return by_regime[regime], regime


def _verdicts(outcomes: Sequence[Outcome]) -> str:
    names = sorted({outcome.verdict for outcome in outcomes})
    return ", ".join(f"{name} {len(with_verdict(outcomes, name)) / len(outcomes):.0%}" for name in names)


def _cell(outcomes: Sequence[Outcome]) -> str:
    return f"{_percent(_covered(outcomes))} ({np.median([o.width for o in outcomes]):.1f})" if outcomes else "-"


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"
