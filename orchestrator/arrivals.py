"""PURE: how often requests of a deployment arrive, from the counters in its ingresses' heartbeats."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from math import sqrt

from schemas.base import DeploymentName
from schemas.capacity import Capacity

ALIKE = 3.0
"""Standard deviations by which the rates of two spans of time may differ by chance, for requests that come at random:
then they are one rate."""
LEAST = timedelta(seconds=5)
"""The rate is no shorter time's,"""
MOST = timedelta(seconds=60)
"""and no longer one's, however steady it is."""
PEAK = timedelta(seconds=300)
"""Load that was there so lately may come back."""
TOGETHER = timedelta(seconds=1)
"""Counts this close to each other are kept as one."""


@dataclass(frozen=True)
class Arrivals:
    """The requests of one deployment that came lately."""

    since: datetime
    """When counting began."""
    counts: tuple[tuple[datetime, int], ...] = ()
    """How many came, and when that was told; the newest last."""
    highs: tuple[tuple[datetime, float], ...] = ()
    """The highest rate of the last `PEAK`, then the highest that there was since, and so on."""

    def more(self, count: int, now: datetime) -> "Arrivals":
        """After `count` more were told of."""
        kept = tuple(one for one in self.counts if now - one[0] < MOST)
        if kept and now - kept[-1][0] < TOGETHER:
            at, before = kept[-1]
            counts = (*kept[:-1], (at, before + count))
        else:
            counts = (*kept, (now, count))
        rate = Arrivals(self.since, counts).per_s(now)
        highs = tuple(one for one in self.highs if one[1] > rate and now - one[0] < PEAK)
        return Arrivals(self.since, counts, (*highs, (now, rate)))

    def per_s(self, now: datetime) -> float:
        """How many arrive a second: over the last `LEAST`, and over twice that, and so on, while the older half is like
        the newer one (adaptive windows: Bifet and Gavalda 2007, here with Poisson's deviation)."""
        # What came since the newest report is not known yet.
        end = max(now - 2 * TOGETHER, self.counts[-1][0]) if self.counts else now
        counts = list(self.counts)
        total, begin = _cut(counts, end - LEAST), max(self.since, end - LEAST)
        while self.since < begin and end - begin < MOST:
            span_s = (end - begin).total_seconds()
            edge = max(self.since, end - MOST, begin - (end - begin))
            older, older_s = _cut(counts, edge), (begin - edge).total_seconds()
            deviation = sqrt(total / span_s**2 + older / older_s**2)
            if abs(total / span_s - older / older_s) > ALIKE * deviation:
                break
            total, begin = total + older, edge
        return total / max(LEAST, end - begin).total_seconds()

    def peak_per_s(self, now: datetime) -> float:
        """How many arrived a second at the highest lately."""
        return max((rate for at, rate in self.highs if now - at < PEAK), default=0.0)


def _cut(counts: list[tuple[datetime, int]], edge: datetime) -> int:
    """Take off, at the end, what was told after `edge`: how many came."""
    total = 0
    while counts and counts[-1][0] > edge:
        total += counts.pop()[1]
    return total


def arrived(
    known: Mapping[DeploymentName, Arrivals],
    before: Capacity | None,
    capacity: Capacity,
    begun: Mapping[DeploymentName, datetime],
    now: datetime,
) -> Mapping[DeploymentName, Arrivals]:
    """The arrivals after a heartbeat that followed `before`. `begun`: since when deployments could be asked, so that
    the first request is known to have been the only one.

    A process that is new counts from 0. Of a node that was never heard nobody knows since when it has counted: its
    first heartbeat is where counting begins.
    """
    if before is None or not capacity.service:
        return known
    told = {one.deployment: one.arrived for one in before.service} if before.boot == capacity.boot else {}
    found = dict(known)
    for one in capacity.service:
        count = one.arrived - told.get(one.deployment, 0)
        if count > 0:
            new = Arrivals(min(now, begun.get(DeploymentName(one.deployment), now)) - TOGETHER)
            found[one.deployment] = found.get(one.deployment, new).more(count, now)
    return found
