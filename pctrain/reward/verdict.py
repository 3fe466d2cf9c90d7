"""The verdict of a verifier on one response, and counts of verdicts."""

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
# The verifier failed, so the reward of 0 says nothing about the response.
FAULTS: tuple[Cause, ...] = ("timeout", "crash", "memory", "error", "bad_value")


@dataclass(frozen=True)
class Verdict:
    """The reward of a response, in [0, 1], and its cause.

    The reward is 1.0 if the cause is right, between 0 and 1 if it is partial (only from a user's function), and
    otherwise 0.0.

    * no_box: the response commits to no answer.
    * parse_error: the answer or the gold answer could not be read.
    * truncated: the length limit cut the response, and `rl.truncated` counts that as wrong.
    * Faults of the verifier, with a `detail`: timeout; crash (its process died twice over this sample); memory (it
      asked for
      more than it may use); error (a user's function raised); bad_value (it did not return a number in [0, 1]).
    """

    reward: float
    cause: Cause
    detail: str = ""


RIGHT = Verdict(1.0, "right")
WRONG = Verdict(0.0, "wrong")
NO_BOX = Verdict(0.0, "no_box")
PARSE_ERROR = Verdict(0.0, "parse_error")
TRUNCATED = Verdict(0.0, "truncated")


def cause_counts(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """Return the metrics `verdicts/<cause>` for every possible cause: a column that comes and goes is hard to plot."""
    counts = Counter(verdict.cause for verdict in verdicts)
    return {f"verdicts/{cause}": counts[cause] for cause in CAUSES}


def fault_line(verdicts: Sequence[Verdict]) -> str | None:
    """Return one line for train.log about failures of the verifier, with the first detail, or None without any."""
    faults = [verdict for verdict in verdicts if verdict.cause in FAULTS]
    if not faults:
        return None
    counts = Counter(verdict.cause for verdict in faults)
    kinds = ", ".join(f"{counts[cause]} {cause}" for cause in FAULTS if counts[cause])
    first = f"; first: {' '.join(faults[0].detail.split())}" if faults[0].detail else ""
    return (
        f"warning: the verifier failed on {len(faults)} of {len(verdicts)} responses ({kinds}); "
        f"their reward is 0{first}"
    )
