"""PURE: the U-shaped private form: one trusted node holds the first and the last interval (mathematics.md A1).

Prompts enter and tokens leave on the head node, other nodes see activations alone. Every head and every length of its
first interval is a case of the chain in between; the chain ends wherever the head's memory, which counts both
intervals, lets it take over again. Nothing is added for the way home: the last stage is the first one's node.
"""

from collections.abc import Sequence
from math import inf

import numpy as np

from orchestrator.solvers.chains import Cases, Chains, chains_of, completion
from orchestrator.solvers.dssr import LABELS_MAX, TABLE_CELLS, settle
from orchestrator.solvers.problem import Floats, Piece, Problem, Solution


def u_shaped(problem: Problem, heads: Sequence[int], labels_max: int = LABELS_MAX, cutoff_ns: float = inf) -> Solution:
    """The U of least latency over all `heads` that takes less than `cutoff_ns`; a head that holds everything alone is
    one as well. Where there is none, the bound is no more than the cut-off: beyond it nobody looked."""
    chains = chains_of(problem)
    value, bound, labels = cutoff_ns, inf, 0
    pieces: tuple[Piece, ...] | None = None
    ways: list[tuple[int, Cases]] = []
    for head in heads:
        alone = problem.need_bytes[head].sum() <= problem.free_bytes[head] and problem.may_run[head].all()
        if alone and problem.time_ns[head].sum() < value:
            value, pieces = float(problem.time_ns[head].sum()), (Piece(head, 0, problem.blocks - 1),)
        cases = _cases(problem, chains, head)
        if len(cases.entry_at):
            ways.append((head, cases))
    for (head, cases), bounds in zip(ways, _bounds(chains, [cases for _, cases in ways]), strict=True):
        some = np.flatnonzero(bounds < value)
        if len(some):
            found, _ = settle(chains, cases.only(some), bounds[some], None, value, labels_max - labels)
            labels += found.labels
            bounds[some] = found.bounds
            if found.case >= 0:
                last = Piece(head, found.pieces[-1].last + 1, problem.blocks - 1)
                first = Piece(head, 0, found.pieces[0].first - 1)
                value, pieces = found.value, (first, *found.pieces, last)
        bound = min(bound, float(bounds.min()))
    return Solution(pieces, inf if pieces is None else value, min(bound, value), "u-shape")


def _bounds(chains: Chains, ways: Sequence[Cases]) -> list[Floats]:
    """By head, what no chain of each of its cases costs less than. Numpy's calls cost more than their work here: heads
    share them, as many as one table has room for."""
    found: list[Floats] = []
    size = max(1, TABLE_CELLS // max(1, chains.nodes * chains.blocks * max((len(c.entry_at) for c in ways), default=1)))
    for begin in range(0, len(ways), size):
        some = ways[begin : begin + size]
        together = _together(some)
        bounds = completion(chains, together).bounds(together)
        found += np.split(bounds, np.cumsum([len(cases.entry_at) for cases in some])[:-1])
    return found


def _together(ways: Sequence[Cases]) -> Cases:
    """The cases of several heads, one after the other."""
    ends = sorted({last for cases in ways for last in cases.exits})
    exits = {
        last: np.concatenate([cases.exits.get(last, np.full(cases.entry.shape, inf)) for cases in ways])
        for last in ends
    }
    return Cases(
        np.concatenate([cases.entry_at for cases in ways]),
        np.concatenate([cases.entry for cases in ways]),
        np.concatenate([cases.barred for cases in ways]),
        exits,
    )


def _cases(problem: Problem, chains: Chains, head: int) -> Cases:
    """One case per length of the head's first interval."""
    blocks = problem.blocks
    time = np.concatenate([[0], np.cumsum(problem.time_ns[head])])
    need = np.concatenate([[0], np.cumsum(problem.need_bytes[head])])
    barred = np.concatenate([[0], np.cumsum(~problem.may_run[head])])
    away = chains.node != head
    site, sites = problem.site_of[head], problem.site_of[chains.node]
    # By the blocks of the first interval and by where the last one begins: whether the head can hold both.
    able = need[:, None] + need[-1] - need[None, :] <= problem.free_bytes[head]
    able &= barred[:, None] + barred[-1] - barred[None, :] == 0
    able &= np.triu(np.ones_like(able), 1)
    able[[0, blocks - 1, blocks], :] = able[:, [0, blocks]] = False
    firsts, lasts = np.flatnonzero(able.any(axis=1)), np.flatnonzero(able.any(axis=0))
    entry = np.full((len(firsts), chains.nodes), inf)
    for row, first in enumerate(firsts.tolist()):
        out = problem.hop_ns[problem.kind_of[first - 1], site, sites]
        entry[row, away] = (time[first] + out)[away]
    exits = {}
    for last in lasts.tolist():
        back = time[-1] - time[last] + problem.hop_ns[problem.kind_of[last - 1], sites, site]
        exits[last] = np.where(able[firsts, last][:, None] & away, back, inf)
    closed = np.broadcast_to(np.where(away, 0.0, inf), entry.shape).copy()
    return Cases(firsts, entry, closed, exits)
