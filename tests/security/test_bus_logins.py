"""Who gets in: enrolment and revocation by a reload, and what cannot stand in the generated configuration."""

import asyncio
import re
import secrets
import shutil
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nats.errors import Error as NatsError
from pydantic import ValidationError

from bus.credentials import Credentials, Login, logins_of, nkey_seed, public_nkey
from bus.enrolment import enrol, renew, revoke, rotate
from bus.founding import found_cluster, load_holder
from bus.identity import load_credentials, read_roster
from bus.joining import join
from bus.natsconf import LOGINS_FILE, SERVER_FILE, logins_conf, quoted, server_conf
from bus.server_certificate import server_files
from bus.streams import ensure_streams
from bus.subject_log import SubjectLog
from bus.together import CLUSTER
from schemas import subjects
from schemas.base import DeploymentName, NodeId
from schemas.errors import ErrorCode, ResplitError
from tests.security.guarded_bus import Member, cluster, credentials, guarded

N0, N1 = NodeId("n0"), NodeId("n1")
SOON_S = 10.0
A_KEY = credentials("n0", "agent").login.nkey


async def test_whoever_is_enrolled_gets_in_and_nobody_is_disturbed(tmp_path: Path) -> None:
    first, second = credentials(N0, "agent"), credentials(N1, "agent")
    with guarded(tmp_path, [first]) as server:
        here = await Member(first).log_in(server.url)
        heard = await here.client.subscribe(subjects.ALL_CAPACITY)
        with pytest.raises(NatsError, match="Authorization Violation"):
            await Member(second).log_in(server.url)
        server.reload([first, second])
        there = await Member(second).log_in(server.url)
        await there.client.publish(subjects.capacity(N1), b"a heartbeat")
        assert (await heard.next_msg(SOON_S)).data == b"a heartbeat"
        assert here.client.stats["reconnects"] == 0
        assert here.client.is_connected
        assert here.refused == there.refused == []
        await here.client.close()
        await there.client.close()


async def test_whoever_is_revoked_is_cut_off_at_once_and_stays_out(tmp_path: Path) -> None:
    kept, revoked = credentials(N0, "agent"), credentials(N1, "agent")
    with guarded(tmp_path, [kept, revoked]) as server:
        cut_off = asyncio.Event()
        here = await Member(kept).log_in(server.url)

        async def closed() -> None:
            cut_off.set()

        gone = await Member(revoked).log_in(server.url, closed_cb=closed)
        server.reload([kept])
        async with asyncio.timeout(SOON_S):
            await cut_off.wait()
        assert not gone.client.is_connected
        with pytest.raises(NatsError, match="Authorization Violation"):
            await Member(revoked).log_in(server.url)
        assert here.client.is_connected
        await here.client.close()


async def test_after_a_reload_everything_still_passes_between_those_who_were_there(tmp_path: Path) -> None:
    steering, serving = credentials("orchestrator", "orchestrator"), credentials(N0, "agent")
    with guarded(tmp_path, [steering, serving]) as server:
        orchestrator, agent = await Member(steering).log_in(server.url), await Member(serving).log_in(server.url)
        js = await ensure_streams(orchestrator.client)
        plans = await agent.client.subscribe(subjects.ALL_PLANS)
        heartbeats = await orchestrator.client.subscribe(subjects.ALL_CAPACITY)
        for member in (orchestrator, agent):
            await member.client.flush()  # the server knows of both before anything is published
        log = SubjectLog(agent.client, subjects.STREAM_JOURNAL, "resplit.v1.journal.chat.n0-x-0")
        last = 0
        for i in range(3):
            server.reload([steering, serving, *(credentials(f"late-{j}", "agent") for j in range(i))])
            await js.publish(subjects.plan(DeploymentName("chat")), b"a plan")
            assert (await plans.next_msg(SOON_S)).data == b"a plan"
            await agent.client.publish(subjects.capacity(N0), b"a heartbeat")
            assert (await heartbeats.next_msg(SOON_S)).data == b"a heartbeat"
            last = await log.append(b"a round", last, SOON_S)
            assert len(await log.read(last)) == i + 1
            await agent.client.jetstream().publish(subjects.receipt(N0), b"a receipt")
        assert orchestrator.client.stats["reconnects"] == agent.client.stats["reconnects"] == 0
        await log.close()
        await orchestrator.client.close()
        await agent.client.close()


