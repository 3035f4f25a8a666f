"""The bus between processes, as a scenario treats it: messages come late, twice, in another order, or never.

What is on its way to a node that is cut off is lost, but for what is stored and for what its own connection keeps.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from orchestrator.fold import CapacityReceived, ReceiptReceived, Report
from schemas.base import DeploymentName, NodeId, NodeName
from schemas.beacon import Beacon
from schemas.capacity import Capacity
from schemas.heartbeat import Hosting, Presence, presence_of
from schemas.plan import PlanEvent, Receipt
from schemas.request import TokenReply
from simulator.beacons import Guide
from simulator.client import SimClient
from simulator.ingress import SimIngress
from simulator.kernel import Kernel
from simulator.machine import Machine
from simulator.network import Network
from simulator.scenario import Scenario
from simulator.wishes import DEPLOYMENT

REORDERED = 10.0
"""How many times as long a message takes that is overtaken."""


@dataclass(frozen=True, slots=True)
class Said:
    """A heartbeat, what everybody hears of it, and what those do to whom it says more."""

    capacity: Capacity
    presence: Presence
    hostings: Mapping[NodeId, Hosting]


class Process(Protocol):
    """An agent, as it hears the bus."""

    machine: Machine
    ingress: SimIngress
    guide: Guide

    def hear(self, event: PlanEvent, /) -> None: ...
    def knows(self, deployment: DeploymentName, /) -> bool: ...
    def heartbeat_arrived(self, presence: Presence, hosting: Hosting | None, /) -> None: ...


class Bus:
    """Of one world."""

    def __init__(
        self,
        scenario: Scenario,
        machines: Mapping[NodeId, Machine],
        network: Network,
        kernel: Kernel,
        rng: np.random.Generator,
        agents: Mapping[NodeId, Process],
        report: Callable[[Report], None],
        stored: Callable[[Receipt], None],
    ) -> None:
        """`agents` are those that were started last, by node; `report` is what a leader hears, and `stored` is called
        as soon as a receipt is."""
        self._spec = scenario.bus
        self._is_even = not (scenario.bus.drop or scenario.bus.duplicate or scenario.bus.reorder)
        self._links = scenario.network
        self._telemetry_s = scenario.telemetry.delay_s
        self._machines = machines
        self._network = network
        self._kernel = kernel
        self._rng = rng
        self._agents = agents
        self._report = report
        self._stored = stored
        self._ears: dict[NodeId, None] = {}
        """Who takes requests, in the order in which they began."""
        self._hearers: dict[NodeId, None] = {}
        self.said: dict[NodeId, Said] = {}
        """The last heartbeat of each."""
        self._unsaid: list[tuple[Machine, int, SimClient, Any]] = []

    def reaches(self, node: NodeId) -> bool:
        return node not in self._network.cut

    def ended(self, node: NodeId) -> None:
        """Its process is gone, and what it subscribed to with it."""
        self._ears.pop(node, None)
        self._hearers.pop(node, None)

    def mended(self) -> None:
        """Somebody is back: connections say what they kept."""
        held, self._unsaid = self._unsaid, []
        for machine, life, client, what in held:
            if machine.alive and machine.life == life:
                self.say(machine, client, what)

    # Plans.

    def tell(self, event: PlanEvent) -> None:
        """An event is in the log of plans: whoever it concerns may hear of it."""
        concerned = {NodeId(node) for plan in event.plans for node in plan.nodes}
        for node in sorted(concerned):
            self.listen_to_peers(node)
        for node, agent in self._agents.items():
            if node in concerned or agent.knows(event.deployment):
                self._deliver(node, lambda agent=agent: agent.hear(event))  # type: ignore[misc]

    def beacon(self, beacon: Beacon, events: Collection[PlanEvent]) -> None:
        """The leader says that these are the newest: who has them learns nothing from it."""
        concerned = {NodeId(node) for event in events for plan in event.plans for node in plan.nodes}
        for node, agent in self._agents.items():
            mine = [event for event in events if node in concerned or agent.knows(event.deployment)]
            if mine and agent.guide.misses(mine):
                self._deliver(node, lambda agent=agent: agent.guide.heard(beacon))  # type: ignore[misc]

    def catch_up(self, events: Iterable[PlanEvent], nodes: Iterable[NodeId]) -> None:
        """Agents read again what is stored."""
        for node in nodes:
            if (agent := self._agents.get(node)) is None:
                continue
            for event in events:
                if self.reaches(node):
                    agent.machine.reach(lambda agent=agent, event=event: agent.hear(event))  # type: ignore[misc]

    def receipt(self, receipt: Receipt) -> None:
        """Receipts are stored: they come, late or twice."""
        spec, rng = self._spec, self._rng
        self._stored(receipt)
        machine = self._machines[NodeId(receipt.node)]
        life = machine.life
        if not self.reaches(machine.name):
            if machine.alive:
                self._kernel.after(1.0, lambda: self.receipt(receipt) if machine.life == life else None)
            return
        late = 1.0 if spec.drop and rng.random() < spec.drop else 0.0
        for _ in range(2 if spec.duplicate and rng.random() < spec.duplicate else 1):
            self._kernel.after(late + self._delay_s(), self._report, ReceiptReceived(receipt))

    # Heartbeats.

    def heartbeat(self, capacity: Capacity, hostings: Iterable[tuple[Hosting, frozenset[NodeName]]]) -> None:
        """`hostings`: what it tells whom, beside what everybody hears."""
        spec, rng = self._spec, self._rng
        node = NodeId(capacity.node)
        if not self.reaches(node):
            return
        if not (spec.drop and rng.random() < spec.drop):
            self._kernel.after(self._delay_s() + self._telemetry_s, self._report, CapacityReceived(capacity))
        told = {NodeId(name): hosting for hosting, names in hostings for name in names}
        said = self.said[node] = Said(capacity, presence_of(capacity), told)
        others = [other for other in self._hearers if other != node]
        if self._is_even:
            # All hear it at once: one event does for as many as there are.
            hearers = [self._machines[other] for other in others if self.reaches(other)]
            self._kernel.after(self._delay_s(), self._hear, [(each, each.life) for each in hearers], said)
            return
        for other in others:
            self._deliver(other, lambda other=other: self._arrives(other, said))  # type: ignore[misc]

    def _hear(self, hearers: list[tuple[Machine, int]], said: Said) -> None:
        for machine, life in hearers:
            machine.reach(lambda node=machine.name: self._arrives(node, said), life)  # type: ignore[misc]

    def _arrives(self, node: NodeId, said: Said) -> None:
        self._agents[node].heartbeat_arrived(said.presence, said.hostings.get(node))

    def listen_to_peers(self, node: NodeId) -> None:
        """Every agent hears all heartbeats. Only where a plan is does it matter, so that others are told once they are
        in one."""
        if node in self._hearers or not self._machines[node].alive:
            return
        self._hearers[node] = None
        for other, said in self.said.items():
            if other != node:
                self._arrives(node, said)

    # Requests.

    def listens(self, node: NodeId, whether: bool) -> None:
        """It is one of those that requests are given to."""
        if not whether:
            self._ears.pop(node, None)
        else:
            self._ears[node] = None
            self.listen_to_peers(node)

    def publish(self, client: SimClient) -> bool:
        """Give a request to one of those who listen, whichever the server picks; False if nobody does."""
        ears = [node for node in self._ears if self.reaches(node)]
        if not ears:
            return False
        node = ears[int(self._rng.integers(len(ears)))]
        machine, agent = self._machines[node], self._agents[node]
        life = machine.life
        self._kernel.after(
            self._way_s(client, machine) + self._spec.delay_ms / 1e3,
            lambda: machine.reach(
                lambda: agent.ingress.requested(DEPLOYMENT, client.request, client.request_id, client), life
            ),
        )
        return True

    def say(self, machine: Machine, client: Any, what: Any) -> None:
        """Answer a client."""
        assert isinstance(client, SimClient)
        if self.reaches(machine.name):
            at_s = self._kernel.now + self._way_s(client, machine)
            if not (isinstance(what, TokenReply) and client.take_early(what, at_s)):
                self._kernel.at(at_s, client.take, what)
        else:
            self._unsaid.append((machine, machine.life, client, what))  # its connection keeps it until it is back

    def _way_s(self, client: SimClient, machine: Machine) -> float:
        links = self._links
        if client.outcome.arrival.site == machine.site:
            return links.within.rtt_ms / 2e3
        return (links.cloud if machine.spec.tier == "cloud" else links.between).rtt_ms / 2e3

    def _deliver(self, node: NodeId, call: Callable[[], None]) -> None:
        """One message to one process."""
        spec, machine = self._spec, self._machines[node]
        life, rng = machine.life, self._rng
        if not self.reaches(node) or (spec.drop and rng.random() < spec.drop):
            return  # what is stored is read again later
        copies = 2 if spec.duplicate and rng.random() < spec.duplicate else 1
        for _ in range(copies):
            self._kernel.after(self._delay_s(), machine.reach, call, life)

    def _delay_s(self) -> float:
        spec, rng = self._spec, self._rng
        delay = spec.delay_ms / 1e3
        return delay * REORDERED if spec.reorder and rng.random() < spec.reorder else delay
