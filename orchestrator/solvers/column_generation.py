"""PURE: several models on one set of nodes, by column generation (mathematics.md A2, joint multi-model).

A column is a whole chain of one model. The master programme chooses among columns so that every node's memory and
compute suffice; its duals price both, and DSSR finds the chain that is best at these prices, per model:

    t' = lambda_m * t + pi_n * W_b + mu_n * lambda_m * t

Every round proves a bound: sum over models of the cheapest chain at the prices, less the prices of all there is.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, linprog, milp

from orchestrator.solvers.dssr import fastest
from orchestrator.solvers.problem import Floats, Piece, Problem, latency_ns
from schemas.errors import ErrorCode, ResplitError

ROUNDS = 30
"""Of pricing, at most."""
ORDERS = 8
"""Random orders of the models in which chains are placed one after another, for the first columns."""
GAP = 1e-3
"""Good enough: the rounds end."""
_FINE = 1 << 10
"""Priced figures are whole 1024ths of a weighted nanosecond, rounded down, which keeps the bound a bound."""
_LABELS = 2_000_000
"""States that pricing one chain may visit."""


@dataclass(frozen=True)
class JointSolution:
    """Chains for all models together, their weighted latency, and what no choice of chains undercuts."""

    pieces: tuple[tuple[Piece, ...], ...] | None
    value_ns: float
    bound_ns: float

    @property
    def gap(self) -> float:
        """(UB - LB) / LB; 0 where proven."""
        if self.bound_ns >= self.value_ns:
            return 0.0
        return (self.value_ns - self.bound_ns) / self.bound_ns if self.bound_ns > 0 else inf


@dataclass(frozen=True)
class _Column:
    model: int
    pieces: tuple[Piece, ...]
    cost: float
    need: Floats
    """[M]: bytes on each node."""
    busy: Floats
    """[M]: weighted time on each node."""


def joint(
    problems: Sequence[Problem], weights: Sequence[float], busy_ns_max: Sequence[float] | None = None, seed: int = 0
) -> JointSolution:
    """Least sum of weight * latency over all models. `weights` are rates, such as tokens per second; `busy_ns_max` [M],
    where given, bounds the sum of weight * time on each node. All problems name the same nodes with the same memory.

    The first chains are placed greedily in random orders drawn from `seed`. Raises INVALID_REQUEST on contradictions.
    """
    free = problems[0].free_bytes
    if len(problems) != len(weights) or any(not np.array_equal(p.free_bytes, free) for p in problems):
        message = "joint planning needs one weight per model, and the same nodes with the same free_bytes for all"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "weights")
    if not all(0 < weight < inf for weight in weights):
        raise ResplitError(ErrorCode.INVALID_REQUEST, "weights must be finite numbers above 0", "weights")
    limits = np.full(len(free), inf) if busy_ns_max is None else np.asarray(busy_ns_max, float)
    bounds = [weight * fastest(p, labels_max=_LABELS).bound_ns for p, weight in zip(problems, weights, strict=True)]
    bound = float(sum(bounds))
    if bound == inf:
        return JointSolution(None, inf, inf)
    columns, best = _first_columns(problems, weights, limits, seed)
    for _ in range(ROUNDS):
        value = sum(column.cost for column in best) if best else inf
        if value <= bound * (1 + GAP):
            break
        duals = _prices(problems, columns, free, limits)
        new, proven = _priced(problems, weights, limits, duals)
        bound = max(bound, proven)
        known = {(column.model, column.pieces) for column in columns}
        fresh = [column for column in new if (column.model, column.pieces) not in known]
        if not fresh:
            break
        columns += fresh
        best = min((best, _chosen(problems, columns, free, limits)), key=_total)
    if not best:
        return JointSolution(None, inf, bound)
    value = float(_total(best))
    return JointSolution(tuple(column.pieces for column in best), value, min(bound, value))


def _total(chosen: Sequence[_Column]) -> float:
    return sum(column.cost for column in chosen) if chosen else inf


def _column(problem: Problem, model: int, weight: float, pieces: tuple[Piece, ...]) -> _Column:
    need, busy = np.zeros(problem.nodes), np.zeros(problem.nodes)
    for p in pieces:
        need[p.node] += problem.need_bytes[p.node, p.first : p.last + 1].sum()
        busy[p.node] += weight * problem.time_ns[p.node, p.first : p.last + 1].sum()
    return _Column(model, pieces, weight * latency_ns(problem, pieces), need, busy)


def _first_columns(
    problems: Sequence[Problem], weights: Sequence[float], limits: Floats, seed: int
) -> tuple[list[_Column], list[_Column]]:
    """Chains placed one model after another, and the best order's chains where one placed all (by model)."""
    rng = np.random.default_rng(seed)
    columns: dict[tuple[int, tuple[Piece, ...]], _Column] = {}
    best: list[_Column] = []
    for _ in range(ORDERS):
        left, idle = problems[0].free_bytes.copy(), limits.copy()
        placed: list[_Column] = []
        for model in rng.permutation(len(problems)).tolist():
            problem = problems[model]
            # A node without compute left for the whole model is left out: rough, and only a beginning.
            may = problem.may_run & (weights[model] * problem.time_ns.sum(axis=1) <= idle)[:, None]
            found = fastest(replace(problem, free_bytes=left, allowed=may), labels_max=_LABELS).pieces
            if found is None:
                break
            column = _column(problem, model, weights[model], found)
            columns[model, found] = column
            placed.append(column)
            left = left - column.need.astype(np.int64)
            idle = idle - column.busy
        if len(placed) == len(problems):
            best = min((best, sorted(placed, key=lambda column: column.model)), key=_total)
    return list(columns.values()), best


