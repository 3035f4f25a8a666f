"""PURE: of very many nodes those among which plans are looked for, and the plan that is made among them.

A search compares all pairs of nodes, and beyond some dozens most of them are alike. A chain wants nodes that are fast,
roomy and near each other, so groups are taken: a node and those that it measured and that would complete a chain with
it soonest, the best groups first. Of each kind that a plan may need (what has the blocks already, the trusted, the
edge, the cloud, the roomiest) some are taken. It is a guess at the nodes worth using, not a proof
(`benchmarks.planning` says what it costs).
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain
from math import ceil

import numpy as np

from orchestrator.beliefs import GUESS_PRUDENCE, GUESSED_NODES_MAX, slower_than_promised
from orchestrator.fold import Snapshot
from orchestrator.planner import Proposal, make_plan
from orchestrator.rooms import believed_rooms
from orchestrator.searched import SEARCH_PERIOD, Searched
from profiler.compute import roofline
from profiler.kv import kv_tokens
from profiler.network import DEFAULT_LINK_BYTES_PER_S, DEFAULT_RTT_MS
from profiler.sizes import Sizes, sizes_of
from schemas.base import NodeId
from schemas.capacity import Capacity, LinkEstimate
from schemas.deployment import Deployment, Placement, nodes_of
from schemas.errors import ResplitError
from schemas.manifest import Manifest

NODES_MAX = GUESSED_NODES_MAX
"""As many, and those in use. Of fewer nodes all are taken."""
PARTNERS_MIN = 7
"""With each node come as many, and as many more as a chain needs: further routes and failovers need some too."""
GROUPS_MAX = 256
"""Nodes of a kind whose groups are compared, the fastest."""


def shortlisted(
    snapshot: Snapshot, deployment: Deployment, manifest: Manifest, now: datetime, searched: Searched | None = None
) -> Snapshot:
    """The same snapshot with only the nodes among which plans for a deployment are looked for: those that it uses, that
    are ready for a failure, and the likeliest others, which after `searched` are the same as then for as long as that
    search holds and most of them are there."""
    if len(snapshot.nodes) <= NODES_MAX:
        return snapshot
    kept = _in_use(snapshot, deployment)
    before = frozenset[NodeId]()
    if searched is not None and searched.at <= now < searched.at + SEARCH_PERIOD:
        before = frozenset(searched.facts.step_ms)
    if 2 * len(before & snapshot.offered.keys()) > NODES_MAX:
        return snapshot.among(kept | before)
    return snapshot.among(kept | _likeliest(snapshot, deployment, manifest, now, kept))


def planned_anew(
    snapshot: Snapshot,
    deployment: Deployment,
    manifest: Manifest,
    now: datetime,
    cause: str,
    avoid: frozenset[NodeId] = frozenset(),
    kept: Placement = (),
) -> Proposal:
    """The plan of the next epoch among the nodes of the shortlist, with at least as many routes as now. `avoid`, `kept`
    and errors as for `make_plan`; where others were not looked at, an error says so."""
    rollout = snapshot.rollout(deployment.name)
    current = rollout.current
    # Where the nodes are named there is nothing to look for.
    among = snapshot if deployment.chains is not None else shortlisted(snapshot, deployment, manifest, now)
    found = believed_rooms(among, deployment, manifest)
    routes = len(current.routes) if current is not None else 1
    try:
        return make_plan(
            deployment, manifest, found, rollout.epoch + 1, current, cause, avoid, kept=kept, routes=routes
        )
    except ResplitError as error:
        if among is snapshot:
            raise
        message = f"{error.message} (of {len(snapshot.nodes)} nodes the {len(among.nodes)} likeliest were looked at)"
        raise ResplitError(error.code, message, error.field) from error


def _in_use(snapshot: Snapshot, deployment: Deployment) -> set[NodeId]:
    """The nodes of its plans, and of those that are ready for when one of them fails."""
    found = {NodeId(node) for plan in snapshot.rollout(deployment.name).plans for node in plan.nodes}
    outlook = snapshot.outlooks.get(deployment.name)
    ready = () if outlook is None else outlook.failovers.values()
    return found.union(*map(nodes_of, ready), nodes_of(deployment.chains or ()))


@dataclass(frozen=True)
class _Nodes:
    """What the nodes that a plan may use would take for the whole model, each in an array."""

    names: Sequence[NodeId]
    number: Mapping[NodeId, int]
    step_ms: np.ndarray
    stages: np.ndarray
    """So many nodes like it hold the model."""
    boundary: int
    """Bytes that cross from one stage to the next."""


def _likeliest(
    snapshot: Snapshot, deployment: Deployment, manifest: Manifest, now: datetime, kept: Collection[NodeId]
) -> set[NodeId]:
    shunned = snapshot.rollout(deployment.name).shunned(now)
    offered = {name: one for name, one in snapshot.offered.items() if name not in shunned}
    nodes = _looked_at(snapshot, offered, deployment, manifest)
    found = set[NodeId]()
    kinds = _kinds(snapshot, offered, deployment, manifest, nodes)
    for left, kind in zip(range(len(kinds), 0, -1), kinds, strict=True):
        until = len(found) + ceil((NODES_MAX - len(kept) - len(found)) / left)
        for name in chain.from_iterable(kind):
            if len(found) >= until:
                break
            if name not in kept:
                found.add(name)
    return found


def _looked_at(
    snapshot: Snapshot, offered: Mapping[NodeId, Capacity], deployment: Deployment, manifest: Manifest
) -> _Nodes:
    sizes = sizes_of(manifest)
    cached = kv_tokens(deployment.settings)
    blocks = [loaded + cached * row for loaded, row in zip(sizes.loaded_bytes, sizes.kv_bytes_per_token, strict=True)]
    roomy = {name: one for name, one in offered.items() if one.memory_free_bytes >= min(blocks)} or offered
    free = np.array([max(1, one.memory_free_bytes) for one in roomy.values()], float)
    stages = np.clip(np.ceil(sum(blocks) / free), deployment.stages or 1, len(blocks))
    step_ms = np.array([float(roofline(one.provider, sizes).decode_ms.sum()) for one in roomy.values()])
    names = list(roomy)
    return _Nodes(
        names,
        {name: number for number, name in enumerate(names)},
        step_ms * _slower(snapshot, roomy, deployment, sizes),
        stages.astype(int),
        max(sizes.boundary_bytes),
    )


def _slower(snapshot: Snapshot, roomy: Mapping[NodeId, Capacity], deployment: Deployment, sizes: Sizes) -> np.ndarray:
    """By what factor each is slower than its roofline: as it measured, or as the best that did and with what disturbs
    it."""
    measured = {}
    for name, one in roomy.items():
        known = snapshot.nodes[name].times.get(deployment.model)
        if known is not None and (ratio := slower_than_promised(known, roofline(one.provider, sizes))) is not None:
            measured[name] = ratio
    guess = max(1.0, min(measured.values(), default=1.0)) * GUESS_PRUDENCE
    return np.array([measured.get(name, guess * (one.contention or 1.0)) for name, one in roomy.items()])


def _kinds(
    snapshot: Snapshot,
    offered: Mapping[NodeId, Capacity],
    deployment: Deployment,
    manifest: Manifest,
    nodes: _Nodes,
) -> list[Iterable[tuple[NodeId, ...]]]:
    """Groups of nodes, the best first, for each kind of node that a plan may need."""
    edge = [name for name in nodes.names if offered[name].tier == "edge"]
    cloud = [name for name in nodes.names if offered[name].tier != "edge"]
    at_hand = [name for name in nodes.names if any(one.model == deployment.model for one in offered[name].on_disk)]
    kinds = [at_hand]
    if deployment.sensitive_of(len(manifest.blocks)):
        kinds.append([name for name in nodes.names if snapshot.trusts(name)])
    kinds += [cloud, edge]
    roomiest = sorted(nodes.names, key=lambda name: (-offered[name].memory_free_bytes, name))
    return [[(name,) for name in roomiest], *(_groups(kind, offered, nodes) for kind in kinds)]


def _groups(kind: Collection[NodeId], offered: Mapping[NodeId, Capacity], nodes: _Nodes) -> list[tuple[NodeId, ...]]:
    """Of the fastest of some nodes, each with its partners, by what a chain of them would take."""
    seeds = sorted(kind, key=lambda name: (nodes.step_ms[nodes.number[name]], name))[:GROUPS_MAX]
    found = []
    for seed in seeds:
        own = nodes.number[seed]
        stages = int(nodes.stages[own])
        partners = sorted(
            (_hop_ms(link, nodes.boundary) + nodes.step_ms[other] / stages, link.peer)
            for link in offered[seed].links
            if (other := nodes.number.get(link.peer)) is not None and link.up and link.peer != seed
        )
        needed = [cost for cost, _ in partners[: stages - 1]]
        stranger = DEFAULT_RTT_MS / 2 + 1e3 * nodes.boundary / DEFAULT_LINK_BYTES_PER_S + nodes.step_ms[own] / stages
        needed += [stranger] * (stages - 1 - len(needed))
        group = (seed, *(NodeId(peer) for _, peer in partners[: max(PARTNERS_MIN, stages - 1)]))
        found.append((float(nodes.step_ms[own] / stages + sum(needed)), group))
    return [group for _, group in sorted(found)]


def _hop_ms(link: LinkEstimate, size: int) -> float:
    return link.rtt_ms / 2 + 1e3 * size / (link.goodput_bytes_per_s or DEFAULT_LINK_BYTES_PER_S)
