"""PURE: who belongs to a cluster, as its offline root signs it, and what a process remembers of that.

The model is TUF's, cut down to two documents. `RootKeys` says who may sign; a new version takes a threshold of the
keys before it and of its own. `Roster` says who belongs to the cluster, and what its nodes must not hold whatever
an orchestrator says. Whoever is not in the newest roster is revoked: there is no other list.

Signatures do not say which of two signed documents is the newer one, so every process remembers what it saw
(`Known`) and takes nothing that goes back. The functions `after_...` decide; `bus.remembered` keeps their result on
the disk before anybody acts upon it.
"""

import base64
from collections import Counter
from collections.abc import Iterable
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Annotated, Literal, NewType, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from pydantic import AwareDatetime, BaseModel, Field, StringConstraints, model_validator

from schemas.base import NAME_PATTERN, DeploymentId, DeploymentName, Digest, NodeId, NodeName, Sha256, Value
from schemas.codec import encode
from schemas.deployment import Sensitive, sensitive_blocks
from schemas.errors import ErrorCode, ResplitError
from schemas.signed import SIGNATURES_MAX, KeyId, claimed, key_id, open_signed

ROOT_TYPE = "application/vnd.resplit.root.v1+json"
ROSTER_TYPE = "application/vnd.resplit.roster.v1+json"

JUMP_MAX = 1000
"""How far one document may be ahead of the one before it, in versions, terms or epochs. Whoever stole a key could
else sign the largest number there is, and nothing honest would ever come after it. A thousand is more than a node
misses that was away for months: rosters change when people do, plans a few times an hour."""
CLOCK_BEHIND_MAX = timedelta(hours=1)
"""How far in the future a document may have been issued. A node whose clock is slow must still hear of a revocation;
what a clock that is fast would get wrong is expiry, and there nothing is forgiven."""
MEMBERS_MAX = 1000
"""A roster of so many members still fits into one signed document."""
DEPLOYMENTS_MAX = 10_000
"""Deployments whose plans a process remembers, and that a policy names: what is kept on the disk is bounded."""
EVERY_DEPLOYMENT = "*"

