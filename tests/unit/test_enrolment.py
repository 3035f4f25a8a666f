"""A bundle is all that a member needs, nothing of it is believed unverified, and what was remembered stays so."""

import contextlib
import os
import resource
import ssl
import stat
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import nkeys
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from bus.certificates import issue, make_authority
from bus.enrolment import enrol, renew, revoke, rotate
from bus.folders import KNOWN, ROSTER, read_root
from bus.founding import ROOT_LIFETIME, ROSTER_LIFETIME, Holder, found_cluster, load_holder
from bus.identity import Identity, load_identity
from bus.joining import BUNDLE_BYTES_MAX, Bundle, join, pack, unpack, with_roster
from bus.remembered import recall, remember, write_durably
from schemas.base import DeploymentName, Digest, NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.known import Known, after_plan, after_roster, first_known
from schemas.roster import Policy, Roster, members_at, open_roster
from tests.kept_folders import content, refused

# Certificates are checked by the clock of the machine where a link is made, so this clock is it.
NOW = datetime.now(UTC)
DAY = timedelta(days=1)
N0, N1, LEADER = NodeId("n0"), NodeId("n1"), NodeId("leader")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    folder = tmp_path / "cluster"
    found_cluster(folder, now=NOW)
    return folder


def holders(folder: Path, *numbers: int) -> list[Holder]:
    return [load_holder(folder / f"root-{number}.key") for number in numbers or (0,)]


def enrolled(folder: Path, name: NodeId = N0, *, days: int = 30, now: datetime = NOW) -> bytes:
    return enrol(folder, name, "agent", "edge", days * DAY, holders(folder), now=now)


def newest(folder: Path) -> Roster:
    return open_roster(known_to(folder).root, (folder / ROSTER).read_bytes())


def known_to(folder: Path) -> Known:
    return read_root(folder)


# A cluster's folder


def test_a_cluster_is_founded_without_members_and_its_secrets_are_its_owners(cluster: Path) -> None:
    assert newest(cluster).members == ()
    public = ["ca.pem", "logins.conf", "nats-server.conf", "nats-server.pem", "root.1.signed", "roster.signed"]
    assert sorted(content(cluster)) == sorted([*public, "nats-server.key", "root-0.key"])
    assert stat.S_IMODE((cluster / "root-0.key").stat().st_mode) == 0o600
    assert stat.S_IMODE(cluster.stat().st_mode) == 0o700


def test_a_cluster_is_founded_once(cluster: Path) -> None:
    refused(ErrorCode.INVALID_REQUEST, "holds a cluster already", cluster, lambda: found_cluster(cluster, now=NOW))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ({"holders": 1, "threshold": 2}, "cannot come from"),
        ({"holders": 0}, "too_short|at least 1"),
        ({"holders": 3, "threshold": 0}, "greater than or equal to 1"),
        ({"holders": 3, "passphrases": ("a long enough passphrase",)}, "1 passphrases for 3 holders"),
        ({"passphrases": ("short",)}, "shorter than 16"),
    ],
)
def test_a_cluster_that_could_not_sign_is_not_founded(tmp_path: Path, arguments: dict[str, Any], why: str) -> None:
    folder = tmp_path / "new"
    refused(ErrorCode.INVALID_REQUEST, why, folder, lambda: found_cluster(folder, now=NOW, **arguments))
    assert not folder.exists()


def test_a_holder_s_file_opens_with_its_passphrase_only(tmp_path: Path) -> None:
    found_cluster(tmp_path, now=NOW, passphrases=("correct horse battery staple",))
    path = tmp_path / "root-0.key"
    assert b"ENCRYPTED" in path.read_bytes()
    assert load_holder(path, "correct horse battery staple").signing.public_key()
    for wrong in (None, "incorrect horse battery"):
        refused(ErrorCode.INVALID_REQUEST, "passphrase", tmp_path, partial(load_holder, path, wrong))


