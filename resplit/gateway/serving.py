"""A gateway as a process: where it listens, who may reach it, and how it ends."""

import asyncio
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from bus.supervision import Supervised
from profiler.tracing import traced
from resplit.gateway.app import GatewayConfig, make_app
from resplit.gateway.connecting import BoundedProtocol
from schemas.errors import ErrorCode, ResplitError

FIRST_FD = 3
"""Of the sockets that systemd hands over (sd_listen_fds)."""
BACKLOG = 2048
CONNECTIONS_SPARE = 1024
"""Connections beyond those of requests that may run: what is more is told 503, and no memory goes with it."""
KEEP_ALIVE_S = 75
"""For so long a connection on which nothing is asked stays open: longer than clients keep theirs (httpx, and so openai,
5 s), since one that asks just as it is closed has an error for an answer."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Listening:
    """Where a gateway listens."""

    host: str
    port: int
    certificate: Path | None = None
    key: Path | None = None
    drain_s: int = 30
    """How long answers that are being given may take once it is to stop."""

    @property
    def is_local(self) -> bool:
        """Whether nobody off this machine can reach it."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def parse_listen(text: str) -> tuple[str, int]:
    """Host and port from `127.0.0.1:8000`, `[::1]:8000` or `:8000`; raises `ResplitError(INVALID_REQUEST)`."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or int(port) > 65535:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"{text!r} is not HOST:PORT such as 127.0.0.1:8000", "listen")
    return host.removeprefix("[").removesuffix("]") or "0.0.0.0", int(port)


def check(config: GatewayConfig, at: Listening, open_to_all: bool) -> None:
    """Whether what is asked for is safe; raises `ResplitError(FORBIDDEN)`, or `INVALID_REQUEST` for half a key pair."""
    if (at.certificate is None) != (at.key is None):
        message = "TLS takes both, --tls-certificate and --tls-key"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "tls")
    if at.is_local or open_to_all:
        return
    if config.api_keys is None:
        message = (
            f"at {at.host} anybody who reaches this machine could ask the models: give --api-keys FILE (made with "
            "`resplit api-key`), listen on 127.0.0.1, or say --open"
        )
        raise ResplitError(ErrorCode.FORBIDDEN, message, "listen")
    if at.certificate is None:
        message = (
            f"at {at.host} API keys and prompts would pass unencrypted: give --tls-certificate and --tls-key, listen "
            "on 127.0.0.1 behind a proxy that has them, or say --open"
        )
        raise ResplitError(ErrorCode.FORBIDDEN, message, "listen")


async def serve(config: GatewayConfig, at: Listening, verbose: bool = False) -> None:
    """Serve until cancelled; answers that are being given then go on for `drain_s`. Raises `ResplitError` and
    `RequestError` where it cannot begin."""
    app = make_app(config, is_local=at.is_local)
    _check_certificate(at)
    settings = uvicorn.Config(
        app,
        backlog=BACKLOG,
        log_config=None,
        access_log=verbose,
        lifespan="off",
        timeout_graceful_shutdown=at.drain_s,
        timeout_keep_alive=KEEP_ALIVE_S,
        limit_concurrency=config.requests_max + CONNECTIONS_SPARE,
        server_header=False,
        http=BoundedProtocol,
        ws="none",
        ssl_certfile=at.certificate,
        ssl_keyfile=None if at.key is None else str(at.key),
    )
    # Its lifespan is run here, so that what cannot begin says why.
    # A line for each request that is malformed would be one for whoever likes to fill a disk.
    logging.getLogger("uvicorn.error").setLevel(logging.INFO if verbose else logging.ERROR)
    with _listener(at) as listener, traced("resplit-gateway", "gateway"):
        async with app.router.lifespan_context(app):
            _announce(listener, at)
            server = _Server(settings)
            serving = asyncio.ensure_future(server.serve([listener]))
            supervised = Supervised(lambda _: None, lambda: f"{app.state.house.answering.running} requests")
            telling = asyncio.ensure_future(supervised.run())
            supervised.ready()
            try:
                await asyncio.shield(serving)
            except asyncio.CancelledError:
                server.should_exit = True
                if (watch := app.state.house.watch) is not None:
                    watch.dismiss()
                await serving
                raise
            finally:
                telling.cancel()
                await asyncio.gather(telling, return_exceptions=True)


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Signals are the command's: it cancels what it runs."""
        yield


def _check_certificate(at: Listening) -> None:
    if at.certificate is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(at.certificate, at.key)
    except (OSError, ValueError) as error:  # ssl's own errors are OSErrors
        message = f"{at.certificate} with {at.key} is no certificate with its key: {error}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "tls") from error


def handed_over() -> tuple[str, int] | None:
    """Where systemd listens for this process, if it does: host and port."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS", "0") == "0":
        return None
    with socket.socket(fileno=os.dup(FIRST_FD)) as there:
        host, port = there.getsockname()[:2]
        return str(host), int(port)


def _listener(at: Listening) -> socket.socket:
    """The socket that systemd listens on for this process, else one of its own."""
    if handed_over() is not None:
        return socket.socket(fileno=FIRST_FD)
    try:
        family = socket.AF_INET6 if ":" in at.host else socket.AF_INET
        return socket.create_server((at.host, at.port), family=family, backlog=BACKLOG)
    except OSError as error:
        message = f"cannot listen at {at.host}:{at.port}: {error.strerror}; choose another --listen"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "listen") from error


def _announce(listener: socket.socket, at: Listening) -> None:
    host, port = listener.getsockname()[:2]
    scheme = "http" if at.certificate is None else "https"
    log.warning("the gateway listens at %s://%s:%d", scheme, f"[{host}]" if ":" in host else host, port)
