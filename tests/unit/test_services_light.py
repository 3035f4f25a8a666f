"""Light services follow the load: no more of them than pays, no fewer than deadlines ask for, and a debt for what was
late."""

from dataclasses import replace
from itertools import product
from math import isclose

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.services.core import Placed
from orchestrator.services.lateness import outlooks, queues
from orchestrator.services.light import Steered, Steering, steer
from orchestrator.services.problem import SOURCE, Host, ServiceKind, Setting, Stream, TaskKind, Ways
from orchestrator.services.routing import Speeds, routed
from profiler.effective_capacity import GammaService, Steady
from schemas.base import NodeId

SLOT_MS = 1.0
N0, N1, N2 = NODES = tuple(NodeId(f"n{number}") for number in range(3))
SERVICES = {
    "cut": ServiceKind("cut", False, {"memory": 1.0}, 1.0, 0.5, 4.0, keep_cost=1.0, deploy_cost=4.0),
    "think": ServiceKind("think", True, {"memory": 2.0}, 4.0, 0.5, 16.0),
    "say": ServiceKind("say", False, {"memory": 1.0}, 1.0, 0.5, 4.0, keep_cost=1.0, deploy_cost=4.0),
}
SPEEDS = Speeds(SLOT_MS, {"cut": GammaService(1.0, 4.0), "think": Steady(16.0), "say": GammaService(1.0, 4.0)})
ASK = TaskKind("ask", {"cut": (SOURCE,), "think": ("cut",), "say": ("think",)}, input=1.0, deadline_ms=4.0)
CORE: Placed = {(N0, "think"): 2}
STEERING = Steering({"ask": 0.1}, tried=2000)


def setting(*per_slot: float, memory: float = 8.0, delay_ms: float = 2.0) -> Setting:
    """Three nodes, at which so many requests a slot come in; the core service is on the first."""
    hosts = {node: Host(node, node, {"memory": memory}) for node in NODES}
    pairs = {(a, b): 1.0 for a in NODES for b in NODES}
    ways = Ways(pairs, dict.fromkeys(pairs, delay_ms))
    streams = tuple(Stream("ask", node, much) for node, much in zip(NODES, per_slot, strict=False) if much)
    return Setting(SERVICES, {"ask": ASK}, hosts, ways, streams)


def steered(found: Setting, before: Placed | None = None, debt: float = 0.0, **changes: float) -> Steered:
    steering = replace(STEERING, **changes)  # type: ignore[arg-type]
    return steer(found, SPEEDS, steering, {"ask": debt}, CORE, before or {})


def lights(found: Steered) -> dict[tuple[NodeId, str], int]:
    return {place: count for place, count in found.placed.items() if place[1] != "think"}


def test_of_nothing_all_that_requests_need_is_made_and_then_they_are_in_time() -> None:
    found = steered(setting(1.0), cost_weight=0.01)
    assert {name for _, name in lights(found)} == {"cut", "say"}
    assert max(found.late.values()) < 0.05
    route = found.routes[Stream("ask", N0, 1.0)]
    assert route == {"cut": N0, "think": N0, "say": N0}, "no way is the shortest"


def test_where_little_is_late_what_costs_more_than_it_saves_goes_and_a_debt_brings_it_back() -> None:
    many: Placed = {(N0, "cut"): 3, (N0, "say"): 3}
    load = setting(1.0)
    calm = steered(load, many, cost_weight=1.0)
    assert sum(lights(calm).values()) < 6
    indebted = steered(load, lights(calm), debt=1000.0)
    assert sum(lights(indebted).values()) > sum(lights(calm).values())
    assert max(indebted.late.values()) < max(calm.late.values())


def test_more_load_takes_more_instances_and_none_beyond_what_a_node_has() -> None:
    counts = [sum(lights(steered(setting(load), debt=10.0)).values()) for load in (1.0, 3.0)]
    assert counts == sorted(set(counts))
    tight = steered(setting(6.0, memory=5.0), debt=100.0)
    for node in NODES:
        used = sum(SERVICES[name].needs["memory"] * count for (at, name), count in tight.placed.items() if at == node)
        assert used <= 5.0
    assert {node for node, _ in lights(tight)} > {N0}, "the others help where the first is full"


