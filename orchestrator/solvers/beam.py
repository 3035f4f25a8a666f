"""PURE: beam search with a completion bound (mathematics.md A3): f = cost so far + what the relaxation says is left.

One generation is one more stage. The completion bound is that of `chains.completion`, which is LB0 with memory: a
chain that runs into a corner without memory is seen from afar.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from orchestrator.solvers.chains import Cases, Chains, Completion
from orchestrator.solvers.problem import Floats, Integers, Mask, Piece

WIDTH = 64
"""Chains kept per generation."""
BRANCH = 8
"""Nodes tried after each of them."""
_ENDS = 4
"""Ends tried of each interval: the best by the completion bound."""


@dataclass(frozen=True)
class _Generation:
    """Partial chains, the best first; all have the same number of stages."""

    case: Integers
    cost: Floats
    at: Integers
    """Blocks done."""
    node: Integers
    visited: Mask
    """[labels, M]"""
    pieces: tuple[tuple[Piece, ...], ...]


def search(
    chains: Chains, cases: Cases, bound: Completion, cutoff: float = inf, width: int = WIDTH, branch: int = BRANCH
) -> tuple[float, int, tuple[Piece, ...]]:
    """The best chain found that costs less than `cutoff`: (its cost, its case, its pieces), else (cutoff, -1, ())."""
    best, answer = cutoff, (-1, ())
    generation = _Generation(
        np.arange(len(cases.entry_at)),
        np.zeros(len(cases.entry_at)),
        cases.entry_at,
        np.full(len(cases.entry_at), -1),
        np.zeros((len(cases.entry_at), chains.nodes), bool),
        ((),) * len(cases.entry_at),
    )
    last = max(cases.exits)
    for stage in range(chains.nodes if bound.stages is None else bound.stages):
        if not len(generation.at):
            break
        cost, label, node = _begun(chains, cases, bound, generation, stage, branch, best)
        total, cost, label, node, end = _ended(chains, cases, bound, generation, stage, cost, label, node, best)
        for at, exit_cost in cases.exits.items():
            if bound.stages is not None and stage + 1 < bound.stages:
                break
            here = np.flatnonzero(end == at)
            values = cost[here] + exit_cost[generation.case[label[here]], node[here]]
            if len(here) and values.min() < best:
                k = int(here[values.argmin()])
                best = float(values.min())
                answer = (
                    int(generation.case[label[k]]),
                    (*generation.pieces[label[k]], _piece(chains, generation, int(label[k]), int(node[k]), int(end[k]))),
                )
        onward = (end < last) & (total < best)
        generation = _next(chains, cases, generation, width, total, cost, label, node, end, onward)
    return best, *answer


def _begun(
    chains: Chains,
    cases: Cases,
    bound: Completion,
    now: _Generation,
    stage: int,
    branch: int,
    best: float,
) -> tuple[Floats, Integers, Integers]:
    """Each label with each of its `branch` most promising next nodes: cost at the stage's beginning, label, node."""
    if stage:
        hops = np.empty((len(now.at), chains.nodes))
        for i, (at, node) in enumerate(zip(now.at.tolist(), now.node.tolist(), strict=True)):
            kind, site = chains.kind[at - 1], chains.site[node]
            row = chains.apart[kind, site].copy()
            row[site] = chains.within[kind, site]
            hops[i] = row[chains.site]
        hops += cases.barred[now.case] + now.cost[:, None]
        hops[now.visited] = inf
    else:
        hops = cases.entry[now.case]
    total = hops + bound.begin[np.minimum(now.at, chains.blocks - 1), _rows(bound, now.case, stage)]
    # What begins may be any of many cases: without a stage there is nothing yet to choose among.
    branch = min(max(branch, -(-WIDTH // len(now.at))), chains.nodes)
    chosen = np.argsort(total, axis=1, kind="stable")[:, :branch] if chains.nodes <= WIDTH else _least(total, branch)
    label = np.repeat(np.arange(len(now.at)), branch)
    node = chosen.ravel()
    good = total[label, node] < best
    label, node = label[good], node[good]
    return hops[label, node], label, node


def _ended(
    chains: Chains,
    cases: Cases,
    bound: Completion,
    now: _Generation,
    stage: int,
    cost: Floats,
    label: Integers,
    node: Integers,
    best: float,
) -> tuple[Floats, Floats, Integers, Integers, Integers]:
    """Each stage with its most promising ends: bound of the whole, cost, label, node, blocks done."""
    at, ends = now.at[label], np.arange(chains.blocks + 1)
    inside = (ends > at[:, None]) & (ends <= chains.high[at, node][:, None])
    spent = cost[:, None] + (chains.prefix[:, node].T - chains.prefix[at, node][:, None])
    rows = _rows(bound, now.case[label], stage)
    total = np.where(inside, spent + bound.done[:, rows, node].T, inf)
    # The chain so far plus the longest intervals of the nodes that are left must reach the end.
    left = chains.longest.sum() - now.visited @ chains.longest
    total[ends + (left[label] - chains.longest[node])[:, None] < min(cases.exits)] = inf
    chosen = np.argsort(total, axis=1, kind="stable")[:, :_ENDS]
    # The furthest end is tried too: where memory is short, what the bound likes best may leave too little of it.
    furthest = np.where(inside.any(axis=1), chains.high[at, node], 0)
    chosen = np.concatenate([chosen, furthest[:, None]], axis=1)
    pick = np.repeat(np.arange(len(label)), chosen.shape[1])
    end = chosen.ravel()
    keep = total[pick, end] < best
    pick, end = pick[keep], end[keep]
    return total[pick, end], spent[pick, end], label[pick], node[pick], end


def _next(
    chains: Chains,
    cases: Cases,
    now: _Generation,
    width: int,
    total: Floats,
    cost: Floats,
    label: Integers,
    node: Integers,
    end: Integers,
    onward: Mask,
) -> _Generation:
    order = np.flatnonzero(onward)
    order = order[np.argsort(total[order], kind="stable")]
    seen: set[tuple[int, int, int, bytes]] = set()
    chosen: list[int] = []
    for k in order.tolist():
        visited = now.visited[label[k]].copy()
        visited[node[k]] = True
        key = (int(now.case[label[k]]), int(node[k]), int(end[k]), np.packbits(visited).tobytes())
        if key not in seen:
            seen.add(key)
            chosen.append(k)
            if len(chosen) == width:
                break
    pieces = tuple(
        (*now.pieces[label[k]], _piece(chains, now, int(label[k]), int(node[k]), int(end[k]))) for k in chosen
    )
    visited = now.visited[label[chosen]]
    visited[np.arange(len(chosen)), node[chosen]] = True
    return _Generation(now.case[label[chosen]], cost[chosen], end[chosen], node[chosen], visited, pieces)


def _piece(chains: Chains, now: _Generation, label: int, node: int, end: int) -> Piece:
    return Piece(int(chains.node[node]), int(now.at[label]), end - 1)


def _rows(bound: Completion, case: Integers, stage: int) -> Integers:
    """Rows of the completion bound for the stage number `stage` of each case."""
    return case if bound.stages is None else case * bound.stages + (bound.stages - 1 - stage)


def _least(values: Floats, count: int) -> Integers:
    """[R, count]: columns of the least values of each row, the least first."""
    if count >= values.shape[1]:
        return np.argsort(values, axis=1, kind="stable")
    some = np.sort(np.argpartition(values, count - 1, axis=1)[:, :count], axis=1)
    order = np.argsort(np.take_along_axis(values, some, axis=1), axis=1, kind="stable")
    return np.take_along_axis(some, order, axis=1)
