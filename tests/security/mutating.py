"""Other bytes made of signed ones: damaged, framed differently, with parts changed, exchanged or signed by others."""

import json
from collections.abc import Sequence
from typing import Any

import msgpack
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import strategies as st

from schemas.envelope import pae

ORDER = 2**252 + 27742317777372353535851937790883648493
"""Of Ed25519's group: a signature whose second half is larger by this is the same one to a careless verifier."""


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """`data` with bits flipped, bytes cut out, put in or doubled, or the end missing; never `data` itself."""
    place = draw(st.integers(0, len(data) - 1))
    match draw(st.sampled_from(["flip", "truncate", "cut", "insert", "repeat", "overwrite"])):
        case "flip":
            changed = bytearray(data)
            for at in draw(st.sets(st.integers(0, len(data) - 1), min_size=1, max_size=4)):
                changed[at] ^= 1 << draw(st.integers(0, 7))
            found = bytes(changed)
        case "truncate":
            found = data[:place]
        case "cut":
            found = data[:place] + data[place + draw(st.integers(1, 100)) :]
        case "insert":
            found = data[:place] + draw(st.binary(min_size=1, max_size=20)) + data[place:]
        case "repeat":
            found = data + data[place:]
        case _:
            patch = draw(st.binary(min_size=1, max_size=64))
            found = data[:place] + patch + data[place + len(patch) :]
    return found if found != data else data[:-1]


@st.composite
def reframed(draw: st.DrawFn, data: bytes) -> bytes:
    """A flat array of the same parts, with the same signatures, in another spelling of msgpack."""
    parts = msgpack.unpackb(data)
    spellings = [_array(len(parts)), *(_bytes(part) if isinstance(part, bytes) else _text(part) for part in parts)]
    longer = draw(st.integers(0, len(spellings) - 1))
    chosen = [draw(st.sampled_from(texts[1:] if i == longer else texts)) for i, texts in enumerate(spellings)]
    return b"".join(chosen)


@st.composite
def forged(draw: st.DrawFn, documents: Sequence[bytes], at: int, strangers: Sequence[Ed25519PrivateKey]) -> bytes:
    """An envelope that says something else, in another's name, as another type or by another key than it was signed
    with: parts of `documents[at]`, of the others, and of our own."""
    kind, payload, signer, signature = msgpack.unpackb(documents[at])
    others = [msgpack.unpackb(other) for other in documents]
    own: list[Any] = [kind, payload, signer, signature]
    for _ in range(draw(st.integers(1, 2))):
        match draw(st.sampled_from(["payload", "exchange", "sign", "malleable", "shape", "junk"])):
            case "payload":
                own[1] = draw(_fields_changed(payload))
            case "exchange":
                place = draw(st.integers(0, 3))
                own[place] = draw(st.sampled_from(others))[place]
            case "sign":
                said = draw(st.sampled_from([pae(str(own[0]), _as_bytes(own[1])), _as_bytes(own[1]), b""]))
                own[3] = draw(st.sampled_from(strangers)).sign(said)
            case "malleable":
                raw = _as_bytes(signature)
                own[3] = raw[:32] + (int.from_bytes(raw[32:], "little") + ORDER).to_bytes(32, "little")
            case "shape":
                own = draw(st.sampled_from([own[:3], [*own, signature], own[::-1], [own], {"payload": own}]))
                return bytes(msgpack.packb(own))
            case _:
                own[draw(st.integers(0, 3))] = draw(
                    st.none() | st.integers(-(1 << 63), 1 << 63) | st.binary(max_size=70) | st.text(max_size=30)
                )
    return bytes(msgpack.packb(own))


def _as_bytes(part: Any) -> bytes:
    return part if isinstance(part, bytes) else b""


@st.composite
def _fields_changed(draw: st.DrawFn, payload: bytes) -> bytes:
    """A payload with one of its fields changed, left out or added, or only spelled in another way."""
    value = json.loads(payload)
    holders = list(_holders(value))
    holder = draw(st.sampled_from(holders))
    key = draw(st.sampled_from(sorted(holder))) if isinstance(holder, dict) else draw(st.integers(0, len(holder) - 1))
    match draw(st.sampled_from(["other", "out", "more", "spelling"])):
        case "other":
            holder[key] = draw(_other_than(holder[key]))
        case "out":
            del holder[key]
        case "more":
            value["more"] = draw(st.integers())
        case _:
            return json.dumps(value).encode() + b" " * draw(st.integers(0, 3))
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).encode()


def _holders(value: Any) -> Sequence[Any]:
    """Every object and list in `value` that is not empty, itself the first."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [*([value] if value and inner else []), *(found for one in inner for found in _holders(one))]


def _other_than(value: Any) -> st.SearchStrategy[Any]:
    match value:
        case bool():
            return st.just(not value)
        case int() | float():
            return st.sampled_from([value + 1, value - 1, 0, 2 * value, 1 << 62])
        case str():
            return st.sampled_from([value + "0", value[:-1], value[::-1], "n1", ""])
        case _:
            return st.none()


def _array(count: int) -> list[bytes]:
    return [bytes([0x90 + count]), *_headers(count, [(0xDC, 2), (0xDD, 4)])]


def _bytes(data: bytes) -> list[bytes]:
    return _spellings(msgpack.packb(data), data, [(0xC4, 1), (0xC5, 2), (0xC6, 4)])


def _text(text: str) -> list[bytes]:
    data = text.encode()
    return _spellings(msgpack.packb(text), data, [(0xD9, 1), (0xDA, 2), (0xDB, 4)])


def _spellings(shortest: bytes, body: bytes, forms: Sequence[tuple[int, int]]) -> list[bytes]:
    """The canonical one first, and then the others."""
    longer = [head + body for head in _headers(len(body), forms)]
    return [shortest, *(spelling for spelling in longer if spelling != shortest)]


def _headers(count: int, forms: Sequence[tuple[int, int]]) -> list[bytes]:
    return [bytes([first]) + count.to_bytes(width, "big") for first, width in forms if count < 1 << 8 * width]
