"""PURE: throughput: the slowest stage instead of the sum (mathematics.md A2, bottleneck variants).

Throughput is at most one step per time of the busiest node. Whether any chain has no stage slower than a limit is a
question about reach alone, answered by the same relaxation as latency: nodes may return unless they are critical.
The least limit is found by bisection; among the chains within it, the one of least latency is the answer.
"""

from collections.abc import Sequence
from enum import Enum
from itertools import count
from math import inf

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_flow

from orchestrator.solvers.chains import chains_of
from orchestrator.solvers.dssr import LABELS_MAX, fastest
from orchestrator.solvers.problem import Integers, Mask, Piece, Problem, Solution, slowest_ns

_CELLS_MAX = 4_000_000
"""Figures that one pass over one question may look at before it is given up: some tens of milliseconds."""
_FLOW_UNIT = 1e-3
"""Steps per second that one unit of integer flow stands for."""


class _Verdict(Enum):
    NONE = "no chain"
    UNKNOWN = "given up"


def most_even(problem: Problem, stages: int | None = None, labels_max: int = LABELS_MAX) -> Solution:
    """The chain (of exactly `stages` stages, where given) whose slowest stage is as fast as can be, and of those the
    one of least latency. Value and bound are the slowest stage's time."""
    most = min(problem.nodes, problem.blocks)
    if stages is not None and not 1 <= stages <= most:
        return Solution(None, inf, inf, "bottleneck")
    low, high = 0, int(problem.time_ns.sum(axis=1).max())
    answer = _within(problem, high, stages)
    if not isinstance(answer, tuple):
        return Solution(None, inf, inf if answer is _Verdict.NONE else float(low), "bottleneck")
    high, proven = slowest_ns(problem, answer), -1
    while low < high:
        middle = (low + high) // 2
        found = _within(problem, middle, stages)
        if isinstance(found, tuple):
            answer, high = found, slowest_ns(problem, found)
            continue
        low = middle + 1
        if found is _Verdict.NONE:
            proven = max(proven, middle)
    quickest = fastest(problem, stages, high, labels_max)
    bound = float(min(proven + 1, high))
    return Solution(quickest.pieces or answer, float(high), bound, "bottleneck")


def _within(problem: Problem, limit: int, stages: int | None) -> tuple[Piece, ...] | _Verdict:
    """A chain of distinct nodes without a stage slower than `limit`."""
    chains = chains_of(problem, limit)
    steps = stages or min(problem.nodes, problem.blocks)
    if chains.longest.sum() < problem.blocks or not _reaches(chains.high, steps):
        return _Verdict.NONE
    greedy = _furthest_first(chains.high, steps, stages is not None)
    if greedy:
        return tuple(Piece(int(chains.node[c]), first, end - 1) for c, first, end in greedy)
    critical: list[int] = []
    while True:
        layers = _layers(chains.high, critical, steps)
        if layers is None:
            return _Verdict.UNKNOWN
        ends = [k for k in ((steps,) if stages else range(1, steps + 1)) if layers[k][:, -1].any()]
        if not ends:
            return _Verdict.NONE
        path = _traced(chains.high, critical, layers[: ends[0] + 1])
        columns = [column for column, _, _ in path]
        repeated = sorted({c for c in columns if columns.count(c) > 1}, key=lambda c: -columns.count(c))
        if not repeated:
            return tuple(Piece(int(chains.node[c]), first, end - 1) for c, first, end in path)
        critical += repeated[:3]


def _reaches(high: Integers, steps: int) -> bool:
    """Whether so many stages could reach the end if every node could be used at will."""
    at, furthest = 0, high.max(axis=1)
    for _ in range(steps):
        at = int(furthest[at])
    return at == len(furthest) - 1


def _furthest_first(high: Integers, steps: int, exactly: bool) -> list[tuple[int, int, int]]:
    """(column, first block, end) of stages that each go as far as any unused node can, if they reach the end."""
    at, blocks, path = 0, high.shape[0] - 1, []
    idle = np.ones(high.shape[1], bool)
    for k in range(steps):
        column = int(np.where(idle, high[at], -1).argmax())
        # Of a fixed number of stages none may be left without a block.
        end = min(int(high[at, column]), blocks - (steps - 1 - k) if exactly else blocks)
        if not idle[column] or end <= at:
            break
        path.append((column, at, end))
        idle[column] = False
        at = end
        if at == blocks:
            return path
    return []


