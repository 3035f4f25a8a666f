"""PURE: the exponent of a backlog's tail from what was seen slot by slot, without knowing what arrives or how a server
varies (`mathematics.md`, B3).

With X = A - S, what arrived in a slot less what could be done in it, the backlog's tail falls as exp(-theta* q) where
theta* > 0 solves E exp(theta X) = 1 (`profiler.effective_capacity` has the same root by formulas). Of the ways to
estimate it that were compared, the root of the empirical mean came closest.
"""

from dataclasses import dataclass
from math import inf, sqrt

import numpy as np
import numpy.typing as npt

BLOCKS = (1, 8, 16, 32)
"""Slots that are summed, so that sums depend little on one another where slots do."""
SLOTS_MIN = 30
"""Fewer sums than these say nothing about a tail."""
ABOVE_MIN = 5
"""So many sums at least in which more came than was done."""
RESAMPLES = 200
CONFIDENCE = 0.95
THETA_MAX = 1e4
HALVINGS = 60

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Observed:
    """What the slots say of theta*, in one over a unit of work; infinite where nothing was ever left over."""

    theta: float
    low: float
    """Lower end of the interval: what to plan by. 0 where it may be that more arrives than is done."""
    high: float
    block: int
    """Slots that were summed."""


def observed(increments: Floats, seed: int, weights: Floats | None = None) -> Observed | None:
    """Theta* with a 95 % bootstrap interval, of X slot by slot; None where there are too few slots.

    `weights`: how much each counts, such as exponentially less the older it is.
    """
    weights = np.ones(len(increments)) if weights is None else weights
    block = _block(increments, weights)
    sums, weights = _summed(increments, weights, block)
    if len(sums) < SLOTS_MIN:
        return None
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(sums), size=(RESAMPLES, len(sums)))
    roots = decay(sums[drawn], weights[drawn])
    low, high = np.quantile(roots, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], method="nearest")
    return Observed(float(decay(sums[None], weights[None])[0]), float(low), float(high), block)


def decay(increments: Floats, weights: Floats) -> Floats:
    """The root of sum w exp(theta x) / sum w = 1 above 0, [n] of [n, slots]: 0 where the mean of x is not below 0,
    infinite where no x is above it."""
    heaviest = increments.max(axis=1)
    shares = weights / weights.sum(axis=1, keepdims=True)
    found = np.full(len(increments), inf)
    found[(shares * increments).sum(axis=1) >= 0.0] = 0.0
    open_ = np.flatnonzero((found == inf) & (heaviest > 0.0))
    if not len(open_):
        return found
    x, w, top = increments[open_], shares[open_], heaviest[open_]

    def rises(theta: Floats) -> npt.NDArray[np.bool_]:
        with np.errstate(divide="ignore"):  # beside the heaviest nothing may be left of a row
            beside = np.log((w * np.exp(theta[:, None] * (x - top[:, None]))).sum(axis=1))
        return np.asarray(beside + theta * top > 0.0)

    low, high = np.zeros(len(x)), 1.0 / top
    while not (done := rises(high) | (high > THETA_MAX)).all():
        high = np.where(done, high, 2.0 * high)
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        above = rises(middle)
        low, high = np.where(above, low, middle), np.where(above, middle, high)
    found[open_] = (low + high) / 2.0
    return found


def _block(increments: Floats, weights: Floats) -> int:
    """The smallest whose sums do not depend on one another, as far as some of them are above 0: without, nothing could
    be said of a tail that there is."""
    chosen = 1
    for block in BLOCKS:
        sums, of_sums = _summed(increments, weights, block)
        if len(sums) < SLOTS_MIN or np.count_nonzero(sums > 0.0) < ABOVE_MIN:
            break
        chosen = block
        if abs(_correlation(sums, of_sums)) < 2.0 * sqrt((of_sums**2).sum()) / of_sums.sum():
            break
    return chosen


def _summed(increments: Floats, weights: Floats, block: int) -> tuple[Floats, Floats]:
    whole = len(increments) // block * block
    newest = slice(len(increments) - whole, None)
    return increments[newest].reshape(-1, block).sum(axis=1), weights[newest].reshape(-1, block).mean(axis=1)


def _correlation(values: Floats, weights: Floats) -> float:
    """Of each with the next."""
    around = values - np.average(values, weights=weights)
    variance = float((weights * around**2).sum())
    return 0.0 if variance == 0.0 else float((weights[1:] * around[1:] * around[:-1]).sum()) / variance
