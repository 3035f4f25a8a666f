"""Jobs that end when they are told to."""

import asyncio
from collections.abc import Coroutine
from typing import Any

CANCEL_AGAIN_S = 0.5


async def stoppable(job: Coroutine[Any, Any, None]) -> None:
    """Run `job`; when this is cancelled, cancel `job` as often as it takes.

    Once may not do: in Python 3.11 `asyncio.wait_for`, which nats-py uses in every request, loses a cancellation
    that arrives together with its result, and a job that never ends by itself then goes on for ever.
    """
    running = asyncio.ensure_future(job)
    try:
        await asyncio.wait({running})
    finally:
        while not running.done():
            running.cancel()
            await asyncio.wait({running}, timeout=CANCEL_AGAIN_S)
    await running
