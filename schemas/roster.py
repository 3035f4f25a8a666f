"""PURE: who belongs to a cluster, as its offline root signs it.

The model is TUF's, cut down to two documents. `RootKeys` says who may sign; a new version takes a threshold of the
keys before it and of its own. `Roster` says who belongs to the cluster, and what its nodes must not hold whatever
an orchestrator says. Whoever is not in the newest roster is revoked: there is no other list.

Which of two signed documents is the newer one no signature says: `schemas.known` does.

Wherever a roster goes, the versions of the root from the second on go in front of it (`presented`), so that whoever
knows an earlier root is led to the one whose holders signed it, and finds both or neither.
"""

import base64
import binascii
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from hashlib import sha256
from typing import Annotated, Literal, NewType, Self

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from pydantic import AfterValidator, AwareDatetime, BaseModel, Field, StringConstraints, model_validator

from schemas.base import (
    DEPLOYMENT_PATTERN,
    DeploymentName,
    Digest,
    Home,
    NodeId,
    NodeName,
    Sha256,
    SiteId,
    SiteName,
    Value,
)
from schemas.codec import encode
from schemas.deployment import Sensitive, ruled_blocks
from schemas.errors import ErrorCode, ResplitError
from schemas.signed import SIGNATURES_MAX, KeyId, documents, key_id, open_signed

ROOT_TYPE = "application/vnd.resplit.root.v1+json"
ROSTER_TYPE = "application/vnd.resplit.roster.v1+json"

MEMBERS_MAX = 12_000
"""A roster of so many members still fits into one signed document."""
DEPLOYMENTS_MAX = 10_000
"""Deployments that a policy names, and whose plans a process remembers: what is kept on the disk is bounded."""
FORMER_MAX = 1000
"""Former keys that a roster still names. Beyond them the one that left first is forgotten."""
ROOTS_MAX = 100
"""Versions of the root that a cluster can have had. Each takes its holders together, so there are few."""
EVERY_DEPLOYMENT = "*"
MODELS_MAX = 100
"""Models that a policy lets one deployment run."""

ClusterId = NewType("ClusterId", str)
ClusterName = Annotated[ClusterId, StringConstraints(pattern=r"^[0-9a-f]{32}$")]
PublicKey = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$")]
"""32 raw bytes in base64, in the one spelling that an encoder gives: keys are compared as text."""
NKEY_OF_A_USER = 20 << 3
"""The first byte of a public NKey: `U`, in base32."""


def _whole(nkey: str) -> str:
    # nats-server refuses its whole configuration for one key that was copied wrongly; better to refuse the key.
    data = base64.b32decode(nkey)
    if data[0] != NKEY_OF_A_USER or int.from_bytes(data[-2:], "little") != binascii.crc_hqx(data[:-2], 0):
        raise ValueError("is not the public NKey of a user; copy it whole")
    return nkey


BusKey = Annotated[str, StringConstraints(pattern=r"^U[A-Z2-7]{55}$"), AfterValidator(_whole)]
"""The public half of a user's NKey."""
Role = Literal["agent", "orchestrator", "operator", "observer", "archivist", "client"]
"""The part a member plays. A client asks for inference and no more, so that an application's key is no operator's; an
operator deploys, removes, drains and trusts; an observer reads the trail and heartbeats; an archivist makes room in
the trail, which nobody else can."""
WRITERS: tuple[Role, ...] = ("agent", "orchestrator")
"""Who writes audit events."""
Ruled = Annotated[str, StringConstraints(pattern=rf"^\*$|{DEPLOYMENT_PATTERN}")]
"""The deployment that a rule of the policy is about, or `*`."""
TrustTier = Literal["trusted", "edge"]
"""What a roster says of an agent. (`Capacity.tier` is what the agent says of itself.)"""


