"""Coverage and verdicts on simulated curves: pooled, and by each thing that was varied, the verdicts apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.ceilings.checks import Check, share, width
from benchmarks.ceilings.simulated import Outcome

VERDICTS = ("identified", "lower_bound")
ENOUGH = 50  # curves of one verdict in one regime: fewer are shown, not judged
FACTORS: dict[str, Callable[[Outcome], object]] = {
    "range/C": lambda o: o.truth.range_c,
    "AR": lambda o: o.truth.ar,
    "noise": lambda o: o.truth.noise,
    "points": lambda o: o.truth.points,
    "tails": lambda o: o.truth.tails,
}


def regimes(outcomes: Sequence[Outcome]) -> Iterator[tuple[str, list[Outcome]]]:
    for name, of in FACTORS.items():
        for level in sorted({of(outcome) for outcome in outcomes}):
            yield f"{name} {level}", [outcome for outcome in outcomes if of(outcome) == level]


def with_verdict(outcomes: Sequence[Outcome], verdict: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.verdict == verdict]


def checks(seen: Sequence[Outcome], below: Sequence[Outcome], no_gain: Sequence[Outcome]) -> list[Check]:
    """`seen`: range / C of 1 and more; `below`: less; `no_gain`: D below 1 point."""
    found = [Check("90 % interval covers A, pooled", _covered(seen), 0.86, 0.94, beside=_width(seen), form=".3f")]
    for verdict in VERDICTS:
        these = with_verdict(seen, verdict)
        found.append(
            Check(
                f"the same, {verdict}",
                _covered(these),
                0.86,
                0.94,
                form=".3f",
                beside=f"{_width(these)}; {len(these) / len(seen):.0%} of the curves",
            )
        )
    worst, at = _worst({name: _covered(group) for name, group in regimes(seen)})
    found.append(Check("the lowest of all regimes", worst, 0.83, beside=at, form=".3f"))
    for verdict in VERDICTS:
        groups = {name: with_verdict(group, verdict) for name, group in regimes(seen)}
        worst, at = _worst({name: _covered(group) for name, group in groups.items() if len(group) >= ENOUGH})
        few = [f"{name} ({len(group)})" for name, group in groups.items() if len(group) < ENOUGH]
        left_out = (
            f"; fewer than {ENOUGH}, not judged: {', '.join(few) if len(few) <= 4 else f'{len(few)} regimes'}"
            if few
            else ""
        )
        found.append(Check(f"the same, {verdict}", worst, 0.83, form=".3f", beside=at + left_out))
    known = with_verdict(seen, "identified")
    return [
        *found,
        Check(
            "identified off by more than 2 points",
            share([o.error > 2 for o in known]),
            high=0.03,
            form=".3f",
            beside=f"median error {np.median([o.error for o in known]):.2f}" if known else "",
        ),
        Check("verdicts right", share([o.right for o in seen]), low=0.93, form=".3f", beside=_verdicts(seen)),
        Check(
            "verdicts right where there is no gain",
            share([o.right for o in no_gain]),
            low=0.93,
            form=".3f",
            beside=_verdicts(no_gain),
        ),
        Check(
            "range/C below 1: lower end below A",
            share([o.low <= o.a for o in below]),
            low=0.93,
            form=".3f",
            beside=_width(below),
        ),
        Check("range/C below 1: 90 % interval covers A", _covered(below), form=".3f", beside=_verdicts(below)),
    ]


def show(outcomes: Sequence[Outcome], console: Console) -> None:
    table = Table(
        title="Simulated curves by regime: coverage of the 90 % interval (median width)",
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


def _worst(by_regime: dict[str, float]) -> tuple[float, str]:
    if not by_regime:
        return float("nan"), "no regime has enough"
    at = min(by_regime, key=by_regime.__getitem__)
    return by_regime[at], at


def _verdicts(outcomes: Sequence[Outcome]) -> str:
    names = sorted({outcome.verdict for outcome in outcomes})
    return ", ".join(f"{name} {len(with_verdict(outcomes, name)) / len(outcomes):.0%}" for name in names)


def _cell(outcomes: Sequence[Outcome]) -> str:
    return f"{_percent(_covered(outcomes))} ({np.median([o.width for o in outcomes]):.1f})" if outcomes else "-"


def _percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{100 * value:.1f}"
