"""PURE: when the services of a pipeline are placed, placed anew or steered, and which deployments follow from it.

Core services are placed by an integer program when there is something else to place them on (`services.core`), light
ones with them for the first time, and from then on they are steered slot by slot by what arrives (`services.light`).
Services that are cut over nodes are planned like any deployment. Whatever is decided is a deployment with its
placement: rollouts, signed plans and failover are those of all deployments.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import datetime, timedelta
from math import sqrt

from orchestrator.fold import Snapshot
from orchestrator.planner import fitted
from orchestrator.services.cluster import COMPUTE, MEMORY, OVERHEAD_MS, SLOT_MS, Ground, depth, ground_of, is_whole
from orchestrator.services.core import Placed, Rules, place_core
from orchestrator.services.light import Steering, owed, steer
from orchestrator.services.measured import Rates, expected
from orchestrator.services.observed import Seen, looked
from orchestrator.services.problem import Setting, Stream
from orchestrator.services.standing import Basis, Standing
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment, ServiceOf, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.pipeline import Pipeline, service_deployment

STEER_EVERY = timedelta(seconds=1)
"""As often as nodes say what arrived."""
AGAIN_AFTER = timedelta(seconds=10)
"""Before services that could not be placed are tried again on the same nodes."""
FRAME_SLOTS = 200
"""For so long a change of light services is made."""
STRAINED, EASED, STRAIN_MAX = 1.15, 0.98, 8.0
"""By what the strain grows in a slot in which more was late than was predicted, and falls in another."""
PARTS = 8
"""Into which what comes in at a conductor is thought to be divided: replicas share it, as far as these go."""
SIGMAS = 2.0
"""More than what chance explains."""
SOLVE_S = 2.0
"""For a program, which then has the best placement that it found: whatever else is to be decided waits meanwhile."""
NAME_MAX = 63


def pipelines(snapshot: Snapshot) -> dict[DeploymentName, Pipeline]:
    """Deployments that are pipelines, of which all models are known, by name, ascending."""
    found = {}
    for name in sorted(snapshot.deployments):
        manifest = snapshot.manifests.get(snapshot.deployments[name].model)
        if manifest is not None and manifest.pipeline is not None:
            models = {service.model for service in manifest.pipeline.services.values()}
            if models <= snapshot.manifests.keys():
                found[name] = manifest.pipeline
    return found


def orphans(snapshot: Snapshot) -> tuple[DeploymentName, ...]:
    """Deployments of services that no pipeline has any more, nor one that still answers its last requests."""
    known = pipelines(snapshot)
    return tuple(
        name
        for name, deployment in snapshot.deployments.items()
        if (of := deployment.service_of) is not None
        and not (of.pipeline in known and of.service in known[of.pipeline].services)
        and not (of.pipeline not in snapshot.deployments and snapshot.rollout(of.pipeline).plans)
    )


def services_of(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline) -> dict[str, Deployment]:
    """The deployments of a pipeline's services, without a placement."""
    of = snapshot.deployments[name]
    return {
        service: snapshot.ruled(
            Deployment(
                name=service_deployment(name, service),
                model=spec.model,
                settings=fitted(spec.settings, snapshot.manifests[spec.model]),
                stages=spec.stages,
                routes=None if is_whole(spec) else spec.replicas,
                sensitive=of.sensitive if isinstance(of.sensitive, str) else None,
                sealed=of.sealed,
                service_of=ServiceOf(pipeline=name, service=service),
            )
        )
        for service, spec in pipeline.services.items()
    }


def check_names(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline) -> None:
    """Raises INVALID_REQUEST where a service's deployment cannot have its name."""
    for service in pipeline.services:
        called = service_deployment(name, service)
        if len(called) > NAME_MAX:
            message = f"service {service!r} would be deployed as {called!r}, longer than {NAME_MAX}; use a shorter name"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")
        taken = snapshot.deployments.get(called)
        if taken is not None and taken.service_of != ServiceOf(pipeline=name, service=service):
            message = (
                f"there is a deployment {called!r}, as which service {service!r} would be deployed; use another name"
            )
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")


def wanted(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline, standing: Standing) -> tuple[Deployment, ...]:
    """The deployments of the services, as they stand."""
    found = []
    for service, deployment in services_of(snapshot, name, pipeline).items():
        last = len(snapshot.manifests[deployment.model].blocks) - 1
        nodes = sorted(node for node, one in standing.placed if one == service)
        if not nodes and is_whole(pipeline.services[service]):
            continue  # it cannot be placed yet, and is not to be planned otherwise meanwhile
        chains = tuple((Stage(node=node, first=0, last=last),) for node in nodes)
        found.append(deployment.model_copy(update={"placement": chains or None}))
    return tuple(found)


