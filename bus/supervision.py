"""What a process says to whoever keeps it running: that it serves, how it fares, that it is alive.

To systemd by the protocol of `sd_notify` (a datagram to `$NOTIFY_SOCKET`), and to whatever looks at files (probes of
Kubernetes) by the file that `$RESPLIT_ALIVE` names: it is there while the process serves, and its time of change is
when the process was last found alive. Without these variables nothing happens.

Alive is more than an event loop that turns: what the loop hands to threads must come back too. Whoever runs such
threads says whether they get on (`Progress`, `Work`); while they do not, nothing is said, and the process is ended and
started again.
"""

import asyncio
import logging
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

SOCKET, ALIVE_FILE = "NOTIFY_SOCKET", "RESPLIT_ALIVE"
WATCHDOG_USEC, WATCHDOG_PID = "WATCHDOG_USEC", "WATCHDOG_PID"
VARIABLES = (SOCKET, ALIVE_FILE, WATCHDOG_USEC, WATCHDOG_PID)
STARTING = "EXTEND_TIMEOUT_USEC="
WATCHDOG_S = 30.0
"""How often to be heard of, where nobody says: for those who look at a file."""
WORDS_PER_WATCHDOG = 4
"""So many fit into the time within which one is expected: a busy machine that delays one or two is not punished."""

T = TypeVar("T")
log = logging.getLogger(__name__)


def say(*fields: str, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the service manager `fields`, as `READY=1` or `STATUS=...`; nothing where there is none.

    A service manager that cannot be told is none: that is logged, and raises nothing.
    """
    if path := environ.get(ALIVE_FILE):
        _mark(Path(path), fields)
    if address := environ.get(SOCKET):
        # A name that begins with "@" is abstract: it is in no folder, and begins with a zero byte.
        target = "\0" + address[1:] if address.startswith("@") else address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.setblocking(False)  # a manager that hangs must not hang us
                sender.sendto("\n".join(fields).encode(), target)
        except OSError as error:
            log.warning("the service manager at %s cannot be told: %s", address, error)


def watchdog_s(environ: Mapping[str, str] = os.environ) -> float | None:
    """Within how many seconds this process is to be heard of; None where nobody waits for it."""
    with suppress(ValueError):
        microseconds = int(environ.get(WATCHDOG_USEC, ""))
        if microseconds > 0 and environ.get(WATCHDOG_PID, str(os.getpid())) == str(os.getpid()):
            return microseconds / 1e6
    return WATCHDOG_S if SOCKET in environ or ALIVE_FILE in environ else None


class Supervised:
    """A process as its service manager sees it: starting until `ready`, and then alive or not.

    `trouble`: why the process is not to be called alive, or None; it is asked on the event loop several times within
    each `watchdog_s`, which it is given, in seconds. `status`: one line for people.
    """

    def __init__(
        self,
        trouble: Callable[[float], str | None],
        status: Callable[[], str],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._trouble = trouble
        self._status = status
        self._environ = environ
        self._watchdog_s = watchdog_s(environ)
        self._is_ready = False
        self._in_trouble = False

    def ready(self) -> None:
        """It serves, from now on; to say so again changes nothing."""
        if not self._is_ready:
            self._is_ready = True
            say("READY=1", self._line(), environ=self._environ)

    async def run(self) -> None:
        """Say how the process fares until cancelled.

        While it starts it asks for more time: it may wait for a server for days, and one whose loop hangs is ended.
        """
        if self._watchdog_s is None:
            await asyncio.Event().wait()
            return
        more = f"{STARTING}{round(self._watchdog_s * 1e6)}"
        while True:
            if not self._is_ready:
                say(more, self._line(), environ=self._environ)
            elif (trouble := self._trouble(self._watchdog_s)) is None:
                self._in_trouble = False
                say("WATCHDOG=1", self._line(), environ=self._environ)
            elif not self._in_trouble:
                self._in_trouble = True
                log.error("this process is not alive: %s", trouble)
                say(f"STATUS=hangs: {trouble}", environ=self._environ)
            await asyncio.sleep(self._watchdog_s / WORDS_PER_WATCHDOG)

    def _line(self) -> str:
        return "STATUS=" + self._status().replace("\n", " ")


class Progress:
    """PURE: whether a thread that completes call after call gets on. Times are in seconds, of any steady clock."""

    def __init__(self, now: float) -> None:
        self._completed = 0
        self._at = now

    def stood_still_s(self, completed: int, now: float) -> float:
        """How long nothing was completed, given how many calls were by now."""
        if completed != self._completed:
            self._completed, self._at = completed, now
        return now - self._at


class Work:
    """Calls that run in threads now, and since when."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._since: dict[object, float] = {}

    def watched(self, call: Callable[[], T]) -> Callable[[], T]:
        """`call`, counted while it runs, whatever became of whoever waited for it."""

        def run() -> T:
            this = object()
            self._since[this] = self._now()
            try:
                return call()
            finally:
                del self._since[this]

        return run

    def longest_s(self) -> float:
        """How long the one has run that has run longest; 0 where none does."""
        now = self._now()
        return max((now - since for since in list(self._since.values())), default=0.0)


def _mark(path: Path, fields: tuple[str, ...]) -> None:
    try:
        if "STOPPING=1" in fields or fields[0].startswith(STARTING):  # one that ended without a word left its file
            path.unlink(missing_ok=True)
        elif "READY=1" in fields or "WATCHDOG=1" in fields:
            path.touch()
    except OSError as error:
        log.warning("cannot say in %s that this process is alive: %s", path, error)
