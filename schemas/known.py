"""PURE: what a process remembers of the signed documents it took, and which ones it takes next.

Signatures do not say which of two signed documents is the newer one. So every process remembers what it saw (`Known`)
and takes nothing that goes back (rollback), runs far ahead (fast-forward), has expired (freeze), or belongs to another
cluster or root (mix-and-match). The functions `after_...` decide, and leave the value they are given as it was;
`bus.remembered` keeps their result on the disk before anybody acts upon it.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta

from pydantic import Field

from schemas.base import DeploymentId, DeploymentName, Digest, Home, Sha256, SiteName, Value, home_of
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import (
    DEPLOYMENTS_MAX,
    ROOT_TYPE,
    PublicKey,
    RootKeys,
    Roster,
    check_cluster,
    open_roster,
    presented,
)
from schemas.signed import claimed, open_signed

JUMP_MAX = 1000
"""How far one document may be ahead of the one before it, in versions or terms. Whoever stole a key could
else sign the largest number there is, and nothing honest would ever come after it. A thousand is more than a node
misses that was away for a week: rosters change when people do, plans a few times an hour."""
CLOCK_BEHIND_MAX = timedelta(hours=1)
"""How far in the future a document may have been issued. A node whose clock is slow must still hear of a revocation;
what a clock that is fast would get wrong is expiry, and there nothing is forgiven."""


class RosterSeen(Value):
    """The newest roster that a process took."""

    version: int = Field(ge=1)
    digest: Sha256


class PlanSeen(Value):
    """The newest plan event of one deployment that a process took."""

    term: int = Field(ge=1)
    revision: int = Field(ge=1)
    digest: Sha256
    """Of the signed bytes."""


class BeaconSeen(Value):
    """The newest beacon of a leader that a process took."""

    term: int = Field(ge=1)
    number: int = Field(ge=1)


class Steering(Value):
    """What a process took of those who steer the deployments of one home."""

    orchestrators: tuple[PublicKey, ...] = ()
    """Their signing keys, ascending: those of the newest roster that names any."""
    beacon: BeaconSeen | None = None
    """Of `orchestrators`."""


class Known(Value):
    """What a process remembers, also over a restart, so that nothing it took can be taken back."""

    root: RootKeys
    """Whole, since the next version is verified with its keys."""
    roster: RosterSeen | None = None
    """None until one signed under this version of the root was taken."""
    orchestrators: tuple[PublicKey, ...] = ()
    """Of the hub, as `Steering` says it."""
    plans: dict[DeploymentId, PlanSeen] = Field(default_factory=dict, max_length=DEPLOYMENTS_MAX)
    """Each can be of the orchestrators of its deployment's home."""
    beacon: BeaconSeen | None = None
    """Of the hub as well."""
    sites: dict[SiteName, Steering] | None = None
    """None where no roster named any, and in what earlier releases wrote."""

    def steering(self, home: Home) -> Steering:
        """What was taken of those who steer at `home`."""
        if home is None:
            return Steering(orchestrators=self.orchestrators, beacon=self.beacon)
        return (self.sites or {}).get(home, Steering())

    def steered(self, home: Home, by: Steering) -> "Known":
        """The same, but that `by` is what was taken of those who steer at `home`."""
        if home is None:
            return self.model_copy(update={"orchestrators": by.orchestrators, "beacon": by.beacon})
        return self.model_copy(update={"sites": {**(self.sites or {}), home: by}})


def first_known(data: bytes) -> Known:
    """What a process knows that is told the first version of the root, by a person who carries it there.

    It must be signed by a threshold of the keys it names, which shows that it is whole, and not that it is the right
    one: raises `ResplitError(BAD_SIGNATURE)` where it is not.
    """
    # Which keys are to verify it is in the document itself, so this once bytes are read that nobody vouches for yet.
    named = claimed(data, RootKeys, ROOT_TYPE)
    return Known(root=open_signed(data, RootKeys, ROOT_TYPE, named.public_keys, named.threshold))


