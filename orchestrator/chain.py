"""PURE: from the rooms there are to the best chain of stages for one route, or why there is none (mathematics.md A1).

Sensitive blocks go to trusted nodes alone (I6). Where the first and the last block are sensitive, one trusted node may
hold both while others hold the middle: the U-shaped form.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.rooms import Room
from orchestrator.solvers.problem import Floats, Integers, Mask, Piece, Problem, Solution, site_hops
from orchestrator.solvers.solve import Objective, solve
from profiler.forecast import forecast
from profiler.network import boundary_bytes, hop_ms, links_of
from profiler.objective import Weights
from schemas.base import NodeId
from schemas.capacity import MS_MAX, Capacity
from schemas.deployment import Chain, Deployment, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import spans

LATENCY_REF_MS_MIN = 2.0
"""L_ref is at least this: beyond 500 tokens a second a plan that is faster still is hardly worth a move."""
CLOUD_GAIN = 0.15
"""A chain over the cloud has to be better by this share of the edge's own, its price included: as much as a plan has
to be better to be moved to (`orchestrator.trigger.MARGIN`)."""
HEADS_MAX = 8
"""Trusted nodes that are tried as the two ends of a U, the fastest first: each is a search of its own. The others are
only where there is no plan with these."""
TRUST_MORE = "`resplit trust NODE` if you trust another, add memory, or keep fewer blocks private"


@dataclass(frozen=True)
class Ways:
    """What it takes to cross between nodes: made once for many questions about one model and some of the nodes."""

    site: Mapping[NodeId, int]
    hop_ns: Integers
    boundary: Integers


def best_chain(
    deployment: Deployment,
    manifest: Manifest,
    rooms: Mapping[NodeId, Room],
    avoid: frozenset[NodeId] = frozenset(),
    ways: Ways | None = None,
    known: Chain = (),
) -> tuple[Chain, str]:
    """The chain to begin with, and how good it is: the edge's own unless the cloud's is well worth its price.

    `avoid` are nodes to leave out where a chain without them exists; `ways` covers all nodes of `rooms`; `known` is a
    chain that may do, so that only better ones have to be looked for. Raises `ResplitError`: MODEL_TOO_LARGE naming the
    bytes short, INFEASIBLE where the bytes are there but no assignment is.
    """
    if not rooms:
        raise ResplitError(ErrorCode.INFEASIBLE, "no node is here; start agents, or wait until they have reported")
    willing = {name: room for name, room in rooms.items() if name not in avoid}
    for offered in (willing, rooms) if willing and len(willing) < len(rooms) else (rooms,):
        anywhere = _found(deployment, manifest, offered, ways, known)
        edge = on_the_edge(offered)
        if len(edge) == len(offered) or (anywhere is not None and within(anywhere[0], edge)):
            # Nothing of the edge is better than what is the best of everything and of the edge.
            here, anywhere = anywhere, None
        else:
            here = _found(deployment, manifest, edge, ways, known)
        if here is not None and anywhere is not None:
            return anywhere if _well_worth(anywhere[0], here[0], manifest, offered) else here
        found = here or anywhere
        if found is not None:
            return found
    raise _shortfall(deployment, manifest, rooms)


def fastest_chain(
    deployment: Deployment,
    manifest: Manifest,
    rooms: Mapping[NodeId, Room],
    ways: Ways | None = None,
    known: Chain = (),
) -> Chain | None:
    """The fastest (or the most even) chain whatever it costs, or None where there is none. `ways` and `known` as for
    `best_chain`."""
    found = _found(deployment, manifest, rooms, ways, known)
    return None if found is None else found[0]


def within(chain: Chain, rooms: Mapping[NodeId, Room]) -> bool:
    """Whether all nodes of a chain are among the rooms."""
    return all(stage.node in rooms for stage in chain)


def on_the_edge(rooms: Mapping[NodeId, Room]) -> dict[NodeId, Room]:
    """The rooms that are not of the cloud."""
    return {name: room for name, room in rooms.items() if room.capacity.tier == "edge"}


def beside(rooms: Mapping[NodeId, Room], taken: Sequence[Chain]) -> dict[NodeId, Room]:
    """The rooms that are left beside routes: a node that serves one is slower by it and holds its blocks already."""
    found = dict(rooms)
    for name in {stage.node for chain in taken for stage in chain} & rooms.keys():
        own = [{block for stage in chain if stage.node == name for block in stage.blocks} for chain in taken]
        uses, held = sum(map(bool, own)), frozenset[int]().union(*own)
        room = rooms[name]
        found[name] = Room(
            room.host.slower(1 + uses),
            max(0, room.free_bytes - sum(room.need_bytes[block] for block in held)),
            tuple(0 if block in held else size for block, size in enumerate(room.need_bytes)),
            room.trusted,
        )
    return found


def ways_of(rooms: Mapping[NodeId, Room], manifest: Manifest) -> Ways:
    """The ways between all nodes of `rooms`."""
    site, latency, byte_ms = _sites({name: room.capacity for name, room in rooms.items()})
    sizes = [boundary_bytes(manifest, block) for block in range(len(manifest.blocks))]
    return Ways(site, *site_hops(latency * 1e6, byte_ms * 1e6, sizes))


def _found(
    deployment: Deployment, manifest: Manifest, offered: Mapping[NodeId, Room], ways: Ways | None, known: Chain
) -> tuple[Chain, str] | None:
    if not offered:
        return None
    even = deployment.stages is not None
    problem = problem_of(deployment, manifest, offered, ways)
    heads = _heads(problem, deployment, offered)
    names = list(offered)
    number = {name: k for k, name in enumerate(names)}
    start = [Piece(number[s.node], s.first, s.last) for s in known] if within(known, offered) else []
    objective: Objective = "throughput" if even else "latency"
    found = solve(problem, objective, deployment.stages, heads=heads[:HEADS_MAX], known=start)
    if found.pieces is None and len(heads) > HEADS_MAX:
        found = solve(problem, objective, deployment.stages, heads=heads[HEADS_MAX:])
    if found.pieces is None:
        return None
    stages = tuple(Stage(node=names[piece.node], first=piece.first, last=piece.last) for piece in found.pieces)
    return stages, f"{_praise(found, even)} on {len(offered)} node(s)"


def _heads(problem: Problem, deployment: Deployment, offered: Mapping[NodeId, Room]) -> list[int]:
    """The trusted nodes with room for both ends, the fastest first, where both are sensitive and some node is not
    trusted."""
    ends = {0, problem.blocks - 1}
    if not ends <= deployment.sensitive_of(problem.blocks) or all(room.trusted for room in offered.values()):
        return []
    able = [
        number
        for number, room in enumerate(offered.values())
        if room.trusted and sum(room.need_bytes[block] for block in ends) <= room.free_bytes
    ]
    return sorted(able, key=lambda number: (int(problem.time_ns[number].sum()), number))


def _well_worth(there: Chain, here: Chain, manifest: Manifest, offered: Mapping[NodeId, Room]) -> bool:
    """Whether the cloud's chain outweighs its price, its latency and what it sees."""
    hosts = {name: room.host for name, room in offered.items()}
    trusted = frozenset(name for name, room in offered.items() if room.trusted)
    known, asked = (forecast((chain,), hosts, manifest, trusted=trusted) for chain in (here, there))
    latency_ref_ms = max(LATENCY_REF_MS_MIN, min(one.e2e_ms / (one.output_tokens or 1) for one in (known, asked)))
    own, other = (one.objective(latency_ref_ms, Weights()).phi for one in (known, asked))
    return other < (1 - CLOUD_GAIN) * own


