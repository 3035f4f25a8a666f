"""What the leader advises comes to an agent's disk, whole and verified, and makes no trouble there."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio
from nats.aio.client import Client

from agent import disk, staging
from agent.disk import Disk
from agent.fetching import Fetcher, block_files
from agent.staging import Gate, Stager
from bus.audit import AuditTrail
from bus.blobs import BlobServer
from bus.connection import connect, settle
from bus.identity import ORCHESTRATOR, load_identity
from bus.together import make_members
from models.store import Store
from schemas import subjects
from schemas.base import Digest, NodeId
from schemas.capacity import StoredBlocks
from schemas.envelope import STAGING_TYPE, seal
from schemas.manifest import Manifest
from schemas.plan import Plan
from schemas.staging import Staging
from tests.model_split import corrupt

pytestmark = pytest.mark.asyncio

N0 = NodeId("n0")


@dataclass
class Scene:
    """An agent's stager beside somebody who has every file, and the leader's pen."""

    client: Client
    files: Fetcher
    mine: Store
    theirs: Store
    model: Digest
    manifest: Manifest
    keys: Path
    corrupt: list[Digest]
    plans: list[Plan] = field(default_factory=list)
    is_busy: bool = False
    number: int = 0

    async def advise(self, *blocks: int, number: int | None = None, signer: NodeId = ORCHESTRATOR) -> None:
        self.number += 1
        word = Staging(
            node=N0,
            term=1,
            number=number or self.number,
            issued_at=datetime.now(UTC),
            blocks=(StoredBlocks.of(self.model, blocks),) if blocks else (),
        )
        identity = load_identity(self.keys / signer, signer)
        await self.client.publish(subjects.staging(N0), seal(word, STAGING_TYPE, signer, identity.key))

    @property
    def on_disk(self) -> frozenset[int]:
        found = {stored.model: stored.blocks for stored in self.files.on_disk()}
        return found.get(self.model, frozenset())

    async def until(self, true: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not true():  # noqa: ASYNC110
                await asyncio.sleep(0.01)


@pytest_asyncio.fixture
async def scene(
    nats_url: str, tmp_path: Path, zoo_store: Store, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Scene]:
    monkeypatch.setattr(staging, "RETRY_S", 1.0)  # a busy machine may answer a request too late
    model = zoo_store.resolve("llama")
    make_members(tmp_path / "keys", [N0])
    mine = Store(tmp_path / "mine")
    holder, client = await connect(nats_url, "holder"), await connect(nats_url, "agent n0")
    manifest = zoo_store.manifest(model)
    await BlobServer(holder, zoo_store).offer([model, *(Digest(file) for file in manifest.blobs)])
    await settle(holder)
    damaged: list[Digest] = []
    files = Fetcher(client, mine, BlobServer(client, mine), damaged.append)
    found = Scene(client, files, mine, zoo_store, model, manifest, tmp_path / "keys", damaged)
    identity = load_identity(tmp_path / "keys" / N0, N0)
    audit = AuditTrail(client.jetstream(), identity)
    room = Disk(N0, mine, files, lambda: found.plans, lambda: audit)
    stager = Stager(identity, mine, files, room, lambda: found.is_busy, audit, lambda: None)
    await stager.listen(client)
    running = asyncio.create_task(stager.run())
    yield found
    running.cancel()
    for one in (client, holder):
        await one.close()


async def test_blocks_that_are_advised_come_whole_and_are_offered_on(scene: Scene) -> None:
    await scene.advise(1, 3)
    await scene.until(lambda: scene.on_disk == {1, 3})
    for ref in block_files(scene.manifest, (1, 3)):
        assert scene.mine.read(ref.digest) == scene.theirs.read(ref.digest)
    assert await scene.files.missing(block_files(scene.manifest, (1, 3))) == []
    await scene.advise(0, 1, 3)
    assert scene.manifest.text is not None
    tokenizer = scene.manifest.text.tokenizer.digest
    await scene.until(lambda: scene.on_disk == {0, 1, 3} and scene.mine.has(tokenizer))


async def test_who_is_no_leader_and_what_is_old_is_not_listened_to(scene: Scene) -> None:
    await scene.advise(1, signer=N0)
    await scene.advise(2, number=7)
    await scene.until(lambda: scene.on_disk == {2})
    await scene.advise(3, number=6)
    await scene.advise(4, number=8)
    await scene.until(lambda: scene.on_disk == {2, 4})


async def test_nothing_is_staged_while_a_plan_is_loaded(scene: Scene) -> None:
    scene.is_busy = True
    gate = Gate(lambda: scene.is_busy)
    passed: list[int] = []

    async def pass_through() -> None:
        async with gate:
            passed.append(1)

    waiting = asyncio.create_task(pass_through())
    await scene.advise(1)
    await asyncio.sleep(0.3)
    assert (passed, scene.on_disk) == ([], frozenset())
    scene.is_busy = False
    await waiting
    await scene.until(lambda: scene.on_disk == {1})


async def test_a_damaged_file_is_fetched_anew(scene: Scene) -> None:
    await scene.advise(1)
    await scene.until(lambda: scene.on_disk == {1})
    weight = scene.manifest.blocks[1].weights[0]
    corrupt(scene.mine.path(weight.digest))
    await scene.advise(1, 2)
    await scene.until(lambda: scene.on_disk == {1, 2})
    assert scene.corrupt == [weight.digest]
    assert scene.mine.read(weight.digest) == scene.theirs.read(weight.digest)


async def test_a_node_does_not_ask_itself_for_what_it_had_once(scene: Scene) -> None:
    await scene.advise(1)
    await scene.until(lambda: scene.on_disk == {1})
    refs = block_files(scene.manifest, (1,))
    for ref in refs:
        scene.mine.path(ref.digest).unlink()
    missing = await scene.files.missing(refs)
    assert set(missing) == set(refs)
    await scene.files.bring(missing)
    for ref in refs:
        assert scene.mine.read(ref.digest) == scene.theirs.read(ref.digest)


async def test_the_disks_reserve_is_not_staged_upon_and_what_nothing_needs_makes_room(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    rubbish = scene.mine.put(b"of a model that is gone" * 1000)
    monkeypatch.setattr(disk, "RESERVE_SHARE", 1.0)
    await scene.advise(1)
    await scene.until(lambda: not scene.mine.has(rubbish.digest))
    await asyncio.sleep(0.2)
    assert scene.on_disk == frozenset(), "a full disk is left as it is"
    assert scene.mine.has(scene.model), "what is wanted is no rubbish"
    monkeypatch.undo()
    await scene.advise(1, 2)
    await scene.until(lambda: scene.on_disk == {1, 2})
