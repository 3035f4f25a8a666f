"""PURE: how fast a deployment's error budget burns, from the counters in its ingresses' heartbeats.

Of all requests that count, `BUDGET` may miss a target of their class. The burn rate of a window is the share that
missed, over the budget: at 1 the budget is just used up. Two windows (Google's SRE workbook, chapter 5): the long one
says that it matters, the short one that it is still so.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta

from schemas.base import DeploymentName
from schemas.capacity import Capacity
from schemas.control import Attainment

BUDGET = 0.01
SHORT = timedelta(seconds=30)
LONG = timedelta(seconds=300)
BUCKET = timedelta(seconds=5)
"""Counts this close together are kept as one, so that a record is short."""
SETTLING = timedelta(seconds=10)
"""After a plan came into force: what ends until then mostly ran on the one before."""
REQUESTS_MIN = 20
"""In the long window, before it says anything."""
MISSES_MIN = 3
"""In a window: one or two requests are no trend, whatever share they are."""


@dataclass(frozen=True)
class Count:
    """What ended about `at`, the time at which the first heartbeat told of it."""

    at: datetime
    met: int
    missed: int


Record = tuple[Count, ...]
"""Of one deployment, the oldest first, none older than the long window."""


def heard(
    records: Mapping[DeploymentName, Record], before: Capacity | None, capacity: Capacity, now: datetime
) -> Mapping[DeploymentName, Record]:
    """The records after a heartbeat that followed `before`.

    A process that is new counts from 0. Of a node that was never heard nobody knows since when it has counted: its
    first heartbeat is where counting begins.
    """
    if before is None or not capacity.service:
        return records
    known = {one.deployment: one for one in before.service} if before.boot == capacity.boot else {}
    found = dict(records)
    for one in capacity.service:
        last = known.get(one.deployment)
        met, missed = one.met - (last.met if last else 0), one.missed - (last.missed if last else 0)
        if met > 0 or missed > 0:
            found[one.deployment] = _added(found.get(one.deployment, ()), max(0, met), max(0, missed), now)
    return found


def attainment(record: Record, since: datetime | None, now: datetime) -> Attainment | None:
    """How requests fared under a plan in force since `since`; None where none was counted."""
    begin = now - LONG if since is None else max(now - LONG, since + SETTLING)
    met, missed = _sums(record, begin)
    if not met and not missed:
        return None
    burn = None
    if met + missed >= REQUESTS_MIN:
        burn = (_rate(*_sums(record, max(begin, now - SHORT))), _rate(met, missed))
    return Attainment(met=met, missed=missed, burn=burn)


def _added(record: Record, met: int, missed: int, now: datetime) -> Record:
    kept = tuple(count for count in record if now - count.at < LONG)
    if kept and now - kept[-1].at < BUCKET:
        last = kept[-1]
        return (*kept[:-1], replace(last, met=last.met + met, missed=last.missed + missed))
    return (*kept, Count(now, met, missed))


def _sums(record: Record, begin: datetime) -> tuple[int, int]:
    within = [count for count in record if count.at >= begin]
    return sum(count.met for count in within), sum(count.missed for count in within)


def _rate(met: int, missed: int) -> float:
    return 0.0 if missed < MISSES_MIN else missed / (met + missed) / BUDGET
