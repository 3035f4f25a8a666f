"""PURE: one deployment and the rooms there are, to one plan or one typed error (mathematics.md A1, A2)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from orchestrator.rooms import Room
from orchestrator.solvers.problem import Floats, Integers, Problem, Solution, site_hops
from orchestrator.solvers.solve import solve
from profiler.cost import Estimate, block_time, boundary_bytes, hop_ms, predict
from schemas.base import NodeId
from schemas.capacity import Capacity
from schemas.deployment import Deployment, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import Plan, Route


@dataclass(frozen=True)
class Proposal:
    """A plan and what it is predicted to cost."""

    plan: Plan
    estimate: Estimate


def make_plan(
    deployment: Deployment,
    manifest: Manifest,
    rooms: Mapping[NodeId, Room],
    epoch: int,
    previous: Plan | None,
    cause: str,
    avoid: frozenset[NodeId] = frozenset(),
) -> Proposal:
    """The plan of the next epoch: the operator's own placement, else the fastest (or the most even) cut.

    `avoid` are nodes to leave out where a plan without them exists. Raises `ResplitError`: MODEL_TOO_LARGE
    naming the bytes short, INFEASIBLE where the bytes are there but no assignment is, INVALID_REQUEST where the
    deployment contradicts itself or the model. The first stage's node is the route's source: the ingress
    tokenises where the embedding is.
    """
    check_shape(deployment, manifest)
    if deployment.placement is not None:
        stages, how = _checked(deployment.placement, manifest, rooms), "as the operator placed it"
    else:
        stages, how = _solved(deployment, manifest, rooms, avoid)
    settings = deployment.settings
    route = Route(index=0, source=stages[0].node, stages=stages, max_sequences=settings.max_sequences)
    estimate = predict(route, {name: room.capacity for name, room in rooms.items()}, manifest, deployment.model)
    plan = Plan(
        deployment=deployment.name,
        model=deployment.model,
        epoch=epoch,
        previous=previous.digest if previous is not None else None,
        block_count=len(manifest.blocks),
        settings=settings,
        routes=(route,),
        slo=deployment.slo,
        reason=f"{cause}; {len(stages)} stage(s), {how}, {estimate.tpot_ms:.2f} ms a step predicted",
    )
    return Proposal(plan, estimate)


def check_shape(deployment: Deployment, manifest: Manifest) -> None:
    """Whether the deployment can be meant for this model at all; raises INVALID_REQUEST naming the field."""
    count = len(manifest.blocks)
    longest = manifest.text.context_length if manifest.text is not None else None
    if longest is not None and deployment.settings.context_tokens > longest:
        message = f"context_tokens is {deployment.settings.context_tokens}, {manifest.name!r} reads at most {longest}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "settings.context_tokens")
    if deployment.stages is not None and deployment.stages > count:
        message = f"{manifest.name!r} has {count} block(s) and cannot be cut into {deployment.stages} stages"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "stages")
    placement = deployment.placement
    if placement is None:
        return
    if not placement:
        raise ResplitError(ErrorCode.INVALID_REQUEST, "a placement needs at least one stage", "placement")
    if deployment.stages is not None and deployment.stages != len(placement):
        message = f"stages is {deployment.stages} but placement has {len(placement)}; leave one of them out"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "stages")
    expected = 0
    for position, stage in enumerate(placement):
        if stage.first != expected:
            message = f"stage {position} starts at block {stage.first}; block {expected} comes next"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, f"placement.{position}.first")
        expected = stage.last + 1
    if expected != count:
        message = f"the placement ends at block {expected - 1}; {manifest.name!r} has blocks 0 to {count - 1}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, f"placement.{len(placement) - 1}.last")


def _checked(placement: tuple[Stage, ...], manifest: Manifest, rooms: Mapping[NodeId, Room]) -> tuple[Stage, ...]:
    """The placement itself, once every node of it is there and has the memory."""
    for position, stage in enumerate(placement):
        if stage.node not in rooms:
            known = ", ".join(rooms) or "none"
            message = f"node {stage.node!r} is not here; the nodes present are: {known}"
            raise ResplitError(ErrorCode.INFEASIBLE, message, f"placement.{position}.node")
    for position, stage in enumerate(placement):
        room = rooms[stage.node]
        blocks = {b for other in placement if other.node == stage.node for b in other.blocks}
        need = sum(room.need_bytes[b] for b in blocks)
        if need > room.free_bytes:
            message = (
                f"node {stage.node!r} needs {need} bytes for its blocks of {manifest.name!r} "
                f"and has {room.free_bytes}, {need - room.free_bytes} bytes short"
            )
            raise ResplitError(ErrorCode.INFEASIBLE, message, f"placement.{position}.node")
    return placement


def _solved(
    deployment: Deployment, manifest: Manifest, rooms: Mapping[NodeId, Room], avoid: frozenset[NodeId]
) -> tuple[tuple[Stage, ...], str]:
    if not rooms:
        raise ResplitError(ErrorCode.INFEASIBLE, "no node is here; start agents, or wait until they have reported")
    willing = {name: room for name, room in rooms.items() if name not in avoid}
    for offered in (willing, rooms) if willing and len(willing) < len(rooms) else (rooms,):
        problem = _problem(deployment, manifest, offered)
        even = deployment.stages is not None
        found = solve(problem, "throughput", deployment.stages) if even else solve(problem)
        if found.pieces is not None:
            names = list(offered)
            stages = tuple(Stage(node=names[piece.node], first=piece.first, last=piece.last) for piece in found.pieces)
            return stages, f"{_praise(found, even)} on {len(offered)} node(s)"
    raise _shortfall(deployment, manifest, rooms)


def _praise(found: Solution, even: bool) -> str:
    """What may be said of a solution: a search that ended early says how far from the best it can be."""
    best = "most even" if even else "fastest"
    return f"the {best}" if found.proven else f"within {found.gap:.1%} of the {best}"


def _problem(deployment: Deployment, manifest: Manifest, rooms: Mapping[NodeId, Room]) -> Problem:
    capacities = {name: room.capacity for name, room in rooms.items()}
    count = len(manifest.blocks)
    times = [
        [block_time(capacity, manifest, deployment.model, block).decode_ms for block in range(count)]
        for capacity in capacities.values()
    ]
    site, latency, byte_ms = _sites(capacities)
    sizes = [boundary_bytes(manifest, block) for block in range(count)]
    hops, boundary = site_hops(latency * 1e6, byte_ms * 1e6, sizes)
    return Problem(
        np.rint(np.array(times) * 1e6).astype(np.int64),
        np.array([room.need_bytes for room in rooms.values()], np.int64),
        np.array([room.free_bytes for room in rooms.values()], np.int64),
        hops,
        site,
        boundary,
    )


def _sites(capacities: Mapping[NodeId, Capacity]) -> tuple[Integers, Floats, Floats]:
    """The site of each node, and latency and time per byte between sites, in milliseconds.

    A node that measured a link, or that another one measured, is a site of its own; all others are alike, and are one.
    """
    links = {
        (here, link.peer)
        for here, capacity in capacities.items()
        for link in capacity.links
        if link.peer in capacities and link.peer != here
    }
    linked = {name for pair in links for name in pair}
    number = {name: k + 1 for k, name in enumerate(name for name in capacities if name in linked)}
    strangers = (NodeId("here"), NodeId("there"))
    shape = (len(number) + 1, len(number) + 1)
    latency = np.full(shape, hop_ms({}, *strangers, 0))
    byte_ms = np.full(shape, hop_ms({}, *strangers, 1)) - latency
    for here, there in {(a, b) for pair in links for a, b in (pair, pair[::-1])}:
        fixed = hop_ms(capacities, here, there, 0)
        latency[number[here], number[there]] = fixed
        byte_ms[number[here], number[there]] = hop_ms(capacities, here, there, 1) - fixed
    return np.array([number.get(name, 0) for name in capacities]), latency, byte_ms


def _shortfall(deployment: Deployment, manifest: Manifest, rooms: Mapping[NodeId, Room]) -> ResplitError:
    """Why no assignment exists, with the bytes that are missing where it is a matter of bytes."""
    needs = [min(room.need_bytes[block] for room in rooms.values()) for block in range(len(manifest.blocks))]
    need, have = sum(needs), sum(room.free_bytes for room in rooms.values())
    if need > have:
        message = f"{manifest.name!r} needs {need} bytes, the nodes have {have}, {need - have} bytes short"
        return ResplitError(ErrorCode.MODEL_TOO_LARGE, message)
    roomiest = max(room.free_bytes for room in rooms.values())
    for block, size in enumerate(needs):
        if not any(room.need_bytes[block] <= room.free_bytes for room in rooms.values()):
            message = (
                f"block {block} of {manifest.name!r} needs {size} bytes on one node, "
                f"the roomiest has {roomiest}, {size - roomiest} bytes short"
            )
            return ResplitError(ErrorCode.MODEL_TOO_LARGE, message)
    if deployment.stages is not None and deployment.stages > len(rooms):
        message = f"{deployment.stages} stages need as many nodes, and {len(rooms)} are here"
        return ResplitError(ErrorCode.INFEASIBLE, message, "stages")
    if deployment.stages == 1:
        short = min(sum(room.need_bytes) - room.free_bytes for room in rooms.values())
        message = f"{manifest.name!r} does not fit on one node, {short} bytes short; ask for more stages"
        return ResplitError(ErrorCode.MODEL_TOO_LARGE, message, "stages")
    asked = "" if deployment.stages is None else f" in {deployment.stages} stages"
    message = (
        f"{manifest.name!r} needs {need} bytes and the nodes have {have}, but no cut into whole blocks fits{asked}"
    )
    return ResplitError(ErrorCode.INFEASIBLE, message)
