"""PURE: the chain as a mixed-integer program for HiGHS, to check the other solvers with (mathematics.md A2).

y[b, n] is 1 if block b runs on n; x[b, n, n'] carries one unit from block b on n to block b + 1 on n', the last block's
to the first block's node, which prices the way home. A node is entered from another one at most once.
"""

from itertools import pairwise
from math import inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array, vstack

from orchestrator.solvers.problem import Floats, Integers, Piece, Problem, Solution, latency_ns

_OPTIMAL, _OUT_OF_TIME, _INFEASIBLE = 0, 1, 2


def by_milp(problem: Problem, time_limit_s: float = 60.0) -> Solution:
    """The chain of least latency as HiGHS finds it; the bound is HiGHS's own where the time runs out."""
    nodes, blocks = problem.nodes, problem.blocks
    y = np.arange(blocks * nodes).reshape(blocks, nodes)
    x = y.size + np.arange(blocks * nodes * nodes).reshape(blocks, nodes, nodes)
    # In milliseconds: HiGHS works with absolute tolerances around 1e-6.
    cost = np.concatenate([problem.time_ns.T.ravel(), problem.dense_hops().ravel()]) * 1e-6
    every = y.size + x.size
    rows, low, high = [], [], []

    def add(columns: Integers, weights: Floats, least: float, most: float) -> None:
        at = np.zeros(columns.size, int)
        rows.append(coo_array((weights.ravel(), (at, columns.ravel())), shape=(1, every)))
        low.append(least)
        high.append(most)

    for b in range(blocks):
        add(y[b], np.ones(nodes), 1, 1)
        for n in range(nodes):
            add(np.append(x[b, n], y[b, n]), np.append(np.ones(nodes), -1.0), 0, 0)
            add(np.append(x[b, :, n], y[(b + 1) % blocks, n]), np.append(np.ones(nodes), -1.0), 0, 0)
    for n in range(nodes):
        add(y[:, n], problem.need_bytes[n] / max(1, problem.free_bytes[n]), 0, 1 if problem.free_bytes[n] else 0)
        others = [m for m in range(nodes) if m != n]
        arriving = np.append(x[: blocks - 1, others, n].ravel(), y[0, n])
        add(arriving, np.ones(arriving.size), 0, 1)
    upper = np.ones(every)
    upper[: y.size] = problem.may_run.T.ravel()
    kind = np.zeros(every)
    kind[: y.size] = 1
    found = milp(
        cost,
        integrality=kind,
        bounds=Bounds(0, upper),
        constraints=LinearConstraint(vstack(rows).tocsr(), low, high),
        options={"time_limit": time_limit_s, "mip_rel_gap": 0},
    )
    if found.status == _INFEASIBLE:
        return Solution(None, inf, inf, "milp")
    bound = max(0.0, float(found.mip_dual_bound)) * 1e6 if found.mip_dual_bound is not None else 0.0
    if found.x is None:
        return Solution(None, inf, bound, "milp")
    pieces = _pieces(found.x[: y.size].reshape(blocks, nodes).argmax(axis=1).tolist())
    value = float(latency_ns(problem, pieces))
    return Solution(pieces, value, value if found.status == _OPTIMAL else min(bound, value), "milp")


def _pieces(node_of: list[int]) -> tuple[Piece, ...]:
    cuts = [0, *(b for b in range(1, len(node_of)) if node_of[b] != node_of[b - 1]), len(node_of)]
    return tuple(Piece(node_of[a], a, b - 1) for a, b in pairwise(cuts))
