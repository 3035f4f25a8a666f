"""A seeded world for the trigger: nodes whose telemetry is noisy, and a deployment that moves when it is told to."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

import numpy as np

from orchestrator.decision import Decision, Observation
from orchestrator.fold import (
    CapacityReceived,
    DeploymentWritten,
    ManifestKnown,
    RolloutAdvanced,
    Snapshot,
    Tick,
    Weighed,
    fold,
)
from orchestrator.planner import make_plan
from orchestrator.rollout import Proceed, Propose, Withdraw, note, step
from orchestrator.rooms import rooms
from orchestrator.scales import Turns
from orchestrator.trigger import DEFAULT_POLICY, Policy, TriggerState
from orchestrator.weighing import chosen_plan, weigh
from profiler.cost import predict
from profiler.forecast import forecast_on, surveyed
from profiler.host import hosts_of
from profiler.memory import memory_bytes
from profiler.objective import Demand
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import BlockTime, Capacity, HostedStage, Provider, Service, StoredBlocks
from schemas.deployment import Deployment, Settings
from schemas.manifest import BlobRef, Block, Manifest, ModelKind, TensorSpec, TextSpec
from schemas.plan import Plan, PlanEvent, Receipt, ReceiptStatus

START = datetime(2026, 1, 1, tzinfo=UTC)
CHAT = DeploymentName("chat")
MODEL, BLOB = Digest("1" * 64), Digest("2" * 64)
BLOCKS = 8
BLOCK_MS = 5.0
WEIGHT = 10**7
SETTINGS = Settings(context_tokens=1024)


def manifest() -> Manifest:
    edge = TensorSpec(name="x", dtype="float32", shape=("batch", "sequence", 64))
    ref = BlobRef(digest=BLOB, size_bytes=0)
    return Manifest(
        name="toy",
        kind=ModelKind.DECODER,
        architecture="toy",
        precision="fp32",
        source="test",
        cut="even",
        inputs=(),
        outputs=(),
        blocks=tuple(
            Block(
                index=i,
                role="layer",
                graph=BlobRef(digest=Digest(f"{i:064x}"), size_bytes=0),
                weights=(BlobRef(digest=BLOB, size_bytes=WEIGHT),),
                input=edge if i else None,
                output=edge if i < BLOCKS - 1 else None,
                flops_per_token=10**6,
            )
            for i in range(BLOCKS)
        ),
        whole=ref,
        text=TextSpec(tokenizer=ref, vocab_size=10, context_length=1024),
    )


BLOCK_BYTES = memory_bytes(manifest().blocks[0], SETTINGS)


@dataclass
class World:
    """Nodes that all ran the model once; `room` blocks fit on each. `slow[n]` is how many times slower n is now."""

    nodes: int
    seed: int
    noise: float = 0.2
    room: float = 5.5
    policy: Policy = DEFAULT_POLICY
    wish: Deployment = field(default_factory=lambda: Deployment(name=CHAT, model=MODEL, settings=SETTINGS))
    slow: dict[NodeId, float] = field(default_factory=dict)
    prices: dict[NodeId, float] = field(default_factory=dict)
    """The nodes of the cloud, and what each costs an hour."""
    strain: float | None = None
    """How many times slower serving makes a node. Then one at rest shows the times of when its blocks were loaded,
    whatever has slowed it since; without it, each shows what it would be like."""
    bare: tuple[NodeId, ...] = ()
    """Nodes that have none of the model's blocks on their disks; the others have all."""
    sequences: int = 0
    """How many run, shared out over the routes."""
    decisions: list[Decision] = field(default_factory=list)
    turns: Turns = field(default_factory=Turns)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng(self.seed)
        self.names = [NodeId(f"n{i}") for i in range(self.nodes)]
        self.now = START
        self.heard = 0
        self.arrived = 0.0
        self.snapshot = fold(Snapshot(term=1), ManifestKnown(MODEL, manifest()), START)
        self.snapshot = fold(self.snapshot, DeploymentWritten(self.wish), START)
        self.hear()
        free = rooms(self.snapshot, self.wish, manifest())
        self.adopt(make_plan(self.wish, manifest(), free, 1, None, "the first plan").plan)

    @property
    def plan(self) -> Plan:
        current = self.snapshot.rollout(CHAT).current
        assert current is not None
        return current

    @property
    def moves(self) -> list[Decision]:
        return [decision for decision in self.decisions if decision.acts]

    def run(self, seconds: float) -> None:
        """Heartbeats a second apart; whenever it is its turn the plan is weighed, and moved if that is decided."""
        for _ in range(int(seconds)):
            self.now += timedelta(seconds=1)
            self.hear()
            if self.turns.next(self.snapshot, self.now) is not None:
                self.look()

    def look(self) -> None:
        outlook = weigh(self.snapshot, CHAT, self.policy, self.now)
        self.snapshot = fold(self.snapshot, Weighed(outlook), self.now)
        self.decisions.append(outlook.decision)
        if outlook.decision.acts:
            self.adopt(chosen_plan(self.snapshot, outlook).plan)

    def observed(self) -> Observation:
        """What the policy would decide on now."""
        seen: list[Observation] = []

        def policy(state: TriggerState, observation: Observation, now: datetime) -> tuple[TriggerState, Decision]:
            seen.append(observation)
            return self.policy(state, observation, now)

        weigh(self.snapshot, CHAT, policy, self.now)
        return seen[0]

    def wait(self, seconds: int) -> None:
        """Heartbeats a second apart, and nobody looks."""
        for _ in range(seconds):
            self.now += timedelta(seconds=1)
            self.hear()

    def hear(self) -> None:
        self.arrived += self.requests_per_s() if self.sequences and self.snapshot.rollout(CHAT).current else 0.0
        for name in self.names:
            self.snapshot = fold(self.snapshot, CapacityReceived(self.heartbeat(name)), self.now)
        self.snapshot = fold(self.snapshot, Tick(), self.now)
        self.heard += 1

    def heartbeat(self, name: NodeId, noisy: bool = True) -> Capacity:
        factor = self.slow.get(name, 1.0) * (self.rng.lognormal(0, self.noise) if noisy and self.noise else 1.0)
        current = self.snapshot.rollout(CHAT).current
        mine = current.blocks_on(name) if current is not None else ()
        serves = self.strain is not None and bool(mine)
        if self.strain is not None:
            factor = factor * self.strain if mine else 1.0
        hosted = HostedStage(
            deployment=CHAT,
            epoch=current.epoch if current else 1,
            model=MODEL,
            blocks=mine,
            state="serving",
            sequences=self.running_on(name),
        )
        return Capacity(
            node=name,
            boot="one",
            sequence=self.heard,
            issued_at=START,
            version="0",
            provider=Provider(name="cpu", device="d", flops_per_s=1e12, bytes_per_s=WEIGHT / (BLOCK_MS / 1e3)),
            tier="cloud" if name in self.prices else "edge",
            price_per_hour=self.prices.get(name, 0.0),
            threads=1,
            memory_total_bytes=1 << 40,
            memory_free_bytes=max(0, int((self.room - len(mine)) * BLOCK_BYTES)),
            disk_free_bytes=0,
            load=0,
            stages=(hosted,) if mine else (),
            block_times=tuple(
                BlockTime(
                    model=MODEL, block=b, decode_ms=BLOCK_MS * factor, prefill_ms_per_token=BLOCK_MS * factor / 20
                )
                for b in range(BLOCKS)
            ),
            service=(Service(deployment=CHAT, arrived=int(self.arrived)),) if name == self.names[0] else (),
            slowdown=factor if serves else None,
            on_disk=() if name in self.bare else (StoredBlocks.of(MODEL, range(BLOCKS)),),
        )

    def requests_per_s(self) -> float:
        """By Little's law as many arrive as keep the sequences running, on the plan in force as its nodes are."""
        truth = {name: self.heartbeat(name, noisy=False) for name in self.names}
        ground = surveyed(self.plan.chains, hosts_of(truth, manifest(), MODEL), manifest())
        low, high = 0.0, self.sequences / (forecast_on(ground).e2e_ms / 1e3)
        for _ in range(10):
            rate = (low + high) / 2
            asked = Demand(rate, batch=self.sequences)
            running = rate * forecast_on(ground, demand=asked, settings=SETTINGS).e2e_ms / 1e3
            low, high = (rate, high) if running <= self.sequences else (low, rate)
        return low

    def running_on(self, name: NodeId) -> int:
        """The sequences of the routes over a node."""
        current = self.snapshot.rollout(CHAT).current
        routes = () if current is None else current.routes
        slots = sum(route.max_sequences for route in routes)
        return sum(round(self.sequences * route.max_sequences / slots) for route in routes if name in route.nodes)

    def true_tpot_ms(self, plan: Plan) -> float:
        capacities = {name: self.heartbeat(name, noisy=False) for name in self.names}
        return predict(plan.routes[0], hosts_of(capacities, manifest(), MODEL), manifest()).tpot_ms

    def best_tpot_ms(self) -> float:
        """What the planner would reach if it saw the truth."""
        truth = {name: self.heartbeat(name, noisy=False) for name in self.snapshot.offered}
        free = rooms(self.snapshot, self.wish, manifest(), hosts_of(truth, manifest(), MODEL))
        return self.true_tpot_ms(make_plan(self.wish, manifest(), free, 9_999, None, "the truth").plan)

    def adopt(self, plan: Plan) -> None:
        """Every node is ready at once, and the drain is over at once."""
        self._take(Propose(plan))
        for node in plan.nodes:
            receipt = Receipt(
                node=NodeId(node),
                deployment=CHAT,
                epoch=plan.epoch,
                plan=plan.digest,
                status=ReceiptStatus.READY,
                elapsed_ms=1,
            )
            self.snapshot = fold(
                self.snapshot, RolloutAdvanced(note(self.snapshot.rollout(CHAT), receipt, self.now)), self.now
            )
        self._take(Proceed())
        rollout = self.snapshot.rollout(CHAT)
        self.snapshot = fold(self.snapshot, RolloutAdvanced(replace(rollout, draining=())), self.now)

    def _take(self, command: Propose | Proceed | Withdraw) -> PlanEvent:
        taken = step(self.snapshot.rollout(CHAT), command, self.now)
        assert taken is not None
        self.snapshot = fold(self.snapshot, RolloutAdvanced(taken[0]), self.now)
        return taken[1]
