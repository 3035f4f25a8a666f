"""PURE: the objective of mathematics.md A1, Phi = alpha*L/L_ref + beta*U + gamma*P, and what it is made of.

A fourth term, C, is what the plan takes: delta * (sum of prices per hour) + copies * (copies of the model beyond one).

Each term is a field, so that whoever reads a decision sees what decided it. Nothing here knows how a time was
predicted: `profiler.cost` fills these values in.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite

from schemas.base import NodeId
from schemas.deployment import Stage
from schemas.errors import ErrorCode, ResplitError

RHO_COUNTED_MAX = 0.95
"""The queue formula has a pole at 1. What lies beyond this is charged to U instead, where it cannot be missed."""
EDGE_SENSITIVITY = 1.0
"""The first block reads the prompt and the last one writes the answer."""
INNER_SENSITIVITY = 0.5
"""Depth is not protection: 88.4 % of prompt tokens were recovered from deep activations (mathematics.md A1)."""


@dataclass(frozen=True)
class Weights:
    """How the terms of Phi are weighed against each other. Raises INVALID_REQUEST for what is no weight."""

    alpha: float = 1.0
    """Of latency. 1 makes Phi read as "so many times the reference latency" while nothing else matters."""
    beta: float = 0.2
    """Of load balance: the worst imbalance there is (0.5) then weighs as much as a tenth of the reference latency."""
    gamma: float = 1.0
    """Of privacy: one sensitive block on an untrusted node weighs as much as doubling the reference latency."""
    delta: float = 0.25
    """Of money: a node that costs 1 an hour weighs as much as a quarter of the reference latency."""
    copies: float = 0.25
    """Of what a further copy of the model takes, the memory and the energy of its nodes. It is more than what another
    plan must save to count as better (`orchestrator.trigger.MARGIN`), so a route without work is given back."""
    overload: float = 5.0
    """K_o: a node a tenth above `rho_safe` weighs as much as the worst imbalance."""
    rho_safe: float = 0.7
    """Where queues begin to grow fast: rho/(1-rho) is 2.3 here and 9 at 0.9."""

    def __post_init__(self) -> None:
        _refuse_unusable(self)


@dataclass(frozen=True)
class Demand:
    """The work that arrives at one route. Raises INVALID_REQUEST for what is no demand."""

    requests_per_s: float = 0.0
    """lambda; 0 asks for the latency of one sequence alone."""
    output_tokens: int = 128
    """Nout: a short answer. It weighs TTFT against TPOT."""
    batch: float = 1.0
    """Sequences that run at once, and share decode steps."""
    ahead_tokens: float = 0.0
    """Of prompts that are to be computed before one that is admitted now."""

    def __post_init__(self) -> None:
        _refuse_unusable(self)
        if self.output_tokens < 1 or self.batch < 1:
            message = f"output_tokens is {self.output_tokens} and batch {self.batch:g}; both are at least 1"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "demand")


@dataclass(frozen=True)
class NodeTerm:
    """What one node bears of a route."""

    node: NodeId
    rho: float
    """Share of its time that the demand keeps it busy; above 1 it cannot keep up."""
    wait_ms: float
    """w: how long a step waits before it runs there."""
    busy_ms: float
    """One step of the sequences that share it, over all of its stages."""
    memory_bytes: int | None
    """Weights and caches it must hold; None where nobody said with which settings."""
    energy_mj: float | None
    """Millijoules per token; None where its power is not known."""


@dataclass(frozen=True)
class Objective:
    """Phi of one route and its three terms, already weighed."""

    latency: float
    """alpha*L/L_ref"""
    balance: float
    """beta*U"""
    privacy: float
    """gamma*P"""
    cost: float = 0.0
    """C: what the plan takes in money, and in memory and energy for further copies of the model."""
    risk: float = 0.0
    """What one of its nodes, were it slow, would add (`orchestrator.risk`)."""

    @property
    def phi(self) -> float:
        return self.latency + self.balance + self.privacy + self.cost + self.risk

    @property
    def terms(self) -> dict[str, float]:
        """What an audit event or an explanation shows of it."""
        named = {
            "phi": self.phi,
            "phi_latency": self.latency,
            "phi_balance": self.balance,
            "phi_privacy": self.privacy,
            "phi_cost": self.cost,
            "phi_risk": self.risk,
        }
        return {name: round(value, 4) for name, value in named.items()}


def queue_wait_ms(rho: float, service_ms: float) -> float:
    """w ~ rho/(1-rho) * (ca2+cs2)/2 * E[s] with both variabilities 1 (mathematics.md A1)."""
    counted = min(rho, RHO_COUNTED_MAX)
    return counted / (1 - counted) * service_ms


def imbalance(loads: Sequence[float], weights: Weights) -> float:
    """U = mean |rho_n - mean rho| + K_o * sum max(rho_n - rho_safe, 0), over the nodes of a route."""
    mean = sum(loads) / len(loads)
    spread = sum(abs(rho - mean) for rho in loads) / len(loads)
    return spread + weights.overload * sum(max(rho - weights.rho_safe, 0) for rho in loads)


def upkeep(prices_per_hour: Iterable[float], copies: float, weights: Weights) -> float:
    """C: the price of the nodes in use, and the copies of the model beyond the first, weighed."""
    return weights.delta * sum(prices_per_hour) + weights.copies * max(0.0, copies - 1)


def exposure(stages: Iterable[Stage], block_count: int, trusted: frozenset[NodeId] | None) -> float:
    """P = sum of sensitivities on untrusted nodes + those of boundaries that cross into or out of trust.

    `trusted` None means that every node is: there are no tiers.
    """
    if trusted is None:
        return 0.0
    placed = list(stages)
    blocks = sum(sensitivity(b, block_count) for s in placed if s.node not in trusted for b in s.blocks)
    pairs = pairwise(placed)
    cuts = sum(sensitivity(a.last, block_count) for a, b in pairs if (a.node in trusted) != (b.node in trusted))
    return blocks + cuts


def sensitivity(block: int, block_count: int) -> float:
    """sigma_b: what a block sees of the prompt or the answer."""
    return EDGE_SENSITIVITY if block in (0, block_count - 1) else INNER_SENSITIVITY


def energy_mj_per_token(nodes: Iterable[NodeTerm]) -> float | None:
    """Over the whole route, or None while the power of one of its nodes is not known."""
    total = 0.0
    for node in nodes:
        if node.energy_mj is None:
            return None
        total += node.energy_mj
    return total


def node_energy_mj(busy_ms: float, watts: float | None) -> float | None:
    """Watts times milliseconds are millijoules; None where the power is not known."""
    return None if watts is None else watts * busy_ms


def _refuse_unusable(value: "Weights | Demand") -> None:
    for name, number in vars(value).items():
        if not isfinite(number) or number < 0:
            message = f"{name} is {number}; it must be a finite number, 0 or more"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, name)
