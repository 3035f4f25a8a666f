"""One deployment at its ingress: requests that wait, requests that run, and what each answer means to them.

A request that was accepted ends in output or in one typed error; that is held here. On the event loop.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from nats.aio.subscription import Subscription
from pydantic import BaseModel

from agent.crossing import Crossings
from agent.driver import Answered
from agent.finished import Finished
from agent.generation import FinishReason, Generation
from agent.intake import Job
from agent.replies import ReplyTo
from agent.run import RouteRun
from agent.tensorjob import TensorJob
from bus.audit import AuditTrail
from bus.journal import Journal
from models.text import Text
from schemas.audit import AuditKind
from schemas.base import DeploymentName, LifeId, NodeId, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Adopted, Failure, Frame, Result, SequenceId, Token
from schemas.journal import Run
from schemas.manifest import Manifest
from schemas.plan import Plan, Route
from schemas.request import ErrorReply, TokenReply

TELL_AFTER_S = 0.001
INTERRUPTED_MAX_S = 60.0
"""A request whose nodes are gone waits this long for a plan that can run it."""
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


@dataclass(frozen=True)
class Desk:
    """What every deployment at one ingress shares: replies out, the audit trail, the clock, who is in flight."""

    node: NodeId
    say: Callable[[ReplyTo, BaseModel, RequestId | None], None]
    audit: AuditTrail
    now: Callable[[], float]
    send: Callable[[NodeId, Frame], None]
    in_flight: dict[RequestId, tuple["Served", Job]]
    on_empty: Callable[[DeploymentName, int], None]
    """`(deployment, epoch)`: a draining epoch's last sequence has ended."""
    finished: Finished = field(default_factory=Finished)
    """What those that ended in text met."""


