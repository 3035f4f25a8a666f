"""Who belongs changes while the cluster runs, and what the root said holds against everybody on the bus."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import pytest_asyncio

from bus.enrolment import renew, revoke, rotate
from bus.folders import ROSTER
from bus.following import publish_roster
from bus.founding import load_holder
from bus.holders import replace_holders
from bus.identity import ORCHESTRATOR, load_identity, read_roster
from bus.joining import join
from bus.sealed_plans import seal_event
from bus.together import CLIENT, CLUSTER, make_members
from models.store import Store
from resplit import Client, control
from resplit.sealing import Sealer
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.deployment import Stage
from schemas.plan import Plan, PlanEvent, PlanPhase, Route
from schemas.roster import ROSTER_TYPE, Policy, Roster
from schemas.signed import key_id, sign
from tests.integration.cluster_fixtures import (
    CHAT,
    N0,
    N1,
    N2,
    PROMPT,
    SETTINGS,
    Oracle,
    Serving,
    Streaming,
    command,
    serving,
    three_stages,
)
from tests.sealed_events import whole

pytestmark = pytest.mark.asyncio(loop_scope="session")

N3 = NodeId("n3")
CUT_OFF_S = 10.0


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def changing(
    tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle
) -> AsyncIterator[Serving]:
    """Three agents, of which n2 is at the edge, and at first may hold everything all the same."""
    folder = tmp_path_factory.mktemp("changing") / "cluster"
    make_members(folder / "keys", [N0, N1, N2], edge=[N2])
    async with serving(folder, zoo_store, oracle) as running:
        yield running


async def published(running: Serving, *nodes: NodeId) -> Roster:
    """The cluster's roster, once `nodes` have taken it."""
    data = (running.cluster.keys / CLUSTER / ROSTER).read_bytes()
    await running.ear.identity.take_roster(data)
    await publish_roster(running.control.jetstream(), data)
    roster = running.ear.identity.roster
    for node in (*nodes, ORCHESTRATOR):
        await running.ear.wait(AuditKind.ROSTER_TAKEN, source=node, version=roster.version)
    return roster


async def test_an_agent_that_joins_later_works_with_those_that_ran_and_reads_what_clients_seal(
    changing: Serving, tmp_path: Path
) -> None:
    """Folders name it only once they took the newer roster from the bus: that of a client which hears of it when the
    new agent refuses its letter, of one that asks when it connects, and of an operator who reads the trail."""
    cluster = changing.cluster
    deaf, late = (Path(shutil.copytree(cluster.client_keys, tmp_path / name)) for name in ("deaf", "late"))
    watching = Path(shutil.copytree(cluster.operator_keys, tmp_path / "watching"))
    await cluster.deny(CLIENT, subjects.ROSTER)
    async with sealing(changing, deaf) as client:
        assert await cluster.join() == N3
        await changing.deploy(CHAT, "llama", placement=three_stages(N0, N3, N1), settings=SETTINGS)
        await changing.answers()
        await changing.deploy(CHAT, "llama", placement=three_stages(N3, N0, N1), settings=SETTINGS)
        await changing.until(lambda found: not found.draining)
        assert read_roster(deaf).member(N3) is None
        await answers(changing, client)
        assert read_roster(deaf).member(N3) is not None
    await cluster.deny(CLIENT)
    assert read_roster(late).member(N3) is None
    async with sealing(changing, late) as client:
        assert read_roster(late) == read_roster(deaf)
        await answers(changing, client)
    code, trail, _ = await command("events", "--url", cluster.url, "--keys", str(watching))
    assert code == 0 and f"  {N3} " in trail and "[FORGED]" not in trail


def sealing(running: Serving, keys: Path) -> Client:
    return Client(running.cluster.url, keys=keys, sealer=Sealer(keys))


