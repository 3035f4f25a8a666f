"""Somebody between a client and a server, who passes everything on and writes it down, or answers in its place."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from urllib.parse import urlsplit

READ_BYTES = 1 << 16

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Wiretap:
    """What went over the connections that came through here."""

    url: str = ""
    up: bytearray = field(default_factory=bytearray)
    """From clients."""
    down: bytearray = field(default_factory=bytearray)
    """To clients."""


@asynccontextmanager
async def tapped(url: str) -> AsyncIterator[Wiretap]:
    """Between those who connect to `Wiretap.url` and the server at `url`."""
    tap, server = Wiretap(), urlsplit(url)

    async def between(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_server, to_server = await asyncio.open_connection(server.hostname, server.port)
        async with asyncio.TaskGroup() as both:
            both.create_task(_pass_on(reader, to_server, tap.up))
            both.create_task(_pass_on(from_server, writer, tap.down))

    async with _listening(between, tap):
        yield tap


@asynccontextmanager
async def impostor(greeting: bytes) -> AsyncIterator[Wiretap]:
    """Says `greeting` to whoever connects to `Wiretap.url`, and listens."""
    tap = Wiretap()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(greeting)
        while data := await reader.read(READ_BYTES):
            tap.up += data
        writer.close()

    async with _listening(answer, tap):
        yield tap


@asynccontextmanager
async def _listening(answer: Answer, tap: Wiretap) -> AsyncIterator[None]:
    tasks: set[asyncio.Future[None]] = set()

    def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.ensure_future(answer(reader, writer)))

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    tap.url = f"nats://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield
    finally:
        server.close()
        if tasks:
            _, left = await asyncio.wait(tasks, timeout=5)
            assert not left, "somebody is still connected"


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray) -> None:
    try:
        while data := await reader.read(READ_BYTES):
            seen += data
            writer.write(data)
            await writer.drain()
    except ConnectionError:
        pass
    finally:
        writer.close()
