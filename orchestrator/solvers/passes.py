"""PURE: one pass of the state-space relaxation: chains forwards, with visited bits for the critical nodes (A2).

done(j, n, S)  = min over i with W(i..j) <= M_n of begin(i, n, S) + seg_n(i, j)
begin(i, n, S) = min over n' other than n of done(i, n', S - n) + net(n', n, a_i);  S holds n if n is critical
"""

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

import numpy as np

from orchestrator.solvers.chains import Cases, Chains, Completion
from orchestrator.solvers.problem import Floats, Integers, Mask, Piece


@dataclass(frozen=True)
class Rows:
    """The states that a pass keeps apart: case, number of stages so far (0 unless it is fixed), critical nodes seen."""

    case: Integers
    depth: Integers
    seen: Integers
    counted: bool

    @staticmethod
    def first(cases: Integers, stages: int | None) -> "Rows":
        """Rows of an empty critical set."""
        depth = stages or 1
        case = np.repeat(cases, depth)
        return Rows(case, np.tile(np.arange(depth), len(cases)), np.zeros(len(case), np.int64), stages is not None)

    def only(self, keep: Mask) -> "Rows":
        return Rows(self.case[keep], self.depth[keep], self.seen[keep], self.counted)

    def with_bits(self, bits: Iterable[int]) -> "Rows":
        """Every row with every subset of new bits."""
        subsets = np.zeros(1, np.int64)
        for bit in bits:
            subsets = np.concatenate([subsets, subsets | (1 << bit)])
        count = len(subsets)
        seen = (self.seen[:, None] | subsets).ravel()
        return Rows(np.repeat(self.case, count), np.repeat(self.depth, count), seen, self.counted)


@dataclass(frozen=True)
class Pass:
    """What a pass found; every state that cannot beat the cut-off is infinite."""

    chains: Chains
    cases: Cases
    rows: Rows
    critical: dict[int, int]
    """Column of a critical node -> its bit."""
    row_of: dict[tuple[int, int, int], int]
    begin: Floats
    """[L, R, M], with the fee, less the node's time of the blocks before."""
    done: Floats
    """[L+1, R, M]"""
    credit: Floats
    """[R]: fees given back at the end, less all fees."""
    values: Floats
    """[A]: the least cost of a whole chain, infinite where it does not beat the cut-off."""

    @property
    def live_rows(self) -> Mask:
        return np.asarray((self.begin < inf).any(axis=(0, 2)))

    @property
    def live_nodes(self) -> Mask:
        return np.asarray((self.begin < inf).any(axis=(0, 1)))

    def live_nodes_of(self, case: int) -> Mask:
        """The nodes that a case can still use."""
        return np.asarray((self.begin[:, self.rows.case == case] < inf).any(axis=(0, 1)))

    def path(self, case: int) -> tuple[Piece, ...]:
        """The chain behind a case's finite value."""
        at, row, node = self._end(case)
        pieces = []
        while True:
            first = int(np.where(self.chains.high[:at, node] >= at, self.begin[:at, row, node], inf).argmin())
            pieces.append(Piece(int(self.chains.node[node]), first, at - 1))
            if first == self.cases.entry_at[case]:
                return tuple(reversed(pieces))
            depth, seen = int(self.rows.depth[row]) - self.rows.counted, int(self.rows.seen[row])
            if node in self.critical:
                seen &= ~(1 << self.critical[node])
            row = self.row_of[case, depth, seen]
            kind, site = self.chains.kind[first - 1], self.chains.site
            hop = self.chains.apart[kind, :, site[node]][site]
            hop = np.where(site == site[node], self.chains.within[kind, site[node]], hop)
            hop[node] = inf
            at, node = first, int((self.done[first, row] + hop).argmin())

    def _end(self, case: int) -> tuple[int, int, int]:
        for at, cost in self.cases.exits.items():
            for row in np.flatnonzero(self.rows.case == case):
                if self.rows.counted and self.rows.depth[row] != self.rows.depth.max():
                    continue
                total = self.done[at, row] + cost[case] + self.credit[row]
                if total.min() == self.values[case]:
                    return at, int(row), int(total.argmin())
        raise AssertionError("a finite value has an end")


