"""Signed envelopes: DSSE over the exact bytes sent, with Ed25519.

The signature covers the payload's type and its bytes (`PAE`, DSSE v1), so a payload of one kind can
never be passed off as another, and nothing is parsed before it is verified. A reader verifies the
bytes it received and then parses those same bytes.
"""

from collections.abc import Mapping
from typing import TypeVar

import msgpack
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from pydantic import BaseModel

from schemas.base import NodeId
from schemas.codec import decode, encode
from schemas.errors import ErrorCode, ResplitError
from schemas.flat import read_flat

PLAN_TYPE = "application/vnd.resplit.plan.v2+json"
RECEIPT_TYPE = "application/vnd.resplit.receipt.v1+json"
HEARTBEAT_TYPE = "application/vnd.resplit.heartbeat.v1+json"
LEADER_TYPE = "application/vnd.resplit.leader.v1+json"
BEACON_TYPE = "application/vnd.resplit.beacon.v1+json"
STAGING_TYPE = "application/vnd.resplit.staging.v1+json"
AUDIT_TYPE = "application/vnd.resplit.audit.v1+json"

MAX_ENVELOPE_BYTES = 1 << 20
"""No signed event is larger: NATS carries messages up to this size unchunked."""

V = TypeVar("V", bound=BaseModel)


def pae(payload_type: str, payload: bytes) -> bytes:
    """DSSE's pre-authentication encoding of a payload and its type."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def seal(value: BaseModel, payload_type: str, signer: NodeId, key: Ed25519PrivateKey) -> bytes:
    """Encode `value` and sign it as `signer`; the result is what travels."""
    payload = encode(value)
    envelope: bytes = msgpack.packb([payload_type, payload, signer, key.sign(pae(payload_type, payload))])
    return envelope


def open_envelope(
    data: bytes, kind: type[V], payload_type: str, trusted: Mapping[NodeId, Ed25519PublicKey]
) -> tuple[V, NodeId]:
    """Verify `data` against the keys in `trusted` and only then decode it: (value, who signed it).

    Raises `ResplitError(BAD_SIGNATURE)` for anything that is not a well-formed envelope of this type,
    signed by a key in `trusted`, and `ResplitError(INVALID_REQUEST)` for a signed value of the wrong form.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise _refused(f"is {len(data)} bytes long, over the limit of {MAX_ENVELOPE_BYTES}")
    match read_flat(data, 4):
        case [str(found_type), bytes(payload), str(signer), bytes(signature)]:
            pass
        case _:
            raise _refused("is not an envelope")
    if found_type != payload_type:
        raise _refused(f"carries {found_type[:100]!r} where {payload_type!r} belongs")
    name = NodeId(signer)
    key = trusted.get(name)
    if key is None:
        raise _refused(f"is signed by {signer[:100]!r}, who is not trusted here")
    try:
        key.verify(signature, pae(payload_type, payload))
    except InvalidSignature as error:
        raise _refused(f"does not carry a valid signature of {signer!r}") from error
    return decode(kind, payload, payload_type), name


def _refused(why: str) -> ResplitError:
    return ResplitError(ErrorCode.BAD_SIGNATURE, f"the event {why}")
