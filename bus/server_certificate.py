"""The NATS server's certificate: made under the cluster's authority, where its root is, and anew before it ends.

It lies in the cluster's folder beside `nats-server.conf` and goes to the server's machine with it. Its key is the only
one there that is secret.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec

from bus.certificates import hosts_of, issue_to_server
from bus.natsconf import TlsFiles
from bus.pem import certificate_pem, key_pem
from bus.remembered import PRIVATE, PUBLIC, write_durably
from natstls.contexts import AUTHORITY
from schemas.errors import ErrorCode, ResplitError
from schemas.known import CLOCK_BEHIND_MAX

SERVER_CERTIFICATE, SERVER_KEY = "nats-server.pem", "nats-server.key"
LIFETIME = timedelta(days=730)
"""Twice what members are enrolled for unless told otherwise: whoever renews them thinks of it in time. Whoever has the
server's key can pass for the server until then."""
LOOPBACK = ("localhost", "127.0.0.1", "::1")
"""Which every certificate is for, beside what it is asked to be for."""
HOSTS_MAX = 100
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")


@dataclass(frozen=True)
class ServerCertificate:
    """What the certificate says."""

    hosts: tuple[str, ...]
    not_after: datetime


def server_files(folder: Path) -> TlsFiles:
    """Where a server whose files lie in `folder` finds what TLS takes: its own, and whose certificates it demands."""
    return TlsFiles(folder / SERVER_CERTIFICATE, folder / SERVER_KEY, folder / AUTHORITY)


def certify(
    folder: Path,
    hosts: Sequence[str],
    authority_key: ec.EllipticCurvePrivateKey,
    *,
    now: datetime,
    into: Path | None = None,
    names: Sequence[str] = (),
) -> ServerCertificate:
    """Make the server's key and certificate anew, for `hosts` and loopback, in the cluster's `folder`.

    Of one server among several they go `into` a folder of its own, are good for asking other servers too, and bear
    `names` besides, which are no hosts. Raises `ResplitError(INVALID_REQUEST)` for what is no host, and for the key of
    another authority than the folder's.
    """
    named = (*checked_hosts(hosts), *names)
    authority = _read(folder / AUTHORITY)
    if authority.public_key() != authority_key.public_key():
        message = f"this root-N.key is not of the cluster in {folder}; bring the file of one of its holders"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "root")
    key = ec.generate_private_key(ec.SECP256R1())
    until = min(now + LIFETIME, authority.not_valid_after_utc)
    begins, asks, there = now - CLOCK_BEHIND_MAX, into is not None, into or folder
    certificate = issue_to_server(named, key.public_key(), authority, authority_key, begins, until, asks=asks)
    write_durably(there / SERVER_KEY, key_pem(key), PRIVATE)
    write_durably(there / SERVER_CERTIFICATE, certificate_pem(certificate), PUBLIC)
    return ServerCertificate(hosts_of(certificate), certificate.not_valid_after_utc)


def read_server_certificate(folder: Path) -> ServerCertificate:
    """What the certificate in the cluster's `folder` says; raises `ResplitError` naming the file that is missing or
    bad."""
    certificate = _read(folder / SERVER_CERTIFICATE)
    return ServerCertificate(hosts_of(certificate), certificate.not_valid_after_utc)


def checked_hosts(hosts: Sequence[str]) -> tuple[str, ...]:
    """Loopback and `hosts`, each once; raises `ResplitError(INVALID_REQUEST)` for what is no host."""
    named = tuple(dict.fromkeys((*LOOPBACK, *(_checked(host) for host in hosts))))
    if len(named) > HOSTS_MAX:
        message = f"{len(named)} hosts are too many for one certificate; name {HOSTS_MAX} at most"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "host")
    return named


def is_host(host: str) -> bool:
    """Whether a certificate may be for it."""
    try:
        ip_address(host)
    except ValueError:
        return _NAME.fullmatch(host.lower()) is not None
    return True


def _checked(host: str) -> str:
    if is_host(host):
        return host.lower()
    message = f"{host!r} is neither the name of a host nor an address; give it without a port, as 10.0.0.2 or nats.lan"
    raise ResplitError(ErrorCode.INVALID_REQUEST, message, "host")


def _read(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except OSError as error:
        remedy = "name the folder of a cluster, or make it with `resplit certify --host`"
        message = f"cannot read {path}: {error.strerror}; {remedy}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, path.name) from error
    except ValueError as error:
        message = f"{path} is not a certificate; restore it from a copy"
        raise ResplitError(ErrorCode.CORRUPT_FILE, message, path.name) from error
