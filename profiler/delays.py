"""PURE: delays that add up along paths and meet at joins, of many paths at once (`mathematics.md`, B3).

The wait at a server is 0 with some probability, and beyond that exponential. Sums of such waits, the later of two, and
what is left of one once some time has passed all end as sums of exponentials,

    P(delay > t) = sum of c exp(-a t)

so that a path takes microseconds, exactly. Bounds for a whole path (union, Chernoff) are loose by an order of
magnitude.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce

import numpy as np
import numpy.typing as npt

from profiler.effective_capacity import Tail

APART = 0.02
"""A server whose exponent is nearer than this, relatively, to one that is there is taken for a little faster or slower:
sums hang on the differences."""
PARTS_MAX = 64
"""Of the later of two delays, at most. Beyond that it is taken for the sum of both probabilities, which it is not more
than."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Delays:
    """How likely each delay of each path is to be exceeded."""

    rates: Floats
    """a, [paths, parts]: in one over a unit of time, above 0."""
    shares: Floats
    """c, likewise: one may be below 0, their sum over a path is between 0 and 1."""

    def over(self, limits: Floats) -> Floats:
        """P(delay > limit), of a limit of 0 or more for each path."""
        ended = (self.shares * np.exp(-self.rates * limits[:, None])).sum(axis=1)
        return np.asarray(np.clip(ended, 0.0, 1.0))

    @property
    def means(self) -> Floats:
        return np.asarray((self.shares / self.rates).sum(axis=1))

    def before(self, passed: Floats) -> "Delays":
        """What of each is left once so much has passed."""
        return Delays(self.rates, self.shares * np.exp(-self.rates * passed[:, None]))

    def then(self, waits: Floats, at: Floats) -> "Delays":
        """Before a wait that there is with a probability of `waits`, and then ends at a rate of `at`, above 0."""
        waits, at = waits[:, None], self._apart(at[:, None])
        ratios = at / (at - self.rates)
        shares = self.shares * (1.0 - waits + waits * ratios)
        left = 1.0 - (self.shares * ratios).sum(axis=1, keepdims=True)
        return Delays(np.concatenate([self.rates, at], axis=1), np.concatenate([shares, waits * left], axis=1))

    def _apart(self, wanted: Floats) -> Floats:
        """The nearest that is apart from every exponent that is there."""
        at = wanted
        for step in range(1, 2 * self.rates.shape[1] + 2):
            near = (np.abs(at - self.rates) < 0.9 * APART * wanted).any(axis=1, keepdims=True)
            if not near.any():
                break
            away = (step + 1) // 2 * (-1 if step % 2 else 1)
            at = np.where(near, wanted * (1.0 + APART * away), at)
        return at

    def beside(self, other: "Delays") -> "Delays":
        """Both at once, and on when both are done."""
        rates, shares = [self.rates, other.rates], [self.shares, other.shares]
        if self.rates.shape[1] * other.rates.shape[1] <= PARTS_MAX:
            paths = len(self.rates)
            rates.append((self.rates[:, :, None] + other.rates[:, None, :]).reshape(paths, -1))
            shares.append(-(self.shares[:, :, None] * other.shares[:, None, :]).reshape(paths, -1))
        return Delays(np.hstack(rates), np.hstack(shares))


def none(paths: int) -> Delays:
    """No delay at all."""
    return Delays(np.zeros((paths, 0)), np.zeros((paths, 0)))


def waiting(tail: Tail, slot: float) -> tuple[float, float]:
    """What `Delays.then` takes, of a server with slots of this length."""
    at = tail.theta * tail.rate / slot
    return (tail.waits, at) if 0.0 < at < np.inf else (0.0, 1.0)


def joined(all_of: Iterable[Delays]) -> Delays:
    """All at once, and on when the last is done; there is one at least."""
    return reduce(Delays.beside, all_of)
