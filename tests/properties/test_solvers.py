"""The solvers against each other and against every chain there is, on seeded random instances."""

from dataclasses import replace
from itertools import combinations, permutations
from math import inf
from typing import Any

import numpy as np
import pytest

from orchestrator.solvers import baselines, beam, fees
from orchestrator.solvers.bottleneck import in_order, most_even, replicated_rate
from orchestrator.solvers.chains import Cases, chains_of, completion
from orchestrator.solvers.column_generation import joint
from orchestrator.solvers.dominance import undominated
from orchestrator.solvers.dssr import fastest, refine
from orchestrator.solvers.lb0 import lb0, lb0_by_start
from orchestrator.solvers.milp import by_milp
from orchestrator.solvers.problem import Piece, Problem, Solution, holds, latency_ns, slowest_ns
from orchestrator.solvers.solve import solve
from orchestrator.solvers.subset_dp import balanced
from orchestrator.solvers.subset_dp import fastest as by_subsets
from orchestrator.solvers.ushape import u_shaped
from schemas.errors import ErrorCode, ResplitError

INSTANCES = 240


def parts(whole: int, always: int) -> list[Any]:
    """Of so many parts of the instances the first few, and with `make test-slow` the others."""
    return [*range(always), *(pytest.param(part, marks=pytest.mark.slow) for part in range(always, whole))]


SITES = (None, 1, 2, 3)


def instance(seed: int, nodes: int | None = None, blocks: int | None = None) -> Problem:
    """Small, often infeasible, links even or not, by site or by node, some blocks barred from some nodes."""
    rng = np.random.default_rng(seed)
    nodes, blocks = nodes or int(rng.integers(1, 6)), blocks or int(rng.integers(1, 8))
    sites = SITES[seed % len(SITES)]
    count = nodes if sites is None else sites
    hops = np.full((blocks, count, count), 7) if seed % 5 == 0 else rng.integers(0, 40, (blocks, count, count))
    return Problem(
        rng.integers(0, 20, (nodes, blocks)),
        rng.integers(0, 5, (nodes, blocks)),
        rng.integers(0, 14, nodes),
        hops,
        None if sites is None else rng.integers(0, sites, nodes),
        None,
        rng.random((nodes, blocks)) < 0.9,
    )


def wide(seed: int, nodes: int = 120, sites: int = 6, blocks: int = 24) -> Problem:
    """More nodes than any exact programme over subsets can take, with speeds, memory and distances that differ."""
    rng = np.random.default_rng(seed)
    speed = np.exp(rng.normal(0, 0.6, nodes))
    where = rng.random((sites, 2))
    distance = np.linalg.norm(where[:, None] - where[None], axis=2)
    return Problem(
        np.rint(1e6 / speed[:, None] * np.exp(rng.normal(0, 0.05, (nodes, blocks)))).astype(np.int64),
        np.full((nodes, blocks), 100),
        (rng.uniform(0.1, 0.4, nodes) * 100 * blocks).astype(np.int64),
        np.rint(2e5 + 1e7 * distance[None]).astype(np.int64),
        rng.integers(0, sites, nodes),
        np.zeros(blocks, np.int64),
    )


def check(problem: Problem, found: Solution, value: float) -> None:
    """The solution is what it says it is."""
    assert found.bound_ns <= found.value_ns
    assert (found.pieces is None) == (found.value_ns == inf)
    if found.pieces is not None:
        assert holds(problem, found.pieces)
        assert found.value_ns == value


def chains_with(problem: Problem, nodes: tuple[int, ...]) -> list[tuple[Piece, ...]]:
    """Every chain over these nodes in this order that holds."""
    found = []
    for cuts in combinations(range(1, problem.blocks), len(nodes) - 1):
        edges = (0, *cuts, problem.blocks)
        chain = tuple(Piece(node, edges[k], edges[k + 1] - 1) for k, node in enumerate(nodes))
        if holds(problem, chain):
            found.append(chain)
    return found


