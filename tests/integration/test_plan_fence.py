"""What an agent hears of plans: a deposed leader's word, heard live, counts only if the log has it."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest
from nats.js.errors import APIError

from agent.plans import PlanInbox
from bus.audit import AuditTrail
from bus.connection import connect
from bus.identity import load_identity
from bus.sealed_plans import seal_event
from bus.stopping import end
from bus.streams import ensure_streams
from bus.together import make_members
from orchestrator.log import PlanLog
from orchestrator.rollout import Proceed, Propose, Rollout, note, step
from schemas import subjects
from schemas.base import DeploymentName, NodeId
from schemas.deployment import Settings, Stage
from schemas.plan import PlanEvent, Receipt, ReceiptStatus
from schemas.section import EventSection, nothing_of, section_of
from tests.nodes import plan_of

CHAT, NODE = DeploymentName("chat"), NodeId("a")
NOW = datetime(2026, 1, 1, tzinfo=UTC)


def first_events() -> tuple[PlanEvent, PlanEvent]:
    """PREPARE and COMMIT of one plan, both of term 1."""
    stages = [Stage(node=NODE, first=0, last=0)]
    plan = plan_of(1, stages, Settings(), 1).model_copy(update={"deployment": CHAT})
    ready = Receipt(node=NODE, deployment=CHAT, epoch=1, plan=plan.digest, status=ReceiptStatus.READY, elapsed_ms=1)
    prepared = step(Rollout(CHAT, term=1), Propose(plan), NOW)
    assert prepared is not None
    committed = step(note(prepared[0], ready, NOW), Proceed(), NOW)
    assert committed is not None
    return prepared[1], committed[1]


async def test_an_event_that_the_log_refused_is_not_obeyed_though_it_was_heard(nats_url: str, tmp_path: Path) -> None:
    make_members(tmp_path, [NODE])
    orchestrator, agent = (
        load_identity(tmp_path / NodeId("orchestrator"), NodeId("orchestrator")),
        load_identity(tmp_path / NODE, NODE),
    )
    client = await connect(nats_url, "test")
    js = await ensure_streams(client)
    prepare, commit = first_events()
    old, new = PlanLog(js, orchestrator), PlanLog(js, orchestrator)
    await old.take_office(NodeId("old"), NOW, lambda _, error: pytest.fail(str(error)))
    await old.append(prepare)
    heard: asyncio.Queue[EventSection] = asyncio.Queue()
    inbox = asyncio.create_task(PlanInbox(client, agent, AuditTrail(js, agent), heard.put_nowait).run())
    try:
        async with asyncio.timeout(20):
            assert await heard.get() == section_of(prepare, NODE)
            _, rollouts = await new.take_office(NodeId("new"), NOW, lambda _, error: pytest.fail(str(error)))
            data = seal_event(commit, orchestrator)
            with pytest.raises(APIError, match="wrong last sequence"):
                await js.publish(subjects.plan(CHAT), data, headers={"Nats-Expected-Last-Sequence": "2"})
            # It looks into the log instead, where the older event is still the newest.
            assert await heard.get() == section_of(prepare, NODE)
            later = step(rollouts[CHAT], Propose(prepare.plans[0]), NOW)
            assert later is None, "the candidate is still there"
            aborted = commit.model_copy(update={"term": 2, "current": None, "reason": "given up"})
            await new.append(aborted)
            assert await heard.get() == nothing_of(aborted)
    finally:
        await end([inbox])
        await client.close()
