"""The deployments that are served at one node: which plans they run over, whose requests they answer, what time brings.

`agent.door` takes their requests off the bus; what becomes of an accepted one is in `agent.served`. On the event loop.
"""

import asyncio
import contextlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence

from nats.aio.client import Client
from nats.errors import Error as NatsError

from agent.asking import Asker
from agent.attainment import Attainment, services
from agent.awake import Awake
from agent.cloud import Clouds
from agent.conductor import Conductor
from agent.desk import Desk
from agent.door import Door
from agent.generation import Generation
from agent.hearing import Hearing
from agent.heirs import Heirs, life_name, process_of
from agent.intake import Job, open_request, opened, prepare, read, takes_long
from agent.numbers import sequence_numbers
from agent.outbox import Outbox
from agent.served import Served
from bus.audit import AuditTrail
from bus.connection import settle
from bus.identity import Identity
from bus.journal import WAITING_BYTES_MAX, Journal, SupersededError
from bus.stopping import stoppable
from models.text import Text
from schemas import subjects
from schemas.base import DeploymentName, LifeId, NodeId, RequestId
from schemas.capacity import FinishedRequest, RouteName, Service
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Adopted, Failure, Frame, Result, Token
from schemas.heartbeat import Hosting
from schemas.journal import LiveRequest
from schemas.manifest import Manifest
from schemas.plan import Plan
from schemas.section import EventSection, SeenPlan

CHECK_EVERY_S = 0.25
STOP_S = 1.0
CONFIRM_S = 5.0
ADOPTED_BYTES = WAITING_BYTES_MAX // 4
"""Taken over at once: more than the journal lets wait would be refused, however often it is tried."""
TOKEN_BYTES = 256
"""In the journal at most, or nearly: with twenty alternatives."""

log = logging.getLogger(__name__)


