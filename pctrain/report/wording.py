"""Wording that the sentences of a report share: numbers with their units and intervals, lists, and the paper's name."""

from __future__ import annotations

from collections.abc import Sequence

from pctrain.ceiling.fit import Fit
from pctrain.ceiling.stats import Measured

PAPER = "the paper (arXiv 2512.11470)"
EXCLUDES_ZERO = "The interval excludes zero."


def percent(score: Measured) -> str:
    """Return a score in percent with its 95% interval, cut at 0 and 100%."""
    low, high = max(0.0, score.low), min(100.0, score.high)
    return f"{score.value:.1f}% (95% interval {low:.1f} to {high:.1f})"


def points(difference: Measured, direction: str = "") -> str:
    """Return a positive difference, its direction (such as "above X") if one is given, and its 95% interval."""
    size = f"{difference.value:.1f} points{f' {direction}' if direction else ''}"
    return f"{size} (95% interval {difference.low:.1f} to {difference.high:.1f})"


def signed_points(change: Measured) -> str:
    """Return a change in points with its sign and its 95% interval."""
    return f"{change.value:+.1f} points (95% interval {change.low:+.1f} to {change.high:+.1f})"


def ceiling(fit: Fit) -> str:
    """Return the estimate of a ceiling with its 90% interval."""
    return f"{fit.a_post:.1f}% (90% interval {fit.a_post_low:.1f} to {fit.a_post_high:.1f})"


def listed(items: Sequence[str], last: str = "and") -> str:
    """Return "a, b and c"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} {last} {items[-1]}"


def probability(value: float) -> str:
    """Return a probability in percent that is never rounded to certainty."""
    if value > 0.995:
        return "above 99%"
    return "below 1%" if value < 0.005 else f"{value:.0%}"


def times(factor: float) -> str:
    """Return a large factor as text: "48.7 thousand times"."""
    for power, word in ((12, "trillion"), (9, "billion"), (6, "million"), (3, "thousand")):
        if factor >= 10**power:
            return f"{factor / 10**power:.3g} {word} times"
    return f"{factor:.2g} times"
