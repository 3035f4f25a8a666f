"""A client whose server goes while the ingress keeps its own: away for a moment, it misses nothing, and is not taken
for one that has gone."""

import asyncio
import json

import pytest
from nats.aio.msg import Msg

from bus.connection import settle
from resplit.client import Client
from schemas import subjects
from schemas.audit import AuditKind
from schemas.codec import CONTENT_TYPE, JSON
from tests.integration.cluster_fixtures import CHAT, PROMPT, Serving, Streaming

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]
COUNT = 300
ENDS_S = 60.0


async def test_a_client_that_comes_back_over_another_connection_has_every_token(chat: Serving) -> None:
    async with Client(chat.cluster.url, keys=chat.cluster.client_keys) as client:
        streams = [await Streaming(client, max_tokens=COUNT).began() for _ in range(2)]
        assert client._nats is not None
        for _ in range(3):
            await asyncio.sleep(0.2)
            await client._nats.force_reconnect()
        for stream in streams:
            assert await stream.end(ENDS_S) is None
            assert stream.ids == chat.oracle.tokens(PROMPT, COUNT)


async def test_what_a_client_that_was_away_asks_again_is_not_computed_again(chat: Serving) -> None:
    request = {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, "stream": True, "request_id": "asked-twice"}
    inbox = chat.bus.nats.new_inbox()
    heard: list[bytes] = []

    async def note(message: Msg) -> None:
        heard.append(message.data)

    await chat.bus.nats.subscribe(inbox, cb=note)
    await settle(chat.bus.nats)
    for times in (1, 2):
        await chat.bus.nats.publish(subjects.infer(CHAT), json.dumps(request).encode(), inbox, {CONTENT_TYPE: JSON})
        async with asyncio.timeout(ENDS_S):
            while sum(b"finish_reason" in data for data in heard) < times:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    await asyncio.sleep(0.5)
    assert len(heard) % 2 == 0 and sorted(heard[: len(heard) // 2]) == sorted(heard[len(heard) // 2 :])
    ended = [
        event for event in chat.ear.heard if event.kind is AuditKind.REQUEST_ENDED and event.request == "asked-twice"
    ]
    assert len(ended) == 1, "it ran once"


async def test_one_that_has_gone_is_still_noticed(chat: Serving) -> None:
    async with Client(chat.cluster.url, keys=chat.cluster.client_keys) as client:
        stream = await Streaming(client, max_tokens=1000).began()
        assert client._nats is not None
        client._nats._wire.abort()
        await client._nats.close()
    await stream.ended
    ended = await chat.ear.wait(AuditKind.REQUEST_ENDED, ENDS_S, code="cancelled")
    assert "nobody listens" in str(ended.fields["error"])
