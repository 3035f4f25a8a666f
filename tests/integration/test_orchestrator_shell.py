"""The orchestrator on a real nats-server, with peers that speak the agents' protocol with keys of their own."""

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy
from pydantic import ValidationError

import orchestrator.log
from bus import blobs
from bus.connection import connect
from bus.credentials import Credentials
from bus.identity import ORCHESTRATOR, Identity, load_credentials, load_identity
from bus.sealed_heartbeats import seal_heartbeat
from bus.sealed_plans import seal_event
from bus.stopping import end
from bus.streams import ensure_streams
from bus.together import CLUSTER, OPERATOR, make_members
from models.store import Store
from orchestrator import operators, wishes
from orchestrator.log import PlanLog
from orchestrator.rollout import Propose, Rollout, step
from orchestrator.shell import OrchestratorConfig, run
from profiler.memory import memory_bytes
from resplit.control import users
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import BlockTime, Capacity, HostedStage, Provider
from schemas.codec import encode
from schemas.control import (
    DeployReply,
    DeployRequest,
    DrainReply,
    DrainRequest,
    ExplainReply,
    ExplainRequest,
    PlaceRequest,
    PlanReply,
    PlanRequest,
    RemoveReply,
    RemoveRequest,
    StatusReply,
    TrustReply,
    TrustRequest,
)
from schemas.deployment import NodeWish, Settings, Stage
from schemas.envelope import AUDIT_TYPE, HEARTBEAT_TYPE, LEADER_TYPE, PLAN_TYPE, RECEIPT_TYPE, open_envelope, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.heartbeat import Heartbeat, presence_of
from schemas.leader import Leadership
from schemas.manifest import BlobRef, Block, Manifest, ModelKind, TensorSpec
from schemas.plan import Plan, Receipt, ReceiptStatus, Route
from schemas.request import ErrorReply
from schemas.section import EventSection, SealedEvent, SeenPlan
from tests.conftest import NatsServer, running_server
from tests.sealed_events import told

CHAT = DeploymentName("chat")
NODES = (NodeId("a"), NodeId("b"), NodeId("c"))
MIB = 1 << 20
BLOCKS = 6
"""Of the model."""


@dataclass
class Peer:
    """A node: it publishes signed heartbeats and answers plan events the way an agent does."""

    identity: Identity
    client: Client
    js: JetStreamContext
    model: Digest
    """Whose block times it knows, in a plan or not, as one that has run it before."""
    memory_bytes: int = 1 << 30
    block_bytes: int = 0
    """What a loaded block takes of it."""
    refuses: bool = False
    alive: bool = True
    boot: str = "first"
    sent: int = 0
    step_ms: float | None = None
    """What it says every block of the model takes, once it has heard of a plan; None for nothing measured."""
    seen: list[EventSection] = field(default_factory=list)

    async def run(self) -> None:
        beats = asyncio.create_task(self._beat())
        try:
            while True:
                await self._follow()
        finally:
            beats.cancel()

    async def _follow(self) -> None:
        """Take each deployment's last event and then new ones, until the connection was a new one."""
        connection = self.client.stats["reconnects"]
        try:
            subscription = await self.js.pull_subscribe(
                subjects.ALL_PLANS,
                stream=subjects.STREAM_PLANS,
                config=ConsumerConfig(deliver_policy=DeliverPolicy.LAST_PER_SUBJECT, ack_policy=AckPolicy.NONE),
            )
        except (NatsError, TimeoutError):
            await asyncio.sleep(0.1)
            return
        while self.client.stats["reconnects"] == connection:
            try:
                (message,) = await subscription.fetch(1, timeout=0.5)
            except (NatsError, TimeoutError):
                continue
            event = told(message.data, self.identity)
            if self.seen and event.revision <= self.seen[-1].revision:
                continue
            self.seen.append(event)
            if self.alive:
                await self._answer(event)
        await subscription.unsubscribe()

    async def _beat(self) -> None:
        while True:
            if self.alive:
                await self.beat()
            await asyncio.sleep(0.3)

    async def beat(self) -> None:
        live = {p.epoch: p for p in (self.seen[-1].plans if self.seen else ()) if self.name in p.nodes}
        loaded = {block for plan in live.values() for block in plan.blocks_on(self.name)}
        capacity = Capacity(
            node=self.name,
            boot=self.boot,
            sequence=self.sent,
            issued_at=datetime.now(UTC),
            version="0",
            link=None,
            provider=Provider(name="cpu", device="test", flops_per_s=1e10, bytes_per_s=1e10),
            threads=1,
            memory_total_bytes=self.memory_bytes,
            memory_free_bytes=self.memory_bytes - self.block_bytes * len(loaded),
            disk_free_bytes=1 << 40,
            load=0.1,
            stages=tuple(
                HostedStage(
                    deployment=p.deployment,
                    epoch=p.epoch,
                    model=p.model,
                    blocks=p.blocks_on(self.name),
                    state="serving",
                    sequences=0,
                )
                for p in live.values()
            ),
            block_times=tuple(
                BlockTime(model=self.model, block=block, decode_ms=self.step_ms, prefill_ms_per_token=0)
                for block in range(BLOCKS if self.seen else 0)
                if self.step_ms is not None
            ),
        )
        self.sent += 1
        await self.client.publish(subjects.capacity(self.name), seal_heartbeat(capacity, lambda _: (), self.identity))

    @property
    def name(self) -> NodeId:
        return self.identity.name

    async def _answer(self, event: EventSection) -> None:
        if event.candidate is not None and self.name in event.candidate.nodes:
            status = ReceiptStatus.REFUSED if self.refuses else ReceiptStatus.READY
            await self.say(event.candidate, status)
        if event.current is not None and self.name in event.current.nodes:
            await self.say(event.current, ReceiptStatus.APPLIED)
        for plan in event.draining:
            if self.name in plan.nodes:
                await self.say(plan, ReceiptStatus.DRAINED)

    async def say(self, plan: SeenPlan, status: ReceiptStatus) -> None:
        receipt = Receipt(
            node=self.name,
            deployment=plan.deployment,
            epoch=plan.epoch,
            plan=plan.digest,
            status=status,
            error="no" if status is ReceiptStatus.REFUSED else None,
            elapsed_ms=1,
        )
        await self.js.publish(subjects.receipt(self.name), seal(receipt, RECEIPT_TYPE, self.name, self.identity.key))


