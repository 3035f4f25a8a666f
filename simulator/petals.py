"""PURE: Petals' rule, for comparison: every server hosts the run of blocks whose total throughput is worst.

Borzunov et al., "Petals: Collaborative Inference and Fine-tuning of Large Models" (arXiv 2209.01188) and "Distributed
Inference and Fine-tuning of Large Language Models Over The Internet" (arXiv 2312.08361, section 3.2), with the details
of its block selection as its servers have them. A server that joins takes the run with the worst blocks. Later it looks
now and then whether the swarm's bottleneck would be so much faster if it moved, the others following, that what there
is comes to less than `BALANCE_QUALITY` of that; then it moves. Clients hold both ends of the model and route by the
shortest path over the runs.

Simplified: all servers look at the same times, in a random order, not each at random times; a throughput is what is
believed of a server now, where Petals keeps what it measured when it started; and paths are routes of a plan, for all
clients, not found anew for each session. Two things are of this world: sensitive blocks are on trusted nodes alone, and
since plans are exchanged while the old one serves, a server's run takes half of its memory where the model then fits,
and it moves only where there is room for it beside what serves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median

import numpy as np

from orchestrator.chain import problem_of
from orchestrator.fold import Snapshot
from orchestrator.rooms import Room, believed_rooms
from orchestrator.solvers.problem import Floats, Mask, Piece, Problem, latency_ns
from profiler.memory import kv_memory_bytes, weight_memory_bytes
from profiler.network import DEFAULT_LINK_BYTES_PER_S, boundary_bytes
from schemas.base import NodeId
from schemas.deployment import ROUTES_MAX, Chain, Deployment, Placement, Stage
from schemas.manifest import Manifest
from simulator.petals_paths import cheapest_paths

BALANCE_QUALITY = 0.75
"""Petals' own default: what there is must be worse than this share of what there could be."""
EPSILON = 1e-3
"""Petals' own too: that much more is taken away than a server gives, so that rounding moves nobody."""
PERIOD_S = 60.0
"""Between two looks; Petals' mean is 120 s for each server."""


@dataclass(frozen=True)
class Swarm:
    """Who hosts what."""

    runs: Mapping[NodeId, range] = field(default_factory=dict)
    """The blocks of each server; of one without room none."""
    placement: Placement = ()
    """The paths over them. They are those of before where there are none now: the runs do not cover the model, or
    nobody can be a client."""


@dataclass(frozen=True)
class _Server:
    """What a node brings."""

    length: int
    """Blocks it hosts."""
    starts: tuple[int, ...]
    """Where its run may begin."""
    throughput: float
    """Blocks' tokens per second."""


def balanced(snapshot: Snapshot, deployment: Deployment, before: Swarm, rng: np.random.Generator) -> Swarm:
    """The swarm after all nodes that have reported looked where they should be; those that are new join first."""
    manifest = snapshot.manifests[deployment.model]
    rooms = believed_rooms(snapshot, deployment, manifest)
    if not rooms:
        return Swarm({}, before.placement)
    problem = problem_of(deployment, manifest, rooms)
    servers = _servers(problem, rooms, deployment, manifest, before)
    able = {node: server for node, server in servers.items() if server.length}
    starts = {
        node: before.runs[node].start
        for node, server in able.items()
        if before.runs.get(node) and before.runs[node].start in server.starts
    }
    for node, server in able.items():
        if node not in starts:
            starts[node] = _worst(_throughputs(problem.blocks, able, starts), server)
    for node in _shuffled(sorted(able), rng):
        starts = _looked(problem.blocks, able, starts, node, rng)
    runs = {node: range(starts[node], starts[node] + able[node].length) if node in able else range(0) for node in rooms}
    return Swarm(runs, _placement(problem, list(rooms), runs, before, deployment))


