"""PURE: from a snapshot to the bounded list of plans that are weighed against the current one (mathematics.md A3.4).

The current plan; for its slowest routes the best reassignment with their cuts and the best re-split; a route more, and
fewer; and for each node in use the best plan without it, ready before that node fails. An operator's placement has no
alternatives, `stages` and `routes` bound them, and no candidate shows a sensitive block to an untrusted node (I6).
They are looked for (`search`) where there is reason to (`searched`), and priced at every look.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from orchestrator.chain import LATENCY_REF_MS_MIN
from orchestrator.conditions import conditions_of
from orchestrator.decision import OPTIONS_MAX, Observation, Origin
from orchestrator.demand import averaged, demand_of, running
from orchestrator.fold import Snapshot
from orchestrator.habits import Habit
from orchestrator.moving import Prices, move_cost, reaches_of
from orchestrator.pricing import Priced, Pricing, latency_bound_ms, with_risk
from orchestrator.rooms import rooms
from orchestrator.search import Search, looked_around
from orchestrator.searched import Searched
from orchestrator.strain import UNSTRAINED, Strain
from profiler.forecast import forecast
from profiler.objective import Weights
from profiler.sizes import sizes_of
from schemas.base import NodeId
from schemas.deployment import Deployment, Placement, nodes_of
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Plan

WAITING = 2.0
"""Requests that by Little's law run or wait: where so many do, some wait, and a further route has work though hardly
more than one runs at a time."""
MISSING_MORE = 0.02
"""Of all requests: fewer are no reason to keep a route."""


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
    conditions = conditions_of(snapshot, manifest, deployment.model, current, strain, optimism, now)
    rested = conditions.rested
    trusted = frozenset(name for name in rested if snapshot.trusts(name))
    idle = rooms(snapshot, deployment, manifest, rested)

    here_now = conditions.serving(current.chains)
    habit = snapshot.habits.get(deployment.name, Habit())
    live = running(snapshot, deployment.name, current, manifest, habit)
    load = averaged(load, live.sequences, elapsed_s)
    arrivals = snapshot.arrivals.get(deployment.name)
    rate = 0.0 if arrivals is None or manifest.kind is not ModelKind.DECODER else arrivals.per_s(now)
    demand = demand_of(rate, load, habit)
    prompt_tokens = round(habit.prompt_tokens)

    bound_ms = latency_bound_ms(
        idle, manifest, demand, deployment.stages or 1, prompt_tokens, deployment.settings, strain.least
    )
    latency_ref_ms = max(bound_ms, LATENCY_REF_MS_MIN)
    weights = weights or Weights()
    pricing = Pricing(deployment, manifest, conditions, demand, prompt_tokens, trusted, latency_ref_ms, weights)
    here = pricing.price(current.chains, Origin.CURRENT)
    alone = forecast(current.chains, here_now, manifest)
    pinned = deployment.chains is not None
    order = sorted(range(len(alone.routes)), key=lambda number: (-alone.routes[number].tpot_ms, number))
    search = Search(
        deployment,
        manifest,
        {name: room for name, room in idle.items() if name not in avoid},
        strain.unplaced,
        current.chains,
        here.option.phi,
        tuple(order),
        load > 1 or rate * here.e2e_s > WAITING,
        deployment.sensitive_of(len(manifest.blocks)),
        trusted,
    )
    if pinned:
        searched = Searched(now, here.option.phi, search.facts, ())
    else:
        searched = looked_around(search, searched, anew or exposed is not None, frozenset(unfit), now)
    failovers = {node: one.chains for node, one in searched.ready.items() if one.chains}
    in_need = bool(unfit) or exposed is not None
    others: dict[Placement, tuple[Origin, NodeId | None]] = {}
    if prepared and set(nodes_of(prepared)) <= rested.keys():
        others[prepared] = (Origin.PREPARED, None)
    for chains, origin in searched.found:
        others.setdefault(chains, (origin, None))
    for node, chains in failovers.items():
        # One of fewer routes than are asked for is for need alone.
        if in_need or deployment.routes is None or len(chains) >= len(current.routes):
            others.setdefault(chains, (Origin.FAILOVER, node))
    others.pop(current.chains, None)
    priced = [here, *(pricing.price(chains, *how) for chains, how in list(others.items())[: OPTIONS_MAX - 1])]
    peak = 0.0 if arrivals is None else arrivals.peak_per_s(now)
    if peak > rate and not in_need:
        priced = _kept_for_peaks(priced, replace(pricing, demand=replace(demand, requests_per_s=peak)))
    kept = with_risk(priced, load)
    # Where even the best plan has queues, whatever disturbs it disturbs more.
    dearer = (prices or Prices()).under(max(1.0, min(one.objective.latency for one, _ in kept)))
    reaches = reaches_of(conditions.heard, deployment.model)
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
    return Slate(observation, failovers, conditions.optimism, searched, load)


def _kept_for_peaks(priced: Sequence[Priced], peak: Pricing) -> list[Priced]:
    """Without those that give a route back which was needed lately: with the highest rate of the last minutes more
    requests would miss what is promised than with the current plan, the first."""
    routes = len(priced[0].option.chains)
    if all(len(one.option.chains) >= routes for one in priced):
        return list(priced)
    allowed = MISSING_MORE + peak.missing(priced[0].option.chains)
    return [one for one in priced if len(one.option.chains) >= routes or peak.missing(one.option.chains) <= allowed]
