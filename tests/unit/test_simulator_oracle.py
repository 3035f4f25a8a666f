"""Whoever knows the run: what placements truly cost, the cheapest way through a run, and that it is taken in time."""

from dataclasses import replace
from functools import cache
from itertools import pairwise, product

import numpy as np
import pytest

from profiler.forecast import forecast
from profiler.host import hosts_of
from profiler.objective import Weights
from schemas.base import NodeId
from schemas.deployment import Placement, Stage
from simulator.files import read_scenario, shipped
from simulator.foresight import Foresight, cheapest_way, foresee, way_cost
from simulator.oracle import oracle_of
from simulator.policies import CONTENDERS
from simulator.pricing import price_of
from simulator.records import Epoch, RunResult
from simulator.scenario import Fault, Telemetry, Where
from simulator.world import World
from tests.synthetic_run import chain, epochs, result

SMALL = read_scenario(shipped()["small"])
TURN_S = 25.0
LEFT, RIGHT = chain(("left-0", 0, 3), ("left-1", 4, 9)), chain(("right-0", 0, 3), ("right-1", 4, 9))


def slow(site: str, begin_s: float, end_s: float) -> Fault:
    nodes = (NodeId(f"{site}-0"), NodeId(f"{site}-1"))
    return Fault(kind="slow", at_s=begin_s, lasts_s=end_s - begin_s, factor=4.0, where=Where(nodes=nodes))


CALM = SMALL.model_copy(update={"faults": ()})
TURNS = SMALL.model_copy(
    update={
        "faults": (slow("right", 0.0, TURN_S), slow("left", TURN_S, 60.0)),
        "duration_s": 45.0,
        "workload": SMALL.workload.model_copy(update={"rate_per_s": 2.0}),
    }
)
"""First the nodes on the right are slow, then those on the left."""


@cache
def known() -> Foresight:
    return foresee(oracle_of(TURNS, 10))


@cache
def ran(policy: str) -> RunResult:
    return World(TURNS, CONTENDERS[policy], 10, foresight=known()).run()


# What a placement costs.


def test_the_oracle_prices_a_plan_as_production_does_from_what_nodes_say_that_do_not_err() -> None:
    scenario = CALM.model_copy(update={"telemetry": Telemetry(noise=0.0)})
    world = World(scenario, CONTENDERS["static-start"], 10)
    plan = world.run().epochs[-1].placement
    oracle = oracle_of(scenario, 10)
    asked = oracle.asked[2]
    capacities = {node: said.capacity for node, said in world.bus.said.items()}
    told = forecast(
        plan,
        hosts_of(capacities, oracle.physics.manifest, oracle.physics.digest),
        oracle.physics.manifest,
        asked.prompt_tokens,
        demand=asked.demand,
        settings=oracle.deployment.settings,
        trusted=oracle.trusted,
    )
    assert oracle.phi(plan, 2) == pytest.approx(told.objective(oracle.latency_ref_ms, Weights()).phi, rel=0.02)


def test_phi_is_above_the_bound_that_it_is_measured_in_and_follows_what_nodes_truly_do() -> None:
    oracle = known().oracle
    first, last = 0, len(oracle.slots) - 1
    assert 1.0 <= oracle.phi(LEFT, first) < 2.0
    assert oracle.phi(LEFT, last) > 3 * oracle.phi(LEFT, first)
    assert oracle.phi(RIGHT, first) > 3 * oracle.phi(RIGHT, last)


def test_what_is_not_served_costs_the_same_whoever_fails_to() -> None:
    oracle = oracle_of(SMALL, 10)  # left-0 is dead from 12 to 18 s
    crammed = chain(("left-0", 0, 9))
    none_s = oracle.unserved * 2.0
    assert oracle.cost(None, 13.0, 15.0) == none_s
    assert oracle.cost(crammed, 6.0, 8.0) == none_s, "it has not the memory"
    assert oracle.cost(LEFT, 13.0, 15.0) == none_s
    assert oracle.cost(RIGHT, 13.0, 15.0) < none_s / 10


def test_a_node_is_away_to_the_moment_and_its_plan_until_there_is_another() -> None:
    oracle = oracle_of(SMALL, 10)
    served = oracle.cost(LEFT, 10.0, 12.0) / 2
    assert oracle.cost(LEFT, 10.0, 20.0) == pytest.approx(4 * served + 6 * oracle.unserved, rel=0.01)
    assert oracle.cost(LEFT, 10.0, 20.0, since_s=8.0) == pytest.approx(2 * served + 8 * oracle.unserved, rel=0.01)
    assert oracle.cost(LEFT, 19.0, 20.0, since_s=18.5) == pytest.approx(served, rel=0.3), "it came later than that"


