"""A hub and a site that is the home of deployments, on one machine: real servers, orchestrators and agents, and between
the two servers a link that can be cut."""

import asyncio
import contextlib
import random
import shutil
import socket
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Self

from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

import models
from bus.connection import connect, settle
from bus.founding import load_holder
from bus.identity import load_credentials, load_identity, orchestrator_of
from bus.natsconf import SERVER_FILE
from bus.sealed_plans import open_event
from bus.servers import Ports, make_leaf, make_servers
from bus.streams import stored_messages
from bus.succession import lives, read_life
from bus.together import CLIENT, CLUSTER, OPERATOR, add_member, make_members
from resplit import control
from resplit.access import Access
from resplit.child import Child
from resplit.client import Client
from resplit.replies import RequestError
from schemas import subjects
from schemas.audit import AuditEvent
from schemas.base import DeploymentName, Home, NodeId, SiteId
from schemas.control import DeployRequest, StatusReply
from schemas.deployment import Settings, Stage
from schemas.envelope import AUDIT_TYPE, PLAN_TYPE, open_envelope
from schemas.errors import ResplitError
from schemas.plan import PlanEvent
from schemas.section import SealedEvent
from tests.conftest import nats_server_binary

LOOPBACK = "127.0.0.1"
KITCHEN = SiteId("kitchen")
HUB_SUM, SITE_SUM = DeploymentName("sum"), DeploymentName("kitchen/sum")
H0, K0, K1, K2 = (NodeId(name) for name in ("h0", "k0", "k1", "k2"))
HOMES = {H0: None, K0: KITCHEN, K1: KITCHEN, K2: KITCHEN}
SETTINGS = Settings(context_tokens=64)
READY_S = 90.0
POLL_S = 0.1
SILENT_S = 20.0
"""A reply that crosses the link as it goes is lost, as in any network: its client gives up after this."""


def free_port() -> int:
    with socket.create_server((LOOPBACK, 0)) as found:
        return int(found.getsockname()[1])


