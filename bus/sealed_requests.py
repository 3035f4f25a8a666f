"""Sealed requests: what a client seals to the agents that may read it, and what seals the answers to it.

    request    a letter (`bus.letters`) to every reader; in it, msgpack: [secret, content type, the request]
    reply      nonce (12 bytes), AES-256-GCM; what it says is filled up with zeros as a letter is
    run        nonce (12 bytes), AES-256-GCM; tokens as the journal keeps them, as long as their number says

The client draws the secret, 32 bytes, for this one request. Replies and runs have each a key of their own, derived from
the secret, the deployment and the request's id (HKDF-SHA256). So everybody who can open the request, and nobody else,
reads and writes all that follows from it: the ingress that accepts it, and whoever takes over from that one, to whom
the journal gives the letter as it came. A reply that opens is from one of them: the client believes no other.

A letter can be sent again by whoever heard it. It is then computed again, unless its id is in flight, and its answer
opens for nobody but the client that drew the secret.
"""

import logging
import secrets
import struct
from collections.abc import Mapping
from dataclasses import dataclass

import msgpack
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from bus.hpke import info_of
from bus.letters import MAX_PAYLOAD_BYTES, About, emptied, filled, open_letter, seal_letter
from schemas.base import DeploymentName, NodeId, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.journal import Likely, LiveRequest, Run, SealedRun

SENDER = "client"
"""Under which every client seals: who it is, a letter could only claim."""
PURPOSE = "resplit.sealed-request.v1"
SECRET_BYTES = 32
NONCE_BYTES = 12
MAX_CONTENT_TYPE = 256

log = logging.getLogger(__name__)


class Seal:
    """What the secret of one request seals: its replies, and its tokens in the journal."""

    def __init__(self, secret: bytes, deployment: DeploymentName, request: RequestId) -> None:
        self._replies = AESGCM(_key(secret, info_of(PURPOSE, "reply", deployment, request)))
        self._runs = AESGCM(_key(secret, info_of(PURPOSE, "run", deployment, request)))

    def seal_reply(self, reply: bytes) -> bytes:
        """A reply that the client opens; different every time."""
        return _sealed(self._replies, filled(reply), b"")

    def open_reply(self, data: bytes) -> bytes:
        """The reply in `data`; raises `ResplitError(BAD_SIGNATURE)` unless a reader of the request sealed it."""
        return emptied(_opened(self._replies, data, b"", "reply"))

    def seal_run(self, run: Run) -> SealedRun:
        """Tokens for the journal; different every time."""
        count = len(run.tokens)
        return SealedRun(run.handle, run.first, count, _sealed(self._runs, _packed(run), _place(run.first, count)))

    def open_run(self, run: SealedRun) -> Run:
        """The tokens in `run`; raises `ResplitError(BAD_SIGNATURE)` unless a reader of the request sealed them, as
        these tokens of it."""
        plain = _opened(self._runs, run.box, _place(run.first, run.count), f"tokens from {run.first} on")
        return _unpacked(run, plain)

    def open_tokens(self, live: LiveRequest) -> LiveRequest:
        """What the journal says of a request, its tokens opened. Those that do not open are passed over: they will come
        again, like whatever was not stored."""
        runs = []
        for run in live.sealed:
            try:
                runs.append(self.open_run(run))
            except ResplitError as error:
                log.error("the journal of request %s: %s", live.request.request_id, error.message)  # noqa: TRY400
        return live.opened(runs)


@dataclass(frozen=True)
class Asked:
    """A request as it was written, and the seal of its answers; None for one that came in the open."""

    data: bytes
    content_type: str
    seal: Seal | None = None


def seal_request(
    data: bytes,
    content_type: str,
    deployment: DeploymentName,
    request: RequestId,
    readers: Mapping[NodeId, X25519PublicKey],
) -> tuple[bytes, Seal]:
    """A request for `readers` alone, and what its replies open with. Errors are those of `seal_letter`."""
    secret = secrets.token_bytes(SECRET_BYTES)
    payload: bytes = msgpack.packb([secret, content_type, data])
    return seal_letter(payload, readers, _about(deployment, request)), Seal(secret, deployment, request)


def open_request(
    letter: bytes, deployment: DeploymentName, request: RequestId, me: NodeId, key: X25519PrivateKey
) -> Asked:
    """What a letter to `me` asks. Errors are those of `open_letter`, INVALID_REQUEST also for one without a request."""
    payload = open_letter(letter, me, key, _about(deployment, request))
    try:
        fields = msgpack.unpackb(
            payload,
            max_array_len=3,
            max_map_len=0,
            max_ext_len=0,
            max_str_len=MAX_CONTENT_TYPE,
            max_bin_len=MAX_PAYLOAD_BYTES,
        )
    except Exception as error:  # msgpack raises a dozen types on hostile bytes; all mean the same here.
        raise _malformed() from error
    match fields:
        case [bytes(secret), str(content_type), bytes(data)] if len(secret) == SECRET_BYTES:
            return Asked(data, content_type, Seal(secret, deployment, request))
        case _:
            raise _malformed()


def _about(deployment: DeploymentName, request: RequestId) -> About:
    return About("request", deployment, request, SENDER)


def _key(secret: bytes, info: bytes) -> bytes:
    return HKDF(SHA256(), 32, None, info).derive(secret)


def _sealed(key: AESGCM, plain: bytes, about: bytes) -> bytes:
    # Drawn, not counted: a successor seals under the same key, and cannot know how far its predecessor came.
    nonce = secrets.token_bytes(NONCE_BYTES)
    return nonce + key.encrypt(nonce, plain, about)


def _opened(key: AESGCM, data: bytes, about: bytes, what: str) -> bytes:
    try:
        return key.decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], about)
    except (InvalidTag, ValueError) as error:
        message = f"a sealed {what} was made by nobody who can read the request, or it was altered"
        raise ResplitError(ErrorCode.BAD_SIGNATURE, message) from error


def _place(first: int, count: int) -> bytes:
    return struct.pack("<QQ", first, count)


def _packed(run: Run) -> bytes:
    """Tokens at a fixed width: msgpack would tell small ids from large ones by their length."""
    parts = [struct.pack(f"<{len(run.tokens)}I", *run.tokens)]
    for logprob, top in run.likely:
        parts.append(struct.pack("<?dI", logprob is not None, logprob or 0.0, len(top)))
        parts += [struct.pack("<Id", *pair) for pair in top]
    return b"".join(parts)


def _unpacked(run: SealedRun, plain: bytes) -> Run:
    tokens = struct.unpack_from(f"<{run.count}I", plain)
    likely: list[Likely] = []
    at = 4 * run.count
    while at < len(plain):
        has_logprob, logprob, count = struct.unpack_from("<?dI", plain, at)
        at += struct.calcsize("<?dI")
        top = tuple(struct.iter_unpack("<Id", plain[at : at + 12 * count]))
        at += 12 * count
        likely.append((logprob if has_logprob else None, top))
    return Run(run.handle, run.first, tokens, tuple(likely))


def _malformed() -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, "a sealed message that holds no request")
