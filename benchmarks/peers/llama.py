"""llama.cpp as its own documents run it: `llama-server`, alone or with `--rpc` and `ggml-rpc-server`."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx2

from benchmarks.peers.contender import Contender, FailedError, Layout, Mend
from resplit.child import Child
from resplit.cluster import free_port

READY_S = 90.0
POLL_S = 0.05
HOST = "127.0.0.1"
FLAGS = (
    "-t",
    "1",
    "-tb",
    "1",
    "-c",
    "2048",
    "-np",
    "1",
    "-ctk",
    "f32",
    "-ctv",
    "f32",
    "-fit",
    "off",
    "--cache-ram",
    "0",
)
"""One thread; a cache of float32, as the others have; no other prompts kept, as none comes twice."""
EVERY_LAYER = ("-ngl", "99")


@dataclass(frozen=True)
class Way:
    """How many RPC servers, and what the server on the main host is told of them."""

    name: str
    layout: Layout
    servers: int
    flags: tuple[str, ...]
    computes: bool
    """Whether the main host's process has layers of its own."""


WHOLE = Way("llama.cpp, one server", "whole", 0, (), True)
TWO_SERVERS = Way("llama.cpp RPC, two servers", "split", 2, (*EVERY_LAYER, "-ts", "1,1"), False)


def half_remote(layers: int) -> Way:
    """Half the layers in the process that serves, the others and the head at one RPC server."""
    return Way("llama.cpp RPC, half here", "split", 1, ("-ngl", str(layers // 2 + 1)), True)


@contextlib.asynccontextmanager
async def llama(bin_folder: Path, model: Path, way: Way, scratch: Path) -> AsyncIterator[list[Contender]]:
    """`llama-server` with its RPC servers, up and with the model loaded."""
    at = scratch / way.name.replace(", ", "-").replace(" ", "-")
    ports = [free_port() for _ in range(way.servers)]
    servers = [
        Child(f"rpc-{i}", [str(bin_folder / "ggml-rpc-server"), "-H", HOST, "-p", str(p), "-t", "1"], at / f"rpc-{i}")
        for i, p in enumerate(ports)
    ]
    port = free_port()
    rpc = ["--rpc", ",".join(f"{HOST}:{p}" for p in ports)] if ports else []
    command = [bin_folder / "llama-server", "-m", model, "--host", HOST, "--port", port, *FLAGS, *way.flags, *rpc]
    main = Child("llama-server", [str(word) for word in command], at / "server")
    url = f"http://{HOST}:{port}"

    async def start() -> None:
        for child in servers:
            if child.pid is None:
                await child.start()
        await asyncio.gather(*(_listens(p) for p in ports))
        if main.pid is None:
            await main.start()
        await _healthy(url, main)

    async def stop() -> None:
        for child in (main, *servers):
            await child.stop()

    async def server_again() -> None:
        await servers[-1].start()

    async def all_again() -> None:
        await stop()
        await start()

    async def stages() -> list[int]:
        return [pid for child in ([main] if way.computes else []) + servers for pid in _pid(child)]

    try:
        await start()
        yield [
            Contender(
                way.name,
                "llama.cpp",
                way.layout,
                lambda prompt, new_tokens: _stream(url, prompt, new_tokens),
                stages,
                others=lambda: [] if way.computes else _pid(main),
                mends=(
                    Mend("the RPC server started again", server_again),
                    Mend("llama-server started again, too", start),
                    Mend("all started again", all_again),
                ),
            )
        ]
    finally:
        await stop()


def _pid(child: Child) -> list[int]:
    return [] if child.pid is None else [child.pid]


async def _stream(url: str, prompt: Sequence[int], new_tokens: int) -> AsyncGenerator[int, None]:
    body = {
        "prompt": list(prompt),
        "n_predict": new_tokens,
        "stream": True,
        "temperature": 0,
        "samplers": ["temperature"],
        "ignore_eos": True,
        "cache_prompt": False,
    }
    try:
        async with (
            httpx2.AsyncClient(timeout=None) as client,
            client.stream("POST", f"{url}/completion", json=body) as reply,
        ):
            async for line in reply.aiter_lines():
                if line.startswith("error:") or reply.status_code != 200:
                    raise FailedError(line)
                if line.startswith("data: "):
                    told = json.loads(line.removeprefix("data: "))
                    if "error" in told:
                        raise FailedError(str(told["error"]["message"]))
                    for token in told.get("tokens", ()):
                        yield int(token)
    except httpx2.HTTPError as error:
        raise FailedError(f"{type(error).__name__}: {error}") from error


async def _listens(port: int) -> None:
    async with asyncio.timeout(READY_S):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(HOST, port)
                writer.close()
                return
            await asyncio.sleep(POLL_S)


async def _healthy(url: str, server: Child) -> None:
    deadline = time.monotonic() + READY_S
    async with httpx2.AsyncClient() as client:
        while time.monotonic() < deadline:
            if server.pid is None:
                raise FailedError(f"llama-server ended; its log ends:\n{server.tail()}")
            with contextlib.suppress(httpx2.HTTPError):
                if (await client.get(f"{url}/health")).status_code == 200:
                    return
            await asyncio.sleep(POLL_S)
    raise FailedError(f"llama-server was not ready after {READY_S:g} s; its log ends:\n{server.tail()}")