@dataclass
class World:
    """A server's address, keys, a store with one model, and an operator's connection."""

    url: str
    keys: Path
    store: Store
    model: Digest
    client: Client
    js: JetStreamContext

    @property
    def login(self) -> Credentials:
        """What all connect with: the server has TLS, and lets everybody in."""
        return load_credentials(self.keys / OPERATOR)

    async def ask(self, verb: str, data: bytes, timeout_s: float = 15) -> bytes:
        reply = await self.client.request(subjects.control(verb), data, timeout=timeout_s)
        return reply.data

    async def deploy(self, **fields: Any) -> DeployReply:
        data = await self.ask("deploy", encode(DeployRequest(**{"name": CHAT, "model": "toy", **fields})))
        return DeployReply.model_validate_json(data)

    async def refusal(self, verb: str, data: bytes) -> ErrorReply:
        return ErrorReply.model_validate_json(await self.ask(verb, data))

    async def status(self) -> StatusReply:
        # A leader that ends with the question unread answers nothing; its successor answers the next one.
        return StatusReply.model_validate_json(await self.ask("status", b"", timeout_s=2))

    async def until(self, condition: Callable[[StatusReply], bool], timeout_s: float = 15) -> StatusReply:
        async with asyncio.timeout(timeout_s):
            while True:
                # Nobody answers while the server is away, and a leader that is deposed says just that.
                with contextlib.suppress(NatsError, ValidationError):
                    status = await self.status()
                    if condition(status):
                        return status
                await asyncio.sleep(0.05)

    async def audited(self, kind: AuditKind) -> list[AuditEvent]:
        identity = load_identity(self.keys / ORCHESTRATOR, ORCHESTRATOR)
        found = []
        sequence = 1
        info = await self.js.stream_info(subjects.STREAM_AUDIT)
        while sequence <= info.state.last_seq:
            message = await self.js.get_msg(subjects.STREAM_AUDIT, sequence)
            event, _ = open_envelope(message.data or b"", AuditEvent, AUDIT_TYPE, identity.writers)
            found.append(event)
            sequence += 1
        return [event for event in found if event.kind is kind]

    @asynccontextmanager
    async def orchestrator(self) -> AsyncIterator["asyncio.Task[None]"]:
        ready = asyncio.Event()
        task = asyncio.create_task(
            run(OrchestratorConfig(self.url, self.keys / ORCHESTRATOR, self.store.root), ready.set)
        )
        waiting = asyncio.create_task(ready.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
        assert ready.is_set()
        try:
            yield task
        finally:
            task.cancel()
            await asyncio.wait({task}, timeout=10)
            assert task.done()
            assert task.cancelled() or task.exception() is None, task.exception()

    @asynccontextmanager
    async def peers(self, *names: NodeId, **fields: Any) -> AsyncIterator[dict[NodeId, Peer]]:
        found: dict[NodeId, Peer] = {}
        tasks = []
        for name in names:
            client = await connect(self.url, name, credentials=self.login)
            identity = load_identity(self.keys / name, name)
            found[name] = Peer(identity, client, client.jetstream(), self.model, **fields)
            tasks.append(asyncio.create_task(found[name].run()))
        try:
            yield found
        finally:
            await end(tasks)
            assert all(task.cancelled() for task in tasks), tasks
            for peer in found.values():
                await peer.client.close()


def toy_model(store: Store, blocks: int = 6, weight_bytes: int = 4 * MIB) -> Digest:
    """A tensor model of `blocks` equal blocks whose files are really in the store."""
    edge = TensorSpec(name="x", dtype="float32", shape=("batch", 64))
    made = []
    for index in range(blocks):
        graph = store.put(b"graph %d" % index)
        weight = store.put(hashlib.sha256(b"%d" % index).digest() * (weight_bytes // 32))
        made.append(
            Block(
                index=index,
                role="segment",
                graph=graph,
                weights=(weight,),
                input=None if index == 0 else edge,
                output=None if index == blocks - 1 else edge,
                flops_per_token=weight_bytes // 2,
            )
        )
    manifest = Manifest(
        name="toy",
        kind=ModelKind.TENSOR,
        architecture="toy",
        precision="fp32",
        source="test",
        cut="equal blocks",
        inputs=(edge,),
        outputs=(edge,),
        blocks=tuple(made),
        whole=BlobRef(digest=made[0].graph.digest, size_bytes=made[0].graph.size_bytes),
    )
    digest = store.save_manifest(manifest)
    store.name("toy", digest)
    return digest


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    make_members(tmp_path / "keys", NODES)
    return tmp_path / "keys"


@pytest.fixture
def server(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    with running_server(tmp_path_factory.mktemp("nats"), keys / CLUSTER) as running:
        yield running


@pytest.fixture
async def world(
    server: NatsServer, keys: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    # Peers here say all they are every 0.3 s, where a spare agent does every ten.
    monkeypatch.setattr(operators, "ALL_HEARD", timedelta(seconds=3))
    monkeypatch.setattr(wishes, "LOOK_S", 0.5)
    store = Store(tmp_path / "store")
    model = toy_model(store)
    client = await connect(server.url, "operator", credentials=load_credentials(keys / OPERATOR))
    js = await ensure_streams(client)
    yield World(server.url, keys, store, model, client, js)
    await client.close()


def serving(status: StatusReply) -> bool:
    return [one.state for one in status.deployments] == ["serving"]


async def test_a_deployment_is_planned_prepared_and_committed(world: World) -> None:
    async with world.peers(*NODES[:2]) as peers, world.orchestrator():
        reply = await world.deploy(stages=2, settings=Settings(max_sequences=4))
        assert reply.deployment.model == world.model
        assert reply.routes == ((Stage(node="a", first=0, last=2), Stage(node="b", first=3, last=5)),)
        status = await world.until(lambda s: serving(s) and s.deployments[0].applied == ("a", "b"))
        (chat,) = status.deployments
        assert chat.current is not None
        assert chat.current.chains == reply.routes
        assert chat.current.routes[0].source == "a"
        assert chat.current.epoch == 1
        assert chat.estimate is not None
        assert chat.error is None
        seen = [(e.candidate is not None, e.current is not None, e.revision) for e in peers[NODES[0]].seen]
        assert seen == [(True, False, 1), (False, True, 2)]
        assert [node.capacity.node for node in status.nodes] == ["a", "b"]
    prepared = await world.audited(AuditKind.PLAN_PREPARED)
    assert prepared[0].epoch == 1
    assert "tpot_ms" in str(prepared[0].fields["terms"])
    assert len(await world.audited(AuditKind.PLAN_COMMITTED)) == 1
    assert {event.fields["node"] for event in await world.audited(AuditKind.NODE_JOINED)} == {"a", "b"}


async def test_the_model_can_be_fetched_from_the_orchestrators_store(world: World, tmp_path: Path) -> None:
    async with world.peers(NODES[0]), world.orchestrator():
        await world.deploy()
        await world.until(serving)
        mine = Store(tmp_path / "mine")
        size = world.store.path(world.model).stat().st_size
        await blobs.fetch(world.client, mine, world.model, size)
        for digest, size_bytes in mine.manifest(world.model).blobs.items():
            await blobs.fetch(world.client, mine, Digest(digest), size_bytes)


async def test_what_cannot_run_is_refused_at_once_and_not_stored(world: World) -> None:
    async with world.peers(NODES[0], memory_bytes=12 * MIB), world.orchestrator():
        unknown = await world.refusal("deploy", encode(DeployRequest(name=CHAT, model="nope")))
        assert unknown.error.code is ErrorCode.UNKNOWN_MODEL
        too_large = await world.refusal("deploy", encode(DeployRequest(name=CHAT, model="toy")))
        assert too_large.error.code is ErrorCode.MODEL_TOO_LARGE
        assert "bytes short" in too_large.error.message
        wrong = DeployRequest(name=CHAT, model="toy", placement=(Stage(node=NODES[0], first=0, last=3),))
        uncovered = await world.refusal("deploy", encode(wrong))
        assert (uncovered.error.code, uncovered.error.field) == (ErrorCode.INVALID_REQUEST, "placement.0.last")
        malformed = await world.refusal("deploy", b'{"name": "chat", "model": "toy", "stagse": 2}')
        assert (malformed.error.code, malformed.error.field) == (ErrorCode.INVALID_REQUEST, "stagse")
        missing = await world.refusal("remove", encode(RemoveRequest(name=CHAT)))
        assert missing.error.code is ErrorCode.UNKNOWN_DEPLOYMENT
        assert (await world.status()).deployments == ()


async def test_a_placement_is_honoured_exactly_even_a_u_shaped_one(world: World) -> None:
    placement = tuple(Stage(node=n, first=f, last=t) for n, f, t in (("a", 0, 1), ("b", 2, 4), ("a", 5, 5)))
    async with world.peers(*NODES[:2]), world.orchestrator():
        await world.deploy(placement=placement)
        status = await world.until(serving)
        assert status.deployments[0].current is not None
        assert status.deployments[0].current.routes[0].stages == placement


async def test_a_lost_node_is_planned_around_and_a_changed_wish_followed(world: World) -> None:
    async with world.peers(*NODES) as peers, world.orchestrator():
        await world.deploy(stages=2)
        first = await world.until(serving)
        assert first.deployments[0].current is not None
        assert set(first.deployments[0].current.nodes) == {"a", "b"}
        peers[NODES[1]].alive = False
        after = await world.until(lambda s: serving(s) and s.deployments[0].current.epoch == 2)  # type: ignore[union-attr]
        assert after.deployments[0].current is not None
        assert set(after.deployments[0].current.nodes) == {"a", "c"}
        assert [node.capacity.node for node in after.nodes if node.lost] == ["b"]
        await world.deploy(stages=1)
        last = await world.until(lambda s: serving(s) and s.deployments[0].current.epoch == 3)  # type: ignore[union-attr]
        assert last.deployments[0].current is not None
        assert len(last.deployments[0].current.routes[0].stages) == 1
    assert [event.fields["node"] for event in await world.audited(AuditKind.NODE_LOST)] == ["b"]


async def test_a_node_that_slows_is_left_and_the_reason_can_be_asked_for(world: World) -> None:
    async with world.peers(*NODES, step_ms=5.0) as peers, world.orchestrator():
        await world.deploy(stages=2)
        first = await world.until(serving)
        assert first.deployments[0].current is not None
        slowed = first.deployments[0].current.routes[0].stages[1].node
        idle = PlanReply.model_validate_json(await world.ask("plan", encode(PlanRequest(name=CHAT))))
        assert idle.decision.action == "keep"
        assert len(idle.decision.candidates) > 1
        peers[slowed].step_ms = 15.0
        after = await world.until(lambda s: serving(s) and s.deployments[0].current.epoch == 2, 30)  # type: ignore[union-attr]
        current = after.deployments[0].current
        assert current is not None
        assert slowed not in current.nodes
        assert f"from {slowed} to" in current.reason
        explained = ExplainReply.model_validate_json(await world.ask("explain", encode(ExplainRequest())))
        assert [(one.epoch, one.action, one.plan_reason) for one in explained.decisions] == [
            (2, "keep", current.reason)
        ]
        unknown = await world.refusal("explain", encode(ExplainRequest(name=DeploymentName("nobody"))))
        assert unknown.error.code is ErrorCode.UNKNOWN_DEPLOYMENT
    told = await world.audited(AuditKind.DECISION)
    acted = [event for event in told if event.fields["action"] != "keep"]
    assert [(event.epoch, event.fields["action"], event.fields["reason"]) for event in acted] == [
        (1, "redistribute", current.reason)
    ]
    prepared = await world.audited(AuditKind.PLAN_PREPARED)
    assert [event.fields["cause"] for event in prepared] == ["no_plan", "better_plan"]


async def test_the_plan_without_a_node_is_ready_before_the_node_is_lost(world: World) -> None:
    async with world.peers(*NODES) as peers, world.orchestrator():
        await world.deploy(stages=2)
        await world.until(serving)
        for _ in range(150):
            if await world.audited(AuditKind.DECISION):
                break
            await asyncio.sleep(0.1)
        peers[NODES[1]].alive = False
        after = await world.until(lambda s: serving(s) and s.deployments[0].current.epoch == 2)  # type: ignore[union-attr]
        assert after.deployments[0].current is not None
        assert after.deployments[0].current.reason == "lost: b; the plan without it was ready"


async def test_a_refusal_aborts_and_another_node_is_tried(world: World) -> None:
    async with world.peers(*NODES[:2]) as peers, world.orchestrator():
        peers[NODES[0]].refuses = True
        await world.deploy()
        status = await world.until(serving)
        assert status.deployments[0].current is not None
        assert status.deployments[0].current.nodes == ("b",)
        told_of = [(bool(event.candidate), bool(event.current)) for event in peers[NODES[1]].seen]
        assert told_of == [(False, False), (False, False), (True, False), (False, True)], "of its own plan alone"
    assert "refused: no" in str((await world.audited(AuditKind.PLAN_ABORTED))[0].fields["reason"])


async def test_a_removed_deployment_drains_and_its_epochs_never_come_back(world: World) -> None:
    async with world.peers(NODES[0]) as peers, world.orchestrator():
        await world.deploy()
        await world.until(serving)
        assert RemoveReply.model_validate_json(await world.ask("remove", encode(RemoveRequest(name=CHAT)))).name == CHAT
        await world.until(lambda s: s.deployments == ())
        assert peers[NODES[0]].seen[-1].plans == ()
        await world.deploy()
        status = await world.until(serving)
        assert status.deployments[0].current is not None
        assert status.deployments[0].current.epoch > 1, "one that was given up in between has a number of its own"


async def test_a_new_orchestrator_goes_on_where_the_old_one_stopped(world: World) -> None:
    async with world.peers(*NODES[:2]) as peers:
        async with world.orchestrator():
            await world.deploy(stages=2)
            before = await world.until(serving)
        async with world.orchestrator():
            after = await world.until(lambda s: serving(s) and len(s.nodes) == 2)
            assert after.deployments[0].current == before.deployments[0].current
            assert after.term == before.term + 1
            assert len(peers[NODES[0]].seen) == 2
            await world.deploy(stages=1)
            changed = await world.until(lambda s: serving(s) and s.deployments[0].current.epoch == 2)  # type: ignore[union-attr]
            assert changed.deployments[0].revision > before.deployments[0].revision


async def terms_in_log(world: World) -> list[tuple[str, int]]:
    """(subject, term) of every message of the log of plans that an orchestrator signed, in order."""
    identity = load_identity(world.keys / ORCHESTRATOR, ORCHESTRATOR)
    found: list[tuple[str, int]] = []
    last = (await world.js.stream_info(subjects.STREAM_PLANS)).state.last_seq
    for sequence in range(1, last + 1):
        message = await world.js.get_msg(subjects.STREAM_PLANS, sequence)
        data, trusted = message.data or b"", identity.orchestrators
        if message.subject == subjects.ROSTER:
            continue
        if message.subject == subjects.LEADER:
            term = open_envelope(data, Leadership, LEADER_TYPE, trusted)[0].term
        else:
            term = open_envelope(data, SealedEvent, PLAN_TYPE, trusted)[0].term
        found.append((message.subject or "", term))
    return found


async def test_a_leader_that_was_replaced_adds_nothing_in_its_term_and_goes_on_as_a_follower(world: World) -> None:
    async with world.peers(NODES[0]), world.orchestrator() as old:
        await world.deploy()
        before = await world.until(serving)
        # Somebody else with the orchestrator's key takes the log over, without ever having held the lease.
        usurper = PlanLog(world.js, load_identity(world.keys / ORCHESTRATOR, ORCHESTRATOR))
        leadership, rollouts = await usurper.take_office(
            NodeId("usurper"), datetime.now(UTC), lambda _, error: pytest.fail(str(error))
        )
        assert leadership.term == before.term + 1
        assert rollouts[CHAT].current == before.deployments[0].current
        reply = await world.deploy(settings=Settings(max_sequences=2))
        after = await world.until(
            lambda s: serving(s) and s.deployments[0].deployment == reply.deployment and s.term == before.term + 2
        )
        assert after.leader is not None
        assert after.leader.term == after.term
        assert not old.done()
    terms = await terms_in_log(world)
    assert [term for _, term in terms] == sorted(term for _, term in terms)
    assert [term for subject, term in terms if subject == subjects.LEADER] == [1, 2, 3]
    told = [(e.kind, e.fields["term"]) for e in await world.audited(AuditKind.LEADER_DEPOSED)]
    assert told == [(AuditKind.LEADER_DEPOSED, 1), (AuditKind.LEADER_DEPOSED, 3)]


async def test_of_two_orchestrators_one_answers_and_the_other_takes_over_at_once_when_it_is_told_to_stop(
    world: World,
) -> None:
    async with world.peers(*NODES[:2]) as peers, world.orchestrator() as first:
        await world.deploy(stages=2)
        before = await world.until(serving)
        second = asyncio.create_task(
            run(OrchestratorConfig(world.url, world.keys / ORCHESTRATOR, world.store.root, NodeId("second")))
        )
        try:
            seen = await world.until(lambda s: s.standbys == ("second",))
            assert seen.leader == before.leader
            beats = {peer.name: peer.sent for peer in peers.values()}
            await world.until(lambda _: all(peer.sent > beats[peer.name] + 1 for peer in peers.values()))
            joined = len(await world.audited(AuditKind.NODE_JOINED))
            first.cancel()
            after = await world.until(lambda s: s.leader is not None and s.leader.leader == "second")
            assert (after.term, after.standbys) == (before.term + 1, ())
            assert after.deployments[0].current == before.deployments[0].current
            assert {node.capacity.node for node in after.nodes} == {"a", "b"}
            assert len(peers[NODES[0]].seen) == 2, "a new leader alone is no news for agents"
        finally:
            second.cancel()
            await asyncio.wait({second}, timeout=10)
    assert len(await world.audited(AuditKind.NODE_JOINED)) == joined, "a standby knows the nodes already"


async def test_a_name_that_cannot_stand_in_a_subject_is_refused(world: World) -> None:
    with pytest.raises(ResplitError) as caught:
        await run(OrchestratorConfig(world.url, world.keys / ORCHESTRATOR, world.store.root, NodeId("two words")))
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "id")


async def test_a_wish_that_a_deposed_leader_stored_is_followed(world: World) -> None:
    async with world.peers(NODES[0]), world.orchestrator():
        await world.deploy()
        seen = await world.until(serving)
        wish = seen.deployments[0].deployment
        assert wish is not None
        bucket = await world.js.key_value(subjects.BUCKET_DEPLOYMENTS)
        changed = wish.model_copy(update={"settings": Settings(max_sequences=3)})
        await bucket.put(CHAT, encode(changed))
        await world.until(lambda s: serving(s) and s.deployments[0].deployment == changed)
        await bucket.delete(CHAT)
        await world.until(lambda s: s.deployments == ())
        nodes = await world.js.key_value(subjects.BUCKET_NODES)
        await nodes.put(NODES[0], encode(NodeWish(node=NODES[0], drained=True)))
        await world.until(lambda s: s.drained == (NODES[0],))
        await nodes.put(NODES[0], encode(NodeWish(node=NODES[0], drained=False)))
        await world.until(lambda s: s.drained == ())


async def test_a_new_leader_goes_on_draining(world: World) -> None:
    async with world.peers(*NODES[:2]):
        async with world.orchestrator():
            await world.until(lambda s: len(s.nodes) == 2)
            await world.client.request(subjects.control("drain"), encode(DrainRequest(node=NODES[0])), timeout=10)
            before = await world.until(lambda s: s.drained == (NODES[0],))
        async with world.orchestrator():
            after = await world.until(lambda s: s.term > before.term)
            assert after.drained == (NODES[0],)


async def test_a_stream_of_an_earlier_release_learns_the_new_subjects(nats_url: str) -> None:
    client = await connect(nats_url, "operator")
    js = client.jetstream()
    await js.add_stream(name=subjects.STREAM_PLANS, subjects=[subjects.ALL_PLANS], max_msgs_per_subject=7)
    for _ in range(2):
        await ensure_streams(client)
        config = (await js.stream_info(subjects.STREAM_PLANS)).config
        assert (config.subjects, config.max_msgs_per_subject) == (
            [subjects.ALL_PLANS, subjects.LEADER, subjects.ROSTER],
            7,
        )
    await client.close()


async def test_an_event_that_is_logged_twice_stands_in_the_log_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    identity = load_identity(world.keys / ORCHESTRATOR, ORCHESTRATOR)
    plan = Plan(
        deployment=CHAT,
        model=world.model,
        epoch=1,
        block_count=1,
        settings=Settings(),
        routes=(Route(index=0, source=NODES[0], stages=(Stage(node=NODES[0], first=0, last=0),), max_sequences=1),),
        reason="a test",
    )
    taken = step(Rollout(CHAT, term=1), Propose(plan), datetime.now(UTC))
    assert taken is not None
    # The first attempt's acknowledgement was lost; the second, of the same bytes, does not know of the first.
    sealed = seal_event(taken[1], identity)
    monkeypatch.setattr(orchestrator.log, "seal_event", lambda event, _: sealed)
    await PlanLog(world.js, identity).append(taken[1])
    await PlanLog(world.js, identity).append(taken[1])
    assert (await world.js.stream_info(subjects.STREAM_PLANS)).state.messages == 1
    monkeypatch.undo()
    other = taken[1].model_copy(update={"reason": "something else"})
    with pytest.raises(ResplitError) as caught:
        await PlanLog(world.js, identity).append(other)
    assert caught.value.code is ErrorCode.STALE_EPOCH


async def test_forged_messages_change_nothing_and_are_audited(world: World) -> None:
    async with world.peers(NODES[0]) as peers, world.orchestrator():
        await world.until(lambda s: len(s.nodes) == 1)
        liar = load_identity(world.keys / NODES[1], NODES[1])
        real = peers[NODES[0]]
        capacity = (await world.status()).nodes[0].capacity.model_copy(update={"boot": "forged", "sequence": 10**6})
        forged = [
            seal_heartbeat(capacity, lambda _: (), liar),
            seal(Heartbeat(**dict(presence_of(capacity))), HEARTBEAT_TYPE, real.name, liar.key),
            b"\x00not an envelope",
        ]
        for data in forged * 10:
            await world.client.publish(subjects.capacity(real.name), data)
        await world.client.publish(subjects.capacity(liar.name), forged[0])
        await world.client.flush()
        await asyncio.sleep(0.5)
        assert [node.capacity.boot for node in (await world.status()).nodes] == ["first"]
    assert 1 <= len(await world.audited(AuditKind.EVENT_REJECTED)) <= 11


async def test_a_server_that_was_killed_costs_nobody_a_plan(world: World, server: NatsServer) -> None:
    async with world.peers(*NODES[:2]), world.orchestrator():
        await world.deploy(stages=2)
        before = await world.until(serving)
        server.kill()
        await asyncio.sleep(6)  # longer than a silent node is given
        server.start()
        after = await world.until(serving)
        assert after.deployments[0].current == before.deployments[0].current
        await world.deploy(stages=1)
        await world.until(lambda s: serving(s) and s.deployments[0].current.epoch == 2)  # type: ignore[union-attr]
    assert await world.audited(AuditKind.NODE_LOST) == []


async def test_a_drain_or_a_lock_that_memory_forbids_names_the_bytes_short_and_changes_nothing(world: World) -> None:
    block = memory_bytes(world.store.manifest(world.model).blocks[0], Settings())
    # Two nodes of four blocks hold the six of the model, one does not.
    async with world.peers(*NODES[:2], memory_bytes=4 * block, block_bytes=block), world.orchestrator():
        await world.deploy(stages=None)
        before = await world.until(serving)
        drained = await world.refusal("drain", encode(DrainRequest(node=NODES[0])))
        assert drained.error.code is ErrorCode.MODEL_TOO_LARGE
        assert before.deployments[0].current is not None
        moving = len(before.deployments[0].current.blocks_on(NODES[0]))
        assert f"'chat' cannot run without node 'a': 'toy' needs {moving * block} bytes" in drained.error.message
        assert f"{2 * block} bytes short" in drained.error.message
        one = PlaceRequest(name=CHAT, placement=(Stage(node=NODES[1], first=0, last=5),))
        locked = await world.refusal("place", encode(one))
        assert (locked.error.code, locked.error.field) == (ErrorCode.INFEASIBLE, "placement.0.node")
        assert f"{2 * block} bytes short" in locked.error.message
        after = await world.status()
        (was,), (now,) = before.deployments, after.deployments
        assert (now.deployment, now.current, now.candidate, now.revision) == (
            was.deployment, was.current, was.candidate, was.revision
        )  # fmt: skip
        assert after.drained == ()
        # A third node makes both possible.
        async with world.peers(NODES[2], memory_bytes=4 * block, block_bytes=block):
            await world.until(lambda status: len(status.nodes) == 3)
            reply = DrainReply.model_validate_json(await world.ask("drain", encode(DrainRequest(node=NODES[0]))))
            assert reply == DrainReply(node=NODES[0], deployments=(CHAT,))
            moved = await world.until(lambda status: serving(status) and not users(status, NODES[0]))
            assert moved.deployments[0].current is not None
            assert set(moved.deployments[0].current.nodes) == set(NODES[1:])
    assert [event.fields["node"] for event in await world.audited(AuditKind.NODE_CHANGED)] == ["a"]


async def test_of_two_routes_a_lost_node_costs_one_and_it_comes_back(world: World) -> None:
    async with world.peers(*NODES) as peers, world.orchestrator():
        reply = await world.deploy(routes=2)
        assert reply.routes == tuple((Stage(node=node, first=0, last=5),) for node in NODES[:2])
        before = await world.until(lambda s: serving(s) and len(s.nodes) == 3)
        assert before.deployments[0].current is not None
        assert before.deployments[0].current.chains == reply.routes, await world.audited(AuditKind.PLAN_PREPARED)
        peers[NODES[1]].alive = False
        after = await world.until(lambda s: serving(s) and set(s.deployments[0].applied) == {"a", "c"})
        assert after.deployments[0].current is not None
        assert after.deployments[0].current.chains == (reply.routes[0], (Stage(node="c", first=0, last=5),))
        peers[NODES[2]].alive = False
        one = await world.until(lambda s: s.deployments[0].applied == ("a",) and s.deployments[0].error is not None)
        assert one.deployments[0].state == "changing"
        assert one.deployments[0].reason == "2 routes are asked for and 1 serve(s)"
        peers[NODES[1]].alive = True
        await world.until(lambda s: serving(s) and set(s.deployments[0].applied) == {"a", "b"})


async def test_a_word_of_trust_holds_past_restarts_and_moves_what_is_sensitive(world: World) -> None:
    def distrust(node: NodeId) -> bytes:
        return encode(TrustRequest(node=node, trusted=False))

    async with world.peers(*NODES[:2]):
        async with world.orchestrator():
            await world.deploy(sensitive="ends")
            before = await world.until(lambda s: serving(s) and len(s.nodes) == 2)
            assert before.deployments[0].current is not None
            (node,) = before.deployments[0].current.nodes
            (other,) = {"a", "b"} - {node}
            reply = TrustReply.model_validate_json(await world.ask("trust", distrust(NodeId(node))))
            assert (reply.trusted, set(reply.deployments) <= {CHAT}) == (False, True)
            await world.until(lambda s: serving(s) and s.deployments[0].applied == (other,))
        async with world.orchestrator():
            after = await world.until(lambda s: serving(s) and len(s.nodes) == 2)
            assert {found.capacity.node: found.trusted for found in after.nodes} == {node: False, other: True}
            nowhere = (await world.refusal("trust", distrust(NodeId(other)))).error
            assert (nowhere.code, nowhere.field) == (ErrorCode.INFEASIBLE, "node")
            assert "keep its sensitive blocks off node" in nowhere.message
            locked = PlaceRequest(name=CHAT, placement=(Stage(node=NodeId(node), first=0, last=5),))
            exposed = (await world.refusal("place", encode(locked))).error
            assert (exposed.code, exposed.field) == (ErrorCode.INFEASIBLE, "placement.0.node")
            unknown = (await world.refusal("trust", distrust(NodeId("nobody")))).error
            assert unknown.code is ErrorCode.UNKNOWN_NODE
            kept = await world.status()
            assert kept.deployments[0].current == after.deployments[0].current
    assert "trust_changed" in {event.fields["cause"] for event in await world.audited(AuditKind.PLAN_PREPARED)}
