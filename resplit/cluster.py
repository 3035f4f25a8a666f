"""A cluster on one machine: NATS servers, orchestrators and agents, each a process as an operator would run it."""

import asyncio
import fcntl
import os
import shutil
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import IO, Literal, Self

from nats.aio.client import Client as Nats

from bus.cluster_folder import SERVERS as SERVERS_FOLDER
from bus.following import publish_roster
from bus.founding import load_holder
from bus.identity import ORCHESTRATOR
from bus.natsconf import LOGINS_FILE
from bus.server_certificate import SERVER_CERTIFICATE, server_files
from bus.servers import Ports, make_servers, routes_of
from bus.together import CLIENT, CLUSTER, OBSERVER, OPERATOR, add_member, make_members, renew_if_due
from resplit.access import Access
from resplit.child import Child
from resplit.reported import (
    Heard,
    hear_capacity,
    unless_one_ends,
    until_healthy,
    until_heard,
    until_known,
    until_orchestrating,
)
from resplit.server import HOST, MAX_PAYLOAD_BYTES, NATS, NatsServer
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

GATEWAY = "gateway"
"""Its name among the processes of a cluster."""
SERVERS = {1: (NATS,), 3: (NATS, f"{NATS}-b", f"{NATS}-c")}
"""Their names among the processes of a cluster."""


@dataclass(frozen=True)
class Place:
    """Where a process runs if not straight on this machine: in a network namespace, say."""

    enter: tuple[str, ...] = ()
    """Goes before its command. It must become that command, as `nsenter` does, and not start it as a child."""
    host: str | None = None
    """The address that others reach it at; None: at this machine's own."""
    url: str | None = None
    """Where it finds the NATS server; None: where that listens."""