async def answers(running: Serving, client: Client) -> None:
    answer = await client.complete(CHAT, PROMPT, max_tokens=3, ignore_eos=True)
    assert answer.token_ids == running.oracle.tokens(PROMPT, 3)


async def test_a_revoked_agent_is_out_and_its_blocks_are_elsewhere(changing: Serving) -> None:
    await changing.deploy(CHAT, "llama", stages=4, settings=SETTINGS)
    status = await changing.deploy(CHAT, "llama", settings=SETTINGS)
    assert status.current is not None and N3 in status.current.nodes
    changing.ear.heard.clear()
    root = changing.cluster.keys / CLUSTER
    revoke(root, N3, [load_holder(root / "root-0.key")], now=datetime.now(UTC))
    assert (await published(changing, N0, N1, N2)).member(N3) is None
    await changing.ear.wait(AuditKind.LINK_CHANGED, peer=N3, up=False)
    await changing.until(
        lambda found: found.state == "serving" and found.current is not None and N3 not in found.current.nodes
    )
    assert N3 in changing.cluster.processes, "it runs, and nobody believes it"
    await changing.cluster.reload()
    async with asyncio.timeout(CUT_OFF_S):
        while "refuses: nats: 'Authorization Violation'" not in changing.cluster.log(N3).read_text():  # noqa: ASYNC110
            await asyncio.sleep(0.1)  # (a log file sends no events)
    await changing.answers()
    assert all(node.capacity.node != N3 for node in (await control.status(changing.cluster.operator)).nodes)
    await changing.cluster.stop(N3)


async def test_an_agent_with_new_keys_is_told_its_plan_again(changing: Serving) -> None:
    """What was sealed for its old key it cannot read; nothing else has changed that would make another event."""
    await changing.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
    await changing.until(lambda found: not found.draining)
    changing.ear.heard.clear()
    root = changing.cluster.keys / CLUSTER
    bundle = rotate(root, N1, [load_holder(root / "root-0.key")], now=datetime.now(UTC))
    await published(changing, N0, N2)
    await changing.ear.wait(AuditKind.PLAN_RESEALED)
    await changing.cluster.kill(N1)
    join(bundle, changing.cluster.keys / N1, datetime.now(UTC))
    await changing.cluster.reload()
    await changing.cluster.start(N1)
    await changing.until_answering()


async def test_an_agent_that_starts_again_is_not_taken_in_by_an_older_plan(changing: Serving) -> None:
    """Whoever owns the server can hide the newest events from a process that knows nothing yet."""
    await changing.deploy(CHAT, "llama", placement=three_stages(N0, N2, N1), settings=SETTINGS)
    await changing.until(lambda found: not found.draining)
    await changing.cluster.stop(ORCHESTRATOR)
    js, subject = changing.control.jetstream(), subjects.plan(CHAT)
    newest = await js.get_last_msg(subjects.STREAM_PLANS, subject)
    assert newest.data is not None and newest.seq is not None
    await changing.cluster.kill(N1)
    await js.delete_msg(subjects.STREAM_PLANS, newest.seq)
    changing.ear.heard.clear()
    await changing.cluster.start(N1)
    event = await changing.ear.wait(AuditKind.EVENT_REJECTED, source=N1)
    assert (event.fields["code"], event.fields["subject"]) == ("rolled_back", subject)
    await js.publish(subject, newest.data)
    await changing.cluster.start(ORCHESTRATOR)
    await changing.until_answering()


async def forge(running: Serving, *stages: Stage) -> Plan:
    """Put a plan in force with the orchestrator's own key, which was stolen, ahead of all that its owner says."""
    last = await running.control.jetstream().get_last_msg(subjects.STREAM_PLANS, subjects.plan(CHAT))
    thief = load_identity(running.cluster.keys / ORCHESTRATOR, ORCHESTRATOR)
    before = whole(last.data, thief)
    assert before.current is not None
    route = Route(index=0, source=stages[0].node, stages=stages, max_sequences=1)
    plan = before.current.model_copy(update={"epoch": before.current.epoch + 1, "routes": (route,), "reason": "theft"})
    event = PlanEvent(
        deployment=CHAT,
        term=before.term + 1,
        revision=1,
        phase=PlanPhase.COMMIT,
        reason="theft",
        issued_at=datetime.now(UTC),
        current=plan,
    )
    await running.control.jetstream().publish(subjects.plan(CHAT), seal_event(event, thief))
    return plan


