"""Whom a process believes is what the newest roster says that it was shown, also after a crash and while it runs."""

import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from bus.certificates import issue
from bus.enrolment import enrol, renew, revoke, rotate
from bus.folders import KNOWN, ROSTER
from bus.founding import ROSTER_LIFETIME, Holder, found_cluster, load_holder
from bus.identity import Identity, load_credentials, load_identity, read_roster
from bus.joining import join
from bus.remembered import recall
from natstls.contexts import AUTHORITY
from schemas.base import DeploymentName, Digest, NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.known import PlanSeen
from schemas.roster import Role, TrustTier

NOW = datetime.now(UTC)
DAY = timedelta(days=1)
N0, N1, LEADER, PERSON = NodeId("n0"), NodeId("n1"), NodeId("leader"), NodeId("person")
CHAT = DeploymentName("chat")
EVENT, OTHER = Digest("1" * 64), Digest("2" * 64)


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    """One orchestrator, one person, for ten days n1, and n0, whose roster names them all."""
    folder = tmp_path / "cluster"
    found_cluster(folder, now=NOW)
    joined(folder, LEADER, "orchestrator")
    joined(folder, PERSON, "client")
    joined(folder, N1, "agent", 10)
    joined(folder, N0, "agent")
    return folder


def joined(cluster: Path, name: NodeId, role: Role, days: int = 30) -> None:
    tier: TrustTier | None = "edge" if role == "agent" else None
    join(enrol(cluster, name, role, tier, days * DAY, roots(cluster), now=NOW), cluster.parent / name, NOW)


def roots(cluster: Path) -> list[Holder]:
    return [load_holder(cluster / "root-0.key")]


def newest(cluster: Path) -> bytes:
    return (cluster / ROSTER).read_bytes()


def n0_of(cluster: Path, now: Callable[[], datetime] = lambda: NOW) -> Identity:
    return load_identity(cluster.parent / N0, N0, now)


def names(identity: Identity) -> tuple[list[NodeId], list[NodeId], list[NodeId]]:
    """(agents, orchestrators, writers), each sorted."""
    return sorted(identity.agents), sorted(identity.orchestrators), sorted(identity.writers)


def rolled_back(field: str) -> "pytest.RaisesExc[ResplitError]":
    return pytest.RaisesExc(
        ResplitError, check=lambda error: (error.code, error.field) == (ErrorCode.ROLLED_BACK, field)
    )


def certificate(folder: Path, name: NodeId) -> bytes:
    return ssl.PEM_cert_to_DER_cert((folder / f"{name}.tls.pem").read_text())


def test_each_is_believed_in_its_role_by_the_key_of_the_roster(cluster: Path) -> None:
    n0 = n0_of(cluster)
    assert names(n0) == ([N0, N1], [LEADER], [LEADER, N0, N1])
    assert n0.agents[N0] == n0.key.public_key()
    member = n0.member(PERSON)
    assert member is not None and member.role == "client"
    assert n0.root.cluster == n0.roster.cluster


async def test_a_newer_roster_counts_at_once_and_after_a_restart(cluster: Path) -> None:
    n0 = n0_of(cluster)
    assert names(n0)[0] == [N0, N1]
    revoke(cluster, N1, roots(cluster), now=NOW)
    assert await n0.take_roster(newest(cluster))
    for one in (n0, n0_of(cluster)):
        assert names(one) == ([N0], [LEADER], [LEADER, N0])
        assert one.member(N1) is None
    assert read_roster(n0.folder) == n0.roster


async def test_the_same_roster_twice_is_no_news(cluster: Path) -> None:
    n0 = n0_of(cluster)
    assert not await n0.take_roster(newest(cluster))
    renew(cluster, roots(cluster), now=NOW)
    assert [await n0.take_roster(newest(cluster)) for _ in range(2)] == [True, False]


async def test_an_older_roster_is_rolled_back_whether_it_is_heard_or_put_into_the_folder(cluster: Path) -> None:
    old = newest(cluster)
    n0 = n0_of(cluster)
    revoke(cluster, N1, roots(cluster), now=NOW)
    await n0.take_roster(newest(cluster))
    with rolled_back("version"):
        await n0.take_roster(old)
    assert (n0.folder / ROSTER).read_bytes() == newest(cluster)
    assert names(n0)[0] == [N0]
    (n0.folder / ROSTER).write_bytes(old)
    with rolled_back("version"):
        n0_of(cluster)