@pytest.mark.parametrize("part", parts(6, 2))
def test_dssr_the_subset_programme_and_the_milp_agree(part: int) -> None:
    feasible = 0
    for seed in range(part, INSTANCES, 6):
        problem = instance(seed)
        found, program = fastest(problem), by_milp(problem)
        pieces = by_subsets(problem)
        expected = inf if pieces is None else latency_ns(problem, pieces)
        assert (found.value_ns, program.value_ns) == (expected, expected), seed
        assert found.proven, seed
        assert program.proven, seed
        assert found.infeasible == (pieces is None), seed
        check(problem, found, expected)
        check(problem, program, expected)
        feasible += pieces is not None
    assert feasible >= 20


@pytest.mark.parametrize("part", range(3))
def test_a_number_of_stages_that_is_asked_for_is_met_as_the_subset_programme_meets_it(part: int) -> None:
    for seed in range(part, 90, 3):
        problem = instance(seed)
        for stages in range(1, 6):
            expected, found = balanced(problem, stages), most_even(problem, stages)
            assert found.infeasible == (expected is None), (seed, stages)
            assert found.proven, (seed, stages)
            if expected is not None:
                assert found.pieces is not None
                assert len(found.pieces) == stages
                check(problem, found, slowest_ns(problem, found.pieces))
                assert found.value_ns == slowest_ns(problem, expected), (seed, stages)
                assert latency_ns(problem, found.pieces) == latency_ns(problem, expected), (seed, stages)


@pytest.mark.parametrize("part", parts(4, 1))
def test_a_number_of_stages_can_be_asked_of_the_least_latency_too(part: int) -> None:
    for seed in range(part, 80, 4):
        problem = instance(seed, nodes=5, blocks=5)
        for stages in (1, 2, 3):
            every = [c for order in permutations(range(5), stages) for c in chains_with(problem, order)]
            best = min((latency_ns(problem, chain) for chain in every), default=inf)
            found = solve(problem, "latency", stages)
            assert (found.value_ns, found.proven, found.infeasible) == (best, True, best == inf), (seed, stages)
            check(problem, found, best)
            even = min((slowest_ns(problem, chain) for chain in every), default=inf)
            assert solve(problem, "throughput", stages).value_ns == even, (seed, stages)


def test_throughput_without_a_number_of_stages_is_the_best_of_all_numbers() -> None:
    for seed in range(60):
        problem = instance(seed)
        best = min(most_even(problem, k).value_ns for k in range(1, problem.nodes + 1))
        assert solve(problem, "throughput").value_ns == best, seed


def test_no_u_is_faster_than_the_u_shaped_answer() -> None:
    for seed in range(120):
        problem = instance(seed, nodes=1 + seed % 4)
        heads = [0] if problem.nodes < 3 else [0, 2]
        best = inf
        for head in heads:
            others = [node for node in range(problem.nodes) if node != head]
            orders = [(head,), *((head, *o, head) for k in range(1, 4) for o in permutations(others, k))]
            every = [chain for order in orders for chain in chains_with(problem, order)]
            best = min([best, *(latency_ns(problem, chain) for chain in every)])
        found = u_shaped(problem, heads)
        assert (found.value_ns, found.proven, found.infeasible) == (best, True, best == inf), seed
        check(problem, found, best)


def test_no_heuristic_is_below_the_bounds_and_no_bound_above_the_optimum() -> None:
    for seed in range(120):
        problem = instance(seed)
        best = fastest(problem)
        assert lb0(problem) <= best.bound_ns
        heuristics = (baselines.even, baselines.greedy, baselines.round_robin, baselines.edgeshard)
        for found in (*(h(problem) for h in heuristics), baselines.random(problem, seed)):
            check(problem, found, inf if found.pieces is None else latency_ns(problem, found.pieces))
            assert found.bound_ns <= best.value_ns <= found.value_ns, (seed, found.method)


def anywhere(problem: Problem) -> Cases:
    """Chains whose way home costs nothing, as one case."""
    nothing = np.zeros((1, problem.nodes))
    return Cases(np.zeros(1, np.int64), nothing, nothing, {problem.blocks: nothing})


