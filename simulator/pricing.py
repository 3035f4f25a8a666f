"""PURE: what the plans of a run truly cost, by the oracle: the columns that only it can fill."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from schemas.base import NodeId
from schemas.deployment import Placement
from simulator.foresight import Foresight
from simulator.oracle import Oracle
from simulator.records import Epoch, RunResult


@dataclass(frozen=True)
class Price:
    """Of one run, as means over the time in which requests arrived."""

    plans: float
    """Phi of whatever was in force."""
    moves: float
    """D of every move to another placement."""
    bound: float
    """Phi of the cheapest candidate at every time, moves being free: that of no policy."""
    least: float
    """The same where the plans that were in force count as candidates too."""

    @property
    def phi(self) -> float:
        return self.plans + self.moves

    @property
    def gap(self) -> float:
        """By how much more than the cheapest at every time the plans in force cost, of what that costs; 0 or more."""
        return self.plans / self.least - 1


def price_of(result: RunResult, known: Foresight) -> Price:
    """What a run in the world that `known` is about cost. Nobody is served before its first plan."""
    oracle = known.oracle
    whole_s = oracle.end_s - oracle.begin_s
    plans, least = 0.0, 0.0
    for number, (begin_s, end_s) in enumerate(oracle.slots):
        paid = _in_force(oracle, result.epochs, begin_s, end_s)
        plans += paid
        least += min([paid, *map(float, known.costs[number])])
    return Price(plans / whole_s, _moves(oracle, result.epochs) / whole_s, known.bound / whole_s, least / whole_s)


def priced(result: RunResult, known: Foresight) -> None:
    """Fill in what only an oracle knows."""
    price = price_of(result, known)
    result.phi, result.gap, result.phi_bound = price.phi, price.gap, price.bound


def _in_force(oracle: Oracle, epochs: Sequence[Epoch], begin_s: float, end_s: float) -> float:
    """What a time cost, in Phi x seconds."""
    total, served_s = 0.0, 0.0
    for one in epochs:
        low, high = max(begin_s, one.begin_s), min(end_s, one.end_s)
        if low < high:
            total += oracle.cost(one.placement, low, high, since_s=one.begin_s)
            served_s += high - low
    return total + oracle.unserved * (end_s - begin_s - served_s)


def _moves(oracle: Oracle, epochs: Sequence[Epoch]) -> float:
    """D of all moves in the time in which requests arrive, in Phi x seconds. A disk holds what plans have put there so
    far: what was fetched ahead of need costs its bytes when it is used."""
    disks: dict[NodeId, frozenset[int]] = {}
    total = 0.0
    for before, after in pairwise(epochs):
        _remember(disks, before.placement)
        if before.placement != after.placement and oracle.begin_s <= after.begin_s < oracle.end_s:
            asked = oracle.asked[oracle.slot_at(after.begin_s)]
            total += oracle.move(before.placement, after.placement, asked, disks).total
    return total


def _remember(disks: dict[NodeId, frozenset[int]], placement: Placement) -> None:
    for chain in placement:
        for stage in chain:
            node = NodeId(stage.node)
            disks[node] = disks.get(node, frozenset()) | frozenset(stage.blocks)
