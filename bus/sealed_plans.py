"""Plan events as they travel: one signature over letters, of which each reader opens its own.

The orchestrators of the deployment's home get the whole event, so that one which takes over goes on with it, and each
node that it concerns the part that it needs (`schemas.section`). Each letter is about its deployment, term and
revision, and about the kind of reader, so it opens as nothing else.

A letter opens with the key that the roster named when it was made. Whoever has a new one waits for the event to be
sealed anew (`orchestrator.rollout`).
"""

from typing import TypeVar

from bus.identity import Identity
from bus.letterbox import letter_to, letters_to
from bus.letters import About
from schemas.base import NodeId
from schemas.codec import decode, encode
from schemas.envelope import PLAN_TYPE, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import PlanEvent
from schemas.section import EventSection, SealedEvent, nothing_of, readers, section_of

WHOLE, SECTION = "plan", "section"
"""What letters to orchestrators and to nodes are about."""

V = TypeVar("V", PlanEvent, EventSection)


def seal_event(event: PlanEvent, identity: Identity) -> bytes:
    """`event`, signed by `identity`, for the orchestrators and for those of its nodes that belong to the cluster.

    Different every time. Raises `ResplitError(PAYLOAD_TOO_LARGE)` for what no letter holds.
    """
    told: dict[bytes, list[NodeId]] = {}
    for node in readers(event):
        section = section_of(event, node)
        if section is not None and node in identity.agents:
            told.setdefault(encode(section), []).append(node)
    whole = {encode(event): {*identity.steering(identity.home), identity.name}}
    sealed = SealedEvent(
        deployment=event.deployment,
        term=event.term,
        revision=event.revision,
        issued_at=event.issued_at,
        letters=(
            *letters_to(whole, identity, _about(WHOLE, event, identity.name)),
            *letters_to(told, identity, _about(SECTION, event, identity.name)),
        ),
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
    plain = letter_to(sealed.letters, identity, _about(kind, sealed, signer))
    if plain is None:
        return None
    found = decode(holds, plain, f"{kind} for {identity.name!r}")
    said = (found.deployment, found.term, found.revision)
    if said != (sealed.deployment, sealed.term, sealed.revision):
        message = (
            f"revision {sealed.revision}, term {sealed.term} of the plan of {sealed.deployment!r} "
            f"holds one of {said[0]!r}, term {said[1]}, revision {said[2]}"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "letters")
    return found


def _about(kind: str, event: PlanEvent | SealedEvent, sender: NodeId) -> About:
    return About(kind, event.deployment, f"{event.term}.{event.revision}", sender)
