"""PURE: from a snapshot to the bounded list of plans that are weighed against the current one (mathematics.md A3.4).

The current plan; the best reassignment with its cuts; the best re-split; and for each node in use the best plan
without it, ready before that node fails. An operator's placement has no alternatives, and `stages` bounds them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from orchestrator.beliefs import believed, optimism_of
from orchestrator.decision import OPTIONS_MAX, Observation, Option, Origin
from orchestrator.fold import Snapshot
from orchestrator.moving import Live, Placed, Prices, move_cost
from orchestrator.planner import make_plan
from orchestrator.reassign import reassigned
from orchestrator.rooms import Room, rooms
from profiler.cost import ALONE, DEFAULT_RTT_MS, PROMPT_TOKENS, Estimate, predict
from profiler.objective import Demand, Weights
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment, Stage
from schemas.errors import ResplitError
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Plan, Route

LATENCY_REF_MS_MIN = 2.0
"""L_ref is at least this: beyond 500 tokens a second a plan that is faster still is hardly worth a move."""
FAILOVERS_MAX = OPTIONS_MAX - 3
"""The current plan, a reassignment and a re-split stand on the list too."""


@dataclass(frozen=True)
class Slate:
    """What there is to choose from now."""

    observation: Observation
    failovers: Mapping[NodeId, tuple[Stage, ...]]
    """For each node in use the best plan without it, where there is one."""
    optimism: float
    """To be handed in the next time (`beliefs.optimism_of`)."""


def slate(
    snapshot: Snapshot,
    deployment: Deployment,
    manifest: Manifest,
    current: Plan,
    *,
    optimism: float | None = None,
    avoid: frozenset[NodeId] = frozenset(),
    unfit: Mapping[NodeId, str] | None = None,
    weights: Weights | None = None,
    prices: Prices | None = None,
) -> Slate:
    """The candidates, what each costs, and what moving between any two of them costs.

    Every node of `current` must have reported once. `avoid` are nodes that no candidate but the current plan uses,
    `unfit` nodes of the current plan that must be left, each with the reason why.
    """
    unfit = unfit or {}
    times = {name: node.times for name, node in snapshot.nodes.items()}
    # A node that is to be drained is no candidate (`rooms`), and what it measured is as true as before.
    optimism = optimism_of(snapshot.present, times, manifest, deployment.model, optimism)
    heard = {name: snapshot.nodes[name].capacity for name in snapshot.nodes}
    seen = believed(heard, times, manifest, deployment.model, optimism)
    offered = {name: replace(room, capacity=seen[name]) for name, room in rooms(snapshot, deployment, manifest).items()}
    route = current.routes[0]
    alone = predict(route, seen, manifest, deployment.model)
    live, demand = _live(snapshot, deployment.name, current, alone)
    bound_ms = latency_bound_ms(offered, manifest, demand, deployment.stages or 1)
    latency_ref_ms = max(bound_ms, LATENCY_REF_MS_MIN)
    weights = weights or Weights()

    def option(stages: tuple[Stage, ...], origin: Origin, without: NodeId | None = None) -> tuple[Option, Placed]:
        way = Route(index=0, source=stages[0].node, stages=stages, max_sequences=1)
        found = predict(
            way, seen, manifest, deployment.model, demand=demand, settings=deployment.settings, weights=weights
        )
        prompt = predict(way, seen, manifest, deployment.model, PROMPT_TOKENS)
        prefill_ms = sum(stage.prefill_ms for stage in prompt.stages) / PROMPT_TOKENS
        priced = Option(stages, origin, found.objective(latency_ref_ms, weights), found.terms, without)
        return priced, Placed(stages, prefill_ms, found.tpot_ms)

    others, failovers = _alternatives(deployment, manifest, offered, current, avoid)
    chosen: dict[str, tuple[Option, Placed]] = {}
    for stages, origin, without in [(route.stages, Origin.CURRENT, None), *others]:
        made = option(stages, origin, without)
        chosen.setdefault(made[0].key, made)
    kept = list(chosen.values())[:OPTIONS_MAX]
    moves = {
        (a.key, b.key): move_cost(x, y, heard, manifest, deployment.model, live, prices or Prices())
        for a, x in kept
        for b, y in kept
        if a.key != b.key
    }
    reasons = "; ".join(unfit.values())
    bound = min(weights.alpha * bound_ms / latency_ref_ms, *(one.phi for one, _ in kept))
    observation = Observation(
        epoch=current.epoch,
        options=tuple(one for one, _ in kept),
        moves=moves,
        bound=bound,
        hard=reasons or None,
        unfit=frozenset(unfit),
        pinned=deployment.placement is not None,
    )
    return Slate(observation, failovers, optimism)


def latency_bound_ms(offered: Mapping[NodeId, Room], manifest: Manifest, demand: Demand, stages_min: int = 1) -> float:
    """A latency L that no plan beats: every block on its fastest node, and the hops that memory makes unavoidable.

    LB0 of mathematics.md A2 without its network, plus one hop for each node beyond the first that the model
    needs to fit (or is to be cut over), plus the way back. What a node holds already counts on both sides: as memory
    that the model needs, and as memory that the node has for it.
    """
    if not offered:
        return 0.0
    digest_times = [room.capacity.block_times for room in offered.values()]
    count = range(len(manifest.blocks))
    decode_ms = sum(min(times[block].decode_ms for times in digest_times) for block in count)
    prefill_ms = sum(min(times[block].prefill_ms_per_token for times in digest_times) for block in count)
    whole = [max(room.need_bytes[block] for room in offered.values()) for block in count]
    need = sum(whole)
    nodes = 0
    for able in sorted((room.free_bytes + need - sum(room.need_bytes) for room in offered.values()), reverse=True):
        if need <= 0:
            break
        need -= able
        nodes += 1
    nodes = max(nodes, stages_min)
    measured = [link.rtt_ms for room in offered.values() for link in room.capacity.links]
    hops_ms = (nodes if nodes > 1 else 0) * min([DEFAULT_RTT_MS, *measured]) / 2
    if manifest.kind is not ModelKind.DECODER:
        return decode_ms + hops_ms
    steps = demand.output_tokens
    return (PROMPT_TOKENS * prefill_ms + (steps - 1) * decode_ms) / steps + hops_ms


def _alternatives(
    deployment: Deployment,
    manifest: Manifest,
    offered: Mapping[NodeId, Room],
    current: Plan,
    avoid: frozenset[NodeId],
) -> tuple[list[tuple[tuple[Stage, ...], Origin, NodeId | None]], dict[NodeId, tuple[Stage, ...]]]:
    """Every plan worth weighing, and the failover plan of each node in use."""
    if deployment.placement is not None:
        return [], {}
    willing = {name: room for name, room in offered.items() if name not in avoid}
    found: list[tuple[tuple[Stage, ...], Origin, NodeId | None]] = []
    moved = reassigned(current.routes[0].stages, manifest, deployment.model, willing)
    if moved is not None:
        found.append((moved, Origin.REASSIGNED, None))
    split = _solved(deployment, manifest, willing, current)
    if split is not None:
        found.append((split, Origin.RESPLIT, None))
    failovers = {}
    in_use = [NodeId(node) for node in current.nodes]
    for node in in_use[:FAILOVERS_MAX]:
        without = _solved(deployment, manifest, {n: room for n, room in willing.items() if n != node}, current)
        if without is not None:
            failovers[node] = without
            found.append((without, Origin.FAILOVER, node))
    return found, failovers


def _solved(
    deployment: Deployment, manifest: Manifest, offered: Mapping[NodeId, Room], current: Plan
) -> tuple[Stage, ...] | None:
    try:
        plan = make_plan(deployment, manifest, offered, current.epoch + 1, current, "a candidate").plan
    except ResplitError:
        return None  # nothing fits without those nodes: that is an answer too
    return plan.routes[0].stages


def _live(snapshot: Snapshot, name: DeploymentName, current: Plan, alone: Estimate) -> tuple[Live, Demand]:
    """What runs now, from the heartbeats: by Little's law N sequences that take E2E each arrive N/E2E a second."""
    counts = [
        stage.sequences
        for node in current.nodes
        for stage in snapshot.nodes[NodeId(node)].capacity.stages
        if stage.deployment == name and stage.epoch == current.epoch
    ]
    count = min(max(counts, default=0), current.settings.max_sequences)
    if not count or alone.output_tokens is None or alone.e2e_ms <= 0:
        return Live(), ALONE
    # On average a sequence is half way.
    half = alone.output_tokens / 2
    demand = Demand(1e3 * (count - 1) / alone.e2e_ms, alone.output_tokens, count)
    return Live(count, PROMPT_TOKENS + half, half), demand
