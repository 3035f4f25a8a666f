"""Standing by: an orchestrator that does not lead hears every heartbeat, so that its turn finds it ready."""

import asyncio
import contextlib
import re
from collections.abc import Callable
from datetime import datetime, timedelta

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from orchestrator.fold import Report, Snapshot, Tick, fold
from schemas import subjects
from schemas.base import NAME_PATTERN, NodeId

TICK_S = 0.25
SAY_EVERY_S = 1.0
SILENT_AFTER = timedelta(seconds=3.5)
"""Three words that were missed."""
STANDBYS_MAX = 64
"""Nobody signs for that word; more names than this are somebody's joke."""


class Standby:
    """Folds what it hears of nodes into a snapshot, and says that it is there."""

    def __init__(self, client: Client, name: NodeId, snapshot: Snapshot, now: Callable[[], datetime]) -> None:
        self.snapshot = snapshot
        self._client = client
        self._name = name
        self._now = now

    def report(self, report: Report) -> None:
        """Take in a report."""
        self.snapshot = fold(self.snapshot, report, self._now())

    async def run(self) -> None:
        """Say so and tick until cancelled: only who ticks knows of its own sleep, and blames no node for it."""
        while True:
            with contextlib.suppress(NatsError, OSError):  # the server is away: nobody would hear it
                await self._client.publish(subjects.standby(self._name))
            for _ in range(round(SAY_EVERY_S / TICK_S)):
                self.report(Tick())
                await asyncio.sleep(TICK_S)


def bystander(snapshot: Snapshot) -> Snapshot:
    """PURE: what a leader that was deposed goes on knowing: the nodes, and nothing of plans and wishes."""
    return Snapshot(
        term=0,
        nodes=snapshot.nodes,
        absent=snapshot.absent.intersection(snapshot.nodes),
        roster=snapshot.roster,
        deaf_since=snapshot.deaf_since,
        ticked_at=snapshot.ticked_at,
    )


class Standbys:
    """Which orchestrators stand by, as the leader hears them."""

    def __init__(self, now: Callable[[], datetime]) -> None:
        self._now = now
        self._heard_at: dict[str, datetime] = {}

    async def hear(self, client: Client) -> Subscription:
        """Listen until the subscription is ended."""
        return await client.subscribe(subjects.ALL_STANDBYS, cb=self._heard)

    @property
    def names(self) -> tuple[str, ...]:
        """By name, ascending."""
        now = self._now()
        self._heard_at = {name: at for name, at in self._heard_at.items() if now - at < SILENT_AFTER}
        return tuple(sorted(self._heard_at))

    async def _heard(self, message: Msg) -> None:
        name = message.subject.rsplit(".", 1)[-1]
        known = self.names
        if re.fullmatch(NAME_PATTERN, name) and (name in known or len(known) < STANDBYS_MAX):
            self._heard_at[name] = self._now()
