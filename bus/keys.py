"""Who a process is and whom it trusts: Ed25519 keys for events, TLS certificates for links.

A key folder holds `trust.json` (public keys by name, and who orchestrates), `ca.pem`, and, for each name
whose process runs on this machine, `<name>.key` (Ed25519), `<name>.tls.pem` and `<name>.tls.key`. Private
files are readable by their owner alone. (Enrolment, rotation and revocation are later work: this folder is
made in one go for a cluster and copied, without the other nodes' private files, to each node.)
"""

import base64
import ssl
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import IPv4Address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from pydantic import ValidationError

from schemas.base import NodeId, NodeName, Value
from schemas.codec import decode
from schemas.errors import ErrorCode, ResplitError

ORCHESTRATOR = NodeId("orchestrator")
LIFETIME = timedelta(days=3650)


class TrustFile(Value):
    """`trust.json`: raw Ed25519 public keys, base64, by name."""

    orchestrator: NodeName
    keys: dict[NodeName, str]


@dataclass(frozen=True)
class Identity:
    """One process's name, its signing key, and the public keys it believes."""

    name: NodeId
    key: Ed25519PrivateKey
    orchestrators: Mapping[NodeId, Ed25519PublicKey]
    """Whose plans are obeyed."""
    nodes: Mapping[NodeId, Ed25519PublicKey]
    """Whose capacity, receipts and audit events are believed."""
    folder: Path

    def tls(self, purpose: ssl.Purpose) -> ssl.SSLContext:
        """A TLS 1.3 context that shows this identity and demands one of the same authority from the peer."""
        context = ssl.SSLContext(
            ssl.PROTOCOL_TLS_SERVER if purpose is ssl.Purpose.CLIENT_AUTH else ssl.PROTOCOL_TLS_CLIENT
        )
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.check_hostname = False  # the peer's *name* is checked against its certificate, not its address
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(self.folder / "ca.pem")
        context.load_cert_chain(self.folder / f"{self.name}.tls.pem", self.folder / f"{self.name}.tls.key")
        return context


def peer_name(certificate: Mapping[str, object] | None) -> str | None:
    """The common name in a verified peer certificate, as `ssl` describes it."""
    subject = (certificate or {}).get("subject", ())
    assert isinstance(subject, tuple)
    return next((value for part in subject for name, value in part if name == "commonName"), None)


def load_identity(folder: Path, name: NodeId) -> Identity:
    """Read the identity `name` from a key folder; raises `ResplitError` naming the file that is missing or bad."""
    trust = decode(TrustFile, _read(folder / "trust.json"), "trust.json")
    try:
        key = serialization.load_pem_private_key(_read(folder / f"{name}.key"), password=None)
    except ValueError as error:
        raise ResplitError(ErrorCode.CORRUPT_FILE, f"{folder / f'{name}.key'} is not a private key") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ResplitError(ErrorCode.CORRUPT_FILE, f"{folder / f'{name}.key'} is not an Ed25519 key")
    public = {node: Ed25519PublicKey.from_public_bytes(base64.b64decode(text)) for node, text in trust.keys.items()}
    leader = {node: k for node, k in public.items() if node == trust.orchestrator}
    return Identity(name, key, leader, public, folder)


def create_keys(folder: Path, nodes: Iterable[NodeId]) -> None:
    """Make a certificate authority and an identity for each of `nodes` and for the orchestrator."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    authority_key = ec.generate_private_key(ec.SECP256R1())
    authority = _certificate(NodeId("resplit-ca"), authority_key.public_key(), None, authority_key)
    _write(folder / "ca.pem", authority.public_bytes(serialization.Encoding.PEM))
    public: dict[NodeId, str] = {}
    for name in (ORCHESTRATOR, *nodes):
        if name in public:
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"two identities are called {name!r}", "nodes")
        signing = Ed25519PrivateKey.generate()
        public[name] = base64.b64encode(signing.public_key().public_bytes_raw()).decode()
        _write(folder / f"{name}.key", _pem(signing), private=True)
        link_key = ec.generate_private_key(ec.SECP256R1())
        certificate = _certificate(name, link_key.public_key(), authority, authority_key)
        _write(folder / f"{name}.tls.pem", certificate.public_bytes(serialization.Encoding.PEM))
        _write(folder / f"{name}.tls.key", _pem(link_key), private=True)
    try:
        trust = TrustFile(orchestrator=ORCHESTRATOR, keys=public)
    except ValidationError as error:
        raise ResplitError.from_validation(error, "node names") from error
    _write(folder / "trust.json", trust.model_dump_json(indent=2).encode())


def _certificate(
    name: NodeId,
    key: ec.EllipticCurvePublicKey,
    issuer: x509.Certificate | None,
    issuer_key: ec.EllipticCurvePrivateKey,
) -> x509.Certificate:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(hours=1))
        .not_valid_after(now + LIFETIME)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), True)
    )
    if issuer is not None:
        names = [x509.DNSName(name), x509.DNSName("localhost"), x509.IPAddress(IPv4Address("127.0.0.1"))]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), False)
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), False)
    return builder.sign(issuer_key, hashes.SHA256())


def _pem(key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return key.private_bytes(encoding, form, serialization.NoEncryption())


def _write(path: Path, data: bytes, *, private: bool = False) -> None:
    path.touch(mode=0o600 if private else 0o644)
    path.write_bytes(data)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; make a key folder with `resplit keys`"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, path.name) from error
