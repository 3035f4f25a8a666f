"""PURE: LB0, the bound that holds for every plan (mathematics.md A2).

    T(b, n) = min over n' of T(b-1, n') + net(n', n) + t[b, n]

Nodes may be used again and memory is ignored, so no chain costs less. By sites it is O(S * L * (M + S^2)).
"""

from math import inf

import numpy as np

from orchestrator.solvers.chains import by_site, least_sum
from orchestrator.solvers.problem import Floats, Problem


def lb0(problem: Problem) -> float:
    """No chain has less latency; infinite where some block may run nowhere."""
    return float(lb0_by_start(problem).min())


def lb0_by_start(problem: Problem) -> Floats:
    """[S]: no chain that begins on a node of the site has less latency; infinite where none can begin."""
    order, starts, sites = by_site(problem.site_of)
    time = np.where(problem.may_run, problem.time_ns, inf)[order].T
    site = problem.site_of[order]
    # Row s: chains that begin on site s. Backwards, `rest` is what remains after block i on each node, in order.
    home = problem.home_ns.astype(float)
    rest: Floats = home.T[:, site]
    for block in range(problem.blocks - 1, 0, -1):
        onward = time[block] + rest
        least = np.minimum.reduceat(onward, starts, axis=1)
        hop = problem.hop_ns[problem.kind_of[block - 1]][:, sites]
        cross = least_sum(least, hop.T.astype(float))
        rest = np.minimum(onward, cross[:, site])
    value = np.full(problem.sites, inf)
    onward = time[0] + rest
    for index, number in enumerate(sites):
        end = starts[index + 1] if index + 1 < len(starts) else problem.nodes
        value[number] = onward[number, starts[index] : end].min()
    # A chain of one stage is at home already, which a home of its own on the diagonal would deny.
    alone = time.sum(axis=0)
    np.minimum.at(value, site, alone)
    return value
