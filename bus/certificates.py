"""PURE: TLS certificates of one cluster: its authority, and what that issues to members and to the NATS server.

A member's certificate says which name a key goes by. Whether its holder belongs to the cluster the roster says, which
names the key's fingerprint: the authority's key alone makes no member. The server's certificate names hosts, and no
member's does: none of them can pass for the server.
"""

from collections.abc import Sequence
from datetime import datetime
from hashlib import sha256
from ipaddress import ip_address

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from schemas.base import Digest, NodeId
from schemas.roster import ClusterId

NO_HOST = "member.invalid"
"""What the names in members' certificates end with. No host can have such a name (RFC 6761)."""
SERVER_NAME = "nats-server"
UNREADABLE = (ValueError, TypeError, UnsupportedAlgorithm, x509.InvalidVersion)
"""What `cryptography` raises on a certificate or key that it cannot read, some of it only when it is asked for a part.
"""


def make_authority(
    cluster: ClusterId, key: ec.EllipticCurvePrivateKey, not_before: datetime, not_after: datetime
) -> x509.Certificate:
    """The certificate that members' links trust, signed by its own key."""
    name = _named(f"resplit {cluster}")
    return (
        _builder(name, name, key.public_key(), key.public_key(), not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )


def issue(
    name: NodeId,
    key: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.Certificate:
    """A certificate by which `key` is the member `name`: to its peers, of whom it is server and client, and to the NATS
    server."""
    # Whoever looks for a host finds one that cannot be, and does not fall back on the common name.
    names = [x509.DNSName(f"{name}.{NO_HOST}")]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    return _leaf(name, names, usages, key, authority, authority_key, not_before, not_after)


def issue_to_server(
    hosts: Sequence[str],
    key: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    not_before: datetime,
    not_after: datetime,
    *,
    asks: bool = False,
) -> x509.Certificate:
    """A certificate by which `key` is the NATS server at `hosts`: names, and addresses of either kind. `asks`: it is a
    client too, of other servers."""
    names = [_general_name(host) for host in hosts]
    usages = [ExtendedKeyUsageOID.SERVER_AUTH, *([ExtendedKeyUsageOID.CLIENT_AUTH] if asks else [])]
    return _leaf(SERVER_NAME, names, usages, key, authority, authority_key, not_before, not_after)


def hosts_of(certificate: x509.Certificate) -> tuple[str, ...]:
    """The names and addresses that it is for."""
    try:
        named = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    names, addresses = named.get_values_for_type(x509.DNSName), named.get_values_for_type(x509.IPAddress)
    return (*names, *map(str, addresses))


def fingerprint(key: CertificatePublicKeyTypes) -> Digest:
    """SHA-256 of a key as SubjectPublicKeyInfo: it stays the same where the key gets a new certificate."""
    encoding, form = serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    return Digest(sha256(key.public_bytes(encoding, form)).hexdigest())


def common_names(certificate: x509.Certificate) -> list[str]:
    """The names that it says its key goes by."""
    return [str(named.value) for named in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]


def _leaf(
    subject: str,
    names: Sequence[x509.GeneralName],
    usages: Sequence[x509.ObjectIdentifier],
    key: ec.EllipticCurvePublicKey,
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.Certificate:
    return (
        _builder(_named(subject), authority.subject, key, authority_key.public_key(), not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .sign(authority_key, hashes.SHA256())
    )


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey,
    issuer_key: ec.EllipticCurvePublicKey,
    not_before: datetime,
    not_after: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key), critical=False)
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )
