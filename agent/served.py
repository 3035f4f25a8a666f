"""One deployment at its ingress: requests that wait, requests that run, and what each answer means to them.

A request that was accepted ends in output or in one typed error; that is held here. On the event loop.
"""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nats.aio.subscription import Subscription
from pydantic import BaseModel

from agent.driver import Answered
from agent.generation import FinishReason, Generation
from agent.replies import ReplyTo
from agent.run import RouteRun
from agent.tensorjob import TensorJob
from bus.audit import AuditTrail
from models.text import Text
from schemas.audit import AuditKind
from schemas.base import DeploymentName, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Failure, Result, SequenceId
from schemas.manifest import Manifest
from schemas.request import ErrorReply, TokenReply

TELL_AFTER_S = 0.001

Job = Generation | TensorJob
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Desk:
    """What every deployment at one ingress shares: replies out, the audit trail, the clock, who is in flight."""

    say: Callable[[ReplyTo, BaseModel, RequestId | None], None]
    audit: AuditTrail
    now: Callable[[], float]
    in_flight: dict[RequestId, tuple["Served", Job]]
    on_empty: Callable[[DeploymentName, int], None]
    """`(deployment, epoch)`: a draining epoch's last sequence has ended."""


@dataclass(eq=False)
class Served:
    """The routes of one deployment that start here, and its requests."""

    name: DeploymentName
    manifest: Manifest
    text: Text | None
    desk: Desk
    runs: dict[tuple[int, int], RouteRun] = field(default_factory=dict)
    queue: deque[Job] = field(default_factory=deque)
    jobs: dict[SequenceId, tuple[Job, RouteRun]] = field(default_factory=dict)
    subscription: Subscription | None = None
    leave_at: float | None = None
    """When this node stops listening, as no plan here succeeds the one that drains."""
    withdrawing: asyncio.Task[None] | None = None

    @property
    def current(self) -> list[RouteRun]:
        """Routes for new requests: of plans in force, else of one that drains but has no successor here yet."""
        admitting = [run for run in self.runs.values() if not run.draining]
        return [run for run in admitting if not run.leaving] or admitting

    def runs_for(self, job: Job) -> list[RouteRun]:
        """Routes that could run a waiting request, the idlest first: those in force before those that drain."""
        could = [
            run
            for run in self.runs.values()
            if not run.draining
            and run.plan.model == job.model
            and (isinstance(job, TensorJob) or run.holds(job.slots_needed))
        ]
        return sorted([run for run in could if not run.leaving] or could, key=lambda run: run.active)

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
                    self.fail(on_run if not sequences else [s for s in on_run if s in sequences], _known(code), message)
        except Exception as error:  # what one answer breaks must not keep the others waiting
            self._broke([s for s in on_run if _concerns(frame, s)], error)
        self.admit()

    def fail(self, sequences: list[SequenceId], code: ErrorCode, message: str) -> None:
        """End the requests of these sequences in a typed error."""
        for sequence in sequences:
            if sequence in self.jobs:
                job, _ = self.jobs[sequence]
                self.end(job, ResplitError(code, message))

    def end(self, job: Job, error: ResplitError) -> None:
        """End one request, wherever it stands, in its one final error."""
        with contextlib.suppress(ValueError):
            self.queue.remove(job)
        by_run: dict[RouteRun, list[SequenceId]] = {}
        for sequence, (held, run) in self.jobs.items():
            if held is job:
                by_run.setdefault(run, []).append(sequence)
        broken = error.code not in (ErrorCode.CANCELLED, ErrorCode.DEADLINE_EXCEEDED)
        for run, sequences in by_run.items():
            self._forget(run, sequences, job, broken=broken)
        self.desk.in_flight.pop(job.request_id, None)
        self.desk.say(job.reply, ErrorReply(request_id=job.request_id, error=error.body), None)
        self.desk.audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in an error",
            deployment=self.name,
            request=job.request_id,
            code=error.code.value,
            error=error.message,
        )

    def report_empty(self, epoch: int) -> None:
        """Tell whoever drains `epoch` that nothing is left on it, if that is so."""
        closed = all(run.draining for (e, _), run in self.runs.items() if e == epoch)
        if closed and not any(over.plan.epoch == epoch for _, over in self.jobs.values()):
            self.desk.on_empty(self.name, epoch)

    def _start(self, job: Job, run: RouteRun, now: float) -> bool:
        match job:
            case Generation():
                sequence = run.start(job.prompt, job.slots_needed, job.sampling)
            case TensorJob():
                sequence = run.call(job.waiting[0], now)
                if sequence is not None:
                    job.started(sequence)
        if sequence is None:
            return False
        if job.meter.started is None:
            job.meter.started, job.meter.epoch, job.meter.route = now, run.plan.epoch, run.route
        self.jobs[sequence] = (job, run)
        return True

    def _take_result(self, run: RouteRun, result: Result) -> None:
        now = self.desk.now()
        ends: dict[SequenceId, FinishReason | None] = {}
        fresh = run.take(result, now)
        for step in fresh:
            job, _ = self.jobs[step.sequence]
            if step.token is not None and isinstance(job, Generation):
                finish = ends[step.sequence] = job.ends_with(step.token)
                if finish is None:
                    run.go_on(step.sequence, step.token.token)
        # The next step leaves first, and has a moment to get into ONNX Runtime, which lets the interpreter go: text
        # and replies are made while it computes. A stop string found then costs one step in vain.
        run.pump(now)
        asyncio.get_running_loop().call_later(TELL_AFTER_S, self._tell, run, result, fresh, ends, now)

    def _tell(
        self,
        run: RouteRun,
        result: Result,
        fresh: list[Answered],
        ends: dict[SequenceId, FinishReason | None],
        now: float,
    ) -> None:
        """Say what a result means to the clients that still want to know."""
        for step in fresh:
            if step.sequence not in self.jobs:
                continue  # it ended in the meantime
            try:
                self._tell_step(run, result, step, ends, now)
            except Exception as error:  # what one answer breaks must not keep the others waiting
                self._broke([step.sequence], error)
        self.admit()

    def _tell_step(
        self, run: RouteRun, result: Result, step: Answered, ends: dict[SequenceId, FinishReason | None], now: float
    ) -> None:
        job, _ = self.jobs[step.sequence]
        job.meter.add(result.times, step.elapsed_s)
        match job:
            case Generation() if step.token is not None:
                reply = job.take(step.token, ends[step.sequence], now)
                if reply.finish_reason is not None:
                    self._finished(run, step.sequence, job, reply)
                elif job.request.stream:
                    self.desk.say(job.reply, reply, job.request_id)
            case TensorJob():
                self._take_tensors(run, step.sequence, job, result)
            case Generation():
                pass  # a prefill chunk before the last

    def _finished(self, run: RouteRun, sequence: SequenceId, job: Generation, last: TokenReply) -> None:
        self.desk.say(job.reply, last if job.request.stream else job.whole(last), None)
        self._forget(run, [sequence], job)
        assert last.usage is not None
        self._audit_output(
            run,
            job,
            finish_reason=last.finish_reason,
            prompt_tokens=len(job.prompt),
            completion_tokens=len(job.tokens),
            total_ms=last.usage.total_ms,
        )

    def _take_tensors(self, run: RouteRun, sequence: SequenceId, job: TensorJob, result: Result) -> None:
        answer = job.take(sequence, dict(result.tensors), self.desk.now())
        del self.jobs[sequence]
        run.end([sequence])
        if answer is None:
            if run.draining:
                self.report_empty(run.plan.epoch)
            return
        self.desk.say(job.reply, answer, None)
        self._forget(run, [], job)
        self._audit_output(run, job, total_ms=answer.usage.total_ms)

    def _audit_output(self, run: RouteRun, job: Job, **fields: str | int | float | None) -> None:
        self.desk.audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in output",
            deployment=self.name,
            epoch=run.plan.epoch,
            request=job.request_id,
            **fields,
        )

    def _broke(self, sequences: list[SequenceId], error: Exception) -> None:
        log.error("an answer could not be taken: %s", self.name, exc_info=error)
        self.fail(sequences, ErrorCode.INTERNAL, f"the ingress failed: {type(error).__name__}")

    def _forget(self, run: RouteRun, sequences: list[SequenceId], job: Job, *, broken: bool = False) -> None:
        run.end(sequences, broken=broken)
        for sequence in sequences:
            self.jobs.pop(sequence, None)
        self.desk.in_flight.pop(job.request_id, None)
        if run.draining:
            self.report_empty(run.plan.epoch)

    def _settle(self) -> None:
        """Close the plans that drain once nothing that waits needs them."""
        if self.leave_at is not None or self.withdrawing is not None:
            return
        needed = {run for job in self.queue for run in self.runs_for(job)}
        for (epoch, _), run in self.runs.items():
            if run.leaving and not run.draining and run not in needed:
                run.draining = True
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
