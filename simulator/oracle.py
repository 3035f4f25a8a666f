"""PURE: what a placement truly costs at any time of a run: Phi of mathematics.md A1 by the functions that decide in
production, told the truth about nodes and links (`simulator.facts`) and about what will be asked.

Time goes in slots of a planning period, of which the middle stands for the whole; only when nodes are away counts
exactly. Two things the oracle does not know: faults whose victims depend on who decides (`Where.in_plan`), and how
long a node that is back takes to load its blocks.
"""

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log2
from statistics import fmean

from orchestrator.chain import LATENCY_REF_MS_MIN
from orchestrator.fold import Node, Snapshot
from orchestrator.habits import Habit
from orchestrator.moving import Live, MoveCost, Placed, Prices, move_cost, reaches_of
from orchestrator.pricing import latency_bound_ms
from orchestrator.rooms import Room, rooms
from orchestrator.trigger import PLANNING_PERIOD_S
from profiler.compute import times_of
from profiler.forecast import Forecast, forecast
from profiler.host import hosts_of
from profiler.memory import memory_bytes
from profiler.objective import Demand, Weights
from schemas.base import NodeId
from schemas.capacity import Capacity, StoredBlocks
from schemas.deployment import Placement, blocks_by_node, nodes_of
from simulator.draws import Draws
from simulator.facts import Facts, Pair, Span, stepped
from simulator.kernel import EPOCH
from simulator.model import Physics, physics_of
from simulator.records import Arrival
from simulator.scenario import Scenario
from simulator.traces import TraceRow
from simulator.truth import Truth, timeline
from simulator.wishes import DEPLOYMENT, deployment_of, trusted_of
from simulator.workload import arrivals

SLOTS_MAX = 1000
"""Of a run longer than an hour and a half slots are longer than a planning period."""
WINDOW_S = 30.0
"""Over which requests are counted: of the few in a slot no rate can be told."""
MEAN_SAMPLES = 48
"""Of nodes and links, for their mean state over a run."""
WEIGHTS, PRICES = Weights(), Prices()
"""Those of production."""


@dataclass(frozen=True)
class Asked:
    """What is asked of the deployment at a time."""

    demand: Demand
    prompt_tokens: int

    @property
    def live(self) -> Live:
        """The sequences that a move would take along, each half way on average (`orchestrator.demand.running`)."""
        if not self.demand.requests_per_s:
            return Live()
        half = self.demand.output_tokens / 2
        return Live(round(self.demand.batch), self.prompt_tokens + half, half)


@dataclass(frozen=True)
class Moment:
    """A state of the world in which placements are looked for."""

    capacities: Mapping[NodeId, Capacity]
    asked: Asked


