"""PURE: what the orchestrator knows, as one frozen value, and how each report changes it.

Reports say what happened; nothing here decides. Time is whatever the caller's steady clock says, never a
sender's: a node with a wrong clock is as alive as any other.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property
from typing import TypeVar, assert_never

from orchestrator import burn
from orchestrator.arrivals import Arrivals, arrived
from orchestrator.beliefs import smoothed, steadied
from orchestrator.habits import Habit, learned
from orchestrator.outcomes import VIEWS, View, Views, is_due, judged
from orchestrator.outlook import Outlook
from orchestrator.rollout import NodeRestarted, Rollout, note
from orchestrator.services.standing import Standing
from profiler.compute import Times, times_of
from profiler.error import PredictionError
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import HEARTBEAT_SPARE_S, LOST_AFTER_S, Capacity, FinishedRequest
from schemas.control import Attainment
from schemas.deployment import Deployment, NodeWish
from schemas.manifest import Manifest
from schemas.plan import Receipt
from schemas.roster import Policy, Roster

T = TypeVar("T")

LOST_IN_PLAN = timedelta(seconds=LOST_AFTER_S)
LOST_SPARE = timedelta(seconds=3 * HEARTBEAT_SPARE_S)
"""A node in no plan reports every `HEARTBEAT_SPARE_S`: three missed heartbeats and it is lost."""
TAKEN_UP = timedelta(seconds=2)
"""A node that was given a part of a plan so long ago, and says that it runs none, has refused it: it goes on reporting
like a spare one."""
LOST_STALLED = timedelta(seconds=2.5)
"""Two missed heartbeats are enough where an ingress waits for a step on a route of that node: it hangs."""
ASLEEP = timedelta(seconds=2)
"""Ticks come several times a second. After a longer gap it was this process that slept, not the nodes."""


LONG_AGO = datetime.min.replace(tzinfo=UTC)
BOOTS_KEPT = 32
"""Processes of a node that are remembered as over, so that a heartbeat replayed from one of them revives nothing."""


@dataclass(frozen=True)
class Node:
    """One node's last heartbeat and when it arrived here."""

    capacity: Capacity
    heard_at: datetime
    past_boots: tuple[str, ...] = ()
    times: Times = field(default_factory=dict)
    """Its block times, smoothed over heartbeats."""
    steady: Times = field(default_factory=dict)
    """The same over a longer time, for loads."""
    judged: int = -1
    """The number of the last finished request of this process that was held against its prediction."""


