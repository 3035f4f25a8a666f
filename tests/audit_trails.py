"""Real audit trails: written by real processes' parts to a real nats-server, and read back byte by byte."""

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from nats.aio.client import Client

from bus.audit import AuditTrail
from bus.connection import connect, settle
from bus.identity import ORCHESTRATOR, Identity, Keys, load_identity, read_roster, writers
from bus.stopping import end
from bus.streams import ensure_streams
from bus.together import make_members
from resplit.chain import Kept, verify
from resplit.standing import Reader, Trust
from resplit.trail import read_trail, read_trust
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind, Link, envelope_digest
from schemas.base import LifeId, NodeId
from schemas.envelope import AUDIT_TYPE, seal
from schemas.merkle import Tree

N0, N1 = NodeId("n0"), NodeId("n1")
OUT_S = 30.0
OFTEN_S = 0.1


class Writer:
    """One life of a writer: an `AuditTrail` that publishes while the block runs, and ends in order unless killed."""

    def __init__(self, client: Client, identity: Identity, memory: Path, checkpoint_s: float = 60.0) -> None:
        self._client, self._identity, self._memory, self._checkpoint_s = client, identity, memory, checkpoint_s

    async def __aenter__(self) -> AuditTrail:
        js = await ensure_streams(self._client)
        self.trail = AuditTrail(js, self._identity, memory=self._memory, checkpoint_s=self._checkpoint_s)
        self._running = asyncio.create_task(self.trail.run())
        await self._client.subscribe(subjects.ALL_AUDIT, cb=self.trail.heads.note)
        await settle(self._client)
        return self.trail

    async def __aexit__(self, *_: object) -> None:
        await self.trail.drain(OUT_S)
        await end([self._running])


async def all_out(trail: AuditTrail) -> None:
    """Wait until JetStream has acknowledged every event."""
    async with asyncio.timeout(OUT_S):
        while trail.backlog:  # noqa: ASYNC110 (nobody else waits for this)
            await asyncio.sleep(0.01)


def tell(trail: AuditTrail, count: int) -> None:
    for number in range(count):
        trail.record(AuditKind.LINK_CHANGED, "a direct link came up", peer="n9", up=number % 2 == 0)


async def envelopes_at(client: Client) -> list[bytes]:
    """The whole trail, oldest first."""
    return [data async for data in read_trail(client.jetstream(), follow=False)]


@dataclass(frozen=True)
class Recorded:
    """A trail of three writers, one of whom lived twice, and who can verify it."""

    folder: Path
    keys: Keys
    """Whose events are believed while they are written."""
    trust: Trust
    envelopes: tuple[bytes, ...]
    kept: tuple[Kept, ...]
    """What a verifier keeps who saw all of it."""

    def event(self, position: int) -> AuditEvent:
        return Reader(self.trust).read(self.envelopes[position]).event

    def link(self, position: int) -> Link:
        link = self.event(position).chain
        assert link is not None
        return link

    def lives(self) -> dict[LifeId, list[int]]:
        """Where the events of each life stand, in order."""
        found: dict[LifeId, list[int]] = {}
        for position in range(len(self.envelopes)):
            found.setdefault(self.link(position).life, []).append(position)
        return found

    def life_of(self, writer: NodeId, number: int = 0) -> list[int]:
        """Where the events of a writer's life stand: its first, its second, ..."""
        return [places for places in self.lives().values() if self.event(places[0]).source == writer][number]


async def record_trail(url: str, folder: Path) -> Recorded:
    """n0 lives twice and n1 once, side by side; the orchestrator hears them and is the last to end."""
    make_members(folder, [N0, N1])
    client = await connect(url, "test")
    try:
        async with AsyncExitStack() as orchestrating:
            leader = await orchestrating.enter_async_context(_writer(client, folder, ORCHESTRATOR))
            tell(leader, 3)
            async with _writer(client, folder, N1, OFTEN_S) as n1:
                tell(n1, 4)
                async with _writer(client, folder, N0) as n0:
                    tell(n0, 8)
                    tell(n1, 8)
                    await asyncio.sleep(2 * OFTEN_S)  # a checkpoint in the middle of its life
                    tell(n1, 8)
                await all_out(n1)
                async with _writer(client, folder, N0) as n0:
                    tell(n0, 12)
                    await all_out(n0)
                    tell(n1, 3)
            await settle(client)
            tell(leader, 2)
        envelopes = await envelopes_at(client)
    finally:
        await client.close()
    trust = read_trust(folder / ORCHESTRATOR)
    verdict = verify(envelopes, trust)
    return Recorded(folder, writers(read_roster(folder / ORCHESTRATOR)), trust, tuple(envelopes), verdict.kept)


def _writer(client: Client, folder: Path, name: NodeId, checkpoint_s: float = 60.0) -> Writer:
    return Writer(client, load_identity(folder / name, name), folder / f"{name}.audit", checkpoint_s)


def rewritten(recorded: Recorded, places: Sequence[int], since: int) -> list[bytes]:
    """The trail as its writer would have it who changes event `since` of a life, and all after it so that it fits."""
    envelopes = list(recorded.envelopes)
    identity = load_identity(recorded.folder / recorded.event(places[0]).source, recorded.event(places[0]).source)
    previous, tree = recorded.link(places[since]).previous, Tree()
    for position in places[:since]:
        tree = tree.with_leaf(sha256(envelopes[position]).digest())
    for position in places[since:]:
        event = recorded.event(position)
        assert event.chain is not None
        link = event.chain.model_copy(update={"previous": previous})
        changed = event.model_copy(update={"chain": link, "message": "it was not like that"})
        if event.checkpoint is not None:
            checkpoint = event.checkpoint.model_copy(update={"root": tree.root})
            changed = changed.model_copy(update={"checkpoint": checkpoint})
        envelopes[position] = seal(changed, AUDIT_TYPE, identity.name, identity.key)
        previous = envelope_digest(envelopes[position])
        tree = tree.with_leaf(bytes.fromhex(previous))
    return envelopes
