"""A plan is priced in the states that were, too; and what is promised is a reason to leave one."""

from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.decision import Action, Origin
from orchestrator.fold import Weighed, fold
from orchestrator.past import (
    APART,
    KEPT_MAX,
    NOISE,
    NONE_SEEN,
    NOW_WEIGHT,
    WORST,
    added_by,
    remembered,
    state_of,
    weighed,
)
from orchestrator.rollout import Propose, step
from orchestrator.trigger import BROKEN, KEPT, URGENT_S, TriggerState, WorkFunction
from orchestrator.weighing import weigh, weighable
from schemas.base import NodeId
from schemas.deployment import Deployment
from schemas.slo import Slo
from tests.trigger_world import CHAT, MODEL, SETTINGS, START, World

N0, N1 = NodeId("n0"), NodeId("n1")
SECOND = timedelta(seconds=1)


def quiet(nodes: int, **fields: object) -> World:
    return World(nodes, 0, noise=0.0, **fields)  # type: ignore[arg-type]


def promised(ttft_ms: float, **fields: object) -> World:
    wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, slo=Slo(ttft_ms=ttft_ms))
    return quiet(wish=wish, **{"nodes": 3, "room": 9.0, **fields})  # type: ignore[arg-type]


def test_states_are_kept_apart_and_only_the_latest() -> None:
    past = NONE_SEEN
    for second in range(0, 20 * int(APART.total_seconds()), 5):
        past = remembered(past, {N0: 1.0 + second}, START + second * SECOND)
    assert len(past.states) == KEPT_MAX
    assert all(b - a == APART for (a, _), (b, _) in zip(past.states, past.states[1:], strict=False))
    assert past.states[-1][0] == START + 19 * APART


def test_the_weights_of_states_add_up_and_alike_ones_are_one() -> None:
    past = NONE_SEEN
    for number, factor in enumerate((1.0, 4.0, 4.0, 1.0)):
        past = remembered(past, {N0: factor, N1: 1.0}, START + number * APART)
    now, then = weighed(past, {N0: 1.0, N1: 1.0})
    assert (now[0], then[0]) == pytest.approx((NOW_WEIGHT + (1 - NOW_WEIGHT) / 2, (1 - NOW_WEIGHT) / 2))
    assert (now[1], then[1]) == ({}, {N0: 4.0})
    assert weighed(past, {N1: 1.0}) == [(1.0, {})], "of n0 it is not known how slow it is now"
    assert weighed(NONE_SEEN, {N0: 3.0}) == [(1.0, {})]
    assert state_of({N0: NOISE - 0.01, N1: NOISE}) == {N0: 1.0, N1: NOISE}


def test_no_plan_counts_in_a_state_for_more_than_three_times_the_best() -> None:
    found = added_by([[2.0, 2.0, 30.0], [3.0, 3.0, 4.0], [5.0, 1.0, 5.0]], [0.5, 0.25, 0.25])
    assert found == pytest.approx([0.25 * (WORST * 4.0 - 2.0), 0.25 * 1.0, 0.25 * (1.0 - 5.0)])
    assert added_by([[2.0], [3.0]], [1.0]) == [0, 0]


def test_a_node_that_was_slow_costs_more_than_one_that_was_not_and_no_more_than_three_times_the_best() -> None:
    world = quiet(3, room=9.0, strain=1.0)
    world.sequences = 1
    world.run(20)
    used = NodeId(world.plan.nodes[0])
    past = remembered(NONE_SEEN, {used: 50.0}, world.now)
    before = world.observed()
    outlook = world.snapshot.outlooks[CHAT]
    world.snapshot = fold(world.snapshot, Weighed(replace(outlook, past=past)), world.now)
    # What is known of the others is what they were when they loaded; of the one in use what it is now.
    after = world.observed()
    risk = after.current.objective.past
    assert before.current.objective.past == 0.0
    others = [x for x in after.options if used not in x.nodes]
    assert all(x.objective.past == 0 for x in others)
    assert others
    best = min(x.phi for x in others)
    assert 0 < risk <= (1 - NOW_WEIGHT) * WORST * best


def test_a_plan_that_cannot_keep_what_is_promised_is_left_at_once_for_one_that_can() -> None:
    world = promised(400.0)
    world.sequences = 1
    world.run(20)
    assert world.moves == []
    slowed = NodeId(world.plan.nodes[0])
    world.slow[slowed] = 20.0
    world.run(10)
    [move] = world.moves
    assert move.action is Action.HARD
    assert "are predicted to miss what is promised" in move.why_now
    assert slowed not in world.plan.nodes


def test_where_no_plan_could_keep_it_much_better_nothing_is_left_for_that() -> None:
    world = promised(1.0)
    world.sequences = 1
    seen = world.observed()
    assert seen.current.missing > 0.99 > BROKEN
    assert all(x.missing > KEPT for x in seen.options)
    world.run(60)
    assert world.moves == []


