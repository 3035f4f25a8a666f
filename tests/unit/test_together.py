"""A cluster whose members are all on one machine keeps itself in order."""

import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

from bus.enrolment import renew
from bus.folders import ROSTER
from bus.founding import load_holder
from bus.identity import ORCHESTRATOR, load_identity, read_roster
from bus.server_certificate import LIFETIME, SERVER_CERTIFICATE, certify
from bus.together import CLIENT, CLUSTER, OBSERVER, OPERATOR, add_member, make_members, renew_if_due
from schemas.base import NodeId

N0, N1 = NodeId("n0"), NodeId("n1")
HOST = "127.0.0.1"


def rosters(folder: Path) -> set[bytes]:
    return {(member / ROSTER).read_bytes() for member in folder.iterdir()}


def test_everybody_knows_everybody_and_who_is_trusted(tmp_path: Path) -> None:
    make_members(tmp_path, [N0, N1], edge=[N1])
    assert len(rosters(tmp_path)) == 1
    found = load_identity(tmp_path / N0, N0)
    assert {member.name: (member.role, member.tier) for member in found.roster.members} == {
        ORCHESTRATOR: ("orchestrator", None),
        OPERATOR: ("operator", None),
        CLIENT: ("client", None),
        OBSERVER: ("observer", None),
        N0: ("agent", "trusted"),
        N1: ("agent", "edge"),
    }


def test_a_member_that_was_enrolled_and_never_joined_joins_with_new_keys(tmp_path: Path) -> None:
    make_members(tmp_path, [N0])
    shutil.rmtree(tmp_path / N0)
    said = add_member(tmp_path, N0, "agent", "trusted")
    assert rosters(tmp_path) == {said}
    assert set(load_identity(tmp_path / N0, N0).agents) == {N0}


def test_the_servers_certificate_is_renewed_before_it_ends_and_for_another_host(tmp_path: Path) -> None:
    make_members(tmp_path, [], hosts=[HOST])
    cluster = tmp_path / CLUSTER
    authority = load_holder(cluster / "root-0.key").authority

    def renewed(host: str) -> bool:
        before = (cluster / SERVER_CERTIFICATE).read_bytes()
        renew_if_due(tmp_path, host)
        return (cluster / SERVER_CERTIFICATE).read_bytes() != before

    assert [renewed(HOST), renewed("localhost"), renewed("10.0.0.2"), renewed("10.0.0.2")] == [
        False,
        False,
        True,
        False,
    ]
    certify(cluster, [HOST], authority, now=datetime.now(UTC) - LIFETIME + timedelta(days=29))
    assert [renewed(HOST), renewed(HOST)] == [True, False]


def test_a_roster_is_renewed_before_it_expires_and_not_each_time(tmp_path: Path) -> None:
    make_members(tmp_path, [N0])
    before = read_roster(tmp_path / CLUSTER)
    renew_if_due(tmp_path, HOST)
    assert read_roster(tmp_path / CLUSTER) == before
    roots = [load_holder(tmp_path / CLUSTER / "root-0.key")]
    renew(tmp_path / CLUSTER, roots, now=datetime.now(UTC) - timedelta(days=65))
    renew_if_due(tmp_path, HOST)
    after = read_roster(tmp_path / CLUSTER)
    assert (after.version, after.members) == (before.version + 2, before.members)
    assert after.expires_at > datetime.now(UTC) + timedelta(days=80)
    assert len(rosters(tmp_path)) == 1
    assert load_identity(tmp_path / N0, N0).roster == after
