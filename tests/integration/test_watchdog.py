"""Processes under a service manager: real ones, a real socket, and a compute thread that is hung on command."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from agent.pulse import PATIENCE
from bus.identity import ORCHESTRATOR
from bus.together import CLUSTER
from tests.conftest import running_server

WATCHDOG_S = 1.0
BOUND_S = PATIENCE * WATCHDOG_S
"""Of the agent's compute thread."""
START_S = 60.0
HOOKED = """
import signal, sys, time
import agent.shell
from resplit.cli import main

def hangs_on_command():
    while True:
        time.sleep(1)

class Compute(agent.shell.ComputeThread):
    def __init__(self, loop):
        super().__init__(loop)
        loop.add_signal_handler(signal.SIGUSR1, self.submit, hangs_on_command, print)
        loop.add_signal_handler(signal.SIGUSR2, self.be_busy, None)

    def be_busy(self, _):
        self.submit(lambda: time.sleep(0.2), self.be_busy)

agent.shell.ComputeThread = Compute
main()
"""


class Manager:
    """A service manager that hears a process and ends it as one does."""

    def __init__(self, folder: Path, program: list[str]) -> None:
        self._heard = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._heard.bind(str(folder / "notify"))
        environ = {**os.environ, "NOTIFY_SOCKET": str(folder / "notify"), "WATCHDOG_USEC": f"{WATCHDOG_S * 1e6:.0f}"}
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen([sys.executable, *program], env=environ, stderr=log)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self._heard.close()

    def said(self, seconds: float) -> list[str]:
        """What it says within so many seconds."""
        words, end = [], time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._heard.settimeout(left)
            try:
                words.append(self._heard.recv(1000).decode())
            except TimeoutError:
                break
        return words

    def until(self, begins: str, seconds: float = START_S) -> list[str]:
        """What it says until something begins so, that included."""
        words, end = [], time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            self._heard.settimeout(left)
            try:
                words.append(self._heard.recv(1000).decode())
            except TimeoutError:
                break
            if words[-1].startswith(begins):
                return words
        raise AssertionError(f"no {begins!r} among {set(words)}; its log:\n{self.log.read_text()}")


@contextmanager
def managed(folder: Path, program: list[str]) -> Iterator[Manager]:
    folder.mkdir()
    manager = Manager(folder, program)
    try:
        yield manager
    finally:
        manager.close()


@pytest.mark.slow
def test_an_agent_is_alive_while_its_compute_thread_is(members: Path, tmp_path: Path) -> None:
    with running_server(tmp_path, members / CLUSTER, guarded=True) as server:
        options = ["--url", server.url, "--store", str(tmp_path / "store")]
        agent = ["-c", HOOKED, "agent", "n0", "--keys", str(members / "n0"), "--threads", "1", *options]
        orchestrator = ["-m", "resplit", "orchestrator", "--keys", str(members / ORCHESTRATOR), *options]
        with managed(tmp_path / "agent", agent) as serving:
            serving.until("EXTEND_TIMEOUT_USEC=1000000\nSTATUS=waits for an orchestrator")
            with managed(tmp_path / "orchestrator", orchestrator) as leading:
                assert leading.until("READY=1")[-1] == "READY=1\nSTATUS=stands by"
                before = serving.until("READY=1")
                assert not any(word.startswith("WATCHDOG=1") for word in before)
                assert before[-1] == "READY=1\nSTATUS=spare; 0 sequence(s)"
                leading.until("WATCHDOG=1\nSTATUS=leads in term 1: 0 deployment(s), 1 node(s)")

                idle = serving.said(BOUND_S + 2 * WATCHDOG_S)
                assert len(idle) > BOUND_S and set(idle) == {"WATCHDOG=1\nSTATUS=spare; 0 sequence(s)"}
                serving.process.send_signal(signal.SIGUSR2)
                busy = serving.said(BOUND_S + 2 * WATCHDOG_S)
                assert len(busy) > BOUND_S and set(busy) == set(idle)

                serving.process.send_signal(signal.SIGUSR1)
                *fed, last = serving.until("STATUS=hangs", BOUND_S + 5)
                assert set(fed) <= set(idle) and "the compute thread has completed nothing" in last
                assert serving.said(2 * WATCHDOG_S) == [], "it is not fed any more"

                serving.process.send_signal(signal.SIGABRT)  # as systemd ends it
                assert serving.process.wait(10) == -signal.SIGABRT
                assert "in hangs_on_command" in serving.log.read_text(), "where every thread stood is in the log"

                leading.process.terminate()
                assert leading.until("STOPPING=1")
                assert leading.process.wait(10) == 0
