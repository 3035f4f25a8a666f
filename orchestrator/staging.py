"""What each agent is to have on its disk ahead of need: the blocks of the plans that may come next.

`to_stage` is PURE. `Adviser` tells agents (`schemas.staging`), each only when what it is to have changed, or when it
restarted or lacks some of it for long: an advice that got lost costs a fetch later, no more.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from math import floor, inf, log2
from types import MappingProxyType

from nats.aio.client import Client
from nats.errors import Error as NatsError

from bus.identity import Identity
from orchestrator.decision import Origin
from orchestrator.fold import Snapshot
from orchestrator.trust import exposed
from schemas import subjects
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import Capacity, StoredBlocks
from schemas.deployment import Placement, blocks_by_node
from schemas.envelope import STAGING_TYPE, seal
from schemas.staging import Staging

LOOK_S = 1.0
KEPT = timedelta(minutes=10)
HISTORY_MAX = 64
AGAIN = timedelta(seconds=60)
"""What was advised and is not on the disk after this long is advised once more."""

AVERAGED_S = 1800.0
"""Over which it is averaged how often a deployment is asked for: disks change in minutes."""
FAILS_PER_S = 1.0 / 3600.0
"""How often a node is thought to fail."""
FETCHING_S = 10.0
"""How long fetching takes about."""

STAGED_OTHERWISE = (Origin.CURRENT, Origin.FAILOVER, Origin.ROUTE_GIVEN_BACK)
"""Plans whose blocks are loaded already, or are advised for the sake of the failover."""

Rates = Mapping[DeploymentName, float]
"""Requests a second."""
Advice = tuple[StoredBlocks, ...]
Plans = Mapping[DeploymentName, Mapping[NodeId, StoredBlocks]]
History = tuple[tuple[Plans, datetime], ...]
"""Different plans, each with the time when it was wanted last."""


def to_stage(snapshot: Snapshot, before: Plans) -> Plans:
    """By deployment and node, the blocks that a failover, a better re-split or a further route would put there, and of
    a cold one those that were loaded there.

    Another plan of as many routes counts while it costs less than the one in force and waits only to repay the move:
    its blocks on the disk are what makes it cheap. Until a new plan was weighed, what `before` says of its deployment
    stands.
    """
    found: dict[DeploymentName, Mapping[NodeId, StoredBlocks]] = {}
    for name in sorted(snapshot.deployments):
        current = snapshot.rollout(name).current
        coming = may_come(snapshot, name)
        if coming is None or current is None:
            found[name] = before.get(name, {})
            continue
        blocks = blocks_by_node(tuple(chain for _, chains in coming for chain in chains))
        found[name] = {node: StoredBlocks.of(current.model, mine) for node, mine in sorted(blocks.items())}
    return found


def may_come(snapshot: Snapshot, name: DeploymentName) -> list[tuple[str, Placement]] | None:
    """What a deployment may run on next, and when; None where that was not weighed yet."""
    outlook, rollout = snapshot.outlooks.get(name), snapshot.rollout(name)
    if rollout.current is not None and rollout.current.cold:
        return [("is cold, and was loaded here last", rollout.loaded)]
    if outlook is None or rollout.current is None or rollout.current.digest != outlook.plan:
        return None
    failovers = [(f"goes on here should {node} fail", chains) for node, chains in sorted(outlook.failovers.items())]
    decision = outlook.decision
    better = [
        ("would be better here, once that repays the move", one.option.chains)
        for one in decision.runners_up
        if one.option.origin not in STAGED_OTHERWISE and one.option.phi < decision.current.phi
    ]
    # A burst leaves no time to fetch what it takes: a route more is ready while it would still cost more than it saves.
    further = [
        ("has its next route here", one.option.chains)
        for one in decision.runners_up
        if one.option.origin is Origin.ROUTE_ADDED
    ]
    return [*failovers, *better[:1], *further[:1]]


def remembered(history: History, plans: Plans, now: datetime) -> History:
    """What was wanted lately, `plans` among it. Among nodes much alike noise says which failover is the best, and what
    was fetched for one is as good a minute later; only what was not wanted for `KEPT` is given up."""
    wanted = [({name: other[name] for name in other if name in plans}, at) for other, at in history]
    kept = [(other, at) for other, at in wanted if other != plans and now - at < KEPT]
    return (*kept[-(HISTORY_MAX - 1) :], (plans, now))


def permitted(snapshot: Snapshot, history: History) -> History:
    """The same without what a node must not have: a sensitive block where it is not trusted, now and not when the plan
    was weighed (I6)."""
    return tuple(
        ({name: _permitted(snapshot, name, by_node) for name, by_node in plans.items()}, at) for plans, at in history
    )


def _permitted(
    snapshot: Snapshot, name: DeploymentName, by_node: Mapping[NodeId, StoredBlocks]
) -> Mapping[NodeId, StoredBlocks]:
    deployment = snapshot.deployments.get(name)
    if deployment is None or not deployment.has_sensitive:
        return by_node
    found = {}
    for node, stored in by_node.items():
        manifest = snapshot.manifests.get(stored.model)
        # How many blocks a model has says its manifest; without it any of them may be its last.
        secret = stored.blocks if manifest is None else deployment.sensitive_of(len(manifest.blocks))
        hidden = exposed(secret, stored.blocks, snapshot.trusts(node))
        found[node] = StoredBlocks.of(stored.model, stored.blocks.difference(hidden)) if hidden else stored
    return found


def averaged(rates: Rates, snapshot: Snapshot, now: datetime, past_s: float) -> Rates:
    """How often deployments are asked for, averaged over about `AVERAGED_S`, after `past_s` more."""
    share = min(1.0, past_s / AVERAGED_S)
    found = {}
    for name in snapshot.deployments:
        before, arrivals = rates.get(name, 0.0), snapshot.arrivals.get(name)
        found[name] = before + share * ((0.0 if arrivals is None else arrivals.per_s(now)) - before)
    return found


def worth(snapshot: Snapshot, rates: Rates) -> dict[DeploymentName, float]:
    """What a byte on a disk is worth to each deployment: requests a second that wait less for it, each for as long as
    fetching it takes (mathematics.md, C3).

    A cold one is loaded as often as it is asked for; what another may go on with is needed as often as nodes fail.
    Whoever comes while it is fetched waits as well.
    """
    found = {}
    for name in snapshot.deployments:
        rate, current = rates.get(name, 0.0), snapshot.rollout(name).current
        needed_per_s = rate if current is not None and current.cold else FAILS_PER_S
        found[name] = needed_per_s * (1.0 + FETCHING_S * rate)
    return found


def ranked(worth: Mapping[DeploymentName, float]) -> dict[DeploymentName, float]:
    """The same in steps of a factor of two: what is worth about as much is not told anew in another order."""
    return {name: float(floor(log2(value))) if value > 0.0 else -inf for name, value in worth.items()}


def advice_for(node: NodeId, history: History, worth: Mapping[DeploymentName, float] = MappingProxyType({})) -> Advice:
    """What one node is to have, over all deployments: blocks of one model together, those first that are worth most to
    whoever wants them. A disk that has no room for all has the first."""
    wanted: dict[Digest, frozenset[int]] = {}
    best: dict[Digest, float] = {}
    for plans, _ in history:
        for name, by_node in plans.items():
            stored = by_node.get(node)
            if stored is not None and stored.ranges:
                wanted[stored.model] = wanted.get(stored.model, frozenset()) | stored.blocks
                best[stored.model] = max(best.get(stored.model, -inf), worth.get(name, -inf))
    ordered = sorted(wanted, key=lambda model: (-best[model], model))
    return tuple(StoredBlocks.of(model, wanted[model]) for model in ordered)


def named(history: History) -> frozenset[NodeId]:
    """Nodes of which any plan wants anything."""
    return frozenset(node for plans, _ in history for by_node in plans.values() for node in by_node)


def has_all(capacity: Capacity, advice: Advice) -> bool:
    """Whether a node says that all of it is on its disk."""
    held = {stored.model: stored.blocks for stored in capacity.on_disk}
    return all(stored.blocks <= held.get(stored.model, frozenset()) for stored in advice)


class Adviser:
    """One leader's advice to all agents."""

    def __init__(self, client: Client, identity: Identity, now: Callable[[], datetime]) -> None:
        self._client = client
        self._identity = identity
        self._now = now
        self._numbers = itertools.count(1)
        self._plans: Plans = {}
        self._history: History = ()
        self._rates: Rates = {}
        self._said: dict[NodeId, tuple[str, Advice, datetime]] = {}
        """By node: to which process of it, what, and when."""

    async def run(self, snapshot: Callable[[], Snapshot]) -> None:
        """Advise until cancelled."""
        while True:
            with contextlib.suppress(NatsError, OSError):  # the connection is away: the next look tries again
                await self.advise(snapshot())
            await asyncio.sleep(LOOK_S)

    async def advise(self, snapshot: Snapshot) -> None:
        """Tell whoever is to have something else than it was told last."""
        self._plans = to_stage(snapshot, self._plans)
        self._history = remembered(self._history, self._plans, self._now())
        history = permitted(snapshot, self._history)
        self._rates = averaged(self._rates, snapshot, self._now(), LOOK_S)
        values = ranked(worth(snapshot, self._rates))
        # Of very many nodes plans name few, and whoever was told nothing and is to have nothing hears nothing.
        concerned = sorted(named(history) | self._said.keys())
        present = {node: snapshot.nodes[node].capacity for node in concerned if snapshot.has(node)}
        wanted = {node: advice_for(node, history, values) for node in present if node not in snapshot.drained}
        for node, advice in due(present, wanted, self._said, self._now()).items():
            staging = Staging(
                node=node, term=snapshot.term, number=next(self._numbers), issued_at=self._now(), blocks=advice
            )
            data = seal(staging, STAGING_TYPE, self._identity.name, self._identity.key)
            await self._client.publish(subjects.staging(node), data)
            self._said[node] = (present[node].boot, advice, self._now())


def due(
    present: Mapping[NodeId, Capacity],
    wanted: Mapping[NodeId, Advice],
    said: Mapping[NodeId, tuple[str, Advice, datetime]],
    now: datetime,
) -> dict[NodeId, Advice]:
    """PURE: who is to be told, and what: a process that was told something else or nothing, or that lacks it still."""
    found: dict[NodeId, Advice] = {}
    for node, capacity in present.items():
        advice = wanted.get(node, ())
        boot, before, at = said.get(node, ("", (), now))
        is_new = advice != (before if boot == capacity.boot else ())
        if is_new or (now - at >= AGAIN and not has_all(capacity, advice)):
            found[node] = advice
    return found
