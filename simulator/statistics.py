"""PURE: what the seeds of a comparison allow to be said: bootstrap intervals over paired seeds (mathematics.md D)."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from schemas.base import Value

DRAWS = 10_000
LEVEL = 0.95
PAIRS_MIN = 6
"""With fewer pairs even a difference of one sign throughout has a chance of more than 5 % to be chance (five pairs:
2 / 2^5 = 6.3 %), and a percentile interval of so few is too narrow. So nothing is called significant."""

Floats = NDArray[np.float64]


class Interval(Value):
    """A mean over `count` seeds and the 95 % percentile bootstrap interval around it."""

    mean: float
    low: float
    high: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the difference that this is about is more than chance. Never, with fewer than `PAIRS_MIN` seeds."""
        return self.count >= PAIRS_MIN and (self.low > 0 or self.high < 0)


def paired_difference(a: Sequence[float], b: Sequence[float], seed: int, draws: int = DRAWS) -> Interval:
    """How much higher `a` is than `b`, whose elements belong to the same seeds in the same order."""
    assert len(a) == len(b), "pairs are of equal seeds"
    return mean_interval(np.subtract(a, b).tolist(), seed, draws)


def mean_interval(values: Sequence[float], seed: int, draws: int = DRAWS) -> Interval:
    """The mean of `values`, at least one of them and all finite. A single value is its own interval, which says
    nothing about others (`Interval.count`)."""
    drawn = np.asarray(values, dtype=np.float64)
    assert drawn.size, "there is no mean of no values"
    assert np.isfinite(drawn).all(), "an interval is of finite values"
    means = _weights(drawn.size, seed, draws) @ drawn
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(means, (tail, 1 - tail))
    mean = float(drawn.mean())
    # The sums of equal values may differ in their last digits; the mean is never outside of its own interval.
    return Interval(mean=mean, low=min(float(low), mean), high=max(float(high), mean), count=drawn.size)


@lru_cache(maxsize=16)
def _weights(count: int, seed: int, draws: int) -> Floats:
    """How much of each of `count` values is in the mean of each resample, [draws, count]: the same resamples for
    every metric of a table, and drawn once."""
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=draws)
    return drawn / count
