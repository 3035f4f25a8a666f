"""The audit trail of one process: signed events, published in order, kept while the bus is away."""

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Protocol

from nats.errors import Error as NatsError
from nats.errors import MaxPayloadError
from nats.js import JetStreamContext

from bus.keys import Identity
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind
from schemas.base import DeploymentName, RequestId
from schemas.envelope import AUDIT_TYPE, seal

BACKLOG_MAX = 10_000
"""Events kept while the bus is away; beyond that the oldest are dropped, and their number is logged."""
RETRY_S = 1.0
TEXT_MAX = 500
"""Characters of a field that are kept: some of them a stranger wrote."""

log = logging.getLogger(__name__)


class Trail(Protocol):
    """Where what happens is written down, whoever keeps it."""

    def record(
        self,
        kind: AuditKind,
        message: str,
        *,
        deployment: DeploymentName | None = None,
        epoch: int | None = None,
        request: RequestId | None = None,
        **fields: str | int | float | bool | None,
    ) -> None: ...


class AuditTrail:
    """Signs and publishes audit events in the background; `record` never waits and never fails."""

    def __init__(
        self, js: JetStreamContext, identity: Identity, now: Callable[[], datetime] = lambda: datetime.now(UTC)
    ) -> None:
        self._js = js
        self._identity = identity
        self._now = now
        self._waiting: deque[AuditEvent] = deque()
        self._dropped = 0
        self._wake = asyncio.Event()
        self._all_out = asyncio.Event()

    def record(
        self,
        kind: AuditKind,
        message: str,
        *,
        deployment: DeploymentName | None = None,
        epoch: int | None = None,
        request: RequestId | None = None,
        **fields: str | int | float | bool | None,
    ) -> None:
        """Append one event; what varies goes into `fields`, never tensors, prompts or keys."""
        event = AuditEvent(
            at=self._now(),
            source=self._identity.name,
            kind=kind,
            message=message,
            deployment=deployment,
            epoch=epoch,
            request=request,
            fields={name: v[:TEXT_MAX] if isinstance(v, str) else v for name, v in fields.items()},
        )
        log.info("%s: %s %s", kind.value, message, fields)
        if len(self._waiting) >= BACKLOG_MAX:
            self._waiting.popleft()
            self._dropped += 1
        self._waiting.append(event)
        self._all_out.clear()
        self._wake.set()

    async def run(self) -> None:
        """Publish events in order until cancelled; an event leaves the backlog once JetStream has it."""
        while True:
            await self._wake.wait()
            while self._waiting:
                event = self._waiting[0]
                data = seal(event, AUDIT_TYPE, self._identity.name, self._identity.key)
                try:
                    await self._js.publish(subjects.audit(event.source, event.kind), data)
                except MaxPayloadError:
                    log.exception("an audit event is larger than the server carries, and is lost")
                except (NatsError, TimeoutError, OSError):
                    await asyncio.sleep(RETRY_S)
                    continue
                self._waiting.popleft()
            if self._dropped:
                log.error("the audit backlog overflowed; events lost: %d", self._dropped)
                self._dropped = 0
            self._wake.clear()
            self._all_out.set()

    async def drain(self, timeout_s: float) -> None:
        """Wait until every event is out, at most `timeout_s`."""
        if not self._waiting:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._all_out.wait()