def test_a_holder_s_file_that_is_none_is_named(cluster: Path) -> None:
    with pytest.raises(ResplitError, match=r"nowhere\.key"):
        load_holder(cluster / "nowhere.key")
    with pytest.raises(ResplitError, match=r"ca\.pem") as caught:
        load_holder(cluster / "ca.pem")
    assert caught.value.code is ErrorCode.INVALID_REQUEST
    (cluster / "empty.key").write_bytes(b"")
    with pytest.raises(ResplitError, match=r"empty\.key") as caught:
        load_holder(cluster / "empty.key")
    assert caught.value.code is ErrorCode.CORRUPT_FILE


# Members


def test_a_member_that_joins_has_what_the_roster_says_and_nobody_else_can_read_it(
    cluster: Path, tmp_path: Path
) -> None:
    bundle = enrolled(cluster)
    joined = join(bundle, tmp_path / "n0", NOW)
    assert joined.roster == newest(cluster)
    assert members_at(joined.roster, "agent", NOW) == (joined.member,)
    assert (joined.member.name, joined.member.tier, joined.member.not_after) == (N0, "edge", NOW + 30 * DAY)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) & 0o077 for path in (tmp_path / "n0").iterdir()}
    public = {"ca.pem", "roster.signed", "n0.tls.pem"}
    private = {"known.json", "n0.key", "n0.sealing.key", "n0.nk", "n0.tls.key"}
    assert set(modes) == public | private
    assert {name for name in modes if modes[name]} <= public
    assert (
        recall(tmp_path / "n0" / KNOWN) == joined.known == after_roster(known_to(cluster), unpack(bundle).roster, NOW)
    )
    seed = (tmp_path / "n0" / "n0.nk").read_bytes()
    assert nkeys.from_seed(seed).public_key.decode() == joined.member.bus


def test_the_folder_of_a_cluster_never_holds_a_member_s_private_key(cluster: Path) -> None:
    keys = unpack(enrolled(cluster)).keys
    held = b"".join(content(cluster).values())
    assert not [name for name in type(keys).model_fields if getattr(keys, name) in held]
    assert repr(keys) == "PrivateKeys()"


def test_members_can_make_links_to_each_other(cluster: Path, tmp_path: Path) -> None:
    first, second = enrolled(cluster), enrolled(cluster, N1)
    newer = (cluster / ROSTER).read_bytes()  # the first bundle's roster does not name the second yet
    n0 = _identity(with_roster(first, newer), tmp_path / "n0", N0)
    assert _handshake(n0, _identity(second, tmp_path / "n1", N1)) == (N1, N0)


def test_a_link_is_refused_to_a_key_that_was_replaced_though_its_certificate_is_of_the_authority(
    cluster: Path, tmp_path: Path
) -> None:
    thief = _identity(enrolled(cluster), tmp_path / "thief", N0)
    rotate(cluster, N0, holders(cluster), now=NOW)
    second = _identity(enrolled(cluster, N1), tmp_path / "n1", N1)
    assert _handshake(second, thief)[0] is None


def test_who_is_enrolled_twice_or_not_at_all_is_named(cluster: Path) -> None:
    enrolled(cluster)
    refused(ErrorCode.INVALID_REQUEST, "'n0' is a member already", cluster, lambda: enrolled(cluster))
    refused(
        ErrorCode.UNKNOWN_NODE, "'n1' is not a member", cluster, lambda: revoke(cluster, N1, holders(cluster), now=NOW)
    )
    refused(
        ErrorCode.UNKNOWN_NODE, "its members are: n0", cluster, lambda: rotate(cluster, N1, holders(cluster), now=NOW)
    )


@pytest.mark.parametrize(
    ("name", "role", "tier", "lifetime", "why"),
    [
        ("n 0", "agent", "edge", DAY, "member: use lower-case letters"),
        ("", "agent", "edge", DAY, "member: use lower-case letters"),
        ("\u00e9", "agent", "edge", DAY, "member: use lower-case letters"),
        ("n0", "agent", None, DAY, "agents have a tier"),
        ("n0", "client", "edge", DAY, "agents have a tier"),
        ("n0", "agent", "edge", timedelta(0), "cannot be a member until"),
        ("n0", "agent", "edge", ROOT_LIFETIME + DAY, "the root is valid until"),
    ],
)
def test_a_member_that_could_not_be_is_not_enrolled(
    cluster: Path, name: Any, role: Any, tier: Any, lifetime: timedelta, why: str
) -> None:
    one = holders(cluster)
    refused(ErrorCode.INVALID_REQUEST, why, cluster, lambda: enrol(cluster, name, role, tier, lifetime, one, now=NOW))


