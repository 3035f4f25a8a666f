"""Each attack that the threat model names, on the parts of an agent that listen: refused, audited, nothing changed.

The attacker owns the bus: it says what it likes on every subject, in any order, and again after a restart. What it has
beside that, each test says: old messages, another cluster's keys, a member's, an orchestrator's that was stolen.
"""

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import msgpack
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nats.aio.client import Client

from agent.guidance import GRACE_S
from bus.audit import AuditTrail
from bus.connection import connect
from bus.enrolment import renew, revoke, rotate
from bus.folders import ROSTER
from bus.founding import ROSTER_LIFETIME, load_holder
from bus.identity import BEACONS_PER_WRITE, ORCHESTRATOR, Identity, load_identity
from bus.joining import join
from bus.sealed_plans import seal_event
from bus.stopping import end
from bus.streams import ensure_streams
from bus.together import CLUSTER, LIFETIME, make_members
from orchestrator.fold import Report
from orchestrator.inbox import Inbox, Rejections
from schemas import subjects
from schemas.audit import AuditKind, envelope_digest
from schemas.base import DeploymentName, Digest, NodeId
from schemas.beacon import BEACON_EVERY_S, Beacon
from schemas.capacity import Guidance
from schemas.codec import decode, encode
from schemas.deployment import Settings, Stage
from schemas.envelope import BEACON_TYPE, LEADER_TYPE, PLAN_TYPE, RECEIPT_TYPE, pae, seal
from schemas.known import JUMP_MAX, PlanSeen, RosterSeen
from schemas.leader import Leadership
from schemas.plan import PlanEvent, PlanPhase, Receipt, ReceiptStatus
from schemas.roster import ROSTER_TYPE, Roster, open_roster
from schemas.section import SealedEvent
from schemas.signed import key_id, sign
from tests.nodes import plan_of
from tests.security.believer import SOON_S, Believer, believing

N0, N1 = NodeId("n0"), NodeId("n1")
CHAT, EMBED = DeploymentName("chat"), DeploymentName("embed")
PLANS = subjects.plan(CHAT)


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    """A cluster of two agents and an orchestrator."""
    make_members(tmp_path / "keys", [N0, N1])
    return tmp_path / "keys"


@pytest_asyncio.fixture
async def bus(nats_url: str) -> AsyncIterator[Client]:
    client = await connect(nats_url, "attacker")
    await ensure_streams(client)
    yield client
    await client.close()


def event(term: int, revision: int, deployment: DeploymentName = CHAT) -> PlanEvent:
    """An orchestrator's word of a plan on n0."""
    plan = plan_of(revision, [Stage(node=N0, first=0, last=0)], Settings(), 1)
    return PlanEvent(
        deployment=deployment,
        term=term,
        revision=revision,
        phase=PlanPhase.COMMIT,
        reason="a test",
        issued_at=datetime.now(UTC),
        current=plan.model_copy(update={"deployment": deployment}),
    )


def signed(keys: Path, term: int, revision: int, deployment: DeploymentName = CHAT) -> bytes:
    """The same, by the orchestrator's own key."""
    return seal_event(event(term, revision, deployment), member(keys, ORCHESTRATOR))


def beacon(
    keys: Path,
    term: int,
    number: int,
    *events: bytes,
    roster: RosterSeen | None = None,
    signer: NodeId = ORCHESTRATOR,
) -> bytes:
    """A leader's word that these events, and this roster or the one in force, are the newest."""
    who = member(keys, signer)
    plans = {}
    for data in events:
        found = decode(SealedEvent, msgpack.unpackb(data)[1], "event")
        plans[found.deployment] = PlanSeen(term=found.term, revision=found.revision, digest=envelope_digest(data))
    seen = roster or RosterSeen(version=who.roster.version, digest=who.roster.digest)
    said = Beacon(term=term, number=number, issued_at=datetime.now(UTC), roster=seen, plans=plans)
    return seal(said, BEACON_TYPE, who.name, who.key)


def member(keys: Path, name: NodeId) -> Identity:
    return load_identity(keys / name, name)


def newest_roster(keys: Path) -> bytes:
    return (keys / CLUSTER / ROSTER).read_bytes()


