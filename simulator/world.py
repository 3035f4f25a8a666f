"""A world: machines, links, a bus, agents, a leader and clients, put together from a scenario and a seed, and run.

The same (scenario, policy, seed) gives the same run, event for event, on any machine: all that is random comes from
named streams of the seed, and nothing reads a clock of this machine but to say how long the run took.
"""

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from orchestrator.fold import (
    CapacityReceived,
    DeploymentWritten,
    ManifestKnown,
    NodeWished,
    ReceiptReceived,
    Report,
    Snapshot,
    fold,
)
from orchestrator.lease import LEASE_S
from orchestrator.staging import Advice
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.capacity import Capacity, LinkEstimate, Provider
from schemas.deployment import Chain, Deployment, NodeWish, Placement
from schemas.frame import Frame
from schemas.plan import Plan, PlanEvent, PlanPhase, Receipt, ReceiptStatus
from simulator.agent import SimAgent, provider_of
from simulator.client import SimClient
from simulator.draws import Draws
from simulator.journal import Stream
from simulator.kernel import EPOCH, Kernel
from simulator.machine import Machine
from simulator.model import Physics, physics_of
from simulator.network import Network
from simulator.orchestrator import Leader, successor
from simulator.policies import Contender, placed
from simulator.records import Arrival, Epoch, NodeUse, Outcome, RunResult, Sample
from simulator.scenario import NodeSpec, RequestClass, Scenario
from simulator.traces import TraceRow
from simulator.trail import Told, Trail
from simulator.truth import Change, timeline
from simulator.workload import arrivals, trace_hash