def test_bounds_only_rise_from_lb0_over_memory_and_fees_to_the_passes() -> None:
    for seed in range(8):
        problem = wide(seed)
        homeless = Problem(
            problem.time_ns,
            problem.need_bytes,
            problem.free_bytes,
            np.concatenate([problem.hop_ns, np.zeros_like(problem.hop_ns)]),
            problem.site,
            np.where(np.arange(problem.blocks) == problem.blocks - 1, 1, problem.kind_of),
        )
        chains, cases = chains_of(homeless), anywhere(homeless)
        table = completion(chains, cases)
        value, case, pieces = beam.search(chains, cases, table)
        assert case == 0
        assert holds(homeless, pieces)
        assert latency_ns(homeless, pieces) == value
        tight = fees.climb(chains, cases, None, value, 10**9)
        rising = [lb0(homeless), table.bounds(cases)[0], tight.bounds[0]]
        for labels_max in (1, 10**5, 10**6, 10**9):
            found = refine(tight.chains, tight.cases, tight.table, tight.bounds, tight.value, labels_max)
            rising.append(float(found.bounds[0]))
            assert found.value <= tight.value <= value
        assert rising == sorted(rising)
        assert rising[-1] == found.value, "with enough states the bound meets the value"


def test_an_answer_that_runs_out_of_states_says_so_and_holds_all_the_same() -> None:
    problem = wide(3)
    best, hasty = fastest(problem), fastest(problem, labels_max=1)
    assert best.proven
    assert hasty.pieces is not None
    assert holds(problem, hasty.pieces)
    assert hasty.bound_ns <= best.value_ns <= hasty.value_ns
    assert hasty.proven == (hasty.gap == 0)


def test_by_sites_or_node_by_node_the_problem_is_the_same() -> None:
    for seed in range(40):
        problem = instance(4 * seed + 2)
        dense = Problem(
            problem.time_ns, problem.need_bytes, problem.free_bytes, problem.dense_hops(), allowed=problem.may_run
        )
        assert fastest(problem).value_ns == fastest(dense).value_ns
        assert lb0(dense) <= lb0(problem), "node by node, a chain may end on its first node and be at home"
        assert lb0_by_start(dense).shape == (problem.nodes,)


def test_dominated_nodes_are_not_missed() -> None:
    for seed in range(80):
        problem = instance(seed, nodes=6)
        keep = undominated(problem, min(problem.nodes, problem.blocks))
        assert fastest(problem.restricted(keep)).value_ns == fastest(problem).value_ns
    alike = Problem(
        np.full((50, 4), 3), np.ones((50, 4), int), np.full(50, 2), np.ones((4, 1, 1), int), np.zeros(50, int)
    )
    assert undominated(alike, 4).tolist() == [0, 1, 2, 3]


def test_an_order_that_is_given_is_split_as_evenly_as_it_can_be() -> None:
    for seed in range(80):
        problem = instance(seed, nodes=3)
        orders = [order for k in range(1, 4) for order in combinations(range(3), k)]
        every = [chain for order in orders for chain in chains_with(problem, order)]
        found = in_order(problem, range(3))
        best = min((slowest_ns(problem, chain) for chain in every), default=inf)
        check(problem, found, best)
        assert found.value_ns == best


def test_replicas_add_their_rates_and_a_lone_stage_limits_all() -> None:
    problem = Problem(np.full((4, 4), 10**6), np.ones((4, 4), int), np.full(4, 4), np.zeros((4, 4, 4), int))
    alone = [Piece(0, 0, 1), Piece(1, 2, 3)]
    assert replicated_rate(problem, alone) == pytest.approx(500)
    assert replicated_rate(problem, [*alone, Piece(2, 0, 1)]) == pytest.approx(500)
    assert replicated_rate(problem, [*alone, Piece(2, 0, 1), Piece(3, 2, 3)]) == pytest.approx(1000)
    assert replicated_rate(problem, [*alone, Piece(2, 0, 3)]) == pytest.approx(750)
    assert replicated_rate(problem, [Piece(0, 0, 1)]) == 0


