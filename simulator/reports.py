"""What a simulated process says of itself, and how often: heartbeats as `agent.publisher` has them, with the noise and
the lies of the scenario in their times."""

from collections.abc import Collection
from typing import Protocol

import numpy as np

from agent.blocktimes import BlockTimes
from schemas.base import DeploymentName, NodeId, NodeName
from schemas.capacity import (
    HEARTBEAT_IN_PLAN_S,
    HEARTBEAT_SPARE_S,
    BlockTime,
    Capacity,
    HostedStage,
    LinkEstimate,
    StoredBlocks,
)
from schemas.heartbeat import hosting_of, hostings_of
from schemas.section import SeenPlan
from simulator.ingress import SimIngress
from simulator.machine import Machine
from simulator.model import provider_of, scaled
from simulator.neighbours import SimNeighbours
from simulator.surroundings import Surroundings

SOON_S = 0.002
"""A change is said at once, and what changes until then with it."""
NEAR_S, FAR_S = 1.0, 600.0
"""Between two looks at the links to nodes of one's plans, and to others where there is no plan."""


class Process(Protocol):
    """What there is to report of."""

    machine: Machine
    boot: str
    times: BlockTimes
    ingress: SimIngress
    neighbours: SimNeighbours

    @property
    def frame_ms(self) -> float | None: ...
    def plans(self) -> list[SeenPlan]: ...
    def ingresses(self, deployment: DeploymentName, /) -> Collection[NodeName]: ...
    def hosted(self) -> tuple[HostedStage, ...]: ...
    def block_times(self) -> tuple[BlockTime, ...]: ...
    def memory_used(self) -> int: ...
    def neighbourhood(self) -> tuple[NodeId, ...]: ...


class Reports:
    """Of one process."""

    def __init__(self, process: Process, around: Surroundings, rng: np.random.Generator) -> None:
        self._process = process
        self._machine = process.machine
        self._around = around
        self._rng = rng
        self._heartbeats = 0
        self._said_at = -1.0
        self._busy_s = 0.0
        self._links: tuple[LinkEstimate, ...] = ()
        self._links_at = -1e9
        self._pending = False

    def computed(self, spent_s: float) -> None:
        """The machine was busy."""
        self._busy_s += spent_s
        self._around.books.busy(self._machine.name, spent_s)

    def changed(self) -> None:
        """Say so at once, however much changes now."""
        if not self._pending:
            self._pending = True
            self._machine.later(SOON_S, self.say)

    def say(self) -> None:
        """A heartbeat, and the next one a while after the last, whatever that was said for."""
        self._pending = False
        said = self._heartbeats + 1

        def again() -> None:
            if self._heartbeats == said:
                self.say()

        self._machine.later(HEARTBEAT_IN_PLAN_S if self._process.plans() else HEARTBEAT_SPARE_S, again)
        capacity = self._capacity()
        self._heartbeats += 1
        self._process.ingress.speaks(self._machine.name, hosting_of(capacity))
        self._around.bus.heartbeat(capacity, hostings_of(capacity, self._process.ingresses))

    def noise(self) -> float:
        """How many times longer a measurement says that something takes."""
        spread = self._around.scenario.telemetry.noise
        return float(np.exp(spread * self._rng.standard_normal())) if spread else 1.0

    def _capacity(self) -> Capacity:
        process, machine, around = self._process, self._machine, self._around
        now, spec = around.kernel.now, machine.spec
        elapsed_s = max(1e-3, now - max(self._said_at, 0.0))
        busy, self._busy_s, self._said_at = min(1.0, self._busy_s / elapsed_s), 0.0, now
        factor = self.noise() / machine.lie
        times = tuple(scaled(time, factor) for time in process.block_times())
        slowdown = process.times.slowdown
        return Capacity(
            node=machine.name,
            boot=process.boot,
            sequence=self._heartbeats,
            issued_at=around.date_at(machine),
            version="simulated",
            provider=provider_of(spec),
            tier=spec.tier,
            price_per_hour=spec.price_per_hour,
            threads=1,
            memory_total_bytes=spec.memory_bytes,
            memory_free_bytes=max(0, spec.memory_bytes - process.memory_used()),
            disk_free_bytes=1 << 40,
            load=busy,
            throttled=("thermal",) if machine.throttled else (),
            power_w=spec.idle_w + busy * (spec.busy_w - spec.idle_w),
            disk_read_bytes_per_s=spec.disk_bytes_per_s,
            stages=process.hosted(),
            block_times=times,
            links=self._estimates(),
            lost_peers=process.neighbours.lost,
            stalled=process.ingress.stalled,
            service=process.ingress.service,
            on_disk=(StoredBlocks.of(around.physics.digest, machine.disk),),
            machine=machine.name,
            cores=(0,),
            frame_ms=process.frame_ms,
            slowdown=None if slowdown is None else slowdown * factor,
            finished=process.ingress.finished,
            contention=max(1.0, machine.factor * factor) if process.times.at_rest else None,
        )

    def _estimates(self) -> tuple[LinkEstimate, ...]:
        """Links to neighbours as they are; to the others as they were when they were last looked at."""
        now, near = self._around.kernel.now, self._process.neighbourhood()
        if now - self._links_at >= (NEAR_S if near else FAR_S):
            self._links_at = now
            known = {link.peer: link for link in self._links}
            for peer in near or self._around.peers(self._machine):
                estimate = self._around.estimate(self._machine, peer, self.noise())
                if estimate is None:
                    known.pop(peer, None)
                else:
                    known[peer] = estimate
            self._links = tuple(known.values())
        return self._links
