"""PURE: beam search with a completion bound (mathematics.md A3): f = cost so far + what the relaxation says is left.

Block by block: of the chains that have done i blocks the `WIDTH` best by f go on, so chains are compared that have the
same road ahead. The completion bound is that of `chains.completion`, LB0 with memory and fees: a chain that runs into
a corner without memory, or into a node that it has used, is seen from afar.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from orchestrator.solvers.chains import Cases, Chains, Completion
from orchestrator.solvers.problem import Floats, Integers, Piece

WIDTH = 64
"""Chains kept per number of blocks done."""
BRANCH = 8
"""Nodes tried after each of them."""
_ENDS = 4
"""Ends tried of each interval: the best by the completion bound; and the furthest."""


class _Labels:
    """Chains by number: the first A stand for the cases, before any stage."""

    def __init__(self, chains: Chains, cases: Cases, table: Completion, width: int) -> None:
        count = len(cases.entry_at)
        room = count + chains.blocks * width
        self.case = np.zeros(room, np.int64)
        self.depth = np.zeros(room, np.int64)
        self.cost = np.zeros(room)
        """With the fees of the nodes used."""
        self.paid = np.zeros(room)
        """Those fees."""
        self.node = np.full(room, -1)
        self.end = np.zeros(room, np.int64)
        self.parent = np.full(room, -1)
        self.key = np.zeros(room, np.int64)
        """Case and nodes used, hashed: sets of nodes are told apart by the exclusive or of a number for each."""
        self.visited = np.zeros((room, chains.nodes), bool)
        self.marks = np.random.default_rng(0).integers(1, 1 << 62, chains.nodes)
        self.count = count
        self.case[:count] = self.key[:count] = np.arange(count)
        self.end[:count] = cases.entry_at
        self._fee = table.fee

    def add(self, grown: "_Grown", chosen: Integers) -> Integers:
        """Numbers of new labels."""
        new = np.arange(self.count, self.count + len(chosen))
        self.count += len(chosen)
        parent, node = grown.label[chosen], grown.node[chosen]
        self.case[new], self.depth[new] = self.case[parent], self.depth[parent] + 1
        self.cost[new], self.paid[new] = grown.cost[chosen], self.paid[parent] + self._fee[self.case[parent], node]
        self.node[new], self.end[new], self.parent[new] = node, grown.end[chosen], parent
        self.key[new] = self.key[parent] ^ self.marks[node]
        self.visited[new] = self.visited[parent]
        self.visited[new, node] = True
        return new

    def pieces(self, chains: Chains, label: int) -> tuple[Piece, ...]:
        found = []
        while self.parent[label] >= 0:
            parent = int(self.parent[label])
            found.append(Piece(int(chains.node[self.node[label]]), int(self.end[parent]), int(self.end[label]) - 1))
            label = parent
        return tuple(reversed(found))


@dataclass(frozen=True)
class _Grown:
    """Labels with one stage more."""

    total: Floats
    """No chain that goes on from here costs less."""
    cost: Floats
    label: Integers
    node: Integers
    end: Integers

    def only(self, keep: Integers | slice) -> "_Grown":
        return _Grown(self.total[keep], self.cost[keep], self.label[keep], self.node[keep], self.end[keep])


def search(
    chains: Chains, cases: Cases, table: Completion, cutoff: float = inf, width: int = WIDTH, branch: int = BRANCH
) -> tuple[float, int, tuple[Piece, ...]]:
    """The best chain found that costs less than `cutoff`: (its cost, its case, its pieces), else (cutoff, -1, ())."""
    best, case = cutoff, -1
    pieces: tuple[Piece, ...] = ()
    labels = _Labels(chains, cases, table, width)
    last = max(cases.exits)
    waiting: list[list[_Grown]] = [[] for _ in range(chains.blocks + 1)]
    for at in range(last):
        entering = np.flatnonzero(cases.entry_at == at)
        groups = [(entering, width)] if len(entering) else []
        if waiting[at]:
            groups.append((_kept(labels, waiting[at], width), branch))
            waiting[at] = []
        for group, tried in groups:
            grown = _grown(chains, cases, table, labels, at, group, tried, best)
            ends, begins = np.unique(grown.end, return_index=True)
            for i, end in enumerate(ends.tolist()):
                some = grown.only(slice(begins[i], begins[i + 1] if i + 1 < len(ends) else None))
                if end in cases.exits:
                    value, k = _finished(cases, table, labels, some)
                    if value < best:
                        number = int(some.label[k])
                        best, case = value, int(labels.case[number])
                        final = Piece(int(chains.node[some.node[k]]), at, end - 1)
                        pieces = (*labels.pieces(chains, number), final)
                if end < last:
                    waiting[end].append(some)
    return best, case, pieces


def _kept(labels: _Labels, groups: list[_Grown], width: int) -> Integers:
    """The `width` best of what has done so many blocks; of the same nodes in another order, the best alone."""
    names = ("total", "cost", "label", "node", "end")
    every = _Grown(*(np.concatenate([getattr(group, name) for group in groups]) for name in names))
    every = every.only(np.argsort(every.total, kind="stable")[: 4 * width])
    key = (labels.key[every.label] ^ labels.marks[every.node]) * len(labels.marks) + every.node
    _, first = np.unique(key, return_index=True)
    return labels.add(every, np.sort(first)[:width])


def _grown(
    chains: Chains,
    cases: Cases,
    table: Completion,
    labels: _Labels,
    at: int,
    group: Integers,
    branch: int,
    best: float,
) -> _Grown:
    """Each label with its most promising next nodes, and each of these with its most promising ends; by end."""
    case, depth = labels.case[group], labels.depth[group]
    rows = case if table.stages is None else case * table.stages + table.stages - 1 - depth
    due = table.fee.sum(axis=1)[case]
    if labels.node[group[0]] < 0:
        spent = cases.entry[case]
    else:
        spent = chains.full[chains.kind[at - 1]][chains.site[labels.node[group]]][:, chains.site]
        spent += cases.barred[case]
        spent += labels.cost[group][:, None]
        spent[labels.visited[group]] = inf
    total = spent + table.begin[at, rows]
    chosen = _least(total, min(branch, chains.nodes))
    label, node = np.repeat(np.arange(len(rows)), chosen.shape[1]), chosen.ravel()
    good = (total[label, node] - due[label] < best) & (table.stages is None or depth[label] < table.depth)
    label, node = label[good], node[good]
    far = chains.high[at, node]
    ends = np.arange(at + 1, max(int(far.max(initial=0)), at) + 1)
    cost = (spent[label, node] + table.fee[case[label], node] - chains.prefix[at, node])[:, None]
    cost = cost + chains.prefix[ends][:, node].T
    total = cost + table.done[ends][:, rows[label], node].T - due[label][:, None]
    # The chain so far plus the longest intervals of the nodes that are left must reach an end.
    left = (chains.longest.sum() - labels.visited[group] @ chains.longest)[label] - chains.longest[node]
    total[(ends > far[:, None]) | (ends + left[:, None] < min(cases.exits))] = inf
    likely = np.argsort(total, axis=1, kind="stable")[:, :_ENDS]
    # The furthest end is tried too: where memory is short, what the bound likes best may leave too little of it.
    furthest = (far - at - 1)[:, None]
    picked = np.concatenate([likely, furthest], axis=1)
    fresh = np.concatenate([np.ones_like(likely, bool), (furthest != likely).all(axis=1, keepdims=True)], axis=1)
    pick, column = np.nonzero(fresh & (np.take_along_axis(total, picked, axis=1) < best))
    end = picked[pick, column]
    order = np.argsort(end, kind="stable")
    pick, end = pick[order], end[order]
    return _Grown(total[pick, end], cost[pick, end], group[label[pick]], node[pick], end + at + 1)


def _finished(cases: Cases, table: Completion, labels: _Labels, grown: _Grown) -> tuple[float, int]:
    """The cheapest way to end a chain here, and which it is."""
    case = labels.case[grown.label]
    paid = labels.paid[grown.label] + table.fee[case, grown.node]
    values = grown.cost - paid + cases.exits[int(grown.end[0])][case, grown.node]
    if table.stages is not None:
        values[labels.depth[grown.label] + 1 != table.stages] = inf
    k = int(values.argmin())
    return float(values[k]), k


def _least(values: Floats, count: int) -> Integers:
    """[R, count]: columns of the least values of each row, the least first, ties as they stand."""
    if count >= values.shape[1] or values.shape[1] <= WIDTH:
        return np.argsort(values, axis=1, kind="stable")[:, :count]
    some = np.sort(np.argpartition(values, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(np.take_along_axis(values, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
