"""Three NATS servers that are one: what JetStream keeps is kept by all three, and any one of them may go."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import pytest_asyncio
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.api import StreamInfo

import bus.replicas
import bus.streams
from bus.connection import ForbiddenError, MemberClient, connect
from bus.identity import ORCHESTRATOR, load_credentials
from bus.replicas import servers_of, spread
from bus.stopping import end
from bus.streams import SPREAD, deployments_bucket, ensure_streams, keep_spread, leader_bucket, nodes_bucket
from bus.together import add_member
from models.store import Store
from orchestrator.lease import LEASE_S
from resplit import control
from resplit.cluster import SERVERS, LocalCluster
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings
from tests.integration.cluster_fixtures import (
    CHAT,
    N0,
    N1,
    N2,
    PROMPT,
    SETTINGS,
    Oracle,
    Serving,
    Streaming,
    command,
    serving,
    three_stages,
)

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]
NAMES = SERVERS[3]
EVERYTHING = (*SPREAD, subjects.STREAM_AUDIT)
ARCHIVIST = NodeId("archivist")
ELECTED_S = 60.0
"""Servers wait for 4 to 9 s for one that leads, and a machine may be busy."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """The decoder over three stages, three servers under it."""
    async with serving(tmp_path_factory.mktemp("three") / "cluster", zoo_store, oracle, servers=3) as running:
        await running.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        yield running


@asynccontextmanager
async def steering(cluster: LocalCluster) -> AsyncIterator[MemberClient]:
    client = await connect(cluster.url, ORCHESTRATOR, credentials=load_credentials(cluster.keys / ORCHESTRATOR))
    try:
        yield client
    finally:
        await client.close()


async def looked_at(js: JetStreamContext, stream: str) -> StreamInfo | None:
    with suppress(NatsError, TimeoutError):
        return await js.stream_info(stream)
    return None


async def until_kept_by_all(js: JetStreamContext, streams: tuple[str, ...] = EVERYTHING) -> None:
    """Wait until each of `streams` is on all three servers, and none lags."""
    async with asyncio.timeout(ELECTED_S):
        for stream in streams:
            while True:
                info = await looked_at(js, stream)
                if info is not None and info.cluster is not None and info.config.num_replicas == 3:
                    current = {peer.name for peer in info.cluster.replicas or () if peer.current and not peer.offline}
                    if {*current, info.cluster.leader} == set(NAMES):
                        break
                await asyncio.sleep(0.2)


async def test_everything_is_kept_by_three_and_read_from_who_leads(served: Serving) -> None:
    async with steering(served.cluster) as client:
        assert servers_of(client) == 3
        js = client.jetstream()
        await until_kept_by_all(js)
        for stream in EVERYTHING:
            # What any replica may answer is as old as that replica.
            assert not (await js.stream_info(stream)).config.allow_direct, stream


@pytest.mark.parametrize("victim", NAMES)
async def test_each_server_may_be_killed_under_load(served: Serving, victim: str) -> None:
    count = 400
    streams = await served.accepted(served.client, (count,) * 3)
    for stream in streams:
        await stream.began()
    await served.cluster.kill(victim)
    later = Streaming(served.client, max_tokens=50)
    try:
        for stream in streams:
            assert await stream.end(ELECTED_S) is None
            assert stream.ids == served.oracle.tokens(PROMPT, count)
        # One that is asked while nobody leads may be refused, with a typed error; never answered wrongly.
        error = await later.end(ELECTED_S)
        assert later.ids == served.oracle.tokens(PROMPT, 50)[: len(later.ids)]
        assert error is None or not later.ids, error
        await served.until_answering()
    finally:
        await served.cluster.start(victim)
    async with steering(served.cluster) as client:
        await until_kept_by_all(client.jetstream())
    assert set(served.cluster.processes) == {*NAMES, ORCHESTRATOR, *served.cluster.agents}
    await served.answers()


async def test_plans_are_made_with_a_server_gone(served: Serving) -> None:
    async with steering(served.cluster) as client:
        info = await client.jetstream().stream_info(subjects.STREAM_PLANS)
        assert info.cluster is not None and info.cluster.leader is not None
        leader = info.cluster.leader
    await served.cluster.kill(leader)
    try:
        async with asyncio.timeout(ELECTED_S):
            while True:
                with suppress(Exception):
                    await served.deploy(CHAT, "llama", placement=three_stages(N1, N2, N0), settings=SETTINGS)
                    break
                await asyncio.sleep(0.5)
        await served.until_answering()
    finally:
        await served.cluster.start(leader)
    assert not [event for event in served.ear.heard if event.kind is AuditKind.EVENT_REJECTED]


async def test_what_was_kept_once_is_kept_thrice_after_an_upgrade(
    tmp_path: Path, zoo_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Streams and buckets of a release that knew of one server, on three of which one is away at first."""
    cluster = LocalCluster(tmp_path / "cluster", zoo_store.root, 1, servers=3, threads=1)
    cluster._make_keys()
    servers = list(cluster._servers.values())
    try:
        await asyncio.gather(*(server.start() for server in servers))
        async with steering(cluster) as client:
            js = client.jetstream()
            with monkeypatch.context() as earlier:
                earlier.setattr(bus.replicas, "servers_of", lambda _: 1)
                await made(client)
            said = [await js.publish(subjects.plan(CHAT), b"%d" % number) for number in range(20)]
            assert {(await js.stream_info(stream)).config.num_replicas for stream in EVERYTHING} == {1}
            monkeypatch.setattr(bus.streams, "SPREAD_EVERY_S", 1.0)
            await servers[2].child.kill()
            spreading = asyncio.create_task(keep_spread(client))
            await asyncio.sleep(3)
            await servers[2].start()
            await until_kept_by_all(js, SPREAD)
            await end([spreading])
            state = (await js.stream_info(subjects.STREAM_PLANS)).state
            assert (state.messages, state.last_seq) == (len(said), said[-1].seq)
            # Nobody who steers may change the trail.
            assert (await js.stream_info(subjects.STREAM_AUDIT)).config.num_replicas == 1
            with pytest.raises(ForbiddenError, match=r"stream\.update\.resplit_audit"):
                await spread(js, subjects.STREAM_AUDIT)
    finally:
        for server in servers:
            await server.child.stop()
    async with LocalCluster(tmp_path / "cluster", zoo_store.root, 1, servers=3, threads=1) as cluster:
        request = DeployRequest(name=DeploymentName("cnn"), model="cnn", settings=Settings())
        await control.deploy_and_wait(cluster.operator, request, ELECTED_S)
        add_member(cluster.keys, ARCHIVIST, "archivist", None)
        await cluster.reload()
        code, said_of_it, _ = await command(
            "audit", "spread", "--keys", str(cluster.keys / ARCHIVIST), "--url", cluster.url
        )
        assert code == 0 and "3 times" in said_of_it
        async with steering(cluster) as client:
            await until_kept_by_all(client.jetstream())


async def made(client: MemberClient) -> None:
    """Every stream and bucket, as soon as the servers have one that leads."""
    async with asyncio.timeout(ELECTED_S):
        while True:
            try:
                js = await ensure_streams(client)
                await leader_bucket(js, LEASE_S)
                await deployments_bucket(js)
                await nodes_bucket(js)
            except (NatsError, TimeoutError):
                await asyncio.sleep(0.2)
            else:
                return