def test_holders_of_another_root_enrol_nobody(cluster: Path, tmp_path: Path) -> None:
    found_cluster(tmp_path / "other", now=NOW)
    for roots in (holders(tmp_path / "other"), []):
        refused(
            ErrorCode.INVALID_REQUEST,
            "is not a holder of the root",
            cluster,
            partial(enrol, cluster, N0, "agent", "edge", DAY, roots, now=NOW),
        )


def test_revoked_is_who_is_not_in_the_newest_roster(cluster: Path) -> None:
    enrolled(cluster)
    enrolled(cluster, N1)
    assert revoke(cluster, N0, holders(cluster), now=NOW) == newest(cluster)
    assert [member.name for member in newest(cluster).members] == ["n1"]
    assert newest(cluster).version == 4


def test_rotation_replaces_every_key_for_as_long_as_before_and_voids_the_old_bundle(
    cluster: Path, tmp_path: Path
) -> None:
    folder, later = tmp_path / "n0", NOW + 10 * DAY
    first = enrolled(cluster)
    old = join(first, folder, NOW).member
    new = join(rotate(cluster, N0, holders(cluster), now=later), folder, later).member
    assert not set(old.keys) & set(new.keys)
    assert (new.name, new.role, new.tier, new.not_after) == (old.name, old.role, old.tier, later + 30 * DAY)
    again = join(rotate(cluster, N0, holders(cluster), now=later), folder, later).member
    assert again.not_after - again.not_before == new.not_after - new.not_before
    refused(ErrorCode.ROLLED_BACK, "was seen already", folder, lambda: join(first, folder, later))


def test_a_roster_is_renewed_though_it_has_expired_and_its_policy_changed(cluster: Path) -> None:
    enrolled(cluster)
    later, policy = NOW + 2 * ROSTER_LIFETIME, Policy(sensitive={"*": "ends"})
    renewed = renew(cluster, holders(cluster), now=later, policy=policy)
    assert renewed == newest(cluster)
    assert (renewed.version, renewed.policy, renewed.expires_at) == (3, policy, later + ROSTER_LIFETIME)
    assert [member.name for member in renewed.members] == ["n0"]
    assert renew(cluster, holders(cluster), now=later).policy == policy


# Joining


def test_joining_again_changes_nothing(cluster: Path, tmp_path: Path) -> None:
    bundle, folder = enrolled(cluster), tmp_path / "n0"
    first = join(bundle, folder, NOW)
    before = content(folder)
    assert join(bundle, folder, NOW) == first
    assert content(folder) == before


def test_joining_again_keeps_what_was_seen_of_plans(cluster: Path, tmp_path: Path) -> None:
    bundle, folder = enrolled(cluster), tmp_path / "n0"
    seen = after_plan(join(bundle, folder, NOW).known, DeploymentName("chat"), 1, 4, Digest("1" * 64))
    remember(folder / KNOWN, seen)
    assert join(bundle, folder, NOW).known == seen


def test_no_identity_is_overwritten_by_another(cluster: Path, tmp_path: Path) -> None:
    folder = tmp_path / "n0"
    join(enrolled(cluster), folder, NOW)
    second = enrolled(cluster, N1)
    refused(ErrorCode.INVALID_REQUEST, r"another identity \(n0.key\)", folder, lambda: join(second, folder, NOW))
    refused(ErrorCode.INVALID_REQUEST, "another identity", cluster, lambda: join(second, cluster, NOW))
    (cluster / "root-0.key").rename(tmp_path / "carried-away.key")
    refused(ErrorCode.INVALID_REQUEST, r"\(root\.1\.signed\)", cluster, lambda: join(second, cluster, NOW))
    (tmp_path / "carried-away.key").rename(cluster / "root-0.key")
    found_cluster(tmp_path / "other", now=NOW)
    namesake = enrolled(tmp_path / "other")
    refused(ErrorCode.INVALID_REQUEST, "belongs to cluster", folder, lambda: join(namesake, folder, NOW))


