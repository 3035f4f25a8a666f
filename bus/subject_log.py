"""One subject of a JetStream stream as a log with one writer at a time, by compare-and-set.

An append names the sequence of the last message that its writer knows of on the subject (0: none). The server
stores it only while that is true, which makes repeating an append harmless: at most one copy is ever stored. So
there is no `Nats-Msg-Id`. (nats-server 2.15 checks the expected sequence *before* the message id, and answers a
repetition of a stored append with *wrong last sequence* whatever its id; measured, `docs/decisions/0010`.)
"""

import asyncio
import contextlib
import json
from dataclasses import dataclass

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError
from nats.js.api import Header
from nats.js.errors import NotFoundError

from bus.connection import jetstream_at
from natstls.client import DeniedError, SafeClient
from schemas import subjects
from schemas.base import Home

API_S = 2.0
"""What is asked while a server is killed is never answered: ask again soon."""
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

    def __init__(self, client: Client, stream: str, subject: str, home: Home = None) -> None:
        """`home` is where the stream is, for those at the EDGE; it knows the subject as `subject`."""
        self._client = client
        self._js = jetstream_at(client, home, timeout=API_S)
        self._stream = stream
        self._subject = subject
        self._written_as = subjects.at_edge(home, subject)
        self._inbox = client.new_inbox()
        self._answers: Subscription | None = None
        self._told = contextlib.ExitStack()
        self._attempt = 0
        self._answer: asyncio.Future[Msg | None] | None = None

    async def close(self) -> None:
        """Listen for answers no more."""
        self._told.close()
        if self._answers is not None:
            with contextlib.suppress(NatsError, OSError):  # the connection may have gone first
                await self._answers.unsubscribe()

    async def append(self, data: bytes, last: int, timeout_s: float) -> int:
        """Store `data` if the subject's last message still is `last`; returns its sequence.

        Raises `MovedError`, `NoRoomError`, or `UnsureError` after which the same append may be tried again. One at a
        time.
        """
        # Not `js.publish`: this is done for every token, and an inbox and a timer of our own take a quarter less time.
        loop = asyncio.get_running_loop()
        self._attempt += 1
        answer = self._answer = loop.create_future()
        patience = loop.call_later(timeout_s, _settle, answer, None)
        headers = {Header.EXPECTED_LAST_SUBJECT_SEQUENCE.value: str(last)}
        try:
            if self._answers is None:
                self._answers = await self._client.subscribe(f"{self._inbox}.*", cb=self._answered)
                if isinstance(self._client, SafeClient):
                    self._told.enter_context(self._client.when_denied((self._written_as,), self._denied))
            await self._client.publish(self._written_as, data, f"{self._inbox}.{self._attempt}", headers)
            msg = await answer
        except DeniedError as error:
            raise NoRoomError(str(error)) from error
        except (NatsError, OSError) as error:
            raise UnsureError(str(error)) from error
        finally:
            patience.cancel()
        if msg is None or not msg.data:
            raise UnsureError("no answer" if msg is None else "no stream takes it")
        return read_answer(msg.data)

    async def last(self) -> Line | None:
        """The newest message, from the stream's leader; raises `UnsureError`."""
        return await self._get(None)

    async def next(self, after: int) -> Line | None:
        """The first message behind sequence `after`, from the stream's leader; raises `UnsureError`."""
        return await self._get(after + 1)

    async def read(self, until: int) -> list[Line]:
        """The messages up to sequence `until`, in order; raises `UnsureError`."""
        # One by one, and not by a consumer: see `bus.streams.stored_messages`.
        found: list[Line] = []
        after = 0
        while after < until and (line := await self.next(after)) is not None and line.sequence <= until:
            found.append(line)
            after = line.sequence
        return found

    async def forget_before(self, sequence: int) -> None:
        """Remove every message in front of `sequence`; raises `UnsureError`."""
        try:
            await self._js.purge_stream(self._stream, subject=self._subject, seq=sequence)
        except (NatsError, TimeoutError, OSError) as error:
            raise UnsureError(str(error)) from error

    async def _answered(self, msg: Msg) -> None:
        # A late answer to an earlier attempt says nothing about this one.
        if self._answer is not None and msg.subject.endswith(f".{self._attempt}"):
            _settle(self._answer, msg)

    def _denied(self, error: DeniedError) -> None:
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error)

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


def read_answer(data: bytes) -> int:
    """The sequence under which the server says that it stored a message.

    Raises `MovedError`, `NoRoomError` or, where it says anything else, `UnsureError`.
    """
    try:
        told = json.loads(data)
    except (ValueError, RecursionError):
        told = None
    match told:
        case {"error": {**refusal}}:
            code, why = refusal.get("err_code"), str(refusal.get("description", ""))
        case {"seq": int(sequence)}:
            return sequence
        case _:
            raise UnsureError("an answer that makes no sense")
    if code in tuple(WRONG_LAST):
        raise MovedError
    raise NoRoomError(why) if code in tuple(NO_ROOM) else UnsureError(why)


def _settle(answer: asyncio.Future[Msg | None], msg: Msg | None) -> None:
    if not answer.done():
        answer.set_result(msg)
