"""PURE: nodes that another node can always stand in for (mathematics.md A3)."""

import numpy as np

from orchestrator.solvers.problem import Floats, Integers, Mask, Problem


def undominated(problem: Problem, stages_max: int) -> Integers:
    """The nodes, ascending, without those that a best plan of at most `stages_max` stages can do without.

    A node goes if `stages_max` others of its site are no slower, need no more memory on every block, have no less of
    it and may run whatever it may: one of them is idle whenever it works, and has the same links. Of equals the one
    that stands first counts as better.
    """
    size = problem.free_bytes[:, None].astype(float)
    # What a node must not run takes it for ever.
    time = np.where(problem.may_run, problem.time_ns, np.inf)
    return _with_few_rivals(problem, np.concatenate([time, problem.need_bytes, -size], axis=1), stages_max)


def core_nodes(problem: Problem, rivals_max: int) -> Integers:
    """The nodes, ascending, with fewer than `rivals_max` others on their site that are both faster and roomier on the
    whole. A guess at the nodes worth using, not a proof."""
    time = np.where(problem.may_run, problem.time_ns, problem.time_ns.max()).mean(axis=1)
    need = np.maximum(problem.need_bytes.mean(axis=1), 1)
    return _with_few_rivals(problem, np.stack([time, -problem.free_bytes / need], axis=1), rivals_max)


def _with_few_rivals(problem: Problem, costs: Floats, rivals_max: int) -> Integers:
    """The nodes that fewer than `rivals_max` nodes of their site are at most as costly as in every column."""
    keep: Mask = np.ones(problem.nodes, bool)
    for site in np.unique(problem.site_of):
        members = np.flatnonzero(problem.site_of == site)
        if len(members) <= rivals_max:
            continue
        ranked = members[np.lexsort((members, costs[members].sum(axis=1)))]
        cost = costs[ranked]
        no_dearer = np.ones((len(ranked), len(ranked)), bool)
        for column in np.unique(cost, axis=1).T:
            no_dearer &= column[:, None] <= column[None, :]
        # Equals: only the one that stands before counts.
        mutual = no_dearer & no_dearer.T
        no_dearer &= ~mutual | (ranked[:, None] < ranked[None, :])
        np.fill_diagonal(no_dearer, False)
        keep[ranked[no_dearer.sum(axis=0) >= rivals_max]] = False
    return np.flatnonzero(keep)
