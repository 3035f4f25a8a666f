"""Frames to where they belong: this node's stages, its ingress, or another node.

Holds one `StageHost` per plan: two epochs that overlap have slots and caches of their own, as each ingress hands out
all the slots of its plan and settings may differ. It also holds the plans, to tell who comes next. On the event loop.
"""

import logging
from collections.abc import Callable
from itertools import pairwise

from agent.compute import ComputeThread, StageQueue
from agent.kv import KvPool
from agent.loader import LoadedPlan
from agent.memory import Device
from agent.peers import Peers
from agent.stage import StageHost
from profiler.kv import length_classes
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Activation, Close, Failure, Frame, Result, unpack
from schemas.plan import Plan

IDLE_LIMIT_US = 120_000_000
"""A sequence nobody drove for two minutes has lost its ingress: a live one drives again after seconds."""

log = logging.getLogger(__name__)


class Stages:
    """Every stage this node runs, and the roads between them."""

    def __init__(
        self,
        node: NodeId,
        device: Device,
        compute: ComputeThread,
        peers: Peers,
        to_ingress: Callable[[Result | Failure], None],
    ) -> None:
        self._node = node
        self._device = device
        self._compute = compute
        self._peers = peers
        self._to_ingress = to_ingress
        self._queue = StageQueue(compute, self._deliver)
        self._hosts: dict[tuple[str, int], StageHost] = {}
        self._plans: dict[tuple[str, int], Plan] = {}

    async def install(self, plan: Plan, loaded: LoadedPlan) -> None:
        """Serve the plan's stages on this node; opens the links that its routes need."""
        key = (plan.deployment, plan.epoch)
        host = self._hosts[key] = StageHost(
            KvPool(self._device, length_classes(plan.settings)), batch_invariant=plan.settings.batch_invariant
        )
        self._plans[key] = plan
        await self._compute.call(lambda: host.install(loaded.engines))
        self._peers.warm(tuple(sorted(self._neighbours(plan))))

    async def remove(self, plan: Plan) -> None:
        """Stop serving the plan and free what only it used."""
        self._plans.pop((plan.deployment, plan.epoch), None)
        host = self._hosts.pop((plan.deployment, plan.epoch), None)
        if host is not None:
            await self._compute.call(lambda: host.remove(plan.epoch))

    def sequences(self, plan: Plan) -> int:
        """Sequences of a plan that hold a slot."""
        host = self._hosts.get((plan.deployment, plan.epoch))
        return 0 if host is None else host.sequences

    def arrived(self, sender: NodeId, data: memoryview) -> None:
        """A frame came in from a peer; a malformed one is dropped with a word in the log."""
        try:
            self.route(unpack(data))
        except ResplitError as error:
            log.warning("dropped a frame from %s: %s", sender, error.message)
        except Exception:  # a frame of nonsense must not cost the link, and the frames behind it
            log.exception("dropped a frame from %s", sender)

    def send(self, node: NodeId, frame: Frame) -> None:
        """Hand a frame to a node, which may be this one."""
        if node == self._node:
            self.route(frame)
        else:
            self._peers.send(node, frame)

    def route(self, frame: Frame) -> None:
        """Act on a frame that is meant for this node."""
        match frame:
            case Result() | Failure():
                self._to_ingress(frame)
            case Close():
                self._close(frame)
            case Activation():
                host = self._hosts.get((frame.deployment, frame.epoch))
                if host is not None:
                    self._queue.put(host, frame)
                else:
                    log.info("dropped a frame of a plan that is not here: %s, epoch %d", frame.deployment, frame.epoch)

    def peer_lost(self, node: NodeId) -> None:
        """A node cannot be reached at all: tell every source whose route needs it from here."""
        for plan in self._plans.values():
            for route in plan.routes:
                if self._node in route.nodes and node in route.nodes:
                    message = f"node {node} cannot be reached from {self._node}"
                    lost = Failure(plan.deployment, plan.epoch, route.index, (), ErrorCode.NODE_LOST, message)
                    if route.source != node:
                        self.send(NodeId(route.source), lost)

    def node_restarted(self, node: NodeId) -> None:
        """Free the slots of sequences whose ingress is a new process, which knows nothing of them."""
        for key, plan in self._plans.items():
            if all(route.source == node for route in plan.routes):
                self._free_idle(key, 0)

    def expire(self) -> None:
        """Free the slots of sequences that nobody drives any more."""
        for key in self._hosts:
            self._free_idle(key, IDLE_LIMIT_US)

    def _free_idle(self, key: tuple[str, int], limit_us: int) -> None:
        host = self._hosts[key]

        def free() -> int:
            idle = host.idle(limit_us)
            host.close(idle)
            return len(idle)

        def freed(count: int) -> None:
            if count:
                log.warning("freed sequences that nobody drives any more: %s, epoch %d, %d", *key, count)

        self._compute.submit(free, freed)

    def _close(self, frame: Close) -> None:
        host = self._hosts.get((frame.deployment, frame.epoch))
        if host is None:
            return
        self._queue.forget(frame.deployment, frozenset(frame.sequences))
        self._compute.submit(lambda: host.close(frame.sequences), lambda _: self._forward_close(frame))

    def _forward_close(self, frame: Close) -> None:
        # Only now: what this stage still computed for these sequences has left already, and a Close must
        # stay behind the last activation all the way.
        plan = self._plans.get((frame.deployment, frame.epoch))
        if plan is None:
            return
        stages = plan.routes[frame.route].stages
        if frame.stage + 1 < len(stages):
            onward = Close(frame.deployment, frame.epoch, frame.route, frame.stage + 1, frame.sequences)
            self.send(stages[frame.stage + 1].node, onward)

    def _deliver(self, frames: list[Frame]) -> None:
        for frame in frames:
            plan = self._plans.get((frame.deployment, frame.epoch))
            if plan is None or frame.route >= len(plan.routes):
                log.info("dropped a frame of a plan that was retired: %s, epoch %d", frame.deployment, frame.epoch)
                continue
            route = plan.routes[frame.route]
            if isinstance(frame, Activation):
                self.send(route.stages[frame.stage].node, frame)
            else:
                self.send(route.source, frame)

    def _neighbours(self, plan: Plan) -> set[NodeId]:
        """Nodes that this node sends to under `plan`."""
        found: set[NodeId] = set()
        for route in plan.routes:
            chain = [route.source, *(stage.node for stage in route.stages), route.source]
            found |= {after for before, after in pairwise(chain) if before == self._node}
        return found - {self._node}
