"""A plan is priced with each of its nodes slow, too; and what is promised is a reason to leave one."""

from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.decision import Action, Origin
from orchestrator.risk import CHANCE, SLOWED, WORST, risks, slowing
from orchestrator.rollout import Propose, step
from orchestrator.trigger import BROKEN, KEPT, URGENT_S, TriggerState, WorkFunction, better_by_then
from orchestrator.weighing import weigh, weighable
from schemas.base import NodeId
from schemas.deployment import Chain, Deployment
from schemas.slo import Slo
from tests.trigger_world import CHAT, MODEL, SETTINGS, World

N0, N1 = NodeId("n0"), NodeId("n1")
SECOND = timedelta(seconds=1)


def nodes(chain: Chain) -> set[str]:
    return {stage.node for stage in chain}


def quiet(nodes: int, **fields: object) -> World:
    return World(nodes, 0, noise=0.0, **fields)  # type: ignore[arg-type]


def promised(ttft_ms: float, **fields: object) -> World:
    wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, slo=Slo(ttft_ms=ttft_ms))
    return quiet(wish=wish, **{"nodes": 3, "room": 9.0, **fields})  # type: ignore[arg-type]


def test_a_slow_node_is_no_slower_than_slow() -> None:
    assert slowing(None) == slowing(0.9) == slowing(1.0) == SLOWED
    assert slowing(2.0) == SLOWED / 2
    assert slowing(SLOWED) == slowing(2 * SLOWED) == 1.0


def test_a_plan_without_the_slow_node_costs_what_it_did_and_one_with_it_no_more_than_three_times_the_best() -> None:
    phis = [2.0, 3.0, 1.0]
    slowed = [{N0: 30.0, N1: 2.5}, {N1: 4.0}, {}]
    found = risks(phis, slowed, load=5.0)
    assert found == pytest.approx([CHANCE * (WORST * 1.0 - 2.0 + 0.5), CHANCE * (3.0 - 3.0), 0.0])
    assert risks([9.0, 1.0], [{N0: 10.0}, {}], 1.0) == [0.0, 0.0], (
        "what costs more than that already costs no less for it"
    )
    assert risks([2.0], [{}], 1.0) == [0.0]
    assert risks(phis, slowed, load=0.5) == pytest.approx([one / 2 for one in found])
    assert risks(phis, slowed, load=0.0) == [0.0, 0.0, 0.0]


def test_a_second_route_over_other_nodes_takes_less_risk() -> None:
    world = quiet(4, room=4.5)
    world.sequences = 8
    world.wait(30)
    seen = world.observed()
    alone = seen.current
    assert len(alone.chains) == 1
    assert alone.objective.risk > 0
    apart = [x for x in seen.options if len(x.chains) == 2 and not set.intersection(*map(nodes, x.chains))]
    assert apart
    assert all(x.objective.risk < alone.objective.risk for x in apart)


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


def in_need() -> World:
    """A plan over some of five nodes, of which the first has become so slow that the promise breaks."""
    world = promised(400.0, nodes=5, room=4.5)
    world.sequences = 1
    world.look()
    world.slow[NodeId(world.plan.nodes[0])] = 20.0
    world.wait(8)
    return world


def test_in_need_a_plan_that_is_ready_soon_is_worth_more_than_one_that_is_a_little_better() -> None:
    world = in_need()
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


def test_in_need_one_that_helps_at_once_goes_before_one_that_keeps_the_promise_in_half_a_minute() -> None:
    world = in_need()
    seen = world.observed()
    able = sorted((x for x in seen.options[1:] if x.missing <= KEPT * seen.current.missing), key=lambda x: x.phi)
    keeps, other = able[:2]
    dearer = replace(keeps.objective, latency=1.5 * keeps.objective.latency)
    helps = replace(other, objective=dearer, missing=0.5 * seen.current.missing)
    later = replace(seen.moves[seen.current.key, keeps.key], handover_s=URGENT_S / 2)
    moves = {**seen.moves, (seen.current.key, keeps.key): later}
    both = replace(seen, options=(seen.current, keeps, helps), moves=moves)
    _, decision = WorkFunction()(TriggerState(), both, world.now)
    assert decision.chosen.key == helps.key
    assert better_by_then(keeps, both) == helps
    assert better_by_then(helps, both) is None


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


def test_in_need_what_is_being_prepared_is_regretted_once_another_plan_is_better_and_ready_sooner() -> None:
    world = promised(400.0, room=9.0)
    world.sequences = 1
    world.slow[NodeId(world.plan.nodes[0])] = 20.0
    world.wait(8)
    world = prepared(world)
    assert weigh(world.snapshot, CHAT, WorkFunction(), world.now).regret is None
    regret = regretted(world, 10.0)
    assert "would be better, and sooner" in regret[1]


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
