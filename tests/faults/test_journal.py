"""The journal under faults: what was accepted is owed by exactly one, and what was reported as stored is there."""

import asyncio
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio
from nats.aio.client import Client

import bus.journal
from bus.connection import connect
from bus.journal import Journal, SupersededError
from bus.sealed_requests import Seal
from bus.stopping import end
from bus.streams import ensure_streams
from bus.subject_log import SubjectLog
from bus.succession import Recovered, fence, lives, read_life, release
from schemas import subjects
from schemas.base import DeploymentName, LifeId, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.journal import AcceptedRequest, Handle, Likely, Run, SealedRun, Tokens, pack_record, unpack_records
from tests.conftest import NatsServer

pytestmark = pytest.mark.slow
CHAT = DeploymentName("chat")
A, B, C, D = (LifeId(f"n{i}-{i * 7:016x}") for i in range(4))
SOON_S = 20.0


def asked(name: str, data: bytes = b'{"prompt":"12+30="}', age_ms: int = 0) -> AcceptedRequest:
    return AcceptedRequest(
        RequestId(name), "0" * 64, data, "application/json", f"_INBOX.{name}", seed=7, max_tokens=100, age_ms=age_ms
    )


class Writing:
    """A journal that runs, and what it reported."""

    def __init__(self, client: Client, life: LifeId) -> None:
        self.client = client
        self.life = life
        self.stored: list[int] = []
        self._news = asyncio.Event()
        self.superseded: list[SupersededError] = []
        self.journal = Journal(client, CHAT, life, self.superseded.append, time.monotonic)
        self.running = asyncio.create_task(self.journal.run())

    def say(self, handle: Handle, index: int, token: int | None = None) -> None:
        """One round of one request."""
        run = Run(handle, index, (index if token is None else token,))
        self.journal.tokens([run], lambda: self.report(index))

    def report(self, index: int) -> None:
        """A round is stored."""
        self.stored.append(index)
        self._news.set()

    async def until_stored(self, count: int) -> None:
        async with asyncio.timeout(SOON_S):
            while len(self.stored) < count:
                self._news.clear()
                await self._news.wait()

    async def until_superseded(self) -> SupersededError:
        async with asyncio.timeout(SOON_S):
            await self.running
        (error,) = self.superseded
        return error

    async def messages(self) -> int:
        """How many the stream holds of this life."""
        found = {life.life: life.messages for life in await lives(self.client, CHAT)}
        return found.get(self.life, 0)


@asynccontextmanager
async def writing(client: Client, life: LifeId) -> AsyncIterator[Writing]:
    one = Writing(client, life)
    try:
        yield one
    finally:
        await end([one.running])


@pytest_asyncio.fixture
async def client(nats_url: str) -> AsyncIterator[Client]:
    """Connected to a server that has the streams."""
    client = await connect(nats_url, "journal-test")
    await ensure_streams(client)
    yield client
    await client.close()


def tokens_of(recovered: Recovered) -> dict[str, tuple[int, ...]]:
    return {str(one.request.request_id): one.tokens for one in recovered.requests}


# What is stored.


async def test_what_was_accepted_is_there_with_its_tokens_until_it_ends(client: Client) -> None:
    async with writing(client, A) as a:
        first = await a.journal.accept(asked("r1"))
        second = await a.journal.accept(asked("r2"))
        likely: tuple[Likely, ...] = ((-0.25, ((5, -0.25), (9, -1.5))),)
        a.journal.tokens([Run(first, 0, (5,), likely), Run(second, 0, (6,))], lambda: a.report(0))
        a.journal.tokens([Run(first, 1, (8,), likely)], lambda: a.report(1))
        await a.until_stored(2)
        one, two = (await read_life(client, CHAT, A)).requests
        assert (one.tokens, one.likely) == ((5, 8), likely * 2)
        assert (two.tokens, two.likely) == ((6,), ())
        assert (one.aged(one.stated_at_s).request, two.handle) == (asked("r1", age_ms=one.request.age_ms), second)
        a.journal.end([first], "output")
        await a.journal.drain(SOON_S)
        assert tokens_of(await read_life(client, CHAT, A)) == {"r2": (6,)}


