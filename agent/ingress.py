"""Where requests enter: off the bus, checked, and handed to their deployment; replies go out in order.

One ingress serves every deployment whose routes start at this node; what becomes of an accepted request is in
`agent.served`. On the event loop.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from agent.generation import Generation
from agent.heirs import Heirs, life_name, process_of
from agent.intake import Job, open_request, read
from agent.outbox import Outbox
from agent.replies import Replier, ReplyTo
from agent.run import sequence_numbers
from agent.served import Desk, Served
from bus.audit import AuditTrail
from bus.connection import PENDING_BYTES_MAX
from bus.journal import Journal
from models.text import Text
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, LifeId, NodeId, RequestId
from schemas.capacity import Capacity, FinishedRequest, RouteName
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Adopted, Failure, Frame, Result, Token
from schemas.journal import AcceptedRequest, LiveRequest
from schemas.manifest import Manifest
from schemas.plan import Plan, PlanEvent
from schemas.request import MAX_REQUEST_BYTES, AcceptedReply

CHECK_EVERY_S = 0.25
HUNG_S = 2.0
"""Without a check for so long, this process hung."""
STOP_S = 1.0
OVERTAKING_S = 1.0
OVERTAKING_MAX = 1024
CANCELLED = "the request was cancelled"

log = logging.getLogger(__name__)


class Ingress:
    """Takes requests off the bus, runs them over this node's routes, and answers."""

    def __init__(
        self,
        node: NodeId,
        boot: str,
        client: Client,
        audit: AuditTrail,
        send: Callable[[NodeId, Frame], None],
        on_empty: Callable[[DeploymentName, int], None],
        now: Callable[[], float],
        is_over: Callable[[NodeId, str], bool],
    ) -> None:
        """`on_empty(deployment, epoch)`: a draining epoch's last sequence has ended. `is_over(node, boot)`: whether a
        process is known to have ended."""
        self._node = node
        self._boot = boot
        self._lives = itertools.count()
        self._journals: dict[LifeId, asyncio.Task[None]] = {}
        self._accepting: set[asyncio.Task[None]] = set()
        self.heirs = Heirs(client, lambda life: life not in self._journals and is_over(*process_of(life)), self)
        self._client = client
        self._audit = audit
        self._on_empty = on_empty
        self._now = now
        self._served: dict[DeploymentName, Served] = {}
        self._in_flight: dict[RequestId, tuple[Served, Job]] = {}
        self._outbox = Outbox(client)
        self._desk = Desk(node, self._outbox.put, audit, now, send, self._in_flight, on_empty)
        self._cancelled_early: OrderedDict[RequestId, float] = OrderedDict()
        self._numbers = sequence_numbers()
        self._checked_at = now()
        self._replier = Replier(client, self._client_gone)

    async def start(self) -> None:
        """Listen for cancellations and bounced replies."""
        await self._replier.start()
        await self._client.subscribe(subjects.ALL_CANCEL, cb=self._cancelled)

    async def serve(self, plan: Plan, manifest: Manifest, text: Text | None) -> None:
        """Take new requests for `plan`'s routes that start at this node."""
        routes = [route for route in plan.routes if route.source == self._node]
        if not routes:
            return
        served = self._served.get(plan.deployment)
        if served is None:
            served = self._open(plan.deployment, manifest, text)
            served.current_nodes = plan.nodes
        served.manifest, served.text = manifest, text
        for route in routes:
            served.add_route(plan, route, self._numbers)
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
        served.admit()
        self.heirs.look()

    async def follow(self, event: PlanEvent) -> None:
        """Requests in flight go over to what is in force now; those that have nowhere to go end in an error."""
        served = self._served.get(event.deployment)
        if served is None:
            return
        served.follow(event.current, event.draining, self._numbers)
        for node in event.lost:
            served.node_lost(node)
        if served.runs:
            return
        for job in list(served.queue):
            message = "the plan that was to run this request was retired"
            served.end(job, ResplitError(ErrorCode.NODE_LOST, message))
        await self._close(served)

    def drain(self, plan: Plan) -> None:
        """Say when nothing of `plan` is left here."""
        served = self._served.get(plan.deployment)
        if served is None:
            self._on_empty(plan.deployment, plan.epoch)
        else:
            served.admit()

    def take(self, frame: Result | Failure | Adopted) -> None:
        """An answer from a route's last stage, the news that a stage cannot go on, or that caches have arrived."""
        served = self._served.get(DeploymentName(frame.deployment))
        run = None if served is None else served.runs.get((frame.epoch, frame.route))
        if served is None or run is None:
            return
        if isinstance(frame, Adopted):
            served.adopted(frame)
        else:
            served.take(run, frame)

    @property
    def served(self) -> tuple[Served, ...]:
        """The deployments whose requests this node can answer."""
        return tuple(served for served in self._served.values() if served.newest is not None)

    def node_lost(self, node: NodeId) -> None:
        """A node cannot be reached at all: what runs over it is to be computed elsewhere."""
        for served in self._served.values():
            served.node_lost(node)
        self.heirs.look()

    def heard(self, capacity: Capacity) -> None:
        """A node's heartbeat: what it runs, it runs."""
        for stage in capacity.stages:
            served = self._served.get(stage.deployment)
            if served is not None and stage.state != "loading":
                served.node_serves(capacity.node, stage.epoch)

    @property
    def finished(self) -> tuple[FinishedRequest, ...]:
        """What requests met that ended lately."""
        return self._desk.finished.recent(self._now())

    @property
    def stalled(self) -> tuple[RouteName, ...]:
        """Routes on which a step is overdue."""
        return tuple(
            RouteName(deployment=name, epoch=epoch, route=index)
            for name, served in self._served.items()
            for (epoch, index), run in served.runs.items()
            if run.driver.stalled
        )

    async def run(self) -> None:
        """Send replies and watch the clock, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._outbox.run())
            group.create_task(self._check_forever())
            group.create_task(self.heirs.run())

    async def stop(self) -> None:
        """Take no more requests, and leave those in flight to whoever serves the deployment next."""
        for served in self._served.values():
            if served.subscription is not None:
                with contextlib.suppress(NatsError, TimeoutError, OSError):
                    await served.subscription.unsubscribe()
        with contextlib.suppress(Exception):  # the bus may have gone first
            async with asyncio.timeout(STOP_S):
                for served in self._served.values():
                    await served.journal.drain(STOP_S)
                await self._outbox.drain()
                await self._client.flush()
        for task in self._journals.values():
            task.cancel()

    # Deployments.

    def _open(self, name: DeploymentName, manifest: Manifest, text: Text | None) -> Served:
        served = self._served[name] = Served(name, manifest, text, self._desk, *self._begin_life(name))
        return served

    def _begin_life(self, name: DeploymentName) -> tuple[LifeId, Journal]:
        life = life_name(self._node, self._boot, next(self._lives))
        journal = Journal(self._client, name, life, lambda _: self._superseded(name, life), self._now)
        self._journals[life] = asyncio.create_task(journal.run())
        return life, journal

    async def _close(self, served: Served) -> None:
        del self._served[served.name]
        await self._withdraw(served)
        await served.journal.drain(STOP_S)
        self._journals.pop(served.life).cancel()

    def _superseded(self, name: DeploymentName, life: LifeId) -> None:
        """Another ingress answers for what this one had accepted: say nothing more about it, and begin a new life."""
        served = self._served.get(name)
        if served is None or served.life != life:
            return
        log.warning("another ingress took over the requests accepted here: %s", name)
        served.superseded()
        self._journals.pop(life)
        served.life, served.journal = self._begin_life(name)

    async def adopt(self, served: Served, requests: Sequence[LiveRequest]) -> None:
        """Answer for requests that an ingress which is gone had accepted; raises what the journal raises."""
        new = [one for one in requests if one.request.request_id not in self._in_flight]
        new.sort(key=lambda one: not one.tokens)  # those that were running first, then those that waited
        adopted = await asyncio.gather(*(self._adopt(served, one) for one in new))
        served.resume([found for found in adopted if found is not None])

    async def _adopt(self, served: Served, live: LiveRequest) -> tuple[Job, list[Token]] | None:
        """One of them, and its tokens; None if it ended in an error here."""
        kept = live.request
        reply = self._replier.at(kept.inbox, kept.content_type)
        arrived = self._now() - kept.age_ms / 1e3
        newest = served.newest
        if newest is None:
            message = "the deployment is not served here any more"
            raise ResplitError(ErrorCode.NODE_LOST, message)
        try:
            _, request = read(kept.data, kept.content_type)
            if kept.model != newest.plan.model:
                message = "the model that ran this request was replaced; ask again"
                raise ResplitError(ErrorCode.NODE_LOST, message)
            text = served.text
            job = open_request(request, kept.request_id, reply, newest.plan, served.manifest, text, arrived, kept.seed)
        except ResplitError as error:
            await self._refuse(served, reply, kept.request_id, error)
            return None
        if isinstance(job, Generation):
            job.max_tokens = kept.max_tokens or job.max_tokens
        self._in_flight[kept.request_id] = (served, job)
        try:
            job.handle = await served.journal.accept(kept, live.tokens, live.likely)
        except BaseException:
            self._in_flight.pop(kept.request_id, None)
            raise
        likely = live.likely or ((None, ()),) * len(live.tokens)
        return job, [Token(0, 0, i, t, *more) for i, (t, more) in enumerate(zip(live.tokens, likely, strict=True))]

    # Requests.

    async def _requested(self, msg: Msg) -> None:
        await self._take_request(msg)
        await asyncio.sleep(0)  # nats-py hands over all it has without a pause; heartbeats must get in between

    async def _take_request(self, msg: Msg) -> None:
        reply = self._replier.to(msg)
        request_id: RequestId | None = None
        served = self._served.get(DeploymentName(msg.subject.rsplit(".", 1)[-1]))
        if served is not None and not served.current and served.current_nodes:
            self._spawn(self._pass_on(served, msg))
            return
        try:
            if served is None or not served.current:
                raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, f"nothing is deployed at {msg.subject}")
            if len(msg.data) > MAX_REQUEST_BYTES:
                message = f"a request of {len(msg.data)} bytes; at most {MAX_REQUEST_BYTES} are taken"
                raise ResplitError(ErrorCode.PAYLOAD_TOO_LARGE, message)
            request_id, request = read(msg.data, reply.content_type)
            if self._cancelled_early.pop(request_id, 0.0) > self._now():
                raise ResplitError(ErrorCode.CANCELLED, CANCELLED)
            self._check_new(served, request_id, request.deadline_ms)
            plan, text = served.current[0].plan, served.text
            job = open_request(request, request_id, reply, plan, served.manifest, text, self._now())
        except ResplitError as error:
            await self._refuse(served, reply, request_id, error)
            return
        except Exception:  # a defect of ours, and still every request gets an answer
            log.exception("a request could not be read")
            fault = ResplitError(ErrorCode.INTERNAL, "the request could not be read; the agent's log has the cause")
            await self._refuse(served, reply, request_id, fault)
            return
        self._in_flight[request_id] = (served, job)
        served.accepting += 1
        self._spawn(self._accept(served, job, msg.data))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._accepting.add(task)
        task.add_done_callback(self._accepting.discard)

    async def _pass_on(self, served: Served, msg: Msg) -> None:
        """Leave a request to whoever serves the deployment now: this node hung, say, and its plan was retired."""
        if served.withdrawing is None and served.subscription is not None:
            served.withdrawing = asyncio.create_task(self._leave(served))
        if served.withdrawing is not None:
            await asyncio.shield(served.withdrawing)  # else the server may pick this node again
        if served.current:
            await self._take_request(msg)  # it serves again meanwhile
        else:
            with contextlib.suppress(NatsError, OSError):
                await self._client.publish(msg.subject, msg.data, msg.reply, msg.headers)

    async def _accept(self, served: Served, job: Job, data: bytes) -> None:
        """Have the journal keep the request; only then is it accepted."""
        seed, max_tokens = (job.seed, job.max_tokens) if isinstance(job, Generation) else (None, None)
        reply = job.reply
        kept = AcceptedRequest(job.request_id, job.model, data, reply.media_type, reply.inbox, seed, max_tokens)
        try:
            job.handle = await served.journal.accept(kept)
        except ResplitError as error:
            self._in_flight.pop(job.request_id, None)
            await self._refuse(served, reply, job.request_id, error)
            return
        finally:
            served.accepting -= 1
        if self._in_flight.get(job.request_id, (None, None))[1] is not job:
            served.journal.end([job.handle], ErrorCode.CANCELLED.value)  # it was cancelled meanwhile
            return
        served.queue.append(job)
        if isinstance(job, Generation) and job.request.stream:
            epoch = max((epoch for epoch, _ in served.runs), default=1)
            accepted = AcceptedReply(request_id=job.request_id, deployment=served.name, epoch=epoch)
            self._outbox.put(reply, accepted, job.request_id)
        served.admit()

    async def _refuse(
        self, served: Served | None, reply: ReplyTo, request_id: RequestId | None, error: ResplitError
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

    def _check_new(self, served: Served, request_id: RequestId, deadline_ms: int | None) -> None:
        if request_id in self._in_flight:
            message = f"a request {request_id!r} is in flight already; choose another id"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "request_id")
        if deadline_ms is not None and deadline_ms <= 0:
            raise ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline has passed already", "deadline_ms")
        slots_free = served.slots_free
        waiting = len(served.queue) + served.accepting
        if waiting >= served.current[0].plan.settings.max_queued + slots_free:
            message = f"all slots are taken and {waiting} requests wait; try again later"
            raise ResplitError(ErrorCode.OVERLOADED, message)

    async def _cancelled(self, msg: Msg) -> None:
        request = RequestId(msg.subject.rsplit(".", 1)[-1])
        if request in self._in_flight:
            self._cancel(request, CANCELLED)
            return
        # Requests and cancellations are separate subscriptions: one may overtake the request it is for.
        self._cancelled_early[request] = self._now() + OVERTAKING_S
        while len(self._cancelled_early) > OVERTAKING_MAX:
            self._cancelled_early.popitem(last=False)

    def _client_gone(self, request: RequestId) -> None:
        if self._outbox.is_open:
            self._cancel(request, "nobody listens to the replies any more")

    def _cancel(self, request: RequestId, why: str) -> None:
        if (found := self._in_flight.get(request)) is not None:
            served, job = found
            served.end(job, ResplitError(ErrorCode.CANCELLED, why))
            served.admit()

    async def _withdraw(self, served: Served) -> None:
        """Stop listening; requests that the server has handed over already are still taken."""
        subscription, served.subscription, served.leave_at = served.subscription, None, None
        if subscription is not None:
            with contextlib.suppress(NatsError, TimeoutError, OSError):  # the bus may be away, and nobody asks then
                await subscription.drain()  # type: ignore[no-untyped-call]

    async def _leave(self, served: Served) -> None:
        await self._withdraw(served)
        served.withdrawing = None
        served.admit()

    # Background.

    async def _check_forever(self) -> None:
        while True:
            await asyncio.sleep(CHECK_EVERY_S)
            try:
                self._check(self._now())
            except Exception:  # a fault with one request must not end the watch over all the others
                log.exception("the requests in flight could not be checked")

    def _check(self, now: float) -> None:
        stood_still, self._checked_at = now - self._checked_at > HUNG_S, now
        for served in self._served.values() if stood_still else ():
            # Others may answer for its requests by now. The journal knows, and until it is asked this node would
            # compute them beside its successor, in slots that the successor needs.
            served.journal.confirm(lambda: None)
        for served, job in list(self._in_flight.values()):
            if job.deadline is not None and now > job.deadline:
                error = ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed", "deadline_ms")
                served.end(job, error)
        for served in list(self._served.values()):
            if served.leave_at is not None and now >= served.leave_at and served.withdrawing is None:
                served.withdrawing = asyncio.create_task(self._leave(served))
            served.check(now)
