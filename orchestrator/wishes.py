"""Desired state as it is stored: what operators want, whichever orchestrator wrote it down."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import KeyNotFoundError
from nats.js.kv import KeyValue
from pydantic import BaseModel

from models.store import Store
from orchestrator.core import Core
from orchestrator.fold import DeploymentRemoved, DeploymentWritten, ManifestKnown, NodeWished, Report
from orchestrator.inbox import Rejections
from schemas.base import DeploymentName
from schemas.codec import decode
from schemas.deployment import Deployment, NodeWish
from schemas.errors import ResplitError

LOOK_S = 2.0
"""A wish that a leader stored in its last moment is followed this much late."""

V = TypeVar("V", bound=BaseModel)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Desired:
    """The buckets that hold it."""

    js: JetStreamContext
    deployments: KeyValue
    nodes: KeyValue

    async def written(self) -> tuple[int, int]:
        """How often each was written to; raises what nats-py raises while the server is away."""
        deployments, nodes = await self.deployments.status(), await self.nodes.status()
        return deployments.stream_info.state.last_seq, nodes.stream_info.state.last_seq


@dataclass(frozen=True)
class Wishes:
    """What was found in them."""

    deployments: Mapping[DeploymentName, Deployment]
    nodes: tuple[NodeWish, ...]

    @property
    def reports(self) -> tuple[Report, ...]:
        """The same, for a snapshot that knows nothing of it."""
        return (*map(DeploymentWritten, self.deployments.values()), *map(NodeWished, self.nodes))


async def stored(desired: Desired, rejections: Rejections) -> Wishes:
    """Everything that is stored; what cannot be read is audited and passed over."""
    deployments = await _stored(desired.js, desired.deployments, Deployment, "a stored deployment", rejections)
    nodes = await _stored(desired.js, desired.nodes, NodeWish, "a stored wish for a node", rejections)
    return Wishes({deployment.name: deployment for deployment in deployments}, tuple(nodes))


async def _stored(js: JetStreamContext, bucket: KeyValue, kind: type[V], what: str, rejections: Rejections) -> list[V]:
    # Not `bucket.keys()`: on a busy machine its watcher may say that it is through before the first key has come, and
    # everything that is deployed would look removed.
    status = await bucket.status()
    info = await js.stream_info(f"KV_{status.bucket}", subjects_filter=f"$KV.{status.bucket}.>")
    found = []
    for key in sorted(subject.split(".", 2)[2] for subject in info.state.subjects or {}):
        try:
            entry = await bucket.get(key)
            found.append(decode(kind, entry.value or b"", what))
        except KeyNotFoundError:
            continue  # removed since
        except ResplitError as error:
            rejections.record(key, error)
    return found


async def follow(desired: Desired, core: Core, store: Store, rejections: Rejections) -> None:
    """Report until cancelled what was stored past this orchestrator: by the leader before it, as its last act."""
    seen: tuple[int, int] | None = None
    while True:
        try:
            last = await desired.written()
            if last != seen:
                wishes = await stored(desired, rejections)
                # A request that is being answered right now reports for itself; what is half of it is looked at anew.
                if await desired.written() == last:
                    _compare(wishes, core, store, rejections)
                    seen = last
        except (NatsError, TimeoutError, OSError) as error:
            log.debug("desired state is out of reach: %r", error)
        await asyncio.sleep(LOOK_S)


def models_of(wish: Deployment, store: Store, rejections: Rejections) -> list[ManifestKnown]:
    """The model of a deployment, and those of a pipeline's services."""
    found, models = list[ManifestKnown](), [wish.model]
    for model in models:  # a pipeline adds to it
        try:
            manifest = store.manifest(model)
        except ResplitError as error:
            rejections.record(model, error)
            continue
        found.append(ManifestKnown(model, manifest))
        services = () if manifest.pipeline is None else manifest.pipeline.services.values()
        models += [service.model for service in services]
    return found


def _compare(wishes: Wishes, core: Core, store: Store, rejections: Rejections) -> None:
    known = core.snapshot.deployments
    for name in sorted({*wishes.deployments, *known}):
        wish = wishes.deployments.get(name)
        if wish is None:
            if known[name].service_of is None:  # those are never stored: they follow from their pipelines
                core.report(DeploymentRemoved(name))
        elif wish != known.get(name):
            for model in models_of(wish, store, rejections):
                core.report(model)
            core.report(DeploymentWritten(wish))
    for node in wishes.nodes:  # such a wish is changed, never deleted
        if node != core.snapshot.wish(node.node):
            core.report(NodeWished(node))