def test_requests_that_nothing_can_serve_are_all_late_and_the_rest_is_served() -> None:
    found = steered(setting(1.0), debt=10.0)
    cut_off = replace(setting(1.0, 1.0), ways=Ways({}, {}))
    lost = steered(cut_off, debt=10.0)
    assert max(found.late.values()) < 0.1
    assert lost.late[Stream("ask", N0, 1.0)] < 0.1
    assert lost.late[Stream("ask", N1, 1.0)] == 1.0


@given(
    st.dictionaries(st.sampled_from([(node, name) for node in NODES for name in ("cut", "say")]), st.integers(1, 2)),
    st.floats(0.0, 100.0),
    st.floats(0.01, 2.0),
)
def test_it_is_never_worse_than_leaving_all_as_it_is(before: Placed, debt: float, load: float) -> None:
    whole = setting(load, load)
    stays = steered(whole, before, debt, tried=0)
    found = steered(whole, before, debt)
    assert found.score <= stays.score
    assert found == steered(whole, before, debt), "and the same for the same"
    assert steered(whole, before, debt, tried=5).tried <= 5


@pytest.mark.parametrize(("load", "debt"), [(0.5, 0.0), (0.5, 20.0), (1.5, 20.0), (1.5, 200.0)])
def test_beside_every_placement_of_a_small_setting_it_is_hardly_worse_than_the_best(load: float, debt: float) -> None:
    whole = setting(load)
    places = [(node, name) for node in (N0, N1) for name in ("cut", "say")]
    best = min(
        steered(
            whole, {place: count for place, count in zip(places, counts, strict=True) if count}, debt, tried=0
        ).score
        + 4.0 * sum(counts) / STEERING.frame_slots
        for counts in product(range(4), repeat=len(places))
    )
    assert steered(whole, {}, debt).score <= 1.1 * best


def run_through(load: float, placed: Placed, slots: int, seed: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """What each request takes whose services are all on the first node: queues in order of arrival, run exactly."""
    rng = np.random.default_rng(seed)
    coming = np.sort(rng.random(rng.poisson(load * slots)) * slots)
    at = coming
    edges = np.arange(2 * slots + 1)
    for name in ASK.order:
        count = placed[N0, name]
        does = np.full(2 * slots, 16.0 * count) if name == "think" else rng.gamma(1.0 * count, 4.0, 2 * slots)
        done = np.concatenate([[0.0], np.cumsum(does)])  # what could have been done by the end of each slot
        before = SERVICES[name].work * np.arange(len(at))
        ends = before + SERVICES[name].work + np.maximum.accumulate(np.interp(at, edges, done) - before)
        at = np.interp(ends, done, edges)
    return at - coming


@pytest.mark.parametrize(("load", "each"), [(1.0, 1), (2.0, 1), (3.0, 1), (6.0, 2)])
def test_what_is_late_of_queues_that_are_run_is_predicted_within_a_factor_of_two(load: float, each: int) -> None:
    placed: Placed = {**CORE, (N0, "cut"): each, (N0, "say"): each}
    took = run_through(load, placed, 60_000, seed=1)
    [stream] = setting(load).streams
    compared = 0
    for deadline_ms in (2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 15.0, 20.0):
        found = replace(setting(load), tasks={"ask": replace(ASK, deadline_ms=deadline_ms)})
        plan = routed(found, placed, SPEEDS)
        seen = float((took > deadline_ms).mean())
        if 0.003 < seen < 0.5:
            compared += 1
            row = (stream, plan.routes[stream], queues(found, plan, SPEEDS, ASK.order))
            assert 0.5 < outlooks(found, [row])[0].late / seen < 2.0, (deadline_ms, seen)
    assert compared >= 3


def test_a_request_that_is_old_when_it_comes_in_has_less_time_left() -> None:
    placed: Placed = {**CORE, (N0, "cut"): 1, (N0, "say"): 1}

    def share(*ages_ms: float) -> float:
        stream = Stream("ask", N0, 2.0, ages_ms)
        found = replace(setting(2.0), streams=(stream,))
        plan = routed(found, placed, SPEEDS)
        [one] = outlooks(found, [(stream, plan.routes[stream], queues(found, plan, SPEEDS, ASK.order))])
        return one.late

    assert share(0.0) < share(1.0) < share(2.0) < share(4.0) == 1.0
    assert isclose(share(0.0, 1.0, 4.0), (share(0.0) + share(1.0) + share(4.0)) / 3.0)
