"""Bytes from anywhere: what is read from them is a value or one typed error, never anything else."""

from dataclasses import replace
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.codec import JSON, MAX_DEPTH, MAX_ELEMENTS, MSGPACK, decode_plain
from schemas.errors import ErrorCode, ResplitError
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
    Move,
    Result,
    Reuse,
    Sampling,
    StageTime,
    Token,
)
from schemas.framing import pack, unpack
from schemas.tensor import NUMPY_TO_OIP, Array

names = st.text(max_size=20)
counts = st.integers(0, (1 << 63) - 1)
small = st.integers(0, 1 << 20)
reals = st.floats(allow_nan=False, allow_infinity=False)
samplings = st.builds(Sampling, reals, small, reals, reals, counts, st.integers(0, 20))
items = st.builds(Item, counts, small, small, small, st.booleans(), small, small, st.none() | samplings)
times = st.lists(st.builds(StageTime, small, counts, counts), max_size=3).map(tuple)
tokens = st.builds(
    Token, counts, small, small, small, st.none() | reals, st.lists(st.tuples(small, reals), max_size=3).map(tuple)
)
sequences = st.lists(counts, max_size=4).map(tuple)


@st.composite
def arrays(draw: st.DrawFn) -> Array:
    shape = tuple(draw(st.lists(st.integers(0, 3), min_size=1, max_size=4)))
    dtype = np.dtype(draw(st.sampled_from(sorted(NUMPY_TO_OIP))))
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    return np.frombuffer(draw(st.binary(min_size=size, max_size=size)), dtype).reshape(shape)


tensors = st.dictionaries(names, arrays(), max_size=3)
kinds: st.SearchStrategy[Any] = st.sampled_from(["prefill", "decode", "replay", "tensor"])
frames: st.SearchStrategy[Frame] = st.one_of(
    st.builds(
        Activation,
        names,
        small,
        small,
        small,
        kinds,
        st.lists(items, min_size=1, max_size=3).map(tuple),
        tensors,
        names,
        times,
    ),
    st.builds(
        Result,
        names,
        small,
        small,
        st.lists(tokens, max_size=3).map(tuple),
        st.lists(st.tuples(counts, small), max_size=3).map(tuple),
        tensors,
        names,
        times,
    ),
    st.builds(Close, names, small, small, small, sequences),
    st.builds(Failure, names, small, small, sequences, names, names, names),
    st.builds(Reuse, names, small, small, small, names, counts, counts, small, small, samplings),
    st.builds(
        Adopt,
        names,
        small,
        small,
        small,
        names,
        counts,
        small,
        small,
        samplings,
        st.lists(st.builds(Move, small, small, names), max_size=3).map(tuple),
        st.booleans(),
    ),
    st.builds(Adopted, names, small, small, names, names, counts, small, st.booleans(), counts, st.none() | names),
    st.builds(Fetch, names, small, small, names, counts, small, small, small, small),
    st.builds(Cache, names, small, names, counts, small, small, small, small, tensors),
)
scalars = st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | names | st.binary()
plain = st.recursive(scalars, lambda inner: st.lists(inner, max_size=4), max_leaves=12)


def packed(frame: Frame) -> bytes:
    return b"".join(bytes(piece) for piece in pack(frame))


def comparable(frame: Frame) -> tuple[Frame, dict[str, tuple[str, tuple[int, ...], bytes]]]:
    """A frame without its tensors, and those as their bytes: NaN is then equal to itself."""
    if not isinstance(frame, Activation | Result | Cache):
        return frame, {}
    content = {name: (a.dtype.name, a.shape, a.tobytes()) for name, a in frame.tensors.items()}
    return replace(frame, tensors={}), content


def read(data: bytes) -> Frame | None:
    """The frame, or None for the one error that there may be."""
    try:
        return unpack(data)
    except ResplitError as error:
        assert error.code is ErrorCode.INVALID_REQUEST
        return None


@given(frames)
def test_a_frame_arrives_as_it_was_sent(frame: Frame) -> None:
    assert comparable(unpack(packed(frame))) == comparable(frame)


ONE = Item(1, 0, 0, 1, wants_token=False, index=0, capacity=1)


def test_a_scalar_arrives_as_a_scalar() -> None:
    frame = Activation("d", 1, 0, 0, "tensor", (ONE,), {"x": np.array(1.5, np.float32)}, "n0")
    assert comparable(unpack(packed(frame))) == comparable(frame)


@given(st.binary(max_size=400))
def test_any_bytes_are_a_frame_or_one_typed_error(data: bytes) -> None:
    read(data)
    read(len(data).to_bytes(4, "little") + data)