async def test_the_tokens_of_a_sealed_request_go_sealed_from_life_to_life(client: Client) -> None:
    seal = Seal(bytes(32), CHAT, RequestId("r"))
    tokens = (70_001, 70_002, 70_003, 70_004)
    async with writing(client, A) as a, writing(client, B) as b:
        handle = await a.journal.accept(asked("r"), seal=seal)
        for index, token in enumerate(tokens[:2]):
            a.say(handle, index, token)
        await a.until_stored(2)
        once = seal.open_tokens((await fence(client, CHAT, A, B)).requests[0])
        assert once.tokens == tokens[:2]
        handle = await b.journal.accept(once.request, once.tokens, once.likely, seal)
        for index, token in enumerate(tokens[2:], 2):
            b.say(handle, index, token)
        await b.until_stored(2)
        for life in (A, B):
            lines = await SubjectLog(client, subjects.STREAM_JOURNAL, subjects.journal(CHAT, life)).read(1 << 62)
            runs = [run for line in lines for r in unpack_records(line.data) if isinstance(r, Tokens) for run in r.runs]
            assert runs
            assert all(isinstance(run, SealedRun) for run in runs)
        twice = (await fence(client, CHAT, B, C)).requests[0]
        assert (twice.tokens, seal.open_tokens(twice).tokens) == ((), tokens)


async def test_rounds_are_reported_in_order_and_only_once_stored(client: Client) -> None:
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        for index in range(300):
            a.say(handle, index)
            if index % 7 == 0:
                await asyncio.sleep(0)
        await a.until_stored(300)
        assert a.stored == list(range(300))
        assert await a.messages() < 100, "what waits is stored together"
        assert tokens_of(await read_life(client, CHAT, A)) == {"r": tuple(range(300))}


async def test_an_idle_journal_is_empty_and_goes_on_from_there(client: Client) -> None:
    async with writing(client, A) as a:
        for name in ("r1", "r2"):
            handle = await a.journal.accept(asked(name))
            a.say(handle, 0)
            a.journal.end([handle], "output")
            await a.journal.drain(SOON_S)
            assert await lives(client, CHAT) == ()
            assert (await read_life(client, CHAT, A)).requests == ()
        assert not a.superseded


async def test_a_life_nobody_heard_of_owes_nothing(client: Client) -> None:
    assert await read_life(client, CHAT, A) == Recovered(CHAT, A, (), None, 0)


async def test_a_request_ages_from_life_to_life(client: Client) -> None:
    async with writing(client, A) as a, writing(client, B) as b:
        await a.journal.accept(asked("r", age_ms=5000))
        await asyncio.sleep(0.3)
        (once,) = (await fence(client, CHAT, A, B)).requests
        assert once.request.age_ms >= 5300
        await b.journal.accept(once.request, once.tokens)
        await asyncio.sleep(0.3)
        (twice,) = (await fence(client, CHAT, B, C)).requests
        assert twice.request.age_ms >= once.request.age_ms + 300


async def test_ten_thousand_rounds_are_recovered_from_a_short_journal(client: Client) -> None:
    rounds = 10_000
    async with writing(client, A) as a:
        handles = [await a.journal.accept(asked(f"r{i}")) for i in range(2)]
        for index in range(0, rounds, 2):
            for half in (index, index + 1):
                runs = [Run(handle, half, (half * 31 + handle,)) for handle in handles]
                a.journal.tokens(runs, lambda i=half: a.report(i))  # type: ignore[misc]
            await a.until_stored(half + 1)
        assert await a.messages() < 600, "5000 were written"
        recovered = await fence(client, CHAT, A, B)
    assert [one.tokens for one in recovered.requests] == [
        tuple(index * 31 + handle for index in range(rounds)) for handle in handles
    ]


# Servers that die, hang and forget.


async def test_a_server_killed_between_appends_loses_nothing_that_was_reported_and_doubles_nothing(
    nats_server: NatsServer, client: Client
) -> None:
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        for index in range(600):
            a.say(handle, index)
            await asyncio.sleep(0.002)
            if index in (150, 400):
                nats_server.kill()
                await asyncio.sleep(0.2)
                nats_server.start()
        await a.until_stored(600)
        assert a.stored == list(range(600))
        assert tokens_of(await read_life(client, CHAT, A)) == {"r": tuple(range(600))}
        assert not a.superseded


