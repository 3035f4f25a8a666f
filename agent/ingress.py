"""Where requests enter: checks, queue, slots, and every reply until the last.

A request that was accepted ends in output or in one typed error. One ingress serves every deployment whose
routes start at this node; everything here runs on the event loop.
"""

import asyncio
import contextlib
import logging
import secrets
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from pydantic import BaseModel

from agent.driver import Answered
from agent.generation import FinishReason, Generation, prompt_ids
from agent.replies import Replier, ReplyTo
from agent.run import RouteRun, sequence_numbers
from agent.tensorjob import TensorJob, open_job
from agent.usage import Meter
from bus.audit import AuditTrail
from bus.connection import PENDING_BYTES_MAX
from models.text import Text
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId, RequestId
from schemas.codec import decode_plain
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Failure, Frame, Result, SequenceId
from schemas.manifest import Manifest, ModelKind
from schemas.plan import Plan
from schemas.request import MAX_REQUEST_BYTES, AcceptedReply, ErrorReply, TextRequest, TokenReply, read_request

CHECK_EVERY_S = 0.25
TELL_AFTER_S = 0.001
HANDOVER_S = 1.0
"""A plan that drains with no successor here takes requests for this much longer: the node that serves the successor
may not listen yet, and a client would find nobody."""

log = logging.getLogger(__name__)

Job = Generation | TensorJob


@dataclass(eq=False)
class _Served:
    """One deployment at this ingress."""

    name: DeploymentName
    manifest: Manifest
    text: Text | None
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


