"""PURE: how far each event of a trail may be believed, read in the order of its stream.

An event is true if it was signed with the key that its writer had when it was written. No event says when that was:
its time is the word of whoever holds the key, also after the key was taken out. The order of the stream says it. Every
process says in the trail that it has taken a newer roster, and in each checkpoint which one is in force; behind the
first such event that is true, the keys that this roster took out vouch for nothing, whatever time is claimed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bus.identity import writers
from schemas.audit import AuditEvent, AuditKind
from schemas.base import NodeId
from schemas.codec import decode
from schemas.envelope import AUDIT_TYPE, open_envelope
from schemas.errors import ErrorCode, ResplitError
from schemas.flat import read_flat
from schemas.roster import Roster, public_key


@dataclass(frozen=True)
class WriterKey:
    """A key with which a writer signs its events, or did."""

    key: Ed25519PublicKey
    out: int | None = None
    """The version of the roster that took it out; None of a key that is in the newest."""


Trust = Mapping[NodeId, tuple[WriterKey, ...]]
"""Whose events are believed, by which keys; the newest first."""
Standing = Literal["verified", "unverified", "late", "forged"]
"""Signed by its source while that had the key; not checked, for want of keys; signed with a key behind the word that it
was taken out; or not what a key of its source signed."""


@dataclass(frozen=True)
class Seen:
    """One event as it was read, and how far it may be believed."""

    event: AuditEvent
    signer: str
    standing: Standing
    out: int | None = None
    """The version of the roster that took its key out since, if one did."""
    why: str = ""
    """Of one that is late: who said so before."""


def trust_of(roster: Roster) -> Trust:
    """Whose events are believed by `roster`: those of its writers, and of writers it still knows as former ones."""
    found = {name: (WriterKey(key),) for name, key in writers(roster).items()}
    for former in reversed(roster.former or ()):
        name = NodeId(former.name)
        found[name] = (*found.get(name, ()), WriterKey(public_key(former.signing), former.out))
    return found


class Reader:
    """Reads the envelopes of one trail, in their order. Without `trust` signatures are not checked."""

    def __init__(self, trust: Trust | None) -> None:
        self.trust = trust
        """That of a newer roster may take its place between two envelopes."""
        self.in_force = 0
        """The highest version of the roster that a true event has named so far."""
        self._said_by = ""

    def read(self, data: bytes) -> Seen:
        """The next envelope; raises `ResplitError` if there is no event in it.

        A forgery is shown as one rather than left out: whoever reads the trail must see that it was tried.
        """
        payload, signer = _claimed(data)
        if self.trust is None:
            return Seen(_decoded(payload), signer, "unverified")
        for known in self.trust.get(signer, ()):
            try:
                event, _ = open_envelope(data, AuditEvent, AUDIT_TYPE, {signer: known.key})
            except ResplitError as error:
                if error.code is not ErrorCode.BAD_SIGNATURE:
                    raise
                continue
            return self._signed(event, signer, known)
        return Seen(_decoded(payload), signer, "forged")

    def _signed(self, event: AuditEvent, signer: NodeId, known: WriterKey) -> Seen:
        if signer != event.source:
            return Seen(event, signer, "forged")
        if known.out is not None and known.out <= self.in_force:
            why = f"its key was taken out by roster {known.out}, and {self._said_by!r} had said before that"
            return Seen(event, signer, "late", known.out, f"{why} roster {self.in_force} was in force")
        if (version := _roster_in(event)) > self.in_force:
            self.in_force, self._said_by = version, str(signer)
        return Seen(event, signer, "verified", known.out)


def signature_of(data: bytes) -> bytes:
    """The signature in an envelope that a `Reader` could read."""
    match read_flat(data, 4):
        case [_, _, _, bytes(signature)]:
            return signature
        case _:
            raise _no_envelope()


def _roster_in(event: AuditEvent) -> int:
    """The version of the roster that an event says to be in force; 0 where it says nothing of it."""
    if event.checkpoint is not None:
        return event.checkpoint.roster or 0
    version = event.fields.get("version")
    return version if event.kind is AuditKind.ROSTER_TAKEN and isinstance(version, int) else 0


def _claimed(data: bytes) -> tuple[bytes, NodeId]:
    """The payload and its signer as they came, neither of them checked."""
    match read_flat(data, 4):
        case [str(), bytes(payload), str(signer), bytes()]:
            return payload, NodeId(signer)
        case _:
            raise _no_envelope()


def _decoded(payload: bytes) -> AuditEvent:
    return decode(AuditEvent, payload, "audit event")


def _no_envelope() -> ResplitError:
    return ResplitError(ErrorCode.BAD_SIGNATURE, "the audit stream holds something that is not an envelope")
