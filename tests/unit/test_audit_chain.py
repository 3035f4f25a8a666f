"""One hash chain per life of a writer: what it says, what it survives, and what a verifier makes of it."""

import asyncio
import json
import stat
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import pytest_asyncio
from nats.aio.client import Client

import bus.audit
from bus.audit import AuditTrail
from bus.connection import connect
from bus.enrolment import revoke
from bus.folders import ROSTER
from bus.founding import load_holder
from bus.heads import Heads, read_head, write_head
from bus.identity import ORCHESTRATOR, load_identity
from bus.together import CLUSTER, make_members
from resplit import chain
from resplit.chain import Finding, Flaw, verify
from resplit.cloudevents import as_line, envelopes
from resplit.holders import Holding, holders
from resplit.standing import Reader, Trust
from resplit.trail import read_trust
from schemas.audit import NOTHING_BEFORE, AuditEvent, AuditKind, Checkpoint, Head, Link, envelope_digest
from schemas.base import DeploymentName, Digest, LifeId, NodeId
from schemas.codec import encode
from schemas.envelope import AUDIT_TYPE, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.merkle import Tree
from tests.audit_trails import N0, N1, Recorded, Writer, all_out, envelopes_at, record_trail, rewritten, tell
from tests.conftest import running_server

AT = datetime(2026, 1, 1, tzinfo=UTC)
# Leaves and roots of the test vectors that come with RFC 6962's implementations.
LEAVES = ["", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f"]
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Recorded]:
    with running_server(tmp_path_factory.mktemp("nats")) as server, asyncio.Runner() as runner:
        yield runner.run(record_trail(server.url, tmp_path_factory.mktemp("keys")))


@pytest_asyncio.fixture
async def client(nats_url: str, tmp_path: Path) -> AsyncIterator[Client]:
    make_members(tmp_path, [N0, N1])
    connection = await connect(nats_url, "test")
    yield connection
    await connection.close()


def writer(client: Client, folder: Path, name: NodeId = N0, checkpoint_s: float = 60.0) -> Writer:
    return Writer(client, load_identity(folder / name, name), folder / f"{name}.audit", checkpoint_s)


def events(data: list[bytes], trust: Trust) -> list[AuditEvent]:
    reader = Reader(trust)
    return [reader.read(one).event for one in data]


def faults(findings: tuple[Finding, ...]) -> list[tuple[Flaw, int]]:
    return [(finding.flaw, finding.number) for finding in findings if not finding.is_declared]


def test_the_tree_is_that_of_rfc_6962() -> None:
    tree, roots = Tree(), []
    for leaf in LEAVES:
        tree = tree.with_leaf(bytes.fromhex(leaf))
        roots.append(tree.root)
    assert roots == ROOTS
    assert Tree().root == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    for _ in range(1000):
        tree = tree.with_leaf(b"")
    assert (tree.count, len(tree.peaks)) == (1008, 6), "as many as there are ones in the number of leaves"


async def test_a_life_is_a_chain_with_its_number_and_the_hash_of_the_envelope_before(
    client: Client, tmp_path: Path
) -> None:
    async with writer(client, tmp_path) as trail:
        tell(trail, 3)
    data = await envelopes_at(client)
    told = events(data, read_trust(tmp_path / N0))
    tree, previous = Tree(), NOTHING_BEFORE
    for number, (envelope, event) in enumerate(zip(data, told, strict=True), 1):
        assert event.chain == Link(life=trail.life, number=number, previous=previous)
        previous = envelope_digest(envelope)
        if event.checkpoint is None:
            tree = tree.with_leaf(bytes.fromhex(previous))
    roster = load_identity(tmp_path / N0, N0).roster.version
    last = Checkpoint(count=3, root=tree.root, roster=roster, ends=True)
    assert [event.checkpoint for event in told] == [None] * 3 + [last]


