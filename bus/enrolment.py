"""Who belongs to a cluster, as its holders say: for the operator's machine, off the bus (`bus.cluster_folder`).

A member's private keys are made here, are in its bundle and nowhere else: the folder never holds them. The signing key
of a writer who leaves, or gets another, stays in the roster as a former one: what it signed before stays true.
"""

from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_bytes

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from bus.certificates import fingerprint, issue
from bus.cluster_folder import Cluster, check_unchanged, open_cluster, propose, signers_of
from bus.credentials import SEED_BYTES, nkey_seed, public_nkey
from bus.founding import ROSTER_LIFETIME, Holder
from bus.joining import Bundle, PrivateKeys, pack
from schemas.base import Home, NodeId, SiteId
from schemas.errors import ErrorCode, ResplitError
from schemas.known import CLOCK_BEHIND_MAX
from schemas.roster import (
    ROSTER_TYPE,
    Member,
    Policy,
    Role,
    RootKeys,
    Roster,
    TrustTier,
    former_after,
    present,
    spelled,
)
from schemas.signed import sign


def enrol(
    folder: Path,
    name: NodeId,
    role: Role,
    tier: TrustTier | None,
    lifetime: timedelta,
    roots: Sequence[Holder],
    *,
    now: datetime,
    home: Home = None,
) -> bytes:
    """Make `name` a member for `lifetime`, at `home`; its bundle, to be carried to its machine and used with
    `bus.joining.join`.

    Where `roots` are fewer than it takes, the bundle opens only with the roster that the others have signed too
    (`bus.joining.with_roster`). Raises `ResplitError(INVALID_REQUEST)` where there is a member of that name, a change
    is still pending, or a key is not of this cluster's root.
    """
    cluster = open_cluster(folder)
    if cluster.roster.member(name) is not None:
        message = f"{name!r} is a member already; give it new keys with `rotate`, or `revoke` it first"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")
    return _enrolled(cluster, name, role, tier, home, lifetime, roots, now)


def rotate(folder: Path, name: NodeId, roots: Sequence[Holder], *, now: datetime) -> bytes:
    """Give the member `name` new keys, for as long as it had the old ones, which are void; its new bundle."""
    cluster = open_cluster(folder)
    member = _existing(cluster, name)
    # What lies before `now` in a lifetime is there for slow clocks, and would grow with each rotation.
    lifetime = member.not_after - member.not_before - CLOCK_BEHIND_MAX
    home = None if member.home is None else SiteId(member.home)
    return _enrolled(cluster, name, member.role, member.tier, home, lifetime, roots, now)


def revoke(folder: Path, name: NodeId, roots: Sequence[Holder], *, now: datetime) -> Roster:
    """Take `name` out; the roster that says so. It holds for whoever sees it: hand it to every node."""
    cluster = open_cluster(folder)
    gone = _existing(cluster, name)
    members = tuple(member for member in cluster.roster.members if member != gone)
    return _change(cluster, members, cluster.roster.policy, roots, now)[0]


def renew(folder: Path, roots: Sequence[Holder], *, now: datetime, policy: Policy | None = None) -> Roster:
    """Say the same again before the roster expires, or with another `policy`."""
    cluster = open_cluster(folder)
    return _change(cluster, cluster.roster.members, policy or cluster.roster.policy, roots, now)[0]


def _enrolled(
    cluster: Cluster,
    name: NodeId,
    role: Role,
    tier: TrustTier | None,
    home: Home,
    lifetime: timedelta,
    roots: Sequence[Holder],
    now: datetime,
) -> bytes:
    """Put a member with new keys into the roster, in the place of one of that name; its bundle."""
    not_before, not_after = now - CLOCK_BEHIND_MAX, now + lifetime
    if lifetime <= timedelta(0) or not_after > cluster.root.expires_at:
        message = f"{name!r} cannot be a member until {not_after}: the root is valid until {cluster.root.expires_at}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "lifetime")
    signing, sealing = Ed25519PrivateKey.generate(), X25519PrivateKey.generate()
    seed = nkey_seed(token_bytes(SEED_BYTES))
    link = ec.generate_private_key(ec.SECP256R1())
    signers_of(cluster.root, roots)
    try:
        member = Member(
            name=name,
            role=role,
            tier=tier,
            home=home,
            signing=spelled(signing.public_key()),
            sealing=spelled(sealing.public_key()),
            bus=public_nkey(seed),
            link=fingerprint(link.public_key()),
            not_before=not_before,
            not_after=not_after,
        )
    except ValidationError as error:
        raise ResplitError.from_validation(error, "member") from error
    certificate = issue(name, link.public_key(), cluster.authority, roots[0].authority, not_before, not_after)
    others = tuple(other for other in cluster.roster.members if other.name != name)
    _, roster = _change(cluster, (*others, member), cluster.roster.policy, roots, now)
    encoding = serialization.Encoding.DER
    return pack(
        Bundle(
            name=name,
            root=cluster.first,
            roster=roster,
            authority=cluster.authority.public_bytes(encoding),
            certificate=certificate.public_bytes(encoding),
            keys=PrivateKeys(
                signing=signing.private_bytes_raw(),
                sealing=sealing.private_bytes_raw(),
                bus=seed.encode(),
                link=link.private_bytes(
                    serialization.Encoding.DER, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
                ),
            ),
        )
    )


def _change(
    cluster: Cluster, members: tuple[Member, ...], policy: Policy, roots: Sequence[Holder], now: datetime
) -> tuple[Roster, bytes]:
    """Sign the next version of the roster and keep it: in force where that is enough, else pending."""
    signers = signers_of(cluster.root, roots)
    check_unchanged(cluster)
    roster = next_roster(cluster, cluster.root, members, policy, now)
    data = present(cluster.roots, sign(roster, ROSTER_TYPE, signers))
    propose(cluster, data)
    return roster, data


def next_roster(cluster: Cluster, root: RootKeys, members: tuple[Member, ...], policy: Policy, now: datetime) -> Roster:
    """The version of the roster after the one in force, under `root`, that nobody has signed yet."""
    try:
        return Roster(
            cluster=root.cluster,
            root_version=root.version,
            version=cluster.roster.version + 1,
            issued_at=now,
            expires_at=now + ROSTER_LIFETIME,
            authority=cluster.roster.authority,
            members=members,
            policy=policy,
            former=former_after(cluster.roster, members, now),
        )
    except ValidationError as error:
        raise ResplitError.from_validation(error, "roster") from error


def _existing(cluster: Cluster, name: NodeId) -> Member:
    member = cluster.roster.member(name)
    if member is None:
        named = ", ".join(other.name for other in cluster.roster.members) or "nobody yet"
        message = f"{name!r} is not a member of cluster {cluster.root.cluster}; its members are: {named}"
        raise ResplitError(ErrorCode.UNKNOWN_NODE, message, "name")
    return member
