"""A letter says what it says to its readers, about one thing, and to everybody else only about how long it is."""

import itertools
import tracemalloc
from dataclasses import replace

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bus.hpke import wrap
from bus.letters import (
    MAX_HEAD_BYTES,
    MAX_LETTER_BYTES,
    MAX_PAYLOAD_BYTES,
    MAX_READERS,
    About,
    open_letter,
    padded_bytes,
    seal_letter,
)
from schemas.base import DeploymentName, NodeId
from schemas.errors import ErrorCode, ResplitError

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
KEYS = {name: X25519PrivateKey.from_private_bytes(bytes([i]) * 32) for i, name in enumerate((A, B, C), 1)}
READERS = {name: KEYS[name].public_key() for name in (A, B)}
ABOUT = About("request", DeploymentName("chat"), "r1", "client")
PAYLOAD = b"the weather in Delphi"
LETTER = seal_letter(PAYLOAD, READERS, ABOUT)
HEAD = LETTER[4 : 4 + int.from_bytes(LETTER[:4], "little")]
BODY = LETTER[4 + len(HEAD) :]


def code(data: bytes, me: NodeId = A, key: X25519PrivateKey = KEYS[A], about: About = ABOUT) -> ErrorCode:
    with pytest.raises(ResplitError) as refused:
        open_letter(data, me, key, about)
    return refused.value.code


def letter(head: bytes, body: bytes = BODY) -> bytes:
    return len(head).to_bytes(4, "little") + head + body


def test_every_reader_reads_the_same_payload() -> None:
    assert [open_letter(LETTER, name, KEYS[name], ABOUT) for name in READERS] == [PAYLOAD, PAYLOAD]


@pytest.mark.parametrize("size", [0, 1, 251, 252, 253, 1000, 65532, 65533, 200_000, MAX_PAYLOAD_BYTES])
def test_a_payload_of_any_length_up_to_the_limit_comes_back(size: int) -> None:
    payload = b"\0" * size
    sealed = seal_letter(payload, READERS, ABOUT)
    assert len(sealed) <= MAX_LETTER_BYTES
    assert open_letter(sealed, B, KEYS[B], ABOUT) == payload


def test_it_opens_for_nobody_it_is_not_for() -> None:
    assert code(LETTER, C, KEYS[C]) is ErrorCode.BAD_SIGNATURE
    assert code(LETTER, A, KEYS[C]) is ErrorCode.BAD_SIGNATURE
    assert code(LETTER, A, KEYS[B]) is ErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize(
    "about",
    [
        replace(ABOUT, kind="reply"),
        replace(ABOUT, deployment=DeploymentName("embed")),
        replace(ABOUT, request="r2"),
        replace(ABOUT, sender="mallory"),
    ],
)
def test_it_passes_as_nothing_that_it_is_not_about(about: About) -> None:
    assert code(LETTER, about=about) is ErrorCode.BAD_SIGNATURE


def test_the_same_words_are_never_the_same_letter() -> None:
    again = seal_letter(PAYLOAD, READERS, ABOUT)
    assert len(again) == len(LETTER)
    assert again[-len(BODY) :] != BODY


def test_no_reader_is_taken_out_or_put_in_unseen() -> None:
    version, wraps = msgpack.unpackb(HEAD)
    content_key = bytes(32)
    stranger = [C, wrap(content_key, KEYS[C].public_key(), ABOUT.info_for(C))]
    for changed in (wraps[:1], wraps[::-1], [*wraps, stranger]):
        assert code(letter(msgpack.packb([version, changed]))) is ErrorCode.BAD_SIGNATURE


def test_a_key_taken_from_one_letter_opens_no_other() -> None:
    """The wrap of one letter, put into another about the same thing for the same reader."""
    assert code(letter(HEAD, seal_letter(PAYLOAD, READERS, ABOUT)[-len(BODY) :])) is ErrorCode.BAD_SIGNATURE


def test_what_a_watcher_sees_of_a_length_is_one_of_few() -> None:
    sizes = {len(seal_letter(bytes(size), {A: READERS[A]}, ABOUT)) for size in range(0, 65_533, 97)}
    assert len(sizes) == 9