@dataclass(frozen=True)
class Snapshot:
    """Everything that decisions are made from."""

    term: int
    nodes: Mapping[NodeId, Node] = field(default_factory=dict)
    absent: frozenset[NodeId] = frozenset()
    """Nodes that are lost: once heard and silent since, or in a plan and never heard."""
    watched: Mapping[NodeId, datetime] = field(default_factory=dict)
    """Nodes in a live plan, and since when a heartbeat a second is expected of them."""
    drained: frozenset[NodeId] = frozenset()
    """Nodes that an operator wants no plan to use."""
    trust: Mapping[NodeId, bool] = field(default_factory=dict)
    """Nodes that an operator trusts, or does not."""
    roster: Roster | None = None
    """What the root says, which no operator's word goes beyond; None in a world that has none."""
    deployments: Mapping[DeploymentName, Deployment] = field(default_factory=dict)
    manifests: Mapping[Digest, Manifest] = field(default_factory=dict)
    rollouts: Mapping[DeploymentName, Rollout] = field(default_factory=dict)
    outlooks: Mapping[DeploymentName, Outlook] = field(default_factory=dict)
    """How each deployment's plan compared with others when it was last weighed."""
    burns: Mapping[DeploymentName, burn.Record] = field(default_factory=dict)
    """How each deployment's requests fared lately."""
    habits: Mapping[DeploymentName, Habit] = field(default_factory=dict)
    """What each deployment's requests lately were,"""
    arrivals: Mapping[DeploymentName, Arrivals] = field(default_factory=dict)
    """and how often they came."""
    views: Views = ()
    """What nodes had shown, lately: requests that end now are held against what was known when they began."""
    pipelines: Mapping[DeploymentName, Standing] = field(default_factory=dict)
    """How the services of each pipeline stand."""
    errors: Mapping[DeploymentName, PredictionError] = field(default_factory=dict)
    """How far predictions were from what requests then met."""
    deaf_since: datetime | None = None
    """Set while this process has no connection to the bus: silence then says nothing about nodes."""
    ticked_at: datetime | None = None
    quiet_until: datetime = LONG_AGO
    """No node has been silent for too long before then, so that thousands need not be looked at several times a
    second."""

    @cached_property
    def present(self) -> Mapping[NodeId, Capacity]:
        """The last capacity of every node that is not lost, by name, ascending."""
        return {name: self.nodes[name].capacity for name in sorted(self.nodes) if name not in self.absent}

    @cached_property
    def offered(self) -> Mapping[NodeId, Capacity]:
        """The last capacity of every node that a new plan may use: present and not drained."""
        return {name: capacity for name, capacity in self.present.items() if name not in self.drained}

    def has(self, node: NodeId) -> bool:
        """Whether a node is `present`."""
        return node in self.nodes and node not in self.absent

    @cached_property
    def enrolled_trusted(self) -> frozenset[NodeId]:
        """Agents that the root trusts."""
        members = () if self.roster is None else self.roster.members
        return frozenset(NodeId(member.name) for member in members if member.tier == "trusted")

    def belongs(self, node: NodeId) -> bool:
        """Whether a node is a member, as far as is known."""
        return self.roster is None or node in self._enrolled

    @cached_property
    def _enrolled(self) -> frozenset[str]:
        return frozenset(member.name for member in self.roster.members) if self.roster is not None else frozenset()

    def attainment(self, name: DeploymentName, now: datetime) -> Attainment | None:
        """How the requests of a deployment fared under its plan in force; None where none was counted."""
        return burn.attainment(self.burns.get(name, ()), self.rollout(name).current_since, now)

    def trusts(self, node: NodeId) -> bool:
        """Whether a node may hold sensitive blocks: the operator's word, for whom the root trusts; without one every
        node of the edge that was heard may, and one of the cloud may not."""
        if self.roster is not None and node not in self.enrolled_trusted:
            return False
        said = self.trust.get(node)
        return node in self.nodes and self.nodes[node].capacity.tier == "edge" if said is None else said

    def distrusts(self, node: NodeId) -> bool:
        """Whether a node is known not to be trusted. Of one that was never heard the root and the operator know."""
        if self.roster is not None and node not in self.enrolled_trusted:
            return True
        return self.trust.get(node) is False if node not in self.nodes else not self.trusts(node)

    def among(self, nodes: Collection[NodeId]) -> "Snapshot":
        """The same as if it had heard of these nodes alone."""
        return replace(self, nodes={name: node for name, node in self.nodes.items() if name in nodes})

    def wish(self, node: NodeId) -> NodeWish:
        """What operators want of a node."""
        return NodeWish(node=node, drained=node in self.drained, trusted=self.trust.get(node))

    def ruled(self, deployment: Deployment) -> Deployment:
        """The same deployment with what the root's policy adds to it."""
        policy = Policy() if self.roster is None else self.roster.policy
        rules, models = policy.rules_of(deployment.name), policy.models_of(deployment.name)
        if (deployment.ruled, deployment.models) == (rules, models):
            return deployment
        return deployment.model_copy(update={"ruled": rules, "models": models})

    def rollout(self, name: DeploymentName) -> Rollout:
        return self.rollouts.get(name, Rollout(name, self.term))


@dataclass(frozen=True)
class CapacityReceived:
    """A heartbeat, its signature verified."""

    capacity: Capacity


@dataclass(frozen=True)
class ReceiptReceived:
    """An answer to a plan event, its signature verified."""

    receipt: Receipt


@dataclass(frozen=True)
class DeploymentWritten:
    """Desired state that is stored."""

    deployment: Deployment


@dataclass(frozen=True)
class DeploymentRemoved:
    """Desired state that is stored no more."""

    name: DeploymentName


@dataclass(frozen=True)
class NodeWished:
    """Desired state of one node that is stored."""

    wish: NodeWish


@dataclass(frozen=True)
class ManifestKnown:
    """A model of the store."""

    digest: Digest
    manifest: Manifest


@dataclass(frozen=True)
class RolloutAdvanced:
    """A rollout's new state; the event that announces it is in the log."""

    rollout: Rollout


@dataclass(frozen=True)
class Weighed:
    """A deployment's plan was weighed against others."""

    outlook: Outlook


@dataclass(frozen=True)
class ServicesStand:
    """The services of a pipeline were placed or steered, or cannot be placed."""

    pipeline: DeploymentName
    standing: Standing
    deployments: tuple[Deployment, ...]
    """As they are wanted now."""