class Oracle:
    """What costs how much in one scenario and seed, whoever decides in it."""

    def __init__(self, scenario: Scenario, physics: Physics, truth: Truth, requests: Sequence[Arrival]) -> None:
        self.physics, self.facts = physics, Facts(scenario, physics, truth)
        self.deployment, self.trusted = deployment_of(scenario, physics), trusted_of(scenario)
        self.begin_s, self.end_s = scenario.warmup_s, scenario.duration_s
        count = min(max(1, round((self.end_s - self.begin_s) / PLANNING_PERIOD_S)), SLOTS_MAX)
        self._width_s = (self.end_s - self.begin_s) / count
        self.slots: tuple[Span, ...] = tuple(
            (self.begin_s + k * self._width_s, self.begin_s + (k + 1) * self._width_s) for k in range(count)
        )
        self._priced: dict[tuple[object, ...], float] = {}
        self._fitting: dict[Placement, bool] = {}
        self._bounds_ms: dict[tuple[int, int], float] = {}
        lengths = _mean_lengths(scenario, requests)
        self.offered = self.rooms_of(Moment(self.facts.undisturbed(), Asked(Demand(), lengths[0])))
        self.latency_ref_ms = max(self._bound_ms(*lengths), LATENCY_REF_MS_MIN)
        """L_ref of the whole run: for the mean request, what no plan beats on the cluster undisturbed."""
        timeout_ms = 1e3 * scenario.timeout_s / lengths[1]
        full = WEIGHTS.overload * (1 - WEIGHTS.rho_safe)
        self.unserved = WEIGHTS.alpha * timeout_ms / self.latency_ref_ms + WEIGHTS.beta * full
        """Phi of not being served, one constant whoever decides: the mean request takes the hard timeout, and a node
        has no time left. No placement counts as worse."""
        self.mean_asked = self._asked(len(requests) / (self.end_s - self.begin_s), *lengths)
        self.asked = tuple(self._asked_around(requests, sum(span) / 2, lengths) for span in self.slots)
        """By slot."""

    # What a placement costs.

    def cost(self, placement: Placement | None, begin_s: float, end_s: float, *, since_s: float | None = None) -> float:
        """The integral of Phi over what of a time is within the run, in Phi x seconds; None is served by nobody.

        A route one of whose nodes is away serves nobody. Its ingress, if that is there, keeps its part of the requests
        waiting, and the routes that are whole have the others. `since_s`: the placement is that of a plan in force from
        then on, whose routes that lost a process serve nobody until another plan is. Otherwise they do once their nodes
        are back.
        """
        begin_s, end_s = max(begin_s, self.begin_s), min(end_s, self.end_s)
        if end_s <= begin_s:
            return 0.0
        if placement is None or not self.fits(placement):
            return self.unserved * (end_s - begin_s)
        total = 0.0
        for low, high, whole, kept in self._whole(placement, begin_s, end_s, since_s):
            if not whole:
                total += (high - low) * self.unserved
                continue
            part = len(whole) / (len(whole) + kept)
            total += (high - low) * (1 - part) * self.unserved
            for number in range(self.slot_at(low), len(self.slots)):
                first, last = max(low, self.slots[number][0]), min(high, self.slots[number][1])
                if first >= high:
                    break
                total += max(0.0, last - first) * part * self.phi(whole, number)
        return total

    def slot_at(self, at_s: float) -> int:
        """The slot of a time within the run."""
        return min(int((at_s - self.begin_s) / self._width_s), len(self.slots) - 1)

    def phi(self, placement: Placement, slot: int) -> float:
        """Phi of a placement in the middle of a slot as if all of its nodes were there; at most `unserved`."""
        at_s, asked = sum(self.slots[slot]) / 2, self.asked[slot]
        nodes, pairs = nodes_of(placement), _pairs_of(placement)
        factors = tuple(self.facts.truth.node_factor(node, at_s) for node in nodes)
        steps = tuple(self.facts.link_step(*pair, at_s) for pair in pairs)
        key = (placement, asked, factors, steps)
        if key not in self._priced:
            self._priced[key] = self.price(placement, Moment(self.facts.capacities(nodes, pairs, at_s), asked))
        return self._priced[key]

    def price(self, placement: Placement, moment: Moment) -> float:
        """Phi of a placement in a moment that has all of its nodes; at most `unserved`."""
        return min(self._forecast(placement, moment).objective(self.latency_ref_ms, WEIGHTS).phi, self.unserved)

    def move(
        self, before: Placement, after: Placement, asked: Asked, disks: Mapping[NodeId, frozenset[int]]
    ) -> MoveCost:
        """D(before -> after) of mathematics.md A4 on the cluster undisturbed, in the same units as `cost`. `disks` are
        blocks that nodes have files of beside those that they run."""
        nodes = nodes_of((*before, *after))
        known = self.facts.capacities(nodes, [(a, b) for a in nodes for b in nodes if a != b], None)
        capacities = {
            name: capacity.model_copy(
                update={"on_disk": (StoredBlocks.of(self.physics.digest, disks.get(name, frozenset())),)}
            )
            for name, capacity in known.items()
        }
        here, there = (self._placed(one, Moment(capacities, asked)) for one in (before, after))
        reaches = reaches_of(capacities, self.physics.digest)
        return move_cost(here, there, reaches, self.physics.manifest, asked.live, PRICES)

    def fits(self, placement: Placement) -> bool:
        """Whether every node has the memory for its blocks, and may hold them."""
        if placement not in self._fitting:
            manifest, settings = self.physics.manifest, self.deployment.settings
            secret = self.deployment.sensitive_of(len(manifest.blocks))
            self._fitting[placement] = all(
                sum(memory_bytes(manifest.blocks[block], settings) for block in blocks)
                <= self.facts.specs[node].memory_bytes
                and (node in self.trusted or not secret & blocks)
                for node, blocks in blocks_by_node(placement).items()
            )
        return self._fitting[placement]

    # What placements are looked for in.

    def moment(self, slot: int) -> Moment:
        """The truth in the middle of a slot."""
        return Moment(self.facts.present(sum(self.slots[slot]) / 2), self.asked[slot])

    def mean(self) -> Moment:
        """The mean state of the whole run."""
        times = [sum(span) / 2 for span in self.slots[:: max(1, len(self.slots) // MEAN_SAMPLES)]]
        return Moment(self.facts.mean(self.begin_s, self.end_s, times), self.mean_asked)

    def signature(self, slot: int) -> tuple[object, ...]:
        """Equal for slots in which the same goes wrong and, within a factor of two, as much is asked. What links do by
        themselves from slot to slot is not in it."""
        at_s, rate = sum(self.slots[slot]) / 2, self.asked[slot].demand.requests_per_s
        spells = (one for one in self.facts.truth.spells if one.kind not in ("lie", "leader"))
        wrong = frozenset((one.what, one.kind, one.factor) for one in spells if one.begin_s <= at_s < one.end_s)
        return wrong, round(log2(rate)) if rate else None

    def snapshot(self, moment: Moment) -> Snapshot:
        """The moment as production would know it."""
        nodes = {}
        for name, capacity in moment.capacities.items():
            times = times_of(capacity.block_times)
            nodes[name] = Node(capacity, EPOCH, times=times, steady=times)
        return Snapshot(
            term=1,
            nodes=nodes,
            trust={node: node in self.trusted for node in nodes},
            deployments={DEPLOYMENT: self.deployment},
            manifests={self.deployment.model: self.physics.manifest},
            habits={DEPLOYMENT: Habit(moment.asked.prompt_tokens, moment.asked.demand.output_tokens, said=1.0)},
        )

    def rooms_of(self, moment: Moment) -> dict[NodeId, Room]:
        return rooms(self.snapshot(moment), self.deployment, self.physics.manifest)

    # Demand.

    def _asked_around(self, requests: Sequence[Arrival], at_s: float, mean: tuple[int, int]) -> Asked:
        """What arrives around a time, in whole steps."""
        low, high = max(self.begin_s, at_s - WINDOW_S / 2), min(self.end_s, at_s + WINDOW_S / 2)
        first, last = (bisect_left(requests, edge, key=lambda one: one.at_s) for edge in (low, high))
        here = requests[first:last]
        if not here:
            return self._asked(0.0, *mean)
        prompt, output = fmean(one.prompt_tokens for one in here), fmean(one.output_tokens for one in here)
        return self._asked(stepped(len(here) / (high - low)), round(stepped(prompt)), round(stepped(output)))

    def _asked(self, rate: float, prompt_tokens: int, output_tokens: int) -> Asked:
        """So many requests a second. As many run at once as by Little's law where each takes the bound's time: one
        figure for all placements, as production prices all of its candidates under one demand."""
        e2e_s = output_tokens * self._bound_ms(prompt_tokens, output_tokens) / 1e3
        batch = min(max(1.0, rate * e2e_s), float(self.deployment.settings.max_sequences))
        return Asked(Demand(rate, output_tokens, batch), prompt_tokens)

    def _bound_ms(self, prompt_tokens: int, output_tokens: int) -> float:
        key = (prompt_tokens, output_tokens)
        if key not in self._bounds_ms:
            settings, stages = self.deployment.settings, self.deployment.stages or 1
            demand, manifest = Demand(output_tokens=output_tokens), self.physics.manifest
            self._bounds_ms[key] = latency_bound_ms(self.offered, manifest, demand, stages, prompt_tokens, settings)
        return self._bounds_ms[key]

    def _whole(
        self, placement: Placement, begin_s: float, end_s: float, since_s: float | None
    ) -> Iterator[tuple[float, float, Placement, int]]:
        """A time in pieces in which nobody comes or goes: from when to when, the routes that are whole, and how many of
        the others have their ingress."""
        away = [self.facts.away(nodes_of((chain,)), begin_s, end_s, since_s=since_s) for chain in placement]
        doors = [self.facts.away([NodeId(chain[0].node)], begin_s, end_s, since_s=since_s) for chain in placement]
        edges = sorted({begin_s, end_s, *(edge for spans in (*away, *doors) for span in spans for edge in span)})
        for low, high in pairwise(edges):
            whole = tuple(chain for chain, spans in zip(placement, away, strict=True) if not _within(low, spans))
            open_ = sum(not _within(low, spans) for spans in doors)
            yield low, high, whole, open_ - len(whole)

    def _forecast(self, placement: Placement, moment: Moment) -> Forecast:
        return forecast(
            placement,
            hosts_of(moment.capacities, self.physics.manifest, self.physics.digest),
            self.physics.manifest,
            moment.asked.prompt_tokens,
            demand=moment.asked.demand,
            settings=self.deployment.settings,
            weights=WEIGHTS,
            trusted=self.trusted,
        )

    def _placed(self, placement: Placement, moment: Moment) -> Placed:
        found = self._forecast(placement, moment)
        prefill_ms = sum(
            share * sum(stage.prefill_ms for stage in route.stages) / moment.asked.prompt_tokens
            for share, route in zip(found.shares, found.routes, strict=True)
        )
        return Placed(placement, prefill_ms, found.tpot_ms, found.shares)


def oracle_of(
    scenario: Scenario, seed: int, trace: Sequence[TraceRow] | None = None, physics: Physics | None = None
) -> Oracle:
    """That of the world which `simulator.world` makes of the same arguments. Raises what drawing them raises."""
    draws = Draws(seed)
    physics = physics or physics_of(scenario.model)
    return Oracle(scenario, physics, timeline(scenario, draws), arrivals(scenario, draws, trace))


def _mean_lengths(scenario: Scenario, requests: Sequence[Arrival]) -> tuple[int, int]:
    """Prompt and output of the mean request; where nobody asks, of the classes."""
    kinds = scenario.workload.classes
    if requests:
        weighed = [(1.0, one.prompt_tokens, one.output_tokens) for one in requests]
    else:
        weighed = [(kind.share, kind.prompt_tokens, kind.output_tokens) for kind in kinds]
    whole = sum(weight for weight, _, _ in weighed)
    prompt = sum(weight * tokens for weight, tokens, _ in weighed) / whole
    output = sum(weight * tokens for weight, _, tokens in weighed) / whole
    return max(1, round(prompt)), max(1, round(output))


def _within(at_s: float, spans: Sequence[Span]) -> bool:
    return any(a <= at_s < b for a, b in spans)


def _pairs_of(placement: Placement) -> tuple[Pair, ...]:
    """The links that it uses: between stages, and back to the first."""
    ends = [ends for chain in placement for ends in (*pairwise(chain), (chain[-1], chain[0]))]
    return tuple(dict.fromkeys((NodeId(a.node), NodeId(b.node)) for a, b in ends if a.node != b.node))
