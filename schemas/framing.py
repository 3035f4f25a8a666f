"""How frames travel: a msgpack header, then the raw bytes of the tensors; bounded and checked when they are read."""

from math import prod
from typing import Any

import msgpack
import numpy as np

from schemas.errors import ErrorCode, ResplitError
from schemas.flat import check_announced
from schemas.frame import (
    Activation,
    Adopt,
    Adopted,
    Cache,
    Close,
    Failure,
    Fetch,
    Frame,
    Item,
    Kind,
    Move,
    Result,
    Reuse,
    Sampling,
    StageTime,
    Token,
)
from schemas.tensor import NAME_OF_DTYPE, NUMPY_TO_OIP, Array, view

MAX_HEADER_BYTES = 1 << 20
MAX_FRAME_BYTES = 1 << 30
MAX_TENSORS = 64


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
            head = [
                "a",
                frame.deployment,
                frame.epoch,
                frame.route,
                frame.stage,
                frame.kind,
                items,
                frame.ingress,
                times,
            ]
        case Result():
            tensors = frame.tensors
            tokens = [(t.sequence, t.step, t.index, t.token, t.logprob, t.top) for t in frame.tokens]
            times = [(t.stage, t.compute_us, t.queue_us) for t in frame.times]
            head = ["r", frame.deployment, frame.epoch, frame.route, tokens, frame.done, frame.ingress, times]
        case Close():
            head = ["c", frame.deployment, frame.epoch, frame.route, frame.stage, frame.sequences]
        case Reuse():
            of = [frame.old, frame.new, frame.tokens, frame.capacity, _sampling_fields(frame.sampling)]
            head = ["u", frame.deployment, frame.epoch, frame.route, frame.stage, frame.ingress, *of]
        case Failure():
            named = (frame.sequences, frame.ingress, frame.code, frame.message)
            head = ["f", frame.deployment, frame.epoch, frame.route, *named]
        case Adopt():
            moves = [(move.first, move.last, move.source) for move in frame.moves]
            road = (frame.before, frame.epoch, frame.route, frame.ingress)
            of = [frame.sequence, frame.tokens, frame.capacity, _sampling_fields(frame.sampling)]
            head = ["o", frame.deployment, *road, *of, moves, frame.final]
        case Adopted():
            of = [frame.sequence, frame.tokens, frame.final, frame.moved_bytes]
            head = ["d", frame.deployment, frame.epoch, frame.route, frame.ingress, frame.node, *of, frame.error]
        case Fetch():
            span = (frame.first, frame.last, frame.start, frame.stop)
            head = ["q", frame.deployment, frame.before, frame.epoch, frame.node, frame.sequence, *span]
        case Cache():
            tensors = frame.tensors
            span = (frame.first, frame.last, frame.start, frame.stop)
            head = ["k", frame.deployment, frame.epoch, frame.node, frame.sequence, *span]
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
        check_announced(body[4 : 4 + header_bytes])
        head = msgpack.unpackb(body[4 : 4 + header_bytes], use_list=False, max_map_len=0, max_ext_len=0)
        tensors = _read_tensors(head[-1], body[4 + header_bytes :])
        match head:
            case ("a", _, _, _, _, _, (), _, _, _):
                raise _malformed("an activation of no sequence")
            case ("a", deployment, epoch, route, stage, kind, items, ingress, times, _):
                return Activation(
                    str(deployment), int(epoch), int(route), int(stage), _kind(kind),
                    tuple(_read_item(fields) for fields in items), tensors, str(ingress), _read_times(times),
                )  # fmt: skip
            case ("r", deployment, epoch, route, tokens, done, ingress, times, _):
                return Result(
                    str(deployment), int(epoch), int(route),
                    tuple(_read_token(fields) for fields in tokens),
                    tuple((_count(sequence), _count(step)) for sequence, step in done),
                    tensors, str(ingress), _read_times(times),
                )  # fmt: skip
            case ("c", deployment, epoch, route, stage, sequences, _):
                closed = tuple(_count(sequence) for sequence in sequences)
                return Close(str(deployment), int(epoch), int(route), int(stage), closed)
            case ("u", deployment, epoch, route, stage, ingress, old, new, count, capacity, sampling, _):
                return Reuse(
                    str(deployment), _count(epoch), _count(route), _count(stage), str(ingress),
                    _count(old), _count(new), _count(count), _count(capacity), Sampling(*sampling),
                )  # fmt: skip
            case ("f", deployment, epoch, route, sequences, ingress, code, message, _):
                failed = tuple(_count(sequence) for sequence in sequences)
                return Failure(str(deployment), int(epoch), int(route), failed, str(ingress), str(code), str(message))
            case (
                "o",
                deployment,
                before,
                epoch,
                route,
                ingress,
                sequence,
                tokens,
                capacity,
                sampling,
                moves,
                final,
                _,
            ):
                return Adopt(
                    str(deployment), _count(before), _count(epoch), _count(route), str(ingress),
                    _count(sequence), _count(tokens), _count(capacity), Sampling(*sampling),
                    tuple(Move(_count(first), _count(last), str(source)) for first, last, source in moves), bool(final),
                )  # fmt: skip
            case ("d", deployment, epoch, route, ingress, node, sequence, tokens, final, moved, error, _):
                return Adopted(
                    str(deployment), _count(epoch), _count(route), str(ingress), str(node), _count(sequence),
                    _count(tokens), bool(final), _count(moved), None if error is None else str(error),
                )  # fmt: skip
            case ("q", deployment, before, epoch, node, sequence, first, last, start, stop, _):
                return Fetch(
                    str(deployment), _count(before), _count(epoch), str(node), _count(sequence),
                    _count(first), _count(last), _count(start), _count(stop),
                )  # fmt: skip
            case ("k", deployment, epoch, node, sequence, first, last, start, stop, _):
                return Cache(
                    str(deployment), _count(epoch), str(node), _count(sequence),
                    _count(first), _count(last), _count(start), _count(stop), tensors,
                )  # fmt: skip
            case _:
                raise _malformed("of no known kind")
    except ResplitError:
        raise
    except Exception as error:  # whatever hostile bytes raise in msgpack or in a constructor: one answer.
        raise _malformed(str(error) or type(error).__name__) from error


def _item_fields(item: Item) -> tuple[Any, ...]:
    sampling = None if item.sampling is None else _sampling_fields(item.sampling)
    return (
        item.sequence, item.step, item.position, item.count, item.wants_token, item.index, item.capacity, sampling,
        item.allowed,
    )  # fmt: skip


def _sampling_fields(s: Sampling) -> tuple[float | str, ...]:
    return (s.temperature, s.top_k, s.top_p, s.min_p, s.seed, s.logprobs, s.trace)


def _read_item(fields: tuple[Any, ...]) -> Item:
    sequence, step, position, count, wants_token, index, capacity, s, allowed = fields
    sampling = None if s is None else Sampling(*s)
    if allowed is not None and not isinstance(allowed, bytes):
        raise _malformed("an item whose mask is not bytes")
    item = Item(sequence, step, position, count, bool(wants_token), index, capacity, sampling, allowed)
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


def _kind(kind: Any) -> Kind:
    match kind:
        case "prefill" | "decode" | "replay" | "tensor":
            known: Kind = kind
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
