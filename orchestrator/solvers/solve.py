"""PURE: the solver that production uses, by objective."""

from dataclasses import replace
from typing import Literal

from orchestrator.solvers import bottleneck, dssr
from orchestrator.solvers.dominance import undominated
from orchestrator.solvers.problem import Piece, Problem, Solution

Objective = Literal["latency", "throughput"]


def solve(
    problem: Problem, objective: Objective = "latency", stages: int | None = None, labels_max: int = dssr.LABELS_MAX
) -> Solution:
    """The best chain, of exactly `stages` stages where given, over all nodes: least time per token, or the fastest
    slowest stage and of those the least time per token.

    Proven optimal or infeasible unless the search needs more than `labels_max` states; the gap then says how far from
    optimal it can be. The same problem always gives the same answer: no clock and no chance is involved.
    """
    if stages is None or stages >= problem.nodes:
        return _solved(problem, objective, stages, labels_max)
    # With few stages most nodes have as many others that can always stand in for them.
    keep = undominated(problem, stages)
    found = _solved(problem.restricted(keep), objective, stages, labels_max)
    if found.pieces is None:
        return found
    return replace(found, pieces=tuple(Piece(int(keep[p.node]), p.first, p.last) for p in found.pieces))


def _solved(problem: Problem, objective: Objective, stages: int | None, labels_max: int) -> Solution:
    if objective == "throughput":
        return bottleneck.most_even(problem, stages, labels_max)
    return dssr.fastest(problem, stages, labels_max=labels_max)
