"""Measure verdicts per second on integers, numbers and LaTeX, by one verifier's function and by the pool.

    python benchmarks/verdicts.py [--workers 2] [--seconds 3]

A response is 300 words of working and a boxed answer. Every answer differs, so no verdict serves several responses. (In
a run the responses of a group repeat each other, and the pool judges fewer.) The pool is warm and gets batches of 256,
like those of a rollout. The single process is measured per second of its CPU time, which other programs on the machine
hardly affect; the pool is measured per second of wall time. Half of the answers are right.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count

from pctrain.config.tree import RewardConfig
from pctrain.reward import VerifierPool
from pctrain.reward.verifiers import VERIFIERS

WORKING = "so we add 7 and 5, which is 12, and carry on; " * 30
BATCH = 256


def pairs(kind: str) -> Iterator[tuple[str, str]]:
    """Yield (response, gold) forever."""
    for n in count(1):
        off = n % 2
        answer, gold = {
            "integers": (f"{n + off}", f"{n}"),
            "numbers": (f"\\frac{{{n + off}}}{{7}} \\text{{ cm}}", f"{n}/7"),
            "LaTeX": (f"\\frac{{{n + off}}}{{2}} \\sqrt{{3}}", f"\\frac{{{n}\\sqrt{{3}}}}{{2}}"),
        }[kind]
        yield f"{WORKING}\\boxed{{{answer}}}.", gold


def rate(
    score: Callable[[list[tuple[str, str]]], list], kind: str, seconds: float, clock: Callable[[], float]
) -> float:
    """Return the verdicts per second of `clock`."""
    stream = pairs(kind)
    done = 0
    right = 0.0
    score([next(stream) for _ in range(BATCH)])
    began = clock()
    while clock() - began < seconds:
        verdicts = score([next(stream) for _ in range(BATCH)])
        done, right = done + len(verdicts), right + sum(verdict.reward for verdict in verdicts)
    assert right == done / 2, f"{kind}: {right:.0f} of {done} are right, expected half"
    return done / (clock() - began)


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2, help="verifier processes of the pool")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    args = parser.parse_args()
    versions = f"math-verify {version('math-verify')}, sympy {version('sympy')}"
    print(
        f"{platform.machine()}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}; "
        f"load {os.getloadavg()[0]:.1f}"
    )
    print(
        f"| answers | strict in one process, verdicts/CPU-second | pool of {args.workers}, verdicts/s |\n|---|---|---|"
    )
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its time-outs are off
    strict = VERIFIERS["strict"]
    with VerifierPool(RewardConfig(workers=args.workers, timeout=60)) as pool:
        for kind in ("integers", "numbers", "LaTeX"):
            alone = rate(lambda batch: [strict(*pair) for pair in batch], kind, args.seconds, time.process_time)
            print(
                f"| {kind} | {alone:,.0f} | {rate(pool.score, kind, args.seconds, time.perf_counter):,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
