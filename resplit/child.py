"""One operating-system process of a local cluster: started on a leash, logged to a file, ended for certain."""

import asyncio
import os
import signal
import sys
from asyncio.subprocess import DEVNULL, Process
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from bus import supervision
from resplit import leash
from schemas.errors import ErrorCode, ResplitError

STOP_S = 10.0
"""From SIGTERM to SIGKILL: an agent closes links and sessions in well under a second."""
TAIL_BYTES = 2000


class Child:
    """A program under a name, with one log file that successive runs append to.

    Its session is its own, so Ctrl-C in a terminal reaches only the parent, which then ends its children
    in order; `on_orphan` is the signal the kernel sends it should the parent be killed.
    """

    def __init__(
        self, name: str, command: Sequence[str], log: Path, on_orphan: signal.Signals = signal.SIGKILL
    ) -> None:
        self.name = name
        self.log = log
        self._command = list(command)
        self._on_orphan = on_orphan
        self._process: Process | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if running and self._process is not None else None

    async def start(self) -> None:
        """Run the program; returns at once."""
        assert self.pid is None, f"{self.name} already runs"
        # The child finds Resplit where this process found it, whatever folder either was started in.
        root = str(Path(leash.__file__).parents[1])
        path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
        tether = [sys.executable, "-I", "-S", leash.__file__, str(os.getpid()), str(int(self._on_orphan))]
        self.log.parent.mkdir(parents=True, exist_ok=True)
        # Whoever keeps this process running hears of it, and not of its children.
        inherited = {name: value for name, value in os.environ.items() if name not in supervision.VARIABLES}
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *tether,
                *self._command,
                stdin=DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**inherited, "PYTHONPATH": path},
            )

    async def ended(self) -> int:
        """Wait until it has ended; the exit status, negative for a signal."""
        assert self._process is not None
        return await self._process.wait()

    async def stop(self, timeout_s: float = STOP_S) -> None:
        """End it: SIGTERM, and SIGKILL if it is still there after `timeout_s`."""
        if self.pid is None or self._process is None:
            return
        self.resume()  # a stopped process would not hear the other signal
        with suppress(ProcessLookupError):  # it has just ended by itself
            self._process.terminate()
        try:
            async with asyncio.timeout(timeout_s):
                await self._process.wait()
        except TimeoutError:
            await self.kill()

    def pause(self) -> None:
        """Stop it where it is, as if its machine hung; returns at once."""
        self.signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on after `pause`; a process that runs does not notice."""
        self.signal(signal.SIGCONT)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal; one that has ended does not notice."""
        if self.pid is not None and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def kill(self) -> None:
        """End it now, without a word to it."""
        if self.pid is not None and self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()
            await self._process.wait()

    def died(self, status: int) -> ResplitError:
        """The error that says how it ended, with the end of its log."""
        how = f"exit status {status}" if status >= 0 else f"signal {signal.Signals(-status).name}"
        return ResplitError(ErrorCode.INTERNAL, f"{self.name} ended with {how}; its log ends:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines of its log."""
        try:
            with self.log.open("rb") as log:
                log.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
                return log.read().decode(errors="replace").rstrip()
        except OSError:
            return "(nothing was logged)"
