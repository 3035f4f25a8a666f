"""The leader's beacon, every few seconds: what is newest, for those from whom newer things may be withheld.

It goes over core NATS and not into a stream: one that is stored says later what was newest earlier, which is what an
attacker would want.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Awaitable, Callable
from datetime import datetime

from nats.aio.client import Client
from nats.errors import Error as NatsError

from bus.identity import Identity
from orchestrator.log import PlanLog
from schemas import subjects
from schemas.beacon import BEACON_EVERY_S, PLANS_MAX, Beacon
from schemas.envelope import BEACON_TYPE, seal


class Beacons:
    """One leader's beacons."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        term: int,
        now: Callable[[], datetime],
        may_act: Callable[[], Awaitable[None]],
    ) -> None:
        """`may_act` returns while this process leads, and waits while that is in doubt."""
        self._client = client
        self._identity = identity
        self._term = term
        self._now = now
        self._may_act = may_act
        self._numbers = itertools.count(1)

    async def run(self, log: PlanLog) -> None:
        """Say what is newest until cancelled."""
        while True:
            await self._may_act()
            with contextlib.suppress(NatsError, OSError):  # the connection is away: nobody would hear it
                await self._client.publish(subjects.BEACON, self._beacon(log))
            await asyncio.sleep(BEACON_EVERY_S)

    def _beacon(self, log: PlanLog) -> bytes:
        roster = self._identity.known.roster
        assert roster is not None, "an identity is made with its roster"
        plans = dict(list(log.newest.items())[-PLANS_MAX:])
        beacon = Beacon(term=self._term, number=next(self._numbers), issued_at=self._now(), roster=roster, plans=plans)
        return seal(beacon, BEACON_TYPE, self._identity.name, self._identity.key)