def after_roster(known: Known, data: bytes, now: datetime) -> Known:
    """`known` after a roster, which must be newer than the one seen last, or that one, and the root that leads to it.

    What was seen of rosters ends with the root that signed them: none of them is valid under a new one, so none can
    come back, and numbers that a stolen root key drove up are forgotten with the key.

    Where other orchestrators have taken the place of all those of a home, what was seen of its plans and beacons is
    forgotten: nobody can sign them again, and numbers that a stolen orchestrator's key drove up are forgotten with the
    key. So a signing key that left the roster must never come back to it; `bus.enrolment` makes a new one each time.

    Raises `ResplitError`: what `root_of` raises, BAD_SIGNATURE without a threshold of the root's keys, ROLLED_BACK for
    a lower version or another document of this one, EXPIRED where it or the root is so at `now`, and INVALID_REQUEST
    for one of another cluster or another version of the root, more than `JUMP_MAX` versions ahead, or not valid yet.
    """
    root = root_of(known.root, data)
    roster = open_roster(root, data)
    seen = known.roster if root == known.root else None
    if seen is not None:
        check_follows("the roster's version", "version", seen.version, roster.version)
        if roster.version == seen.version and roster.digest != seen.digest:
            raise _another("roster", f"version {roster.version}", seen.digest, roster.digest)
    _check_time("root", root, now)
    _check_time("roster", roster, now)
    seen_now = RosterSeen(version=roster.version, digest=roster.digest)
    known = known.model_copy(update={"root": root, "roster": seen_now})
    for home in roster.homes:
        known = _steered_by(known, home, roster)
    return known


def _steered_by(known: Known, home: Home, roster: Roster) -> Known:
    """`known`, where those whom `roster` names steer at `home`."""
    before = known.steering(home)
    keys = tuple(sorted(one.signing for one in roster.members if one.role == "orchestrator" and one.home == home))
    if not keys or keys == before.orchestrators:
        return known
    if not before.orchestrators or set(keys) & set(before.orchestrators):
        return known.steered(home, before.model_copy(update={"orchestrators": keys}))
    plans = {name: plan for name, plan in known.plans.items() if home_of(name) != home}
    return known.model_copy(update={"plans": plans}).steered(home, Steering(orchestrators=keys))


def held(known: Known, data: bytes) -> tuple[Known, Roster]:
    """`known` after the roster that a process finds in its own folder, and that roster. It may have expired since, and
    be the newest there is all the same. Errors are those of `after_roster`."""
    roster = open_roster(root_of(known.root, data), data)
    return after_roster(known, data, roster.issued_at), roster


def after_plan(known: Known, deployment: DeploymentName, term: int, revision: int, event: Digest) -> Known:
    """`known` after a plan event (its digest) that the leader of `term` signed as `revision` of `deployment`.

    (`term`, `revision`) does not fall, and stands for one event. An event is the whole state, so whoever missed some
    has lost nothing; a revision may be far ahead, and what a stolen key drove up ends with the next term.

    Raises `ResplitError`: ROLLED_BACK otherwise, and INVALID_REQUEST where the term is more than `JUMP_MAX` ahead, or
    where too many deployments would have to be remembered.
    """
    seen = known.plans.get(deployment)
    if seen is None:
        if len(known.plans) >= DEPLOYMENTS_MAX:
            message = (
                f"{deployment!r} would be deployment {DEPLOYMENTS_MAX + 1} to be remembered; give the orchestrators "
                "new keys (`resplit rotate`), and what was remembered under the old ones is forgotten"
            )
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "deployment")
    else:
        check_follows(f"the term of {deployment!r}", "term", seen.term, term)
        if term == seen.term and revision < seen.revision:
            raise fell(f"the revision of {deployment!r} in term {term}", "revision", seen.revision, revision)
        if (term, revision) == (seen.term, seen.revision) and event != seen.digest:
            raise _another("event", f"revision {revision} of {deployment!r}", seen.digest, event)
    now_seen = PlanSeen(term=term, revision=revision, digest=event)
    return known.model_copy(update={"plans": {**known.plans, deployment: now_seen}})


