"""One agent process in virtual time: what `agent.shell` does with sockets and threads, around the same decisions.

`agent.step`, `agent.stages`, `agent.stage`, its batches, slots and hand-over, and the ingress' routes are production's.
"""

from collections.abc import Awaitable, Coroutine, Iterable
from typing import Any, TypeVar, cast

from agent import step as core
from agent.blocktimes import BlockTimes
from agent.handover import PIECE_BYTES
from agent.kv import KvPool
from agent.loader import LoadedPlan
from agent.numbers import sequence_numbers
from agent.stage import StageHost
from agent.stages import EXPIRE_EVERY_S, Stages
from profiler.kv import length_classes
from profiler.memory import kv_memory_bytes, weight_memory_bytes
from profiler.network import TOKEN_BYTES, boundary_bytes
from schemas.base import DeploymentName, Digest, NodeId, NodeName
from schemas.capacity import BlockTime, HostedStage
from schemas.errors import ErrorCode
from schemas.frame import Activation, Adopted, Cache, Failure, Frame, Result
from schemas.heartbeat import Hosting, Presence
from schemas.plan import Plan, PlanEvent, Receipt
from schemas.section import SeenPlan, nothing_of, section_of
from simulator.beacons import Guide
from simulator.compute import SimCompute
from simulator.engine import Clockwork, SimEngine, SimPool
from simulator.ingress import SimIngress
from simulator.machine import Machine
from simulator.model import scaled
from simulator.neighbours import SimNeighbours
from simulator.reports import Reports
from simulator.staging import Stager
from simulator.surroundings import Surroundings

NOTICE_S = 0.012
"""From the end of a process until its neighbours have asked the broker and know."""
LOAD_BLOCK_S = 0.02
"""To open a session, beside reading the file."""

T = TypeVar("T")


class Trusting:
    """No simulated agent asks for what it must not have."""

    def may_drive(self, _plan: SeenPlan, _node: NodeId) -> bool:
        return True

    def may_hold(self, _plan: SeenPlan, _node: NodeId, _blocks: Iterable[int]) -> bool:
        return True


