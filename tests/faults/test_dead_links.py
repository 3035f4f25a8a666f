"""Connections to NATS that die without a word: each is noticed and made anew, whatever the kernel and nats-py do."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio
from nats.errors import Error as NatsError

import natstls.client
import natstls.patience
from benchmarks.faults.wires import MACHINE, Wires, why_not
from bus.connection import MemberClient, connect, settle
from natstls.patience import SILENT_S
from resplit.child import Child
from resplit.cluster import free_port
from resplit.server import nats_program
from schemas.base import NodeId
from tests.conftest import running_server
from tests.security.guarded_bus import credentials, guarded

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
NOTICED_S = SILENT_S + 1.0
SLACK_S = 2.0
"""A machine that is shared with other tests."""
SOON_S = 20.0
FAR = NodeId("far")
PORT = 4222
MIB = bytes(1 << 20)
needs_namespaces = pytest.mark.skipif(why_not() is not None, reason=str(why_not()))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def far(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Wires, str]]:
    """A server behind a wire that can be cut, and its URL."""
    folder: Path = tmp_path_factory.mktemp("far")
    async with Wires(folder, (FAR,)) as wires:
        place = wires.places[FAR]
        assert place.host is not None
        command = [*place.enter, str(nats_program()), "-a", place.host, "-p", str(PORT)]
        server = Child("nats", command, folder / "log")
        await server.start()
        yield wires, f"nats://{place.host}:{PORT}"
        await server.kill()


class Tale:
    """What a connection tells of itself, and when."""

    def __init__(self) -> None:
        self.lost, self.back = asyncio.Event(), asyncio.Event()
        self.losses = 0

    async def on_lost(self) -> None:
        self.losses += 1
        self.lost.set()

    async def on_back(self) -> None:
        self.back.set()


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[tuple[MemberClient, Tale]]:
    tale = Tale()
    client = await connect(url, "n0", on_lost=tale.on_lost, on_back=tale.on_back)
    try:
        yield client, tale
    finally:
        async with asyncio.timeout(SOON_S):
            await client.close()


async def publish_on(client: MemberClient) -> None:
    """More than any socket buffers, without end."""
    while True:
        with suppress(NatsError):
            await client.publish("x", MIB)
        await asyncio.sleep(0.01)


@needs_namespaces
@pytest.mark.parametrize("unsent", [True, False], ids=["unsent", "idle"])
@pytest.mark.parametrize("kernel_says", [True, False], ids=["user-timeout", "watchdog-alone"])
async def test_a_black_hole_is_noticed_in_time_and_survived(
    far: tuple[Wires, str], monkeypatch: pytest.MonkeyPatch, kernel_says: bool, unsent: bool
) -> None:
    if not kernel_says:
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    wires, url = far
    async with connected(url) as (client, tale):
        await client.flush()
        await wires.cut(MACHINE, FAR)
        began = time.monotonic()
        publishing = [asyncio.create_task(publish_on(client)) for _ in range(4 if unsent else 0)]
        try:
            async with asyncio.timeout(NOTICED_S + SLACK_S):
                await tale.lost.wait()
            print(f"noticed after {time.monotonic() - began:.2f} s")
        finally:
            for task in publishing:
                task.cancel()
            await wires.mend(MACHINE, FAR)
        async with asyncio.timeout(SOON_S):
            await tale.back.wait()
        assert tale.losses == client.troubles["lost"] == 1
        await settle(client)


@needs_namespaces
async def test_where_missed_pings_tell_first_leaving_the_dead_link_does_not_hang(
    far: tuple[Wires, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py waits without end until what was unsent is sent, and only then says that it is lost (its issue 671)."""
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    monkeypatch.setattr(natstls.patience, "SILENT_S", 1000.0)
    wires, url = far
    async with connected(url) as (client, tale):
        await client.flush()
        await wires.cut(MACHINE, FAR)
        publishing = [asyncio.create_task(publish_on(client)) for _ in range(4)]
        try:
            async with asyncio.timeout(3 * natstls.client.PING_S + natstls.client.GOODBYE_S + SLACK_S):
                await tale.lost.wait()
        finally:
            for task in publishing:
                task.cancel()
            await wires.mend(MACHINE, FAR)
        async with asyncio.timeout(SOON_S):
            await tale.back.wait()


@needs_namespaces
async def test_leaving_over_a_black_hole_takes_no_longer_than_a_goodbye(far: tuple[Wires, str]) -> None:
    wires, url = far
    client = await connect(url, "n0")
    await client.flush()
    await wires.cut(MACHINE, FAR)
    try:
        publishing = [asyncio.create_task(publish_on(client)) for _ in range(4)]
        await asyncio.sleep(0.5)
        for task in publishing:
            task.cancel()
        async with asyncio.timeout(2 * natstls.client.GOODBYE_S + SLACK_S):
            await client.close()
    finally:
        await wires.mend(MACHINE, FAR)


async def test_a_stuck_flusher_that_keeps_pings_from_being_sent_is_noticed(tmp_path: Path) -> None:
    """A ping waits for its place in the queue of who flushes: while that is stuck none is sent, and none is missed."""
    with running_server(tmp_path) as server:
        async with connected(server.url) as (client, tale):
            assert client._flusher_task is not None and client._flush_queue is not None
            never = asyncio.Event()
            monkeypatched = client._wire.drain
            client._wire.drain = never.wait  # type: ignore[method-assign]  # as where a socket takes nothing
            await client.publish("x", b"1")
            await asyncio.sleep(0)
            with suppress(asyncio.QueueFull):
                while True:
                    client._flush_queue.put_nowait(asyncio.get_running_loop().create_future())
            server.pause()
            try:
                async with asyncio.timeout(NOTICED_S + SLACK_S):
                    await tale.lost.wait()
            finally:
                client._wire.drain = monkeypatched  # type: ignore[method-assign]
                server.resume()
            async with asyncio.timeout(SOON_S):
                await tale.back.wait()
            await settle(client)