async def test_a_crash_between_the_two_files_of_a_roster_leaves_the_newer_one_in_force(cluster: Path) -> None:
    n0 = n0_of(cluster)
    before = (n0.folder / KNOWN).read_bytes()
    old = newest(cluster)
    revoke(cluster, N1, roots(cluster), now=NOW)
    await n0.take_roster(newest(cluster))
    (n0.folder / KNOWN).write_bytes(before)
    again = n0_of(cluster)
    assert names(again)[0] == [N0]
    known = recall(n0.folder / KNOWN)
    assert known is not None and known.roster is not None and known.roster.version == again.roster.version
    (n0.folder / ROSTER).write_bytes(old)
    with rolled_back("version"):
        n0_of(cluster)


async def test_a_roster_that_the_disk_does_not_take_does_not_count(cluster: Path) -> None:
    n0 = n0_of(cluster)
    revoke(cluster, N1, roots(cluster), now=NOW)
    (n0.folder / KNOWN).unlink()
    (n0.folder / KNOWN).mkdir()  # nothing can be renamed over it
    with pytest.raises(ResplitError, match="cannot write") as caught:
        await n0.take_roster(newest(cluster))
    assert caught.value.code is ErrorCode.INTERNAL
    assert names(n0)[0] == [N0, N1]


