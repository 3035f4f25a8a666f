"""PURE: what the solvers are compared with: even, greedy, random, round-robin and EdgeShard's programme (A2, D).

None proves anything; each answer carries LB0. None looks for another way where its rule fails: it then has no plan.
"""

from collections.abc import Iterable
from itertools import pairwise
from math import inf

import numpy as np

from orchestrator.solvers.chains import chains_of
from orchestrator.solvers.lb0 import lb0
from orchestrator.solvers.problem import Integers, Piece, Problem, Solution, holds, latency_ns


def even(problem: Problem) -> Solution:
    """As few stages of as equal a number of blocks as fit, on the fastest nodes, the fastest first."""
    order = _fastest_first(problem)
    for stages in range(1, min(problem.nodes, problem.blocks) + 1):
        edges = np.linspace(0, problem.blocks, stages + 1).round().astype(int).tolist()
        pieces = tuple(Piece(node, edges[k], edges[k + 1] - 1) for k, node in enumerate(order[:stages].tolist()))
        if holds(problem, pieces):
            return _answer(problem, pieces, "even")
    return _answer(problem, None, "even")


def greedy(problem: Problem) -> Solution:
    """The fastest node takes all blocks that fit, then the next fastest."""
    return _answer(problem, _filled(problem, _fastest_first(problem).tolist()), "greedy")


def random(problem: Problem, seed: int) -> Solution:
    """Nodes in random order, each taking a random part of what fits."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(problem.nodes).tolist()
    return _answer(problem, _filled(problem, order, rng), "random")


def round_robin(problem: Problem) -> Solution:
    """Nodes as they stand, each taking all blocks that fit."""
    return _answer(problem, _filled(problem, range(problem.nodes)), "round-robin")


def edgeshard(problem: Problem) -> Solution:
    """EdgeShard's dynamic programme: block by block over the last node, with what memory is left, and which nodes were
    used, known along the winning predecessor alone. Not exact; ties go to the node that stands first. The way home is
    added where the last block ends."""
    return _answer(problem, edgeshard_pieces(problem), "edgeshard")


def edgeshard_pieces(problem: Problem) -> tuple[Piece, ...] | None:
    """The chain of `edgeshard`, for who needs no bound."""
    nodes, blocks = problem.nodes, problem.blocks
    site = problem.site_of
    may = problem.may_run & (problem.need_bytes <= problem.free_bytes[:, None])
    cost = np.where(may[:, 0], problem.time_ns[:, 0].astype(float), inf)
    left = np.tile(problem.free_bytes, (nodes, 1))
    left[np.arange(nodes), np.arange(nodes)] -= problem.need_bytes[:, 0]
    used = np.eye(nodes, dtype=bool)
    node_of = np.arange(nodes)[:, None]
    for block in range(1, blocks):
        hop = problem.hop_ns[problem.kind_of[block - 1]]
        total = cost[:, None] + hop[site[:, None], site[None, :]]
        total[used] = inf
        total[np.arange(nodes), np.arange(nodes)] = cost
        total[left < problem.need_bytes[:, block]] = inf
        before = total.argmin(axis=0)
        cost = total[before, np.arange(nodes)] + np.where(may[:, block], problem.time_ns[:, block], inf)
        left, used = left[before], used[before]
        left[np.arange(nodes), np.arange(nodes)] -= problem.need_bytes[:, block]
        used[np.arange(nodes), np.arange(nodes)] = True
        node_of = np.concatenate([node_of[before], np.arange(nodes)[:, None]], axis=1)
    start = node_of[:, 0]
    home = np.where(start == np.arange(nodes), 0, problem.home_ns[site, site[start]])
    last = int((cost + home).argmin())
    if cost[last] == inf:
        return None
    path = node_of[last].tolist()
    cuts = [0, *(b for b in range(1, blocks) if path[b] != path[b - 1]), blocks]
    return tuple(Piece(path[a], a, b - 1) for a, b in pairwise(cuts))


def _filled(problem: Problem, order: Iterable[int], rng: np.random.Generator | None = None) -> tuple[Piece, ...] | None:
    chains = chains_of(problem)
    column = {int(node): c for c, node in enumerate(chains.node)}
    pieces, at = [], 0
    for node in order:
        end = int(chains.high[at, column[node]])
        if rng is not None and end > at + 1:
            end = int(rng.integers(at + 1, end + 1))
        if end > at:
            pieces.append(Piece(node, at, end - 1))
            at = end
        if at == problem.blocks:
            return tuple(pieces)
    return None


def _fastest_first(problem: Problem) -> Integers:
    return np.argsort(problem.time_ns.sum(axis=1), kind="stable")


def _answer(problem: Problem, pieces: tuple[Piece, ...] | None, method: str) -> Solution:
    bound = lb0(problem)
    if pieces is None:
        return Solution(None, inf, bound, method)
    return Solution(pieces, float(latency_ns(problem, pieces)), bound, method)
