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
from agent.heirs import goes_on, life_name, process_of
from agent.intake import Job
from agent.run import RouteRun
from agent.served import Served
from agent.urgency import urgency
from agent.usage import Meter
from agent.ways import Position
from bus.journal import Journal
from models.text import Text
from schemas.base import DeploymentName, LifeId, NodeId, RequestId
from schemas.capacity import FinishedRequest, RouteName, Service
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Adopted, Failure, Frame, Result, SequenceId, Token
from schemas.manifest import Manifest
from schemas.plan import Plan, PlanEvent
from schemas.request import TextRequest
from simulator.journal import Life, Owed, SimJournal, Stream, fence
from simulator.machine import Machine
from simulator.trail import Trail

CHECK_EVERY_S = 0.25
LOOK_AGAIN_S = (0.003, 0.3, 1.0)
LOOK_EVERY_S = 10.0
FENCE_S = 0.006
"""A fence, and to read what it closed."""


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
        self._boot = boot
        self._stream = stream
        self._on_empty = on_empty
        self._now = now
        self._is_over = is_over
        self._numbers = numbers
        self._listens = listens
        self._reaches_bus = reaches_bus
        self.served: dict[DeploymentName, Served] = {}
        self.in_flight: dict[RequestId, tuple[Served, Job]] = {}
        self._attainments: dict[DeploymentName, Attainment] = {}
        self._lives = 0
        self._own: set[LifeId] = set()
        self._taken: dict[tuple[LifeId, LifeId], set[RequestId]] = {}
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
        self._say = say
        self._check_at = now() + CHECK_EVERY_S
        self._checks = False
        machine.every(lambda: LOOK_EVERY_S, self._look, LOOK_EVERY_S)

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
        self.look()

    def follow(self, event: PlanEvent) -> None:
        """Requests in flight go over to what is in force now."""
        served = self.served.get(event.deployment)
        if served is None:
            return
        served.follow(event.current, event.draining, self._numbers)
        for node in event.lost:
            served.node_lost(node)
        if event.lost:
            self.look()
        if served.runs:
            return
        for job in list(served.queue):
            served.end(job, ResplitError(ErrorCode.NODE_LOST, "the plan that was to run this request was retired"))
        del self.served[event.deployment]
        self._listens(self._machine.name, False)

    def drain(self, plan: Plan) -> None:
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
        self.look()

    def node_serves(self, node: NodeId, deployment: DeploymentName, epoch: int) -> None:
        if (served := self.served.get(deployment)) is not None:
            served.node_serves(node, epoch)

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
            served.refuse_if_full()
            job = self._job(served, request, request_id, client, self._now(), plan)
            served.appraise(job)
        except ResplitError as error:
            if served is not None and own is not None:
                served.attainment.refused(served.promised, own, error.code)
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

    def _job(
        self, served: Served, request: TextRequest, request_id: RequestId, client: Any, arrived: float, plan: Plan
    ) -> Generation:
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

    # Lives.

    def _open(self, name: DeploymentName, manifest: Manifest) -> Served:
        attainment = self._attainments.setdefault(name, Attainment())
        served = Served(name, manifest, SILENT, self._desk, *self._begin_life(name), attainment)
        if not self._hands_over:
            served.crossings = Anew(self._desk.send)
        self.served[name] = served
        self._begin_checks()
        return served

    def _begin_life(self, name: DeploymentName) -> tuple[LifeId, Journal]:
        life = life_name(self._machine.name, self._boot, self._lives)
        self._lives += 1
        self._own.add(life)
        journal = SimJournal(
            self._stream, Life(life, name), self._machine, self._reaches_bus, lambda: self._superseded(name, life)
        )
        return life, cast(Journal, journal)

    def _superseded(self, name: DeploymentName, life: LifeId) -> None:
        served = self.served.get(name)
        self._own.discard(life)
        if served is None or served.life != life:
            return
        served.superseded()
        served.life, served.journal = self._begin_life(name)

    def look(self) -> None:
        """Something began or ended: see, now and a few times after, whether there is anything to take over."""
        for delay_s in LOOK_AGAIN_S:
            self._machine.later(delay_s, self._look)

    def _look(self) -> None:
        if not self._reaches_bus():
            return
        for served in self.served.values():
            every = [life for life in self._stream.values() if life.deployment == served.name]
            fences = {life.name: life.fenced_by for life in every}
            found = [life for life in every if not life.done]
            heirs = {life.fenced_by for life in found}
            for life in sorted(found, key=lambda life: life.name not in heirs):
                mine = life.name in self._own
                over = life.fenced_by is not None or (not mine and self._is_over(*process_of(life.name)))
                if life.name != served.life and over:
                    self._take_over(served, life, goes_on(life.fenced_by, fences))

    def _take_over(self, served: Served, life: Life, begun_by: LifeId | None) -> None:
        by = life.fenced_by
        others = by is not None and by != served.life
        over = begun_by is None or self._is_over(*process_of(begun_by))
        if begun_by != served.life and (not served.runs.current or not over):
            return
        if by == served.life and (served.life, life.name) in self._taken:
            return
        try:
            owed = fence(self._stream, life.name, served.life, by if others else None)
        except ResplitError:
            return
        taken = self._taken.setdefault((served.life, life.name), set())
        self._machine.later(FENCE_S, lambda: self._adopt(served, life, owed, taken))

    def _adopt(self, served: Served, life: Life, owed: tuple[Owed, ...], taken: set[RequestId]) -> None:
        if served.runs.newest is None:
            return
        plan, journal = served.runs.newest.plan, cast(SimJournal, served.journal)
        new = [one for one in owed if one.job.request_id not in self.in_flight.keys() | taken]
        new.sort(key=lambda one: not one.tokens)
        left = len(new)
        jobs: list[tuple[Generation, list[Token]]] = []

        def all_stored() -> None:
            for other in self._stream.values():
                if other.fenced_by == life.name and not other.done:  # it may owe the same requests still
                    self._taken.setdefault((served.life, other.name), set()).update(taken)
            served.resume([(job, said) for job, said in jobs if self._desk.holds(job)])
            life.owed.clear()
            life.done = True

        def one_stored(job: Generation, tokens: list[int], handle: int | None) -> None:
            nonlocal left
            left -= 1
            if handle is None:
                self._desk.drop(job)
            else:
                job.handle = handle
                taken.add(job.request_id)
                jobs.append((job, [Token(0, 0, i, token) for i, token in enumerate(tokens)]))
            if left == 0 and len(jobs) == len(new):
                all_stored()

        if not new:
            # What is in flight here is answered here only if this life is not over too, which it may not have heard.
            journal.confirm(all_stored)
        for one in new:
            before = one.job
            job = self._job(served, before.request, before.request_id, before.reply, before.meter.arrived, plan)
            job.max_tokens = before.max_tokens
            self.in_flight[job.request_id] = (served, job)
            tokens = list(one.tokens)
            journal.accept(job, tokens, lambda handle, job=job, tokens=tokens: one_stored(job, tokens, handle))  # type: ignore[misc]

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

    def driven(self, plan: Plan) -> int:
        """How many sequences of a plan run that this ingress drives."""
        served = self.served.get(plan.deployment)
        return 0 if served is None else served.driven(plan.epoch)

    @property
    def service(self) -> tuple[Service, ...]:
        return services(self._attainments)

    @property
    def finished(self) -> tuple[FinishedRequest, ...]:
        return self._desk.finished.recent(self._now())

    @property
    def stalled(self) -> tuple[RouteName, ...]:
        return tuple(name for served in self.served.values() for name in served.stalled)
