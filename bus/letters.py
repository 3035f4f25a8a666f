"""Letters: messages that their readers can open and the bus cannot: requests of clients, activations, plans.

    uint32 length of the head (little-endian), the head, the body
    head    msgpack: [1, [[reader's name, the content key wrapped for it], ...]]
    body    AES-256-GCM under the content key: uint32 length of the payload, the payload, zeros

The content key is fresh for each letter and opens nothing else, so its nonce is all zeros. Authenticated with the
body are the head as it travels, so that nobody takes a reader out or puts one in unseen, and what the letter is about
(`About`), so that it never passes as a message of another kind, deployment, request or sender. A reader takes `About`
from where the letter came from (its subject and headers), not from the letter.

A letter hides what is said. It does not prove who says it: anybody who knows the readers' public keys can write one
and claim any sender. Where that matters, sign the letter (`schemas.envelope`). Nor is it fresh: the same letter opens
again, and it is for the reader to know that it has had this request. How many readers there are, and which, is in the
open.

Lengths tell much about text: the number of its tokens, and in a stream the length of each. So the body is filled up
with zeros to 256 bytes, or the next power of two, or from 64 KiB on to the next multiple of 64 KiB. All that a watcher
learns of a prompt of up to 64 KiB is one of nine sizes; at most half of what travels is filling (from 256 bytes on),
and above 64 KiB, where doubling would push letters over what the bus carries, never more than 64 KiB.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from bus.hpke import WRAP_BYTES, info_of, unwrap, wrap
from schemas.base import DeploymentName, NodeId
from schemas.errors import ErrorCode, ResplitError

VERSION = 1
LETTER = "resplit.letter.v1"
MAX_PAYLOAD_BYTES = 4 << 20
"""Beyond any message that the bus is meant to carry (1 MiB, unless the server is told otherwise)."""
MAX_READERS = 64
MAX_NAME = 63
MAX_HEAD_BYTES = 16 + MAX_READERS * (MAX_NAME + WRAP_BYTES + 8)
SMALLEST_BUCKET = 256
LARGE_BUCKET = 64 << 10
TAG_BYTES = 16
MAX_LETTER_BYTES = 4 + MAX_HEAD_BYTES + MAX_PAYLOAD_BYTES + LARGE_BUCKET + TAG_BYTES
# A key that encrypts one message needs no other nonce.
NONCE = bytes(12)


@dataclass(frozen=True)
class About:
    """What a letter is about; it opens only for a reader who expects just this. No part is empty or contains `|`."""

    kind: str
    """`request`, `activation`, `section`: what the reader will take the payload for."""
    deployment: DeploymentName
    """`-` where it is about none."""
    request: str
    """The request's id, or whatever else says which message this is."""
    sender: str
    """A node, or the name that a client gave itself: a claim, unless the letter is signed."""

    def encode(self) -> bytes:
        """The bytes that the letter is bound to. Raises `ResplitError(INVALID_REQUEST)` for a part that cannot be."""
        return info_of(LETTER, self.kind, self.deployment, self.request, self.sender)

    def info_for(self, reader: NodeId) -> bytes:
        """What the content key is wrapped for: this letter's subject, and one reader."""
        return info_of(LETTER, self.kind, self.deployment, self.request, self.sender, reader)


def seal_letter(payload: bytes, readers: Mapping[NodeId, X25519PublicKey], about: About) -> bytes:
    """`payload` for each of `readers` and nobody else; different every time.

    Raises `ResplitError`: PAYLOAD_TOO_LARGE above `MAX_PAYLOAD_BYTES`, INVALID_REQUEST for no readers, more than
    `MAX_READERS`, a name or key that cannot be one, or an `about` with an empty part.
    """
    if len(payload) > MAX_PAYLOAD_BYTES:
        message = f"a message of {len(payload)} bytes cannot be sealed; at most {MAX_PAYLOAD_BYTES} can"
        raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message, "payload")
    if not 1 <= len(readers) <= MAX_READERS:
        message = f"a letter to {len(readers)} readers; name 1 to {MAX_READERS}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "readers")
    if long := next((name for name in readers if len(name.encode()) > MAX_NAME), None):
        message = f"{long!r} is no node's name: it has more than {MAX_NAME} bytes"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "readers")
    key = AESGCM.generate_key(256)
    wraps = [[name, wrap(key, public, about.info_for(name))] for name, public in sorted(readers.items())]
    head: bytes = msgpack.packb([VERSION, wraps])
    body = AESGCM(key).encrypt(NONCE, filled(payload), about.encode() + head)
    return len(head).to_bytes(4, "little") + head + body


