"""A bundle: what one member needs to be one, in one file; and how it is put in place on the member's machine.

The bundle holds private keys and is carried by hand, over `scp` or on a stick, and deleted after. Nothing of it is
believed but what its root signs: everything is verified before the first byte is written.

A member's folder holds `known.json` (the root and what else it has seen, `bus.remembered`), `roster.signed`, `ca.pem`
(and `server-ca.pem`, where the NATS server's certificate is from others), and its own `NAME.key` (Ed25519),
`NAME.sealing.key` (X25519), `NAME.nk` (the NKey's seed), `NAME.tls.key` and `NAME.tls.pem`. `bus.identity` reads it.
"""

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from pydantic import Field

from bus.certificates import UNREADABLE, common_names, fingerprint
from bus.credentials import public_nkey
from bus.folders import FIRST_ROOT, KNOWN, ROSTER
from bus.pem import certificate_pem, key_pem
from bus.remembered import PRIVATE, PUBLIC, recall, remember, write_durably
from natstls.contexts import AUTHORITY, SERVER_AUTHORITY, member_certificate
from schemas.base import NodeName, Value
from schemas.codec import MSGPACK, decode_as, encode_as
from schemas.errors import ErrorCode, ResplitError
from schemas.known import Known, after_roster, fell, first_known, root_of
from schemas.roster import Member, Roster, open_roster, spelled

BUNDLE_BYTES_MAX = 8 << 20
"""A roster at its largest, and the roots that lead to it."""


class PrivateKeys(Value):
    """One member's. Shown nowhere, not even in an error."""

    signing: bytes = Field(repr=False, min_length=32, max_length=32)
    """Ed25519, raw."""
    sealing: bytes = Field(repr=False, min_length=32, max_length=32)
    """X25519, raw."""
    bus: bytes = Field(repr=False, max_length=100)
    """The NKey's seed, `SU...`."""
    link: bytes = Field(repr=False, max_length=10_000)
    """Of the TLS certificate: P-256, PKCS #8 in DER."""


class Bundle(Value):
    """All that a member needs."""

    bundle: int = Field(default=2, ge=2, le=2)
    """The version of this form."""
    name: NodeName
    root: bytes
    """The first version of the root."""
    roster: bytes
    """With the later versions in front of it."""
    authority: bytes
    """The certificate of the cluster's authority, DER."""
    certificate: bytes
    """The member's, DER."""
    keys: PrivateKeys


@dataclass(frozen=True)
class _Tls:
    """What a member makes links with."""

    authority: x509.Certificate
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey


@dataclass(frozen=True)
class Joined:
    """What `join` verified and put in place."""

    member: Member
    roster: Roster
    known: Known


def pack(bundle: Bundle) -> bytes:
    """The bytes of a bundle."""
    return encode_as(bundle, MSGPACK)


def unpack(data: bytes) -> Bundle:
    """Read a bundle of which nothing is verified yet; raises `ResplitError(CORRUPT_FILE)` where it is none."""
    if len(data) > BUNDLE_BYTES_MAX:
        raise _broken(f"it is {len(data)} bytes long, over the limit of {BUNDLE_BYTES_MAX}")
    try:
        return decode_as(Bundle, data, MSGPACK, "bundle")
    except ResplitError as error:
        # The first error's message shows the value at fault, which may be a key.
        if error.field is None:
            message = (
                "this is no bundle, or not all of one; give the file that `resplit enroll` or `resplit rotate` wrote"
            )
            raise ResplitError(ErrorCode.CORRUPT_FILE, message, "bundle") from None
        raise _broken(f"its field {error.field!r} is not what it must be") from None


def with_roster(data: bytes, roster: bytes) -> bytes:
    """The bundle `data` with another roster: the one that more holders have signed since the bundle was made."""
    return pack(unpack(data).model_copy(update={"roster": roster}))


def join(data: bytes, folder: Path, now: datetime, server_authority: bytes | None = None) -> Joined:
    """Verify the bundle `data` and put what is in it into `folder`, private files readable by their owner alone.
    `server_authority`: PEM of those who may sign the NATS server's certificate, if the cluster's authority does not.

    Joining again with the same bundle changes nothing, and one with newer keys (`bus.enrolment.rotate`) replaces what
    is there. Raises, with the folder as it was: `ResplitError(CORRUPT_FILE)` for what is no bundle or does not belong
    together; INVALID_REQUEST where the folder holds another identity, or its member's time has not come; EXPIRED where
    it is over; and what `after_roster` raises, ROLLED_BACK for an older bundle of this node among it.
    """
    bundle = unpack(data)
    _check_free(folder, bundle.name)
    before = recall(folder / KNOWN)
    first = first_known(bundle.root)
    if before is not None:
        _check_same(folder, before, first, bundle)
    known = after_roster(before or first, bundle.roster, now)
    roster = open_roster(known.root, bundle.roster)
    member = roster.member(bundle.name)
    if member is None:
        raise _broken(f"its roster does not name {bundle.name!r}")
    _check_time(member, now)
    tls = _checked_tls(bundle, member, roster)
    _check_keys(bundle, member)
    if server_authority is not None:
        _check_authorities(server_authority)

    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    # First what was seen: if the power fails between here and the end, the same bundle is taken once more.
    remember(folder / KNOWN, known)
    name = bundle.name
    certificate_file, key_file = member_certificate(name)
    private = {
        f"{name}.key": key_pem(Ed25519PrivateKey.from_private_bytes(bundle.keys.signing)),
        f"{name}.sealing.key": key_pem(X25519PrivateKey.from_private_bytes(bundle.keys.sealing)),
        f"{name}.nk": bundle.keys.bus,
        key_file: key_pem(tls.key),
    }
    public = {
        certificate_file: certificate_pem(tls.certificate),
        AUTHORITY: certificate_pem(tls.authority),
        ROSTER: bundle.roster,
        **({} if server_authority is None else {SERVER_AUTHORITY: server_authority}),
    }
    for file, content in private.items():
        write_durably(folder / file, content, PRIVATE)
    for file, content in public.items():
        write_durably(folder / file, content, PUBLIC)
    return Joined(member, roster, known)


