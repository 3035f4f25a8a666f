"""What an agent does about plans."""

from typing import Any

from agent import step as core
from agent.step import Answer, Drain, Emptied, Follow, Free, Ignore, Load, Loaded, LoadFailed, PlanArrived, Serve, State
from schemas.base import DeploymentName, Digest, NodeId
from schemas.deployment import Settings, Stage
from schemas.plan import Plan, ReceiptStatus, Route
from schemas.section import EventSection

DEPLOYMENT = DeploymentName("d")


def plan(epoch: int, *nodes: str) -> Plan:
    stages = tuple(Stage(node=NodeId(n), first=i, last=i) for i, n in enumerate(nodes or ("n0", "n1")))
    route = Route(index=0, source=stages[0].node, stages=stages, max_sequences=4)
    return Plan(
        deployment=DEPLOYMENT,
        model=Digest("0" * 64),
        epoch=epoch,
        block_count=len(stages),
        settings=Settings(max_sequences=4),
        routes=(route,),
        reason="test",
    )


def event(revision: int, term: int = 1, **plans: Any) -> PlanArrived:
    return PlanArrived(EventSection(deployment=DEPLOYMENT, term=term, revision=revision, **plans))


def run(*events: core.Event) -> tuple[State, list[core.Instruction]]:
    """Feed events one second apart; the instructions of the last one, without the `Follow` of a fresh plan."""
    state = State(NodeId("n0"))
    out: tuple[core.Instruction, ...] = ()
    for now, happening in enumerate(events):
        state, out = core.step(state, happening, float(now))
    if isinstance(happening, PlanArrived) and not any(isinstance(one, Ignore) for one in out):
        assert out[0] == Follow(happening.event)
        return state, list(out[1:])
    return state, list(out)


PREPARED = event(1, candidate=plan(1))
COMMITTED = event(2, current=plan(1))


def test_a_candidate_is_loaded_and_then_answered_ready() -> None:
    assert run(PREPARED)[1] == [Load(plan(1))]
    assert run(PREPARED, Loaded(plan(1)))[1] == [Answer(plan(1), ReceiptStatus.READY, 1.0)]


def test_a_commit_is_served_and_answered_applied() -> None:
    assert run(PREPARED, Loaded(plan(1)), COMMITTED)[1] == [Serve(plan(1)), Answer(plan(1), ReceiptStatus.APPLIED, 2.0)]


def test_an_agent_that_missed_prepare_acts_on_commit_alone() -> None:
    assert run(COMMITTED)[1] == [Load(plan(1))]
    served = [Serve(plan(1)), Answer(plan(1), ReceiptStatus.APPLIED, 1.0)]
    assert run(COMMITTED, Loaded(plan(1)))[1] == [Answer(plan(1), ReceiptStatus.READY, 1.0), *served]


def test_a_commit_that_overtakes_loading_is_served_once_loaded() -> None:
    assert run(PREPARED, COMMITTED)[1] == []
    assert Serve(plan(1)) in run(PREPARED, COMMITTED, Loaded(plan(1)))[1]


def test_a_replayed_or_older_event_changes_nothing() -> None:
    state, _ = run(PREPARED, Loaded(plan(1)), COMMITTED)
    for stale in (PREPARED, COMMITTED):
        after, out = core.step(state, stale, 9.0)
        assert after == state
        assert [type(i) for i in out] == [Ignore]
    after, out = core.step(run(event(5, term=3, current=plan(1)))[0], event(9, term=2, candidate=plan(2)), 1.0)
    assert [type(i) for i in out] == [Ignore], "a lower term is refused whatever its revision"


def test_the_old_epoch_drains_and_is_freed_when_it_stands_nowhere_any_more() -> None:
    story: list[core.Event] = [
        PREPARED,
        Loaded(plan(1)),
        COMMITTED,
        event(3, current=plan(1), candidate=plan(2)),
        Loaded(plan(2)),
    ]
    switch = event(4, current=plan(2), draining=(plan(1),))
    out = run(*story, switch)[1]
    assert Drain(plan(1)) in out
    assert Serve(plan(2)) in out
    drained = run(*story, switch, Emptied(DEPLOYMENT, 1))[1]
    assert [(i.status, i.plan.epoch) for i in drained if isinstance(i, Answer)] == [(ReceiptStatus.DRAINED, 1)]
    again = run(*story, switch, Emptied(DEPLOYMENT, 1), Emptied(DEPLOYMENT, 1))[1]
    assert not [i for i in again if isinstance(i, Answer)], "said once, however often it is found out"
    retire = event(5, current=plan(2))
    out = run(*story, switch, Emptied(DEPLOYMENT, 1), retire)[1]
    assert out[0] == Free(plan(1))
    assert isinstance(out[1], Answer)
    assert out[1].status is ReceiptStatus.RETIRED


def test_freeing_comes_before_loading() -> None:
    out = run(PREPARED, Loaded(plan(1)), event(2, candidate=plan(2)))[1]
    kinds = [type(i) for i in out]
    assert kinds.index(Free) < kinds.index(Load)


def test_what_cannot_be_loaded_is_refused_with_the_reason() -> None:
    out = run(PREPARED, LoadFailed(plan(1), "too large"))[1]
    assert out == [Answer(plan(1), ReceiptStatus.REFUSED, 1.0, "too large")]


def test_a_plan_retired_while_it_was_loading_is_freed_when_it_is_loaded() -> None:
    assert run(PREPARED, event(2), Loaded(plan(1)))[1] == [Free(plan(1))]


def test_a_plan_of_other_nodes_asks_nothing_of_this_one() -> None:
    assert run(event(1, candidate=plan(1, "n5", "n6")))[1] == []
