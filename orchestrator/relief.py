"""PURE: the blocks of one stage shared out among nodes that have room, while all others stay where they are.

A whole other split needs room beside the plan in force, on nodes that are full of it. Where a single node has become
slow there may be room for what it holds, in pieces, and even on nodes that the route passes already: it then comes by
them twice. Once that serves, what the slow node held is free, and a plan of fewer stages fits beside it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, permutations

from orchestrator.rooms import Room
from profiler.network import Links, boundary_bytes, hop_ms
from schemas.base import NodeId
from schemas.deployment import Chain, Stage
from schemas.manifest import Manifest

PIECES_MAX = 3
"""Every one more is a hop more for each token."""
HELPERS_MAX = 6
"""Nodes tried: those that would take the most off."""


@dataclass(frozen=True)
class _Helper:
    node: NodeId
    block_ms: float
    blocks_max: int


def relieved(chain: Chain, manifest: Manifest, rooms: Mapping[NodeId, Room], sensitive: frozenset[int]) -> Chain | None:
    """`chain` with its slowest stage in at most `PIECES_MAX` pieces, on the nodes of `rooms` on which a token takes
    the least time; None where no pieces take less than the whole. What is `sensitive` goes to trusted nodes alone."""
    slowest = max(range(len(chain)), key=lambda position: _stage_ms(chain[position], rooms))
    stage = chain[slowest]
    links = {name: room.host.links for name, room in rooms.items()}
    before, after = chain[:slowest], chain[slowest + 1 :]
    best, least_ms = None, _stage_ms(stage, rooms) + _hops_ms((*before[-1:], stage, *after[:1]), manifest, links)
    left = {name: room.free_bytes - _need(name, (*before, *after), room) for name, room in rooms.items()}
    for pieces in _ways(stage, list(_helpers(stage, rooms, left, sensitive))):
        around = (*before[-1:], *pieces, *after[:1])
        taken_ms = sum([_stage_ms(piece, rooms) for piece in pieces]) + _hops_ms(around, manifest, links)
        if taken_ms < least_ms and all(_need(one.node, (one,), rooms[one.node]) <= left[one.node] for one in pieces):
            best, least_ms = pieces, taken_ms
    return None if best is None else _joined((*before, *best, *after))


def _helpers(
    stage: Stage, rooms: Mapping[NodeId, Room], left: Mapping[NodeId, int], sensitive: frozenset[int]
) -> Iterator[_Helper]:
    """Nodes that may hold some of the stage, those that would take the most off first. `left`: the bytes that each has
    beside its other stages."""
    private = not sensitive.isdisjoint(stage.blocks)
    found = []
    for name, room in rooms.items():
        own_ms = float(room.host.times.decode_ms[stage.first : stage.last + 1].mean())
        need = max(room.need_bytes[block] for block in stage.blocks)
        count = len(stage.blocks) if need == 0 else min(len(stage.blocks), left[name] // need)
        if count > 0 and (room.trusted or not private):
            found.append(_Helper(name, own_ms, count))
    slow_ms = max((one.block_ms for one in found), default=0.0)
    found.sort(key=lambda one: (-one.blocks_max * (slow_ms - one.block_ms), one.block_ms, one.node))
    own = [one for one in found[HELPERS_MAX:] if one.node == stage.node]
    yield from (*found[:HELPERS_MAX], *own)


def _ways(stage: Stage, helpers: Sequence[_Helper]) -> Iterator[Chain]:
    """The stage in pieces over every choice of helpers, in every order, each fast one filled before a slow one."""
    total = len(stage.blocks)
    for count in range(1, min(PIECES_MAX, total) + 1):
        for chosen in permutations(helpers, count):
            lengths = dict.fromkeys(chosen, 1)
            left = total - count
            for one in sorted(chosen, key=lambda one: (one.block_ms, one.node)):
                more = min(left, one.blocks_max - 1)
                lengths[one] += more
                left -= more
            if left == 0:
                ends = [stage.first]
                for one in chosen:
                    ends.append(ends[-1] + lengths[one])
                yield tuple(
                    Stage(node=one.node, first=first, last=end - 1)
                    for one, (first, end) in zip(chosen, pairwise(ends), strict=True)
                )


def _need(node: NodeId, stages: Chain, room: Room) -> int:
    """Bytes that the stages on a node take there."""
    return sum(room.need_bytes[block] for stage in stages if stage.node == node for block in stage.blocks)


def _stage_ms(stage: Stage, rooms: Mapping[NodeId, Room]) -> float:
    room = rooms.get(stage.node)
    return float("inf") if room is None else float(room.host.times.decode_ms[stage.first : stage.last + 1].sum())


def _hops_ms(stages: Chain, manifest: Manifest, links: Links) -> float:
    pairs = pairwise(stages)
    return sum([hop_ms(links, one.node, other.node, boundary_bytes(manifest, one.last)) for one, other in pairs])


def _joined(stages: Chain) -> Chain:
    """Pieces that lie beside each other on one node as one stage."""
    found: list[Stage] = []
    for stage in stages:
        if found and found[-1].node == stage.node:
            found[-1] = found[-1].model_copy(update={"last": stage.last})
        else:
            found.append(stage)
    return tuple(found)
