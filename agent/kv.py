"""The KV cache of one deployment on this node: outside the sessions, per block, in length classes.

A sequence has one slot, the same for every block on the node, so a block that arrives later simply
brings its own buffers. Two layouts hide behind the pool (`schemas.manifest.KvCache`): buffers that
sessions write in place, and, for graphs that append, one growing tensor per sequence.
"""

import itertools
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import helper

from agent.memory import Buffer, Device, allocate, bind_input, bind_output, rows_of
from agent.slots import Move, Slot, SlotTable
from profiler.kv import SLOTS_MIN
from schemas.frame import SequenceId
from schemas.manifest import Block, KvCache

_pools = itertools.count()


@dataclass(frozen=True, slots=True)
class CachePair:
    """Key and value buffers [rows, heads, tokens, dim] of one attention layer in one length class."""

    key: Buffer
    value: Buffer


class KvPool:
    """Slots and caches. Used from the compute thread alone."""

    def __init__(self, device: Device, classes: tuple[tuple[int, int], ...]) -> None:
        """`classes`: (tokens per sequence, sequences), ascending (`profiler.kv.length_classes`)."""
        self.number = next(_pools)
        """Unlike `id`, never the same for two pools: prepared calls hold addresses of one pool's buffers."""
        self._device = device
        self._classes = classes
        self._slots = SlotTable(classes)
        self._shared: dict[int, dict[int, tuple[CachePair, ...]]] = {}
        self._appended: dict[int, dict[SequenceId, tuple[ort.OrtValue, ...]]] = {}
        self._users: dict[int, int] = {}

    def __contains__(self, sequence: SequenceId) -> bool:
        return sequence in self._slots

    @property
    def sequences(self) -> tuple[SequenceId, ...]:
        return self._slots.sequences

    def slot(self, sequence: SequenceId) -> Slot:
        """The slot that `sequence` has."""
        return self._slots[sequence]

    def sequence_at(self, tokens: int, row: int) -> SequenceId | None:
        """Whose row it is, if anybody's."""
        return self._slots.at(tokens, row)

    def add_block(self, block: Block) -> None:
        """Make room for one block's caches; counted, so that two stages may share a block."""
        self._users[block.index] = self._users.get(block.index, 0) + 1
        if self._users[block.index] > 1 or not block.kv:
            return
        if block.kv[0].layout == "concat":
            self._appended[block.index] = {}
            return
        self._shared[block.index] = {
            tokens: tuple(self._pair(cache, max(rows, SLOTS_MIN), tokens) for cache in block.kv)
            for tokens, rows in self._classes
        }

    def drop_block(self, block: Block) -> None:
        """Undo one `add_block`; frees the caches when nobody uses the block any more."""
        self._users[block.index] -= 1
        if self._users[block.index] == 0:
            del self._users[block.index]
            self._shared.pop(block.index, None)
            self._appended.pop(block.index, None)

    def open(self, sequence: SequenceId, tokens: int) -> Slot:
        """The slot of `sequence`, taken from length class `tokens` if it has none yet."""
        return self._slots.take(sequence, tokens)

    def close(self, sequence: SequenceId) -> None:
        """Free the slot; the last sequence of its class moves into the hole."""
        for past in self._appended.values():
            past.pop(sequence, None)
        move = self._slots.release(sequence)
        if move is not None:
            self._fill_hole(move)

    def shared(self, block: int, tokens: int) -> tuple[CachePair, ...]:
        """The in-place buffers of a block in one length class."""
        return self._shared[block][tokens]

    def past(self, block: Block, sequence: SequenceId) -> tuple[ort.OrtValue, ...]:
        """Key and value of each layer so far (append layout), [1, heads, length, dim]; empty at first."""
        held = self._appended[block.index].get(sequence)
        if held is not None:
            return held
        empty = [np.zeros((1, c.heads, 0, c.head_dim), c.dtype) for c in block.kv for _ in ("key", "value")]
        return tuple(ort.OrtValue.ortvalue_from_numpy(array, self._device, 0) for array in empty)

    def append(self, block: int, sequence: SequenceId, present: tuple[ort.OrtValue, ...]) -> None:
        """Keep what a call returned as the past of the next one (append layout)."""
        self._appended[block][sequence] = present

    def _pair(self, cache: KvCache, rows: int, tokens: int) -> CachePair:
        shape = (rows, cache.heads, tokens, cache.head_dim)
        return CachePair(allocate(self._device, shape, cache.dtype), allocate(self._device, shape, cache.dtype))

    def _fill_hole(self, move: Move) -> None:
        for classes in self._shared.values():
            for pair in classes[move.tokens]:
                for buffer in (pair.key, pair.value):
                    copy_row(buffer, move.source, move.target)


def copy_row(buffer: Buffer, source: int, target: int) -> None:
    """Copy one row over another without leaving the device."""
    if buffer.device == "cpu":
        buffer.owner[target] = buffer.owner[source]
        return
    session = _copier(buffer.dtype.name)
    binding = session.io_binding()
    bind_input(binding, "x", rows_of(buffer, range(source, source + 1)))
    bind_output(binding, "y", rows_of(buffer, range(target, target + 1)))
    session.run_with_iobinding(binding)


_copiers: dict[str, ort.InferenceSession] = {}


def _copier(dtype: str) -> ort.InferenceSession:
    """ONNX Runtime has no device-to-device copy of its own in Python; a graph of one Identity is one."""
    if dtype not in _copiers:
        kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        ends = [helper.make_tensor_value_info(name, kind, None) for name in ("x", "y")]
        graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "copy", ends[:1], ends[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        _copiers[dtype] = ort.InferenceSession(model.SerializeToString(), providers=["CUDAExecutionProvider"])
    return _copiers[dtype]
