"""Where an ingress sends a request: by what it measured on a route lately, else by what the nodes say of themselves."""

import itertools

import pytest

from agent.pace import CALLS_MIN
from agent.run import RouteRun
from agent.runs import LATELY_S, Runs
from agent.speeds import Speed, Speeds
from schemas.base import NodeId
from schemas.capacity import BlockTime, Capacity
from schemas.deployment import Settings, Stage
from schemas.heartbeat import Hosting
from tests.nodes import plan_of
from tests.trigger_world import World

A, B, C = (NodeId(f"n{i}") for i in range(3))
SETTINGS = Settings(context_tokens=64, max_sequences=4, chunk_tokens=8)
PLAN = plan_of(1, [Stage(node=A, first=0, last=1), Stage(node=B, first=2, last=3)], SETTINGS, 4)


def says(node: NodeId, ms: float, contention: float | None = None, blocks: int = 4) -> Capacity:
    """A heartbeat of a node whose blocks take `ms` for a step and a tenth of it for a token."""
    times = tuple(
        BlockTime(model=PLAN.model, block=b, decode_ms=ms, prefill_ms_per_token=ms / 10) for b in range(blocks)
    )
    heartbeat = World(3, 0, noise=0.0).heartbeat(node)
    return heartbeat.model_copy(update={"block_times": times, "contention": contention})


def telling(capacity: Capacity) -> Hosting:
    """What it tells an ingress of all that it runs."""
    return Hosting(block_times=capacity.block_times, contention=capacity.contention)


def heard(*capacities: Capacity) -> Speeds:
    speeds = Speeds()
    for capacity in capacities:
        speeds.heard(NodeId(capacity.node), telling(capacity))
    return speeds


def told(speed: Speed | None) -> tuple[float, float, float]:
    assert speed is not None
    return speed.step_s, speed.token_s, speed.busiest_token_s


def run_over(*nodes: NodeId) -> RouteRun:
    stages = tuple(Stage(node=node, first=2 * i, last=2 * i + 1) for i, node in enumerate(nodes))
    route = PLAN.routes[0].model_copy(update={"stages": stages, "source": nodes[0]})
    return RouteRun(PLAN, route, A, itertools.count(1), lambda *_: None)


def measured(run: RouteRun, step_s: float, now: float) -> RouteRun:
    for _ in range(CALLS_MIN):
        run.driver.pace.chunk.add(8, step_s, now)
        run.driver.pace.step.add(1, step_s, now)
    return run


def test_a_route_is_as_fast_as_its_nodes_say_together() -> None:
    route, speeds = PLAN.routes[0], heard(says(A, 1.0), says(B, 3.0))
    assert told(speeds.of(PLAN.model, route)) == pytest.approx((0.008, 0.0008, 0.0006))
    speeds.heard(B, telling(says(B, 6.0)))
    assert told(speeds.of(PLAN.model, route)) == pytest.approx((0.014, 0.0014, 0.0012))


def test_a_node_at_rest_is_as_much_slower_than_when_it_loaded_as_others_make_it() -> None:
    found = heard(says(A, 1.0, contention=5.0), says(B, 3.0)).of(PLAN.model, PLAN.routes[0])
    assert found is not None
    assert found.step_s == pytest.approx(0.016)


def test_of_a_route_of_which_a_node_or_a_block_is_unknown_nothing_is_said() -> None:
    assert heard(says(A, 1.0)).of(PLAN.model, PLAN.routes[0]) is None
    assert heard(says(A, 1.0), says(B, 1.0, blocks=3)).of(PLAN.model, PLAN.routes[0]) is None


def test_what_was_measured_lately_counts_whatever_is_said() -> None:
    run, other = measured(run_over(A, B), 0.1, 10.0), measured(run_over(A, C), 0.2, 10.0)
    runs = Runs(heard(says(A, 1.0), says(B, 9.0), says(C, 1.0)))
    assert runs.pace(run, [run, other], 10.0 + LATELY_S / 2) is run.driver.pace


def test_a_route_that_was_not_used_lately_is_held_against_the_one_that_was() -> None:
    other = measured(run_over(A, C), 0.1, 100.0)
    for run in (run_over(A, B), measured(run_over(A, B), 0.3, 80.0)):
        pace = Runs(heard(says(A, 1.0), says(B, 9.0), says(C, 1.0))).pace(run, [run, other], 100.0)
        assert pace is not None
        # Two blocks of 9 ms in place of two of 1 ms, and 8 tokens that take a tenth of that.
        assert pace.step_s(1) == pytest.approx(0.116)
        assert pace.chunk_s(8) == pytest.approx(0.1 + 8 * 0.0016)


def test_where_nodes_do_not_say_a_route_is_thought_as_fast_so_that_it_is_tried() -> None:
    run, other = run_over(A, B), measured(run_over(A, C), 0.1, 100.0)
    assert Runs(Speeds()).pace(run, [run, other], 100.0) is other.driver.pace
    assert Runs(Speeds()).pace(run, [run], 100.0) is None