class RootKeys(Value):
    """Who may sign rosters, and the next version of this document."""

    cluster: ClusterName
    version: int = Field(ge=1)
    previous: Sha256 | None = None
    """The digest of the version before, so that whoever knows this one knows all that led to it; None of the first."""
    keys: dict[KeyId, PublicKey] = Field(min_length=1, max_length=SIGNATURES_MAX)
    """Ed25519, by key id."""
    threshold: int = Field(ge=1)
    """How many of `keys` it takes."""
    issued_at: AwareDatetime
    expires_at: AwareDatetime

    @model_validator(mode="after")
    def _can_sign(self) -> Self:
        if (self.previous is None) != (self.version == 1):
            raise ValueError("every version of the root but the first names the one before")
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
    home: SiteName | None = None
    """The site whose deployments an orchestrator steers, and no others; or whose trail an agent writes. None: the hub,
    and in what earlier releases signed (as `Roster.former`)."""
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
        if self.home is not None and self.role not in WRITERS:
            raise ValueError(f"{self.name}: orchestrators and agents have a home, and nobody else has")
        _check_order(self.not_before, self.not_after)
        return self

    @property
    def keys(self) -> tuple[str, ...]:
        """All that nobody else may have."""
        return (self.signing, self.sealing, self.bus, self.link)

    def is_current(self, now: datetime) -> bool:
        return self.not_before <= now < self.not_after


class Former(Value):
    """A signing key that was a writer's, and is not any more.

    What it signed while it was stays true, wherever the trail shows that it was signed by then (`resplit.standing`).
    Nothing else believes it.
    """

    name: NodeName
    role: Role
    signing: PublicKey
    out: int = Field(ge=2)
    """The version of the roster that took it out."""
    until: AwareDatetime
    """When the root did, by its holders' clock. It may have taken long until members heard of it."""


class Policy(Value):
    """What no orchestrator can override."""

    sensitive: dict[Ruled, Sensitive] = Field(default_factory=dict, max_length=DEPLOYMENTS_MAX)
    """Blocks that only trusted nodes may hold, by deployment; `*` holds for every deployment, named or not."""

    models: dict[Ruled, Annotated[tuple[Sha256, ...], Field(min_length=1, max_length=MODELS_MAX)]] | None = Field(
        default=None, max_length=DEPLOYMENTS_MAX
    )
    """The only models that a deployment may run, by the digests of their manifests; `*` is for each deployment that is
    not named. None where nothing is said of models, and in what earlier releases signed (as `Roster.former`)."""

    def models_of(self, deployment: DeploymentName) -> tuple[Digest, ...] | None:
        """The models that `deployment` may run; None: any."""
        models = self.models or {}
        return models.get(deployment, models.get(EVERY_DEPLOYMENT))

    def sensitive_of(self, deployment: DeploymentName, block_count: int) -> frozenset[int]:
        """The blocks of `deployment` that only trusted nodes may hold."""
        return ruled_blocks(self.rules_of(deployment), block_count)

    def rules_of(self, deployment: DeploymentName) -> tuple[Sensitive, ...]:
        """What `sensitive` says that holds for `deployment`."""
        said = (self.sensitive.get(name) for name in (EVERY_DEPLOYMENT, deployment))
        return tuple(rule for rule in said if rule is not None)


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
    former: tuple[Former, ...] | None = Field(default=None, max_length=FORMER_MAX)
    """Who left first in front. None where nobody did, and in what earlier releases signed: the digests of rosters that
    processes remember must not change."""

    @model_validator(mode="after")
    def _members_differ(self) -> Self:
        names = [member.name for member in self.members]
        if doubled := _doubled(names):
            raise ValueError(f"two members are called {doubled!r}")
        for kind in ("signing", "sealing", "bus", "link"):
            if doubled := _doubled([str(getattr(member, kind)) for member in self.members]):
                raise ValueError(f"two members have the {kind} key {doubled}")
        known = [member.signing for member in self.members] + [one.signing for one in self.former or ()]
        if doubled := _doubled(known):
            raise ValueError(f"a key that left never comes back, and {doubled} has left")
        _check_order(self.issued_at, self.expires_at)
        return self

    @property
    def digest(self) -> Digest:
        return digest(self)

    @property
    def homes(self) -> tuple[Home, ...]:
        """The hub, and every site that has orchestrators of its own."""
        sites = {SiteId(one.home) for one in self.members if one.role == "orchestrator" and one.home is not None}
        return (None, *sorted(sites))

    def member(self, name: NodeId) -> Member | None:
        """Who is called `name`; None where nobody is, or not any more."""
        return next((member for member in self.members if member.name == name), None)


