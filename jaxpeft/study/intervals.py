"""The statistics of claims: intervals over seeds, the word for an interval, slopes, and pairs that depart from monotonicity.

An effect is one number per seed. Each seed draws a subset, an initialisation and an order of its own, so the numbers of
different seeds are independent, and the interval is that of Student's t. Whatever the runs of one seed have in common cancels
in the effect or is part of its spread.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from scipy import stats

LEVEL = 0.95
POSITIVE, BELOW, FLAT, NEGATIVE = "positive", "positive, below the margin", "flat", "negative"
UNDECIDED, NOT_TESTED = (
    "undecided",
    "not tested",
)  # no verdict: the interval allows several, or there is too little to judge


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its t-interval, and p, the two-sided probability of such a mean if the truth is 0."""

    value: float
    low: float
    high: float
    p: float


def t_interval(values: Sequence[float] | np.ndarray, level: float = LEVEL) -> Estimate:
    """The interval mean -+ t(n - 1) s / sqrt(n) of one number per seed. Raises ValueError below two seeds."""
    values = np.asarray(values, float)
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs at least 2 seeds, but there is {len(values)}")
    mean, error, df = values.mean(), values.std(ddof=1) / np.sqrt(len(values)), len(values) - 1
    half = stats.t.ppf(0.5 + level / 2, df) * error
    p = 2 * stats.t.sf(abs(mean) / error, df) if error else float(mean == 0)
    return Estimate(float(mean), float(mean - half), float(mean + half), float(p))


def verdict(low: float, high: float, margin: float) -> str:
    """The word for an interval. Each word says where the truth is, and is right whenever the interval contains it.

    positive                    0 < low, margin <= high    above 0; it may reach the margin
    positive, below the margin  0 < low, high < margin     above 0, and too small to matter
    flat                        -margin < low <= 0 <= high < margin    within the margin of 0
    negative                    high < 0                   below 0
    undecided                   else: no verdict
    """
    if low > 0:
        return POSITIVE if high >= margin else BELOW
    if high < 0:
        return NEGATIVE
    return FLAT if -margin < low and high < margin else UNDECIDED


def slope(xs: Sequence[float], scores_PS: np.ndarray) -> np.ndarray:
    """Least-squares slopes of scores (points, seeds) per doubling of x -> (seeds,)."""
    x_P = np.log2(np.asarray(xs, float))
    x_P -= x_P.mean()
    return x_P @ scores_PS / (x_P @ x_P)


def doublings(xs: Sequence[float]) -> float:
    """The length of an axis."""
    return float(np.log2(max(xs) / min(xs)))


def seed_sd(scores_CS: np.ndarray) -> float:
    """The standard deviation over seeds of a cell's score, pooled over cells (cells, seeds)."""
    return float(np.sqrt(scores_CS.var(axis=1, ddof=1).mean()))


def departure_pair(scores_P: np.ndarray) -> tuple[int, int] | None:
    """(i, j): the pair of points whose scores_P[i] - scores_P[j] is the departure from monotonicity; None for a monotonic line.

    It is the smaller of the largest rise and the largest fall along the points, because a monotonic line lacks one of them.
    """
    first, second = np.triu_indices(len(scores_P), 1)
    rises = scores_P[second] - scores_P[first]
    up, down = rises.argmax(), rises.argmin()
    if min(rises[up], -rises[down]) <= 0:
        return None
    if rises[up] < -rises[down]:
        return int(second[up]), int(first[up])
    return int(first[down]), int(second[down])


def surviving(p_values: Sequence[float]) -> list[bool]:
    """Which effects differ from 0 when all are looked at together, by Benjamini and Yekutieli's control of false discoveries,
    which holds under any dependence."""
    if not len(p_values):
        return []
    return [bool(p <= 1 - LEVEL) for p in stats.false_discovery_control(p_values, method="by")]