def run(chains: Chains, cases: Cases, table: Completion, rows: Rows, critical: tuple[int, ...], cutoff: float) -> Pass:
    """One pass over `rows`, `critical` being node numbers of the problem in the order of their bits."""
    blocks, count = chains.blocks, len(rows.case)
    columns = {int(np.flatnonzero(chains.node == node)[0]): bit for bit, node in enumerate(critical)}
    row_of = {
        key: r for r, key in enumerate(zip(rows.case.tolist(), rows.depth.tolist(), rows.seen.tolist(), strict=True))
    }
    step = int(rows.counted)
    keys = list(row_of)
    plain = np.array([row_of.get((a, k + step, s), -1) for a, k, s in keys])
    marked = {
        column: np.array([-1 if s >> bit & 1 else row_of.get((a, k + step, s | 1 << bit), -1) for a, k, s in keys])
        for column, bit in columns.items()
    }
    barred = cases.barred[rows.case]
    fee = table.fee[rows.case]
    # A critical node is visited once or not at all, and these rows know which: what is not spent is given back.
    due = table.fee.sum(axis=1)[rows.case]
    unseen = sum((table.fee[rows.case, c] * (~rows.seen >> bit & 1) for c, bit in columns.items()), np.zeros(count))
    left = rows.case if table.stages is None else rows.case * table.stages + table.stages - 1 - rows.depth
    shape = (count, chains.nodes)
    begin, done = np.full((blocks, *shape), inf), np.full((blocks + 1, *shape), inf)
    values = np.full(len(cases.entry_at), inf)
    complete = np.flatnonzero(rows.depth == table.depth - 1)
    some, every = chains.begins
    entries = _entries(cases, rows, row_of, columns)
    critical_columns = list(columns)
    for at in range(blocks + 1):
        if at:
            done[at] = _least_begun(begin, chains.high, some[at], every[at], at) + chains.prefix[at]
        if at in cases.exits:
            total = done[at, complete] + cases.exits[at][rows.case[complete]] + (unseen - due)[complete, None]
            np.minimum.at(values, rows.case[complete], total.min(axis=1))
        if at == blocks:
            break
        now = begin[at]
        if at:
            arrived = chains.arrive(done[at], at - 1) + barred
            if not step:
                now[:] = arrived
            else:
                source = np.flatnonzero(plain >= 0)
                now[plain[source]] = arrived[source]
            now[:, critical_columns] = inf
            for column, target in marked.items():
                source = np.flatnonzero(target >= 0)
                now[target[source], column] = arrived[source, column]
        for row, nodes, cost in entries.get(at, ()):
            now[row, nodes] = np.minimum(now[row, nodes], cost)
        now[now + table.begin[at, left] >= cutoff + due[:, None]] = inf
        now += fee - chains.prefix[at]
    values[values >= cutoff] = inf
    return Pass(chains, cases, rows, columns, row_of, begin, done, unseen - due, values)


def _entries(
    cases: Cases, rows: Rows, row_of: dict[tuple[int, int, int], int], critical: dict[int, int]
) -> dict[int, list[tuple[int, Integers, Floats]]]:
    """By block: (row, columns, costs) of the chains that begin there."""
    found: dict[int, list[tuple[int, Integers, Floats]]] = {}
    plain = np.setdiff1d(np.arange(cases.entry.shape[1]), list(critical))
    for case in sorted(set(rows.case.tolist())):
        into = found.setdefault(int(cases.entry_at[case]), [])
        options = [(0, plain), *((1 << bit, np.array([column])) for column, bit in critical.items())]
        for seen, columns in options:
            row = row_of.get((case, 0, seen))
            if row is not None:
                into.append((row, columns, cases.entry[case, columns]))
    return found


def _least_begun(begin: Floats, high: Integers, outer: int, inner: int, at: int) -> Floats:
    """[R, M]: min over outer <= i < at, with at <= high[i, n], of begin[i, r, n]."""
    found: Floats = np.minimum.reduce(begin[min(inner, at) : at], axis=0, initial=inf)
    if outer < min(inner, at):
        outside = np.where(high[outer:inner][: at - outer] < at, inf, 0.0)
        window = begin[outer : min(inner, at)]
        found = np.minimum(found, np.minimum.reduce(window + outside[:, None, :]))
    return found
