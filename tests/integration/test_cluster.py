"""A local cluster of real processes: it starts, survives losses, and leaves nothing behind."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import resplit
from bus.natsconf import LOGINS_FILE, logins_conf
from bus.server_certificate import server_files
from bus.together import CLIENT, CLUSTER, make_members
from resplit import control
from resplit.child import Child
from resplit.client import Client
from resplit.cluster import LocalCluster
from resplit.exits import Exit
from resplit.replies import RequestError
from resplit.server import NatsServer
from schemas.errors import ErrorCode, ResplitError

ROOT = Path(resplit.__file__).parents[1]
STEP_S = 60
needs_services = pytest.mark.skipif(
    find_spec("agent.shell") is None or find_spec("orchestrator.shell") is None, reason="services are not built yet"
)
HOLD = """
import asyncio, sys
from pathlib import Path
from bus.natsconf import logins_conf
from bus.server_certificate import server_files
from resplit.server import NatsServer

async def main():
    server = NatsServer(Path(sys.argv[1]), lambda: logins_conf(()), server_files(Path(sys.argv[2])))
    await server.start()
    print(server.child.pid, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


def runs(pid: int) -> bool:
    """Whether the process lives; one that ended but was not yet reaped does not."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


async def gone(pids: list[int], timeout_s: float = STEP_S) -> bool:
    async with asyncio.timeout(timeout_s):
        while any(runs(pid) for pid in pids):  # noqa: ASYNC110 (processes send no events to strangers)
            await asyncio.sleep(0.02)
    return True


async def test_a_server_keeps_its_port_over_a_restart_and_leaves_nothing(tmp_path: Path) -> None:
    make_members(tmp_path / "keys", [])
    cluster = tmp_path / "keys" / CLUSTER
    server = NatsServer(tmp_path / "nats", (cluster / LOGINS_FILE).read_text, server_files(cluster))
    await server.start()
    url, pid = server.url, server.child.pid
    assert pid is not None
    async with Client(url, keys=tmp_path / "keys" / CLIENT):
        pass
    with pytest.raises(RequestError, match="give the folder of a member"):
        async with Client(url):
            pass
    await server.child.kill()
    await server.start()
    assert server.url == url
    second = server.child.pid
    assert second is not None
    await server.child.stop()
    assert await gone([pid, second], 0.1)
    assert server.child.pid is None


async def test_a_port_that_is_taken_is_one_line_that_says_what_to_do(tmp_path: Path) -> None:
    make_members(tmp_path / "keys", [])
    tls = server_files(tmp_path / "keys" / CLUSTER)
    first = NatsServer(tmp_path / "a", lambda: logins_conf(()), tls)
    await first.start()
    port = int(first.url.rsplit(":", 1)[1])
    with pytest.raises(ResplitError) as refused:
        await NatsServer(tmp_path / "b", lambda: logins_conf(()), tls, port).start()
    assert refused.value.field == "port"
    assert refused.value.message.startswith(f"port {port} of 127.0.0.1 is another program's; ")
    await first.child.stop()


async def test_killing_the_parent_ends_its_children(tmp_path: Path, members: Path) -> None:
    holder = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HOLD, str(tmp_path), str(members / CLUSTER), cwd=ROOT, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    pid = int(await holder.stdout.readline())
    assert runs(pid)
    holder.kill()
    await holder.wait()
    assert await gone([pid])


async def test_a_child_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    deaf = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
    )
    child = Child("deaf", [sys.executable, "-c", deaf], tmp_path / "log")
    await child.start()
    pid = child.pid
    assert pid is not None
    async with asyncio.timeout(10):
        while "deaf" not in child.tail():  # noqa: ASYNC110 (a log file sends no events)
            await asyncio.sleep(0.02)
    await child.stop(timeout_s=0.2)
    assert await child.ended() == -signal.SIGKILL
    assert not runs(pid)


async def test_a_paused_child_still_ends_when_it_is_told_to(tmp_path: Path) -> None:
    child = Child("paused", [sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log")
    await child.start()
    child.pause()
    await child.stop()
    assert await child.ended() == -signal.SIGTERM
    child.pause()  # nobody is there to be paused
    child.resume()


async def test_an_agent_that_dies_at_start_is_told_with_its_log_and_nothing_is_left(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path / "cluster", tmp_path / "store", agents=2)
    cluster._make_keys()
    (cluster.keys / "orchestrator" / "orchestrator.key").write_text("not a key\n")
    with pytest.raises(ResplitError) as caught:
        async with cluster:
            pass
    assert caught.value.code is ErrorCode.INTERNAL
    assert "orchestrator ended with exit status" in caught.value.message
    assert cluster.processes == {}


async def test_one_folder_holds_one_cluster_at_a_time(tmp_path: Path) -> None:
    first = LocalCluster(tmp_path / "cluster", tmp_path / "store")
    first._lock_folder()
    with pytest.raises(ResplitError, match="another cluster runs in"):
        async with LocalCluster(tmp_path / "cluster", tmp_path / "store"):
            pass
    await first.__aexit__(None, None, None)


@pytest.mark.parametrize("arguments", [{"agents": 0}, {"orchestrators": 0}, {"agents": 2, "cores": [[0]]}])
def test_a_cluster_that_makes_no_sense_is_refused(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(ResplitError) as caught:
        LocalCluster(tmp_path, tmp_path, **arguments)  # type: ignore[arg-type]
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_this_system_can_tell_whether_a_process_runs() -> None:
    assert runs(os.getpid())


async def hold(folder: Path) -> tuple[asyncio.subprocess.Process, dict[str, int]]:
    """`resplit up` as an operator runs it, once it says that it is up: (the process, its children)."""
    command = [sys.executable, "-m", "resplit", "up", "--agents", "1", "--port", "0", "--http", "0", "--json"]
    command += ["--folder", str(folder / "cluster"), "--store", str(folder / "store")]
    up = await asyncio.create_subprocess_exec(*command, cwd=ROOT, stdout=subprocess.PIPE)
    assert up.stdout is not None
    async with asyncio.timeout(STEP_S):
        said = json.loads(await up.stdout.readline())
    processes: dict[str, int] = said["processes"]
    assert set(processes) == {"nats", "orchestrator", "n0", "gateway"}
    return up, processes


@needs_services
async def test_a_cluster_reports_its_agents_brings_a_killed_one_back_and_leaves_no_process(tmp_path: Path) -> None:
    async with LocalCluster(tmp_path / "cluster", tmp_path / "store", agents=2, memory_bytes=256 << 20) as cluster:
        before = cluster.processes
        seen = await control.status(cluster.operator)
        assert {node.capacity.node for node in seen.nodes} == {"n0", "n1"}
        assert all(not node.lost for node in seen.nodes)
        assert all(runs(pid) for pid in before.values())
        ending = asyncio.create_task(cluster.first_to_end())
        await asyncio.sleep(0)
        await cluster.kill("n1")
        name, error = await ending
        assert (name, "signal SIGKILL" in error.message) == ("n1", True)
        assert "n1" not in cluster.processes
        await cluster.start("n1")
        after = cluster.processes
        assert after["n1"] != before["n1"]
        assert all(runs(pid) for pid in after.values())
    assert cluster.processes == {}
    assert await gone([*before.values(), *after.values()])


@needs_services
@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, Exit.INTERRUPTED), (signal.SIGTERM, Exit.OK), (signal.SIGKILL, -signal.SIGKILL)],
)
async def test_up_leaves_no_process_however_it_is_ended(tmp_path: Path, number: signal.Signals, status: int) -> None:
    up, processes = await hold(tmp_path)
    os.kill(up.pid, number)
    async with asyncio.timeout(STEP_S):
        assert await up.wait() == status
    assert await gone(list(processes.values()))
