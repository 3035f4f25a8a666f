"""Answers operators: deploy, remove, status, explain, plan (core request and reply, JSON)."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from datetime import timedelta

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.js.kv import KeyValue
from pydantic import BaseModel

from models.store import Store
from orchestrator.core import Core
from orchestrator.explaining import dry_run, explained
from orchestrator.fold import DeploymentRemoved, DeploymentWritten, ManifestKnown, Snapshot
from orchestrator.offers import Offers
from orchestrator.planner import Proposal, check_shape, make_plan
from orchestrator.rooms import rooms
from orchestrator.view import status
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import Digest
from schemas.capacity import HEARTBEAT_SPARE_S
from schemas.codec import decode, encode
from schemas.control import (
    DeployReply,
    DeployRequest,
    ExplainReply,
    ExplainRequest,
    PlanReply,
    PlanRequest,
    RemoveReply,
    RemoveRequest,
    StatusReply,
)
from schemas.deployment import Deployment, Settings
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.request import ErrorReply

ALL_HEARD = timedelta(seconds=HEARTBEAT_SPARE_S + 1)
"""After this long every node that is alive has reported; until then "it does not fit" may only mean "not yet"."""
NODES_WAIT = timedelta(seconds=3)
"""How long a deploy waits for a first node to report where there is none at all."""
LOOK_AGAIN_S = 0.2
FOLDED_S = 5.0
"""A reply waits for its change to be in the snapshot, so that a `status` right after shows it; longer than this
only if the bus is away, and then the change is stored all the same."""

log = logging.getLogger(__name__)


class Operators:
    """Requests of operators, each checked against the snapshot before anything is stored."""

    def __init__(self, core: Core, store: Store, bucket: KeyValue, offers: Offers) -> None:
        self._core = core
        self._store = store
        self._bucket = bucket
        self._offers = offers
        self._started_at = core.now()

    async def listen(self, client: Client) -> None:
        """Answer from now on. Requests of one kind are answered one after the other, so deploys never race."""
        verbs: dict[str, Callable[[bytes], Awaitable[BaseModel]]] = {
            "deploy": self._deploy,
            "remove": self._remove,
            "status": self._status,
            "explain": self._explain,
            "plan": self._plan,
        }
        for verb, answer in verbs.items():
            await client.subscribe(subjects.control(verb), cb=_replying(answer))

    async def _deploy(self, data: bytes) -> DeployReply:
        request = decode(DeployRequest, data, "request")
        digest = await asyncio.to_thread(self._store.resolve, request.model)
        manifest = await asyncio.to_thread(self._store.manifest, digest)
        deployment = desired(request, digest, manifest)
        check_shape(deployment, manifest)
        proposal = await self._feasible(deployment, manifest)
        try:
            await self._bucket.put(deployment.name, encode(deployment))
        except (NatsError, TimeoutError, OSError) as error:
            message = f"the deployment could not be stored, so nothing has changed: {error!r}"
            raise ResplitError(ErrorCode.UNREACHABLE, message) from error
        await self._offers.add(digest, manifest)
        self._core.report(ManifestKnown(digest, manifest))
        self._core.audit.record(
            AuditKind.DEPLOYMENT_CHANGED, "an operator deployed", deployment=deployment.name, model=deployment.model
        )
        await self._core.folded(DeploymentWritten(deployment), FOLDED_S)
        return DeployReply(
            deployment=deployment,
            model_name=manifest.name,
            stages=proposal.plan.routes[0].stages,
            estimate=proposal.estimate.terms,
        )

    async def _feasible(self, deployment: Deployment, manifest: Manifest) -> Proposal:
        """The plan there would be now; raises the planner's error once every node had the time to report."""
        waited_since = self._core.now()
        while True:
            snapshot = self._core.snapshot
            try:
                return await asyncio.to_thread(trial, snapshot, deployment, manifest)
            except ResplitError:
                now = self._core.now()
                patience = NODES_WAIT if not snapshot.present else timedelta(0)
                if now >= max(self._started_at + ALL_HEARD, waited_since + patience):
                    raise
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _remove(self, data: bytes) -> RemoveReply:
        request = decode(RemoveRequest, data, "request")
        if request.name not in self._core.snapshot.deployments:
            known = ", ".join(sorted(self._core.snapshot.deployments)) or "none"
            message = f"there is no deployment {request.name!r}; the deployments are: {known}"
            raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, message, "name")
        try:
            await self._bucket.delete(request.name)
        except (NatsError, TimeoutError, OSError) as error:
            message = f"the deployment could not be removed, so nothing has changed: {error!r}"
            raise ResplitError(ErrorCode.UNREACHABLE, message) from error
        self._core.audit.record(
            AuditKind.DEPLOYMENT_CHANGED, "an operator removed the deployment", deployment=request.name
        )
        await self._core.folded(DeploymentRemoved(request.name), FOLDED_S)
        return RemoveReply(name=request.name)

    async def _status(self, _: bytes) -> StatusReply:
        return status(self._core.snapshot, self._core.now())

    async def _explain(self, data: bytes) -> ExplainReply:
        request = decode(ExplainRequest, data, "request")
        snapshot, now = self._core.snapshot, self._core.now()
        return await asyncio.to_thread(explained, snapshot, request.name, self._core.policy, now)

    async def _plan(self, data: bytes) -> PlanReply:
        request = decode(PlanRequest, data, "request")
        snapshot, now = self._core.snapshot, self._core.now()
        return await asyncio.to_thread(dry_run, snapshot, request.name, self._core.policy, now)


def desired(request: DeployRequest, digest: Digest, manifest: Manifest) -> Deployment:
    """The deployment that a request means, for the model it turned out to name."""
    settings = request.settings
    longest = manifest.text.context_length if manifest.text is not None else settings.context_tokens
    if settings.context_tokens == Settings().context_tokens and longest < settings.context_tokens:
        settings = settings.model_copy(update={"context_tokens": longest})
    return Deployment(
        name=request.name, model=digest, settings=settings, stages=request.stages, placement=request.placement
    )


def trial(snapshot: Snapshot, deployment: Deployment, manifest: Manifest) -> Proposal:
    """The plan that this deployment would get now; raises what `make_plan` raises. Nothing is changed."""
    rollout = snapshot.rollout(deployment.name)
    found = rooms(snapshot, deployment, manifest)
    return make_plan(deployment, manifest, found, rollout.epoch + 1, rollout.current, "a trial")


def _replying(answer: Callable[[bytes], Awaitable[BaseModel]]) -> Callable[[Msg], Awaitable[None]]:
    async def reply(message: Msg) -> None:
        try:
            value: BaseModel = await answer(message.data)
        except ResplitError as error:
            value = ErrorReply(error=error.body)
        except Exception:  # the operator must hear of a fault of ours, and the next request must be answered
            log.exception("a request of an operator failed")
            value = ErrorReply(error=ResplitError(ErrorCode.INTERNAL, "the orchestrator's log has the cause").body)
        if message.reply:
            await message.respond(encode(value))

    return reply