@dataclass(eq=False)
class Served:
    """The routes that this node's requests of one deployment may run over, and those requests."""

    name: DeploymentName
    manifest: Manifest
    text: Text | None
    desk: Desk
    life: LifeId
    journal: Journal
    accepting: int = 0
    """Requests that are being stored in the journal, before they wait in the queue."""
    current_nodes: tuple[str, ...] = ()
    """Nodes of the plan in force. If this one is not among them it serves its last requests to their end."""
    runs: dict[tuple[int, int], RouteRun] = field(default_factory=dict)
    queue: deque[Job] = field(default_factory=deque)
    jobs: dict[SequenceId, tuple[Job, RouteRun]] = field(default_factory=dict)
    subscription: Subscription | None = None
    leave_at: float | None = None
    """When this node stops listening, as no plan here succeeds the one that drains."""
    withdrawing: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.crossings = Crossings(self.desk.send)

    @property
    def current(self) -> list[RouteRun]:
        """Routes that new requests enter by: of plans in force, else of one that drains but has no successor here."""
        entering = [run for run in self.runs.values() if run.is_own and not run.draining]
        return [run for run in entering if not run.leaving] or entering

    @property
    def newest(self) -> RouteRun | None:
        """A route of the newest plan here, wherever it begins."""
        return self.runs[max(self.runs)] if self.runs else None

    @property
    def slots_free(self) -> int:
        """Slots that a request which came now could have."""
        could = [run for run in self.runs.values() if run.is_open]
        return sum(run.slots_free for run in [run for run in could if not run.leaving] or could)

    def runs_for(self, job: Job) -> list[RouteRun]:
        """Routes that could run a waiting request: those in force first, those that begin here, the idlest."""
        could = [
            run
            for run in self.runs.values()
            if run.is_open
            and run.plan.model == job.model
            and (isinstance(job, TensorJob) or run.holds(job.slots_needed))
        ]
        could = [run for run in could if not run.leaving] or could
        now, prompt = self.desk.now(), job.prompt if isinstance(job, Generation) else ()
        return sorted(could, key=lambda run: (not run.is_own, -run.cached(prompt, now), run.active))

    def on(self, run: RouteRun) -> list[SequenceId]:
        """The sequences that run over one route."""
        return [sequence for sequence, (_, over) in self.jobs.items() if over is run]

    def admit(self) -> None:
        """Give waiting requests slots, in order of arrival, on the route with the fewest sequences."""
        now = self.desk.now()
        while self.queue:
            job = self.queue[0]
            if not any(self._start(job, run, now) for run in self.runs_for(job)):
                break
            if isinstance(job, Generation) or not job.waiting:
                self.queue.popleft()
        self._cross(now)
        for run in self.runs.values():
            run.pump(now)
        self._settle()

    def take(self, run: RouteRun, frame: Result | Failure) -> None:
        """An answer from a route's last stage, or the news that a stage cannot go on."""
        on_run = self.on(run)
        try:
            match frame:
                case Result():
                    self._take_result(run, frame)
                case Failure(sequences=sequences, code=code, message=message):
                    named = on_run if not sequences else [s for s in on_run if s in sequences]
                    if _known(code) is ErrorCode.OVERLOADED:
                        run.closed_until = self.desk.now() + FULL_S
                    if _known(code) in RECOVERABLE:
                        self.recover(named, message, counts=_known(code) is ErrorCode.STEP_LOST)
                    else:
                        self.fail(named, _known(code), message)
        except Exception as error:  # what one answer breaks must not keep the others waiting
            for job in [self.jobs[s][0] for s in on_run if s in self.jobs and _concerns(frame, s)]:
                self._broke(job, error)
        self.admit()

    def adopted(self, frame: Adopted) -> None:
        """A node's answer to what it was asked to take over."""
        lost = self.crossings.take(frame, self.desk.now())
        if lost is not None:
            self.recover([lost], "it could not be handed over")
        self.admit()

    def node_lost(self, node: NodeId) -> None:
        """What ran over a node that is gone is recomputed elsewhere, as soon as there is a plan for it."""
        for run in self.runs.values():
            if node in run.route.nodes and node not in run.lost:
                run.lost.add(node)
                self.recover(self.on(run), f"node {node} cannot be reached")
        self.admit()

    def node_serves(self, node: NodeId, epoch: int) -> None:
        """A node says that it runs its part of a plan; it may have been thought lost."""
        for (e, _), run in self.runs.items():
            if e == epoch and node in run.lost:
                run.lost.discard(node)
                self.admit()

    def follow(self, current: Plan | None, draining: tuple[Plan, ...], numbers: "itertools.count[int]") -> None:
        """Run over the plan in force, let what drains go on until it has crossed, and nothing else."""
        self.current_nodes = () if current is None else current.nodes
        live = {plan.epoch for plan in (*draining, *((current,) if current is not None else ()))}
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

    def add_route(self, plan: Plan, route: Route, numbers: "itertools.count[int]") -> None:
        """Requests may run over this route, which need not begin at this node."""
        if (plan.epoch, route.index) in self.runs:
            return
        run = RouteRun(plan, route, self.desk.node, numbers, self.desk.send)
        for before in self.runs.values():
            run.learn_from(before)
        self.runs[plan.epoch, route.index] = run

    def recover(self, sequences: list[SequenceId], why: str, *, counts: bool = False) -> None:
        """Compute these anew, ahead of what waits; where it `counts`, one that failed too often ends in an error."""
        now = self.desk.now()
        if sequences:
            log.info("recomputing what ran: %s, %d sequences: %s", self.name, len(sequences), why)
        for sequence in reversed(sequences):
            job, run = self.jobs[sequence]
            if isinstance(job, TensorJob):
                job.restart(sequence, run.call_of(sequence))
            job.interrupted_at = job.interrupted_at or now
            job.recoveries += counts
            self.crossings.forget(sequence)
            del self.jobs[sequence]
            run.end([sequence], broken=True)
            if job.recoveries > RECOVERIES_MAX:
                self.end(job, ResplitError(ErrorCode.STAGE_FAILED, f"recomputed {RECOVERIES_MAX} times in vain: {why}"))
            elif job not in self.queue:
                self.queue.appendleft(job)

    def check(self, now: float) -> None:
        """What time brings: steps that are overdue, crossings that are late, requests that wait for a plan too long."""
        for run in list(self.runs.values()):
            if lost := run.check(now):
                run.closed_until = now + STALLED_S
                self.recover([s for s in lost if s in self.jobs], "a stage does not answer any more")
        if lost_in_crossing := self.crossings.check(now):
            self.recover([s for s in lost_in_crossing if s in self.jobs], "it could not be handed over")
        for job in [job for job in self.queue if job.interrupted_at is not None]:
            assert job.interrupted_at is not None
            if now - job.interrupted_at >= INTERRUPTED_MAX_S:
                message = f"what ran this request is gone, and for {INTERRUPTED_MAX_S:g} s nothing took its place"
                self.end(job, ResplitError(ErrorCode.NODE_LOST, message))
        self.admit()

    def fail(self, sequences: list[SequenceId], code: ErrorCode, message: str) -> None:
        """End the requests of these sequences in a typed error."""
        for sequence in sequences:
            if sequence in self.jobs:
                job, _ = self.jobs[sequence]
                self.end(job, ResplitError(code, message))

    def end(self, job: Job, error: ResplitError) -> None:
        """End one request, wherever it stands, in its one final error."""
        self._forget(job, broken=error.code not in (ErrorCode.CANCELLED, ErrorCode.DEADLINE_EXCEEDED))
        # It is said only once the journal shows that these requests are still this node's to answer.
        self.journal.confirm(lambda: self._say_error(job, error))

    def superseded(self) -> None:
        """Another ingress answers for all these requests: not a word more about them."""
        for job in {id(job): job for job in (*self.queue, *(job for job, _ in self.jobs.values()))}.values():
            self._forget(job, broken=True)

    def resume(self, jobs: Sequence[tuple[Job, Sequence[Token]]]) -> None:
        """Take over requests that another ingress had accepted and that this one's journal has, the first one first."""
        for job, said in reversed(jobs):
            job.interrupted_at = self.desk.now()
            if not (isinstance(job, Generation) and said and self._say_again(job, said)):
                self.queue.appendleft(job)
        self.admit()

    def _say_again(self, job: Generation, said: Sequence[Token]) -> bool:
        """Say what the other ingress may have said; True if that was all there is to say."""
        assert self.newest is not None, "requests are taken over where they can run"
        job.meter.runs_on(self.newest.plan.epoch, self.newest.route)
        replies = job.resume(said, self.desk.now())
        final = replies.pop() if replies[-1].finish_reason is not None else None
        for reply in replies if job.request.stream else ():
            self.desk.say(job.reply, reply, job.request_id)
        if final is not None:
            self._finished(job, final)
        return final is not None

    def _say_error(self, job: Job, error: ResplitError) -> None:
        self.desk.say(job.reply, ErrorReply(request_id=job.request_id, error=error.body), None)
        if job.handle is not None:
            self.journal.end([job.handle], error.code.value)
        self.desk.audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in an error",
            deployment=self.name,
            request=job.request_id,
            code=error.code.value,
            error=error.message,
        )

    def report_empty(self, epoch: int) -> None:
        """Tell whoever drains `epoch` that this node may go as far as it is concerned, if that is so.

        A node that the plan in force does without stays for the requests that it still answers, wherever they run.
        """
        closed = all(run.draining for (e, _), run in self.runs.items() if e == epoch)
        needed = any(over.plan.epoch == epoch for _, over in self.jobs.values()) or self.crossings.lead_to(epoch)
        if self.desk.node not in self.current_nodes:
            needed = bool(self.jobs or self.queue or self.accepting)
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
        for sequence, (job, old) in list(self.jobs.items()):
            if not self.crossings.has_room:
                break
            if not old.leaving or old.lost or not isinstance(job, Generation):
                continue
            successor = next((run for run in self.runs_for(job) if succeeds(run, old)), None)
            if successor is not None:
                self.crossings.begin(sequence, old, successor, now)

    def _start(self, job: Job, run: RouteRun, now: float) -> bool:
        if now < run.closed_until:
            return False
        match job:
            case Generation():
                job.meter.ahead_tokens = run.driver.unfilled_tokens
                started = run.start(job.prompt, job.slots_needed, job.sampling, job.known, now)
                sequence = None if started is None else started.sequence
                job.meter.cached_tokens = 0 if started is None else started.cached
            case TensorJob():
                sequence = run.call(job.waiting[0][1], now)
                if sequence is not None:
                    job.started(sequence)
        if sequence is None:
            return False
        job.meter.started = job.meter.started or now
        job.meter.runs_on(run.plan.epoch, run.route)
        self.jobs[sequence] = (job, run)
        return True

    def _take_result(self, run: RouteRun, result: Result) -> None:
        now = self.desk.now()
        fresh: list[tuple[Answered, Job, FinishReason | None]] = []
        decoding = run.driver.decoding
        for step in run.take(result, now):
            job, _ = self.jobs[step.sequence]
            job.meter.add(result.times, step.elapsed_s)
            if step.token is not None and step.token.index > 0:
                job.meter.beside(decoding)
            finish = None
            if step.token is not None and isinstance(job, Generation):
                finish = job.ends_with(step.token)
                if finish is None:
                    run.go_on(step.sequence, step.token.token)
            fresh.append((step, job, finish))
        # The next step leaves first, and has a moment to get into ONNX Runtime, which lets the interpreter go: text
        # and replies are made while it computes. A stop string found then costs one step in vain.
        run.pump(now)
        asyncio.get_running_loop().call_later(TELL_AFTER_S, self._store, result, fresh, now)

    def _store(self, result: Result, fresh: list[tuple[Answered, Job, FinishReason | None]], now: float) -> None:
        """Have the journal keep what a result holds; then say it."""
        kept: list[tuple[Answered, Job, FinishReason | None]] = []
        round_: list[Run] = []
        for step, job, finish in fresh:
            if step.sequence not in self.jobs:
                continue  # it ended in the meantime, or is computed anew and will come to this token again
            kept.append((step, job, finish))
            if step.token is not None and isinstance(job, Generation) and job.handle is not None:
                job.owed.append(step.token)
                likely = ((step.token.logprob, step.token.top),) if job.request.logprobs else ()
                round_.append(Run(job.handle, step.token.index, (step.token.token,), likely))
        if not round_:
            self._tell(result, kept, now)
            return
        try:
            self.journal.tokens(round_, lambda: self._tell(result, kept, now))
        except ResplitError as error:
            for _, job, _ in kept:
                self.end(job, error)

    def _tell(self, result: Result, kept: list[tuple[Answered, Job, FinishReason | None]], now: float) -> None:
        """Say what a result means to the clients that still want to know."""
        for step, job, finish in kept:
            if self.desk.in_flight.get(job.request_id, (None, None))[1] is not job:
                continue  # it ended in the meantime
            try:
                self._tell_step(result, step, job, finish, now)
            except Exception as error:  # what one answer breaks must not keep the others waiting
                self._broke(job, error)
        self.admit()

    def _tell_step(self, result: Result, step: Answered, job: Job, finish: FinishReason | None, now: float) -> None:
        match job:
            case Generation() if step.token is not None:
                reply = job.take(step.token, finish, now)
                if reply.finish_reason is not None:
                    self._finished(job, reply)
                elif job.request.stream:
                    self.desk.say(job.reply, reply, job.request_id)
            case TensorJob():
                self._take_tensors(step.sequence, job, result)
            case Generation():
                pass  # a prefill chunk before the last

    def _finished(self, job: Generation, last: TokenReply) -> None:
        assert last.usage is not None
        self.desk.finished.add(self.name, job.meter, len(job.prompt), len(job.tokens), self.desk.now())
        self._ended_in_output(
            job,
            last if job.request.stream else job.whole(last),
            finish_reason=last.finish_reason,
            prompt_tokens=len(job.prompt),
            completion_tokens=len(job.tokens),
            total_ms=last.usage.total_ms,
        )

    def _take_tensors(self, sequence: SequenceId, job: TensorJob, result: Result) -> None:
        answer = job.take(sequence, dict(result.tensors), self.desk.now())
        _, run = self.jobs.pop(sequence)
        run.end([sequence])
        if answer is not None:
            self.journal.confirm(lambda: self._ended_in_output(job, answer, total_ms=answer.usage.total_ms))

    def _ended_in_output(self, job: Job, reply: BaseModel, **fields: str | int | float | None) -> None:
        self.desk.say(job.reply, reply, None)
        if job.handle is not None:
            self.journal.end([job.handle], "output")
        for sequence in [s for s, (held, _) in self.jobs.items() if held is job and s not in self.crossings]:
            _, run = self.jobs.pop(sequence)
            run.finish(sequence, self.desk.now())
        self._forget(job)
        self.desk.audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in output",
            deployment=self.name,
            epoch=job.meter.epoch,
            request=job.request_id,
            **fields,
        )

    def _broke(self, job: Job, error: Exception) -> None:
        log.error("an answer could not be taken: %s", self.name, exc_info=error)
        self.end(job, ResplitError(ErrorCode.INTERNAL, f"the ingress failed: {type(error).__name__}"))

    def _forget(self, job: Job, *, broken: bool = False) -> None:
        """Free whatever the request holds."""
        with contextlib.suppress(ValueError):
            self.queue.remove(job)
        by_run: dict[RouteRun, list[SequenceId]] = {}
        for sequence, (held, run) in list(self.jobs.items()):
            if held is job:
                by_run.setdefault(run, []).append(sequence)
                del self.jobs[sequence]
                self.crossings.forget(sequence)
        for run, sequences in by_run.items():
            run.end(sequences, broken=broken)
        self.desk.in_flight.pop(job.request_id, None)

    def _settle(self) -> None:
        """Close the plans that drain once nothing that waits needs them, and say when they are empty."""
        if self.leave_at is None and self.withdrawing is None:
            needed = {run for job in self.queue for run in self.runs_for(job)}
            for run in self.runs.values():
                run.draining = run.draining or (run.leaving and run not in needed)
        for epoch in {epoch for (epoch, _), run in self.runs.items() if run.draining}:
            self.report_empty(epoch)


def succeeds(run: RouteRun, old: RouteRun) -> bool:
    """Whether sequences of `old` can go on over `run` with their caches."""
    return run.plan.family == old.plan.family and run.plan.epoch > old.plan.epoch and not run.leaving


def _known(code: str) -> ErrorCode:
    """A peer of a newer release may fail in a way that has no name here."""
    return ErrorCode(code) if code in set(ErrorCode) else ErrorCode.INTERNAL


def _concerns(frame: Result | Failure, sequence: SequenceId) -> bool:
    match frame:
        case Failure(sequences=sequences):
            return sequence in sequences
        case Result(tokens=tokens, done=done):
            return any(token.sequence == sequence for token in tokens) or any(sequence == s for s, _ in done)
