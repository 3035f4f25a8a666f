"""What a cluster holds, looked at every few seconds: of each process, in the plans, in JetStream, on the server."""

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import httpx2
import psutil
from nats.aio.client import Client as Nats
from nats.errors import Error as NatsError

from resplit import control
from resplit.cluster import LocalCluster
from schemas import subjects
from schemas.control import StatusReply
from schemas.errors import ResplitError

EVERY_S = 2.0
STREAMS = (subjects.STREAM_PLANS, subjects.STREAM_RECEIPTS, subjects.STREAM_AUDIT, subjects.STREAM_JOURNAL)
FILES = f"{subjects.ROOT}.blob."
"""An agent listens for every file that it holds, and holds more as plans come and go: that is a cache, and no leak."""
NUMBER = re.compile(r"( n|-)\d+$")
"""Which of several that are alike: who leads, and who is an ingress, changes."""
PER_PROCESS = ("pss_bytes", "files", "threads")

Points = list[tuple[float, float]]


@dataclass
class Samples:
    """What was seen; times are those of `time.monotonic`."""

    processes: dict[str, dict[str, dict[str, Points]]] = field(default_factory=lambda: defaultdict(dict))
    """By figure, by the name of a process, by its life: what `PER_PROCESS` names."""
    cluster: dict[str, Points] = field(default_factory=lambda: defaultdict(list))
    """Sums over the cluster, by figure."""

    def of_process(self, name: str, life: str, figures: dict[str, float], now: float) -> None:
        for figure, value in figures.items():
            self.processes[figure].setdefault(name, {}).setdefault(life, []).append((now, value))

    def of_cluster(self, figures: dict[str, float], now: float) -> None:
        for figure, value in figures.items():
            self.cluster[figure].append((now, value))


class Sampler:
    """Looks at a cluster while it runs."""

    def __init__(self, cluster: LocalCluster, connection: Nats) -> None:
        """`connection` is an operator's."""
        self._cluster = cluster
        self._connection = connection
        self.samples = Samples()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Look while the block runs."""
        looking = asyncio.create_task(self._look_forever())
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.wait([looking])

    async def held(self) -> dict[str, float]:
        """What the cluster holds now; raises what nats-py and `control` do where it cannot be asked."""
        status = await control.status_on(self._connection)
        infos = [await self._connection.jetstream().stream_info(name) for name in STREAMS]
        found = {f"{info.config.name} bytes": float(info.state.bytes) for info in infos}
        return {**found, **of_plans(status), "consumers": float(sum(info.state.consumer_count for info in infos))}

    async def connections(self) -> dict[str, float]:
        """Subscriptions by whose connections they are, those to files left out, and `connections`."""
        async with httpx2.AsyncClient() as http:
            answer = await http.get(f"{self._cluster.monitor_url}/connz", params={"subs": "1", "limit": "4096"})
        found: dict[str, float] = defaultdict(float)
        for one in answer.json()["connections"]:
            found["connections"] += 1
            lasting = [subject for subject in one.get("subscriptions_list") or () if not subject.startswith(FILES)]
            found[f"subscriptions of {NUMBER.sub('', one.get('name') or 'somebody')}"] += len(lasting)
        return dict(found)

    async def _look_forever(self) -> None:
        while True:
            await self._look()
            await asyncio.sleep(EVERY_S)

    async def _look(self) -> None:
        for name, pid in self._cluster.processes.items():
            with suppress(psutil.Error, OSError):  # it has just ended
                figures = await asyncio.to_thread(of_process, pid)
                self.samples.of_process(name, f"{name} {pid}", figures, time.monotonic())
        with suppress(ResplitError, NatsError, TimeoutError, OSError):  # nobody leads now, or the server is away
            async with asyncio.timeout(EVERY_S):
                self.samples.of_cluster(await self.held(), time.monotonic())


def of_process(pid: int) -> dict[str, float]:
    """What a process holds: memory that is its own, with its share of what others have too; files; threads."""
    process = psutil.Process(pid)
    memory = process.memory_full_info()
    values = (float(memory.pss), float(process.num_fds()), float(process.num_threads()))
    return dict(zip(PER_PROCESS, values, strict=True))


def of_plans(status: StatusReply) -> dict[str, float]:
    """Sequences that run, epochs that are loaded, and those of them that no plan in force or on its way names."""
    stages = [(node.capacity.node, stage) for node in status.nodes for stage in node.capacity.stages]
    named = set()
    for found in status.deployments:
        plans = (found.current, found.candidate, *found.draining)
        named |= {(found.name, plan.epoch) for plan in plans if plan is not None}
    waiting = sum(one.waiting for node in status.nodes for one in node.capacity.service)
    return {
        "sequences": float(sum(stage.sequences for _, stage in stages)),
        "requests that wait": float(waiting),
        "epochs loaded": float(len({(node, stage.deployment, stage.epoch) for node, stage in stages})),
        "epochs that no plan names": float(
            len({(node, s.deployment, s.epoch) for node, s in stages if (s.deployment, s.epoch) not in named})
        ),
    }
