"""What nats-py keeps from whoever calls it, and what it lets grow: one test for each trap, on a real nats-server."""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.aio.msg import Msg
from nats.errors import TimeoutError as NatsTimeoutError

import natstls.client
from bus.connection import ForbiddenError, FullError, MemberClient, connect, settle
from bus.streams import ensure_streams
from bus.subject_log import NoRoomError, SubjectLog
from natstls.client import ANSWER_S, UNSENT_BYTES_MAX, UnsentError
from resplit.client import Client
from resplit.exchange import open_connection
from resplit.replies import RequestError
from schemas import subjects
from schemas.base import DeploymentName, LifeId, NodeId
from schemas.errors import ErrorCode, ResplitError
from tests.conftest import NatsServer, running_server
from tests.security.guarded_bus import GuardedServer, credentials, guarded

CHAT = DeploymentName("chat")
AT_ONCE_S = 1.0
"""Far below any timeout that is not the server's answer."""
SOON_S = 15.0
AGENT = credentials("n0", "agent")
ORCHESTRATOR = credentials("orchestrator", "orchestrator")
OTHERS = subjects.capacity(NodeId("n1"))
MIB = bytes(1 << 20)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[GuardedServer]:
    """One that lets in an agent and an orchestrator, and lets each do what it may."""
    with guarded(tmp_path_factory.mktemp("guarded"), [AGENT, ORCHESTRATOR]) as running:
        yield running


@asynccontextmanager
async def agent_of(server: GuardedServer) -> AsyncIterator[MemberClient]:
    client = await connect(server.url, "n0", credentials=AGENT)
    try:
        yield client
    finally:
        await client.close()


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not true():  # noqa: ASYNC110 - a connection sends no events
            await asyncio.sleep(0.01)


# What the server denies


async def test_a_denied_request_is_refused_at_once_and_says_what(server: GuardedServer) -> None:
    async with agent_of(server) as client:
        began = time.monotonic()
        with pytest.raises(ForbiddenError) as refused:
            await client.request(OTHERS, b"", timeout=30)
        assert time.monotonic() - began < AT_ONCE_S
        assert isinstance(refused.value, ResplitError) and refused.value.code is ErrorCode.FORBIDDEN
        assert f"publish to '{OTHERS}'" in refused.value.message
        assert not client._awaited, "nothing of it is kept"


async def test_a_denied_publish_to_a_stream_is_refused_at_once(server: GuardedServer) -> None:
    steering = await connect(server.url, "orchestrator", credentials=ORCHESTRATOR)
    await ensure_streams(steering)
    await steering.close()
    async with agent_of(server) as client:
        began = time.monotonic()
        with pytest.raises(ForbiddenError, match=r"resplit\.v1\.plan\.chat"):
            await client.jetstream().publish("resplit.v1.plan.chat", b"", timeout=30)
        with pytest.raises(ForbiddenError, match=r"stream\.delete"):
            await client.jetstream(timeout=30).delete_stream(subjects.STREAM_PLANS)
        assert time.monotonic() - began < AT_ONCE_S
        # What it may is answered as ever, beside what it may not.
        asked = await asyncio.gather(
            client.jetstream().stream_info(subjects.STREAM_PLANS),
            client.request(OTHERS, b"", timeout=30),
            return_exceptions=True,
        )
        assert not isinstance(asked[0], BaseException) and isinstance(asked[1], ForbiddenError)


async def test_a_denied_append_to_a_journal_is_refused_at_once(server: GuardedServer) -> None:
    steering = await connect(server.url, "orchestrator", credentials=ORCHESTRATOR)
    journal = SubjectLog(steering, subjects.STREAM_JOURNAL, subjects.journal(CHAT, LifeId("n0-x-0")))
    began = time.monotonic()
    with pytest.raises(NoRoomError, match=r"publish to 'resplit\.v1\.journal"):
        await journal.append(b"x", 0, 30)
    assert time.monotonic() - began < AT_ONCE_S
    await journal.close()
    assert not steering._awaited
    await steering.close()


async def test_a_denied_subscription_is_told_to_who_settles(server: GuardedServer) -> None:
    async with agent_of(server) as client:

        async def nobody(_: Msg) -> None: ...

        await settle(client)
        await client.subscribe(subjects.control("*"), cb=nobody)
        with pytest.raises(ForbiddenError, match=r"subscribe to .resplit\.v1\.control"):
            await settle(client)


