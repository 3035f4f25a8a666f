"""PURE: the exact subset dynamic programme of mathematics.md A2, for up to `NODES_MAX` nodes.

    G(i, S, k)     = min over j in S of F(i, S, j) + net(j, k, a_i)
    F(i', S+k, k)  = min over i < i' with W(i..i') <= M_k of G(i, S, k) + seg_k(i, i')

F(i, S, k) is the least time to run the first i blocks on exactly the nodes S, k the last one. Times are whole
nanoseconds, so equal plans compare equal and ties go to the nodes that stand first. What cannot beat the best
plan known even if the remaining blocks took the cheapest way with all memory to themselves (LB0) is dropped; that
keeps the result exact.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from orchestrator.solvers.problem import Integers, Piece, Problem

NODES_MAX = 14
"""Time and memory double with each node: 14 nodes and 34 blocks take five seconds at worst (two cores, measured)."""
INFINITE = 1 << 60
"""No plan; three of them still add up within 63 bits."""
BATCH = 256
"""Node sets looked at in one numpy call: bounds the working memory to tens of megabytes."""


def fastest(problem: Problem) -> tuple[Piece, ...] | None:
    """The stages that minimise the time per token over all orders and subsets of nodes, or None if nothing fits."""
    return _least_time(problem, _segments(problem), range(1, min(problem.nodes, problem.blocks) + 1))


def balanced(problem: Problem, stages: int) -> tuple[Piece, ...] | None:
    """Exactly `stages` stages whose slowest is as fast as can be, and among those the least time per token."""
    if stages > min(problem.nodes, problem.blocks):
        return None
    segments = _segments(problem)
    slowest = _least_bottleneck(segments, stages)
    if slowest >= INFINITE:
        return None
    return _least_time(problem, np.where(segments > slowest, INFINITE, segments), range(stages, stages + 1))


def _segments(problem: Problem) -> Integers:
    """seg[k, i, i']: time of blocks i to i'-1 on node k, infinite where the range is empty or does not fit."""
    edge = np.zeros((problem.nodes, 1), np.int64)
    time = np.concatenate([edge, np.cumsum(problem.time_ns, axis=1)], axis=1)
    need = np.concatenate([edge, np.cumsum(problem.need_bytes, axis=1)], axis=1)
    fits = (need[:, None, :] - need[:, :, None]) <= problem.free_bytes[:, None, None]
    ahead = np.triu(np.ones((problem.blocks + 1, problem.blocks + 1), bool), 1)
    banned = np.concatenate([edge, np.cumsum(~problem.may_run, axis=1)], axis=1)
    fits &= banned[:, None, :] == banned[:, :, None]
    return np.where(fits & ahead, time[:, None, :] - time[:, :, None], INFINITE)


def _least_bottleneck(segments: Integers, stages: int) -> int:
    """The least possible time of the slowest of exactly `stages` stages: the recurrence with max in place of +."""
    nodes, width = segments.shape[0], segments.shape[1]
    masks = np.zeros(1, np.int64)
    best = np.full((1, width), INFINITE, np.int64)
    best[0, 0] = 0
    for _ in range(stages):
        following = _grown(masks, nodes)
        values = np.full((len(following), width), INFINITE, np.int64)
        for k, rows, targets in _moves(masks, following, nodes):
            reached = np.maximum(best[rows][:, :, None], segments[k]).min(axis=1)
            values[targets] = np.minimum(values[targets], reached)
        masks, best = following, values
    return int(best[:, -1].min(initial=INFINITE))


@dataclass(frozen=True)
class _Layer:
    """F for all node sets of one size: `values[row, k, i]` belongs to the set `masks[row]`, ascending."""

    masks: Integers
    values: Integers


def _least_time(problem: Problem, segments: Integers, sizes: range) -> tuple[Piece, ...] | None:
    hops = problem.dense_hops()
    back = hops[-1]
    nodes = problem.nodes
    apart = back[~np.eye(nodes, dtype=bool)]
    # The way back depends on where the chain began. Where it costs the same from everywhere, one pass over all
    # beginnings does; otherwise each beginning is solved for itself.
    if apart.size == 0 or (apart == apart[0]).all():
        passes = [(list(range(nodes)), np.full(nodes, apart[0] if apart.size else 0, np.int64))]
    else:
        passes = [([start], back[:, start]) for start in range(nodes)]
    best, answer = INFINITE, None
    for starts, home in passes:
        found, pieces = _one_pass(problem, segments, hops, sizes, starts, home, best)
        if found < best:
            best, answer = found, pieces
    return answer


def _one_pass(
    problem: Problem,
    segments: Integers,
    crossing: Integers,
    sizes: range,
    starts: list[int],
    home: Integers,
    bound: int,
) -> tuple[int, tuple[Piece, ...]]:
    """The best chain that begins on one of `starts` and is better than `bound`, else (INFINITE, ())."""
    nodes, width = problem.nodes, problem.blocks + 1
    hops = np.zeros((nodes, nodes, width), np.int64)
    hops[:, :, 1:] = crossing.transpose(1, 2, 0)
    rest = _least_rest(problem, crossing, home)
    first = np.full((len(starts), nodes, width), INFINITE, np.int64)
    for row, start in enumerate(starts):
        first[row, start] = segments[start, 0]
    layers = [_Layer(np.array([1 << start for start in starts], np.int64), first)]
    best, where = bound, None
    for size in range(1, sizes.stop):
        layer = layers[-1]
        if size in sizes:
            # A chain of one stage is at home already.
            ends = np.minimum(layer.values[:, :, -1] + (home if size > 1 else 0), INFINITE)
            found = int(ends.min(initial=INFINITE))
            if found < best:
                row = int(np.argmax(ends.min(axis=1) == found))
                best, where = found, (size, int(layer.masks[row]), _last_equal(ends[row], found))
        if size + 1 == sizes.stop:
            break
        layer = _pruned(layer, rest, best)
        layers[-1] = layer
        if not len(layer.masks):
            break
        layers.append(_extended(layer, segments, hops))
    if where is None:
        return INFINITE, ()
    size, mask, node = where
    return best, _trace(layers[:size], segments, hops, mask, node)


def _least_rest(problem: Problem, crossing: Integers, home: Integers) -> Integers:
    """LB0 backwards, [M, L+1]: no chain that has run i blocks, the last on n, ends in less (memory ignored)."""
    rest = np.empty((problem.nodes, problem.blocks + 1), np.int64)
    rest[:, -1] = home
    for i in range(problem.blocks - 1, -1, -1):
        onward = problem.time_ns[:, i] + rest[:, i + 1]
        rest[:, i] = (crossing[i - 1] + onward[None, :]).min(axis=1) if i else onward.min()
    return rest


def _pruned(layer: _Layer, rest: Integers, best: int) -> _Layer:
    # Only what is strictly worse goes: the chain that is the best so far keeps all of its beginnings.
    values = np.where(layer.values + rest > best, INFINITE, layer.values)
    keep = values.min(axis=(1, 2)) < INFINITE if len(layer.masks) else np.zeros(0, bool)
    return _Layer(layer.masks[keep], values[keep])


def _extended(layer: _Layer, segments: Integers, hops: Integers) -> _Layer:
    nodes, width = segments.shape[0], segments.shape[1]
    masks = _grown(layer.masks, nodes)
    values = np.full((len(masks), nodes, width), INFINITE, np.int64)
    for k, rows, targets in _moves(layer.masks, masks, nodes):
        reached = (layer.values[rows] + hops[:, k]).min(axis=1)
        values[targets, k] = np.minimum((reached[:, :, None] + segments[k]).min(axis=1), INFINITE)
    return _Layer(masks, values)


def _grown(masks: Integers, nodes: int) -> Integers:
    """Every set that adds one node to one of `masks`, ascending."""
    added = [masks[(masks >> k) & 1 == 0] | (1 << k) for k in range(nodes)]
    return np.unique(np.concatenate(added))


def _moves(masks: Integers, grown: Integers, nodes: int) -> Iterator[tuple[int, Integers, Integers]]:
    """(k, rows of the sets without k, rows of the same sets with k), a batch at a time."""
    for k in range(nodes):
        rows = np.flatnonzero((masks >> k) & 1 == 0)
        targets = np.searchsorted(grown, masks[rows] | (1 << k))
        for start in range(0, len(rows), BATCH):
            yield k, rows[start : start + BATCH], targets[start : start + BATCH]


def _trace(layers: list[_Layer], segments: Integers, hops: Integers, mask: int, node: int) -> tuple[Piece, ...]:
    """The chain behind an end, found by redoing each minimum: whole numbers compare exactly."""
    pieces = []
    end = segments.shape[1] - 1
    for depth in range(len(layers) - 1, 0, -1):
        layer, below = layers[depth], layers[depth - 1]
        row = int(np.searchsorted(layer.masks, mask))
        value = layer.values[row, node, end]
        mask &= ~(1 << node)
        before = below.values[int(np.searchsorted(below.masks, mask))]
        total = before + hops[:, node] + segments[node][None, :, end]
        previous, cut = (int(n) for n in np.argwhere(total == value)[-1])
        pieces.append(Piece(node, cut, end - 1))
        node, end = previous, cut
    pieces.append(Piece(node, 0, end - 1))
    return tuple(reversed(pieces))


def _last_equal(values: Integers, wanted: int) -> int:
    # Of equal last nodes the one that stands last: its predecessors are then those that stand first.
    return int(np.flatnonzero(values == wanted)[-1])
