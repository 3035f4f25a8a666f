"""PURE: how often each model is asked for, by what came, and how sure that is (`mathematics.md`, C3).

Counts fade, so that the rates are those of lately. A caller's rate for a model is its own count, drawn towards what all
callers together ask for as long as there is little of it; with a Gamma law for the rate of what comes at random that is
its mean, and its quantiles say how far off it may be.
"""

from dataclasses import dataclass
from math import exp, log

import numpy as np
from scipy.special import gammaincinv

from orchestrator.residency.problem import Floats

HALF_S = 600.0
"""After so long a request counts half."""
TOGETHER_S = 300.0
"""What all callers ask for weighs as much as so long a time of one's own."""
UNHEARD = 0.5
"""Requests that a model is credited with over all callers before any came: Jeffreys' prior."""
UNHEARD_S = 60.0
"""Over so long."""


@dataclass(frozen=True, eq=False)
class Popularity:
    """What came, [callers, models], faded; over how long."""

    counts: Floats
    seconds: float = 0.0
    half_s: float = HALF_S

    @classmethod
    def unheard(cls, callers: int, models: int, half_s: float = HALF_S) -> "Popularity":
        """Before anything came."""
        return cls(np.zeros((callers, models)), 0.0, half_s)

    def after(self, arrived: Floats, seconds: float) -> "Popularity":
        """Once so many more came in so many seconds."""
        kept = exp(-log(2.0) * seconds / self.half_s)
        fresh_s = self.half_s / log(2.0) * (1.0 - kept)
        # What comes in the time itself fades too, as evenly as it came.
        counts = kept * self.counts + arrived * (fresh_s / seconds if seconds > 0.0 else 1.0)
        return Popularity(counts, kept * self.seconds + fresh_s, self.half_s)

    @property
    def rates(self) -> Floats:
        """Requests a second, [callers, models]."""
        shape, seconds = self._law
        return shape / seconds

    def interval(self, share: float = 0.9) -> tuple[Floats, Floats]:
        """Between these two the rates are with this probability."""
        shape, seconds = self._law
        low, high = (np.asarray(gammaincinv(shape, at)) for at in ((1.0 - share) / 2.0, (1.0 + share) / 2.0))
        return low / seconds, high / seconds

    @property
    def _law(self) -> tuple[Floats, float]:
        """Shape, and one over scale, of the rates' Gamma law."""
        callers = max(1, len(self.counts))
        models = (self.counts.sum(axis=0) + UNHEARD) / (self.seconds + UNHEARD_S)
        mine = self.counts.sum(axis=1) + UNHEARD
        usual = models[None, :] * (mine / mine.sum())[:, None] if callers else self.counts
        return self.counts + TOGETHER_S * usual, self.seconds + TOGETHER_S