async def test_a_denied_publish_that_nobody_waits_for_is_said_once_and_counted(
    server: GuardedServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with agent_of(server) as client:
        for _ in range(5):
            await client.publish(OTHERS, b"")
        await settle(client)
        assert client.troubles["denied"] == 5
    assert [record.message for record in caplog.records if OTHERS in record.message] == [
        f'the NATS server refuses: permissions violation for publish to "{OTHERS}"'
    ]


async def test_a_client_with_a_login_of_another_role_is_told_at_once(tmp_path: Path) -> None:
    observer = credentials("eye", "observer")
    with guarded(tmp_path, [observer]) as other:
        async with Client(other.url, nats_options={**observer.nats_options}) as client:
            began = time.monotonic()
            with pytest.raises(RequestError) as refused:
                await client.complete("chat", "x", max_tokens=1)
            assert time.monotonic() - began < AT_ONCE_S
            assert refused.value.code == "forbidden" and "resplit.v1.infer.chat" in str(refused.value)


async def test_who_may_not_log_in_any_more_tries_until_it_may(server: GuardedServer) -> None:
    async with agent_of(server) as client:
        server.reload([ORCHESTRATOR])
        try:
            await until(lambda: not client.is_connected)
            await asyncio.sleep(0.5)
            assert not client.is_closed
        finally:
            server.reload([AGENT, ORCHESTRATOR])
        await until(lambda: client.is_connected)


# What waits


async def test_what_cannot_be_sent_is_bounded_and_refused(tmp_path: Path) -> None:
    with running_server(tmp_path) as plain:
        client = await connect(plain.url, "n0")
        plain.kill()
        await until(lambda: not client.is_connected)
        with pytest.raises(FullError, match="bytes wait to be sent") as full:
            for _ in range(100):
                await client.publish("x", MIB)
        assert full.value.code is ErrorCode.UNREACHABLE
        assert client.pending_data_size <= UNSENT_BYTES_MAX + len(MIB)
        assert client.troubles["unsent"] == 1
        plain.start()
        await until(lambda: client.is_connected and not client.pending_data_size)
        await client.publish("x", MIB)  # and there is room again
        await client.close()


async def test_what_a_server_that_hangs_does_not_take_is_bounded_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nats-py, while it is connected, waits for ten seconds and then takes it all the same, however much it is."""
    monkeypatch.setattr(natstls.client, "UNSENT_BYTES_MAX", 2 << 20)
    monkeypatch.setattr(natstls.client, "FLUSH_S", 0.2)
    with running_server(tmp_path) as plain:
        client = await open_connection(plain.url, "client", 5.0, {"ping_interval": 60})
        plain.pause()
        most = 0
        try:
            refused = 0
            async with asyncio.timeout(SOON_S):
                while not refused:
                    told = await asyncio.gather(*(client.publish("x", MIB) for _ in range(20)), return_exceptions=True)
                    refused += sum(isinstance(one, UnsentError) for one in told)
                    most = max(most, client.pending_data_size)
        finally:
            plain.resume()
        assert most <= (2 << 20) + 2 * len(MIB)
        await client.close()


async def test_a_slow_consumer_holds_so_much_and_the_rest_is_counted_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(natstls.client, "PENDING_MESSAGES_MAX", 10)
    caplog.set_level(logging.WARNING)
    with running_server(tmp_path) as plain:
        slow, quick = await connect(plain.url, "slow"), await connect(plain.url, "quick")
        go_on, handled = asyncio.Event(), 0

        async def handle(_: Msg) -> None:
            nonlocal handled
            await go_on.wait()
            handled += 1

        subscription = await slow.subscribe("x", cb=handle)
        await settle(slow)
        for _ in range(50):
            await quick.publish("x", b"1")
        await settle(quick)
        await until(lambda: slow.troubles["dropped"] + subscription.pending_msgs >= 49)
        assert subscription.pending_msgs <= 10 and slow.troubles["dropped"] in (39, 40)
        assert sum("messages of 'x' are dropped" in record.message for record in caplog.records) == 1
        go_on.set()
        await until(lambda: handled + slow.troubles["dropped"] == 50)
        for client in (slow, quick):
            await client.close()


# What is waited for


@pytest.mark.parametrize("opened", ["connect", "open_connection"])
async def test_nobody_waits_long_for_one_answer_of_jetstream(tmp_path: Path, opened: str) -> None:
    with running_server(tmp_path) as plain:
        client = await (connect(plain.url, "n0") if opened == "connect" else open_connection(plain.url, "n0", 5.0, {}))
        js = client.jetstream()
        await js.add_stream(name="s", subjects=["s"])
        bucket = await js.create_key_value(bucket="b")
        plain.pause()
        began = time.monotonic()
        try:
            asked = await asyncio.gather(
                js.publish("s", b""), js.stream_info("s"), bucket.get("k"), js.get_msg("s", 1), return_exceptions=True
            )
        finally:
            plain.resume()
        assert all(isinstance(one, NatsTimeoutError) for one in asked), asked
        assert time.monotonic() - began < ANSWER_S + AT_ONCE_S
        await client.close()


async def test_those_who_lost_the_same_server_come_back_one_by_one(tmp_path: Path) -> None:
    with running_server(tmp_path) as plain:
        at: list[float] = []

        async def one(number: int) -> MemberClient:
            async def back() -> None:
                at.append(time.monotonic())

            return await connect(plain.url, f"n{number}", on_back=back)

        clients = [await one(number) for number in range(30)]
        plain.kill()
        await asyncio.sleep(2.0)
        await asyncio.to_thread(plain.start)  # whose waiting is none of theirs
        await until(lambda: len(at) == len(clients))
        assert max(at) - min(at) > 0.1
        for client in clients:
            await client.close()


async def test_other_servers_are_tried_before_one_is_tried_twice(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with running_server(tmp_path / "a") as one, running_server(tmp_path / "b") as other:
        client = await connect(f"{one.url},{other.url}", "n0")
        for _ in range(6):
            used: NatsServer = (
                one if client.connected_url is not None and client.connected_url.port == one.port else other
            )
            reconnects = client.stats["reconnects"]
            used.pause()  # takes connections, and says nothing
            used_port = used.port
            await client.force_reconnect()
            async with asyncio.timeout(AT_ONCE_S):
                while client.stats["reconnects"] == reconnects:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert client.connected_url is not None and client.connected_url.port != used_port
            used.resume()
        await client.close()
