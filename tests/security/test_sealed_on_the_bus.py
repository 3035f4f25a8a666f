"""What a capture of the bus and JetStream's files hold of a request: everything of a plain one, nothing of a sealed."""

import asyncio
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import msgpack
import pytest
import pytest_asyncio
from nats.aio.msg import Msg

from bus.connection import settle
from models.store import Store
from resplit.client import Client
from resplit.sealing import Sealer
from schemas.journal import Run, Tokens, pack_record
from tests.integration.cluster_fixtures import (
    CHAT,
    EMBED,
    N0,
    N1,
    N2,
    SETTINGS,
    Oracle,
    Serving,
    cached_store,
    serving,
    three_stages,
)

pytestmark = [pytest.mark.asyncio(loop_scope="session"), pytest.mark.slow]

PROMPT = "the oracle of Delphi keeps a secret about the quick brown fox"
TEXT = "no vector of this is for the bus"
REFUSED = "what was asked too hotly"
COUNT = 200
SETTLED_S = 60.0
"""Behind all that a capture of everything has to read first."""
HANDLES = range(1, 40)
"""More than requests are accepted here."""
SEALED_AND_NOT = pytest.mark.parametrize("sealed", [True, False])
"""The plain request shows that what is looked for would be found. It comes second: JetStream takes its time with the
files of what was removed."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def running(tmp_path_factory: pytest.TempPathFactory, pytestconfig: pytest.Config) -> AsyncIterator[Serving]:
    store: Store = cached_store(pytestconfig)
    async with serving(tmp_path_factory.mktemp("capture") / "cluster", store, Oracle(store)) as found:
        await found.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        await found.deploy(EMBED, "embedder", stages=2)
        yield found


@dataclass
class Capture:
    """Every message on the bus, and JetStream's files as they were again and again meanwhile."""

    messages: list[Msg] = field(default_factory=list)
    files: dict[Path, list[bytes]] = field(default_factory=lambda: defaultdict(list))
    """What each held; a copy that another one begins with is not kept beside it."""

    async def note(self, message: Msg) -> None:
        self.messages.append(message)

    def copy_files(self, folder: Path) -> None:
        for path in folder.rglob("*"):
            try:
                data = path.read_bytes()
            except OSError:  # a folder, or a file that JetStream removed just now
                continue
            copies = self.files[path]
            if copies and data.startswith(copies[-1]):
                copies.pop()
            copies.append(data)

    def holds(self, secrets: Iterable[bytes]) -> tuple[bool, bool]:
        """Whether any of these byte strings is on the bus, and whether any is on the disk."""
        secrets = tuple(secrets)
        said = [data for message in self.messages for data in (message.data, repr(message.headers).encode())]
        return _in(said, secrets), _in(chain.from_iterable(self.files.values()), secrets)

    @property
    def spoken(self) -> list[Any]:
        """What is on the bus that anybody can read, as plain values."""
        return [plain for message in self.messages if isinstance(plain := _plain(message.data), dict)]


def _in(found: Iterable[bytes], secrets: tuple[bytes, ...]) -> bool:
    return any(secret in data for data in found for secret in secrets)


def _plain(data: bytes) -> Any:
    for read in (json.loads, msgpack.unpackb):
        try:
            return read(data)
        except Exception:  # it is something else
            continue
    return None


async def captured(running: Serving, ask: Callable[[], Coroutine[Any, Any, Any]]) -> tuple[Capture, Any]:
    """Everything that is to be seen while `ask` runs, and what it returns."""
    capture = Capture()
    folder = running.cluster.folder / "nats"
    owners = (running.control, running.edge)
    subscriptions = [await owner.subscribe(">", cb=capture.note) for owner in owners]
    for owner in owners:
        await settle(owner, SETTLED_S)
    asking = asyncio.create_task(ask())
    while not asking.done():
        await asyncio.to_thread(capture.copy_files, folder)
        await asyncio.sleep(0.05)
    await asyncio.to_thread(capture.copy_files, folder)
    for owner, subscription in zip(owners, subscriptions, strict=True):
        await settle(owner, SETTLED_S)
        await subscription.unsubscribe()
    return capture, asking.result()


