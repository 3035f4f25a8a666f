"""The door of an ingress: each request off the bus is opened, checked, journalled and accepted, or refused."""

import asyncio
import contextlib
import logging
import re
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from agent.awake import Awake
from agent.generation import Generation
from agent.intake import Job, open_request, opened, prepare, read, takes_long
from agent.outbox import Outbox
from agent.replies import Replier, ReplyTo
from agent.served import Served
from agent.traces import Trace
from bus.audit import AuditTrail
from bus.identity import Identity
from bus.journal import SupersededError
from bus.sealed_requests import Asked
from models.text import Text
from schemas.audit import AuditKind
from schemas.base import REQUEST_ID_PATTERN, DeploymentName, RequestId
from schemas.codec import REQUEST_ID, SEALED
from schemas.errors import ErrorCode, ResplitError
from schemas.journal import AcceptedRequest
from schemas.plan import Plan
from schemas.request import (
    MAX_REQUEST_BYTES,
    AcceptedReply,
    EmbeddingRequest,
    ErrorReply,
    Request,
    TensorRequest,
    TextRequest,
)
from schemas.slo import Slo

OVERTAKING_S = 1.0
TOLD_S = 5.0
OVERTAKING_MAX = 1024
PREPARING_MAX = 2
"""Requests whose opening takes long, at once: blocks compute beside them."""
CANCELLED = "the request was cancelled"

log = logging.getLogger(__name__)


