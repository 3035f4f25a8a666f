"""The subset dynamic programme against every chain there is."""

from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.solvers.problem import Piece, Problem
from orchestrator.solvers.subset_dp import NODES_MAX, balanced, fastest


@st.composite
def problems(draw: st.DrawFn, even_links: bool | None = None) -> Problem:
    nodes, blocks = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    even = draw(st.booleans()) if even_links is None else even_links
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    hops = np.full((blocks, nodes, nodes), 7) if even else rng.integers(0, 40, (blocks, nodes, nodes))
    hops[:, np.arange(nodes), np.arange(nodes)] = 0
    return Problem(
        rng.integers(0, 20, (nodes, blocks)),
        rng.integers(0, 5, (nodes, blocks)),
        rng.integers(0, 14, nodes),
        hops,
    )


def chains(problem: Problem, stages: int) -> list[tuple[Piece, ...]]:
    found = []
    for order in permutations(range(problem.nodes), stages):
        for cuts in combinations(range(1, problem.blocks), stages - 1):
            edges = (0, *cuts, problem.blocks)
            chain = tuple(Piece(n, edges[i], edges[i + 1] - 1) for i, n in enumerate(order))
            if all(problem.need_bytes[p.node, p.first : p.last + 1].sum() <= problem.free_bytes[p.node] for p in chain):
                found.append(chain)
    return found


def total(problem: Problem, chain: tuple[Piece, ...]) -> int:
    compute = sum(int(problem.time_ns[p.node, p.first : p.last + 1].sum()) for p in chain)
    hops = [int(problem.hop_ns[a.last, a.node, b.node]) for a, b in pairwise(chain)]
    return compute + sum(hops) + int(problem.hop_ns[-1, chain[-1].node, chain[0].node])


def slowest(problem: Problem, chain: tuple[Piece, ...]) -> int:
    return max(int(problem.time_ns[p.node, p.first : p.last + 1].sum()) for p in chain)


@settings(max_examples=150, deadline=None)
@given(problems())
def test_no_chain_is_faster_than_the_fastest(problem: Problem) -> None:
    every = [c for k in range(1, min(problem.nodes, problem.blocks) + 1) for c in chains(problem, k)]
    answer = fastest(problem)
    if answer is None:
        assert not every
    else:
        assert answer in every
        assert total(problem, answer) == min(total(problem, c) for c in every)


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(1, 4))
def test_no_chain_of_k_stages_has_a_faster_slowest_stage(problem: Problem, stages: int) -> None:
    every = chains(problem, stages) if stages <= min(problem.nodes, problem.blocks) else []
    answer = balanced(problem, stages)
    if answer is None:
        assert not every
    else:
        assert answer in every
        best = min((slowest(problem, c), total(problem, c)) for c in every)
        assert (slowest(problem, answer), total(problem, answer)) == best


def equal(nodes: int, blocks: int, free: int) -> Problem:
    hops = np.full((blocks, nodes, nodes), 3)
    hops[:, np.arange(nodes), np.arange(nodes)] = 0
    return Problem(np.full((nodes, blocks), 10), np.full((nodes, blocks), 1), np.full(nodes, free), hops)


def test_of_equal_nodes_the_first_ones_serve_in_order() -> None:
    assert fastest(equal(4, 6, 6)) == (Piece(0, 0, 5),)
    assert balanced(equal(4, 6, 6), 3) == (Piece(0, 0, 1), Piece(1, 2, 3), Piece(2, 4, 5))
    found = fastest(equal(4, 6, 2))
    assert found is not None
    assert [piece.node for piece in found] == [0, 1, 2]


def test_a_large_problem_is_solved_in_a_second_or_two() -> None:
    rng = np.random.default_rng(5)
    nodes, blocks = NODES_MAX - 2, 34
    hops = rng.integers(0, 3_000, (blocks, nodes, nodes))
    hops[:, np.arange(nodes), np.arange(nodes)] = 0
    problem = Problem(
        rng.integers(1_000, 9_000, (nodes, blocks)), np.full((nodes, blocks), 10), rng.integers(60, 100, nodes), hops
    )
    found = fastest(problem)
    assert found is not None
    assert len(found) >= 4


@pytest.mark.parametrize("stages", [2, 7])
def test_memory_that_nobody_has_is_no_plan(stages: int) -> None:
    assert fastest(equal(3, 6, 1)) is None
    assert balanced(equal(3, 6, 1), stages) is None
