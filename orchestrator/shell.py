"""The orchestrator as a process: connects, recovers, and runs its parts until it is cancelled.

recover the plan log and the desired state -> hear agents and operators -> Core reacts
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TypeVar

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.errors import NoKeysError
from nats.js.kv import KeyValue
from pydantic import BaseModel

from bus.audit import AuditTrail
from bus.blobs import BlobServer
from bus.connection import connect
from bus.keys import ORCHESTRATOR, Identity, load_identity
from bus.streams import deployments_bucket, ensure_streams, nodes_bucket
from models.store import Store
from orchestrator.core import Core, steady_clock
from orchestrator.fold import (
    BusBack,
    BusLost,
    DeploymentWritten,
    ManifestKnown,
    NodeWished,
    Report,
    RolloutAdvanced,
    Snapshot,
    fold,
)
from orchestrator.inbox import Inbox, Rejections
from orchestrator.log import PlanLog
from orchestrator.offers import Offers, models_in_use
from orchestrator.operators import Operators
from schemas import subjects
from schemas.codec import decode
from schemas.deployment import Deployment, NodeWish
from schemas.errors import ResplitError

READY_RETRY_S = 0.5
"""A server that accepts connections may still be opening its streams."""
LISTENING_S = 5.0
CANCEL_AGAIN_S = 0.5
GOODBYE_S = 2.0
"""For the last audit events and the connection; a server that is gone must not hold up the end."""

V = TypeVar("V", bound=BaseModel)
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OrchestratorConfig:
    """What an orchestrator is told when it starts."""

    url: str
    keys: Path
    """A key folder with the identity `orchestrator` (`bus.keys`)."""
    store: Path
    """The store of imported models, whose files it serves to agents."""


async def run(config: OrchestratorConfig, on_ready: Callable[[], object] = lambda: None) -> None:
    """Orchestrate until cancelled; `on_ready` is called once operators are answered.

    Raises `ResplitError` if the key folder is unusable, and STALE_EPOCH once another orchestrator has taken over.
    """
    identity = load_identity(config.keys, ORCHESTRATOR)
    store = Store(config.store)
    watch = _BusWatch()
    client = await connect(config.url, ORCHESTRATOR, on_lost=watch.lost, on_back=watch.back)
    try:
        await _serve(client, identity, store, watch, on_ready)
    finally:
        with contextlib.suppress(NatsError, TimeoutError, OSError):
            await asyncio.wait_for(client.close(), GOODBYE_S)


class _BusWatch:
    """Says when the connection comes and goes, as soon as somebody listens."""

    deliver: Callable[[Report], object] = staticmethod(lambda _: None)

    async def lost(self) -> None:
        self.deliver(BusLost())

    async def back(self) -> None:
        self.deliver(BusBack())


async def _serve(
    client: Client, identity: Identity, store: Store, watch: _BusWatch, on_ready: Callable[[], object]
) -> None:
    js, deployments, nodes = await _streams(client)
    now = steady_clock()
    audit = AuditTrail(js, identity, now)
    rejections = Rejections(audit)
    plans = PlanLog(js, identity)
    term, rollouts = await plans.recover(now(), rejections.record)
    snapshot = Snapshot(term)
    for report in [*map(RolloutAdvanced, rollouts.values()), *await _desired(deployments, nodes, rejections)]:
        snapshot = fold(snapshot, report, now())
    snapshot = _with_manifests(snapshot, store, rejections, now())
    offers = Offers(BlobServer(client, store))
    core = Core(snapshot, plans, audit, now)
    watch.deliver = core.report
    log.info("orchestrating in term %d: %d deployment(s)", term, len(snapshot.deployments))
    inbox = Inbox(identity, rejections, core.report)
    await inbox.hear_capacity(client)
    await offers.follow(snapshot)
    parts = [
        asyncio.create_task(part)
        for part in (audit.run(), inbox.hear_receipts(client), core.run(), offers.run(lambda: core.snapshot))
    ]
    try:
        await Operators(core, store, deployments, nodes, offers).listen(client)
        await _listening(client)
        on_ready()
        ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
        for part in ended:
            part.result()  # no part ends by itself: this raises why it did
    finally:
        await audit.drain(GOODBYE_S)
        await _end(parts)


async def _end(parts: list[asyncio.Task[None]]) -> None:
    """Cancel until each part has ended.

    Once is not always enough: in Python 3.11 `asyncio.wait_for`, which every nats-py request waits in, loses a
    cancellation that comes together with the answer.
    """
    while running := [part for part in parts if not part.done()]:
        for part in running:
            part.cancel()
        await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*parts, return_exceptions=True)  # each was looked at or is of no interest any more


async def _streams(client: Client) -> tuple[JetStreamContext, KeyValue, KeyValue]:
    """The streams and the buckets of deployments and nodes, as soon as the server has opened them."""
    said = False
    while True:
        try:
            js = await ensure_streams(client)
            return js, await deployments_bucket(js), await nodes_bucket(js)
        except (NatsError, TimeoutError, OSError) as error:
            if not said:
                log.warning("JetStream does not answer yet; trying until it does: %r", error)
                said = True
        await asyncio.sleep(READY_RETRY_S)


async def _desired(deployments: KeyValue, nodes: KeyValue, rejections: Rejections) -> list[Report]:
    """What operators want, as it is stored."""
    return [
        *map(DeploymentWritten, await _stored(deployments, Deployment, "a stored deployment", rejections)),
        *map(NodeWished, await _stored(nodes, NodeWish, "a stored wish for a node", rejections)),
    ]


async def _stored(bucket: KeyValue, kind: type[V], what: str, rejections: Rejections) -> list[V]:
    """Every value of a bucket, by key; one that cannot be read is audited and passed over."""
    try:
        keys = await bucket.keys()
    except NoKeysError:
        return []
    found = []
    for key in sorted(keys):
        entry = await bucket.get(key)
        try:
            found.append(decode(kind, entry.value or b"", what))
        except ResplitError as error:
            rejections.record(key, error)
    return found


def _with_manifests(snapshot: Snapshot, store: Store, rejections: Rejections, now: datetime) -> Snapshot:
    for digest in sorted(models_in_use(snapshot)):
        try:
            snapshot = fold(snapshot, ManifestKnown(digest, store.manifest(digest)), now)
        except ResplitError as error:
            rejections.record(digest, error)
    return snapshot


async def _listening(client: Client) -> None:
    """Wait until the server knows every subscription made so far.

    `Client.flush` does not say so: nats-py's PING overtakes the commands that still wait in its own buffer. A
    request goes through that buffer, so its answer comes after them.
    """
    while True:
        try:
            await client.request(subjects.control("status"), b"", timeout=LISTENING_S)
        except (NatsError, TimeoutError, OSError) as error:
            log.debug("not answered by ourselves yet: %r", error)
            await asyncio.sleep(READY_RETRY_S)
        else:
            return
