"""Check the ceilings of `pctrain fit` against the published curves and against simulated truth.

    python -m benchmarks.ceilings [--quick] [--curves FILE] [--out FILE]

It prints three tables. The first compares with the published ceilings; this is only a sanity check, because those come
from settings chosen for each curve. The second needs no published value: held-out points, consistency, alarms. The
third uses simulated curves of known ceilings, 500 of each range / C, with fixed seeds (simulated.py). The exit status
is 1 if a target is missed. --quick simulates only 4 curves of each range / C, in this process: it shows that everything
runs, but its numbers mean little.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from rich.console import Console

from benchmarks.ceilings import published, regimes, simulated
from benchmarks.ceilings.checks import Check, show
from pctrain.ceiling.fit import fit_ceiling
from pctrain.common.progress import make_console, progress, track
from pctrain.files.durable import write_atomically

DRAWS, QUICK_DRAWS = 500, 4


def main(arguments: list[str] | None = None) -> int:
    """Run all checks and return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ceilings", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few simulated curves")
    parser.add_argument(
        "--curves", type=Path, default=published.FILE, help="the published curves, in the exchange format"
    )
    parser.add_argument("--out", type=Path, help="JSON list of the checks: name, value, low, high, passed")
    options = parser.parse_args(arguments)
    console = make_console()
    console.width = max(console.width, 180)  # do not wrap rows: the tables are Markdown, for benchmarks/CEILINGS.md
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, NumPy {version('numpy')}, "
        f"SciPy {version('scipy')}; load {os.getloadavg()[0]:.1f}\n"
    )

    curves = published.read(options.curves)
    cases = [published.case_of(curve) for curve in track(curves, "published curves", len(curves), unit="curve")]
    sections = {
        "Published ceilings": published.agreement(cases),
        "Without published values": published.without_published(cases),
    }
    sections["Time"] = [time_of_a_fit(cases)]
    for title, checks in sections.items():
        show(title, checks, console)

    draws, workers = (QUICK_DRAWS, 1) if options.quick else (DRAWS, None)
    seen, below, no_gain = simulate(draws, workers)
    sections["Simulated"] = regimes.checks(seen, below, no_gain)
    show(f"Simulated curves, {draws} of each range / C", sections["Simulated"], console)
    regimes.show(seen, console)
    return finish([check for checks in sections.values() for check in checks], options.out, console)


def time_of_a_fit(cases: list[published.Case]) -> Check:
    """Return the median time over the published curves, with all points."""
    seconds, with_shift = [], []
    for case in cases:
        began = time.perf_counter()
        fit = fit_ceiling(case.curve.eflops, case.curve.scores, case.curve.p_sft)
        seconds.append(time.perf_counter() - began)
        _ = fit.prior_shift
        with_shift.append(time.perf_counter() - began)
    return Check(
        "one fit with its interval, seconds",
        float(np.median(seconds)),
        high=0.3,
        form=".3f",
        note=f"with the shift under wide priors {np.median(with_shift):.3f}",
    )


def simulate(
    draws: int, workers: int | None
) -> tuple[list[simulated.Outcome], list[simulated.Outcome], list[simulated.Outcome]]:
    """Fit simulated curves: of range / C 1 and more, below 1, and without a gain."""
    seed = simulated.SEED
    groups = (
        simulated.truths(simulated.RANGES, draws, seed),
        simulated.truths(simulated.RANGES_BELOW, draws, seed + 1),
        simulated.truths((3.0,), draws, seed + 2, no_gain=True),
    )
    outcomes: list[simulated.Outcome] = []
    with progress("simulated curves", total=sum(map(len, groups)), unit="fit") as bar:
        for outcome in simulated.outcomes([truth for group in groups for truth in group], workers):
            outcomes.append(outcome)
            bar.advance()
    first, second = len(groups[0]), len(groups[0]) + len(groups[1])
    return outcomes[:first], outcomes[first:second], outcomes[second:]


def finish(checks: list[Check], out: Path | None, console: Console) -> int:
    """Write the checks to `out`, print which targets are missed, and return the exit status."""
    if out is not None:
        rows = [
            {
                "name": c.name,
                "value": None if np.isnan(c.value) else c.value,
                "low": c.low,
                "high": c.high,
                "passed": c.passed,
            }
            for c in checks
        ]
        write_atomically(out, json.dumps(rows, indent=1, allow_nan=False) + "\n")
    judged = [check for check in checks if check.passed is not None]
    missed = [check.name for check in judged if not check.passed]
    console.print(
        f"{len(judged) - len(missed)} of {len(judged)} targets met"
        + (f"; missed: {'; '.join(missed)}" if missed else "")
    )
    return 1 if missed else 0


if __name__ == "__main__":
    raise SystemExit(main())
