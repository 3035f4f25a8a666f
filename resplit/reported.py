"""Until the processes of a local cluster have reported: each wait is bounded, and ends with the reason."""

import asyncio
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import suppress
from typing import Any

import httpx2
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from resplit.child import Child
from resplit.control import status_on
from schemas import subjects
from schemas.codec import decode
from schemas.control import StatusReply
from schemas.errors import ErrorCode, ResplitError

GATEWAY_READY_S = 30.0
ORCHESTRATOR_READY_S = 60.0
AGENTS_READY_S = 120.0
"""An agent imports ONNX Runtime and measures its processor before it reports."""
ASK_S = 0.5
KNOWN_S = 3.0
POLL_S = 0.05

Heard = defaultdict[str, asyncio.Event]
"""By node: whether it has reported."""


async def until_healthy(url: str) -> None:
    """Wait until the gateway there answers; raises TIMEOUT."""
    try:
        async with asyncio.timeout(GATEWAY_READY_S), httpx2.AsyncClient() as client:
            while True:
                with suppress(httpx2.TransportError):
                    if (await client.get(f"{url}/health")).status_code == 200:
                        return
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        message = f"the gateway does not answer at {url} after {GATEWAY_READY_S:g} s"
        raise ResplitError(ErrorCode.TIMEOUT, message) from error


async def hear_capacity(connection: Nats) -> Heard:
    """Listen for heartbeats from now on."""
    heard: Heard = defaultdict(asyncio.Event)

    async def note(message: Msg) -> None:
        heard[message.subject.rsplit(".", 1)[-1]].set()

    await connection.subscribe(subjects.ALL_CAPACITY, cb=note)
    await connection.flush()
    return heard


async def until_known(connection: Nats, names: Sequence[str]) -> None:
    """Wait until the orchestrator, if there is one, has taken in what was heard."""
    with suppress(TimeoutError, ResplitError):
        async with asyncio.timeout(KNOWN_S):
            while True:
                reply = await status_on(connection, ASK_S)
                if {node.capacity.node for node in reply.nodes}.issuperset(names):
                    return
                await asyncio.sleep(POLL_S)


async def until_heard(heard: Heard, names: Sequence[str]) -> None:
    """Wait until each of `names` has reported; raises TIMEOUT with those that have not."""
    try:
        async with asyncio.timeout(AGENTS_READY_S):
            await asyncio.gather(*(heard[name].wait() for name in names))
    except TimeoutError as error:
        silent = ", ".join(name for name in names if not heard[name].is_set())
        message = f"no capacity report from {silent} after {AGENTS_READY_S:g} s"
        raise ResplitError(ErrorCode.TIMEOUT, message) from error


async def until_orchestrating(connection: Nats, names: frozenset[str]) -> None:
    """Wait until each of `names` leads or stands by; raises TIMEOUT with those that do not."""
    found: set[str] = set()
    try:
        async with asyncio.timeout(ORCHESTRATOR_READY_S):
            while not names <= found:
                with suppress(NatsError):  # no responders yet
                    reply = await connection.request(subjects.control("status"), b"", timeout=ASK_S)
                    status = decode(StatusReply, reply.data, "status")
                    found = {*status.standbys, *([status.leader.leader] if status.leader is not None else [])}
                await asyncio.sleep(POLL_S)
    except TimeoutError as error:
        message = f"after {ORCHESTRATOR_READY_S:g} s there is no word of {', '.join(sorted(names - found))}"
        raise ResplitError(ErrorCode.TIMEOUT, message) from error


async def unless_one_ends(children: Sequence[Child], ready: Coroutine[Any, Any, None]) -> None:
    """Wait for `ready`; raises how it ended if one of `children` ends before."""
    waiting = asyncio.ensure_future(ready)
    ends = {asyncio.ensure_future(child.ended()): child for child in children}
    try:
        await asyncio.wait({waiting, *ends}, return_when=asyncio.FIRST_COMPLETED)
        for end, child in ends.items():
            if end.done():
                raise child.died(end.result())
        await waiting
    finally:
        for future in (waiting, *ends):
            future.cancel()
        await asyncio.gather(waiting, return_exceptions=True)