ClusterId = NewType("ClusterId", str)
ClusterName = Annotated[ClusterId, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$")]
"""32 raw bytes in base64, in the one spelling that an encoder gives: keys are compared as text."""
BusKey = Annotated[str, StringConstraints(pattern=r"^U[A-Z2-7]{55}$")]
"""The public half of a user's NKey."""
Role = Literal["agent", "orchestrator", "client"]
TrustTier = Literal["trusted", "edge"]
"""What a roster says of an agent. (`Capacity.tier` is what the agent says of itself.)"""


class RootKeys(Value):
    """Who may sign rosters, and the next version of this document."""

    cluster: ClusterName
    version: int = Field(ge=1)
    keys: dict[KeyId, PublicKey] = Field(min_length=1, max_length=SIGNATURES_MAX)
    """Ed25519, by key id."""
    threshold: int = Field(ge=1)
    """How many of `keys` it takes."""
    issued_at: AwareDatetime
    expires_at: AwareDatetime

    @model_validator(mode="after")
    def _can_sign(self) -> Self:
        if self.threshold > len(self.keys):
            raise ValueError(f"{self.threshold} signatures cannot come from {len(self.keys)} keys")
        for name, key in self.public_keys.items():
            if key_id(key) != name:
                raise ValueError(f"key {name} is called {key_id(key)}")
        _check_order(self.issued_at, self.expires_at)
        return self

    @property
    def public_keys(self) -> dict[str, Ed25519PublicKey]:
        return {name: public_key(text) for name, text in self.keys.items()}

    @property
    def digest(self) -> Digest:
        return digest(self)


class Member(Value):
    """One process or person of a cluster: what it may be, and by which keys it is known."""

    name: NodeName
    role: Role
    tier: TrustTier | None = None
    """Of agents, whether they may hold what the policy keeps to trusted nodes; None for all others."""
    signing: PublicKey
    """Ed25519: capacity, receipts, audit events; of an orchestrator, plans."""
    sealing: PublicKey
    """X25519: what is encrypted to this member."""
    bus: BusKey
    """By which it logs in to NATS."""
    link: Sha256
    """SHA-256 of the SubjectPublicKeyInfo of its TLS certificate. An authority's word alone makes no peer."""
    not_before: AwareDatetime
    not_after: AwareDatetime

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        if (self.tier is None) == (self.role == "agent"):
            raise ValueError(f"{self.name}: agents have a tier, and nobody else has")
        _check_order(self.not_before, self.not_after)
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """All that nobody else may have."""
        return (self.signing, self.sealing, self.bus, self.link)

    def is_current(self, now: datetime) -> bool:
        return self.not_before <= now < self.not_after


class Policy(Value):
    """What no orchestrator can override."""

    sensitive: dict[Annotated[str, StringConstraints(pattern=rf"^\*$|{NAME_PATTERN}")], Sensitive] = Field(
        default_factory=dict, max_length=DEPLOYMENTS_MAX
    )
    """Blocks that only trusted nodes may hold, by deployment; `*` holds for every deployment, named or not."""

    def sensitive_of(self, deployment: DeploymentName, block_count: int) -> frozenset[int]:
        """The blocks of `deployment` that only trusted nodes may hold."""
        said = (self.sensitive.get(name) for name in (EVERY_DEPLOYMENT, deployment))
        return frozenset[int]().union(*(sensitive_blocks(blocks, block_count) for blocks in said))


class Roster(Value):
    """Everyone who belongs to a cluster."""

    cluster: ClusterName
    root_version: int = Field(ge=1)
    """The version of the root whose keys signed it. A roster of an earlier root is void."""
    version: int = Field(ge=1)
    issued_at: AwareDatetime
    expires_at: AwareDatetime
    """Until then it may be the newest. Who is shown nothing newer after that is being kept from it."""
    authority: Sha256
    """SHA-256 of the SubjectPublicKeyInfo of the certificate authority that issues the members' TLS certificates."""
    members: tuple[Member, ...] = Field(default=(), max_length=MEMBERS_MAX)
    policy: Policy = Policy()

    @model_validator(mode="after")
    def _members_differ(self) -> Self:
        names = [member.name for member in self.members]
        if doubled := _doubled(names):
            raise ValueError(f"two members are called {doubled!r}")
        for kind in ("signing", "sealing", "bus", "link"):
            if doubled := _doubled([str(getattr(member, kind)) for member in self.members]):
                raise ValueError(f"two members have the {kind} key {doubled}")
        _check_order(self.issued_at, self.expires_at)
        return self

    @property
    def digest(self) -> Digest:
        return digest(self)

    def member(self, name: NodeId) -> Member | None:
        """Who is called `name`; None where nobody is, or not any more."""
        return next((member for member in self.members if member.name == name), None)


class RosterSeen(Value):
    """The newest roster that a process took."""

    version: int = Field(ge=1)
    digest: Sha256


class PlanSeen(Value):
    """The newest plan of one deployment that a process took."""

    term: int = Field(ge=1)
    epoch: int = Field(ge=1)
    digest: Sha256


class Known(Value):
    """What a process remembers, also over a restart, so that nothing it took can be taken back."""

    root: RootKeys
    """Whole, since the next version is verified with its keys."""
    roster: RosterSeen | None = None
    """None until one signed under this version of the root was taken."""
    orchestrators: tuple[PublicKey, ...] = ()
    """The signing keys that the plans below can be of, ascending: those of the newest roster that names any."""
    plans: dict[DeploymentId, PlanSeen] = Field(default_factory=dict, max_length=DEPLOYMENTS_MAX)


def first_known(chain: Iterable[bytes], now: datetime) -> Known:
    """What a process knows that is told its first versions of the root, by a person who carries them there.

    The first must be signed by a threshold of the keys it names, which shows that it is whole, and not that it is the
    right one; each other under the one before. Only the last needs to be valid at `now`. Errors are those of
    `after_root`.
    """
    root = open_roots(chain)
    _check_time("root", root, now)
    return Known(root=root)


def after_root(known: Known, data: bytes, now: datetime) -> Known:
    """`known` after another version of the root, which must be the next one, or the one that is known.

    What was seen of rosters ends with the root that signed them: none of them is valid under the new one, so none can
    come back, and numbers that a stolen root key drove up are forgotten with the key.

    Raises `ResplitError`: BAD_SIGNATURE without a threshold of the known and of the new keys, ROLLED_BACK for a lower
    version or another document of this one, EXPIRED at `now`, and INVALID_REQUEST for another cluster's, one that
    skips a version, or one that is not valid yet.
    """
    return after_roots(known, (data,), now)


def after_roots(known: Known, chain: Iterable[bytes], now: datetime) -> Known:
    """`known` after several versions of the root, one upon the other; only the last needs to be valid at `now`.

    A process that was away finds versions expired that it must pass through. Errors are those of `after_root`.
    """
    found = known.root
    for data in chain:
        found = _next_root(found, data)
    _check_time("root", found, now)
    return known if found == known.root else known.model_copy(update={"root": found, "roster": None})


def after_roster(known: Known, data: bytes, now: datetime) -> Known:
    """`known` after a roster, which must be newer than the one seen last, or that one.

    Where other orchestrators have taken the place of all those before, what was seen of plans is forgotten: nobody can
    sign them again, and numbers that a stolen orchestrator's key drove up are forgotten with the key. So a signing key
    that left the roster must never come back to it; `bus.enrolment` makes a new one each time.

    Raises `ResplitError`: BAD_SIGNATURE without a threshold of the root's keys, ROLLED_BACK for a lower version or
    another document of this one, EXPIRED where it or the root is so at `now`, and INVALID_REQUEST for one of another
    cluster or another version of the root, more than `JUMP_MAX` versions ahead, or not valid yet.
    """
    roster = open_roster(known.root, data)
    seen = known.roster
    if seen is not None:
        _check_follows("the roster's version", "version", seen.version, roster.version)
        if roster.version == seen.version and roster.digest != seen.digest:
            raise _another("roster", f"version {roster.version}", seen.digest, roster.digest)
    _check_time("root", known.root, now)
    _check_time("roster", roster, now)
    keys = tuple(sorted(member.signing for member in roster.members if member.role == "orchestrator"))
    replaced = bool(keys and known.orchestrators) and not set(keys) & set(known.orchestrators)
    return known.model_copy(
        update={
            "roster": RosterSeen(version=roster.version, digest=roster.digest),
            "orchestrators": keys or known.orchestrators,
            "plans": {} if replaced else known.plans,
        }
    )


def after_plan(known: Known, deployment: DeploymentName, term: int, epoch: int, plan: Digest) -> Known:
    """`known` after a plan (its digest) that the leader of `term` signed for `epoch` of `deployment`.

    Neither number may fall, and an epoch has one plan. Raises `ResplitError`: ROLLED_BACK otherwise, and
    INVALID_REQUEST where one of them is more than `JUMP_MAX` ahead, or of too many deployments to be remembered.
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
        _check_follows(f"the term of {deployment!r}", "term", seen.term, term)
        _check_follows(f"the epoch of {deployment!r}", "epoch", seen.epoch, epoch)
        if epoch == seen.epoch and plan != seen.digest:
            raise _another("plan", f"epoch {epoch} of {deployment!r}", seen.digest, plan)
    now_seen = PlanSeen(term=term, epoch=epoch, digest=plan)
    return known.model_copy(update={"plans": {**known.plans, deployment: now_seen}})


def open_roster(root: RootKeys, data: bytes) -> Roster:
    """The roster in `data`, signed under `root`, whenever it was or will be valid.

    Raises `ResplitError(BAD_SIGNATURE)` without a threshold of the root's keys, and `INVALID_REQUEST` for one of
    another cluster or another version of the root.
    """
    roster = open_signed(data, Roster, ROSTER_TYPE, root.public_keys, root.threshold)
    _check_cluster("roster", root.cluster, roster.cluster)
    if roster.root_version != root.version:
        message = (
            f"the roster goes with version {roster.root_version} of the root and version {root.version} is known; "
            "fetch the other of the two"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "root_version")
    return roster


def open_roots(chain: Iterable[bytes]) -> RootKeys:
    """The last of a chain of root documents, each signed under the one before, whenever it was or will be valid.

    Errors are those of `after_root`.
    """
    documents = iter(chain)
    found = _self_signed(next(documents, b""))
    for data in documents:
        found = _next_root(found, data)
    return found


def members_at(roster: Roster, role: Role, now: datetime) -> tuple[Member, ...]:
    """Those of `role` whose time it is."""
    return tuple(member for member in roster.members if member.role == role and member.is_current(now))


def forbidden(
    policy: Policy, roster: Roster, deployment: DeploymentName, block_count: int, node: NodeId, blocks: Iterable[int]
) -> frozenset[int]:
    """Which of `blocks` of `deployment` (a model of `block_count` blocks) `node` must not hold, whoever says so.

    A node that is not an agent of `roster` must hold none at all.
    """
    member = roster.member(node)
    if member is None or member.role != "agent":
        return frozenset(blocks)
    if member.tier == "trusted":
        return frozenset()
    return policy.sensitive_of(deployment, block_count).intersection(blocks)


def digest(value: BaseModel) -> Digest:
    """SHA-256 of a value's canonical bytes: the same whoever signed it, and however many did."""
    return Digest(sha256(encode(value)).hexdigest())


def public_key(text: str) -> Ed25519PublicKey:
    """The key that a `PublicKey` spells."""
    return Ed25519PublicKey.from_public_bytes(base64.b64decode(text))


def _self_signed(data: bytes) -> RootKeys:
    # Which keys are to verify it is in the document itself, so this once bytes are read that nobody vouches for yet.
    named = claimed(data, RootKeys, ROOT_TYPE)
    return open_signed(data, RootKeys, ROOT_TYPE, named.public_keys, named.threshold)


def _next_root(before: RootKeys, data: bytes) -> RootKeys:
    """The version after `before`, or `before` itself."""
    root = open_signed(data, RootKeys, ROOT_TYPE, before.public_keys, before.threshold)
    root = open_signed(data, RootKeys, ROOT_TYPE, root.public_keys, root.threshold)
    _check_cluster("root", before.cluster, root.cluster)
    if root.version < before.version:
        raise _fell("the root's version", "version", before.version, root.version)
    if root.version == before.version and root != before:
        raise _another("root", f"version {root.version}", before.digest, root.digest)
    if root.version > before.version + 1:
        message = (
            f"the root's version is {root.version} and {before.version} is known; "
            f"fetch version {before.version + 1} first, each is signed under the one before"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "version")
    return root


def _check_follows(what: str, field: str, seen: int, found: int) -> None:
    if found < seen:
        raise _fell(what, field, seen, found)
    if found > seen + JUMP_MAX:
        message = (
            f"{what} is {found}, more than {JUMP_MAX} ahead of {seen}, which was seen last; either a key is in wrong "
            "hands, or this process was away too long and must join again with a new bundle"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, field)


def _check_cluster(what: str, known: ClusterId, found: ClusterId) -> None:
    if found != known:
        message = f"the {what} is of cluster {found} and this process belongs to {known}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "cluster")


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


def _check_order(first: datetime, last: datetime) -> None:
    if first >= last:
        raise ValueError(f"what begins at {first} cannot end at {last}")


def _doubled(texts: list[str]) -> str | None:
    return next((text for text, count in Counter(texts).items() if count > 1), None)


def _fell(what: str, field: str, seen: int, found: int) -> ResplitError:
    message = f"{what} is {found} and {seen} was seen already; an old one is being shown again"
    return ResplitError(ErrorCode.ROLLED_BACK, message, field)


def _another(what: str, which: str, seen: Digest, found: Digest) -> ResplitError:
    message = f"another {what} ({found[:12]}) was seen as {which} already ({seen[:12]}); one of the two is forged"
    return ResplitError(ErrorCode.ROLLED_BACK, message, "digest")