async def test_what_other_people_signed_is_not_taken(cluster: Path, tmp_path: Path) -> None:
    n0 = n0_of(cluster)
    found_cluster(tmp_path / "other", now=NOW)
    renew(tmp_path / "other", roots(tmp_path / "other"), now=NOW)
    mutated = bytearray(newest(cluster))
    mutated[len(mutated) // 2] ^= 1
    for data in (newest(tmp_path / "other"), bytes(mutated), b""):
        with pytest.raises(ResplitError) as caught:
            await n0.take_roster(data)
        assert caught.value.code is ErrorCode.BAD_SIGNATURE
    assert (n0.folder / ROSTER).read_bytes() == newest(cluster)


def test_members_are_believed_in_their_time_and_what_they_wrote_in_it_for_good(cluster: Path) -> None:
    clock = [NOW]
    n0 = n0_of(cluster, lambda: clock[0])
    shown = certificate(cluster.parent / N1, N1)
    assert (names(n0)[0], n0.peer(shown)) == ([N0, N1], N1)
    clock[0] = NOW + 10 * DAY
    assert names(n0) == ([N0], [LEADER], [LEADER, N0, N1])
    assert (n0.member(N1), n0.peer(shown)) == (None, None)
    clock[0] = NOW + 30 * DAY
    assert names(n0) == ([], [], [LEADER, N0, N1])
    clock[0] = NOW - DAY
    assert n0.member(N0) is None, "nor before it"


def test_an_expired_roster_is_stale_and_still_the_newest_there_is(cluster: Path) -> None:
    clock = [NOW]
    n0 = n0_of(cluster, lambda: clock[0])
    assert not n0.is_stale()
    clock[0] = n0.roster.expires_at
    assert n0.is_stale()
    late = n0_of(cluster, lambda: NOW + 2 * ROSTER_LIFETIME)
    assert (late.is_stale(), late.roster) == (True, n0.roster)


async def test_a_peer_is_an_agent_by_the_key_that_the_roster_names(cluster: Path) -> None:
    n0 = n0_of(cluster)
    old = certificate(cluster.parent / N1, N1)
    assert n0.peer(old) == N1
    assert n0.peer(certificate(cluster.parent / LEADER, LEADER)) is None, "an orchestrator makes no links"
    unheard_of = old.replace(b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x03", 1)  # the version of X.509 in it
    strange = (None, b"", b"\x30\x03\x02\x01\x01", old[:-9], unheard_of)
    assert [n0.peer(data) for data in strange] == [None] * 5
    join(rotate(cluster, N1, roots(cluster), now=NOW), cluster.parent / N1, NOW)
    new = certificate(cluster.parent / N1, N1)
    assert (n0.peer(old), n0.peer(new)) == (N1, None), "until it has heard"
    await n0.take_roster(newest(cluster))
    assert (n0.peer(old), n0.peer(new)) == (None, N1)


def test_a_certificate_of_the_authority_for_another_key_is_nobody_s(cluster: Path) -> None:
    """Whoever stole the authority's key alone can name anybody, and is let in as nobody."""
    authority = x509.load_pem_x509_certificate((cluster / AUTHORITY).read_bytes())
    stolen, own = roots(cluster)[0].authority, ec.generate_private_key(ec.SECP256R1()).public_key()
    for name in (N1, NodeId("n7")):
        issued = issue(name, own, authority, stolen, NOW - DAY, NOW + DAY)
        assert n0_of(cluster).peer(issued.public_bytes(serialization.Encoding.DER)) is None
    shown = x509.load_der_x509_certificate(certificate(cluster.parent / N1, N1)).public_key()
    assert isinstance(shown, ec.EllipticCurvePublicKey)
    renamed = issue(N0, shown, authority, stolen, NOW - DAY, NOW + DAY)
    assert n0_of(cluster).peer(renamed.public_bytes(serialization.Encoding.DER)) is None, "n1's key in n0's name"


async def test_the_newest_plan_event_is_remembered_over_a_restart(cluster: Path) -> None:
    await n0_of(cluster).take_plan(CHAT, 2, 7, EVENT)
    again = n0_of(cluster)
    for term, revision, event, field in (
        (1, 9, OTHER, "term"),
        (2, 6, OTHER, "revision"),
        (2, 7, OTHER, "digest"),
    ):
        with rolled_back(field):
            await again.take_plan(CHAT, term, revision, event)
    await again.take_plan(CHAT, 2, 7, EVENT)
    await again.take_plan(CHAT, 3, 1, OTHER)
    known = recall(again.folder / KNOWN)
    assert known is not None and known.plans == {CHAT: PlanSeen(term=3, revision=1, digest=OTHER)}


async def test_a_roster_and_a_plan_forget_nothing_of_each_other(cluster: Path) -> None:
    n0 = n0_of(cluster)
    await n0.take_plan(CHAT, 1, 1, EVENT)
    revoke(cluster, N1, roots(cluster), now=NOW)
    await n0.take_roster(newest(cluster))
    again = n0_of(cluster)
    assert names(again)[0] == [N0]
    with rolled_back("digest"):
        await again.take_plan(CHAT, 1, 1, OTHER)


@pytest.mark.parametrize("file", [KNOWN, ROSTER, "n0.key"])
def test_a_file_that_is_not_there_is_named_with_how_to_get_it(cluster: Path, file: str) -> None:
    folder = cluster.parent / N0
    (folder / file).unlink()
    with pytest.raises(ResplitError, match=rf"{file}.*resplit join") as caught:
        load_identity(folder, N0)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, file)


@pytest.mark.parametrize("content", [b"", b"not a key\n", None])
def test_a_key_that_is_none_is_named(cluster: Path, content: bytes | None) -> None:
    folder = cluster.parent / N0
    other = (folder / "n0.sealing.key").read_bytes()
    (folder / "n0.key").write_bytes(other if content is None else content)
    with pytest.raises(ResplitError, match=r"n0\.key is not") as caught:
        load_identity(folder, N0)
    assert caught.value.code is ErrorCode.CORRUPT_FILE


def test_a_member_logs_in_with_what_is_in_its_folder_and_as_what_the_roster_says(cluster: Path) -> None:
    who = load_credentials(cluster.parent / PERSON)
    member = read_roster(cluster).member(PERSON)
    assert member is not None
    assert (who.name, who.role, who.login.nkey) == (PERSON, "client", member.bus)


def test_a_folder_without_one_login_or_of_who_was_revoked_is_refused(cluster: Path) -> None:
    for folder in (cluster, cluster.parent / "nowhere"):
        with pytest.raises(ResplitError, match="holds no login") as caught:
            load_credentials(folder)
        assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "keys")
    (cluster.parent / N0 / "other.nk").write_text("SU")
    with pytest.raises(ResplitError, match="holds 2 logins"):
        load_credentials(cluster.parent / N0)
    revoke(cluster, PERSON, roots(cluster), now=NOW)
    (cluster.parent / PERSON / ROSTER).write_bytes(newest(cluster))
    with pytest.raises(ResplitError, match="does not name 'person' any more") as caught:
        load_credentials(cluster.parent / PERSON)
    assert caught.value.code is ErrorCode.FORBIDDEN


def test_a_trail_is_verified_with_the_folder_of_a_member_or_of_the_cluster(cluster: Path) -> None:
    read = [read_roster(folder) for folder in (cluster, cluster.parent / N0)]
    assert read[0] == read[1] == n0_of(cluster).roster
    assert all(isinstance(key, Ed25519PublicKey) for key in n0_of(cluster).writers.values())
    with pytest.raises(ResplitError, match=r"root\.1\.signed"):
        read_roster(cluster.parent)
