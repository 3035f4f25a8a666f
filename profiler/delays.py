"""PURE: delays that add up along a path and meet at joins, as distributions on a grid (`mathematics.md`, B3).

Bounds for a whole path (union, Chernoff) are loose by an order of magnitude; sums are convolved here and joins are
products, which is exact for delays that are independent of one another.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from math import ceil

import numpy as np
import numpy.typing as npt

from profiler.effective_capacity import Tail

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Delays:
    """How likely each delay is."""

    step: float
    """Width of a cell, in a unit of time; what lies in a cell counts as its upper end."""
    mass: Floats
    """[cells], of sum 1: of a delay of 0 first; the last holds all that is longer."""

    def over(self, limit: float) -> float:
        """P(delay > limit), counting what is in the cell of the limit as within it."""
        return float(self.mass[ceil(limit / self.step - 1e-9) + 1 :].sum())

    @property
    def mean(self) -> float:
        """Where nothing is in the last cell; a lower bound otherwise."""
        return float(self.step * (self.mass @ np.arange(len(self.mass))))

    def after(self, delay: float) -> "Delays":
        """The same behind a fixed delay."""
        cells = min(ceil(delay / self.step - 1e-9), len(self.mass) - 1)
        mass = np.zeros_like(self.mass)
        mass[cells:] = self.mass[: len(mass) - cells]
        mass[-1] += self.mass[len(mass) - cells :].sum()
        return Delays(self.step, mass)

    def before(self, delay: float) -> "Delays":
        """What of it is left once so much has passed."""
        cells = min(int(delay / self.step + 1e-9), len(self.mass) - 1)
        mass = np.zeros_like(self.mass)
        mass[: len(mass) - cells] = self.mass[cells:]
        mass[0] += self.mass[:cells].sum()
        return Delays(self.step, mass)

    def then(self, other: "Delays") -> "Delays":
        """One after the other."""
        whole = np.convolve(self.mass, other.mass)
        mass = whole[: len(self.mass)].copy()
        mass[-1] += whole[len(self.mass) :].sum()
        return Delays(self.step, mass)

    def beside(self, other: "Delays") -> "Delays":
        """Both at once, and on when both are done."""
        reached = np.cumsum(self.mass) * np.cumsum(other.mass)
        return Delays(self.step, np.diff(reached, prepend=0.0))


def none(step: float, cells: int) -> Delays:
    """No delay at all, on a grid."""
    mass = np.zeros(cells)
    mass[0] = 1.0
    return Delays(step, mass)


def waiting(tail: Tail, slot: float, step: float, cells: int) -> Delays:
    """What a server's tail says, with slots of this length."""
    over = np.array([tail.over(cell * step / slot) for cell in range(cells)])
    mass = -np.diff(over, prepend=1.0)
    mass[-1] += over[-1]
    return Delays(step, mass)


def joined(all_of: Iterable[Delays]) -> Delays:
    """All at once, and on when the last is done; there is one at least."""
    return reduce(Delays.beside, all_of)