async def test_a_stolen_orchestrator_s_key_puts_no_sensitive_block_on_an_untrusted_node(changing: Serving) -> None:
    await changing.deploy(CHAT, "llama", placement=three_stages(N0, N2, N1), settings=SETTINGS)
    root = changing.cluster.keys / CLUSTER
    policy = Policy(sensitive={"*": "ends"})
    renew(root, [load_holder(root / "root-0.key")], now=datetime.now(UTC), policy=policy)
    await published(changing, N0, N1, N2)
    await changing.answers()
    stream = await Streaming(changing.client, max_tokens=900).began()
    await changing.cluster.stop(ORCHESTRATOR)  # it would answer the usurper at once

    changing.ear.heard.clear()
    plan = await forge(changing, *three_stages(N2, N0, N1))
    for node in (N0, N2):  # n1 is told of no block of n2's, and is handed nothing that n0 does not hand it
        event = await changing.ear.wait(AuditKind.PLAN_REFUSED, source=node, epoch=plan.epoch)
        assert str(event.fields["error"]).startswith("forbidden: block 0 of 'chat' must not be on 'n2'")
    error = await stream.end()
    assert error is not None and error.code == "node_lost", "what ran ends, rather than on a node of the thief's choice"

    await changing.cluster.start(ORCHESTRATOR)
    await changing.deploy(CHAT, "llama", placement=three_stages(N1, N2, N0), settings=SETTINGS)
    await changing.answers()


async def test_others_hold_the_root_and_those_before_them_are_heard_no_more(changing: Serving, tmp_path: Path) -> None:
    """While the cluster runs; a client and an agent that were away for it follow when they are back."""
    root, cluster = changing.cluster.keys / CLUSTER, changing.cluster
    copied = Path(shutil.copytree(root, tmp_path / "copied"))
    before = load_holder(root / "root-0.key")
    forged = read_roster(root).model_copy(update={"version": 500, "members": ()})
    away = Path(shutil.copytree(cluster.client_keys, tmp_path / "away"))
    await cluster.kill(N1)
    changing.ear.heard.clear()
    _, [path] = replace_holders(root, [before], staying=(), added=1, threshold=1, now=datetime.now(UTC))
    assert (await published(changing, N0, N2)).root_version == 2

    keys = {key_id(before.signing.public_key()): before.signing}
    await publish_roster(changing.control.jetstream(), sign(forged, ROSTER_TYPE, keys))
    for node in (N0, N2, ORCHESTRATOR):
        event = await changing.ear.wait(AuditKind.EVENT_REJECTED, source=node, subject=subjects.ROSTER)
        assert event.fields["code"] == "bad_signature"

    changing.ear.heard.clear()
    renew(root, [load_holder(path)], now=datetime.now(UTC))
    await published(changing, N0, N2)
    await cluster.start(N1)
    await changing.ear.wait(AuditKind.ROSTER_TAKEN, source=N1)
    await changing.until_answering()
    assert read_roster(away).root_version == 1
    async with sealing(changing, away) as client:
        await answers(changing, client)
    assert read_roster(away) == read_roster(cluster.keys / N1) == read_roster(root)
    publish = ("roster", "publish", "--url", cluster.url, "--keys", str(cluster.operator_keys), "--cluster")
    code, _, said = await command(*publish, str(copied))
    assert (code != 0, "the cluster has roster" in said) == (True, True), said
    assert (await command(*publish, str(root)))[0] == 0