def is_to_be_placed(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline, now: datetime) -> bool:
    """Whether the nodes, or what services are held to, are others than when they were placed, or a node refused what it
    was given; all that run any having been heard."""
    standing = snapshot.pipelines.get(name)
    if standing is None:
        return True
    if any(node not in snapshot.nodes and node not in snapshot.absent for node, _ in standing.placed):
        return False
    if standing.error is not None and now - standing.at >= AGAIN_AFTER:
        return True
    return standing.basis != basis_of(snapshot, name, pipeline) or any(
        node in snapshot.rollout(service_deployment(name, service)).shunned(now) for node, service in standing.placed
    )


def basis_of(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline) -> Basis:
    """What services can be placed on."""
    nodes = frozenset(snapshot.offered)
    trusted = frozenset(node for node in nodes if snapshot.trusts(node))
    return Basis(tuple(services_of(snapshot, name, pipeline).values()), nodes, trusted)


def adopted(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline, now: datetime) -> Standing | None:
    """What the leader before decided, by the plans in force; None where there are none."""
    placed: dict[tuple[NodeId, str], int] = {}
    plans = {service: snapshot.rollout(service_deployment(name, service)).current for service in pipeline.services}
    for service, current in plans.items():
        if current is not None and is_whole(pipeline.services[service]):
            placed.update({(NodeId(stage.node), service): 1 for chain in current.chains for stage in chain})
    if not any(plans.values()):
        return None
    rates = expected(_declared(snapshot, name, pipeline))
    return Standing(None, placed, rates, now, why="as the plans in force have it")


def confirmed(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline) -> Standing | None:
    """What was adopted, if all of it is there: then there is no reason to place anything anew."""
    standing = snapshot.pipelines.get(name)
    if standing is None or standing.basis is not None:
        return None
    found = by_service(standing.placed)
    whole = {service for service, spec in pipeline.services.items() if is_whole(spec)}
    here = all(node in snapshot.offered for node, _ in standing.placed)
    return replace(standing, basis=basis_of(snapshot, name, pipeline)) if here and found.keys() == whole else None


def placed_anew(
    snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline, now: datetime, *, strictly: bool = False
) -> Standing:
    """Core services by program, and light ones where there are too few; what there is stays as far as that costs less.

    Raises INFEASIBLE, and MODEL_TOO_LARGE for a service that no node has room for. Unless it is to be `strictly` as
    asked, what cannot be kept is given up first: to survive another failure, then replicas, then that nodes have time
    for all of it.
    """
    standing = snapshot.pipelines.get(name)
    before = {} if standing is None else _alive(snapshot, standing.placed)
    declared = _declared(snapshot, name, pipeline)
    rates = (standing.rates if standing is not None else expected(declared)).knowing(declared)
    seen = standing.seen if standing is not None else Seen()
    ground = ground_of(
        snapshot, pipeline, services_of(snapshot, name, pipeline), _heavier(declared, rates), before, seen, now=now
    )
    _check_each_fits(ground)
    last: ResplitError | None = None
    for setting, rules, given_up in _ladder(pipeline, ground, before, strictly=strictly):
        try:
            found = place_core(setting, rules, SOLVE_S)
        except ResplitError as error:
            last = last or error
            continue
        terms = {"cost": round(found.cost, 6), "bound": round(found.bound, 6), "proven": float(found.is_optimal)}
        why = "the core services were placed" + (f", {given_up}" if given_up else "")
        basis, placed = basis_of(snapshot, name, pipeline), dict(found.placed)
        if standing is None:
            return Standing(basis, placed, rates, now, why=why, terms=terms, changed_at=now)
        changed_at = now if standing.placed != placed else standing.changed_at
        same = replace(standing, basis=basis, rates=rates, error=None)
        return replace(same, placed=placed, why=why, terms=terms, changed_at=changed_at)
    assert last is not None
    raise last


def unplaced(
    snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline, error: ResplitError, now: datetime
) -> Standing:
    """What stands where services cannot be placed: what there was."""
    basis, standing = basis_of(snapshot, name, pipeline), snapshot.pipelines.get(name)
    if standing is None:
        return Standing(basis, {}, expected(_declared(snapshot, name, pipeline)), now, error=error.body)
    return replace(standing, basis=basis, at=now, error=error.body)


def is_to_be_steered(snapshot: Snapshot, name: DeploymentName, now: datetime) -> bool:
    """Whether a slot is over."""
    standing = snapshot.pipelines.get(name)
    return standing is not None and standing.error is None and now - standing.at >= STEER_EVERY