class SimAgent:
    """One process of a node, from its start to its end."""

    def __init__(self, machine: Machine, boot: str, around: Surroundings) -> None:
        self.machine = machine
        self.boot = boot
        self._around = around
        self._kernel = around.kernel
        rng = around.draws.stream(f"agent {machine.name} {boot}")
        self._reports = Reports(self, around, rng)
        self._state = core.State(machine.name)
        self._clock = Clockwork(self._kernel, lambda: machine.factor)
        self._compute = SimCompute(machine, self._clock, around.physics.frame_s, self._reports.computed)
        self.times = BlockTimes(machine.name, lambda: self._kernel.now)
        self._stages = Stages(
            machine.name,
            self._compute,
            self,
            self._to_ingress,
            self._open_host,
            Trusting(),
            lambda node, sequence: self.neighbours.is_gone(node, sequence),  # noqa: PLW0108 - there are none yet
            self._clock.now_us,
        )
        self.neighbours: SimNeighbours = SimNeighbours(
            machine.name, boot, lambda: self._kernel.now, self._look_for, self._stages.ingress_lost
        )
        self.ingress = SimIngress(
            machine,
            boot,
            around.journal,
            around.trail,
            self._stages.send,
            lambda deployment, epoch: self._step(core.Emptied(deployment, epoch)),
            lambda: self._kernel.now,
            self.neighbours.is_over,
            lambda client, what: around.bus.say(machine, client, what),
            sequence_numbers(machine.name, boot, int(rng.integers(1 << 31))),
            around.bus.listens,
            lambda: around.bus.reaches(machine.name),
            hands_over=around.hands_over,
        )
        self.guide = Guide(
            machine,
            lambda: self._kernel.now,
            lambda: {name: one.event for name, one in self._state.deployments.items()},
            lambda: around.bus.reaches(machine.name),
            lambda: around.read_plans(machine.name),
        )
        self.staging = Stager(machine, around, lambda: core.is_loading(self._state))
        self._loaded: dict[tuple[DeploymentName, int], LoadedPlan] = {}
        self._measured: dict[tuple[Digest, int], BlockTime] = {}
        """Of blocks of models that are loaded: what the probe found."""
        self._kinds: dict[tuple[Digest, str], float] = {}
        self._boundary = boundary_bytes(around.physics.manifest, 0)
        self._used: dict[tuple[tuple[str, int], ...], int] = {}
        """Bytes, by the plans that are loaded."""
        machine.later(float(rng.uniform(0, 0.05)), self._reports.say)
        self._expires = False

    # Plans.

    def hear(self, event: PlanEvent) -> None:
        """A plan event, live or read again from its stream."""
        section = section_of(event, self.machine.name) or nothing_of(event)
        # Worlds began before sections did: here everybody hears of whoever is lost, so that a seed is what it was.
        self._step(core.PlanArrived(section.model_copy(update={"lost": event.lost})))
        if not self._around.makes_before_breaks:
            last = [one.event for one in self._state.deployments.values()]
            self._compute.hold(any(one.current is not None and one.candidate is not None for one in last))

    def knows(self, deployment: DeploymentName) -> bool:
        return deployment in self._state.deployments

    def _step(self, event: core.Event) -> None:
        self._state, instructions = core.step(self._state, event, self._kernel.now)
        for instruction in instructions:
            self._act(instruction)
        if instructions:
            self._reports.changed()

    def _act(self, instruction: core.Instruction) -> None:
        match instruction:
            case core.Load(plan):
                self._load(plan)
            case core.Follow(event):
                self.neighbours.declared(event.lost)
                for node in event.lost:
                    self._stages.ingress_lost(node)
                self.ingress.follow(event)
            case core.Serve(plan):
                if isinstance(plan, Plan):
                    self.ingress.serve(plan, self._around.physics.manifest)
            case core.Drain(plan):
                self.ingress.drain(plan)
            case core.Free(plan):
                _run(self._stages.remove(plan))
                self._loaded.pop((plan.deployment, plan.epoch), None)
            case core.Answer():
                self._answer(instruction)
            case core.Ignore():
                pass

    def _load(self, plan: SeenPlan) -> None:
        """Bring what is not on the disk, open what is not open, then install it."""
        blocks = plan.blocks_on(self.machine.name)
        manifest = self._around.physics.manifest
        self._around.loads(self.machine, plan)
        open_already = self._open_blocks(plan.model)
        needed = sum(weight_memory_bytes(manifest.blocks[b]) for b in blocks if b not in open_already)
        cached = {b for key in self._loaded for b in self._blocks_of(key, plan.family)}
        needed += sum(kv_memory_bytes(manifest.blocks[b], plan.settings) for b in blocks if b not in cached)
        free = self.machine.spec.memory_bytes - self.memory_used()
        if needed > free:
            why = f"{ErrorCode.MODEL_TOO_LARGE.value}: {needed} bytes needed, {free} are free"
            self.machine.later(0.001, lambda: self._step(core.LoadFailed(plan, why)))
            return
        missing = [b for b in blocks if b not in self.machine.disk]
        sizes = {b: manifest.blocks[b].weight_bytes for b in blocks}
        fetch_s = self._around.fetch_s(self.machine, sum(sizes[b] for b in missing))
        fresh = [b for b in blocks if b not in open_already]
        load_s = sum(sizes[b] / self.machine.spec.disk_bytes_per_s + LOAD_BLOCK_S for b in fresh) * self.machine.factor
        self._around.books.moved(sum(sizes[b] for b in missing))
        self._loaded[plan.deployment, plan.epoch] = cast(LoadedPlan, plan)

        def done() -> None:
            if (plan.deployment, plan.epoch) not in self._loaded:
                return  # freed in the meantime
            self.machine.disk |= set(blocks)
            for block in blocks:
                self._measure(plan.model, block)
            engines = {
                (plan.epoch, *place): self._engine(stage.blocks)
                for place, stage in plan.placed.items()
                if stage.node == self.machine.name
            }
            loaded = LoadedPlan(manifest, cast(dict[tuple[int, int, int], Any], engines), 0)
            _run(self._stages.install(plan, loaded))
            self._begin_expiring()
            self._step(core.Loaded(plan))

        self.machine.later(fetch_s + load_s + 0.001, done)

    def _engine(self, blocks: range) -> SimEngine:
        manifest = self._around.physics.manifest
        times = [self._true_time(block) for block in blocks]
        return SimEngine(manifest.blocks[blocks[0] : blocks[-1] + 1], times, len(manifest.blocks) - 1, self._clock)

    def _open_host(self, plan: SeenPlan) -> StageHost:
        pool: KvPool = SimPool(length_classes(plan.settings))
        return StageHost(self.machine.name, plan.model, pool, self.times.note, now_us=self._clock.now_us)

    def _measure(self, model: Digest, block: int) -> None:
        """What the probe finds when a block is loaded: once for blocks of a kind, as fast as the machine is then."""
        role = self._around.physics.manifest.blocks[block].role
        factor = self._kinds.setdefault((model, role), self.machine.factor * self._reports.noise() / self.machine.lie)
        self._measured.setdefault((model, block), scaled(self._true_time(block), factor))

    def _true_time(self, block: int) -> BlockTime:
        return self._around.physics.time_of(self.machine.name, self.machine.spec, block)

    def _open_blocks(self, model: Digest) -> set[int]:
        return {
            b
            for plan in self.plans()
            for b in plan.blocks_on(self.machine.name)
            if (plan.deployment, plan.epoch) in self._loaded and plan.model == model
        }

    def _blocks_of(self, key: tuple[DeploymentName, int], family: Digest) -> set[int]:
        return {
            b
            for p in self.plans()
            if (p.deployment, p.epoch) == key and p.family == family
            for b in p.blocks_on(self.machine.name)
        }

    def memory_used(self) -> int:
        loaded = [plan for plan in self.plans() if (plan.deployment, plan.epoch) in self._loaded]
        key = tuple((plan.deployment, plan.epoch) for plan in loaded)
        used = self._used.get(key)
        if used is None:
            used = self._used[key] = self._footprint(loaded)
        self._around.books.memory(self.machine, used)
        return used

    def _footprint(self, loaded: list[SeenPlan]) -> int:
        """What these plans take together: weights of a model and caches of a family once."""
        manifest = self._around.physics.manifest
        weights: set[tuple[Digest, int]] = set()
        caches: dict[tuple[Digest, int], int] = {}
        for plan in loaded:
            family = plan.family
            for block in plan.blocks_on(self.machine.name):
                weights.add((plan.model, block))
                caches[family, block] = kv_memory_bytes(manifest.blocks[block], plan.settings)
        return sum(weight_memory_bytes(manifest.blocks[block]) for _, block in weights) + sum(caches.values())

    def _answer(self, answer: core.Answer) -> None:
        plan = answer.plan
        self._around.bus.receipt(
            Receipt(
                node=self.machine.name,
                deployment=plan.deployment,
                epoch=plan.epoch,
                plan=plan.digest,
                status=answer.status,
                error=answer.error,
                elapsed_ms=round(1e3 * answer.elapsed_s, 3),
            )
        )

    # Frames.

    def _begin_expiring(self) -> None:
        """There may be sequences that nobody drives any more, for as long as there are plans."""
        if not self._expires:
            self._expires = True
            self.machine.later(EXPIRE_EVERY_S, self._expire)

    def _expire(self) -> None:
        self._expires = False
        if self._loaded:
            self._stages.expire(self.neighbours.numbers)
            self._begin_expiring()

    def send(self, node: NodeId, frame: Frame) -> None:
        """Hand a frame to another node."""
        self._around.frame(self.machine.name, node, frame, self._size(frame))

    def warm(self, nodes: tuple[NodeId, ...]) -> None:
        """Links are open."""

    def piece_bytes(self, node: NodeId) -> int:
        """What is asked for comes whole."""
        return PIECE_BYTES

    def arrived(self, frame: Frame) -> None:
        self._stages.route(frame)

    def _to_ingress(self, frame: Result | Failure | Adopted) -> None:
        self.ingress.take(frame)

    def _size(self, frame: Frame) -> float:
        match frame:
            case Activation():
                tokens = sum(item.count for item in frame.items)
                return float(tokens * (TOKEN_BYTES if frame.stage == 0 else self._boundary))
            case Cache():
                return float(sum(array.nbytes for array in frame.tensors.values()))
            case _:
                return 0.0

    # Peers.

    def heartbeat_arrived(self, presence: Presence, hosting: Hosting | None) -> None:
        """A peer's heartbeat, and what it says to this node alone."""
        if self.neighbours.heard(presence) and hosting is not None:
            self.ingress.heard(NodeId(presence.node), hosting)

    def link_ended(self, node: NodeId) -> None:
        """A peer closed its link: ask the broker whether it is gone."""
        if any(node in plan.nodes for plan in self.plans()):
            self._look_for(node)

    def _look_for(self, node: NodeId) -> None:
        def found() -> None:
            if not self._around.is_alive(node):
                self.neighbours.lose(node)
                self._reports.changed()
                self._stages.peer_lost(node)
                self._stages.ingress_lost(node)
                self.ingress.node_lost(node)

        self.machine.later(NOTICE_S, found)

    def neighbourhood(self) -> tuple[NodeId, ...]:
        """The other nodes of the plans that this one has a part in, ascending: for each of them noise is drawn."""
        return tuple(sorted({NodeId(n) for plan in self.plans() for n in plan.nodes} - {self.machine.name}))

    # What it reports of.

    @property
    def frame_ms(self) -> float | None:
        return self._stages.frame_ms

    def plans(self) -> list[SeenPlan]:
        """Those that it has a part in."""
        return core.plans_of(self._state)

    def ingresses(self, deployment: DeploymentName) -> tuple[NodeName, ...]:
        return core.ingresses(self._state, deployment)

    def hosted(self) -> tuple[HostedStage, ...]:
        return core.hosted(self._state, lambda plan: self.ingress.driven(plan) + self._stages.passing(plan))

    def block_times(self) -> tuple[BlockTime, ...]:
        """What the probe found, and calls since then."""
        return self.times.now(self._measured, self.plans())


def _run(work: Coroutine[Any, Any, T] | Awaitable[T]) -> None:
    """Run a coroutine that waits for nothing."""
    try:
        cast(Coroutine[Any, Any, T], work).send(None)
    except StopIteration:
        return
    raise AssertionError("it waits for something that takes time here")
