"""What a member shows and whom it believes: version 1.3, and the authorities that its folder names, not the system's.

The folder holds `ca.pem`, the cluster's authority, and the member's own `NAME.tls.pem` and `NAME.tls.key`. Where the
NATS server has its certificate from others, `server-ca.pem` says from whom, and counts for that server alone.
"""

import ssl
from pathlib import Path

AUTHORITY, SERVER_AUTHORITY = "ca.pem", "server-ca.pem"


def member_certificate(name: str) -> tuple[str, str]:
    """The files of a member's certificate and of its key."""
    return f"{name}.tls.pem", f"{name}.tls.key"


def link_context(folder: Path, name: str, purpose: ssl.Purpose) -> ssl.SSLContext:
    """For a link between members, from either side. Who the peer is its certificate says, and not its address.

    Raises ValueError, in a sentence with the remedy, where a file is missing or bad.
    """
    protocol = ssl.PROTOCOL_TLS_SERVER if purpose is ssl.Purpose.CLIENT_AUTH else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(protocol)
    context.check_hostname = False
    return _filled(context, folder, name, AUTHORITY)


def server_context(folder: Path, name: str) -> ssl.SSLContext:
    """For a connection to the NATS server, whose certificate is for the host in the URL. Raises as `link_context`."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.hostname_checks_common_name = False
    return _filled(context, folder, name, SERVER_AUTHORITY if (folder / SERVER_AUTHORITY).exists() else AUTHORITY)


def _filled(context: ssl.SSLContext, folder: Path, name: str, authority: str) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    certificate, key = member_certificate(name)
    try:
        context.load_verify_locations(folder / authority)
        context.load_cert_chain(folder / certificate, folder / key)
    except OSError as error:  # which those of OpenSSL are, too
        why = "is not PEM, or they do not belong together" if isinstance(error, ssl.SSLError) else error.strerror
        message = (
            f"{folder / authority}, {certificate} or {key}: {why}; `resplit join BUNDLE --keys {folder}` makes a "
            f"member's folder"
        )
        raise ValueError(message) from error
    return context
