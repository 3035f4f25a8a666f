"""Who stole an orchestrator's key, against the root's policy: real processes, plans signed as they should be."""

import asyncio
import base64
from datetime import UTC, datetime
from pathlib import Path

import msgpack
import pytest
from nats.aio.client import Client as Nats

import resplit.demo
from benchmarks.faults.owned import OwnedCluster
from bus.identity import ORCHESTRATOR, Identity, load_identity
from bus.letters import is_for
from bus.sealed_plans import seal_event
from models.store import Store
from resplit import Client, control
from resplit.access import Access
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Stage
from schemas.envelope import PLAN_TYPE, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import Plan, PlanEvent, PlanPhase, Route
from schemas.roster import Policy
from schemas.section import SealedEvent
from tests.sealed_events import whole
from tests.security.believer import Believer
from tests.security.recording import ADDER, DEPLOYED, N0, N1, SERVING_S, half_trusted, ruled

ANY_MODEL = "forbidden: '{}' must not run model {}, which roster 7 does not name"

N2 = NodeId("n2")


async def test_a_candidate_that_the_policy_forbids_is_refused_by_both_and_what_serves_goes_on(tmp_path: Path) -> None:
    async with half_trusted(tmp_path) as cluster, Client(cluster.url, keys=cluster.client_keys) as client:
        bus = await cluster.owner("CONTROL")
        ears = await listening(bus, cluster, N0, N1)
        await control.deploy_and_wait(cluster.operator, DEPLOYED, SERVING_S)
        before = (await client.complete(ADDER, "12+30=", max_tokens=4)).token_ids
        blocks = Store(cluster.folder / N0 / "store").manifest(await model_of(cluster.operator)).blocks
        held = Store(cluster.folder / N1 / "store")
        assert held.has(blocks[1].graph.digest), "the middle is there"
        assert not held.has(blocks[0].weights[0].digest), "the ends are not"
        await cluster.stop(ORCHESTRATOR)  # it would answer the thief at once

        current = await in_force(bus, cluster)
        stages = (
            Stage(node=N1, first=0, last=0),
            *(s.model_copy(update={"node": N0}) for s in current.routes[0].stages[1:]),
        )
        route = Route(index=0, source=NodeId(N1), stages=stages, max_sequences=1)
        candidate = current.model_copy(update={"epoch": current.epoch + 1, "routes": (route,), "reason": "theft"})
        await steal(bus, cluster, current, candidate)
        for node, ear in ears.items():
            refusal = await ear.audited(AuditKind.PLAN_REFUSED)
            assert (refusal.source, refusal.epoch) == (node, candidate.epoch)
            assert str(refusal.fields["error"]).startswith("forbidden: block 0 of 'adder' must not be on 'n1'")
        assert not held.has(blocks[0].weights[0].digest), "not even fetched"
        answers = await asyncio.gather(*(client.complete(ADDER, "12+30=", max_tokens=4) for _ in range(4)))
        assert {answer.token_ids for answer in answers} == {before}
        assert {answer.usage.epoch for answer in answers} == {current.epoch}
        await bus.close()


async def test_a_model_that_the_root_does_not_name_is_deployed_by_nobody(tmp_path: Path) -> None:
    """Not by an operator, who is told what to do, and not with the orchestrator's own key."""
    named = Store(resplit.demo.shipped_store()).resolve("adder")
    pinned = ruled(tmp_path, Policy(models={"*": (named,)}))
    registry = Store(pinned.store)
    other = registry.save_manifest(registry.manifest(named).model_copy(update={"name": "other"}))
    registry.name("other", other)
    async with pinned as cluster, Client(cluster.url, keys=cluster.client_keys) as client:
        bus = await cluster.owner("CONTROL")
        ears = await listening(bus, cluster, N0, N1)
        await control.deploy_and_wait(cluster.operator, DEPLOYED, SERVING_S)
        before = (await client.complete(ADDER, "12+30=", max_tokens=4)).token_ids
        for name in (ADDER, "fresh"):
            with pytest.raises(ResplitError, match=f"does not let '{name}' run model .*`resplit roster policy") as told:
                await control.deploy(cluster.operator, DEPLOYED.model_copy(update={"name": name, "model": "other"}))
            assert (told.value.code, told.value.field) == (ErrorCode.FORBIDDEN, "model")
        assert await model_of(cluster.operator) == named
        await cluster.stop(ORCHESTRATOR)

        current = await in_force(bus, cluster)
        theft = {"epoch": current.epoch + 1, "model": other, "reason": "theft"}
        await steal(bus, cluster, current, current.model_copy(update=theft))
        fresh = DeploymentName("fresh")
        await steal(bus, cluster, None, current.model_copy(update={**theft, "deployment": fresh}))
        for node, ear in ears.items():
            refusal = await ear.audited(AuditKind.PLAN_REFUSED, error=ANY_MODEL.format(ADDER, other[:12]))
            assert (refusal.source, refusal.epoch) == (node, current.epoch + 1)
            await ear.audited(AuditKind.PLAN_REFUSED, error=ANY_MODEL.format(fresh, other[:12]))
            assert not Store(cluster.folder / node / "store").has(other), "not even its manifest is fetched"
        answers = await asyncio.gather(*(client.complete(ADDER, "12+30=", max_tokens=4) for _ in range(4)))
        assert {answer.token_ids for answer in answers} == {before}
        assert {answer.usage.epoch for answer in answers} == {current.epoch}
        await bus.close()


