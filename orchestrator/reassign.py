"""PURE: the best nodes for stages whose cuts stay as they are.

A beam search over the stages in order: exact while no more than `WIDTH` partial answers are alive, which is so
for a few stages and nodes; beyond that the best ones found. Stages that share a node go on sharing one.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from orchestrator.rooms import Room
from profiler.network import boundary_bytes, hop_ms
from schemas.base import NodeId
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
    stages: tuple[Stage, ...],
    manifest: Manifest,
    rooms: Mapping[NodeId, Room],
    sensitive: frozenset[int] = frozenset(),
) -> tuple[Stage, ...] | None:
    """The stages on the nodes of `rooms` that take the least time per token, or None if they fit on none. What is
    `sensitive` stays on trusted nodes."""
    links = {name: room.host.links for name, room in rooms.items()}
    beam = [_Partial((), 0.0)]
    for position, stage in enumerate(stages):
        own = {
            name: float(room.host.times.decode_ms[stage.first : stage.last + 1].sum()) for name, room in rooms.items()
        }
        fast = sorted(_able(stages, stage, rooms, sensitive), key=lambda name: (own[name], name))
        shared = next((earlier for earlier in range(position) if stages[earlier].node == stage.node), None)
        size = boundary_bytes(manifest, stage.first - 1) if position else 0
        grown = []
        for partial in beam:
            for name in _choices(partial, fast, stage.node, shared):
                hop = hop_ms(links, partial.nodes[-1], name, size) if position else 0.0
                spent = partial.spent_ms + hop + own[name] * (1 if name == stage.node else MOVED)
                grown.append(_Partial((*partial.nodes, name), spent))
        beam = sorted(grown, key=lambda one: (one.spent_ms, one.nodes))[:WIDTH]
    if not beam:
        return None
    back = boundary_bytes(manifest, stages[-1].last)
    best = min(
        beam,
        key=lambda one: (one.spent_ms + hop_ms(links, one.nodes[-1], one.nodes[0], back), one.nodes),
    )
    return tuple(
        Stage(node=node, first=stage.first, last=stage.last) for node, stage in zip(best.nodes, stages, strict=True)
    )


def _able(
    stages: tuple[Stage, ...], stage: Stage, rooms: Mapping[NodeId, Room], sensitive: frozenset[int]
) -> list[NodeId]:
    """Nodes with the memory for everything that shares a node with `stage`, and the trust."""
    together = [block for other in stages if other.node == stage.node for block in other.blocks]
    private = not sensitive.isdisjoint(together)
    return [
        name
        for name, room in rooms.items()
        if sum(room.need_bytes[block] for block in together) <= room.free_bytes and (room.trusted or not private)
    ]


def _choices(partial: _Partial, fast: list[NodeId], now: NodeId, shared: int | None) -> list[NodeId]:
    if shared is not None:
        return [partial.nodes[shared]]
    free = [name for name in fast if name not in partial.nodes]
    return free[:CHOICES] + ([now] if now in free[CHOICES:] else [])
