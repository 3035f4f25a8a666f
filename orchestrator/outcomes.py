"""PURE: what requests met against what was predicted for them, per deployment.

A heartbeat of an ingress names the requests that ended there. Each is held against what the nodes had shown when it
was admitted, not against what running it has shown since; the load that it met is taken as it was.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from profiler.compute import Times
from profiler.cost import Estimate, predict
from profiler.error import PredictionError
from profiler.host import hosts_of
from profiler.objective import Demand
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import Capacity, FinishedRequest
from schemas.manifest import Manifest
from schemas.plan import Plan

KEPT_EVERY = timedelta(seconds=2)
VIEWS = 64
"""Views that are kept: requests of up to two minutes are held against what was known when they were admitted, longer
ones against the oldest view."""


@dataclass(frozen=True)
class View:
    """What every node had shown at some time. Capacities are shared between views, not copied."""

    at: datetime
    capacities: Mapping[NodeId, Capacity]
    times: Mapping[NodeId, Times]


Views = tuple[View, ...]
"""The oldest first."""


def is_due(views: Views, now: datetime) -> bool:
    """Whether the last view is not as good as new."""
    return not views or now - views[-1].at >= KEPT_EVERY


def judged(
    errors: Mapping[DeploymentName, PredictionError],
    fresh: tuple[FinishedRequest, ...],
    plans: Mapping[DeploymentName, tuple[Plan, ...]],
    manifests: Mapping[Digest, Manifest],
    views: Views,
    now: datetime,
) -> dict[DeploymentName, PredictionError]:
    """The errors with those of `fresh` requests; what cannot be predicted any more is left out."""
    found = dict(errors)
    for one in fresh:
        plan = next((p for p in plans.get(one.deployment, ()) if p.epoch == one.epoch), None)
        manifest = manifests.get(plan.model) if plan is not None else None
        if plan is None or manifest is None or not views or one.route >= len(plan.routes):
            continue
        admitted = now - timedelta(milliseconds=one.started_ms)
        view = next((view for view in reversed(views) if view.at <= admitted), views[0])
        if not all(NodeId(node) in view.capacities for node in plan.routes[one.route].nodes):
            continue
        estimate = predicted(plan, one, manifest, view)
        found[one.deployment] = found.get(one.deployment, PredictionError()).finished(
            predicted_ttft_ms=estimate.ttft_ms,
            predicted_tpot_ms=estimate.tpot_ms,
            ttft_ms=one.ttft_ms,
            tpot_ms=one.tpot_ms,
        )
    return found


def predicted(plan: Plan, met: FinishedRequest, manifest: Manifest, view: View) -> Estimate:
    """What a request like `met` costs on its route, from what the nodes had shown; each of them is in `view`."""
    route = plan.routes[met.route]
    capacities = {NodeId(node): view.capacities[NodeId(node)] for node in route.nodes}
    hosts = hosts_of(capacities, manifest, plan.model, view.times)
    demand = Demand(output_tokens=met.output_tokens, batch=met.batch, ahead_tokens=met.ahead_tokens)
    return predict(
        route,
        hosts,
        manifest,
        met.prompt_tokens,
        cached_tokens=met.cached_tokens,
        demand=demand,
        settings=plan.settings,
    )