@pytest.mark.parametrize("part", parts(3, 1))
def test_models_that_share_nodes_share_their_memory(part: int) -> None:
    for seed in range(part, 6, 3):
        one = wide(seed, nodes=12, sites=3, blocks=8)
        models = [
            Problem(one.time_ns, one.need_bytes * k, one.free_bytes * 3, one.hop_ns, one.site, one.boundary)
            for k in (1, 2, 1)
        ]
        weights = (1.0, 3.0, 2.0)
        found = joint(models, weights)
        assert found.pieces is not None
        used = np.zeros(12)
        for model, pieces in zip(models, found.pieces, strict=True):
            assert holds(model, pieces)
            for p in pieces:
                used[p.node] += model.need_bytes[p.node, p.first : p.last + 1].sum()
        assert (used <= models[0].free_bytes).all()
        value = sum(w * latency_ns(m, p) for w, m, p in zip(weights, models, found.pieces, strict=True))
        assert found.value_ns == pytest.approx(value)
        alone = sum(w * fastest(m).value_ns for w, m in zip(weights, models, strict=True))
        assert alone * (1 - 1e-9) <= found.bound_ns <= found.value_ns
        assert found.gap <= 0.25


def test_models_that_can_never_fit_are_infeasible() -> None:
    one = wide(0, nodes=4, sites=2, blocks=8)
    assert joint([one, one], (1.0, 1.0)).bound_ns == inf


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("time_ns", np.full((2, 3), -1)),
        ("time_ns", np.full((2, 3), np.nan)),
        ("need_bytes", np.ones((3, 2), int)),
        ("free_bytes", np.array([1, -1])),
        ("hop_ns", np.zeros((3, 1, 1), int)),
        ("site", np.array([0, 2])),
        ("boundary", np.array([0, 0, 3])),
        ("allowed", np.ones((2, 2), bool)),
    ],
)
def test_a_problem_that_contradicts_itself_is_refused_by_field(field: str, value: Any) -> None:
    good = Problem(np.ones((2, 3), int), np.ones((2, 3), int), np.ones(2, int), np.zeros((3, 2, 2), int))
    with pytest.raises(ResplitError) as caught:
        replace(good, **{field: value})
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, field)


@pytest.mark.parametrize("part", parts(6, 2))
def test_where_a_chain_is_known_the_answer_is_as_good_and_of_equals_that_chain(part: int) -> None:
    asked = 0
    for seed in range(part, INSTANCES, 6):
        problem = instance(seed)
        best = solve(problem)
        chains = [
            chain
            for count in range(1, min(problem.nodes, problem.blocks) + 1)
            for nodes in permutations(range(problem.nodes), count)
            for chain in chains_with(problem, nodes)
        ]
        for chain in chains[:: max(1, len(chains) // 3)]:
            found = solve(problem, known=chain)
            check(problem, found, best.value_ns)
            assert found.proven
            if latency_ns(problem, chain) == best.value_ns:
                assert found.pieces == chain
            asked += 1
    assert asked > INSTANCES / 6


def test_what_is_no_chain_of_the_problem_is_not_begun_with() -> None:
    for seed in range(0, INSTANCES, 4):
        problem = instance(seed, nodes=3)
        for wrong in ((), (Piece(0, 0, 0), Piece(1, 0, problem.blocks - 1)), (Piece(2, 0, problem.blocks),)):
            assert solve(problem, known=wrong) == solve(problem)


@pytest.mark.parametrize("part", parts(3, 1))
def test_a_cut_off_leaves_out_exactly_the_u_that_is_no_better(part: int) -> None:
    found = 0
    for seed in range(part, INSTANCES, 3):
        problem = instance(seed)
        heads = list(range(problem.nodes))
        best = u_shaped(problem, heads)
        if best.pieces is None:
            continue
        found += 1
        assert u_shaped(problem, heads, cutoff_ns=best.value_ns + 1).value_ns == best.value_ns
        none = u_shaped(problem, heads, cutoff_ns=best.value_ns)
        assert none.pieces is None
        assert none.bound_ns == best.value_ns
    assert found > INSTANCES / 12