def test_a_bundle_out_of_its_time_is_refused(cluster: Path, tmp_path: Path) -> None:
    bundle, folder = enrolled(cluster, days=1), tmp_path / "n0"
    refused(ErrorCode.EXPIRED, "belonged until", folder, lambda: join(bundle, folder, NOW + DAY))
    refused(
        ErrorCode.EXPIRED, "roster of version 2 expired", folder, lambda: join(bundle, folder, NOW + ROSTER_LIFETIME)
    )
    refused(ErrorCode.INVALID_REQUEST, "set the clock", folder, lambda: join(bundle, folder, NOW - DAY))
    assert not folder.exists()


def test_a_bundle_of_a_member_that_was_revoked_since_is_refused(cluster: Path, tmp_path: Path) -> None:
    bundle, folder = enrolled(cluster), tmp_path / "n0"
    revoke(cluster, N0, holders(cluster), now=NOW)
    newer = with_roster(bundle, (cluster / ROSTER).read_bytes())
    refused(ErrorCode.CORRUPT_FILE, "its roster does not name 'n0'", folder, lambda: join(newer, folder, NOW))


def _other_authority(bundle: Bundle, cluster: Path) -> Bundle:
    key = ec.generate_private_key(ec.SECP256R1())
    authority = make_authority(newest(cluster).cluster, key, NOW - DAY, NOW + DAY)
    return bundle.model_copy(update={"authority": authority.public_bytes(serialization.Encoding.DER)})


def _certified(bundle: Bundle, name: NodeId, authority_key: ec.EllipticCurvePrivateKey) -> Bundle:
    """A certificate for the member's own key, by an authority of the right name."""
    link = serialization.load_der_private_key(bundle.keys.link, None)
    assert isinstance(link, ec.EllipticCurvePrivateKey)
    authority = make_authority(first_known(bundle.root).root.cluster, authority_key, NOW - DAY, NOW + DAY)
    certificate = issue(name, link.public_key(), authority, authority_key, NOW - DAY, NOW + DAY)
    return bundle.model_copy(update={"certificate": certificate.public_bytes(serialization.Encoding.DER)})


def _with_keys(bundle: Bundle, **keys: bytes) -> Bundle:
    return bundle.model_copy(update={"keys": bundle.keys.model_copy(update=keys)})


def _seed_misspelled(bundle: Bundle) -> Bundle:
    # The last characters of a seed are its checksum, which the library does not look at.
    seed = bundle.keys.bus
    return _with_keys(bundle, bus=seed[:-3] + (b"AAA" if seed[-3:] != b"AAA" else b"BBB"))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda own, other, _: own.model_copy(update={"keys": other.keys}), "TLS key is not that"),
        (lambda own, other, _: _with_keys(own, signing=other.keys.signing), "its signing key"),
        (lambda own, other, _: _with_keys(own, sealing=other.keys.sealing), "its sealing key"),
        (lambda own, other, _: _with_keys(own, bus=other.keys.bus), "its bus key"),
        (lambda own, _o, _: _with_keys(own, bus=b"SUAAA"), "not the seed of an NKey"),
        (lambda own, _o, _: _seed_misspelled(own), "its bus key"),
        (lambda own, _o, _: _with_keys(own, link=b"\0"), "cannot be read"),
        (lambda own, other, _: own.model_copy(update={"certificate": other.certificate}), "its TLS certificate is not"),
        (lambda own, other, _: own.model_copy(update={"name": N1}), "its TLS certificate is not"),
        (lambda own, _o, cluster: _other_authority(own, cluster), "its certificate authority"),
        (lambda own, _o, _: _certified(own, N0, ec.generate_private_key(ec.SECP256R1())), "were not issued by"),
        (lambda own, _o, cluster: _certified(own, N1, holders(cluster)[0].authority), "is not of 'n0'"),
        (lambda own, _o, _: own.model_copy(update={"authority": b"x"}), "cannot be read"),
    ],
)
def test_a_bundle_that_does_not_belong_together_is_refused(
    cluster: Path, tmp_path: Path, change: Callable[[Bundle, Bundle, Path], Bundle], why: str
) -> None:
    enrolled(cluster, N1)
    own = enrolled(cluster)
    other = rotate(cluster, N1, holders(cluster), now=NOW)
    changed = change(unpack(with_roster(own, (cluster / ROSTER).read_bytes())), unpack(other), cluster)
    folder = tmp_path / "joining"
    refused(ErrorCode.CORRUPT_FILE, why, folder, lambda: join(pack(changed), folder, NOW))


