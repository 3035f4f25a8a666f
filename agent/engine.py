"""Blocks that are loaded and can run: a chain of sessions over consecutive blocks of one model.

An engine that serves runs on the compute thread alone. Results are bit-equal however the blocks are spread over
sessions and whatever rows share a call (measured; `tests/integration` holds it).
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnxruntime as ort

from agent.kv import KvPool
from agent.memory import Buffer, Device, allocate, bind_input, bind_output, rows_of
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import SequenceId
from schemas.manifest import Block, Manifest, SharedInput, SharedRole, TensorSpec
from schemas.tensor import Array

BOUND_STEPS_MAX = 48
"""Prepared calls kept per engine: one for each slice of rows that recurs, each with its small buffers."""


@dataclass(frozen=True)
class Segment:
    """One session and the consecutive blocks it runs."""

    blocks: tuple[Block, ...]
    session: ort.InferenceSession
    adapter: Mapping[str, ort.OrtValue] = field(default_factory=dict)
    """What it is fed beside its inputs, by name: a variant's own matrices (`models.lora`)."""


@dataclass(frozen=True)
class BoundStep:
    """A call with every tensor already bound to its address: a step copies its input in and runs."""

    x: Buffer
    small: dict[SharedRole, tuple[Buffer, ...]]
    bindings: tuple[tuple[ort.InferenceSession, Any], ...]
    boundaries: tuple[Buffer, ...]
    """What the sessions hand each other; ONNX Runtime holds only their addresses."""
    y: Buffer