async def test_a_host_that_is_told_another_plan_than_its_ingress_hands_nothing_where_it_must_not_go(
    tmp_path: Path,
) -> None:
    """Block 5 is sensitive. The ingress is shown a plan that is allowed, the trusted host before it one in which the
    node at the edge comes right after and holds block 5."""
    shown = ((N0, 0, 2), (N2, 3, 6), (N1, 7, 8), (N0, 9, 9))
    told = ((N0, 0, 2), (N2, 3, 4), (N1, 5, 8), (N0, 9, 9))
    async with half_trusted(tmp_path, N2, sensitive=(0, 5, 9)) as cluster:
        bus = await cluster.owner("CONTROL")
        ears = await listening(bus, cluster, N0, N1, N2)
        async with Client(cluster.url, keys=cluster.client_keys) as client:
            await control.deploy_and_wait(cluster.operator, honest(shown), SERVING_S)
            before = (await client.complete(ADDER, "12+30=", max_tokens=4)).token_ids
            await cluster.stop(ORCHESTRATOR)  # it would answer the thief at once

            thief = load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR)
            last = await bus.jetstream().get_last_msg(subjects.STREAM_PLANS, subjects.plan(ADDER))
            said = whole(last.data, thief)
            assert said.current is not None
            event = said.model_copy(update={"term": said.term + 1, "revision": 1, "phase": PlanPhase.PREPARE})
            lies = {
                node: event.model_copy(update={"candidate": moved(said.current, stages)})
                for node, stages in ((N0, shown), (N1, told), (N2, told))
            }
            await bus.jetstream().publish(subjects.plan(ADDER), two_faced(lies, thief))
            for node in (N1, N2):
                refusal = await ears[node].audited(AuditKind.PLAN_REFUSED)
                assert str(refusal.fields["error"]).startswith("forbidden: block 5 of 'adder' must not be on 'n1'")
            await ears[N0].audited(AuditKind.PLAN_READY, blocks="0-2,9")  # what it was shown is allowed
            assert (await client.complete(ADDER, "12+30=", max_tokens=4)).token_ids == before
        await bus.close()


async def listening(bus: Nats, cluster: OwnedCluster, *nodes: NodeId) -> dict[NodeId, Believer]:
    """What each of some nodes says in the trail."""
    ears = {node: Believer(bus, load_identity(cluster.keys / node, node)) for node in nodes}
    for ear in ears.values():
        await bus.subscribe(subjects.ALL_AUDIT, cb=ear.note)
    return ears


async def in_force(bus: Nats, cluster: OwnedCluster) -> Plan:
    """The plan of the deployment, as the log has it."""
    last = await bus.jetstream().get_last_msg(subjects.STREAM_PLANS, subjects.plan(ADDER))
    said = whole(last.data, load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR))
    assert said.current is not None
    return said.current


async def steal(bus: Nats, cluster: OwnedCluster, current: Plan | None, candidate: Plan) -> None:
    """Have a plan prepared in the orchestrator's name, in a term that nobody has seen yet."""
    thief = load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR)
    event = PlanEvent(
        deployment=candidate.deployment,
        term=100,
        revision=1,
        phase=PlanPhase.PREPARE,
        reason="theft",
        issued_at=datetime.now(UTC),
        current=current,
        candidate=candidate,
    )
    await bus.jetstream().publish(subjects.plan(candidate.deployment), seal_event(event, thief))


Said = tuple[tuple[NodeId, int, int], ...]
"""Stages: node, first block, last block."""


def chain(stages: Said) -> tuple[Stage, ...]:
    return tuple(Stage(node=node, first=first, last=last) for node, first, last in stages)


def honest(stages: Said) -> DeployRequest:
    return DEPLOYED.model_copy(update={"placement": chain(stages)})


def moved(plan: Plan, stages: Said) -> Plan:
    """The next plan after `plan`, and where it puts the blocks."""
    route = plan.routes[0].model_copy(update={"stages": chain(stages)})
    return plan.model_copy(update={"epoch": plan.epoch + 1, "routes": (route,), "reason": "theft"})


def two_faced(lies: dict[NodeId, PlanEvent], thief: Identity) -> bytes:
    """One event under one signature, of which each node is told another: the letters of several."""
    payloads = [msgpack.unpackb(seal_event(event, thief))[1] for event in lies.values()]
    events = [SealedEvent.model_validate_json(payload) for payload in payloads]
    letters = [
        next(letter for letter in event.letters if is_for(base64.b64decode(letter), node))
        for node, event in zip(lies, events, strict=True)
    ]
    mixed = events[0].model_copy(update={"letters": tuple(letters)})
    return seal(mixed, PLAN_TYPE, thief.name, thief.key)


async def model_of(at: Access) -> str:
    """The digest of the model that is deployed."""
    status = await control.status(at)
    plan = status.deployments[0].current
    assert plan is not None
    return str(plan.model)