def as_root(keys: Path, **changes: object) -> bytes:
    """The newest roster with `changes`, signed by the root's own key."""
    holder = load_holder(keys / CLUSTER / "root-0.key").signing
    roster = open_roster(member(keys, N0).root, newest_roster(keys)).model_copy(update=changes)
    return sign(Roster.model_validate(roster.model_dump()), ROSTER_TYPE, {key_id(holder.public_key()): holder})


async def shown(client: Client, subject: str, *messages: bytes) -> None:
    """Put messages where whoever comes later finds them."""
    for message in messages:
        await client.jetstream().publish(subject, message)


async def test_replay_what_was_superseded_is_not_acted_upon_again(nats_url: str, bus: Client, keys: Path) -> None:
    old, new = signed(keys, 1, 1), signed(keys, 1, 2)
    async with believing(nats_url, keys, N0) as agent:
        for data, revision in ((old, 1), (new, 2)):
            await shown(bus, PLANS, data)
            await agent.acts_on(1, revision)
        before = agent.state()
        # Live, an older event is one that was overtaken on its way, as happens to honest ones: passed over, not said.
        await bus.publish(PLANS, old)
        await shown(bus, PLANS, signed(keys, 1, 3))
        await agent.acts_on(1, 3)
        assert agent.state() != before, "and the newer one is remembered"
    async with believing(nats_url, keys, N0) as again:
        await again.acts_on(1, 3)


async def test_rollback_after_a_restart_an_older_event_is_refused(nats_url: str, bus: Client, keys: Path) -> None:
    """Whoever owns the server can hide the newest event from a process that knows nothing yet."""
    old, new = signed(keys, 1, 1), signed(keys, 2, 1)
    async with believing(nats_url, keys, N0) as agent:
        await shown(bus, PLANS, new)
        await agent.acts_on(2, 1)
        before = agent.state()
    await bus.jetstream().purge_stream(subjects.STREAM_PLANS, subject=PLANS)
    async with believing(nats_url, keys, N0) as again:
        await again.rejected("rolled_back", old, PLANS)
        assert again.plans.empty()
        assert again.state() == before


async def test_rollback_a_revoked_member_does_not_come_back_with_an_older_roster(
    nats_url: str, bus: Client, keys: Path
) -> None:
    old = newest_roster(keys)
    revoke(keys / CLUSTER, N1, [load_holder(keys / CLUSTER / "root-0.key")], now=datetime.now(UTC))
    async with believing(nats_url, keys, N0) as agent:
        await bus.publish(subjects.ROSTER, newest_roster(keys))
        await agent.audited(AuditKind.ROSTER_TAKEN)
        before = agent.state()
        await bus.publish(subjects.ROSTER, old)
        # Earlier rosters lie in the stream for good, so this alone is refused without a word; what follows is heard.
        await agent.rejected("bad_signature", old[:-1], subjects.ROSTER)
        assert agent.state() == before
        assert agent.identity.member(N1) is None
    async with believing(nats_url, keys, N0) as again:
        assert again.identity.member(N1) is None


async def test_freeze_a_roster_whose_time_is_over_is_said_and_not_taken(nats_url: str, bus: Client, keys: Path) -> None:
    renew(keys / CLUSTER, [load_holder(keys / CLUSTER / "root-0.key")], now=datetime.now(UTC))
    late = datetime.now(UTC) + ROSTER_LIFETIME + timedelta(days=1)
    async with believing(nats_url, keys, N0, lambda: late) as agent:
        await agent.audited(AuditKind.ROSTER_STALE)
        await agent.rejected("expired", newest_roster(keys), subjects.ROSTER)


async def test_freeze_an_event_that_is_withheld_is_missed(nats_url: str, bus: Client, keys: Path) -> None:
    """Whoever owns the server keeps it out of the log and off the wire; the beacon that names it comes through."""
    old, new = signed(keys, 1, 1), signed(keys, 1, 2)
    async with believing(nats_url, keys, N0) as agent:
        await shown(bus, PLANS, old)
        await agent.acts_on(1, 1)
        for number in (1, 2):  # the second says nothing new, and is not said again
            await bus.publish(subjects.BEACON, beacon(keys, 1, number, new))
        found = await agent.audited(AuditKind.EVENT_WITHHELD, revision=2, digest=envelope_digest(new))
        assert found.deployment == CHAT
        await agent.reports(Guidance(withheld=(CHAT,)))
        await shown(bus, PLANS, new)
        await agent.acts_on(1, 2)
        await agent.reports(None)


