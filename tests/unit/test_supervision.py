"""What a process says to its service manager, over real sockets; and when it stops saying that it is alive."""

import asyncio
import os
import secrets
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from agent.compute import ComputeThread
from agent.pulse import PATIENCE, Pulse
from bus.supervision import (
    ALIVE_FILE,
    SOCKET,
    WATCHDOG_PID,
    WATCHDOG_S,
    WATCHDOG_USEC,
    Progress,
    Supervised,
    Work,
    say,
    watchdog_s,
)

DEADLINE_S = 10.0


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, socket.socket]]:
    """A service manager's socket and the address at which processes are told to find it."""
    named = str(tmp_path / "notify") if request.param == "path" else f"@resplit-{secrets.token_hex(8)}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as heard:
        heard.bind("\0" + named[1:] if named.startswith("@") else named)
        heard.settimeout(DEADLINE_S)
        yield named, heard


def test_one_datagram_says_all_fields(manager: tuple[str, socket.socket]) -> None:
    address, heard = manager
    say("READY=1", "STATUS=spare", environ={SOCKET: address})
    assert heard.recv(1000) == b"READY=1\nSTATUS=spare"


def test_nothing_is_said_where_nobody_listens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    say("READY=1", environ={})
    assert caplog.messages == []
    say("READY=1", environ={SOCKET: str(tmp_path / "nobody")})  # and where somebody should, that is no reason to end
    assert len(caplog.messages) == 1 and "cannot be told" in caplog.messages[0]


def test_a_file_is_there_while_the_process_serves_and_changes_while_it_lives(tmp_path: Path) -> None:
    path = tmp_path / "alive"
    environ = {ALIVE_FILE: str(path)}
    path.touch()
    say("EXTEND_TIMEOUT_USEC=1000000", "STATUS=waits", environ=environ)
    assert not path.exists(), "what a process left that was killed is no sign of life"
    say("READY=1", environ=environ)
    os.utime(path, (1, 1))
    say("STATUS=hangs", environ=environ)
    assert path.stat().st_mtime == 1
    say("WATCHDOG=1", environ=environ)
    assert path.stat().st_mtime > 1
    say("STOPPING=1", environ=environ)
    assert not path.exists()


def test_how_often_to_be_heard_of_is_said_in_microseconds_and_to_one_process() -> None:
    own = str(os.getpid())
    assert watchdog_s({}) is None
    assert watchdog_s({WATCHDOG_USEC: "2500000"}) == 2.5
    assert watchdog_s({WATCHDOG_USEC: "2500000", WATCHDOG_PID: own}) == 2.5
    assert watchdog_s({WATCHDOG_USEC: "2500000", WATCHDOG_PID: own + "0"}) is None
    assert watchdog_s({ALIVE_FILE: "x"}) == WATCHDOG_S
    assert watchdog_s({SOCKET: "x", WATCHDOG_USEC: "soon"}) == WATCHDOG_S


async def test_a_process_asks_for_time_until_it_serves_and_is_silent_in_trouble(
    manager: tuple[str, socket.socket],
) -> None:
    address, heard = manager
    trouble: list[str] = []
    life = Supervised(
        lambda watchdog_s: trouble[0] if trouble else None,
        lambda: "two\nlines",
        {SOCKET: address, WATCHDOG_USEC: "100000"},
    )
    telling = asyncio.create_task(life.run())
    said = await asyncio.to_thread(heard.recv, 1000)
    assert said == b"EXTEND_TIMEOUT_USEC=100000\nSTATUS=two lines"
    life.ready()
    life.ready()
    words = [await asyncio.to_thread(heard.recv, 1000) for _ in range(3)]
    assert words.count(b"READY=1\nSTATUS=two lines") == 1
    assert words[-1] == b"WATCHDOG=1\nSTATUS=two lines"
    trouble.append("a stone fell on it")
    while (word := await asyncio.to_thread(heard.recv, 1000)).startswith(b"WATCHDOG=1"):
        pass
    assert word == b"STATUS=hangs: a stone fell on it"
    heard.settimeout(0.5)
    with pytest.raises(TimeoutError):
        await asyncio.to_thread(heard.recv, 1000)
    telling.cancel()


def test_progress_is_that_something_was_completed_since() -> None:
    progress = Progress(now=100.0)
    assert progress.stood_still_s(0, 103.0) == 3.0
    assert progress.stood_still_s(2, 104.0) == 0.0
    assert progress.stood_still_s(2, 109.0) == 5.0
    assert progress.stood_still_s(3, 109.0) == 0.0


def test_work_is_as_old_as_the_call_that_runs_longest_even_when_nobody_waits_for_it() -> None:
    now = [10.0]
    work, begun, go = Work(lambda: now[0]), threading.Event(), threading.Event()

    def hangs() -> None:
        begun.set()
        go.wait(DEADLINE_S)

    assert work.longest_s() == 0.0
    running = threading.Thread(target=work.watched(hangs))
    running.start()
    assert begun.wait(DEADLINE_S)
    now[0] = 17.0
    assert work.watched(work.longest_s)() == 7.0
    go.set()
    running.join()
    assert work.longest_s() == 0.0

    def fails() -> None:
        raise ValueError

    with pytest.raises(ValueError):
        work.watched(fails)()
    assert work.longest_s() == 0.0


async def test_a_thread_that_completes_nothing_is_in_trouble_and_one_that_is_busy_is_not() -> None:
    loop, now = asyncio.get_running_loop(), [0.0]
    compute = ComputeThread(loop)
    pulse, bound_s = Pulse(compute, lambda: now[0]), PATIENCE * 1.0
    for _ in range(3):  # idle: what is put there comes back
        assert pulse.trouble(1.0) is None
        await compute.call(lambda: None)
        now[0] += bound_s - 0.5
    hold = threading.Event()
    compute.submit(lambda: hold.wait(DEADLINE_S), lambda _: None)
    for _ in range(20):  # busy: its own calls end, the ones that ask wait behind them
        compute.submit(lambda: None, lambda _: None)
    assert pulse.trouble(1.0) is None
    now[0] += bound_s - 0.1
    assert pulse.trouble(1.0) is None, "one call may be slow"
    now[0] += 0.2
    said = pulse.trouble(1.0)
    assert said is not None and "completed nothing for 4 s" in said
    hold.set()
    await compute.call(lambda: None)
    assert pulse.trouble(1.0) is None, "it goes on after all"
    compute.stop()
