"""What some faults take besides a cluster: wires, small disks, clocks that can be set, a slow way to NATS."""

import asyncio
import os
import random
import shutil
import struct
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from benchmarks.faults.owned import OwnedCluster
from benchmarks.faults.wires import Wires, why_not
from bus.identity import ORCHESTRATOR
from resplit.cluster import SERVERS, Place, free_port
from resplit.server import HOST
from schemas.base import NodeId
from schemas.errors import ResplitError

AGENTS = 3
NODES = tuple(NodeId(f"n{i}") for i in range(AGENTS))
SERVER_ENDS = {name: NodeId(end) for name, end in zip(SERVERS[3], "abc", strict=True)}
"""The end of a wire that each of three servers is at."""
SPARE_BYTES = 4096
"""What is left of a disk that is full: it takes the name of a file, and nothing in it."""
PIECE_BYTES = 1 << 16
SECONDS = struct.Struct("=q")


class SkippedError(Exception):
    """This fault cannot be tried here; the reason is its text."""


@dataclass(frozen=True)
class Needs:
    """What a fault's cluster is to have."""

    orchestrators: int = 1
    memory_bytes: int | None = None
    """Of each agent."""
    servers: int = 1
    """NATS servers that are one."""
    wires: Literal["agents", "servers"] | None = None
    """Who is in network namespaces of their own: agents, or the servers where there are several."""
    disks: Mapping[str, int] = field(default_factory=dict)
    """Folders of the cluster that are disks of their own, and how many bytes they have."""
    clocks: bool = False
    """Every process has a wall clock that can be set."""
    detour: bool = False
    """Each agent reaches NATS by a way that can be slowed."""
    watched: bool = False
    """A gateway, and a NATS server that tells who is connected."""


@dataclass(frozen=True)
class Surroundings:
    """A cluster, and what its fault needs."""

    cluster: OwnedCluster
    wired: Wires | None
    disks: Mapping[str, "Disk"]
    clocks: "Clocks | None"
    detours: Mapping[NodeId, "Detour"]


@asynccontextmanager
async def surrounded(needs: Needs, folder: Path, store: Path) -> AsyncIterator[Surroundings]:
    """The cluster of a fault, with all its processes running; raises `SkippedError` where it cannot be had."""
    async with AsyncExitStack() as stack:
        wires = None
        if needs.wires is not None:
            ends = NODES if needs.wires == "agents" else tuple(SERVER_ENDS.values())
            wires = await stack.enter_async_context(_wires(folder / "wires", ends))
        clocks = await stack.enter_async_context(Clocks(folder / "clocks")) if needs.clocks else None
        disks = {
            name: await stack.enter_async_context(Disk(folder / "cluster" / name, size))
            for name, size in needs.disks.items()
        }
        port = free_port()
        detours = {node: await stack.enter_async_context(Detour(port)) for node in (NODES if needs.detour else ())}
        places: dict[str, Place] = {}
        if wires is not None and needs.wires == "agents":
            places |= wires.places
        elif wires is not None:
            places |= {name: wires.places[end] for name, end in SERVER_ENDS.items()}
        if clocks is not None:
            names = (*NODES, ORCHESTRATOR, *(NodeId(f"{ORCHESTRATOR}-{i}") for i in range(1, needs.orchestrators)))
            places |= {name: Place(clocks.enter(name)) for name in names}
        places |= {node: Place(url=detour.url) for node, detour in detours.items()}
        cluster = await stack.enter_async_context(
            OwnedCluster(
                folder / "cluster",
                store,
                AGENTS,
                host=wires.host if wires is not None and needs.wires == "agents" else HOST,
                port=port,
                places=places,
                threads=1,
                memory_bytes=needs.memory_bytes,
                orchestrators=needs.orchestrators,
                servers=needs.servers,
                http_port=0 if needs.watched else None,
                monitored=needs.watched,
            )
        )
        yield Surroundings(cluster, wires, disks, clocks, detours)


@asynccontextmanager
async def _wires(folder: Path, ends: Sequence[NodeId]) -> AsyncIterator[Wires]:
    if (why := why_not()) is not None:
        raise SkippedError(why)
    async with AsyncExitStack() as stack:
        try:
            wires = await stack.enter_async_context(Wires(folder, ends))
        except ResplitError as error:
            raise SkippedError(f"no network namespaces here: {error.message}") from error
        yield wires