DEPLOYMENT = DeploymentName("model")
PLANS_MAX = 4
"""One in force, one that is prepared, and two that drain while a hard trigger supersedes one of them."""
CATCH_UP_S = 30.0
"""As often an agent reads the stream of plans again (`agent.plans`): a word that was lost is heard by then."""
RESTART_S = 1.5
"""From the end of what killed a process to the first thing that it does."""
LEADER_AT_S = 0.0
PLACED_AT_S = 2.0
"""A static contender is placed once every node has reported."""
REORDERED = 10.0
"""How many times as long a message takes that is overtaken."""
SLOWEST = 20.0
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
    ) -> None:
        """`physics` other than the scenario's own are those of machines that were measured; `placement` is locked."""
        self.scenario = scenario
        self.physics = physics or physics_of(scenario.model)
        self.kernel = Kernel()
        self.draws = Draws(seed)
        self.journal: Stream = {}
        self.trail = Trail(lambda: self.kernel.now, hear=self._told)
        self.hands_over = contender.hands_over
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
        self.network = Network(scenario.network, self._truth, self.machines, self.kernel, self.draws.stream("network"))
        self.agents: dict[NodeId, SimAgent] = {}
        self._bus_rng = self.draws.stream("bus")
        self._skew = self._skews()
        self._ears: dict[NodeId, None] = {}
        """Who takes requests, in the order in which they began."""
        self._hearers: dict[NodeId, None] = {}
        self._said: dict[NodeId, Capacity] = {}
        """The last heartbeat of each."""
        self._log: dict[DeploymentName, PlanEvent] = {}
        self._epochs_seen: dict[DeploymentName, int] = {}
        self._ready: dict[str, set[str]] = {}
        """By plan, the nodes that have said READY."""
        self.clients: list[SimClient] = []
        self._unsaid: list[tuple[Machine, int, SimClient, Any]] = []
        self.leader: Leader | None = None
        self._wish = self._desired(placement)
        self._locked = False
        self._stored = self._wishes()
        self._uses = {node: NodeUse(node) for node in self.machines}
        self._used_at = dict.fromkeys(self.machines, 0.0)
        self.epochs: list[Epoch] = []
        self._open: tuple[Plan, float, str] | None = None
        self._cause = "first_plan"
        self._samples: list[Sample] = []
        self._busy_before = 0.0
        self.violations: list[str] = []
        self.aborts = 0
        self._moved = 0.0
        self._planner_s = 0.0

    def run(self) -> RunResult:
        """All of it, from the first process to the last answer."""
        began = time.perf_counter()
        kernel, scenario = self.kernel, self.scenario
        starting = self.draws.stream("starting")
        for machine in self.machines.values():
            kernel.at(float(starting.uniform(0, 0.3)), lambda machine=machine: self._start(machine))  # type: ignore[misc]
        kernel.at(LEADER_AT_S, lambda: self._lead(self._stored))
        if self._contender.static not in (None, "optimum"):
            kernel.at(PLACED_AT_S, self._place)
        for change in self._truth.changes:
            kernel.at(change.at_s, lambda change=change: self._change(change))  # type: ignore[misc]
        for fault in self._truth.late:
            kernel.at(fault.at_s, lambda fault=fault: self._late(fault))  # type: ignore[misc]
        until = scenario.duration_s + scenario.drain_s
        for arrival in self._arrivals:
            client = SimClient(Outcome(arrival), self._class(arrival), kernel, self._publish, until)
            self.clients.append(client)
            kernel.at(arrival.at_s, client.ask)
        kernel.every(1.0, self._sample, 1.0)
        kernel.every(CATCH_UP_S, self._catch_up)
        kernel.run(until)
        return self._result(time.perf_counter() - began)

    # Processes.

    def _start(self, machine: Machine) -> None:
        if machine.alive:
            return
        machine.start()
        boot = f"{machine.life:08x}"  # no dash: lives are named after it
        self._used_at[machine.name] = self.kernel.now
        self.agents[machine.name] = agent = SimAgent(machine, boot, self)
        for event in self._log.values():
            agent.hear(event)
        if agent.neighbourhood():
            self._listen_to_peers(machine.name)

    def _kill(self, machine: Machine) -> None:
        if not machine.alive:
            return
        near = self.agents[machine.name].neighbourhood()
        self._account(machine)
        machine.kill()
        self._ears.pop(machine.name, None)
        self._hearers.pop(machine.name, None)
        for peer in sorted(near):
            other = self.agents.get(peer)
            if other is not None and self.network.reaches(peer, machine.name):
                self.machines[peer].later(CLOSED_S, lambda other=other: other.link_ended(machine.name))  # type: ignore[misc]

    def _change(self, change: Change) -> None:
        if change.what == "orchestrator":
            if change.begins:
                self._kill_leader()
            return
        for node in self._meant(change.what):
            machine, now = self.machines[node], self.kernel.now
            match change.kind:
                case "kill" if change.begins:
                    self._kill(machine)
                case "kill":
                    self.kernel.after(RESTART_S, lambda machine=machine: self._revive(machine))  # type: ignore[misc]
                case "hang":
                    machine.hang() if self._truth.hangs(node, now) else machine.go_on()
                case "slow" | "throttle":
                    machine.factor = self._truth.node_factor(node, now)
                    machine.throttled = self._truth.throttled(node, now)
                case "lie":
                    machine.lie = self._truth.lies(node, now)
                case "cut":
                    self._cut(node) if change.begins else self._mend(node)

    def _revive(self, machine: Machine) -> None:
        if self._truth.alive(machine.name, self.kernel.now):
            self._start(machine)

    def _late(self, fault: Any) -> None:
        """A fault whose victim is found in the plan in force."""
        event = self._log.get(DEPLOYMENT)
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

    # The leader.

    def _desired(self, placement: Chain | None) -> Deployment:
        scenario, served = self.scenario, self.scenario.served
        return Deployment(
            name=DEPLOYMENT,
            model=self.physics.digest,
            placement=placement,
            settings=served.settings,
            stages=served.stages if placement is None else None,
            routes=1 if self._contender.static is not None and placement is None else served.routes,
            slo=served.slo,
            sensitive=served.sensitive,
        )

    def _wishes(self) -> Snapshot:
        """What is stored before anything runs; a static contender's deployment is only once it is placed."""
        snapshot = fold(Snapshot(term=1), ManifestKnown(self._wish.model, self.physics.manifest), EPOCH)
        if self._contender.static in (None, "optimum"):
            snapshot = fold(snapshot, DeploymentWritten(self._wish), EPOCH)
        for site in self.scenario.sites:
            trusted = site.trusted if site.trusted is not None else self.scenario.kinds[site.node].trusted
            for node in site.members:
                snapshot = fold(snapshot, NodeWished(NodeWish(node=node, trusted=trusted)), EPOCH)
        return snapshot

    def _lead(self, snapshot: Snapshot) -> None:
        advise = self._advise if self._contender.stages_ahead else None
        policy = self._contender.policy
        self.leader = Leader(self.kernel, policy, snapshot, self.trail, self._append, advise, lambda: self.kernel.date)

    def _place(self) -> None:
        """Lock a static contender's plan, as an operator would; where its rule finds none, nothing is served."""
        if self.leader is None or self._contender.static is None:
            return
        snapshot = self.leader.mind.snapshot
        chain = placed(self._contender.static, snapshot, self._wish, self._seed)
        if chain is not None:
            self._lock(chain)

    def _lock(self, placement: Chain | Placement) -> None:
        deployment = self._wish.model_copy(update={"placement": placement, "stages": None, "routes": None})
        self._stored = fold(self._stored, DeploymentWritten(deployment), self.kernel.date)
        self._report(DeploymentWritten(deployment))

    def _kill_leader(self) -> None:
        leader = self.leader
        if leader is None:
            return
        leader.stop()
        self._planner_s += leader.spent_s
        self.leader = None
        before = leader.mind.snapshot
        self.kernel.after(
            LEASE_S, lambda: self._lead(successor(before, self._log, self._epochs_seen, self.kernel.date))
        )

    def _report(self, report: Report) -> None:
        if self.leader is not None:
            self.leader.report(report)

    def _append(self, event: PlanEvent) -> None:
        """The log of plans: stored once, delivered as the bus likes."""
        self._check_event(event)
        self._log[event.deployment] = event
        newest = max([plan.epoch for plan in event.plans], default=0)
        self._epochs_seen[event.deployment] = max(self._epochs_seen.get(event.deployment, 0), newest)
        if event.phase is PlanPhase.COMMIT and event.current is not None:
            self._in_force(event.current)
            if self._contender.static == "optimum" and not self._locked:
                self._locked, placement = True, event.current.chains
                self.kernel.after(0.0, lambda: self._lock(placement))
        if event.phase is PlanPhase.ABORT:
            self.aborts += 1
        concerned = {NodeId(node) for plan in event.plans for node in plan.nodes}
        for node in sorted(concerned):
            self._listen_to_peers(node)
        for node, agent in self.agents.items():
            if node in concerned or agent.knows(event.deployment):
                self._deliver(node, lambda agent=agent: agent.hear(event), stored=True)  # type: ignore[misc]

    def _check_event(self, event: PlanEvent) -> None:
        """I1, I2 and I4: epochs never come back, nothing is in force that its nodes were not ready for, and no more
        than three plans are alive at once."""
        before = self._log.get(event.deployment)
        at = f"{self.kernel.now:.3f} s: term {event.term}, revision {event.revision}"
        if before is not None and (event.term, event.revision) <= (before.term, before.revision):
            self.violations.append(f"{at}: comes behind term {before.term}, revision {before.revision}")
        if len(event.plans) > PLANS_MAX:
            self.violations.append(f"{at}: {len(event.plans)} plans are alive")
        seen = self._epochs_seen.get(event.deployment, 0)
        known = set() if before is None else {plan.epoch for plan in before.plans}
        for plan in event.plans:
            if plan.epoch <= seen and plan.epoch not in known:
                self.violations.append(f"{at}: epoch {plan.epoch} has come back")
        if event.phase is PlanPhase.COMMIT and event.current is not None:
            unready = set(event.current.nodes) - self._ready.get(event.current.digest, set())
            if unready:
                self.violations.append(f"{at}: in force while {', '.join(sorted(unready))} had not said READY")

    def _catch_up(self) -> None:
        for agent in list(self.agents.values()):
            for event in self._log.values():
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
        self._moved += size

    # The bus.

    def _deliver(self, node: NodeId, call: Callable[[], None], *, stored: bool = False) -> None:
        """One message to one process, as the bus of the scenario treats it; what is `stored` is only heard late."""
        bus, machine = self.scenario.bus, self.machines[node]
        life, rng = machine.life, self._bus_rng
        if not self._reachable(node) or (bus.drop and rng.random() < bus.drop):
            return  # what is stored is read again later
        copies = 2 if bus.duplicate and rng.random() < bus.duplicate else 1
        for _ in range(copies):
            self.kernel.after(self._delay_s(), lambda: machine.reach(call, life))

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
            self.kernel.after(delay, lambda: self._report(CapacityReceived(capacity)))
        self._said[node] = capacity
        for other in self._hearers:
            if other != node:
                self._deliver(other, lambda other=other: self._peer(other, capacity))  # type: ignore[misc]

    def _peer(self, node: NodeId, capacity: Capacity) -> None:
        self.agents[node].capacity_arrived(capacity)

    def receipt(self, receipt: Receipt) -> None:
        """Receipts are stored: they come, late or twice."""
        bus, rng = self.scenario.bus, self._bus_rng
        if receipt.status is ReceiptStatus.READY:
            self._ready.setdefault(receipt.plan, set()).add(receipt.node)
        machine, life = self.machines[NodeId(receipt.node)], self.machines[NodeId(receipt.node)].life
        if not self._reachable(machine.name):
            if machine.alive:
                self.kernel.after(1.0, lambda: self.receipt(receipt) if machine.life == life else None)
            return
        late = 1.0 if bus.drop and rng.random() < bus.drop else 0.0
        for _ in range(2 if bus.duplicate and rng.random() < bus.duplicate else 1):
            self.kernel.after(late + self._delay_s(), lambda: self._report(ReceiptReceived(receipt)))

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
            self.kernel.after(self._way_s(client, machine), lambda: client.take(what))
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
        self._moved += size

    def busy(self, machine: Machine, spent_s: float) -> None:
        self._uses[machine.name].busy_s += spent_s

    def memory(self, machine: Machine, used: int) -> None:
        use = self._uses[machine.name]
        share = used / machine.spec.memory_bytes if machine.spec.memory_bytes else 0.0
        use.memory_peak = max(use.memory_peak, share)
        if share > 1.0:
            self.violations.append(f"{self.kernel.now:.3f} s: {machine.name} holds {share:.0%} of its memory")

    def loads(self, machine: Machine, plan: Plan) -> None:
        """I6: no sensitive block is even prepared where it is not trusted."""
        if self.leader is None:
            return
        snapshot = self.leader.mind.snapshot
        secret = snapshot.deployments[DEPLOYMENT].sensitive_of(plan.block_count)
        if secret.intersection(plan.blocks_on(machine.name)) and snapshot.distrusts(machine.name):
            self.violations.append(f"{self.kernel.now:.3f} s: {machine.name} was given a sensitive block")

    def _account(self, machine: Machine) -> None:
        use, since = self._uses[machine.name], self._used_at[machine.name]
        use.alive_s += max(0.0, self.kernel.now - since)
        self._used_at[machine.name] = self.kernel.now

    def _told(self, told: Told) -> None:
        if told.kind is AuditKind.PLAN_PREPARED and told.fields.get("cause") is not None:
            self._cause = str(told.fields["cause"])

    def _in_force(self, plan: Plan) -> None:
        self._close_epoch()
        self._open = (plan, self.kernel.now, self._cause)

    def _close_epoch(self) -> None:
        if self._open is None:
            return
        plan, since, cause = self._open
        now = self.kernel.now
        self.epochs.append(Epoch(plan.epoch, since, now, plan.chains, cause, plan.reason))
        for node in plan.nodes:
            self._uses[NodeId(node)].hosting_s += now - since
        self._open = None

    def _sample(self) -> None:
        event = self._log.get(DEPLOYMENT)
        nodes = event.current.nodes if event is not None and event.current is not None else ()
        busy = sum(self._uses[NodeId(node)].busy_s for node in nodes)
        served = [s for agent in self.agents.values() if agent.machine.alive for s in agent.ingress.served.values()]
        self._samples.append(
            Sample(
                self.kernel.now,
                sum(len(one.jobs) for one in served),
                sum(len(one.queue) for one in served),
                max(0.0, busy - self._busy_before) / len(nodes) if nodes else 0.0,
            )
        )
        self._busy_before = busy

    def _result(self, wall_s: float) -> RunResult:
        self._close_epoch()
        for machine in self.machines.values():
            if machine.alive:
                self._account(machine)
        outcomes = [client.outcome for client in self.clients]
        good = sum(o.tokens + o.arrival.prompt_tokens for o in outcomes if self._is_good(o))
        every = sum(o.tokens + o.arrival.prompt_tokens for o in outcomes if o.first_s is not None)
        for use in self._uses.values():
            spec = self.machines[use.node].spec
            use.good_s = use.busy_s * good / every if every else 0.0
            use.energy_j = spec.idle_w * use.hosting_s + (spec.busy_w - spec.idle_w) * use.busy_s
        for client in self.clients:
            if client.conflicts:
                self.violations.append(f"{client.request_id}: {client.conflicts} replies that contradict others")
        if self.leader is not None:
            self._planner_s += self.leader.spent_s
        scenario = self.scenario
        return RunResult(
            scenario=scenario.name,
            policy=self._contender.name,
            seed=self._seed,
            trace_hash=trace_hash(self._arrivals),
            begin_s=scenario.warmup_s,
            end_s=scenario.duration_s,
            timeout_s=scenario.timeout_s,
            outcomes=outcomes,
            epochs=self.epochs,
            spells=list(self._truth.spells),
            nodes=list(self._uses.values()),
            samples=self._samples,
            moved_bytes=self._moved,
            aborts=self.aborts,
            planner_s=self._planner_s,
            violations=self.violations,
            events=self.kernel.events,
            wall_s=wall_s,
        )

    def _is_good(self, outcome: Outcome) -> bool:
        if outcome.last_s is None or outcome.first_s is None:
            return False
        slo, begin = self._class(outcome.arrival).slo, outcome.arrival.at_s
        tpot_s = (outcome.last_s - outcome.first_s) / max(1, outcome.tokens - 1)
        held = (
            (outcome.first_s - begin, slo.ttft_ms),
            (tpot_s, slo.tpot_ms),
            (outcome.last_s - begin, slo.deadline_ms),
        )
        return all(target is None or took <= target / 1e3 for took, target in held)


@cache
def _provider(flops_per_s: float, bytes_per_s: float) -> Provider:
    return provider_of(flops_per_s, bytes_per_s)


@cache
def _sample_of(nodes: tuple[NodeId, ...], own: NodeId, most: int = 64) -> tuple[NodeId, ...]:
    """Whom a node looks at: everybody, or of very many some, its own place's first."""
    others = [node for node in nodes if node != own]
    step = max(1, len(others) // most)
    return tuple(others[::step][:most])
