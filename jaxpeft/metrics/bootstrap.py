"""Bootstrap intervals."""

from collections.abc import Callable

import numpy as np

REPLICATES = 1000


def interval(
    effect: Callable, replicates: int = REPLICATES, level: float = 0.95, seed: int = 0
) -> tuple[float, float, float]:
    """(value, low, high) of `effect(rng)`: the value is effect(None), the bounds are percentiles over replicates."""
    rng = np.random.default_rng(seed)
    drawn = np.array([effect(rng) for _ in range(replicates)])
    low, high = np.percentile(drawn, [50 * (1 - level), 50 * (1 + level)])
    return float(effect(None)), float(low), float(high)
