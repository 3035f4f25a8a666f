"""Founding a cluster and changing who belongs to it, as its holders and the owners of its machines type it."""

import json
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from bus.folders import ROSTER
from bus.founding import load_holder
from bus.identity import load_credentials, load_identity, read_roster
from bus.server_certificate import SERVER_KEY
from bus.together import CLIENT, CLUSTER, OPERATOR
from natstls.contexts import AUTHORITY, SERVER_AUTHORITY
from resplit.cli import app
from resplit.exits import Exit
from schemas.base import Digest, NodeId
from schemas.roster import Policy
from schemas.signed import key_id

N0 = NodeId("n0")
A, B = Digest("a" * 64), Digest("b" * 64)
PHRASE = "correct horse battery staple"


def run(*arguments: object, stdin: str | None = None) -> Result:
    """Run one command; in a thread, because `asyncio.run` takes the loop of the thread it runs in."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(CliRunner().invoke, app, [str(a) for a in arguments], input=stdin).result()


def told(*arguments: object) -> Any:
    """What a command that succeeds says to a program."""
    ended = run(*arguments, "--json")
    assert ended.exit_code == Exit.OK, ended.stderr
    return json.loads(ended.stdout)


def refused(code: Exit, why: str, *arguments: object) -> None:
    """That a command ends so, with one line that says why."""
    ended = run(*arguments)
    assert (ended.exit_code, ended.stdout, ended.stderr.count("\n")) == (code, "", 1)
    assert why in ended.stderr


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    folder = tmp_path / "cluster"
    assert told("init", folder)["threshold"] == 1
    return folder


def enrolled(cluster: Path, *arguments: object) -> Path:
    """The bundle of n0."""
    bundle = cluster.parent / "n0.bundle"
    assert told("enroll", N0, "--cluster", cluster, "--out", bundle, *arguments)["bundle"] == str(bundle)
    return bundle


def names(cluster: Path) -> list[str]:
    return [member["name"] for member in told("roster", "show", "--cluster", cluster)["members"]]


def test_a_member_is_enrolled_joins_gets_new_keys_and_is_revoked(cluster: Path, tmp_path: Path) -> None:
    keys, again = tmp_path / "keys", tmp_path / "again.bundle"
    bundle = enrolled(cluster, "--tier", "edge", "--days", 30)
    assert stat.S_IMODE(bundle.stat().st_mode) == 0o600
    joined = told("join", bundle, "--keys", keys)
    assert (joined["name"], joined["role"], joined["tier"]) == (N0, "agent", "edge")
    before = load_identity(keys, N0)
    assert told("rotate", N0, "--cluster", cluster, "--out", again) == {"name": N0, "bundle": str(again)}
    assert run("join", again, "--keys", keys).exit_code == Exit.OK
    after = load_identity(keys, N0)
    assert after.key.public_key() != before.key.public_key()
    refused(Exit.REFUSED, "(rolled_back", "join", bundle, "--keys", keys)
    assert names(cluster) == [N0]
    assert told("revoke", N0, "--cluster", cluster) == {"version": 4}
    assert names(cluster) == []
    refused(Exit.NOT_FOUND, "'n0' is not a member", "revoke", N0, "--cluster", cluster)


def test_each_step_names_the_next_one(cluster: Path, tmp_path: Path) -> None:
    bundle, keys = tmp_path / "n0.bundle", tmp_path / "keys"
    said = run("enroll", N0, "--tier", "trusted", "--cluster", cluster, "--out", bundle).stdout
    assert "resplit join n0.bundle --keys" in said and f"resplit roster publish --cluster {cluster}" in said
    said = run("join", bundle, "--keys", keys).stdout
    assert "trusted agent n0" in said and f"delete {bundle}" in said and f"resplit agent n0 --keys {keys}" in said
    logins = cluster / "logins.conf"
    assert f"carry {logins} to the NATS server" in run("rotate", N0, "--cluster", cluster, "--out", bundle).stdout
    said = run("revoke", N0, "--cluster", cluster).stdout
    assert "resplit roster publish" in said and "nats-server --signal reload" in said
    shown = run("roster", "show", "--cluster", cluster).stdout
    assert (
        "roster 4, valid until" in shown and "2 former keys, of 1000 at most; the last that of n0, by roster 4" in shown
    )


def test_the_logins_are_written_anew_with_each_change(cluster: Path) -> None:
    logins = cluster / "logins.conf"
    assert "user: nobody" in logins.read_text()
    enrolled(cluster, "--tier", "edge")
    first = logins.read_text()
    assert "# agent n0" in first and "user: nobody" not in first
    told("rotate", N0, "--cluster", cluster, "--out", cluster.parent / "again.bundle")
    assert "# agent n0" in logins.read_text() and logins.read_text() != first
    told("revoke", N0, "--cluster", cluster)
    assert "user: nobody" in logins.read_text()


def test_each_role_can_be_enrolled_and_logs_in_as_such(cluster: Path, tmp_path: Path) -> None:
    for role in ("orchestrator", "operator", "observer", "archivist", "client"):
        bundle = tmp_path / f"{role}.bundle"
        told("enroll", role, "--role", role, "--cluster", cluster, "--out", bundle)
        said = run("join", bundle, "--keys", tmp_path / role).stdout
        assert f"KEYS={tmp_path / role}" in said or f"resplit orchestrator --keys {tmp_path / role}" in said
        assert load_credentials(tmp_path / role).role == role


def test_a_policy_is_kept_and_changed_rule_by_rule(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster"
    told("init", cluster, "--sensitive", "*=ends")
    enrolled(cluster, "--tier", "edge")
    shown = run("roster", "show", "--cluster", cluster).stdout
    assert "sensitive *: ends" in shown and "edge" in shown
    assert told("roster", "renew", "--cluster", cluster)["version"] == 3
    assert read_roster(cluster).policy.sensitive == {"*": "ends"}
    change = ["roster", "policy", "--cluster", cluster]
    assert told(*change, "--sensitive", "chat=0,5", "--sensitive", "other=all")["version"] == 4
    assert read_roster(cluster).policy.sensitive == {"*": "ends", "chat": (0, 5), "other": "all"}
    told(*change, "--model", f"chat={A},{B}", "--model", f"*={A}")
    assert "sensitive chat: 0,5" in run("roster", "show", "--cluster", cluster).stdout
    assert run(*change).stdout.splitlines()[-2:] == [f"model chat: {A}, {B}", f"model *: {A}"]
    told(*change, "--sensitive", "*=", "--sensitive", "other=", "--model", f"chat={B}")
    after = read_roster(cluster).policy
    assert (after.sensitive, after.models) == ({"chat": (0, 5)}, {"chat": (B,), "*": (A,)})
    assert told(*change) == after.model_dump(mode="json")
    told(*change, "--model", "chat=", "--model", "*=", "--sensitive", "chat=")
    assert read_roster(cluster).policy == Policy()
    assert "any model" in run(*change).stdout and read_roster(cluster).version == 7
    assert Path(cluster / "roster.signed").read_bytes().count(b'"models"') == 0, "what nobody set is not in the bytes"


def test_a_cluster_is_founded_with_pinned_models(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster"
    told("init", cluster, "--model", f"chat={A}")
    assert read_roster(cluster).policy.models == {"chat": (A,)}


def test_a_home_folder_is_meant_where_it_is_written_as_one(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(cluster.parent))
    bundle = cluster.parent / "n0.bundle"
    assert run("enroll", N0, "--tier", "edge", "--cluster", "~/cluster", "--out", "~/n0.bundle").exit_code == Exit.OK
    assert run("join", "~/n0.bundle", "--keys", "~/keys").exit_code == Exit.OK
    assert bundle.exists() and load_identity(cluster.parent / "keys", N0).name == N0
    assert names(Path("~/cluster")) == [N0]


def test_what_nobody_can_be_enrolled_as_is_a_usage_error(cluster: Path, tmp_path: Path) -> None:
    at = ["--cluster", cluster, "--out", tmp_path / "bundle"]
    refused(Exit.USAGE, "(invalid_request, tier)", "enroll", N0, *at)
    refused(Exit.USAGE, "have a tier", "enroll", "orchestrator", "--role", "orchestrator", "--tier", "edge", *at)
    refused(Exit.USAGE, "called 'orchestrator'", "enroll", "leader", "--role", "orchestrator", *at)
    for name in ("Not a name", "", "n.0", "n" * 100):
        refused(Exit.USAGE, "(invalid_request, node)", "enroll", name, "--tier", "edge", *at)
    assert run("enroll", N0, "--tier", "none", *at).exit_code == Exit.USAGE
    assert run("enroll", N0, "--tier", "edge", "--days", 0, *at).exit_code == Exit.USAGE
    assert not (tmp_path / "bundle").exists()
    assert names(cluster) == []
    bundle = enrolled(cluster, "--tier", "edge")
    refused(Exit.USAGE, "is a member already", "enroll", N0, "--tier", "edge", *at)
    assert bundle.exists() and not (tmp_path / "bundle").exists()


def test_without_a_holder_s_file_nothing_changes(cluster: Path, tmp_path: Path) -> None:
    carried = tmp_path / "root-0.key"
    (cluster / "root-0.key").rename(carried)
    at = ["--tier", "edge", "--cluster", cluster, "--out", tmp_path / "bundle"]
    refused(Exit.USAGE, "(invalid_request, root)", "enroll", N0, *at)
    refused(Exit.USAGE, "nowhere.key", "enroll", N0, *at, "--root", tmp_path / "nowhere.key")
    told("init", tmp_path / "other")
    refused(Exit.USAGE, "is not a holder", "enroll", N0, *at, "--root", tmp_path / "other" / "root-0.key")
    assert not (tmp_path / "bundle").exists()
    assert run("enroll", N0, *at, "--root", carried).exit_code == Exit.OK


def test_a_folder_holds_one_cluster_and_no_folder_of_one_a_member(cluster: Path, tmp_path: Path) -> None:
    before = (cluster / ROSTER).read_bytes()
    refused(Exit.USAGE, "holds a cluster already", "init", cluster)
    assert (cluster / ROSTER).read_bytes() == before
    refused(Exit.USAGE, "holds another identity", "join", enrolled(cluster, "--tier", "edge"), "--keys", cluster)
    refused(Exit.USAGE, "cannot come from", "init", tmp_path / "new", "--holders", 1, "--threshold", 2)
    for rule in ("ends", "=ends", "Chat=ends", "*=some"):
        refused(Exit.USAGE, "(invalid_request, sensitive)", "init", tmp_path / "new", "--sensitive", rule)
    for rule in (A, f"Chat={A}", "chat=llama", f"chat={A[:12]}", f"chat={A},"):
        refused(Exit.USAGE, "(invalid_request, model)", "init", tmp_path / "new", "--model", rule)
    assert not (tmp_path / "new").exists()
    refused(Exit.USAGE, "root.1.signed", "roster", "show", "--cluster", tmp_path)


def test_what_is_no_bundle_makes_no_member(cluster: Path, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    refused(Exit.USAGE, "(invalid_request, bundle)", "join", tmp_path / "nowhere", "--keys", keys)
    for file in (cluster / ROSTER, cluster / "root-0.key"):
        refused(Exit.FAILED, "(corrupt_file", "join", file, "--keys", keys)
    bundle = enrolled(cluster, "--tier", "edge")
    refused(Exit.USAGE, "(invalid_request, roster)", "join", bundle, "--keys", keys, "--roster", tmp_path / "nowhere")
    refused(Exit.REFUSED, "(bad_signature", "join", bundle, "--keys", keys, "--roster", cluster / "root.1.signed")
    assert not keys.exists()


def test_two_of_three_holders_sign_one_after_another(tmp_path: Path) -> None:
    cluster, keys, pending = tmp_path / "cluster", tmp_path / "keys", tmp_path / "cluster" / "roster.pending"
    assert (
        "give each holder one" in run("init", cluster, "--holders", 3, "--threshold", 2, "--sensitive", "*=ends").stdout
    )
    for number in (1, 2):
        (cluster / f"root-{number}.key").rename(tmp_path / f"root-{number}.key")
    bundle = tmp_path / "n0.bundle"
    said = run("enroll", N0, "--tier", "trusted", "--cluster", cluster, "--out", bundle).stdout
    assert f"resplit roster sign {pending}" in said
    refused(Exit.REFUSED, "1 valid signatures of the 2", "join", bundle, "--keys", keys)
    refused(Exit.REFUSED, "1 valid signatures of the 2", "roster", "adopt", pending, "--cluster", cluster)
    refused(Exit.USAGE, "a change is pending", "roster", "renew", "--cluster", cluster)

    sign = ["roster", "sign", pending, "--cluster", cluster, "--root", tmp_path / "root-2.key"]
    unsigned = pending.read_bytes()
    asked = run(*sign, stdin="n\n")
    assert "sensitive *: ends" in asked.stdout, "whoever signs sees the policy as well"
    assert (asked.exit_code, "n0" in asked.stdout, pending.read_bytes()) == (Exit.FAILED, True, unsigned)
    assert run(*sign, stdin="y\n").exit_code == Exit.OK
    assert run(*sign, "--yes").exit_code == Exit.OK, "a holder may sign twice"
    assert told("roster", "adopt", pending, "--cluster", cluster) == {"version": 2}
    assert names(cluster) == [N0] and not pending.exists()

    refused(Exit.REFUSED, "1 valid signatures of the 2", "join", bundle, "--keys", keys)
    assert told("join", bundle, "--keys", keys, "--roster", cluster / ROSTER)["tier"] == "trusted"
    both = ["--root", cluster / "root-0.key", "--root", tmp_path / "root-1.key"]
    assert told("revoke", N0, "--cluster", cluster, *both) == {"version": 3}


def test_a_holder_who_lost_a_key_is_replaced(tmp_path: Path) -> None:
    cluster, pending = tmp_path / "cluster", tmp_path / "cluster" / "roster.pending"
    run("init", cluster, "--holders", 3, "--threshold", 2)
    one, two, lost = (cluster / f"root-{number}.key" for number in range(3))
    lost.unlink()
    before = told("roster", "holders", "--cluster", cluster)
    assert (before["version"], before["threshold"], len(before["keys"])) == (1, 2, 3)
    assert sorted(before["keys"])[0] in run("roster", "holders", "--cluster", cluster).stdout
    refused(Exit.USAGE, "(invalid_request, keep)", "roster", "holders", "--cluster", cluster, "--keep", "0" * 32)

    made = cluster / "root-2.0.key"
    said = run("roster", "holders", "--cluster", cluster, "--add", 1).stdout
    assert (
        f"{made}: new; give it to its holder" in said and said.count(" stays\n") == 2 and said.count(" is out\n") == 1
    )
    assert "version 2 of the root is in force in roster 2" in said
    after = told("roster", "holders", "--cluster", cluster)
    assert len(set(before["keys"]) & set(after["keys"])) == 2
    assert told("roster", "renew", "--cluster", cluster, "--root", one, "--root", made)["version"] == 3

    # The first of them has to go; the second holder is far away, and the third is here.
    two.rename(tmp_path / "two.key")
    [stays] = (set(before["keys"]) & set(after["keys"])) - {id_of(one)}
    change = ["roster", "holders", "--cluster", cluster, "--root", made, "--keep", stays, "--add", 1]
    run("init", tmp_path / "pair", "--holders", 2)
    assert "every one of them" in run("roster", "holders", "--cluster", tmp_path / "pair", "--threshold", 2).stdout
    assert told(*change) == {"version": 4, "pending": str(pending), "files": [str(cluster / "root-3.0.key")]}
    signed = run("roster", "sign", pending, "--cluster", cluster, "--root", tmp_path / "two.key", "--yes")
    assert "the root changes hands:\nroot 3: 2 of 3 holders sign" in signed.stdout
    assert told("roster", "adopt", pending, "--cluster", cluster) == {"version": 4}
    shown = told("roster", "holders", "--cluster", cluster)
    assert (shown["version"], id_of(one) in shown["keys"], stays in shown["keys"]) == (3, False, True)

    # A key in wrong hands signs its own end, wherever its file lies.
    run("init", tmp_path / "small")
    leaked = (tmp_path / "small" / "root-0.key").rename(tmp_path / "leaked.key")
    run("roster", "holders", "--cluster", tmp_path / "small", "--out", leaked, "--add", 1)
    refused(Exit.USAGE, "is not a holder", "roster", "renew", "--cluster", tmp_path / "small", "--root", leaked)
    assert told("roster", "renew", "--cluster", tmp_path / "small")["version"] == 3


def id_of(path: Path) -> str:
    return key_id(load_holder(path).signing.public_key())


def test_a_root_with_a_passphrase_signs_with_it_alone(tmp_path: Path) -> None:
    cluster, bundle = tmp_path / "cluster", tmp_path / "n0.bundle"
    assert run("init", cluster, "--locked", stdin=f"{PHRASE}\n" * 2).exit_code == Exit.OK
    assert b"ENCRYPTED" in (cluster / "root-0.key").read_bytes()
    enroll = ["enroll", N0, "--tier", "edge", "--cluster", cluster, "--out", bundle]
    refused(Exit.USAGE, "give its passphrase", *enroll)
    assert run(*enroll, "--locked", stdin="incorrect horse battery\n").exit_code == Exit.USAGE
    assert not bundle.exists()
    opened = run(*enroll, "--locked", stdin=f"{PHRASE}\n")
    assert (opened.exit_code, PHRASE in opened.output) == (Exit.OK, False)


def test_the_server_s_certificate_is_made_anew_for_the_same_hosts_or_for_others(tmp_path: Path) -> None:
    cluster = tmp_path / "cluster"
    assert told("init", cluster, "--host", "10.0.0.2")["hosts"] == ["localhost", "127.0.0.1", "::1", "10.0.0.2"]
    key = (cluster / SERVER_KEY).read_bytes()
    assert told("certify", "--cluster", cluster)["hosts"] == ["localhost", "127.0.0.1", "::1", "10.0.0.2"]
    assert (cluster / SERVER_KEY).read_bytes() != key
    said = run("certify", "--cluster", cluster, "--host", "nats.lan").stdout
    assert "is for localhost, nats.lan, 127.0.0.1, ::1, until" in said and "nats-server --signal reload" in said
    assert "certificate is for localhost, nats.lan" in run("roster", "show", "--cluster", cluster).stdout
    refused(Exit.USAGE, "(invalid_request, host)", "certify", "--cluster", cluster, "--host", "nats.lan:4222")
    refused(Exit.USAGE, "resplit certify --host", "certify", "--cluster", tmp_path)
    named = run("init", tmp_path / "named").stdout
    assert "nats-server.key, which is secret" in named and f"resplit certify --host HOST --cluster {tmp_path}" in named


def test_whose_certificate_the_server_has_is_told_at_joining(cluster: Path, tmp_path: Path) -> None:
    bundle = enrolled(cluster, "--tier", "edge")
    refused(Exit.USAGE, "server-authority)", "join", bundle, "--keys", tmp_path / "k", "--server-authority", bundle)
    assert not (tmp_path / "k").exists()
    other = cluster / AUTHORITY
    assert run("join", bundle, "--keys", tmp_path / "k", "--server-authority", other).exit_code == Exit.OK
    assert (tmp_path / "k" / SERVER_AUTHORITY).read_bytes() == other.read_bytes()


def test_a_roster_is_published_where_there_is_a_server_by_an_operator(members: Path) -> None:
    publish = ["roster", "publish", "--cluster", members / CLUSTER, "--url", "nats://127.0.0.1:9", "--keys"]
    refused(Exit.UNREACHABLE, "no NATS server", *publish, members / OPERATOR)
    refused(Exit.REFUSED, "enrolled as client; this takes", *publish, members / CLIENT)
