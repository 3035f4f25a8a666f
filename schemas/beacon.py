"""PURE: the leader's beacon: what is newest now, said again every few seconds, and what a process takes of it.

A signature says that a document is genuine and not that it is the newest. Whoever owns the bus can keep newer ones from
a process, which then goes on with what it has and notices nothing: a freeze. A beacon names what there is, so that what
is withheld is missed, and where the beacons themselves are withheld their absence tells.

(`term`, `number`) only grows, so that a beacon cannot be shown twice. Nobody compares clocks: how old a beacon is that
comes for the first time, it does not say.
"""

from typing import Self

from pydantic import AwareDatetime, Field, model_validator

from schemas.base import DeploymentId, Home, Value, called, home_of
from schemas.errors import ErrorCode, ResplitError
from schemas.known import BeaconSeen, Known, PlanSeen, RosterSeen, check_follows, check_near, fell

BEACON_EVERY_S = 2.0
PLANS_MAX = 4096
"""Deployments that one beacon names: with names and numbers of any length it stays below the limit of an envelope."""


class Beacon(Value):
    """What the leader knows as the newest at one moment."""

    term: int = Field(ge=1)
    number: int = Field(ge=1, lt=1 << 53)
    """Grows with each one of a term."""
    issued_at: AwareDatetime
    """For people."""
    roster: RosterSeen
    plans: dict[DeploymentId, PlanSeen] = Field(default_factory=dict, max_length=PLANS_MAX)
    """The newest event of each deployment in the log of plans of the leader's home."""

    @model_validator(mode="after")
    def _names_nothing_of_a_later_term(self) -> Self:
        for name, plan in self.plans.items():
            if plan.term > self.term:
                raise ValueError(f"{name!r} of term {plan.term} in a beacon of term {self.term}")
        return self


def after_beacon(known: Known, beacon: Beacon, home: Home = None) -> Known:
    """`known` after a beacon of a leader at `home`, which must be newer than the one seen last of that home, and of no
    earlier term than any of its plans that was seen.

    Raises `ResplitError`: ROLLED_BACK otherwise, FORBIDDEN where it names another home's deployment, and
    INVALID_REQUEST where its term or the roster that it names is more than `JUMP_MAX` ahead. A number may be far ahead:
    what a stolen key drove up ends with the next term.
    """
    strange = next((name for name in beacon.plans if home_of(name) != home), None)
    if strange is not None:
        message = f"a beacon of {called(home)} names {strange!r}, which is at home at {called(home_of(strange))}"
        raise ResplitError(ErrorCode.FORBIDDEN, message, "plans")
    terms = [plan.term for name, plan in known.plans.items() if home_of(name) == home]
    before = known.steering(home)
    seen = before.beacon
    if seen is not None:
        terms.append(seen.term)
    if terms:
        check_follows("the beacon's term", "term", max(terms), beacon.term)
    if seen is not None and beacon.term == seen.term and beacon.number <= seen.number:
        raise fell(f"the number of a beacon of term {beacon.term}", "number", seen.number, beacon.number)
    if known.roster is not None:
        check_near(
            "the version of the roster that a beacon names", "roster", known.roster.version, beacon.roster.version
        )
    newest = BeaconSeen(term=beacon.term, number=beacon.number)
    return known.steered(home, before.model_copy(update={"beacon": newest}))
