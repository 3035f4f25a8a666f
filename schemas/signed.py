"""Documents that a threshold of keys must sign: DSSE, as in `schemas.envelope`, with several signatures.

Every signature is over the payload's type and its exact bytes. Holders of keys sign one after another, on machines of
their own (`countersign`), and nobody needs to see another's key. A reader knows the keys and how many of them it
takes; until that many signatures hold, it parses nothing but the envelope.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Annotated, TypeVar

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel, StringConstraints

from schemas.codec import decode, encode
from schemas.envelope import pae
from schemas.errors import ErrorCode, ResplitError
from schemas.flat import read_flat

MAX_DOCUMENT_BYTES = 7 << 20
"""A roster of as many members as there may be, in one message of a server that is configured as `bus.natsconf` does."""
SIGNATURES_MAX = 16
"""More holders than a cluster has. It bounds how many signatures a hostile document can make its reader check."""

KeyId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
"""The first 16 bytes of SHA-256 of a raw public key, as 32 lower-case hexadecimal digits."""

V = TypeVar("V", bound=BaseModel)
Signatures = tuple[tuple[str, bytes], ...]


def key_id(key: Ed25519PublicKey) -> KeyId:
    """The name under which a key signs."""
    return sha256(key.public_bytes_raw()).hexdigest()[:32]


def sign(value: BaseModel, payload_type: str, keys: Mapping[str, Ed25519PrivateKey]) -> bytes:
    """Encode `value` and sign it with each of `keys`, by key id; the result is what travels."""
    return _signed_too(payload_type, encode(value), (), keys)


def countersign(data: bytes, payload_type: str, keys: Mapping[str, Ed25519PrivateKey]) -> bytes:
    """Add the signatures of `keys` to a document. A key that has signed already replaces its signature.

    The signatures that are there are kept and not checked: `open_signed` does that, and the holder of a key opens
    what is to be signed before it signs. Raises `ResplitError(BAD_SIGNATURE)` where `data` is no such document.
    """
    payload, signatures = _unpacked(data, payload_type)
    return _signed_too(payload_type, payload, signatures, keys)


def open_signed(
    data: bytes, kind: type[V], payload_type: str, keys: Mapping[str, Ed25519PublicKey], threshold: int
) -> V:
    """Verify that `threshold` of `keys` (by key id) signed `data`, and only then decode it.

    A key counts once, however often it signs and under whatever names it is listed; a signature that does not hold,
    or of a key that is not among `keys`, is as if it were not there. Raises `ResplitError(BAD_SIGNATURE)` for
    anything else than a well-formed document of this type with enough signatures, and
    `ResplitError(INVALID_REQUEST)` for a signed value of the wrong form.
    """
    assert threshold >= 1, "what nobody has to sign is not signed"
    payload, signatures = _unpacked(data, payload_type)
    signed = pae(payload_type, payload)
    known = ((keys[name], signature) for name, signature in signatures if name in keys)
    holding = {key.public_bytes_raw() for key, signature in known if _holds(key, signature, signed)}
    if len(holding) < threshold:
        raise _refused(f"carries {len(holding)} valid signatures of the {threshold} that it takes")
    return decode(kind, payload, payload_type)


def documents(data: bytes, count_max: int) -> tuple[bytes, ...]:
    """The documents that stand one behind the other in `data`, none of them verified.

    Raises `ResplitError(BAD_SIGNATURE)` where it is none, or more than `count_max`.
    """
    found: list[bytes] = []
    unpacker = msgpack.Unpacker(max_buffer_size=max(1, len(data)))
    unpacker.feed(data)
    while (begin := unpacker.tell()) < len(data) and len(found) < count_max:
        try:
            unpacker.skip()  # takes no memory, whatever the headers announce
        except Exception as error:  # msgpack raises a dozen types on hostile bytes; all mean the same here
            raise _refused("is not a signed document") from error
        found.append(data[begin : unpacker.tell()])
    if not found or begin < len(data):
        raise _refused(f"is not one of at most {count_max} signed ones" if found else "is empty")
    return tuple(found)


def claimed(data: bytes, kind: type[V], payload_type: str) -> V:
    """What a document says, though nobody vouches for it: for one that names the keys it is to be verified with."""
    payload, _ = _unpacked(data, payload_type)
    return decode(kind, payload, payload_type)


def _holds(key: Ed25519PublicKey, signature: bytes, signed: bytes) -> bool:
    try:
        key.verify(signature, signed)
    except InvalidSignature:
        return False
    return True


def _signed_too(payload_type: str, payload: bytes, before: Signatures, keys: Mapping[str, Ed25519PrivateKey]) -> bytes:
    signed = pae(payload_type, payload)
    signatures = {**dict(before), **{name: key.sign(signed) for name, key in keys.items()}}
    if len(signatures) > SIGNATURES_MAX:
        message = f"a document takes {SIGNATURES_MAX} signatures, and this one would have {len(signatures)}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "signatures")
    flat = [part for name in sorted(signatures) for part in (name, signatures[name])]
    data: bytes = msgpack.packb([payload_type, payload, *flat])
    if len(data) > MAX_DOCUMENT_BYTES:
        message = f"a signed document of {len(data)} bytes is over the limit of {MAX_DOCUMENT_BYTES}"
        raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message)
    return data


def _unpacked(data: bytes, payload_type: str) -> tuple[bytes, Signatures]:
    """The payload and the signatures as they came, none of them checked."""
    if len(data) > MAX_DOCUMENT_BYTES:
        raise _refused(f"is {len(data)} bytes long, over the limit of {MAX_DOCUMENT_BYTES}")
    match read_flat(data, 2 + 2 * SIGNATURES_MAX):
        case [str(found_type), bytes(payload), *flat] if len(flat) % 2 == 0:
            pass
        case _:
            raise _refused("is not a signed document")
    if found_type != payload_type:
        raise _refused(f"carries {found_type[:100]!r} where {payload_type!r} belongs")
    return payload, tuple(_signature(*pair) for pair in zip(flat[::2], flat[1::2], strict=True))


def _signature(name: object, signature: object) -> tuple[str, bytes]:
    if not isinstance(name, str) or not isinstance(signature, bytes):
        raise _refused("carries what is not a signature")
    return name, signature


def _refused(why: str) -> ResplitError:
    return ResplitError(ErrorCode.BAD_SIGNATURE, f"the document {why}")
