"""Plan events as they travel: one signature over letters, of which each reader opens its own.

The orchestrators of the roster get the whole event, so that one which takes over goes on with it, and each node that
it concerns the part that it needs (`schemas.section`). All letters are under one signature, so nobody puts a letter of
one event into another or leaves one out; each is about its deployment, term and revision, and about the kind of reader,
so it opens as nothing else.

A letter opens with the key that the roster named when it was made. Whoever has a new one waits for the event to be
sealed anew (`orchestrator.rollout`).
"""

import base64
import logging
from collections.abc import Mapping
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

from bus.identity import Identity
from bus.letters import MAX_READERS, About, is_for, open_letter, seal_letter
from schemas.base import NodeId
from schemas.codec import decode, encode
from schemas.envelope import PLAN_TYPE, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import PlanEvent
from schemas.roster import sealing_key
from schemas.section import EventSection, SealedEvent, nothing_of, readers, section_of

WHOLE, SECTION = "plan", "section"
"""What letters to orchestrators and to nodes are about."""

V = TypeVar("V", PlanEvent, EventSection)
log = logging.getLogger(__name__)


def seal_event(event: PlanEvent, identity: Identity) -> bytes:
    """`event`, signed by `identity`, for the orchestrators and for those of its nodes that belong to the cluster.

    Different every time. Raises `ResplitError(PAYLOAD_TOO_LARGE)` for what no letter holds.
    """
    leaders = {name: key for name in identity.orchestrators if (key := _key_of(identity, name)) is not None}
    leaders[identity.name] = identity.sealing.public_key()
    letters = [seal_letter(encode(event), leaders, _about(WHOLE, event, identity.name))]
    about = _about(SECTION, event, identity.name)
    told: dict[bytes, dict[NodeId, X25519PublicKey]] = {}
    for node in readers(event):
        section, key = section_of(event, node), _key_of(identity, node)
        if section is not None and key is not None and node in identity.agents:
            told.setdefault(encode(section), {})[node] = key
    for payload, nodes in told.items():
        letters += _letters(payload, nodes, about)
    sealed = SealedEvent(
        deployment=event.deployment,
        term=event.term,
        revision=event.revision,
        issued_at=event.issued_at,
        letters=tuple(base64.b64encode(letter).decode() for letter in letters),
    )
    return seal(sealed, PLAN_TYPE, identity.name, identity.key)


def open_event(sealed: SealedEvent, signer: NodeId, identity: Identity) -> PlanEvent:
    """The whole of an event that `signer` signed, for an orchestrator. Raises as `open_letter` does, and
    INVALID_REQUEST for what is about another event than it says."""
    event = _opened(sealed, signer, identity, WHOLE, PlanEvent)
    if event is None:
        message = (
            f"revision {sealed.revision} of the plan of {sealed.deployment!r} is not sealed for {identity.name!r}; "
            f"let an orchestrator that was a member then lead, until it has sealed it anew, or revoke {signer!r}"
        )
        raise ResplitError(ErrorCode.BAD_SIGNATURE, message, "letters")
    return event


def open_section(sealed: SealedEvent, signer: NodeId, identity: Identity) -> EventSection:
    """What an event that `signer` signed tells this node: nothing where there is no letter for it. Raises as
    `open_letter` does, and INVALID_REQUEST for what is about another event than it says."""
    section = _opened(sealed, signer, identity, SECTION, EventSection)
    return nothing_of(sealed) if section is None else section


def _opened(sealed: SealedEvent, signer: NodeId, identity: Identity, kind: str, holds: type[V]) -> V | None:
    mine = [letter for letter in map(_bytes, sealed.letters) if is_for(letter, identity.name)]
    if not mine:
        return None
    if len(mine) > 1:
        raise _refused(sealed, f"has {len(mine)} letters for {identity.name!r}")
    plain = open_letter(mine[0], identity.name, identity.sealing, _about(kind, sealed, signer))
    found = decode(holds, plain, f"{kind} for {identity.name!r}")
    if (found.deployment, found.term, found.revision) != (sealed.deployment, sealed.term, sealed.revision):
        raise _refused(sealed, f"holds one of {found.deployment!r}, term {found.term}, revision {found.revision}")
    return found


def _about(kind: str, event: PlanEvent | SealedEvent, sender: NodeId) -> About:
    return About(kind, event.deployment, f"{event.term}.{event.revision}", sender)


def _key_of(identity: Identity, name: NodeId) -> X25519PublicKey | None:
    member = identity.member(name)
    return None if member is None else sealing_key(member)


def _letters(payload: bytes, nodes: Mapping[NodeId, X25519PublicKey], about: About) -> list[bytes]:
    """One letter for all, or for as many as one can have. A node whose key is nobody's gets none."""
    names = sorted(nodes)
    try:
        some = [names[i : i + MAX_READERS] for i in range(0, len(names), MAX_READERS)]
        return [seal_letter(payload, {name: nodes[name] for name in group}, about) for group in some]
    except ResplitError as error:
        if len(names) > 1:
            return [letter for name in names for letter in _letters(payload, {name: nodes[name]}, about)]
        log.warning("no section of the plan of %s comes for %s: %s", about.deployment, names[0], error.message)
        return []


def _bytes(letter: str) -> bytes:
    try:
        return base64.b64decode(letter, validate=True)
    except ValueError as error:
        raise ResplitError(ErrorCode.INVALID_REQUEST, "a letter of the event is not base64", "letters") from error


def _refused(sealed: SealedEvent, why: str) -> ResplitError:
    message = f"revision {sealed.revision}, term {sealed.term} of the plan of {sealed.deployment!r} {why}"
    return ResplitError(ErrorCode.INVALID_REQUEST, message, "letters")
