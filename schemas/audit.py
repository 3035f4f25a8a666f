"""Audit events: everything that was decided, applied, refused or failed. Never the content."""

from enum import StrEnum

from pydantic import AwareDatetime, Field

from schemas.base import DeploymentId, NodeName, RequestName, Value


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
    PREDICTION_JUDGED = "prediction_judged"
    PLAN_PREPARED = "plan_prepared"
    PLAN_COMMITTED = "plan_committed"
    PLAN_ABORTED = "plan_aborted"
    PLAN_RETIRED = "plan_retired"
    PLAN_READY = "plan_ready"
    PLAN_REFUSED = "plan_refused"
    PLAN_APPLIED = "plan_applied"
    EVENT_REJECTED = "event_rejected"
    BLOB_FETCHED = "blob_fetched"
    BLOB_CORRUPT = "blob_corrupt"
    BLOCKS_STAGED = "blocks_staged"
    BLOCKS_SWEPT = "blocks_swept"
    REQUEST_ENDED = "request_ended"
    CROSSING_CHOSEN = "crossing_chosen"
    SEQUENCE_MOVED = "sequence_moved"
    REQUEST_REFUSED = "request_refused"
    LINK_CHANGED = "link_changed"


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