async def test_freeze_what_is_kept_from_the_wire_alone_is_found_in_the_log(
    nats_url: str, bus: Client, keys: Path
) -> None:
    old, new = signed(keys, 1, 1), signed(keys, 1, 2)
    async with believing(nats_url, keys, N0) as agent:
        await shown(bus, PLANS, old)
        await agent.acts_on(1, 1)
        await agent.deaf_to_plans()
        await shown(bus, PLANS, new)
        await bus.publish(subjects.BEACON, beacon(keys, 1, 1, new))
        async with asyncio.timeout(GRACE_S):  # and not when it next looks by itself
            await agent.acts_on(1, 2)


async def test_freeze_a_roster_that_is_withheld_is_missed(nats_url: str, bus: Client, keys: Path) -> None:
    revoke(keys / CLUSTER, N1, [load_holder(keys / CLUSTER / "root-0.key")], now=datetime.now(UTC))
    newest = open_roster(member(keys, N0).root, newest_roster(keys))
    async with believing(nats_url, keys, N0) as agent:
        seen = RosterSeen(version=newest.version, digest=newest.digest)
        await bus.publish(subjects.BEACON, beacon(keys, 1, 1, roster=seen))
        await agent.audited(AuditKind.EVENT_WITHHELD, version=newest.version, digest=newest.digest)
        await agent.reports(Guidance(withheld_roster=newest.version))
        assert agent.identity.member(N1) is not None, "that it is revoked was kept from here"
        await bus.publish(subjects.ROSTER, newest_roster(keys))
        await agent.audited(AuditKind.ROSTER_TAKEN)
        await agent.reports(None)


async def test_freeze_where_no_beacon_comes_the_node_says_so_and_when_one_does(
    nats_url: str, bus: Client, keys: Path
) -> None:
    async with believing(nats_url, keys, N0) as agent:
        await shown(bus, PLANS, signed(keys, 1, 1))
        await agent.acts_on(1, 1)
        # Rubbish is no beacon: a node that hears nothing else is as unguided as one that hears nothing.
        await agent.rejected("bad_signature", beacon(keys, 1, 1, signer=N1), subjects.BEACON)
        await agent.audited(AuditKind.NODE_UNGUIDED)
        await shown(bus, PLANS, signed(keys, 1, 2))
        await agent.acts_on(1, 2)  # it goes on with what does come
        await bus.publish(subjects.BEACON, beacon(keys, 1, 1))
        await agent.audited(AuditKind.NODE_GUIDED)
        await agent.reports(None)


async def test_replay_no_beacon_counts_twice_or_backwards_or_from_elsewhere(
    nats_url: str, bus: Client, keys: Path, tmp_path: Path
) -> None:
    make_members(tmp_path / "others", [N0])
    stranger = Ed25519PrivateKey.generate()
    first, second, newest = beacon(keys, 2, 1), beacon(keys, 2, 2), beacon(keys, 3, 1)
    kind, payload, signer, _ = msgpack.unpackb(beacon(keys, 3, 2))
    refused = {
        "rolled_back": (first, second, beacon(keys, 2, 9), newest),
        "invalid_request": (beacon(keys, 4 + JUMP_MAX, 1),),
        "bad_signature": (
            beacon(tmp_path / "others", 3, 2),
            beacon(keys, 3, 2, signer=N1),
            signed(keys, 3, 2),
            msgpack.packb([kind, payload, signer, stranger.sign(pae(kind, payload))]),
            b"\xdc\x00\x04" + beacon(keys, 3, 2)[1:],
        ),
    }
    async with believing(nats_url, keys, N0) as agent:
        for data in (first, second, newest):
            await bus.publish(subjects.BEACON, data)
        await agent.has_taken_beacon(3, 1)
        for code, attacks in refused.items():
            for attack in attacks:
                await agent.rejected(code, attack, subjects.BEACON)
    async with believing(nats_url, keys, N0) as again:
        await again.rejected("rolled_back", newest, subjects.BEACON)


