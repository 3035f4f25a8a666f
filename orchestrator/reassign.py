"""PURE: the best nodes for stages whose cuts stay as they are.

A beam search over the stages in order: exact while no more than `WIDTH` partial answers are alive, which is so
for a few stages and nodes; beyond that the best ones found. Stages that share a node go on sharing one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.rooms import Room
from profiler.cost import block_time, boundary_bytes, hop_ms
from schemas.base import Digest, NodeId
from schemas.deployment import Stage
from schemas.manifest import Manifest

WIDTH = 64
CHOICES = 8
"""Nodes tried for each stage: the fastest for it, and the one it is on."""
MOVED = 1.1
"""A stage that moves has to be a tenth faster there: equal nodes are not swapped for nothing."""


@dataclass(frozen=True)
class _Partial:
    nodes: tuple[NodeId, ...]
    spent_ms: float


def reassigned(
    stages: tuple[Stage, ...], manifest: Manifest, digest: Digest, rooms: Mapping[NodeId, Room]
) -> tuple[Stage, ...] | None:
    """The stages on the nodes of `rooms` that take the least time per token, or None if they fit on none."""
    beam = [_Partial((), 0.0)]
    for position, stage in enumerate(stages):
        grown = [more for partial in beam for more in _grown(partial, position, stages, manifest, digest, rooms)]
        last = position + 1 == len(stages)
        if last:
            size = boundary_bytes(manifest, stage.last)
            capacities = {name: room.capacity for name, room in rooms.items()}
            grown = [
                _Partial(one.nodes, one.spent_ms + hop_ms(capacities, one.nodes[-1], one.nodes[0], size))
                for one in grown
            ]
        beam = sorted(grown, key=lambda one: (one.spent_ms, one.nodes))[:WIDTH]
    if not beam:
        return None
    return tuple(
        Stage(node=node, first=stage.first, last=stage.last) for node, stage in zip(beam[0].nodes, stages, strict=True)
    )


def _grown(
    partial: _Partial,
    position: int,
    stages: tuple[Stage, ...],
    manifest: Manifest,
    digest: Digest,
    rooms: Mapping[NodeId, Room],
) -> list[_Partial]:
    stage = stages[position]
    shared = [earlier for earlier in range(position) if stages[earlier].node == stage.node]
    if shared:
        choices = [partial.nodes[shared[0]]]
    else:
        together = [block for other in stages if other.node == stage.node for block in other.blocks]
        able = [
            name
            for name, room in rooms.items()
            if name not in partial.nodes and sum(room.need_bytes[block] for block in together) <= room.free_bytes
        ]
        fast = sorted(able, key=lambda name: (_stage_ms(stage, manifest, digest, rooms[name]), name))
        choices = fast[:CHOICES] + ([stage.node] if stage.node in fast[CHOICES:] else [])
    found = []
    capacities = {name: room.capacity for name, room in rooms.items()}
    for name in choices:
        spent = partial.spent_ms + _stage_ms(stage, manifest, digest, rooms[name]) * (
            1 if name == stage.node else MOVED
        )
        if partial.nodes:
            size = boundary_bytes(manifest, stage.first - 1)
            spent += hop_ms(capacities, partial.nodes[-1], name, size)
        found.append(_Partial((*partial.nodes, name), spent))
    return found


def _stage_ms(stage: Stage, manifest: Manifest, digest: Digest, room: Room) -> float:
    return sum(block_time(room.capacity, manifest, digest, block).decode_ms for block in stage.blocks)
