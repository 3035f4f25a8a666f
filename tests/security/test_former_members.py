"""Members get new keys and leave while a real cluster serves: what they wrote stays true, and their keys, stolen, add
nothing to the trail and steer nothing."""

import asyncio
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from nats.aio.client import Client as Nats

import resplit.demo
from benchmarks.faults.owned import OwnedCluster
from bus.enrolment import revoke, rotate
from bus.folders import ROSTER
from bus.following import publish_roster
from bus.founding import load_holder
from bus.identity import ORCHESTRATOR, Identity, load_identity, read_roster
from bus.joining import join
from bus.sealed_heartbeats import seal_heartbeat
from bus.together import CLUSTER, OPERATOR
from resplit import Client, RequestError, control
from resplit.chain import Flaw, LifeFound, verify
from resplit.exits import Exit
from resplit.standing import Reader, Seen, WriterKey, trust_of
from schemas import subjects
from schemas.audit import NOTHING_BEFORE, AuditEvent, AuditKind, Link, envelope_digest
from schemas.base import LifeId, NodeId
from schemas.envelope import AUDIT_TYPE, seal
from tests.audit_trails import envelopes_at
from tests.integration.cluster_fixtures import command
from tests.security.recording import ADDER, DEPLOYED, N0, N1, SERVING_S

N2 = NodeId("n2")
SOON_S = 60.0
LATER = 10**6
"""A heartbeat that would follow every honest one."""


@pytest.mark.slow
async def test_the_trail_outlives_its_writers_and_their_keys_add_nothing_to_it(tmp_path: Path) -> None:
    store = Path(shutil.copytree(resplit.demo.shipped_store(), tmp_path / "store"))
    async with OwnedCluster(tmp_path / "cluster", store, agents=3, threads=1) as cluster:
        bus = await cluster.owner("CONTROL")
        await control.deploy_and_wait(cluster.operator, DEPLOYED, SERVING_S)
        await served(cluster)
        thieves = [load_identity(cluster.keys / node, node) for node in (N1, N2)]
        reports = {node.capacity.node: node.capacity for node in (await control.status(cluster.operator)).nodes}

        root, now = cluster.keys / CLUSTER, datetime.now(UTC)
        bundle = rotate(root, N1, [load_holder(root / "root-0.key")], now=now)
        await cluster.stop(N1)
        join(bundle, cluster.keys / N1, now)
        await handed_out(cluster, bus, N0, N2)
        await cluster.start(N1)
        await served(cluster)
        revoke(root, N2, [load_holder(root / "root-0.key")], now=datetime.now(UTC))
        await handed_out(cluster, bus, N0, N1)
        await cluster.stop(N2)
        await served(cluster)

        verdict = verify(await envelopes_at(bus), trust_of(read_roster(root)))
        assert verdict.is_sound, verdict.findings
        assert {life.writer for life in verdict.lives} == {ORCHESTRATOR, N0, N1, N2}
        assert len([life for life in verdict.lives if life.writer == N1]) == 2, "under its old key and its new one"
        former = [seen for seen in await trail(cluster, bus) if seen.signer == N2]
        assert former and {seen.standing for seen in former} == {"verified"}

        for thief in thieves:
            lived = await lives_of(cluster, bus, thief.name)
            its_own = Reader({thief.name: (WriterKey(thief.key.public_key()),)})
            last = [data for data in await envelopes_at(bus) if its_own.read(data).standing == "verified"][-1]
            for number, forged in enumerate((appended(thief, last), backdated(thief)), 1):
                await bus.jetstream().publish(subjects.audit(thief.name, AuditKind.LINK_CHANGED), forged)
                late = [seen for seen in await trail(cluster, bus) if seen.signer == thief.name][-number:]
                assert {seen.standing for seen in late} == {"late"}
            now_lived = await lives_of(cluster, bus, thief.name)
            assert now_lived[0] == lived[0], "the life that it follows does not go on with it"
            assert len(now_lived) == len(lived), "and none begins"
            heartbeat = reports[thief.name].model_copy(update={"sequence": LATER, "issued_at": datetime.now(UTC)})
            await bus.publish(subjects.capacity(thief.name), seal_heartbeat(heartbeat, lambda _: (), thief))
            await refused(cluster, bus, subjects.capacity(thief.name))
        known = (await control.status(cluster.operator)).nodes
        assert all(node.capacity.sequence < LATER for node in known)

        at = ["--url", cluster.url, "--keys", str(cluster.keys / OPERATOR)]
        code, out, _ = await command("audit", "verify", *at)
        assert code == Exit.FAILED
        faults = [line.split()[1] for line in out.splitlines() if line.startswith("FAULT")]
        assert faults == [Flaw.LATE] * 4
        code, out, _ = await command("events", *at)
        assert code == Exit.OK
        assert [line.endswith("[LATE]") for line in out.splitlines()].count(True) == 4
        assert "[FORGED]" not in out
        await served(cluster)
        await bus.close()


