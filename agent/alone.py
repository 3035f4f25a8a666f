"""One process of a machine at a time: agents that share its cores would each measure the others.

Whoever has bound a name in the kernel's abstract sockets has the turn. It needs no file and no rights, and goes with
the process however that ends.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator

NAME = "\0resplit/measuring"
PATIENCE_S = 10.0
"""After which it is measured beside whoever has the turn: a stopped process may have it for ever."""
AGAIN_S = 0.02

log = logging.getLogger(__name__)


@contextlib.asynccontextmanager
async def alone_on_machine(patience_s: float = PATIENCE_S) -> AsyncIterator[bool]:
    """While no other process of this machine (of its network namespace) is in here; False if that took too long."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as turn:
        got = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                while not (got := _bound(turn)):  # noqa: ASYNC110 - other processes set no event here
                    await asyncio.sleep(AGAIN_S)
        if not got:
            log.info("another process of this machine has been loading for %g s: not waiting for it", patience_s)
        yield got


def _bound(turn: socket.socket) -> bool:
    try:
        turn.bind(NAME)
    except OSError:
        return False
    return True