@dataclass(frozen=True)
class RosterTaken:
    """Others are members now, or another policy is in force."""

    roster: Roster


@dataclass(frozen=True)
class BusLost:
    """This process lost its connection to the bus."""


@dataclass(frozen=True)
class BusBack:
    """This process has its connection again."""


@dataclass(frozen=True)
class Tick:
    """Time passed."""


Report = (
    CapacityReceived
    | ReceiptReceived
    | DeploymentWritten
    | DeploymentRemoved
    | NodeWished
    | ManifestKnown
    | RolloutAdvanced
    | Weighed
    | ServicesStand
    | RosterTaken
    | BusLost
    | BusBack
    | Tick
)


def fold(snapshot: Snapshot, report: Report, now: datetime) -> Snapshot:
    """The snapshot after `report`, which arrived at `now`."""
    return _at_once(snapshot, _folded(snapshot, report, now))


def _at_once(before: Snapshot, after: Snapshot) -> Snapshot:
    """Plans that lost a node are replaced at once: what failed before was tried for another reason, and says nothing
    about that."""
    if after.absent is before.absent:
        return after
    lost = after.absent - before.absent
    held = {
        name: replace(rollout, retry_at=None)
        for name, rollout in after.rollouts.items()
        if rollout.retry_at is not None and rollout.current is not None and lost.intersection(rollout.current.nodes)
    }
    return replace(after, rollouts={**after.rollouts, **held}) if held else after


def _folded(snapshot: Snapshot, report: Report, now: datetime) -> Snapshot:
    match report:
        case CapacityReceived(capacity):
            return _heard(snapshot, capacity, now)
        case ReceiptReceived(receipt):
            rollout = snapshot.rollouts.get(receipt.deployment)
            if rollout is None:
                return snapshot
            return replace(snapshot, rollouts={**snapshot.rollouts, receipt.deployment: note(rollout, receipt, now)})
        case DeploymentWritten(deployment):
            ruled = snapshot.ruled(deployment)
            written = replace(snapshot, deployments={**snapshot.deployments, deployment.name: ruled})
            # What was tried for the old wish says nothing about the new one.
            rollout = replace(snapshot.rollout(deployment.name), failures=0, retry_at=None, last_error=None, refused={})
            outlooks = _without(deployment.name, snapshot.outlooks)
            return replace(written, rollouts={**snapshot.rollouts, deployment.name: rollout}, outlooks=outlooks)
        case DeploymentRemoved(name):
            return replace(
                snapshot,
                deployments=_without(name, snapshot.deployments),
                outlooks=_without(name, snapshot.outlooks),
                burns=_without(name, snapshot.burns),
                habits=_without(name, snapshot.habits),
                arrivals=_without(name, snapshot.arrivals),
                pipelines=_without(name, snapshot.pipelines),
                errors=_without(name, snapshot.errors),
            )
        case NodeWished(wish):
            return _wished(snapshot, wish)
        case ManifestKnown(digest, manifest):
            return replace(snapshot, manifests={**snapshot.manifests, digest: manifest})
        case RolloutAdvanced(rollout):
            return _watching(replace(snapshot, rollouts={**snapshot.rollouts, rollout.deployment: rollout}), now)
        case Weighed(outlook):
            if outlook.deployment not in snapshot.deployments:
                return snapshot
            return replace(snapshot, outlooks={**snapshot.outlooks, outlook.deployment: outlook})
        case ServicesStand(name, standing, wanted):
            stands = replace(snapshot, pipelines={**snapshot.pipelines, name: standing})
            for one in wanted:
                if stands.deployments.get(one.name) != stands.ruled(one):
                    stands = fold(stands, DeploymentWritten(one), now)
            return stands
        case RosterTaken(roster):
            known = replace(snapshot, roster=roster)
            ruled_anew = {name: known.ruled(one) for name, one in snapshot.deployments.items()}
            # As with a node that joins: what failed for want of a trusted one may be tried again at once.
            rollouts = {name: replace(rollout, retry_at=None) for name, rollout in snapshot.rollouts.items()}
            # Nobody hears who left: what runs there has to move at once.
            gone = {name for name in known.nodes if not known.belongs(name)}
            return replace(known, deployments=ruled_anew, rollouts=rollouts, absent=known.absent | gone)
        case BusLost():
            return replace(snapshot, deaf_since=snapshot.deaf_since or now)
        case BusBack():
            return replace(_excused(snapshot, now), deaf_since=None)
        case Tick():
            return _ticked(snapshot, now)
        case _:
            assert_never(report)


