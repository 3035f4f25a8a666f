"""Streams that do not cease, what each is to answer, and what was said on the wire meanwhile."""

import asyncio
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from agent.sampling import choose
from bus.connection import settle
from bus.credentials import inbox_prefix
from bus.together import CLIENT
from models.reference import Reference
from models.store import Store
from models.text import Text
from resplit.client import Client
from resplit.replies import RequestError
from schemas.base import DeploymentName
from schemas.codec import CONTENT_TYPE, JSON, decode_plain
from schemas.deployment import Settings
from schemas.frame import Sampling

DEPLOYMENT = DeploymentName("adder")
SETTINGS = Settings(context_tokens=256, max_sequences=32, chunk_tokens=8)
STREAMS = 8
TOKENS = 200
TEMPERATURE = 0.8
SILENCE_S = 20.0
"""A stream that says nothing for so long has failed: twice what the slowest promise allows, and more."""
ENDS_S = 60.0
AGAIN_S = 0.05
"""Before a stream that was refused is asked for anew."""
INBOX = f"{inbox_prefix('client', CLIENT)}.faults"


@dataclass(frozen=True)
class Question:
    """A prompt and what the uncut model answers; `seed` is None where the answer is greedy."""

    prompt: str
    seed: int | None
    expected: tuple[int, ...]


class Uncut:
    """The model that is shipped, in one piece: it says what each answer has to be."""

    def __init__(self, store: Store) -> None:
        self._reference = Reference(store, DEPLOYMENT)
        spec = self._reference.manifest.text
        assert spec is not None
        self._ends = spec.eos_token_ids
        self._text = Text(spec, store.path(spec.tokenizer.digest))

    def tokens(self, prompt: str, seed: int | None, count: int, *, stop_at_eos: bool) -> tuple[int, ...]:
        """At most `count`; greedy without a `seed`."""
        sampling = Sampling() if seed is None else Sampling(TEMPERATURE, seed=seed)
        index = itertools.count()
        ids = self._reference.generate(
            list(self._text.encode(prompt)),
            count,
            SETTINGS.chunk_tokens,
            SETTINGS.context_tokens,
            lambda logits: choose(logits, sampling, next(index)).token,
            stop_at_eos=stop_at_eos,
        )
        return tuple(ids)

    def text(self, tokens: Sequence[int]) -> str:
        """As a client reads them."""
        return self._text.decode([token for token in tokens if token not in self._ends])


def questions(store: Store) -> tuple[Question, ...]:
    """One for each stream; every second is answered by seeded sampling, since greedy answers soon repeat themselves."""
    uncut = Uncut(store)
    found = []
    for i in range(STREAMS):
        prompt, seed = f"{17 * i + 12}+{i * i + 34}=", None if i % 2 == 0 else i
        found.append(Question(prompt, seed, uncut.tokens(prompt, seed, TOKENS, stop_at_eos=False)))
    return tuple(found)


@dataclass(eq=False)
class Asked:
    """One streamed request as its reader saw it."""

    request_id: str
    question: Question
    began: float
    arrivals: list[float] = field(default_factory=list)
    """When each token came; times are those of `time.monotonic`."""
    ids: list[int] = field(default_factory=list)
    ended: float | None = None
    error: RequestError | None = None


class Wire:
    """Hears every reply to these streams, whoever says it and as often as it is said."""

    def __init__(self) -> None:
        self.accepted: set[str] = set()
        self.conflicts: list[str] = []
        """Indices of which two different tokens were said."""
        self._tokens: dict[str, dict[int, int]] = {}
        self._said_before: dict[str, int] = {}
        self.repeated = 0
        """Tokens said again after `from_now` though they had been said before."""

    async def listen(self, connection: Nats, inboxes: str = f"{INBOX}.>") -> Subscription:
        subscription = await connection.subscribe(inboxes, cb=self._note)
        await settle(connection)
        return subscription

    def from_now(self) -> None:
        """Count whatever is said again from now on."""
        self._said_before = {request: max(tokens) for request, tokens in self._tokens.items()}

    def forget(self, requests: Iterable[str]) -> None:
        """Keep no tokens of these any longer: they ended a while ago."""
        for request in requests:
            self._tokens.pop(request, None)

    async def _note(self, message: Msg) -> None:
        if not message.data:
            return  # the server itself says that nobody takes requests
        content_type = (message.headers or {}).get(CONTENT_TYPE, JSON)
        reply: dict[str, Any] = decode_plain(message.data, content_type, "reply")
        request = reply.get("request_id") or ""
        if reply.get("status") == "accepted":
            self.accepted.add(request)
        if (token := reply.get("token_id")) is None:
            return
        index = reply["index"]
        if self._tokens.setdefault(request, {}).setdefault(index, token) != token:
            self.conflicts.append(f"token {index} of {request}")
        if index <= self._said_before.get(request, -1):
            self.repeated += 1


@dataclass(eq=False)
class Load:
    """Streams that follow one another, so many at a time."""

    client: Client
    questions: Sequence[Question]
    asked: list[Asked] = field(default_factory=list)
    _goes_on: bool = True

    @property
    def live(self) -> list[Asked]:
        """Those that have not ended."""
        return [one for one in self.asked if one.ended is None]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask while the block runs, and then until every stream has ended."""
        asking = [asyncio.create_task(self._ask(question)) for question in self.questions]
        try:
            yield
        finally:
            self._goes_on = False
            _, late = await asyncio.wait(asking, timeout=ENDS_S)
            for task in late:
                task.cancel()
        for task in asking:
            if task not in late:
                task.result()  # a defect of the benchmark

    async def flowing(self, tokens: int = 10) -> None:
        """Wait until every stream that is asked for has so many tokens."""
        async with asyncio.timeout(ENDS_S):
            while len(self.live) < len(self.questions) or any(len(one.ids) < tokens for one in self.live):  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    async def _ask(self, question: Question) -> None:
        fields: dict[str, Any] = {} if question.seed is None else {"temperature": TEMPERATURE, "seed": question.seed}
        while self._goes_on:
            one = Asked(uuid.uuid4().hex, question, time.monotonic())
            self.asked.append(one)
            stream = self.client.stream(
                DEPLOYMENT, question.prompt, max_tokens=TOKENS, ignore_eos=True, request_id=one.request_id, **fields
            )
            try:
                async for token in stream:
                    one.arrivals.append(time.monotonic())
                    one.ids.append(token.token_id)
            except RequestError as error:
                one.error = error
            one.ended = time.monotonic()
            if one.error is not None:
                await asyncio.sleep(AGAIN_S)
