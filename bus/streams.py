"""What JetStream keeps: plans, receipts, the audit trail, accepted requests, desired state, the leader's lease."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.js import JetStreamContext
from nats.js.api import (
    DiscardPolicy,
    KeyValueConfig,
    RetentionPolicy,
    StreamConfig,
)
from nats.js.errors import BucketNotFoundError, NotFoundError
from nats.js.kv import KeyValue

from bus.connection import jetstream_at
from bus.replicas import spread, with_replicas
from natstls.client import DeniedError
from schemas import subjects
from schemas.base import Home

PLANS_KEPT = 64
RECEIPTS_KEPT = 256
AUDIT_BYTES_MAX = 2 << 30
"""About three million events. Nothing deletes them, and without a limit of its own the trail would in the end take
the room of plans, receipts and the journal, and nothing could be served or moved any more."""
JOURNAL_BYTES_MAX = 512 << 20
JOURNAL_MESSAGES_MAX = 50_000
"""Of one life: it states its live requests anew long before; this stops one that runs wild."""
JOURNAL_AGE_S = 48 * 3600.0
"""No deadline is longer than a day. The fence of a dead life is kept for as long."""

SPREAD = (
    subjects.STREAM_PLANS,
    subjects.STREAM_RECEIPTS,
    subjects.STREAM_JOURNAL,
    *(f"KV_{bucket}" for bucket in (subjects.BUCKET_DEPLOYMENTS, subjects.BUCKET_NODES, subjects.BUCKET_LEADER)),
)
SPREAD_EVERY_S = 30.0
RETRY_S = 0.5
NO_MESSAGE = 10037
"""JetStream's error code for a message that there is not; a stream that there is not has another."""

log = logging.getLogger(__name__)


async def ensure_streams(client: Client) -> JetStreamContext:
    """Create the streams that are missing, each kept as often as the cluster has servers (`bus.replicas`). What exists
    keeps its limits, and is kept as often as that by `keep_spread`."""
    js = client.jetstream()
    streams = [
        StreamConfig(
            name=subjects.STREAM_PLANS,
            subjects=[subjects.ALL_PLANS, subjects.LEADER, subjects.ROSTER],
            max_msgs_per_subject=PLANS_KEPT,
            discard=DiscardPolicy.OLD,
        ),
        StreamConfig(
            name=subjects.STREAM_RECEIPTS,
            subjects=[subjects.ALL_RECEIPTS],
            max_msgs_per_subject=RECEIPTS_KEPT,
            discard=DiscardPolicy.OLD,
        ),
        # A full trail takes no more, rather than lose its beginning: its writers keep the latest and say that it is
        # full, and an operator exports it (`resplit audit export`) and makes room.
        StreamConfig(
            name=subjects.STREAM_AUDIT,
            subjects=[subjects.ALL_AUDIT],
            retention=RetentionPolicy.LIMITS,
            discard=DiscardPolicy.NEW,
            max_bytes=AUDIT_BYTES_MAX,
            deny_delete=True,
            deny_purge=True,
        ),
        # What does not fit is refused, and the client told: the oldest record may be the one that matters.
        StreamConfig(
            name=subjects.STREAM_JOURNAL,
            subjects=[subjects.ALL_JOURNAL],
            discard=DiscardPolicy.NEW,
            discard_new_per_subject=True,
            max_msgs_per_subject=JOURNAL_MESSAGES_MAX,
            max_bytes=JOURNAL_BYTES_MAX,
            max_age=JOURNAL_AGE_S,
        ),
    ]
    for config in streams:
        assert config.name is not None
        try:
            found = (await js.stream_info(config.name)).config
        except NotFoundError:
            await with_replicas(js, lambda count, config=config: js.add_stream(config, num_replicas=count))  # type: ignore[misc]
        else:  # made by an earlier release perhaps, with other limits, or without a subject
            await _add_subjects(js, config, found)
    return js


async def _add_subjects(js: JetStreamContext, wanted: StreamConfig, found: StreamConfig) -> None:
    missing = [subject for subject in wanted.subjects or () if subject not in (found.subjects or ())]
    if missing:
        await js.update_stream(found, subjects=[*(found.subjects or ()), *missing])


