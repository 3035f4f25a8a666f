"""What the routes of one gateway share, and how a route gets at it."""

import re
from dataclasses import dataclass
from typing import cast

from fastapi import Request

from resplit.gateway.answering import Answering
from resplit.gateway.api_keys import ApiKey
from resplit.gateway.measures import Measures
from resplit.gateway.watching import Watch
from resplit.replies import RequestError
from schemas.base import NAME_PATTERN

KEY = "resplit.key"
"""Where in its scope a request has what it may use."""


@dataclass(frozen=True)
class House:
    """One gateway."""

    answering: Answering
    measures: Measures
    watch: Watch | None
    """What an observer sees; None where the gateway has no observer's folder."""
    began: int
    """Seconds since 1970."""


def house_of(request: Request) -> House:
    """The gateway that a request came to."""
    return cast(House, request.app.state.house)


def key_of(request: Request) -> ApiKey:
    """What the sender of a request may use, as the threshold found it."""
    return cast(ApiKey, request.scope[KEY])


def check_model(request: Request, name: str) -> None:
    """Whether there may be a deployment of this name, and the sender's key is for it; raises `RequestError`."""
    if re.fullmatch(NAME_PATTERN, name) is None:
        raise unknown_model(name)
    key_of(request).check(name)


def unknown_model(name: str) -> RequestError:
    """That there is no such deployment."""
    return RequestError("unknown_deployment", f"there is no deployment {name[:80]!r} here", "model")


def watch_of(request: Request) -> Watch:
    """What an observer sees, for who may see it; raises `RequestError`."""
    if not key_of(request).watch:
        raise RequestError("forbidden", "this API key does not open the dashboard (watch = true in its entry)")
    watch = house_of(request).watch
    if watch is None:
        message = "this gateway was started without an observer's folder (--watch-keys), so it sees no cluster"
        raise RequestError("forbidden", message)
    return watch
