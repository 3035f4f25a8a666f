"""Jobs that end when they are told to."""

import asyncio
from collections.abc import Coroutine, Sequence
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
        await end([running])
    await running


async def end(parts: Sequence[asyncio.Task[Any]]) -> None:
    """Cancel until each part has ended; how is the business of whoever looks at it."""
    while running := [part for part in parts if not part.done()]:
        for part in running:
            part.cancel()
        await asyncio.wait(running, timeout=CANCEL_AGAIN_S)
    await asyncio.gather(*parts, return_exceptions=True)  # so that no error counts as never retrieved


async def first_of(*jobs: Coroutine[Any, Any, Any]) -> Any:
    """Run the jobs until one of them ends, end the others, and return or raise what that one did."""
    parts = [asyncio.ensure_future(job) for job in jobs]
    try:
        ended, _ = await asyncio.wait(parts, return_when=asyncio.FIRST_COMPLETED)
    finally:
        await end(parts)
    return next(part for part in parts if part in ended).result()