async def test_the_next_life_names_the_last_envelope_of_the_one_before(client: Client, tmp_path: Path) -> None:
    async with writer(client, tmp_path) as first:
        tell(first, 2)
    file = tmp_path / "n0.audit"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    async with writer(client, tmp_path) as second:
        tell(second, 1)
    data = await envelopes_at(client)
    begins = events(data, read_trust(tmp_path / N0))[3].chain
    assert begins is not None and begins.number == 1
    assert begins.before == Head(writer=N0, life=first.life, number=3, digest=envelope_digest(data[2]))


async def test_events_that_did_not_fit_into_memory_are_counted_in_the_next(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus.audit, "BACKLOG_MAX", 4)
    async with writer(client, tmp_path) as trail:
        tell(trail, 2)
        await all_out(trail)
        for number in range(10):
            trail.record(AuditKind.LINK_CHANGED, "a direct link came up", number=number)
    trust = read_trust(tmp_path / N0)
    data = await envelopes_at(client)
    links = [(e.chain.number, e.chain.lost) for e in events(data, trust) if e.chain is not None]
    assert links == [(1, 0), (2, 0), (3, 6), (4, 0), (5, 0), (6, 0), (7, 0)]
    assert [e.fields["number"] for e in events(data, trust)[2:6]] == [6, 7, 8, 9]
    verdict = verify(data, trust)
    assert verdict.is_sound
    assert [(f.flaw, f.number) for f in verdict.findings] == [(Flaw.BEGINNING, 0), (Flaw.LOST, 3)]
    assert verdict.lives[0].lost == 6


async def test_who_hears_that_its_key_is_out_says_no_more(client: Client, tmp_path: Path) -> None:
    root, identity = tmp_path / CLUSTER, load_identity(tmp_path / N0, N0)
    async with Writer(client, identity, tmp_path / "n0.audit") as trail:
        tell(trail, 2)
        await all_out(trail)
        revoke(root, N0, [load_holder(root / "root-0.key")], now=datetime.now(UTC))
        await identity.take_roster((root / ROSTER).read_bytes())
        tell(trail, 3)
        began = asyncio.get_running_loop().time()
        await trail.drain(60.0)
        assert asyncio.get_running_loop().time() - began < 10.0, "nothing is owed, and nothing waits"
    assert trail.backlog == 0
    told = events(await envelopes_at(client), read_trust(root))
    assert [event.chain.number for event in told if event.chain is not None] == [1, 2]
    verdict = verify(await envelopes_at(client), read_trust(root))
    assert verdict.is_sound and verdict.events == 2


async def test_an_event_larger_than_the_server_carries_is_a_declared_loss(client: Client, tmp_path: Path) -> None:
    async with writer(client, tmp_path) as trail:
        trail.record(AuditKind.LINK_CHANGED, "x" * (2 << 20))
        tell(trail, 1)
    data = await envelopes_at(client)
    links = [(e.chain.number, e.chain.lost) for e in events(data, read_trust(tmp_path / N0)) if e.chain is not None]
    assert links == [(1, 1), (2, 0)]


async def test_a_checkpoint_comes_after_so_many_events_or_so_long(
    client: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus.audit, "CHECKPOINT_EVENTS", 5)
    async with writer(client, tmp_path, N0) as trail:
        tell(trail, 12)
    async with writer(client, tmp_path, N1, checkpoint_s=0.05) as trail:
        tell(trail, 1)
        async with asyncio.timeout(10):
            while len(await envelopes_at(client)) < 17:  # noqa: ASYNC110 (the stream tells nobody)
                await asyncio.sleep(0.05)
    told = events(await envelopes_at(client), read_trust(tmp_path / N0))
    said = [(e.source, e.checkpoint.count, e.checkpoint.ends) for e in told if e.checkpoint is not None]
    assert said == [(N0, 5, False), (N0, 11, False), (N0, 14, True), (N1, 1, False), (N1, 2, True)]