async def test_replay_after_a_restart_a_minute_of_beacons_counts_again_at_most(
    nats_url: str, bus: Client, keys: Path
) -> None:
    recorded = [beacon(keys, 1, number) for number in range(1, 2 * BEACONS_PER_WRITE)]
    async with believing(nats_url, keys, N0) as agent:
        for data in recorded:
            await bus.publish(subjects.BEACON, data)
        await agent.has_taken_beacon(1, len(recorded))
    async with believing(nats_url, keys, N0) as again:
        seen = again.identity.known.beacon
        assert seen is not None and (len(recorded) - seen.number) * BEACON_EVERY_S < 60
        for data in recorded[: seen.number]:
            await again.rejected("rolled_back", data, subjects.BEACON)


async def test_fast_forward_no_term_and_no_roster_is_far_ahead(nats_url: str, bus: Client, keys: Path) -> None:
    """Nor does what was refused for that stand before what an honest leader says, live or in the log."""
    far = signed(keys, 10 + JUMP_MAX, 1)
    async with believing(nats_url, keys, N0) as agent:
        await shown(bus, PLANS, signed(keys, 1, 1))
        await agent.acts_on(1, 1)
        await agent.rejected("invalid_request", far, PLANS)
        version = agent.identity.roster.version + JUMP_MAX + 1
        await agent.rejected("invalid_request", as_root(keys, version=version), subjects.ROSTER)
        await shown(bus, PLANS, signed(keys, 2, 1))
        await agent.acts_on(2, 1)
    async with believing(nats_url, keys, N0) as again:
        await again.acts_on(2, 1)


async def test_mix_and_match_nothing_of_another_cluster_subject_or_kind(
    nats_url: str, bus: Client, keys: Path, tmp_path: Path
) -> None:
    make_members(tmp_path / "others", [N0])
    leader = Leadership(leader=ORCHESTRATOR, term=7, since=datetime.now(UTC))
    word = seal(leader, LEADER_TYPE, ORCHESTRATOR, member(keys, ORCHESTRATOR).key)
    kind, payload, signer, _ = msgpack.unpackb(signed(keys, 1, 1))
    other_signature = msgpack.unpackb(signed(keys, 1, 2))[3]
    async with believing(nats_url, keys, N0) as agent:
        for attack in (
            signed(tmp_path / "others", 1, 1),
            signed(keys, 1, 1, EMBED),
            word,
            msgpack.packb([kind, payload, signer, other_signature]),
            msgpack.packb([kind, msgpack.unpackb(word)[1], signer, msgpack.unpackb(word)[3]]),
        ):
            await agent.rejected("bad_signature", attack, PLANS)
        await agent.rejected("bad_signature", newest_roster(tmp_path / "others"), subjects.ROSTER)
        await agent.rejected("bad_signature", signed(keys, 1, 1), subjects.LEADER)
        assert agent.plans.empty()


async def test_another_spelling_of_a_genuine_event_does_not_spoil_it(nats_url: str, bus: Client, keys: Path) -> None:
    """What is remembered of an event is the digest of its bytes: were another spelling taken first, the genuine event
    would be refused as its forgery."""
    genuine = signed(keys, 1, 1)
    async with believing(nats_url, keys, N0) as agent:
        await agent.rejected("bad_signature", b"\xdc\x00\x04" + genuine[1:], PLANS)
        assert agent.plans.empty()
        await shown(bus, PLANS, genuine)
        await agent.acts_on(1, 1)
    async with believing(nats_url, keys, N0) as again:
        await again.acts_on(1, 1)


