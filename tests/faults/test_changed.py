"""Deployments that change while requests run: nothing that was accepted is lost, nothing new is turned away."""

import asyncio

import pytest

from resplit import control
from resplit.replies import RequestError
from schemas.audit import AuditKind
from schemas.deployment import Settings, Stage
from tests.integration.cluster_fixtures import (
    CHAT,
    N0,
    N1,
    N2,
    PROMPT,
    QUEUED,
    SETTINGS,
    SLOTS,
    Serving,
    Streaming,
    three_stages,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

PLACEMENTS = (
    three_stages(N0, N2, N1),  # the same ingress
    three_stages(N1, N0, N2),  # another ingress
    (Stage(node=N2, first=0, last=3), Stage(node=N1, first=4, last=5)),
    (Stage(node=N0, first=0, last=5),),
    three_stages(N0, N1, N2),
)


@pytest.mark.slow
async def test_no_request_fails_while_the_placement_changes(chat: Serving) -> None:
    changing = True
    answers = 0

    async def keep_asking(count: int) -> None:
        nonlocal answers
        while changing:
            answer = await chat.client.complete(CHAT, PROMPT, max_tokens=count, ignore_eos=True)
            assert answer.token_ids == chat.oracle.tokens(PROMPT, count)
            answers += 1

    asking = [asyncio.create_task(keep_asking(count)) for count in (3, 10, 30, 50, 50, 200)]
    for placement in PLACEMENTS:
        before = answers
        await chat.deploy(CHAT, "llama", placement=placement, settings=SETTINGS)
        async with asyncio.timeout(20):
            while answers < before + 5 and not any(task.done() for task in asking):  # noqa: ASYNC110 (a counter)
                await asyncio.sleep(0.05)
    changing = False
    await asyncio.gather(*asking)


async def test_requests_that_wait_survive_a_move_of_their_ingress(chat: Serving) -> None:
    running = await Streaming(chat.client, max_tokens=700).began()
    streams = [Streaming(chat.client, max_tokens=40) for _ in range(SLOTS + QUEUED - 1)]
    await chat.deploy(CHAT, "llama", placement=three_stages(N2, N1, N0), settings=SETTINGS)
    assert [await stream.end() for stream in (running, *streams)] == [None] * (SLOTS + QUEUED)
    assert {stream.ids for stream in streams} == {chat.oracle.tokens(PROMPT, 40)}
    assert running.ids == chat.oracle.tokens(PROMPT, 700)


async def test_requests_that_no_longer_fit_finish_where_they_were_accepted(chat: Serving) -> None:
    running = await Streaming(chat.client, max_tokens=600).began()
    waiting = Streaming(chat.client, max_tokens=300)
    short = Settings(context_tokens=128, max_sequences=SLOTS, max_queued=QUEUED)
    await chat.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=short)
    with pytest.raises(RequestError) as caught:
        await chat.client.complete(CHAT, token_ids=[5] * 128, max_tokens=1)
    assert caught.value.code == "context_exceeded"
    assert [await running.end(), await waiting.end()] == [None, None]
    assert (len(running.ids), waiting.ids) == (600, chat.oracle.tokens(PROMPT, 300))


async def test_a_removed_deployment_finishes_what_it_accepted(chat: Serving) -> None:
    running = await Streaming(chat.client, max_tokens=700).began()
    waiting = [Streaming(chat.client, max_tokens=50) for _ in range(SLOTS + 2)]
    await asyncio.gather(*(stream.began() for stream in waiting[:2]))
    await control.remove(chat.cluster.operator, CHAT)
    assert [await stream.end() for stream in (running, *waiting)] == [None] * (len(waiting) + 1)
    assert running.ids == chat.oracle.tokens(PROMPT, 700)
    async with asyncio.timeout(10):
        while True:
            try:
                await chat.client.complete(CHAT, PROMPT, max_tokens=1)
            except RequestError as error:
                assert error.code == "unknown_deployment"
                break
            await asyncio.sleep(0.05)
    await chat.ear.wait(AuditKind.PLAN_RETIRED)
    async with asyncio.timeout(20):
        while any(found.name == CHAT for found in (await control.status(chat.cluster.operator)).deployments):  # noqa: ASYNC110
            await asyncio.sleep(0.1)
    again = await chat.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
    assert again.current is not None
    await chat.answers()
