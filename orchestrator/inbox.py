"""What arrives from agents: verified, named by who signed it, or rejected and audited."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy

from bus.audit import AuditTrail
from bus.identity import Identity
from bus.sealed_heartbeats import open_heartbeat, read_capacity
from orchestrator.fold import CapacityReceived, ReceiptReceived, Report
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.envelope import RECEIPT_TYPE, open_envelope
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import Receipt

REJECTIONS_PER_WINDOW = 10
REJECTION_WINDOW_S = 10.0
"""More forged messages than this are counted, not audited one by one: a flood must not fill the audit stream."""
FETCH_S = 1.0
"""A pull that is in flight when the server dies stalls for its whole timeout: one of 10 s was seen to take 10 s."""
SILENT_FETCHES_MAX = 10
"""After as many empty pulls, and after each reconnection, the consumer is made anew: a server that restarted has
forgotten it and does not say so."""
FORGET_CONSUMER_S = 60.0
RETRY_S = 0.5

log = logging.getLogger(__name__)


class Inbox:
    """Turns messages of agents into reports; `deliver` gets only what carries its sender's own signature."""

    def __init__(self, identity: Identity, rejections: "Rejections", deliver: Callable[[Report], object]) -> None:
        self._identity = identity
        self._rejections = rejections
        self._deliver = deliver

    async def hear_capacity(self, client: Client) -> None:
        """Take heartbeats from now on."""
        await client.subscribe(subjects.ALL_CAPACITY, cb=self._capacity)

    async def hear_receipts(self, client: Client) -> None:
        """Take receipts until cancelled, each once and in order, starting with those the stream still has.

        Receipts of plans that are not live change nothing, so the old ones do no harm, and a drain that ended
        while no orchestrator was here is heard of.
        """
        js = client.jetstream()
        next_sequence = 1
        while True:
            connection = client.stats["reconnects"]
            try:
                subscription = await js.pull_subscribe(
                    subjects.ALL_RECEIPTS,
                    stream=subjects.STREAM_RECEIPTS,
                    config=ConsumerConfig(
                        deliver_policy=DeliverPolicy.BY_START_SEQUENCE,
                        opt_start_seq=next_sequence,
                        ack_policy=AckPolicy.NONE,
                        inactive_threshold=FORGET_CONSUMER_S,
                    ),
                )
            except (NatsError, TimeoutError, OSError) as error:
                log.debug("receipts are out of reach: %r", error)
                await asyncio.sleep(RETRY_S)
                continue
            try:
                next_sequence = await self._take_receipts(client, connection, subscription, next_sequence)
            finally:
                with contextlib.suppress(NatsError, TimeoutError, OSError):
                    await subscription.unsubscribe()

    async def _take_receipts(
        self, client: Client, connection: int, subscription: JetStreamContext.PullSubscription, next_sequence: int
    ) -> int:
        silent = 0
        while silent < SILENT_FETCHES_MAX and client.stats["reconnects"] == connection:
            try:
                (message,) = await subscription.fetch(1, timeout=FETCH_S)
            except (NatsTimeoutError, TimeoutError):
                silent += 1
                continue
            except (NatsError, OSError) as error:
                log.debug("the receipts' consumer is gone: %r", error)
                await asyncio.sleep(RETRY_S)
                break
            silent = 0
            next_sequence = message.metadata.sequence.stream + 1
            receipt = self._verified(message)
            if receipt is not None:
                self._deliver(ReceiptReceived(receipt))
        return next_sequence

    async def _capacity(self, message: Msg) -> None:
        try:
            heartbeat = open_heartbeat(message.data, self._identity)
            if message.subject != subjects.capacity(NodeId(heartbeat.node)):
                raise ResplitError(ErrorCode.BAD_SIGNATURE, f"{heartbeat.node!r} speaks as another node")
        except ResplitError as error:
            self._rejections.record(message.subject, error)
            return
        try:
            capacity = read_capacity(heartbeat, self._identity)
        except ResplitError as error:
            if error.code is ErrorCode.BAD_SIGNATURE:  # the node does not know yet which key this orchestrator has now
                log.warning("a heartbeat cannot be read: %s", error.message)
            else:
                self._rejections.record(message.subject, error)
            return
        if capacity is None:
            log.warning("a heartbeat of %s is not for %s: its roster is old", heartbeat.node, self._identity.name)
            return
        self._deliver(CapacityReceived(capacity))

    def _verified(self, message: Msg) -> Receipt | None:
        """The receipt in the message if the node that it is about, that its subject names and that signed is one."""
        try:
            receipt, signer = open_envelope(message.data, Receipt, RECEIPT_TYPE, self._identity.agents)
            if message.subject != subjects.receipt(signer) or receipt.node != signer:
                raise ResplitError(ErrorCode.BAD_SIGNATURE, f"{signer!r} speaks for another node")
        except ResplitError as error:
            self._rejections.record(message.subject, error)
            return None
        return receipt


class Rejections:
    """Audits messages that were not believed, at most `REJECTIONS_PER_WINDOW` in a window; the rest as a number."""

    def __init__(self, audit: AuditTrail) -> None:
        self._audit = audit
        self._window_start = 0.0
        self._count = 0
        self.silent = False
        """While another orchestrator leads, which hears the same and says it."""

    def record(self, subject: str, error: ResplitError) -> None:
        """Say where the message stood and why it was not believed; never what it said."""
        if self.silent:
            return
        now = time.monotonic()
        if now - self._window_start >= REJECTION_WINDOW_S:
            if self._count > REJECTIONS_PER_WINDOW:
                unsaid = self._count - REJECTIONS_PER_WINDOW
                self._audit.record(AuditKind.EVENT_REJECTED, "more messages were not believed", count=unsaid)
            self._window_start, self._count = now, 0
        self._count += 1
        if self._count <= REJECTIONS_PER_WINDOW:
            self._audit.record(
                AuditKind.EVENT_REJECTED,
                "a message was not believed",
                subject=subject,
                code=error.code.value,
                why=error.message,
            )
