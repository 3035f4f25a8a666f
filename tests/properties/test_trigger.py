"""When to move and when not: the trigger under noise, slowdowns, adversaries and nonsense."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.decision import Action, Observation, Option, Origin
from orchestrator.moving import MoveCost, Way
from orchestrator.trigger import (
    PLANNING_PERIOD_S,
    AlwaysArgmin,
    EwmaThreshold,
    Policy,
    RoundTripRegret,
    TriggerState,
    WorkFunction,
)
from orchestrator.weighing import chosen_plan, weigh
from profiler.objective import Objective
from schemas.base import NodeId
from schemas.deployment import Deployment, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.slo import Slo
from tests.trigger_world import CHAT, MODEL, SETTINGS, START, World, manifest

HALF_AN_HOUR_S = 1800
RULES: tuple[Policy, ...] = (WorkFunction(), RoundTripRegret(), AlwaysArgmin(), EwmaThreshold())


def option(node: str, phi: float, cut: int = 3) -> Option:
    stages = (Stage(node=NodeId(node), first=0, last=cut), Stage(node=NodeId("z"), first=cut + 1, last=7))
    return Option((stages,), Origin.CURRENT, Objective(phi, 0, 0))


def moving(cost: float, size: int = 0) -> MoveCost:
    return MoveCost((), Way.NONE, size, 0, price=0, slowdown=0, pause=0, fixed=cost)


def observed(*options: Option, cost: float = 1.0, bound: float = 0.0, **fields: object) -> Observation:
    moves = {(a.key, b.key): moving(cost) for a in options for b in options if a.key != b.key}
    seen = Observation(1, options, moves, bound)
    return replace(seen, **fields)  # type: ignore[arg-type]


def played(policy: Policy, costs: Sequence[tuple[float, ...]], toll: float) -> tuple[float, int]:
    """What `policy` pays for plans a, b, c..., whose Phi in each period is `costs`, and how often it moves."""
    state, here, paid, moves = TriggerState(), 0, 0.0, 0
    for turn, phis in enumerate(costs):
        options = [option("abcdef"[i], phi) for i, phi in enumerate(phis)]
        seen = observed(options[here], *(one for i, one in enumerate(options) if i != here), cost=toll)
        state, decision = policy(state, seen, START + timedelta(seconds=PLANNING_PERIOD_S * turn))
        if decision.acts:
            here = [one.key for one in options].index(decision.chosen.key)
            paid, moves = paid + toll, moves + 1
        paid += PLANNING_PERIOD_S * phis[here]
    return paid, moves


@pytest.mark.parametrize(
    ("nodes", "seed"), [(3, 2), *(pytest.param(n, s, marks=pytest.mark.slow) for n, s in ((2, 1), (5, 3)))]
)
def test_half_an_hour_of_noise_moves_nothing(nodes: int, seed: int) -> None:
    world = World(nodes, seed, noise=0.2)
    world.run(HALF_AN_HOUR_S)
    sooner = len(world.decisions) - HALF_AN_HOUR_S / PLANNING_PERIOD_S
    assert 0 <= sooner <= 2, "noise hardly ever looks like a node that changed"
    assert [decision.sentence for decision in world.moves] == []


@pytest.mark.parametrize(
    "share", [1.0, *(pytest.param(share, marks=pytest.mark.slow) for share in (0.8, 0.9, 1.1, 1.2))]
)
def test_a_promise_that_is_just_kept_or_just_broken_moves_nothing_under_noise(share: float) -> None:
    probe = World(3, 0, noise=0.0, room=9.0)
    probe.sequences = 1
    probe.look()
    takes_ms = probe.decisions[0].current.terms["ttft_ms"]
    wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, slo=Slo(ttft_ms=share * takes_ms))
    world = World(3, 1, noise=0.2, room=9.0, wish=wish)
    world.sequences = 1
    world.run(600)
    assert [decision.sentence for decision in world.moves] == []


@pytest.mark.parametrize("seed", [0, 3, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 4, 5))])
def test_a_node_slowed_three_times_is_left_within_two_periods_and_once(seed: int) -> None:
    world = World(4, seed, noise=0.2)
    world.run(30 + seed % 5)
    slowed = world.plan.nodes[seed % len(world.plan.nodes)]
    since = world.now
    world.slow[NodeId(slowed)] = 3.0
    world.run(300)
    assert [decision.acts for decision in world.moves] == [True]
    assert (world.moves[0].at - since).total_seconds() <= 2 * PLANNING_PERIOD_S
    assert world.true_tpot_ms(world.plan) <= 1.2 * world.best_tpot_ms()
    assert slowed in world.moves[0].sentence


def test_the_literal_rule_moves_all_the_time_under_the_same_noise() -> None:
    world = World(3, 2, noise=0.2, policy=AlwaysArgmin())
    world.run(300)
    assert len(world.moves) > 10


@settings(max_examples=15, deadline=None)
@given(
    st.lists(st.floats(1, 5), min_size=3, max_size=6),
    st.lists(st.tuples(st.integers(0, 5), st.floats(0.5, 8)), max_size=4),
    st.floats(3, 9),
    st.sampled_from(RULES),
)
def test_what_is_proposed_fits(
    slow: list[float], changes: list[tuple[int, float]], room: float, policy: Policy
) -> None:
    assume(room * len(slow) > 10)
    world = World(len(slow), 0, room=room, policy=policy)
    world.slow.update(zip(world.names, slow, strict=True))
    for node, factor in changes:
        world.slow[world.names[node % len(slow)]] = factor
        for _ in range(3):
            world.now += timedelta(seconds=PLANNING_PERIOD_S)
            world.hear()
            outlook = weigh(world.snapshot, CHAT, policy, world.now)
            for chains in outlook.failovers.values():
                assert all(fits(stages, room) for stages in chains)
            for runner_up in outlook.decision.runners_up:
                assert all(fits(stages, room) for stages in runner_up.option.chains)
            if outlook.decision.acts:
                world.adopt(chosen_plan(world.snapshot, outlook).plan)
                assert fits(world.plan.chains[0], room)
    assert {stage.node for stage in world.plan.routes[0].stages} <= set(world.names)


def fits(stages: tuple[Stage, ...], room: float) -> bool:
    covered = [block for stage in stages for block in stage.blocks]
    sizes = {stage.node: sum(len(o.blocks) for o in stages if o.node == stage.node) for stage in stages}
    return covered == list(range(len(manifest().blocks))) and all(size <= room for size in sizes.values())


def test_each_node_in_use_has_a_plan_that_does_without_it() -> None:
    world = World(4, 1, noise=0)
    outlook = weigh(world.snapshot, CHAT, WorkFunction(), world.now)
    assert set(outlook.failovers) == set(world.plan.nodes)
    assert all(node != stage.node for node, chains in outlook.failovers.items() for c in chains for stage in c)


def test_an_adversary_that_slows_whatever_is_used_gets_a_bounded_number_of_moves() -> None:
    world = World(4, 1, noise=0)
    minutes = 10
    for _ in range(minutes * 12):
        world.slow = {NodeId(world.plan.nodes[0]): 4.0}
        world.run(5)
    assert 0 < len(world.moves) <= 5 * minutes


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 4), st.floats(0.5, 20), st.data())
def test_the_work_function_stays_within_its_bound_of_the_best_static_plan(
    plans: int, toll: float, data: st.DataObject
) -> None:
    row = st.tuples(*[st.floats(0.1, 5)] * plans)
    costs = data.draw(st.lists(row, min_size=1, max_size=60))
    paid, _ = played(WorkFunction(margin=0.0, horizon_s=1e9), costs, toll)
    static = min(PLANNING_PERIOD_S * sum(row[i] for row in costs) for i in range(plans))
    # A plan's Phi is seen once its first period is over, and each move of the budget may double D for a while.
    assert paid <= (2 * plans - 1) * (static + 3 * toll) + 5 * PLANNING_PERIOD_S


@pytest.mark.parametrize("policy", [WorkFunction(), RoundTripRegret()], ids=["work function", "regret"])
def test_where_two_plans_take_turns_faster_than_a_move_pays_staying_wins(policy: Policy) -> None:
    costs = [(1.0, 1.5) if turn % 2 else (1.5, 1.0) for turn in range(200)]
    assert played(policy, costs, 40)[1] == 0
    paid, moves = played(AlwaysArgmin(), costs, 40)
    assert moves > 150
    assert played(policy, costs, 40)[0] < paid / 4


@pytest.mark.parametrize("policy", [WorkFunction(), RoundTripRegret()], ids=["work function", "regret"])
def test_a_lasting_difference_is_moved_for_once(policy: Policy) -> None:
    paid, moves = played(policy, [(2.0, 1.0, 1.5)] * 100, 5)
    assert moves == 1
    assert paid <= 100 * PLANNING_PERIOD_S * 1.0 + 4 * 5


@pytest.mark.parametrize("policy", [WorkFunction(), RoundTripRegret()], ids=["work function", "regret"])
@given(gap=st.floats(0, 1), cost=st.floats(0.01, 1000))
def test_a_keep_is_certified_exactly_where_no_plan_could_pay_for_the_cheapest_move(
    policy: Policy, gap: float, cost: float
) -> None:
    seen = observed(option("a", 1 + gap), option("b", 1.0), cost=cost, bound=1.0)
    _, decision = policy(TriggerState(), seen, START)
    assert decision.certified is (gap * 120 < cost)
    assert not decision.acts


@pytest.mark.parametrize("policy", RULES)
def test_a_hard_trigger_weighs_nothing_and_leaves_what_is_unfit(policy: Policy) -> None:
    seen = observed(
        option("a", 1.0),
        option("b", 2.0),
        option("a", 1.5, cut=4),
        cost=1e6,
        hard="lost",
        unfit=frozenset({NodeId("a")}),
    )
    _, decision = policy(TriggerState(), seen, START)
    assert (decision.action, decision.chosen.key) == (Action.HARD, option("b", 2.0).key)
    nowhere = replace(seen, unfit=frozenset({NodeId("z")}))
    assert not policy(TriggerState(), nowhere, START)[1].acts


@pytest.mark.parametrize("policy", RULES)
def test_an_error_budget_that_burns_in_both_windows_is_a_hard_trigger(policy: Policy) -> None:
    seen = observed(option("a", 1.0), option("b", 0.8), cost=1e6, burn=(6.0, 3.0))
    assert policy(TriggerState(), seen, START)[1].action is Action.HARD
    for burn in ((6.0, 1.0), (1.0, 3.0)):
        assert policy(TriggerState(), replace(seen, burn=burn), START)[1].action is not Action.HARD


@pytest.mark.parametrize("policy", RULES)
def test_where_there_is_nothing_else_the_plan_stays_even_if_it_cannot(policy: Policy) -> None:
    alone = observed(option("a", 2.0), bound=1.0)
    assert policy(TriggerState(), alone, START)[1].why_now == "there is no other plan that fits"
    decision = policy(TriggerState(), replace(alone, hard="lost"), START)[1]
    assert (decision.acts, decision.why_now) == (False, "lost, and no other plan is there that would help")
    assert "an operator placed it" in policy(TriggerState(), replace(alone, pinned=True), START)[1].sentence


def test_of_two_that_fire_the_cheaper_class_is_taken_unless_the_other_would_follow_at_once() -> None:
    def after_a_minute(resplit_phi: float) -> Action:
        seen = observed(option("a", 3.0), option("b", 1.5), option("a", resplit_phi, cut=5), cost=1.0)
        state, decision = WorkFunction()(TriggerState(), seen, START)
        for turn in range(1, 12):
            state, decision = WorkFunction()(state, seen, START + timedelta(seconds=turn * PLANNING_PERIOD_S))
            if decision.acts:
                break
        return decision.action

    assert after_a_minute(1.45) is Action.REDISTRIBUTE
    assert after_a_minute(0.5) is Action.RESPLIT


def test_candidates_come_and_go_without_an_advantage_for_the_new() -> None:
    policy, state = WorkFunction(), TriggerState()
    for turn in range(40):
        # A plan that was never seen before looks good each time, and is gone the next.
        seen = observed(option("a", 1.5), option("bcdef"[turn % 5], 1.0), cost=5.0)
        state, decision = policy(state, seen, START + timedelta(seconds=turn * PLANNING_PERIOD_S))
        assert not decision.acts
        assert set(state.work) == {one.key for one in seen.options}


def test_time_that_runs_backwards_or_stands_still_for_an_hour_is_no_evidence() -> None:
    seen = observed(option("a", 2.0), option("b", 1.0), cost=20.0)
    state, _ = WorkFunction()(TriggerState(), seen, START)
    back, decision = WorkFunction()(state, seen, START - timedelta(hours=1))
    assert (back.work, decision.acts) == (state.work, False)
    assert not WorkFunction()(state, seen, START + timedelta(hours=1))[1].acts


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -0.1])
def test_costs_that_are_no_costs_are_refused(wrong: float) -> None:
    cases: tuple[Callable[[], Observation], ...] = (
        lambda: observed(option("a", wrong), option("b", 1.0)),
        lambda: observed(option("a", 1.0), option("b", wrong)),
        lambda: observed(option("a", 1.0), option("b", 1.0), cost=wrong),
        lambda: observed(option("a", 1.0), bound=wrong),
    )
    for made in cases:
        with pytest.raises(ResplitError) as refused:
            made()
        assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_candidates_that_are_too_many_twice_there_or_without_a_price_are_refused() -> None:
    many = [option("a", 1.0, cut=cut) for cut in range(7)] + [option(n, 1.0, cut=cut) for n in "bc" for cut in range(7)]
    cases: tuple[Callable[[], Observation], ...] = (
        lambda: observed(*many),
        lambda: observed(option("a", 1.0), option("a", 2.0)),
        lambda: Observation(1, (option("a", 1.0), option("b", 1.0)), {}, 0.0),
        lambda: Observation(1, (), {}, 0.0),
    )
    for made in cases:
        with pytest.raises(ResplitError):
            made()


def test_the_runners_up_stand_by_cost_and_each_says_why_it_lost() -> None:
    world = World(4, 3)
    world.run(60)
    decision = world.decisions[-1]
    phis = [one.option.phi for one in decision.runners_up]
    assert all(a <= b for a, b in pairwise(phis))
    assert all(one.why_not for one in decision.runners_up)
