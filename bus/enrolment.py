"""Who belongs to a cluster, as its holders say: for the operator's machine, off the bus.

The cluster's folder (`bus.founding` makes it) holds `root-0.key` and so on, one file for each holder, which may be
taken to machines of their own; and what is public: `root.1.signed` and so on, `roster.signed` (the newest), `ca.pem`;
`nats-server.conf` with the server's certificate (`bus.server_certificate`), whose key is the one other secret here, and
`logins.conf` which goes with the roster: whom the cluster's nats-server lets in.
Each change is a new version of the roster. Where fewer holders sign it than it takes, it waits as `roster.pending`:
carry that to the others (`countersign_roster`) and bring it back (`adopt`). Until then it is not in force.

A member's private keys are made here, are in its bundle and nowhere else: the folder never holds them. The signing key
of a writer who leaves, or gets another, stays in the roster as a former one: what it signed before stays true.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_bytes

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import ValidationError

from bus.certificates import fingerprint, issue
from bus.credentials import SEED_BYTES, logins_of, nkey_seed, public_nkey
from bus.founding import ROSTER_LIFETIME, Holder
from bus.joining import ROOTS_MAX, ROSTER, Bundle, PrivateKeys, pack
from bus.natsconf import LOGINS_FILE, logins_conf
from bus.remembered import PUBLIC, write_durably
from natstls.contexts import AUTHORITY
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.known import CLOCK_BEHIND_MAX, open_roots
from schemas.roster import (
    ROSTER_TYPE,
    Member,
    Policy,
    Role,
    RootKeys,
    Roster,
    TrustTier,
    former_after,
    open_roster,
    spelled,
)
from schemas.signed import countersign, key_id, sign

PENDING = "roster.pending"


@dataclass(frozen=True)
class _Cluster:
    """What the folder says, verified, whether or not it has expired: an expired roster must be renewable."""

    chain: tuple[bytes, ...]
    root: RootKeys
    roster: Roster
    authority: x509.Certificate


def enrol(
    folder: Path,
    name: NodeId,
    role: Role,
    tier: TrustTier | None,
    lifetime: timedelta,
    roots: Sequence[Holder],
    *,
    now: datetime,
) -> bytes:
    """Make `name` a member for `lifetime`; its bundle, to be carried to its machine and used with `bus.joining.join`.

    Where `roots` are fewer than it takes, the bundle opens only with the roster that the others have signed too
    (`bus.joining.with_roster`). Raises `ResplitError(INVALID_REQUEST)` where there is a member of that name, a change
    is still pending, or a key is not of this cluster's root.
    """
    cluster = _open(folder)
    if cluster.roster.member(name) is not None:
        message = f"{name!r} is a member already; give it new keys with `rotate`, or `revoke` it first"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "name")
    return _enrolled(folder, cluster, name, role, tier, lifetime, roots, now)


def rotate(folder: Path, name: NodeId, roots: Sequence[Holder], *, now: datetime) -> bytes:
    """Give the member `name` new keys, for as long as it had the old ones, which are void; its new bundle."""
    cluster = _open(folder)
    member = _existing(cluster, name)
    # What lies before `now` in a lifetime is there for slow clocks, and would grow with each rotation.
    lifetime = member.not_after - member.not_before - CLOCK_BEHIND_MAX
    return _enrolled(folder, cluster, name, member.role, member.tier, lifetime, roots, now)


def revoke(folder: Path, name: NodeId, roots: Sequence[Holder], *, now: datetime) -> Roster:
    """Take `name` out; the roster that says so. It holds for whoever sees it: hand it to every node."""
    cluster = _open(folder)
    gone = _existing(cluster, name)
    members = tuple(member for member in cluster.roster.members if member != gone)
    return _change(folder, cluster, members, cluster.roster.policy, roots, now)[0]


def renew(folder: Path, roots: Sequence[Holder], *, now: datetime, policy: Policy | None = None) -> Roster:
    """Say the same again before the roster expires, or with another `policy`."""
    cluster = _open(folder)
    return _change(folder, cluster, cluster.roster.members, policy or cluster.roster.policy, roots, now)[0]


def review(data: bytes, chain: Iterable[bytes]) -> Roster:
    """The roster that at least one holder has signed, for the eyes of the next; `chain`: the versions of the root.

    Raises `ResplitError(BAD_SIGNATURE)` where no holder vouches for it.
    """
    root = open_roots(chain)
    return open_roster(root.model_copy(update={"threshold": 1}), data)


def countersign_roster(data: bytes, chain: Iterable[bytes], roots: Sequence[Holder]) -> bytes:
    """Add the signatures of `roots` to a roster that another holder has signed; errors are those of `review`."""
    documents = tuple(chain)
    review(data, documents)
    return countersign(data, ROSTER_TYPE, _signers(open_roots(documents), roots))


def adopt(folder: Path, data: bytes) -> Roster:
    """Make the roster `data` the cluster's, now that enough holders have signed it; it is pending no more.

    Raises `ResplitError(BAD_SIGNATURE)` where signatures are missing and ROLLED_BACK where it is not the next one.
    """
    cluster = _open(folder)
    roster = open_roster(cluster.root, data)
    if roster.version != cluster.roster.version + 1 and roster != cluster.roster:
        message = f"the roster is version {roster.version} and the cluster has version {cluster.roster.version}"
        raise ResplitError(ErrorCode.ROLLED_BACK, message, "version")
    _put_in_force(folder, roster, data)
    pending = folder / PENDING
    if pending.exists() and review(_read(pending), cluster.chain).version <= roster.version:
        pending.unlink()
    return roster


def read_roots(folder: Path) -> tuple[bytes, ...]:
    """Every version of the root, as the folder holds them, the first one first."""
    paths = [folder / f"root.{version}.signed" for version in range(1, ROOTS_MAX + 1)]
    return tuple(_read(path) for path in paths if path.exists() or path == paths[0])


def _enrolled(
    folder: Path,
    cluster: _Cluster,
    name: NodeId,
    role: Role,
    tier: TrustTier | None,
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
    _signers(cluster.root, roots)
    try:
        member = Member(
            name=name,
            role=role,
            tier=tier,
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
    _, roster = _change(folder, cluster, (*others, member), cluster.roster.policy, roots, now)
    encoding = serialization.Encoding.DER
    return pack(
        Bundle(
            name=name,
            roots=cluster.chain,
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
    folder: Path,
    cluster: _Cluster,
    members: tuple[Member, ...],
    policy: Policy,
    roots: Sequence[Holder],
    now: datetime,
) -> tuple[Roster, bytes]:
    """Sign the next version of the roster and keep it: in force where that is enough, else pending."""
    signers = _signers(cluster.root, roots)
    if (folder / PENDING).exists():
        # Two documents of one version would split the cluster into those who saw the one and those who saw the other.
        message = f"a change is pending in {folder / PENDING}; adopt it once it is signed, or delete it if nobody signs"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "folder")
    try:
        roster = Roster(
            cluster=cluster.root.cluster,
            root_version=cluster.root.version,
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
    data = sign(roster, ROSTER_TYPE, signers)
    if len(signers) >= cluster.root.threshold:
        _put_in_force(folder, roster, data)
    else:
        write_durably(folder / PENDING, data, PUBLIC)
    return roster, data


def _put_in_force(folder: Path, roster: Roster, data: bytes) -> None:
    """The roster, and the logins that go with it."""
    write_durably(folder / ROSTER, data, PUBLIC)
    write_durably(folder / LOGINS_FILE, logins_conf(logins_of(roster)).encode(), PUBLIC)


def _open(folder: Path) -> _Cluster:
    chain = read_roots(folder)
    root = open_roots(chain)
    roster = open_roster(root, _read(folder / ROSTER))
    try:
        authority = x509.load_pem_x509_certificate(_read(folder / AUTHORITY))
    except ValueError as error:
        message = f"{folder / AUTHORITY} is not a certificate; restore it from a copy"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, AUTHORITY) from error
    if fingerprint(authority.public_key()) != roster.authority:
        message = f"{folder / AUTHORITY} is not the authority that the roster names; restore it from a copy"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, AUTHORITY)
    return _Cluster(chain, root, roster, authority)


def _signers(root: RootKeys, roots: Sequence[Holder]) -> dict[str, Ed25519PrivateKey]:
    """The holders' keys by id; each is one of the root's, and there is at least one."""
    keys = {key_id(holder.signing.public_key()): holder.signing for holder in roots}
    strangers = sorted(set(keys) - set(root.keys))
    if strangers or not keys:
        found = f"key {strangers[0]}" if strangers else "nobody"
        message = f"{found} is not a holder of the root of cluster {root.cluster}; use its `root-N.key`"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "roots")
    return keys


def _existing(cluster: _Cluster, name: NodeId) -> Member:
    member = cluster.roster.member(name)
    if member is None:
        named = ", ".join(other.name for other in cluster.roster.members) or "nobody yet"
        message = f"{name!r} is not a member of cluster {cluster.root.cluster}; its members are: {named}"
        raise ResplitError(ErrorCode.UNKNOWN_NODE, message, "name")
    return member


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; found a cluster first, or name the folder of one"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, path.name) from error
