"""Every request that was accepted has its end in the audit trail, also where its ingress died right after it."""

import asyncio

import pytest

from schemas.audit import AuditKind
from schemas.deployment import Settings
from tests.integration.cluster_fixtures import CHAT, N0, Serving, Streaming, three_stages

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

MANY = 32
"""So many ends take the trail a while, and the journal one append."""
TOKENS = 20


async def test_the_end_of_a_request_is_in_the_trail_though_its_ingress_is_killed_as_it_ends(chat: Serving) -> None:
    settings = Settings(context_tokens=64, max_sequences=MANY, chunk_tokens=8)
    await chat.deploy(CHAT, "llama", placement=three_stages(*chat.cluster.agents), settings=settings)
    names = [f"ends-{number}" for number in range(MANY)]
    streams = [Streaming(chat.client, max_tokens=TOKENS, request_id=name) for name in names]
    await asyncio.wait([stream.ended for stream in streams], return_when=asyncio.FIRST_COMPLETED)
    await chat.cluster.kill(N0)
    await chat.cluster.start(N0)
    assert [await stream.end(60.0) for stream in streams] == [None] * MANY
    for name in names:
        event = await chat.ear.wait(AuditKind.REQUEST_ENDED, request=name)
        assert event.fields.get("code") is None
