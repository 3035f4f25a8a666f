"""Beacons as they come, verified, or rejected and audited; what `agent.guidance` makes of them, looked for and said."""

import asyncio
import logging
import time
from collections.abc import Callable

from nats.aio.client import Client
from nats.aio.msg import Msg

from agent import guidance as core
from bus.audit import AuditTrail
from bus.identity import Identity
from bus.refusals import Refusals
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import Home, called
from schemas.beacon import Beacon
from schemas.capacity import Guidance
from schemas.envelope import BEACON_TYPE, open_envelope
from schemas.errors import ResplitError
from schemas.known import PlanSeen

REFUSED_MAX = 100
"""Beacons come every few seconds: a leader that nobody believes must not fill the trail."""

log = logging.getLogger(__name__)


class BeaconInbox:
    """Hears the leader's beacons, and notices what they name and this node does not get, and when they end."""

    def __init__(
        self,
        client: Client,
        identity: Identity,
        audit: AuditTrail,
        look_for_plans: Callable[[], None],
        look_for_roster: Callable[[], None],
        on_change: Callable[[], object],
        home: Home = None,
    ) -> None:
        """`on_change` hears that `guidance` is another; `home`: whose leader's beacons they are."""
        self._home = home
        self._client = client
        self._identity = identity
        self._audit = audit
        self._look_for_plans = look_for_plans
        self._look_for_roster = look_for_roster
        self._on_change = on_change
        self._refusals = Refusals(audit, "a beacon was rejected and nothing was changed", REFUSED_MAX)
        self._state = core.State(time.monotonic(), home)

    @property
    def guidance(self) -> Guidance | None:
        """What keeps this node from knowing that it follows the newest."""
        return self._state.guidance

    async def run(self) -> None:
        """Listen until cancelled."""
        await self._client.subscribe(subjects.at_edge(self._home, subjects.BEACON), cb=self._arrived)
        while True:
            await asyncio.sleep(core.TICK_S)
            known, connected = self._identity.known, self._client.is_connected
            self._perform(*core.ticked(self._state, known, connected=connected, now=time.monotonic()))

    async def _arrived(self, msg: Msg) -> None:
        try:
            beacon, _ = open_envelope(msg.data, Beacon, BEACON_TYPE, self._identity.steering(self._home))
            await self._identity.take_beacon(beacon, self._home)
        except ResplitError as error:
            self._refusals.record(msg, error)
            return
        self._perform(*core.heard(self._state, beacon, self._identity.known))

    def _perform(self, state: core.State, steps: core.Steps) -> None:
        before, self._state = self._state, state
        for step in steps:
            self._act(step)
        if _shown(before) != _shown(state):
            self._on_change()

    def _act(self, step: core.Step) -> None:
        match step:
            case core.Look(None):
                self._look_for_roster()
            case core.Look():
                self._look_for_plans()
            case core.Unguided(silent_s):
                here = called(self._home)
                log.warning("no beacon of a leader at %s for %.0f s; serving on by the plans here", here, silent_s)
                self._audit.record(
                    AuditKind.NODE_UNGUIDED,
                    "no beacon of a leader comes: none leads, or beacons are kept from here; this node serves on",
                    silent_s=round(silent_s, 1),
                    home=self._home,
                )
            case core.Guided(silent_s):
                log.warning("beacons of a leader at %s come again, after %.0f s", called(self._home), silent_s)
                told = "beacons of a leader come again"
                self._audit.record(AuditKind.NODE_GUIDED, told, silent_s=round(silent_s, 1), home=self._home)
            case core.Withheld():
                self._say_withheld(step)

    def _say_withheld(self, step: core.Withheld) -> None:
        named, waited_s = step.named, round(step.waited_s, 1)
        if isinstance(named, PlanSeen):
            log.warning("the newest plan event of %s is not to be had here", step.thing)
            self._audit.record(
                AuditKind.EVENT_WITHHELD,
                "a beacon names a plan event that did not reach this node, or was refused here",
                deployment=step.thing,
                term=named.term,
                revision=named.revision,
                digest=named.digest,
                waited_s=waited_s,
            )
        else:
            log.warning("the newest roster, of version %d, is not to be had here", named.version)
            self._audit.record(
                AuditKind.EVENT_WITHHELD,
                "a beacon names a roster that did not reach this node, or was refused here",
                version=named.version,
                digest=named.digest,
                waited_s=waited_s,
            )


def _shown(state: core.State) -> object:
    """What a heartbeat would say, but for how long."""
    said = state.guidance
    return None if said is None else (said.silent_s is None, said.withheld, said.withheld_roster)