def test_where_one_of_two_routes_is_lost_the_other_serves_its_own_part() -> None:
    oracle = oracle_of(SMALL, 10)
    both: Placement = (*LEFT, *RIGHT)
    alone = oracle.cost(RIGHT, 13.0, 15.0)
    assert oracle.cost(both, 13.0, 15.0) == pytest.approx(alone), "its ingress is gone, so nobody is asked there"
    other_end = chain(("left-1", 0, 3), ("left-0", 4, 9))
    half = oracle.cost((*other_end, *RIGHT), 13.0, 15.0)
    assert half == pytest.approx((alone + 2.0 * oracle.unserved) / 2), "its ingress keeps what it is given"


def test_time_outside_of_the_run_costs_nothing() -> None:
    oracle = known().oracle
    assert oracle.cost(LEFT, 0.0, oracle.begin_s) == oracle.cost(None, oracle.end_s, oracle.end_s + 9) == 0.0


# The cheapest way.


@pytest.mark.parametrize("seed", range(20))
def test_no_way_through_the_candidates_is_cheaper_and_staying_is_one_of_them(seed: int) -> None:
    rng = np.random.default_rng(seed)
    costs, moves = rng.exponential(1.0, (5, 3)), rng.exponential(0.5, (3, 3))
    np.fill_diagonal(moves, 0.0)
    least = way_cost(costs, moves, cheapest_way(costs, moves))
    assert least == pytest.approx(min(way_cost(costs, moves, way) for way in product(range(3), repeat=5)))
    assert costs.min(axis=1).sum() <= least + 1e-9
    assert least <= costs.sum(axis=0).min() + 1e-9


def test_a_move_that_pays_only_to_the_moment_is_not_made() -> None:
    costs = np.array([[1.0, 9.0], [1.0, 0.5], [1.0, 9.0]])
    assert cheapest_way(costs, np.zeros((2, 2))) == (0, 1, 0)
    assert cheapest_way(costs, np.zeros((2, 2)), early=0.1) == (0, 0, 0)


def test_of_ways_that_cost_the_same_the_one_that_stays_is_taken() -> None:
    assert cheapest_way(np.ones((6, 3)), np.zeros((3, 3))) == (0,) * 6


def test_the_bound_is_below_the_cheapest_way_and_that_below_every_static_plan() -> None:
    found = known()
    assert found.bound < found.least < found.costs.sum(axis=0).min()
    assert found.static == found.candidates[0]
    assert {LEFT, RIGHT} <= set(found.candidates)


def test_the_same_run_is_foreseen_in_the_same_way() -> None:
    again = foresee(oracle_of(TURNS, 10))
    assert (again.candidates, again.chosen, again.schedule) == (known().candidates, known().chosen, known().schedule)
    assert (again.least, again.bound) == (known().least, known().bound)


def test_a_model_that_fits_nowhere_has_no_candidates_and_is_served_by_nobody() -> None:
    large = SMALL.model.model_copy(update={"layer_bytes": 10**9})
    scenario = SMALL.model_copy(update={"model": large, "duration_s": 10.0})
    found = foresee(oracle_of(scenario, 10))
    assert (found.candidates, found.static, found.schedule) == ((), None, ())
    assert found.bound == found.least + found.oracle.unserved * 5.0
    for policy in ("static", "clairvoyant"):
        price = price_of(World(scenario, CONTENDERS[policy], 10, foresight=found).run(), found)
        assert price.phi == pytest.approx(found.oracle.unserved)


# It is taken in time.


def test_who_knows_the_run_has_moved_before_its_nodes_become_slow() -> None:
    before, after = ran("clairvoyant").epochs
    assert (before.placement, after.placement) == (LEFT, RIGHT)
    assert TURN_S - 1 < after.begin_s <= TURN_S
    assert not ran("clairvoyant").violations


def test_a_step_that_is_due_while_nobody_leads_is_taken_by_the_next_leader() -> None:
    leader = Fault(kind="leader", at_s=TURN_S - 4.0)
    result = World(
        TURNS.model_copy(update={"faults": (*TURNS.faults, leader)}), CONTENDERS["clairvoyant"], 10, foresight=known()
    ).run()
    assert [epoch.placement for epoch in result.epochs] == [LEFT, RIGHT]


