"""PURE: what is best for whoever knows all of a run beforehand (mathematics.md D).

Placements are looked for as production looks for them, told the truth of the mean state and of the states of the run
that cost most. Over these candidates there are the static optimum on the mean state, the cheapest way through the run
with the price of every move in it (a dynamic programme over slots), and the bound that nobody who chooses among them
can pass: the cheapest candidate of every slot, moves being free.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
from numpy.typing import NDArray

from orchestrator.candidates import slate
from orchestrator.decision import placement_text
from orchestrator.planner import further_chain, make_plan
from orchestrator.rooms import Room
from schemas.base import NodeId
from schemas.capacity import Capacity, HostedStage
from schemas.deployment import ROUTES_MAX, Placement, blocks_by_node, nodes_of
from schemas.errors import ResplitError
from schemas.plan import Plan
from simulator.agent import LOAD_BLOCK_S
from simulator.kernel import EPOCH
from simulator.oracle import Moment, Oracle

CANDIDATES_MAX = 24
"""The dynamic programme takes their square, and pricing them all is most of what an oracle costs."""
SEARCHES_MAX = 10
"""States of a run in which placements are looked for; each gives two at most."""
WEIGHED_NODES_MAX = 16
"""Among more nodes the candidates of production, a failover for each node in use, take ten times as long as the plan
itself, and on smart-city none of them was better."""

AGREED_S = 0.5
"""To make a plan, to store its events and to hear all of its nodes."""
EARLY = 0.1
"""Of a slot: nobody can be ready to the moment."""
LOOKED_S = 1.0
"""A node loads as fast as it is so long before it serves."""
RETURNED_S = 2.5
"""From the end of what killed a node to the first word of it that the leader hears."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """A placement that is to be in force from a time on."""

    begin_s: float
    """When to begin with it: before that by what preparing it takes, and not before its nodes are there."""
    at_s: float
    placement: Placement


@dataclass(frozen=True)
class Foresight:
    """All of it, in Phi x seconds."""

    oracle: Oracle
    candidates: tuple[Placement, ...]
    """The first is the static optimum on the mean state. None at all where the model fits nowhere."""
    costs: Floats
    """[slots, candidates]: the integral of Phi over each slot."""
    moves: Floats
    """[candidates, candidates]: D from the first to the second, with nothing on a disk that is not running."""
    chosen: tuple[int, ...]
    """The candidate of each slot in the cheapest way through the run."""

    @property
    def static(self) -> Placement | None:
        return self.candidates[0] if self.candidates else None

    @property
    def schedule(self) -> tuple[Step, ...]:
        """The cheapest way, as the times at which the placement changes; each is begun once the one before it should be
        in force."""
        made: list[Step] = []
        for slot, number in enumerate(self.chosen):
            at_s, placement = self.oracle.slots[slot][0], self.candidates[number]
            if not made:
                made.append(Step(0.0, at_s, placement))
            elif placement != made[-1].placement:
                begin_s = at_s - _ahead_s(self.oracle, made[-1].placement, placement, at_s)
                begin_s = max(begin_s, made[-1].at_s, _there_s(self.oracle, placement, begin_s))
                made.append(Step(begin_s, at_s, placement))
        return tuple(made)

    @property
    def least(self) -> float:
        """What the cheapest way costs, its moves included."""
        return way_cost(self.costs, self.moves, self.chosen)

    @property
    def bound(self) -> float:
        """The free-switching bound: no way through the candidates costs less."""
        if not self.candidates:
            return self.oracle.unserved * (self.oracle.end_s - self.oracle.begin_s)
        return float(self.costs.min(axis=1).sum())


def foresee(oracle: Oracle) -> Foresight:
    """The candidates of a run, what they cost, and the cheapest way through them. The same oracle gives the same."""
    candidates, columns = _candidates(oracle)
    costs = np.array(columns, float).T.reshape(len(oracle.slots), len(candidates))
    moves = np.array(
        [[0.0 if a == b else oracle.move(a, b, oracle.mean_asked, {}).total for b in candidates] for a in candidates]
    ).reshape(len(candidates), len(candidates))
    return Foresight(oracle, tuple(candidates), costs, moves, cheapest_way(costs, moves, EARLY))


def cheapest_way(costs: Floats, moves: Floats, early: float = 0.0) -> tuple[int, ...]:
    """For each of T slots one of K candidates, so that the costs [T, K] and the moves [K, K] between successive ones
    add up to the least; the first is free to be in. Of ways that cost the same the one that stays.

    `early`: the part of the slot before it that a candidate may be in force too soon, which is counted if it is dearer
    there."""
    if not costs.size:
        return ()
    slots, count = costs.shape
    paid, came = costs[0], np.zeros((slots, count), int)
    own = np.arange(count)
    for k in range(1, slots):
        ways = paid[:, None] + moves + early * np.maximum(0.0, costs[k - 1][None, :] - costs[k - 1][:, None])
        best = ways.argmin(axis=0)
        best = np.where(ways[own, own] <= ways[best, own], own, best)
        came[k], paid = best, ways[best, own] + costs[k]
    way = [int(paid.argmin())]
    for k in range(slots - 1, 0, -1):
        way.append(int(came[k, way[-1]]))
    return tuple(reversed(way))


def way_cost(costs: Floats, moves: Floats, chosen: tuple[int, ...]) -> float:
    """What a way through slots costs, its moves included."""
    stays = sum(float(costs[k, here]) for k, here in enumerate(chosen))
    return stays + sum(float(moves[a, b]) for a, b in pairwise(chosen))


def _ahead_s(oracle: Oracle, before: Placement, after: Placement, at_s: float) -> float:
    """From beginning with a placement to its being in force at a time, as loading truly takes. Its blocks are on the
    disks by then: who knows that they will be needed has them fetched at the beginning (`simulator.office`)."""
    held, loads_s = blocks_by_node(before), [0.0]
    for node, blocks in blocks_by_node(after).items():
        fresh = blocks - held.get(node, set())
        size = sum(oracle.physics.manifest.blocks[block].weight_bytes for block in fresh)
        undisturbed_s = size / oracle.facts.specs[node].disk_bytes_per_s + LOAD_BLOCK_S * len(fresh)
        loads_s.append(undisturbed_s * oracle.facts.truth.node_factor(node, at_s - LOOKED_S))
    return AGREED_S + max(loads_s)


def _there_s(oracle: Oracle, placement: Placement, at_s: float) -> float:
    """From when on, at `at_s` or later, every node of it has said that it is back."""
    back = [oracle.facts.back_s(node, at_s) for node in nodes_of(placement)]
    return max([at_s, *(one + RETURNED_S for one in back if at_s < one < oracle.end_s)])


def _candidates(oracle: Oracle) -> tuple[list[Placement], list[list[float]]]:
    """At most `CANDIDATES_MAX` placements with their costs by slot: the best on the mean state first, then the best of
    the state that is dearest so far, with the best of all that is known, and so on."""
    states: dict[tuple[object, ...], list[int]] = {}
    for slot in range(len(oracle.slots)):
        states.setdefault(oracle.signature(slot), []).append(slot)
    found: dict[str, Placement] = {}
    columns: list[list[float]] = []

    def add(moment: Moment) -> None:
        for placement in found_in(oracle, moment):
            if len(found) < CANDIDATES_MAX and placement_text(placement) not in found:
                found[placement_text(placement)] = placement
                columns.append([oracle.cost(placement, *span) for span in oracle.slots])

    add(oracle.mean())
    for _ in range(SEARCHES_MAX - 1):
        least = np.min(columns, axis=0) if columns else np.full(len(oracle.slots), oracle.unserved)
        if not states or len(found) == CANDIDATES_MAX:
            break
        worst = max(states, key=lambda state: float(least[states[state]].sum()))
        slots = states.pop(worst)
        add(oracle.moment(max(slots, key=lambda slot: float(least[slot]))))
    return list(found.values()), columns


def found_in(oracle: Oracle, moment: Moment) -> list[Placement]:
    """The planner's best placement in a moment, and before it the best of what production would weigh against that, if
    it is better. None where none fits."""
    rooms = oracle.rooms_of(moment) if moment.capacities else {}
    planned = _planned(oracle, moment, rooms) if rooms else None
    if planned is None:
        return []
    if len(rooms) > WEIGHED_NODES_MAX:
        return [planned]
    better = min(_weighed(oracle, moment, rooms, planned), key=lambda one: oracle.price(one, moment))
    return [better, planned] if oracle.price(better, moment) < oracle.price(planned, moment) else [planned]


def _planned(oracle: Oracle, moment: Moment, rooms: dict[NodeId, Room]) -> Placement | None:
    """The planner's placement, with further routes for as long as each makes it better."""
    deployment, manifest = oracle.deployment, oracle.physics.manifest
    try:
        chains: Placement = make_plan(deployment, manifest, rooms, 1, None, "told the truth").plan.chains
    except ResplitError:
        return None  # the model does not fit on the nodes that are there
    if deployment.routes is not None:
        return chains
    while len(chains) < min(ROUTES_MAX, deployment.settings.max_sequences):
        more = further_chain(deployment, manifest, rooms, chains)
        if more is None or oracle.price((*chains, more), moment) >= oracle.price(chains, moment):
            break
        chains = (*chains, more)
    return chains


def _weighed(oracle: Oracle, moment: Moment, rooms: dict[NodeId, Room], placement: Placement) -> Iterator[Placement]:
    """What production would weigh against a placement in force."""
    deployment, manifest = oracle.deployment, oracle.physics.manifest
    insisted = deployment.model_copy(update={"placement": placement, "stages": None, "routes": None})
    plan = make_plan(insisted, manifest, rooms, 1, None, "told the truth").plan
    busy = Moment(_serving(moment, plan), moment.asked)
    found = slate(oracle.snapshot(busy), deployment, manifest, plan, now=EPOCH)
    yield from (option.chains for option in found.observation.options)


def _serving(moment: Moment, plan: Plan) -> dict[NodeId, Capacity]:
    """The nodes as they report while they run a plan, with as many sequences as there are in the moment."""
    sequences = ceil(moment.asked.demand.batch) if moment.asked.demand.requests_per_s else 0
    found = dict(moment.capacities)
    for node in nodes_of(plan.chains):
        stage = HostedStage(
            deployment=plan.deployment,
            epoch=plan.epoch,
            model=plan.model,
            blocks=plan.blocks_on(node),
            state="serving",
            sequences=sequences,
        )
        found[node] = found[node].model_copy(update={"stages": (stage,)})
    return found
