"""Desired state as it is stored: what operators want, whichever orchestrator wrote it down."""

import asyncio
import logging
from collections.abc import Mapping

from nats.errors import Error as NatsError
from nats.js.errors import KeyNotFoundError, NoKeysError
from nats.js.kv import KeyValue

from models.store import Store
from orchestrator.core import Core
from orchestrator.fold import DeploymentRemoved, DeploymentWritten, ManifestKnown
from orchestrator.inbox import Rejections
from schemas.base import DeploymentName
from schemas.codec import decode
from schemas.deployment import Deployment
from schemas.errors import ResplitError

LOOK_S = 2.0
"""A wish that a leader stored in its last moment is followed this much late."""

log = logging.getLogger(__name__)

Wishes = Mapping[DeploymentName, Deployment]


async def stored(bucket: KeyValue, rejections: Rejections) -> Wishes:
    """The stored deployments; one that cannot be read is audited and passed over."""
    try:
        keys = await bucket.keys()
    except NoKeysError:
        return {}
    found: dict[DeploymentName, Deployment] = {}
    for key in sorted(keys):
        try:
            entry = await bucket.get(key)
            deployment = decode(Deployment, entry.value or b"", "a stored deployment")
        except KeyNotFoundError:
            continue  # removed since
        except ResplitError as error:
            rejections.record(key, error)
            continue
        found[deployment.name] = deployment
    return found


async def follow(bucket: KeyValue, core: Core, store: Store, rejections: Rejections) -> None:
    """Report until cancelled what was stored past this orchestrator: by the leader before it, as its last act."""
    seen = -1
    while True:
        try:
            last = (await bucket.status()).stream_info.state.last_seq
            if last != seen:
                wishes = await stored(bucket, rejections)
                # A deploy that is being answered right now reports for itself; what is half of it is looked at anew.
                if (await bucket.status()).stream_info.state.last_seq == last:
                    _compare(wishes, core, store, rejections)
                    seen = last
        except (NatsError, TimeoutError, OSError) as error:
            log.debug("desired state is out of reach: %r", error)
        await asyncio.sleep(LOOK_S)


def _compare(wishes: Wishes, core: Core, store: Store, rejections: Rejections) -> None:
    known = core.snapshot.deployments
    for name in sorted({*wishes, *known}):
        wish = wishes.get(name)
        if wish is None:
            core.report(DeploymentRemoved(name))
        elif wish != known.get(name):
            if wish.model not in core.snapshot.manifests:
                try:
                    core.report(ManifestKnown(wish.model, store.manifest(wish.model)))
                except ResplitError as error:
                    rejections.record(wish.model, error)
            core.report(DeploymentWritten(wish))
