"""A sequence moves to another epoch with its caches: the part of the nodes, on the compute thread.

The ingress asks a node of the new route to `adopt` a sequence; the node fetches what the blocks that are new to it kept
for the sequence, a piece at a time, from the nodes that have it, and answers once all of it is here. Caches are only
ever appended to, so all but the last few tokens are copied while the sequence still runs where it was. Blocks that stay
on a node keep their caches in place and cost nothing.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from math import ceil

from agent.kv import KvPool
from agent.sequences import Progress, Record, Records
from schemas.base import NodeId
from schemas.errors import ResplitError
from schemas.frame import Adopt, Adopted, Cache, Fetch, Frame, Move
from schemas.tensor import Array

PIECE_BYTES = 1 << 20
"""Cache bytes in one frame at most: about a millisecond of copying between two steps of the sequences that run."""
PIECE_TENSORS = 32
"""Tensors in one frame: half of what a frame may hold."""

Outgoing = list[tuple[NodeId, Frame]]
log = logging.getLogger(__name__)


class Handover:
    """Adopts sequences, and gives away what others adopt."""

    def __init__(
        self,
        node: NodeId,
        pool: KvPool,
        records: Records,
        stages_on: Callable[[int, int], tuple[int, ...]],
        blocks_on: Callable[[int, int], frozenset[int]],
        now_us: Callable[[], int],
    ) -> None:
        """`stages_on(epoch, route)`: the stages that this node runs of a route; `blocks_on`: their blocks."""
        self._node = node
        self._pool = pool
        self._records = records
        self._stages_on = stages_on
        self._blocks_on = blocks_on
        self._now_us = now_us

    def adopt(self, frame: Adopt) -> Outgoing:
        """Take a slot and ask for what is missing; asked again, ask again for what is still missing."""
        record = self._records.get(frame.sequence)
        if record is not None and record.epoch is not None and record.epoch >= frame.epoch:
            return [self._adopted(frame, record)]  # it crossed, and the answer was lost
        try:
            if not self._stages_on(frame.epoch, frame.route) or not all(
                self._hosts(m.first, m.last) for m in frame.moves
            ):
                return [self._refused(frame, f"epoch {frame.epoch} is not served by {self._node}")]
            if record is None or record.epoch is None:
                brought = {block for move in frame.moves for block in range(move.first, move.last + 1)}
                if self._blocks_on(frame.epoch, frame.route) - brought:
                    # A process that was restarted since: what is to stay was never here.
                    return [self._refused(frame, f"{self._node} has no caches of blocks that were to stay")]
            if record is None:
                self._pool.open(frame.sequence, frame.capacity)
                record = self._records[frame.sequence] = Record(frame.ingress, self._now_us())
        except ResplitError as error:
            return [self._refused(frame, error.message)]
        if record.adopting is not None and record.adopting.epoch != frame.epoch:
            record.arrived.clear()
        record.adopting = frame
        record.seen_us = self._now_us()
        return self._go_on(frame, record, None)

    def provide(self, frame: Fetch, most_bytes: int) -> Outgoing:
        """The caches that another node asks for, or as many tokens of them as take `most_bytes` or just more; an empty
        answer where they are not here."""
        tensors: dict[str, Array] = {}
        record = self._records.get(frame.sequence)
        written = 0 if record is None else record.written
        try:
            if frame.stop > written or not self._hosts(frame.first, frame.last):
                raise KeyError(frame.sequence)
            blocks = range(frame.first, frame.last + 1)
            bytes_per_token = max(1, sum(self._pool.shape_of(block)[1] for block in blocks))
            frame = replace(frame, stop=min(frame.stop, frame.start + ceil(most_bytes / bytes_per_token)))
            for block in blocks:
                tensors |= _named(block, self._pool.read(block, frame.sequence, frame.start, frame.stop))
        except KeyError:
            log.info("asked for caches that are not here: sequence %d, token %d", frame.sequence, frame.stop)
            tensors = {}
        return [(NodeId(frame.node), replace(nothing_for(frame, self._node), tensors=tensors))]

    def receive(self, frame: Cache) -> Outgoing:
        """Keep what came, and ask for the next piece or say that all is here."""
        record = self._records.get(frame.sequence)
        adopting = None if record is None else record.adopting
        if (
            record is None
            or adopting is None
            or adopting.epoch != frame.epoch
            or not self._hosts(frame.first, frame.last)
            or not any(_brings(move, frame) for move in adopting.moves)
        ):
            return []  # it was given up in the meantime, or another was asked
        blocks = range(frame.first, frame.last + 1)
        if min(record.arrived.get(block, 0) for block in blocks) != frame.start:
            return []  # it came before: what was asked for twice
        try:
            for block in blocks:
                self._pool.write(block, frame.sequence, frame.start, _of(block, frame.tensors))
        except (KeyError, ValueError):
            record.adopting = None
            return [self._refused(adopting, "the caches it was to bring are not where they were")]
        record.arrived |= dict.fromkeys(blocks, frame.stop)
        record.moved_bytes += sum(array.nbytes for array in frame.tensors.values())
        record.seen_us = self._now_us()
        return self._go_on(adopting, record, blocks)

    def _go_on(self, frame: Adopt, record: Record, arrived: range | None) -> Outgoing:
        """Fetches for what is missing (only the follow-up of what just arrived, if anything did), else the end."""
        out: Outgoing = []
        missing = False
        for move in frame.moves:
            for first, last, piece_tokens in self._groups(move):
                start = min(record.arrived.get(block, 0) for block in range(first, last + 1))
                if start >= frame.tokens:
                    continue
                missing = True
                if arrived is None or arrived.start == first:
                    stop = min(frame.tokens, start + piece_tokens)
                    road = (frame.deployment, frame.before, frame.epoch, self._node)
                    out.append((NodeId(move.source), Fetch(*road, frame.sequence, first, last, start, stop)))
        if missing:
            return out
        record.adopting = None
        if frame.final:
            record.epoch, record.route = frame.epoch, frame.route
            record.ingress, record.sampling = frame.ingress, frame.sampling
            at = frame.tokens
            record.progress = {stage: Progress(at, at) for stage in self._stages_on(frame.epoch, frame.route)}
            record.arrived = {}
        done = self._adopted(frame, record)
        if frame.final:
            record.moved_bytes = 0
        return [done]

    def _hosts(self, first: int, last: int) -> bool:
        return first <= last and all(self._pool.has_block(block) for block in range(first, last + 1))

    def _groups(self, move: Move) -> Iterator[tuple[int, int, int]]:
        """(first block, last block, tokens) of each piece that a move is made in."""
        first = move.first
        while first <= move.last:
            last, tensors, bytes_per_token = first, 0, 0
            while last <= move.last:
                count, size = self._pool.shape_of(last)
                if last > first and (tensors + count > PIECE_TENSORS or bytes_per_token + size > PIECE_BYTES):
                    break
                tensors, bytes_per_token, last = tensors + count, bytes_per_token + size, last + 1
            if tensors:
                yield first, last - 1, max(1, PIECE_BYTES // bytes_per_token)
            first = last

    def _adopted(self, frame: Adopt, record: Record) -> tuple[NodeId, Frame]:
        of = (frame.sequence, frame.tokens, frame.final, record.moved_bytes)
        road = (frame.deployment, frame.epoch, frame.route, frame.ingress)
        return NodeId(frame.ingress), Adopted(*road, self._node, *of)

    def _refused(self, frame: Adopt, why: str) -> tuple[NodeId, Frame]:
        road = (frame.deployment, frame.epoch, frame.route, frame.ingress)
        return NodeId(frame.ingress), Adopted(*road, self._node, frame.sequence, frame.tokens, frame.final, 0, why)


def nothing_for(frame: Fetch, node: NodeId) -> Cache:
    """The answer of `node` to who asks for caches that are not there, or not for it."""
    span = (frame.first, frame.last, frame.start, frame.stop)
    return Cache(frame.deployment, frame.epoch, node, frame.sequence, *span, tensors={})


def _brings(move: Move, frame: Cache) -> bool:
    return move.source == frame.node and move.first <= frame.first and frame.last <= move.last


def _named(block: int, arrays: list[Array]) -> dict[str, Array]:
    return {f"{block}.{i // 2}.{'kv'[i % 2]}": array for i, array in enumerate(arrays)}


def _of(block: int, tensors: dict[str, Array]) -> list[Array]:
    """The tensors of one block, key and value of each layer in order; a frame that is not whole raises KeyError."""
    mine = {name: array for name, array in tensors.items() if name.split(".", 1)[0] == str(block)}
    return [mine[f"{block}.{i // 2}.{'kv'[i % 2]}"] for i in range(len(mine))]
