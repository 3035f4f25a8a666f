"""What an ingress took over, or was taken from it: each request is answered once, whatever fails on the way.

A real ingress with its journal; the nodes of its route are played by the test.
"""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio
from nats.aio.client import Client
from nats.aio.msg import Msg

from agent.ingress import Ingress
from agent.numbers import sequence_numbers
from agent.pace import CALLS_MIN
from agent.run import RouteRun
from agent.served import INTERRUPTED_MAX_S, Served
from bus.audit import AuditTrail
from bus.connection import connect
from bus.identity import load_identity
from bus.journal import WAITING_BYTES_MAX, Journal
from bus.stopping import end
from bus.streams import ensure_streams
from bus.succession import fence, lives
from bus.together import make_members
from schemas.base import DeploymentName, Digest, LifeId, NodeId, RequestId
from schemas.deployment import Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Activation, Frame, Result
from schemas.journal import AcceptedRequest, LiveRequest
from schemas.manifest import BlobRef, Block, Manifest, ModelKind, TensorSpec
from tests.conftest import NatsServer
from tests.nodes import plan_of

N0, N1 = NodeId("n0"), NodeId("n1")
D = DeploymentName("d")
SOON_S = 20.0
X = TensorSpec(name="x", dtype="float32", shape=(1,))
BLOB = BlobRef(digest=Digest("0" * 64), size_bytes=10)
MANIFEST = Manifest(
    name="m",
    kind=ModelKind.TENSOR,
    architecture="a",
    precision="fp32",
    source="a test",
    cut="Not cut: a test.",
    inputs=(X,),
    outputs=(X,),
    blocks=(Block(index=0, role="whole", graph=BLOB, weights=(), flops_per_token=1),),
    whole=BLOB,
)


@dataclass
class OneIngress:
    """An ingress on n0 whose one route, with two slots, is a stage on n1."""

    client: Client
    keys: Path
    at: float = 1000.0
    sent: list[Activation] = field(default_factory=list)
    replies: dict[str, list[dict[str, object]]] = field(default_factory=dict)
    taken: set[RequestId] = field(default_factory=set)
    over: set[NodeId] = field(default_factory=set)
    """Nodes whose processes have ended."""

    async def start(self) -> None:
        plan = plan_of(1, [Stage(node=N1, first=0, last=0)], Settings(max_sequences=2), 1)
        route = plan.routes[0].model_copy(update={"source": N0})
        self.plan = plan.model_copy(update={"routes": (route,)})
        identity = load_identity(self.keys / N0, N0)
        audit = AuditTrail(self.client.jetstream(), identity)
        self.ingress = Ingress(
            identity,
            "boot",
            self.client,
            audit,
            self.send,
            lambda *_: None,
            lambda: self.at,
            lambda node, _: node in self.over,
            lambda: None,
        )
        await self.ingress.serve(self.plan, MANIFEST, None)
        await self.client.subscribe("inbox.*", cb=self.heard)

    def send(self, node: NodeId, frame: Frame) -> None:
        if isinstance(frame, Activation):
            self.sent.append(frame)

    async def heard(self, msg: Msg) -> None:
        self.replies.setdefault(msg.subject.rpartition(".")[2], []).append(json.loads(msg.data))

    @property
    def served(self) -> Served:
        [one] = self.ingress.served
        return one

    async def adopt(self, *requests: LiveRequest) -> None:
        await self.ingress.adopt(self.served, requests, self.taken)

    def answer(self, frame: Activation) -> None:
        """The stage on n1 answers a call."""
        done = tuple((item.sequence, item.step) for item in frame.items)
        self.ingress.take(Result("d", 1, 0, (), done, {"x": np.ones(1, np.float32)}, "n0", ()))

    async def until_said(self, name: str) -> None:
        async with asyncio.timeout(SOON_S):
            while name not in self.replies:  # noqa: ASYNC110 (the bus tells no event)
                await asyncio.sleep(0.01)

    async def settled(self) -> None:
        """Whatever was to be said is said."""
        await self.served.journal.drain(SOON_S)
        await self.client.flush()
        await asyncio.sleep(0.1)
        await self.client.flush()


def owed(name: str, padding: int = 0) -> LiveRequest:
    """A request of a dead ingress that had not begun."""
    tensor = {"name": "x", "shape": [1], "datatype": "FP32", "data": [1.0]}
    data = json.dumps({"inputs": [tensor], "parameters": {"padding": "x" * padding}}).encode()
    model = str(plan_of(1, [Stage(node=N1, first=0, last=0)], Settings(), 1).model)
    return LiveRequest(1, AcceptedRequest(RequestId(name), model, data, "application/json", f"inbox.{name}"), 0.0)