def test_heads_count_what_the_stream_acknowledged_and_are_said_once(recorded: Recorded) -> None:
    places = recorded.life_of(N0, 1)
    heads = Heads(lambda: recorded.keys, N1, LifeId("n1-here"))
    heads.hear(recorded.envelopes[places[0]])
    assert (heads.news, heads.take()) == (False, ())
    for position in (places[1], places[3], places[2]):
        heads.hear(recorded.envelopes[position])
    third = recorded.envelopes[places[2]]
    heads.hear(bytes([third[0]]) + third[1:-1] + bytes([third[-1] ^ 1]))
    assert heads.news is True
    life = recorded.link(places[0]).life
    assert heads.take() == (Head(writer=N0, life=life, number=3, digest=envelope_digest(third)),)
    assert (heads.news, heads.take()) == (False, ())


def test_checkpoints_of_two_orchestrators_do_not_answer_each_other(recorded: Recorded) -> None:
    places = recorded.life_of(NodeId(ORCHESTRATOR))
    heads = Heads(lambda: recorded.keys, NodeId(ORCHESTRATOR), LifeId("orchestrator-other"))
    heads.hear(recorded.envelopes[places[-1]])
    assert recorded.event(places[-1]).kind is AuditKind.CHECKPOINT
    assert not heads.news
    assert len(heads.take()) == 1, "what it is worth is said all the same when there is something else to say"


def test_a_writer_that_rewrites_its_past_is_found_by_who_saw_it(recorded: Recorded) -> None:
    places = recorded.life_of(N0, 1)
    verdict = verify(rewritten(recorded, places, 4), recorded.trust)
    assert {finding.flaw for finding in verdict.findings if not finding.is_declared} == {Flaw.NOT_AS_SEEN}
    last = verify(rewritten(recorded, places, len(places) - 1), recorded.trust)
    assert last.is_sound, "the very last nobody else has seen yet"
    kept = verify(rewritten(recorded, places, len(places) - 1), recorded.trust, recorded.kept)
    assert {finding.flaw for finding in kept.findings if not finding.is_declared} == {Flaw.NOT_AS_SEEN}


def test_two_events_with_one_number_are_a_fork(recorded: Recorded) -> None:
    places = recorded.life_of(N1)
    other = rewritten(recorded, places, 5)[places[5]]
    forked = [*recorded.envelopes[: places[5] + 1], other, *recorded.envelopes[places[5] + 1 :]]
    assert faults(verify(forked, recorded.trust).findings) == [(Flaw.FORK, 6)]


def test_an_event_of_long_ago_may_not_come_again(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chain, "RECENT", 4)
    places = recorded.life_of(N1)
    trail = recorded.envelopes
    assert faults(verify([*trail, trail[places[-4]]], recorded.trust).findings) == []
    assert faults(verify([*trail, trail[places[-5]]], recorded.trust).findings) == [
        (Flaw.OUT_OF_ORDER, len(places) - 4)
    ]


def test_an_old_unchained_event_is_read_but_may_not_come_again_behind_a_chain(recorded: Recorded) -> None:
    key = load_identity(recorded.folder / N0, N0).key
    old = AuditEvent(at=AT, source=N0, kind=AuditKind.NODE_JOINED, message="a node joined")
    data = seal(old, AUDIT_TYPE, N0, key)
    assert b"chain" not in encode(old), "an event without a chain has the bytes that it always had"
    before = verify([data, data, *recorded.envelopes], recorded.trust)
    assert before.is_sound
    assert [f.writer for f in before.findings if f.flaw is Flaw.EARLIER_RELEASE] == [N0]
    assert faults(verify([*recorded.envelopes, data], recorded.trust).findings) == [(Flaw.UNCHAINED, 0)]


def test_without_keys_the_chain_is_judged_and_forgeries_are_not_known(recorded: Recorded) -> None:
    places = recorded.life_of(N0)
    stranger = rewritten(recorded, places, len(places) - 2)
    assert verify(recorded.envelopes, None).is_sound
    assert not verify(stranger, None).is_sound, "the second life names another end"


