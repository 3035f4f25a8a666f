"""A wrapped key opens for one reader and one purpose, and its bytes are those of RFC 9180."""

import hashlib
import hmac

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from bus.hpke import WRAP_BYTES, block_info, info_of, unwrap, wrap
from schemas.base import Digest, NodeId
from schemas.errors import ErrorCode, ResplitError

ME, OTHER = X25519PrivateKey.from_private_bytes(b"\1" * 32), X25519PrivateKey.from_private_bytes(b"\2" * 32)
KEY = bytes(range(32))
MODEL, NODE = Digest("a" * 64), NodeId("n0")
INFO = block_info("home", MODEL, 4, NODE)

# RFC 9180, A.1.1: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-128-GCM, base mode.
RFC_INFO = b"Ode on a Grecian Urn"
RFC_EPHEMERAL = bytes.fromhex("52c4a758a802cd8b936eceea314432798d5baf2d7e9235dc084ab1b9cfa2f736")
RFC_ENCAPSULATED = bytes.fromhex("37fda3567bdbd628e88668c3c8d7e97d1d1253b6d4ea6d44c150f741f1bf4431")
RFC_RECIPIENT = bytes.fromhex("4612c550263fc8ad58375df3f557aac531d26850903e55a9f23f21d8534e8ac8")
RFC_SHARED = bytes.fromhex("fe0e18c9f024ce43799ae393c7e8fe8fce9d218875e8227b0187c04e7d2ea1fc")
RFC_KEY = bytes.fromhex("4531685d41d65f03dc48f6b8302c05b0")
RFC_NONCE = bytes.fromhex("56d890e5accaaf011cff4b7d")
AES_128_GCM, AES_256_GCM = 1, 2


def test_a_wrapped_key_opens_to_itself() -> None:
    wrapped = wrap(KEY, ME.public_key(), INFO)
    assert unwrap(wrapped, ME, INFO) == KEY
    assert len(wrapped) == WRAP_BYTES == 80


def test_a_key_wrapped_twice_has_two_forms() -> None:
    assert wrap(KEY, ME.public_key(), INFO) != wrap(KEY, ME.public_key(), INFO)


def test_it_opens_for_nobody_else() -> None:
    assert refusal(wrap(KEY, ME.public_key(), INFO), OTHER, INFO) is ErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize(
    "other",
    [
        block_info("away", MODEL, 4, NODE),
        block_info("home", Digest("b" * 64), 4, NODE),
        block_info("home", MODEL, 5, NODE),
        block_info("home", MODEL, 4, NodeId("n1")),
        info_of("resplit.letter.v1", "home", MODEL, 4, NODE),
        b"",
    ],
)
def test_it_opens_for_no_other_cluster_model_block_node_or_purpose(other: bytes) -> None:
    assert refusal(wrap(KEY, ME.public_key(), INFO), ME, other) is ErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize("place", range(WRAP_BYTES))
def test_a_flipped_bit_opens_nothing(place: int) -> None:
    altered = bytearray(wrap(KEY, ME.public_key(), INFO))
    # The top bit of an X25519 key's last byte means nothing to the curve; HPKE's key schedule sees it all the same.
    altered[place] ^= 0x80
    assert refusal(bytes(altered), ME, INFO) is ErrorCode.BAD_SIGNATURE


@pytest.mark.parametrize("wrapped", [b"", bytes(79), bytes(80), bytes(81)])
def test_what_is_no_wrap_opens_nothing(wrapped: bytes) -> None:
    assert refusal(wrapped, ME, INFO) is ErrorCode.BAD_SIGNATURE


def refusal(wrapped: bytes, key: X25519PrivateKey, info: bytes) -> ErrorCode:
    with pytest.raises(ResplitError) as error:
        unwrap(wrapped, key, info)
    return error.value.code


def test_what_cannot_be_wrapped_is_refused() -> None:
    with pytest.raises(ResplitError, match="31 bytes"):
        wrap(KEY[1:], ME.public_key(), INFO)
    with pytest.raises(ResplitError, match="no X25519 key") as error:
        wrap(KEY, X25519PublicKey.from_public_bytes(bytes(32)), INFO)
    assert error.value.field == "recipient"


