"""PURE: from a snapshot to the bounded list of plans that are weighed against the current one (mathematics.md A3.4).

The current plan; for its slowest routes the best reassignment with their cuts and the best re-split; a route more, and
fewer; and for each node in use the best plan without it, ready before that node fails. An operator's placement has no
alternatives, `stages` and `routes` bound them, and no candidate shows a sensitive block to an untrusted node (I6).
They are looked for (`search`) where there is reason to (`searched`), and priced at every look.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime

import numpy as np

from orchestrator.beliefs import believed, guessed, optimism_of, slower_times, timed
from orchestrator.chain import LATENCY_REF_MS_MIN
from orchestrator.decision import OPTIONS_MAX, Observation, Option, Origin
from orchestrator.demand import averaged, demand_of, running
from orchestrator.fold import Snapshot
from orchestrator.habits import Habit
from orchestrator.moving import Placed, Prices, move_cost, reaches_of
from orchestrator.risk import risks, slowing
from orchestrator.rooms import Room, rooms
from orchestrator.search import Search, looked_around
from orchestrator.searched import Searched
from orchestrator.strain import UNSTRAINED, Strain
from profiler.compute import CONTEXT, DECODE, TOKEN
from profiler.cost import PROMPT_TOKENS
from profiler.forecast import Forecast, forecast
from profiler.host import Host
from profiler.network import DEFAULT_RTT_MS
from profiler.objective import Demand, Weights
from profiler.sizes import sizes_of
from profiler.waiting import chunks_of
from schemas.base import NodeId
from schemas.capacity import REFERENCE_CONTEXT_TOKENS
from schemas.deployment import Deployment, Placement, Settings, nodes_of
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Plan


@dataclass(frozen=True)
class Slate:
    """What there is to choose from now."""

    observation: Observation
    failovers: Mapping[NodeId, Placement]
    """For each node in use the best plan without it, where there is one."""
    optimism: float
    """To be handed in the next time (`beliefs.optimism_of`)."""
    searched: Searched
    """The same."""
    load: float
    """The same: how many sequences run on average."""


def slate(
    snapshot: Snapshot,
    deployment: Deployment,
    manifest: Manifest,
    current: Plan,
    *,
    now: datetime,
    load: float | None = None,
    elapsed_s: float = 0.0,
    strain: Strain = UNSTRAINED,
    optimism: float | None = None,
    avoid: frozenset[NodeId] = frozenset(),
    unfit: Mapping[NodeId, str] | None = None,
    exposed: str | None = None,
    weights: Weights | None = None,
    prices: Prices | None = None,
    prepared: Placement = (),
    searched: Searched | None = None,
    anew: bool = False,
) -> Slate:
    """The candidates, what each costs, and what moving between any two of them costs.

    Every node of `current` must have reported once. `load` is the mean at the last look, `elapsed_s` ago. `avoid`
    are nodes that no candidate but the current plan uses, `unfit` nodes of the current plan that must be left, each
    with the reason why, and `exposed` says that a node of it must not hold what it holds. `searched` is the last
    search for other plans than `current`: what it found is priced anew while nothing speaks for another search
    (`searched.is_stale`); `anew` asks for one whatever it says. `prepared` is the plan being prepared, if one is.
    """
    unfit = unfit or {}
    heard = {name: node.capacity for name, node in snapshot.nodes.items()}
    in_use = {heard[NodeId(node)].machine for node in current.nodes} - {None}
    rest = {
        name: strain.at_rest(name, capacity, current.chains, now, beside=capacity.machine in in_use)
        for name, capacity in heard.items()
    }
    times = {name: slower_times(node.times, rest[name]) for name, node in snapshot.nodes.items()}
    # A node that is to be drained is no candidate (`rooms`), and what it measured is as true as before.
    optimism = optimism_of(snapshot.present, times, manifest, deployment.model, optimism)

    def as_it_is(hosts: Mapping[NodeId, Host]) -> dict[NodeId, Host]:
        """A roofline knows nothing of what others compute there."""
        return {
            name: host if deployment.model in times[name] else host.slower(rest[name]) for name, host in hosts.items()
        }

    rested = as_it_is(believed(heard, times, manifest, deployment.model, optimism))
    trusted = frozenset(name for name in rested if snapshot.trusts(name))
    idle = rooms(snapshot, deployment, manifest, rested)
    steadied = {name: slower_times(node.steady, rest[name]) for name, node in snapshot.nodes.items()}
    calm = as_it_is(timed(heard, steadied, manifest, deployment.model, optimism))

    slowings = {
        name: slowing(strain.slowness(name, capacity, current.chains, beside=capacity.machine in in_use))
        for name, capacity in heard.items()
    }

    def serving(chains: Placement) -> dict[NodeId, Host]:
        """The nodes of some routes under the strain of serving them."""
        return {node: rested[node].slower(strain.on(node, chains)) for node in nodes_of(chains)}

    def steady(chains: Placement) -> dict[NodeId, Host]:
        """The same as they are over a longer time."""
        those = guessed({node: calm[node] for node in nodes_of(chains)})
        return {node: host.slower(strain.on(node, chains)) for node, host in those.items()}

    alone = forecast(current.chains, serving(current.chains), manifest)
    habit = snapshot.habits.get(deployment.name, Habit())
    live = running(snapshot, deployment.name, current, manifest, habit)
    load = averaged(load, live.sequences, elapsed_s)
    demand = demand_of(load, habit, current, serving(current.chains), steady(current.chains), manifest)
    prompt_tokens = round(habit.prompt_tokens)

    bound_ms = latency_bound_ms(
        idle, manifest, demand, deployment.stages or 1, prompt_tokens, deployment.settings, strain.least
    )
    latency_ref_ms = max(bound_ms, LATENCY_REF_MS_MIN)
    weights = weights or Weights()

    def option(
        chains: Placement, origin: Origin, without: NodeId | None = None
    ) -> tuple[Option, Placed, dict[NodeId, float]]:
        """A plan as its nodes are now, and its Phi were one of them slow."""
        now_hosts, calm_hosts = serving(chains), steady(chains) if demand.requests_per_s else None

        def with_slow(node: NodeId | None) -> Forecast:
            return forecast(
                chains,
                _slowed(now_hosts, node, slowings),
                manifest,
                prompt_tokens,
                demand=demand,
                settings=deployment.settings,
                weights=weights,
                trusted=trusted,
                steady=None if calm_hosts is None else _slowed(calm_hosts, node, slowings),
            )

        found = with_slow(None)
        objective = found.objective(latency_ref_ms, weights)
        slowed = {
            node: with_slow(node).objective(latency_ref_ms, weights).phi
            for node in nodes_of(chains)
            if slowings[node] > 1
        }
        prefill_ms = sum(
            share * sum(stage.prefill_ms for stage in route.stages) / prompt_tokens
            for share, route in zip(found.shares, found.routes, strict=True)
        )
        slo = deployment.slo
        priced = Option(chains, origin, objective, found.terms, without, found.missing(slo), found.of_promised(slo))
        return priced, Placed(chains, prefill_ms, found.tpot_ms, found.shares), slowed

    here = option(current.chains, Origin.CURRENT)
    pinned = deployment.chains is not None
    order = sorted(range(len(alone.routes)), key=lambda number: (-alone.routes[number].tpot_ms, number))
    search = Search(
        deployment,
        manifest,
        {name: room for name, room in idle.items() if name not in avoid},
        strain.unplaced,
        current.chains,
        here[0].phi,
        tuple(order),
        load > 1,
        deployment.sensitive_of(len(manifest.blocks)),
        trusted,
    )
    if pinned:
        searched = Searched(now, here[0].phi, search.facts, ())
    else:
        searched = looked_around(search, searched, anew or exposed is not None, frozenset(unfit), now)
    failovers = {node: one.chains for node, one in searched.ready.items() if one.chains}
    # A failover plan of fewer routes than are asked for is for need alone.
    spares = [
        (chains, Origin.FAILOVER, node)
        for node, chains in failovers.items()
        if unfit or exposed or deployment.routes is None or len(chains) >= len(current.routes)
    ]
    alternatives = [(chains, origin, None) for chains, origin in searched.found]
    others: dict[Placement, tuple[Origin, NodeId | None]] = {}
    if prepared and set(nodes_of(prepared)) <= rested.keys():
        others[prepared] = (Origin.PREPARED, None)
    for chains, origin, without in [*alternatives, *spares]:
        if chains != current.chains:
            others.setdefault(chains, (origin, without))
    priced = [here, *(option(chains, *how) for chains, how in list(others.items())[: OPTIONS_MAX - 1])]
    added = risks([one.phi for one, _, _ in priced], [slowed for _, _, slowed in priced], load)
    kept = [
        (replace(one, objective=replace(one.objective, risk=risk)), placed)
        for (one, placed, _), risk in zip(priced, added, strict=True)
    ]
    # Where even the best plan has queues, whatever disturbs it disturbs more.
    dearer = (prices or Prices()).under(max(1.0, min(one.objective.latency for one, _ in kept)))
    reaches = reaches_of(heard, deployment.model)
    moves = {
        (a.key, b.key): move_cost(x, y, reaches, manifest, live, dearer)
        for a, x in kept
        for b, y in kept
        if a.key != b.key
    }
    reasons = "; ".join((*unfit.values(), *([exposed] if exposed else [])))
    bound = min(weights.alpha * bound_ms / latency_ref_ms, *(one.phi for one, _ in kept))
    observation = Observation(
        epoch=current.epoch,
        options=tuple(one for one, _ in kept),
        moves=moves,
        bound=bound,
        hard=reasons or None,
        unfit=frozenset(unfit),
        pinned=pinned,
        model_bytes=sum(sizes_of(manifest).weight_bytes),
    )
    return Slate(observation, failovers, optimism, searched, load)


def _slowed(
    hosts: Mapping[NodeId, Host], node: NodeId | None, slowings: Mapping[NodeId, float]
) -> Mapping[NodeId, Host]:
    """Nodes as they are, but for one that is slow."""
    return hosts if node is None else {**hosts, node: hosts[node].slower(slowings[node])}


def latency_bound_ms(
    offered: Mapping[NodeId, Room],
    manifest: Manifest,
    demand: Demand,
    stages_min: int = 1,
    prompt_tokens: int = PROMPT_TOKENS,
    settings: Settings | None = None,
    strain: float = 1.0,
) -> float:
    """A latency L that no plan beats: every block on its fastest node, and the hops that memory makes unavoidable.

    LB0 of mathematics.md A2 without its network, plus one hop for each node beyond the first that the model
    needs to fit (or is to be cut over), plus the way back. What a node holds already counts on both sides: as memory
    that the model needs, and as memory that the node has for it. It holds for every route, so for all of them. All
    nodes are `strain` times slower than the rooms say.
    """
    if not offered:
        return 0.0
    settings = settings or Settings()
    chunks, last = chunks_of(prompt_tokens, settings.chunk_tokens)
    # A cache shorter than the one that times are quoted behind makes a step shorter, for each sequence in it.
    short = max(0.0, REFERENCE_CONTEXT_TOKENS - prompt_tokens - demand.output_tokens / 2)

    times = np.stack([room.host.times.ms for room in offered.values()])
    saved_ms = short * np.stack([room.host.times.rows_min for room in offered.values()]) * times[:, CONTEXT]
    decode_ms = strain * float(np.maximum(0.0, times[:, DECODE] - saved_ms).min(axis=0).sum())
    tokens = np.array([last if block.role == "head" else prompt_tokens for block in manifest.blocks])
    # As many chunks as may be in flight are computed at once, at best.
    prefill_ms = strain * float((tokens * times[:, TOKEN].min(axis=0)).sum()) / min(settings.pipeline_depth, chunks)
    whole = [max(need) for need in zip(*(room.need_bytes for room in offered.values()), strict=True)]
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
    return (prefill_ms + (steps - 1) * decode_ms) / steps + hops_ms
