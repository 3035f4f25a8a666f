"""A drained node is left out, what runs on it moves while it serves, and what could not move is refused before."""

from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.decide import Cause, DropCandidate, Need, Replan, decide
from orchestrator.fold import CapacityReceived, DeploymentWritten, NodeWished, RolloutAdvanced, Snapshot, fold
from orchestrator.operators import placed
from orchestrator.rollout import Propose, Rollout, step
from orchestrator.trial import check_drain, trial, users
from orchestrator.view import status
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment, NodeWish, Stage
from schemas.errors import ErrorCode, ResplitError
from tests.unit.test_orchestrator_planning import (
    BLOCK,
    CHAT,
    START,
    A,
    B,
    C,
    heartbeat,
    in_force,
    later,
    manifest,
    planned,
    wish,
    world,
)
from tests.unit.test_orchestrator_planning import placed as places

OTHER = DeploymentName("other")


def drained(snapshot: Snapshot, *nodes: NodeId, back: bool = False) -> Snapshot:
    for node in nodes:
        snapshot = fold(snapshot, NodeWished(NodeWish(node=node, drained=not back)), START)
    return snapshot


def serving(snapshot: Snapshot, deployment: Deployment) -> Snapshot:
    snapshot = fold(snapshot, DeploymentWritten(deployment), START)
    return in_force(snapshot, planned(snapshot, deployment))


def stages(*placement: tuple[str, int, int]) -> tuple[Stage, ...]:
    return tuple(Stage(node=NodeId(node), first=first, last=last) for node, first, last in placement)


def test_a_drained_node_is_left_out_until_it_is_given_back() -> None:
    snapshot = world(heartbeat(A, speed=2e10), heartbeat(B))
    assert places(planned(drained(snapshot, A), wish())) == [("b", 0, 3)]
    assert places(planned(drained(drained(snapshot, A), A, back=True), wish())) == [("a", 0, 3)]
    # It is present all the same: nothing about it counts as lost.
    assert set(drained(snapshot, A).present) == {A, B}
    assert status(drained(snapshot, A), START).drained == (A,)


def test_a_node_that_comes_back_stays_drained() -> None:
    snapshot = drained(world(heartbeat(A), heartbeat(B)), A)
    lost = later(snapshot, 31, B)
    assert lost.absent == {A}
    back = fold(lost, CapacityReceived(heartbeat(A, boot="two")), START + timedelta(seconds=31))
    assert back.absent == frozenset()
    assert back.drained == {A}
    assert places(planned(back, wish())) == [("b", 0, 3)]


def test_what_runs_on_a_drained_node_moves_and_serves_meanwhile() -> None:
    snapshot = serving(world(heartbeat(A), heartbeat(B)), wish())
    assert decide(drained(snapshot, B), START) == ()
    leaving = drained(snapshot, A)
    assert decide(leaving, START) == (Replan(CHAT, Need(Cause.NODE_DRAINS, "to be drained: a")),)
    assert not Need(Cause.NODE_DRAINS, "").hard
    assert status(leaving, START).deployments[0].state == "changing"


def test_a_plan_being_prepared_on_a_drained_node_is_dropped() -> None:
    snapshot = fold(world(heartbeat(A), heartbeat(B)), DeploymentWritten(wish()), START)
    taken = step(snapshot.rollout(CHAT), Propose(planned(snapshot, wish())), START)
    assert taken is not None
    preparing = fold(snapshot, RolloutAdvanced(taken[0]), START)
    assert decide(preparing, START) == ()
    assert decide(drained(preparing, A), START) == (DropCandidate(CHAT, "to be drained: a"),)


def test_a_node_given_back_ends_the_wait_of_what_failed_for_want_of_it() -> None:
    snapshot = drained(fold(world(heartbeat(A)), DeploymentWritten(wish()), START), A)
    waiting = fold(snapshot, RolloutAdvanced(replace(Rollout(CHAT, 1), retry_at=START.replace(year=2027))), START)
    assert decide(waiting, START) == ()
    assert len(decide(drained(waiting, A, back=True), START)) == 1


