"""Frames to where they belong: this node's stages, its ingress, or another node.

Holds one `StageHost` per family of plans: epochs that run the same model in the same way share slots and caches, so
that a block which stays on this node goes on as if nothing had happened. Plans of other settings have a host of their
own. It also holds the plans, to tell who comes next. On the event loop.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol, assert_never

from agent.compute import Computes, StageQueue
from agent.guard import Guard
from agent.handover import Handover, Outgoing, nothing_for
from agent.loader import LoadedPlan
from agent.stage import StageHost, StageOutput
from schemas.base import Digest, NodeId
from schemas.errors import ErrorCode
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
    SequenceId,
)
from schemas.plan import Route
from schemas.section import RouteSection, SeenPlan

EXPIRE_EVERY_S = 5.0
"""Between two looks for sequences that nobody drives any more."""
IDLE_LIMIT_US = 120_000_000
"""A sequence nobody drove for two minutes has lost its ingress: a live one drives again after seconds."""
STRAY_LIMIT_US = 5_000_000
"""One that another process drove than the one there is now: frames may come after the word that who sent them is gone,
and were that process the newer one, it would have been heard by then."""

ToIngress = Result | Failure | Adopted

log = logging.getLogger(__name__)


class Roads(Protocol):
    """The ways to other nodes; `agent.peers.Peers`."""

    def send(self, node: NodeId, frame: Frame, /) -> None: ...
    def warm(self, nodes: tuple[NodeId, ...], /) -> None: ...
    def piece_bytes(self, node: NodeId, /) -> int: ...


class Stages:
    """Every stage this node runs, and the roads between them."""

    def __init__(
        self,
        node: NodeId,
        compute: Computes,
        peers: Roads,
        to_ingress: Callable[[ToIngress], None],
        open_host: Callable[[SeenPlan], StageHost],
        guard: Guard,
        is_gone: Callable[[NodeId, SequenceId], bool],
        now_us: Callable[[], int] = lambda: time.monotonic_ns() // 1000,
    ) -> None:
        """`open_host` makes the host of a family of plans, given one of them; `is_gone` says whether the process that
        drove a sequence of an ingress is (`agent.neighbours`)."""
        self._node = node
        self._compute = compute
        self._peers = peers
        self._to_ingress = to_ingress
        self._open_host = open_host
        self._guard = guard
        self._is_gone = is_gone
        self._queue = StageQueue(compute, self._deliver, now_us)
        self._hosts: dict[Digest, StageHost] = {}
        """By family."""
        self._plans: dict[tuple[str, int], SeenPlan] = {}
        self._host_of: dict[tuple[str, int], StageHost] = {}
        """Of each of these plans: a family is a digest, too dear to make for every frame."""

    async def install(self, plan: SeenPlan, loaded: LoadedPlan) -> None:
        """Serve the plan's stages on this node; opens the links that its routes need."""
        host = self._hosts.get(plan.family)
        if host is None:
            host = self._hosts[plan.family] = self._open_host(plan)
        self._plans[plan.deployment, plan.epoch] = plan
        self._host_of[plan.deployment, plan.epoch] = host
        await self._compute.call(lambda: host.install(loaded.engines))
        self._peers.warm(tuple(sorted(self._neighbours(plan))))

    async def remove(self, plan: SeenPlan) -> None:
        """Stop serving the plan and free what only it used."""
        self._plans.pop((plan.deployment, plan.epoch), None)
        self._host_of.pop((plan.deployment, plan.epoch), None)
        host = self._hosts.get(plan.family)
        if host is None:
            return
        await self._compute.call(lambda: host.remove(plan.epoch))
        if not any(other.family == plan.family for other in self._plans.values()):
            self._hosts.pop(plan.family, None)  # two plans of a family may be removed at once

    def passing(self, plan: SeenPlan) -> int:
        """Sequences of a plan that run here and that others drive."""
        host = self._hosts.get(plan.family)
        return 0 if host is None else host.sequences(plan.epoch, but_of=self._node)

    @property
    def frame_ms(self) -> float | None:
        """What a frame costs this node beside waiting and computing; None before there were any."""
        return self._queue.frame_ms

    def send(self, node: NodeId, frame: Frame) -> None:
        """Hand a frame to a node, which may be this one."""
        if node == self._node:
            self.route(frame)
        else:
            self._peers.send(node, frame)

    def route(self, frame: Frame) -> None:
        """Act on a frame that is meant for this node."""
        match frame:
            case Result() | Failure() | Adopted():
                self._to_ingress(frame)
            case Close():
                self._close(frame)
            case Reuse():
                self._reuse(frame)
            case Activation():
                host = self._host(frame.deployment, frame.epoch)
                if self._is_gone(NodeId(frame.ingress), frame.items[0].sequence):
                    log.info("dropped a frame of a process that is gone, of %s", frame.ingress)
                elif host is not None:
                    self._queue.put(host, frame)
                else:
                    self._not_here(frame.deployment, frame.epoch)
            case Adopt():
                if self._is_gone(NodeId(frame.ingress), frame.sequence):
                    log.info("dropped what a process that is gone wanted handed over, of %s", frame.ingress)
                    return
                self._hand_over(self._host(frame.deployment, frame.epoch), lambda h: h.adopt(frame), frame)
            case Fetch():
                self._provide(frame)
            case Cache():
                self._hand_over(self._host(frame.deployment, frame.epoch), lambda h: h.receive(frame), frame)
            case _:
                assert_never(frame)

    def peer_lost(self, node: NodeId) -> None:
        """A node cannot be reached at all: tell every ingress whose route needs it from here."""
        message = f"node {node} cannot be reached from {self._node}"
        for plan in self._plans.values():
            for route in plan.routes:
                if self._node in route.nodes and node in route.nodes:
                    self._tell_ingresses(plan, route, message, node)

    def ingress_lost(self, node: NodeId) -> None:
        """Free the slots of sequences whose ingress is gone, or a new process, which knows nothing of them. Whoever
        answers for them now needs the slots; an ingress that lives all the same computes them anew."""
        for host in self._hosts.values():
            self._free(host, lambda host: host.of_ingress(node))

    def expire(self, present: Mapping[NodeId, int]) -> None:
        """Free the slots of sequences that nobody drives any more; `present` are the numbers of the processes that are
        there, by node, as far as they were heard."""
        for host in self._hosts.values():
            self._free(host, lambda host: host.idle(IDLE_LIMIT_US, STRAY_LIMIT_US, present))

    def _host(self, deployment: str, epoch: int) -> StageHost | None:
        return self._host_of.get((deployment, epoch))

    def _not_here(self, deployment: str, epoch: int) -> None:
        log.info("dropped a frame of a plan that is not here: %s, epoch %d", deployment, epoch)

    def _hand_over(
        self, host: StageHost | None, call: Callable[[Handover], Outgoing], frame: Adopt | Fetch | Cache
    ) -> None:
        if host is None:
            self._not_here(frame.deployment, frame.epoch)
            return
        handover = host.handover
        self._compute.submit(lambda: call(handover), self._send_all)

    def _provide(self, frame: Fetch) -> None:
        node, plan = NodeId(frame.node), self._plans.get((frame.deployment, frame.before))
        if plan is None:
            self._not_here(frame.deployment, frame.before)
        elif self._guard.may_hold(plan, node, range(frame.first, frame.last + 1)):
            most_bytes = self._peers.piece_bytes(node)
            host = self._host(frame.deployment, frame.before)
            self._hand_over(host, lambda handover: handover.provide(frame, most_bytes), frame)
        else:
            self.send(node, nothing_for(frame, self._node))

    def _send_all(self, outgoing: Outgoing) -> None:
        for node, frame in outgoing:
            self.send(node, frame)

    def _tell_ingresses(self, plan: SeenPlan, route: Route | RouteSection, message: str, lost: NodeId) -> None:
        host = self._hosts.get(plan.family)
        if host is None:
            return

        def tell(found: tuple[str, ...]) -> None:
            for ingress in dict.fromkeys((route.source, *found)):
                if ingress != lost:
                    of = (plan.deployment, plan.epoch, route.index, ())
                    self.send(NodeId(ingress), Failure(*of, ingress, ErrorCode.NODE_LOST, message))

        self._compute.submit(lambda: host.ingresses(plan.epoch, route.index), tell)

    def _free(self, host: StageHost, choose: Callable[[StageHost], tuple[SequenceId, ...]]) -> None:
        def free() -> int:
            chosen = choose(host)
            host.close(chosen)
            return len(chosen)

        def freed(count: int) -> None:
            if count:
                log.warning("freed sequences that nobody drives any more: %d", count)

        self._compute.submit(free, freed)

    def _close(self, frame: Close) -> None:
        host = self._host(frame.deployment, frame.epoch)
        if host is None:
            return
        self._queue.forget(frame.deployment, frame.epoch, frozenset(frame.sequences))
        self._compute.submit(lambda: host.close(frame.sequences, frame.epoch), lambda _: self._forward(frame))

    def _reuse(self, frame: Reuse) -> None:
        host = self._host(frame.deployment, frame.epoch)
        if host is not None:
            self._compute.submit(lambda: host.reuse(frame), lambda _: self._forward(frame))

    def _forward(self, frame: Close | Reuse) -> None:
        # Only now: what this stage still computed for these sequences has left already, and a Close must stay behind
        # the last activation all the way, as a Reuse ahead of the first.
        plan = self._plans.get((frame.deployment, frame.epoch))
        after = None if plan is None else plan.placed.get((frame.route, frame.stage + 1))
        if after is not None:
            self.send(after.node, replace(frame, stage=frame.stage + 1))

    def _deliver(self, frames: list[StageOutput]) -> None:
        for frame in frames:
            plan = self._plans.get((frame.deployment, frame.epoch))
            if plan is None:
                log.info("dropped a frame of a plan that was retired: %s, epoch %d", frame.deployment, frame.epoch)
                continue
            if isinstance(frame, Activation):
                self._pass_on(plan, frame)
                continue
            if isinstance(frame, Result) and not self._guard.may_drive(plan, NodeId(frame.ingress)):
                continue
            self.send(NodeId(frame.ingress), frame)
            if isinstance(frame, Failure) and frame.code == ErrorCode.OVERLOADED:
                self._tell_keepers(plan, frame)

    def _pass_on(self, plan: SeenPlan, frame: Activation) -> None:
        after = plan.placed.get((frame.route, frame.stage))
        if after is None:
            log.info("dropped a frame for a stage that nobody is: %s, epoch %d", frame.deployment, frame.epoch)
        else:
            self.send(after.node, frame)

    def _tell_keepers(self, plan: SeenPlan, refused: Failure) -> None:
        """Every ingress that may keep caches of what has ended here hears that another's sequence found no room."""
        for other in [other for other in self._plans.values() if other.family == plan.family]:  # they share the slots
            for route in other.routes:
                if route.source != refused.ingress and self._node in route.nodes:
                    told = replace(refused, epoch=other.epoch, route=route.index, ingress=route.source)
                    self.send(NodeId(route.source), told)

    def _neighbours(self, plan: SeenPlan) -> set[NodeId]:
        """Nodes that this node sends to under `plan`."""
        placed, sources = plan.placed, {route.index: route.source for route in plan.routes}
        first = {stage.node for (route, i), stage in placed.items() if i == 0 and sources[route] == self._node}
        # Behind the last stage of a route comes its source.
        after = {
            placed[route, i + 1].node if (route, i + 1) in placed else sources[route]
            for (route, i), stage in placed.items()
            if stage.node == self._node
        }
        return {NodeId(node) for node in first | after} - {self._node}
