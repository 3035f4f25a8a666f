"""Answers operators, who ask for a change or for what is, by request and reply in JSON (`schemas.control`)."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import TypeVar

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from pydantic import BaseModel

from models.store import Store
from orchestrator.core import Core
from orchestrator.explaining import dry_run, explained
from orchestrator.fold import DeploymentRemoved, DeploymentWritten, ManifestKnown, NodeWished, Snapshot
from orchestrator.keys import KeyHolder
from orchestrator.offers import Offers
from orchestrator.planner import Proposal, check_shape, fitted
from orchestrator.standby import Standbys
from orchestrator.trial import (
    check_cloud,
    check_distrust,
    check_drain,
    check_is_no_service,
    check_is_same_graph,
    check_known,
    check_services,
    check_trustable,
    exposed_on,
    trial,
    users,
)
from orchestrator.view import status
from orchestrator.whereabouts import whereabouts
from orchestrator.wishes import Desired
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, Digest, Home, called, home_of
from schemas.capacity import HEARTBEAT_SPARE_S
from schemas.codec import decode, encode
from schemas.control import (
    DeployReply,
    DeployRequest,
    DrainReply,
    DrainRequest,
    ExplainReply,
    ExplainRequest,
    PlaceRequest,
    PlanReply,
    PlanRequest,
    RemoveReply,
    RemoveRequest,
    StatusReply,
    TrustReply,
    TrustRequest,
    UndrainReply,
    UndrainRequest,
    WhereReply,
    WhereRequest,
)
from schemas.deployment import Chain, Deployment, NodeWish, Placement, chains_of
from schemas.errors import ErrorCode, ResplitError
from schemas.leader import Leadership
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

DEPOSED = ResplitError(ErrorCode.UNREACHABLE, "the orchestrator that was asked does not lead any more; ask again")

T = TypeVar("T")
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Office:
    """This orchestrator's time as the leader at `home`."""

    home: Home

    leadership: Leadership
    standbys: Standbys
    may_act: Callable[[], Awaitable[None]]
    """Returns while it leads, and waits while that is in doubt (`Lease.may_act`)."""


