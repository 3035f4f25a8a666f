"""A real nats-server with a generated configuration, its members' credentials, and an ear for what it refuses.

Its certificate and those of its members are of one cluster, made once; its logins are what each test says.
"""

import asyncio
import atexit
import os
import re
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from nats.aio.client import Client
from nats.errors import Error as NatsError

from bus.connection import MemberClient
from bus.credentials import Credentials, nkey_seed
from bus.natsconf import LOGINS_FILE, TlsFiles, logins_conf, server_conf
from bus.server_certificate import server_files
from bus.together import CLUSTER, make_members
from natstls.client import DeniedError
from natstls.contexts import server_context
from schemas.base import NodeId
from schemas.roster import Role
from tests.conftest import START_S, STOP_S, nats_server_binary

REFUSAL_S = 5.0


@cache
def cluster() -> Path:
    """The folders of a cluster with an agent, n0."""
    folder = Path(tempfile.mkdtemp(prefix="resplit-guarded-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    make_members(folder / "keys", [NodeId("n0")])
    return folder / "keys"


def credentials(name: str, role: Role) -> Credentials:
    """A member with an NKey of its own. It shows the certificate of n0: the server asks for one of the cluster, and
    goes by the NKey."""
    return Credentials(NodeId(name), role, nkey_seed(secrets.token_bytes(32)), server_context(cluster() / "n0", "n0"))


class GuardedServer:
    """One nats-server that lets in whom its file of logins names."""

    def __init__(self, folder: Path, members: Iterable[Credentials], tls: TlsFiles) -> None:
        self._folder = folder
        self._reloads = 0
        conf = server_conf("127.0.0.1:-1", folder / "jetstream", tls, max_file_store_bytes=4 << 30)
        (folder / "nats-server.conf").write_text(conf)
        self._write(logins_conf([member.login for member in members]))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        return (self._folder / "server.log").read_text()

    @property
    def url(self) -> str:
        [port] = set(re.findall(r"Listening for client connections on 127\.0\.0\.1:(\d+)", self.log))
        return f"nats://127.0.0.1:{port}"

    def start(self) -> None:
        command = [nats_server_binary(), "-c", str(self._folder / "nats-server.conf")]
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        self._until("Server is ready")

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(STOP_S)

    def reload(self, members: Iterable[Credentials]) -> None:
        """Let these in from now on, and nobody else."""
        self.reload_text(logins_conf([member.login for member in members]))

    def reload_text(self, logins: str) -> None:
        """Let in whom this file of logins names."""
        self._write(logins)
        self._reloads += 1
        self.hang_up("Reloaded server configuration", self._reloads)

    async def admits(self, who: Credentials) -> bool:
        """Whether it lets somebody in."""
        try:
            member = await Member(who).log_in(self.url)
        except NatsError as error:
            assert "Authorization Violation" in str(error)
            return False
        await member.client.close()
        return True

    def hang_up(self, said: str, times: int = 1) -> None:
        """SIGHUP, and wait for what the server says to it."""
        assert self._process is not None
        os.kill(self._process.pid, signal.SIGHUP)
        self._until(said, times)

    def _write(self, logins: str) -> None:
        fresh = self._folder / f"{LOGINS_FILE}.new"
        fresh.write_text(logins)
        fresh.rename(self._folder / LOGINS_FILE)

    def _until(self, said: str, times: int = 1) -> None:
        assert self._process is not None
        stop = time.monotonic() + START_S
        while self.log.count(said) < times:
            assert self._process.poll() is None, self.log
            assert time.monotonic() < stop, self.log
            time.sleep(0.01)


@contextmanager
def guarded(folder: Path, members: Iterable[Credentials], tls: TlsFiles | None = None) -> Iterator[GuardedServer]:
    """A server that runs for as long as the block does; `tls`: with a certificate of another cluster."""
    folder.mkdir(parents=True, exist_ok=True)
    server = GuardedServer(folder, members, tls or server_files(cluster() / CLUSTER))
    server.start()
    try:
        yield server
    finally:
        server.stop()


@dataclass
class Member:
    """A connection, and what the server refused on it."""

    who: Credentials
    client: Client = field(init=False)
    refused: list[str] = field(default_factory=list)
    _news: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.client = MemberClient(self.who)

    async def log_in(self, url: str, **options: object) -> "Member":
        """Connect with the member's own credentials; raises what nats-py raises where that is refused."""
        given = {**self.who.nats_options, "error_cb": self._failed, "allow_reconnect": False, **options}
        try:
            await self.client.connect(url, **given)  # type: ignore[arg-type]
        except NatsError:
            await self.client.close()
            raise
        return self

    async def is_refused(self, action: Awaitable[object]) -> str:
        """What the server said to an action that it refused: the operation and the subject."""
        self._news.clear()
        known = len(self.refused)
        with suppress(NatsError, TimeoutError):
            await action
        async with asyncio.timeout(REFUSAL_S):
            while len(self.refused) == known:
                await self._news.wait()
                self._news.clear()
        return self.refused[known]

    async def _failed(self, error: Exception) -> None:
        if isinstance(error, DeniedError):
            what = "publish to" if error.verb == "publish to" else "subscription to"
            self.refused.append(f'{what} "{error.subject}"')
            self._news.set()
