"""What agents measure of each other: over real TLS links, through a network that can be slowed and cut, and the bus."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from nats.aio.client import Client

from agent import links, peers
from agent.busroad import BusRoad
from agent.links import PROBE_BYTES, LinkServer
from agent.peers import ESTIMATES_MAX, Peers
from agent.survey import Survey
from bus.connection import connect, settle
from bus.identity import ORCHESTRATOR, load_identity
from bus.sealed_heartbeats import open_heartbeat, read_capacity
from bus.stopping import end
from bus.together import make_members
from models.store import Store
from profiler.links import TRANSFER_BYTES
from resplit.cluster import LocalCluster
from schemas import subjects
from schemas.base import NodeId
from schemas.capacity import Capacity, LinkEstimate
from schemas.frame import Failure, Frame
from schemas.heartbeat import Presence

A, B = NodeId("a"), NodeId("b")
WAIT_S = 30.0
PIECE_BYTES = 16 << 10


class Road:
    """A TCP proxy: the network between two nodes, which can be slow, and cut while both ends stay up."""

    def __init__(self, port: int, bytes_per_s: float | None = None, delay_s: float = 0.0) -> None:
        self._port = port
        self._bytes_per_s = bytes_per_s
        self._delay_s = delay_s
        self._writers: list[asyncio.StreamWriter] = []
        self._passes = asyncio.Event()
        self._passes.set()
        self.calls = 0
        self._full_at: list[float] = []
        """When each piece of full size had passed."""

    @property
    def passed_bytes_per_s(self) -> float:
        """What large messages had of it, which on a busy machine is less than its rate."""
        return (len(self._full_at) - 1) * PIECE_BYTES / (self._full_at[-1] - self._full_at[0])

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def cut(self) -> None:
        """From now on nothing passes, and nobody is told."""
        self._passes.clear()

    def mend(self) -> None:
        """What was on its way arrives, and all that follows."""
        self._passes.set()

    async def close(self) -> None:
        self._server.close()
        self.mend()
        for writer in self._writers:
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.calls += 1
        back, there = await asyncio.open_connection("127.0.0.1", self._port)
        self._writers += [writer, there]
        await asyncio.gather(self._pump(reader, there), self._pump(back, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(PIECE_BYTES):
                await self._passes.wait()
                await asyncio.sleep(self._delay_s + (len(data) / self._bytes_per_s if self._bytes_per_s else 0.0))
                writer.write(data)
                await writer.drain()
                if len(data) == PIECE_BYTES:
                    self._full_at.append(time.monotonic())
            writer.close()


class End:
    """One agent's roads, without the rest of the agent."""

    def __init__(self, keys: Path, name: NodeId, client: Client) -> None:
        identity = load_identity(keys / name, name)
        self.name = name
        self.client = client
        self.received = 0
        self.changes: list[tuple[NodeId, bool]] = []
        self.unreached: list[NodeId] = []
        self.server = LinkServer(identity, self._took, lambda _: None)
        self.peers = Peers(identity, lambda node, up: self.changes.append((node, up)))
        self.bus = self.peers.bus = BusRoad(
            client, identity, self._took, self.unreached.append, self.peers.came_over_the_bus
        )
        self.news = 0
        self.survey = Survey(identity, self.peers, lambda: True, self._heard_news)

    def _took(self, _: NodeId, data: memoryview) -> None:
        self.received += len(data)

    def _heard_news(self) -> None:
        self.news += 1

    def learn(self, name: NodeId, link: str | None, sequence: int = 0) -> None:
        """Hear a heartbeat of a peer."""
        self.peers.learn(Presence(node=name, boot="first", sequence=sequence, issued_at=datetime.now(UTC), link=link))

    def of(self, peer: NodeId) -> LinkEstimate | None:
        return next((estimate for estimate in self.peers.estimates() if estimate.peer == peer), None)

    async def until(self, peer: NodeId, true: Callable[[LinkEstimate | None], bool]) -> LinkEstimate | None:
        """The first estimate that is as wanted."""
        async with asyncio.timeout(WAIT_S):
            while not true(found := self.of(peer)):  # noqa: ASYNC110 (an estimate is asked for, it tells nobody)
                await asyncio.sleep(0.02)
        return found


@asynccontextmanager
async def ends(folder: Path, url: str, survey: bool = False) -> AsyncIterator[tuple[End, End, int]]:
    """Two agents' roads and the port on which the second one listens; the first one measures."""
    make_members(folder, [A, B])
    a, b = End(folder, A, await connect(url, A)), End(folder, B, await connect(url, B))
    _, port = await b.server.start("127.0.0.1:0")
    await a.bus.start()
    await b.bus.start()
    await settle(b.client)
    jobs = [asyncio.create_task(a.peers.ping())]
    if survey:
        jobs.append(asyncio.create_task(a.survey.run()))
    try:
        yield a, b, port
    finally:
        await end(jobs)
        await a.peers.stop()
        await b.server.stop()
        await a.client.close()
        await b.client.close()


def frame(size: int) -> Frame:
    """A frame of about `size` bytes."""
    return Failure("d", 1, 0, (), "b", "internal", "x" * size)