@pytest.mark.parametrize("part", ["", "a|b", "|"])
def test_no_part_of_an_info_reaches_into_the_next(part: str) -> None:
    with pytest.raises(ResplitError) as error:
        info_of("purpose", "a", part)
    assert (error.value.code, error.value.field) == (ErrorCode.INVALID_REQUEST, "info")


def test_an_info_names_everything_that_a_wrap_is_for() -> None:
    assert INFO == b"resplit.block-key.v1|home|" + b"a" * 64 + b"|4|n0"


def test_our_reading_of_the_standard_gives_the_values_of_the_standard() -> None:
    recipient = X25519PrivateKey.from_private_bytes(RFC_RECIPIENT)
    shared = decapsulate(RFC_ENCAPSULATED, recipient)
    key, nonce = key_schedule(shared, RFC_INFO, AES_128_GCM, 16)
    assert (shared, key, nonce) == (RFC_SHARED, RFC_KEY, RFC_NONCE)
    sealed = AESGCM(key).encrypt(nonce, b"Beauty is truth, truth beauty", b"Count-0")
    assert sealed.hex() == (
        "f938558b5d72f1a23810b4be2ab4f84331acc02fc97babc53a52ae8218a355a96d8770ac83d07bea87e13c512a"
    )


def test_what_the_standard_s_sender_wraps_we_open() -> None:
    recipient = X25519PrivateKey.from_private_bytes(RFC_RECIPIENT)
    ephemeral = X25519PrivateKey.from_private_bytes(RFC_EPHEMERAL)
    assert ephemeral.public_key().public_bytes_raw() == RFC_ENCAPSULATED
    key, nonce = key_schedule(RFC_SHARED, INFO, AES_256_GCM, 32)
    assert unwrap(RFC_ENCAPSULATED + AESGCM(key).encrypt(nonce, KEY, b""), recipient, INFO) == KEY


def test_what_we_wrap_the_standard_s_receiver_opens() -> None:
    wrapped = wrap(KEY, ME.public_key(), INFO)
    key, nonce = key_schedule(decapsulate(wrapped[:32], ME), INFO, AES_256_GCM, 32)
    assert AESGCM(key).decrypt(nonce, wrapped[32:], b"") == KEY


def decapsulate(encapsulated: bytes, recipient: X25519PrivateKey) -> bytes:
    """RFC 9180, section 4.1: Decap of DHKEM(X25519, HKDF-SHA256), identifier 0x0020."""
    suite = b"KEM" + (0x20).to_bytes(2, "big")
    secret = recipient.exchange(X25519PublicKey.from_public_bytes(encapsulated))
    context = encapsulated + recipient.public_key().public_bytes_raw()
    return expanded(extracted(b"", b"eae_prk", secret, suite), b"shared_secret", context, 32, suite)


def key_schedule(shared: bytes, info: bytes, aead: int, key_bytes: int) -> tuple[bytes, bytes]:
    """RFC 9180, section 5.1: key and base nonce of base mode, with HKDF-SHA256 (0x0001)."""
    suite = b"HPKE" + b"".join(number.to_bytes(2, "big") for number in (0x20, 1, aead))
    context = b"\0" + extracted(b"", b"psk_id_hash", b"", suite) + extracted(b"", b"info_hash", info, suite)
    secret = extracted(shared, b"secret", b"", suite)
    return expanded(secret, b"key", context, key_bytes, suite), expanded(secret, b"base_nonce", context, 12, suite)


def extracted(salt: bytes, label: bytes, material: bytes, suite: bytes) -> bytes:
    """LabeledExtract of RFC 9180, section 4."""
    return hmac.digest(salt or bytes(32), b"HPKE-v1" + suite + label + material, hashlib.sha256)


def expanded(secret: bytes, label: bytes, info: bytes, length: int, suite: bytes) -> bytes:
    """LabeledExpand of RFC 9180, section 4."""
    labelled = length.to_bytes(2, "big") + b"HPKE-v1" + suite + label + info
    return HKDFExpand(hashes.SHA256(), length, labelled).derive(secret)
