"""PURE: what the last search for other plans found, what it was made on, and when there is reason to search anew.

A search takes a hundred times what pricing its findings takes. What it found is priced anew at every look with the
facts of then; other plans are looked for once something is better than it was at the last search (a node that came,
is faster, roomier or trusted, a link that is back, more to do), the plan in force is worse, or it is a while ago.
What becomes worse elsewhere shows in the prices, or the plan fits no more, which is a reason as well.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from orchestrator.decision import Origin
from schemas.base import NodeId
from schemas.deployment import Placement

SEARCH_PERIOD = timedelta(seconds=30)
"""What drifts too slowly to be a reason is found after this long."""
PHI_RISE = 0.05
"""By this share the plan in force costs more than at the last search: a third of what a move has to save
(`trigger.MARGIN`), so that the best other plan is known, and its blocks are staged, by the time that it counts."""
FASTER = 1.5
"""A node is so many times as fast as it was: of forty nodes none seems so by chance."""
SLOWED = 1.5
"""A failover plan whose stages take so many times what they took is looked for anew."""


@dataclass(frozen=True)
class Facts:
    """What could make a search find something better than the last one did."""

    step_ms: Mapping[NodeId, float]
    """One step of all blocks on each node that a plan may use."""
    free_bytes: Mapping[NodeId, int]
    block_bytes: int
    """Of the largest block that a node does not hold yet."""
    trusted: frozenset[NodeId]
    roundabout: frozenset[tuple[NodeId, NodeId]]
    """Who does not reach whom over a link of their own."""
    busy: bool
    """Whether a further route has work."""


@dataclass(frozen=True)
class Ready:
    """The plan for when a node fails."""

    chains: Placement
    """Empty where none was found."""
    at: datetime
    """When it was looked for."""
    step_ms: float
    """What its stages took then."""


@dataclass(frozen=True)
class Searched:
    """The last search and what is kept of it. It is about one plan in force."""

    at: datetime
    phi: float
    """Of the plan in force."""
    facts: Facts
    found: tuple[tuple[Placement, Origin], ...]
    """The other plans, but for the failovers."""
    ready: Mapping[NodeId, Ready] = field(default_factory=dict)
    drawn_at: datetime | None = None
    """When the nodes were chosen among which it was made (`shortlist`); None where it was among all there were."""


def is_stale(before: Searched, facts: Facts, phi: float, now: datetime) -> bool:
    """Whether another search may find something better than the last one did."""
    then = before.facts
    return (
        not before.at <= now < before.at + SEARCH_PERIOD
        or phi > (1 + PHI_RISE) * before.phi
        or (facts.busy and not then.busy)
        or not facts.step_ms.keys() <= then.step_ms.keys()
        or not facts.trusted <= then.trusted
        or any(FASTER * step_ms < then.step_ms[node] for node, step_ms in facts.step_ms.items())
        or any(free >= then.free_bytes[node] + facts.block_bytes for node, free in facts.free_bytes.items())
        or any(pair[0] in facts.step_ms and pair[1] in facts.step_ms for pair in then.roundabout - facts.roundabout)
    )


def longest_ago(ready: Mapping[NodeId, Ready]) -> tuple[NodeId, ...]:
    """The node whose failover plan was looked for the longest ago, if there is any."""
    return tuple(sorted(ready, key=lambda node: (ready[node].at, node))[:1])


def is_slowed(ready: Ready, step_ms: float) -> bool:
    """Whether a failover plan whose stages take `step_ms` now is so slow that there may be a better one."""
    return step_ms > SLOWED * ready.step_ms
