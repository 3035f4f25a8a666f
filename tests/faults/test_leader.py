"""Leaders that are killed at every step, or hang and come back: agents serve, and the successor completes or aborts."""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import nats
import pytest
import pytest_asyncio
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

import resplit.demo
from benchmarks.faults.owned import OwnedCluster
from bus.connection import settle
from bus.identity import ORCHESTRATOR, Identity, load_identity
from models.reference import Reference
from models.store import Store
from models.text import Text
from resplit import control
from resplit.client import Client
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.control import DeploymentStatus, DeployRequest, StatusReply
from schemas.deployment import Settings, Stage
from schemas.envelope import AUDIT_TYPE, LEADER_TYPE, RECEIPT_TYPE, open_envelope
from schemas.errors import ErrorCode, ResplitError
from schemas.leader import Leadership
from schemas.plan import PlanEvent, PlanPhase, Receipt, ReceiptStatus
from tests.sealed_events import whole

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

ADDER = DeploymentName("adder")
N0, N1 = NodeId("n0"), NodeId("n1")
SETTINGS = Settings(context_tokens=64, max_sequences=8, chunk_tokens=8)
PROMPTS = ("12+30=", "348+1275=", "9+9=", "77777+5=")
PLACEMENTS = (
    (Stage(node=N0, first=0, last=4), Stage(node=N1, first=5, last=9)),
    (Stage(node=N1, first=0, last=2), Stage(node=N0, first=3, last=9)),
)
STEP_S = 60.0
ASKERS = 3

Word = PlanEvent | Leadership | Receipt | AuditEvent


@dataclass
class Ear:
    """Hears the control plane from the moment it was made, in order; each word with what its subject promises."""

    identity: Identity
    heard: list[Word] = field(default_factory=list)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    async def listen(self, connection: Nats) -> None:
        for subject in (subjects.ALL_PLANS, subjects.LEADER, subjects.ALL_RECEIPTS, subjects.ALL_AUDIT):
            await connection.subscribe(subject, cb=self._note)
        await settle(connection)

    async def _note(self, message: Msg) -> None:
        self.heard.append(self._read(message.subject, message.data))
        self._more.set()

    def _read(self, subject: str, data: bytes) -> Word:
        if subject == subjects.LEADER:
            return open_envelope(data, Leadership, LEADER_TYPE, self.identity.orchestrators)[0]
        match subject.split(".")[2]:
            case "plan":
                return whole(data, self.identity)
            case "receipt":
                return open_envelope(data, Receipt, RECEIPT_TYPE, self.identity.agents)[0]
            case _:
                return open_envelope(data, AuditEvent, AUDIT_TYPE, self.identity.writers)[0]

    async def until(self, true: Callable[[Sequence[Word]], bool], since: int) -> None:
        """Wait until what was heard from position `since` on is as wanted."""
        async with asyncio.timeout(STEP_S):
            while not true(self.heard[since:]):
                self._more.clear()
                await self._more.wait()

    async def event(self, phase: PlanPhase, since: int) -> None:
        await self.until(lambda words: any(isinstance(w, PlanEvent) and w.phase is phase for w in words), since)

    async def receipts(self, status: ReceiptStatus, nodes: set[NodeId], since: int) -> None:
        await self.until(
            lambda words: nodes <= {w.node for w in words if isinstance(w, Receipt) and w.status is status}, since
        )

    async def successor(self, since: int) -> None:
        await self.until(lambda words: any(isinstance(word, Leadership) for word in words), since)


