"""Frames: what agents send each other while they serve, over a link or, as a fallback, the bus.

A frame is a msgpack header followed by the raw bytes of its tensors. Every hop carries deployment,
epoch, route and, for each sequence in it, the step: a stage that sees a step twice computes the same
bytes twice, so a lost frame is simply driven again.
"""

from dataclasses import dataclass
from math import prod
from typing import Any, Literal

import msgpack
import numpy as np

from schemas.errors import ErrorCode, ResplitError
from schemas.tensor import NAME_OF_DTYPE, NUMPY_TO_OIP, Array, view

MAX_HEADER_BYTES = 1 << 20
MAX_FRAME_BYTES = 1 << 30
MAX_TENSORS = 64

SequenceId = int
"""Unique among everything an ingress process ever started: its boot number and a counter."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the head picks the next token of a sequence; travels once, with the sequence's first frame."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int = 0


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence's share of a frame.

    `step` counts the frames that the ingress drove for the sequence, from 0: the prefill chunks, then
    one per token. `position` is the absolute position of its first token here, `count` how many there are.
    `wants_token` is set on the last prefill chunk and on every decode step; the token's index is then
    `index` (0 for the first one). `capacity` is the number of tokens the sequence may grow to, which
    decides the KV length class; `sampling` is what the head needs. Both travel in every prefill frame.
    """

    sequence: SequenceId
    step: int
    position: int
    count: int
    wants_token: bool
    index: int
    capacity: int
    sampling: Sampling | None = None


@dataclass(frozen=True, slots=True)
class StageTime:
    """What one stage spent on one frame, in microseconds."""

    stage: int
    compute_us: int
    queue_us: int


