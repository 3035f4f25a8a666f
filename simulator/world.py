"""A world: machines, links, a bus, agents, a leader and clients, put together from a scenario and a seed, and run.

The same (scenario, policy, seed) gives the same run, event for event, on any machine: all that is random comes from
named streams of the seed, and nothing reads a clock of this machine but to say how long the run took.
"""

import gc
import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from typing import Any

from agent.plans import CATCH_UP_EVERY_S
from bus.streams import RETRY_S
from orchestrator.staging import Advice
from schemas.base import NodeId
from schemas.beacon import BEACON_EVERY_S
from schemas.capacity import LinkEstimate
from schemas.deployment import Chain
from schemas.frame import Frame
from schemas.plan import Plan
from schemas.section import SeenPlan
from simulator.agent import SimAgent
from simulator.beacons import Beacons
from simulator.books import Books
from simulator.bus import Bus
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
from simulator.policies import Contender, Foreseen, Part
from simulator.records import Arrival, Outcome, RunResult
from simulator.scenario import RequestClass, Scenario
from simulator.spells import ORCHESTRATOR
from simulator.traces import TraceRow
from simulator.trail import Trail
from simulator.truth import Change, timeline
from simulator.workload import arrivals

RESTART_S = 1.5
"""From the end of what killed a process to the first thing that it does."""
PEERS_MAX = 64
"""Of more nodes each measures as many, half of them of its own place."""
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
        self.hands_over = Part.HANDOVER in contender.parts
        self.makes_before_breaks = Part.OVERLAP in contender.parts
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
        self._places: dict[str, tuple[tuple[NodeId, ...], tuple[NodeId, ...]]] = {}
        """The nodes of each, and those of all others."""
        for site in scenario.sites:
            own = frozenset(site.members)
            self._places[site.name] = (site.members, tuple(node for node in self.machines if node not in own))
        self.books = Books(self.kernel, self.machines)
        self.trail = Trail(lambda: self.kernel.now, hear=self.books.told)
        self.network = Network(scenario.network, self._truth, self.machines, self.kernel, self.draws.stream("network"))
        self.agents: dict[NodeId, SimAgent] = {}
        self._beacons = Beacons()
        self.bus = Bus(
            scenario,
            self.machines,
            self.network,
            self.kernel,
            self.draws.stream("bus"),
            self.agents,
            lambda report: self._office.report(report),  # noqa: PLW0108 - there is no office yet
            lambda receipt: self._office.log.ready(receipt),  # noqa: PLW0108
        )
        self._skew = self._skews()
        self.clients: list[SimClient] = []
        steps: tuple[Step, ...] = ()
        if placement is not None:
            steps = (Step(0.0, 0.0, (placement,)),)
            parts = contender.parts & ~Part.RECOVERY
            contender = replace(contender, placing=Foreseen(lambda _: steps), parts=parts)
        elif isinstance(contender.placing, Foreseen):
            oracle = Oracle(scenario, self.physics, self._truth, self._arrivals)
            steps = contender.placing.steps(foresight or foresee(oracle))
        self._office = Office(
            scenario,
            self.physics,
            contender,
            seed,
            steps,
            self.kernel,
            self.trail,
            self.books,
            self.bus.tell,
            self._advise,
            self._foresee,
        )

    @property
    def plan(self) -> Plan | None:
        """The one in force."""
        return self._office.log.plan

    def place(self, placement: Chain) -> None:
        """An operator locks a placement."""
        self._office.placer.lock(placement)

    @property
    def at_rest(self) -> bool:
        """A plan is in force, and no other is prepared or drains."""
        event = self._office.log.event
        return event is not None and event.current is not None and len(event.plans) == 1

    def ask(self, client: SimClient) -> None:
        """A request that is not among the arrivals, now."""
        self.clients.append(client)
        client.ask()

    def client(self, arrival: Arrival) -> SimClient:
        """Whoever asks for it."""
        until = self.scenario.duration_s + self.scenario.drain_s
        return SimClient(Outcome(arrival), self._classes[arrival.name], self.kernel, self.bus.publish, until)

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
        return self.books.result(
            self.scenario,
            self._contender.name,
            self._seed,
            self._truth,
            self._arrivals,
            self.clients,
            self._office.operators.untrusted,
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
        kernel.every(CATCH_UP_EVERY_S, lambda: self.bus.catch_up(self._office.log.last.values(), tuple(self.agents)))
        kernel.every(BEACON_EVERY_S, self._say_newest)
        kernel.run(scenario.duration_s + scenario.drain_s)

    # Processes.

    def _start(self, machine: Machine) -> None:
        if machine.alive:
            return
        machine.start()
        boot = f"{machine.life:08x}"  # no dash: lives are named after it
        self.books.started(machine.name)
        self.agents[machine.name] = agent = SimAgent(machine, boot, self)
        for event in self._office.log.last.values():
            agent.hear(event)
        if agent.neighbourhood():
            self.bus.listen_to_peers(machine.name)

    def _kill(self, machine: Machine) -> None:
        if not machine.alive:
            return
        near = self.agents[machine.name].neighbourhood()
        self.books.ended(machine.name)
        machine.kill()
        self.bus.ended(machine.name)
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
                    self._office.operators.lock_current(change.begins)
                case "redeploy" if change.begins:
                    self._office.operators.redeploy()
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
                    self.network.cut_off(node) if change.begins else self._mend(node)
                case "drain" | "distrust":
                    self._office.operators.wish(node, change.kind, change.begins)

    def _revive(self, machine: Machine) -> None:
        if self._truth.alive(machine.name, self.kernel.now):
            self._start(machine)

    def _late(self, fault: Any) -> None:
        """A fault whose victim is found in the plan in force."""
        plan = self.plan
        if plan is None or fault.where.in_plan is None:
            return
        stages = plan.routes[0].stages
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
                self._office.operators.wish(node, fault.kind, True)
                undo = lambda: self._office.operators.wish(node, fault.kind, False)  # noqa: E731
            case _:
                self.network.cut_off(node)
                undo = lambda: self._mend(node)  # noqa: E731
        if lasts_s is not None:
            self.kernel.after(lasts_s, undo)

    def _mend(self, node: NodeId) -> None:
        self.network.mended(node)
        self.bus.mended()
        # Who is connected again looks in the log (`bus.streams`).
        self.kernel.after(RETRY_S, self.read_plans, node)

    def _say_newest(self) -> None:
        if (term := self._office.term) is not None:
            events = tuple(self._office.log.last.values())
            self.bus.beacon(self._beacons.next(term, events, self.kernel.date), events)

    def _meant(self, what: str) -> list[NodeId]:
        if what in self.machines:
            return [NodeId(what)]
        return [node for node, machine in self.machines.items() if machine.site == what]

    def _advise(self, node: NodeId, advice: Advice) -> None:
        """Blocks that a node is to have ahead of need."""
        if self.is_alive(node):
            self.agents[node].staging.want({block for stored in advice for block in stored.blocks})

    def _foresee(self, node: NodeId, blocks: Collection[int]) -> None:
        """The same, from whoever knows the run."""
        if self.is_alive(node):
            self.agents[node].staging.foresee(blocks)

    # What processes ask of the world.

    def frame(self, source: NodeId, target: NodeId, frame: Frame, size: float) -> None:
        def arrive() -> None:
            self.agents[target].arrived(frame)

        self.network.send(source, target, size, arrive)

    def is_alive(self, node: NodeId) -> bool:
        return self.machines[node].alive

    def peers(self, machine: Machine) -> tuple[NodeId, ...]:
        """Whom a node looks at: everybody, or of very many some, half of them of its own place."""
        if len(self.machines) <= PEERS_MAX + 1:
            return tuple(node for node in self.machines if node != machine.name)
        members, others = self._places[machine.site]
        near = [node for node in members if node != machine.name][: PEERS_MAX - min(PEERS_MAX // 2, len(others))]
        far = PEERS_MAX - len(near)
        return (*near, *others[:: max(1, len(others) // max(1, far))][:far])

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
        work_s = size * 8 / (link.mbit_per_s * 1e6)
        passing_s = self._truth.passing_s(registry.name, machine.name, self.kernel.now, work_s)
        return link.rtt_ms / 1e3 + passing_s

    def date_at(self, machine: Machine) -> datetime:
        return self.kernel.date + timedelta(seconds=self._skew[machine.name])

    def _skews(self) -> dict[NodeId, float]:
        spread = self.scenario.bus.clock_skew_s
        rng = self.draws.stream("clocks")
        return {node: float(rng.normal(0, spread)) if spread else 0.0 for node in self.machines}

    def read_plans(self, node: NodeId) -> None:
        """A node reads again what is stored."""
        self.bus.catch_up(self._office.log.last.values(), (node,))

    def loads(self, machine: Machine, plan: SeenPlan) -> None:
        self._office.operators.check_load(machine, plan)

    def _sample(self) -> None:
        served = [s for agent in self.agents.values() if agent.machine.alive for s in agent.ingress.served.values()]
        self.books.sample(sum(len(one.jobs) for one in served), sum(len(one.queue) for one in served))
