"""Agents in network namespaces of their own, with a wire between each two and one from each to this machine.

Each namespace is held by a process that sleeps in it; once that and the agent in it have ended, however they end, the
kernel takes the namespace away with its wires. So nothing is left behind, and nothing else on this machine is touched.

A wire is cut without a word: packets go to a hardware address that nobody has, so that neither end hears of it, and the
kernel sends again what was under way once it is mended, as after a switch that hung. Linux' `tbf` makes a wire slow.
"""

import asyncio
import itertools
import os
import shutil
from collections.abc import Sequence
from contextlib import AsyncExitStack
from pathlib import Path
from types import TracebackType
from typing import Self

from resplit.child import Child
from resplit.cluster import Place
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

TOOLS = ("ip", "tc", "nsenter", "unshare")
NOBODY = "02:00:00:00:00:66"
"""A hardware address that no interface has."""
MACHINE = "machine"
"""The end of a wire that is this machine itself, where the broker, the orchestrators and the clients are."""
ENTERED_S = 5.0
POLL_S = 0.01
_numbers = itertools.count()
BURST_BYTES = 4000
QUEUED_S = 0.4
"""What a slow wire keeps waiting at most; the rest is dropped, and sent again."""


def why_not() -> str | None:
    """Why there can be no namespaces here, if so."""
    if os.geteuid() != 0:
        return "network namespaces take root"
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    return f"there is no {', '.join(missing)} here (packages iproute2 and util-linux)" if missing else None


class Wires:
    """Namespaces for `nodes`, wired to each other and to this machine; raises `ResplitError` if that cannot be done."""

    def __init__(self, folder: Path, nodes: Sequence[NodeId]) -> None:
        # Namespaces go a moment after their processes, and other benchmarks may run beside this one.
        number = os.getpid() + next(_numbers)
        net = f"10.{200 + number % 50}.{number // 50 % 250}"
        self._prefix = f"rs{number}"
        self._address: dict[str, str] = {MACHINE: f"{net}.254"}
        self._address |= {node: f"{net}.{i}" for i, node in enumerate(nodes, 1)}
        self._holders = {
            node: Child(
                f"{node}'s namespace", [_program("unshare"), "--net", "sleep", "infinity"], folder / f"{node}.namespace"
            )
            for node in nodes
        }
        self._stack = AsyncExitStack()

    @property
    def host(self) -> str:
        """Where the broker is to listen."""
        return self._address[MACHINE]

    @property
    def places(self) -> dict[str, Place]:
        """Where they are to run."""
        return {node: Place(self._inside(node), self._address[node]) for node in self._holders}

    async def __aenter__(self) -> Self:
        async with AsyncExitStack() as stack:
            for holder in self._holders.values():
                stack.push_async_callback(holder.kill)
                await holder.start()
            for node in self._holders:
                await self._entered(node)
                await self._ip(node, "link", "set", "lo", "up")
                await self._ip(node, "addr", "add", f"{self._address[node]}/32", "dev", "lo")
            for one, other in itertools.combinations((MACHINE, *self._holders), 2):
                await self._lay(one, other)
            self._stack = stack.pop_all()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def cut(self, one: str, other: str) -> None:
        """Let nothing through between two ends, either way."""
        for here, there in ((one, other), (other, one)):
            away = ("to", self._address[there], "lladdr", NOBODY, "nud", "permanent")
            await self._ip(here, "neigh", "replace", *away, "dev", self._device(here, there))

    async def mend(self, one: str, other: str) -> None:
        """Let everything through again that `cut` stopped."""
        for here, there in ((one, other), (other, one)):
            await self._ip(here, "neigh", "del", self._address[there], "dev", self._device(here, there))

    async def cut_off(self, node: str) -> None:
        """Let nothing reach a node, nor leave it."""
        for other in self._others(node):
            await self.cut(node, other)

    async def take_back(self, node: str) -> None:
        """Undo `cut_off`."""
        for other in self._others(node):
            await self.mend(node, other)

    async def slow(self, one: str, other: str, bytes_per_s: int) -> None:
        """Carry no more than this between two nodes, either way; what waits is queued."""
        bucket = (
            "tbf",
            "rate",
            f"{8 * bytes_per_s}bit",
            "burst",
            str(BURST_BYTES),
            "latency",
            f"{1e3 * QUEUED_S:.0f}ms",
        )
        for here, there in ((one, other), (other, one)):
            await self._run("tc", here, "qdisc", "replace", "dev", self._device(here, there), "root", *bucket)

    async def quicken(self, one: str, other: str) -> None:
        """Undo `slow`."""
        for here, there in ((one, other), (other, one)):
            await self._run("tc", here, "qdisc", "del", "dev", self._device(here, there), "root")

    def _others(self, node: str) -> list[str]:
        return [other for other in (MACHINE, *self._holders) if other != node]

    def _inside(self, node: NodeId) -> tuple[str, ...]:
        return (_program("nsenter"), f"--net=/proc/{self._holders[node].pid}/ns/net", "--")

    async def _entered(self, node: NodeId) -> None:
        """Wait until the holder has left this machine's namespace for one of its own."""
        pid = self._holders[node].pid
        async with asyncio.timeout(ENTERED_S):
            while pid is not None and _namespace(pid) in (None, _namespace(os.getpid())):
                await asyncio.sleep(POLL_S)
                pid = self._holders[node].pid
        if pid is None:
            raise self._holders[node].died(1)

    async def _lay(self, one: str, other: str) -> None:
        ends = [(self._device(one, other), one), (self._device(other, one), other)]
        (device, here), (peer, there) = ends
        await self._ip(
            MACHINE, "link", "add", device, *self._of(here), "type", "veth", "peer", "name", peer, *self._of(there)
        )
        for (name, end), far in zip(ends, (other, one), strict=True):
            if end == MACHINE:
                await self._ip(end, "addr", "add", f"{self._address[end]}/32", "dev", name)
            await self._ip(end, "link", "set", name, "up")
            await self._ip(end, "route", "add", f"{self._address[far]}/32", "dev", name, "src", self._address[end])

    def _device(self, here: str, there: str) -> str:
        """The name of a wire's end."""
        return f"{self._prefix}-{there}"[:15] if here == MACHINE else f"to-{there}"

    def _of(self, end: str) -> tuple[str, ...]:
        return () if end == MACHINE else ("netns", str(self._holders[NodeId(end)].pid))

    async def _ip(self, end: str, *arguments: str) -> None:
        await self._run("ip", end, *arguments)

    async def _run(self, program: str, end: str, *arguments: str) -> None:
        enter = () if end == MACHINE else self._inside(NodeId(end))
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(*enter, program, *arguments, stdout=pipe, stderr=pipe)
        _, said = await process.communicate()
        if process.returncode != 0:
            message = f"{program} {' '.join(arguments)}: {said.decode(errors='replace').strip()}"
            raise ResplitError(ErrorCode.INTERNAL, message)


def _program(tool: str) -> str:
    found = shutil.which(tool)
    assert found is not None, "`why_not` was asked before"
    return found


def _namespace(pid: int) -> str | None:
    try:
        return str(Path(f"/proc/{pid}/ns/net").readlink())
    except OSError:
        return None
