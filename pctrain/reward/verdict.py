"""What a verifier says of one response, and how verdicts are counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

Cause = Literal[
    "right",
    "partial",
    "wrong",
    "no_box",
    "parse_error",
    "truncated",
    "timeout",
    "crash",
    "memory",
    "error",
    "bad_value",
]
CAUSES: tuple[Cause, ...] = get_args(Cause)
# The verifier did not do its work: the reward of 0 says nothing about the response.
FAULTS: tuple[Cause, ...] = ("timeout", "crash", "memory", "error", "bad_value")


@dataclass(frozen=True)
class Verdict:
    """`reward` lies in [0, 1]: 1.0 where `cause` is right, between where it is partial (a user's function only), else 0.0.

    cause: right; partial; wrong; no_box (the response commits to no answer); parse_error (answer or gold could not be read);
    truncated (the length limit cut the response, and `rl.truncated` counts that as wrong); and the faults of a verifier: timeout, crash
    (its process died twice of this sample), memory (it asked for more than it may have), error (a user's function raised), bad_value (it
    returned no number in [0, 1]). `detail` says more about a fault.
    """

    reward: float
    cause: Cause
    detail: str = ""


RIGHT, WRONG, NO_BOX, PARSE_ERROR = (
    Verdict(1.0, "right"),
    Verdict(0.0, "wrong"),
    Verdict(0.0, "no_box"),
    Verdict(0.0, "parse_error"),
)
TRUNCATED = Verdict(0.0, "truncated")


def cause_counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Metrics `verdicts/<cause>`, one for every cause there is: a column that comes and goes is hard to plot."""
    counts = Counter(verdict.cause for verdict in verdicts)
    return {f"verdicts/{cause}": counts[cause] for cause in CAUSES}


def fault_line(verdicts: Sequence[Verdict]) -> str | None:
    """One line for train.log where the verifier failed, with the first fault's own words; None where it did not."""
    faults = [verdict for verdict in verdicts if verdict.cause in FAULTS]
    if not faults:
        return None
    counts = Counter(verdict.cause for verdict in faults)
    kinds = ", ".join(f"{counts[cause]} {cause}" for cause in FAULTS if counts[cause])
    first = f"; first: {' '.join(faults[0].detail.split())}" if faults[0].detail else ""
    return f"warning: the verifier failed on {len(faults)} of {len(verdicts)} responses ({kinds}); their reward is 0{first}"