def test_in_need_a_plan_that_is_ready_soon_is_worth_more_than_one_that_is_a_little_better() -> None:
    world = promised(400.0, nodes=5, room=4.5)
    world.sequences = 1
    world.look()
    world.slow[NodeId(world.plan.nodes[0])] = 20.0
    world.wait(8)
    seen = world.observed()
    able = [x for x in seen.options[1:] if x.missing <= KEPT * seen.current.missing]
    best = min(able, key=lambda x: (x.phi, x.key))
    _, decision = WorkFunction()(TriggerState(), seen, world.now)
    assert decision.chosen.key == best.key
    slow = replace(seen.moves[seen.current.key, best.key], handover_s=2 * URGENT_S)
    later = replace(seen, moves={**seen.moves, (seen.current.key, best.key): slow})
    _, decision = WorkFunction()(TriggerState(), later, world.now)
    assert decision.action is Action.HARD
    assert decision.chosen.key != best.key


def prepared(world: World) -> World:
    """The world while the plan on the best other node is being prepared."""
    chosen = min(world.observed().options[1:], key=lambda x: (x.phi, x.key))
    plan = world.plan.model_copy(
        update={
            "epoch": 2,
            "previous": world.plan.digest,
            "routes": tuple(
                route.model_copy(update={"stages": chain, "source": chain[0].node})
                for route, chain in zip(world.plan.routes, chosen.chains, strict=True)
            ),
        }
    )
    taken = step(world.snapshot.rollout(CHAT), Propose(plan, False), world.now)
    assert taken is not None
    world.snapshot = replace(world.snapshot, rollouts={**world.snapshot.rollouts, CHAT: taken[0]})
    return world


def regretted(world: World, factor: float) -> tuple[int, str]:
    """Why what is being prepared is given up once its first node is `factor` times slower."""
    candidate = world.snapshot.rollout(CHAT).candidate
    assert candidate is not None
    world.slow[NodeId(candidate.plan.nodes[0])] = factor
    world.wait(8)
    regret = weigh(world.snapshot, CHAT, WorkFunction(), world.now).regret
    assert regret is not None
    return regret


def test_what_is_being_prepared_is_regretted_once_it_would_be_worse() -> None:
    world = quiet(3, room=9.0)
    world.sequences = 1
    world.slow[NodeId(world.plan.nodes[0])] = 3.0
    world.wait(4)
    world = prepared(world)
    assert weighable(world.snapshot, world.now) == (CHAT,)
    outlook = weigh(world.snapshot, CHAT, WorkFunction(), world.now)
    assert (outlook.decision.action, outlook.regret) == (Action.KEEP, None)
    regret = regretted(world, 9.0)
    assert regret[0] == 2
    assert "by now it would be worse" in regret[1]


def test_what_is_being_prepared_is_regretted_once_it_would_be_left_at_once() -> None:
    world = promised(400.0, room=9.0)
    world.sequences = 1
    world.slow[NodeId(world.plan.nodes[0])] = 20.0
    world.wait(8)
    world = prepared(world)
    assert weigh(world.snapshot, CHAT, WorkFunction(), world.now).regret is None
    regret = regretted(world, 10.0)
    assert "would miss what is promised" in regret[1]


def test_while_a_plan_drains_the_one_in_force_is_left_for_need_alone() -> None:
    world = promised(400.0)
    world.sequences = 1
    world.look()
    seen = world.observed()
    assert not seen.settling
    world.slow[NodeId(world.plan.nodes[0])] = 20.0
    world.wait(8)
    needed = replace(world.observed(), settling=True)
    assert WorkFunction()(TriggerState(), needed, world.now)[1].action is Action.HARD
    unpromised = replace(needed, options=tuple(replace(x, missing=0.0) for x in needed.options))
    state = TriggerState(at=world.now - 60 * SECOND)
    after, decision = WorkFunction()(state, unpromised, world.now)
    assert decision.action is Action.KEEP
    assert "still drains" in decision.why_now
    assert after.work == state.work


def test_routes_of_the_same_cuts_exchange_nodes_so_that_one_is_without_the_slow_ones() -> None:
    world = quiet(4, room=4.5, wish=Deployment(name=CHAT, model=MODEL, settings=SETTINGS, routes=2, stages=2))
    world.sequences = 8
    world.look()
    first, second = world.plan.chains
    world.slow[first[0].node] = world.slow[second[1].node] = 6.0
    world.wait(8)
    together = {(first[0].node, second[1].node), (second[0].node, first[1].node)}
    found = world.observed()
    regrouped = [x for x in found.options if {tuple(s.node for s in chain) for chain in x.chains} == together]
    assert [x.origin for x in regrouped] == [Origin.REASSIGNED]
    assert regrouped[0].phi < found.current.phi
    assert found.moves[found.current.key, regrouped[0].key].nodes == (), "they hold the same blocks"
