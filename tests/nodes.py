"""Nodes and their ingress in one process: production stages, caches, driver and crossings; a seed rules the roads.

Frames between two nodes keep their order, as over a link; between pairs the seed decides who comes first. A seeded
share of them is lost or comes twice.
"""

import itertools
import random
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

from agent.crossing import Crossings
from agent.handover import Outgoing
from agent.kv import KvPool
from agent.run import RouteRun
from agent.stage import Queued, StageHost
from profiler.kv import length_classes
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Settings, Stage
from schemas.frame import (
    Activation,
    Adopt,
    Adopted,
    Cache,
    Close,
    Failure,
    Fetch,
    Frame,
    Result,
    Reuse,
    Sampling,
    SequenceId,
    Token,
)
from schemas.framing import pack, unpack
from schemas.plan import Plan, Route
from tests.route_harness import MODEL, EngineCache

INGRESS = NodeId("n0")
PIECE_BYTES = 4096
"""Caches cross in several pieces."""
STEP_S = 0.01
"""Virtual time per delivered frame."""


def plan_of(epoch: int, stages: list[Stage], settings: Settings, block_count: int) -> Plan:
    """A plan of one route that begins where its first stage is."""
    route = Route(index=0, source=stages[0].node, stages=tuple(stages), max_sequences=settings.max_sequences)
    return Plan(
        deployment=DeploymentName("d"),
        model=MODEL,
        epoch=epoch,
        block_count=block_count,
        settings=settings,
        routes=(route,),
        reason="a test",
    )


class Nodes:
    """The nodes' side: stage hosts and the roads between them."""

    def __init__(self, engines: EngineCache, settings: Settings, seed: int = 0, *, lossy: float = 0.0) -> None:
        self.engines = engines
        self.settings = settings
        self.hosts: dict[NodeId, StageHost] = {}
        self.plans: dict[int, Plan] = {}
        self.to_ingress: Callable[[Frame], None] = lambda _: None
        self.moved: dict[int, int] = defaultdict(int)
        """By block: tokens whose caches travelled."""
        self._channels: dict[tuple[NodeId, NodeId], deque[bytes]] = defaultdict(deque)
        self._draw = random.Random(seed)
        self._lossy = lossy

    def host(self, node: NodeId) -> StageHost:
        if node not in self.hosts:
            self.hosts[node] = StageHost(
                node, MODEL, KvPool(self.engines.device, length_classes(self.settings)), lambda _: None
            )
        return self.hosts[node]

    def install(self, plan: Plan) -> None:
        self.plans[plan.epoch] = plan
        for i, stage in enumerate(plan.routes[0].stages):
            self.host(stage.node).install({(plan.epoch, 0, i): self.engines.engine(stage.first, stage.last)})

    def remove(self, epoch: int) -> None:
        del self.plans[epoch]
        for host in self.hosts.values():
            host.remove(epoch)

    def send(self, source: NodeId, target: NodeId, frame: Frame) -> None:
        data = b"".join(bytes(piece) for piece in pack(frame))
        self._channels[source, target].append(data)

    def lossless(self) -> None:
        """From now on every frame arrives, once."""
        self._lossy = 0.0

    def deliver_one(self) -> bool:
        """Hand one frame over; False if none is under way."""
        busy = [channel for channel, frames in self._channels.items() if frames]
        if not busy:
            return False
        channel = self._draw.choice(busy)
        data = self._channels[channel].popleft()
        luck = self._draw.random()
        if luck < self._lossy:
            return True
        self._arrived(channel[1], unpack(data))
        if luck > 1 - self._lossy:
            self._arrived(channel[1], unpack(data))
        return True

    def _arrived(self, node: NodeId, frame: Frame) -> None:
        host = self.host(node)
        match frame:
            case Activation():
                for out in host.run([Queued(frame, 0)]):
                    self._pass_on(node, out)
            case Close():
                host.close(frame.sequences, frame.epoch)
                stages = self.plans[frame.epoch].routes[0].stages if frame.epoch in self.plans else ()
                if frame.stage + 1 < len(stages):
                    onward = Close(frame.deployment, frame.epoch, frame.route, frame.stage + 1, frame.sequences)
                    self.send(node, NodeId(stages[frame.stage + 1].node), onward)
            case Reuse():
                host.reuse(frame)
                stages = self.plans[frame.epoch].routes[0].stages if frame.epoch in self.plans else ()
                if frame.stage + 1 < len(stages):
                    self.send(node, NodeId(stages[frame.stage + 1].node), replace(frame, stage=frame.stage + 1))
            case Adopt():
                self._send_all(node, host.handover.adopt(frame))
            case Fetch():
                self._send_all(node, host.handover.provide(frame, PIECE_BYTES))
            case Cache():
                for block in range(frame.first, frame.last + 1):
                    self.moved[block] += frame.stop - frame.start
                self._send_all(node, host.handover.receive(frame))
            case Result() | Failure() | Adopted():
                self.to_ingress(frame)

    def _send_all(self, node: NodeId, outgoing: Outgoing) -> None:
        for target, frame in outgoing:
            self.send(node, target, frame)

    def _pass_on(self, node: NodeId, frame: Activation | Result | Failure) -> None:
        plan = self.plans.get(frame.epoch)
        if isinstance(frame, Activation):
            if plan is not None:
                self.send(node, NodeId(plan.routes[0].stages[frame.stage].node), frame)
        else:
            self.send(node, NodeId(frame.ingress), frame)