def _wished(snapshot: Snapshot, wish: NodeWish) -> Snapshot:
    trust = {node: said for node, said in snapshot.trust.items() if node != wish.node}
    if wish.trusted is not None:
        trust[wish.node] = wish.trusted
    snapshot = replace(snapshot, trust=trust)
    if wish.drained:
        return replace(snapshot, drained=snapshot.drained | {wish.node})
    # As with a node that joins: whatever failed for want of it may be tried again at once.
    rollouts = {name: replace(rollout, retry_at=None) for name, rollout in snapshot.rollouts.items()}
    return replace(snapshot, drained=snapshot.drained - {wish.node}, rollouts=rollouts)


def _heard(snapshot: Snapshot, capacity: Capacity, now: datetime) -> Snapshot:
    """A heartbeat counts unless it was overtaken: by a later one of its process, or by a later process."""
    name = capacity.node
    known = snapshot.nodes.get(name)
    rollouts = snapshot.rollouts
    past_boots = () if known is None else known.past_boots
    apart_s = 0.0 if known is None else _apart_s(known, now)
    said = times_of(capacity.block_times)
    times = smoothed({} if known is None else known.times, said, apart_s)
    steady = steadied({} if known is None else known.steady, said, apart_s, times)
    if known is not None and known.capacity.boot == capacity.boot:
        if capacity.sequence <= known.capacity.sequence:
            return snapshot
    elif known is not None:
        if capacity.boot in past_boots:
            return snapshot
        past_boots = (*past_boots, known.capacity.boot)[-BOOTS_KEPT:]
        times = steady = said
        restarted = NodeRestarted(name, known.heard_at)
        rollouts = {other: note(rollout, restarted, now) for other, rollout in rollouts.items()}
    returns = known is None or name in snapshot.absent
    if returns or rollouts is not snapshot.rollouts:
        # Whatever failed for want of a node may be tried again at once.
        rollouts = {other: replace(rollout, retry_at=None) for other, rollout in rollouts.items()}
    if any(rollout.candidate is not None for rollout in rollouts.values()):
        rollouts = {other: note(rollout, capacity, now) for other, rollout in rollouts.items()}
    judged_before = known.judged if known is not None and known.capacity.boot == capacity.boot else -1
    fresh = tuple(one for one in capacity.finished if one.number > judged_before)
    judged_until = max((one.number for one in fresh), default=judged_before)
    fresh = tuple(one for one in fresh if one.deployment in snapshot.deployments)
    nodes = {**snapshot.nodes, name: Node(capacity, now, past_boots, times, steady, judged_until)}
    errors = _judged(snapshot, fresh, now)
    # A process that closed its links and of which the broker says that it does not listen has ended. A later process
    # of that node, or this one if it was not so, reports by itself.
    gone = {
        peer.node
        for peer in capacity.lost_peers
        if peer.node != name and peer.node in nodes and nodes[peer.node].capacity.boot == peer.boot
    }
    before = None if known is None else known.capacity
    # Nothing is kept of a deployment that nobody asked for, or that was removed while its last requests ran.
    service = tuple(one for one in capacity.service if one.deployment in snapshot.deployments)
    counted = capacity.model_copy(update={"service": service})
    burns = burn.heard(snapshot.burns, before, counted, now)
    begun = {name: rollout.current_since for name, rollout in rollouts.items() if rollout.current_since is not None}
    views = _viewed(snapshot.views, nodes, now) if rollouts else snapshot.views
    after = replace(
        snapshot,
        nodes=nodes,
        absent=(snapshot.absent - {name}) | gone if returns or gone else snapshot.absent,
        rollouts=_asked(rollouts, counted, now),
        burns=burns,
        habits=learned(snapshot.habits, before, counted),
        arrivals=arrived(snapshot.arrivals, before, counted, begun, now),
        views=views,
        errors=errors,
    )
    # From a node that is back, or runs something from now on, more is heard, and its silence counts sooner.
    hurries = returns or (capacity.stages and before is not None and not before.stages)
    return replace(after, quiet_until=min(after.quiet_until, _due(after, name))) if hurries else after


def _asked(
    rollouts: Mapping[DeploymentName, Rollout], capacity: Capacity, now: datetime
) -> Mapping[DeploymentName, Rollout]:
    """The rollouts of cold deployments for which requests wait now, and none did before, know since when."""
    waited_for = {DeploymentName(one.deployment) for one in capacity.service if one.waiting}
    fresh = {
        name: replace(rollout, asked_since=now)
        for name in waited_for
        if (rollout := rollouts.get(name)) is not None
        and rollout.asked_since is None
        and rollout.current is not None
        and rollout.current.cold
    }
    return {**rollouts, **fresh} if fresh else rollouts


