"""How a command runs: its event loop, its logging, and how it stops when it is told to."""

import asyncio
import faulthandler
import gc
import logging
import signal
import sys
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from logging_journald import Facility, JournaldLogHandler, check_journal_stream

from bus.supervision import say

T = TypeVar("T")
LINE = "%(asctime)s %(levelname)s %(name)s: %(message)s"


def log_to_stderr(level: int) -> None:
    """One line per event on stderr: everything from `level` up, and of the libraries only warnings. Where stderr is
    systemd's journal, entries with fields go there instead: priorities, and of audit events what they are about
    (`journalctl EXTRA_DEPLOYMENT=chat`)."""
    if check_journal_stream():
        logging.basicConfig(level=level, format="%(name)s: %(message)s", handlers=[_journal()], force=True)
    else:
        logging.basicConfig(level=level, format=LINE, stream=sys.stderr, force=True)
    for library in ("nats", "asyncio"):
        logging.getLogger(library).setLevel(logging.WARNING)


def _journal() -> logging.Handler:
    found: logging.Handler = JournaldLogHandler(identifier="resplit", facility=Facility.DAEMON, use_message_id=False)
    return found


def run_service(service: Coroutine[Any, Any, None]) -> None:
    """Run an agent or an orchestrator on uvloop until SIGTERM; Ctrl-C raises KeyboardInterrupt. Both let it close."""
    import uvloop  # noqa: PLC0415

    # Where every thread stood, into the log, when a watchdog ends a process that hangs (SIGABRT).
    faulthandler.enable()
    run_until_told(service, uvloop.new_event_loop)


def run_until_told(
    service: Coroutine[Any, Any, None], loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None
) -> None:
    """Run `service` until it ends or is told to: SIGTERM cancels it and returns, Ctrl-C cancels it and raises."""
    # What was imported stays: to look through it took 40 ms of every full collection, and every stream waited for that.
    gc.collect()
    gc.freeze()
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(_until_sigterm(service))


async def _until_sigterm(service: Coroutine[Any, Any, None]) -> None:
    running = asyncio.ensure_future(service)
    told = False

    def stop() -> None:
        nonlocal told
        told = True
        say("STOPPING=1")
        running.cancel()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop)
    try:
        await running
    except asyncio.CancelledError:
        if not told:
            raise
