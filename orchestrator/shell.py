"""The orchestrator as a process: connects, stands by, and leads whenever it holds the lease, until it is cancelled."""

import asyncio
import contextlib
import logging
import os
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js import JetStreamContext
from nats.js.kv import KeyValue

from bus.audit import AuditTrail
from bus.connection import MemberClient, connect
from bus.following import RosterInbox, offer_roster
from bus.identity import load_credentials, load_identity
from bus.stopping import end, first_of
from bus.streams import deployments_bucket, ensure_streams, keep_spread, leader_bucket, nodes_bucket
from bus.supervision import Supervised, Work
from models.store import Store
from orchestrator.core import Core, steady_clock
from orchestrator.fold import BusBack, BusLost, Report, RosterTaken, Snapshot
from orchestrator.inbox import Inbox, Rejections
from orchestrator.lease import LEASE_S, Lease
from orchestrator.measures import OrchestratorMeasures
from orchestrator.office import Surroundings, Term
from orchestrator.residency.memory import Keeping
from orchestrator.standby import Standby
from orchestrator.wishes import Desired
from profiler.exposition import exposed
from schemas import subjects
from schemas.base import NAME_PATTERN, NAME_RULE, NodeId
from schemas.control import StatusReply
from schemas.errors import ErrorCode, ResplitError

READY_RETRY_S = 0.5
"""A server that accepts connections may still be opening its streams."""
PATIENCE = 15
"""So many times as long as the event loop may a decision take: a quarter of an hour, with `WatchdogSec=60`."""
SHOWN_S = 5.0
"""Figures for Prometheus are as old as this at most."""
GOODBYE_S = 2.0
"""For the last audit events and the connection; a server that is gone must not hold up the end."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OrchestratorConfig:
    """What an orchestrator is told when it starts."""

    url: str
    keys: Path
    """The folder of the member that the orchestrators of its home are (`bus.identity`)."""
    store: Path
    """The store of imported models, whose files it serves to agents."""
    name: NodeId | None = None
    """What tells it from other orchestrators of the cluster; default: host and process id."""
    keeping: Keeping = "worth"
    """Which deployments on demand stay loaded."""
    metrics: str | None = None
    """host:port where Prometheus may read its figures."""


async def run(config: OrchestratorConfig, on_ready: Callable[[], object] = lambda: None) -> None:
    """Orchestrate until cancelled, by turns standing by and leading; `on_ready` is called each time that operators
    are answered from here.

    Raises `ResplitError` if the key folder or the name is unusable.
    """
    life = _Life(config.url)
    telling = asyncio.create_task(life.supervised.run())
    try:
        await _serve(config, on_ready, life)
    finally:
        await end([telling])


async def _serve(config: OrchestratorConfig, on_ready: Callable[[], object], life: "_Life") -> None:
    credentials = load_credentials(config.keys)
    if credentials.role != "orchestrator":
        message = f"{config.keys} is the folder of the {credentials.role} {credentials.name!r}; give an orchestrator's"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "keys")
    identity = load_identity(config.keys, credentials.name)
    name = config.name or default_name()
    if re.fullmatch(NAME_PATTERN, name) is None:
        message = f"{name!r} cannot name an orchestrator; {NAME_RULE}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "id")
    ears = _Ears()
    client = await connect(config.url, name, credentials=credentials, on_lost=ears.lost, on_back=ears.back)
    try:
        js, desired, leases = await _streams(client)
        now = steady_clock()
        audit = AuditTrail(js, identity, now, memory=identity.folder / f"{config.name or identity.name}.trail.end")
        await client.subscribe(subjects.ALL_AUDIT, cb=audit.heads.note)
        rejections = Rejections(audit)
        inbox = Inbox(identity, rejections, ears.hear)
        await inbox.hear_capacity(client)
        store = Store(config.store)
        here = Surroundings(
            name,
            client,
            js,
            desired,
            leases,
            identity,
            store,
            audit,
            rejections,
            inbox,
            now,
            heard_since=now(),
            keeping=config.keeping,
            work=life.work,
        )
        offering = asyncio.create_task(offer_roster(js, identity))
        rosters = RosterInbox(client, identity, audit, lambda: ears.hear(RosterTaken(identity.roster)))
        if identity.home is not None:
            await client.subscribe(subjects.ROSTER_OF_HUB, cb=rosters.arrived)
        following = asyncio.create_task(rosters.run())
        publishing = asyncio.create_task(audit.run())
        spreading = asyncio.create_task(keep_spread(client))
        measures = OrchestratorMeasures()
        showing = [asyncio.create_task(_show(measures, life, audit, client))] if config.metrics is not None else []
        try:
            with exposed(config.metrics, measures.registry):
                await first_of(_by_turns(here, ears, on_ready, life))
        finally:
            await audit.drain(GOODBYE_S)
            await end([offering, following, publishing, spreading, *showing])
    finally:
        with contextlib.suppress(NatsError, TimeoutError, OSError):
            await asyncio.wait_for(client.close(), GOODBYE_S)


async def _show(measures: OrchestratorMeasures, life: "_Life", audit: AuditTrail, client: MemberClient) -> None:
    while True:
        measures.told(life.seen(), audit.counts, client.troubles)
        await asyncio.sleep(SHOWN_S)


def default_name() -> NodeId:
    """This process, in letters that may stand in a subject: host and process id."""
    host = re.sub(r"[^a-z0-9_-]+", "-", socket.gethostname().lower()).strip("-_")
    return NodeId(f"{host[:48] or 'host'}-{os.getpid()}")


class _Ears:
    """What is heard, for whoever listens now: the standby or the leader's core."""

    listener: Standby | Core | None = None

    def hear(self, report: Report) -> None:
        if self.listener is not None:
            self.listener.report(report)

    def listened_to_by(self, listener: Standby | Core) -> None:
        self.listener = listener

    async def lost(self) -> None:
        self.hear(BusLost())

    async def back(self) -> None:
        self.hear(BusBack())