class Ingress:
    """Takes requests off the bus, runs them over this node's routes, and answers."""

    def __init__(
        self,
        identity: Identity,
        boot: str,
        client: Client,
        audit: AuditTrail,
        send: Callable[[NodeId, Frame], None],
        on_empty: Callable[[DeploymentName, int], None],
        now: Callable[[], float],
        is_over: Callable[[NodeId, str], bool],
        asked_for: Callable[[], None],
        clouds: Clouds | None = None,
    ) -> None:
        """`on_empty(deployment, epoch)`: a draining epoch's last sequence has ended. `is_over(node, boot)`: whether a
        process is known to have ended. `asked_for` is called when a cold model is."""
        self._identity = identity
        self._node = node = identity.name
        self._boot = boot
        self._lives = itertools.count()
        self._journals: dict[LifeId, asyncio.Task[None]] = {}
        self.heirs = Heirs(client, lambda life: life not in self._journals and is_over(*process_of(life)), self)
        self._client = client
        self._audit = audit
        self._on_empty = on_empty
        self._now = now
        self._served: dict[DeploymentName, Served] = {}
        self._attainments: dict[DeploymentName, Attainment] = {}
        self._hearings: dict[DeploymentName, Hearing] = {}
        self._in_flight: dict[RequestId, tuple[Served, Job]] = {}
        self._outbox = Outbox(client, lambda request: self._door.client_gone(request))  # noqa: PLW0108 - made below
        later = asyncio.get_running_loop().call_later
        self._asker = Asker(client, identity)
        conductor = Conductor(self._asker, now)
        self._desk = Desk(
            node,
            self._outbox.put,
            audit,
            now,
            send,
            self._in_flight,
            later,
            on_empty,
            conductor=conductor,
            clouds=clouds,
        )
        self._numbers = sequence_numbers(node, boot)
        self._awake = Awake(now, self._catch_up)
        self._door = Door(
            client,
            identity,
            audit,
            self._awake,
            now,
            self._outbox,
            self._served,
            self._in_flight,
            self._leave,
            asked_for,
        )

    async def start(self) -> None:
        """Listen for cancellations, bounced replies, and answers to what this ingress asks itself."""
        await self._door.replier.start()
        await self._asker.start()
        await self._client.subscribe(subjects.ALL_CANCEL, cb=self._door.cancelled)

    async def serve(self, plan: Plan, manifest: Manifest, text: Text | None) -> None:
        """Take new requests if a route of `plan` starts at this node; they may run over any of its routes."""
        if not any(route.source == self._node for route in plan.routes):
            return
        served = self._served.get(plan.deployment)
        if served is None:
            served = self._open(plan.deployment, manifest, text)
            served.current_nodes = plan.nodes
        served.manifest, served.text = manifest, text
        for route in plan.routes:
            served.add_route(plan, route, self._numbers)
        served.leave_at = None
        if served.withdrawing is not None:
            await served.withdrawing
        await self._hearing(served.name).open()
        served.admit()
        self.heirs.look()

    async def follow(self, event: EventSection) -> None:
        """Requests in flight go over to what is in force now; those that have nowhere to go end in an error."""
        if event.lost:
            await self._hearing(event.deployment).one_is_lost()
        served = self._served.get(event.deployment)
        if served is None:
            return
        # Who answers requests sees whole plans; over one of which it is shown a part it can drive nothing.
        current = event.current if isinstance(event.current, Plan) else None
        served.follow(current, event.draining, self._numbers)
        for node in event.lost:
            served.node_lost(node)
        if event.lost:
            self.heirs.look()
        if served.runs:
            return
        for job in [*served.queue, *served.fallback.jobs]:
            message = "the plan that was to run this request was retired"
            served.end(job, ResplitError(ErrorCode.NODE_LOST, message))
        await self._close(served)

    def drain(self, plan: SeenPlan) -> None:
        """Say when nothing of `plan` is left here."""
        served = self._served.get(plan.deployment)
        if served is None:
            self._on_empty(plan.deployment, plan.epoch)
        else:
            served.drain(plan.epoch)

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
        return tuple(served for served in self._served.values() if served.runs.newest is not None)

    def node_lost(self, node: NodeId) -> None:
        """A node cannot be reached at all: what runs over it is to be computed elsewhere."""
        for served in self._served.values():
            served.node_lost(node)
        self.heirs.look()

    def link_lost(self, node: NodeId) -> None:
        """What the link to that node had been given may not have arrived."""
        for served in self._served.values():
            served.link_lost(node)

    def heard(self, node: NodeId, hosting: Hosting) -> None:
        """A node's heartbeat: what it runs, it runs."""
        self.speaks(node, hosting)
        for stage in hosting.stages:
            served = self._served.get(stage.deployment)
            if served is not None and stage.state != "loading":
                served.node_serves(node, stage.epoch)

    def speaks(self, node: NodeId, hosting: Hosting) -> None:
        """What a heartbeat of this node, or another, says of how fast it is."""
        self._desk.speeds.heard(node, hosting)

    def runs_over(self, plan: SeenPlan) -> bool:
        """Whether requests here may run over exactly this plan."""
        served = self._served.get(plan.deployment)
        return served is not None and any(run.plan == plan for run in served.runs.values())

    def driven(self, plan: SeenPlan) -> int:
        """How many sequences of a plan run that this ingress drives."""
        served = self._served.get(plan.deployment)
        return 0 if served is None else served.driven(plan.epoch)

    @property
    def service(self) -> tuple[Service, ...]:
        """What became of requests here, of every deployment of which any was counted or waits."""
        waiting = {name: served.waiting for name, served in self._served.items()}
        return services(self._attainments, waiting)

    @property
    def finished(self) -> tuple[FinishedRequest, ...]:
        """What requests met that ended lately."""
        return self._desk.finished.recent(self._now())

    @property
    def stalled(self) -> tuple[RouteName, ...]:
        """Routes on which a step is overdue."""
        return tuple(name for served in self._served.values() for name in served.stalled)

    async def run(self) -> None:
        """Send replies and watch the clock, until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._outbox.run())
            group.create_task(self._check_forever())
            group.create_task(stoppable(self.heirs.run()))

    async def stop(self) -> None:
        """Take no more requests, and leave those in flight to whoever serves the deployment next."""
        for served in self._served.values():
            await self._hearing(served.name).drop()
        with contextlib.suppress(Exception):  # the bus may have gone first
            async with asyncio.timeout(STOP_S):
                for served in self._served.values():
                    served.answers.let_go()
                    await served.journal.drain(STOP_S)
                await self._outbox.drain()
                await self._client.flush()
        for task in self._journals.values():
            task.cancel()

    # Deployments.

    def _open(self, name: DeploymentName, manifest: Manifest, text: Text | None) -> Served:
        attainment = self._attainments.setdefault(name, Attainment())
        served = self._served[name] = Served(name, manifest, text, self._desk, *self._begin_life(name), attainment)
        return served

    def _hearing(self, name: DeploymentName) -> Hearing:
        return self._hearings.setdefault(name, Hearing(self._client, name, self._door.requested))

    def _begin_life(self, name: DeploymentName) -> tuple[LifeId, Journal]:
        life = life_name(self._node, self._boot, next(self._lives))
        journal = Journal(self._client, name, life, lambda _: self._superseded(name, life), self._now)
        self._journals[life] = asyncio.create_task(journal.run())
        return life, journal

    async def _close(self, served: Served) -> None:
        del self._served[served.name]
        await self._withdraw(served)
        self._hearings.pop(served.name, None)
        served.answers.let_go()
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

    @property
    def journal_waits_s(self) -> float:
        """How long the journal that waits longest has waited for JetStream; 0 where none waits."""
        return max((served.journal.waits_s for served in self.served), default=0.0)

    def was_here(self, life: LifeId) -> bool:
        """Whether a life of this process has ended, though the process goes on."""
        return process_of(life) == (self._node, self._boot) and life not in self._journals

    async def adopt(self, served: Served, requests: Sequence[LiveRequest], taken: set[RequestId]) -> None:
        """Answer for requests that an ingress which is gone had accepted, but for those `taken`, and add to these.

        What is in flight here already is answered here only if this life is not over too, which it may not have heard.
        Raises the first of what the journal raises; those that it did take run then, and are `taken`.
        """
        if any(one.request.request_id in self._in_flight and one.request.request_id not in taken for one in requests):
            await _confirmed(served)
        new = [one for one in requests if one.request.request_id not in self._in_flight.keys() | taken]
        new.sort(key=lambda one: not one.tokens_stored)  # those that were running first, then those that waited
        life, failed = served.life, list[BaseException]()
        for some in _portions(new):
            adopted = await asyncio.gather(*(self._adopt(served, one) for one in some), return_exceptions=True)
            failed += [found for found in adopted if isinstance(found, BaseException)]
            both = zip(some, adopted, strict=True)
            taken.update(one.request.request_id for one, found in both if not isinstance(found, BaseException))
            jobs = [found for found in adopted if found is not None and not isinstance(found, BaseException)]
            served.resume([(job, said) for job, said in jobs if self._desk.holds(job)])
            if served.life != life:
                raise SupersededError(life, None)
        if failed:
            raise failed[0]

    async def _adopt(self, served: Served, live: LiveRequest) -> tuple[Job, list[Token]] | None:
        """One of them, opened, and its tokens; None if it has ended here."""
        kept = live.request
        reply = self._door.replier.at(kept.inbox, kept.content_type)
        arrived = self._now() - kept.age_ms / 1e3
        newest = served.runs.newest
        if newest is None:
            message = "the deployment is not served here any more"
            raise ResplitError(ErrorCode.NODE_LOST, message)
        try:
            asked = opened(kept.data, kept.content_type, served.name, kept.request_id, self._identity)
            reply = reply.to_asker_of(asked)
            _, request = read(asked, kept.request_id)
            if kept.model != newest.plan.model:
                message = "the model that ran this request was replaced; ask again"
                raise ResplitError(ErrorCode.NODE_LOST, message)
            text = served.text
            if text is not None and takes_long(text, request, len(asked.data)):
                await asyncio.to_thread(prepare, text, request)
            job = open_request(request, kept.request_id, reply, newest.plan, served.manifest, text, arrived, kept.seed)
        except ResplitError as error:
            await self._door.give_up(served, reply, kept.request_id, error)
            return None
        if asked.seal is not None:
            live = asked.seal.open_tokens(live)
        if isinstance(job, Generation):
            job.max_tokens = kept.max_tokens or job.max_tokens
        self._in_flight[kept.request_id] = (served, job)
        journal = served.journal  # of this life; another may have begun once it answers
        try:
            job.handle = await journal.accept(kept, live.tokens, live.likely, asked.seal)
        except BaseException:
            self._desk.drop(job)
            raise
        if not self._desk.holds(job):
            journal.end([job.handle], ErrorCode.CANCELLED.value)  # it ended meanwhile
            return None
        likely = live.likely or ((None, ()),) * len(live.tokens)
        return job, [Token(0, 0, i, t, *more) for i, (t, more) in enumerate(zip(live.tokens, likely, strict=True))]

    async def _withdraw(self, served: Served) -> None:
        """Stop listening; requests that the server has handed over already are still taken."""
        served.leave_at = None
        await self._hearing(served.name).close()

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

    async def _catch_up(self) -> None:
        """Take in all that came while this process stood still, and learn whose its requests are: others may answer for
        them by now. Until the journal was asked this node would compute them beside its successor, in slots that the
        successor needs."""
        with contextlib.suppress(NatsError, OSError, TimeoutError):
            await settle(self._client)
        await asyncio.gather(*(_confirmed(served) for served in self.served), return_exceptions=True)

    def _check(self, now: float) -> None:
        self._awake.look()
        for served, job in list(self._in_flight.values()):
            if job.deadline is not None and now > job.deadline:
                error = ResplitError(ErrorCode.DEADLINE_EXCEEDED, "the deadline passed", "deadline_ms")
                served.end(job, error)
        for served in list(self._served.values()):
            if served.leave_at is not None and now >= served.leave_at and served.withdrawing is None:
                served.withdrawing = asyncio.create_task(self._leave(served))
            served.check(now)


def _portions(requests: Sequence[LiveRequest]) -> Iterator[list[LiveRequest]]:
    """In order, each at most `ADOPTED_BYTES` in the journal unless it is one request."""
    some: list[LiveRequest] = []
    size = 0
    for one in requests:
        adds = len(one.request.data) + TOKEN_BYTES * one.tokens_stored
        if some and size + adds > ADOPTED_BYTES:
            yield some
            some, size = [], 0
        some.append(one)
        size += adds
    if some:
        yield some


async def _confirmed(served: Served) -> None:
    """Returns once the stream has shown that this life goes on; raises `ResplitError(NODE_LOST)` if it does not, or not
    in time."""
    life = served.life
    try:
        async with asyncio.timeout(CONFIRM_S):
            await served.journal.confirmed()
    except TimeoutError as error:
        message = f"whether ingress {life} goes on is not known yet; what it may answer for waits"
        raise ResplitError(ErrorCode.NODE_LOST, message) from error
