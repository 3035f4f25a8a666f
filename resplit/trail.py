"""Reading the audit trail: every event in order, each with how far it may be believed."""

from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from nats.aio.client import Client
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js.api import DeliverPolicy
from nats.js.client import JetStreamContext
from nats.js.errors import NotFoundError, ServiceUnavailableError

from bus.credentials import Credentials
from bus.following import Follower
from bus.identity import read_roster, writers
from bus.membership import Membership
from schemas import subjects
from schemas.audit import AuditEvent
from schemas.base import NodeId
from schemas.codec import decode
from schemas.envelope import AUDIT_TYPE, open_envelope
from schemas.errors import ErrorCode, ResplitError
from schemas.flat import read_flat
from schemas.roster import Role

QUIET_S = 10.0
"""Without --follow: a replay that brings nothing for this long has come to a halt."""
FOLLOW_S = 3600.0

Trust = Mapping[NodeId, Ed25519PublicKey]
READERS: tuple[Role, ...] = ("operator", "observer", "archivist")
"""Who may read the trail."""
ASKING: tuple[Role, ...] = ("operator", "observer")
"""Who of them may ask for the newest roster."""
Standing = Literal["verified", "unverified", "forged"]
"""Signed by the key of its source; not checked, for want of keys; or not what a trusted key signed."""


@dataclass(frozen=True)
class Seen:
    """One event as it was read, and how far it may be believed."""

    event: AuditEvent
    signer: str
    standing: Standing


async def read_trail(js: JetStreamContext, follow: bool) -> AsyncIterator[bytes]:
    """The envelopes of the audit stream, oldest first: those there are now or, to `follow`, without end.

    An envelope may come twice where its writer could not know that it was stored. Raises `ResplitError(UNREACHABLE)`
    where there is no stream, or where it stops before its end: a part never passes for the whole.
    """
    try:
        info = await js.stream_info(subjects.STREAM_AUDIT)
        last = info.state.last_seq
        if info.state.messages == 0 and not follow:
            return
        reader = await js.subscribe(subjects.ALL_AUDIT, ordered_consumer=True, deliver_policy=DeliverPolicy.ALL)
    except (NotFoundError, ServiceUnavailableError) as error:
        message = "this NATS server has no audit stream yet; start an orchestrator"
        raise ResplitError(ErrorCode.UNREACHABLE, message) from error
    while True:
        try:
            envelope = await reader.next_msg(FOLLOW_S if follow else QUIET_S)
        except NatsTimeoutError:
            if follow:
                continue
            message = "the audit stream stopped before its end; see to nats-server and read it again"
            raise ResplitError(ErrorCode.UNREACHABLE, message) from None
        yield envelope.data
        if not follow and envelope.metadata.sequence.stream >= last:
            return


def read_trust(folder: Path) -> Trust:
    """Whose events are believed, by a member's folder or the cluster's; no private key is needed to verify."""
    return writers(read_roster(folder))


async def follow_trust(connection: Client, who: Credentials, folder: Path) -> Callable[[], Trust]:
    """Whose events are believed at the moment, by the newest roster that `folder` or the bus has shown: who was
    enrolled since is no forger. An archivist goes by the folder."""
    membership = Membership(folder)
    if who.role in ASKING:
        await Follower(membership).follow(connection)
    trust = membership.roster, writers(membership.roster)

    def believed() -> Trust:
        nonlocal trust
        if trust[0] is not membership.roster:
            trust = membership.roster, writers(membership.roster)
        return trust[1]

    return believed


def read_event(data: bytes, trust: Trust | None) -> Seen:
    """Read one envelope of the audit stream; raises `ResplitError` if there is no event in it.

    A forgery is shown as one rather than left out: whoever reads the trail must see that it was tried.
    """
    if trust is not None:
        try:
            event, name = open_envelope(data, AuditEvent, AUDIT_TYPE, trust)
            return Seen(event, name, "verified" if name == event.source else "forged")
        except ResplitError as error:
            if error.code is not ErrorCode.BAD_SIGNATURE:
                raise
    match read_flat(data, 4):
        case [str(), bytes(payload), str(signer), bytes()]:
            event = decode(AuditEvent, payload, "audit event")
            return Seen(event, signer, "unverified" if trust is None else "forged")
        case _:
            raise ResplitError(ErrorCode.BAD_SIGNATURE, "the audit stream holds something that is not an envelope")


def signature_of(data: bytes) -> bytes:
    """The signature in an envelope that `read_event` could read."""
    match read_flat(data, 4):
        case [_, _, _, bytes(signature)]:
            return signature
        case _:
            raise ResplitError(ErrorCode.BAD_SIGNATURE, "the audit stream holds something that is not an envelope")
