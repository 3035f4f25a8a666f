"""The command line: what it prints, for people and for programs, and how it ends."""

import asyncio
import json
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from nats.aio.msg import Msg
from typer.testing import CliRunner, Result

from agent.config import AgentConfig
from bus.connection import connect, settle
from bus.credentials import SEED_BYTES, nkey_seed
from bus.identity import ORCHESTRATOR, load_credentials, load_identity
from bus.natsconf import LOGINS_FILE
from bus.server_certificate import server_files
from bus.streams import ensure_streams
from bus.together import CLIENT, CLUSTER, OPERATOR, make_members
from resplit.cli import app
from resplit.commands.deployments import default_name, kept_private, parse_placement, parse_sensitive
from resplit.commands.events import event_line
from resplit.commands.serve import parse_cores, parse_size
from resplit.exits import Exit, exit_of
from resplit.server import NatsServer
from resplit.standing import Seen
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind
from schemas.base import NodeId
from schemas.deployment import Stage, sensitive_blocks
from schemas.envelope import AUDIT_TYPE, seal
from schemas.errors import ErrorCode, ResplitError

NODE = NodeId("n0")


def run(*arguments: object, stdin: str | None = None) -> Result:
    """Run one command; in a thread, because `asyncio.run` takes the loop of the thread it runs in."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(CliRunner().invoke, app, [str(a) for a in arguments], input=stdin).result()


@pytest.fixture
def loop() -> Iterator[Callable[[Any], Any]]:
    """Runs coroutines on a loop in another thread, so that commands can run a loop of their own here."""
    background = asyncio.new_event_loop()
    thread = threading.Thread(target=background.run_forever)
    thread.start()
    yield lambda work: asyncio.run_coroutine_threadsafe(work, background).result(30)
    background.call_soon_threadsafe(background.stop)
    thread.join()
    background.close()


@pytest.fixture
def logged_in(members: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands have the folders of an operator and of a client."""
    monkeypatch.setenv("RESPLIT_KEYS", str(members / OPERATOR))
    monkeypatch.setenv("RESPLIT_CLIENT_KEYS", str(members / CLIENT))


@pytest.fixture
def server_url(tmp_path: Path, members: Path, logged_in: None, loop: Callable[[Any], Any]) -> Iterator[str]:
    server = NatsServer(tmp_path / "nats", (members / CLUSTER / LOGINS_FILE).read_text, server_files(members / CLUSTER))
    loop(server.start())
    yield server.url
    loop(server.child.stop())


@pytest.fixture
def onnx_file(tmp_path: Path) -> Path:
    """Two matrix products in a row, [batch, 4] to [batch, 4]."""
    weights = [np.full((4, 4), value, np.float32) for value in (0.5, 0.25)]
    given, result = (
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", 4]) for name in ("x", "y")
    )
    nodes = [onnx.helper.make_node("MatMul", ["x", "a"], ["h"]), onnx.helper.make_node("MatMul", ["h", "b"], ["y"])]
    constants = [onnx.numpy_helper.from_array(w, name) for w, name in zip(weights, "ab", strict=True)]
    graph = onnx.helper.make_graph(nodes, "two", [given], [result], constants)
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "two.onnx")
    return tmp_path / "two.onnx"


