"""What operators do to a cluster that serves: drain, lock, watch, diagnose; and what they are refused."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

import resplit
from models.store import Store
from resplit import control
from resplit.exits import Exit
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.control import StatusReply
from schemas.deployment import Stage
from schemas.errors import ErrorCode, ResplitError
from tests.integration.cluster_fixtures import (
    CHAT,
    N0,
    N1,
    N2,
    PROMPT,
    SETTINGS,
    SLOTS,
    Oracle,
    Serving,
    Streaming,
    command,
    serving,
    three_stages,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROOT = Path(resplit.__file__).parents[1]
COMMAND_S = 90
MOVED_S = 60.0
LEADS_S = 60.0
ORCHESTRATOR = "orchestrator"


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def tended(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """Three agents of these tests alone."""
    async with serving(tmp_path_factory.mktemp("tended") / "cluster", zoo_store, oracle) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="session")
async def chat(tended: Serving) -> AsyncIterator[Serving]:
    """The decoder in two stages that the planner chose; nothing is drained before or after."""
    await tended.deploy(CHAT, "llama", stages=2, settings=SETTINGS)
    yield tended
    for node in (await seen(tended)).drained:
        await control.undrain(tended.cluster.operator, node)
    tended.alive()
    await tended.until_answering()


async def seen(running: Serving) -> StatusReply:
    """What the orchestrator says, as soon as one leads: one that was stopped may have to be elected again."""
    async with asyncio.timeout(LEADS_S):
        while True:
            try:
                return await control.status(running.cluster.operator)
            except ResplitError as error:
                if error.code is not ErrorCode.UNREACHABLE:
                    raise
                await asyncio.sleep(0.1)


async def chat_stages(running: Serving) -> tuple[Stage, ...]:
    (found,) = [one for one in (await seen(running)).deployments if one.name == CHAT]
    assert found.current is not None
    return found.current.routes[0].stages


async def wished(running: Serving) -> object:
    """Everything that a refusal must leave as it is."""
    reply = await seen(running)
    return reply.drained, [(one.deployment, one.current, one.candidate, one.revision) for one in reply.deployments]


async def run(running: Serving, *arguments: str) -> tuple[int, str, str]:
    """Run a command of `resplit` on this cluster: (exit code, stdout, stderr)."""
    return await command(*arguments, *way_in(running))


def way_in(running: Serving) -> list[str]:
    """The options of every command that asks the cluster."""
    return ["--url", running.cluster.url, "--keys", str(running.cluster.operator_keys)]


async def test_a_drain_under_load_moves_the_blocks_and_loses_no_request(chat: Serving) -> None:
    source = (await chat_stages(chat))[0].node
    long = [await Streaming(chat.client, max_tokens=400).began() for _ in range(2)]
    waiting = [Streaming(chat.client, max_tokens=40) for _ in range(SLOTS)]
    asked_at = datetime.now(UTC)
    code, out, error = await run(chat, "drain", source, "--wait", "--timeout", str(MOVED_S))
    assert (code, error) == (Exit.OK, "")
    assert out.splitlines()[-1] == f"{source}: drained; no plan uses it, it is safe to switch off"
    assert {stage.node for stage in await chat_stages(chat)} == {N0, N1, N2} - {source}
    reply = await seen(chat)
    (epoch,) = [one.current.epoch for one in reply.deployments if one.name == CHAT and one.current is not None]
    assert (reply.drained, control.users(reply, source)) == ((source,), ())
    # Nothing is in flight on it any more, so switching it off harms nobody.
    after = [await Streaming(chat.client, max_tokens=200).began() for _ in range(2)]
    await chat.cluster.kill(source)
    assert [await stream.end() for stream in after] == [None] * 2
    await chat.cluster.start(source)
    assert [await stream.end() for stream in (*long, *waiting)] == [None] * (2 + SLOTS)
    assert {stream.ids for stream in long} == {chat.oracle.tokens(PROMPT, 400)}
    assert {stream.ids for stream in waiting} == {chat.oracle.tokens(PROMPT, 40)}
    assert {stream.ids for stream in after} == {chat.oracle.tokens(PROMPT, 200)}
    event = await chat.ear.wait(AuditKind.PLAN_PREPARED, deployment=CHAT, epoch=epoch)
    if event.at >= asked_at:  # else a plan that leaves it was on its way for a reason of its own
        assert event.fields["cause"] == "node_drains", event
        assert str(event.fields["reason"]).startswith(f"to be drained: {source}")


@pytest.mark.slow
async def test_a_drained_node_stays_drained_whatever_restarts(chat: Serving) -> None:
    source = (await chat_stages(chat))[0].node
    await control.drain_and_wait(chat.cluster.operator, source, MOVED_S)
    for process in (source, ORCHESTRATOR):
        await chat.cluster.kill(process)
        await chat.cluster.start(process)
    # Wish and plan outlive both; a new plan passes it over.
    assert (await seen(chat)).drained == (source,)
    await chat.deploy(CHAT, "llama", stages=2, settings=SETTINGS.model_copy(update={"max_queued": 7}))
    assert source not in {stage.node for stage in await chat_stages(chat)}
    with pytest.raises(ResplitError, match=f"node '{source}' is drained"):
        await control.place(chat.cluster.operator, CHAT, three_stages(source, N1, N2))
    await control.undrain(chat.cluster.operator, source)
    assert (await seen(chat)).drained == ()
    await chat.deploy(CHAT, "llama", stages=3, settings=SETTINGS)
    assert source in {stage.node for stage in await chat_stages(chat)}


async def test_a_drain_that_cannot_be_is_refused_and_changes_nothing(chat: Serving) -> None:
    at = chat.cluster.operator
    await chat.deploy(CHAT, "llama", stages=3, settings=SETTINGS)
    before = await wished(chat)
    with pytest.raises(ResplitError, match="no node 'n9'; the nodes are: n0, n1, n2") as caught:
        await control.drain(at, NodeId("n9"))
    assert caught.value.code is ErrorCode.UNKNOWN_NODE
    with pytest.raises(ResplitError, match="'chat' cannot run without node 'n1': 3 stages need as many nodes"):
        await control.drain(at, N1)
    with pytest.raises(ResplitError, match="there is no node 'n9'"):
        await control.undrain(at, NodeId("n9"))
    code, out, error = await run(chat, "drain", "N 9")
    assert (code, out, error.count("\n")) == (Exit.USAGE, "", 1)
    assert await wished(chat) == before
    await chat.answers()


async def test_what_is_shown_can_be_locked_and_unlocked_again(chat: Serving, tmp_path: Path) -> None:
    before = await chat_stages(chat)
    (wish,) = [one.deployment for one in (await seen(chat)).deployments if one.name == CHAT]
    code, shown, _ = await run(chat, "topology", "show", CHAT)
    assert code == Exit.OK
    file = tmp_path / "f.toml"
    file.write_text(shown)
    assert (await run(chat, "topology", "lock", str(file)))[0] == Exit.OK
    assert "# locked by an operator" in (await run(chat, "topology", "show", CHAT))[1]
    # What runs is frozen, not moved: not even an epoch passed.
    assert await chat_stages(chat) == before
    with pytest.raises(ResplitError, match="its placement is locked; run `resplit topology unlock chat`"):
        await control.drain(chat.cluster.operator, before[0].node)

    nodes = (before[1].node, before[0].node)
    swapped = tuple(stage.model_copy(update={"node": node}) for stage, node in zip(before, nodes, strict=True))
    other = tmp_path / "f.json"
    other.write_text(json.dumps({"deployment": CHAT, "stages": [stage.model_dump() for stage in swapped]}))
    code, out, error = await run(chat, "topology", "lock", str(other))
    assert (code, error) == (Exit.OK, "")
    assert "locked; serving epoch" in out
    assert await chat_stages(chat) == swapped
    await chat.answers()

    assert (await run(chat, "topology", "unlock", CHAT))[0] == Exit.OK
    (again,) = [one.deployment for one in (await seen(chat)).deployments if one.name == CHAT]
    assert again == wish
    assert await chat_stages(chat) == swapped


async def test_a_lock_that_cannot_hold_is_refused_and_changes_nothing(chat: Serving, tmp_path: Path) -> None:
    before = await wished(chat)
    file = tmp_path / "f.json"
    stages = [stage.model_dump() for stage in three_stages(N0, N1, NodeId("n9"))]
    wrong = [
        ({"deployment": CHAT, "stages": stages}, Exit.REFUSED, "(infeasible, stages.2.node)", "node 'n9' is not here"),
        ({"deployment": CHAT, "stages": stages[:2]}, Exit.USAGE, "(invalid_request, stages.1.last)", "blocks 0 to 5"),
        ({"deployment": CHAT, "stages": stages[1:]}, Exit.USAGE, "(invalid_request, stages.0.first)", "block 0 comes"),
        ({"deployment": "none", "stages": stages}, Exit.NOT_FOUND, "(unknown_deployment, deployment)", "'none'"),
    ]
    for topology, code, about, words in wrong:
        file.write_text(json.dumps(topology))
        ended = await run(chat, "topology", "lock", str(file))
        assert (ended[0], ended[1]) == (code, "")
        assert about in ended[2] and words in ended[2] and str(file) in ended[2]
    assert (await run(chat, "topology", "show", "none"))[0] == Exit.NOT_FOUND
    assert (await run(chat, "topology", "unlock", "none"))[0] == Exit.NOT_FOUND
    assert await wished(chat) == before


async def diagnosed(running: Serving, *arguments: str) -> tuple[int, dict[tuple[str, str | None], str]]:
    """(exit code, verdict by check and what it is about)."""
    code, out, error = await run(running, "doctor", "--json", *arguments)
    assert error == ""
    return code, {(one["check"], one.get("about")): one["verdict"] for one in json.loads(out)["findings"]}


async def test_a_doctor_finds_nothing_failing_in_a_healthy_cluster(chat: Serving) -> None:
    await chat.answers()
    code, found = await diagnosed(chat)
    assert (code, [check for check, verdict in found.items() if verdict == "fail"]) == (Exit.OK, [])
    assert {("nats", None), ("jetstream", None), ("orchestrator", None), ("keys", None), ("versions", None)} <= set(
        found
    )
    assert found["deployment", CHAT] == "ok"
    assert {about for check, about in found if check == "heartbeat"} == {N0, N1, N2}
    code, text, _ = await run(chat, "doctor")
    assert (code, "0 failing" in text) == (Exit.OK, True)
    assert (await run(chat, "doctor", "n9"))[0] == Exit.FAILED


async def test_a_doctor_finds_a_private_key_that_others_may_read(chat: Serving) -> None:
    keys = chat.cluster.keys / N1
    key = keys / f"{N1}.key"
    mode = key.stat().st_mode
    key.chmod(0o644)
    try:
        code, found = await diagnosed(chat, N1, "--agent", str(keys))
    finally:
        key.chmod(mode)
    assert (code, found["keys", key.name]) == (Exit.FAILED, "fail")


async def test_a_doctor_finds_a_killed_agent_and_what_suffers(chat: Serving) -> None:
    await chat.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
    await chat.cluster.kill(N1)
    try:
        await chat.until(lambda found: found.state == "degraded")
        code, found = await diagnosed(chat)
        assert code == Exit.FAILED
        assert {check for check, verdict in found.items() if verdict == "fail"} == {
            ("heartbeat", N1),
            ("deployment", CHAT),
        }
    finally:
        await chat.cluster.start(N1)
    await chat.until(lambda found: found.state == "serving" and len(found.applied) == 3)
    assert (await diagnosed(chat, N1))[0] == Exit.OK


@pytest.mark.parametrize("how", ["killed", "stopped"])
async def test_a_doctor_finds_an_orchestrator_that_does_not_answer(chat: Serving, how: str) -> None:
    pid = chat.cluster.processes[ORCHESTRATOR]
    if how == "killed":
        await chat.cluster.kill(ORCHESTRATOR)
    else:
        os.kill(pid, signal.SIGSTOP)
    try:
        code, found = await diagnosed(chat)
    finally:
        if how == "killed":
            await chat.cluster.start(ORCHESTRATOR)
        else:
            os.kill(pid, signal.SIGCONT)
    verdicts = {("keys", None): "ok", ("nats", None): "ok", ("jetstream", None): "ok", ("orchestrator", None): "fail"}
    assert (code, found) == (Exit.FAILED, verdicts)


async def test_status_is_drawn_anew_on_a_terminal_until_it_is_interrupted(chat: Serving) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "resplit", "status", "--watch", "--interval", "0.2", *way_in(chat)]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40"}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE
    )
    os.close(theirs)
    drawn = bytearray()
    over = asyncio.Event()

    def read() -> None:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            data = b""
        drawn.extend(data)
        if not data or drawn.count(b"term ") >= 3:
            over.set()
        if not data:
            asyncio.get_running_loop().remove_reader(ours)

    asyncio.get_running_loop().add_reader(ours, read)
    async with asyncio.timeout(COMMAND_S):
        await over.wait()
        process.send_signal(signal.SIGINT)
        _, error = await process.communicate()
    asyncio.get_running_loop().remove_reader(ours)
    os.close(ours)
    text = drawn.decode()
    assert (process.returncode, error) == (Exit.INTERRUPTED, b"interrupted\n")
    assert text.count("term ") >= 3
    assert "\x1b[" in text and "█" in text and "serves" in text


async def test_status_is_listed_without_control_codes_where_there_is_no_terminal(chat: Serving) -> None:
    for options, mark in ((["--json"], '"term"'), ([], "Deployments")):
        command = [sys.executable, "-m", "resplit", "status", "--watch", "--interval", "0.1", *options]
        process = await asyncio.create_subprocess_exec(
            *command, *way_in(chat), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert process.stdout is not None
        out = ""
        async with asyncio.timeout(COMMAND_S):
            while out.count(mark) < 2:
                line = await process.stdout.readline()
                assert line, "it ended"
                out += line.decode()
            process.send_signal(signal.SIGINT)
            await process.communicate()
        assert process.returncode == Exit.INTERRUPTED
        assert "\x1b" not in out