class Operators:
    """Requests of operators, each checked against the snapshot before anything is stored."""

    def __init__(
        self,
        core: Core,
        store: Store,
        keys: KeyHolder,
        buckets: Desired,
        offers: Offers,
        office: Office,
        heard_since: datetime,
    ) -> None:
        self._core = core
        self._store = store
        self._keys = keys
        self._deployments = buckets.deployments
        self._nodes = buckets.nodes
        self._offers = offers
        self._office = office
        self._changing = asyncio.Lock()
        self._heard_since = heard_since

    async def listen(self, client: Client) -> list[Subscription]:
        """Answer until the subscriptions are ended. Changes are made one after the other: none is checked against
        what another undoes."""
        verbs: dict[str, Callable[[bytes], Awaitable[BaseModel]]] = {
            "deploy": self._one_by_one(self._deploy),
            "place": self._one_by_one(self._place),
            "remove": self._one_by_one(self._remove),
            "drain": self._one_by_one(self._drain),
            "undrain": self._one_by_one(self._undrain),
            "trust": self._one_by_one(self._trust),
            "status": self._status,
            "explain": self._explain,
            "plan": self._plan,
            "where": self._where,
        }
        return [
            await client.subscribe(subjects.control(verb), cb=_replying(answer, self._office.may_act))
            for verb, answer in verbs.items()
        ]

    def _one_by_one(self, answer: Callable[[bytes], Awaitable[BaseModel]]) -> Callable[[bytes], Awaitable[BaseModel]]:
        async def alone(data: bytes) -> BaseModel:
            async with self._changing:
                return await answer(data)

        return alone

    async def _deploy(self, data: bytes) -> DeployReply:
        request = decode(DeployRequest, data, "request")
        check_home(request.name, self._office.home)
        digest = await asyncio.to_thread(self._store.resolve, request.model)
        manifest = await asyncio.to_thread(self._store.manifest, digest)
        await asyncio.to_thread(self._keys.check, digest, manifest)
        services = await asyncio.to_thread(self._models_of_services, manifest)
        return await self._want(desired(request, digest, manifest), manifest, "an operator deployed", services)

    def _models_of_services(self, manifest: Manifest) -> dict[Digest, Manifest]:
        """Of a pipeline: the models of its services. Raises as `_deploy` does."""
        found = {}
        for service in () if manifest.pipeline is None else manifest.pipeline.services.values():
            found[service.model] = of_service = self._store.manifest(service.model)
            self._keys.check(service.model, of_service)
        return found

    async def _place(self, data: bytes) -> DeployReply:
        request = decode(PlaceRequest, data, "request")
        deployment = placed(self._desired(request.name), request.placement)
        manifest = await asyncio.to_thread(self._store.manifest, deployment.model)
        services = await asyncio.to_thread(self._models_of_services, manifest)
        what = "an operator locked the placement" if request.placement else "an operator left the placement to planning"
        return await self._want(deployment, manifest, what, services)

    async def _want(
        self, deployment: Deployment, manifest: Manifest, what: str, services: Mapping[Digest, Manifest]
    ) -> DeployReply:
        """Store the deployment if it can run, and only then change anything. `services` are the models that a pipeline
        uses."""
        deployment = self._core.snapshot.ruled(deployment)
        check_is_no_service(self._core.snapshot, deployment.name)
        check_shape(deployment, manifest)
        models = {deployment.model: manifest, **services}
        check_is_same_graph(self._core.snapshot, deployment, models)
        proposal = await self._once_all_are_heard(lambda snapshot: self._tried(snapshot, deployment, models))
        await self._office.may_act()
        try:
            await self._deployments.put(deployment.name, encode(deployment))
        except (NatsError, TimeoutError, OSError) as error:
            message = f"the deployment could not be stored, so nothing has changed: {error!r}"
            raise ResplitError(ErrorCode.UNREACHABLE, message) from error
        for model, known in models.items():
            await self._offers.add(model, known)
            self._core.report(ManifestKnown(model, known))
        self._core.audit.record(AuditKind.DEPLOYMENT_CHANGED, what, deployment=deployment.name, model=deployment.model)
        await self._core.folded(DeploymentWritten(deployment), FOLDED_S)
        return DeployReply(
            deployment=deployment,
            model_name=manifest.name,
            routes=proposal.plan.chains,
            cold=proposal.plan.cold,
            estimate=proposal.terms,
        )

    def _tried(self, snapshot: Snapshot, deployment: Deployment, models: Mapping[Digest, Manifest]) -> Proposal:
        manifest = models[deployment.model]
        check_cloud(snapshot, deployment)
        proposal = trial(snapshot, deployment, manifest, self._core.now())
        if manifest.pipeline is not None:
            check_services(snapshot, deployment, manifest.pipeline, models, self._core.now())
        return proposal

    async def _once_all_are_heard(self, attempt: Callable[[Snapshot], T]) -> T:
        """What `attempt` makes of the snapshot; raises its error once every node had the time to report."""
        waited_since = self._core.now()
        while True:
            snapshot = self._core.snapshot
            try:
                return await asyncio.to_thread(attempt, snapshot)
            except ResplitError:
                now = self._core.now()
                patience = NODES_WAIT if not snapshot.present else timedelta(0)
                if now >= max(self._heard_since + ALL_HEARD, waited_since + patience):
                    raise
            await asyncio.sleep(LOOK_AGAIN_S)

    async def _remove(self, data: bytes) -> RemoveReply:
        request = decode(RemoveRequest, data, "request")
        self._desired(request.name)
        await self._office.may_act()
        try:
            await self._deployments.delete(request.name)
        except (NatsError, TimeoutError, OSError) as error:
            message = f"the deployment could not be removed, so nothing has changed: {error!r}"
            raise ResplitError(ErrorCode.UNREACHABLE, message) from error
        self._core.audit.record(
            AuditKind.DEPLOYMENT_CHANGED, "an operator removed the deployment", deployment=request.name
        )
        await self._core.folded(DeploymentRemoved(request.name), FOLDED_S)
        return RemoveReply(name=request.name)

    def _desired(self, name: DeploymentName) -> Deployment:
        """The deployment as it is wanted now; raises UNKNOWN_DEPLOYMENT if there is none of this name, and FORBIDDEN if
        another home steers it."""
        check_home(name, self._office.home)
        known = self._core.snapshot.deployments
        if name not in known:
            message = f"there is no deployment {name!r}; the deployments are: {', '.join(sorted(known)) or 'none'}"
            raise ResplitError(ErrorCode.UNKNOWN_DEPLOYMENT, message, "name")
        check_is_no_service(self._core.snapshot, name)
        return known[name]

    async def _drain(self, data: bytes) -> DrainReply:
        node = decode(DrainRequest, data, "request").node
        if node not in self._core.snapshot.drained:
            wish = self._core.snapshot.wish(node).model_copy(update={"drained": True})
            await self._once_all_are_heard(lambda snapshot: check_drain(snapshot, node, self._core.now()))
            await self._wish(wish, "an operator drains the node")
        return DrainReply(node=node, deployments=users(self._core.snapshot, node))

    async def _undrain(self, data: bytes) -> UndrainReply:
        node = decode(UndrainRequest, data, "request").node
        snapshot = self._core.snapshot
        if node in snapshot.drained:
            wish = snapshot.wish(node).model_copy(update={"drained": False})
            await self._wish(wish, "an operator lets plans use the node again")
        elif node not in snapshot.nodes:
            drained = ", ".join(sorted(snapshot.drained)) or "none"
            message = f"there is no node {node!r}; the drained nodes are: {drained}"
            raise ResplitError(ErrorCode.UNKNOWN_NODE, message, "node")
        return UndrainReply(node=node)

    async def _trust(self, data: bytes) -> TrustReply:
        request = decode(TrustRequest, data, "request")
        node, trusted = request.node, request.trusted
        wish = self._core.snapshot.wish(node).model_copy(update={"trusted": trusted})
        if trusted:
            check_known(self._core.snapshot, node)
            check_trustable(self._core.snapshot, node)
        else:
            await self._once_all_are_heard(lambda snapshot: check_distrust(snapshot, node, self._core.now()))
        if self._core.snapshot.trust.get(node) != trusted:
            what = "an operator trusts the node" if trusted else "an operator does not trust the node"
            await self._wish(wish, what)
        return TrustReply(node=node, trusted=trusted, deployments=exposed_on(self._core.snapshot, node))

    async def _wish(self, wish: NodeWish, what: str) -> None:
        await self._office.may_act()
        try:
            await self._nodes.put(wish.node, encode(wish))
        except (NatsError, TimeoutError, OSError) as error:
            message = f"the wish could not be stored, so nothing has changed: {error!r}"
            raise ResplitError(ErrorCode.UNREACHABLE, message) from error
        self._core.audit.record(
            AuditKind.NODE_CHANGED, what, node=wish.node, drained=wish.drained, trusted=wish.trusted
        )
        await self._core.folded(NodeWished(wish), FOLDED_S)

    def seen(self) -> StatusReply:
        """The whole view, as operators are told it."""
        seen = status(self._core.snapshot, self._core.now())
        return seen.model_copy(update={"leader": self._office.leadership, "standbys": self._office.standbys.names})

    async def _status(self, _: bytes) -> StatusReply:
        return self.seen()

    async def _explain(self, data: bytes) -> ExplainReply:
        request = decode(ExplainRequest, data, "request")
        snapshot, now = self._core.snapshot, self._core.now()
        return await asyncio.to_thread(explained, snapshot, request.name, self._core.policy, now)

    async def _plan(self, data: bytes) -> PlanReply:
        request = decode(PlanRequest, data, "request")
        snapshot, now = self._core.snapshot, self._core.now()
        return await asyncio.to_thread(dry_run, snapshot, request.name, self._core.policy, now)

    async def _where(self, data: bytes) -> WhereReply:
        request = decode(WhereRequest, data, "request")
        digest = await asyncio.to_thread(self._store.resolve, request.model)
        manifest = await asyncio.to_thread(self._store.manifest, digest)
        at = whereabouts(self._core.snapshot, digest)
        return WhereReply(model=digest, name=manifest.name, blocks=len(manifest.blocks), at=at)


