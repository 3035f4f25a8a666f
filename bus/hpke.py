"""Keys wrapped for one reader: HPKE of RFC 9180, base mode, with X25519, HKDF-SHA256 and AES-256-GCM.

A wrap is made for one purpose and opens for that purpose alone: what it is for (`info`) goes into HPKE's key
schedule, so a key wrapped for one node, model or block opens under no other, and a wrap of one kind never passes
as one of another kind, although a node has one X25519 key for all of them.

Base mode says nothing about who made a wrap: anybody can wrap a key of his own for anybody. Whoever unwraps must
have the wrap from something signed (`schemas.envelope`).
"""

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from schemas.base import Digest, NodeId
from schemas.errors import ErrorCode, ResplitError

SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
KEY_BYTES = 32
WRAP_BYTES = 32 + KEY_BYTES + 16
"""The ephemeral public key, the key, and its tag."""

BLOCK_KEY = "resplit.block-key.v1"


def block_info(cluster: str, model: Digest, block: int, node: NodeId) -> bytes:
    """What the wrap of a block's key is for: this block of this sealed model, at this node. The digest of a sealed
    model's manifest names every sealed file, so a model that is sealed again is another one."""
    return info_of(BLOCK_KEY, cluster, model, block, node)


def info_of(purpose: str, *parts: str | int) -> bytes:
    """`purpose|part|part...`: different parts never give the same bytes.

    Raises `ResplitError(INVALID_REQUEST)` for a part that is empty or contains `|`.
    """
    texts = [purpose, *(str(part) for part in parts)]
    for text in texts:
        if not text or "|" in text:
            message = f"{text!r} cannot be part of what a key is wrapped for; use a name that has characters and no '|'"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "info")
    return "|".join(texts).encode()


def wrap(key: bytes, recipient: X25519PublicKey, info: bytes) -> bytes:
    """A 256-bit key, for the holder of one private key and one purpose; `WRAP_BYTES` long, different every time.

    Raises `ResplitError(INVALID_REQUEST)` for a key of another length, and for a public key that no private key has.
    """
    if len(key) != KEY_BYTES:
        raise ResplitError(
            ErrorCode.INVALID_REQUEST, f"a key of {len(key)} bytes; wrap one of {KEY_BYTES} random bytes", "key"
        )
    try:
        return SUITE.encrypt(key, recipient, info)
    except ValueError as error:  # a point of low order: the secret would be known to everybody.
        message = f"{recipient.public_bytes_raw().hex()} is no X25519 key of anybody; enrol the node again"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "recipient") from error


def unwrap(wrapped: bytes, key: X25519PrivateKey, info: bytes) -> bytes:
    """The key inside a wrap. Raises `ResplitError(BAD_SIGNATURE)` unless it was made for `key` and for `info`."""
    if len(wrapped) != WRAP_BYTES:
        raise _refused(f"has {len(wrapped)} bytes instead of {WRAP_BYTES}", info)
    try:
        return SUITE.decrypt(wrapped, key, info)
    except InvalidTag as error:
        raise _refused("does not open: it was made for another reader or purpose, or it was altered", info) from error


def _refused(why: str, info: bytes) -> ResplitError:
    purpose = info.decode(errors="replace")
    return ResplitError(ErrorCode.BAD_SIGNATURE, f"the wrapped key for {purpose} {why}; ask for it to be wrapped again")
