"""Paired differences: is a contender worse than its baseline, over the seeds that both had?"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev

MARGIN = 0.5  # points: an interval that lies above -MARGIN shows that there is no loss worth the name
MOST_SEEDS = 20

# Student's t, two-sided 95 %, by degrees of freedom from 1 on; beyond, an expansion has four digits (`quantile`).
_QUANTILES = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies with 95 % confidence.

    Attributes:
        mean: of `count` values.
        spread: their standard deviation; NaN of one value.
        half_width: of the interval, by Student's t; infinite of one value.
    """

    count: int
    mean: float
    spread: float
    half_width: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Of at least one value, each drawn independently of the others."""
        count = len(values)
        if count < 2:
            return cls(count, values[0], math.nan, math.inf)
        spread = stdev(values)
        return cls(count, fmean(values), spread, quantile(count - 1) * spread / math.sqrt(count))

    @property
    def low(self) -> float:
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        return self.mean + self.half_width


def verdict(difference: Interval) -> str:
    """What an interval of paired differences, contender minus baseline in points, says of a loss.

    `no loss`: all of it lies above -0.5; `loss`: all of it lies below 0; `loss below 0.5`: both; else `not decided`.
    """
    above, below = difference.low > -MARGIN, difference.high < 0
    if above and below:
        return f"loss below {MARGIN}"
    return "no loss" if above else "loss" if below else "not decided"


def seeds_needed(spread: float, half_width: float = MARGIN) -> int | None:
    """The fewest pairs whose interval is at most so wide to each side, were their spread this; None beyond 20."""
    enough = (n for n in range(2, MOST_SEEDS + 1) if quantile(n - 1) * spread / math.sqrt(n) <= half_width)
    return next(enough, None)


def quantile(freedom: int) -> float:
    """Student's t at 97.5 %, so that 95 % lie between it and its opposite, for so many degrees of freedom."""
    if freedom <= len(_QUANTILES):
        return _QUANTILES[freedom - 1]
    z = NormalDist().inv_cdf(0.975)
    # Abramowitz and Stegun 26.7.5.
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**power for power, term in enumerate(terms, start=1))
