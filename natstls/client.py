"""nats-py's client over TLS from the first byte. Of its own, which puts TLS over a connection that it reads already, a
server that says something first is never understood, the end is logged as a mistake, leaving a server that hangs takes
half a minute, and leaving one that was not believed takes for ever."""

import asyncio
import ssl
from datetime import UTC, datetime
from urllib.parse import ParseResult

from nats.aio.client import Client
from nats.aio.transport import TcpTransport

GOODBYE_S = 1.0
"""How long the other side may take to say goodbye; asyncio's own 30 s would pass before the first attempt to reconnect
to a server that hangs."""


class TlsClient(Client):
    """A client that is to connect with `tls` and `tls_handshake_first`."""

    def __init__(self) -> None:
        super().__init__()
        self._transport = self._wire = _TlsTransport()

    @property
    def certificate_until(self) -> datetime:
        """When the server's certificate ends; of a client that is connected."""
        return self._wire.certificate_until


class _TlsTransport(TcpTransport):
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._server: ParseResult | None = None

    def __bool__(self) -> bool:
        return True  # nats-py puts one of its own in the place of a transport that is not connected yet

    @property
    def certificate_until(self) -> datetime:
        assert self._io_writer is not None, "the client is connected"
        ends: str = self._io_writer.get_extra_info("peercert")["notAfter"]
        return datetime.fromtimestamp(ssl.cert_time_to_seconds(ends), UTC)

    async def connect(self, uri: ParseResult, buffer_size: int, connect_timeout: int) -> None:
        self._server = uri  # the handshake, which nats-py asks for next, is a part of connecting

    async def connect_tls(
        self, uri: str | ParseResult, ssl_context: ssl.SSLContext, buffer_size: int, connect_timeout: int
    ) -> None:
        assert self._server is not None, "connect comes first"
        async with asyncio.timeout(connect_timeout):
            self._io_reader, self._io_writer = await asyncio.open_connection(
                self._server.hostname,
                self._server.port,
                limit=buffer_size,
                ssl=ssl_context,
                server_hostname=uri if isinstance(uri, str) else uri.hostname,
                ssl_shutdown_timeout=GOODBYE_S,
            )
