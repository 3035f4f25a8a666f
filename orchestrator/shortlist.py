"""PURE: of very many nodes those among which plans are looked for, and the plan that is made among them.

A search compares all pairs of nodes, and beyond some dozens most of them are alike. A chain wants nodes that are fast,
roomy and near each other, so groups are taken: a node and those that it measured and that would complete a chain with
it soonest, the best groups first. Of each kind that a plan may need (what has the blocks already, the trusted, the
edge, the cloud, the roomiest) some are taken. It is a guess at the nodes worth using, not a proof
(`benchmarks.shortlist` says what it costs).
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from math import ceil

import numpy as np

from orchestrator.beliefs import GUESS_PRUDENCE, slower_than_promised
from orchestrator.fold import Snapshot
from orchestrator.planner import Proposal, make_plan
from orchestrator.rooms import believed_rooms, unpromised_bytes
from orchestrator.searched import SEARCH_PERIOD, Searched
from profiler.compute import roofline
from profiler.memory import memory_bytes
from profiler.network import hop_ms, links_by_peer
from profiler.sizes import sizes_of
from schemas.base import NodeId
from schemas.capacity import Capacity
from schemas.deployment import Deployment, Placement, nodes_of
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest

NODES_MAX = 64
"""Of fewer nodes all are looked at. Of more as many, those in use among them,"""
OTHERS_MIN = 32
"""and at least so many besides those."""
ROOMIEST_MAX = 128
"""Where none of these does, as many of the roomiest."""
PARTNERS_MIN = 7
"""With each node come as many, and as many more as a chain needs: further routes and failovers need some too."""
GROUPS_MAX = 256
"""Nodes of a kind whose groups are compared, the fastest."""
STRANGER = NodeId("stranger")
"""One that nobody measured."""
UNFOUND = (ErrorCode.INFEASIBLE, ErrorCode.MODEL_TOO_LARGE)
"""What may be otherwise among other nodes."""


@dataclass(frozen=True)
class Shortlist:
    """Some of the nodes, as if there were no others."""

    snapshot: Snapshot
    drawn_at: datetime | None = None
    """When they were chosen; None where they are all there are."""


def shortlisted(
    snapshot: Snapshot, deployment: Deployment, manifest: Manifest, now: datetime, searched: Searched | None = None
) -> Shortlist:
    """The nodes among which plans for a deployment are looked for: those that it uses, that are ready for a failure,
    and the likeliest others. After `searched` they stay the same until they were chosen `SEARCH_PERIOD` ago or most of
    them are gone."""
    if len(snapshot.nodes) <= NODES_MAX:
        return Shortlist(snapshot)
    kept = _in_use(snapshot, deployment)
    drawn_at = None if searched is None else searched.drawn_at
    if searched is not None and drawn_at is not None and drawn_at <= now < drawn_at + SEARCH_PERIOD:
        before = searched.facts.step_ms.keys()
        if 2 * len(before & snapshot.offered.keys()) > len(before):
            return Shortlist(snapshot.among(kept | before), drawn_at)
    return Shortlist(snapshot.among(kept | _likeliest(snapshot, deployment, manifest, now, kept)), now)


def planned_anew(
    snapshot: Snapshot,
    deployment: Deployment,
    manifest: Manifest,
    now: datetime,
    cause: str,
    avoid: frozenset[NodeId] = frozenset(),
    kept: Placement = (),
) -> Proposal:
    """The plan of the next epoch among the nodes of the shortlist or, where none is found, among the roomiest; with at
    least as many routes as now. `avoid`, `kept` and errors as for `make_plan`; where others were not looked at, an
    error says so."""
    rollout = snapshot.rollout(deployment.name)
    current = rollout.current
    routes = len(current.routes) if current is not None else 1

    def among(some: Snapshot) -> Proposal:
        found = believed_rooms(some, deployment, manifest)
        return make_plan(
            deployment, manifest, found, rollout.epoch + 1, current, cause, avoid, kept=kept, routes=routes
        )

    # Where the nodes are named there is nothing to look for.
    named = deployment.chains is not None
    likeliest = snapshot if named else shortlisted(snapshot, deployment, manifest, now).snapshot
    try:
        return among(likeliest)
    except ResplitError as error:
        if likeliest is snapshot or error.code not in UNFOUND:
            raise
    roomiest = _roomiest(snapshot, deployment, manifest)
    try:
        return among(roomiest)
    except ResplitError as error:
        message = f"{error.message} (of {len(snapshot.nodes)} nodes the {len(roomiest.nodes)} roomiest were looked at)"
        raise ResplitError(error.code, message, error.field) from error


def _in_use(snapshot: Snapshot, deployment: Deployment) -> set[NodeId]:
    """The nodes of its plans, and of those that are ready for when one of them fails."""
    found = {NodeId(node) for plan in snapshot.rollout(deployment.name).plans for node in plan.nodes}
    outlook = snapshot.outlooks.get(deployment.name)
    ready = () if outlook is None else outlook.failovers.values()
    return found.union(*map(nodes_of, ready), nodes_of(deployment.chains or ()))


def _roomiest(snapshot: Snapshot, deployment: Deployment, manifest: Manifest) -> Snapshot:
    """The nodes in use, and those with the most room, whatever else is said of them: half of them trusted, where blocks
    are private and there are as many."""
    free = unpromised_bytes(snapshot)
    order = sorted(free, key=lambda name: (-free[name], name))
    private = bool(deployment.sensitive_of(len(manifest.blocks)))
    trusted = [name for name in order if snapshot.trusts(name)] if private else []
    first = [*trusted[: ROOMIEST_MAX // 2], *order]
    return snapshot.among(_in_use(snapshot, deployment) | set(list(dict.fromkeys(first))[:ROOMIEST_MAX]))


@dataclass(frozen=True)
class _Nodes:
    """What the nodes that a plan may use would take for the whole model, each in an array."""

    offered: Mapping[NodeId, Capacity]
    number: Mapping[NodeId, int]
    free_bytes: Mapping[NodeId, int]
    step_ms: np.ndarray
    stages: np.ndarray
    """So many nodes like it hold the model."""
    boundary: int
    """Bytes that cross from one stage to the next."""

    def roomiest(self, kind: Iterable[NodeId]) -> list[NodeId]:
        return sorted(kind, key=lambda name: (-self.free_bytes[name], name))


def _likeliest(
    snapshot: Snapshot, deployment: Deployment, manifest: Manifest, now: datetime, kept: Collection[NodeId]
) -> set[NodeId]:
    shunned = snapshot.rollout(deployment.name).shunned(now)
    nodes = _looked_at(snapshot, deployment, manifest, shunned)
    kinds = [iter(kind) for kind in _kinds(snapshot, deployment, manifest, nodes)]
    room = max(NODES_MAX - len(snapshot.offered.keys() & kept), OTHERS_MIN)
    found = set[NodeId]()
    # A part for each kind, and what one has no use for is for those behind it, and then for whichever has more.
    for left, kind in (*zip(range(len(kinds), 0, -1), kinds, strict=True), *((1, kind) for kind in kinds)):
        until = len(found) + ceil((room - len(found)) / left)
        while len(found) < until and (name := next(kind, None)) is not None:
            if name not in kept:
                found.add(name)
    return found


def _looked_at(snapshot: Snapshot, deployment: Deployment, manifest: Manifest, shunned: Collection[NodeId]) -> _Nodes:
    sizes = sizes_of(manifest)
    blocks = [memory_bytes(block, deployment.settings) for block in manifest.blocks]
    free = unpromised_bytes(snapshot)
    willing = {name: one for name, one in snapshot.offered.items() if name not in shunned}
    roomy = {name: one for name, one in willing.items() if free[name] >= min(blocks)} or willing
    stages = np.ceil(sum(blocks) / np.array([max(1, free[name]) for name in roomy], float))
    promised = [roofline(one.provider, sizes) for one in roomy.values()]
    known = [snapshot.nodes[name].times.get(deployment.model) for name in roomy]
    measured = [slower_than_promised(said, one) for said, one in zip(known, promised, strict=True)]
    best = max(1.0, min((ratio for ratio in measured if ratio is not None), default=1.0))
    slower = [
        ratio if ratio is not None else best * GUESS_PRUDENCE * (one.contention or 1.0)
        for ratio, one in zip(measured, roomy.values(), strict=True)
    ]
    return _Nodes(
        roomy,
        {name: number for number, name in enumerate(roomy)},
        free,
        np.array([float(one.decode_ms.sum()) for one in promised]) * np.array(slower),
        np.clip(stages, deployment.stages or 1, len(blocks)).astype(int),
        max(sizes.boundary_bytes),
    )


def _kinds(snapshot: Snapshot, deployment: Deployment, manifest: Manifest, nodes: _Nodes) -> list[Iterable[NodeId]]:
    """The nodes of each kind that a plan may need, the best first."""
    edge = {name for name, one in nodes.offered.items() if one.tier == "edge"}
    at_hand = {name for name, one in nodes.offered.items() if any(s.model == deployment.model for s in one.on_disk)}
    kinds: list[Iterable[NodeId]] = [nodes.roomiest(nodes.offered)]
    if deployment.sensitive_of(len(manifest.blocks)):
        trusted = {name for name in nodes.offered if snapshot.trusts(name)}
        kinds += [nodes.roomiest(trusted), _grouped(trusted, trusted, nodes)]
    return [*kinds, *(_grouped(kind, nodes.offered, nodes) for kind in (at_hand, nodes.offered.keys() - edge, edge))]


def _grouped(kind: Collection[NodeId], others: Collection[NodeId], nodes: _Nodes) -> Iterator[NodeId]:
    """The fastest of some nodes, each with its partners among others, by what a chain of them would take."""
    seeds = sorted(kind, key=lambda name: (nodes.step_ms[nodes.number[name]], name))[:GROUPS_MAX]
    found = []
    for seed in seeds:
        own = nodes.number[seed]
        stages = int(nodes.stages[own])
        # By what it measured alone: what its peers did is not looked up for each of very many pairs.
        links = {seed: links_by_peer(nodes.offered[seed])}
        partners = sorted(
            (hop_ms(links, seed, peer, nodes.boundary) + nodes.step_ms[nodes.number[peer]] / stages, peer)
            for peer, link in links[seed].items()
            if peer in others and peer in nodes.number and link.up and peer != seed
        )
        needed = [cost for cost, _ in partners[: stages - 1]]
        stranger = hop_ms({}, seed, STRANGER, nodes.boundary) + nodes.step_ms[own] / stages
        needed += [stranger] * (stages - 1 - len(needed))
        group = (seed, *(peer for _, peer in partners[: max(PARTNERS_MIN, stages - 1)]))
        found.append((float(nodes.step_ms[own] / stages + sum(needed)), group))
    return chain.from_iterable(group for _, group in sorted(found))