def test_lengths_are_filled_up_to_powers_of_two_and_then_to_multiples_of_64_kib() -> None:
    assert [padded_bytes(size) for size in (4, 256, 257, 512, 513, 65_536, 65_537, 131_072, 131_073)] == [
        256, 256, 512, 512, 1024, 65_536, 131_072, 131_072, 196_608,
    ]  # fmt: skip
    assert all(a <= b for a, b in itertools.pairwise(padded_bytes(size) for size in range(4, 300_000, 101)))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0" * 3,
        bytes(300),
        LETTER[: 4 + len(HEAD)],
        LETTER[: 4 + len(HEAD) + 100],
        (MAX_HEAD_BYTES + 1).to_bytes(4, "little") + bytes(100_000),
        b"\xff\xff\xff\xff" + LETTER[4:],
        letter(b"\xc1"),
        letter(b"\x90"),
        letter(msgpack.packb([2, []])),
        letter(msgpack.packb([1, {"a": b"x"}])),
        letter(msgpack.packb([1, [["a"]]])),
        letter(msgpack.packb([1, [["a", "text"]]])),
        letter(msgpack.packb([1, [["a", b"x"], ["a", b"x"]]])),
        letter(msgpack.packb([1, [["a" * 64, b"x"]]])),
        letter(msgpack.packb([1, [["a", bytes(81)]]])),
        letter(msgpack.packb([1, [[str(i), b"x"] for i in range(MAX_READERS + 1)]])),
        letter(HEAD + b"\0"),
        letter(b"\x91" * 5000),
    ],
)
def test_what_is_no_letter_is_refused_as_such(data: bytes) -> None:
    assert code(data) is ErrorCode.INVALID_REQUEST


def test_a_body_that_is_cut_off_lengthened_or_altered_is_refused() -> None:
    for body in (BODY + b"\0", BODY + BODY, BODY[:-1] + bytes([BODY[-1] ^ 1]), bytes([BODY[0] ^ 1]) + BODY[1:]):
        assert code(letter(HEAD, body)) is ErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize("plain", [b"\5\0\0\0hello", (253).to_bytes(4, "little") + bytes(252), b"\xff" * 256])
def test_a_sender_who_lies_about_a_length_is_refused(plain: bytes) -> None:
    key = bytes(32)
    head = msgpack.packb([1, [[A, wrap(key, READERS[A], ABOUT.info_for(A))]]])
    padded = plain.ljust(512 if len(plain) < 256 else 256, b"\0")
    assert code(letter(head, AESGCM(key).encrypt(bytes(12), padded, ABOUT.encode() + head))) is (
        ErrorCode.INVALID_REQUEST
    )


def test_what_is_longer_than_any_letter_is_refused_unread() -> None:
    assert code(bytes(MAX_LETTER_BYTES + 1)) is ErrorCode.PAYLOAD_TOO_LARGE


def test_a_head_full_of_empty_arrays_is_never_unpacked() -> None:
    nested: list[object] = []
    for _ in range(3):
        nested = [nested] * MAX_READERS
    data = letter(msgpack.packb(nested))
    tracemalloc.start()
    try:
        assert code(data) is ErrorCode.INVALID_REQUEST
        assert tracemalloc.get_traced_memory()[1] < len(data)
    finally:
        tracemalloc.stop()


def test_the_most_readers_with_the_longest_names_fit() -> None:
    readers = {NodeId(f"{i:063}"): READERS[A] for i in range(MAX_READERS)}
    name = NodeId(f"{7:063}")
    assert open_letter(seal_letter(PAYLOAD, readers, ABOUT), name, KEYS[A], ABOUT) == PAYLOAD


def test_what_cannot_be_a_letter_is_not_made_one() -> None:
    too_many = {NodeId(str(i)): READERS[A] for i in range(MAX_READERS + 1)}
    for payload, readers, about, expected in (
        (bytes(MAX_PAYLOAD_BYTES + 1), READERS, ABOUT, (ErrorCode.PAYLOAD_TOO_LARGE, "payload")),
        (b"", {}, ABOUT, (ErrorCode.INVALID_REQUEST, "readers")),
        (b"", too_many, ABOUT, (ErrorCode.INVALID_REQUEST, "readers")),
        (b"", {NodeId("n" * 64): READERS[A]}, ABOUT, (ErrorCode.INVALID_REQUEST, "readers")),
        (b"", {NodeId("a|b"): READERS[A]}, ABOUT, (ErrorCode.INVALID_REQUEST, "info")),
        (b"", READERS, replace(ABOUT, request="a|b"), (ErrorCode.INVALID_REQUEST, "info")),
        (b"", READERS, replace(ABOUT, kind=""), (ErrorCode.INVALID_REQUEST, "info")),
    ):
        with pytest.raises(ResplitError) as refused:
            seal_letter(payload, readers, about)
        assert (refused.value.code, refused.value.field) == expected
