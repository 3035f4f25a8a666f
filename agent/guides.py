"""Those who steer this node: of each home its plans, beacons and rosters, and the answers that go there.

The hub is one home, and each site that the roster names orchestrators of is another. None waits for another: where one
is cut off, this node is steered by those that are not.
"""

import asyncio
import logging
from collections.abc import Callable
from functools import partial

from nats.aio.client import Client

from agent.beacons import BeaconInbox
from agent.plans import PlanInbox
from bus.audit import AuditTrail
from bus.connection import jetstream_at
from bus.following import RosterInbox
from bus.identity import Identity
from bus.stopping import stoppable
from schemas import subjects
from schemas.base import Home
from schemas.capacity import Guidance
from schemas.section import EventSection

RETRY_S = 1.0

log = logging.getLogger(__name__)


class Guide:
    """Those who steer at one home."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        audit: AuditTrail,
        deliver: Callable[[EventSection], None],
        on_roster: Callable[[], object],
        on_change: Callable[[], object],
        home: Home,
    ) -> None:
        self._js = jetstream_at(client, home)
        self._subject = subjects.at_edge(home, subjects.receipt(identity.name))
        self._receipts: asyncio.Queue[bytes] = asyncio.Queue()
        self._plans = PlanInbox(client, identity, audit, deliver, home)
        self._rosters = RosterInbox(client, identity, audit, on_roster, home)
        self.beacons = BeaconInbox(client, identity, audit, self._plans.look, self._rosters.look, on_change, home)

    def answer(self, receipt: bytes) -> None:
        """Send it, after those before it."""
        self._receipts.put_nowait(receipt)

    async def run(self) -> None:
        """Listen and answer until cancelled."""
        async with asyncio.TaskGroup() as group:
            for job in (self._rosters.run(), self._plans.run(), self.beacons.run(), self._answer()):
                group.create_task(stoppable(job))

    async def _answer(self) -> None:
        while True:
            receipt = await self._receipts.get()
            while True:
                try:
                    await self._js.publish(self._subject, receipt)
                    break
                except Exception as error:  # nats-py raises several types while the server is away
                    log.warning("a receipt could not be published yet: %s", error)
                    await asyncio.sleep(RETRY_S)


class Guides:
    """Those of every home that a roster named since this process began."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        audit: AuditTrail,
        deliver: Callable[[EventSection], None],
        on_roster: Callable[[], object],
        on_change: Callable[[], object],
    ) -> None:
        """`deliver` gets what plan events tell this node; `on_roster` hears that other members are in force, and
        `on_change` that `guidance` is another."""

        def changed() -> None:
            on_roster()
            self._news.set()

        self._identity = identity
        self._make = partial(Guide, client, identity, audit, deliver, changed, on_change)
        self._news = asyncio.Event()
        self._at: dict[Home, Guide] = {}

    @property
    def guidance(self) -> Guidance | None:
        """What keeps this node from knowing that it follows the newest of its own home."""
        guide = self._at.get(self._identity.home)
        return None if guide is None else guide.beacons.guidance

    def answer(self, home: Home, receipt: bytes) -> None:
        """Send a signed receipt to `home`, in time."""
        self._at[home].answer(receipt)

    async def run(self) -> None:
        """Follow each home until cancelled."""
        async with asyncio.TaskGroup() as group:
            while True:
                self._news.clear()
                for home in self._identity.roster.homes:
                    if home not in self._at:
                        self._at[home] = self._make(home)
                        group.create_task(stoppable(self._at[home].run()))
                await self._news.wait()