def open_letter(data: bytes, me: NodeId, key: X25519PrivateKey, about: About) -> bytes:
    """The payload of a letter to `me` (among others) that is about just this.

    Raises `ResplitError`: PAYLOAD_TOO_LARGE for what is longer than any letter, INVALID_REQUEST for what is not a
    letter, and BAD_SIGNATURE where `me` is not among the readers, or where any part is not as it was sealed.
    """
    if len(data) > MAX_LETTER_BYTES:
        message = f"a letter of {len(data)} bytes; none is longer than {MAX_LETTER_BYTES}"
        raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message, "letter")
    head, body = _parts(data)
    wrapped = _readers(head).get(me)
    if wrapped is None:
        raise _refused(about, f"is not for {me!r}")
    content_key = unwrap(wrapped, key, about.info_for(me))
    try:
        padded = AESGCM(content_key).decrypt(NONCE, body, about.encode() + head)
    except InvalidTag as error:
        raise _refused(about, "was altered") from error
    return emptied(padded)


def is_for(data: bytes, me: NodeId) -> bool:
    """Whether `me` is among the readers of a letter. Raises `ResplitError(INVALID_REQUEST)` for what is none."""
    return me in _readers(_parts(data)[0])


def filled(payload: bytes) -> bytes:
    """What is encrypted: `payload` behind its length, and zeros."""
    plain = len(payload).to_bytes(4, "little") + payload
    return plain.ljust(padded_bytes(len(plain)), b"\0")


def emptied(padded: bytes) -> bytes:
    """The payload in what `filled` made. Raises `ResplitError(INVALID_REQUEST)` where it did not make it."""
    length = int.from_bytes(padded[:4], "little")
    if padded_bytes(4 + length) != len(padded):
        raise _malformed(f"{length} bytes said to be in a body of {len(padded)}")
    return padded[4 : 4 + length]


def padded_bytes(size: int) -> int:
    """The length to which `size` bytes are filled up."""
    if size > LARGE_BUCKET:
        return -(-size // LARGE_BUCKET) * LARGE_BUCKET
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


def _parts(data: bytes) -> tuple[bytes, bytes]:
    """Head and body. The head is bounded before it is parsed: a body full of empty arrays is never unpacked."""
    length = int.from_bytes(data[:4], "little")
    if len(data) < 4 + length + SMALLEST_BUCKET + TAG_BYTES or length > MAX_HEAD_BYTES:
        raise _malformed(f"a head of {length} bytes in {len(data)}")
    return data[4 : 4 + length], data[4 + length :]


def _readers(head: bytes) -> dict[str, bytes]:
    try:
        fields = msgpack.unpackb(
            head, max_array_len=MAX_READERS, max_map_len=0, max_ext_len=0, max_str_len=MAX_NAME, max_bin_len=WRAP_BYTES
        )
    except Exception as error:  # msgpack raises a dozen types on hostile bytes; all mean the same here.
        raise _malformed("its head is not msgpack") from error
    match fields:
        case [int(version), list(wraps)] if version == VERSION:
            pass
        case _:
            raise _malformed(f"its head is not that of version {VERSION}")
    found: dict[str, bytes] = {}
    for entry in wraps:
        match entry:
            case [str(name), bytes(wrapped)] if name not in found:
                found[name] = wrapped
            case _:
                raise _malformed("a reader without a name and a key, or twice the same")
    return found


def _malformed(why: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, f"not a sealed message: {why}", "letter")


def _refused(about: About, why: str) -> ResplitError:
    named = f"the sealed {about.kind} of {about.sender!r} about {about.request!r} in {about.deployment!r}"
    return ResplitError(ErrorCode.BAD_SIGNATURE, f"{named} {why}")