def appended(thief: Identity, last: bytes) -> bytes:
    """The next event of its last life, as that would have written it."""
    chain = Reader(None).read(last).event.chain
    assert chain is not None
    link = Link(life=chain.life, number=chain.number + 1, previous=envelope_digest(last))
    return signed(thief, link, datetime.now(UTC))


def backdated(thief: Identity) -> bytes:
    """The first event of a life that nobody saw, from the time when the key was a member's."""
    link = Link(life=LifeId(f"{thief.name}-unseen"), number=1, previous=NOTHING_BEFORE)
    return signed(thief, link, datetime.now(UTC) - timedelta(minutes=30))


def signed(thief: Identity, link: Link, at: datetime) -> bytes:
    event = AuditEvent(at=at, source=thief.name, kind=AuditKind.LINK_CHANGED, message="a direct link came up")
    return seal(event.model_copy(update={"chain": link}), AUDIT_TYPE, thief.name, thief.key)


async def handed_out(cluster: OwnedCluster, bus: Nats, *agents: NodeId) -> None:
    """The cluster's roster as its operators bring it: to the server's logins, and then to everybody; until each of
    `agents` and the orchestrator has said that it is in force."""
    data = (cluster.keys / CLUSTER / ROSTER).read_bytes()
    (cluster.keys / OPERATOR / ROSTER).write_bytes(data)
    await cluster.reload()
    await publish_roster(bus.jetstream(), data)
    version = read_roster(cluster.keys / CLUSTER).version
    await until_told(cluster, bus, {(name, version) for name in (ORCHESTRATOR, *agents)}, "version")


async def refused(cluster: OwnedCluster, bus: Nats, subject: str) -> None:
    """Wait until the orchestrator has said that it did not believe a message on `subject`."""
    await until_told(cluster, bus, {(ORCHESTRATOR, subject)}, "subject")


async def until_told(cluster: OwnedCluster, bus: Nats, wanted: set[tuple[NodeId, object]], field: str) -> None:
    """Wait until for each of `wanted` its source has said so much in an event that is true."""
    async with asyncio.timeout(SOON_S):
        while True:
            true = [seen.event for seen in await trail(cluster, bus) if seen.standing == "verified"]
            if wanted <= {(event.source, event.fields.get(field)) for event in true}:
                return
            await asyncio.sleep(0.1)


async def trail(cluster: OwnedCluster, bus: Nats) -> list[Seen]:
    """Every event so far, read by the cluster's newest roster."""
    reader = Reader(trust_of(read_roster(cluster.keys / CLUSTER)))
    return [reader.read(data) for data in await envelopes_at(bus)]


async def lives_of(cluster: OwnedCluster, bus: Nats, writer: NodeId) -> list[LifeFound]:
    """What the trail has of each life of a writer, the first one first."""
    verdict = verify(await envelopes_at(bus), trust_of(read_roster(cluster.keys / CLUSTER)))
    return [life for life in verdict.lives if life.writer == writer]


async def served(cluster: OwnedCluster) -> None:
    """Ask until an answer comes: whoever has a part in it may have been cut off just now."""
    async with Client(cluster.url, keys=cluster.client_keys) as client, asyncio.timeout(SERVING_S):
        while True:
            try:
                await client.complete(ADDER, "12+30=", max_tokens=4)
            except RequestError:
                await asyncio.sleep(0.2)
            else:
                return