async def keep_spread(client: Client) -> None:
    """Have all but the audit trail kept as often as the cluster has servers, also what is there already, and once
    servers are there that were away or are new; forever. For whoever may change them.

    Nobody who steers may change the stream of the trail, whose limits could be made so small that nothing stays in it:
    that is for an archivist (`resplit audit spread`).
    """
    js = client.jetstream()

    async def look() -> None:
        for stream in SPREAD:
            # Not made yet; or not to be changed by a login of an earlier release, of which the log speaks.
            with contextlib.suppress(NotFoundError, DeniedError):
                await spread(js, stream)

    await look_now_and_then(client, look, SPREAD_EVERY_S)


async def leader_bucket(js: JetStreamContext, lease_s: float) -> KeyValue:
    """The bucket of the leader's lease, made if it is missing.

    What is in it vanishes after `lease_s` by the server's clock alone, and that is the whole of its use: nobody
    compares clocks. On disk, so that a server that restarts forgets no lease that still runs.
    """
    try:
        return await js.key_value(subjects.BUCKET_LEADER)
    except BucketNotFoundError:
        return await _made(js, KeyValueConfig(bucket=subjects.BUCKET_LEADER, history=1, ttl=lease_s))


async def deployments_bucket(js: JetStreamContext) -> KeyValue:
    """The bucket of desired deployments, made if it is missing."""
    return await _bucket(js, subjects.BUCKET_DEPLOYMENTS)


async def nodes_bucket(js: JetStreamContext) -> KeyValue:
    """The bucket of what operators want of single nodes, made if it is missing."""
    return await _bucket(js, subjects.BUCKET_NODES)


async def _bucket(js: JetStreamContext, name: str) -> KeyValue:
    try:
        return await js.key_value(name)
    except BucketNotFoundError:
        return await _made(js, KeyValueConfig(bucket=name, history=8))


async def _made(js: JetStreamContext, config: KeyValueConfig) -> KeyValue:
    return await with_replicas(js, lambda count: js.create_key_value(config, replicas=count))


async def wait_for_streams(client: Client, home: Home = None) -> JetStreamContext:
    """The streams of `home`, for whoever may not make them (`bus.permissions`): raises what nats-py does where one is
    missing."""
    js = jetstream_at(client, home)
    for stream in (subjects.STREAM_PLANS, subjects.STREAM_JOURNAL):  # the first and the last that are made
        await js.stream_info(stream)
    return js


async def look_now_and_then(
    client: Client, look: Callable[[], Awaitable[None]], every_s: float, at_once: Callable[[], bool] = lambda: False
) -> None:
    """Call `look` now, after every reconnection, every `every_s` and when `at_once` says so; forever. What was
    published while nobody listened, or got lost on its way, is found by it. It may raise whatever nats-py does."""
    while True:
        connection = client.stats["reconnects"]
        try:
            await look()
        except Exception as error:  # nats-py raises several types while the server is away
            log.debug("a stream is out of reach: %r", error)
            await asyncio.sleep(RETRY_S)
            continue
        for _ in range(int(every_s / RETRY_S)):
            if at_once() or client.stats["reconnects"] != connection:
                break
            await asyncio.sleep(RETRY_S)


async def stored_messages(js: JetStreamContext, stream: str, subject: str) -> list[Msg]:
    """Every message on subjects that match, in order, as the stream has them now.

    Asked for one by one, which costs a round trip each. A consumer would bring them faster, but whoever may make one
    can have what it wrote into a stream delivered to any subject, whatever its permissions say of that subject.
    Raises what nats-py raises while the server or the stream is away.
    """
    found: list[Msg] = []
    sequence = 0
    while True:
        try:
            stored = await js.get_msg(stream, seq=sequence + 1, subject=subject, next=True)
        except NotFoundError as error:
            if error.err_code != NO_MESSAGE:
                raise
            return found
        assert stored.seq is not None
        sequence = stored.seq
        found.append(Msg(js._nc, stored.subject or "", data=stored.data or b""))
