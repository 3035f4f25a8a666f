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
from orchestrator.solvers.problem import Floats, Integers, Mask, Piece

ROUNDS = 8
"""Steps that the fees climb, at most."""
PACE = 0.3
"""Of Polyak's step: the value known is above the bound that fees can reach, so a whole step goes too far."""
_SEARCH_EVERY = 4
"""Rounds between two beams and eliminations of nodes."""
FEW_NODES = 32
"""Up to here a narrow beam is enough, and nodes are not worth leaving out."""
FEW_ROUNDS = 4
"""Steps for so few nodes: passes are cheaper then."""
_STALE = 3
"""Rounds without a gain of a hundredth after which the fees stay."""


@dataclass(frozen=True)
class Tight:
    """The relaxation with good fees, of the cases that are still open, over the nodes that can still be part of a
    better chain."""

    chains: Chains
    cases: Cases
    table: Completion
    open_cases: Integers
    """Which cases of those given these are."""
    bounds: Floats
    """[A], of all cases given: no chain of the case costs less."""
    fee: Floats
    """[A, M], of all cases and nodes given: the fees that prove the bounds."""
    value: float
    case: int
    """Of those given; -1 where nothing better than the cut-off was found."""
    pieces: tuple[Piece, ...]
    labels: int


def climb(
    chains: Chains, cases: Cases, stages: int | None, cutoff: float, labels_max: int, fee: Floats | None = None
) -> Tight:
    """The relaxation of every case with fees of its own, beginning with `fee` [A, M] or with none."""
    fees = np.zeros_like(cases.entry) if fee is None else fee.copy()
    now, columns = np.arange(len(cases.entry_at)), np.arange(chains.nodes)
    best = table = completion(chains, cases, stages, fees)
    bounds = best.bounds(cases)
    held, pace = bounds.copy(), np.full(len(now), PACE)
    value, found, labels, stale, mark = cutoff, -1, 0, 0, 0.0
    pieces: tuple[Piece, ...] = ()
    few = chains.nodes <= FEW_NODES
    size = (beam.WIDTH // 4, beam.BRANCH // 2) if few else (beam.WIDTH, beam.BRANCH)
    for step in range(FEW_ROUNDS if few else ROUNDS):
        labels += len(now) * best.depth * chains.nodes * chains.blocks
        if step % _SEARCH_EVERY == _SEARCH_EVERY - 1:
            better, case, chain = beam.search(chains, cases, best, value, *size)
            if case >= 0:
                value, found, pieces = better, int(now[case]), chain
        left = bounds[now] < value
        if not left.all():
            keep = np.flatnonzero(left)
            cases, best, table = cases.only(keep), best.only(keep), table.only(keep)
            now, held, pace = now[keep], held[keep], pace[keep]
        if value < inf and step % _SEARCH_EVERY in (0, _SEARCH_EVERY - 1) and not few and len(now):
            live = run(chains, cases, best, Rows.first(np.arange(len(now)), stages), (), value).live_nodes
            if live.sum() < 0.8 * chains.nodes:
                chains, cases, best, table = chains.kept(live), cases.kept(live), best.kept(live), table.kept(live)
                columns = columns[live]
                # Fees of nodes that are out of the question are nobody's credit any more.
                bounds[now] = np.maximum(bounds[now], best.bounds(cases) if live.any() else value)
        if not (bounds[now] < value).any() or labels > labels_max or stale > _STALE:
            break
        table = completion(chains, cases, stages, _stepped(chains, cases, table, held, value, pace))
        held = table.bounds(cases)
        gained = held > bounds[now]
        pace = np.where(gained, pace, pace * 0.9)
        best = _merged(best, table, gained)
        fees[np.ix_(now[gained], columns)] = table.fee[gained]
        bounds[now] = np.maximum(bounds[now], held)
        least = float(bounds[now].min())
        stale, mark = (0, least) if least > mark * 1.01 else (stale + 1, mark)
    if value == inf and len(now):
        # However little there is to spend, a chain to serve with comes first.
        value, case, pieces = beam.search(chains, cases, best, value, *size)
        found = int(now[case]) if case >= 0 else -1
    return Tight(chains, cases, best, now, bounds, fees, value, found, pieces, labels)


def _stepped(chains: Chains, cases: Cases, table: Completion, held: Floats, value: float, pace: Floats) -> Floats:
    """One subgradient step of every case: nodes used twice get dearer, nodes with a fee and not used cheaper."""
    fee = table.fee.copy()
    for case in range(len(fee)):
        if held[case] == inf:
            continue
        used = np.bincount(table.path(chains, cases, case), minlength=chains.nodes) - 1.0
        used[(fee[case] == 0) & (used < 0)] = 0
        length = float(used @ used)
        if length:
            goal = value if value < inf else held[case] * 1.1
            fee[case] = np.maximum(np.rint(fee[case] + pace[case] * max(goal - held[case], 0.0) / length * used), 0)
    return fee


def _merged(best: Completion, table: Completion, gained: Mask) -> Completion:
    """Case by case whichever of two tables has the better bound."""
    if gained.all():
        return table
    rows = np.repeat(gained, table.depth)
    begin, done, fee = best.begin.copy(), best.done.copy(), best.fee.copy()
    begin[:, rows], done[:, rows], fee[gained] = table.begin[:, rows], table.done[:, rows], table.fee[gained]
    return Completion(begin, done, fee, table.stages)