def ids_as_bytes(ids: tuple[int, ...]) -> list[bytes]:
    """Token ids in a row, as requests and replies spell them in JSON and msgpack."""
    spellings = (json.dumps(ids), json.dumps(ids, separators=(",", ":")))
    return [msgpack.packb(ids), *(spelling.encode() for spelling in spellings)]


def rounds_as_bytes(ids: tuple[int, ...]) -> list[bytes]:
    """The journal's record of each single token, whichever number its request had."""
    return [pack_record(Tokens((Run(handle, i, (t,)),))) for handle in HANDLES for i, t in enumerate(ids)]


def client_of(running: Serving, *, sealed: bool) -> Client:
    keys = running.cluster.client_keys
    return Client(running.cluster.url, keys=keys, sealer=Sealer(keys) if sealed else None)


@SEALED_AND_NOT
async def test_a_stream_leaves_neither_prompt_nor_token_on_the_bus_or_its_disk(
    running: Serving, *, sealed: bool
) -> None:
    async def ask() -> Any:
        async with client_of(running, sealed=sealed) as client:
            return await client.complete(CHAT, PROMPT, max_tokens=COUNT, ignore_eos=True)

    capture, answer = await captured(running, ask)
    assert answer.token_ids == running.oracle.tokens(PROMPT, COUNT)
    plain = not sealed
    assert len(capture.messages) > COUNT, "the capture heard the replies"
    assert capture.holds([PROMPT.encode()]) == (plain, plain)
    assert capture.holds(rounds_as_bytes(answer.token_ids)) == (plain, plain)
    said = "".join(reply["text"] for reply in capture.spoken if "token_id" in reply)
    assert said == (answer.text if plain else "")


@SEALED_AND_NOT
async def test_token_ids_given_and_answered_in_one_piece_are_not_to_be_found_either(
    running: Serving, *, sealed: bool
) -> None:
    """The ids of the prompt lie in the journal while the answer is computed; those of the answer are on the bus."""
    prompt = tuple(range(11, 75))
    seal = Sealer(running.cluster.client_keys)

    async def ask() -> Any:
        request = {"request_id": f"whole-{sealed}", "token_ids": prompt, "max_tokens": COUNT, "ignore_eos": True}
        data, headers = json.dumps(request).encode(), {"Content-Type": "application/json"}
        letter = seal.seal(CHAT, f"whole-{sealed}", data, headers["Content-Type"])
        if sealed:
            data, headers = letter.data, letter.headers
        reply = await running.bus.nats.request(f"resplit.v1.infer.{CHAT}", data, 30, headers=headers)
        assert reply.headers is not None
        return letter.open(reply.data, reply.headers["Content-Type"]) if sealed else reply.data

    capture, data = await captured(running, ask)
    answer = json.loads(data)
    plain = not sealed
    assert capture.holds(ids_as_bytes(prompt)) == (plain, plain)
    assert capture.holds(ids_as_bytes(tuple(answer["token_ids"]))) == (plain, False)
    assert capture.holds([json.dumps(answer["text"], ensure_ascii=False).encode()]) == (plain, False)


@SEALED_AND_NOT
async def test_a_text_to_embed_and_its_vector_are_sealed_too(running: Serving, *, sealed: bool) -> None:
    async def ask() -> Any:
        async with client_of(running, sealed=sealed) as client:
            return await client.embed(EMBED, [TEXT])

    capture, answer = await captured(running, ask)
    plain = not sealed
    assert capture.holds([TEXT.encode()])[0] is plain
    assert any("data" in said and "usage" in said for said in capture.spoken) is plain
    assert len(answer.vectors[0]) > 1


async def test_a_refusal_of_what_was_sealed_is_sealed(running: Serving) -> None:
    """A sentence about a bad request quotes it."""
    secret = "no-such-temperature"

    async def ask() -> Any:
        async with client_of(running, sealed=True) as client:
            try:
                await client.complete(CHAT, REFUSED, temperature=secret)
            except Exception as error:
                return error

    capture, error = await captured(running, ask)
    assert (error.code, error.field) == ("invalid_request", "temperature")
    assert secret in error.message
    assert capture.holds([secret.encode(), REFUSED.encode()]) == (False, False)