class Ingress:
    """Takes requests off the bus, runs them over this node's routes, and answers."""

    def __init__(
        self,
        client: Client,
        audit: AuditTrail,
        send: Callable[[NodeId, Frame], None],
        on_empty: Callable[[DeploymentName, int], None],
        now: Callable[[], float],
    ) -> None:
        """`on_empty(deployment, epoch)`: a draining epoch's last sequence has ended."""
        self._client = client
        self._audit = audit
        self._send = send
        self._on_empty = on_empty
        self._now = now
        self._served: dict[DeploymentName, _Served] = {}
        self._by_request: dict[RequestId, tuple[_Served, Job]] = {}
        self._numbers = sequence_numbers()
        self._outbox: asyncio.Queue[tuple[ReplyTo, BaseModel, RequestId | None]] = asyncio.Queue()
        self._replier = Replier(client, self._client_gone)

    async def start(self) -> None:
        """Listen for cancellations and bounced replies."""
        await self._replier.start()
        await self._client.subscribe(subjects.ALL_CANCEL, cb=self._cancelled)

    async def serve(self, plan: Plan, manifest: Manifest, text: Text | None, node: NodeId) -> None:
        """Admit new requests to `plan`'s routes that start at `node`."""
        routes = [route for route in plan.routes if route.source == node]
        if not routes:
            return
        served = self._served.get(plan.deployment)
        if served is None:
            served = self._served[plan.deployment] = _Served(plan.deployment, manifest, text)
        served.manifest, served.text = manifest, text
        for route in routes:
            if (plan.epoch, route.index) not in served.runs:
                run = RouteRun(plan, route, self._numbers, self._send)
                served.runs[plan.epoch, route.index] = run
        served.leave_at = None
        if served.withdrawing is not None:
            await served.withdrawing
        if served.subscription is None:
            served.subscription = await self._client.subscribe(
                subjects.infer(served.name),
                subjects.INGRESS_QUEUE,
                cb=self._requested,
                pending_bytes_limit=PENDING_BYTES_MAX,
            )
        self._admit(served)

    async def drain(self, plan: Plan) -> None:
        """Admit no new request to `plan`; those that wait go to its successor, or to it if only it can run them."""
        served = self._served.get(plan.deployment)
        leaving = [] if served is None else [run for (epoch, _), run in served.runs.items() if epoch == plan.epoch]
        if served is None or not leaving:
            self._on_empty(plan.deployment, plan.epoch)
            return
        for run in leaving:
            run.leaving = True
        if all(run.leaving for run in served.runs.values()):
            served.leave_at = self._now() + HANDOVER_S
        self._admit(served)

    async def drop(self, plan: Plan) -> None:
        """Forget `plan`; sequences still on it end in an error."""
        served = self._served.get(plan.deployment)
        if served is None:
            return
        for key, run in list(served.runs.items()):
            if key[0] == plan.epoch:
                left = [sequence for sequence, (_, on) in served.jobs.items() if on is run]
                self._fail(served, left, ErrorCode.NODE_LOST, "the plan that ran this request was retired")
                del served.runs[key]
        stranded = [job for job in served.queue if not served.runs_for(job)]
        for job in stranded:
            error = ResplitError(ErrorCode.NODE_LOST, "the plan that was to run this request was retired")
            self._end_with_error(served, job, error)
        if not served.runs:
            del self._served[plan.deployment]
            await self._withdraw(served)

    def take(self, frame: Result | Failure) -> None:
        """An answer from a route's last stage, or the news that a stage cannot go on."""
        served = self._served.get(DeploymentName(frame.deployment))
        run = None if served is None else served.runs.get((frame.epoch, frame.route))
        if served is None or run is None:
            return
        on_run = [sequence for sequence, (_, on) in served.jobs.items() if on is run]
        try:
            match frame:
                case Result():
                    self._take_result(served, run, frame)
                case Failure(sequences=sequences, code=code, message=message):
                    named = on_run if not sequences else [s for s in on_run if s in sequences]
                    self._fail(served, named, _known(code), message)
        except Exception as error:  # what one answer breaks must not keep the others waiting
            log.exception("an answer could not be taken: %s, epoch %d", frame.deployment, frame.epoch)
            message = f"the ingress failed: {type(error).__name__}"
            self._fail(served, [s for s in on_run if _concerns(frame, s)], ErrorCode.INTERNAL, message)
        self._admit(served)

    def route_lost(self, node: NodeId) -> None:
        """A node cannot be reached at all: what runs over it ends now."""
        for served in self._served.values():
            for run in served.runs.values():
                if node in run.route.nodes:
                    left = [s for s, (_, on) in served.jobs.items() if on is run]
                    self._fail(served, left, ErrorCode.NODE_LOST, f"node {node} cannot be reached")
            self._admit(served)

    async def run(self) -> None:
        """Send replies and watch the clock, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reply_forever())
            group.create_task(self._check_forever())

    # Requests.

    async def _requested(self, msg: Msg) -> None:
        reply = self._replier.to(msg)
        request_id: RequestId | None = None
        served = self._served.get(DeploymentName(msg.subject.rsplit(".", 1)[-1]))
        try:
            if served is None or not served.current:
                raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, f"nothing is deployed at {msg.subject}")
            if len(msg.data) > MAX_REQUEST_BYTES:
                message = f"a request of {len(msg.data)} bytes; at most {MAX_REQUEST_BYTES} are taken"
                raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message)
            request = read_request(decode_plain(msg.data, reply.content_type, "request"))
            request_id = request.request_id or RequestId(secrets.token_hex(8))
            self._check_new(served, request_id, request.deadline_ms)
            now = self._now()
            deadline = None if request.deadline_ms is None else now + request.deadline_ms / 1e3
            job: Job
            if isinstance(request, TextRequest):
                job = self._generation(served, request, request_id, reply, deadline, now)
            else:
                model = served.current[0].plan.model
                job = open_job(request, request_id, reply, model, served.manifest, served.text, deadline, Meter(now))
        except ResplitError as error:
            await self._refuse(served, reply, request_id, error)
            return
        except Exception:  # a defect of ours, and still every request gets an answer
            log.exception("a request could not be read")
            fault = ResplitError(ErrorCode.INTERNAL, "the request could not be read; the agent's log has the cause")
            await self._refuse(served, reply, request_id, fault)
            return
        served.queue.append(job)
        self._by_request[request_id] = (served, job)
        if isinstance(job, Generation) and job.request.stream:
            epoch = served.current[0].plan.epoch
            accepted = AcceptedReply(request_id=request_id, deployment=served.name, epoch=epoch)
            self._outbox.put_nowait((reply, accepted, request_id))
        self._admit(served)

    async def _refuse(
        self, served: _Served | None, reply: ReplyTo, request_id: RequestId | None, error: ResplitError
    ) -> None:
        self._audit.record(
            AuditKind.REQUEST_REFUSED,
            "a request was refused",
            deployment=None if served is None else served.name,
            request=request_id,
            code=error.code.value,
            field=error.field,
        )
        await reply.refuse(error, request_id)

    def _check_new(self, served: _Served, request_id: RequestId, deadline_ms: int | None) -> None:
        if request_id in self._by_request:
            message = f"a request {request_id!r} is in flight already; choose another id"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "request_id")
        if deadline_ms is not None and deadline_ms <= 0:
            raise ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline has passed already", "deadline_ms")
        slot_free = any(run.has_room for run in served.current)
        if len(served.queue) >= served.current[0].plan.settings.max_queued and (served.queue or not slot_free):
            message = f"all slots are taken and {len(served.queue)} requests wait; try again later"
            raise ResplitError(ErrorCode.OVERLOADED, message)

    def _generation(
        self,
        served: _Served,
        request: TextRequest,
        request_id: RequestId,
        reply: ReplyTo,
        deadline: float | None,
        now: float,
    ) -> Generation:
        if served.manifest.kind is not ModelKind.DECODER:
            message = f"{served.manifest.name} does not generate text: send `input` (text) or `inputs` (tensors)"
            given = (
                "prompt" if request.prompt is not None else "messages" if request.messages is not None else "token_ids"
            )
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, given)
        spec, text = served.manifest.text, served.text
        assert spec is not None
        assert text is not None
        plan = served.current[0].plan
        context = min(spec.context_length, plan.settings.context_tokens)
        prompt = prompt_ids(request, text, spec, context)
        seed = request.seed if request.seed is not None else secrets.randbits(63)
        max_tokens = min(request.max_tokens, context - len(prompt))
        eos = frozenset(spec.eos_token_ids)
        return Generation(
            request_id, request, reply, plan.model, prompt, max_tokens, eos, seed, Meter(now), text, deadline
        )

    def _admit(self, served: _Served) -> None:
        """Give waiting requests slots, in order of arrival, on the route with the fewest sequences."""
        now = self._now()
        while served.queue:
            job = served.queue[0]
            if not any(self._start(served, job, run, now) for run in served.runs_for(job)):
                break
            if isinstance(job, Generation) or not job.waiting:
                served.queue.popleft()
        for run in served.runs.values():
            run.pump(now)
        self._settle(served)

    def _settle(self, served: _Served) -> None:
        """Close the plans that drain once nothing that waits needs them."""
        if served.leave_at is not None or served.withdrawing is not None:
            return
        needed = {run for job in served.queue for run in served.runs_for(job)}
        for (epoch, _), run in served.runs.items():
            if run.leaving and not run.draining and run not in needed:
                run.draining = True
                self._report_empty(served, epoch)

    def _start(self, served: _Served, job: Job, run: RouteRun, now: float) -> bool:
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
        served.jobs[sequence] = (job, run)
        return True

    # Answers.

    def _take_result(self, served: _Served, run: RouteRun, result: Result) -> None:
        now = self._now()
        ends: dict[SequenceId, FinishReason | None] = {}
        fresh = run.take(result, now)
        for step in fresh:
            job, _ = served.jobs[step.sequence]
            if step.token is not None and isinstance(job, Generation):
                finish = ends[step.sequence] = job.ends_with(step.token)
                if finish is None:
                    run.go_on(step.sequence, step.token.token)
        # The next step leaves first, and has a moment to get into ONNX Runtime, which lets the interpreter go: text
        # and replies are made while it computes. A stop string found then costs one step in vain.
        run.pump(now)
        asyncio.get_running_loop().call_later(TELL_AFTER_S, self._tell, served, run, result, fresh, ends, now)

    def _tell(
        self,
        served: _Served,
        run: RouteRun,
        result: Result,
        fresh: list[Answered],
        ends: dict[SequenceId, FinishReason | None],
        now: float,
    ) -> None:
        """Say what a result means to the clients that still want to know."""
        for step in fresh:
            if step.sequence not in served.jobs:
                continue  # it ended in the meantime
            job, _ = served.jobs[step.sequence]
            job.meter.add(result.times, step.elapsed_s)
            match job:
                case Generation() if step.token is not None:
                    reply = job.take(step.token, ends[step.sequence], now)
                    if reply.finish_reason is not None:
                        self._finished(served, run, step.sequence, job, reply)
                    elif job.request.stream:
                        self._outbox.put_nowait((job.reply, reply, job.request_id))
                case TensorJob():
                    self._take_tensors(served, run, step.sequence, result)
                case Generation():
                    pass  # a prefill chunk before the last
        self._admit(served)

    def _finished(
        self, served: _Served, run: RouteRun, sequence: SequenceId, job: Generation, last: TokenReply
    ) -> None:
        self._outbox.put_nowait((job.reply, last if job.request.stream else job.whole(last), None))
        self._forget(served, run, [sequence], job)
        assert last.usage is not None
        self._audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in output",
            deployment=served.name,
            epoch=run.plan.epoch,
            request=job.request_id,
            finish_reason=last.finish_reason,
            prompt_tokens=len(job.prompt),
            completion_tokens=len(job.tokens),
            total_ms=last.usage.total_ms,
        )

    def _take_tensors(self, served: _Served, run: RouteRun, sequence: SequenceId, result: Result) -> None:
        job, _ = served.jobs.pop(sequence)
        assert isinstance(job, TensorJob)
        run.end([sequence])
        answer = job.take(sequence, dict(result.tensors), self._now())
        if answer is None:
            return
        self._outbox.put_nowait((job.reply, answer, None))
        self._forget(served, run, [], job)
        self._audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in output",
            deployment=served.name,
            epoch=run.plan.epoch,
            request=job.request_id,
            total_ms=job.meter.usage(0, 0, self._now()).total_ms,
        )

    # Ends that are not output.

    def _fail(self, served: _Served, sequences: list[SequenceId], code: ErrorCode, message: str) -> None:
        for sequence in sequences:
            if sequence in served.jobs:
                job, _ = served.jobs[sequence]
                self._end_with_error(served, job, ResplitError(code, message))

    def _end_with_error(self, served: _Served, job: Job, error: ResplitError) -> None:
        with contextlib.suppress(ValueError):
            served.queue.remove(job)
        by_run: dict[RouteRun, list[SequenceId]] = {}
        for sequence, (held, run) in served.jobs.items():
            if held is job:
                by_run.setdefault(run, []).append(sequence)
        broken = error.code not in (ErrorCode.CANCELLED, ErrorCode.DEADLINE_EXCEEDED)
        for run, sequences in by_run.items():
            self._forget(served, run, sequences, job, broken=broken)
        self._by_request.pop(job.request_id, None)
        self._outbox.put_nowait((job.reply, ErrorReply(request_id=job.request_id, error=error.body), None))
        self._audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in an error",
            deployment=served.name,
            request=job.request_id,
            code=error.code.value,
            error=error.message,
        )

    def _forget(
        self, served: _Served, run: RouteRun, sequences: list[SequenceId], job: Job, *, broken: bool = False
    ) -> None:
        run.end(sequences, broken=broken)
        for sequence in sequences:
            served.jobs.pop(sequence, None)
        self._by_request.pop(job.request_id, None)
        if run.draining:
            self._report_empty(served, run.plan.epoch)

    def _report_empty(self, served: _Served, epoch: int) -> None:
        closed = all(run.draining for (e, _), run in served.runs.items() if e == epoch)
        if closed and not any(on.plan.epoch == epoch for _, on in served.jobs.values()):
            self._on_empty(served.name, epoch)

    async def _cancelled(self, msg: Msg) -> None:
        self._cancel(RequestId(msg.subject.rsplit(".", 1)[-1]), "the request was cancelled")

    def _client_gone(self, request: RequestId) -> None:
        self._cancel(request, "nobody listens to the replies any more")

    def _cancel(self, request: RequestId, why: str) -> None:
        if (found := self._by_request.get(request)) is not None:
            served, job = found
            self._end_with_error(served, job, ResplitError(ErrorCode.CANCELLED, why))
            self._admit(served)

    async def _withdraw(self, served: _Served) -> None:
        """Stop listening; requests that the server has handed over already are still taken."""
        subscription, served.subscription, served.leave_at = served.subscription, None, None
        if subscription is not None:
            with contextlib.suppress(NatsError, TimeoutError, OSError):  # the bus may be away, and nobody asks then
                await subscription.drain()  # type: ignore[no-untyped-call]

    async def _leave(self, served: _Served) -> None:
        await self._withdraw(served)
        served.withdrawing = None
        self._admit(served)

    # Background.

    async def _reply_forever(self) -> None:
        while True:
            reply, value, request = await self._outbox.get()
            try:
                await reply.send(value, request)
            except Exception:  # one client's reply must not keep the others from theirs
                log.exception("a reply could not be sent")

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            try:
                self._check(self._now())
            except Exception:  # a fault with one request must not end the watch over all the others
                log.exception("the requests in flight could not be checked")

    def _check(self, now: float) -> None:
        for served, job in list(self._by_request.values()):
            if job.deadline is not None and now > job.deadline:
                error = ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed", "deadline_ms")
                self._end_with_error(served, job, error)
        for served in list(self._served.values()):
            for run in list(served.runs.values()):
                lost = run.check(now)
                if lost:
                    self._fail(served, list(lost), ErrorCode.NODE_LOST, "a stage does not answer any more")
            if served.leave_at is not None and now >= served.leave_at and served.withdrawing is None:
                served.withdrawing = asyncio.create_task(self._leave(served))
            self._admit(served)


def _known(code: str) -> ErrorCode:
    """A peer of a newer release may fail in a way that has no name here."""
    return ErrorCode(code) if code in set(ErrorCode) else ErrorCode.INTERNAL


def _concerns(frame: Result | Failure, sequence: SequenceId) -> bool:
    match frame:
        case Failure(sequences=sequences):
            return sequence in sequences
        case Result(tokens=tokens, done=done):
            return any(token.sequence == sequence for token in tokens) or any(sequence == s for s, _ in done)