def is_direct(estimate: LinkEstimate | None) -> bool:
    return estimate is not None and estimate.direct


async def test_large_frames_measure_the_goodput_and_small_ones_do_not(tmp_path: Path, shared_nats_url: str) -> None:
    async with ends(tmp_path, shared_nats_url) as (a, b, port):
        a.learn(B, f"127.0.0.1:{port}")
        a.peers.send(B, frame(100))
        found = await a.until(B, is_direct)
        assert found is not None
        assert found.goodput_bytes_per_s is None, "the link is in use, and nothing large passed"
        assert found.up
        a.peers.send(B, frame(4 * TRANSFER_BYTES))
        found = await a.until(B, lambda e: e is not None and e.goodput_bytes_per_s is not None)
        assert found is not None
        assert found.goodput_bytes_per_s is not None
        assert found.goodput_bytes_per_s > 1e6
        assert b.received > 4 * TRANSFER_BYTES, "the measurement is a real frame's"


async def test_an_idle_link_is_probed_with_what_reaches_nobody(tmp_path: Path, shared_nats_url: str) -> None:
    async with ends(tmp_path, shared_nats_url) as (a, b, port):
        a.learn(B, f"127.0.0.1:{port}")
        a.peers.warm((B,))
        await a.until(B, lambda e: e is not None and e.goodput_bytes_per_s is not None)
        found = await a.until(B, lambda e: e is not None and e.jitter_ms is not None)
        assert found is not None
        assert found.direct
        assert b.received == 0


async def test_a_slow_roads_rate_and_delay_are_found(tmp_path: Path, shared_nats_url: str) -> None:
    rate, delay_s = 4e6, 0.02
    async with ends(tmp_path, shared_nats_url, survey=True) as (a, _, port):
        road = Road(port, rate, delay_s / 16)
        a.learn(B, await road.open())
        found = await a.until(B, lambda e: e is not None and e.goodput_bytes_per_s is not None)
        await road.close()
        assert found is not None
        assert found.goodput_bytes_per_s is not None
        assert road.passed_bytes_per_s / 4 < found.goodput_bytes_per_s < 1.25 * rate
        assert found.rtt_ms > 2 * delay_s / 16 * 1e3


async def test_a_peer_that_one_sends_nothing_to_is_called_on_and_left(tmp_path: Path, shared_nats_url: str) -> None:
    async with ends(tmp_path, shared_nats_url, survey=True) as (a, b, port):
        road = Road(port)
        a.learn(B, await road.open())
        found = await a.until(B, is_direct)
        assert found is not None
        assert found.up
        assert found.goodput_bytes_per_s is not None
        assert a.changes == [], "a call is not a link that came up"
        assert b.received == 0
        assert road.calls == 1
        assert a.news == 1
        await road.close()


@pytest.mark.slow
async def test_a_cut_between_two_nodes_is_not_the_loss_of_one(
    tmp_path: Path, shared_nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked over the bus twice a second and not every five, a peer that answers nothing is known sooner to be gone.
    monkeypatch.setattr(peers, "BUS_PING_EVERY_S", 0.5)
    monkeypatch.setattr(peers, "ANSWER_LATEST_S", 3.0)
    async with ends(tmp_path, shared_nats_url) as (a, b, port):
        road = Road(port)
        address = await road.open()
        a.learn(B, address)
        a.peers.warm((B,))
        await a.until(B, is_direct)
        road.cut()
        cut = await a.until(B, lambda e: e is not None and not e.up)
        assert cut is not None
        assert (cut.direct, cut.goodput_bytes_per_s) == (False, None)
        assert cut.rtt_ms < 1000, "over the bus it answers as ever"
        road.mend()
        a.peers.send(B, frame(100))
        mended = await a.until(B, is_direct)
        assert mended is not None
        assert mended.up
        await b.client.close()  # the node itself is gone: it answers neither here nor there
        await b.server.stop()
        await road.close()
        assert await a.until(B, lambda e: e is None) is None


async def test_a_link_that_swallows_frames_is_left_for_the_bus(tmp_path: Path, shared_nats_url: str) -> None:
    async with ends(tmp_path, shared_nats_url) as (a, b, port):
        road = Road(port)
        a.learn(B, await road.open())
        a.peers.send(B, frame(100))
        await a.until(B, is_direct)
        road.cut()
        async with asyncio.timeout(WAIT_S):
            while (B, False) not in a.changes:  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.02)
        before = b.received
        for _ in range(3):
            a.peers.send(B, frame(100))
        async with asyncio.timeout(WAIT_S):
            while b.received < before + 300:  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.02)
        await road.close()