async def test_wrong_key_no_agent_and_no_stranger_commands(nats_url: str, bus: Client, keys: Path) -> None:
    agents = member(keys, N1).key
    payload = msgpack.unpackb(signed(keys, 1, 1))[1]
    async with believing(nats_url, keys, N0) as agent:
        for key, name in (
            (Ed25519PrivateKey.generate(), ORCHESTRATOR),
            (agents, ORCHESTRATOR),
            (agents, N1),
            (member(keys, N0).key, N0),
        ):
            signature = key.sign(pae(PLAN_TYPE, payload))
            await agent.rejected("bad_signature", msgpack.packb([PLAN_TYPE, payload, name, signature]), PLANS)
        bare = member(keys, ORCHESTRATOR).key.sign(payload)
        await agent.rejected("bad_signature", msgpack.packb([PLAN_TYPE, payload, ORCHESTRATOR, bare]), PLANS)
        stolen = Ed25519PrivateKey.generate()
        forged = sign(agent.identity.roster, ROSTER_TYPE, {key_id(stolen.public_key()): stolen})
        await agent.rejected("bad_signature", forged, subjects.ROSTER)
        root_name = next(iter(agent.identity.root.keys))
        in_its_name = [ROSTER_TYPE, encode(agent.identity.roster), root_name]
        signature = stolen.sign(pae(ROSTER_TYPE, encode(agent.identity.roster)))
        await agent.rejected("bad_signature", msgpack.packb([*in_its_name, signature]), subjects.ROSTER)
        assert agent.plans.empty()


async def test_expired_delegation_an_orchestrator_whose_time_is_over_commands_nobody(
    nats_url: str, bus: Client, keys: Path
) -> None:
    late = datetime.now(UTC) + LIFETIME + timedelta(hours=1)
    async with believing(nats_url, keys, N0, lambda: late) as agent:
        assert agent.identity.roster.member(ORCHESTRATOR) is not None, "the roster still names it"
        await agent.rejected("bad_signature", signed(keys, 1, 1), PLANS)
        assert agent.plans.empty()


async def test_a_stolen_orchestrator_s_key_ends_with_its_rotation(nats_url: str, bus: Client, keys: Path) -> None:
    thief = member(keys, ORCHESTRATOR)
    async with believing(nats_url, keys, N0) as agent:
        await bus.publish(PLANS, seal_event(event(900, 1), thief))
        await agent.acts_on(900, 1)  # until then it is the orchestrator's
        now, root = datetime.now(UTC), [load_holder(keys / CLUSTER / "root-0.key")]
        join(rotate(keys / CLUSTER, ORCHESTRATOR, root, now=now), keys / ORCHESTRATOR, now)
        await bus.publish(subjects.ROSTER, newest_roster(keys))
        await agent.audited(AuditKind.ROSTER_TAKEN)
        await agent.rejected("bad_signature", seal_event(event(901, 1), thief), PLANS)
    async with believing(nats_url, keys, N0) as again:
        await bus.publish(PLANS, signed(keys, 1, 1))
        await again.acts_on(1, 1)  # and what it drove up is forgotten with it


async def test_an_agent_speaks_for_nobody_else_to_the_orchestrator(nats_url: str, bus: Client, keys: Path) -> None:
    """Receipts decide when a plan is committed: one in another's name, or on its subject, is none."""
    leader = member(keys, ORCHESTRATOR)
    heard: list[Report] = []
    trail = AuditTrail(bus.jetstream(), leader)
    inbox = Inbox(leader, Rejections(trail), heard.append)
    ear = Believer(bus, leader)
    await bus.subscribe(subjects.ALL_AUDIT, cb=ear.note)
    tasks = [asyncio.create_task(job) for job in (trail.run(), inbox.hear_receipts(bus))]

    def receipt(node: NodeId, signer: NodeId) -> bytes:
        said = Receipt(
            node=node, deployment=CHAT, epoch=1, plan=Digest("0" * 64), status=ReceiptStatus.READY, elapsed_ms=1
        )
        return seal(said, RECEIPT_TYPE, signer, member(keys, N1).key)

    try:
        for node, signer, subject in ((N0, N1, N0), (N0, N0, N0), (N1, N1, N0), (N0, N1, N1)):
            await shown(bus, subjects.receipt(subject), receipt(node, signer))
            await ear.audited(AuditKind.EVENT_REJECTED, code="bad_signature", subject=subjects.receipt(subject))
        assert heard == []
        await shown(bus, subjects.receipt(N1), receipt(N1, N1))
        async with asyncio.timeout(SOON_S):
            while not heard:  # noqa: ASYNC110 (it tells nobody)
                await asyncio.sleep(0.01)
        assert len(heard) == 1
    finally:
        await end(tasks)
