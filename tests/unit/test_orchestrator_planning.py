"""From a snapshot to decisions and plans: fold, rooms, planner, decide."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from hashlib import sha256

import pytest

from orchestrator.decide import Cause, DropCandidate, End, Need, Replan, decide
from orchestrator.fold import (
    BusBack,
    BusLost,
    CapacityReceived,
    DeploymentRemoved,
    DeploymentWritten,
    ManifestKnown,
    ReceiptReceived,
    RolloutAdvanced,
    Snapshot,
    Tick,
    fold,
)
from orchestrator.operators import desired
from orchestrator.proposing import propose
from orchestrator.rollout import Proceed, Propose, Rollout, note, step
from orchestrator.rooms import rooms
from orchestrator.view import status
from profiler.memory import memory_bytes
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import Capacity, HostedStage, LinkEstimate, Provider
from schemas.control import DeployRequest
from schemas.deployment import Deployment, Settings, Stage
from schemas.errors import ErrorBody, ErrorCode, ResplitError
from schemas.manifest import BlobRef, Block, Manifest, ModelKind, TensorSpec, TextSpec
from schemas.plan import Plan, Receipt, ReceiptStatus

START = datetime(2026, 1, 1, tzinfo=UTC)
CHAT = DeploymentName("chat")
MODEL, BLOB = Digest("1" * 64), Digest("2" * 64)
WEIGHT = 10**7
NEED = Need(Cause.NO_PLAN, "a test")
A, B, C = NodeId("a"), NodeId("b"), NodeId("c")


def manifest(blocks: int = 4, context: int = 1024, name: str = "toy") -> Manifest:
    """Of weights alone. Two of one name share every block."""
    edge = TensorSpec(name="x", dtype="float32", shape=("batch", "sequence", 64))
    ref = BlobRef(digest=BLOB, size_bytes=0)
    return Manifest(
        name=name,
        kind=ModelKind.DECODER,
        architecture="toy",
        precision="fp32",
        source="test",
        cut="even",
        inputs=(),
        outputs=(),
        blocks=tuple(
            Block(
                index=i,
                role="layer",
                graph=BlobRef(digest=Digest(sha256(f"{name} {i}".encode()).hexdigest()), size_bytes=0),
                weights=(BlobRef(digest=BLOB, size_bytes=WEIGHT),),
                input=edge if i else None,
                output=edge if i < blocks - 1 else None,
                flops_per_token=10**6,
            )
            for i in range(blocks)
        ),
        whole=ref,
        text=TextSpec(tokenizer=ref, vocab_size=10, context_length=context),
    )


BLOCK = memory_bytes(manifest().blocks[0], Settings())


def heartbeat(node: NodeId, blocks: float = 10, sequence: int = 0, boot: str = "one", speed: float = 1e10) -> Capacity:
    return Capacity(
        node=node,
        boot=boot,
        sequence=sequence,
        issued_at=START,
        version="0",
        provider=Provider(name="cpu", device="d", flops_per_s=1e12, bytes_per_s=speed),
        threads=1,
        memory_total_bytes=1 << 40,
        memory_free_bytes=int(blocks * BLOCK),
        disk_free_bytes=0,
        load=0,
    )


def world(*capacities: Capacity) -> Snapshot:
    snapshot = fold(Snapshot(term=1), ManifestKnown(MODEL, manifest()), START)
    for capacity in capacities:
        snapshot = fold(snapshot, CapacityReceived(capacity), START)
    return fold(snapshot, Tick(), START)


def wish(**fields: object) -> Deployment:
    return Deployment.model_validate({"name": CHAT, "model": MODEL, "settings": {"context_tokens": 1024}, **fields})


def planned(snapshot: Snapshot, deployment: Deployment) -> Plan:
    return propose(snapshot, deployment, NEED, START).plan


def placed(plan: Plan) -> list[tuple[str, int, int]]:
    return [(stage.node, stage.first, stage.last) for stage in plan.routes[0].stages]


def in_force(snapshot: Snapshot, plan: Plan) -> Snapshot:
    taken = step(snapshot.rollout(CHAT), Propose(plan), START)
    assert taken is not None
    rollout = taken[0]
    for node in plan.nodes:
        ready = Receipt(
            node=NodeId(node),
            deployment=CHAT,
            epoch=plan.epoch,
            plan=plan.digest,
            status=ReceiptStatus.READY,
            elapsed_ms=1,
        )
        rollout = note(rollout, ready, START)
    taken = step(rollout, Proceed(), START)
    assert taken is not None
    return fold(snapshot, RolloutAdvanced(taken[0]), START)


def later(snapshot: Snapshot, seconds: float, *alive: NodeId) -> Snapshot:
    """A second at a time, heartbeats of `alive` arriving."""
    began = snapshot.ticked_at or START
    for passed in range(1, int(seconds) + 1):
        now = began + timedelta(seconds=passed)
        for node in alive:
            capacity = snapshot.nodes[node].capacity
            beat = capacity.model_copy(update={"sequence": capacity.sequence + 1})
            snapshot = fold(snapshot, CapacityReceived(beat), now)
        snapshot = fold(snapshot, Tick(), now)
    return snapshot


def test_a_heartbeat_that_was_overtaken_changes_nothing() -> None:
    snapshot = world(heartbeat(A, sequence=5))
    assert fold(snapshot, CapacityReceived(heartbeat(A, sequence=4)), START) is snapshot
    restarted = fold(snapshot, CapacityReceived(heartbeat(A, sequence=0, boot="two")), START)
    assert restarted.nodes[A].capacity.boot == "two"
    replayed = heartbeat(A, sequence=99, boot="one")
    assert fold(restarted, CapacityReceived(replayed), START) is restarted


def test_silence_is_five_seconds_in_a_plan_and_three_heartbeats_outside() -> None:
    snapshot = world(heartbeat(A), heartbeat(B))
    snapshot = in_force(snapshot, planned(snapshot, wish(stages=1)))
    assert later(snapshot, 4).absent == frozenset()
    assert later(snapshot, 5).absent == {A}
    assert later(snapshot, 29, A).absent == frozenset()
    assert later(snapshot, 30, A).absent == {B}
    back = fold(later(snapshot, 5), CapacityReceived(heartbeat(A, sequence=9)), START + timedelta(seconds=6))
    assert back.absent == frozenset()


def test_a_spare_node_gets_its_time_when_it_enters_a_plan() -> None:
    snapshot = world(heartbeat(A))
    snapshot = later(snapshot, 9)
    taken = step(snapshot.rollout(CHAT), Propose(planned(snapshot, wish())), START)
    assert taken is not None
    snapshot = fold(snapshot, RolloutAdvanced(taken[0]), START + timedelta(seconds=9))
    assert later(snapshot, 4).absent == frozenset()
    assert later(snapshot, 5).absent == {A}


def test_a_node_that_refused_its_part_reports_like_a_spare_one_and_is_not_lost_for_it() -> None:
    snapshot = world(heartbeat(A))
    taken = step(snapshot.rollout(CHAT), Propose(planned(snapshot, wish())), START)
    assert taken is not None
    given = fold(snapshot, RolloutAdvanced(taken[0]), START)
    refused = later(later(given, 4), 1, A)
    assert later(refused, 9).absent == frozenset()
    assert later(refused, 30).absent == {A}
    hosted = HostedStage(deployment=CHAT, epoch=1, model=MODEL, blocks=(0,), state="loading", sequences=0)
    runs = refused.nodes[A].capacity.model_copy(update={"sequence": 99, "stages": (hosted,)})
    loading = fold(refused, CapacityReceived(runs), START + timedelta(seconds=6))
    assert later(loading, 6).absent == {A}


def test_silence_while_this_process_is_deaf_or_asleep_is_not_held_against_anyone() -> None:
    snapshot = world(heartbeat(A))
    snapshot = in_force(snapshot, planned(snapshot, wish()))
    deaf = later(fold(snapshot, BusLost(), START), 60)
    assert deaf.absent == frozenset()
    back = fold(deaf, BusBack(), START + timedelta(seconds=60))
    assert later(back, 4).absent == frozenset()
    assert later(back, 5).absent == {A}
    assert fold(snapshot, Tick(), START + timedelta(hours=1)).absent == frozenset()


def test_the_fastest_plan_of_equal_nodes_is_the_first_node() -> None:
    assert placed(planned(world(heartbeat(B), heartbeat(A)), wish())) == [("a", 0, 3)]
    assert placed(planned(world(heartbeat(B, speed=2e10), heartbeat(A)), wish())) == [("b", 0, 3)]


def test_stages_that_are_asked_for_are_even() -> None:
    snapshot = world(heartbeat(A), heartbeat(B), heartbeat(C))
    assert placed(planned(snapshot, wish(stages=2))) == [("a", 0, 1), ("b", 2, 3)]
    uneven = world(heartbeat(A, speed=1e10), heartbeat(B, speed=3e10))
    assert placed(planned(uneven, wish(stages=2))) == [("a", 0, 0), ("b", 1, 3)]


def test_every_node_is_looked_at_however_many_there_are() -> None:
    fast = [heartbeat(NodeId(f"fast{k:02}"), blocks=0.5, speed=9e10) for k in range(20)]
    roomy = [heartbeat(NodeId(f"roomy{k:02}"), blocks=9, speed=1e9) for k in range(20)]
    right = heartbeat(NodeId("middle"), blocks=4, speed=3e10)
    plan = planned(world(*fast, *roomy, right), wish())
    assert placed(plan) == [("middle", 0, 3)]
    assert "the fastest on 41 node(s)" in plan.reason


def test_measured_links_decide_among_nodes_that_are_otherwise_alike() -> None:
    names = [NodeId(f"n{k}") for k in range(6)]
    near = {names[2], names[4]}

    def links(node: NodeId) -> tuple[LinkEstimate, ...]:
        return tuple(
            LinkEstimate(peer=peer, rtt_ms=0.1 if {node, peer} == near else 40.0, direct=True)
            for peer in names
            if peer != node
        )

    nodes = [heartbeat(n, blocks=2).model_copy(update={"links": links(n)}) for n in names]
    assert {stage[0] for stage in placed(planned(world(*nodes, heartbeat(A, blocks=2)), wish(stages=2)))} == near


def test_memory_decides_where_one_node_is_not_enough() -> None:
    plan = planned(world(heartbeat(A, blocks=3), heartbeat(B, blocks=2)), wish())
    assert sorted(stage.node for stage in plan.routes[0].stages) == ["a", "b"]
    assert plan.routes[0].source == plan.routes[0].stages[0].node


@pytest.mark.parametrize(
    ("deployment", "nodes", "code", "field", "words"),
    [
        (wish(), [heartbeat(A, blocks=2)], ErrorCode.MODEL_TOO_LARGE, None, f"{4 * BLOCK - 2 * BLOCK} bytes short"),
        (
            wish(),
            [heartbeat(n, blocks=0.9) for n in (A, B, C, NodeId("d"), NodeId("e"))],
            ErrorCode.MODEL_TOO_LARGE,
            None,
            "block 0",
        ),
        (wish(), [], ErrorCode.INFEASIBLE, None, "no node"),
        (wish(stages=3), [heartbeat(A), heartbeat(B)], ErrorCode.INFEASIBLE, "stages", "3 stages"),
        (wish(stages=9), [heartbeat(A)], ErrorCode.INVALID_REQUEST, "stages", "4 block"),
        (
            wish(stages=1),
            [heartbeat(A, blocks=3), heartbeat(B, blocks=3)],
            ErrorCode.MODEL_TOO_LARGE,
            "stages",
            "short",
        ),
        (wish(settings={"context_tokens": 2000}), [], ErrorCode.INVALID_REQUEST, "settings.context_tokens", "1024"),
    ],
)
def test_what_cannot_be_planned_says_why(
    deployment: Deployment, nodes: list[Capacity], code: ErrorCode, field: str | None, words: str
) -> None:
    with pytest.raises(ResplitError, match=words) as caught:
        planned(world(*nodes), deployment)
    assert (caught.value.code, caught.value.field) == (code, field)


@pytest.mark.parametrize(
    ("placement", "code", "field"),
    [
        ([("a", 0, 2)], ErrorCode.INVALID_REQUEST, "placement.0.last"),
        ([("a", 0, 1), ("b", 3, 3)], ErrorCode.INVALID_REQUEST, "placement.1.first"),
        ([("a", 0, 1), ("x", 2, 3)], ErrorCode.INFEASIBLE, "placement.1.node"),
        ([("a", 0, 0), ("b", 1, 3)], ErrorCode.INFEASIBLE, "placement.1.node"),
        ([("b", 0, 0), ("a", 1, 2), ("b", 3, 3)], None, None),
    ],
)
def test_a_placement_is_checked_and_never_changed(
    placement: list[tuple[str, int, int]], code: ErrorCode | None, field: str | None
) -> None:
    snapshot = world(heartbeat(A), heartbeat(B, blocks=2))
    deployment = wish(placement=[Stage(node=NodeId(n), first=f, last=t) for n, f, t in placement])
    if code is None:
        assert placed(planned(snapshot, deployment)) == placement
        return
    with pytest.raises(ResplitError) as caught:
        planned(snapshot, deployment)
    assert (caught.value.code, caught.value.field) == (code, field)


def test_memory_that_a_plan_in_flight_will_take_is_taken() -> None:
    snapshot = world(heartbeat(A, blocks=5))
    plan = planned(snapshot, wish())
    taken = step(snapshot.rollout(CHAT), Propose(plan), START)
    assert taken is not None
    snapshot = fold(snapshot, RolloutAdvanced(taken[0]), START)
    other = wish(name="other")
    with pytest.raises(ResplitError, match="bytes short"):
        planned(snapshot, other)
    hosted = HostedStage(deployment=CHAT, epoch=1, model=MODEL, blocks=(0, 1, 2, 3), state="ready", sequences=0)
    # Once loaded, the heartbeat's own figure counts, and it counts once.
    loaded = heartbeat(A, blocks=1, sequence=1).model_copy(update={"stages": (hosted,)})
    snapshot = fold(snapshot, CapacityReceived(loaded), START)
    assert rooms(snapshot, other, manifest())[A].free_bytes == BLOCK
    # A plan that follows it shares what is there; one of other settings has caches of its own.
    assert rooms(snapshot, wish(), manifest())[A].need_bytes == (0,) * 4


def test_each_need_is_found_from_the_state_alone() -> None:
    snapshot = fold(world(heartbeat(A), heartbeat(B)), DeploymentWritten(wish(stages=1)), START)
    assert decide(snapshot, START) == (Replan(CHAT, Need(Cause.NO_PLAN, "the deployment has no plan yet")),)
    served = in_force(snapshot, planned(snapshot, wish(stages=1)))
    assert decide(served, START) == ()
    changed = fold(served, DeploymentWritten(wish(stages=2)), START)
    (decision,) = decide(changed, START)
    assert isinstance(decision, Replan)
    assert decision.need == Need(Cause.WISH_CHANGED, "the deployment was changed")
    lost = later(served, 5, B)
    (decision,) = decide(lost, START + timedelta(seconds=5))
    assert isinstance(decision, Replan)
    assert decision.need == Need(Cause.NODE_LOST, "lost: a")
    assert placed(planned(lost, wish(stages=1))) == [("b", 0, 3)]
    assert status(lost, START).deployments[0].state == "degraded"
    removed = fold(served, DeploymentRemoved(CHAT), START)
    assert decide(removed, START) == (End(CHAT, "the deployment was removed"),)


def test_a_plan_that_a_new_process_refuses_before_it_is_heard_is_broken() -> None:
    snapshot = fold(world(heartbeat(A), heartbeat(B)), DeploymentWritten(wish(stages=2)), START)
    plan = planned(snapshot, wish(stages=2))
    soon = START + timedelta(seconds=0.5)
    refusal = Receipt(
        node=A, deployment=CHAT, epoch=1, plan=plan.digest, status=ReceiptStatus.REFUSED, error="full", elapsed_ms=1
    )
    refused = fold(in_force(snapshot, plan), ReceiptReceived(refusal), soon)
    heard = fold(refused, CapacityReceived(heartbeat(A, boot="two")), soon)
    (decision,) = decide(heard, soon)
    assert isinstance(decision, Replan)
    assert decision.need == Need(Cause.PLAN_BROKEN, "the plan does not run any more (a: full)")


def test_a_candidate_that_is_not_wanted_any_more_is_dropped() -> None:
    snapshot = fold(world(heartbeat(A), heartbeat(B)), DeploymentWritten(wish(stages=1)), START)
    taken = step(snapshot.rollout(CHAT), Propose(planned(snapshot, wish(stages=1))), START)
    assert taken is not None
    snapshot = fold(snapshot, RolloutAdvanced(taken[0]), START)
    assert decide(snapshot, START) == ()
    changed = fold(snapshot, DeploymentWritten(wish(stages=2)), START)
    (decision,) = decide(changed, START)
    assert isinstance(decision, DropCandidate)


def test_a_failed_attempt_waits_unless_a_node_joins_or_the_wish_changes() -> None:
    snapshot = fold(world(heartbeat(A)), DeploymentWritten(wish()), START)
    retry_at = START + timedelta(seconds=30)
    error = ErrorBody(code=ErrorCode.STAGE_FAILED, message="no")
    failed = replace(Rollout(CHAT, 1), retry_at=retry_at, failures=5, last_error=error)
    snapshot = fold(snapshot, RolloutAdvanced(failed), START)
    assert decide(snapshot, START) == ()
    assert len(decide(snapshot, retry_at)) == 1
    assert len(decide(fold(snapshot, CapacityReceived(heartbeat(B)), START), START)) == 1
    assert len(decide(fold(snapshot, DeploymentWritten(wish(stages=1)), START), START)) == 1


def test_a_node_lost_while_it_prepares_is_no_reason_to_wait_and_one_that_refuses_is() -> None:
    snapshot = fold(world(heartbeat(A), heartbeat(B)), DeploymentWritten(wish(stages=1)), START)
    plan = planned(snapshot, wish(stages=1))
    taken = step(snapshot.rollout(CHAT), Propose(plan), START)
    assert taken is not None
    [node] = [NodeId(node) for node in plan.nodes]
    aborted = step(taken[0], Proceed(), START, frozenset({node}))
    assert aborted is not None
    assert (aborted[0].retry_at, aborted[0].candidate) == (None, None)
    lost = replace(fold(snapshot, RolloutAdvanced(aborted[0]), START), absent=frozenset({node}))
    assert [type(decision) for decision in decide(lost, START)] == [Replan]
    refusal = Receipt(
        node=node,
        deployment=CHAT,
        epoch=plan.epoch,
        plan=plan.digest,
        status=ReceiptStatus.REFUSED,
        error="no",
        elapsed_ms=1,
    )
    refused = step(note(taken[0], refusal, START), Proceed(), START)
    assert refused is not None
    assert refused[0].retry_at is not None
    assert refused[0].retry_at > START


def test_a_node_that_refused_is_avoided_while_another_will_do() -> None:
    snapshot = world(heartbeat(A), heartbeat(B))
    shunning = fold(snapshot, RolloutAdvanced(replace(Rollout(CHAT, 1), refused={A: START})), START)
    assert placed(planned(shunning, wish())) == [("b", 0, 3)]
    alone = fold(world(heartbeat(A)), RolloutAdvanced(replace(Rollout(CHAT, 1), refused={A: START})), START)
    assert placed(planned(alone, wish())) == [("a", 0, 3)]


def test_a_context_left_at_its_default_is_the_models_own() -> None:
    request = DeployRequest(name=CHAT, model="toy")
    assert desired(request, MODEL, manifest()).settings.context_tokens == 1024
    assert desired(request, MODEL, manifest(context=9999)).settings.context_tokens == 2048
    asked = DeployRequest(name=CHAT, model="toy", settings=Settings(context_tokens=512))
    assert desired(asked, MODEL, manifest()).settings.context_tokens == 512
