"""Audit events: everything that was decided, applied, refused or failed. Never the content.

One *life* of a writer is one process, from its start to its end. The events of a life are a chain: each carries its
number and the hash of the whole envelope before it, so that none can be changed, left out or moved unseen. The link
is in the event, under its signature, and not beside the envelope: a second, signed envelope around each event would
say nothing more, and readers of other events would have to know of it. It may be missing, as it is in trails of
earlier releases.

A chain says nothing of its end. That is what checkpoints are for: signed events with the Merkle root over the life so
far, which a verifier may keep, and with the heads of other writers' chains, which are witnesses that these were as
long at least. A new life names the last envelope of the life before, as far as its process knows it.
"""

from enum import StrEnum
from hashlib import sha256

from pydantic import AwareDatetime, Field

from schemas.base import DeploymentId, Digest, LifeName, NodeName, RequestName, Sha256, Value

HEADS_MAX = 256
"""Heads in one checkpoint: of more lives than this nobody is a witness at once."""
NOTHING_BEFORE = Digest("0" * 64)
"""What the first event of a life names as the envelope before it."""


class AuditKind(StrEnum):
    """What an audit event tells; also the last token of its subject."""

    LEADER_ELECTED = "leader_elected"
    LEADER_DEPOSED = "leader_deposed"
    NODE_JOINED = "node_joined"
    NODE_LOST = "node_lost"
    NODE_CHANGED = "node_changed"
    DEPLOYMENT_CHANGED = "deployment_changed"
    DEPLOYMENT_INFEASIBLE = "deployment_infeasible"
    DECISION = "decision"
    SERVICES_PLACED = "services_placed"
    SERVICES_STEERED = "services_steered"
    PREDICTION_JUDGED = "prediction_judged"
    PLAN_PREPARED = "plan_prepared"
    PLAN_COMMITTED = "plan_committed"
    PLAN_ABORTED = "plan_aborted"
    PLAN_RETIRED = "plan_retired"
    PLAN_RESEALED = "plan_resealed"
    PLAN_READY = "plan_ready"
    PLAN_REFUSED = "plan_refused"
    PLAN_APPLIED = "plan_applied"
    BLOCKS_FREED = "blocks_freed"
    EVENT_REJECTED = "event_rejected"
    BLOB_FETCHED = "blob_fetched"
    BLOB_CORRUPT = "blob_corrupt"
    BLOCKS_STAGED = "blocks_staged"
    BLOCKS_SWEPT = "blocks_swept"
    REQUEST_ENDED = "request_ended"
    CROSSING_CHOSEN = "crossing_chosen"
    SEQUENCE_MOVED = "sequence_moved"
    REQUEST_REFUSED = "request_refused"
    CLOUD_ASKED = "cloud_asked"
    CLOUD_CHANGED = "cloud_changed"
    LINK_CHANGED = "link_changed"
    CHECKPOINT = "checkpoint"
    ROSTER_TAKEN = "roster_taken"
    ROSTER_STALE = "roster_stale"
    EVENT_WITHHELD = "event_withheld"
    NODE_UNGUIDED = "node_unguided"
    NODE_GUIDED = "node_guided"
    FRAME_REFUSED = "frame_refused"


def envelope_digest(data: bytes) -> Digest:
    """The hash by which chains and checkpoints name an envelope: SHA-256 of the exact bytes that were published."""
    return Digest(sha256(data).hexdigest())


class Head(Value):
    """One envelope in the chain of one life, by its place and its hash: the last that somebody knows of."""

    writer: NodeName
    life: LifeName
    number: int = Field(ge=1)
    digest: Sha256


class Link(Value):
    """Where an event stands in the chain of its writer's life."""

    life: LifeName
    number: int = Field(ge=1)
    """1, 2, ... without a gap: events that never left the process have no number."""
    previous: Sha256
    """Of the envelope before it in this life; `NOTHING_BEFORE` for the first."""
    lost: int = Field(default=0, ge=0)
    """Events between the one before and this that were never sent, because the bus was away for too long or they were
    larger than it carries: a gap that is declared."""
    before: Head | None = None
    """In the first event of a life: the last envelope of the life before that its process knows to be stored. There
    may have been a few more. None in the first life of all, or where nothing is known."""


class Checkpoint(Value):
    """What a life had recorded before this event, and what it knows of others."""

    count: int = Field(ge=0)
    """Events of this life before this one."""
    root: Sha256
    """The Merkle tree hash (RFC 6962) whose leaves are the SHA-256, as 32 bytes, of their envelopes."""
    heads: tuple[Head, ...] = Field(default=(), max_length=HEADS_MAX)
    """Of other lives: envelopes that the stream has acknowledged, where they changed since the checkpoint before."""
    roster: int | None = Field(default=None, ge=1)
    """The version of the roster that is in force here: the keys that it took out sign nothing any more."""
    ends: bool = False
    """The process ends in order, and this is the last event of its life."""


class AuditEvent(Value):
    """One event of the audit stream, in the words of the process it happened in."""

    at: AwareDatetime
    source: NodeName
    kind: AuditKind
    message: str
    """A constant sentence; what varies is in `fields`."""
    deployment: DeploymentId | None = None
    epoch: int | None = Field(default=None, ge=1)
    request: RequestName | None = None
    fields: dict[str, str | int | float | bool | None] = Field(default_factory=dict)
    chain: Link | None = None
    """None in what earlier releases wrote."""
    checkpoint: Checkpoint | None = None