def steered(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline, now: datetime) -> Standing:
    """What came since the last slot, and what light services there are to be from now on. While a change of any service
    is under way only what came is counted."""
    standing = snapshot.pipelines[name]
    conduct = snapshot.rollout(name).nodes
    heard = {node: capacity for node, capacity in snapshot.present.items() if node in conduct}
    seen, slot = looked(standing.seen, heard, name, pipeline, frozenset(snapshot.present))
    declared = _declared(snapshot, name, pipeline)
    slots = (now - standing.at) / timedelta(milliseconds=SLOT_MS)
    rates = standing.rates.knowing(declared).after(slot.arrived, slots)
    arrived: dict[str, int] = {}
    for (task, _), count in slot.arrived.items():
        arrived[task] = arrived.get(task, 0) + count
    allowed = {task: one.late_share for task, one in pipeline.tasks.items()}
    debts = owed(standing.debts, allowed, arrived, slot.missed)
    strain = _strain(standing, arrived, slot.missed)
    counted = replace(standing, at=now, seen=seen, rates=rates, debts=debts, strain=strain)
    if standing.basis is None or _is_changing(snapshot, name, pipeline) or not _has_light(pipeline):
        return counted
    services = services_of(snapshot, name, pipeline)
    streams = tuple(part for one in rates.of(declared) for part in one.in_parts(PARTS))
    ground = ground_of(snapshot, pipeline, services, streams, standing.placed, seen, strain, now=now)
    if any(node not in ground.setting.hosts for node, _ in standing.placed):
        return counted  # a node was lost or drained since: they are placed anew first
    core, light = _cores(snapshot, name, pipeline, standing.placed), _lights(pipeline, standing.placed)
    steering = Steering(allowed, frame_slots=FRAME_SLOTS)
    found = steer(ground.setting, ground.speeds, steering, debts, core, light, standing.known, standing.turn)
    now_light = _lights(pipeline, found.placed)
    per_slot = {stream: stream.per_slot for stream in found.late}
    late = {
        task: sum(share * per_slot[stream] for stream, share in found.late.items() if stream.task == task)
        / max(sum(rate for stream, rate in per_slot.items() if stream.task == task), 1e-12)
        for task in {stream.task for stream in per_slot}
    }
    counted = replace(counted, known=found.known, turn=standing.turn + 1, late=late)
    if now_light == light:
        return counted
    return replace(
        counted,
        placed={**{place: one for place, one in standing.placed.items() if place not in light}, **now_light},
        why=_told(light, now_light),
        terms=_terms(late, debts, rates, {"cost": found.cost, "score": found.score, "strain": strain}),
        changed_at=now,
    )


def by_service(placed: Placed) -> dict[str, list[NodeId]]:
    """The nodes of each service, all by name."""
    found: dict[str, list[NodeId]] = {}
    for node, service in sorted(placed, key=lambda place: (place[1], place[0])):
        found.setdefault(service, []).append(node)
    return found


def _strain(standing: Standing, arrived: Mapping[str, int], missed: Mapping[str, int]) -> float:
    """What is predicted too well is taken for slower, step by step, until it is predicted as it is."""
    expected_late = sum(standing.late.get(task, 0.0) * count for task, count in arrived.items())
    late = sum(missed.values())
    if late > expected_late + SIGMAS * sqrt(expected_late) + 1.0:
        return min(STRAIN_MAX, STRAINED * standing.strain)
    return max(1.0, EASED * standing.strain)


def _declared(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline) -> tuple[Stream, ...]:
    """What is expected to come in, shared out to the nodes that conduct."""
    current = snapshot.rollout(name).current
    nodes = () if current is None else tuple(dict.fromkeys(NodeId(route.source) for route in current.routes))
    nodes = tuple(node for node in nodes if node in snapshot.offered) or tuple(
        node for node in snapshot.offered if snapshot.trusts(node)
    )
    nodes = nodes or tuple(snapshot.offered)
    return tuple(
        Stream(task, node, one.rate_per_s * SLOT_MS / 1e3 / len(nodes), (OVERHEAD_MS * depth(one),))
        for task, one in pipeline.tasks.items()
        for node in nodes
    )


def _heavier(declared: tuple[Stream, ...], rates: Rates) -> tuple[Stream, ...]:
    """What is declared, or what comes where that is more: what is quiet now need not stay so."""
    comes = {(one.task, one.at): one.per_slot for one in rates.of(declared)}
    return tuple(replace(one, per_slot=max(one.per_slot, comes.get((one.task, one.at), 0.0))) for one in declared)


def _alive(snapshot: Snapshot, placed: Placed) -> dict[tuple[NodeId, str], int]:
    return {(node, service): count for (node, service), count in placed.items() if node in snapshot.offered}