def presented(data: bytes) -> tuple[tuple[bytes, ...], bytes]:
    """What a roster's bytes hold, none of it verified: the versions of the root from the second on, and the roster.

    Raises `ResplitError(BAD_SIGNATURE)` for what is no such thing.
    """
    *roots, roster = documents(data, ROOTS_MAX)
    return tuple(roots), roster


def present(roots: Iterable[bytes], roster: bytes) -> bytes:
    """The bytes of a roster as it goes anywhere (`presented`)."""
    return b"".join((*roots, roster))


def open_roster(root: RootKeys, data: bytes) -> Roster:
    """The roster in `data`, signed under `root`, whenever it was or will be valid. (`schemas.known.root_of` follows
    the roots in front of it.)

    Raises `ResplitError(BAD_SIGNATURE)` without a threshold of the root's keys, and `INVALID_REQUEST` for one of
    another cluster or another version of the root.
    """
    _, document = presented(data)
    roster = open_signed(document, Roster, ROSTER_TYPE, root.public_keys, root.threshold)
    check_cluster("roster", root.cluster, roster.cluster)
    if roster.root_version != root.version:
        message = (
            f"the roster goes with version {roster.root_version} of the root and version {root.version} is known; "
            "fetch the other of the two"
        )
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "root_version")
    return roster


def former_after(before: Roster, members: Iterable[Member], now: datetime) -> tuple[Former, ...] | None:
    """The former keys of the roster that follows `before`, names `members` and is issued at `now`."""
    kept = {member.signing for member in members}
    left = (
        Former(name=one.name, role=one.role, signing=one.signing, out=before.version + 1, until=now)
        for one in before.members
        if one.role in WRITERS and one.signing not in kept
    )
    return (*(before.former or ()), *left)[-FORMER_MAX:] or None


def members_at(roster: Roster, role: Role, now: datetime) -> tuple[Member, ...]:
    """Those of `role` whose time it is."""
    return tuple(member for member in roster.members if member.role == role and member.is_current(now))


def readers_at(roster: Roster, now: datetime) -> dict[NodeId, X25519PublicKey]:
    """To whom requests are sealed: the trusted agents, any of which may be the ingress, each with its key."""
    found = (member for member in members_at(roster, "agent", now) if member.tier == "trusted")
    return {NodeId(member.name): sealing_key(member) for member in found}


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


def sealing_key(member: Member) -> X25519PublicKey:
    """To which what is for `member` alone is sealed."""
    return X25519PublicKey.from_public_bytes(base64.b64decode(member.sealing))


def spelled(key: Ed25519PublicKey | X25519PublicKey) -> str:
    """A key as a `PublicKey`."""
    return base64.b64encode(key.public_bytes_raw()).decode()


def check_cluster(what: str, known: ClusterId, found: ClusterId) -> None:
    """Raise `ResplitError(INVALID_REQUEST)` where a document is of another cluster."""
    if found != known:
        message = f"the {what} is of cluster {found} and this process belongs to {known}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "cluster")


def _check_order(first: datetime, last: datetime) -> None:
    if first >= last:
        raise ValueError(f"what begins at {first} cannot end at {last}")


def _doubled(texts: Iterable[str]) -> str | None:
    return next((text for text, count in Counter(texts).items() if count > 1), None)