async def test_a_link_is_left_as_soon_as_its_peer_goes_round_it(
    tmp_path: Path, shared_nats_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(links, "SILENT_AFTER_S", 1000.0)  # by itself it would never notice
    async with ends(tmp_path, shared_nats_url) as (a, b, port):
        road = Road(port)
        a.learn(B, await road.open())
        a.peers.send(B, frame(100))
        await a.until(B, is_direct)
        b.peers.send(A, frame(100))  # whose address it does not know
        async with asyncio.timeout(WAIT_S):
            while not a.received:  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.02)
        await asyncio.sleep(2 * links.DOUBTED_AFTER_S)
        assert a.changes == [(B, True)], "it answers"
        _, back_port = await a.server.start("127.0.0.1:0")
        back = Road(back_port)
        b.learn(A, await back.open())
        b.peers.send(A, frame(100))
        async with asyncio.timeout(WAIT_S):
            while (A, True) not in b.changes:  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.02)
        road.cut()
        await asyncio.sleep(links.PING_EVERY_S)
        taken = a.received
        await back.close()  # what B has notices at once, and says so
        async with asyncio.timeout(WAIT_S):
            while (B, False) not in a.changes:  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.02)
        assert a.received == taken, "that is no frame"
        await road.close()
        await b.peers.stop()
        await a.server.stop()


async def test_a_peer_without_an_address_is_measured_over_the_bus(tmp_path: Path, shared_nats_url: str) -> None:
    async with ends(tmp_path, shared_nats_url, survey=True) as (a, _, _):
        a.learn(B, None)
        found = await a.until(B, lambda e: e is not None)
        assert found is not None
        assert (found.direct, found.up, found.goodput_bytes_per_s) == (False, True, None)


async def test_a_peer_that_was_never_heard_is_nobody(tmp_path: Path, shared_nats_url: str) -> None:
    async with ends(tmp_path, shared_nats_url) as (a, b, port):
        assert a.peers.estimates() == ()
        assert a.peers.to_visit() == {}
        await b.client.close()
        a.learn(B, f"127.0.0.1:{port}")
        assert a.peers.to_visit() == {B: f"127.0.0.1:{port}"}
        assert a.of(B) is None


async def test_a_probe_is_answered_to_an_inbox_and_nowhere_else(tmp_path: Path, shared_nats_url: str) -> None:
    async with ends(tmp_path, shared_nats_url) as (a, _, _):
        heard: list[str] = []

        async def note(message: object) -> None:
            heard.append(getattr(message, "subject", ""))

        cancel = "resplit.v1.cancel.somebodys"
        inbox = a.client.new_inbox()
        await a.client.subscribe(cancel, cb=note)
        await a.client.subscribe(inbox, cb=note)
        for reply in ("", cancel, inbox):
            await a.client.publish(subjects.activation(B), b"", reply=reply)
        async with asyncio.timeout(WAIT_S):
            while inbox not in heard:  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.02)
        assert heard == [inbox], "B answers in order, so what it sent elsewhere would be here"


async def test_a_probe_that_a_node_answers_is_no_loss_and_one_that_the_broker_answers_is(
    tmp_path: Path, shared_nats_url: str
) -> None:
    nobody = NodeId("nobody")
    async with ends(tmp_path, shared_nats_url) as (a, _, _):
        for node in (B, nobody, B, nobody):
            await a.bus.probe(node)
        async with asyncio.timeout(WAIT_S):
            while len(a.unreached) < 2:  # noqa: ASYNC110 (as above)
                await asyncio.sleep(0.02)
        assert a.unreached == [nobody, nobody]


async def test_a_heartbeat_names_a_bounded_number_of_peers_the_nearest_first(
    tmp_path: Path, shared_nats_url: str
) -> None:
    async with ends(tmp_path, shared_nats_url) as (a, _, _):
        for i in range(2 * ESTIMATES_MAX):
            name = NodeId(f"n{i}")
            a.learn(name, "127.0.0.1:1")
            history = a.peers.history(name)
            now = time.monotonic()
            a.peers.visited(name, history.round_trip(now - i / 1e3, now))
        found = [estimate.rtt_ms for estimate in a.peers.estimates()]
        assert len(found) == ESTIMATES_MAX
        assert found == sorted(found)
        assert found[-1] < ESTIMATES_MAX


async def test_agents_that_serve_nothing_report_each_other(tmp_path: Path) -> None:
    Store(tmp_path / "store").blobs_folder.mkdir(parents=True, exist_ok=True)
    async with LocalCluster(tmp_path / "cluster", tmp_path / "store", 2, threads=1) as cluster:
        names = [NodeId("n0"), NodeId("n1")]
        identity = load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR)
        known: dict[NodeId, Capacity] = {}
        all_known = asyncio.Event()
        client = await cluster.operator.connect("test", "operator")

        async def note(message: object) -> None:
            capacity = read_capacity(open_heartbeat(getattr(message, "data", b""), identity), identity)
            assert capacity is not None
            known[NodeId(capacity.node)] = capacity
            if all(name in known and known[name].links for name in names):
                all_known.set()

        await client.subscribe(subjects.ALL_CAPACITY, cb=note)
        async with asyncio.timeout(2 * WAIT_S):
            await all_known.wait()
        await client.close()
        for name in names:
            [link] = known[name].links
            assert link.peer != name
            assert (link.direct, link.up) == (True, True)
            assert link.goodput_bytes_per_s is not None
            assert PROBE_BYTES / link.goodput_bytes_per_s < 1
            assert known[name].disk_free_bytes > 0
