"""PURE: why TLS to a NATS server came to nothing, in a sentence, and what to do about it."""

import ssl

EXPIRED, NOT_YET, OTHER_NAME, OTHER_ADDRESS = 10, 9, 62, 64
"""OpenSSL's X509_V_ERR_*."""
NO_TLS = frozenset({"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"})
OLD_TLS = frozenset({"UNSUPPORTED_PROTOCOL", "TLSV1_ALERT_PROTOCOL_VERSION"})


def explained(error: BaseException) -> str | None:
    """What went wrong and the remedy, to stand behind a server's address; None for what is no matter of TLS."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return _of_certificate(error.verify_code, error.verify_message)
    if isinstance(error, ssl.SSLError):
        reason = error.reason or str(error)
        if reason in NO_TLS:
            return (
                "answers without TLS, or not from the first byte: start it with the nats-server.conf of "
                "`resplit init`, in whose tls block is `handshake_first: true`"
            )
        if reason in OLD_TLS:
            return "does not speak TLS 1.3: take a newer nats-server"
        if "ALERT" in reason:
            return (
                f"refuses this member's certificate ({reason.lower().replace('_', ' ')}): it is of another cluster, or "
                "its time is over; join with a bundle of this cluster (`resplit rotate`)"
            )
        return f"does not get through with TLS: {reason}"
    return None


def _of_certificate(code: int, said: str) -> str:
    if code in (EXPIRED, NOT_YET):
        return (
            f"has a certificate that does not hold by the clock here ({said}): renew it with `resplit certify`, carry "
            "it to the server and reload it; or set the clock"
        )
    if code in (OTHER_NAME, OTHER_ADDRESS):
        return (
            f"has a certificate for other hosts ({said}): reach it by one of those, or name this one with "
            "`resplit certify --host`"
        )
    return (
        f"has a certificate that the authority in the member's folder did not sign ({said}): it is the server of "
        "another cluster, or not a server of yours; if its certificate comes from others, `resplit join "
        "--server-authority` says from whom"
    )