@dataclass(frozen=True, slots=True)
class Activation:
    """The input of stage `stage`: a prefill chunk of one sequence, one decode step of several, or tensors.

    Tensors: the boundary tensor (or `input_ids` for the first stage), [B, S, ...] with the items' rows in
    order; in a `tensor` frame, also the graph inputs and finished outputs that later stages still need.
    """

    deployment: str
    epoch: int
    route: int
    stage: int
    kind: Literal["prefill", "decode", "tensor"]
    items: tuple[Item, ...]
    tensors: dict[str, Array]
    times: tuple[StageTime, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """What the head chose for one sequence."""

    sequence: SequenceId
    step: int
    index: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """From the last stage to the ingress: tokens (`prefill`, `decode`) or output tensors (`tensor`).

    A prefill chunk that is not the last yields an item in `done` instead of a token: the chunk arrived.
    """

    deployment: str
    epoch: int
    route: int
    tokens: tuple[Token, ...]
    done: tuple[tuple[SequenceId, int], ...]
    tensors: dict[str, Array]
    times: tuple[StageTime, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Along a route, behind its activations: these sequences are over, stage `stage` frees their caches."""

    deployment: str
    epoch: int
    route: int
    stage: int
    sequences: tuple[SequenceId, ...]


@dataclass(frozen=True, slots=True)
class Failure:
    """From a stage to the ingress: these sequences (none named: all of the route) cannot go on, and why."""

    deployment: str
    epoch: int
    route: int
    sequences: tuple[SequenceId, ...]
    code: str
    message: str


Frame = Activation | Result | Close | Failure


def pack(frame: Frame) -> list[bytes | memoryview]:
    """The pieces of a frame, to be written one after the other; tensors are not copied.

    Layout: uint32 header length (little-endian), the header, then each tensor's bytes in header order.
    """
    tensors: dict[str, Array] = {}
    head: list[Any]
    match frame:
        case Activation():
            tensors = frame.tensors
            items = [_item_fields(item) for item in frame.items]
            times = [(t.stage, t.compute_us, t.queue_us) for t in frame.times]
            head = ["a", frame.deployment, frame.epoch, frame.route, frame.stage, frame.kind, items, times]
        case Result():
            tensors = frame.tensors
            tokens = [(t.sequence, t.step, t.index, t.token, t.logprob, t.top) for t in frame.tokens]
            times = [(t.stage, t.compute_us, t.queue_us) for t in frame.times]
            head = ["r", frame.deployment, frame.epoch, frame.route, tokens, frame.done, times]
        case Close():
            head = ["c", frame.deployment, frame.epoch, frame.route, frame.stage, frame.sequences]
        case Failure():
            head = ["f", frame.deployment, frame.epoch, frame.route, frame.sequences, frame.code, frame.message]
    arrays = [np.asarray(array, order="C") for array in tensors.values()]
    head.append([(name, NAME_OF_DTYPE[a.dtype], a.shape) for name, a in zip(tensors, arrays, strict=True)])
    packed: bytes = msgpack.packb(head)
    pieces: list[bytes | memoryview] = [len(packed).to_bytes(4, "little") + packed]
    pieces.extend(memoryview(a.reshape(-1).view(np.uint8).data) for a in arrays if a.size)
    return pieces


def unpack(data: bytes | memoryview) -> Frame:
    """Read one frame; tensors are views of `data`. Raises `ResplitError(INVALID_REQUEST)` on any flaw."""
    if not 4 <= len(data) <= MAX_FRAME_BYTES:
        raise _malformed(f"{len(data)} bytes long")
    body = memoryview(data)
    header_bytes = int.from_bytes(body[:4], "little")
    if header_bytes > min(MAX_HEADER_BYTES, len(body) - 4):
        raise _malformed(f"a header of {header_bytes} bytes in {len(body)}")
    try:
        head = msgpack.unpackb(body[4 : 4 + header_bytes], use_list=False, max_map_len=0, max_ext_len=0)
        tensors = _read_tensors(head[-1], body[4 + header_bytes :])
        match head:
            case ("a", deployment, epoch, route, stage, kind, items, times, _):
                return Activation(
                    str(deployment), int(epoch), int(route), int(stage), _kind(kind),
                    tuple(_read_item(fields) for fields in items), tensors, _read_times(times),
                )  # fmt: skip
            case ("r", deployment, epoch, route, tokens, done, times, _):
                return Result(
                    str(deployment), int(epoch), int(route),
                    tuple(_read_token(fields) for fields in tokens),
                    tuple((_count(sequence), _count(step)) for sequence, step in done),
                    tensors, _read_times(times),
                )  # fmt: skip
            case ("c", deployment, epoch, route, stage, sequences, _):
                closed = tuple(_count(sequence) for sequence in sequences)
                return Close(str(deployment), int(epoch), int(route), int(stage), closed)
            case ("f", deployment, epoch, route, sequences, code, message, _):
                failed = tuple(_count(sequence) for sequence in sequences)
                return Failure(str(deployment), int(epoch), int(route), failed, str(code), str(message))
            case _:
                raise _malformed("of no known kind")
    except ResplitError:
        raise
    except Exception as error:  # whatever hostile bytes raise in msgpack or in a constructor: one answer.
        raise _malformed(str(error) or type(error).__name__) from error


def on_stage(frame: Activation, stage: int, tensors: dict[str, Array], time: StageTime) -> Activation:
    """The frame as the next stage receives it."""
    f = frame
    return Activation(f.deployment, f.epoch, f.route, stage, f.kind, f.items, tensors, (*f.times, time))


def _item_fields(item: Item) -> tuple[Any, ...]:
    s = item.sampling
    sampling = None if s is None else (s.temperature, s.top_k, s.top_p, s.min_p, s.seed, s.logprobs)
    return (
        item.sequence, item.step, item.position, item.count, item.wants_token, item.index, item.capacity, sampling,
    )  # fmt: skip


def _read_item(fields: tuple[Any, ...]) -> Item:
    sequence, step, position, count, wants_token, index, capacity, s = fields
    sampling = None if s is None else Sampling(*s)
    item = Item(sequence, step, position, count, bool(wants_token), index, capacity, sampling)
    whole = (item.sequence, item.step, item.position, item.count, item.index, item.capacity)
    if not all(isinstance(n, int) and n >= 0 for n in whole):
        raise _malformed("an item with a number that is not a count")
    return item


def _read_token(fields: tuple[Any, ...]) -> Token:
    sequence, step, index, token, logprob, top = fields
    chosen = None if logprob is None else float(logprob)
    likely = tuple((_count(i), float(p)) for i, p in top)
    return Token(_count(sequence), _count(step), _count(index), _count(token), chosen, likely)


def _count(number: Any) -> int:
    if not isinstance(number, int) or number < 0:
        raise _malformed(f"{number!r} where a count belongs")
    return number


def _read_times(times: tuple[tuple[int, int, int], ...]) -> tuple[StageTime, ...]:
    return tuple(StageTime(*fields) for fields in times)


def _kind(kind: Any) -> Literal["prefill", "decode", "tensor"]:
    match kind:
        case "prefill" | "decode" | "tensor":
            known: Literal["prefill", "decode", "tensor"] = kind
            return known
        case _:
            raise _malformed(f"an activation of kind {kind!r}")


def _read_tensors(specs: Any, body: memoryview) -> dict[str, Array]:
    if len(specs) > MAX_TENSORS:
        raise _malformed(f"{len(specs)} tensors")
    tensors: dict[str, Array] = {}
    start = 0
    for name, dtype, shape in specs:
        if dtype not in NUMPY_TO_OIP or any(size < 0 for size in shape):
            raise _malformed(f"tensor {name!r} of {dtype}{shape}")
        end = start + prod(shape) * np.dtype(dtype).itemsize
        tensors[str(name)] = view(body[start:end], dtype, tuple(shape), f"tensor {name}")
        start = end
    if start != len(body):
        raise _malformed(f"{len(body) - start} bytes after its last tensor")
    return tensors


def _malformed(why: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, f"a malformed frame: {why}")