def test_what_is_no_bundle_is_refused_and_no_secret_shown(cluster: Path, tmp_path: Path) -> None:
    bundle = unpack(enrolled(cluster))
    long = pack(_with_keys(bundle, signing=bundle.keys.signing * 2))
    for data in (b"", b"{}", pack(bundle)[:-1], pack(bundle) + b"\0", b"\0" * (BUNDLE_BYTES_MAX + 1), long):
        with pytest.raises(ResplitError, match=r"the bundle cannot be used|this is no bundle") as caught:
            join(data, tmp_path / "n0", NOW)
        assert caught.value.code is ErrorCode.CORRUPT_FILE
        assert repr(bundle.keys.signing)[2:12] not in caught.value.message
    assert not (tmp_path / "n0").exists()


# What is remembered


def test_what_is_remembered_is_recalled_and_its_owner_s_alone(cluster: Path, tmp_path: Path) -> None:
    path = tmp_path / KNOWN
    assert recall(path) is None
    first = known_to(cluster)
    remember(path, first)
    assert recall(path) == first
    second = after_roster(first, (cluster / ROSTER).read_bytes(), NOW)
    remember(path, second)
    assert recall(path) == second
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in tmp_path.iterdir() if file != cluster] == [KNOWN]


def test_a_file_that_is_there_and_cannot_be_read_is_not_nothing(cluster: Path, tmp_path: Path) -> None:
    path = tmp_path / KNOWN
    remember(path, known_to(cluster))
    whole = path.read_bytes()
    flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(0, len(whole), 11)]
    for data in (b"", b"\n", whole[:-1], whole + b" ", whole[65:], *flipped):
        path.write_bytes(data)
        with pytest.raises(ResplitError, match=r"known\.json.*delete it and join again") as caught:
            recall(path)
        assert (caught.value.code, caught.value.field) == (ErrorCode.CORRUPT_FILE, KNOWN)
    path.unlink()
    path.mkdir()
    with pytest.raises(ResplitError, match=r"known\.json.*delete it and join again"):
        recall(path)


def test_a_disk_that_takes_nothing_leaves_what_was_remembered(cluster: Path, tmp_path: Path) -> None:
    path = tmp_path / "node" / KNOWN
    path.parent.mkdir()
    first = known_to(cluster)
    remember(path, first)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10, hard))  # the kernel ends every file after ten bytes
    try:
        with pytest.raises(ResplitError, match=r"cannot write .*known\.json") as caught:
            remember(path, after_roster(first, (cluster / ROSTER).read_bytes(), NOW))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.code is ErrorCode.INTERNAL
    assert recall(path) == first
    assert [file.name for file in path.parent.iterdir()] == [KNOWN]


def test_what_is_written_is_on_the_disk_before_it_has_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the system's calls is the guarantee; a loss of power cannot be had in a test."""
    calls: list[str] = []
    fsync, rename = os.fsync, Path.rename

    def synced(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        calls.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", renamed)
    write_durably(tmp_path / "file", b"content", 0o600)
    assert calls == ["file", "rename", "folder"]


def _identity(bundle: bytes, folder: Path, name: NodeId) -> Identity:
    join(bundle, folder, NOW)
    return load_identity(folder, name)


def _handshake(server: Identity, client: Identity) -> tuple[str | None, str | None]:
    """The peer's name as each of the two sees it, over a link in memory."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    serving = server.tls(ssl.Purpose.CLIENT_AUTH).wrap_bio(to_server, to_client, server_side=True)
    calling = client.tls(ssl.Purpose.SERVER_AUTH).wrap_bio(to_client, to_server)
    for _ in range(3):
        for side in (calling, serving):
            with contextlib.suppress(ssl.SSLWantReadError):
                side.do_handshake()
    return server.peer(serving.getpeercert(binary_form=True)), client.peer(calling.getpeercert(binary_form=True))