async def test_a_reader_that_died_is_noticed(tmp_path: Path) -> None:
    """nats-py logs what its reader cannot make sense of, and stays connected without it."""
    with running_server(tmp_path) as server:
        async with connected(server.url) as (client, tale):
            assert client._reading_task is not None
            client._reading_task.cancel()
            async with asyncio.timeout(SILENT_S - 1):  # a silence would take longer
                await tale.lost.wait()
            async with asyncio.timeout(SOON_S):
                await tale.back.wait()
            assert client.troubles["hung"] == 1
            await settle(client)


async def test_who_ends_its_attempts_is_made_to_go_on(tmp_path: Path) -> None:
    """nats-py's attempts end with the first error that it did not think of."""
    with running_server(tmp_path) as server:
        async with connected(server.url) as (client, tale):
            server.kill()
            async with asyncio.timeout(SOON_S):
                await tale.lost.wait()
            assert client._reconnection_task is not None
            client._reconnection_task.cancel()
            server.start()
            async with asyncio.timeout(SOON_S):
                await tale.back.wait()
            assert tale.losses == 1, "it is one loss"
            await settle(client)


async def test_a_complaint_of_the_server_ends_no_connection_for_good(tmp_path: Path) -> None:
    """nats-py closes whatever the server complains about that is no matter of permissions."""
    with running_server(tmp_path) as server:
        async with connected(server.url) as (client, tale):
            await client._send_command(b"NONSENSE\r\n")
            await client._flush_pending()
            async with asyncio.timeout(SOON_S):
                await tale.back.wait()
            assert not client.is_closed and client.troubles["hung"] == 0
            await settle(client)


async def test_what_follows_from_a_loss_may_fail(tmp_path: Path) -> None:
    """nats-py would end its attempts with it."""

    async def fails() -> None:
        raise ValueError("not foreseen")

    with running_server(tmp_path) as server:
        client = await connect(server.url, "n0", on_lost=fails, on_back=fails)
        server.kill()
        await asyncio.sleep(1)
        server.start()
        async with asyncio.timeout(SOON_S):
            while not client.is_connected:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await settle(client)
        assert client.troubles["hung"] == 0, "nobody had to see to it"
        await client.close()


async def test_what_follows_from_a_loss_may_hang(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """nats-py waits for it, before it tries to reconnect."""
    monkeypatch.setattr(natstls.patience, "ATTEMPT_S", 2.0)
    back = asyncio.Event()

    async def hangs() -> None:
        await asyncio.Event().wait()

    async def on_back() -> None:
        back.set()

    with running_server(tmp_path) as server:
        client = await connect(server.url, "n0", on_lost=hangs, on_back=on_back)
        server.kill()
        await asyncio.sleep(1)
        server.start()
        async with asyncio.timeout(SOON_S):
            await back.wait()
        await settle(client)
        await client.close()


async def test_a_server_that_hangs_is_noticed_over_tls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    who, tale = credentials("n0", "agent"), Tale()
    with guarded(tmp_path, [who]) as server:
        client = await connect(server.url, "n0", credentials=who, on_lost=tale.on_lost, on_back=tale.on_back)
        assert server._process is not None
        server._process.send_signal(19)
        publishing = [asyncio.create_task(publish_on(client)) for _ in range(4)]
        try:
            async with asyncio.timeout(NOTICED_S + SLACK_S):
                await tale.lost.wait()
        finally:
            for task in publishing:
                task.cancel()
            server._process.send_signal(18)
        async with asyncio.timeout(SOON_S):
            await tale.back.wait()
        await client.close()


async def test_a_process_that_was_stopped_itself_blames_nobody(tmp_path: Path) -> None:
    """Of what came meanwhile it knows only once it reads."""
    with running_server(tmp_path) as server:
        async with connected(server.url) as (client, tale):
            for _ in range(2):
                time.sleep(1.2 * SILENT_S)  # noqa: ASYNC251 - nothing else runs here meanwhile, as if it had hung
                await asyncio.sleep(1.0)
            assert not tale.losses and client.is_connected and not client.troubles["hung"]


async def test_a_server_that_loses_sight_of_the_others_is_left_once(tmp_path: Path) -> None:
    """Here they have ended, so there is no better one: whoever comes back to it stays."""
    clients, routes = [free_port() for _ in range(3)], [free_port() for _ in range(3)]
    others = ",".join(f"nats://127.0.0.1:{port}" for port in routes)
    servers = []
    for number, (own, route) in enumerate(zip(clients, routes, strict=True)):
        address = ["-a", "127.0.0.1", "-p", str(own), "--server_name", f"s{number}", "--cluster_name", "c"]
        cluster = ["--cluster", f"nats://127.0.0.1:{route}", "--routes", others]
        servers.append(Child(f"s{number}", [str(nats_program()), *address, *cluster], tmp_path / f"log{number}"))
    try:
        for server in servers:
            await server.start()
        async with connected(f"nats://127.0.0.1:{clients[0]}") as (client, tale):
            async with asyncio.timeout(SOON_S):
                while len(client._server_info.get("connect_urls", ())) < 3:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
            await servers[1].kill()
            await asyncio.sleep(2)
            assert not tale.lost.is_set(), "most are left"
            await servers[2].kill()
            async with asyncio.timeout(SOON_S):
                await tale.lost.wait()
                await tale.back.wait()
            assert client.troubles["hung"] == 1
            await asyncio.sleep(3)
            assert tale.losses == 1 and client.is_connected
            await settle(client)
    finally:
        for server in servers:
            await server.kill()
