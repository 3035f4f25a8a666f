"""Planning: how fast, and how far from the best there could be.

    python -m benchmarks.planning [--quick]

Random clusters: speeds and memory differ from node to node, latency grows with the distance of sites, every node has
room for 10 to 40 % of the model, and for 3 to 10 % in the last size. Each is planned for several seeds;
a row has the median and the worst. Times are CPU seconds of one call on one thread, the least of three calls where they
take less than two seconds. HiGHS and the subset programme are given the same instances where they can take them.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from math import inf

import numpy as np

from benchmarks.table import Row, report
from orchestrator.solvers import baselines, subset_dp
from orchestrator.solvers.lb0 import lb0
from orchestrator.solvers.milp import by_milp
from orchestrator.solvers.problem import Problem, Solution, holds, latency_ns, site_hops
from orchestrator.solvers.solve import solve

BOUNDARY_BYTES = 16_384
"""A hidden state of 4,096 numbers in fp32."""
TOKEN_BYTES = 8
MILP_LIMIT_S = 60.0
CALLS, CALLS_S = 3, 2.0
"""Calls of one solver on one instance at most, and seconds after which there is no other."""


@dataclass(frozen=True)
class Size:
    """Clusters of one size, and what planning one may take."""

    nodes: int
    sites: int
    blocks: int
    gap_target: float | None
    seconds_target: float | None
    exact: bool = False
    """Whether HiGHS and the subset programme are asked as well."""
    room: tuple[float, float] = (0.1, 0.4)
    """Memory of a node as a share of the model's, from and to."""


SIZES = (
    Size(8, 8, 34, 0.0, 0.05, exact=True),
    Size(14, 5, 34, 0.0, 0.05, exact=True),
    Size(14, 14, 34, 0.0, 0.05, exact=True),
    Size(1000, 20, 80, 0.01, 1.0),
    Size(5000, 20, 80, 0.05, 5.0),
    Size(1000, 20, 80, None, None, room=(0.03, 0.1)),
)


def cluster(size: Size, seed: int) -> Problem:
    """A random cluster on which the model needs three stages or more."""
    rng = np.random.default_rng(seed)
    nodes, blocks = size.nodes, size.blocks
    speed = np.exp(rng.normal(0, 0.6, nodes))
    work_ns = 1e6 * (1 + 0.05 * rng.random(blocks))
    time_ns = work_ns[None] / speed[:, None] * np.exp(rng.normal(0, 0.03, (nodes, blocks)))
    need_bytes = np.full((nodes, blocks), 100_000_000)
    free_bytes = rng.uniform(*size.room, nodes) * need_bytes[0].sum()
    place = rng.random((size.sites, 2))
    latency_ns = 2e5 + 1e7 * np.linalg.norm(place[:, None] - place[None], axis=2)
    gbit_s = rng.uniform(0.05, 1, (size.sites, size.sites))
    gbit_s = np.minimum(gbit_s, gbit_s.T)
    np.fill_diagonal(gbit_s, 1)
    hops, kinds = site_hops(latency_ns, 8 / gbit_s, [BOUNDARY_BYTES] * (blocks - 1) + [TOKEN_BYTES])
    site = rng.permutation(np.arange(nodes) % size.sites)
    return Problem(np.rint(time_ns).astype(np.int64), need_bytes, free_bytes.astype(np.int64), hops, site, kinds)


def by_subsets(problem: Problem) -> Solution:
    """The subset programme as a solution."""
    pieces = subset_dp.fastest(problem)
    value = inf if pieces is None else float(latency_ns(problem, pieces))
    return Solution(pieces, value, value, "subset-dp")


def by_highs(problem: Problem) -> Solution:
    return by_milp(problem, MILP_LIMIT_S)


def measure(seeds: int, exact_seeds: int) -> list[Row]:
    rows = []
    for size in SIZES:
        problems = [cluster(size, seed) for seed in range(seeds)]
        answers, seconds = _timed(solve, problems)
        rows.append(_row("DSSR", size, answers, seconds, [a.bound_ns for a in answers]))
        bounds = [a.bound_ns for a in answers]
        rows[-1]["lb0_gap_median"] = round(
            statistics.median(a.value_ns / lb0(p) - 1 for a, p in zip(answers, problems, strict=True)), 4
        )
        if size.exact:
            for name, solver in (("subset programme", by_subsets), ("HiGHS", by_highs)):
                few = problems[:exact_seeds]
                others, seconds = _timed(solver, few)
                rows.append(_row(name, size, others, seconds, [o.bound_ns for o in others]))
                for other, ours in zip(others, answers, strict=False):
                    assert not (other.proven and ours.proven) or abs(other.value_ns - ours.value_ns) < 1, "disagreement"
        for name, baseline in (
            ("even", baselines.even),
            ("greedy", baselines.greedy),
            ("round-robin", baselines.round_robin),
            ("random", lambda problem: baselines.random(problem, 0)),
            ("EdgeShard's programme", baselines.edgeshard),
        ):
            # EdgeShard's keeps a row per pair of nodes: at thousands it takes minutes and gigabytes.
            if name.startswith("Edge") and size.nodes > 1000:
                continue
            others, seconds = _timed(baseline, problems)
            rows.append(_row(name, size, others, seconds, bounds))
    return rows


def _timed(solver: Callable[[Problem], Solution], problems: list[Problem]) -> tuple[list[Solution], list[float]]:
    answers, seconds = [], []
    for problem in problems:
        taken: list[float] = []
        while len(taken) < CALLS and sum(taken) < CALLS_S:
            started = time.process_time()
            answer = solver(problem)
            taken.append(time.process_time() - started)
        seconds.append(min(taken))
        assert answer.pieces is None or holds(problem, answer.pieces), "a plan that does not hold"
        answers.append(answer)
    return answers, seconds


def _row(name: str, size: Size, answers: list[Solution], seconds: list[float], bounds: list[float]) -> Row:
    """Gaps against the bound each answer is compared with; a plan that was not found counts in `found` alone."""
    gaps = [max(0.0, a.value_ns / b - 1) for a, b in zip(answers, bounds, strict=True) if a.pieces is not None]
    row: Row = {
        "name": name,
        "nodes": size.nodes,
        "sites": size.sites,
        "blocks": size.blocks,
        "room": "{:.0%} to {:.0%}".format(*size.room),
        "found": f"{len(gaps)}/{len(answers)}",
        "proven": f"{sum(a.proven for a in answers)}/{len(answers)}",
        "gap_median": round(statistics.median(gaps), 5) if gaps else None,
        "gap_worst": round(max(gaps), 5) if gaps else None,
        "seconds_median": round(statistics.median(seconds), 4),
        "seconds_worst": round(max(seconds), 4),
    }
    if name == "DSSR" and size.gap_target is not None:
        row |= {"gap_target": size.gap_target, "seconds_target": size.seconds_target}
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="three seeds instead of eleven, one for HiGHS")
    arguments = parser.parse_args()
    seeds, exact_seeds = (3, 1) if arguments.quick else (11, 1)
    solve(cluster(SIZES[0], 0))  # numpy and scipy warm up
    rows = measure(seeds, exact_seeds)
    report("planning", "planning random clusters", rows, seeds=seeds, exact_seeds=exact_seeds)


if __name__ == "__main__":
    main()