def _praise(found: Solution, even: bool) -> str:
    """What may be said of a solution: a search that ended early says how far from the best it can be."""
    best = "most even" if even else "fastest"
    return f"the {best}" if found.proven else f"within {found.gap:.1%} of the {best}"


def problem_of(
    deployment: Deployment, manifest: Manifest, rooms: Mapping[NodeId, Room], ways: Ways | None = None
) -> Problem:
    """What a solver is asked; `ways` covers all nodes of `rooms`, and is made here where it is not given."""
    ways = ways or ways_of(rooms, manifest)
    times = np.array([room.host.times.decode_ms for room in rooms.values()])
    count = len(manifest.blocks)
    # Of the sites those that nodes are on.
    used, site = np.unique([ways.site[name] for name in rooms], return_inverse=True)
    return Problem(
        np.rint(np.minimum(times, MS_MAX) * 1e6).astype(np.int64),
        np.array([room.need_bytes for room in rooms.values()], np.int64),
        np.array([room.free_bytes for room in rooms.values()], np.int64),
        ways.hop_ns[:, used[:, None], used[None, :]],
        site.astype(np.int64),
        ways.boundary,
        _allowed(rooms, deployment.sensitive_of(count), count),
    )


def _allowed(rooms: Mapping[NodeId, Room], sensitive: frozenset[int], count: int) -> Mask | None:
    """[M, L]: whether a node may hold a block; None where every node may hold all."""
    if not sensitive or all(room.trusted for room in rooms.values()):
        return None
    secret = np.isin(np.arange(count), list(sensitive))
    trusted = np.array([room.trusted for room in rooms.values()])
    return trusted[:, None] | ~secret[None, :]