def test_a_checkpoint_that_lies_is_found(recorded: Recorded) -> None:
    places = recorded.life_of(N0, 1)
    identity = load_identity(recorded.folder / N0, N0)
    event = recorded.event(places[-1])
    assert event.checkpoint is not None
    wrong = event.model_copy(update={"checkpoint": event.checkpoint.model_copy(update={"root": "0" * 64})})
    trail = [*recorded.envelopes]
    trail[places[-1]] = seal(wrong, AUDIT_TYPE, N0, identity.key)
    assert faults(verify(trail, recorded.trust).findings) == [(Flaw.WRONG_CHECKPOINT, len(places))]


def test_a_life_that_is_named_twice_as_the_one_before_is_said(recorded: Recorded) -> None:
    key = load_identity(recorded.folder / N0, N0).key
    first = recorded.event(recorded.life_of(N0, 1)[0])
    assert first.chain is not None and first.chain.before is not None
    other = first.model_copy(update={"chain": first.chain.model_copy(update={"life": LifeId("n0-other")})})
    verdict = verify([*recorded.envelopes, seal(other, AUDIT_TYPE, N0, key)], recorded.trust)
    assert verdict.is_sound
    said = [f for f in verdict.findings if f.flaw is Flaw.TWO_SUCCESSORS]
    assert [f.life for f in said] == [first.chain.before.life]


