"""Live streams, the audit trail and the agents' memory, watched from outside. Times are seconds since 1970."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from nats.aio.msg import Msg

from resplit import Client
from resplit.cluster import LocalCluster
from resplit.replies import RequestError, Usage
from resplit.standing import Reader
from resplit.trail import read_trust
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind

LOOK_EVERY_S = 0.05
WAIT_S = 60.0


@dataclass
class Stream:
    """One streamed request: its tokens, and when each of them reached the client."""

    prompt: Sequence[int]
    tokens_wanted: int
    request_id: str
    ids: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    usage: Usage | None = None
    error: str | None = None
    _more: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def run(self, client: Client, deployment: str) -> None:
        """Read it to its end, whatever the end is."""
        fields: dict[str, Any] = {"max_tokens": self.tokens_wanted, "ignore_eos": True, "request_id": self.request_id}
        try:
            async for token in client.stream(deployment, token_ids=self.prompt, **fields):
                self.times.append(time.time())
                self.ids.append(token.token_id)
                self.usage = token.usage or self.usage
                await self._tell()
        except RequestError as error:
            self.error = str(error)
            await self._tell()

    async def reached(self, tokens: int) -> None:
        """Wait until so many tokens have come; raises `RuntimeError` if the stream ends in an error before."""
        async with self._more:
            await self._more.wait_for(lambda: len(self.ids) >= tokens or self.error is not None)
        if len(self.ids) < tokens:
            raise RuntimeError(f"{self.request_id}: {self.error}")

    async def _tell(self) -> None:
        async with self._more:
            self._more.notify_all()

    def written(self, at: float) -> int:
        """Tokens whose caches existed at that time: the prompt, and all that came out but the last."""
        return len(self.prompt) + max(0, sum(t <= at for t in self.times) - 1)


def gaps(streams: Iterable[Stream], begin: float, end: float) -> list[tuple[float, float]]:
    """(when it ended, seconds) of every wait for a token that overlaps the time from `begin` to `end`."""
    return [
        (after, after - before)
        for stream in streams
        for before, after in zip(stream.times, stream.times[1:], strict=False)
        if after >= begin and before <= end
    ]


class Trail:
    """The audit events since it was opened, as they come."""

    def __init__(self, keys: Path) -> None:
        self._reader = Reader(read_trust(keys))
        self.events: list[AuditEvent] = []
        self._more = asyncio.Condition()

    async def note(self, message: Msg) -> None:
        seen = self._reader.read(message.data)
        if seen.standing == "verified":
            self.events.append(seen.event)
            async with self._more:
                self._more.notify_all()

    async def wait(self, at: float, kind: AuditKind, request: str) -> AuditEvent:
        """The first event of a kind about a request that happened after `at`, or is to come."""

        def found() -> list[AuditEvent]:
            return [event for event in self.since(at, kind) if event.request == request]

        async with asyncio.timeout(WAIT_S), self._more:
            await self._more.wait_for(found)
            return found()[0]

    def since(self, at: float, kind: AuditKind) -> list[AuditEvent]:
        """The events of a kind that happened after `at`."""
        return [event for event in self.events if event.kind is kind and event.at.timestamp() >= at]


class Memory:
    """Private memory of the agents, sampled: pages of theirs that are not backed by files."""

    def __init__(self, cluster: LocalCluster) -> None:
        self._pids = {node: cluster.processes[node] for node in cluster.agents}
        self.samples: list[tuple[float, dict[str, int]]] = []

    async def run(self) -> None:
        """Sample until cancelled."""
        while True:
            self.samples.append((time.time(), self.now()))
            await asyncio.sleep(LOOK_EVERY_S)

    def now(self) -> dict[str, int]:
        """Bytes of each agent. Cheaper than USS, which walks all pages and holds their owner up meanwhile."""
        found: dict[str, int] = {}
        for node, pid in self._pids.items():
            info = psutil.Process(pid).memory_info()
            found[node] = info.rss - info.shared
        return found

    def peak(self, node: str, begin: float, end: float) -> int:
        """The most that `node` had in that time."""
        return max(sample[node] for at, sample in self.samples if begin <= at <= end)


@contextlib.asynccontextmanager
async def watching(cluster: LocalCluster) -> AsyncIterator[tuple[Client, Trail, Memory]]:
    """A client, the trail from now on, and memory from now on."""
    trail, memory = Trail(cluster.operator_keys), Memory(cluster)
    connection = await cluster.operator.connect("resplit-bench", "operator")
    await connection.subscribe(subjects.ALL_AUDIT, cb=trail.note)
    sampling = asyncio.create_task(memory.run())
    try:
        async with Client(cluster.url, keys=cluster.client_keys) as client:
            yield client, trail, memory
    finally:
        sampling.cancel()
        await connection.close()