def _check_free(folder: Path, name: str) -> None:
    """That the folder holds no identity but, at most, the one called `name`, of a cluster with a root."""
    own = {f"{name}.key", f"{name}.sealing.key", f"{name}.tls.key"}
    # A cluster's own folder is of somebody else whatever the name.
    others = [FIRST_ROOT] if (folder / FIRST_ROOT).exists() else []
    others += sorted(path.name for path in folder.glob("*.key") if path.name not in own)
    if others:
        message = f"{folder} holds another identity ({others[0]}); join {name!r} in a folder of its own"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "folder")


def _check_same(folder: Path, before: Known, first: Known, bundle: Bundle) -> None:
    """That the bundle is of the cluster that the folder is of, and not of a time before it."""
    if before.root.cluster != first.root.cluster:
        other = f"join cluster {first.root.cluster} in a folder of its own"
        message = f"{folder} belongs to cluster {before.root.cluster}; {other}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "folder")
    root = root_of(first.root, bundle.roster)
    if root.version < before.root.version:  # whose keys say nothing of one that they followed
        raise fell("the root's version", "version", before.root.version, root.version)


def _check_time(member: Member, now: datetime) -> None:
    if now < member.not_before:
        message = f"{member.name!r} belongs from {member.not_before}, and by the clock here it is {now}; set the clock"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "not_before")
    if now >= member.not_after:
        message = f"{member.name!r} belonged until {member.not_after}, and it is {now}; make a new bundle (`rotate`)"
        raise ResplitError(ErrorCode.EXPIRED, message, "not_after")


def _check_keys(bundle: Bundle, member: Member) -> None:
    """That the private keys are those of the member whom the root enrolled."""
    if spelled(Ed25519PrivateKey.from_private_bytes(bundle.keys.signing).public_key()) != member.signing:
        raise _broken("its signing key is not the one in the roster")
    if spelled(X25519PrivateKey.from_private_bytes(bundle.keys.sealing).public_key()) != member.sealing:
        raise _broken("its sealing key is not the one in the roster")
    try:
        named = public_nkey(bundle.keys.bus.decode("ascii", "replace"))
    except ResplitError as error:
        raise _broken("its bus key is not the seed of an NKey") from error
    if named != member.bus:
        raise _broken("its bus key is not the one in the roster")


def _checked_tls(bundle: Bundle, member: Member, roster: Roster) -> _Tls:
    """Authority, certificate and key, which are the ones that the root names and belong together."""
    try:
        # Certificates are parsed when they are asked, so what is asked of them is asked here.
        authority = x509.load_der_x509_certificate(bundle.authority)
        certificate = x509.load_der_x509_certificate(bundle.certificate)
        key = serialization.load_der_private_key(bundle.keys.link, password=None)
        prints = fingerprint(authority.public_key()), fingerprint(certificate.public_key())
        names = common_names(certificate)
    except UNREADABLE as error:
        raise _broken("its TLS certificates or their key cannot be read") from error
    if prints[0] != roster.authority:
        raise _broken("its certificate authority is not the one in the roster")
    if prints[1] != member.link:
        raise _broken("its TLS certificate is not the one in the roster")
    try:
        authority.verify_directly_issued_by(authority)
        certificate.verify_directly_issued_by(authority)
    except (*UNREADABLE, InvalidSignature) as error:
        raise _broken("its TLS certificates were not issued by its authority") from error
    if names != [member.name]:
        raise _broken(f"its TLS certificate is not of {member.name!r}")
    if not isinstance(key, ec.EllipticCurvePrivateKey) or key.public_key() != certificate.public_key():
        raise _broken("its TLS key is not that of its certificate")
    return _Tls(authority, certificate, key)


def _check_authorities(data: bytes) -> None:
    try:
        x509.load_pem_x509_certificates(data)
    except ValueError as error:
        message = "the server's authority is not a file of certificates in PEM; give the one that its certificate is of"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "server-authority") from error


def _broken(why: str) -> ResplitError:
    return ResplitError(ErrorCode.CORRUPT_FILE, f"the bundle cannot be used: {why}; make another (`resplit rotate`)")