async def test_a_role_that_was_changed_counts_for_those_who_are_connected(tmp_path: Path) -> None:
    agent, other = credentials("one", "observer"), credentials(N1, "agent")
    with guarded(tmp_path, [agent, other]) as server:
        one = await Member(agent).log_in(server.url, allow_reconnect=True, reconnect_time_wait=0)
        await one.client.subscribe(subjects.ALL_CAPACITY)
        server.reload([replace(agent, role="client"), other])
        async with asyncio.timeout(SOON_S):
            refused = await one.is_refused(one.client.publish(subjects.control("status"), b""))
        assert "resplit.v1" in refused
        await one.client.close()


async def test_a_file_of_logins_with_a_mistake_changes_nothing_on_a_running_server(tmp_path: Path) -> None:
    member = credentials(N0, "agent")
    with guarded(tmp_path, [member]) as server:
        one = await Member(member).log_in(server.url)
        (tmp_path / "logins.conf").write_text("authorization { users: [ { nkey: Unsinn } ] }")
        server.hang_up("Failed to reload")
        await one.client.publish(subjects.capacity(N0), b"")
        await one.client.flush()
        assert one.client.is_connected
        two = await Member(member).log_in(server.url)
        await one.client.close()
        await two.client.close()


HOSTILE = ("", "n 0", "n.0", "n*", ">", 'n"', "n\n", "n\\", "n}", "N0", "ä", "n0\x00", "$n", "#n", "a" * 64, "n0\n")


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_that_would_mean_something_to_the_server_is_no_name(name: str) -> None:
    with pytest.raises(ValidationError):
        Login(name=NodeId(name), role="agent", nkey=A_KEY)


@given(st.text('az09AZ_-.*> \n\t\x00\\"$#{}[]:,ä', max_size=6))
def test_whatever_is_taken_for_a_name_is_one_word_of_a_subject(name: str) -> None:
    try:
        Login(name=NodeId(name), role="agent", nkey=A_KEY)
    except ValidationError:
        return
    assert re.fullmatch(r"[a-z0-9][a-z0-9_-]*", name)


@given(st.data())
def test_a_key_or_a_seed_with_one_changed_letter_is_refused(data: st.DataObject) -> None:
    seed = nkey_seed(bytes(range(32)))
    for text, read in ((seed, public_nkey), (public_nkey(seed), lambda key: Login(name=N0, role="agent", nkey=key))):
        place = data.draw(st.integers(0, len(text) - 1))
        letter = data.draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ234567").filter(lambda c: c != text[place]))  # noqa: B023
        with pytest.raises((ResplitError, ValidationError)):
            read(text[:place] + letter + text[place + 1 :])


@pytest.mark.parametrize(
    "seed", ["", "SU", "ä", "S" * 58, "SUAIBDPBAUTWCWBKIO6XHQNK5FWJW4OHLXC3HQ2KFE4PEJUA44CNHTC4", "é" * 58]
)
def test_what_is_no_seed_is_refused_and_not_repeated(seed: str) -> None:
    with pytest.raises(ResplitError) as refused:
        Credentials(N0, "agent", seed, credentials(N0, "agent").tls)
    assert refused.value.field == "seed"
    assert len(seed) < 3 or seed not in refused.value.message


def test_a_seed_is_not_shown_where_its_owner_is() -> None:
    member = credentials(N0, "agent")
    assert member.seed not in repr(member)


async def test_where_nobody_is_enrolled_nobody_gets_in(tmp_path: Path) -> None:
    """A server without any login would let everybody in."""
    first = credentials(N0, "agent")
    with guarded(tmp_path, []) as server:
        for options in ({}, {"user": "nobody", "password": ""}, {"user": "nobody", "password": "nobody"}):
            with pytest.raises(NatsError, match="Authorization Violation"):
                await Member(first).log_in(server.url, **{"nkeys_seed_str": None, **options})
        server.reload([first])
        enrolled = await Member(first).log_in(server.url)
        await enrolled.client.close()