class Door:
    """Takes requests and cancellations of every deployment that is served here."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        audit: AuditTrail,
        awake: Awake,
        now: Callable[[], float],
        outbox: Outbox,
        served: Mapping[DeploymentName, Served],
        in_flight: dict[RequestId, tuple[Served, Job]],
        leave: Callable[[Served], Coroutine[Any, Any, None]],
        asked_for: Callable[[], None],
    ) -> None:
        """`leave(served)`: stop listening for requests of a deployment that others serve by now. `asked_for` is called
        when the first request waits for a model that is cold."""
        self._client = client
        self._identity = identity
        self._audit = audit
        self._awake = awake
        self._now = now
        self._outbox = outbox
        self._served = served
        self._in_flight = in_flight
        self._leave = leave
        self._asked_for = asked_for
        self._accepting: set[asyncio.Task[None]] = set()
        self._preparing = asyncio.Semaphore(PREPARING_MAX)
        self._cancelled_early: OrderedDict[RequestId, float] = OrderedDict()
        self.replier = Replier(client, outbox.missed)

    async def requested(self, msg: Msg) -> None:
        """A request off the bus."""
        if self._awake.look():
            self._spawn(self._take_once_caught_up(msg))
        else:
            await self._take_request(msg)
        await asyncio.sleep(0)  # nats-py hands over all it has without a pause; heartbeats must get in between

    async def cancelled(self, msg: Msg) -> None:
        """A client wants no more of a request, which may be another ingress' or none."""
        request = RequestId(msg.subject.rsplit(".", 1)[-1])
        if request in self._in_flight:
            self._cancel(request, CANCELLED)
            return
        # Requests and cancellations are separate subscriptions: one may overtake the request it is for.
        self._cancelled_early[request] = self._now() + OVERTAKING_S
        while len(self._cancelled_early) > OVERTAKING_MAX:
            self._cancelled_early.popitem(last=False)

    def refuse(
        self,
        served: Served | None,
        reply: ReplyTo,
        request_id: RequestId | None,
        error: ResplitError,
    ) -> None:
        """Say the one reply of a request that is not taken."""
        self._audit.record(
            AuditKind.REQUEST_REFUSED,
            "a request was refused",
            deployment=None if served is None else served.name,
            request=request_id,
            code=error.code.value,
            field=error.field,
        )
        self._outbox.put(reply, ErrorReply(request_id=request_id, error=error.body, refused=True), None)

    async def give_up(self, served: Served, reply: ReplyTo, request_id: RequestId, error: ResplitError) -> None:
        """End a request that an ingress which is gone had accepted, and that cannot go on here. Returns once the trail
        has it, or after `TOLD_S`: then nothing of it is left in the journal."""
        told = asyncio.Event()
        self._audit.record(
            AuditKind.REQUEST_ENDED,
            "a request ended in an error",
            deployment=served.name,
            request=request_id,
            then=told.set,
            code=error.code.value,
            error=error.message,
        )
        self._outbox.put(reply, ErrorReply(request_id=request_id, error=error.body), None)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TOLD_S):
                await told.wait()

    async def _take_request(self, msg: Msg, *, prepared: bool = False) -> None:
        reply = self.replier.to(msg)
        named = request_id = _named(msg) if reply.media_type == SEALED else None
        request: Request | None = None
        own: Slo | None = None
        served = self._served.get(DeploymentName(msg.subject.rsplit(".", 1)[-1]))
        if served is not None and not served.runs.current and served.current_nodes:
            self._spawn(self._pass_on(served, msg))
            return
        try:
            if served is None or not served.runs.current:
                raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, f"nothing is deployed at {msg.subject}")
            if len(msg.data) > MAX_REQUEST_BYTES:
                message = f"a request of {len(msg.data)} bytes; at most {MAX_REQUEST_BYTES} are taken"
                raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message)
            asked = opened(msg.data, reply.content_type, served.name, named, self._identity)
            reply = reply.to_asker_of(asked)
            plan, text = served.runs.current[0].plan, served.text
            _check_sealed(plan, asked)
            request_id, request = read(asked, named)
            if self._cancelled_early.pop(request_id, 0.0) > self._now():
                raise ResplitError(ErrorCode.CANCELLED, CANCELLED)
            if not prepared and takes_long(text, request, len(asked.data)):
                self._spawn(self._take_prepared(text, request, msg))
                return
            own = request.slo(served.promised_to(request))
            if self._outbox.say_again(reply.inbox, request_id):
                return  # its client was away, and may have missed some of that
            self._check_new(request_id, request)
            full = served.full(request, sealed=reply.seal is not None)
            job = open_request(request, request_id, reply, plan, served.manifest, text, self._now())
            served.appraise(job, full)
            job.meter.trace = Trace.begun(msg.headers, _operation(request), served.name, request_id)
        except ResplitError as error:
            if served is not None and request is not None and own is not None:
                served.turned_down(request, own, error.code)
            self.refuse(served, reply, request_id, error)
            return
        except Exception:  # a defect of ours, and still every request gets an answer
            log.exception("a request could not be read")
            fault = ResplitError(ErrorCode.INTERNAL, "the request could not be read; the agent's log has the cause")
            self.refuse(served, reply, request_id, fault)
            return
        self._in_flight[request_id] = (served, job)
        served.accepting.add(job)
        self._spawn(self._accept(served, job, msg))

    async def _take_once_caught_up(self, msg: Msg) -> None:
        """It may have waited for long: who asked may have asked again, and another may answer."""
        await self._awake.caught_up()
        await self._take_request(msg)

    async def _take_prepared(self, text: Text | None, request: Request, msg: Msg) -> None:
        assert text is not None
        async with self._preparing:
            with contextlib.suppress(Exception):  # what is wrong with it is said when it is taken
                await asyncio.to_thread(prepare, text, request)
            await self._take_request(msg, prepared=True)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    async def _pass_on(self, served: Served, msg: Msg) -> None:
        """Leave a request to whoever serves the deployment now: this node hung, say, and its plan was retired."""
        if served.withdrawing is None:
            served.withdrawing = asyncio.create_task(self._leave(served))
        await asyncio.shield(served.withdrawing)  # else the server may pick this node again
        if served.runs.current:
            await self._take_request(msg)  # it serves again meanwhile
        else:
            with contextlib.suppress(NatsError, OSError):
                await self._client.publish(msg.subject, msg.data, msg.reply, msg.headers)

    async def _accept(self, served: Served, job: Job, msg: Msg) -> None:
        """Have the journal keep the request; only then is it accepted."""
        seed, max_tokens = (job.seed, job.max_tokens) if isinstance(job, Generation) else (None, None)
        reply = job.reply
        kept = AcceptedRequest(job.request_id, job.model, msg.data, reply.media_type, reply.inbox, seed, max_tokens)
        journal = served.journal  # of this life; another may have begun once it answers
        try:
            job.handle = await journal.accept(kept, seal=reply.seal)
        except SupersededError as error:
            # Nothing of it is stored. Whoever took over serves now, or this node in its next life.
            served.fallback.forget(job)
            if served.desk.holds(job):
                served.desk.drop(job)
                self._awake.missed()
                self._spawn(self._take_once_caught_up(msg))
            else:
                self.refuse(served, reply, job.request_id, error)  # it has ended, which that journal never says
            return
        except ResplitError as error:
            served.fallback.forget(job)
            if served.desk.holds(job):  # else it has ended, and that is said once the journal answers
                served.desk.drop(job)
                served.turned_down(job.request, job.slo, error.code)
                self.refuse(served, reply, job.request_id, error)
            return
        finally:
            served.accepting.discard(job)
        if not served.desk.holds(job):
            journal.end([job.handle], ErrorCode.CANCELLED.value)  # it ended meanwhile
            return
        if journal is not served.journal:
            served.fallback.forget(job)
            served.desk.drop(job)  # whoever took over from that life answers for it
            return
        if not served.fallback.begin_chosen(job):
            served.queue.add(job)
        if job.request.acknowledge or (isinstance(job, Generation) and job.request.stream):
            epoch = max((epoch for epoch, _ in served.runs), default=1)
            cold = served.runs.cold
            loads_s = None if cold is None else cold.loads_s
            accepted = AcceptedReply(request_id=job.request_id, deployment=served.name, epoch=epoch, loads_s=loads_s)
            self._outbox.put(reply, accepted, job.request_id)
        if served.runs.cold is not None and len(served.queue) == 1:
            self._asked_for()
        served.admit()

    def _check_new(self, request_id: RequestId, request: Request) -> None:
        if request_id in self._in_flight:
            message = f"a request {request_id!r} is in flight already; choose another id"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "request_id")
        if request.deadline_ms is not None and request.deadline_ms <= 0:
            raise ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline has passed already", "deadline_ms")

    def client_gone(self, request: RequestId) -> None:
        """Nobody listens to what is said about a request."""
        self._cancel(request, "nobody listens to the replies any more")

    def _cancel(self, request: RequestId, why: str) -> None:
        if (found := self._in_flight.get(request)) is not None:
            served, job = found
            served.end(job, ResplitError(ErrorCode.CANCELLED, why))
            served.admit()


def _named(msg: Msg) -> RequestId | None:
    """The id beside a sealed request."""
    name = (msg.headers or {}).get(REQUEST_ID, "")
    return RequestId(name) if re.fullmatch(REQUEST_ID_PATTERN, name) else None


def _check_sealed(plan: Plan, asked: Asked) -> None:
    if plan.sealed and asked.seal is None:
        message = (
            f"{plan.deployment} takes sealed requests alone; seal it (`resplit infer --sealed`, or a client's `sealer`)"
        )
        raise ResplitError(ErrorCode.FORBIDDEN, message)


def _operation(request: Request) -> str:
    """What OpenTelemetry's conventions call it."""
    match request:
        case TextRequest():
            return "text_completion" if request.messages is None else "chat"
        case EmbeddingRequest():
            return "embeddings"
        case TensorRequest():
            return "infer"