class Link:
    """What the site's server reaches the hub's by. While it is cut nothing passes and nobody is told, as behind a
    firewall that drops what it gets."""

    def __init__(self, to: int) -> None:
        self.port = free_port()
        self._to = to
        self._open = asyncio.Event()
        self._open.set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._joined, LOOPBACK, self.port)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        self._drop()

    def cut(self) -> None:
        self._open.clear()

    def mend(self) -> None:
        """What was held back is lost, and both ends connect anew."""
        self._drop()
        self._open.set()

    def _drop(self) -> None:
        for writer in self._writers:
            writer.transport.abort()
        for pump in self._pumps:
            pump.cancel()

    async def _joined(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        await self._open.wait()
        try:
            there, thither = await asyncio.open_connection(LOOPBACK, self._to)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(thither)
        for source, sink in ((reader, thither), (there, writer)):
            pump = asyncio.create_task(self._pump(source, sink))
            self._pumps.add(pump)
            pump.add_done_callback(self._pumps.discard)

    async def _pump(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(1 << 16):
                await self._open.wait()
                sink.write(data)
                await sink.drain()
        sink.transport.abort()


@dataclass
class Load:
    """Sums, asked for one after the other, and how each ended: right, or by a typed error; anything else fails."""

    url: str
    keys: Path
    deployment: DeploymentName
    right: list[float] = field(default_factory=list)
    """When each began, by the loop's clock."""
    refused: list[tuple[float, str]] = field(default_factory=list)
    """When, and the error's code."""
    wrong: list[str] = field(default_factory=list)

    async def run(self) -> None:
        dice = random.Random(7)
        loop = asyncio.get_running_loop()
        async with Client(self.url, keys=self.keys, idle_timeout_s=SILENT_S) as client:
            while True:
                a, b, began = dice.randrange(1000), dice.randrange(1000), loop.time()
                try:
                    async with asyncio.timeout(3 * SILENT_S):
                        answer = await client.complete(self.deployment, f"{a}+{b}=", max_tokens=8)
                    if answer.text.split("|")[0][::-1] == str(a + b):
                        self.right.append(began)
                    else:
                        self.wrong.append(f"{a}+{b}={answer.text}")
                except RequestError as error:
                    self.refused.append((began, error.code))
                except TimeoutError:
                    self.wrong.append(f"{a}+{b} never ended")
                await asyncio.sleep(0.1)

    async def rights(self, more: int, timeout_s: float = READY_S) -> None:
        """Wait until so many more that were asked from now on were answered, and right."""
        since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(timeout_s):
                while sum(at >= since for at in self.right) < more:  # noqa: ASYNC110 - a list sends no events
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise AssertionError(f"{self.deployment}: {self.refused[-5:]}, {self.wrong}") from None


class Sites:
    """The hub with the agent h0, and the site `kitchen` with k0, k1 and k2."""

    def __init__(self, folder: Path, memory_bytes: int | None = None) -> None:
        self.folder = folder
        self._memory = [] if memory_bytes is None else ["--memory", str(memory_bytes)]
        self.keys = folder / "keys"
        make_members(self.keys, [H0])
        for name, role, tier, home in (
            (orchestrator_of(KITCHEN), "orchestrator", None, KITCHEN),
            *((node, "agent", "trusted", KITCHEN) for node in (K0, K1, K2)),
        ):
            add_member(self.keys, name, role, tier, home)  # type: ignore[arg-type]
        self._store = folder / "store"
        shutil.copytree(Path(models.__path__[0]) / "adder" / "store", self._store)
        hub = Ports(LOOPBACK, free_port(), free_port(), free_port())
        site = Ports(LOOPBACK, free_port(), free_port(), free_port())
        self.link = Link(hub.leaves)
        self.url: dict[Home, str] = {
            at: f"nats://{LOOPBACK}:{one.clients}" for at, one in ((None, hub), (KITCHEN, site))
        }
        cluster, now, js = self.keys / CLUSTER, datetime.now(UTC), Path("jetstream")
        key = load_holder(cluster / "root-0.key").authority
        [hub_files] = make_servers(cluster, {"hub": LOOPBACK}, key, now=now, ports={"hub": hub}, store=js)
        conf = hub_files / SERVER_FILE  # a leaf node that is told where the hub is itself goes around the link
        conf.write_text(conf.read_text().replace("leafnodes {", "leafnodes {\n  no_advertise: true"))
        site_files = make_leaf(
            cluster, KITCHEN, LOOPBACK, [f"{LOOPBACK}:{self.link.port}"], key, now=now, ports=site, store=js
        )
        self.servers = {None: self._server("hub", hub_files), KITCHEN: self._server("site", site_files)}
        self.orchestrators = {home: self._orchestrator(home) for home in (None, KITCHEN)}
        self.agents = {node: self._agent(node) for node in HOMES}

    def operator(self, home: Home) -> Access:
        return Access(self.url[home], self.keys / OPERATOR)

    def load(self, home: Home, deployment: DeploymentName) -> Load:
        """Asked by an application where `home` is."""
        return Load(self.url[home], self.keys / CLIENT, deployment)

    @property
    def children(self) -> tuple[Child, ...]:
        return (*self.agents.values(), *self.orchestrators.values(), *self.servers.values())

    async def start(self, *nodes: NodeId) -> None:
        """Start agents, and wait until both orchestrators hear them."""
        for node in nodes:
            await self.agents[node].start()
        for home in (None, KITCHEN):
            await self.until(home, lambda seen: {one.capacity.node for one in seen.nodes}.issuperset(nodes))

    async def until(self, home: Home, true: Callable[[StatusReply], object], timeout_s: float = READY_S) -> StatusReply:
        """What the orchestrator there says once that is so."""
        last: object = None
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    try:
                        last = seen = await control.status(self.operator(home))
                    except (ResplitError, RequestError) as error:  # nobody answers yet, or leads
                        last = error
                    else:
                        if true(seen):
                            return seen
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            tails = "\n".join(f"--- {child.name}\n{child.tail()[-3000:]}" for child in self.children)
            raise AssertionError(f"{last}\n{tails}") from None

    async def deploy(
        self,
        home: Home,
        name: DeploymentName,
        placement: tuple[Stage, ...] | None = None,
        settings: Settings = SETTINGS,
    ) -> None:
        request = DeployRequest(name=name, model="adder", settings=settings, placement=placement)
        await control.deploy_and_wait(self.operator(home), request, READY_S)

    @asynccontextmanager
    async def member(self, name: NodeId, home: Home) -> AsyncIterator[Nats]:
        client = await connect(self.url[home], name, credentials=load_credentials(self.keys / name))
        try:
            yield client
        finally:
            await client.close()

    async def plans(self, home: Home) -> list[PlanEvent]:
        """Every plan event in the log there, in its order."""
        name = orchestrator_of(home)
        identity = load_identity(self.keys / name, name)
        found = []
        async with self.member(name, home) as client:
            for message in await stored_messages(client.jetstream(), subjects.STREAM_PLANS, subjects.ALL_PLANS):
                sealed, signer = open_envelope(message.data, SealedEvent, PLAN_TYPE, identity.steering(home))
                found.append(open_event(sealed, signer, identity))
        return found

    async def owed(self, deployment: DeploymentName, by: NodeId, home: Home) -> int:
        """How many accepted requests the journal of `deployment` owes an answer, as the agent `by` reads it."""
        async with self.member(by, home) as client:
            found = [await read_life(client, deployment, one.life) for one in await lives(client, deployment)]
        return sum(len(one.requests) for one in found if one.fenced_by is None)

    @asynccontextmanager
    async def trail(self, home: Home) -> AsyncIterator[list[AuditEvent]]:
        """What is written into the trail there from now on."""
        found: list[AuditEvent] = []
        name = orchestrator_of(home)
        writers = load_identity(self.keys / name, name).writers

        async def note(message: Msg) -> None:
            found.append(open_envelope(message.data, AuditEvent, AUDIT_TYPE, writers)[0])

        async with self.member(OPERATOR, home) as client:
            await client.subscribe(subjects.ALL_AUDIT, cb=note)
            await settle(client)
            yield found

    def _server(self, name: str, files: Path) -> Child:
        command = ["/bin/sh", "-c", f"cd {files} && exec {nats_server_binary()} -c {SERVER_FILE}"]
        return Child(name, command, self.folder / f"{name}.log")

    def _orchestrator(self, home: Home) -> Child:
        name = orchestrator_of(home)
        return self._resplit(name, home, ["orchestrator", "--id", name], self._store)

    def _agent(self, node: NodeId) -> Child:
        options = ["agent", node, "--threads", "1", "--provider", "cpu", *self._memory]
        return self._resplit(node, HOMES[node], options, self.folder / node)

    def _resplit(self, name: NodeId, home: Home, command: Sequence[str], store: Path) -> Child:
        common = ["--keys", str(self.keys / name), "--url", self.url[home], "--store", str(store)]
        return Child(name, [sys.executable, "-m", "resplit", *command, *common], self.folder / f"{name}.log")


@asynccontextmanager
async def homes(folder: Path, memory_bytes: int | None = None) -> AsyncIterator[Sites]:
    """Both homes, with the agent h0 alone; `memory_bytes` are what each agent may take."""
    found = Sites(folder, memory_bytes)
    async with AsyncExitStack() as stack:
        for child in found.children:
            stack.push_async_callback(child.kill)
        await stack.enter_async_context(found.link)
        for server in found.servers.values():
            await server.start()
        for orchestrator in found.orchestrators.values():
            await orchestrator.start()
        await found.start(H0)
        yield found


@asynccontextmanager
async def sites(folder: Path) -> AsyncIterator[Sites]:
    """Both homes, each with a deployment: the hub's on h0, and the site's over a route that crosses the link."""
    async with homes(folder) as found:
        await found.deploy(None, HUB_SUM)
        await found.start(K0)
        await found.deploy(KITCHEN, SITE_SUM, (Stage(node=H0, first=0, last=4), Stage(node=K0, first=5, last=9)))
        await found.start(K1, K2)
        await control.place(found.operator(KITCHEN), SITE_SUM, None)  # from now on it may move, where that is worth it
        yield found


@asynccontextmanager
async def asking(*loads: Load) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(load.run()) for load in loads]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