@pytest.mark.parametrize(("command", "member"), [(("status",), OPERATOR), (("infer", "chat", "hi"), CLIENT)])
def test_keys_that_nobody_named_are_asked_for_with_where_they_may_be(
    command: tuple[str, ...], member: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for variable in ("RESPLIT_KEYS", "RESPLIT_CLIENT_KEYS"):
        monkeypatch.delenv(variable, raising=False)
    told = run(*command)
    assert told.exit_code == Exit.USAGE
    assert f"keys/{member}" in told.output.replace("\n", "")
    monkeypatch.setenv("RESPLIT_KEYS", str(tmp_path / "mine"))
    told = run(*command)
    assert f"{tmp_path / 'mine'} holds no login" in told.output, "a client's may be those of any member"


def test_a_server_that_is_none_and_a_bundle_that_is_none_are_told_in_a_line(tmp_path: Path) -> None:
    told = run("status", "--keys", tmp_path, "--url", "http://127.0.0.1:4222")
    assert told.exit_code == Exit.USAGE
    assert "nats://HOST:4222" in told.output
    (tmp_path / "file").write_text("junk")
    told = run("join", tmp_path / "file", "--keys", tmp_path / "keys")
    assert told.exit_code != Exit.OK
    assert "this is no bundle" in told.output
    assert not (tmp_path / "keys").exists()


def test_every_command_has_help_that_lists_its_options() -> None:
    listed = re.findall(r"│ ([a-z]+)  ", run("--help").output)
    assert {
        "up",
        "agent",
        "orchestrator",
        "init",
        "enroll",
        "join",
        "roster",
        "models",
        "deploy",
        "remove",
        "status",
        "infer",
    } | {
        "events",
        "demo",
    } <= set(listed)
    for command in listed:
        shown = run(command, "--help")
        assert (shown.exit_code, "Usage" in shown.output) == (0, True)


def test_the_help_documents_the_exit_codes() -> None:
    text = " ".join(run("--help").output.split())
    for code in (Exit.OK, Exit.FAILED, Exit.USAGE, Exit.NOT_FOUND, Exit.REFUSED, Exit.UNREACHABLE, Exit.OVERLOADED):
        assert f"{int(code)} " in text
    assert "130 interrupted" in text


def test_every_error_code_has_an_exit_code_that_says_it_went_wrong() -> None:
    assert all(exit_of(code) is not Exit.OK for code in ErrorCode)
    assert exit_of("a code of a later release") is Exit.FAILED


@pytest.mark.parametrize(
    "arguments", [["infer", "adder"], ["agent", "n0"], ["nonsense"], ["infer", "adder", "1+2=", "--max-tokens", "0"]]
)
def test_a_malformed_command_is_a_usage_error(arguments: list[str]) -> None:
    assert run(*arguments).exit_code == Exit.USAGE


@pytest.mark.usefixtures("logged_in")
def test_no_server_is_one_line_and_unreachable() -> None:
    asking = ["infer adder 1", "events", "status", "status --watch", "deploy adder", "remove adder"]
    for command in (
        *asking,
        "drain n0",
        "drain n0 --wait",
        "undrain n0",
        "topology show adder",
        "topology unlock adder",
    ):
        ended = run(*command.split(), "--url", "nats://127.0.0.1:9")
        assert ended.exit_code == Exit.UNREACHABLE
        assert re.fullmatch(r"error: no NATS server answers at nats://127.0.0.1:9: .* \(unreachable\)\n", ended.stderr)


@pytest.mark.usefixtures("logged_in")
def test_a_doctor_without_a_server_says_what_is_beneath_and_fails() -> None:
    ended = run("doctor", "--url", "nats://user:secret@127.0.0.1:9")
    assert ended.exit_code == Exit.FAILED
    assert "fail  nats" in ended.stdout and "start nats-server" in ended.stdout
    found = json.loads(run("doctor", "--json", "--url", "nats://127.0.0.1:9").stdout)
    assert [(one["check"], one["verdict"]) for one in found["findings"]] == [("keys", "ok"), ("nats", "fail")]
    assert found["ok"] is False


def test_a_doctor_tells_a_server_without_jetstreams_streams_from_a_whole_one(server_url: str) -> None:
    ended = run("doctor", "--json", "--url", server_url)
    verdicts = {one["check"]: one["verdict"] for one in json.loads(ended.stdout)["findings"]}
    assert (ended.exit_code, verdicts) == (
        Exit.FAILED,
        {"keys": "ok", "nats": "ok", "jetstream": "fail", "orchestrator": "fail"},
    )


def test_a_doctor_with_a_login_of_another_role_says_whose_it_takes(server_url: str, members: Path) -> None:
    ended = run("doctor", "--json", "--url", server_url, "--keys", members / NODE)
    [login] = [one for one in json.loads(ended.stdout)["findings"] if one["check"] == "login"]
    assert (ended.exit_code, login["verdict"]) == (Exit.FAILED, "fail")
    assert "enrolled as agent; this takes the folder of a member enrolled as operator" in login["fact"]


def test_commands_are_for_members_of_the_roles_that_may(server_url: str, members: Path) -> None:
    """Told here, rather than refused by the server without a word."""
    for command, folder, role in (
        (["status"], members / NODE, "operator or observer"),
        (["events"], members / CLIENT, "operator or observer or archivist"),
        (["deploy", "adder"], members / CLIENT, "operator"),
        (["infer", "adder", "1+2="], members / OPERATOR, "client"),
    ):
        ended = run(*command, "--url", server_url, "--keys", folder)
        assert (ended.exit_code, ended.stdout) == (Exit.REFUSED, "")
        assert f"enrolled as {role} (--keys) (forbidden, keys)" in ended.stderr


def test_a_login_that_the_server_does_not_know_is_told_as_such(server_url: str, members: Path, tmp_path: Path) -> None:
    unknown = shutil.copytree(members / OPERATOR, tmp_path / OPERATOR)
    (unknown / f"{OPERATOR}.nk").write_text(nkey_seed(secrets.token_bytes(SEED_BYTES)))
    ended = run("status", "--url", server_url, "--keys", unknown)
    assert ended.exit_code == Exit.UNREACHABLE
    assert "does not let this login in" in ended.stderr


@pytest.mark.usefixtures("logged_in")
def test_a_topology_file_that_is_wrong_never_reaches_the_orchestrator(tmp_path: Path) -> None:
    file = tmp_path / "f.toml"
    file.write_text('deployment = "chat"\n[[stages]]\nnode = "n0"\nfirst = 3\nlast = 1\n')
    ended = run("topology", "lock", file, "--url", "nats://127.0.0.1:9")
    assert ended.exit_code == Exit.USAGE
    assert str(file) in ended.stderr and "(invalid_request, stages.0)" in ended.stderr


def test_an_event_is_one_line_that_says_why() -> None:
    event = AuditEvent(
        at=datetime(2026, 1, 2, tzinfo=UTC),
        source=NODE,
        kind=AuditKind.PLAN_ABORTED,
        message="given up",
        deployment="chat",
        epoch=7,
        fields={"cause": "node_lost", "reason": "node n1 refused:\n\x1b[31mno", "revision": None},
    )
    line = event_line(Seen(event, NODE, "verified"))
    assert line.endswith("plan_aborted           chat/7          given up: node n1 refused:  [31mno  cause=node_lost")
    assert line.isprintable()


def test_asking_for_a_deployment_nobody_serves_is_not_found(server_url: str) -> None:
    ended = run("infer", "absent", "1+2=", "--url", server_url)
    assert (ended.exit_code, ended.stdout) == (Exit.NOT_FOUND, "")
    assert ended.stderr.startswith("error: no agent serves") and ended.stderr.endswith("(unknown_deployment)\n")


USAGE = {
    "prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5, "queued_ms": 0.0, "ttft_ms": 1.0, "tpot_ms": 1.0,
    "total_ms": 2.0, "network_ms": 1.0, "epoch": 1, "route": 0, "stages": [],
}  # fmt: skip


def test_infer_streams_text_and_with_json_one_line_a_token(
    server_url: str, members: Path, loop: Callable[[Any], Any]
) -> None:
    seen: list[dict[str, Any]] = []

    async def answer(message: Msg) -> None:
        body = json.loads(message.data)
        seen.append(body)
        for index, last in enumerate([{}, {"finish_reason": "stop", "usage": USAGE}]):
            reply = {"request_id": body["request_id"], "index": index, "token_id": 3 + index, "text": "3|"[index]}
            await peer.publish(message.reply, json.dumps(reply | last).encode())

    peer = loop(connect(server_url, NODE, credentials=load_credentials(members / NODE)))
    loop(peer.subscribe("resplit.v1.infer.adder", subjects.INGRESS_QUEUE, cb=answer))
    loop(settle(peer))
    assert run("infer", "adder", "-", "--url", server_url, "--seed", 7, stdin="1+2=").stdout == "3|\n"
    lines = run("infer", "adder", "1+2", "--chat", "--json", "--url", server_url).stdout.splitlines()
    tokens = [json.loads(line) for line in lines]
    loop(peer.close())
    assert [(t["index"], t["text"], t.get("finish_reason")) for t in tokens] == [(0, "3", None), (1, "|", "stop")]
    assert (seen[0]["prompt"], seen[0]["seed"], seen[0]["max_tokens"]) == ("1+2=", 7, 256)
    assert seen[1]["messages"] == [{"role": "user", "content": "1+2"}]
    assert "prompt" not in seen[1]


def test_models_are_imported_listed_shown_verified_and_removed(tmp_path: Path, onnx_file: Path) -> None:
    store = ["--store", tmp_path / "store"]
    assert json.loads(run("models", "list", "--json", *store).stdout) == {"models": []}
    imported = run("models", "import", onnx_file, "--name", "two", "--json", *store)
    assert imported.exit_code == Exit.OK, imported.stderr
    digest = json.loads(imported.stdout)["digest"]
    listed = json.loads(run("models", "list", "--json", *store).stdout)["models"]
    assert [(m["name"], m["digest"], m["kind"]) for m in listed] == [("two", digest, "tensor")]
    assert "two" in run("models", "list", *store).stdout
    shown = json.loads(run("models", "show", "two", "--json", *store).stdout)
    assert (shown["digest"], shown["manifest"]["name"]) == (digest, "two")
    assert digest in run("models", "show", "two", *store).stdout
    assert json.loads(run("models", "verify", "--json", *store).stdout) == {"verified": ["two"]}
    freed = json.loads(run("models", "remove", "two", "--json", *store).stdout)
    assert freed["removed"] == "two" and freed["freed_bytes"] > 0
    for gone in (["show", "two"], ["verify", "two"], ["remove", "two"]):
        ended = run("models", *gone, *store)
        assert (ended.exit_code, "(unknown_model, model)" in ended.stderr) == (Exit.NOT_FOUND, True)


def test_a_place_that_cannot_be_used_is_one_line(tmp_path: Path, onnx_file: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    failed = CliRunner().invoke(app, ["models", "import", str(onnx_file), "--store", str(tmp_path / "file" / "store")])
    assert failed.exit_code == Exit.USAGE
    assert failed.stderr.startswith("error: cannot use ") and failed.stderr.count("\n") == 1


def test_a_corrupt_file_of_a_model_is_found(tmp_path: Path, onnx_file: Path) -> None:
    store = ["--store", tmp_path / "store"]
    run("models", "import", onnx_file, "--name", "two", *store)
    shown = json.loads(run("models", "show", "two", "--json", *store).stdout)
    blob = tmp_path / "store" / "blobs" / shown["manifest"]["blocks"][0]["graph"]["digest"]
    blob.chmod(0o644)
    blob.write_bytes(blob.read_bytes() + b" ")
    ended = run("models", "verify", *store)
    assert (ended.exit_code, "(corrupt_file" in ended.stderr) == (Exit.FAILED, True)


def test_events_are_shown_with_how_far_they_may_be_believed(
    tmp_path: Path, server_url: str, members: Path, loop: Callable[[Any], Any]
) -> None:
    others = tmp_path / "others"
    make_members(others, [NODE])
    loop(publish_events(server_url, members, others))
    shown = [json.loads(line) for line in run("events", "--json", "--url", server_url).stdout.splitlines()]
    assert [(e["kind"], e["standing"]) for e in shown] == [("node_joined", "verified"), ("plan_applied", "forged")]
    lines = run("events", "--url", server_url, "--deployment", "adder").stdout.splitlines()
    assert len(lines) == 1 and lines[0].endswith("a plan took effect  blocks=4  [FORGED]")
    assert run("events", "--url", server_url, "--keys", tmp_path).exit_code == Exit.USAGE


def test_events_of_a_server_without_an_audit_stream_say_so(server_url: str) -> None:
    assert run("events", "--url", server_url).exit_code == Exit.UNREACHABLE


async def publish_events(url: str, keys: Path, others: Path) -> None:
    orchestrator = await connect(url, "test", credentials=load_credentials(keys / ORCHESTRATOR))
    await ensure_streams(orchestrator)
    await orchestrator.close()
    connection = await connect(url, "test", credentials=load_credentials(keys / NODE))
    js = connection.jetstream()
    at = datetime(2026, 1, 2, tzinfo=UTC)
    joined = AuditEvent(at=at, source=NODE, kind=AuditKind.NODE_JOINED, message="a node joined")
    applied = AuditEvent(
        at=at,
        source=NODE,
        kind=AuditKind.PLAN_APPLIED,
        message="a plan took effect",
        deployment="adder",
        epoch=1,
        fields={"blocks": 4},
    )
    for event, folder in ((joined, keys), (applied, others)):
        identity = load_identity(folder / NODE, NODE)
        await js.publish(subjects.audit(NODE, event.kind), seal(event, AUDIT_TYPE, NODE, identity.key))
    await connection.close()


@pytest.mark.parametrize(
    ("text", "found"), [("4096", 4096), ("512M", 512 << 20), ("2GiB", 2 << 30), ("1.5kb", 1536), ("3 TiB", 3 << 40)]
)
def test_sizes_are_read_in_binary_units(text: str, found: int) -> None:
    assert parse_size(text) == found


def test_cores_are_read_as_numbers_and_ranges() -> None:
    assert parse_cores("0,2,4-7") == (0, 2, 4, 5, 6, 7)


def test_cores_that_end_before_they_begin_or_are_not_there_are_refused() -> None:
    with pytest.raises(ResplitError, match="'7-4' ends before it begins"):
        parse_cores("0,7-4")
    with pytest.raises(ResplitError, match="there is no core 4096: this machine has cores 0 to"):
        AgentConfig(NodeId("n1"), "nats://127.0.0.1:1", Path("keys"), Path("store"), cores=(0, 4096))


@pytest.mark.parametrize("read", [parse_size, parse_cores])
@pytest.mark.parametrize("text", ["", "two", "-1", "1,,2", "0-"])
def test_what_is_neither_size_nor_cores_is_refused(read: Callable[[str], object], text: str) -> None:
    with pytest.raises(ResplitError):
        read(text)


def test_a_placement_is_read_as_stages() -> None:
    n0, n1 = NodeId("n0"), NodeId("n1")
    chain = (Stage(node=n0, first=0, last=3), Stage(node=n1, first=4, last=4))
    assert parse_placement("n0:0-3, n1:4") == chain
    assert parse_placement("n0:0-3,n1:4 | n1:0-4") == (chain, (Stage(node=n1, first=0, last=4),))


def test_sensitive_blocks_are_named_or_numbered() -> None:
    assert [parse_sensitive(text) for text in ("ends", "all", "7,0,7")] == ["ends", "all", (0, 7)]
    assert [parse_sensitive(text) for text in ("ends:0", "ends:12")] == ["ends", "ends:12"]
    for text in ("", "some", "-1", "1-3", "0,", "ends:", "ends:01", "ends:-1", "ends:10000", "all:1"):
        with pytest.raises(ResplitError) as caught:
            parse_sensitive(text)
        assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "sensitive")


def test_private_is_so_many_blocks_at_either_end_and_is_said_once() -> None:
    assert [kept_private(None, private) for private in (None, 0, 2)] == [None, "ends", "ends:2"]
    assert kept_private("0,3", None) == (0, 3)
    assert sensitive_blocks(kept_private(None, 0), 10) == {0, 9}
    assert sensitive_blocks(kept_private(None, 2), 10) == {0, 1, 2, 7, 8, 9}
    assert sensitive_blocks(kept_private(None, 9999), 10) == frozenset(range(10)), "no model has others"
    with pytest.raises(ResplitError) as caught:
        kept_private("ends", 0)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "private")


