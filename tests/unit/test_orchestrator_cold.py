"""Deployments on demand: who makes room for whom, with the leader's own steps and the agents' own state machine."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from hashlib import sha256

import pytest

from agent import step as agent
from agent.step import Drain, Emptied, Free, Load, Loaded, PlanArrived
from orchestrator.cold import DOORS, asked_for, cold_plan, is_clearing
from orchestrator.fold import (
    CapacityReceived,
    DeploymentRemoved,
    DeploymentWritten,
    ManifestKnown,
    NodeWished,
    ReceiptReceived,
    Snapshot,
    Tick,
)
from orchestrator.mind import Mind
from orchestrator.outlook import Outlook
from orchestrator.planner import check_shape
from orchestrator.preloading import Expected, to_preload
from orchestrator.staging import to_stage
from orchestrator.steps import Append, Solve, Steps
from orchestrator.trial import check_drain, trial
from orchestrator.view import status
from orchestrator.whereabouts import UNWANTED, whereabouts
from schemas.audit import AuditKind
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import HostedStage, Service, StoredBlocks
from schemas.control import BlocksAt
from schemas.deployment import Deployment, NodeWish
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import PlanEvent, Receipt
from schemas.section import EventSection, section_of
from tests.unit.test_orchestrator_planning import BLOCK, MODEL, START, A, B, C, heartbeat, manifest, wish, world

ONE, TWO, THREE = DeploymentName("one"), DeploymentName("two"), DeploymentName("three")
TICK = timedelta(milliseconds=250)


def model_of(name: DeploymentName) -> Digest:
    """Each deployment runs a model of its own."""
    return Digest(sha256(name.encode()).hexdigest())


class Trail:
    """What was recorded, by kind."""

    def __init__(self) -> None:
        self.said: list[tuple[AuditKind, dict[str, object]]] = []

    def record(self, kind: AuditKind, message: str, **fields: object) -> None:
        self.said.append((kind, fields))


class Unweighed:
    """No plan is weighed here."""

    def put(self, snapshot: Snapshot, now: datetime) -> None:
        pass

    def take(self) -> Outlook | None:
        return None


@dataclass
class Node:
    """An agent's state machine: what it is told to load is there at once, unless it is to take its time."""

    name: NodeId
    room: float
    state: agent.State = field(init=False)
    sequence: int = 0
    loads: bool = True
    running: dict[tuple[DeploymentName, int], int] = field(default_factory=dict)
    """Sequences of plans."""
    waiting: dict[DeploymentName, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.state = agent.State(self.name)
        self._held: set[tuple[DeploymentName, int]] = set()
        self._pending: list[agent.Event] = []

    def told(self, section: EventSection, now_s: float) -> Iterator[Receipt]:
        yield from self._step(PlanArrived(section), now_s)

    def act(self, now_s: float) -> Iterator[Receipt]:
        pending, self._pending = self._pending, []
        for event in pending:
            match event:
                case Emptied(deployment, epoch) if self.running.get((deployment, epoch)):
                    self._pending.append(event)
                case Loaded() if not self.loads:
                    self._pending.append(event)
                case _:
                    yield from self._step(event, now_s)

    def _step(self, event: agent.Event, now_s: float) -> Iterator[Receipt]:
        self.state, todo = agent.step(self.state, event, now_s)
        for one in todo:
            match one:
                case Load(plan):
                    self._held.add((plan.deployment, plan.epoch))
                    self._pending.append(Loaded(plan))
                case Drain(plan):
                    self._pending.append(Emptied(plan.deployment, plan.epoch))
                case Free(plan):
                    self._held.discard((plan.deployment, plan.epoch))
                case agent.Answer(plan, said, _, error):
                    yield Receipt(
                        node=self.name,
                        deployment=plan.deployment,
                        epoch=plan.epoch,
                        plan=plan.digest,
                        status=said,
                        elapsed_ms=1,
                        error=error,
                    )
                case _:
                    pass

    def beat(self) -> CapacityReceived:
        self.sequence += 1
        stages = agent.hosted(self.state, lambda plan: self.running.get((plan.deployment, plan.epoch), 0))
        loaded = {(s.deployment, s.model, block) for s in stages if s.state != "loading" for block in s.blocks}
        said = heartbeat(self.name, max(0.0, self.room - len(loaded)), self.sequence)
        service = tuple(Service(deployment=name, waiting=count) for name, count in sorted(self.waiting.items()))
        return CapacityReceived(said.model_copy(update={"stages": stages, "service": service}))


class Cluster:
    """A leader and its nodes, in steps of a quarter of a second."""

    def __init__(self, *nodes: Node) -> None:
        self.now, self.trail = START, Trail()
        self.nodes = {node.name: node for node in nodes}
        self.mind = Mind(world(*(heartbeat(n.name, n.room) for n in nodes)), self.trail, lambda: self.now)
        self.events: list[PlanEvent] = []
        self._beaten = START

    def deploy(self, name: DeploymentName, **fields: object) -> Deployment:
        model = model_of(name)
        found = wish(**{"name": name, "model": model, "on_demand": True, **fields})
        self.mind.fold(ManifestKnown(model, manifest(name=name)), self.now)
        trial(self.mind.snapshot, found, manifest(name=name), self.now)
        self.mind.fold(DeploymentWritten(found), self.now)
        self.run(3)
        return found

    def ask(self, name: DeploymentName, count: int = 1) -> None:
        """Requests come to the deployment's first door."""
        current = self.mind.snapshot.rollout(name).current
        assert current is not None
        node = self.nodes[NodeId(current.routes[0].source)]
        node.waiting[name] = node.waiting.get(name, 0) + count

    def begun(self, name: DeploymentName) -> None:
        """What waits runs, and has ended."""
        for node in self.nodes.values():
            node.waiting.pop(name, None)

    def run(self, seconds: float) -> None:
        until = self.now + timedelta(seconds=seconds)
        while self.now < until:
            self.now += TICK
            if self.now - self._beaten >= timedelta(seconds=1):
                self._beaten = self.now
                for node in self.nodes.values():
                    self.mind.fold(node.beat(), self.now)
            for node in self.nodes.values():
                self._hear(node.act(self.now.timestamp()))
            self.mind.fold(Tick(), self.now)
            self._perform(self.mind.settle(Unweighed()))

    def _hear(self, receipts: Iterator[Receipt]) -> None:
        for receipt in receipts:
            self.mind.fold(ReceiptReceived(receipt), self.now)

    def _perform(self, steps: Steps) -> None:
        answer, error = None, None
        while True:
            try:
                effect = steps.send(answer) if error is None else steps.throw(error)
            except StopIteration:
                return
            answer, error = None, None
            match effect:
                case Append(event):
                    self.events.append(event)
                    for node in self.nodes.values():
                        section = section_of(event, node.name)
                        told = EventSection(deployment=event.deployment, term=event.term, revision=event.revision)
                        self._hear(node.told(section or told, self.now.timestamp()))
                case Solve(make):
                    try:
                        answer = make()
                    except ResplitError as why:
                        error = why

    def state(self, name: DeploymentName) -> str:
        return next(one.state for one in status(self.mind.snapshot, self.now).deployments if one.name == name)

    def states(self) -> dict[DeploymentName, str]:
        return {one.name: one.state for one in status(self.mind.snapshot, self.now).deployments}


def cluster_of(*names: DeploymentName, room: float = 4.5, nodes: tuple[NodeId, ...] = (A, B)) -> Cluster:
    """Nodes of which one at a time holds all of the four blocks of a model, and deployments of it on demand."""
    cluster = Cluster(*(Node(node, room if node == A else 0.5) for node in nodes))
    for name in names:
        cluster.deploy(name)
    return cluster


def test_what_has_no_room_is_cold_with_its_doors_open_and_what_has_room_serves() -> None:
    cluster = cluster_of(ONE, TWO)
    assert cluster.states() == {ONE: "serving", TWO: "cold"}
    current = cluster.mind.snapshot.rollout(TWO).current
    assert current is not None
    assert current.cold
    assert (len(current.nodes), current.blocks_on(A), dict(current.placed)) == (DOORS, (), {})
    # It takes nothing of anybody's memory, and nobody is told that no plan can be made.
    assert cluster.mind.snapshot.nodes[A].capacity.memory_free_bytes == int(0.5 * BLOCK)
    assert AuditKind.DEPLOYMENT_INFEASIBLE not in {kind for kind, _ in cluster.trail.said}


def test_what_is_asked_for_is_loaded_in_the_place_of_what_is_idle() -> None:
    cluster = cluster_of(ONE, TWO)
    cluster.ask(TWO)
    cluster.run(5)
    assert cluster.states() == {ONE: "cold", TWO: "serving"}
    causes = [fields["cause"] for kind, fields in cluster.trail.said if kind is AuditKind.PLAN_PREPARED]
    assert causes[-2:] == ["makes_room", "asked_for"]
    cluster.begun(TWO)
    # It was prepared at once here; a cold plan says how long loading it took.
    cold = cluster.mind.snapshot.rollout(ONE).current
    assert cold is not None
    assert cold.loads_s is not None


def test_what_runs_sequences_goes_when_its_time_is_over_and_they_have_ended() -> None:
    cluster = cluster_of(ONE, TWO)
    current = cluster.mind.snapshot.rollout(ONE).current
    assert current is not None
    node = cluster.nodes[A]
    node.running[ONE, current.epoch] = 2
    cluster.run(1)
    cluster.ask(TWO)
    cluster.run(2)
    assert cluster.states() == {ONE: "serving", TWO: "cold"}  # it was loaded a few seconds ago
    cluster.run(8)
    # It drains: nothing is freed while they run.
    assert cluster.state(ONE) == "cold"
    assert is_clearing(cluster.mind.snapshot)
    assert [s.blocks for s in agent.hosted(node.state, lambda _: 0) if s.blocks] == [(0, 1, 2, 3)]
    node.running.clear()
    cluster.run(4)
    assert cluster.states() == {ONE: "cold", TWO: "serving"}


def test_room_is_made_by_whoever_is_worth_least() -> None:
    cluster = cluster_of(ONE, TWO, THREE, room=9.0)
    assert cluster.states() == {ONE: "serving", TWO: "serving", THREE: "cold"}
    node = cluster.nodes[A]
    # Requests have come to the first since, not to the second.
    said = node.beat().capacity
    counted = said.model_copy(update={"service": (Service(deployment=ONE, arrived=5),)})
    cluster.mind.fold(CapacityReceived(counted), cluster.now)
    cluster.ask(THREE)
    cluster.run(5)
    assert cluster.states() == {ONE: "serving", TWO: "cold", THREE: "serving"}


def test_two_that_are_asked_for_all_the_time_take_turns() -> None:
    cluster = cluster_of(ONE, TWO)
    served = []
    for _ in range(4):
        for name in (ONE, TWO):
            if cluster.state(name) == "cold" and not asked_for(cluster.mind.snapshot, name):
                cluster.ask(name)
            if cluster.state(name) == "serving":
                cluster.begun(name)
        cluster.run(15)
        served += [name for name, state in cluster.states().items() if state == "serving"]
    assert set(served) == {ONE, TWO}


def test_a_deployment_that_always_serves_makes_room_for_nobody() -> None:
    cluster = Cluster(Node(A, 4.5), Node(B, 0.5))
    cluster.deploy(ONE, on_demand=False)
    with pytest.raises(ResplitError) as caught:
        trial(cluster.mind.snapshot, wish(name=TWO, on_demand=True), manifest(), cluster.now)
    assert caught.value.code is ErrorCode.MODEL_TOO_LARGE


def test_a_model_that_fits_nowhere_is_refused_and_not_deployed_cold() -> None:
    cluster = Cluster(Node(A, 2.0), Node(B, 1.0))
    with pytest.raises(ResplitError) as caught:
        trial(cluster.mind.snapshot, wish(on_demand=True), manifest(), START)
    assert caught.value.code is ErrorCode.MODEL_TOO_LARGE


def test_a_door_that_is_lost_is_replaced_and_nothing_is_loaded_for_it() -> None:
    cluster = cluster_of(ONE, TWO, nodes=(A, B, C))
    before = cluster.mind.snapshot.rollout(TWO).current
    assert before is not None
    assert before.nodes == (A, B)
    del cluster.nodes[B]
    cluster.run(8)
    after = cluster.mind.snapshot.rollout(TWO).current
    assert after is not None
    assert (after.cold, after.nodes) == (True, (A, C))
    assert cluster.state(ONE) == "serving"


def test_a_node_can_be_drained_of_a_door() -> None:
    cluster = cluster_of(ONE, TWO, nodes=(A, B, C))
    check_drain(cluster.mind.snapshot, B, cluster.now)
    cluster.mind.fold(NodeWished(NodeWish(node=B, drained=True)), cluster.now)
    cluster.run(3)
    after = cluster.mind.snapshot.rollout(TWO).current
    assert after is not None
    assert (after.cold, after.nodes) == (True, (A, C))


def test_room_is_made_for_what_is_to_serve_always() -> None:
    cluster = cluster_of(ONE, TWO)
    cluster.deploy(THREE, on_demand=False)
    cluster.run(5)
    assert cluster.states() == {ONE: "cold", TWO: "cold", THREE: "serving"}
    with pytest.raises(ResplitError) as caught:
        cluster.deploy(DeploymentName("four"), on_demand=False)
    assert caught.value.code is ErrorCode.MODEL_TOO_LARGE


def test_a_failover_finds_room_where_models_lie_that_nobody_uses() -> None:
    cluster = Cluster(Node(A, 4.5), Node(B, 4.5))
    cluster.deploy(ONE, on_demand=False)
    cluster.deploy(TWO)
    assert cluster.states() == {ONE: "serving", TWO: "serving"}
    lost = cluster.mind.snapshot.rollout(ONE).current
    assert lost is not None
    del cluster.nodes[NodeId(lost.nodes[0])]
    cluster.run(12)
    assert cluster.states() == {ONE: "serving", TWO: "cold"}


def test_what_is_to_serve_always_and_has_no_room_says_so() -> None:
    cluster = cluster_of(ONE, TWO)
    cluster.mind.fold(DeploymentWritten(wish(name=ONE, on_demand=False)), cluster.now)
    cluster.mind.fold(DeploymentWritten(wish(name=TWO, on_demand=False)), cluster.now)
    cluster.run(3)
    [found] = [one for one in status(cluster.mind.snapshot, cluster.now).deployments if one.name == TWO]
    assert found.error is not None
    assert found.error.code is ErrorCode.MODEL_TOO_LARGE
    cluster.mind.fold(DeploymentRemoved(ONE), cluster.now)
    cluster.run(70)
    assert cluster.state(TWO) == "serving"


def test_what_is_likely_to_be_asked_for_is_loaded_once_there_is_room() -> None:
    cluster = cluster_of(ONE, TWO)
    cluster.mind.fold(DeploymentRemoved(ONE), cluster.now)
    cluster.run(15)
    assert cluster.state(TWO) == "serving"
    assert [fields["cause"] for kind, fields in cluster.trail.said if kind is AuditKind.PLAN_PREPARED][-1] == "expected"


def test_what_is_asked_for_much_is_loaded_ahead_in_the_place_of_what_is_not() -> None:
    cluster = cluster_of(ONE, TWO)
    node, arrived = cluster.nodes[A], 0
    for _ in range(20):  # as if somebody asked and gave up at once
        arrived += 3
        said = node.beat().capacity
        counted = said.model_copy(update={"service": (Service(deployment=TWO, arrived=arrived),)})
        cluster.mind.fold(CapacityReceived(counted), cluster.now)
        cluster.run(1)
    cluster.run(10)
    assert cluster.states() == {ONE: "cold", TWO: "serving"}
    causes = [fields["cause"] for kind, fields in cluster.trail.said if kind is AuditKind.PLAN_PREPARED]
    assert "asked_for" not in causes
    assert causes[-2:] == ["makes_room", "expected"]


def test_nothing_is_swapped_for_what_is_worth_no_more() -> None:
    snapshot = cluster_of(ONE, TWO).mind.snapshot
    alike = {name: replace(rollout, loads_s=1.0, woke_s=None) for name, rollout in snapshot.rollouts.items()}
    snapshot, now = replace(snapshot, rollouts=alike), START + timedelta(seconds=60)

    def fits(world: Snapshot, name: DeploymentName) -> bool:
        return world.rollout(ONE).current is None

    assert to_preload(snapshot, {ONE: 0.1, TWO: 0.1}, fits, now) is None
    found = to_preload(snapshot, {ONE: 0.1, TWO: 0.5}, fits, now)
    assert found is not None
    assert (found.name, found.leaving) == (TWO, (ONE,))
    dear = replace(snapshot.rollout(TWO), loads_s=50.0)
    costly = replace(snapshot, rollouts={**snapshot.rollouts, TWO: dear})
    assert to_preload(costly, {ONE: 49.6, TWO: 1.0}, fits, now) is None, "it is worth more, and less than loading it"
    assert to_preload(snapshot, {ONE: 0.0, TWO: 0.001}, fits, now) is None, "hardly anybody asks for it"
    assert to_preload(snapshot, {ONE: 0.1, TWO: 0.5}, lambda *_: False, now) is None


def test_expectations_follow_what_arrives_whoever_comes_and_goes() -> None:
    cluster = cluster_of(ONE, TWO)
    expected = Expected().heard(cluster.mind.snapshot, cluster.now)
    assert Expected().rates() == {}
    before = expected.rates()
    assert before[ONE] == before[TWO] > 0.0
    said = cluster.nodes[A].beat().capacity
    counted = said.model_copy(update={"service": (Service(deployment=TWO, arrived=30),)})
    cluster.mind.fold(CapacityReceived(counted), cluster.now + timedelta(seconds=1))
    later = expected.heard(cluster.mind.snapshot, cluster.now + timedelta(seconds=30))
    assert later.rates()[TWO] > 10 * later.rates()[ONE]
    cluster.mind.fold(DeploymentRemoved(ONE), cluster.now)
    left = later.heard(cluster.mind.snapshot, cluster.now + timedelta(seconds=31))
    assert left.rates().keys() == {TWO}
    assert left.rates()[TWO] > 10 * before[TWO]


def test_it_is_said_which_blocks_are_where_and_for_whom() -> None:
    cluster = cluster_of(ONE, TWO)
    beats = {node.name: node.beat().capacity for node in cluster.nodes.values()}
    stored = (StoredBlocks(model=model_of(ONE), ranges=((0, 3),)),)
    for capacity in beats.values():
        cluster.mind.fold(CapacityReceived(capacity.model_copy(update={"on_disk": stored})), cluster.now)
    serving = BlocksAt(node=A, tier="memory", ranges=((0, 3),), why=("one serves",))
    on_disk = serving.model_copy(update={"tier": "disk"})
    unwanted = on_disk.model_copy(update={"node": B, "why": (UNWANTED,)})
    assert whereabouts(cluster.mind.snapshot, model_of(ONE)) == (serving, on_disk, unwanted)
    assert whereabouts(cluster.mind.snapshot, Digest("9" * 64)) == ()


def test_what_was_loaded_before_it_went_cold_is_to_stay_on_its_disk() -> None:
    cluster = cluster_of(ONE, TWO)
    cluster.ask(TWO)
    cluster.run(5)
    assert cluster.states() == {ONE: "cold", TWO: "serving"}
    assert to_stage(cluster.mind.snapshot, {})[ONE] == {A: StoredBlocks(model=model_of(ONE), ranges=((0, 3),))}


def test_only_a_trusted_node_takes_requests_whose_first_block_is_sensitive() -> None:
    snapshot = cluster_of(nodes=(A, B, C)).mind.snapshot
    trusting = replace(snapshot, trust={A: False, B: False, C: True})
    found = cold_plan(trusting, wish(on_demand=True, sensitive="ends"), manifest(), "a test").plan
    assert found.nodes == (C,)
    with pytest.raises(ResplitError, match="no trusted node") as caught:
        cold_plan(replace(snapshot, trust=dict.fromkeys((A, B, C), False)), wish(sealed=True), manifest(), "a test")
    assert caught.value.code is ErrorCode.INFEASIBLE


def test_a_pipeline_cannot_be_on_demand() -> None:
    piped = manifest().model_copy(update={"pipeline": object()})
    with pytest.raises(ResplitError) as caught:
        check_shape(wish(on_demand=True), piped)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "on_demand")


def test_a_cold_plan_says_what_was_measured() -> None:
    stage = HostedStage(deployment=ONE, epoch=1, model=MODEL, blocks=(), state="serving", sequences=0)
    assert stage.blocks == ()
    snapshot = cluster_of(ONE).mind.snapshot
    rollout = replace(snapshot.rollout(ONE), loads_s=4.5)
    found = cold_plan(
        replace(snapshot, rollouts={ONE: rollout}), wish(name=ONE, on_demand=True), manifest(), "why"
    ).plan
    assert found.loads_s == 4.5
    assert found.reason.startswith("why; cold, ")
