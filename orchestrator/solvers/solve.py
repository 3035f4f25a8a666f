"""PURE: the solver that production uses, by objective."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from orchestrator.solvers import bottleneck, dssr, ushape
from orchestrator.solvers.dominance import undominated
from orchestrator.solvers.problem import Piece, Problem, Solution

Objective = Literal["latency", "throughput"]


def solve(
    problem: Problem,
    objective: Objective = "latency",
    stages: int | None = None,
    labels_max: int = dssr.LABELS_MAX,
    heads: Sequence[int] = (),
    known: Sequence[Piece] = (),
) -> Solution:
    """The best chain, of exactly `stages` stages where given, over all nodes: least time per token, or the fastest
    slowest stage and of those the least time per token.

    Proven optimal or infeasible unless the search needs more than `labels_max` states; the gap then says how far from
    optimal it can be. The same problem always gives the same answer: no clock and no chance is involved.

    `heads` are nodes that may hold the first and the last blocks at once while others hold the middle
    (`solvers.ushape`). Such a U is taken where it is faster than every chain; where stages are counted or to be even,
    only if there is no chain, and it has as many.

    `known` is a chain that may do, the one in force say: where it is a chain of this problem, only what takes less is
    looked for, and of equals it is the answer.
    """
    chain = _chain(problem, objective, stages, labels_max, known)
    chosen = chain.pieces is not None and (objective == "throughput" or stages is not None)
    if not heads or chosen or (chain.pieces is not None and len(chain.pieces) == 1):
        return chain
    # Counted stages never get here with a chain, and without one nothing is cut off.
    u = ushape.u_shaped(problem, heads, labels_max, chain.value_ns)
    fits = u.pieces is not None and (stages is None or len(u.pieces) == stages)
    best = u if fits and u.value_ns < chain.value_ns else chain
    return replace(best, bound_ns=min(u.bound_ns, chain.bound_ns))


def _chain(
    problem: Problem, objective: Objective, stages: int | None, labels_max: int, known: Sequence[Piece]
) -> Solution:
    if stages is None or stages >= problem.nodes:
        return _solved(problem, objective, stages, labels_max, known)
    # With few stages most nodes have as many others that can always stand in for them.
    keep = undominated(problem, stages)
    found = _solved(problem.restricted(keep), objective, stages, labels_max, ())
    if found.pieces is None:
        return found
    return replace(found, pieces=tuple(Piece(int(keep[p.node]), p.first, p.last) for p in found.pieces))


def _solved(
    problem: Problem, objective: Objective, stages: int | None, labels_max: int, known: Sequence[Piece]
) -> Solution:
    if objective == "throughput":
        return bottleneck.most_even(problem, stages, labels_max)
    return dssr.fastest(problem, stages, labels_max=labels_max, known=known)