def _servers(
    problem: Problem, rooms: Mapping[NodeId, Room], deployment: Deployment, manifest: Manifest, before: Swarm
) -> dict[NodeId, _Server]:
    """By node, in the order of `rooms`: as many blocks as before, or as half of its memory holds; where that is not
    the whole model, as all of it does."""
    whole = [weight_memory_bytes(b) + kv_memory_bytes(b, deployment.settings) for b in manifest.blocks]
    largest, ends = max(1, *whole[1:-1]), whole[0] + whole[-1]
    spare = {
        node: room.free_bytes
        + sum(a - b for a, b in zip(whole, room.need_bytes, strict=True))
        - (ends if problem.may_run[number, [0, -1]].all() else 0)
        for number, (node, room) in enumerate(rooms.items())
    }
    half, all_of_it = ({node: max(0, size // parts // largest) for node, size in spare.items()} for parts in (2, 1))
    asked = {node: len(before.runs.get(node, ())) or half[node] for node in rooms}
    lengths = next((one for one in (asked, half) if sum(one.values()) >= problem.blocks - 2), all_of_it)
    size = boundary_bytes(manifest, 1)
    found = {}
    for number, (node, room) in enumerate(rooms.items()):
        length, starts = _able(problem, number, lengths[node], before.runs.get(node, range(0)))
        found[node] = _Server(
            length, starts, _throughput(float(problem.time_ns[number, 1:-1].mean()), room, length, size)
        )
    return found


def _able(problem: Problem, node: int, length: int, before: range) -> tuple[int, tuple[int, ...]]:
    """The longest run of at most `length` inner blocks that a node may have, and where it may begin: where it is, and
    wherever there is room for it beside all that serves."""
    inner, need, may = problem.blocks - 2, problem.need_bytes[node], problem.may_run[node]
    free = _free(problem, node)
    for size in range(min(length, inner), 0, -1):
        starts = tuple(
            first
            for first in range(1, inner - size + 2)
            if may[first : first + size].all()
            and (range(first, first + size) == before or need[first : first + size].sum() <= free)
        )
        if starts:
            return size, starts
    return 0, ()


def _free(problem: Problem, node: int) -> int:
    """What a node has for blocks besides the ends, which it may be a client of."""
    ends = problem.need_bytes[node, [0, -1]].sum() if problem.may_run[node, [0, -1]].all() else 0
    return max(0, int(problem.free_bytes[node] - ends))


def _throughput(block_ns: float, room: Room, length: int, boundary: int) -> float:
    """Of a server: of its link, or of computing half of its blocks on average for each that asks, whichever is less."""
    rates = [link.goodput_bytes_per_s for link in room.capacity.links if link.goodput_bytes_per_s is not None]
    network = (median(rates) if rates else DEFAULT_LINK_BYTES_PER_S) / max(1, boundary)
    return min(network, 1e9 / max(1.0, block_ns) / ((length + 1) / 2))


def _throughputs(blocks: int, servers: Mapping[NodeId, _Server], starts: Mapping[NodeId, int]) -> Floats:
    """[L]: of each block, over all that host it."""
    found = np.zeros(blocks)
    for node, start in starts.items():
        found[start : start + servers[node].length] += servers[node].throughput
    return found


def _worst(throughputs: Floats, server: _Server) -> int:
    """Where the run with the worst blocks begins: the worst first, then the next worst, then the first of equals."""
    return min(server.starts, key=lambda s: (np.sort(throughputs[s : s + server.length]).tolist(), s))


def _looked(
    blocks: int,
    servers: Mapping[NodeId, _Server],
    starts: Mapping[NodeId, int],
    node: NodeId,
    rng: np.random.Generator,
) -> dict[NodeId, int]:
    """Where all begin once `node` has looked whether it should move."""
    stays = dict(starts)
    total = _throughputs(blocks, servers, starts)
    initial = float(total[1:-1].min())
    _add(total, servers[node], starts[node], -(1 + EPSILON))
    if initial > EPSILON and total[1:-1].min() <= 0:
        return stays  # without it the model is not whole
    start = _worst(total, servers[node])
    if start == starts[node]:
        return stays
    moves = {**stays, node: start}
    then = _settled(blocks, servers, moves, rng)
    best = float(_throughputs(blocks, servers, then)[1:-1].min())
    if best < EPSILON or initial / best >= BALANCE_QUALITY - EPSILON:
        return stays
    return moves


def _settled(
    blocks: int, servers: Mapping[NodeId, _Server], starts: Mapping[NodeId, int], rng: np.random.Generator
) -> dict[NodeId, int]:
    """Where all would begin if everybody moved for as long as anybody would; who goes round in circles is stopped."""
    found = dict(starts)
    total = _throughputs(blocks, servers, found)
    for _ in range(len(servers)):
        moved = False
        for node in _shuffled(sorted(servers), rng):
            _add(total, servers[node], found[node], -(1 + EPSILON))
            start = _worst(total, servers[node])
            _add(total, servers[node], found[node], EPSILON)
            _add(total, servers[node], start, 1.0)
            moved, found[node] = moved or start != found[node], start
        if not moved:
            break
    return found


def _add(total: Floats, server: _Server, start: int, times: float) -> None:
    total[start : start + server.length] += times * server.throughput


def _shuffled(nodes: Sequence[NodeId], rng: np.random.Generator) -> list[NodeId]:
    return [nodes[int(number)] for number in rng.permutation(len(nodes))]


def _placement(
    problem: Problem, nodes: Sequence[NodeId], runs: Mapping[NodeId, range], before: Swarm, deployment: Deployment
) -> Placement:
    """The paths over the runs. Those of before stay while they are within them, unless others are so much faster that
    a server would move for it; and where there are none."""
    hosts = np.array([_fitting(problem, number, runs[node]) for number, node in enumerate(nodes)])
    most = min(ROUTES_MAX, deployment.settings.max_sequences)
    found = cheapest_paths(problem, hosts, most)
    number = {node: k for k, node in enumerate(nodes)}
    chains = tuple(tuple(Stage(node=nodes[p.node], first=p.first, last=p.last) for p in path) for path in found)
    if not chains or not before.placement:
        return chains or before.placement
    if not all(_stands(problem, chain, number, hosts) for chain in before.placement):
        return chains
    old = sum(1 / latency_ns(problem, _pieces(chain, number)) for chain in before.placement)
    new = sum(1 / latency_ns(problem, path) for path in found)
    return chains if old / new < BALANCE_QUALITY else before.placement


def _fitting(problem: Problem, node: int, run: range) -> Mask:
    """[L]: the blocks of a run for which there is room beside all that serves: those that it has, then the others."""
    need, free = problem.need_bytes[node], _free(problem, node)
    found = np.zeros(problem.blocks, bool)
    for block in sorted(run, key=lambda b: (need[b] > 0, b)):
        if need[block] <= free:
            found[block], free = True, free - need[block]
    return found


def _stands(problem: Problem, chain: Chain, number: Mapping[NodeId, int], hosts: Mask) -> bool:
    """Whether every stage is where it is hosted, and the ends are with a client that may have them."""
    if not all(stage.node in number for stage in chain) or chain[0].node != chain[-1].node:
        return False
    inner = [(number[NodeId(stage.node)], b) for stage in chain for b in stage.blocks if 0 < b < problem.blocks - 1]
    return bool(problem.may_run[number[NodeId(chain[0].node)], [0, -1]].all()) and all(hosts[pair] for pair in inner)


def _pieces(chain: Chain, number: Mapping[NodeId, int]) -> tuple[Piece, ...]:
    return tuple(Piece(number[NodeId(stage.node)], stage.first, stage.last) for stage in chain)