def _sites(capacities: Mapping[NodeId, Capacity]) -> tuple[Mapping[NodeId, int], Floats, Floats]:
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
    known = links_of(capacities)
    for here, there in {(a, b) for pair in links for a, b in (pair, pair[::-1])}:
        fixed = hop_ms(known, here, there, 0)
        latency[number[here], number[there]] = fixed
        byte_ms[number[here], number[there]] = hop_ms(known, here, there, 1) - fixed
    return {name: number.get(name, 0) for name in capacities}, latency, byte_ms


def _shortfall(deployment: Deployment, manifest: Manifest, rooms: Mapping[NodeId, Room]) -> ResplitError:
    """Why no assignment exists, with the bytes that are missing where it is a matter of bytes."""
    needs = [min(room.need_bytes[block] for room in rooms.values()) for block in range(len(manifest.blocks))]
    need, have = sum(needs), sum(room.free_bytes for room in rooms.values())
    if need > have:
        message = f"{manifest.name!r} needs {need} bytes, the nodes have {have}, {need - have} bytes short"
        return ResplitError(ErrorCode.MODEL_TOO_LARGE, message)
    if (unsafe := _unsafe(deployment, manifest, rooms)) is not None:
        return unsafe
    roomiest = max(room.free_bytes for room in rooms.values())
    for block, size in enumerate(needs):
        if not any(room.need_bytes[block] <= room.free_bytes for room in rooms.values()):
            message = (
                f"block {block} of {manifest.name!r} needs {size} bytes on one node, "
                f"the roomiest has {roomiest}, {size - roomiest} bytes short"
            )
            return ResplitError(ErrorCode.MODEL_TOO_LARGE, message)
    if deployment.stages is not None and deployment.stages > len(rooms):
        message = (
            f"{deployment.stages} stages need as many nodes, and {len(rooms)} may run them: neither lost nor drained; "
            "ask for fewer, or add nodes"
        )
        return ResplitError(ErrorCode.INFEASIBLE, message, "stages")
    if deployment.stages == 1:
        short = min(sum(room.need_bytes) - room.free_bytes for room in rooms.values())
        message = f"{manifest.name!r} does not fit on one node, {short} bytes short; ask for more stages"
        return ResplitError(ErrorCode.MODEL_TOO_LARGE, message, "stages")
    asked = "" if deployment.stages is None else f" in {deployment.stages} stages"
    message = (
        f"{manifest.name!r} needs {need} bytes and the nodes have {have}, but no cut into whole blocks fits{asked}"
    )
    if not all(room.trusted for room in rooms.values()) and (kept := deployment.sensitive_of(len(manifest.blocks))):
        message += f" with blocks {spans(sorted(kept))} on trusted nodes alone; {TRUST_MORE}"
        return ResplitError(ErrorCode.INFEASIBLE, message, "sensitive")
    return ResplitError(ErrorCode.INFEASIBLE, message)


def _unsafe(deployment: Deployment, manifest: Manifest, rooms: Mapping[NodeId, Room]) -> ResplitError | None:
    """Why the trusted nodes cannot hold the sensitive blocks, if they cannot."""
    trusted = [room for room in rooms.values() if room.trusted]
    sensitive = sorted(deployment.sensitive_of(len(manifest.blocks)))
    for block in sensitive:
        if not any(room.need_bytes[block] <= room.free_bytes for room in trusted):
            message = (
                f"block {block} of {manifest.name!r} is sensitive and none of the {len(trusted)} trusted node(s) has "
                f"room for it; {TRUST_MORE}"
            )
            return ResplitError(ErrorCode.INFEASIBLE, message, "sensitive")
    need = sum(min(room.need_bytes[block] for room in trusted) for block in sensitive)
    have = sum(room.free_bytes for room in trusted)
    if need <= have:
        return None
    message = (
        f"the sensitive blocks of {manifest.name!r} need {need} bytes, the trusted nodes have {have}, "
        f"{need - have} bytes short; {TRUST_MORE}"
    )
    return ResplitError(ErrorCode.INFEASIBLE, message, "sensitive")
