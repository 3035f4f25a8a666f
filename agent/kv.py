"""The KV cache of one deployment on this node: outside the sessions, per block, in length classes.

A sequence has one slot, the same for every block on the node, so a block that arrives later simply
brings its own buffers. Two layouts hide behind the pool (`schemas.manifest.KvCache`): buffers that
sessions write in place, and, for graphs that append, one growing tensor per sequence.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime as ort
from onnx import helper

from agent.memory import Buffer, Device, allocate, bind_input, bind_output, rows_of
from agent.slots import Move, Slot, SlotTable
from profiler.kv import SLOTS_MIN
from schemas.frame import SequenceId
from schemas.manifest import Block, KvCache
from schemas.tensor import Array

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
        self._shapes: dict[int, tuple[int, int]] = {}

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
        if self._users[block.index] > 1:
            return
        size = sum(2 * cache.heads * cache.head_dim * np.dtype(cache.dtype).itemsize for cache in block.kv)
        self._shapes[block.index] = (2 * len(block.kv), size)
        if not block.kv:
            return
        if block.kv[0].layout == "concat":
            self._appended[block.index] = {}
            return
        self._shared[block.index] = {
            tokens: tuple(self._pair(cache, max(rows, SLOTS_MIN), tokens) for cache in block.kv)
            for tokens, rows in self._classes
        }

    def drop_block(self, block: Block) -> bool:
        """Undo one `add_block`; True if nobody uses the block any more, and its caches are gone."""
        self._users[block.index] -= 1
        if self._users[block.index] > 0:
            return False
        del self._users[block.index], self._shapes[block.index]
        self._shared.pop(block.index, None)
        self._appended.pop(block.index, None)
        return True

    def open(self, sequence: SequenceId, tokens: int) -> Slot:
        """The slot of `sequence`, taken from length class `tokens` if it has none yet."""
        return self._slots.take(sequence, tokens)

    def reuse(self, old: SequenceId, new: SequenceId, tokens: int, capacity: int) -> None:
        """Let `new` begin with the first `tokens` tokens of `old`, which then has no slot any more.

        Raises as `open` does where that needs a row of another length class and there is none.
        """
        if self._slots[old].tokens == capacity:
            self._slots.rename(old, new)
            for past in self._appended.values():
                if old in past:
                    past[new] = past.pop(old)
            return
        self.open(new, capacity)
        for block in self._users:
            arrays = self.read(block, old, 0, tokens) if self._shapes[block][0] else []
            if arrays:
                self.write(block, new, 0, arrays)
        self.close(old)

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

    def has_block(self, block: int) -> bool:
        """Whether there is room for this block's caches."""
        return block in self._users

    def shape_of(self, block: int) -> tuple[int, int]:
        """How many tensors a block keeps of a sequence, and their bytes per token."""
        return self._shapes[block]

    def read(self, block: int, sequence: SequenceId, start: int, stop: int) -> list[Array]:
        """Key and value of each layer for tokens `start` up to `stop`, each [heads, stop - start, dim], on the host.

        Raises KeyError where the block or the sequence is not here.
        """
        if block in self._appended:
            past = self._appended[block][sequence]
            return [np.ascontiguousarray(value.numpy()[0, :, start:stop]) for value in past]
        slot = self._slots[sequence]
        buffers = self._buffers(block, slot)
        return [np.ascontiguousarray(read_row(buffer, slot.row)[:, start:stop]) for buffer in buffers]

    def write(self, block: int, sequence: SequenceId, start: int, arrays: Sequence[Array]) -> None:
        """Put there what `read` returned elsewhere; what lies before `start` must be here already.

        Raises KeyError where the block or the sequence is not here, ValueError where the shapes are not its caches'.
        """
        if block in self._appended:
            held = self._appended[block].get(sequence)
            before = [value.numpy()[0, :, :start] for value in held] if held is not None else [a[:, :0] for a in arrays]
            whole = [np.concatenate([old, new], axis=1)[None] for old, new in zip(before, arrays, strict=True)]
            self._appended[block][sequence] = tuple(
                ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), self._device, 0) for array in whole
            )
            return
        slot = self._slots[sequence]
        for buffer, array in zip(self._buffers(block, slot), arrays, strict=True):
            write_row(buffer, slot.row, start, array)

    def _buffers(self, block: int, slot: Slot) -> list[Buffer]:
        """Key and value of each layer of a block, in the length class of a slot."""
        return [b for pair in self._shared.get(block, {}).get(slot.tokens, ()) for b in (pair.key, pair.value)]

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


def read_row(buffer: Buffer, row: int) -> Array:
    """One row on the host, [heads, tokens, dim]; on the CPU a view."""
    if buffer.device == "cpu":
        view: Array = buffer.owner[row]
        return view
    session = _copier(buffer.dtype.name)
    binding = session.io_binding()
    bind_input(binding, "x", rows_of(buffer, range(row, row + 1)))
    binding.bind_output("y", "cpu")
    session.run_with_iobinding(binding)
    copied: Array = binding.get_outputs()[0].numpy()[0]
    return copied


def write_row(buffer: Buffer, row: int, start: int, array: Array) -> None:
    """Put `array`, [heads, n, dim], at tokens `start` to `start + n` of one row."""
    stop = start + array.shape[1]
    if buffer.device == "cpu":
        buffer.owner[row][:, start:stop] = array
        return
    whole = read_row(buffer, row).copy()
    whole[:, start:stop] = array
    session = _copier(buffer.dtype.name)
    binding = session.io_binding()
    binding.bind_cpu_input("x", np.ascontiguousarray(whole[None]))
    bind_output(binding, "y", rows_of(buffer, range(row, row + 1)))
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
