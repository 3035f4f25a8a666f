"""Founding a cluster: the keys of its root, in one file for each holder, and its certificate authority."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from secrets import token_hex

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from pydantic import ValidationError

from bus.certificates import fingerprint, make_authority
from bus.folders import FIRST_ROOT, ROSTER
from bus.natsconf import LOGINS_FILE, SERVER_FILE, logins_conf, server_conf
from bus.pem import certificate_pem, key_pem
from bus.remembered import PRIVATE, PUBLIC, write_durably
from bus.server_certificate import certify, checked_hosts, server_files
from natstls.contexts import AUTHORITY
from schemas.errors import ErrorCode, ResplitError
from schemas.known import CLOCK_BEHIND_MAX
from schemas.roster import ROOT_TYPE, ROSTER_TYPE, ClusterId, Policy, RootKeys, Roster, spelled
from schemas.signed import key_id, sign

ROOT_LIFETIME = timedelta(days=3650)
ROSTER_LIFETIME = timedelta(days=90)
"""Within that the holders sign again, if only to say that nothing changed (`bus.enrolment.renew`). It is how long a
node that is kept from the newest roster can be made to believe in a member that was revoked."""
LISTEN = "0.0.0.0:4222"
JETSTREAM = Path("/var/lib/nats/jetstream")
"""Where the cluster's nats-server listens and keeps what it keeps, until its owner writes otherwise."""
PASSPHRASE_MIN = 16
"""Characters. The key of a PKCS #8 file is derived in 2,048 rounds, so guesses are cheap."""
_PEM_BLOCK = re.compile(rb"-----BEGIN [A-Z ]+-----.+?-----END [A-Z ]+-----\n", re.DOTALL)


@dataclass(frozen=True)
class Holder:
    """What one holder of the root has: a key to sign with, and the authority's, of which each has a copy."""

    signing: Ed25519PrivateKey
    authority: ec.EllipticCurvePrivateKey


def found_cluster(
    folder: Path,
    *,
    now: datetime,
    holders: int = 1,
    threshold: int = 1,
    passphrases: Sequence[str] = (),
    policy: Policy | None = None,
    hosts: Sequence[str] = (),
) -> RootKeys:
    """Make a cluster without members: the keys of its `holders`, of whom `threshold` sign, its authority, and the
    certificate and the configuration of a nats-server, which lets nobody in yet.

    `passphrases`: none, or one for each holder, with which its file is encrypted. `hosts`: where members reach the
    server, beside loopback. Raises `ResplitError(INVALID_REQUEST)` where the folder holds a cluster already, for
    numbers that do not fit, and for what is no host.
    """
    if any(folder.glob("root[-.]*")):
        message = f"{folder} holds a cluster already; found another in a folder of its own"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "folder")
    check_passphrases(passphrases, holders)
    checked_hosts(hosts)
    keys = [Ed25519PrivateKey.generate() for _ in range(holders)]
    by_id = {key_id(key.public_key()): key for key in keys}
    authority_key = ec.generate_private_key(ec.SECP256R1())
    until = now + ROOT_LIFETIME
    cluster = ClusterId(token_hex(16))
    certificate = make_authority(cluster, authority_key, now - CLOCK_BEHIND_MAX, until)
    try:
        root = RootKeys(
            cluster=cluster,
            version=1,
            keys={name: spelled(key.public_key()) for name, key in by_id.items()},
            threshold=threshold,
            issued_at=now,
            expires_at=until,
        )
    except ValidationError as error:
        raise ResplitError.from_validation(error, "root") from error
    roster = Roster(
        cluster=cluster,
        root_version=1,
        version=1,
        issued_at=now,
        expires_at=now + ROSTER_LIFETIME,
        authority=fingerprint(authority_key.public_key()),
        policy=policy or Policy(),
    )
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    for position, key in enumerate(keys):
        passphrase = passphrases[position] if passphrases else None
        keep_holder(folder / f"root-{position}.key", Holder(key, authority_key), passphrase)
    write_durably(folder / AUTHORITY, certificate_pem(certificate), PUBLIC)
    write_durably(folder / SERVER_FILE, server_conf(LISTEN, JETSTREAM, server_files(Path())).encode(), PUBLIC)
    certify(folder, hosts, authority_key, now=now)
    write_durably(folder / LOGINS_FILE, logins_conf(()).encode(), PUBLIC)
    write_durably(folder / ROSTER, sign(roster, ROSTER_TYPE, by_id), PUBLIC)
    write_durably(folder / FIRST_ROOT, sign(root, ROOT_TYPE, by_id), PUBLIC)
    return root


def keep_holder(path: Path, holder: Holder, passphrase: str | None) -> None:
    """Write one holder's file, encrypted where there is a passphrase."""
    write_durably(path, key_pem(holder.signing, passphrase) + key_pem(holder.authority, passphrase), PRIVATE)


def load_holder(path: Path, passphrase: str | None = None) -> Holder:
    """Read one holder's `root-N.key`; raises `ResplitError` naming the file where it is missing, bad or locked."""
    secret = None if passphrase is None else passphrase.encode()
    try:
        blocks = _PEM_BLOCK.findall(path.read_bytes())
        keys = [serialization.load_pem_private_key(block, secret) for block in blocks]
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; bring the file of a holder"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "roots") from error
    except TypeError as error:
        needed = "is encrypted; give its passphrase" if passphrase is None else "is not encrypted; give no passphrase"
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"{path} {needed}", "passphrase") from error
    except ValueError as error:
        message = f"{path} does not open: it is damaged, or the passphrase is another"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "passphrase") from error
    match keys:
        case [Ed25519PrivateKey() as signing, ec.EllipticCurvePrivateKey() as authority]:
            return Holder(signing, authority)
        case _:
            raise ResplitError(ErrorCode.CORRUPT_FILE, f"{path} is not the file of a holder; restore it from a copy")


def check_passphrases(passphrases: Sequence[str], holders: int) -> None:
    """That each of `holders` has a passphrase that is long enough, or none has one."""
    if passphrases and len(passphrases) != holders:
        message = f"{len(passphrases)} passphrases for {holders} holders; give each its own, or none to any"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "passphrases")
    if any(len(passphrase) < PASSPHRASE_MIN for passphrase in passphrases):
        message = f"a passphrase is shorter than {PASSPHRASE_MIN} characters; take a few random words"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "passphrases")