class Engine:
    """Blocks `first` to `last` of a model, ready to run."""

    def __init__(self, manifest: Manifest, segments: Sequence[Segment], device: Device) -> None:
        self.manifest = manifest
        self.segments = tuple(segments)
        self.device = device
        self.blocks = tuple(block for segment in segments for block in segment.blocks)
        self._shared = {entry.tensor.name: entry for entry in manifest.shared_inputs}
        self.rows_min = 1
        """Decode rows per call from which results do not depend on the batch (`agent.probe`)."""
        self._steps: OrderedDict[tuple[object, ...], BoundStep] = OrderedDict()
        layouts = {cache.layout for block in manifest.blocks for cache in block.kv}
        self.in_place = layouts == {"shared"}
        if self.in_place:
            self._refuse_what_cannot_be_bound()

    @property
    def is_last(self) -> bool:
        return self.blocks[-1].index == len(self.manifest.blocks) - 1

    @property
    def ends_in_head(self) -> bool:
        """Whether the last session is the head alone, which only a wanted token needs."""
        last = self.segments[-1].blocks
        return self.is_last and len(last) == 1 and last[0].role == "head"

    def run_rows(
        self, pool: KvPool, tokens: int, rows: range, positions: Sequence[int], x: Array, *, head: bool
    ) -> Array | None:
        """One call over a contiguous slice of rows of length class `tokens` (in-place caches).

        `x` is [rows, S] ids or [rows, S, ...] activations, starting at `positions`, one each. S > 1 needs
        exactly one row. Returns [rows, S, ...], or for the last blocks logits [rows, S or 1, vocabulary];
        None if only the head is here and `head` is False.
        """
        segments = self.segments if head or not self.ends_in_head else self.segments[:-1]
        if not segments:
            return None
        length = x.shape[1]
        step = self._bound(pool, segments, tokens, rows, length)
        step.x.fill(x)
        after = np.asarray(positions, np.int64)
        after += length
        for role, buffers in step.small.items():
            values = _small(role, after, length)
            for buffer in buffers:
                buffer.fill(values)
        for session, binding in step.bindings:
            session.run_with_iobinding(binding)
        return step.y.read()

    def run_appending(self, pool: KvPool, sequence: SequenceId, position: int, x: Array, *, head: bool) -> Array | None:
        """One call of one sequence for graphs that append to their caches. Shapes as in `run_rows`, one row."""
        length = x.shape[1]
        segments = self.segments if head or not self.ends_in_head else self.segments[:-1]
        if not segments:
            return None
        after = np.asarray([position + length], np.int64)
        value: Any = x
        for segment in segments:
            binding = _binding(segment)
            self._feed(binding, segment, value)
            for entry in self._shared_of(segment):
                array = _small(entry.role, after, length).astype(entry.tensor.dtype)
                binding.bind_cpu_input(entry.tensor.name, array.reshape(_shape_like(entry.tensor, array)))
            names = [
                _output_name(segment, self.manifest),
                *self._bind_appended(binding, segment, pool, sequence, position),
            ]
            for name in names:
                binding.bind_output(name, self.device)
            segment.session.run_with_iobinding(binding)
            results = dict(zip(names, binding.get_outputs(), strict=True))
            for block in segment.blocks:
                present = [results[n] for cache in block.kv for n in (cache.present_key, cache.present_value)]
                if present:
                    pool.append(block.index, sequence, tuple(present))
            value = results[names[0]]
        result: Array = value.numpy()
        return result

    def run_tensors(self, tensors: Mapping[str, Array]) -> dict[str, Array]:
        """Run a model without caches: what these blocks read by name -> boundary and outputs by name.

        `tensors` holds the boundary tensor, the request's inputs, and outputs that earlier blocks made;
        what later blocks still need of it is in the result too.
        """
        known = dict(tensors)
        for segment in self.segments:
            wanted = [spec.name for spec in segment.session.get_outputs()]
            feeds = {spec.name: known[spec.name] for spec in segment.session.get_inputs()}
            known.update(zip(wanted, segment.session.run(wanted, feeds), strict=True))
        rest = self.manifest.blocks[self.blocks[-1].index + 1 :]
        needed = {name for block in rest for name in block.shared} | {spec.name for spec in self.manifest.outputs}
        boundary = self.blocks[-1].output
        if boundary is not None:
            needed.add(boundary.name)
        return {name: array for name, array in known.items() if name in needed}

    def _bound(self, pool: KvPool, segments: tuple[Segment, ...], tokens: int, rows: range, length: int) -> BoundStep:
        key = (pool.number, tokens, rows.start, len(rows), length, len(segments))
        if (step := self._steps.get(key)) is not None:
            self._steps.move_to_end(key)
            return step
        first = self.blocks[0].input
        tail = () if first is None else _fixed_tail(first)
        kind = self.manifest.inputs[0].dtype if first is None else first.dtype
        x = current = allocate(self.device, (len(rows), length, *tail), kind)
        small: dict[SharedRole, tuple[Buffer, ...]] = {}
        inputs: dict[str, Buffer] = {}
        bindings, boundaries = [], []
        for segment in segments:
            binding = _binding(segment)
            bind_input(binding, _input_name(segment, self.manifest), current)
            boundaries.append(current)
            for entry in self._shared_of(segment):
                name = entry.tensor.name
                if name not in inputs:
                    shape = _small_shape(entry, len(rows), length)
                    inputs[name] = allocate(self.device, shape, entry.tensor.dtype)
                    small[entry.role] = (*small.get(entry.role, ()), inputs[name])
                bind_input(binding, name, inputs[name])
            for block in segment.blocks:
                for cache, pair in zip(block.kv, pool.shared(block.index, tokens) if block.kv else (), strict=True):
                    key_rows, value_rows = rows_of(pair.key, rows), rows_of(pair.value, rows)
                    bind_input(binding, cache.past_key, key_rows)
                    bind_input(binding, cache.past_value, value_rows)
                    bind_output(binding, cache.present_key, key_rows)
                    bind_output(binding, cache.present_value, value_rows)
            spec = _output_spec(segment, self.manifest)
            middle = spec.shape[1] if isinstance(spec.shape[1], int) else length
            current = allocate(self.device, (len(rows), middle, *_fixed_tail(spec)), spec.dtype)
            bind_output(binding, spec.name, current)
            bindings.append((segment.session, binding))
        step = BoundStep(x, small, tuple(bindings), tuple(boundaries), current)
        if length > 1:
            return step  # the lengths of last chunks are many, their buffers large, and binding anew costs them little
        self._steps[key] = step
        if len(self._steps) > BOUND_STEPS_MAX:
            self._steps.popitem(last=False)
        return step

    def forget(self, pool: KvPool) -> None:
        """Drop prepared calls over a pool whose buffers are about to go."""
        for key in [key for key in self._steps if key[0] == pool.number]:
            del self._steps[key]

    def _bind_appended(
        self, binding: Any, segment: Segment, pool: KvPool, sequence: SequenceId, position: int
    ) -> list[str]:
        names: list[str] = []
        for block in segment.blocks:
            past = pool.past(block, sequence) if block.kv else ()
            inputs = [n for cache in block.kv for n in (cache.past_key, cache.past_value)]
            for name, value in zip(inputs, past, strict=True):
                binding.bind_ortvalue_input(name, _truncated(value, position, self.device))
            names += [n for cache in block.kv for n in (cache.present_key, cache.present_value)]
        return names

    def _feed(self, binding: Any, segment: Segment, value: Any) -> None:
        name = _input_name(segment, self.manifest)
        if isinstance(value, np.ndarray):
            binding.bind_cpu_input(name, np.ascontiguousarray(value))
        else:
            binding.bind_ortvalue_input(name, value)

    def _shared_of(self, segment: Segment) -> list[SharedInput]:
        names = dict.fromkeys(name for block in segment.blocks for name in block.shared)
        return [self._shared[name] for name in names]

    def _refuse_what_cannot_be_bound(self) -> None:
        for entry in self.manifest.shared_inputs:
            if entry.role in (SharedRole.ATTENTION_MASK, SharedRole.USER):
                message = f"{self.manifest.name}: caches written in place beside a graph input {entry.tensor.name!r}"
                raise ResplitError(ErrorCode.UNSUPPORTED_MODEL, message)


