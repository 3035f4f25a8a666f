"""A time in office: take the log over, then lead until the lease is lost.

announce the term in the log -> recover plans and desired state -> answer operators -> Core reacts
"""

import asyncio
import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

from bus.audit import AuditTrail
from bus.blobs import BlobServer
from bus.identity import Identity
from bus.stopping import first_of
from bus.supervision import Work
from models.store import Store
from orchestrator import wishes
from orchestrator.beacons import Beacons
from orchestrator.core import Core
from orchestrator.fold import ManifestKnown, Report, RolloutAdvanced, Snapshot, fold
from orchestrator.inbox import Inbox, Rejections
from orchestrator.keys import KeyHolder
from orchestrator.lease import Lease
from orchestrator.log import PlanLog
from orchestrator.offers import Offers, models_in_use
from orchestrator.operators import Office, Operators
from orchestrator.residency.memory import Keeping
from orchestrator.staging import Adviser
from orchestrator.standby import Standby, Standbys, bystander
from orchestrator.wishes import Desired
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import Digest, NodeId
from schemas.control import StatusReply
from schemas.errors import ErrorCode, ResplitError
from schemas.leader import Leadership

LISTENING_S = 2.0
LISTENING_RETRY_S = 0.5

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What lasts as long as the process, whoever leads."""

    name: NodeId
    client: Client
    js: JetStreamContext
    desired: Desired
    leases: KeyValue
    identity: Identity
    store: Store
    audit: AuditTrail
    rejections: Rejections
    inbox: Inbox
    now: Callable[[], datetime]
    heard_since: datetime
    """When this process began to hear heartbeats."""
    keeping: Keeping = "worth"
    work: Work = field(default_factory=Work)
    """What is decided in threads."""


class Term:
    """One time in office, from the moment the lease is held."""

    def __init__(self, here: Surroundings, lease: Lease, standby: Standby, on_core: Callable[[Core], object]) -> None:
        self._here = here
        self._lease = lease
        self._standby = standby
        self._on_core = on_core
        self._core: Core | None = None
        self._leadership: Leadership | None = None
        self._operators: Operators | None = None

    async def serve(self, on_ready: Callable[[], object]) -> None:
        """Lead until deposed; `on_ready` is called once operators are answered. Nothing is done any more when this
        returns or is cancelled, and the audit says why."""
        reason = "it was told to stop"
        try:
            reason = await first_of(self._lease.hold(), self._lead(on_ready))
        except (NatsError, TimeoutError, OSError) as error:  # first: some of these are both
            reason = f"the bus failed while the log was taken over: {error!r}"
        except ResplitError as error:
            reason = error.message
            if error.code is not ErrorCode.STALE_EPOCH:
                raise
        finally:
            if self._leadership is not None:
                self._here.audit.record(
                    AuditKind.LEADER_DEPOSED,
                    "an orchestrator does not lead any more",
                    leader=self._leadership.leader,
                    term=self._leadership.term,
                    reason=reason,
                )

    def status(self) -> str:
        """What it does now, in one line."""
        if self._core is None or self._leadership is None:
            return "takes the lead over"
        snapshot = self._core.snapshot
        return (
            f"leads in term {snapshot.term}: {len(snapshot.deployments)} deployment(s), {len(snapshot.nodes)} node(s)"
        )

    def seen(self) -> StatusReply | None:
        """What operators would be told; None before they are answered."""
        return None if self._operators is None else self._operators.seen()

    @property
    def snapshot(self) -> Snapshot:
        """What to go on with as a bystander."""
        return bystander(self._core.snapshot) if self._core is not None else self._standby.snapshot

    async def _lead(self, on_ready: Callable[[], object]) -> None:
        here = self._here
        keys = KeyHolder(here.store, here.identity, here.now)
        plans = PlanLog(here.js, here.identity, self._lease.may_act, keys.with_keys)
        leadership, rollouts = await plans.take_office(here.name, here.now(), here.rejections.record)
        self._leadership = leadership
        self._lease.announce(leadership.term)
        here.audit.record(
            AuditKind.LEADER_ELECTED, "an orchestrator leads", leader=leadership.leader, term=leadership.term
        )
        wanted = await wishes.stored(here.desired, here.rejections)
        snapshot = replace(self._standby.snapshot, term=leadership.term)
        recovered: list[Report] = [*map(RolloutAdvanced, rollouts.values()), *wanted.reports]
        for report in recovered:
            snapshot = fold(snapshot, report, here.now())
        snapshot = _with_manifests(snapshot, here.store, here.rejections, here.now())
        core = Core(snapshot, plans, here.audit, here.now, keeping=here.keeping, work=here.work)
        self._core = core
        self._on_core(core)
        log.info("%s leads in term %d: %d deployment(s)", here.name, leadership.term, len(snapshot.deployments))
        standbys, offers = Standbys(here.now), Offers(BlobServer(here.client, here.store))
        office = Office(here.identity.home, leadership, standbys, self._lease.may_act)
        self._operators = operators = Operators(core, here.store, keys, here.desired, offers, office, here.heard_since)
        subscriptions = [await standbys.hear(here.client)]
        try:
            await offers.follow(snapshot)
            await first_of(
                core.run(),
                here.inbox.hear_receipts(here.client),
                offers.run(lambda: core.snapshot),
                Beacons(here.client, here.identity, leadership.term, here.now, self._lease.may_act).run(plans),
                Adviser(here.client, here.identity, here.now).run(lambda: core.snapshot),
                wishes.follow(here.desired, core, here.store, here.rejections),
                _answering(operators, here.client, subscriptions, on_ready),
            )
        finally:
            for subscription in subscriptions:
                with contextlib.suppress(NatsError, OSError):
                    await subscription.unsubscribe()
            with contextlib.suppress(NatsError, OSError):
                await offers.end()


async def _answering(
    operators: Operators, client: Client, subscriptions: list[Subscription], on_ready: Callable[[], object]
) -> None:
    subscriptions += await operators.listen(client)
    await _listening(client)
    on_ready()
    await asyncio.Event().wait()


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
            await asyncio.sleep(LISTENING_RETRY_S)
        else:
            return


def _with_manifests(snapshot: Snapshot, store: Store, rejections: Rejections, now: datetime) -> Snapshot:
    tried = set[Digest]()
    while missing := sorted(models_in_use(snapshot) - tried):  # a pipeline names others
        tried.update(missing)
        for digest in missing:
            try:
                snapshot = fold(snapshot, ManifestKnown(digest, store.manifest(digest)), now)
            except ResplitError as error:
                rejections.record(digest, error)
    return snapshot
