"""A world: machines, links, a bus, agents, a leader and clients, put together from a scenario and a seed, and run.

The same (scenario, policy, seed) gives the same run, event for event, on any machine: all that is random comes from
named streams of the seed, and nothing reads a clock of this machine but to say how long the run took.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from orchestrator.fold import CapacityReceived, ReceiptReceived
from orchestrator.staging import Advice
from schemas.base import NodeId
from schemas.capacity import Capacity, LinkEstimate, Provider
from schemas.deployment import Chain
from schemas.frame import Frame
from schemas.plan import Plan, PlanEvent, Receipt
from schemas.request import TokenReply
from simulator.agent import SimAgent, provider_of
from simulator.books import Books
from simulator.client import SimClient
from simulator.draws import Draws
from simulator.foresight import Foresight, Step, foresee
from simulator.journal import Stream
from simulator.kernel import Kernel
from simulator.machine import Machine
from simulator.model import Physics, physics_of
from simulator.network import Network
from simulator.office import Office
from simulator.oracle import Oracle
from simulator.policies import Contender
from simulator.records import Arrival, Outcome, RunResult
from simulator.scenario import NodeSpec, RequestClass, Scenario
from simulator.spells import ORCHESTRATOR
from simulator.traces import TraceRow
from simulator.trail import Trail
from simulator.truth import Change, timeline
from simulator.wishes import DEPLOYMENT
from simulator.workload import arrivals

CATCH_UP_S = 30.0
"""As often an agent reads the stream of plans again (`agent.plans`): a word that was lost is heard by then."""
RESTART_S = 1.5
"""From the end of what killed a process to the first thing that it does."""
REORDERED = 10.0
"""How many times as long a message takes that is overtaken."""
SLOWEST = 20.0
GARBAGE_MIN = 50_000
"""New objects before it is worth looking for cycles among them: events make few, and looking cost a tenth of a run."""
CLOSED_S = 0.004
"""Until the other end of a link knows that the process at this end is gone."""


class World:
    """Everything that there is in one run."""

    def __init__(
        self,
        scenario: Scenario,
        contender: Contender,
        seed: int,
        trace: Sequence[TraceRow] | None = None,
        *,
        physics: Physics | None = None,
        placement: Chain | None = None,
        foresight: Foresight | None = None,
    ) -> None:
        """`physics` other than the scenario's own are those of machines that were measured; `placement` is locked.
        `foresight` is that of this world where it is known already."""
        self.scenario = scenario
        self.physics = physics or physics_of(scenario.model)
        self.kernel = Kernel()
        self.draws = Draws(seed)
        self.journal: Stream = {}
        self.hands_over = contender.hands_over
        self.makes_before_breaks = contender.makes_before_breaks
        self._contender = contender
        self._seed = seed
        self._truth = timeline(scenario, self.draws)
        self._arrivals = arrivals(scenario, self.draws, trace)
        self._classes: dict[str, RequestClass] = {one.name: one for one in scenario.workload.classes}
        self.machines: dict[NodeId, Machine] = {}
        for site in scenario.sites:
            spec = scenario.kinds[site.node]
            for node in site.members:
                self.machines[node] = Machine(node, site.name, spec, self.kernel)
        self._books = Books(self.kernel, self.machines)
        self.trail = Trail(lambda: self.kernel.now, hear=self._books.told)
        self.network = Network(scenario.network, self._truth, self.machines, self.kernel, self.draws.stream("network"))
        self.agents: dict[NodeId, SimAgent] = {}
        self._bus_rng = self.draws.stream("bus")
        self._skew = self._skews()
        self._ears: dict[NodeId, None] = {}
        """Who takes requests, in the order in which they began."""
        self._hearers: dict[NodeId, None] = {}
        self._said: dict[NodeId, Capacity] = {}
        """The last heartbeat of each."""
        self.clients: list[SimClient] = []
        self._unsaid: list[tuple[Machine, int, SimClient, Any]] = []
        steps: tuple[Step, ...] = ()
        if placement is not None:
            contender = replace(contender, recovers=False)
            steps = (Step(0.0, 0.0, (placement,)),)
        elif contender.foresees is not None:
            oracle = Oracle(scenario, self.physics, self._truth, self._arrivals)
            steps = contender.foresees(foresight or foresee(oracle))
        self._office = Office(
            scenario,
            self.physics,
            contender,
            seed,
            steps,
            self.kernel,
            self.trail,
            self._books,
            self._deliver_event,
            self._advise,
        )

    @property
    def plan(self) -> Plan | None:
        """The one in force."""
        event = self._office.log.get(DEPLOYMENT)
        return None if event is None else event.current

    def place(self, placement: Chain) -> None:
        """An operator locks a placement."""
        self._office.lock(placement)

    @property
    def at_rest(self) -> bool:
        """A plan is in force, and no other is prepared or drains."""
        event = self._office.log.get(DEPLOYMENT)
        return event is not None and event.current is not None and len(event.plans) == 1

    def ask(self, client: SimClient) -> None:
        """A request that is not among the arrivals, now."""
        self.clients.append(client)
        client.ask()

    def client(self, arrival: Arrival) -> SimClient:
        """Whoever asks for it."""
        until = self.scenario.duration_s + self.scenario.drain_s
        return SimClient(Outcome(arrival), self._class(arrival), self.kernel, self._publish, until)

    def run(self) -> RunResult:
        """All of it, from the first process to the last answer."""
        began = time.perf_counter()
        said = logging.root.manager.disable
        logging.disable(logging.WARNING)  # what agents warn of is what a scenario is about
        collected = gc.get_threshold()
        gc.set_threshold(GARBAGE_MIN, *collected[1:])
        try:
            self._run()
        finally:
            gc.set_threshold(*collected)
            logging.disable(said)
        self._office.close()
        wall_s = time.perf_counter() - began
        return self._books.result(
            self.scenario,
            self._contender.name,
            self._seed,
            self._truth,
            self._arrivals,
            self.clients,
            self._office.untrusted,
            wall_s,
        )

    def _run(self) -> None:
        kernel, scenario = self.kernel, self.scenario
        starting = self.draws.stream("starting")
        for machine in self.machines.values():
            kernel.at(float(starting.uniform(0, 0.3)), self._start, machine)
        self._office.open()
        for change in self._truth.changes:
            kernel.at(change.at_s, self._change, change)
        for fault in self._truth.late:
            kernel.at(fault.at_s, self._late, fault)
        for arrival in self._arrivals:
            client = self.client(arrival)
            self.clients.append(client)
            kernel.at(arrival.at_s, client.ask)
        kernel.every(1.0, self._sample, 1.0)
        kernel.every(CATCH_UP_S, self._catch_up)
        kernel.run(scenario.duration_s + scenario.drain_s)

    # Processes.

    def _start(self, machine: Machine) -> None:
        if machine.alive:
            return
        machine.start()
        boot = f"{machine.life:08x}"  # no dash: lives are named after it
        self._books.started(machine.name)
        self.agents[machine.name] = agent = SimAgent(machine, boot, self)
        for event in self._office.log.values():
            agent.hear(event)
        if agent.neighbourhood():
            self._listen_to_peers(machine.name)

    def _kill(self, machine: Machine) -> None:
        if not machine.alive:
            return
        near = self.agents[machine.name].neighbourhood()
        self._books.ended(machine.name)
        machine.kill()
        self._ears.pop(machine.name, None)
        self._hearers.pop(machine.name, None)
        for peer in near:
            other = self.agents.get(peer)
            if other is not None and self.network.reaches(peer, machine.name):
                self.machines[peer].later(CLOSED_S, lambda other=other: other.link_ended(machine.name))  # type: ignore[misc]

    def _change(self, change: Change) -> None:
        if change.what == ORCHESTRATOR:
            match change.kind:
                case "leader" if change.begins:
                    self._office.kill()
                case "lock":
                    self._office.lock_current(change.begins)
                case "redeploy" if change.begins:
                    self._office.redeploy()
            return
        for node in self._meant(change.what):
            machine, now = self.machines[node], self.kernel.now
            match change.kind:
                case "kill" if change.begins:
                    self._kill(machine)
                case "kill":
                    self.kernel.after(RESTART_S, self._revive, machine)
                case "hang":
                    machine.hang() if self._truth.hangs(node, now) else machine.go_on()
                case "slow" | "throttle":
                    machine.factor = self._truth.node_factor(node, now)
                    machine.throttled = self._truth.throttled(node, now)
                case "lie":
                    machine.lie = self._truth.lies(node, now)
                case "cut":
                    self._cut(node) if change.begins else self._mend(node)
                case "drain" | "distrust":
                    self._office.wish(node, change.kind, change.begins)

    def _revive(self, machine: Machine) -> None:
        if self._truth.alive(machine.name, self.kernel.now):
            self._start(machine)

    def _late(self, fault: Any) -> None:
        """A fault whose victim is found in the plan in force."""
        event = self._office.log.get(DEPLOYMENT)
        if event is None or event.current is None or fault.where.in_plan is None:
            return
        stages = event.current.routes[0].stages
        node = NodeId(stages[min(fault.where.in_plan, len(stages) - 1)].node)
        machine = self.machines[node]
        lasts_s = fault.lasts_s
        match fault.kind:
            case "kill":
                self._kill(machine)
                undo: Callable[[], None] = lambda: self._revive(machine)  # noqa: E731
            case "hang":
                machine.hang()
                undo = machine.go_on
            case "slow" | "throttle":
                machine.factor *= fault.factor
                undo = lambda: setattr(machine, "factor", machine.factor / fault.factor)  # noqa: E731
            case "drain" | "distrust":
                self._office.wish(node, fault.kind, True)
                undo = lambda: self._office.wish(node, fault.kind, False)  # noqa: E731
            case _:
                self._cut(node)
                undo = lambda: self._mend(node)  # noqa: E731
        if lasts_s is not None:
            self.kernel.after(lasts_s, undo)

    def _cut(self, node: NodeId) -> None:
        self.network.cut_off(node)

    def _mend(self, node: NodeId) -> None:
        self.network.mended(node)
        held, self._unsaid = self._unsaid, []
        for machine, life, client, what in held:
            if machine.alive and machine.life == life:
                self.say(machine, client, what)

    def _meant(self, what: str) -> list[NodeId]:
        if what in self.machines:
            return [NodeId(what)]
        return [node for node, machine in self.machines.items() if machine.site == what]

    # The bus.

    def _deliver_event(self, event: PlanEvent) -> None:
        """An event is in the log of plans: whoever it concerns may hear of it."""
        concerned = {NodeId(node) for plan in event.plans for node in plan.nodes}
        for node in sorted(concerned):
            self._listen_to_peers(node)
        for node, agent in self.agents.items():
            if node in concerned or agent.knows(event.deployment):
                self._deliver(node, lambda agent=agent: agent.hear(event))  # type: ignore[misc]

    def _catch_up(self) -> None:
        for agent in list(self.agents.values()):
            for event in self._office.log.values():
                if self._reachable(agent.machine.name):
                    agent.machine.reach(lambda agent=agent, event=event: agent.hear(event))  # type: ignore[misc]

    def _advise(self, node: NodeId, advice: Advice) -> None:
        """Blocks that a node fetches ahead of need, at its leisure."""
        machine = self.machines[node]
        blocks = {block for stored in advice for block in stored.blocks} - machine.disk
        if not blocks:
            return
        manifest = self.physics.manifest
        size = sum(manifest.blocks[block].weight_bytes for block in blocks)
        # It rests as long as each piece takes.
        machine.later(2 * self.fetch_s(machine, size), lambda: machine.disk.update(blocks))
        self._books.moved_bytes += size

    def _deliver(self, node: NodeId, call: Callable[[], None]) -> None:
        """One message to one process, as the bus of the scenario treats it."""
        bus, machine = self.scenario.bus, self.machines[node]
        life, rng = machine.life, self._bus_rng
        if not self._reachable(node) or (bus.drop and rng.random() < bus.drop):
            return  # what is stored is read again later
        copies = 2 if bus.duplicate and rng.random() < bus.duplicate else 1
        for _ in range(copies):
            self.kernel.after(self._delay_s(), machine.reach, call, life)

    def _delay_s(self) -> float:
        bus, rng = self.scenario.bus, self._bus_rng
        delay = bus.delay_ms / 1e3
        return delay * REORDERED if bus.reorder and rng.random() < bus.reorder else delay

    def _reachable(self, node: NodeId) -> bool:
        return node not in self.network.cut

    def heartbeat(self, capacity: Capacity) -> None:
        bus, rng = self.scenario.bus, self._bus_rng
        node = NodeId(capacity.node)
        if not self._reachable(node):
            return
        if not (bus.drop and rng.random() < bus.drop):
            delay = self._delay_s() + self.scenario.telemetry.delay_s
            self.kernel.after(delay, self._office.report, CapacityReceived(capacity))
        self._said[node] = capacity
        for other in self._hearers:
            if other != node:
                self._deliver(other, lambda other=other: self._peer(other, capacity))  # type: ignore[misc]

    def _peer(self, node: NodeId, capacity: Capacity) -> None:
        self.agents[node].capacity_arrived(capacity)

    def receipt(self, receipt: Receipt) -> None:
        """Receipts are stored: they come, late or twice."""
        bus, rng = self.scenario.bus, self._bus_rng
        self._office.ready(receipt)
        machine, life = self.machines[NodeId(receipt.node)], self.machines[NodeId(receipt.node)].life
        if not self._reachable(machine.name):
            if machine.alive:
                self.kernel.after(1.0, lambda: self.receipt(receipt) if machine.life == life else None)
            return
        late = 1.0 if bus.drop and rng.random() < bus.drop else 0.0
        for _ in range(2 if bus.duplicate and rng.random() < bus.duplicate else 1):
            self.kernel.after(late + self._delay_s(), self._office.report, ReceiptReceived(receipt))

    def frame(self, source: NodeId, target: NodeId, frame: Frame, size: float) -> None:
        def arrive() -> None:
            self.agents[target].arrived(frame)

        self.network.send(source, target, size, arrive)

    def listens(self, node: NodeId, whether: bool) -> None:
        if not whether:
            self._ears.pop(node, None)
        else:
            self._ears[node] = None
            self._listen_to_peers(node)

    def _listen_to_peers(self, node: NodeId) -> None:
        """Every agent hears all heartbeats. Only where a plan is does it matter, so that others are told once they are
        in one."""
        if node in self._hearers or not self.machines[node].alive:
            return
        self._hearers[node] = None
        for other, capacity in self._said.items():
            if other != node:
                self.agents[node].capacity_arrived(capacity)

    # Clients.

    def _class(self, arrival: Arrival) -> RequestClass:
        return self._classes[arrival.name]

    def _publish(self, client: SimClient) -> bool:
        """Give a request to one of those who listen, whichever the server picks; False if nobody does."""
        ears = [node for node in self._ears if self._reachable(node)]
        if not ears:
            return False
        node = ears[int(self._bus_rng.integers(len(ears)))]
        machine, agent = self.machines[node], self.agents[node]
        delay = self._way_s(client, machine) + self.scenario.bus.delay_ms / 1e3
        life = machine.life
        self.kernel.after(
            delay,
            lambda: machine.reach(
                lambda: agent.ingress.requested(DEPLOYMENT, client.request, client.request_id, client), life
            ),
        )
        return True

    def say(self, machine: Machine, client: Any, what: Any) -> None:
        assert isinstance(client, SimClient)
        if self._reachable(machine.name):
            at_s = self.kernel.now + self._way_s(client, machine)
            if not (isinstance(what, TokenReply) and client.take_early(what, at_s)):
                self.kernel.at(at_s, client.take, what)
        else:
            self._unsaid.append((machine, machine.life, client, what))  # its connection keeps it until it is back

    def _way_s(self, client: SimClient, machine: Machine) -> float:
        site, network = client.outcome.arrival.site, self.scenario.network
        link = (
            network.within
            if site == machine.site
            else network.cloud
            if machine.spec.tier == "cloud"
            else network.between
        )
        return link.rtt_ms / 2e3

    # What processes ask of the world.

    def is_alive(self, node: NodeId) -> bool:
        return self.machines[node].alive

    def on_bus(self, node: NodeId) -> bool:
        return self._reachable(node)

    def peers(self, machine: Machine) -> tuple[NodeId, ...]:
        return _sample_of(tuple(self.machines), machine.name)

    def estimate(self, machine: Machine, peer: NodeId, noise: float) -> LinkEstimate | None:
        other = self.machines[peer]
        if not other.alive or other.hangs or not self.network.reaches(machine.name, peer):
            return None
        return LinkEstimate(
            peer=peer,
            rtt_ms=self.network.rtt_s(machine, other) * 1e3 * noise,
            goodput_bytes_per_s=self.network.bytes_per_s(machine, other) / noise,
            direct=True,
        )

    def fetch_s(self, machine: Machine, size: float) -> float:
        """To bring files from the registry, which stands where the first site is."""
        if not size:
            return 0.0
        registry = next(iter(self.machines.values()))
        link = self.network.spec_of(registry, machine)
        factor = 1.0 if registry is machine else self._truth.path_factor(registry.name, machine.name, self.kernel.now)
        factor = min(factor, SLOWEST)  # a link that is cut is tried until it is back
        return link.rtt_ms / 1e3 + size * 8 / (link.mbit_per_s * 1e6) * factor

    def provider(self, spec: NodeSpec) -> Provider:
        return _provider(spec.flops_per_s, spec.bytes_per_s)

    def date_at(self, machine: Machine) -> datetime:
        return self.kernel.date + timedelta(seconds=self._skew[machine.name])

    def _skews(self) -> dict[NodeId, float]:
        spread = self.scenario.bus.clock_skew_s
        rng = self.draws.stream("clocks")
        return {node: float(rng.normal(0, spread)) if spread else 0.0 for node in self.machines}

    # Books.

    def moved(self, size: float) -> None:
        self._books.moved_bytes += size

    def busy(self, machine: Machine, spent_s: float) -> None:
        self._books.busy(machine.name, spent_s)

    def memory(self, machine: Machine, used: int) -> None:
        self._books.memory(machine, used)

    def loads(self, machine: Machine, plan: Plan) -> None:
        self._office.check_load(machine, plan)

    def _sample(self) -> None:
        served = [s for agent in self.agents.values() if agent.machine.alive for s in agent.ingress.served.values()]
        self._books.sample(sum(len(one.jobs) for one in served), sum(len(one.queue) for one in served))


@cache
def _provider(flops_per_s: float, bytes_per_s: float) -> Provider:
    return provider_of(flops_per_s, bytes_per_s)


@cache
def _sample_of(nodes: tuple[NodeId, ...], own: NodeId, most: int = 64) -> tuple[NodeId, ...]:
    """Whom a node looks at: everybody, or of very many some, its own place's first."""
    others = [node for node in nodes if node != own]
    step = max(1, len(others) // most)
    return tuple(others[::step][:most])
