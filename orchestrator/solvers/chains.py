"""PURE: chains of intervals in which a node may return, the relaxation under the exact solver and the beam.

Memory holds for each interval, and a node never follows itself; only its return later is not forbidden (A2, DSSR
with an empty critical set). Backwards, with i' after i and n' other than n:

    begin(i, n) = min over i' with W(i..i') <= M_n of seg_n(i, i') + done(i', n)
    done(i, n)  = min(exit(i, n), min over n' of net(n, n', a_i) + begin(i, n'))

Both are lower bounds for what a chain of distinct nodes still costs, and they know about memory, which LB0 does
not. Arithmetic is in float64, exact for whole nanoseconds below 2^53 (104 days); infinity means "no chain".
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from math import inf

import numpy as np

from orchestrator.solvers.problem import Floats, Integers, Mask, Problem

_WINDOW_CELLS = 1 << 20
"""Figures looked at in one numpy call: 8 MB, which still fits a cache."""


@dataclass(frozen=True)
class Chains:
    """A problem as the relaxation reads it; nodes are ordered by site, `node` says which they are."""

    node: Integers
    """[M]: the number of each in the problem."""
    site: Integers
    """[M]: ascending, numbered from 0 without holes."""
    prefix: Floats
    """[L+1, M]: time of the first i blocks."""
    high: Integers
    """[L+1, M]: where an interval that begins at block i ends at the latest (exclusive); i where none begins."""
    hops: Floats
    """[D, S, S], for the sites that have nodes."""
    kind: Integers
    """[L]"""

    @property
    def nodes(self) -> int:
        return len(self.node)

    @property
    def blocks(self) -> int:
        return len(self.kind)

    @cached_property
    def starts(self) -> Integers:
        return np.flatnonzero(np.diff(self.site, prepend=-1))

    @cached_property
    def begins(self) -> tuple[list[int], list[int]]:
        """By block j: from which block on some node, and from which on every node, can run until j."""
        ends = np.arange(self.blocks + 1)
        some, every = (np.searchsorted(high, ends) for high in (self.high.max(axis=1), self.high.min(axis=1)))
        return some.tolist(), every.tolist()

    @cached_property
    def longest(self) -> Integers:
        """[M]: the most blocks each node could take in one interval."""
        found: Integers = (self.high - np.arange(self.blocks + 1)[:, None]).max(axis=0)
        return found

    @cached_property
    def apart(self) -> Floats:
        """[D, S, S]: `hops` between different sites alone."""
        apart = self.hops.copy()
        here = np.arange(self.hops.shape[1])
        apart[:, here, here] = inf
        return apart

    @cached_property
    def within(self) -> Floats:
        """[D, S]: between two nodes of one site; infinite where a site has one node."""
        here = np.arange(self.hops.shape[1])
        counts = np.bincount(self.site)
        return np.where(counts > 1, self.hops[:, here, here], inf)

    @cached_property
    def full(self) -> Floats:
        """[D, S, S]: from a node of one site to another node of another or the same."""
        full = self.apart.copy()
        here = np.arange(self.hops.shape[1])
        full[:, here, here] = self.within
        return full

    @cached_property
    def lonely(self) -> bool:
        """Every node is a site of its own."""
        return len(self.starts) == self.nodes

    def arrive(self, values: Floats, block: int) -> Floats:
        """[R, M]: min over n' other than n of values[r, n'] + net(n', n) across the boundary after `block`."""
        kind = self.kind[block]
        return self._crossed(values, self.apart[kind], self.within[kind])

    def leave(self, values: Floats, block: int) -> Floats:
        """[R, M]: min over n' other than n of net(n, n') + values[r, n'] across the boundary after `block`."""
        kind = self.kind[block]
        return self._crossed(values, self.apart[kind].T, self.within[kind])

    def _crossed(self, values: Floats, apart: Floats, within: Floats) -> Floats:
        if self.lonely:
            return least_sum(values, apart)
        least = np.minimum.reduceat(values, self.starts, axis=1)
        spread = least[:, self.site]
        # Within the site a node takes the best of the others: the site's best, unless it is that one itself.
        first = values == spread
        others = np.minimum.reduceat(np.where(first, inf, values), self.starts, axis=1)
        several = np.add.reduceat(first, self.starts, axis=1, dtype=np.int64) > 1
        others = np.where(several, least, others)
        own = np.where(first, (others + within)[:, self.site], (least + within)[:, self.site])
        return np.minimum(own, least_sum(least, apart)[:, self.site])

    def node_by_node(self) -> "Chains":
        """The same with every node a site of its own: for a few nodes one big step beats several small ones."""
        hops = self.hops[:, self.site[:, None], self.site[None, :]]
        return replace(self, site=np.arange(self.nodes), hops=hops)

    def kept(self, keep: Mask) -> "Chains":
        """The same with some nodes left out."""
        site = self.site[keep]
        used, renumbered = np.unique(site, return_inverse=True)
        return Chains(
            self.node[keep],
            renumbered.astype(np.int64),
            np.ascontiguousarray(self.prefix[:, keep]),
            np.ascontiguousarray(self.high[:, keep]),
            self.hops[:, used[:, None], used[None, :]],
            self.kind,
        )


@dataclass(frozen=True)
class Cases:
    """Ways to begin and end a chain, each solved for itself because its end depends on its beginning: A of them."""

    entry_at: Integers
    """[A]: the block before which a chain begins."""
    entry: Floats
    """[A, M]: what beginning on each node costs."""
    barred: Floats
    """[A, M]: infinite for nodes that cannot come later in the chain, else 0."""
    exits: Mapping[int, Floats]
    """[A, M] by the number of blocks done: what ending there on each node costs."""

    def kept(self, keep: Mask) -> "Cases":
        """The same with some nodes left out."""
        exits = {at: cost[:, keep] for at, cost in self.exits.items()}
        return replace(self, entry=self.entry[:, keep], barred=self.barred[:, keep], exits=exits)

    def only(self, cases: Integers) -> "Cases":
        """Some of the cases, in the order given."""
        exits = {at: cost[cases] for at, cost in self.exits.items()}
        return Cases(self.entry_at[cases], self.entry[cases], self.barred[cases], exits)


@dataclass(frozen=True)
class Completion:
    """What a chain costs from here on, at least. With a fixed number K of stages, row a * K + k is for case a and
    k more stages after this one; otherwise K is 1 and rows are cases."""

    begin: Floats
    """[L, R, M]: the stage on n begins with block i."""
    done: Floats
    """[L+1, R, M]: the stage on n has ended before block i."""
    fee: Floats
    """[A, M]: what beginning a stage on each node costs on top, in the figures above (see `fees`)."""
    stages: int | None

    @property
    def depth(self) -> int:
        return 1 if self.stages is None else self.stages

    def kept(self, keep: Mask) -> "Completion":
        return replace(self, begin=self.begin[:, :, keep], done=self.done[:, :, keep], fee=self.fee[:, keep])

    def only(self, cases: Integers) -> "Completion":
        """Some of the cases, in the order given."""
        rows = (cases[:, None] * self.depth + np.arange(self.depth)).ravel()
        return replace(self, begin=self.begin[:, rows], done=self.done[:, rows], fee=self.fee[cases])

    def bounds(self, cases: Cases) -> Floats:
        """[A]: no chain of the case costs less; a chain of distinct nodes pays each fee once at most."""
        rows = np.arange(len(cases.entry_at)) * self.depth + self.depth - 1
        found: Floats = (self.begin[cases.entry_at, rows] + cases.entry).min(axis=1, initial=inf)
        bound: Floats = found - self.fee.sum(axis=1)
        return bound

    def path(self, chains: Chains, cases: Cases, case: int) -> list[int]:
        """The columns of the nodes of the chain behind a case's finite bound, in order."""
        row = case * self.depth + self.depth - 1
        at = int(cases.entry_at[case])
        column = int((self.begin[at, row] + cases.entry[case]).argmin())
        columns = [column]
        while True:
            ends = np.arange(at + 1, int(chains.high[at, column]) + 1)
            at = int(ends[(self.done[ends, row, column] + chains.prefix[ends, column]).argmin()])
            row_left = row - (self.stages is not None)
            if at in cases.exits and cases.exits[at][case, column] <= self.done[at, row, column]:
                return columns
            hop = chains.full[chains.kind[at - 1], chains.site[column]][chains.site] + cases.barred[case]
            hop[column] = inf
            row, column = row_left, int((hop + self.begin[at, row_left]).argmin())
            columns.append(column)


def chains_of(problem: Problem, slowest_ns: float | None = None) -> Chains:
    """The problem as chains, its stages no slower than `slowest_ns` where that is given."""
    order, _, sites = by_site(problem.site_of)
    _, site = np.unique(problem.site_of[order], return_inverse=True)
    time, free = problem.time_ns[order].T, problem.free_bytes[order]
    # A block that a node must not run counts as more than all the memory that it has.
    need = np.where(problem.may_run[order].T, problem.need_bytes[order].T, free + 1)
    high = _reach(np.minimum(need, free + 1), free)
    if slowest_ns is not None:
        high = np.minimum(high, _reach(time, np.full(len(order), int(slowest_ns))))
    edge = np.zeros((1, len(order)))
    prefix = np.concatenate([edge, np.cumsum(time, axis=0, dtype=np.float64)])
    hops = problem.hop_ns[:, sites[:, None], sites[None, :]].astype(np.float64)
    return Chains(order, site.astype(np.int64), prefix, high, hops, problem.kind_of)


def completion(chains: Chains, cases: Cases, stages: int | None = None, fee: Floats | None = None) -> Completion:
    """The relaxation backwards, for every case at once: O(A * K * L * M * (longest interval))."""
    fee = np.zeros_like(cases.entry) if fee is None else fee
    blocks, count = chains.blocks, len(cases.entry_at)
    depth = 1 if stages is None else stages
    shape = (count * depth, chains.nodes)
    begin = np.full((blocks, *shape), inf)
    done = np.full((blocks + 1, *shape), inf)
    onward = np.full((blocks + 1, *shape), inf)
    barred = np.repeat(cases.barred, depth, axis=0)
    fees = np.repeat(fee, depth, axis=0)
    nothing_left = np.arange(count) * depth
    for i in range(blocks, -1, -1):
        if i < blocks:
            begin[i] = _least_ending(onward, i, chains.high[i]) - chains.prefix[i] + fees
        if not i:
            break
        if i < blocks:
            following = chains.leave(begin[i] + barred, i - 1)
            if stages is None:
                done[i] = following
            else:
                done[i].reshape(count, depth, -1)[:, 1:] = following.reshape(count, depth, -1)[:, :-1]
        if i in cases.exits:
            done[i, nothing_left] = np.minimum(done[i, nothing_left], cases.exits[i])
        np.add(done[i], chains.prefix[i], out=onward[i])
    return Completion(begin, done, fee, stages)


def by_site(site: Integers) -> tuple[Integers, Integers, Integers]:
    """Nodes ordered by site (ties as they stand), where each site begins among them, and which sites there are."""
    order = np.argsort(site, kind="stable")
    sites, starts = np.unique(site[order], return_index=True)
    return order, starts, sites


def _reach(size: Integers, limit: Integers) -> Integers:
    """[L+1, M]: the latest end of an interval that begins at i and whose sizes [L, M] add up to at most `limit`."""
    blocks, nodes = size.shape
    total = np.concatenate([np.zeros((1, nodes), np.int64), np.cumsum(size, axis=0)])
    start = np.arange(blocks + 1)[:, None]
    low, high = np.broadcast_to(start, total.shape).copy(), np.full(total.shape, blocks)
    for _ in range(blocks.bit_length()):
        middle = (low + high + 1) // 2
        fits = np.take_along_axis(total, middle, axis=0) - total <= limit
        low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
    return low


def _least_ending(values: Floats, start: int, end: Integers) -> Floats:
    """[R, M]: min over start < i <= end[n] of values[i, r, n]."""
    last, sure = int(end.max()), int(end.min())
    found: Floats = np.minimum.reduce(values[start + 1 : sure + 1], axis=0, initial=inf)
    step = max(1, _WINDOW_CELLS // max(1, found.size))
    for i in range(max(sure, start) + 1, last + 1, step):
        rows = np.arange(i, min(i + step, last + 1))
        outside = np.where(rows[:, None] > end, inf, 0.0)
        found = np.minimum(found, np.minimum.reduce(values[i : i + len(rows)] + outside[:, None, :]))
    return found


def least_sum(values: Floats, hops: Floats) -> Floats:
    """[R, S]: min over s' of values[r, s'] + hops[s', s]."""
    rows, sites = values.shape
    if rows * sites * sites <= _WINDOW_CELLS:
        found: Floats = np.minimum.reduce(values[:, :, None] + hops, axis=1)
        return found
    return np.stack([(values + hops[:, s]).min(axis=1) for s in range(sites)], axis=1)