@pytest.mark.parametrize("text", ["", "n0", "n0:1-0", "n0:a-b", "N0:0-1", "n0:0-1,"])
def test_what_is_no_placement_is_refused(text: str) -> None:
    with pytest.raises(ResplitError) as caught:
        parse_placement(text)
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "place")


@pytest.mark.parametrize(
    ("model", "name"), [("adder", "adder"), ("Qwen2.5-0.5B", "qwen2-5-0-5b"), ("ab" * 32, "abababababab")]
)
def test_a_deployment_is_called_like_its_model(model: str, name: str) -> None:
    assert default_name(model) == name


def test_a_server_without_an_orchestrator_is_unreachable(server_url: str) -> None:
    for command in (["status"], ["deploy", "adder"], ["deploy", "adder", "--no-wait"], ["remove", "adder"]):
        ended = run(*command, "--url", server_url)
        assert (ended.exit_code, "no orchestrator answers" in ended.stderr) == (Exit.UNREACHABLE, True)


def test_a_malformed_deployment_is_a_usage_error(server_url: str) -> None:
    for more in (["--name", "No name"], ["--place", "n0"], ["--chunk", "9999999"]):
        ended = run("deploy", "adder", *more, "--url", server_url)
        assert (ended.exit_code, "(invalid_request" in ended.stderr) == (Exit.USAGE, True)
