"""Every request that was accepted has its end in the audit trail, also where its ingress died right after it."""

import pytest

from schemas import subjects
from schemas.audit import AuditKind
from tests.integration.cluster_fixtures import CHAT, N0, Serving, Streaming

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

REFUSED = 1500
"""So many events stand in front of the one that counts: the trail takes them one by one, the journal does not wait."""


async def test_the_end_of_a_request_is_in_the_trail_though_its_ingress_is_killed_as_it_ends(chat: Serving) -> None:
    stream = await Streaming(chat.client, max_tokens=40, request_id="it-ends").began()
    for _ in range(REFUSED):
        await chat.edge.publish(subjects.infer(CHAT), b"{}")
    assert await stream.end() is None
    await chat.cluster.kill(N0)
    assert not [event for event in chat.ear.heard if event.request == "it-ends"], "it was killed too late to tell"
    await chat.cluster.start(N0)
    event = await chat.ear.wait(AuditKind.REQUEST_ENDED, request="it-ends")
    assert event.fields.get("code") is None
