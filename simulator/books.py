"""Who did what, and what was broken: kept while a world runs, summed up at its end."""

from collections.abc import Mapping, Sequence

from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.plan import Plan
from schemas.slo import Slo
from simulator.client import SimClient
from simulator.kernel import Kernel
from simulator.machine import Machine
from simulator.metrics import met
from simulator.records import Arrival, Epoch, NodeUse, Outcome, RunResult, Sample
from simulator.scenario import Scenario
from simulator.trail import Told
from simulator.truth import Truth
from simulator.workload import trace_hash


class Books:
    """Of one run."""

    def __init__(self, kernel: Kernel, machines: Mapping[NodeId, Machine]) -> None:
        self._kernel = kernel
        self._machines = machines
        self._uses = {node: NodeUse(node) for node in machines}
        self._alive_since = dict.fromkeys(machines, 0.0)
        self._epochs: list[Epoch] = []
        self._open: tuple[Plan, float, str] | None = None
        self._cause = "first_plan"
        self._samples: list[Sample] = []
        self._busy_before = 0.0
        self.violations: list[str] = []
        self.aborts = 0
        self.moved_bytes = 0.0
        self.planner_s = 0.0

    def broken(self, how: str) -> None:
        """An invariant was."""
        self.violations.append(f"{self._kernel.now:.3f} s: {how}")

    def moved(self, size: float) -> None:
        self.moved_bytes += size

    def busy(self, node: NodeId, spent_s: float) -> None:
        self._uses[node].busy_s += spent_s

    def memory(self, machine: Machine, used: int) -> None:
        """I9: what is there is all that there is."""
        use = self._uses[machine.name]
        share = used / machine.spec.memory_bytes if machine.spec.memory_bytes else 0.0
        use.memory_peak = max(use.memory_peak, share)
        if share > 1.0:
            self.broken(f"{machine.name} holds {share:.0%} of its memory")

    def started(self, node: NodeId) -> None:
        self._alive_since[node] = self._kernel.now

    def ended(self, node: NodeId) -> None:
        self._uses[node].alive_s += self._kernel.now - self._alive_since[node]

    def told(self, told: Told) -> None:
        """An audit event: why the next plan comes."""
        if told.kind is AuditKind.PLAN_PREPARED and told.fields.get("cause") is not None:
            self._cause = str(told.fields["cause"])

    def in_force(self, plan: Plan) -> None:
        self._close_epoch()
        self._open = (plan, self._kernel.now, self._cause)

    def sample(self, running: int, waiting: int) -> None:
        """A second has passed."""
        nodes = [] if self._open is None else [NodeId(node) for node in self._open[0].nodes]
        busy = sum(self._uses[node].busy_s for node in nodes)
        share = max(0.0, busy - self._busy_before) / len(nodes) if nodes else 0.0
        self._samples.append(Sample(self._kernel.now, running, waiting, min(1.0, share)))
        self._busy_before = busy

    def result(
        self,
        scenario: Scenario,
        policy: str,
        seed: int,
        truth: Truth,
        arrivals: Sequence[Arrival],
        clients: Sequence[SimClient],
        untrusted: frozenset[str],
        wall_s: float,
    ) -> RunResult:
        """All of it, once the run is over."""
        self._close_epoch()
        for machine in self._machines.values():
            if machine.alive:
                self.ended(machine.name)
        for client in clients:
            client.outcome.exposed = bool(client.nodes & untrusted)
            if client.conflicts:
                self.violations.append(f"{client.request_id}: {client.conflicts} replies that contradict others")
        self._share_out(scenario, [client.outcome for client in clients])
        return RunResult(
            scenario=scenario.name,
            policy=policy,
            seed=seed,
            trace_hash=trace_hash(arrivals),
            begin_s=scenario.warmup_s,
            end_s=scenario.duration_s,
            timeout_s=scenario.timeout_s,
            outcomes=[client.outcome for client in clients],
            epochs=self._epochs,
            spells=list(truth.spells),
            nodes=list(self._uses.values()),
            samples=self._samples,
            moved_bytes=self.moved_bytes,
            aborts=self.aborts,
            planner_s=self.planner_s,
            violations=self.violations,
            events=self._kernel.events,
            wall_s=wall_s,
        )

    def _share_out(self, scenario: Scenario, outcomes: Sequence[Outcome]) -> None:
        """Compute and energy to requests, by their tokens; what was computed in vain is in everybody's share."""
        slos: dict[str, Slo] = {one.name: one.slo for one in scenario.workload.classes}
        tokens = {one.arrival.number: one.tokens + one.arrival.prompt_tokens for one in outcomes if one.tokens}
        every = sum(tokens.values())
        busy_s, joules = 0.0, 0.0
        for use in self._uses.values():
            spec = self._machines[use.node].spec
            use.energy_j = spec.idle_w * use.hosting_s + (spec.busy_w - spec.idle_w) * use.busy_s
            busy_s, joules = busy_s + use.busy_s, joules + use.energy_j
        good = 0
        for one in outcomes:
            share = tokens.get(one.arrival.number, 0) / every if every else 0.0
            one.compute_s, one.energy_j = share * busy_s, share * joules
            is_good = met(one, slos[one.arrival.name], scenario.timeout_s)
            good += tokens.get(one.arrival.number, 0) if is_good else 0
        for use in self._uses.values():
            use.good_s = use.busy_s * good / every if every else 0.0

    def _close_epoch(self) -> None:
        if self._open is None:
            return
        plan, since, cause = self._open
        now = self._kernel.now
        self._epochs.append(Epoch(plan.epoch, since, now, plan.chains, cause, plan.reason))
        for node in plan.nodes:
            self._uses[NodeId(node)].hosting_s += now - since
        self._open = None
