"""What can go wrong, as one type with a code, a sentence and the field at fault."""

from enum import StrEnum

from pydantic import BaseModel, ConfigDict, ValidationError

from schemas import base


class ErrorCode(StrEnum):
    """The stable error codes of the wire (`docs/protocol.md` lists what each one means)."""

    INVALID_REQUEST = "invalid_request"
    PAYLOAD_TOO_LARGE = "payload_too_large"
    UNKNOWN_MODEL = "unknown_model"
    UNKNOWN_DEPLOYMENT = "unknown_deployment"
    UNKNOWN_NODE = "unknown_node"
    TOKEN_OUT_OF_RANGE = "token_out_of_range"
    CONTEXT_EXCEEDED = "context_exceeded"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    DEADLINE_UNATTAINABLE = "deadline_unattainable"
    OVERLOADED = "overloaded"
    CANCELLED = "cancelled"
    NODE_LOST = "node_lost"
    STAGE_FAILED = "stage_failed"
    STEP_LOST = "step_lost"
    MODEL_TOO_LARGE = "model_too_large"
    INFEASIBLE = "infeasible"
    CORRUPT_FILE = "corrupt_file"
    MISSING_BLOB = "missing_blob"
    MISSING_KEYS = "missing_keys"
    BAD_SIGNATURE = "bad_signature"
    STALE_EPOCH = "stale_epoch"
    ROLLED_BACK = "rolled_back"
    EXPIRED = "expired"
    FORBIDDEN = "forbidden"
    UNSUPPORTED_MODEL = "unsupported_model"
    PROVIDER_UNAVAILABLE = "provider_unavailable"
    MISSING_DEPENDENCY = "missing_dependency"
    UNREACHABLE = "unreachable"
    CLOUD_FAILED = "cloud_failed"
    TIMEOUT = "timeout"
    INTERNAL = "internal"


class ErrorBody(BaseModel):
    """The `error` object of a reply: what went wrong, in which field, and what to do about it."""

    model_config = ConfigDict(frozen=True)

    code: ErrorCode
    message: str
    field: str | None = None
    estimate_ms: float | None = None
    """How long a request would have taken that was refused because it could not meet its deadline."""


class ResplitError(Exception):
    """Every error that a user, an operator or a peer may see.

    `code` is stable and for programs, `message` is one sentence for people that names the value and
    the remedy, `field` is the path of the field at fault where there is one.
    """

    def __init__(
        self, code: ErrorCode, message: str, field: str | None = None, estimate_ms: float | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.field = field
        self.estimate_ms = estimate_ms

    def __reduce__(self) -> tuple[type["ResplitError"], tuple[ErrorCode, str, str | None, float | None]]:
        # Between processes exceptions travel by what they were made of, and that is more than what they print.
        return type(self), (self.code, self.message, self.field, self.estimate_ms)

    @property
    def body(self) -> ErrorBody:
        return ErrorBody(code=self.code, message=self.message, field=self.field, estimate_ms=self.estimate_ms)

    @classmethod
    def from_validation(cls, error: ValidationError, what: str) -> "ResplitError":
        """The first fault pydantic found in `what` (for example "request"), as one sentence."""
        first = error.errors(include_url=False)[0]
        # Where a field may be of several types, pydantic names the type between the fields: `tuple[Stage, ...]`.
        path = ".".join(str(part) for part in first["loc"] if "[" not in str(part))[:200] or None
        value = repr(first.get("input"))
        shown = value if len(value) <= 60 else value[:57] + "..."
        said = first["msg"].removeprefix("Value error, ")
        match first.get("ctx", {}).get("pattern"):
            case base.NAME_PATTERN:
                said = base.NAME_RULE
            case base.DEPLOYMENT_PATTERN:
                said = f"{base.NAME_RULE}; of a deployment at home at a site, SITE/NAME, each so"
        if path is not None:
            said += f" (got {shown})"  # of the whole of `what` whoever sent it knows what it was
        return cls(ErrorCode.INVALID_REQUEST, f"{what}: {said}", path)