def _check_each_fits(ground: Ground) -> None:
    """Whether each service would fit somewhere if it were alone."""
    for name in sorted(ground.whole):
        kind = ground.setting.services[name]
        room = [host.has[MEMORY] for node, host in ground.setting.hosts.items() if kind.may_be_at(node)]
        if not room:
            message = f"no node that is here may have service {name!r}: what is sensitive goes to trusted nodes alone"
            raise ResplitError(ErrorCode.INFEASIBLE, message, f"services.{name}")
        if max(room) < kind.needs[MEMORY]:
            message = (
                f"service {name!r} needs {kind.needs[MEMORY]:.0f} bytes on one node and none has more than "
                f"{max(room):.0f} free for it; cut it over nodes with `stages`, or add memory"
            )
            raise ResplitError(ErrorCode.MODEL_TOO_LARGE, message, f"services.{name}")


def _all_core(ground: Ground) -> Setting:
    """To the program, whatever is placed is a core service; what is cut is not placed by it."""
    services = {name: replace(kind, is_core=name in ground.whole) for name, kind in ground.setting.services.items()}
    return replace(ground.setting, services=services)


def _without_compute(setting: Setting) -> Setting:
    services = {
        name: replace(kind, needs={key: need for key, need in kind.needs.items() if key != COMPUTE})
        for name, kind in setting.services.items()
    }
    return replace(setting, services=services)


def _ladder(
    pipeline: Pipeline, ground: Ground, before: Placed, *, strictly: bool
) -> Iterator[tuple[Setting, Rules, str]]:
    """What is placed, the rules, and what is given up where they cannot be kept."""
    have = {name: sum(count for (_, one), count in before.items() if one == name) for name in ground.whole}
    kept = {
        name: pipeline.services[name].replicas
        if pipeline.services[name].kind == "core"
        else max(pipeline.services[name].replicas, have[name])
        for name in ground.whole
    }
    rules = Rules(
        capacity=ground.capacity,
        replicas=kept,
        survives_node=pipeline.survives in ("node", "site"),
        survives_site=pipeline.survives == "site",
        survivors=frozenset(name for name in ground.whole if pipeline.services[name].kind == "core"),
        before=before,
        latency_cost=1e-3,
    )
    setting = _all_core(ground)
    yield setting, rules, ""
    if strictly:
        return
    alone = replace(rules, survives_node=False, survives_site=False)
    yield setting, alone, "although another failure would not be survived"
    fewer = replace(alone, replicas=dict.fromkeys(ground.whole, 1))
    yield setting, fewer, "with fewer replicas than are asked for"
    anyhow = replace(fewer, reserve=0.0, capacity=dict.fromkeys(ground.capacity, 1e9))
    yield _without_compute(setting), anyhow, "on nodes without time for all of them"


def _is_changing(snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline) -> bool:
    """Whether a plan of any service is being prepared, or is not in force yet as it is wanted."""
    for service in pipeline.services:
        called = service_deployment(name, service)
        rollout, deployment = snapshot.rollout(called), snapshot.deployments.get(called)
        if rollout.current is None or rollout.candidate is not None or deployment is None:
            return True
        if deployment.chains is not None and rollout.current.chains != deployment.chains:
            return True
    return False


def _has_light(pipeline: Pipeline) -> bool:
    return any(spec.kind == "light" for spec in pipeline.services.values())


def _lights(pipeline: Pipeline, placed: Placed) -> dict[tuple[NodeId, str], int]:
    return {place: count for place, count in placed.items() if count and pipeline.services[place[1]].kind == "light"}


def _cores(
    snapshot: Snapshot, name: DeploymentName, pipeline: Pipeline, placed: Placed
) -> dict[tuple[NodeId, str], int]:
    """Core services, those that are cut where their requests come in."""
    found = {place: count for place, count in placed.items() if pipeline.services[place[1]].kind == "core"}
    for service, spec in pipeline.services.items():
        current = snapshot.rollout(service_deployment(name, service)).current
        if not is_whole(spec) and current is not None:
            found.update(
                {
                    (NodeId(route.source), service): 1
                    for route in current.routes
                    if NodeId(route.source) in snapshot.offered
                }
            )
    return found


def _told(before: Placed, after: Placed) -> str:
    """The change of light services, as a person would say it."""
    more = [f"{service} on {node}" for node, service in sorted(after) if (node, service) not in before]
    less = [f"{service} on {node}" for node, service in sorted(before) if (node, service) not in after]
    parts = [f"{word} {', '.join(one)}" for word, one in (("added", more), ("dropped", less)) if one]
    return "; ".join(parts)


def _terms(
    late: Mapping[str, float], debts: Mapping[str, float], rates: Rates, also: Mapping[str, float]
) -> dict[str, float]:
    found = dict(also)
    for task, rate in rates.tasks.items():
        found[f"{task}.per_s"] = rate * 1e3 / SLOT_MS
        found[f"{task}.late"] = late.get(task, 0.0)
        found[f"{task}.debt"] = debts.get(task, 0.0)
    return {key: round(value, 6) for key, value in found.items()}
