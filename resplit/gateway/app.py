"""The HTTP application: its routes, who is let in, and how errors are told."""

import logging
import re
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.exceptions import HTTPException

from resplit.access import Access
from resplit.client import Client
from resplit.exchange import Sealer
from resplit.gateway import dashboard_routes, oip_routes, openai_routes
from resplit.gateway.answering import REQUESTS_MAX, Answering
from resplit.gateway.api_keys import Door
from resplit.gateway.connections import ClientGoneError
from resplit.gateway.failures import body_of, dialect_of, headers_of, status_of
from resplit.gateway.house import House
from resplit.gateway.measures import Measures
from resplit.gateway.threshold import LOCAL_NAMES, BodyError, Threshold
from resplit.gateway.watching import Watch
from resplit.replies import RequestError
from schemas.errors import ResplitError
from schemas.toml import shown as shown_value

CLIENT_CLOSED = 499

_TRACE = TraceContextTextMapPropagator()

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class GatewayConfig:
    """What a gateway is told."""

    url: str
    keys: Path
    """The folder of a member that was enrolled as a client."""
    watch_keys: Path | None = None
    """The folder of an observer: the list of models, the dashboard, the cluster's metrics."""
    api_keys: Path | None = None
    """A file of API keys; without one nobody is asked for any."""
    idle_timeout_s: float = 75.0
    requests_max: int = REQUESTS_MAX
    sealed: bool = False
    """Whether requests are sealed here to the agents that may read them."""


def make_app(config: GatewayConfig, *, is_local: bool) -> FastAPI:
    """The application; it connects when it is started. `is_local`: nobody off this machine can reach it. Raises what
    reading the file of API keys raises."""
    door = Door(config.api_keys)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            access = Access(config.url, config.keys)
            login = dict(access.credentials("client").nats_options)
            sealer = _sealer(config.keys) if config.sealed else None
            timeout_s = config.idle_timeout_s
            client = Client(config.url, nats_options=login, idle_timeout_s=timeout_s, sealer=sealer, headers=_traced)
            await stack.enter_async_context(client)
            watch = None
            if config.watch_keys is not None:
                watch = await stack.enter_async_context(Watch(Access(config.url, config.watch_keys)))
            measures = Measures()
            answering = Answering(client, measures, config.requests_max)
            app.state.house = House(answering, measures, watch, int(time.time()))
            yield

    # The pages that FastAPI makes of the API come from elsewhere; a gateway may stand where there is no elsewhere.
    app = FastAPI(title="Resplit", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(RequestError, _failed)
    app.add_exception_handler(ResplitError, _failed)
    app.add_exception_handler(RequestValidationError, _malformed)
    app.add_exception_handler(HTTPException, _not_here)
    app.add_exception_handler(ClientGoneError, _gone)
    app.add_exception_handler(Exception, _broke)
    app.add_middleware(Threshold, names=LOCAL_NAMES if is_local and door.is_open else None, door=door)
    for routes in (openai_routes.routes, oip_routes.routes, dashboard_routes.routes):
        app.include_router(routes)
    return app


def _traced() -> dict[str, str]:
    """The span that asks, as the cluster is told it: FastAPI's own, whose parent is the HTTP client's."""
    carrier: dict[str, str] = {}
    _TRACE.inject(carrier)
    return carrier


def _sealer(keys: Path) -> Sealer:
    from resplit.sealing import Sealer as ByRoster  # noqa: PLC0415

    return ByRoster(keys)


def _told(request: Request, error: RequestError) -> Response:
    return JSONResponse(body_of(error, dialect_of(request.url.path)), status_of(error.code), headers_of(error))


async def _failed(request: Request, error: Exception) -> Response:
    if isinstance(error, ResplitError):
        error = RequestError(error.code, error.message, error.field, None, error.estimate_ms)
    assert isinstance(error, RequestError)
    if error.code == "unknown_deployment" and error.field is None:
        error.field = "model"
    return _told(request, error)


async def _malformed(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    # The first word says that it is the body; where a field may be of several types, their names stand between.
    path = [str(part) for part in first["loc"][1:] if "[" not in str(part)]
    said = str(first["msg"]).removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return _told(request, RequestError("invalid_request", f"the body is not JSON: {first['ctx']['error']}"))
    if (named := re.match(r"([a-z_]+): (.*)", said, re.DOTALL)) is not None:  # a check of several fields names one
        path, said = [*path, named[1]], named[2]
    field = ".".join(path) or None
    if first["type"] == "extra_forbidden":
        said = f"there is no field {path[-1]!r} here"
    shown = (
        ""
        if field is None or first["type"] in ("extra_forbidden", "missing")
        else f" (got {shown_value(first.get('input'))})"
    )
    return _told(request, RequestError("invalid_request", f"{field or 'the request'}: {said}{shown}", field))


async def _not_here(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if isinstance(error, BodyError):
        return JSONResponse(body_of(error.refusal, dialect_of(request.url.path)), error.status_code, error.headers)
    code = "invalid_request" if error.status_code < 500 else "internal"
    body = body_of(
        RequestError(code, f"{request.method} {request.url.path}: {error.detail}"), dialect_of(request.url.path)
    )
    return JSONResponse(body, error.status_code, error.headers)


async def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)  # nobody reads it; logs do


async def _broke(request: Request, error: Exception) -> Response:
    log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _told(request, RequestError("internal", f"the gateway failed: {type(error).__name__}"))
