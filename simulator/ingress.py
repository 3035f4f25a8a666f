"""The ingress of one simulated process: what `agent.ingress` and `agent.door` do on the bus, done in virtual time.

What becomes of an accepted request is decided by the code that runs in production: `agent.served`, its routes, its
crossings, its queue, its answers.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

from agent.attainment import Attainment, services
from agent.crossing import Crossings
from agent.desk import Desk
from agent.generation import Generation
from agent.intake import Job
from agent.run import RouteRun
from agent.served import Served
from agent.urgency import urgency
from agent.usage import Meter
from agent.ways import Position
from models.text import Text
from schemas.base import DeploymentName, NodeId, RequestId
from schemas.capacity import FinishedRequest, RouteName, Service
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Adopted, Failure, Frame, Result, SequenceId
from schemas.heartbeat import Hosting
from schemas.manifest import Manifest
from schemas.plan import Plan
from schemas.request import TextRequest
from schemas.section import EventSection, SeenPlan
from simulator.heirs import Heirs
from simulator.journal import SimJournal, Stream
from simulator.machine import Machine
from simulator.trail import Trail

CHECK_EVERY_S = 0.25
LOOK_EVERY_S = 10.0


class Silent:
    """Text of tokens that mean nothing."""

    def stream(self) -> "Silent":
        return self

    def push(self, token: int) -> str:
        return ""

    def flush(self) -> str:
        return ""


SILENT = cast(Text, Silent())


class Anew(Crossings):
    """As if links were too slow to copy anything."""

    def position(
        self, sequence: SequenceId, old: RouteRun, new: RouteRun, manifest: Manifest, to_come: int
    ) -> Position:
        return replace(super().position(sequence, old, new, manifest, to_come), bytes_per_s=1.0)


class SimIngress:
    """The deployments that are served at one process, and whose requests it answers."""

    def __init__(
        self,
        machine: Machine,
        boot: str,
        stream: Stream,
        trail: Trail,
        send: Callable[[NodeId, Frame], None],
        on_empty: Callable[[DeploymentName, int], None],
        now: Callable[[], float],
        is_over: Callable[[NodeId, str], bool],
        say: Callable[[Any, Any], None],
        numbers: Any,
        listens: Callable[[NodeId, bool], None],
        reaches_bus: Callable[[], bool],
        *,
        hands_over: bool,
    ) -> None:
        """`say(client, reply)`; `listens(node, whether)`: it is one of those that requests are given to. Where it does
        not hand over, what moves is computed anew."""
        self._hands_over = hands_over
        self._machine = machine
        self._on_empty = on_empty
        self._now = now
        self._numbers = numbers
        self._listens = listens
        self.served: dict[DeploymentName, Served] = {}
        self.in_flight: dict[RequestId, tuple[Served, Job]] = {}
        self._attainments: dict[DeploymentName, Attainment] = {}
        self._desk = Desk(
            machine.name,
            lambda reply, model, request: say(reply, model),
            trail,
            now,
            send,
            self.in_flight,
            machine.later,
            on_empty,
        )
        self._heirs = Heirs(
            machine, boot, stream, self.served, self.in_flight, self._desk, is_over, reaches_bus, self._job
        )
        self._say = say
        self._check_at = now() + CHECK_EVERY_S
        self._checks = False
        machine.every(lambda: LOOK_EVERY_S, self._heirs.see, LOOK_EVERY_S)

    # Plans.

    def serve(self, plan: Plan, manifest: Manifest) -> None:
        """Take new requests if a route of `plan` starts here; they may run over any of its routes."""
        if not any(route.source == self._machine.name for route in plan.routes):
            return
        served = self.served.get(plan.deployment)
        if served is None:
            served = self._open(plan.deployment, manifest)
            served.current_nodes = plan.nodes
        for route in plan.routes:
            served.add_route(plan, route, self._numbers)
        served.leave_at = None
        self._listens(self._machine.name, True)
        served.admit()
        self._heirs.look()

    def follow(self, event: EventSection) -> None:
        """Requests in flight go over to what is in force now."""
        served = self.served.get(event.deployment)
        if served is None:
            return
        current = event.current if isinstance(event.current, Plan) else None
        served.follow(current, event.draining, self._numbers)
        for node in event.lost:
            served.node_lost(node)
        if event.lost:
            self._heirs.look()
        if served.runs:
            return
        for job in list(served.queue):
            served.end(job, ResplitError(ErrorCode.NODE_LOST, "the plan that was to run this request was retired"))
        del self.served[event.deployment]
        self._listens(self._machine.name, False)

    def drain(self, plan: SeenPlan) -> None:
        served = self.served.get(plan.deployment)
        if served is None:
            self._on_empty(plan.deployment, plan.epoch)
        else:
            served.drain(plan.epoch)

    def take(self, frame: Result | Failure | Adopted) -> None:
        served = self.served.get(DeploymentName(frame.deployment))
        run = None if served is None else served.runs.get((frame.epoch, frame.route))
        if served is None or run is None:
            return
        if isinstance(frame, Adopted):
            served.adopted(frame)
        else:
            served.take(run, frame)

    def node_lost(self, node: NodeId) -> None:
        for served in self.served.values():
            served.node_lost(node)
        self._heirs.look()

    def heard(self, node: NodeId, hosting: Hosting) -> None:
        """A node's heartbeat: what it runs, it runs."""
        self.speaks(node, hosting)
        for stage in hosting.stages:
            served = self.served.get(DeploymentName(stage.deployment))
            if served is not None and stage.state != "loading":
                served.node_serves(node, stage.epoch)

    # Requests.

    def requested(self, deployment: DeploymentName, request: TextRequest, request_id: RequestId, client: Any) -> None:
        """A request off the bus: stored and accepted, or refused."""
        served = self.served.get(deployment)
        own = None
        try:
            if served is None or not served.runs.current:
                raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, "nothing is deployed here")
            plan = served.runs.current[0].plan
            own = request.slo(plan.slo)
            if request_id in self.in_flight:
                raise ResplitError(ErrorCode.INVALID_REQUEST, "it is in flight already", "request_id")
            served.full(request, sealed=False)
            job = self._job(request, request_id, client, self._now(), plan)
            served.appraise(job)
        except ResplitError as error:
            if served is not None and own is not None:
                served.turned_down(request, own, error.code)
            self._say(client, error)
            return
        self.in_flight[request_id] = (served, job)
        served.accepting.add(job)
        journal = served.journal

        def stored(handle: int | None) -> None:
            served.accepting.discard(job)
            if handle is None:
                self._desk.drop(job)
                self._say(client, ResplitError(ErrorCode.NODE_LOST, "another ingress took over"))
                return
            job.handle = handle
            if not self._desk.holds(job):
                journal.end([handle], ErrorCode.CANCELLED.value)
                return
            if journal is not served.journal:
                self._desk.drop(job)
                return
            served.queue.add(job)
            self._say(client, "accepted")
            served.admit()

        cast(SimJournal, journal).accept(job, (), stored)

    def _job(self, request: TextRequest, request_id: RequestId, client: Any, arrived: float, plan: Plan) -> Generation:
        assert request.token_ids is not None
        slo = request.slo(plan.slo)
        deadline = None if slo.deadline_ms is None else arrived + slo.deadline_ms / 1e3
        if len(request.token_ids) >= plan.settings.context_tokens:
            raise ResplitError(ErrorCode.CONTEXT_EXCEEDED, "the prompt is longer than the context", "token_ids")
        tokens = min(request.max_tokens, plan.settings.context_tokens - len(request.token_ids))
        return Generation(
            request_id,
            request,
            client,
            plan.model,
            request.token_ids,
            tokens,
            frozenset(),
            0,
            Meter(arrived),
            SILENT,
            deadline,
            slo=slo,
            urgency=urgency(slo, arrived, tokens),
        )

    def _open(self, name: DeploymentName, manifest: Manifest) -> Served:
        attainment = self._attainments.setdefault(name, Attainment())
        served = Served(name, manifest, SILENT, self._desk, *self._heirs.begin_life(name), attainment)
        if not self._hands_over:
            served.crossings = Anew(self._desk.send)
        self.served[name] = served
        self._begin_checks()
        return served

    # What time brings.

    def _begin_checks(self) -> None:
        """There is something to check: from the next time that it would be done were it always done."""
        if self._checks:
            return
        self._checks, now = True, self._now()
        while self._check_at <= now:
            self._check_at += CHECK_EVERY_S
        self._machine.later(self._check_at - now, self._check)

    def _check(self) -> None:
        now = self._now()
        self._check_at, self._checks = now, False
        for served, job in list(self.in_flight.values()):
            if job.deadline is not None and now > job.deadline:
                served.end(job, ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed", "deadline_ms"))
        for served in list(self.served.values()):
            if served.leave_at is not None and now >= served.leave_at:
                served.leave_at = None
                self._listens(self._machine.name, False)
                served.admit()
            served.check(now)
        if self.served:
            self._begin_checks()

    # What is reported.

    def speaks(self, node: NodeId, hosting: Hosting) -> None:
        """What a heartbeat says of how fast a node is."""
        self._desk.speeds.heard(node, hosting)

    def driven(self, plan: SeenPlan) -> int:
        """How many sequences of a plan run that this ingress drives."""
        served = self.served.get(plan.deployment)
        return 0 if served is None else served.driven(plan.epoch)

    @property
    def service(self) -> tuple[Service, ...]:
        return services(self._attainments, {name: len(served.queue) for name, served in self.served.items()})

    @property
    def finished(self) -> tuple[FinishedRequest, ...]:
        return self._desk.finished.recent(self._now())

    @property
    def stalled(self) -> tuple[RouteName, ...]:
        return tuple(name for served in self.served.values() for name in served.stalled)