async def test_an_append_whose_acknowledgement_was_lost_is_stored_once(
    nats_server: NatsServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server hangs for longer than an append is waited for: it then finds the append and its repetitions."""
    monkeypatch.setattr(bus.journal, "ACK_S", 0.2)
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        nats_server.pause()
        for index in range(10):
            a.say(handle, index)
        await asyncio.sleep(1.2)
        assert a.stored == []
        assert a.journal.waits_s > 1
        nats_server.resume()
        await a.until_stored(10)
        assert a.journal.waits_s == 0
        for index in range(10, 20):
            a.say(handle, index)
        await a.until_stored(20)
        lines = await SubjectLog(client, subjects.STREAM_JOURNAL, subjects.journal(CHAT, A)).read(1 << 62)
        assert len({line.data for line in lines}) == len(lines)
        assert tokens_of(await read_life(client, CHAT, A)) == {"r": tuple(range(20))}
        assert not a.superseded


async def test_an_append_that_was_stored_before_the_fence_is_reported_and_nothing_after_it(
    nats_server: NatsServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer hears of neither; it finds its own message first, which the successor has read, then the fence."""
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        newest = await client.jetstream().get_last_msg(subjects.STREAM_JOURNAL, subjects.journal(CHAT, A))
        stolen = pack_record(Tokens((Run(handle, 0, (0,)),)))
        headers = {"Nats-Expected-Last-Subject-Sequence": str(newest.seq)}
        await client.jetstream().publish(subjects.journal(CHAT, A), stolen, headers=headers)
        recovered = await fence(client, CHAT, A, B)
        a.say(handle, 0)
        await asyncio.sleep(0)
        a.say(handle, 1)
        assert (await a.until_superseded()).by == B
        assert a.stored == [0]
        assert tokens_of(recovered) == {"r": (0,)}


async def test_a_server_that_lost_what_it_had_acknowledged_is_told_again(client: Client) -> None:
    js = client.jetstream()
    async with writing(client, A) as a:
        first = await a.journal.accept(asked("r1"))
        a.say(first, 0)
        await a.until_stored(1)
        second = await a.journal.accept(asked("r2"))
        a.say(second, 0)
        a.say(first, 1)
        await a.until_stored(3)
        for _ in range(2):  # as after a power failure before the disk had it
            newest = await js.get_last_msg(subjects.STREAM_JOURNAL, subjects.journal(CHAT, A))
            assert newest.seq is not None
            await js.delete_msg(subjects.STREAM_JOURNAL, newest.seq)
        a.say(second, 1)
        await a.until_stored(4)
        assert tokens_of(await read_life(client, CHAT, A)) == {"r1": (0, 1), "r2": (0, 1)}
        assert not a.superseded


async def test_a_journal_of_which_not_even_a_fence_is_left_belongs_to_nobody(client: Client) -> None:
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        await client.jetstream().purge_stream(subjects.STREAM_JOURNAL, subject=subjects.journal(CHAT, A))
        a.say(handle, 0)
        assert (await a.until_superseded()).by is None
        assert a.stored == []


async def test_no_request_is_accepted_while_nothing_can_be_stored(
    nats_server: NatsServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus.journal, "ACCEPT_S", 0.3)
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r1"))
        nats_server.kill()
        with pytest.raises(ResplitError, match="did not store the request") as refused:
            await a.journal.accept(asked("r2"))
        assert refused.value.code is ErrorCode.UNREACHABLE
        a.say(handle, 0)
        nats_server.start()
        await a.until_stored(1)
        await a.journal.drain(SOON_S)
        assert tokens_of(await read_life(client, CHAT, A)) == {"r1": (0,)}, "the client was told that r2 is not taken"


async def test_what_waits_for_a_server_is_bounded(
    nats_server: NatsServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bus.journal, "WAITING_BYTES_MAX", 1000)
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        nats_server.kill()
        said = 0
        with pytest.raises(ResplitError, match="bytes wait for JetStream") as refused:
            while said < 1000:
                a.say(handle, said)
                said += 1
        assert refused.value.code is ErrorCode.UNREACHABLE
        nats_server.start()
        await a.until_stored(said)
        assert tokens_of(await read_life(client, CHAT, A)) == {"r": tuple(range(said))}


# Limits.


async def test_a_full_journal_refuses_new_requests_and_keeps_those_it_has(client: Client) -> None:
    js = client.jetstream()
    config = (await js.stream_info(subjects.STREAM_JOURNAL)).config
    await js.update_stream(config.evolve(max_bytes=200_000))
    async with writing(client, A) as a, writing(client, B) as b:
        held = await b.journal.accept(asked("other", b"x" * 150_000))
        handle = await a.journal.accept(asked("r1"))
        for _ in range(2):
            with pytest.raises(ResplitError, match="the journal of requests takes no more") as refused:
                await a.journal.accept(asked("r2", b"x" * 100_000))
            assert refused.value.code is ErrorCode.OVERLOADED
        a.say(handle, 0)
        await a.until_stored(1)
        b.journal.end([held], "output")
        await b.journal.drain(SOON_S)
        await a.journal.accept(asked("r3", b"x" * 100_000))
        assert tokens_of(await read_life(client, CHAT, A)) == {"r1": (0,), "r3": ()}


async def test_a_round_that_finds_no_room_is_stored_once_there_is_some(client: Client) -> None:
    js = client.jetstream()
    config = (await js.stream_info(subjects.STREAM_JOURNAL)).config
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        await js.update_stream(config.evolve(max_msgs_per_subject=1))
        a.say(handle, 0)
        await asyncio.sleep(0.5)
        with pytest.raises(ResplitError, match="takes no more"):
            await a.journal.accept(asked("r2"))
        assert a.stored == []
        await js.update_stream(config)
        await a.until_stored(1)
        await a.journal.drain(SOON_S)
        assert tokens_of(await read_life(client, CHAT, A)) == {"r": (0,)}


async def test_a_request_that_could_not_be_read_again_is_not_taken(client: Client) -> None:
    async with writing(client, A) as a:
        for request, code in (
            (asked("r", b"x" * (1 << 20)), ErrorCode.PAYLOAD_TOO_LARGE),
            (AcceptedRequest(RequestId("r"), "m", b"", "x" * 1000, ""), ErrorCode.INVALID_REQUEST),
            (AcceptedRequest(RequestId("r"), "m", b"", "text/\udce9", ""), ErrorCode.INVALID_REQUEST),
        ):
            with pytest.raises(ResplitError) as refused:
                await a.journal.accept(request)
            assert refused.value.code is code
        assert await lives(client, CHAT) == ()


# Strangers.


async def test_what_cannot_be_read_is_rejected_by_name_and_the_others_survive(client: Client) -> None:
    js = client.jetstream()
    async with writing(client, A) as a:
        first = await a.journal.accept(asked("r1"))
        a.say(first, 0)
        await a.until_stored(1)
        for rubbish in (b"", b"\xc1", b"\x93\xa1a\x01", pack_record(Tokens(()))[:-1]):
            await js.publish(subjects.journal(CHAT, A), rubbish)
        second = await a.journal.accept(asked("r2"))
        a.say(second, 0)
        a.say(first, 1)
        await a.until_stored(3)
        recovered = await fence(client, CHAT, A, B)
        assert tokens_of(recovered) == {"r1": (0, 1), "r2": (0,)}
        assert [sentence.split(":")[1] for sentence in recovered.rejected] == [" a malformed journal message"] * 4


# Successors.


async def test_a_fenced_life_says_nothing_more_and_takes_nothing_more(client: Client) -> None:
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r1"))
        a.say(handle, 0)
        await a.until_stored(1)
        recovered = await fence(client, CHAT, A, B)
        told: list[str] = []
        a.say(handle, 1)
        a.journal.confirm(lambda: told.append("the deadline passed"))
        with pytest.raises(SupersededError, match=f"{B} took over from ingress {A}") as refused:
            await a.journal.accept(asked("r2"))
        assert (refused.value.code, refused.value.by) == (ErrorCode.NODE_LOST, B)
        assert (await a.until_superseded()).by == B
        a.say(handle, 2)
        a.journal.confirm(lambda: told.append("the deadline passed"))
        a.journal.end([handle], "output")
        with pytest.raises(SupersededError):
            await a.journal.accept(asked("r3"))
        assert (a.stored, told) == ([0], [])
        assert tokens_of(recovered) == tokens_of(await read_life(client, CHAT, A)) == {"r1": (0,)}


async def test_a_confirmation_comes_after_the_rounds_before_it(client: Client) -> None:
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        a.say(handle, 0)
        a.journal.confirm(lambda: a.report(-1))
        a.say(handle, 1)
        await a.until_stored(3)
        assert a.stored == [0, -1, 1]


async def test_a_fence_outlives_what_a_stopped_ingress_still_removes(client: Client) -> None:
    """It had nothing live and was about to empty its journal when it was stopped."""
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))
        a.journal.end([handle], "output")
        await fence(client, CHAT, A, B)
        await a.journal.drain(SOON_S)
        assert [(life.life, life.messages, life.fenced_by) for life in await lives(client, CHAT)] == [(A, 1, B)]
        with pytest.raises(SupersededError):
            await a.journal.accept(asked("r2"))


