"""How often JetStream keeps what it keeps: as often as the cluster has servers, one, three or five.

Most of a stream's replicas have to agree on a write, so of three servers any one may be lost, with nothing of what was
acknowledged. A server says whether it is one of several, and at which addresses the others are that it knows; whether
so many replicas find room says the cluster's own leader, who knows which servers are away.
"""

import logging
from collections.abc import Awaitable, Callable
from typing import TypeVar

from nats.aio.client import Client
from nats.js import JetStreamContext
from nats.js.errors import APIError

REPLICAS_MAX = 5
"""JetStream takes no more, and more make every write slower and nothing safer."""
NO_PEERS = frozenset({10005, 10074})
"""JetStream's error codes: too few servers are there, or the server is none of several."""

log = logging.getLogger(__name__)

Made = TypeVar("Made")


def counts(servers: int) -> tuple[int, ...]:
    """PURE: how often something is kept by so many servers, at best, and then as is tried if some of them are away."""
    return tuple(count for count in (REPLICAS_MAX, 3, 1) if count <= max(1, servers))


def servers_of(client: Client) -> int:
    """How many servers the cluster has that this connection leads to, as far as its server says; at least three where
    there are several."""
    told = client._server_info  # nats-py shows what a server says of itself nowhere else
    return max(3, len(told.get("connect_urls") or ())) if told.get("cluster") else 1


async def with_replicas(js: JetStreamContext, make: Callable[[int], Awaitable[Made]]) -> Made:
    """Make something, kept as often as can be now: `make` is given how often. Raises what it raises."""
    for count in counts(servers_of(js._nc)):
        try:
            return await make(count)
        except APIError as error:
            if error.err_code not in NO_PEERS or count == 1:
                raise
    raise AssertionError("once is the last that is tried")


async def spread(js: JetStreamContext, stream: str) -> int:
    """Keep a stream that is there as often as the cluster has servers; how often that is now.

    It is never kept less often than it was. Raises what nats-py raises, `NotFoundError` where there is no such stream.
    """
    config = (await js.stream_info(stream)).config
    kept = config.num_replicas or 1
    for count in counts(servers_of(js._nc)):
        if count <= kept:
            return kept
        try:
            await js.update_stream(config, num_replicas=count)
        except APIError as error:
            if error.err_code not in NO_PEERS:
                raise
        else:
            log.warning("%s is kept %d times from now on, and was kept %d times", stream, count, kept)
            return count
    return kept
