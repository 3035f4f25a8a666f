"""PURE: how the quality of a link varies by itself, a Gilbert-Elliott chain times an AR(1) (mathematics.md, part D)."""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import exp, inf, nextafter, sqrt

from numpy.random import Generator

from schemas.errors import ErrorCode, ResplitError
from simulator.scenario import LinkSpec, Scenario

POINTS_PER_MEMORY = 8
"""The AR(1) is drawn so many times in the time over which it forgets; it changes little in between."""
POINTS_MAX = 100_000
"""Of one link in one run: beyond that a shorter time changes nothing that a request could notice."""


@dataclass(frozen=True, slots=True)
class Steps:
    """A value that changes at certain times: `values[i]` holds from `times[i-1]` on, until `times[i]`."""

    times: Sequence[float]
    values: Sequence[float]

    def __post_init__(self) -> None:
        assert len(self.values) == len(self.times) + 1

    def at(self, t: float) -> float:
        return self.values[bisect_right(self.times, t)]

    def until(self, t: float) -> float:
        """How long the value at `t` holds: a later time, or infinity."""
        index = bisect_right(self.times, t)
        return self.times[index] if index < len(self.times) else inf


CALM = Steps((), (1.0,))


def multiplied(spans: Iterable[tuple[float, float, float]]) -> Steps:
    """The product of the factors in force, 1 while there is none. A span is (begin, end, factor), its end excluded."""
    spans = [span for span in spans if span[1] > span[0]]
    if not spans:
        return CALM
    times = sorted({edge for begin, end, _ in spans for edge in (begin, end)})
    starts: dict[float, list[tuple[float, float]]] = {}
    for begin, end, factor in spans:
        starts.setdefault(begin, []).append((end, factor))
    active: list[tuple[float, float]] = []
    values = [1.0]
    for time in times:
        active = [span for span in active if span[0] > time] + starts.get(time, [])
        product = 1.0
        for _, factor in active:
            product *= factor
        values.append(product)
    return Steps(times, values)


@dataclass(frozen=True, slots=True)
class Quality:
    """How many times slower a link is than it should be; below 1 where it is faster for once."""

    spells: Steps
    """Gilbert-Elliott: 1 or `LinkSpec.bad_factor`."""
    drift_step_s: float
    drift: Sequence[float]
    """exp of the AR(1), each value for `drift_step_s`, the last one for ever; empty if it does not drift."""

    def at(self, t: float) -> float:
        factor = self.spells.at(t)
        if self.drift:
            factor *= self.drift[min(int(t / self.drift_step_s), len(self.drift) - 1)]
        return factor

    def until(self, t: float) -> float:
        """How long the value at `t` holds: a later time, or infinity."""
        if not self.drift or int(t / self.drift_step_s) >= len(self.drift) - 1:
            return self.spells.until(t)
        return min(self.spells.until(t), max((int(t / self.drift_step_s) + 1) * self.drift_step_s, nextafter(t, inf)))


def refuse_restless(scenario: Scenario, horizon_s: float) -> None:
    """Raises `ResplitError(INVALID_REQUEST)` if a link would become good and bad more than `POINTS_MAX` times."""
    network = scenario.network
    for name, link in (("within", network.within), ("between", network.between), ("cloud", network.cloud)):
        # A bad spell and the good one before it take bad_s / bad_share together.
        if (expected := 2 * horizon_s * link.bad_share / link.bad_s) > POINTS_MAX:
            key = f"network.{name}.bad_s"
            message = f"{key} = {link.bad_s:g} makes a link change about {expected:.3g} times; {POINTS_MAX} at most"
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"scenario {scenario.name!r}: {message}", key)


def quality(link: LinkSpec, rng: Generator, horizon_s: float) -> Quality:
    """What becomes of one link until `horizon_s`, from its stationary state on."""
    spells = _gilbert_elliott(link, rng, horizon_s)
    if link.drift == 0:
        return Quality(spells, 1.0, ())
    step_s = max(link.drift_s / POINTS_PER_MEMORY, horizon_s / POINTS_MAX)
    # x(t+h) = rho x(t) + sqrt(1 - rho^2) sigma e keeps the variance sigma^2 whatever the step.
    rho = exp(-step_s / link.drift_s)
    count = int(horizon_s / step_s) + 1
    noise = rng.standard_normal(count).tolist()
    scale = link.drift * sqrt(1 - rho * rho)
    first = link.drift * noise[0]
    states = accumulate(noise[1:], lambda state, value: rho * state + scale * value, initial=first)
    return Quality(spells, step_s, [round(exp(state), 6) for state in states])


def _gilbert_elliott(link: LinkSpec, rng: Generator, horizon_s: float) -> Steps:
    """Good and bad times, both exponential, bad ones a share `bad_share` of all."""
    if link.bad_share in (0, 1) or link.bad_factor == 1:
        return Steps((), (link.bad_factor if link.bad_share else 1.0,))
    good_s = link.bad_s * (1 - link.bad_share) / link.bad_share
    bad = bool(rng.random() < link.bad_share)
    values, times, at_s = [link.bad_factor if bad else 1.0], [], 0.0
    while (at_s := at_s + rng.exponential(link.bad_s if bad else good_s)) < horizon_s:
        bad = not bad
        times.append(round(at_s, 6))
        values.append(link.bad_factor if bad else 1.0)
    return Steps(times, values)
