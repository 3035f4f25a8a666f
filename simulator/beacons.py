"""The leader's beacons in a world, and what an agent makes of them: production's `agent.guidance`, in virtual time.

Nothing is signed here, so a number stands for the digest of an event. Only who misses something is told: to all others
a beacon says nothing new, and a world of thousands of nodes has no events for it.
"""

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from hashlib import sha256

from agent import guidance
from bus.streams import RETRY_S
from schemas.base import DeploymentName
from schemas.beacon import Beacon
from schemas.known import BeaconSeen, Known, PlanSeen, RosterSeen
from schemas.plan import PlanEvent
from schemas.roster import ClusterId, RootKeys, public_key
from schemas.section import EventSection
from schemas.signed import key_id
from simulator.kernel import EPOCH
from simulator.machine import Machine

ROSTER = RosterSeen(version=1, digest="0" * 64)
"""Members do not change in a world."""
NO_KEY = "A" * 43 + "="
ROOT = RootKeys(
    cluster=ClusterId("0" * 32),
    version=1,
    keys={key_id(public_key(NO_KEY)): NO_KEY},
    threshold=1,
    issued_at=EPOCH,
    expires_at=EPOCH + timedelta(days=1),
)
"""Nobody asks it."""


def seen(event: PlanEvent | EventSection) -> PlanSeen:
    """An event as a beacon names it, and as who took it remembers it."""
    number = f"{event.deployment} {event.term} {event.revision}"
    return PlanSeen(term=event.term, revision=event.revision, digest=sha256(number.encode()).hexdigest())


class Beacons:
    """What leaders say is newest."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)

    def next(self, term: int, events: Iterable[PlanEvent], date: datetime) -> Beacon:
        """The next one."""
        plans = {event.deployment: seen(event) for event in events}
        return Beacon(term=term, number=next(self._numbers), issued_at=date, roster=ROSTER, plans=plans)


class Guide:
    """One process that hears beacons, and reads in the log what they name and it has not."""

    def __init__(
        self,
        machine: Machine,
        now: Callable[[], float],
        taken: Callable[[], Mapping[DeploymentName, EventSection]],
        is_connected: Callable[[], bool],
        look: Callable[[], None],
    ) -> None:
        """`taken` are the newest events that it has, by deployment."""
        self._machine = machine
        self._now = now
        self._taken = taken
        self._is_connected = is_connected
        self._look = look
        self._state = guidance.State(now())

    def misses(self, events: Iterable[PlanEvent]) -> bool:
        """Whether one of these would be news."""
        taken = self._taken()
        return any(_age(event) > _age(taken.get(event.deployment)) for event in events)

    def heard(self, beacon: Beacon) -> None:
        """A beacon has come."""
        waits = bool(self._state.missing)
        self._state, _ = guidance.heard(self._state, beacon, self._known(beacon))
        if self._state.missing and not waits:
            self._state = replace(self._state, at=self._now())
            self._machine.later(guidance.TICK_S, self._tick)

    def _tick(self) -> None:
        beacon = self._state.beacon
        assert beacon is not None, "ticks begin with a beacon"
        known, connected = self._known(beacon), self._is_connected()
        self._state, steps = guidance.ticked(self._state, known, connected=connected, now=self._now())
        if any(isinstance(step, guidance.Look) for step in steps):
            self._machine.later(RETRY_S, self._look)  # as often as an inbox asks whether it is to look again
        if self._state.missing:
            self._machine.later(guidance.TICK_S, self._tick)

    def _known(self, beacon: Beacon) -> Known:
        plans = {name: seen(event) for name, event in self._taken().items()}
        return Known(root=ROOT, roster=ROSTER, plans=plans, beacon=BeaconSeen(term=beacon.term, number=beacon.number))


def _age(event: PlanEvent | EventSection | None) -> tuple[int, int]:
    return (0, 0) if event is None else (event.term, event.revision)
