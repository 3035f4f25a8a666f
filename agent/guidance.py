"""PURE: what an agent makes of the leader's beacons: what it misses, what is withheld from it, whether it is guided.

(state, beacon or tick, what is known) -> (state, steps). What a beacon names and the node does not have is looked for
in the log, and if it has not come after a grace it is called withheld. A node to which no beacon comes is *unguided*:
it serves on, since an orchestrator that is away is no attack, and says so.

Silence and waiting are counted in ticks of a process that is awake and connected: one that was itself stopped, or cut
off from its server, blames nobody for what it could not hear.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

from schemas.base import DeploymentName, Home
from schemas.beacon import Beacon
from schemas.capacity import Guidance
from schemas.known import Known, PlanSeen, RosterSeen

TICK_S = 0.5
TICK_MAX_S = 2.0
"""A tick that took longer counts for this much: the process was not awake."""
LOOK_AFTER_S = 0.5
"""What overtook nothing is there by then: most of what a beacon names first is just being taken."""
GRACE_S = 10.0
"""Long enough to read the whole log once on a slow machine."""
UNGUIDED_AFTER_S = 15.0
"""Seven beacons; an orchestrator that takes over needs five seconds."""

Thing = DeploymentName | None
"""What a beacon names the newest of: a deployment, or the roster (None)."""
Named = PlanSeen | RosterSeen


@dataclass(frozen=True)
class Missing:
    """Something that a beacon named and that is not here."""

    named: Named
    waited_s: float = 0.0
    looked: bool = False
    told: Named | None = None
    """What was called withheld last, of the same thing, while nothing newer came."""


@dataclass(frozen=True)
class State:
    """Between two beacons or ticks."""

    at: float
    """The last tick."""
    home: Home = None
    """Whose leader's beacons they are."""
    silent_s: float = 0.0
    is_unguided: bool = False
    beacon: Beacon | None = None
    """The last one taken."""
    missing: Mapping[Thing, Missing] = field(default_factory=dict)

    @property
    def guidance(self) -> Guidance | None:
        """The same as heartbeats say it."""
        withheld = {thing: one.told for thing, one in self.missing.items() if one.told is not None}
        if not self.is_unguided and not withheld:
            return None
        roster = withheld.get(None)
        return Guidance(
            silent_s=round(self.silent_s, 1) if self.is_unguided else None,
            withheld=tuple(sorted(thing for thing in withheld if thing is not None)[:1024]),
            withheld_roster=roster.version if isinstance(roster, RosterSeen) else None,
        )


@dataclass(frozen=True)
class Look:
    """Look in the log for what is missing of this."""

    thing: Thing


@dataclass(frozen=True)
class Withheld:
    """A beacon named this, and it has not come."""

    thing: Thing
    named: Named
    waited_s: float


@dataclass(frozen=True)
class Unguided:
    """No beacon has come for too long."""

    silent_s: float


@dataclass(frozen=True)
class Guided:
    """A beacon came after all."""

    silent_s: float


Step = Look | Withheld | Unguided | Guided
Steps = tuple[Step, ...]


def heard(state: State, beacon: Beacon, known: Known) -> tuple[State, Steps]:
    """After a beacon that counts (`schemas.beacon.after_beacon`)."""
    steps = (Guided(state.silent_s),) if state.is_unguided else ()
    missing = _missing(state.missing, beacon, known)
    return replace(state, silent_s=0.0, is_unguided=False, beacon=beacon, missing=missing), steps


def ticked(state: State, known: Known, *, connected: bool, now: float) -> tuple[State, Steps]:
    """After some time, with what is `known` by now."""
    awake_s = min(now - state.at, TICK_MAX_S) if connected else 0.0
    # Where others are the orchestrators now, what those before them said is void: no event of theirs will come.
    beacon = None if known.steering(state.home).beacon is None else state.beacon
    missing = {} if beacon is None else _missing(state.missing, beacon, known)
    waited = {thing: replace(one, waited_s=one.waited_s + awake_s) for thing, one in missing.items()}
    state = replace(state, at=now, silent_s=state.silent_s + awake_s, missing=waited)
    # Who is cut off cannot look, and would tell nobody.
    steps = tuple(_due(state)) if connected else ()
    for step in steps:
        state = _performed(state, step)
    return state, steps


def _due(state: State) -> Iterator[Step]:
    if not state.is_unguided and state.silent_s >= UNGUIDED_AFTER_S:
        yield Unguided(state.silent_s)
    for thing, one in state.missing.items():
        if not one.looked and one.waited_s >= LOOK_AFTER_S:
            yield Look(thing)
        if one.told != one.named and one.waited_s >= GRACE_S:
            yield Withheld(thing, one.named, one.waited_s)


def _performed(state: State, step: Step) -> State:
    """The state in which `step` is not due any more."""
    match step:
        case Unguided():
            return replace(state, is_unguided=True)
        case Look(thing):
            one = replace(state.missing[thing], looked=True)
        case Withheld(thing, named):
            one = replace(state.missing[thing], told=named)
        case Guided():
            raise AssertionError("only a beacon guides")
    return replace(state, missing={**state.missing, thing: one})


def _missing(before: Mapping[Thing, Missing], beacon: Beacon, known: Known) -> dict[Thing, Missing]:
    named: list[tuple[Thing, Named]] = [(None, beacon.roster), *beacon.plans.items()]
    return {thing: _still(before.get(thing), one) for thing, one in named if not _has(known, thing, one)}


def _still(before: Missing | None, named: Named) -> Missing:
    if before is None:
        return Missing(named)
    if before.named == named:
        return before
    # What is named anew while its predecessor never came gets no new grace, or ever newer events would put off the word
    # for good. Once that was said, each later event gets its own: it may come.
    waited_s = before.waited_s if before.told is None else 0.0
    return Missing(named, waited_s, told=before.told)


def _has(known: Known, thing: Thing, named: Named) -> bool:
    if isinstance(named, RosterSeen):
        return known.roster is not None and (known.roster == named or known.roster.version > named.version)
    assert thing is not None
    seen = known.plans.get(thing)
    return seen is not None and (seen == named or (seen.term, seen.revision) > (named.term, named.revision))
