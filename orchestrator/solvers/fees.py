"""PURE: fees on nodes, which make the relaxation dislike what it must not do: use a node twice.

    max over fee >= 0 of  min over chains of  cost + sum_n fee_n * (stages on n - 1)

is a lower bound for chains of distinct nodes (Lagrange; a node used once pays and gets back, one not used gets at
most too much). Without fees a chain goes to and fro between the two fastest nodes; with them it spreads. The fees
climb by Polyak's steps towards the best value known. They are whole nanoseconds, so sums stay exact.
"""

from dataclasses import dataclass
from math import inf

import numpy as np

from orchestrator.solvers import beam
from orchestrator.solvers.chains import Cases, Chains, Completion, completion
from orchestrator.solvers.passes import Rows, run
from orchestrator.solvers.problem import Floats, Piece

ROUNDS = 12
"""Steps that the fees climb, at most."""
PACE = 0.3
"""Of Polyak's step: the value known is above the bound that fees can reach, so a whole step goes too far."""
_SEARCH_EVERY = 4
"""Rounds between two beams and eliminations of nodes."""
_STALE = 3
"""Rounds without a gain of a hundredth after which the fees stay."""


@dataclass(frozen=True)
class Tight:
    """The relaxation with good fees, over the nodes that can still be part of a better chain."""

    chains: Chains
    cases: Cases
    """All of them: those that are closed by their bound too."""
    table: Completion
    bounds: Floats
    """[A]: no chain of the case costs less."""
    value: float
    case: int
    """-1 where nothing better than the cut-off was found."""
    pieces: tuple[Piece, ...]
    labels: int


def climb(
    chains: Chains, cases: Cases, stages: int | None, cutoff: float, labels_max: int, search: bool = True
) -> Tight:
    """The relaxation of every case with fees of its own, starting from none."""
    fee = np.zeros_like(cases.entry)
    count = len(cases.entry_at)
    depth = stages or 1
    best = completion(chains, cases, stages, fee)
    bounds = best.bounds(cases)
    table, held = best, bounds
    value, found = cutoff, -1
    pieces: tuple[Piece, ...] = ()
    labels, stale, mark = 0, 0, float(bounds.min(initial=inf))
    pace = np.full(count, PACE)
    for round_number in range(ROUNDS):
        if round_number % _SEARCH_EVERY == 0:
            if search:
                better, case, chain = beam.search(chains, cases, best, value)
                if case >= 0:
                    value, found, pieces = better, case, chain
            open_cases = np.flatnonzero(bounds < value)
            if value < inf and len(open_cases):
                live = run(chains, cases, best, Rows.first(open_cases, stages), (), value).live_nodes
                labels += len(open_cases) * depth * chains.nodes * chains.blocks
                if live.sum() < 0.8 * chains.nodes:
                    chains, cases, best, fee = chains.kept(live), cases.kept(live), best.kept(live), fee[:, live]
                    table = table.kept(live)
                    if not live.any():
                        bounds = np.maximum(bounds, value)
                        break
        labels += count * depth * chains.nodes * chains.blocks
        open_cases = np.flatnonzero(bounds < value)
        if not len(open_cases) or labels > labels_max or stale > _STALE:
            break
        fee = _stepped(chains, cases, table, held, open_cases, fee, value, pace)
        table = completion(chains, cases, stages, fee)
        held = table.bounds(cases)
        gained = held > bounds
        pace = np.where(gained, pace, pace * 0.9)
        best = _merged(best, table, gained)
        bounds = np.maximum(bounds, held)
        least = float(bounds[open_cases].min())
        stale, mark = (0, least) if least > mark * 1.01 else (stale + 1, mark)
    return Tight(chains, cases, best, bounds, value, found, pieces, labels)


def _stepped(
    chains: Chains,
    cases: Cases,
    table: Completion,
    held: Floats,
    open_cases: np.ndarray[tuple[int], np.dtype[np.int64]],
    fee: Floats,
    value: float,
    pace: Floats,
) -> Floats:
    """One subgradient step of every open case: nodes used twice get dearer, nodes with a fee and not used cheaper."""
    fee = fee.copy()
    for case in open_cases.tolist():
        used = np.bincount(table.path(chains, cases, case), minlength=chains.nodes) - 1.0
        used[(fee[case] == 0) & (used < 0)] = 0
        length = float(used @ used)
        if not length:
            continue
        goal = value if value < inf else held[case] * 1.1
        step = pace[case] * max(goal - held[case], 0.0) / length
        fee[case] = np.maximum(np.rint(fee[case] + step * used), 0)
    return fee


def _merged(best: Completion, table: Completion, gained: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> Completion:
    """Case by case whichever of two tables has the better bound."""
    if gained.all():
        return table
    rows = np.repeat(gained, table.depth)
    begin, done, fee = best.begin.copy(), best.done.copy(), best.fee.copy()
    begin[:, rows], done[:, rows], fee[gained] = table.begin[:, rows], table.done[:, rows], table.fee[gained]
    return Completion(begin, done, fee, table.stages)