def test_a_drain_that_fits_is_let_through() -> None:
    snapshot = serving(world(heartbeat(A), heartbeat(B)), wish())
    check_drain(snapshot, A, START)
    check_drain(snapshot, B, START)
    assert (users(snapshot, A), users(snapshot, B)) == ((CHAT,), ())


@pytest.mark.parametrize(
    ("snapshot", "node", "code", "words"),
    [
        (world(heartbeat(A)), NodeId("x"), ErrorCode.UNKNOWN_NODE, "no node 'x'; the nodes are: a"),
        (
            serving(world(heartbeat(A), heartbeat(B, blocks=1)), wish()),
            A,
            ErrorCode.MODEL_TOO_LARGE,
            f"'chat' cannot run without node 'a': .*{3 * BLOCK} bytes short",
        ),
        (
            serving(world(heartbeat(A), heartbeat(B)), wish(stages=2)),
            B,
            ErrorCode.INFEASIBLE,
            "2 stages need as many nodes",
        ),
        (
            serving(world(heartbeat(A), heartbeat(B)), wish(placement=stages(("a", 0, 3)))),
            A,
            ErrorCode.INFEASIBLE,
            "locked; run `resplit topology unlock chat`",
        ),
        (serving(world(heartbeat(A)), wish()), A, ErrorCode.INFEASIBLE, "no node is here"),
    ],
)
def test_a_drain_that_nothing_could_follow_is_refused(
    snapshot: Snapshot, node: NodeId, code: ErrorCode, words: str
) -> None:
    with pytest.raises(ResplitError, match=words) as caught:
        check_drain(snapshot, node, START)
    assert (caught.value.code, caught.value.field) == (code, "node")


def test_what_fits_one_by_one_but_not_together_is_refused() -> None:
    # Each of the two takes four blocks; b has room for six.
    snapshot = serving(world(heartbeat(A, blocks=20), heartbeat(B, blocks=6)), wish(placement=stages(("a", 0, 3))))
    snapshot = fold(snapshot, DeploymentWritten(wish()), START)
    check_drain(snapshot, A, START)
    current = snapshot.rollout(CHAT).current
    assert current is not None
    twin = current.model_copy(update={"deployment": OTHER})
    snapshot = fold(snapshot, DeploymentWritten(wish(name=OTHER)), START)
    snapshot = fold(snapshot, RolloutAdvanced(replace(Rollout(OTHER, 1), epoch=1, current=twin)), START)
    with pytest.raises(ResplitError, match=f"'other' cannot run without node 'a': .*{2 * BLOCK} bytes short"):
        check_drain(snapshot, A, START)


def test_a_trial_of_what_runs_already_is_what_runs() -> None:
    snapshot = serving(world(heartbeat(A, blocks=4), heartbeat(B, blocks=1)), wish())
    current = snapshot.rollout(CHAT).current
    # Its own blocks take what is free: another plan for it would not fit beside it.
    assert trial(snapshot, wish(placement=stages(("a", 0, 3))), manifest(), START).plan == current


def test_a_placement_on_a_drained_node_is_refused_by_that_name() -> None:
    snapshot = drained(world(heartbeat(A), heartbeat(B), heartbeat(C)), B)
    with pytest.raises(ResplitError, match="node 'b' is drained") as caught:
        trial(snapshot, wish(placement=stages(("a", 0, 1), ("b", 2, 3))), manifest(), START)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INFEASIBLE, "placement.1.node")


def test_a_lock_and_its_end_leave_the_wish_as_it_was() -> None:
    asked, two = wish(stages=2), stages(("a", 0, 1), ("b", 2, 3))
    assert placed(placed(asked, two), None) == asked
    assert placed(asked, stages(("a", 0, 3))).stages is None
