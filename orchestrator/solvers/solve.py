"""PURE: the solver that production uses, by objective."""

from typing import Literal

from orchestrator.solvers import bottleneck, dssr
from orchestrator.solvers.problem import Problem, Solution

Objective = Literal["latency", "throughput"]


def solve(
    problem: Problem, objective: Objective = "latency", stages: int | None = None, labels_max: int = dssr.LABELS_MAX
) -> Solution:
    """The best chain, of exactly `stages` stages where given, over all nodes: least time per token, or the fastest
    slowest stage and of those the least time per token.

    Proven optimal or infeasible unless the search needs more than `labels_max` states; the gap then says how far from
    optimal it can be. The same problem always gives the same answer: no clock and no chance is involved.
    """
    if objective == "throughput":
        return bottleneck.most_even(problem, stages, labels_max)
    return dssr.fastest(problem, stages, labels_max=labels_max)