class Disk:
    """A folder that is a disk of its own (tmpfs), which can be filled."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self._size_bytes = size_bytes

    async def __aenter__(self) -> Self:
        if os.geteuid() != 0 or (mount := shutil.which("mount")) is None:
            raise SkippedError("small disks take root, and the program mount")
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if await _status(mount, "-t", "tmpfs", "-o", f"size={self._size_bytes},mode=0700", "tmpfs", str(self.folder)):
            raise SkippedError("no disk can be mounted here")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await _status("umount", "--lazy", str(self.folder))

    @property
    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free

    def fill(self) -> None:
        """Leave no room in it, as another program may."""
        with self._ballast.open("ab") as file:
            while (room := self.free_bytes - SPARE_BYTES) > 0:
                try:
                    os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, room)
                except OSError:  # others write, too
                    return

    def free(self) -> None:
        """Take away what `fill` put there."""
        self._ballast.unlink(missing_ok=True)

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"


class Clocks:
    """A wall clock for each process, which can be set while it runs; what it measures durations by is left alone."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._library = folder / "wallclock.so"

    async def __aenter__(self) -> Self:
        if (compiler := shutil.which("cc")) is None:
            raise SkippedError("clocks that can be set take a C compiler")
        self._folder.mkdir(parents=True)
        source = Path(__file__).with_name("wallclock.c")
        if await _status(compiler, "-O2", "-shared", "-fPIC", "-o", str(self._library), str(source), "-ldl"):
            raise SkippedError(f"{compiler} cannot make {source.name}")
        return self

    async def __aexit__(self, *_: object) -> None:
        return None

    def enter(self, name: NodeId) -> tuple[str, ...]:
        """What goes before the command of a process."""
        (self._folder / name).write_bytes(bytes(SECONDS.size))
        return "/usr/bin/env", f"LD_PRELOAD={self._library}", f"WALLCLOCK_FILE={self._folder / name}"

    def set(self, name: str, ahead_s: int) -> None:
        """From now on the clock of this process is so far ahead of the right time."""
        with (self._folder / name).open("r+b") as file:  # in place: it is mapped
            file.write(SECONDS.pack(ahead_s))


class Detour:
    """A way to the NATS server at `port` of this machine, on which everything can be delayed."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server: asyncio.Server | None = None
        self._delay_s: tuple[float, float] = (0.0, 0.0)
        self._draw = random.Random(port)
        self._carrying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._taken, HOST, 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._carrying:
            task.cancel()
        await asyncio.gather(*self._carrying, return_exceptions=True)

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"nats://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def delay(self, least_s: float = 0.0, most_s: float = 0.0) -> None:
        """From now on whatever goes this way, either way, comes so much later, in the order in which it went."""
        self._delay_s = least_s, most_s

    async def _taken(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there, back = await asyncio.open_connection(HOST, self._port)
        except OSError:  # the server is away, and so is the way to it
            writer.close()
            return
        for source, target in ((reader, back), (there, writer)):
            task = asyncio.create_task(self._carry(source, target))
            self._carrying.add(task)
            task.add_done_callback(self._carrying.discard)

    async def _carry(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

        async def arrive() -> None:
            while True:
                due, data = await under_way.get()
                await asyncio.sleep(max(0.0, due - loop.time()))
                if not data:
                    return
                target.write(data)
                await target.drain()

        arriving = asyncio.create_task(arrive())
        try:
            with suppress(OSError):
                while data := await source.read(PIECE_BYTES):
                    under_way.put_nowait((loop.time() + self._draw.uniform(*self._delay_s), data))
            under_way.put_nowait((loop.time(), b""))
            with suppress(OSError):
                await arriving
        finally:
            arriving.cancel()
            target.close()


async def _status(program: str, *arguments: str) -> int:
    quiet = asyncio.subprocess.DEVNULL
    process = await asyncio.create_subprocess_exec(program, *arguments, stdout=quiet, stderr=quiet)
    return await process.wait()