def desired(request: DeployRequest, digest: Digest, manifest: Manifest) -> Deployment:
    """The deployment that a request means, for the model it turned out to name."""
    return Deployment(
        name=request.name,
        model=digest,
        settings=fitted(request.settings, manifest),
        stages=request.stages,
        placement=request.placement,
        slo=request.slo,
        routes=request.routes,
        sensitive=request.sensitive,
        sealed=request.sealed,
        on_demand=request.on_demand,
        cloud=request.cloud,
    )


def check_home(name: DeploymentName, home: Home) -> None:
    """That a deployment is steered at `home`; raises `ResplitError(FORBIDDEN)` naming where to ask."""
    at = home_of(name)
    if at != home:
        here = "" if home is None else f" (one of {called(home)} is called {home}/NAME)"
        message = (
            f"{name!r} is at home at {called(at)}, and {called(home)} was asked{here}; give the --url of its server"
        )
        raise ResplitError(ErrorCode.FORBIDDEN, message, "name")


def placed(deployment: Deployment, placement: Chain | Placement | None) -> Deployment:
    """The same deployment with another placement, or with none.

    A number of stages, or of routes, that the placement has too stays, and is what is wanted once the placement is
    taken back.
    """
    chains = chains_of(placement)
    as_cut = chains is None or all(len(chain) == deployment.stages for chain in chains)
    as_many = chains is None or len(chains) == deployment.routes
    update = {
        "placement": placement,
        "stages": deployment.stages if as_cut else None,
        "routes": deployment.routes if as_many else None,
    }
    return deployment.model_copy(update=update)


def _replying(
    answer: Callable[[bytes], Awaitable[BaseModel]], may_act: Callable[[], Awaitable[None]]
) -> Callable[[Msg], Awaitable[None]]:
    async def reply(message: Msg) -> None:
        try:
            await may_act()  # what waited here while this process slept is not its business any more
            value: BaseModel = await answer(message.data)
        except asyncio.CancelledError:
            if message.reply:
                with contextlib.suppress(NatsError, OSError):
                    await message.respond(encode(ErrorReply(error=DEPOSED.body)))
            raise
        except ResplitError as error:
            value = ErrorReply(error=error.body)
        except Exception:  # the operator must hear of a fault of ours, and the next request must be answered
            log.exception("a request of an operator failed")
            value = ErrorReply(error=ResplitError(ErrorCode.INTERNAL, "the orchestrator's log has the cause").body)
        if message.reply:
            await message.respond(encode(value))

    return reply