async def test_a_life_without_a_message_can_be_fenced(client: Client) -> None:
    assert (await fence(client, CHAT, A, B)).requests == ()
    async with writing(client, A) as a:
        with pytest.raises(SupersededError):
            await a.journal.accept(asked("r"))


async def test_of_successors_that_race_against_each_other_and_the_writer_one_wins(client: Client) -> None:
    async with writing(client, A) as a:
        handle = await a.journal.accept(asked("r"))

        async def go_on() -> None:
            index = 0
            while not a.superseded:
                a.say(handle, index)
                index += 1
                await asyncio.sleep(0)

        writer = asyncio.create_task(go_on())
        await a.until_stored(20)
        ended = await asyncio.gather(*(fence(client, CHAT, A, by) for by in (B, C, D)), return_exceptions=True)
        await writer
        (winner,) = [one for one in ended if isinstance(one, Recovered)]
        assert {one.by for one in ended if isinstance(one, SupersededError)} == {winner.fenced_by}
        assert a.superseded[0].by == winner.fenced_by
        assert len([one for one in ended if isinstance(one, SupersededError)]) == 2
        # A statement may hold tokens whose own round was not stored yet: the successor then knows more than was said.
        known = winner.requests[0].tokens
        assert known == tuple(range(len(known)))
        assert a.stored == list(range(len(a.stored)))
        assert len(a.stored) <= len(known)


