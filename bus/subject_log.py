"""One subject of a JetStream stream as a log with one writer at a time, by compare-and-set.

An append names the sequence of the last message that its writer knows of on the subject (0: none). The server
stores it only while that is true, which makes repeating an append harmless: at most one copy is ever stored. So
there is no `Nats-Msg-Id`. (nats-server 2.15 checks the expected sequence *before* the message id, and answers a
repetition of a stored append with *wrong last sequence* whatever its id; measured, `docs/decisions/0010`.)
"""

import contextlib
import json
from dataclasses import dataclass

from nats.aio.client import Client
from nats.errors import Error as NatsError
from nats.js.api import AckPolicy, ConsumerConfig, DeliverPolicy, Header
from nats.js.errors import NotFoundError

from bus.streams import FETCH_S, FORGET_CONSUMER_S

READ_AT_ONCE = 512
WRONG_LAST = frozenset({10071, 10164})
"""Error codes of JetStream: the last message is another one, or that is about to be so."""
NO_ROOM = frozenset({10023, 10047, 10077})
"""Error codes of JetStream: a limit of the stream or of the server is reached, or the disk is full."""


class MovedError(Exception):
    """The last message of the subject is not the one that was expected."""


class NoRoomError(Exception):
    """The server did not store the message, and says why."""


class UnsureError(Exception):
    """No word from the server: it may have stored the message, and may yet."""


@dataclass(frozen=True, slots=True)
class Line:
    """One message of the log. `at_s`: when it was stored, in seconds of the server's clock."""

    sequence: int
    at_s: float
    data: bytes


class SubjectLog:
    """Appends to one subject, reads it, and forgets its beginning."""

    def __init__(self, client: Client, stream: str, subject: str) -> None:
        self._client = client
        self._js = client.jetstream()
        self._stream = stream
        self._subject = subject

    async def append(self, data: bytes, last: int, timeout_s: float) -> int:
        """Store `data` if the subject's last message still is `last`; returns its sequence.

        Raises `MovedError`, `NoRoomError`, or `UnsureError` after which the same append may be tried again.
        """
        headers = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(last)}
        try:
            # Not `js.publish`: this is done for every token, and reading the answer ourselves is a tenth cheaper.
            answer = await self._client.request(self._subject, data, timeout=timeout_s, headers=headers)
        except (NatsError, TimeoutError, OSError) as error:
            raise UnsureError(str(error)) from error
        told = json.loads(answer.data)
        if (refusal := told.get("error")) is None:
            return int(told["seq"])
        if refusal.get("err_code") in WRONG_LAST:
            raise MovedError
        if refusal.get("err_code") in NO_ROOM:
            raise NoRoomError(refusal.get("description", ""))
        raise UnsureError(refusal.get("description", ""))

    async def last(self) -> Line | None:
        """The newest message, from the stream's leader; raises `UnsureError`."""
        return await self._get(None)

    async def next(self, after: int) -> Line | None:
        """The first message behind sequence `after`, from the stream's leader; raises `UnsureError`."""
        return await self._get(after + 1)

    async def read(self, until: int) -> list[Line]:
        """The messages up to sequence `until`, in order; raises `UnsureError`."""
        config = ConsumerConfig(
            deliver_policy=DeliverPolicy.ALL,
            ack_policy=AckPolicy.NONE,
            inactive_threshold=FORGET_CONSUMER_S,
            mem_storage=True,
            num_replicas=1,
        )
        found: list[Line] = []
        try:
            subscription = await self._js.pull_subscribe(self._subject, stream=self._stream, config=config)
            try:
                while not found or found[-1].sequence < until:
                    waiting = (await subscription.consumer_info()).num_pending or 0
                    if not waiting:
                        break
                    while waiting > 0:
                        # The writer may forget its beginning meanwhile: then fewer come than were waiting.
                        batch = await subscription.fetch(min(READ_AT_ONCE, waiting), timeout=FETCH_S)
                        waiting -= len(batch)
                        for msg in batch:
                            data = msg.metadata
                            found.append(Line(data.sequence.stream, data.timestamp.timestamp(), msg.data))
            finally:
                with contextlib.suppress(Exception):  # the consumer forgets itself if the server cannot be told
                    await subscription.unsubscribe()
        except (NatsError, TimeoutError, OSError) as error:
            raise UnsureError(str(error)) from error
        return [line for line in found if line.sequence <= until]

    async def forget_before(self, sequence: int) -> None:
        """Remove every message in front of `sequence`; raises `UnsureError`."""
        try:
            await self._js.purge_stream(self._stream, subject=self._subject, seq=sequence)
        except (NatsError, TimeoutError, OSError) as error:
            raise UnsureError(str(error)) from error

    async def _get(self, at_or_after: int | None) -> Line | None:
        try:
            if at_or_after is None:
                raw = await self._js.get_last_msg(self._stream, self._subject)
            else:
                raw = await self._js.get_msg(self._stream, at_or_after, self._subject, next=True)
        except NotFoundError:
            return None
        except (NatsError, TimeoutError, OSError) as error:
            raise UnsureError(str(error)) from error
        assert raw.seq is not None
        assert raw.time is not None
        return Line(raw.seq, raw.time.timestamp(), raw.data or b"")