@dataclass
class Sequence:
    """One request at the ingress."""

    prompt: list[int]
    wanted: int
    sampling: Sampling
    out: list[Token] = field(default_factory=list)
    cached: int = 0
    """Tokens of the prompt whose caches an earlier sequence left."""


class Ingress:
    """The ingress' side: runs by epoch, and the crossings between them. A sequence that cannot go on is recomputed."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        nodes.to_ingress = self.take
        self.now = 0.0
        self.send = partial(nodes.send, INGRESS)
        self.numbers = itertools.count(1)
        self.crossings = Crossings(self.send)
        self.runs: dict[int, RouteRun] = {}
        self.current = 0
        self.live: dict[SequenceId, tuple[Sequence, RouteRun]] = {}
        self.waiting: deque[Sequence] = deque()
        self.crossed = 0
        self.recomputed = 0

    def commit(self, plan: Plan) -> None:
        """New sequences, and those that run, go to `plan`."""
        self.nodes.install(plan)
        self.runs[plan.epoch] = RouteRun(plan, plan.routes[0], INGRESS, self.numbers, self.send)
        for epoch, run in self.runs.items():
            run.leaving = epoch != plan.epoch
            if run.leaving:
                run.drop_kept()
                self.runs[plan.epoch].learn_from(run)
        self.current = plan.epoch

    def ask(self, prompt: list[int], wanted: int, sampling: Sampling) -> Sequence:
        sequence = Sequence(prompt, wanted, sampling)
        self.waiting.append(sequence)
        return sequence

    def run(self, frames: int | None = None) -> None:
        """Deliver so many frames, or all there are until every sequence has ended."""
        delivered = 0
        quiet = 0
        self._pump()
        while (frames is None and (self.live or self.waiting)) or (frames is not None and delivered < frames):
            if self.nodes.deliver_one():
                self.now += STEP_S
                delivered += 1
                quiet = 0
            else:
                self.now += 0.25
                quiet += 1
                assert quiet < 4000, f"nothing moves any more: {list(self.live)}, {self.crossings._under_way}"
                if frames is not None and quiet > 200:
                    return
            self._check()
            self._pump()

    def retire(self) -> None:
        """Free every epoch that nothing runs on."""
        for epoch in [e for e in self.runs if e != self.current]:
            used = any(run is self.runs[epoch] for _, run in self.live.values())
            if not used and not self.crossings.lead_to(epoch):
                del self.runs[epoch]
                self.nodes.remove(epoch)

    def take(self, frame: Frame) -> None:
        match frame:
            case Adopted():
                lost = self.crossings.take(frame, self.now)
                if lost is not None:
                    self._recompute(lost)
            case Failure():
                for sequence in frame.sequences:
                    if sequence in self.live and self.live[sequence][1].plan.epoch == frame.epoch:
                        self._recompute(sequence)
            case Result():
                run = self.runs.get(frame.epoch)
                for answered in run.take(frame, self.now) if run is not None else ():
                    self._taken(answered.sequence, answered.token)
            case _:
                raise AssertionError(frame)

    def _taken(self, number: SequenceId, token: Token | None) -> None:
        if token is None:
            return
        sequence, run = self.live[number]
        assert token.index == len(sequence.out), "each index comes once, in order"
        sequence.out.append(token)
        if len(sequence.out) < sequence.wanted:
            run.go_on(number, token.token)
            return
        self.crossings.forget(number)
        run.finish(number, self.now)
        del self.live[number]

    def _recompute(self, number: SequenceId) -> None:
        sequence, run = self.live.pop(number)
        self.crossings.forget(number)
        run.end([number], broken=True)
        self.recomputed += 1
        self.waiting.appendleft(sequence)

    def _check(self) -> None:
        for run in self.runs.values():
            for number in run.check(self.now):
                self._recompute(number)
        for number in self.crossings.check(self.now):
            self._recompute(number)

    def _pump(self) -> None:
        current = self.runs[self.current]
        while self.waiting:
            sequence = self.waiting[0]
            known = tuple(token.token for token in sequence.out)
            tokens_max = len(sequence.prompt) + sequence.wanted
            started = current.start(tuple(sequence.prompt), tokens_max, sequence.sampling, known, self.now)
            if started is None:
                break
            sequence.cached = started.cached
            self.live[started.sequence] = (self.waiting.popleft(), current)
        for crossed in self.crossings.finished(self.now):
            self.live[crossed.sequence] = (self.live[crossed.sequence][0], crossed.new)
            self.crossed += 1
        for number, (_, run) in list(self.live.items()):
            if run is not current:
                self.crossings.begin(number, run, current, self.now)
        for run in self.runs.values():
            run.pump(self.now)