def root_of(root: RootKeys, data: bytes) -> RootKeys:
    """The root under which the roster in `data` is to be signed, as whoever knows `root` is led to it; `root` itself
    where there has been none since. Whenever they were or will be valid: who was away passes through expired ones.

    Raises `ResplitError`: BAD_SIGNATURE for a version without a threshold of the keys before it and of its own,
    ROLLED_BACK for a lower one or another document of the known one, and INVALID_REQUEST for another cluster's and one
    that skips a version.
    """
    roots, _ = presented(data)
    seen = max(0, root.version - 2)  # of those in front; the known one is compared, since two of one version are a fork
    _check_past(root, roots[:seen])
    for version, document in enumerate(roots[seen:], seen + 2):
        root = _next_root(root, document)
        if root.version != version:
            message = f"version {root.version} of the root stands where version {version} belongs"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "version")
    return root


def _check_past(root: RootKeys, roots: Sequence[bytes]) -> None:
    """That `roots`, which nobody needs who knows `root`, led to it: others would lead nobody else anywhere."""
    for document in reversed(roots):
        before = claimed(document, RootKeys, ROOT_TYPE)
        if before.digest != root.previous:
            message = (
                f"the root in front as version {root.version - 1} is not the one that version {root.version} names"
            )
            raise ResplitError(ErrorCode.BAD_SIGNATURE, message)
        root = before


def _next_root(before: RootKeys, data: bytes) -> RootKeys:
    """The version after `before`, or `before` itself."""
    root = open_signed(data, RootKeys, ROOT_TYPE, before.public_keys, before.threshold)
    root = open_signed(data, RootKeys, ROOT_TYPE, root.public_keys, root.threshold)
    check_cluster("root", before.cluster, root.cluster)
    if root.version < before.version:
        raise fell("the root's version", "version", before.version, root.version)
    if root.version == before.version and root != before:
        raise _another("root", f"version {root.version}", before.digest, root.digest)
    if root.version == before.version + 1 and root.previous != before.digest:
        message = f"version {root.version} of the root was made for another version {before.version} than is known"
        raise ResplitError(ErrorCode.ROLLED_BACK, message, "previous")
    if root.version > before.version + 1:
        message = (
            f"the root's version is {root.version} and {before.version} is known; "
            f"fetch version {before.version + 1} first, each is signed under the one before"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "version")
    return root


def check_follows(what: str, field: str, seen: int, found: int) -> None:
    """That a number neither falls nor runs far ahead; raises `ResplitError`: ROLLED_BACK, or as `check_near` does."""
    if found < seen:
        raise fell(what, field, seen, found)
    check_near(what, field, seen, found)


def check_near(what: str, field: str, seen: int, found: int) -> None:
    """That a number is not far ahead; raises `ResplitError(INVALID_REQUEST)`."""
    if found > seen + JUMP_MAX:
        message = (
            f"{what} is {found}, more than {JUMP_MAX} ahead of {seen}, which was seen last; either a key is in wrong "
            "hands, or this process was away too long: then delete what it remembers and join again"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, field)


def _check_time(what: str, document: RootKeys | Roster, now: datetime) -> None:
    if document.issued_at > now + CLOCK_BEHIND_MAX:
        message = f"the {what} is issued at {document.issued_at}, and by the clock here it is {now}; set the clock"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "issued_at")
    if now >= document.expires_at:
        message = (
            f"the {what} of version {document.version} expired at {document.expires_at}, and by the clock here it is "
            f"{now}; its holders must sign a new one, or somebody keeps it from this process"
        )
        raise ResplitError(ErrorCode.EXPIRED, message, "expires_at")


def fell(what: str, field: str, seen: int, found: int) -> ResplitError:
    """The error for a number that is lower than one that was seen, or that must grow and did not."""
    message = f"{what} is {found} and {seen} was seen already; an old one is being shown again"
    return ResplitError(ErrorCode.ROLLED_BACK, message, field)


def _another(what: str, which: str, seen: Digest, found: Digest) -> ResplitError:
    message = f"another {what} ({found[:12]}) was seen as {which} already ({seen[:12]}); one of the two is forged"
    return ResplitError(ErrorCode.ROLLED_BACK, message, "digest")