async def test_a_successor_that_asks_twice_hears_the_same(client: Client) -> None:
    async with writing(client, A) as a:
        await a.journal.accept(asked("r"))
        assert await fence(client, CHAT, A, B) == await fence(client, CHAT, A, B)


async def test_the_successor_of_a_dead_successor_finds_all_that_is_owed(client: Client) -> None:
    async with writing(client, A) as a, writing(client, B) as b:
        for name in ("r1", "r2"):
            await a.journal.accept(asked(name))
        taken = await fence(client, CHAT, A, B)
        await b.journal.accept(taken.requests[0].request)  # and here it dies
        from_b = await fence(client, CHAT, B, C)
        with pytest.raises(SupersededError) as refused:
            await fence(client, CHAT, A, C)
        assert refused.value.by == B
        from_a = await fence(client, CHAT, A, C, over=B)
        assert (tokens_of(from_b), tokens_of(from_a)) == ({"r1": ()}, {"r1": (), "r2": ()})
        with pytest.raises(SupersededError) as late:
            await fence(client, CHAT, A, D, over=B)
        assert late.value.by == C


async def test_what_was_taken_over_leaves_only_its_fence(client: Client) -> None:
    async with writing(client, A) as a, writing(client, B) as b:
        handle = await a.journal.accept(asked("r"))
        for index in range(5):
            a.say(handle, index)
        await a.until_stored(5)
        taken = await fence(client, CHAT, A, B)
        for one in taken.requests:
            again = await b.journal.accept(one.request, one.tokens, one.likely)
            b.say(again, 5)
        await b.until_stored(1)
        for _ in range(2):
            await release(client, taken)
        assert [(life.life, life.messages, life.fenced_by) for life in await lives(client, CHAT)] == [
            (A, 1, B),
            (B, 2, None),
        ]
        assert tokens_of(await read_life(client, CHAT, B)) == {"r": tuple(range(6))}


async def test_a_process_that_was_stopped_and_resumed_says_nothing_after_its_successor_took_over(
    nats_url: str, client: Client
) -> None:
    command = [sys.executable, "-m", "tests.faults.journal_writer", nats_url, CHAT, A]
    process = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    try:
        async with asyncio.timeout(SOON_S):
            said = [(await process.stdout.readline()).decode().strip() for _ in range(100)]
            process.send_signal(signal.SIGSTOP)
            recovered = await fence(client, CHAT, A, B)
            await asyncio.sleep(0.5)
            process.send_signal(signal.SIGCONT)
            said += (await process.stdout.read()).decode().split()
            assert await process.wait() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    (request,) = recovered.requests
    assert request.tokens == tuple(7 * i for i in range(len(request.tokens)))
    assert said == [*(str(i) for i in range(len(said) - 1)), "superseded"]
    assert len(said) - 1 <= len(request.tokens), "every token it ever said is one that the successor knows"
