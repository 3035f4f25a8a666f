"""When a plan that drains may end."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.rollout import NodeRestarted, Proceed, Propose, Rollout, Withdraw, note, recovered, step
from schemas.base import DeploymentName, NodeId
from schemas.capacity import Capacity, HostedStage, HostedState
from schemas.deployment import Settings, Stage
from schemas.plan import Plan, PlanPhase, Receipt, ReceiptStatus
from tests.nodes import plan_of
from tests.unit.test_orchestrator_planning import heartbeat

NOW = datetime(2026, 1, 1, tzinfo=UTC)
A, B = NodeId("a"), NodeId("b")


def plan(epoch: int, *nodes: NodeId) -> Plan:
    return plan_of(epoch, [Stage(node=node, first=i, last=i) for i, node in enumerate(nodes)], Settings(), len(nodes))


def said(rollout: Rollout, of: Plan, status: ReceiptStatus, *nodes: NodeId) -> Rollout:
    for node in nodes:
        told = Receipt(node=node, deployment=of.deployment, epoch=of.epoch, plan=of.digest, status=status, elapsed_ms=1)
        rollout = note(rollout, told, NOW)
    return rollout


def committed(rollout: Rollout, wanted: Plan) -> Rollout:
    prepared = step(rollout, Propose(wanted), NOW)
    assert prepared is not None
    taken = step(said(prepared[0], wanted, ReceiptStatus.READY, A, B), Proceed(), NOW)
    assert taken is not None
    return taken[0]


def test_a_plan_waits_for_the_ingress_of_an_earlier_one_whose_sequences_crossed_to_it() -> None:
    there, back, again = plan(1, A, B), plan(2, B, A), plan(3, A, B)
    rollout = committed(Rollout(DeploymentName("d"), term=1), there)
    rollout = said(committed(rollout, back), there, ReceiptStatus.DRAINED, A, B)
    retired = step(rollout, Proceed(), NOW)
    assert retired is not None
    rollout = committed(retired[0], again)
    rollout = said(rollout, back, ReceiptStatus.DRAINED, B)
    assert step(rollout, Proceed(), NOW) is None, "A answers requests that run over it, though it begins at B"
    ended = step(said(rollout, back, ReceiptStatus.DRAINED, A), Proceed(), NOW)
    assert ended is not None
    assert (ended[1].phase, ended[0].draining) == (PlanPhase.RETIRE, ())


def test_the_end_of_a_plan_names_those_of_its_nodes_that_are_lost() -> None:
    one, other = plan(1, A), plan(2, B)
    rollout = committed(committed(Rollout(DeploymentName("d"), term=1), one), other)
    ended = step(rollout, Proceed(), NOW, frozenset({A}))
    assert ended is not None
    assert (ended[1].phase, ended[1].lost) == (PlanPhase.RETIRE, (A,))


def test_a_node_that_refused_its_part_is_not_waited_for() -> None:
    first, second = plan(1, A, B), plan(2, B, A)
    rollout = said(committed(Rollout(DeploymentName("d"), term=1), first), first, ReceiptStatus.REFUSED, B)
    rollout = said(committed(rollout, second), first, ReceiptStatus.DRAINED, A)
    ended = step(rollout, Proceed(), NOW)
    assert ended is not None
    assert ended[1].phase is PlanPhase.RETIRE


def test_nor_is_one_whose_refusal_is_heard_once_the_plan_drains() -> None:
    """A new leader may have made the next plan before it has read all that was said of the one before."""
    first, second = plan(1, A, B), plan(2, B, A)
    rollout = committed(committed(Rollout(DeploymentName("d"), term=1), first), second)
    rollout = said(said(rollout, first, ReceiptStatus.DRAINED, A), first, ReceiptStatus.REFUSED, B)
    ended = step(rollout, Proceed(), NOW)
    assert ended is not None
    assert ended[1].phase is PlanPhase.RETIRE


def test_a_new_process_that_was_ready_before_its_first_heartbeat_came_counts_once_a_heartbeat_shows_it() -> None:
    wanted = plan(1, A, B)
    prepared = step(Rollout(DeploymentName("d"), term=1), Propose(wanted), NOW)
    assert prepared is not None
    rollout = note(said(prepared[0], wanted, ReceiptStatus.READY, A, B), NodeRestarted(A, NOW), NOW)
    assert step(rollout, Proceed(), NOW) is None, "it may have been said by the process before"
    loading = shows(A, hosted(wanted, A, "loading"))
    other_plan = shows(A, hosted(plan(1, B, A), A, "ready"))
    for one in (loading, other_plan):
        assert step(note(rollout, one, NOW), Proceed(), NOW) is None
    taken = step(note(rollout, shows(A, hosted(wanted, A, "ready")), NOW), Proceed(), NOW)
    assert taken is not None
    assert taken[1].phase is PlanPhase.COMMIT


@pytest.mark.parametrize(("heard_s", "kept"), [(-1, True), (0, False), (1, False)])
def test_what_a_new_process_refused_before_its_first_heartbeat_came_is_its_word(heard_s: int, kept: bool) -> None:
    wanted = plan(1, A, B)
    rollout = said(committed(Rollout(DeploymentName("d"), term=1), wanted), wanted, ReceiptStatus.APPLIED, A, B)
    rollout = said(rollout, wanted, ReceiptStatus.REFUSED, B)
    after = note(rollout, NodeRestarted(B, NOW + timedelta(seconds=heard_s)), NOW + timedelta(seconds=2))
    assert (B in after.current_faults, B in after.refused) == (kept, kept)
    assert after.applied == {A}
    assert not said(after, wanted, ReceiptStatus.APPLIED, B).current_faults


def shows(node: NodeId, stage: HostedStage) -> Capacity:
    return heartbeat(node).model_copy(update={"stages": (stage,)})


def hosted(of: Plan, node: NodeId, state: HostedState) -> HostedStage:
    blocks = of.blocks_on(node)
    return HostedStage(
        deployment=of.deployment, epoch=of.epoch, model=of.model, blocks=blocks, state=state, sequences=0
    )


def test_what_was_sealed_by_an_older_roster_is_said_again_once_and_changes_nothing() -> None:
    rollout = committed(Rollout(DeploymentName("d"), term=1), plan(1, A, B))
    assert step(rollout, Proceed(), NOW) is None
    resealed = step(rollout, Proceed(), NOW, roster=2)
    assert resealed is not None
    after, event = resealed
    assert (event.phase, event.roster, event.current) == (PlanPhase.RESEAL, 2, rollout.current)
    assert after == replace(rollout, revision=rollout.revision + 1, roster=2)
    assert step(after, Proceed(), NOW, roster=2) is None
    assert step(Rollout(DeploymentName("d"), term=1), Proceed(), NOW, roster=2) is None, "nothing was ever said"
    prepared = step(after, Propose(plan(2, B, A)), NOW, roster=3)
    assert prepared is not None
    assert prepared[1].roster == prepared[0].roster == 3, "whatever is said is sealed by the newest"
    again = recovered(prepared[1], 2, NOW)
    assert (again.roster, again.epoch, again.answering) == (3, 2, after.answering)


def test_who_was_an_ingress_is_remembered_until_the_deployment_has_no_plan() -> None:
    there, back = plan(1, A, B), plan(2, B, A)
    rollout = committed(Rollout(DeploymentName("d"), term=1), there)
    assert rollout.answering == {A}
    rollout = said(committed(rollout, back), there, ReceiptStatus.DRAINED, A, B)
    retired = step(rollout, Proceed(), NOW)
    assert retired is not None
    assert (retired[1].draining, retired[1].answering) == ((), (A, B))
    assert retired[1].ingresses == {A, B}
    withdrawn = step(retired[0], Withdraw("removed"), NOW)
    assert withdrawn is not None
    ended = step(said(withdrawn[0], back, ReceiptStatus.DRAINED, A, B), Proceed(), NOW)
    assert ended is not None
    assert (ended[1].plans, ended[1].answering, ended[1].epoch) == ((), (), 2)
