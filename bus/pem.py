"""PURE: keys and certificates as the text that stands in files."""

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

PrivateKey = Ed25519PrivateKey | X25519PrivateKey | ec.EllipticCurvePrivateKey


def key_pem(key: PrivateKey, passphrase: str | None = None) -> bytes:
    """A private key in PKCS #8, encrypted where there is a passphrase."""
    lock: serialization.KeySerializationEncryption = serialization.NoEncryption()
    if passphrase is not None:
        lock = serialization.BestAvailableEncryption(passphrase.encode())
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, lock)


def certificate_pem(certificate: x509.Certificate) -> bytes:
    """A certificate."""
    return certificate.public_bytes(serialization.Encoding.PEM)
