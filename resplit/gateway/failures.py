"""PURE: errors of the cluster as HTTP says them: a status, a body in the words of the protocol, when to come again."""

from typing import Any, Literal

from resplit.replies import RequestError
from schemas.errors import ErrorCode

Dialect = Literal["openai", "oip"]

STATUS = {
    ErrorCode.INVALID_REQUEST: 400,
    ErrorCode.TOKEN_OUT_OF_RANGE: 400,
    ErrorCode.CONTEXT_EXCEEDED: 400,
    ErrorCode.UNSUPPORTED_MODEL: 400,
    ErrorCode.FORBIDDEN: 403,
    ErrorCode.UNKNOWN_DEPLOYMENT: 404,
    ErrorCode.UNKNOWN_MODEL: 404,
    ErrorCode.PAYLOAD_TOO_LARGE: 413,
    ErrorCode.OVERLOADED: 429,
    ErrorCode.DEADLINE_UNATTAINABLE: 429,
    ErrorCode.CANCELLED: 499,
    ErrorCode.CLOUD_FAILED: 502,
    ErrorCode.NODE_LOST: 503,
    ErrorCode.STAGE_FAILED: 503,
    ErrorCode.STEP_LOST: 503,
    ErrorCode.INFEASIBLE: 503,
    ErrorCode.BAD_SIGNATURE: 503,
    ErrorCode.UNREACHABLE: 503,
    ErrorCode.DEADLINE_EXCEEDED: 504,
    ErrorCode.TIMEOUT: 504,
}
"""Every other code, those of a newer release too, is a fault of ours: 500."""
UNAUTHORIZED = "unauthorized"
"""The gateway's own: no API key, or none that it knows."""
COMES_BACK = {429, 503}
"""What these refuse may be asked again, as it is."""
REQUEST_ID = "X-Request-Id"
"""The header with the id under which the trail names a request."""
AGAIN_S = 1
AGAIN_MAX_S = 60

_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES: dict[str, str] = {
    ErrorCode.UNKNOWN_DEPLOYMENT: "model_not_found",
    ErrorCode.CONTEXT_EXCEEDED: "context_length_exceeded",
    ErrorCode.OVERLOADED: "rate_limit_exceeded",
    UNAUTHORIZED: "invalid_api_key",
}
"""Where OpenAI has a word for what ours says."""
_PARAMS = {"constraint": "response_format", "deployment": "model"}
"""Fields of the wire that stand for one of theirs."""


def dialect_of(path: str) -> Dialect:
    """The protocol that is spoken at a path."""
    return "oip" if path.startswith("/v2") else "openai"


def status_of(code: str) -> int:
    """The HTTP status of an error code."""
    if code == UNAUTHORIZED:
        return 401
    try:
        return STATUS.get(ErrorCode(code), 500)
    except ValueError:
        return 500


def headers_of(error: RequestError) -> dict[str, str]:
    """Its id, where it has one, and `Retry-After`, in whole seconds, where the same request may fare better later."""
    status, found = status_of(error.code), dict[str, str]()
    if error.request_id is not None:
        found[REQUEST_ID] = error.request_id
    if status == 401:
        found["WWW-Authenticate"] = 'Basic realm="resplit", Bearer'
    if status in COMES_BACK:
        seconds = AGAIN_S if error.estimate_ms is None else round(error.estimate_ms / 1e3)
        found["Retry-After"] = str(min(max(seconds, AGAIN_S), AGAIN_MAX_S))
    return found


def body_of(error: RequestError, dialect: Dialect) -> dict[str, Any]:
    """The body: OpenAI's error object, with our own code beside theirs, or the Open Inference Protocol's sentence."""
    if dialect == "oip":
        return {"error": error.message, "code": error.code, "field": error.field, "request_id": error.request_id}
    status = status_of(error.code)
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {
        "error": {
            "message": error.message,
            "type": kind,
            "param": _PARAMS.get(error.field or "", error.field),
            "code": _CODES.get(error.code, error.code),
            "resplit_code": error.code,
            "request_id": error.request_id,
            "estimate_ms": error.estimate_ms,
        }
    }
