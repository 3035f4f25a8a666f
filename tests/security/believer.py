"""The parts of an agent that believe what others sign, on a real bus, with its folder on the disk and its trail."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from nats.aio.client import Client
from nats.aio.msg import Msg

from agent.beacons import BeaconInbox
from agent.plans import PlanInbox
from bus.audit import AuditTrail
from bus.connection import connect, settle
from bus.following import RosterInbox
from bus.identity import Identity, load_identity
from bus.stopping import end
from bus.streams import ensure_streams
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind
from schemas.base import NodeId
from schemas.capacity import Guidance
from schemas.envelope import AUDIT_TYPE, open_envelope
from schemas.known import BeaconSeen
from schemas.section import EventSection

SOON_S = 20.0


@dataclass
class Believer:
    """One life of an agent's inboxes for plans, rosters and beacons."""

    client: Client
    identity: Identity
    beacons: BeaconInbox = field(init=False)
    plans: asyncio.Queue[EventSection] = field(default_factory=asyncio.Queue)
    """Every event that it would act upon."""
    _said: list[AuditEvent] = field(default_factory=list)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def state(self) -> tuple[dict[str, bytes], object]:
        """All that an attack must leave as it was: what is on the disk, and who and what is believed."""
        folder = self.identity.folder
        return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}, self.identity.roster

    async def note(self, message: Msg) -> None:
        event, signer = open_envelope(message.data, AuditEvent, AUDIT_TYPE, self.identity.writers)
        if signer == self.identity.name:
            self._said.append(event)
            self._more.set()

    async def audited(self, kind: AuditKind, **fields: object) -> AuditEvent:
        """The event that this life wrote into the trail, now or soon, and signed."""
        async with asyncio.timeout(SOON_S):
            while True:
                self._more.clear()
                for event in self._said:
                    if event.kind is kind and all(event.fields.get(name) == value for name, value in fields.items()):
                        return event
                await self._more.wait()

    async def acts_on(self, term: int, revision: int) -> None:
        """Wait until it would act upon this event, and upon none that is newer. One that is read from the log as well
        comes again."""
        async with asyncio.timeout(SOON_S):
            while (found := await self.plans.get()) and (found.term, found.revision) != (term, revision):
                assert (found.term, found.revision) < (term, revision)

    async def deaf_to_plans(self) -> None:
        """From now on no plan event reaches it live."""
        for subscription in list(self.client._subs.values()):
            if subscription.subject == subjects.ALL_PLANS:
                await subscription.unsubscribe()
        await settle(self.client)

    async def reports(self, guidance: Guidance | None) -> None:
        """Wait until its heartbeats would say this of its guidance."""
        async with asyncio.timeout(SOON_S):
            while self.beacons.guidance != guidance:  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.05)

    async def has_taken_beacon(self, term: int, number: int) -> None:
        """Wait until this beacon is the newest that was taken."""
        async with asyncio.timeout(SOON_S):
            while self.identity.known.beacon != BeaconSeen(term=term, number=number):  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.01)

    async def rejected(self, code: str, attack: bytes, subject: str) -> AuditEvent:
        """Show it `attack`, which must be refused and audited with this code, and change nothing."""
        before = self.state()
        self._said.clear()
        await self.client.publish(subject, attack)
        event = await self.audited(AuditKind.EVENT_REJECTED, code=code, subject=subject)
        assert self.state() == before
        return event


@asynccontextmanager
async def believing(
    url: str, folder: Path, name: NodeId, now: Callable[[], datetime] = lambda: datetime.now(UTC)
) -> AsyncIterator[Believer]:
    """An agent that starts from `folder`, and ends with the block; the next one remembers what this one took."""
    client = await connect(url, "believer")
    js = await ensure_streams(client)
    identity = load_identity(folder / name, name, now)
    believer = Believer(client, identity)
    trail = AuditTrail(js, identity)
    await client.subscribe(subjects.audit(name, AuditKind.EVENT_REJECTED).rsplit(".", 1)[0] + ".*", cb=believer.note)
    plans = PlanInbox(client, identity, trail, believer.plans.put_nowait)
    rosters = RosterInbox(client, identity, trail)
    beacons = believer.beacons = BeaconInbox(client, identity, trail, plans.look, rosters.look, lambda: None)
    tasks = [asyncio.create_task(part.run()) for part in (trail, rosters, plans, beacons)]
    async with asyncio.timeout(SOON_S):
        while subjects.BEACON not in {one.subject for one in client._subs.values()}:  # noqa: ASYNC110 (it tells nobody)
            await asyncio.sleep(0.01)
    await settle(client)
    try:
        yield believer
    finally:
        await end(tasks)
        await client.close()