def _without(name: DeploymentName, known: Mapping[DeploymentName, T]) -> dict[DeploymentName, T]:
    return {other: one for other, one in known.items() if other != name}


def _judged(
    snapshot: Snapshot, fresh: tuple[FinishedRequest, ...], now: datetime
) -> Mapping[DeploymentName, PredictionError]:
    """The errors with requests that ended, each against what was predicted for it before."""
    if not fresh:
        return snapshot.errors
    plans = {name: rollout.plans for name, rollout in snapshot.rollouts.items()}
    return judged(snapshot.errors, fresh, plans, snapshot.manifests, snapshot.views, now)


def _viewed(views: Views, nodes: Mapping[NodeId, Node], now: datetime) -> Views:
    """The views with that of now, if the last is not as good as new."""
    if not is_due(views, now):
        return views
    capacities = {name: node.capacity for name, node in nodes.items()}
    times = {name: node.times for name, node in nodes.items()}
    return (*views, View(now, capacities, times))[-VIEWS:]


def _apart_s(known: Node, now: datetime) -> float:
    return (now - known.heard_at).total_seconds()


def _watching(snapshot: Snapshot, now: datetime) -> Snapshot:
    # A spare node may have spoken ten seconds ago; once it is in a plan it gets the full time to speak again.
    live = frozenset[NodeId]().union(*(rollout.nodes for rollout in snapshot.rollouts.values()))
    watched = {node: snapshot.watched.get(node, now) for node in sorted(live)}
    return replace(snapshot, watched=watched, quiet_until=LONG_AGO)


def _ticked(snapshot: Snapshot, now: datetime) -> Snapshot:
    if snapshot.ticked_at is not None and now - snapshot.ticked_at > ASLEEP:
        snapshot = _excused(snapshot, now)
    snapshot = replace(snapshot, ticked_at=now)
    if snapshot.deaf_since is not None:
        return snapshot
    suspects = _on_stalled_routes(snapshot)
    silent = {name for name in suspects if now >= _due(snapshot, name, suspects)}
    if now < snapshot.quiet_until:
        return replace(snapshot, absent=snapshot.absent | silent) if silent - snapshot.absent else snapshot
    due = {name: _due(snapshot, name, suspects) for name in {*snapshot.nodes, *snapshot.watched} - snapshot.absent}
    silent |= {name for name, at in due.items() if now >= at}
    return replace(
        snapshot,
        absent=snapshot.absent | silent if silent else snapshot.absent,
        quiet_until=min((at for name, at in due.items() if name not in silent), default=LONG_AGO),
    )


def _due(snapshot: Snapshot, name: NodeId, suspects: frozenset[NodeId] = frozenset()) -> datetime:
    """When a node is lost that says nothing until then."""
    node, since = snapshot.nodes.get(name), snapshot.watched.get(name)
    if since is None:
        return snapshot.nodes[name].heard_at + LOST_SPARE
    if node is not None and not node.capacity.stages and node.heard_at - since > TAKEN_UP:
        return node.heard_at + LOST_SPARE
    last = since if node is None else max(since, node.heard_at)
    return last + (LOST_STALLED if name in suspects else LOST_IN_PLAN)


def _on_stalled_routes(snapshot: Snapshot) -> frozenset[NodeId]:
    """Nodes of routes on which an ingress that is alive waits for a step for too long."""
    stalled = {
        (one.deployment, one.epoch, one.route)
        for name in snapshot.watched
        if name in snapshot.nodes and name not in snapshot.absent
        for one in snapshot.nodes[name].capacity.stalled
    }
    return frozenset(
        NodeId(node)
        for name, rollout in snapshot.rollouts.items()
        for plan in rollout.plans
        for route in plan.routes
        if (name, plan.epoch, route.index) in stalled
        for node in route.nodes
    )


def _excused(snapshot: Snapshot, now: datetime) -> Snapshot:
    """Silence until now was ours, not theirs: every node that was not lost before gets its time anew."""
    return replace(
        snapshot,
        nodes={
            name: replace(node, heard_at=now) for name, node in snapshot.nodes.items() if name not in snapshot.absent
        }
        | {name: node for name, node in snapshot.nodes.items() if name in snapshot.absent},
        watched=dict.fromkeys(snapshot.watched, now),
    )