@pytest_asyncio.fixture
async def one(nats_url: str, tmp_path: Path) -> AsyncIterator[OneIngress]:
    make_members(tmp_path / "keys", [N0, N1])
    client = await connect(nats_url, "taking-over")
    await ensure_streams(client)
    made = OneIngress(client, tmp_path / "keys")
    await made.start()
    running = asyncio.create_task(made.ingress.run())
    yield made
    await end([running])
    await made.ingress.stop()
    await client.close()


async def wrote(client: Client, life: LifeId, *owed: LiveRequest) -> None:
    """A life of another ingress accepted these, and ended."""
    journal = Journal(client, D, life, lambda _: None, lambda: 1000.0)
    running = asyncio.create_task(journal.run())
    for one in owed:
        await journal.accept(one.request)
    await end([running])


async def test_more_than_the_journal_lets_wait_is_taken_over_whole(one: OneIngress) -> None:
    size = 900_000
    many = [owed(f"r{i}", size) for i in range(WAITING_BYTES_MAX // size + 3)]
    await one.adopt(*many)
    assert len(one.served.queue) + len(one.served.jobs) == len(many)


async def test_what_the_journal_refuses_keeps_nobody_else_waiting_and_nothing_is_answered_twice(
    one: OneIngress,
) -> None:
    requests = [owed("r1"), owed("large", 2 << 20), owed("r2")]
    with pytest.raises(ResplitError) as refused:
        await one.adopt(*requests)
    assert refused.value.code is ErrorCode.PAYLOAD_TOO_LARGE
    assert len(one.sent) == 2, "those that it took run"
    for frame in one.sent.copy():
        one.answer(frame)
    await one.until_said("r1")
    await one.until_said("r2")
    with pytest.raises(ResplitError):
        await one.adopt(*requests)
    await one.settled()
    assert len(one.sent) == 2
    assert {name: len(said) for name, said in one.replies.items()} == {"r1": 1, "r2": 1}


async def test_nothing_is_left_of_what_another_ingress_answers_for(one: OneIngress) -> None:
    await one.adopt(owed("r1"), owed("r2"), owed("r3"))
    served = one.served
    life = served.life
    await fence(one.client, D, life, LifeId("n2-0-0"), None)
    assert [found.fenced_by for found in await lives(one.client, D)] == ["n2-0-0"]
    one.answer(one.sent[0])
    async with asyncio.timeout(SOON_S):
        while served.life == life:  # noqa: ASYNC110 (the journal tells only the ingress)
            await asyncio.sleep(0.01)
    await one.settled()
    assert (served.desk.in_flight, served.jobs, len(served.queue), one.replies) == ({}, {}, 0, {})


async def test_what_is_in_flight_here_is_this_life_s_to_answer_only_if_the_stream_shows_that_it_goes_on(
    one: OneIngress, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.ingress.CONFIRM_S", 1.0)
    await one.adopt(owed("r1"))
    await one.ingress.adopt(one.served, [owed("r1")], set())
    assert len(one.sent) == 1, "it runs here, and the life that owed it besides may be forgotten"
    life = one.served.life
    await fence(one.client, D, life, LifeId("n2-0-0"), None)  # while this process hung
    with pytest.raises(ResplitError) as refused:
        await one.ingress.adopt(one.served, [owed("r1")], set())
    assert refused.value.code is ErrorCode.NODE_LOST
    assert one.served.life != life
    assert not one.served.desk.in_flight


async def test_what_two_lives_owe_that_each_fenced_the_other_is_whoever_s_that_serves_now(one: OneIngress) -> None:
    hung, heir = LifeId("n2-boot-0"), LifeId("n3-boot-0")
    await wrote(one.client, heir, owed("r1"))
    # The heir took over from the one that hung, and died; that one inherits before it has heard of it.
    await fence(one.client, D, hung, heir)
    await fence(one.client, D, heir, hung)
    one.over = {NodeId("n3")}
    one.ingress.heirs.look()
    async with asyncio.timeout(SOON_S):
        while not one.sent:  # noqa: ASYNC110 (the journal tells only the ingress)
            await asyncio.sleep(0.01)
    one.answer(one.sent[0])
    await one.until_said("r1")
    await one.settled()
    assert len(one.replies["r1"]) == 1


async def test_what_is_left_of_a_life_that_was_taken_over_from_is_its_heir_s_heir_s_though_its_process_lives(
    one: OneIngress,
) -> None:
    slow, heir = LifeId("n2-boot-0"), LifeId("n3-boot-0")
    await wrote(one.client, slow, owed("r1"))
    await fence(one.client, D, slow, heir)  # which ends before it has taken over anything
    one.over = {NodeId("n3")}
    one.ingress.heirs.look()
    async with asyncio.timeout(SOON_S):
        while not one.sent:  # noqa: ASYNC110 (the journal tells only the ingress)
            await asyncio.sleep(0.01)
    one.answer(one.sent[0])
    await one.until_said("r1")


async def test_what_an_heir_had_begun_to_take_over_is_answered_once_whoever_inherits_from_it(one: OneIngress) -> None:
    dead, slow, heir = LifeId("n4-boot-0"), LifeId("n2-boot-0"), LifeId("n3-boot-0")
    await wrote(one.client, dead, owed("r1"))
    await wrote(one.client, slow, owed("r1"))  # taken over from the dead one, of which nothing was released yet
    await fence(one.client, D, dead, slow)
    await fence(one.client, D, slow, heir)
    one.over = {NodeId("n3"), NodeId("n4")}
    one.ingress.heirs.look()
    async with asyncio.timeout(SOON_S):
        while not one.sent:  # noqa: ASYNC110 (the journal tells only the ingress)
            await asyncio.sleep(0.01)
        one.answer(one.sent[0])
        both = dead, slow
        while [found.messages for found in await lives(one.client, D) if found.life in both] != [1, 1]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    await one.until_said("r1")
    await one.settled()
    assert (len(one.sent), len(one.replies["r1"])) == (1, 1)


async def test_a_node_that_others_hold_for_lost_is_not_lost_to_itself(one: OneIngress) -> None:
    assert N0 in one.plan.routes[0].nodes
    one.ingress.node_lost(N0)
    await one.adopt(owed("r1"))
    assert len(one.sent) == 1


async def test_a_deadline_that_passes_while_the_journal_stands_still_is_the_one_final_answer(
    one: OneIngress, nats_server: NatsServer
) -> None:
    await one.adopt(owed("r1"))
    [(job, _)] = one.served.jobs.values()
    nats_server.pause()
    try:
        one.answer(one.sent[0])
        async with asyncio.timeout(SOON_S):
            while one.served.jobs:  # noqa: ASYNC110 (it is taken a moment later, in steps of its own)
                await asyncio.sleep(0.01)
        one.served.end(job, ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed", "deadline_ms"))
    finally:
        nats_server.resume()
    await one.until_said("r1")
    await one.settled()
    assert len(one.replies["r1"]) == 1


async def test_a_node_that_is_lost_as_its_answer_comes_costs_nobody_anything(one: OneIngress) -> None:
    await one.adopt(owed("r1"), owed("r2"))
    one.answer(one.sent[0])
    one.ingress.node_lost(N1)  # before the answer was looked at
    assert len(one.served.queue) == 2
    one.served.node_serves(N1, 1)
    again = one.sent[2:]
    assert [frame.tensors["x"].tolist() for frame in again] == [[1.0], [1.0]]
    for frame in again:
        one.answer(frame)
    await one.until_said("r1")
    await one.until_said("r2")
    await one.settled()
    assert {name: len(said) for name, said in one.replies.items()} == {"r1": 1, "r2": 1}


async def test_waiting_for_a_slot_ends_nothing_and_waiting_for_a_node_ends_in_time(one: OneIngress) -> None:
    await one.adopt(owed("r1"), owed("r2"), owed("r3"))
    for _ in range(2):
        one.at += INTERRUPTED_MAX_S
        one.served.check(one.at)
    assert len(one.served.desk.in_flight) == 3, "r3 waits for a slot"
    one.served.node_lost(N1)
    one.served.check(one.at)
    assert len(one.served.queue) == 3
    one.at += INTERRUPTED_MAX_S
    one.served.check(one.at)
    assert not one.served.desk.in_flight
    await one.until_said("r3")
    assert "node_lost" in json.dumps(one.replies["r3"]).lower()


async def test_a_route_that_was_not_measured_is_thought_as_fast_as_the_fastest_and_no_faster(one: OneIngress) -> None:
    await one.adopt(owed("r1"), owed("r2"), owed("r3"))
    job, measured = one.served.queue.first, one.served.runs[1, 0]
    unmeasured = RouteRun(one.plan, measured.route, N0, sequence_numbers(N0, "one"), one.send)
    for _ in range(CALLS_MIN):
        measured.driver.pace.call.add(1, 0.5, one.at)
    found = one.served.runs.predicted(unmeasured, job, (), (), one.at, [measured, unmeasured])
    assert found is not None
    assert found.e2e_ms == pytest.approx(500)