async def test_the_files_of_a_cluster_let_in_whom_its_roster_names(tmp_path: Path) -> None:
    """As `resplit init`, `enroll`, `rotate` and `revoke` write them; the server has to know of them by a reload."""
    cluster, now = tmp_path / "cluster", datetime.now(UTC)
    found_cluster(cluster, now=now)
    roots = [load_holder(cluster / "root-0.key")]

    def enrolled(bundle: bytes) -> Credentials:
        join(bundle, tmp_path / N0, now)
        return load_credentials(tmp_path / N0)

    def logins() -> str:
        return (cluster / LOGINS_FILE).read_text()

    shipped = (cluster / SERVER_FILE).read_text()
    assert f'include "{LOGINS_FILE}"' in shipped and 'listen: "0.0.0.0:4222"' in shipped
    with guarded(tmp_path / "nats", [], server_files(cluster)) as server:
        old = enrolled(enrol(cluster, N0, "agent", "edge", timedelta(days=1), roots, now=now))
        server.reload_text(logins())
        assert await server.admits(old)
        new = enrolled(rotate(cluster, N0, roots, now=now))
        server.reload_text(logins())
        assert (await server.admits(new), await server.admits(old)) == (True, False)
        revoke(cluster, N0, roots, now=now)
        server.reload_text(logins())
        assert not await server.admits(new)


def test_whose_time_was_over_when_the_roster_was_signed_is_let_in_no_more(tmp_path: Path) -> None:
    now = datetime.now(UTC)
    found_cluster(tmp_path, now=now)
    roots = [load_holder(tmp_path / "root-0.key")]
    enrol(tmp_path, N0, "agent", "edge", timedelta(days=1), roots, now=now)
    assert [login.name for login in logins_of(read_roster(tmp_path))] == [N0]
    assert logins_of(renew(tmp_path, roots, now=now + timedelta(days=2))) == ()
    assert N0 not in (tmp_path / LOGINS_FILE).read_text()


def test_each_member_has_a_name_and_a_key_of_its_own() -> None:
    one, two = credentials(N0, "agent").login, credentials(N0, "client").login
    for logins, field in (
        ([one, two], "name"),
        ([one, two.model_copy(update={"name": "n1", "nkey": one.nkey})], "nkey"),
    ):
        with pytest.raises(ResplitError, match="each member has its own") as refused:
            logins_conf(logins)
        assert refused.value.field == field


def test_the_same_logins_give_the_same_text_in_whatever_order() -> None:
    logins = [credentials(f"n{i}", "agent").login for i in range(3)] + [credentials("app", "client").login]
    assert logins_conf(logins) == logins_conf(reversed(logins))
    assert "SU" not in re.sub(r"nkey: U\w+", "", logins_conf(logins)), "no seed is in it"


def test_paths_with_quotes_and_blanks_reach_the_server_as_they_are(tmp_path: Path) -> None:
    folder = tmp_path / 'a "quoted" \\ $HOME # {folder}, ä'
    files = shutil.copytree(cluster() / CLUSTER, folder)
    with guarded(folder, [credentials(N0, "agent")], server_files(files)):
        assert (folder / "jetstream").is_dir()


@pytest.mark.parametrize("text", ["a\nb", "a\x00", "a\tb", "\u2028"])
def test_control_characters_do_not_stand_in_the_configuration(text: str) -> None:
    with pytest.raises(ResplitError) as refused:
        quoted(text)
    assert refused.value.code is ErrorCode.INVALID_REQUEST


def test_sizes_are_written_as_people_read_them_and_the_file_of_logins_lies_beside() -> None:
    with pytest.raises(ResplitError):
        server_conf("0.0.0.0:1", Path("/nats"), server_files(Path()), logins_file="../logins.conf")
    files = server_files(Path())
    conf = server_conf("0.0.0.0:1", Path("/nats"), files, max_payload_bytes=1000, max_file_store_bytes=3 << 20)
    assert "max_payload: 1000\n" in conf and "max_file_store: 3MB\n" in conf


def test_seeds_are_of_users_and_each_is_another() -> None:
    seeds = {nkey_seed(secrets.token_bytes(32)) for _ in range(10)}
    assert len(seeds) == 10
    assert all(seed.startswith("SU") for seed in seeds)
