"""The certificate of the NATS server: for whom it is, how long, and who can make it."""

import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from bus.certificates import hosts_of
from bus.enrolment import enrol
from bus.founding import ROOT_LIFETIME, found_cluster, load_holder
from bus.joining import unpack
from bus.server_certificate import (
    HOSTS_MAX,
    LIFETIME,
    LOOPBACK,
    SERVER_CERTIFICATE,
    SERVER_KEY,
    certify,
    is_host,
    read_server_certificate,
)
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

NOW = datetime(2026, 3, 1, tzinfo=UTC)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    found_cluster(tmp_path / "cluster", now=NOW, hosts=["10.0.0.2", "Nats.LAN", "127.0.0.1"])
    return tmp_path / "cluster"


def authority(cluster: Path) -> Any:
    return load_holder(cluster / "root-0.key").authority


def shown(cluster: Path) -> x509.Certificate:
    return x509.load_pem_x509_certificate((cluster / SERVER_CERTIFICATE).read_bytes())


def test_it_is_for_the_hosts_that_were_named_and_loopback_and_for_a_server_alone(cluster: Path) -> None:
    found, certificate = read_server_certificate(cluster), shown(cluster)
    assert set(found.hosts) == {*LOOPBACK, "10.0.0.2", "nats.lan"} and len(found.hosts) == len(LOOPBACK) + 2
    assert found.not_after == NOW + LIFETIME
    usage = certificate.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert stat.S_IMODE((cluster / SERVER_KEY).stat().st_mode) == 0o600


def test_one_made_anew_has_another_key_and_never_outlives_the_authority(cluster: Path) -> None:
    before = shown(cluster).public_key()
    late = NOW + ROOT_LIFETIME - timedelta(days=1)
    made = certify(cluster, ["10.0.0.3"], authority(cluster), now=late)
    assert made == read_server_certificate(cluster)
    assert set(made.hosts) == {*LOOPBACK, "10.0.0.3"} and made.not_after == NOW + ROOT_LIFETIME
    assert shown(cluster).public_key() != before


@pytest.mark.parametrize(
    "host",
    [
        "",
        "10.0.0.2:4222",
        "nats://10.0.0.2",
        "a b",
        "*.lan",
        "-a",
        "a..b",
        "a.",
        "ä.lan",
        "a" * 64,
        "10.0.0.0/8",
        "a\n",
    ],
)
def test_what_is_no_host_is_refused_and_changes_nothing(cluster: Path, tmp_path: Path, host: str) -> None:
    assert not is_host(host)
    before = (cluster / SERVER_CERTIFICATE).read_bytes()
    for step in (
        lambda: certify(cluster, [host], authority(cluster), now=NOW),
        lambda: found_cluster(tmp_path / "new", now=NOW, hosts=[host]),
    ):
        with pytest.raises(ResplitError, match="neither the name of a host nor an address") as refused:
            step()
        assert (refused.value.code, refused.value.field) == (ErrorCode.INVALID_REQUEST, "host")
    assert (cluster / SERVER_CERTIFICATE).read_bytes() == before
    assert not (tmp_path / "new").exists()


def test_too_many_hosts_are_refused(cluster: Path) -> None:
    with pytest.raises(ResplitError, match="too many"):
        certify(cluster, [f"h{i}" for i in range(HOSTS_MAX)], authority(cluster), now=NOW)


def test_the_key_of_another_authority_makes_none(cluster: Path, tmp_path: Path) -> None:
    found_cluster(tmp_path / "other", now=NOW)
    before = (cluster / SERVER_CERTIFICATE).read_bytes()
    with pytest.raises(ResplitError, match="not of the cluster") as refused:
        certify(cluster, [], authority(tmp_path / "other"), now=NOW)
    assert refused.value.field == "root"
    assert (cluster / SERVER_CERTIFICATE).read_bytes() == before


@pytest.mark.parametrize(("content", "code"), [(None, ErrorCode.INVALID_REQUEST), (b"x", ErrorCode.CORRUPT_FILE)])
def test_one_that_is_missing_or_bad_is_named(cluster: Path, content: bytes | None, code: ErrorCode) -> None:
    (cluster / SERVER_CERTIFICATE).unlink()
    if content is not None:
        (cluster / SERVER_CERTIFICATE).write_bytes(content)
    with pytest.raises(ResplitError, match=SERVER_CERTIFICATE) as refused:
        read_server_certificate(cluster)
    assert refused.value.code is code


def test_a_member_s_certificate_names_no_host(cluster: Path) -> None:
    roots = [load_holder(cluster / "root-0.key")]
    bundle = unpack(enrol(cluster, NodeId("localhost"), "agent", "edge", timedelta(days=1), roots, now=NOW))
    assert hosts_of(x509.load_der_x509_certificate(bundle.certificate)) == ("localhost.member.invalid",)
