"""A signed value is believed as it was signed, by whom it was signed, as what it was signed, or not at all."""

import base64

import msgpack
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from schemas.base import DeploymentName, Digest, NodeId
from schemas.envelope import HEARTBEAT_TYPE, MAX_ENVELOPE_BYTES, RECEIPT_TYPE, open_envelope, pae, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import Receipt, ReceiptStatus

NODE, OTHER = NodeId("n0"), NodeId("n1")
KEY, OTHER_KEY = Ed25519PrivateKey.from_private_bytes(b"\1" * 32), Ed25519PrivateKey.from_private_bytes(b"\2" * 32)
TRUSTED = {NODE: KEY.public_key(), OTHER: OTHER_KEY.public_key()}
RECEIPT = Receipt(
    node=NODE,
    deployment=DeploymentName("adder"),
    epoch=1,
    plan=Digest("a" * 64),
    status=ReceiptStatus.READY,
    elapsed_ms=1.5,
)
SEALED = seal(RECEIPT, RECEIPT_TYPE, NODE, KEY)


@pytest.mark.parametrize(
    ("kind", "payload", "encoded"),
    [
        ("http://example.com/HelloWorld", b"hello world", b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"),
        ("", b"", b"DSSEv1 0  0 "),
        ("\u00e9", b"\xff \x00", b"DSSEv1 2 \xc3\xa9 3 \xff \x00"),  # lengths are of bytes, not of characters
    ],
)
def test_the_signed_bytes_are_those_of_dsse(kind: str, payload: bytes, encoded: bytes) -> None:
    assert pae(kind, payload) == encoded


def test_no_two_values_have_the_same_signed_bytes() -> None:
    assert len({pae("a", b"b 1 c"), pae("a 5 b", b"c"), pae("a", b"b"), pae("", b"a b")}) == 4


def test_a_sealed_value_opens_to_itself_and_its_signer() -> None:
    assert open_envelope(SEALED, Receipt, RECEIPT_TYPE, TRUSTED) == (RECEIPT, NODE)


def test_sealing_is_deterministic() -> None:
    assert seal(RECEIPT, RECEIPT_TYPE, NODE, KEY) == SEALED


def test_the_signature_is_ed25519_over_the_bytes_that_travel() -> None:
    kind, payload, signer, signature = msgpack.unpackb(SEALED)
    assert (kind, signer) == (RECEIPT_TYPE, NODE)
    KEY.public_key().verify(signature, b"DSSEv1 %d %b %d %b" % (len(kind), kind.encode(), len(payload), payload))
    assert base64.b64encode(KEY.public_key().public_bytes_raw()) == b"iojj3XQJ8ZX9UtstPLpdcspnCb8dlBIb83SIAbQPb1w="


@pytest.mark.parametrize("place", range(0, len(SEALED), 7))
def test_a_flipped_bit_is_never_believed(place: int) -> None:
    forged = bytearray(SEALED)
    forged[place] ^= 1
    with pytest.raises(ResplitError) as refused:
        open_envelope(bytes(forged), Receipt, RECEIPT_TYPE, TRUSTED)
    assert refused.value.code is ErrorCode.BAD_SIGNATURE


def test_a_value_of_one_kind_never_passes_as_another() -> None:
    with pytest.raises(ResplitError, match="where"):
        open_envelope(SEALED, Receipt, HEARTBEAT_TYPE, TRUSTED)
    _, payload, signer, signature = msgpack.unpackb(SEALED)
    relabelled = msgpack.packb([HEARTBEAT_TYPE, payload, signer, signature])
    with pytest.raises(ResplitError, match="valid signature"):
        open_envelope(relabelled, Receipt, HEARTBEAT_TYPE, TRUSTED)


def test_a_signature_counts_for_its_own_signer_only() -> None:
    kind, payload, _, signature = msgpack.unpackb(SEALED)
    with pytest.raises(ResplitError, match="valid signature of 'n1'"):
        open_envelope(msgpack.packb([kind, payload, OTHER, signature]), Receipt, RECEIPT_TYPE, TRUSTED)
    with pytest.raises(ResplitError, match="not trusted"):
        open_envelope(SEALED, Receipt, RECEIPT_TYPE, {OTHER: OTHER_KEY.public_key()})


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"{}",
        msgpack.packb([RECEIPT_TYPE, b"{}", "n0"]),
        msgpack.packb([RECEIPT_TYPE, "{}", "n0", b""]),
        msgpack.packb([RECEIPT_TYPE, b"{}", "n0", b"short"]),
        msgpack.packb({"payload": b""}),
        SEALED + b"\0",
        SEALED[:-1],
        b"\0" * (MAX_ENVELOPE_BYTES + 1),
    ],
)
def test_what_is_no_envelope_is_refused_before_anything_is_decoded(data: bytes) -> None:
    with pytest.raises(ResplitError) as refused:
        open_envelope(data, Receipt, RECEIPT_TYPE, TRUSTED)
    assert refused.value.code is ErrorCode.BAD_SIGNATURE


def test_a_signed_value_of_the_wrong_form_is_invalid_not_forged() -> None:
    payload = b'{"node":"n0"}'
    signed = msgpack.packb([RECEIPT_TYPE, payload, NODE, KEY.sign(pae(RECEIPT_TYPE, payload))])
    with pytest.raises(ResplitError) as refused:
        open_envelope(signed, Receipt, RECEIPT_TYPE, TRUSTED)
    assert refused.value.code is ErrorCode.INVALID_REQUEST
