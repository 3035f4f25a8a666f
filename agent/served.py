"""One deployment at its ingress: requests that wait, requests that run, and what each answer means to them.

A request that was accepted ends in output or in one typed error; that is held here. On the event loop.
"""

import asyncio
import itertools
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from agent.answers import Answers
from agent.attainment import Attainment
from agent.crossing import Crossings
from agent.desk import Desk
from agent.fallback import Fallback
from agent.generation import Generation
from agent.intake import Job, asked_for, promised
from agent.pipelinejob import PipelineJob
from agent.run import RouteRun
from agent.runs import Running, Runs, succeeds
from agent.tensorjob import TensorJob
from agent.urgency import urgency
from agent.waiting import Waiting
from agent.ways import Way, choose
from bus.journal import Journal
from models.text import Text
from schemas.audit import AuditKind
from schemas.base import DeploymentName, LifeId, NodeId
from schemas.capacity import RouteName
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Adopted, Failure, Result, SequenceId, Token
from schemas.manifest import Manifest
from schemas.plan import Plan, Route
from schemas.request import Request
from schemas.section import SeenPlan
from schemas.slo import Slo

INTERRUPTED_MAX_S = 60.0
"""A request whose nodes are gone waits this long for a plan that can run it."""
LOADING_MAX_S = 600.0
"""One whose model is cold waits this long until it is loaded: others may not make room, or its files come slowly."""
RECOVERIES_MAX = 3
HANDOVER_S = 1.0
"""A plan that drains with no successor here takes requests for this much longer: the node that serves the successor
may not listen yet, and a client would find nobody."""
STALLED_S = 3.0
"""Before a route whose steps stay unanswered is tried again; by then there may be another."""
FULL_S = 0.1
"""Another ingress' sequences may hold a route's last slots; after this long it is tried again."""
RECOVERABLE = frozenset({ErrorCode.NODE_LOST, ErrorCode.STALE_EPOCH, ErrorCode.STEP_LOST, ErrorCode.OVERLOADED})
"""Failures that say nothing against the request: it is computed anew."""

log = logging.getLogger(__name__)


