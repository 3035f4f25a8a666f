"""A cluster to do something to: who runs what, what the control plane says, and whether all is whole again."""

import asyncio
import random
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from benchmarks.faults.load import DEPLOYMENT, SETTINGS, Asked, Load, Wire
from benchmarks.faults.owned import OwnedCluster
from benchmarks.faults.surroundings import Clocks, Surroundings
from benchmarks.faults.wires import Wires
from bus.connection import settle
from bus.identity import Identity
from bus.sealed_plans import open_event
from resplit import control
from resplit.standing import Reader, trust_of
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind
from schemas.control import DeploymentStatus, DeployRequest, StatusReply
from schemas.deployment import Stage
from schemas.envelope import LEADER_TYPE, PLAN_TYPE, RECEIPT_TYPE, open_envelope
from schemas.errors import ResplitError
from schemas.leader import Leadership
from schemas.plan import PlanEvent, PlanPhase, Receipt
from schemas.section import SealedEvent

WHOLE_S = 90.0
FRESH_S = 3.0
"""A heartbeat no older than this: they come every second."""
WENT_ON_TOKENS = 10
"""A stream that was disturbed goes on once it has so many tokens more; fewer may have been under way already."""
WENT_ON_S = 45.0
POLL_S = 0.05

Word = PlanEvent | Leadership | Receipt


@dataclass(eq=False)
class Ear:
    """Hears the control plane: each word and when it came."""

    identity: Identity
    heard: list[tuple[float, Word]] = field(default_factory=list)
    audit: list[tuple[float, AuditEvent]] = field(default_factory=list)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self, connection: Nats) -> None:
        await connection.subscribe(subjects.ALL_PLANS, cb=self._plan)
        await connection.subscribe(subjects.LEADER, cb=self._leader)
        await connection.subscribe(subjects.ALL_RECEIPTS, cb=self._receipt)
        await connection.subscribe(subjects.ALL_AUDIT, cb=self._audited)
        await settle(connection)

    async def wait(self, wanted: Callable[[Word], bool], since: float, timeout_s: float) -> tuple[float, Word]:
        """The first word as wanted that came after `since`, and when; raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while True:
                self._more.clear()
                for at, word in self.heard:
                    if at >= since and wanted(word):
                        return at, word
                await self._more.wait()

    def commits(self, since: float) -> list[PlanEvent]:
        """The plans that came into force since then."""
        return [
            word
            for at, word in self.heard
            if at >= since and isinstance(word, PlanEvent) and word.phase is PlanPhase.COMMIT
        ]

    def audited(self, kind: AuditKind, since: float) -> tuple[str, ...]:
        """The nodes that audit events of a kind since then are about."""
        return tuple(str(event.fields.get("node")) for at, event in self.audit if at >= since and event.kind is kind)

    async def _plan(self, message: Msg) -> None:
        sealed, signer = open_envelope(message.data, SealedEvent, PLAN_TYPE, self.identity.orchestrators)
        self._keep(open_event(sealed, signer, self.identity))

    async def _leader(self, message: Msg) -> None:
        self._keep(open_envelope(message.data, Leadership, LEADER_TYPE, self.identity.orchestrators)[0])

    async def _receipt(self, message: Msg) -> None:
        self._keep(open_envelope(message.data, Receipt, RECEIPT_TYPE, self.identity.agents)[0])

    async def _audited(self, message: Msg) -> None:
        seen = Reader(trust_of(self.identity.roster)).read(message.data)
        self.audit.append((time.monotonic(), seen.event))

    def _keep(self, word: Word) -> None:
        self.heard.append((time.monotonic(), word))
        self._more.set()


@dataclass(eq=False)
class Scene:
    """What a fault is done to."""

    around: Surroundings
    connection: Nats
    """The operator's."""
    ear: Ear
    wire: Wire
    load: Load
    draw: random.Random
    index: int
    """Of this run among those of its fault."""

    @property
    def cluster(self) -> OwnedCluster:
        return self.around.cluster

    @property
    def wires(self) -> Wires:
        assert self.around.wired is not None, "only a fault that needs them asks for them"
        return self.around.wired

    @property
    def clocks(self) -> Clocks:
        assert self.around.clocks is not None, "only a fault that needs them asks for them"
        return self.around.clocks

    async def stages(self) -> tuple[Stage, ...]:
        """The chain in force, its ingress first."""
        found = await self._seen(lambda _, found: found.current is not None)
        assert found.current is not None
        return found.current.routes[0].stages

    async def spare(self) -> str:
        """A node that the plan in force does without."""
        used = {stage.node for stage in await self.stages()}
        return next(node for node in self.cluster.agents if node not in used)

    async def leader(self) -> str:
        status = await control.status_on(self.connection)
        assert status.leader is not None
        return status.leader.leader

    async def place(self, placement: tuple[Stage, ...] | None) -> DeploymentStatus:
        """Insist on a placement, or on two stages wherever the planner wants them, and wait until it serves."""
        return await control.deploy_and_wait(self.cluster.operator, request(placement), WHOLE_S)

    async def whole(self) -> None:
        """Wait until every process is there, serves as desired, and nothing is under way any more."""
        await self._seen(self._is_whole)

    async def went_on(self, affected: Sequence[Asked]) -> float:
        """Wait until each of these streams goes on or has ended; when that was. Gives up after a bounded time."""
        wanted = [(one, len(one.ids) + WENT_ON_TOKENS) for one in affected]
        try:
            async with asyncio.timeout(WENT_ON_S):
                while any(one.ended is None and len(one.ids) < count for one, count in wanted):  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
        except TimeoutError:
            pass  # what does not go on is found among the losses
        return time.monotonic()

    def _is_whole(self, status: StatusReply, found: DeploymentStatus) -> bool:
        current = found.current
        return (
            current is not None
            and found.state == "serving"
            and (found.candidate, found.draining) == (None, ())
            and set(current.nodes) <= set(found.applied)
            and {node.capacity.node for node in status.nodes if not node.lost and node.age_s < FRESH_S}
            >= set(self.cluster.agents)
            and len(status.standbys) == len(self.cluster.orchestrators) - 1
            and not status.drained
        )

    async def _seen(self, true: Callable[[StatusReply, DeploymentStatus], bool]) -> DeploymentStatus:
        status: StatusReply | None = None
        try:
            async with asyncio.timeout(WHOLE_S):
                while True:
                    with suppress(ResplitError):  # between two leaders there is none
                        status = await control.status_on(self.connection)
                        for found in status.deployments:
                            if found.name == DEPLOYMENT and true(status, found):
                                return found
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            raise TimeoutError(f"not as it is to be after {WHOLE_S:g} s; the status was {status}") from None


def request(placement: tuple[Stage, ...] | None) -> DeployRequest:
    """The deployment that all of this is about."""
    stages = 2 if placement is None else None
    return DeployRequest(name=DEPLOYMENT, model=DEPLOYMENT, settings=SETTINGS, stages=stages, placement=placement)
