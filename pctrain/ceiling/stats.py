"""Means, differences and their 95% intervals, and the one criterion by which two values count as different.

Two values are statistically distinguishable if the two-sided 95% interval of their difference excludes zero: with known
standard errors, if they are more than 1.96 standard errors apart. The headline, the findings and the answers of a
report and `pctrain data rank` all use `difference` and `Measured.excludes_zero`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import special

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Measured:
    """A measured value, or a difference of two, with its standard error and the degrees of freedom of that error."""

    value: float
    se: float
    freedom: float = math.inf

    @property
    def half_width(self) -> float:
        """Half the width of the 95% interval."""
        quantile = (1 + CONFIDENCE) / 2
        t = special.ndtri(quantile) if math.isinf(self.freedom) else special.stdtrit(self.freedom, quantile)
        return float(t) * self.se

    @property
    def low(self) -> float:
        """Lower end of the 95% interval."""
        return self.value - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the 95% interval."""
        return self.value + self.half_width

    @property
    def excludes_zero(self) -> bool:
        """True if the 95% interval excludes zero: the two sides of a difference are statistically distinguishable."""
        return self.low > 0 or self.high < 0


def mean_over_seeds(readings: Sequence[Measured]) -> Measured:
    """Return the mean of one reading per seed.

    With two or more seeds the standard error is that of the seeds' mean. A single reading keeps its own error.
    """
    n = len(readings)
    if n == 1:
        return readings[0]
    mean = math.fsum(reading.value for reading in readings) / n
    squares = math.fsum((reading.value - mean) ** 2 for reading in readings)
    return Measured(mean, math.sqrt(squares / (n - 1) / n), n - 1)


def difference(a: Measured, b: Measured) -> Measured:
    """Return a - b of two independent values, with Welch's degrees of freedom."""
    return contrast([(1.0, a), (-1.0, b)])


def contrast(terms: Sequence[tuple[float, Measured]]) -> Measured:
    """Return the sum of weight x value over independent values, with Welch and Satterthwaite's degrees of freedom."""
    value = math.fsum(weight * term.value for weight, term in terms)
    se = math.hypot(*(weight * term.se for weight, term in terms))
    estimated = [(weight * term.se, term.freedom) for weight, term in terms if math.isfinite(term.freedom)]
    squares = math.fsum(part**4 / freedom for part, freedom in estimated)
    return Measured(value, se, se**4 / squares if squares else math.inf)