def _layers(high: Integers, critical: Sequence[int], steps: int) -> list[Mask] | None:
    """By number of stages: [2^|C|, L+1], whether a chain that has used these critical nodes can end before block i.
    None where that would take too long to find out."""
    blocks, rows = high.shape[0] - 1, 1 << len(critical)
    here = np.zeros((rows, blocks + 1), bool)
    here[0, 0] = True
    layers = [here]
    plain = np.setdiff1d(np.arange(high.shape[1]), critical)
    ends = np.arange(1, blocks + 1)
    cells = 0
    for _ in range(steps):
        cells += int(here.any(axis=1).sum()) * high.size
        if cells > _CELLS_MAX:
            return None
        following = np.zeros_like(here)
        for row in np.flatnonzero(here.any(axis=1)).tolist():
            reach = np.maximum.accumulate(np.where(here[row, :-1, None], high[:-1], 0), axis=0)
            covered = reach >= ends[:, None]
            following[row, 1:] |= covered[:, plain].any(axis=1)
            for bit, column in enumerate(critical):
                if not row >> bit & 1:
                    following[row | 1 << bit, 1:] |= covered[:, column]
        here = following
        layers.append(here)
    return layers


def _traced(high: Integers, critical: Sequence[int], layers: list[Mask]) -> list[tuple[int, int, int]]:
    """(column, first block, end) of the stages behind the last layer's end, unused nodes first."""
    end, row = high.shape[0] - 1, int(np.flatnonzero(layers[-1][:, -1])[0])
    bit_of = {column: bit for bit, column in enumerate(critical)}
    path: list[tuple[int, int, int]] = []
    used: set[int] = set()
    for k in count(len(layers) - 2, -1):
        options = []
        for column in range(high.shape[1]):
            bit = bit_of.get(column)
            if bit is not None and not row >> bit & 1:
                continue
            before = row if bit is None else row & ~(1 << bit)
            begins = np.flatnonzero(layers[k][before, :end] & (high[:end, column] >= end))
            if len(begins):
                options.append((column in used, int(begins[0]), column, before))
        _, first, column, row = min(options)
        path.append((column, first, end))
        used.add(column)
        end = first
        if k == 0:
            return path[::-1]
    raise AssertionError("the first layer begins with block 0")


def in_order(problem: Problem, order: Sequence[int]) -> Solution:
    """Chains-on-chains: the split with the fastest slowest stage, nodes in the given order (some may stay idle)."""
    chains = chains_of(problem)
    column = {int(node): c for c, node in enumerate(chains.node)}
    width = problem.blocks + 1
    best, steps = np.full(width, inf), []
    best[0] = 0
    first, end = np.arange(width)[:, None], np.arange(width)[None, :]
    for node in order:
        c = column[node]
        segment = chains.prefix[:, c][None, :] - chains.prefix[:, c][:, None]
        fits = (end >= first) & (end <= np.maximum(chains.high[:, c][:, None], first))
        reached = np.maximum(best[:, None], np.where(fits, segment, inf))
        steps.append(reached.argmin(axis=0))
        best = reached.min(axis=0)
    value = float(best[-1])
    if value == inf:
        return Solution(None, inf, inf, "in order")
    pieces, at = [], problem.blocks
    for node, step in zip(reversed(order), reversed(steps), strict=True):
        begin = int(step[at])
        if begin < at:
            pieces.append(Piece(node, begin, at - 1))
        at = begin
    return Solution(tuple(reversed(pieces)), value, value, "in order")


def replicated_rate(problem: Problem, placed: Sequence[Piece]) -> float:
    """Steps per second that nodes with given intervals sustain together: maximum flow on the node-split graph (Helix,
    arXiv 2406.01566). A step passes from a node to another whose interval holds the next block; a node's rate is that
    of its whole interval. Links do not limit it."""
    ends = 2 * len(placed)
    source, sink = ends, ends + 1
    rates = [1e9 / int(problem.time_ns[p.node, p.first : p.last + 1].sum()) for p in placed]
    unlimited = min(int(sum(rates) / _FLOW_UNIT) + 1, 2**31 - 1)
    edges = [(2 * i, 2 * i + 1, min(int(rate / _FLOW_UNIT), 2**31 - 1)) for i, rate in enumerate(rates)]
    for i, piece in enumerate(placed):
        if piece.first == 0:
            edges.append((source, 2 * i, unlimited))
        if piece.last == problem.blocks - 1:
            edges.append((2 * i + 1, sink, unlimited))
        edges += [
            (2 * i + 1, 2 * j, unlimited)
            for j, other in enumerate(placed)
            if other.node != piece.node and other.first <= piece.last + 1 <= other.last
        ]
    rows, columns, limits = zip(*edges, strict=True)
    graph = csr_array((np.array(limits, np.int32), (rows, columns)), shape=(ends + 2, ends + 2))
    return float(maximum_flow(graph, source, sink).flow_value * _FLOW_UNIT)