def test_who_knows_the_run_pays_less_than_who_stays_and_more_than_the_bound() -> None:
    knows, stays = (price_of(ran(policy), known()) for policy in ("clairvoyant", "static"))
    assert knows.bound < knows.phi < stays.phi
    assert knows.moves > 0 and stays.moves == 0
    assert 0 <= knows.gap < stays.gap


def test_the_static_optimum_of_the_mean_state_is_in_force_from_the_beginning_and_stays() -> None:
    assert [epoch.placement for epoch in ran("static").epochs] == [known().static]


def test_who_plans_again_for_lost_nodes_does_so_from_the_static_optimum() -> None:
    oracle = oracle_of(SMALL, 10)
    found = replace(foresee(oracle), candidates=(LEFT,))
    placements = {}
    for policy in ("static", "static-restart"):
        placements[policy] = World(SMALL, CONTENDERS[policy], 10, foresight=found).run().epochs
    assert {epoch.placement for epoch in placements["static"]} == {LEFT}
    first, second = placements["static-restart"][:2]
    assert first.placement == LEFT and NodeId("left-0") not in {stage.node for stage in second.placement[0]}
    assert second.cause == "node_lost"


# What a run cost.


def priced(*placed: tuple[float, Placement]) -> tuple[float, float, float, float]:
    made: list[Epoch] = epochs(*placed, end_s=TURNS.duration_s) if placed else []
    price = price_of(result([], epochs=made), known())
    return price.plans, price.moves, price.bound, price.gap


def test_a_run_costs_what_its_plans_and_its_moves_do() -> None:
    oracle, whole_s = known().oracle, known().oracle.end_s - known().oracle.begin_s
    plans, moves, bound, gap = priced((1.0, LEFT), (TURN_S, RIGHT))
    assert plans * whole_s == pytest.approx(oracle.cost(LEFT, 0.0, TURN_S) + oracle.cost(RIGHT, TURN_S, 45.0))
    asked = oracle.asked[oracle.slot_at(TURN_S)]
    assert moves * whole_s == pytest.approx(oracle.move(LEFT, RIGHT, asked, {}).total)
    assert gap == pytest.approx(plans / bound - 1, abs=1e-9)


def test_a_plan_issued_anew_and_a_move_before_requests_come_cost_no_move() -> None:
    assert priced((1.0, LEFT), (2.0, RIGHT), (3.0, LEFT), (20.0, LEFT))[1] == 0.0


def test_what_a_node_has_on_its_disk_already_costs_no_bytes_again() -> None:
    there, back = priced((1.0, LEFT), (10.0, RIGHT))[1], priced((1.0, LEFT), (10.0, RIGHT), (20.0, LEFT))[1]
    assert there < back < 2 * there


def test_a_run_without_a_plan_is_not_served_and_has_no_smaller_gap_than_another() -> None:
    plans, moves, _, gap = priced()
    assert plans == pytest.approx(known().oracle.unserved) and moves == 0.0
    assert gap > priced((1.0, LEFT))[3] > priced((1.0, LEFT), (TURN_S, RIGHT))[3] >= 0


def test_steps_of_a_schedule_follow_one_another_and_begin_before_they_are_due() -> None:
    scenario = TURNS.model_copy(
        update={"faults": (slow("right", 0, 15), slow("left", 15, 30), slow("right", 30, 60)), "duration_s": 45.0}
    )
    steps = foresee(oracle_of(scenario, 10)).schedule
    assert [step.at_s for step in steps] == [5.0, 15.0, 30.0]
    assert all(step.begin_s < step.at_s for step in steps)
    assert all(before.at_s <= after.begin_s for before, after in pairwise(steps))


def test_a_step_waits_for_nodes_that_are_not_back_yet() -> None:
    dead = Fault(kind="kill", at_s=10.0, lasts_s=TURN_S - 10.0, where=Where(nodes=(NodeId("right-0"),)))
    scenario = TURNS.model_copy(update={"faults": (dead, slow("right", 0, 20), slow("left", 20, 60))})
    steps = foresee(oracle_of(scenario, 10)).schedule
    assert any(step.begin_s > TURN_S for step in steps if Stage(node="right-0", first=0, last=3) in step.placement[0])
