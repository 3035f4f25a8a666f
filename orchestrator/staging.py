"""What each agent is to have on its disk ahead of need: the blocks of the plans that may come next.

`to_stage` is PURE. `Adviser` tells agents (`schemas.staging`), each only when what it is to have changed, or when it
restarted or lacks some of it for long: an advice that got lost costs a fetch later, no more.
"""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta

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

STAGED_OTHERWISE = (Origin.CURRENT, Origin.FAILOVER, Origin.ROUTE_GIVEN_BACK)
"""Plans whose blocks are loaded already, or are advised for the sake of the failover."""

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


def advice_for(node: NodeId, history: History) -> Advice:
    """What one node is to have, over all deployments; blocks of one model together."""
    wanted: dict[Digest, frozenset[int]] = {}
    found = [by_node[node] for plans, _ in history for by_node in plans.values() if node in by_node]
    for stored in (stored for stored in found if stored.ranges):
        wanted[stored.model] = wanted.get(stored.model, frozenset()) | stored.blocks
    return tuple(StoredBlocks.of(model, blocks) for model, blocks in sorted(wanted.items()))


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
        wanted = {node: advice_for(node, history) for node in snapshot.offered}
        for node, advice in due(snapshot.present, wanted, self._said, self._now()).items():
            staging = Staging(
                node=node, term=snapshot.term, number=next(self._numbers), issued_at=self._now(), blocks=advice
            )
            data = seal(staging, STAGING_TYPE, self._identity.name, self._identity.key)
            await self._client.publish(subjects.staging(node), data)
            self._said[node] = (snapshot.present[node].boot, advice, self._now())


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
