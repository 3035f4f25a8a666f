"""What people and Prometheus read: the dashboard, what it is drawn from, metrics, and whether the gateway is there."""

from collections.abc import AsyncGenerator
from importlib.resources import files

from fastapi import APIRouter, Request, Response
from fastapi.responses import RedirectResponse

from resplit.gateway.connections import EventStream, event
from resplit.gateway.house import house_of, key_of, watch_of
from resplit.gateway.watching import Watch
from resplit.replies import RequestError
from schemas.control import ExplainReply

routes = APIRouter()

PAGE = {"index.html": "text/html; charset=utf-8", "style.css": "text/css", "dashboard.js": "text/javascript"}
SECURITY = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""The page shows words of strangers: it runs its own script and no other, and loads nothing from anywhere else."""


@routes.get("/", include_in_schema=False)
async def root() -> Response:
    """People who open the gateway see the dashboard."""
    return RedirectResponse("dashboard/")


@routes.get("/health")
async def health(request: Request) -> Response:
    """200 while the gateway is connected to the cluster, else 503."""
    return Response(status_code=200 if house_of(request).answering.client.is_connected else 503)


@routes.get("/metrics")
async def metrics(request: Request) -> Response:
    """The gateway's own figures, for Prometheus."""
    if not key_of(request).watch:
        raise RequestError("forbidden", "this API key does not read metrics (watch = true in its entry)")
    body, media_type = house_of(request).measures.page()
    return Response(body, media_type=media_type)


@routes.get("/dashboard/", include_in_schema=False)
async def dashboard(request: Request) -> Response:
    """The page."""
    return _file(request, "index.html")


@routes.get("/dashboard/watch")
async def watch(request: Request) -> Response:
    """What is seen, as server-sent events: `past` once, then `look` each second, and `event` for each of the trail."""
    return EventStream(_tellings(watch_of(request)))


@routes.get("/dashboard/why")
async def why(request: Request) -> ExplainReply:
    """The last decision about each deployment, with what was weighed."""
    return await watch_of(request).why()


@routes.get("/dashboard/{name}", include_in_schema=False)
async def file(request: Request, name: str) -> Response:
    """A file of the page."""
    if name not in PAGE:
        raise RequestError("unknown_model", f"the dashboard has no file {name[:80]!r}")
    return _file(request, name)


def _file(request: Request, name: str) -> Response:
    watch_of(request)
    data = (files("resplit.gateway") / "page" / name).read_bytes()
    return Response(data, media_type=PAGE[name], headers=SECURITY)


async def _tellings(watch: Watch) -> AsyncGenerator[bytes, None]:
    async with watch.viewer() as viewer:
        async for kind, found in viewer.tellings():
            yield event(found, kind)
