"""`resplit audit` against a real server, with writers that die, return, and lose the bus meanwhile."""

import asyncio
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from nats.js.api import DiscardPolicy, StreamConfig

from bus.audit import AuditTrail
from bus.connection import connect
from bus.credentials import Credentials
from bus.identity import ORCHESTRATOR, load_credentials, load_identity
from bus.server_certificate import server_files
from bus.stopping import end
from bus.streams import AUDIT_BYTES_MAX, ensure_streams
from bus.together import CLUSTER, OPERATOR, add_member, make_members
from resplit.chain import Flaw, Verdict, verify
from resplit.exits import Exit
from resplit.rolling import seal_trail
from resplit.trail import read_trust
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import NodeId
from tests.audit_trails import N0, N1, Writer, all_out, envelopes_at, tell
from tests.conftest import NatsServer, running_server
from tests.integration.cluster_fixtures import command
from tests.security.guarded_bus import guarded

SOON_S = 60.0
ARCHIVIST = NodeId("archivist")


@pytest.fixture
def keys(tmp_path: Path) -> Iterator[Path]:
    make_members(tmp_path / "keys", [N0, N1])
    yield tmp_path / "keys"


@pytest.fixture
def tls_url(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_server(tmp_path_factory.mktemp("tls-nats"), keys / CLUSTER) as server:
        yield server.url


@asynccontextmanager
async def living(url: str, keys: Path, memory: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    """One process that writes to the trail, killed at the end if nobody did."""
    arguments = [sys.executable, "-m", "tests.integration.audit_writer", url, str(keys), N0, str(memory)]
    process = await asyncio.create_subprocess_exec(*arguments, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def told(process: asyncio.subprocess.Process, count: int) -> None:
    """Wait until it has recorded so many more events."""
    assert process.stdout is not None
    async with asyncio.timeout(SOON_S):
        for _ in range(count):
            assert await process.stdout.readline()


async def judged(url: str, keys: Path) -> Verdict:
    client = await connect(url, "test")
    try:
        return verify(await envelopes_at(client), read_trust(keys / OPERATOR))
    finally:
        await client.close()


@pytest.mark.slow
async def test_a_writer_that_is_killed_and_returns_while_the_bus_goes_away_leaves_a_sound_trail(
    nats_server: NatsServer, keys: Path, tmp_path: Path
) -> None:
    memory = tmp_path / "n0.audit"
    async with living(nats_server.url, keys, memory) as first:
        await told(first, 50)
        async with asyncio.timeout(SOON_S):
            while not memory.exists():  # noqa: ASYNC110 (a file tells nobody)
                await asyncio.sleep(0.05)
        first.kill()
        await first.wait()
    async with living(nats_server.url, keys, memory) as second:
        await told(second, 30)
        nats_server.kill()
        await told(second, 60)
        nats_server.start()
        await told(second, 30)
        second.send_signal(signal.SIGTERM)
        assert second.stdout is not None
        await second.stdout.read()
        async with asyncio.timeout(SOON_S):
            assert await second.wait() == 0
    verdict = await judged(nats_server.url, keys)
    assert verdict.is_sound, verdict.findings
    killed, ended = verdict.lives
    assert (killed.is_ended, ended.is_ended) == (False, True)
    assert ended.events >= 120 and ended.lost == 0, "what was recorded while the bus was away is there"
    assert {f.flaw for f in verdict.findings} - {Flaw.REPEATED} == {Flaw.BEGINNING, Flaw.CUT_OFF}


async def test_an_event_in_doubt_is_sent_again_as_the_same_bytes_and_stored_once(
    nats_server: NatsServer, keys: Path, tmp_path: Path
) -> None:
    client = await connect(nats_server.url, "test")
    try:
        async with Writer(client, load_identity(keys / N0, N0), tmp_path / "n0.audit") as trail:
            tell(trail, 1)
            await all_out(trail)
            # It takes the event once it is awake again; meanwhile its writer has given up waiting, and asks again.
            nats_server.pause()
            tell(trail, 1)
            await asyncio.sleep(7.0)
            nats_server.resume()
            await all_out(trail)
        assert len(await envelopes_at(client)) == 3
        assert verify(await envelopes_at(client), read_trust(keys / OPERATOR)).is_sound
    finally:
        await client.close()


async def test_what_follows_an_event_comes_once_and_not_before_the_stream_has_it(
    nats_server: NatsServer, keys: Path, tmp_path: Path
) -> None:
    client = await connect(nats_server.url, "test")
    told: list[int] = []
    try:
        async with Writer(client, load_identity(keys / N0, N0), tmp_path / "n0.audit") as trail:
            nats_server.pause()
            for number in range(3):
                trail.record(AuditKind.LINK_CHANGED, "a direct link came up", then=lambda n=number: told.append(n))  # type: ignore[misc]
            await asyncio.sleep(1.0)
            assert told == []
            nats_server.resume()
            await all_out(trail)
            assert told == [0, 1, 2]
    finally:
        await client.close()


async def test_a_full_stream_is_said_and_what_waits_is_written_once_there_is_room(
    nats_url: str, keys: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = await connect(nats_url, "test")
    js = client.jetstream()
    small = StreamConfig(
        subjects.STREAM_AUDIT, subjects=[subjects.ALL_AUDIT], max_bytes=8192, discard=DiscardPolicy.NEW
    )
    await js.add_stream(small)
    await ensure_streams(client)
    trail = AuditTrail(js, load_identity(keys / N0, N0), memory=tmp_path / "n0.audit")
    running = asyncio.create_task(trail.run())
    try:
        tell(trail, 40)
        async with asyncio.timeout(SOON_S):
            while not trail.full:  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.02)
        await asyncio.sleep(2.5)
        stored = len(await envelopes_at(client))
        assert 0 < stored < 40 and trail.backlog == 40 - stored
        waited: list[int] = []
        trail.record(AuditKind.LINK_CHANGED, "a direct link came up", then=lambda: waited.append(1))
        assert waited == [1], "nobody waits for a stream that is full"
        assert [record.message for record in caplog.records if "audit stream is full" in record.message][1:] == []
        await js.update_stream(small, max_bytes=1 << 20)
        await trail.drain(SOON_S)
        assert (trail.full, trail.backlog, waited) == (False, 0, [1])
        verdict = verify(await envelopes_at(client), read_trust(keys / OPERATOR))
        assert verdict.is_sound and verdict.lives[0].events == 42 and verdict.lives[0].lost == 0
    finally:
        await end([running])
        await client.close()


async def test_the_stream_keeps_its_beginning_and_has_a_limit_of_its_own(nats_url: str) -> None:
    client = await connect(nats_url, "test")
    config = (await (await ensure_streams(client)).stream_info(subjects.STREAM_AUDIT)).config
    await client.close()
    assert (config.discard, config.max_bytes) == (DiscardPolicy.NEW, AUDIT_BYTES_MAX)
    assert config.deny_delete and config.deny_purge


async def test_the_commands_prove_export_and_prove_the_export(tls_url: str, keys: Path, tmp_path: Path) -> None:
    client = await connect(tls_url, "test", credentials=load_credentials(keys / OPERATOR))
    async with Writer(client, load_identity(keys / N0, N0), tmp_path / "n0.audit") as trail:
        tell(trail, 5)
        trail.record(AuditKind.LINK_CHANGED, "was \x1b[31mred", why="a\nb")
    everything = await envelopes_at(client)
    export, known = tmp_path / "trail.jsonl", tmp_path / "known.jsonl"
    asked = ["audit", "verify", "--keys", str(keys / OPERATOR), "--known", str(known)]
    at = ["--url", tls_url, "--keys", str(keys / OPERATOR)]
    code, out, _ = await command(*asked, "--url", tls_url)
    assert code == Exit.OK
    assert out.splitlines()[-1].startswith("sound: 7 events, 1 writers, 1 lives; 0 undeclared, 1 declared; every sig")
    code, _, said = await command("audit", "export", str(export), *at)
    assert (code, said) == (Exit.OK, "7 events exported\n")
    assert (await command("audit", "export", str(export), *at))[0] == Exit.USAGE
    lines = export.read_text().splitlines(keepends=True)
    assert len(lines) == len(everything) == 7
    assert (await command(*asked, "--file", str(export)))[0] == Exit.OK
    export.write_text("".join(lines[:3] + lines[4:]))
    code, out, _ = await command(*asked, "--file", str(export))
    assert code == Exit.FAILED
    assert "FAULT" in out and "gap" in out and out.splitlines()[-1].startswith("NOT SOUND")
    export.write_text("".join(lines[:5]))
    assert (await command("audit", "verify", "--keys", str(keys / OPERATOR), "--file", str(export)))[0] == Exit.OK
    code, out, _ = await command(*asked, "--file", str(export))
    assert code == Exit.FAILED and "truncated" in out, "who kept a checkpoint knows that there was more"
    assert (await command(*asked, "--file", str(export), "--and-stream", "--url", tls_url))[0] == Exit.OK
    export.write_text(lines[0].replace("direct", "lasting"))
    assert (await command(*asked, "--file", str(export)))[0] == Exit.FAILED
    await client.close()


async def test_the_commands_say_who_held_what_in_json_too(tls_url: str, keys: Path, tmp_path: Path) -> None:
    client = await connect(tls_url, "test", credentials=load_credentials(keys / OPERATOR))
    async with Writer(client, load_identity(keys / N0, N0), tmp_path / "n0.audit") as trail:
        trail.record(AuditKind.PLAN_READY, "this node answered ready", deployment="chat", epoch=3)  # type: ignore[arg-type]
    for options in ([], ["--json"]):
        code, out, _ = await command(
            "audit", "verify", "--holders", "--keys", str(keys / OPERATOR), "--url", tls_url, *options
        )
        assert code == Exit.OK and "n0" in out and "chat" in out
    await client.close()


async def test_a_stream_that_is_rolled_goes_on_and_both_parts_are_one_trail(keys: Path, tmp_path: Path) -> None:
    """Nobody but an archivist can do it: here the server refuses whatever a member may not."""
    add_member(keys, ARCHIVIST, "archivist", None)
    logins = {name: load_credentials(keys / name) for name in (ORCHESTRATOR, OPERATOR, ARCHIVIST)}
    with guarded(tmp_path / "nats", logins.values(), server_files(keys / CLUSTER)) as server:
        await roll(server.url, keys, logins, tmp_path)
        assert "Violation" not in server.log


async def roll(url: str, keys: Path, logins: dict[NodeId, Credentials], tmp_path: Path) -> None:
    client = await connect(url, "writer", credentials=logins[ORCHESTRATOR])
    archivist = await connect(url, "archivist", credentials=logins[ARCHIVIST])
    at = ["--url", url, "--keys", str(keys / ARCHIVIST)]
    first, second, known = tmp_path / "first.jsonl", tmp_path / "second.jsonl", tmp_path / "known.jsonl"
    asked = ["audit", "verify", "--keys", str(keys / OPERATOR), "--known", str(known), "--url", url]
    async with Writer(client, load_identity(keys / ORCHESTRATOR, ORCHESTRATOR), tmp_path / "writer.audit") as trail:
        tell(trail, 5)
        await all_out(trail)
        assert (await command(*asked))[0] == Exit.OK
        rolling = asyncio.create_task(command("audit", "export", str(first), "--roll", *at))
        while not rolling.done():
            tell(trail, 1)
            await asyncio.sleep(0.005)
        code, _, said = await rolling
        assert code == Exit.OK, said
        tell(trail, 3)
        await all_out(trail)
    info = await client.jetstream().stream_info(subjects.STREAM_AUDIT)
    assert info.state.first_seq == len(first.read_text().splitlines()) + 1, "sequences go on where they were"
    assert (info.config.sealed, info.config.deny_purge, info.config.max_bytes) == (False, True, AUDIT_BYTES_MAX)
    code, out, _ = await command(*asked, "--file", str(first), "--and-stream")
    assert code == Exit.OK, out
    code, out, _ = await command(*asked)
    assert code == Exit.FAILED and "events 1 to" in out, "one part alone is not the whole"
    assert (await command("audit", "export", str(second), *at))[0] == Exit.OK
    assert (await command(*asked, "--file", str(first), "--file", str(second)))[0] == Exit.OK
    assert (await command("audit", "export", "--roll", *at))[0] == Exit.USAGE
    operators = ["--url", url, "--keys", str(keys / OPERATOR)]
    code, _, said = await command("audit", "export", str(tmp_path / "no.jsonl"), "--roll", *operators)
    assert (code, "enrolled as archivist" in said) == (Exit.REFUSED, True)
    await seal_trail(archivist.jetstream())  # by somebody who then stopped half way
    third = tmp_path / "third.jsonl"
    assert (await command("audit", "export", str(third), "--roll", *at))[0] == Exit.OK
    assert (third.read_text(), await envelopes_at(archivist)) == (second.read_text(), [])
    await client.close()
    await archivist.close()