class LocalCluster:
    """`agents` agents `n0`, `n1`, ... with orchestrators and NATS servers of their own, in `folder`.

        async with LocalCluster(folder, store) as cluster, Client(cluster.url, keys=cluster.client_keys) as client:
            await control.deploy_and_wait(cluster.operator, ...)

    Each agent has a store of its own in its folder and fetches what it needs; the orchestrators
    (`orchestrator`, `orchestrator-1`, ...) read `store`. Entering waits until every process has reported, and
    raises `ResplitError` with the end of its log if one dies before. Leaving ends and awaits every process,
    forcibly after a bounded time; should this process itself be killed, the kernel ends them. Unless `threads`
    says otherwise, agents share the machine's cores evenly. `cores[i]` pins agent i. `places` says where agents,
    orchestrators and, where there are several, NATS servers run that do not run straight on this machine, `host` where
    the NATS server listens, `keep` which deployments on demand stay loaded, `servers` how many NATS servers are one (1,
    or 3: `nats`, `nats-b`, `nats-c`), and `clouds` is a file of endpoints that agents may ask. With `http_port` a
    gateway serves HTTP at that port of this machine, and 0 takes one that is free; `monitored`: the (first) NATS server
    says at `monitor_url` who is connected. Keys and what the processes stored stay in `folder` for the next start.
    """

    def __init__(
        self,
        folder: Path,
        store: Path,
        agents: int = 3,
        *,
        host: str = HOST,
        port: int | None = None,
        places: Mapping[str, Place] | None = None,
        provider: str = "cpu",
        cores: Sequence[Sequence[int]] | None = None,
        threads: int | None = None,
        memory_bytes: int | None = None,
        disk_bytes: int | None = None,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        orchestrators: int = 1,
        servers: int = 1,
        keep: Literal["worth", "recent"] = "worth",
        clouds: Path | None = None,
        http_port: int | None = None,
        monitored: bool = False,
        verbose: bool = False,
    ) -> None:
        for field, count in (("agents", agents), ("orchestrators", orchestrators)):
            if count < 1:
                raise ResplitError(ErrorCode.INVALID_REQUEST, f"a cluster needs {field}, not {count}", field)
        if cores is not None and len(cores) != agents:
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"{len(cores)} core lists for {agents} agents", "cores")
        if servers not in SERVERS:
            raise ResplitError(
                ErrorCode.INVALID_REQUEST, f"one or three NATS servers make a cluster, not {servers}", "servers"
            )
        self.folder = folder.absolute()
        self.store = store.absolute()
        self.agents = tuple(NodeId(f"n{i}") for i in range(agents))
        self.orchestrators = (ORCHESTRATOR, *(NodeId(f"{ORCHESTRATOR}-{i}") for i in range(1, orchestrators)))
        self._provider = provider
        self._cores = cores
        self._threads = threads or max(1, len(os.sched_getaffinity(0)) // agents)
        self._memory_bytes = memory_bytes
        self._disk_bytes = disk_bytes
        self._keep = keep
        self._clouds = clouds
        self._http_port = http_port
        self._verbose = verbose
        self._places = {} if places is None else dict(places)
        self._host = host
        self._servers = {
            one.name: one for one in self._nats_servers(SERVERS[servers], port, max_payload_bytes, monitored)
        }
        self._children: dict[str, Child] = {name: server.child for name, server in self._servers.items()}
        self._lock: IO[str] | None = None

    @property
    def url(self) -> str:
        """Where clients connect: the servers, with commas between."""
        return ",".join(server.url for server in self._servers.values())

    @property
    def keys(self) -> Path:
        """The folders of the cluster's root and of each member."""
        return self.folder / "keys"

    @property
    def operator_keys(self) -> Path:
        """The folder of the member that deploys and asks, and whose keys people verify with."""
        return self.keys / OPERATOR

    @property
    def client_keys(self) -> Path:
        """The folder of the member that sends requests: `Client(cluster.url, keys=cluster.client_keys)`."""
        return self.keys / CLIENT

    @property
    def observer_keys(self) -> Path:
        """The folder of the member that watches."""
        return self.keys / OBSERVER

    @property
    def http_url(self) -> str:
        """Where the gateway serves HTTP."""
        assert self._http_port, "the cluster was told to have a gateway, and has been started"
        return f"http://{HOST}:{self._http_port}"

    @property
    def monitor_url(self) -> str:
        """Where the NATS server says over HTTP who is connected; another after each start of it."""
        return self._servers[NATS].monitor_url

    @property
    def operator(self) -> Access:
        """The way in for whoever deploys, drains and asks."""
        return Access(self.url, self.operator_keys)

    @property
    def processes(self) -> dict[str, int]:
        """The running processes: name -> pid."""
        return {name: child.pid for name, child in self._children.items() if child.pid is not None}

    def log(self, name: str) -> Path:
        """The log file of a process."""
        return self._children[name].log

    async def __aenter__(self) -> Self:
        self._lock_folder()
        try:
            self._make_keys()
            await asyncio.gather(*(server.start() for server in self._servers.values()))
            self._children |= {name: self._orchestrator(name) for name in self.orchestrators}
            self._children |= {node: self._agent(i, node) for i, node in enumerate(self.agents)}
            await self._start_and_await(self.orchestrators)
            await self._start_and_await(self.agents)
            if self._http_port is not None:
                self._http_port = self._http_port or free_port()
                self._children[GATEWAY] = self._gateway()
                await self._start_gateway()
        except BaseException:
            await self._stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stop()

    async def join(self) -> NodeId:
        """Start one more agent than there are, and wait until it has reported."""
        node = NodeId(f"n{len(self.agents)}")
        if not (self.keys / node).exists():
            await self._enrol(node)
        self._children[node] = self._agent(len(self.agents), node)
        self.agents = (*self.agents, node)
        await self._start_and_await([node])
        return node

    async def reload(self) -> None:
        """Let the servers know who belongs by now, and wait until they do."""
        await asyncio.gather(*(one.reload() for one in self._servers.values() if one.child.pid is not None))

    async def start(self, name: str) -> None:
        """Start a process that was killed, and wait until it is back."""
        if name in self._servers:
            await self._servers[name].start()
        elif name == GATEWAY:
            await self._start_gateway()
        else:
            await self._start_and_await([name])

    async def kill(self, name: str) -> None:
        """Kill a process as a power cut would."""
        await self._children[name].kill()

    async def stop(self, name: str) -> None:
        """End a process as an operator would (SIGTERM), and wait until it has."""
        await self._children[name].stop()

    async def pause(self, name: str) -> None:
        """Stop a process where it is (SIGSTOP), as if its machine hung."""
        self._children[name].pause()

    async def resume(self, name: str) -> None:
        """Let a paused process go on (SIGCONT)."""
        self._children[name].resume()

    async def first_to_end(self) -> tuple[str, ResplitError]:
        """Wait until one of the processes that run now ends: its name, and how it ended."""
        waits = {asyncio.ensure_future(c.ended()): c for c in self._children.values() if c.pid is not None}
        try:
            done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        first = done.pop()
        return waits[first].name, waits[first].died(first.result())

    async def _start_and_await(self, names: Sequence[str]) -> None:
        watch = await self.operator.connect("resplit-cluster", "operator")
        try:
            heard = await hear_capacity(watch)
            children = [self._children[name] for name in names]
            for child in children:
                await child.start()
            await unless_one_ends(children, self._until_there(watch, heard, names))
        finally:
            await watch.close()

    async def _until_there(self, watch: Nats, heard: Heard, names: Sequence[str]) -> None:
        orchestrators = frozenset(names).intersection(self.orchestrators)
        if orchestrators:
            await until_orchestrating(watch, orchestrators)
        agents = [name for name in names if name not in orchestrators]
        await until_heard(heard, agents)
        if agents:
            await until_known(watch, agents)

    async def _start_gateway(self) -> None:
        child = self._children[GATEWAY]
        await child.start()
        await unless_one_ends([child], until_healthy(self.http_url))

    async def _stop(self) -> None:
        others = [child for name, child in self._children.items() if name not in self._servers]
        try:
            await asyncio.gather(*(child.stop() for child in others))
            await asyncio.gather(*(server.child.stop() for server in self._servers.values()))
        finally:
            for child in self._children.values():
                await child.kill()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def _lock_folder(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = (self.folder / "lock").open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            message = f"another cluster runs in {self.folder}; stop it or choose another folder"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "folder") from error
        self._lock = lock

    def _make_keys(self) -> None:
        if not (self.keys / CLUSTER / SERVER_CERTIFICATE).exists():
            # Made beside and put in place whole: one that was interrupted, or is of an earlier release, is of no use.
            fresh = self.folder / "keys.new"
            for folder in (fresh, self.keys):
                shutil.rmtree(folder, ignore_errors=True)
            make_members(fresh, self.agents, hosts=[self._host])
            fresh.rename(self.keys)
        renew_if_due(self.keys, self._host)
        if len(self._servers) > 1:
            key = load_holder(self.keys / CLUSTER / "root-0.key").authority
            make_servers(self.keys / CLUSTER, self._server_hosts(self._servers), key, now=datetime.now(UTC))
        if not self.observer_keys.exists():  # made by an earlier release
            add_member(self.keys, OBSERVER, "observer", None)
        for node in self.agents:
            if not (self.keys / node).exists():
                add_member(self.keys, node, "agent", "trusted")

    async def _enrol(self, node: NodeId) -> None:
        roster = add_member(self.keys, node, "agent", "trusted")
        await self.reload()
        connection = await self.operator.connect("resplit-cluster", "operator")
        try:
            await publish_roster(connection.jetstream(), roster)
        finally:
            await connection.close()

    def _nats_servers(
        self, names: Sequence[str], port: int | None, max_payload_bytes: int, monitored: bool
    ) -> Iterator[NatsServer]:
        """One, or several that are one, each in a folder of its name."""
        cluster = self.keys / CLUSTER
        if len(names) == 1:
            yield NatsServer(
                self.folder / NATS,
                self._logins,
                server_files(cluster),
                port,
                max_payload_bytes,
                self._host,
                monitored=monitored,
            )
            return
        hosts = self._server_hosts(names)
        given = None if port is None or port < 0 else port
        ports = {
            name: Ports(host)  # nobody else is where it is
            if name in self._places
            else Ports(host, (given if name == NATS else None) or free_port(host), free_port(host))
            for name, host in hosts.items()
        }
        for name, host in hosts.items():
            yield NatsServer(
                self.folder / name,
                self._logins,
                server_files(cluster / SERVERS_FOLDER / name),
                ports[name].clients,
                max_payload_bytes,
                host,
                name=name,
                routes=routes_of(name, hosts, ports),
                enter=self._place(name).enter,
                monitored=monitored,
            )

    def _server_hosts(self, names: Iterable[str]) -> dict[str, str]:
        return {name: self._place(name).host or self._host for name in names}

    def _logins(self) -> str:
        """Whom the server lets in."""
        return (self.keys / CLUSTER / LOGINS_FILE).read_text()

    def _orchestrator(self, name: NodeId) -> Child:
        return self._child(name, ["orchestrator", "--id", name, "--keep", self._keep], self.store)

    def _agent(self, index: int, node: NodeId) -> Child:
        arguments = ["agent", node, "--provider", self._provider, "--threads", str(self._threads)]
        if self._memory_bytes is not None:
            arguments += ["--memory", str(self._memory_bytes)]
        if self._disk_bytes is not None:
            arguments += ["--disk", str(self._disk_bytes)]
        if self._clouds is not None:
            arguments += ["--clouds", str(self._clouds.absolute())]
        if self._cores is not None:
            arguments += ["--cores", ",".join(map(str, self._cores[index]))]
        if (host := self._place(node).host) is not None:
            arguments += ["--listen", f"{host}:0"]
        return self._child(node, arguments, self.folder / node / "store")

    def _place(self, name: str) -> Place:
        return self._places.get(name, Place())

    def _gateway(self) -> Child:
        arguments = ["gateway", "--listen", f"{HOST}:{self._http_port}", "--watch-keys", str(self.observer_keys)]
        keys = ["--url", self.url, "--keys", str(self.client_keys)]
        verbose = ["--verbose"] if self._verbose else []
        return Child(
            GATEWAY,
            [sys.executable, "-m", "resplit", *arguments, *keys, *verbose],
            self.folder / GATEWAY / "log",
        )

    def _child(self, name: NodeId, arguments: Sequence[str], store: Path) -> Child:
        keys = self.keys / (ORCHESTRATOR if name in self.orchestrators else name)
        place = self._place(name)
        common = ["--url", place.url or self.url, "--keys", str(keys), "--store", str(store)]
        verbose = ["--verbose"] if self._verbose else []
        command = [*place.enter, sys.executable, "-m", "resplit", *arguments, *common, *verbose]
        return Child(name, command, self.folder / name / "log")


def free_port(host: str = HOST) -> int:
    """A port of this machine on which nobody listens now."""
    with socket.create_server((host, 0)) as found:
        return int(found.getsockname()[1])