@pytest.mark.parametrize(
    "content", [b"", b"{}", b'{"writer":"n1","life":"n1-a","number":1,"digest":"' + b"0" * 64 + b'"}']
)
def test_a_memory_that_is_not_this_writers_is_unknown(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "n0.audit"
    assert read_head(file, N0) is None
    file.write_bytes(content)
    assert read_head(file, N0) is None
    head = Head(writer=N0, life=LifeId("n0-a"), number=7, digest=Digest("1" * 64))
    write_head(file, head)
    assert read_head(file, N0) == head
    assert list(tmp_path.iterdir()) == [file], "nothing half written stays"


def test_an_export_is_cloud_events_and_gives_back_the_exact_envelopes(recorded: Recorded) -> None:
    lines = [as_line(data) for data in recorded.envelopes]
    assert tuple(envelopes(lines)) == recorded.envelopes
    place = recorded.life_of(N0)[1]
    found = json.loads(lines[place])
    assert (found["specversion"], found["datacontenttype"]) == ("1.0", "application/json")
    assert (found["source"], found["type"]) == ("/resplit/n0", "resplit.audit.link_changed")
    assert datetime.fromisoformat(found["time"]) == recorded.event(place).at
    assert found["id"] == envelope_digest(recorded.envelopes[place])
    assert (found["resplitlife"], found["resplitnumber"]) == (recorded.link(place).life, "2")
    assert found["data"] == recorded.event(place).model_dump(mode="json", exclude_none=True)
    assert all(name.isascii() and name.isalnum() and name == name.lower() for name in found), "as the standard wants"
    assert tuple(envelopes([as_line(b"anything")])) == (b"anything",), "what is no envelope was there, too"


def test_an_export_that_shows_what_was_not_signed_is_refused(recorded: Recorded) -> None:
    line = as_line(recorded.envelopes[0])
    for wrong in (line.replace("a direct link", "an indirect link"), line[:-1], "[]", "", line.replace("id", "di", 1)):
        with pytest.raises(ResplitError, match="line 2 of the export") as raised:
            list(envelopes([line, wrong]))
        assert (raised.value.code, raised.value.field) == (ErrorCode.CORRUPT_FILE, "file")


def test_who_held_what_follows_from_the_words_of_nodes_and_leader() -> None:
    leader, chat = NodeId(ORCHESTRATOR), DeploymentName("chat")

    def told(second: int, source: NodeId, kind: AuditKind, epoch: int, life: str = "", **fields: str) -> AuditEvent:
        at = AT + timedelta(seconds=second)
        link = Link(life=LifeId(f"{source}-{life}"), number=1, previous=NOTHING_BEFORE) if life else None
        about = {"deployment": chat, "epoch": epoch, "fields": {**fields}, "chain": link}
        return AuditEvent(at=at, source=source, kind=kind, message="m").model_copy(update=about)

    model = "d" * 64
    trail = [
        told(2, N0, AuditKind.PLAN_READY, 1, "a", model=model, blocks="0-1,4-5"),
        told(3, N1, AuditKind.PLAN_READY, 1, "a", model=model, blocks="2-3"),
        told(4, N1, AuditKind.PLAN_RETIRED, 1, "a"),
        told(6, N1, AuditKind.PLAN_READY, 2, "a", model=model, blocks="0-5"),
        told(7, leader, AuditKind.PLAN_RETIRED, 1),
        told(8, N0, AuditKind.BLOCKS_FREED, 1, "a"),
        told(9, N1, AuditKind.PLAN_READY, 3, "b", model=model, blocks="0"),
    ]
    at2, at3, at6, at7, at8, at9 = (AT + timedelta(seconds=second) for second in (2, 3, 6, 7, 8, 9))
    assert holders(trail) == (
        Holding(N0, chat, 1, model, "0-1,4-5", at2, at8),  # its own word: it was still at it when the plan was over
        Holding(N1, chat, 1, model, "2-3", at3, at7),
        Holding(N1, chat, 2, model, "0-5", at6, at9),  # that process is gone
        Holding(N1, chat, 3, model, "0", at9, None),
    )
    bare = told(2, N0, AuditKind.PLAN_READY, 1)
    assert holders([bare]) == (Holding(N0, chat, 1, None, None, at2, None),), "what is not said is not guessed"


async def test_a_trail_that_said_nothing_ends_without_a_word(client: Client, tmp_path: Path) -> None:
    async with writer(client, tmp_path) as trail:
        assert isinstance(trail, AuditTrail)
    assert await envelopes_at(client) == []


async def test_checkpoints_that_were_kept_tell_what_a_former_key_adds_wherever_it_is_put(
    client: Client, tmp_path: Path
) -> None:
    """Who has the server's disk as well can put an event before anybody's word that the key is out."""
    root, thief = tmp_path / CLUSTER, load_identity(tmp_path / N0, N0)
    async with Writer(client, thief, tmp_path / "n0.audit") as n0:
        tell(n0, 3)
    revoke(root, N0, [load_holder(root / "root-0.key")], now=datetime.now(UTC))
    n1 = load_identity(tmp_path / N1, N1)
    await n1.take_roster((root / ROSTER).read_bytes())
    async with Writer(client, n1, tmp_path / "n1.audit") as trail:
        tell(trail, 1)
    data, trust = await envelopes_at(client), read_trust(root)
    verdict = verify(data, trust)
    assert verdict.is_sound and {kept.roster for kept in verdict.kept} == {n1.roster.version}
    assert verify(data, trust, verdict.kept).is_sound, "what it wrote then is as true with them"
    last = Reader(trust).read(data[3]).event
    assert last.chain is not None
    for link in (
        last.chain.model_copy(update={"number": 5, "previous": envelope_digest(data[3])}),
        Link(life=LifeId("n0-unseen"), number=1, previous=NOTHING_BEFORE),
    ):
        added = seal(last.model_copy(update={"chain": link, "checkpoint": None}), AUDIT_TYPE, N0, thief.key)
        assert faults(verify([*data[:4], added, *data[4:]], trust, verdict.kept).findings) == [(Flaw.LATE, 0)]
        assert faults(verify([*data, added], trust).findings) == [(Flaw.LATE, 0)], "behind it, without them as well"