@dataclass(eq=False)
class Served:
    """The routes that this node's requests of one deployment may run over, and those requests."""

    name: DeploymentName
    manifest: Manifest
    text: Text | None
    desk: Desk
    life: LifeId
    journal: Journal
    attainment: Attainment
    accepting: set[Job] = field(default_factory=set)
    """Requests that are being stored in the journal, before they wait in the queue."""
    current_nodes: tuple[str, ...] = ()
    """Nodes of the plan in force. If this one is not among them it serves its last requests to their end."""
    runs: Runs = field(init=False)
    queue: Waiting = field(default_factory=Waiting)
    jobs: dict[SequenceId, tuple[Job, RouteRun]] = field(default_factory=dict)
    leave_at: float | None = None
    """When this node stops listening, as no plan here succeeds the one that drains."""
    withdrawing: asyncio.Task[None] | None = None
    stranded: dict[Job, float] = field(default_factory=dict)
    """Requests that nothing here can run, and since when."""
    asked: set[int] = field(default_factory=set)
    """Epochs that drain and that this node is to say it has emptied, even those that it never drove anything over."""

    def __post_init__(self) -> None:
        self.runs = Runs(self.desk.speeds)
        self.crossings = Crossings(self.desk.send)
        self.answers = Answers(self)
        self.fallback = Fallback(self)

    @property
    def slots_free(self) -> int:
        """Slots that a request which came now could have."""
        return sum(run.slots_free for run in self.runs.open)

    def promised_to(self, request: Request) -> Slo | None:
        """The class that counts for a request: the deployment's, or that of its pipeline's task."""
        newest = self.runs.newest
        return None if newest is None else promised(self.manifest, newest.plan, request)

    @property
    def in_flight(self) -> list[Job]:
        """Its requests that have not ended, those among them that are being stored."""
        return [job for served, job in self.desk.in_flight.values() if served is self]

    @property
    def stalled(self) -> tuple[RouteName, ...]:
        """Routes on which a step is overdue."""
        return tuple(
            RouteName(deployment=self.name, epoch=epoch, route=index)
            for (epoch, index), run in self.runs.items()
            if run.driver.stalled
        )

    def on(self, run: RouteRun) -> list[SequenceId]:
        """The sequences that run over one route."""
        return [sequence for sequence, (_, over) in self.jobs.items() if over is run]

    def driven(self, epoch: int) -> int:
        """How many sequences of an epoch run that this ingress drives."""
        return sum(run.plan.epoch == epoch for _, run in self.jobs.values())

    def turned_down(self, request: Request, own: Slo, code: ErrorCode) -> None:
        """A request of class `own` was refused."""
        self.attainment.refused(self.promised_to(request), own, code, asked_for(self.manifest, request))

    @property
    def waiting(self) -> int:
        """Requests that were accepted and are not begun, and those for a cold model that a cloud answers meanwhile."""
        return len(self.queue) + self.fallback.waiting

    def full(self, request: Request, *, sealed: bool) -> ResplitError | None:
        """OVERLOADED where as many requests wait as may; raised, unless a cloud may take this one."""
        waiting = len(self.queue) + len(self.accepting)
        if waiting < self.runs.current[0].plan.settings.max_queued + self.slots_free:
            return None
        refusal = ResplitError(
            ErrorCode.OVERLOADED, f"all slots are taken and {waiting} requests wait; try again later"
        )
        if not self.fallback.may_take(request, sealed=sealed):
            self.attainment.turned_away(asked_for(self.manifest, request))
            raise refusal
        return refusal

    def appraise(self, job: Job, full: ResplitError | None = None) -> None:
        """Refuse a new request that cannot be run, as the queue is `full`, or cannot meet its deadline, unless a cloud
        takes it: raises OVERLOADED, or DEADLINE_UNATTAINABLE with the estimate.

        Targets without a deadline are objectives: nothing is refused for them.
        """
        self.attainment.came(job)
        try:
            if full is not None:
                raise full
            self._appraise(job)
        except ResplitError as refusal:
            self.fallback.choose(job, refusal)

    def _appraise(self, job: Job) -> None:
        if job.slo.deadline_ms is None:
            return
        if (cold := self.runs.cold) is not None:
            self._appraise_loading(cold.loads_s, job.slo.deadline_ms)
        storing = [other for other in self.accepting if other.urgency.due <= job.urgency.due]
        ahead = [*self.queue.before(job), *storing]
        seen = self.runs.forecast(job, self._running(), ahead, self.desk.now())
        if seen is None:
            return
        if not seen.attains(job.slo.deadline_ms):
            message = (
                f"this would take about {seen.e2e_ms:.0f} ms, {seen.wait_ms:.0f} ms of it waiting for a slot, and may "
                f"take {job.slo.deadline_ms:g} ms; allow more time, ask for fewer tokens, or try again later"
            )
            code, estimate_ms = ErrorCode.DEADLINE_UNATTAINABLE, round(seen.e2e_ms, 3)
            raise ResplitError(code, message, "deadline_ms", estimate_ms)
        if isinstance(job, Generation):
            rest_s = (seen.e2e_ms - seen.ttft_ms) / 1e3
            job.urgency = urgency(job.slo, job.meter.arrived, job.max_tokens, rest_s)

    def _appraise_loading(self, loads_s: float | None, deadline_ms: float) -> None:
        if loads_s is not None and 1e3 * loads_s > deadline_ms:
            message = (
                f"the model has to be loaded first, which takes about {loads_s:.1f} s, and this may take "
                f"{deadline_ms:g} ms; allow more time, or try again later"
            )
            raise ResplitError(ErrorCode.DEADLINE_UNATTAINABLE, message, "deadline_ms", round(1e3 * loads_s, 3))

    def admit(self) -> None:
        """Give waiting requests slots, the most urgent first, on the route where each is predicted to end first."""
        now = self.desk.now()
        self.fallback.take_what_would_wait()
        self._cross(now)  # what runs comes before what waits: a slot that is free is theirs to cross to
        self._start_waiting(now)
        for run in self.runs.values():
            run.pump(now)
        self._settle()

    def _start_waiting(self, now: float) -> None:
        while self.queue:
            job = self.queue.first
            if not any(self._start(job, run, now) for run in self.runs.ranked(job, self._running(), now)):
                break
            if not isinstance(job, TensorJob) or not job.waiting:
                self.queue.remove(job)

    def take(self, run: RouteRun, frame: Result | Failure) -> None:
        """An answer from a route's last stage, or the news that a stage cannot go on."""
        try:
            match frame:
                case Result():
                    self.answers.take(run, frame)
                case Failure(sequences=sequences, code=code, message=message):
                    named = [s for s in self.on(run) if not sequences or s in sequences]
                    if _known(code) is ErrorCode.OVERLOADED:
                        run.closed_until = self.desk.now() + FULL_S
                        for other in self.runs.values():  # epochs, and routes over one node, share their slots
                            other.drop_kept()
                            other.close_again()
                        for job in {self.jobs[sequence][0] for sequence in named}:
                            job.meter.bounced()
                    if _known(code) in RECOVERABLE:
                        self.recover(named, message, counts=_known(code) is ErrorCode.STEP_LOST)
                    else:
                        self.fail(named, _known(code), message)
        except Exception as error:  # what one answer breaks must not keep the others waiting
            for job in [self.jobs[s][0] for s in self.on(run) if _concerns(frame, s)]:
                self.answers.broke(job, error)
        self.admit()

    def adopted(self, frame: Adopted) -> None:
        """A node's answer to what it was asked to take over."""
        lost = self.crossings.take(frame, self.desk.now())
        if lost is not None:
            self.recover([lost], "it could not be handed over")
        self.admit()

    def node_lost(self, node: NodeId) -> None:
        """What ran over a node that is gone is recomputed elsewhere, as soon as there is a plan for it."""
        if node == self.desk.node:
            return  # It was another process of it, or cut off: this one lives, and no heartbeat would tell it so.
        for run in self.runs.values():
            if node in run.route.nodes and node not in run.lost:
                run.lost.add(node)
                self.recover(self.on(run), f"node {node} cannot be reached")
        self.admit()

    def link_lost(self, node: NodeId) -> None:
        """The link from here to a node is gone; the node may well be there."""
        for run in self.runs.values():
            if node in run.route.nodes and not run.lost:
                run.drive_again(self.desk.now())

    def node_serves(self, node: NodeId, epoch: int) -> None:
        """A node says that it runs its part of a plan; it may have been thought lost."""
        for (e, _), run in self.runs.items():
            if e == epoch and node in run.lost:
                run.lost.discard(node)
                self.admit()

    def follow(self, current: Plan | None, draining: tuple[SeenPlan, ...], numbers: "itertools.count[int]") -> None:
        """Run over the plan in force, let what drains go on until it has crossed, and nothing else."""
        self.current_nodes = () if current is None else current.nodes
        live = {plan.epoch for plan in (*draining, *((current,) if current is not None else ()))}
        self.asked &= live
        for key in [key for key in self.runs if key[0] not in live]:
            run = self.runs.pop(key)
            if current is None:
                self.fail(self.on(run), ErrorCode.NODE_LOST, "the plan that ran this request was retired")
            self.recover(self.on(run), "the plan that ran it was retired")
        for (epoch, _), run in self.runs.items():
            run.leaving = current is None or epoch != current.epoch
            if run.leaving:
                run.drop_kept()
        if current is not None:
            for route in current.routes:
                self.add_route(current, route, numbers)
        if self.leave_at is None and not any(run.is_own and not run.leaving for run in self.runs.values()):
            self.leave_at = self.desk.now() + HANDOVER_S
        self.admit()

    def drain(self, epoch: int) -> None:
        """Say when nothing of a plan is left here. A process that began while it drained knows no routes of it."""
        self.asked.add(epoch)
        self.admit()

    def add_route(self, plan: Plan, route: Route, numbers: "itertools.count[int]") -> None:
        """Requests may run over this route, which need not begin at this node."""
        if (plan.epoch, route.index) in self.runs:
            return
        run = RouteRun(plan, route, self.desk.node, numbers, self.desk.send)
        if self.runs.newest is not None:
            run.learn_from(self.runs.newest)
        self.runs[plan.epoch, route.index] = run

    def recover(self, sequences: list[SequenceId], why: str, *, counts: bool = False) -> None:
        """Compute these anew, ahead of what waits; where it `counts`, one that failed too often ends in an error."""
        now = self.desk.now()
        if sequences:
            log.info("recomputing what ran: %s, %d sequences: %s", self.name, len(sequences), why)
        interrupted: dict[Job, None] = {}
        for sequence in sequences:
            job, run = self.jobs.pop(sequence)
            if isinstance(job, TensorJob):
                job.restart(sequence)
            self._conduct_no_more(job)
            if job.has_begun:
                job.interrupted_at = job.interrupted_at or now
            self.crossings.forget(sequence)
            run.end([sequence], broken=True)
            interrupted[job] = None
        for job in interrupted:  # once each, however many of its calls came to nothing
            job.recoveries += counts
            if job.recoveries > RECOVERIES_MAX:
                self.end(job, ResplitError(ErrorCode.STAGE_FAILED, f"recomputed {RECOVERIES_MAX} times in vain: {why}"))
            else:
                self.queue.add(job)

    def check(self, now: float) -> None:
        """What time brings: steps that are overdue, crossings that are late, requests that wait for a plan too long."""
        for run in list(self.runs.values()):
            if lost := run.check(now):
                run.closed_until = now + STALLED_S
                found = [(s, isinstance(self.jobs[s][0], TensorJob)) for s in lost if s in self.jobs]
                why = "a stage does not answer any more"
                self.recover([s for s, is_call in found if not is_call], why)
                # A call that is never answered may be what hangs the stages it comes to.
                self.recover([s for s, is_call in found if is_call], why, counts=True)
        if lost_in_crossing := self.crossings.check(now):
            self.recover([s for s in lost_in_crossing if s in self.jobs], "it could not be handed over")
        for job in self.in_flight:
            self.attainment.waits(self.promised_to(job.request), job, now)
        self._end_stranded(now)
        self.admit()

    def _end_stranded(self, now: float) -> None:
        """What nothing could run for too long ends; a request that waits for a slot, however long, is not stranded."""
        again = [job for job, _ in self.jobs.values() if job.interrupted_at is not None]
        here = [job for job in dict.fromkeys((*self.queue, *again)) if self._is_stranded(job)]
        self.stranded = {job: self.stranded.get(job, now) for job in here}
        if self.runs.cold is not None:
            code, longest_s = ErrorCode.OVERLOADED, LOADING_MAX_S
            message = f"its model is not loaded, and for {longest_s:g} s there was no room to load it; try again later"
        else:
            code, longest_s = ErrorCode.NODE_LOST, INTERRUPTED_MAX_S
            message = f"what could run this request is gone, and for {longest_s:g} s nothing took its place"
        for job in [job for job in self.queue if now - self.stranded.get(job, now) >= longest_s]:
            self.end(job, ResplitError(code, message))

    def _is_stranded(self, job: Job) -> bool:
        """Whether nothing can run it; to what was interrupted, a route that does not answer is none."""
        return all(job.interrupted_at is not None and run.driver.stalled for run in self.runs.able(job))

    def fail(self, sequences: list[SequenceId], code: ErrorCode, message: str) -> None:
        """End the requests of these sequences in a typed error."""
        for sequence in sequences:
            if sequence in self.jobs:
                job, _ = self.jobs[sequence]
                self.end(job, ResplitError(code, message))

    def end(self, job: Job, error: ResplitError) -> None:
        """End one request, wherever it stands, in its one final error."""
        self.attainment.failed(self.promised_to(job.request), job, error.code)
        self.forget(job, broken=error.code not in (ErrorCode.CANCELLED, ErrorCode.DEADLINE_EXCEEDED))
        # It is said only once the journal shows that these requests are still this node's to answer.
        self.journal.confirm(lambda: self.answers.error(job, error))

    def superseded(self) -> None:
        """Another ingress answers for all these requests: not a word more about them."""
        for job in self.in_flight:
            if job not in self.accepting:  # what was not accepted yet is refused as the journal gives up on it
                self.forget(job, broken=True)

    def resume(self, jobs: Sequence[tuple[Job, Sequence[Token]]]) -> None:
        """Take over requests that another ingress had accepted and that this one's journal has."""
        for job, said in jobs:
            if isinstance(job, Generation) and said and self.answers.again(job, said):
                continue
            if job.has_begun:
                job.interrupted_at = self.desk.now()
            self.queue.add(job)
        self.admit()

    def report_empty(self, epoch: int) -> None:
        """Tell whoever drains `epoch` that this node may go as far as it is concerned, if that is so.

        A node that the plan in force does without stays for the requests that it still answers, wherever they run.
        """
        closed = all(run.draining for (e, _), run in self.runs.items() if e == epoch)
        needed = any(over.plan.epoch == epoch for _, over in self.jobs.values()) or self.crossings.lead_to(epoch)
        if self.desk.node not in self.current_nodes:
            # What waits for a model that is cold can do so without the plan before.
            waiting = self.runs.cold is None and bool(self.queue or self.accepting)
            needed = bool(self.jobs) or waiting or bool(self.fallback.jobs)
        if closed and not needed:
            self.desk.on_empty(self.name, epoch)

    def _cross(self, now: float) -> None:
        """Move sequences from plans that drain to the one in force, and take on those that have arrived."""
        for crossed in self.crossings.finished(now):
            job, _ = self.jobs[crossed.sequence]
            self.jobs[crossed.sequence] = (job, crossed.new)
            job.meter.runs_on(crossed.new.plan.epoch, crossed.new.route)
            self.desk.audit.record(
                AuditKind.SEQUENCE_MOVED,
                "a request goes on over another plan",
                deployment=self.name,
                epoch=crossed.new.plan.epoch,
                request=job.request_id,
                moved_bytes=crossed.moved_bytes,
                held_ms=round(1e3 * crossed.held_s, 3),
            )
        leaving = [(s, job, over) for s, (job, over) in self.jobs.items() if over.leaving]
        for sequence, job, old in leaving:
            if old.lost or not isinstance(job, Generation) or sequence in self.crossings:
                continue
            successors = [
                run
                for run in self.runs.able(job)
                if succeeds(run, old) and self.crossings.may_begin(sequence, old, run)
            ]
            if successors:
                best = self.runs.in_order(successors, job, self._running(), now)[0]
                self._leave_by_the_cheapest_way(sequence, job, old, best, now)

    def _leave_by_the_cheapest_way(
        self, sequence: SequenceId, job: Generation, old: RouteRun, new: RouteRun, now: float
    ) -> None:
        to_come = job.max_tokens - len(job.owed)
        choice = choose(self.crossings.position(sequence, old, new, self.manifest, to_come))
        match choice.way:
            case Way.HAND_OVER:
                if not self.crossings.begin(sequence, old, new, now):
                    return  # no slot is free yet: it is asked again
            case Way.RECOMPUTE:
                if not new.has_room(old.driver.prompt(sequence).capacity):
                    return  # it runs, and is not to wait
                self.recover([sequence], "that is cheaper than to hand it over")
                self._start_waiting(now)  # at once: the slot that was seen is for this one
            case Way.STAY:
                self.crossings.stay(sequence, new)
        self.desk.audit.record(
            AuditKind.CROSSING_CHOSEN,
            "how a request leaves a plan that drains",
            deployment=self.name,
            epoch=new.plan.epoch,
            request=job.request_id,
            then=None,
            **choice.terms,
        )

    def _running(self) -> Iterator[Running]:
        return ((job, run, sequence) for sequence, (job, run) in self.jobs.items())

    def _start(self, job: Job, run: RouteRun, now: float) -> bool:
        try:
            allowed = job.allowed if isinstance(job, Generation) else None
        except ResplitError as error:
            self.end(job, error)
            return True
        match job:
            case Generation():
                job.meter.ahead_tokens = run.driver.unfilled_tokens
                started = run.start(job.prompt, job.slots_needed, job.sampling, job.known, now, job.urgency, allowed)
                sequence = None if started is None else started.sequence
                job.meter.cached_tokens = 0 if started is None else started.cached
            case TensorJob():
                sequence = run.call(job.waiting[0][1], now)
                if sequence is not None:
                    job.started(sequence)
            case PipelineJob():
                sequence = run.hold()
        if sequence is None:
            return False
        if job.interrupted_at is not None:
            job.meter.computed_anew(exactly=run.replays_exactly or not (isinstance(job, Generation) and job.known))
        job.meter.started = job.meter.started or now
        job.meter.runs_on(run.plan.epoch, run.route)
        self.jobs[sequence] = (job, run)
        if isinstance(job, PipelineJob):
            self._conduct(job, sequence, run)
        return True

    def _conduct(self, job: PipelineJob, sequence: SequenceId, run: RouteRun) -> None:
        assert self.desk.conductor is not None, "an ingress that is given pipelines conducts them"
        job.interrupted_at = None
        done = partial(self.answers.conducted, job, sequence)
        sealed = run.plan.sealed or job.reply.seal is not None  # what came sealed stays so
        self.desk.conductor.begin(job, self.name, done, sealed=sealed)

    def _conduct_no_more(self, job: Job) -> None:
        if isinstance(job, PipelineJob) and self.desk.conductor is not None:
            self.desk.conductor.stop(job)

    def forget(self, job: Job, *, broken: bool = False) -> None:
        """Free whatever the request holds."""
        self.queue.remove(job)
        self.fallback.forget(job)
        self._conduct_no_more(job)
        by_run: dict[RouteRun, list[SequenceId]] = {}
        for sequence, (held, run) in list(self.jobs.items()):
            if held is job:
                by_run.setdefault(run, []).append(sequence)
                del self.jobs[sequence]
                self.crossings.forget(sequence)
        for run, sequences in by_run.items():
            run.end(sequences, broken=broken)
        self.desk.drop(job)

    def _settle(self) -> None:
        """Close the plans that drain once nothing that waits needs them, and say when they are empty."""
        if self.leave_at is None and self.withdrawing is None:
            leaving = [run for run in self.runs.values() if run.leaving and not run.draining]
            waiting = (*self.queue, *self.accepting)  # what the journal stores now waits in a moment
            needed = {run for job in waiting for run in self.runs.able(job)} if leaving else set()
            for run in leaving:
                run.draining = run not in needed
        unknown = self.asked - {epoch for epoch, _ in self.runs}
        for epoch in {epoch for (epoch, _), run in self.runs.items() if run.draining} | unknown:
            self.report_empty(epoch)


def _known(code: str) -> ErrorCode:
    """A peer of a newer release may fail in a way that has no name here."""
    return ErrorCode(code) if code in set(ErrorCode) else ErrorCode.INTERNAL


def _concerns(frame: Result | Failure, sequence: SequenceId) -> bool:
    match frame:
        case Failure(sequences=sequences):
            return sequence in sequences
        case Result(tokens=tokens, done=done):
            return any(token.sequence == sequence for token in tokens) or any(sequence == s for s, _ in done)
