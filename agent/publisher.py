"""Heartbeats: what this node can do and does, signed and in letters to those whom it concerns, every second in a plan
and every ten seconds spare."""

import asyncio
import contextlib
import itertools
from collections.abc import Callable, Collection
from datetime import UTC, datetime

from nats.aio.client import Client
from nats.errors import Error as NatsError

from bus.identity import Identity
from bus.sealed_heartbeats import seal_heartbeat
from profiler.device import Reading, placed
from schemas import subjects
from schemas.base import DeploymentName, NodeName
from schemas.capacity import (
    HEARTBEAT_IN_PLAN_S,
    HEARTBEAT_SPARE_S,
    BlockTime,
    Capacity,
    FinishedRequest,
    Guidance,
    HostedStage,
    LinkEstimate,
    LostPeer,
    Provider,
    RouteName,
    Service,
    StoredBlocks,
    Tier,
)


class CapacityPublisher:
    """Publishes `Capacity` on a schedule, and at once when something changed."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        boot: str,
        *,
        provider: Provider,
        threads: int,
        tier: Tier,
        price_per_hour: float,
        clouds: tuple[str, ...],
        link: str,
        version: str,
        read: Callable[[], Reading],
        stages: Callable[[], tuple[HostedStage, ...]],
        block_times: Callable[[], tuple[BlockTime, ...]],
        slowdown: Callable[[], float | None],
        links: Callable[[], tuple[LinkEstimate, ...]],
        on_disk: Callable[[], tuple[StoredBlocks, ...]],
        lost_peers: Callable[[], tuple[LostPeer, ...]],
        stalled: Callable[[], tuple[RouteName, ...]],
        service: Callable[[], tuple[Service, ...]],
        frame_ms: Callable[[], float | None],
        finished: Callable[[], tuple[FinishedRequest, ...]],
        guidance: Callable[[], Guidance | None],
        ingresses: Callable[[DeploymentName], Collection[NodeName]],
        on_said: Callable[[Capacity], None],
        on_published: Callable[[], object] = lambda: None,
    ) -> None:
        """`ingresses` are told what runs here for them; `on_said` hears what this node says, all of it, and
        `on_published` is called when that has gone."""
        self._client = client
        self._identity = identity
        self._fixed = {
            "provider": provider,
            "threads": threads,
            "tier": tier,
            "price_per_hour": price_per_hour,
            "clouds": clouds,
            "link": link,
            "version": version,
            **placed(),
        }
        self._read = read
        self._stages = stages
        self._block_times = block_times
        self._slowdown = slowdown
        self._links = links
        self._on_disk = on_disk
        self._lost_peers = lost_peers
        self._stalled = stalled
        self._service = service
        self._frame_ms = frame_ms
        self._finished = finished
        self._guidance = guidance
        self._ingresses = ingresses
        self._on_said = on_said
        self._on_published = on_published
        self._boot = boot
        self._sequence = itertools.count()
        self._changed = asyncio.Event()

    def changed(self) -> None:
        """Publish now: the node loaded, served or freed something."""
        self._changed.set()

    async def run(self) -> None:
        """Publish until cancelled."""
        while True:
            self._changed.clear()
            capacity = self._capacity(await asyncio.to_thread(self._read))
            self._on_said(capacity)
            data = seal_heartbeat(capacity, self._ingresses, self._identity)
            with contextlib.suppress(NatsError):  # the bus is away and its buffer full: the next one will do
                await self._client.publish(subjects.capacity(self._identity.name), data)
                self._on_published()
            pause = HEARTBEAT_IN_PLAN_S if capacity.stages else HEARTBEAT_SPARE_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause):
                    await self._changed.wait()

    def _capacity(self, reading: Reading) -> Capacity:
        return Capacity(
            node=self._identity.name,
            boot=self._boot,
            sequence=next(self._sequence),
            issued_at=datetime.now(UTC),
            memory_total_bytes=reading.memory.total_bytes,
            memory_free_bytes=reading.memory.free_bytes,
            disk_free_bytes=reading.disk_free_bytes,
            disk_models_bytes=reading.disk_models_bytes,
            load=reading.load,
            pressure=reading.pressure.cpu,
            memory_pressure=reading.pressure.memory,
            io_pressure=reading.pressure.io,
            gpu_load=reading.gpu_load,
            throttled=reading.compute.throttled,
            temperature_c=reading.compute.temperature_c,
            power_w=reading.compute.power_w,
            energy_j=reading.compute.energy_j,
            disk_read_bytes_per_s=reading.disk_read_bytes_per_s,
            stages=self._stages(),
            block_times=self._block_times(),
            slowdown=self._slowdown(),
            links=self._links(),
            on_disk=self._on_disk(),
            lost_peers=self._lost_peers(),
            stalled=self._stalled(),
            service=self._service(),
            frame_ms=self._frame_ms(),
            finished=self._finished(),
            guidance=self._guidance(),
            contention=reading.contention,
            **self._fixed,
        )