def _rows(problems: Sequence[Problem], columns: Sequence[_Column], limits: Floats) -> tuple[Floats, Floats, Floats]:
    """Memory and compute used per column as shares of what there is [2M, columns], what is there, and one per model."""
    free = np.maximum(problems[0].free_bytes.astype(float), 1)
    bounded = limits < inf
    use = np.stack([np.concatenate([c.need / free, (c.busy / limits)[bounded]]) for c in columns], axis=1)
    have = np.concatenate([problems[0].free_bytes / free, np.ones(int(bounded.sum()))])
    one = np.stack([np.arange(len(problems)) == c.model for c in columns], axis=1).astype(float)
    return use, have, one


def _prices(
    problems: Sequence[Problem],
    columns: Sequence[_Column],
    free: np.ndarray[tuple[int], np.dtype[np.int64]],
    limits: Floats,
) -> tuple[Floats, Floats]:
    """(pi, mu): what a byte, and a nanosecond of compute, of each node is worth to the relaxed master programme."""
    count = len(problems)
    # Each model may also go unserved, at a price that makes it the last resort: the programme always has a solution.
    dear = 10 * max((column.cost for column in columns), default=1.0)
    cost = [column.cost for column in columns] + [dear] * count
    nothing = np.zeros(len(free))
    idle = [_Column(model, (), dear, nothing, nothing) for model in range(count)]
    use, have, one = _rows(problems, [*columns, *idle], limits)
    found = linprog(cost, A_ub=use, b_ub=have, A_eq=one, b_eq=np.ones(count), method="highs")
    shadow = -np.minimum(found.ineqlin.marginals, 0)
    mu = np.zeros(len(free))
    mu[limits < inf] = shadow[len(free) :] / limits[limits < inf]
    return shadow[: len(free)] / np.maximum(free, 1), mu


def _priced(
    problems: Sequence[Problem], weights: Sequence[float], limits: Floats, duals: tuple[Floats, Floats]
) -> tuple[list[_Column], float]:
    """The best chain of each model at the prices, and the bound that they prove."""
    pi, mu = duals
    bound = -float(pi @ problems[0].free_bytes) - float(mu[limits < inf] @ limits[limits < inf])
    columns = []
    for model, (problem, weight) in enumerate(zip(problems, weights, strict=True)):
        time = weight * (1 + mu)[:, None] * problem.time_ns + pi[:, None] * problem.need_bytes
        priced = replace(
            problem,
            time_ns=np.floor(time * _FINE).astype(np.int64),
            hop_ns=np.floor(weight * problem.hop_ns * _FINE).astype(np.int64),
        )
        found = fastest(priced, labels_max=_LABELS)
        bound += found.bound_ns / _FINE
        if found.pieces is not None:
            columns.append(_column(problem, model, weight, found.pieces))
    return columns, bound


def _chosen(
    problems: Sequence[Problem],
    columns: Sequence[_Column],
    free: np.ndarray[tuple[int], np.dtype[np.int64]],
    limits: Floats,
) -> list[_Column]:
    """One column per model, the cheapest that fit together; empty where none do."""
    use, have, one = _rows(problems, columns, limits)
    found = milp(
        [column.cost for column in columns],
        integrality=np.ones(len(columns)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(use, ub=have), LinearConstraint(one, 1, 1)],
        options={"time_limit": 10.0},
    )
    if found.x is None:
        return []
    chosen = [column for column, taken in zip(columns, found.x, strict=True) if taken > 0.5]
    # HiGHS allows a millionth more than there is; a node does not.
    fits = (sum(column.need for column in chosen) <= free).all()
    return sorted(chosen, key=lambda column: column.model) if fits else []
