"""PURE: beam search with a completion bound (mathematics.md A3): f = cost so far + what the relaxation says is left.

Block by block: of the chains that have done i blocks the `WIDTH` best by f go on, so chains are compared that have the
same road ahead. The completion bound is that of `chains.completion`, LB0 with memory and fees: a chain that runs into
a corner without memory, or into a node that it has used, is seen from afar.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from orchestrator.solvers.chains import Cases, Chains, Completion
from orchestrator.solvers.problem import Floats, Integers, Mask, Piece

WIDTH = 64
"""Chains kept per number of blocks done."""
BRANCH = 8
"""Nodes tried after each of them."""
_ENDS = 4
"""Ends tried of each interval: the best by the completion bound; and the furthest."""


@dataclass(frozen=True)
class _Labels:
    """Chains that have done the same number of blocks."""

    case: Integers
    depth: Integers
    """Stages so far."""
    cost: Floats
    """With the fees of the nodes used."""
    paid: Floats
    """Those fees."""
    node: Integers
    visited: Mask
    """[labels, M]"""
    key: Integers
    """A hash of case and nodes used."""
    story: tuple[tuple[Piece, ...], ...]


@dataclass(frozen=True)
class _Grown:
    """Labels with one stage more, by the label that they grew from."""

    source: _Labels
    total: Floats
    """No chain that goes on from here costs less."""
    cost: Floats
    label: Integers
    node: Integers
    end: Integers

    def only(self, keep: Integers) -> "_Grown":
        return _Grown(
            self.source, self.total[keep], self.cost[keep], self.label[keep], self.node[keep], self.end[keep]
        )


def search(
    chains: Chains, cases: Cases, table: Completion, cutoff: float = inf, width: int = WIDTH, branch: int = BRANCH
) -> tuple[float, int, tuple[Piece, ...]]:
    """The best chain found that costs less than `cutoff`: (its cost, its case, its pieces), else (cutoff, -1, ())."""
    best, case, pieces = cutoff, -1, ()
    last = max(cases.exits)
    # Sets of nodes are told apart by the exclusive or of a number for each.
    marks = np.random.default_rng(0).integers(1, 1 << 62, chains.nodes)
    waiting: list[list[tuple[int, _Grown]]] = [[] for _ in range(chains.blocks + 1)]
    for at in range(last):
        labels = [_entered(chains, cases, at)] if (cases.entry_at == at).any() else []
        if waiting[at]:
            labels.append(_kept(chains, cases, table, at, waiting[at], marks, width))
            waiting[at] = []
        for source in labels:
            grown = _grown(chains, cases, table, at, source, width if source.node[0] < 0 else branch, best)
            for end in np.unique(grown.end).tolist():
                some = grown.only(np.flatnonzero(grown.end == end))
                if end in cases.exits:
                    value, k = _finished(cases, table, some)
                    if value < best:
                        label = int(some.label[k])
                        best, case = value, int(source.case[label])
                        pieces = (*source.story[label], Piece(int(chains.node[some.node[k]]), at, end - 1))
                if end < last:
                    waiting[end].append((at, some))
    return best, case, pieces


def _entered(chains: Chains, cases: Cases, at: int) -> _Labels:
    case = np.flatnonzero(cases.entry_at == at)
    nothing = np.zeros(len(case))
    number = np.zeros(len(case), np.int64)
    visited = np.zeros((len(case), chains.nodes), bool)
    return _Labels(case, number, nothing, nothing, number - 1, visited, case, ((),) * len(case))


def _kept(
    chains: Chains, cases: Cases, table: Completion, at: int, groups: list[tuple[int, _Grown]], marks: Integers, width: int
) -> _Labels:
    """The `width` best of what has done `at` blocks; of the same nodes in another order, the best alone."""
    total = np.concatenate([g.total for _, g in groups])
    key = np.concatenate([g.source.key[g.label] ^ marks[g.node] for _, g in groups])
    node = np.concatenate([g.node for _, g in groups])
    order = np.argsort(total, kind="stable")
    _, first = np.unique(key[order] * len(marks) + node[order], return_index=True)
    chosen = order[np.sort(first)[:width]]
    group = np.repeat(np.arange(len(groups)), [len(g.node) for _, g in groups])[chosen]
    offset = np.cumsum([0, *(len(g.node) for _, g in groups)])[group]
    member = (chosen - offset).tolist()
    picks = [(groups[g][0], groups[g][1], k) for g, k in zip(group.tolist(), member, strict=True)]
    labels = [int(g.label[k]) for _, g, k in picks]
    sources = [g.source for _, g, _ in picks]
    case = np.array([s.case[n] for s, n in zip(sources, labels, strict=True)])
    node = node[chosen]
    visited = np.stack([s.visited[n] for s, n in zip(sources, labels, strict=True)])
    visited[np.arange(len(node)), node] = True
    return _Labels(
        case,
        np.array([s.depth[n] + 1 for s, n in zip(sources, labels, strict=True)]),
        np.array([g.cost[k] for _, g, k in picks]),
        np.array([s.paid[n] for s, n in zip(sources, labels, strict=True)]) + table.fee[case, node],
        node,
        visited,
        key[chosen],
        tuple(
            (*g.source.story[n], Piece(int(chains.node[g.node[k]]), first, at - 1))
            for (first, g, k), n in zip(picks, labels, strict=True)
        ),
    )


def _grown(
    chains: Chains, cases: Cases, table: Completion, at: int, now: _Labels, branch: int, best: float
) -> _Grown:
    """Each label with its most promising next nodes, and each of these with its most promising ends."""
    rows = now.case if table.stages is None else now.case * table.stages + table.stages - 1 - now.depth
    due = table.fee.sum(axis=1)[now.case]
    if now.node[0] < 0:
        spent = cases.entry[now.case].copy()
    else:
        spent = chains.full[chains.kind[at - 1]][chains.site[now.node]][:, chains.site]
        spent += cases.barred[now.case]
        spent += now.cost[:, None]
        spent[now.visited] = inf
    total = spent + table.begin[at, rows]
    chosen = _least(total, min(branch, chains.nodes))
    label = np.repeat(np.arange(len(rows)), chosen.shape[1])
    node = chosen.ravel()
    good = total[label, node] - due[label] < best
    label, node = label[good], node[good]
    if table.stages is not None:
        good = now.depth[label] < table.stages
        label, node = label[good], node[good]
    far = chains.high[at, node]
    ends = np.arange(at + 1, max(int(far.max(initial=0)), at) + 1)
    cost = (spent[label, node] + table.fee[now.case[label], node] - chains.prefix[at, node])[:, None]
    cost = cost + chains.prefix[ends][:, node].T
    total = cost + table.done[ends][:, rows[label], node].T - due[label][:, None]
    # The chain so far plus the longest intervals of the nodes that are left must reach an end.
    left = (chains.longest.sum() - now.visited @ chains.longest)[label] - chains.longest[node]
    total[(ends > far[:, None]) | (ends + left[:, None] < min(cases.exits))] = inf
    likely = np.argsort(total, axis=1, kind="stable")[:, :_ENDS]
    # The furthest end is tried too: where memory is short, what the bound likes best may leave too little of it.
    several = (far - at - 1)[:, None] != likely
    picked = np.concatenate([likely, (far - at - 1)[:, None]], axis=1)
    fresh = np.concatenate([np.ones_like(several), several.all(axis=1, keepdims=True)], axis=1)
    fresh &= np.take_along_axis(total, picked, axis=1) < best if total.size else False
    pick, column = np.nonzero(fresh)
    end = picked[pick, column]
    return _Grown(now, total[pick, end], cost[pick, end], label[pick], node[pick], ends[end] if len(ends) else end)


def _finished(cases: Cases, table: Completion, grown: _Grown) -> tuple[float, int]:
    """The cheapest way to end a chain here, and which it is."""
    case = grown.source.case[grown.label]
    paid = grown.source.paid[grown.label] + table.fee[case, grown.node]
    values = grown.cost - paid + cases.exits[int(grown.end[0])][case, grown.node]
    if table.stages is not None:
        values[grown.source.depth[grown.label] + 1 != table.stages] = inf
    k = int(values.argmin())
    return float(values[k]), k


def _least(values: Floats, count: int) -> Integers:
    """[R, count]: columns of the least values of each row, the least first, ties as they stand."""
    if count >= values.shape[1] or values.shape[1] <= WIDTH:
        return np.argsort(values, axis=1, kind="stable")[:, :count]
    some = np.sort(np.argpartition(values, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(np.take_along_axis(values, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