def _binding(segment: Segment) -> Any:
    binding = segment.session.io_binding()
    for name, value in segment.adapter.items():
        binding.bind_ortvalue_input(name, value)
    return binding


def _small(role: SharedRole, after: Array, length: int) -> Array:
    """The value of a shared input when each row has `after` tokens once this call of `length` is done."""
    match role:
        case SharedRole.SEQLENS_K:
            last: Array = after - 1
            return last
        case SharedRole.TOTAL_SEQUENCE_LENGTH:
            longest: Array = after.max(keepdims=True)
            return longest
        case SharedRole.POSITION_IDS:
            positions: Array = (after - length)[:, None] + np.arange(length)[None, :]
            return positions
        case SharedRole.ATTENTION_MASK:
            return np.ones((1, int(after[0])), np.int64)
        case SharedRole.PAST_LENGTH:
            past: Array = after[:1] - length
            return past
        case SharedRole.USER:
            raise AssertionError("a decoder has no inputs of the user's besides its tokens")


def _small_shape(entry: SharedInput, rows: int, length: int) -> tuple[int, ...]:
    rank = len(entry.tensor.shape)
    match entry.role:
        case SharedRole.SEQLENS_K:
            return (rows,) if rank == 1 else (rows, 1)
        case SharedRole.POSITION_IDS:
            return (rows, length)
        case _:
            return (1,) * rank


def _shape_like(spec: TensorSpec, array: Array) -> tuple[int, ...]:
    return array.shape if len(spec.shape) == array.ndim else (1,) * len(spec.shape)


def _input_name(segment: Segment, manifest: Manifest) -> str:
    boundary = segment.blocks[0].input
    return manifest.inputs[0].name if boundary is None else boundary.name


def _output_spec(segment: Segment, manifest: Manifest) -> TensorSpec:
    return segment.blocks[-1].output or manifest.outputs[0]


def _output_name(segment: Segment, manifest: Manifest) -> str:
    return _output_spec(segment, manifest).name


def _fixed_tail(spec: TensorSpec) -> tuple[int, ...]:
    """The dimensions after [batch, sequence], which a decoder's boundary always knows."""
    tail = tuple(size for size in spec.shape[2:] if isinstance(size, int))
    if len(tail) != len(spec.shape) - 2:
        raise ResplitError(
            ErrorCode.UNSUPPORTED_MODEL, f"tensor {spec.name!r} of shape {spec.shape} has no fixed width"
        )
    return tail


def _truncated(value: ort.OrtValue, position: int, device: Device) -> ort.OrtValue:
    """A cache as it was before `position`: a step that is driven again must not see its own first run."""
    if value.shape()[2] <= position:
        return value
    return ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(value.numpy()[:, :, :position]), device, 0)
