"""PURE: weigh a plan that serves against others, and make the plan that the decision asks for."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import datetime, timedelta

from orchestrator.candidates import slate
from orchestrator.decide import drained_of, exposed_by, serves, what_is_needed
from orchestrator.decision import Observation
from orchestrator.fold import Snapshot
from orchestrator.outlook import Outlook
from orchestrator.planner import Proposal, make_plan
from orchestrator.rollout import Rollout, may_propose
from orchestrator.rooms import rooms
from orchestrator.shortlist import shortlisted
from orchestrator.strain import UNSTRAINED, learned
from orchestrator.trigger import PLANNING_PERIOD_S, Policy, TriggerState, awaited, better_by_then, burns
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Deployment, Placement, nodes_of
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import Plan

STARVED = timedelta(seconds=2 * PLANNING_PERIOD_S)
"""A node whose memory is gone for this long is a hard trigger; loading alone takes memory for a moment."""
STARVED_PRESSURE = 10.0
"""Per cent of the time in which some task waits for memory, from which a node without any left is in trouble."""


def weighable(snapshot: Snapshot, now: datetime) -> tuple[DeploymentName, ...]:
    """The deployments that serve as asked and could be given another plan: only those are weighed."""
    return tuple(name for name in sorted(snapshot.deployments) if _at_rest(snapshot, name, now))


def _at_rest(snapshot: Snapshot, name: DeploymentName, now: datetime) -> bool:
    deployment, rollout = snapshot.deployments[name], snapshot.rollout(name)
    current = rollout.current
    if current is None or not (rollout.candidate is not None or may_propose(rollout, hard=True)):
        return False
    if current.cold or (rollout.candidate is not None and rollout.candidate.plan.cold):
        return False
    need = what_is_needed(snapshot, deployment, rollout)
    # A route that cannot be added yet is tried now and then, and what serves is weighed meanwhile.
    if need is None and rollout.retry_at is not None and now < rollout.retry_at:
        return False
    known = all(NodeId(node) in snapshot.nodes for node in current.nodes)
    manifest = snapshot.manifests.get(current.model)
    if manifest is None or manifest.pipeline is not None:
        return False  # to conduct costs next to nothing, wherever
    is_placed = deployment.service_of is not None and deployment.chains is not None  # by `orchestrator.pipelines`
    return known and not is_placed and serves(need)


def weigh(snapshot: Snapshot, name: DeploymentName, policy: Policy, now: datetime, afresh: bool = False) -> Outlook:
    """The decision about one deployment with a plan; raises `ResplitError` if there is nothing to weigh. `afresh`
    looks for other plans as if nobody had before; else that is done when there is reason to (`searched`)."""
    deployment, manifest, current = subject(snapshot, name)
    rollout = snapshot.rollout(name)
    prepared = rollout.candidate
    before = snapshot.outlooks.get(name)
    starved = _starved(snapshot, current, before, now)
    unfit = {
        node: f"node {node} has had no memory left for {(now - since).total_seconds():.0f} s"
        for node, since in starved.items()
        if now - since >= STARVED
    }
    unfit |= {node: f"node {node} cannot run it ({why})" for node, why in rollout.current_faults.items()}
    unfit |= {NodeId(node): f"node {node} is lost" for node in current.nodes if node in snapshot.absent}
    unfit |= {node: f"node {node} is to be drained" for node in drained_of(snapshot, current)}
    strain = learned(
        before.strain if before is not None else UNSTRAINED, _at_work(snapshot, current), current.chains, now
    )
    fared = snapshot.attainment(name, now)
    burn = None if fared is None else fared.burn
    same = None if before is None or afresh or before.plan != current.digest else before.searched
    state = before.state if before is not None else TriggerState()
    among = shortlisted(snapshot, deployment, manifest, now, same)
    found = slate(
        among.snapshot,
        deployment,
        manifest,
        current,
        now=now,
        load=before.load if before is not None else None,
        elapsed_s=0.0 if state.at is None else (now - state.at).total_seconds(),
        strain=strain,
        optimism=before.optimism if before is not None else None,
        avoid=rollout.shunned(now),
        unfit=unfit,
        exposed=exposed_by(snapshot, deployment, current),
        prepared=() if prepared is None else prepared.plan.chains,
        searched=same,
        anew=burns(burn),
    )
    seen = replace(found.observation, burn=burn, settling=bool(rollout.draining))
    state, decision = policy(state, seen, now) if prepared is None else awaited(state, seen, now)
    return Outlook(
        name,
        current.digest,
        decision,
        state,
        found.failovers,
        found.optimism,
        strain,
        starved,
        replace(found.searched, drawn_at=among.drawn_at),
        found.load,
        None if prepared is None else _regretted(prepared.plan, seen),
    )


def _regretted(prepared: Plan, seen: Observation) -> tuple[int, str] | None:
    """Why a plan is not to be prepared any further, if it is not."""
    here = seen.current
    found = next((one for one in seen.options if one.chains == prepared.chains), None)
    if found is None or seen.hard is not None:
        return None
    if found.phi >= here.phi:
        return prepared.epoch, f"by now it would be worse (Phi {found.phi:.2f}) than the plan in force ({here.phi:.2f})"
    if (other := better_by_then(found, seen)) is not None:
        return prepared.epoch, f"{other.key} would be better, and sooner"
    return None


def _at_work(snapshot: Snapshot, current: Plan) -> dict[NodeId, float]:
    """How slow the nodes are on which sequences of the plan run now."""
    found = {}
    for node in map(NodeId, current.nodes):
        capacity = snapshot.nodes[node].capacity
        works = any(
            stage.sequences
            for stage in capacity.stages
            if (stage.deployment, stage.epoch) == (current.deployment, current.epoch)
        )
        if works and capacity.slowdown is not None:
            found[node] = capacity.slowdown
    return found


def subject(snapshot: Snapshot, name: DeploymentName) -> tuple[Deployment, Manifest, Plan]:
    """What a decision about `name` is about; raises a typed error naming what is missing."""
    deployment = snapshot.deployments.get(name)
    if deployment is None:
        known = ", ".join(sorted(snapshot.deployments)) or "none"
        message = f"there is no deployment {name!r}; the deployments are: {known}"
        raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, message, "name")
    current, manifest = snapshot.rollout(name).current, snapshot.manifests.get(deployment.model)
    if current is None or current.model != deployment.model:
        message = f"{name!r} has no plan in force yet, so there is nothing to weigh; see `resplit status`"
        raise ResplitError(ErrorCode.INFEASIBLE, message, "name")
    if current.cold:
        message = f"{name!r} is cold: nothing of it is loaded, so there is nothing to weigh; a request has it loaded"
        raise ResplitError(ErrorCode.INFEASIBLE, message, "name")
    silent = [node for node in current.nodes if NodeId(node) not in snapshot.nodes]
    if manifest is None or silent:
        missing = f"node {silent[0]} has not reported" if silent else f"model {deployment.model} is not in the store"
        raise ResplitError(ErrorCode.INFEASIBLE, f"{name!r} cannot be weighed: {missing}", "name")
    return deployment, manifest, current


def chosen_plan(snapshot: Snapshot, outlook: Outlook) -> Proposal:
    """The plan of the next epoch that the decision asks for; raises what `make_plan` raises if it fits no more."""
    deployment, manifest, _ = subject(snapshot, outlook.deployment)
    return _placed(snapshot, deployment, manifest, outlook.decision.chosen.chains, outlook.decision.sentence)


def failover_plan(snapshot: Snapshot, deployment: Deployment, reason: str, now: datetime) -> Proposal | None:
    """The plan that was ready for the one node of the current plan that is lost, if it still fits the facts."""
    rollout = snapshot.rollout(deployment.name)
    outlook, current = snapshot.outlooks.get(deployment.name), rollout.current
    manifest = snapshot.manifests.get(deployment.model)
    if outlook is None or current is None or manifest is None or outlook.plan != current.digest:
        return None
    lost = snapshot.absent.intersection(map(NodeId, current.nodes))
    if len(lost) != 1 or deployment.chains is not None:
        return None
    chains = outlook.failovers.get(next(iter(lost)))
    if chains is None or not _usable(chains, snapshot, rollout, deployment, now):
        return None
    try:
        return _placed(snapshot, deployment, manifest, chains, f"{reason}; the plan without it was ready")
    except ResplitError:
        return None  # the facts have changed since: solve anew


def _usable(chains: Placement, snapshot: Snapshot, rollout: Rollout, deployment: Deployment, now: datetime) -> bool:
    nodes = {stage.node for chain in chains for stage in chain}
    as_many = deployment.stages is None or all(len(chain) == deployment.stages for chain in chains)
    return as_many and nodes <= snapshot.offered.keys() and not nodes & rollout.shunned(now)


def _placed(snapshot: Snapshot, deployment: Deployment, manifest: Manifest, chains: Placement, reason: str) -> Proposal:
    rollout = snapshot.rollout(deployment.name)
    # The planner checks a placement against the facts of now, whoever asks for it.
    insisted = deployment.model_copy(update={"placement": chains, "stages": None, "routes": None})
    found = rooms(snapshot.among(nodes_of(chains)), deployment, manifest)
    proposal = make_plan(insisted, manifest, found, rollout.epoch + 1, rollout.current, reason)
    return replace(proposal, plan=proposal.plan.model_copy(update={"reason": reason}))


def _starved(snapshot: Snapshot, current: Plan, before: Outlook | None, now: datetime) -> Mapping[NodeId, datetime]:
    known = before.starved_since if before is not None else {}
    capacities = {NodeId(node): snapshot.nodes[NodeId(node)].capacity for node in current.nodes}
    # A plan may fill a node exactly. It is too much where programs wait for memory besides.
    short = [
        node
        for node, capacity in capacities.items()
        if capacity.memory_free_bytes == 0 and (capacity.memory_pressure or 0.0) >= STARVED_PRESSURE
    ]
    return {node: known.get(node, now) for node in short}
