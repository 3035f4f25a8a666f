"""PURE: how long work waits where the rate of a server varies. Effective capacity against effective bandwidth.

A server works in slots. In each, some work A arrives and the server can do S of it; both vary, and what is left over
waits for the next slots. For a tail exponent theta > 0

    EC(theta) = -log E exp(-theta S) / theta      effective capacity: the constant rate that S is as good as
    EB(theta) =  log E exp( theta A) / theta      effective bandwidth: the constant rate that A is as bad as

and with theta* where the two meet, P(backlog > q) <= exp(-theta* q) and P(delay > d) is about
P(wait) exp(-theta* EB(theta*) d) (`mathematics.md`, B3). The paper (arXiv 2601.19563) puts the mean of what arrives in
the place of EB: `paper_tail` is that, for comparison. On jobs that come one by one it is far too hopeful, since most of
what waits there waits because two came at once.

Work is in any unit, the same for both; delays are in slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import exp, expm1, inf, isinf, log, log1p
from typing import Protocol

from scipy.optimize import brentq
from scipy.special import gammainc

STEADY_MAX = 1.0 - 1e-6
"""Of what a server does on average: where more arrives the backlog grows, as far as can be reckoned."""
THETA_MIN, THETA_MAX = 1e-9, 1e4
"""Between these the exponents are looked for, in one over a unit of work."""


class Work(Protocol):
    """What arrives in a slot."""

    @property
    def mean(self) -> float:
        """Work a slot."""

    @property
    def variance(self) -> float:
        """Of the work of a slot."""

    def bandwidth(self, theta: float) -> float:
        """EB(theta), work a slot."""


class Service(Protocol):
    """What a server can do in a slot."""

    @property
    def mean(self) -> float:
        """Work a slot."""

    @property
    def variance(self) -> float:
        """Of the work of a slot."""

    def capacity(self, theta: float) -> float:
        """EC(theta), work a slot."""


@dataclass(frozen=True)
class Steady:
    """The same in every slot: as work, and as a server."""

    rate: float

    @property
    def mean(self) -> float:
        return self.rate

    @property
    def variance(self) -> float:
        return 0.0

    def bandwidth(self, theta: float) -> float:
        return self.rate

    def capacity(self, theta: float) -> float:
        return self.rate

    def times(self, count: float) -> "Steady":
        """So many that are alike and share what arrives."""
        return Steady(count * self.rate)

    def short_of(self, work: float) -> float:
        """P(what is done in a slot < work)."""
        return float(self.rate < work)


@dataclass(frozen=True)
class GammaService:
    """Gamma(shape, scale) in each slot, one independent of the other."""

    shape: float
    scale: float

    @property
    def mean(self) -> float:
        return self.shape * self.scale

    @property
    def variance(self) -> float:
        return self.shape * self.scale**2

    def capacity(self, theta: float) -> float:
        return self.shape * log1p(theta * self.scale) / theta

    def times(self, count: float) -> "GammaService":
        """So many that are alike, independent of each other, and share what arrives."""
        return GammaService(count * self.shape, self.scale)

    def short_of(self, work: float) -> float:
        """P(what is done in a slot < work)."""
        return float(gammainc(self.shape, work / self.scale))


@dataclass(frozen=True)
class PoissonJobs:
    """Jobs of one size, so many in the mean of a slot."""

    rate: float
    size: float

    @property
    def mean(self) -> float:
        return self.rate * self.size

    @property
    def variance(self) -> float:
        return self.rate * self.size**2

    def bandwidth(self, theta: float) -> float:
        return self.rate * expm1(min(theta * self.size, 700.0)) / theta


@dataclass(frozen=True)
class Together:
    """Several that arrive independently."""

    parts: tuple[Work, ...]

    @property
    def mean(self) -> float:
        return sum(part.mean for part in self.parts)

    @property
    def variance(self) -> float:
        return sum(part.variance for part in self.parts)

    def bandwidth(self, theta: float) -> float:
        return sum(part.bandwidth(theta) for part in self.parts)


@dataclass(frozen=True)
class Tail:
    """How the delay at a server ends."""

    theta: float
    """One over a unit of work; infinite where nothing ever waits."""
    rate: float
    """At which a backlog is worked off, work a slot."""
    waits: float
    """The probability that a job waits at all."""

    def over(self, delay: float) -> float:
        """P(delay > so many slots)."""
        return 0.0 if isinf(self.theta) else min(1.0, self.waits * exp(-self.theta * self.rate * delay))

    def within(self, share: float) -> float:
        """The delay, in slots, over which no more than this share of the work waits."""
        return 0.0 if isinf(self.theta) or share >= self.waits else log(self.waits / share) / (self.theta * self.rate)


def tail(work: Work, service: Service, waits: float = 1.0) -> Tail | None:
    """The `corrected` form; None where more arrives than is done. `waits`: the share of jobs that are not done in the
    slot in which they come, where that was measured; else it may be all, which is an upper bound."""
    return _tail(work.bandwidth, work.mean, work.variance, service, waits)


def paper_tail(work: Work, service: Service) -> Tail | None:
    """The `paper` form, as if the mean arrived in every slot."""
    return _tail(lambda _: work.mean, work.mean, 0.0, service, min(1.0, work.mean / service.mean))


def _tail(
    bandwidth: Callable[[float], float], arrives: float, variance: float, service: Service, waits: float
) -> Tail | None:
    if arrives >= STEADY_MAX * service.mean:
        return None

    def short(theta: float) -> float:
        """What arrives less what is done: below 0 near theta 0, and above it from theta* on."""
        return bandwidth(theta) - service.capacity(theta)

    if (spread := variance + service.variance) == 0.0:
        return Tail(inf, arrives, waits)
    # Of increments that are normal it would be just this.
    low = high = min(max(2.0 * (service.mean - arrives) / spread, THETA_MIN), THETA_MAX)
    while short(high) < 0.0:
        low, high = high, 2.0 * high
        if high > THETA_MAX:
            return Tail(inf, arrives, waits)
    while short(low) >= 0.0 and low > THETA_MIN:
        low /= 2.0
    theta = brentq(short, low, high, rtol=1e-9)
    return Tail(theta, bandwidth(theta), waits)
