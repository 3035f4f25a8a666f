"""PURE: what would come of an operator's wish, tried on the snapshot before anything is stored."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime

from orchestrator.cold import UNFOUND, all_cold, cold_plan, stays_cold
from orchestrator.decide import standing, what_is_needed
from orchestrator.fold import NodeWished, RolloutAdvanced, Snapshot, fold
from orchestrator.pipelines import check_names, pipelines, placed_anew, wanted
from orchestrator.planner import Proposal, check_routes, check_shape, place
from orchestrator.rollout import Candidate
from orchestrator.shortlist import planned_anew
from orchestrator.trust import exposed
from profiler.forecast import forecast
from profiler.host import hosts_of
from schemas.base import DeploymentName, Digest, NodeId
from schemas.deployment import Deployment, ServiceOf
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.pipeline import Pipeline
from schemas.plan import Plan


def trial(snapshot: Snapshot, deployment: Deployment, manifest: Manifest, now: datetime) -> Proposal:
    """The plan that this deployment would get now; raises what `make_plan` raises. Nothing is changed.

    A current plan that is as wished is the answer: it has its memory already and nothing would move.
    """
    rollout, present = snapshot.rollout(deployment.name), snapshot.present
    current = rollout.current
    here = current is not None and present.keys() >= set(current.nodes)
    if current is not None and here and what_is_needed(snapshot, deployment, rollout) is None:
        if current.cold:
            return Proposal(current, None)
        return Proposal(current, forecast(current.chains, hosts_of(present, manifest, deployment.model), manifest))
    for number, chain in enumerate(deployment.chains or ()):
        for position, stage in enumerate(chain):
            if stage.node in snapshot.drained:
                message = f"node {stage.node!r} is drained; run `resplit undrain {stage.node}` or name another node"
                raise ResplitError(ErrorCode.INFEASIBLE, message, f"{place(deployment, number)}.{position}.node")
    if stays_cold(deployment, rollout, wakes=False):
        return cold_plan(snapshot, deployment, manifest, "a trial")
    try:
        return _planned(snapshot, deployment, manifest, now)
    except ResplitError as error:
        if error.code not in UNFOUND:
            raise
        if deployment.outside is not None:
            return cold_plan(snapshot, deployment, manifest, "a trial")
        if not any(one.on_demand for one in snapshot.deployments.values() if one.name != deployment.name):
            raise
    later = _planned(all_cold(snapshot), deployment, manifest, now)  # once others are cold it has room, or never
    return cold_plan(snapshot, deployment, manifest, "a trial") if deployment.on_demand else later


def check_cloud(snapshot: Snapshot, deployment: Deployment) -> None:
    """Raises FORBIDDEN where a cloud is to answer for what must not leave the cluster, and INVALID_REQUEST for one that
    no agent knows."""
    if deployment.cloud is None:
        return
    if deployment.outside is None:
        message = f"requests to {deployment.name!r} must not leave the cluster, as it is sealed or has sensitive blocks"
        raise ResplitError(ErrorCode.FORBIDDEN, f"{message}; leave cloud out", "cloud")
    known = sorted({name for capacity in snapshot.present.values() for name in capacity.clouds})
    if deployment.cloud.name not in known:
        message = f"no agent knows a cloud {deployment.cloud.name!r}, they know: {', '.join(known) or 'none'}"
        raise ResplitError(
            ErrorCode.INVALID_REQUEST, f"{message}; name it in a file for `resplit agent --clouds`", "cloud.name"
        )


def _planned(snapshot: Snapshot, deployment: Deployment, manifest: Manifest, now: datetime) -> Proposal:
    kept = standing(snapshot, deployment, snapshot.rollout(deployment.name))
    proposal = planned_anew(snapshot, deployment, manifest, now, "a trial", kept=kept)
    check_routes(deployment, proposal.plan)
    check_disks(snapshot, proposal.plan, manifest)
    return proposal


def check_disks(snapshot: Snapshot, plan: Plan, manifest: Manifest) -> None:
    """Raises MODEL_TOO_LARGE where a node could not keep the files of its blocks, however much else left its disk."""
    for node in plan.nodes:
        capacity = snapshot.present.get(NodeId(node))
        most = None if capacity is None else capacity.disk_models_bytes
        files = {ref.digest: ref.size_bytes for block in plan.blocks_on(node) for ref in manifest.blocks[block].stored}
        size = sum(files.values())
        if most is not None and size > most:
            message = f"the disk of {node!r} has room for {most} bytes of models, and its blocks take {size}"
            raise ResplitError(
                ErrorCode.MODEL_TOO_LARGE, f"{message}, {size - most} short; give it more, or place fewer there"
            )


def check_is_no_service(snapshot: Snapshot, name: DeploymentName) -> None:
    """Raises INVALID_REQUEST for a deployment that follows from a pipeline: nobody changes it by itself."""
    known = snapshot.deployments.get(name)
    if known is not None and known.service_of is not None:
        of = known.service_of
        message = f"{name!r} is service {of.service!r} of pipeline {of.pipeline!r}; change or remove that"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")


def check_is_same_graph(snapshot: Snapshot, deployment: Deployment, models: Mapping[Digest, Manifest]) -> None:
    """Raises INVALID_REQUEST where a pipeline is to become another, or another model: requests that are under way, and
    new ones until every service has moved, would meet services of the wrong graph."""
    known = snapshot.deployments.get(deployment.name)
    if known is None or known.model == deployment.model:
        return
    before = snapshot.manifests.get(known.model)
    if (before is not None and before.pipeline is not None) or models[deployment.model].pipeline is not None:
        message = f"{deployment.name!r} runs another graph or model; deploy this one under another name, or remove that"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")


def check_services(
    snapshot: Snapshot, deployment: Deployment, pipeline: Pipeline, models: Mapping[Digest, Manifest], now: datetime
) -> None:
    """Whether the services of a pipeline can be placed as it asks, and those that are cut be planned; raises INFEASIBLE
    and what `trial` raises."""
    check_names(snapshot, deployment.name, pipeline)
    world = replace(
        snapshot,
        manifests={**snapshot.manifests, **models},
        deployments={**snapshot.deployments, deployment.name: deployment},
    )
    standing = placed_anew(world, deployment.name, pipeline, now, strictly=True)
    for one in wanted(world, deployment.name, pipeline, standing):
        check_shape(one, models[one.model])
        if one.chains is None:
            trial(world, one, models[one.model], now)


def check_drain(snapshot: Snapshot, node: NodeId, now: datetime) -> None:
    """Whether everything on `node` can go on without it, all of it at once.

    Raises `ResplitError`: UNKNOWN_NODE for a node that nobody ever heard of; INFEASIBLE where an operator locked a
    deployment to it; what `make_plan` raises where the others have too little room, with the bytes short.
    """
    check_known(snapshot, node)
    wish = snapshot.wish(node).model_copy(update={"drained": True})
    _all_move(fold(snapshot, NodeWished(wish), now), users(snapshot, node), f"run without node {node!r}", now)


def check_distrust(snapshot: Snapshot, node: NodeId, now: datetime) -> None:
    """Whether what is sensitive on `node` fits on nodes that are trusted, all of it at once; raises as `check_drain`
    does."""
    check_known(snapshot, node)
    wish = snapshot.wish(node).model_copy(update={"trusted": False})
    without = fold(snapshot, NodeWished(wish), now)
    _all_move(without, exposed_on(without, node), f"keep its sensitive blocks off node {node!r}", now)


def check_known(snapshot: Snapshot, node: NodeId) -> None:
    """Raises UNKNOWN_NODE for a node that nobody ever heard of."""
    if node not in snapshot.nodes and node not in snapshot.watched:
        known = ", ".join(sorted(snapshot.nodes)) or "none"
        raise ResplitError(ErrorCode.UNKNOWN_NODE, f"there is no node {node!r}; the nodes are: {known}", "node")


def check_trustable(snapshot: Snapshot, node: NodeId) -> None:
    """Raises FORBIDDEN for a node that the root does not trust."""
    if snapshot.roster is not None and node not in snapshot.enrolled_trusted:
        message = (
            f"{node!r} is no trusted member by roster {snapshot.roster.version}, and no operator can make it one: "
            "revoke it and enroll it anew with `--tier trusted`"
        )
        raise ResplitError(ErrorCode.FORBIDDEN, message, "node")


def _all_move(without: Snapshot, names: tuple[DeploymentName, ...], hurdle: str, now: datetime) -> None:
    known = pipelines(without)
    for name in sorted({of.pipeline for one in names if (of := _placed_with(without, one)) is not None} & known.keys()):
        try:
            placed_anew(without, name, known[name], now)
        except ResplitError as error:
            message = f"the services of {name!r} cannot {hurdle}: {error.message}"
            raise ResplitError(error.code, message, "node") from error
    for name in names:
        deployment = without.deployments.get(name)
        if deployment is None or _placed_with(without, name) is not None:
            continue  # it was removed: it ends by itself; or it moves with its pipeline
        try:
            proposal = _moved(without, deployment, now)
        except ResplitError as error:
            raise ResplitError(error.code, f"{name!r} cannot {hurdle}: {error.message}", "node") from error
        # The next deployment must find room beside this one.
        rollout = replace(without.rollout(name), candidate=Candidate(proposal.plan, now))
        without = fold(without, RolloutAdvanced(rollout), now)


def _placed_with(snapshot: Snapshot, name: DeploymentName) -> ServiceOf | None:
    """Of which pipeline it is a service that is placed with the others."""
    deployment = snapshot.deployments.get(name)
    return None if deployment is None or deployment.chains is None else deployment.service_of


def exposed_on(snapshot: Snapshot, node: NodeId) -> tuple[DeploymentName, ...]:
    """The deployments whose sensitive blocks are on `node` although it is not trusted, by name, ascending."""
    trusted = not snapshot.distrusts(node)
    return tuple(
        name
        for name in users(snapshot, node)
        if name in snapshot.deployments
        and any(
            exposed(snapshot.deployments[name].sensitive_of(plan.block_count), plan.blocks_on(node), trusted)
            for plan in snapshot.rollouts[name].plans
        )
    )


def users(snapshot: Snapshot, node: NodeId) -> tuple[DeploymentName, ...]:
    """The deployments of which a live plan uses `node`, by name, ascending."""
    return tuple(sorted(name for name, rollout in snapshot.rollouts.items() if node in rollout.nodes))


def _moved(without: Snapshot, deployment: Deployment, now: datetime) -> Proposal:
    manifest = without.manifests.get(deployment.model)
    if manifest is None:
        message = f"the orchestrator's store does not hold its model {deployment.model}; import it there again"
        raise ResplitError(ErrorCode.UNKNOWN_MODEL, message)
    if any(stage.node in without.drained for chain in deployment.chains or () for stage in chain):
        message = f"its placement is locked; run `resplit topology unlock {deployment.name}`, or place it elsewhere"
        raise ResplitError(ErrorCode.INFEASIBLE, message)
    return trial(without, deployment, manifest, now)
