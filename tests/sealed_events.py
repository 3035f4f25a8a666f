"""Plan events as they travel, read with an orchestrator's keys, or with a node's."""

from bus.identity import Identity
from bus.sealed_plans import open_event, open_section
from schemas.envelope import PLAN_TYPE, open_envelope
from schemas.plan import PlanEvent
from schemas.section import EventSection, SealedEvent


def whole(data: bytes | None, identity: Identity) -> PlanEvent:
    """All that an event says, to an orchestrator."""
    return open_event(*open_envelope(data or b"", SealedEvent, PLAN_TYPE, identity.orchestrators), identity)


def told(data: bytes | None, identity: Identity) -> EventSection:
    """What it tells a node."""
    return open_section(*open_envelope(data or b"", SealedEvent, PLAN_TYPE, identity.orchestrators), identity)