@given(frames, st.data())
def test_a_damaged_frame_is_a_frame_or_one_typed_error(frame: Frame, data: st.DataObject) -> None:
    whole = bytearray(packed(frame))
    at = data.draw(st.integers(0, len(whole) - 1))
    match data.draw(st.sampled_from(["flip", "cut", "insert"])):
        case "flip":
            whole[at] ^= data.draw(st.integers(1, 255))
        case "cut":
            del whole[at:]
        case _:
            whole[at:at] = data.draw(st.binary(min_size=1, max_size=8))
    read(bytes(whole))


@given(st.sampled_from("arcufodqk"), st.lists(plain, max_size=9))
def test_a_header_of_anything_is_a_frame_that_can_be_sent_on_or_one_typed_error(kind: str, rest: list[Any]) -> None:
    head = msgpack.packb([kind, *rest])
    frame = read(len(head).to_bytes(4, "little") + head)
    if frame is not None:
        assert isinstance(frame.epoch, int)
        read(packed(frame))


@given(st.lists(plain, max_size=4))
def test_a_result_holds_numbers_where_numbers_belong(rows: list[Any]) -> None:
    for head in (
        ["r", "d", 1, 0, rows, [], "n", [], []],
        ["r", "d", 1, 0, [], rows, "n", [], []],
        ["c", "d", 1, 0, 0, rows, []],
    ):
        body = msgpack.packb(head)
        match read(len(body).to_bytes(4, "little") + body):
            case Result() as result:
                assert all(isinstance(n, int) for t in result.tokens for n in (t.sequence, t.step, t.index, t.token))
                assert all(isinstance(n, int) for pair in result.done for n in pair)
                assert all(len(pair) == 2 for pair in result.done)
            case Close() as close:
                assert all(isinstance(sequence, int) for sequence in close.sequences)


@pytest.mark.parametrize("shape", [[1 << 62], [1 << 31, 1 << 31], [-1], [2] * 60, ["2"], [1.5], [0, 1 << 62]])
def test_a_tensor_larger_than_its_bytes_allocates_nothing(shape: list[Any]) -> None:
    head = msgpack.packb(["a", "d", 1, 0, 0, "tensor", [], "n", [], [["x", "float32", shape]]])
    data = len(head).to_bytes(4, "little") + head
    assert read(data + b"\0" * 8) is None


@given(st.binary(max_size=300), st.sampled_from([JSON, MSGPACK, "", "text/html", "application/json; a=b"]))
def test_any_bytes_decode_to_plain_values_or_one_typed_error(data: bytes, content_type: str) -> None:
    try:
        decode_plain(data, content_type, "request")
    except ResplitError as error:
        assert error.code in (ErrorCode.INVALID_REQUEST, ErrorCode.PAYLOAD_TOO_LARGE)


@given(st.text(alphabet='{}[],:"\\ud8tfn0123456789.eE-+ ', max_size=60))
def test_anything_that_looks_like_json_decodes_or_is_refused(text: str) -> None:
    try:
        decode_plain(text.encode(), JSON, "request")
    except ResplitError as error:
        assert error.code is ErrorCode.INVALID_REQUEST


@given(st.recursive(scalars, lambda i: st.lists(i, max_size=3) | st.dictionaries(names, i, max_size=3), max_leaves=20))
def test_plain_values_come_back_from_msgpack(value: Any) -> None:
    found = decode_plain(msgpack.packb(value), MSGPACK, "request")
    assert msgpack.packb(found) == msgpack.packb(value)


@pytest.mark.parametrize("content_type", [JSON, MSGPACK])
def test_values_too_deep_or_too_many_are_refused(content_type: str) -> None:
    is_json = content_type == JSON
    empty = b"[]" if is_json else b"\x90"
    for depth in (MAX_DEPTH + 1, 100_000):
        data = b"[" * depth + b"]" * depth if is_json else b"\x91" * depth + b"\x90"
        with pytest.raises(ResplitError) as caught:
            decode_plain(data, content_type, "request")
        assert caught.value.code is ErrorCode.INVALID_REQUEST
    half = MAX_ELEMENTS // 2 + 1
    halves = [empty] * half
    if is_json:
        data = b"[" + b",".join([b"[" + b",".join(halves) + b"]"] * 2) + b"]"
    else:
        data = b"\x92" + (b"\xdd" + half.to_bytes(4, "big") + b"".join(halves)) * 2
    with pytest.raises(ResplitError) as caught:
        decode_plain(data, content_type, "request")
    assert caught.value.code is ErrorCode.PAYLOAD_TOO_LARGE