class _Life:
    """An orchestrator as the service manager sees it, from before it has connected.

    It is alive while its loop turns and the threads in which it decides come back. What they do is bounded by states
    and by a minute for each integer programme, of which a pipeline that fits nowhere takes several to say why. A leader
    that is slow harms nobody, since what serves goes on; so only one that decides nothing for very long is hung.
    """

    def __init__(self, url: str) -> None:
        self.work = Work()
        self._status: Callable[[], str] = lambda: f"waits for the NATS server at {url}"
        self.seen: Callable[[], StatusReply | None] = lambda: None
        self.supervised = Supervised(self._trouble, lambda: self._status())  # noqa: PLW0108 - another one later

    def serves(self, status: Callable[[], str], seen: Callable[[], StatusReply | None] = lambda: None) -> None:
        """It stands by, or leads, and then operators are told what is `seen`."""
        self._status, self.seen = status, seen
        self.supervised.ready()

    def _trouble(self, watchdog_s: float) -> str | None:
        longest_s = self.work.longest_s()
        return None if longest_s < PATIENCE * watchdog_s else f"a decision has taken {longest_s:.0f} s so far"


async def _by_turns(here: Surroundings, ears: _Ears, on_ready: Callable[[], object], life: _Life) -> None:
    """Stand by until the lease is free, lead until it is lost, and again."""
    lease = Lease(here.leases, here.name)
    snapshot = Snapshot(term=0, roster=here.identity.roster)
    while True:
        standby = Standby(here.client, here.name, snapshot, here.now)
        ears.listened_to_by(standby)
        here.rejections.silent = True
        log.info("%s stands by", here.name)
        life.serves(lambda: "stands by")
        try:
            await first_of(lease.acquire(), standby.run())
            here.rejections.silent = False
            term = Term(here, lease, standby, ears.listened_to_by)
            life.serves(term.status, term.seen)
            await term.serve(on_ready)
            snapshot = term.snapshot
        finally:
            await lease.release()


async def _streams(client: Client) -> tuple[JetStreamContext, Desired, KeyValue]:
    """The streams and the buckets, as soon as the server has opened them."""
    said = False
    while True:
        try:
            js = await ensure_streams(client)
            desired = Desired(js, await deployments_bucket(js), await nodes_bucket(js))
            return js, desired, await leader_bucket(js, LEASE_S)
        except (NatsError, TimeoutError, OSError) as error:
            if not said:
                log.warning("JetStream does not answer yet; trying until it does: %r", error)
                said = True
        await asyncio.sleep(READY_RETRY_S)
