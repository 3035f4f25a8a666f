"""What the routes of one gateway share, and how a route gets at it."""

from dataclasses import dataclass
from typing import cast

from fastapi import Request

from resplit.gateway.answering import Answering
from resplit.gateway.api_keys import ApiKey, Door
from resplit.gateway.measures import Measures
from resplit.gateway.watching import Watch
from resplit.replies import RequestError


@dataclass(frozen=True)
class House:
    """One gateway."""

    door: Door
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
    """What the sender of a request may use; raises `RequestError("unauthorized")`."""
    house = house_of(request)
    try:
        return house.door.opened_by(request.headers.get("authorization"))
    except RequestError:
        house.measures.unauthorized()
        raise


def watch_of(request: Request) -> Watch:
    """What an observer sees, for who may see it; raises `RequestError`."""
    if not key_of(request).watch:
        raise RequestError("forbidden", "this API key does not open the dashboard (watch = true in its entry)")
    watch = house_of(request).watch
    if watch is None:
        message = "this gateway was started without an observer's folder (--watch-keys), so it sees no cluster"
        raise RequestError("forbidden", message)
    return watch
