"""Who stole an orchestrator's key, against the root's policy: real processes, a plan signed as it should be."""

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from bus.identity import ORCHESTRATOR, load_identity
from models.store import Store
from resplit import Client, control
from resplit.access import Access
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.deployment import Stage
from schemas.envelope import PLAN_TYPE, open_envelope, seal
from schemas.plan import PlanEvent, PlanPhase, Route
from tests.security.believer import Believer
from tests.security.recording import ADDER, DEPLOYED, N0, N1, SERVING_S, half_trusted


async def test_a_candidate_that_the_policy_forbids_is_refused_by_both_and_what_serves_goes_on(tmp_path: Path) -> None:
    async with half_trusted(tmp_path) as cluster, Client(cluster.url, keys=cluster.client_keys) as client:
        bus = await cluster.owner("CONTROL")
        ears = {node: Believer(bus, load_identity(cluster.keys / node, node)) for node in (N0, N1)}
        for ear in ears.values():
            await bus.subscribe(subjects.ALL_AUDIT, cb=ear.note)
        await control.deploy_and_wait(cluster.operator, DEPLOYED, SERVING_S)
        before = (await client.complete(ADDER, "12+30=", max_tokens=4)).token_ids
        blocks = Store(cluster.folder / N0 / "store").manifest(await model_of(cluster.operator)).blocks
        held = Store(cluster.folder / N1 / "store")
        assert held.has(blocks[1].graph.digest), "the middle is there"
        assert not held.has(blocks[0].weights[0].digest), "the ends are not"
        await cluster.stop(ORCHESTRATOR)  # it would answer the thief at once

        thief = load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR)
        js = bus.jetstream()
        last = await js.get_last_msg(subjects.STREAM_PLANS, subjects.plan(ADDER))
        said, _ = open_envelope(last.data or b"", PlanEvent, PLAN_TYPE, thief.orchestrators)
        current = said.current
        assert current is not None
        stages = (
            Stage(node=N1, first=0, last=0),
            *(s.model_copy(update={"node": N0}) for s in current.routes[0].stages[1:]),
        )
        route = Route(index=0, source=NodeId(N1), stages=stages, max_sequences=1)
        candidate = current.model_copy(update={"epoch": current.epoch + 1, "routes": (route,), "reason": "theft"})
        event = PlanEvent(
            deployment=ADDER,
            term=said.term + 1,
            revision=1,
            phase=PlanPhase.PREPARE,
            reason="theft",
            issued_at=datetime.now(UTC),
            current=current,
            candidate=candidate,
        )
        await js.publish(subjects.plan(ADDER), seal(event, PLAN_TYPE, thief.name, thief.key))
        for node, ear in ears.items():
            refusal = await ear.audited(AuditKind.PLAN_REFUSED)
            assert (refusal.source, refusal.epoch) == (node, candidate.epoch)
            assert str(refusal.fields["error"]).startswith("forbidden: block 0 of 'adder' must not be on 'n1'")
        assert not held.has(blocks[0].weights[0].digest), "not even fetched"
        answers = await asyncio.gather(*(client.complete(ADDER, "12+30=", max_tokens=4) for _ in range(4)))
        assert {answer.token_ids for answer in answers} == {before}
        assert {answer.usage.epoch for answer in answers} == {current.epoch}
        await bus.close()


async def model_of(at: Access) -> str:
    """The digest of the model that is deployed."""
    status = await control.status(at)
    plan = status.deployments[0].current
    assert plan is not None
    return str(plan.model)