@dataclass
class Flow:
    """Requests that never cease, each of whose answers is the unsplit model's."""

    client: Client
    expected: dict[str, tuple[int, ...]]
    answers: int = 0

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Ask while the block runs; raises what any request ended in but its right output."""
        async with asyncio.TaskGroup() as group:
            asking = True

            async def ask(first: int) -> None:
                turn = first
                while asking:
                    prompt = PROMPTS[turn % len(PROMPTS)]
                    answer = await self.client.complete(ADDER, prompt, max_tokens=20)
                    assert answer.token_ids == self.expected[prompt]
                    self.answers += 1
                    turn += 1

            for first in range(ASKERS):
                group.create_task(ask(first))
            try:
                yield
            finally:
                asking = False

    async def more(self, count: int = ASKERS * 2) -> None:
        """Wait until so many further requests were answered."""
        wanted = self.answers + count
        async with asyncio.timeout(STEP_S):
            while self.answers < wanted:  # noqa: ASYNC110 (a counter)
                await asyncio.sleep(0.01)


@dataclass
class Led:
    """A cluster with two orchestrators that serves the adder."""

    cluster: OwnedCluster
    ear: Ear
    flow: Flow
    connection: Nats

    async def seen(self, true: Callable[[StatusReply, DeploymentStatus], bool]) -> tuple[StatusReply, DeploymentStatus]:
        """Wait for a status as wanted; between two leaders there is none."""
        async with asyncio.timeout(STEP_S):
            while True:
                try:
                    status = await control.status(self.cluster.operator)
                except ResplitError as error:
                    assert error.code is ErrorCode.UNREACHABLE
                else:
                    for found in status.deployments:
                        if true(status, found):
                            return status, found
                await asyncio.sleep(0.05)

    async def settled(self, placement: tuple[Stage, ...]) -> tuple[StatusReply, DeploymentStatus]:
        """Wait until the wish is fulfilled, everywhere, and nothing is under way any more."""
        return await self.seen(
            lambda _, found: (
                found.state == "serving"
                and found.current is not None
                and found.current.routes[0].stages == placement
                and set(found.applied) == set(found.current.nodes)
            )
        )

    async def whole(self) -> str:
        """Wait until one leads and the other stands by; who leads."""
        status, _ = await self.seen(lambda status, _: status.leader is not None and len(status.standbys) == 1)
        assert status.leader is not None
        assert {status.leader.leader, *status.standbys} == set(self.cluster.orchestrators)
        return status.leader.leader

    async def wish(self, placement: tuple[Stage, ...]) -> None:
        request = DeployRequest(name=ADDER, model="adder", placement=placement, settings=SETTINGS)
        await control.deploy(self.cluster.operator, request)

    async def other_placement(self) -> tuple[Stage, ...]:
        _, found = await self.seen(lambda _, found: found.current is not None)
        assert found.current is not None
        return next(p for p in PLACEMENTS if p != found.current.routes[0].stages)

    async def log(self) -> list[PlanEvent | Leadership]:
        """What the log of plans holds, in order."""
        js = self.connection.jetstream()
        found = []
        state = (await js.stream_info(subjects.STREAM_PLANS)).state
        for sequence in range(state.first_seq, state.last_seq + 1):
            with suppress(nats.js.errors.NotFoundError):  # the oldest make room
                message = await js.get_msg(subjects.STREAM_PLANS, sequence)
                if message.subject == subjects.ROSTER:
                    continue
                word = self.ear._read(message.subject or "", message.data or b"")
                assert isinstance(word, PlanEvent | Leadership)
                found.append(word)
        return found


def reference(store: Store) -> dict[str, tuple[int, ...]]:
    """What the unsplit model answers, which is right."""
    whole = Reference(store, "adder")
    spec = whole.manifest.text
    assert spec is not None
    text = Text(spec, store.path(spec.tokenizer.digest))
    found = {}
    for prompt in PROMPTS:
        ids = whole.generate(list(text.encode(prompt)), 20, SETTINGS.chunk_tokens, SETTINGS.context_tokens)
        total = str(sum(map(int, prompt.rstrip("=").split("+"))))
        assert text.decode(ids).startswith(f"{total[::-1]}|{total}")
        found[prompt] = tuple(ids)
    return found


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def led(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Led]:
    try:
        shipped = resplit.demo.shipped_store()
    except ResplitError:
        pytest.skip("this checkout has no trained adder")
    folder = tmp_path_factory.mktemp("led")
    store = Store(Path(shutil.copytree(shipped, folder / "store")))
    expected = reference(store)
    async with (
        OwnedCluster(folder / "cluster", store.root, agents=2, threads=1, orchestrators=2) as cluster,
        Client(cluster.url, keys=cluster.client_keys) as client,
    ):
        connection = await cluster.owner("CONTROL")
        ear = Ear(load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR))
        await ear.listen(connection)
        request = DeployRequest(name=ADDER, model="adder", placement=PLACEMENTS[0], settings=SETTINGS)
        await control.deploy_and_wait(cluster.operator, request, STEP_S)
        yield Led(cluster, ear, Flow(client, expected), connection)
        await connection.close()


async def prepare_logged(led: Led, leader: str, since: int) -> None:
    await led.ear.event(PlanPhase.PREPARE, since)


async def all_ready(led: Led, leader: str, since: int) -> None:
    # It sleeps from PREPARE on, or it would have committed before anybody could kill it.
    await led.ear.event(PlanPhase.PREPARE, since)
    await led.cluster.pause(leader)
    await led.ear.receipts(ReceiptStatus.READY, {N0, N1}, since)


async def commit_logged(led: Led, leader: str, since: int) -> None:
    await led.ear.event(PlanPhase.COMMIT, since)


async def drained(led: Led, leader: str, since: int) -> None:
    await led.ear.event(PlanPhase.COMMIT, since)
    await led.cluster.pause(leader)
    await led.ear.until(
        lambda words: any(isinstance(w, Receipt) and w.status is ReceiptStatus.DRAINED for w in words), since
    )


async def retire_logged(led: Led, leader: str, since: int) -> None:
    await led.ear.event(PlanPhase.RETIRE, since)


@pytest.mark.parametrize(
    ("reach", "committed"),
    [(prepare_logged, False), (all_ready, False), (commit_logged, True), (drained, True), (retire_logged, True)],
)
async def test_a_leader_killed_at_any_step_has_a_successor_that_completes_or_aborts(
    led: Led, reach: Callable[[Led, str, int], Awaitable[None]], committed: bool
) -> None:
    leader = await led.whole()
    placement = await led.other_placement()
    before, _ = await led.seen(lambda *_: True)
    since = len(led.ear.heard)
    async with led.flow.running():
        await led.flow.more()
        asked = asyncio.create_task(led.wish(placement))
        await reach(led, leader, since)
        killed_at = len(led.ear.heard)
        await led.cluster.kill(leader)
        await asked  # it was answered before the first plan event
        await led.flow.more()  # agents serve on without a leader
        await led.ear.successor(killed_at)
        after, found = await led.settled(placement)
        await led.flow.more()
    assert after.leader is not None
    assert after.leader.leader != leader
    assert after.term == before.term + 1
    words = [word for word in await led.log() if word.term >= before.term]
    tried = next(word.candidate for word in led.ear.heard[since:] if isinstance(word, PlanEvent) and word.candidate)
    assert found.current is not None
    if committed:
        assert found.current == tried, "what was committed is completed"
    else:
        assert found.current.epoch > tried.epoch, "what was not is given up, and done anew"
        first = next(word for word in words if isinstance(word, PlanEvent) and word.term == after.term)
        assert (first.phase, first.candidate) == (PlanPhase.ABORT, None)
    assert_one_leader_at_a_time(await led.log())
    await led.cluster.start(leader)


async def test_a_leader_that_hangs_past_its_lease_is_refused_by_its_term_and_stands_by(led: Led) -> None:
    leader = await led.whole()
    placement = await led.other_placement()
    since = len(led.ear.heard)
    async with led.flow.running():
        await led.wish(placement)
        await led.ear.event(PlanPhase.PREPARE, since)
        await led.cluster.pause(leader)  # about to commit
        paused_at = len(led.ear.heard)
        await led.ear.successor(paused_at)
        after, _ = await led.settled(placement)
        assert after.leader is not None
        assert after.leader.leader != leader
        await led.cluster.resume(leader)
        await led.ear.until(
            lambda words: any(
                isinstance(word, AuditEvent)
                and word.kind is AuditKind.LEADER_DEPOSED
                and word.fields["leader"] == leader
                for word in words
            ),
            paused_at,
        )
        status, _ = await led.seen(lambda status, _: leader in status.standbys)
        assert status.leader == after.leader
        await led.flow.more()
    assert leader in led.cluster.processes, "it was not ended, only deposed"
    assert_one_leader_at_a_time(await led.log())


async def test_a_leader_that_is_told_to_stop_hands_over(led: Led) -> None:
    leader = await led.whole()
    since = len(led.ear.heard)
    async with led.flow.running():
        await led.cluster.stop(leader)
        await led.ear.successor(since)
        status, _ = await led.seen(lambda status, _: status.leader is not None and status.leader.leader != leader)
        await led.flow.more()
    told = [word.fields["reason"] for word in led.ear.heard[since:] if _is(word, AuditKind.LEADER_DEPOSED)]  # type: ignore[union-attr]
    assert told == ["it was told to stop"]
    assert status.standbys == ()
    await led.cluster.start(leader)


def _is(word: Word, kind: AuditKind) -> bool:
    return isinstance(word, AuditEvent) and word.kind is kind


def assert_one_leader_at_a_time(log: Sequence[PlanEvent | Leadership]) -> None:
    """Terms only grow, each has one leader, and of each epoch one plan at most was ever in force."""
    assert [word.term for word in log] == sorted(word.term for word in log)
    terms = [word.term for word in log if isinstance(word, Leadership)]
    assert len(set(terms)) == len(terms)
    in_force: dict[int, str] = {}
    for word in log:
        if isinstance(word, PlanEvent) and word.current is not None:
            assert in_force.setdefault(word.current.epoch, word.current.digest) == word.current.digest
