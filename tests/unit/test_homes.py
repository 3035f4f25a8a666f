"""Homes: who steers what follows from names and from the roster alone, and each home's past is its own."""

import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from typer.testing import CliRunner

from bus.cluster_folder import write_logins
from bus.credentials import logins_of
from bus.enrolment import enrol, revoke, rotate
from bus.founding import load_holder
from bus.identity import ORCHESTRATOR, Identity, load_identity, orchestrator_of
from bus.natsconf import logins_conf
from bus.servers import make_leaf
from bus.together import CLUSTER, OPERATOR, add_member, make_members
from resplit.cli import app
from schemas import subjects
from schemas.base import DeploymentId, DeploymentName, Digest, Home, NodeId, SiteId, home_of
from schemas.beacon import Beacon
from schemas.codec import encode
from schemas.errors import ErrorCode, ResplitError
from schemas.known import PlanSeen, RosterSeen

KITCHEN, ATTIC = SiteId("kitchen"), SiteId("attic")
N0, K0 = NodeId("n0"), NodeId("k0")
COOK = orchestrator_of(KITCHEN)
HUBS, SITES = DeploymentName("chat"), DeploymentName("kitchen/chat")
DIGEST = Digest("a" * 64)
NOW = datetime.now(UTC)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A cluster with the home `kitchen`, whose agent is k0, beside the hub with n0."""
    make_members(tmp_path, [N0])
    add_member(tmp_path, COOK, "orchestrator", None, KITCHEN)
    add_member(tmp_path, K0, "agent", "trusted", KITCHEN)
    return tmp_path


@pytest.fixture
def n0(keys: Path) -> Identity:
    return load_identity(keys / N0, N0)


def beacon(term: int, number: int, *plans: DeploymentName) -> Beacon:
    seen = PlanSeen(term=1, revision=1, digest=DIGEST)
    return Beacon(
        term=term,
        number=number,
        issued_at=NOW,
        roster=RosterSeen(version=1, digest=DIGEST),
        plans=dict.fromkeys(plans, seen),
    )


def test_a_name_says_where_a_deployment_is_at_home() -> None:
    assert (home_of(HUBS), home_of(SITES)) == (None, KITCHEN)
    read = TypeAdapter[str](DeploymentId).validate_python
    assert read(SITES) == SITES
    for bad in ("/chat", "kitchen/", "kitchen/a/b", "kitchen//a", "Kitchen/a", "kitchen/a.b", "kitchen/*"):
        with pytest.raises(ValueError, match="pattern"):
            read(bad)


def test_the_subjects_of_a_site_stand_under_its_name_and_those_of_the_hub_as_ever() -> None:
    plan = subjects.plan(SITES)
    assert subjects.at_edge(None, plan) == plan == "resplit.v1.plan.kitchen/chat"
    assert subjects.at_edge(KITCHEN, plan) == "resplit.v1.site.kitchen.plan.kitchen/chat"


def test_each_home_is_steered_by_its_own_alone(n0: Identity) -> None:
    assert n0.roster.homes == (None, KITCHEN)
    assert set(n0.steering(None)) == {ORCHESTRATOR} and set(n0.steering(KITCHEN)) == {COOK}
    assert not n0.steering(ATTIC)
    said: list[tuple[NodeId, DeploymentName, Home]] = [(ORCHESTRATOR, HUBS, None), (COOK, SITES, KITCHEN)]
    for signer, deployment, home in said:
        n0.check_steers(signer, deployment, home)
    wrong: list[tuple[NodeId, DeploymentName, Home]] = [
        (COOK, HUBS, KITCHEN),
        (COOK, HUBS, None),
        (COOK, SITES, None),
        (ORCHESTRATOR, SITES, None),
        (ORCHESTRATOR, SITES, KITCHEN),
        (COOK, DeploymentName("attic/chat"), KITCHEN),
    ]
    for signer, deployment, home in wrong:
        with pytest.raises(ResplitError, match="steers the deployments of") as refused:
            n0.check_steers(signer, deployment, home)
        assert (refused.value.code, refused.value.field) == (ErrorCode.FORBIDDEN, "deployment")


async def test_the_terms_and_beacons_of_homes_do_not_hold_each_other_back(n0: Identity) -> None:
    await n0.take_plan(HUBS, 900, 1, DIGEST)
    await n0.take_beacon(beacon(900, 7, HUBS))
    await n0.take_beacon(beacon(1, 1, SITES), KITCHEN)
    await n0.take_plan(SITES, 1, 1, DIGEST)
    await n0.take_beacon(beacon(1, 2, SITES), KITCHEN)
    for old, home in ((beacon(1, 2), KITCHEN), (beacon(900, 7), None)):
        with pytest.raises(ResplitError) as refused:
            await n0.take_beacon(old, home)
        assert refused.value.code is ErrorCode.ROLLED_BACK
    for strange, home in ((beacon(2, 1, HUBS), KITCHEN), (beacon(901, 1, SITES), None)):
        with pytest.raises(ResplitError, match="which is at home at") as refused:
            await n0.take_beacon(strange, home)
        assert refused.value.code is ErrorCode.FORBIDDEN
    again = load_identity(n0.folder, N0)
    assert again.known.steering(KITCHEN).beacon is not None, "over a restart too"


async def test_new_orchestrators_of_a_home_void_what_was_seen_of_it_and_of_no_other(keys: Path, n0: Identity) -> None:
    for name, home in ((HUBS, None), (SITES, KITCHEN)):
        await n0.take_plan(name, 5, 1, DIGEST)
        await n0.take_beacon(beacon(5, 1, name), home)
    cluster = keys / CLUSTER
    root = [load_holder(cluster / "root-0.key")]
    rotate(cluster, COOK, root, now=NOW)
    assert await n0.take_roster((cluster / "roster.signed").read_bytes())
    assert set(n0.known.plans) == {HUBS}
    assert n0.known.beacon is not None and n0.known.steering(KITCHEN).beacon is None
    assert n0.roster.homes == (None, KITCHEN), "a rotated orchestrator stays at home where it was"
    await n0.take_plan(SITES, 1, 1, DIGEST)
    revoke(cluster, COOK, root, now=NOW)
    assert await n0.take_roster((cluster / "roster.signed").read_bytes())
    assert n0.known.plans.keys() == {HUBS, SITES}, "nobody has taken its place yet"
    assert len(n0.roster.homes) == 1


def test_without_sites_all_that_is_signed_and_kept_is_as_it_was(tmp_path: Path) -> None:
    make_members(tmp_path, [N0])
    identity = load_identity(tmp_path / N0, N0)
    assert b"home" not in encode(identity.roster) and b"sites" not in encode(identity.known)
    assert "site" not in logins_conf(logins_of(identity.roster))


def test_orchestrators_log_in_at_home_alone_and_an_agent_writes_one_trail(keys: Path) -> None:
    cluster = keys / CLUSTER
    key = load_holder(cluster / "root-0.key").authority
    there = make_leaf(cluster, KITCHEN, "192.168.7.2", ["10.0.0.2"], key, now=NOW, store=Path("js"))
    roster = load_identity(keys / N0, N0).roster
    logins = {one.name: one for one in logins_of(roster)}
    hub, site = (cluster / "logins.conf").read_text(), (there / "logins.conf").read_text()
    for name, at_hub, at_site in (
        (ORCHESTRATOR, True, False),
        (COOK, False, True),
        (OPERATOR, True, True),
        (N0, True, True),
        (K0, True, True),
    ):
        assert (logins[name].nkey in hub, logins[name].nkey in site) == (at_hub, at_site), name
    trails = re.findall(r'"(resplit\.v1\.\S*audit\.[nk]0\.\*)"', hub)
    assert trails == ["resplit.v1.site.kitchen.audit.k0.*", "resplit.v1.audit.n0.*"]
    assert 'domain: "kitchen"' in (there / "nats-server.conf").read_text()
    make_leaf(cluster, KITCHEN, "192.168.7.2", ["10.0.0.2"], key, now=NOW)  # a home no more
    write_logins(cluster, roster)
    assert "CONTROL" not in (there / "logins.conf").read_text()


def test_only_who_steers_or_serves_has_a_home(keys: Path) -> None:
    root = [load_holder(keys / CLUSTER / "root-0.key")]
    with pytest.raises(ResplitError, match="have a home"):
        enrol(keys / CLUSTER, NodeId("app"), "client", None, timedelta(days=1), root, now=NOW, home=KITCHEN)
    options = ["--role", "orchestrator", "--home", "attic", "--cluster", str(keys / CLUSTER)]
    refused = CliRunner().invoke(app, ["enroll", "orchestrator", *options])
    assert refused.exit_code and "orchestrator-attic" in refused.output
    out = keys / "attic.bundle"
    taken = CliRunner().invoke(app, ["enroll", "orchestrator-attic", *options, "--out", str(out)])
    assert taken.exit_code == 0 and out.exists()
