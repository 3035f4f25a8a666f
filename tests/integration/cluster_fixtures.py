"""A cluster of real processes for tests, models to run on it, and a client that says exactly what it is told to."""

import asyncio
import hashlib
import json
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import msgpack
import numpy as np
import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from typer.testing import CliRunner

import models
from benchmarks.faults.owned import OwnedCluster
from bus.connection import settle
from bus.identity import Identity, load_credentials, load_identity
from bus.together import OPERATOR
from models.importer import import_model
from models.reference import Reference
from models.store import Store
from models.text import Text
from resplit import control
from resplit.cli import app
from resplit.client import Client
from resplit.exchange import open_connection
from resplit.replies import RequestError, Token
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.codec import CONTENT_TYPE, JSON, MSGPACK
from schemas.control import DeploymentStatus, DeployRequest
from schemas.deployment import Settings, Stage
from schemas.envelope import AUDIT_TYPE, open_envelope
from schemas.tensor import Array
from tests import model_zoo

ANSWER_S = 30.0
CONNECT_S = 5.0
SERVING_S = 60.0
CHAT, EMBED, CNN = DeploymentName("chat"), DeploymentName("embed"), DeploymentName("cnn")
SLOTS, QUEUED = 4, 6
CONTEXT = 1024
SETTINGS = Settings(context_tokens=CONTEXT, max_sequences=SLOTS, max_queued=QUEUED)
N0, N1, N2 = NodeId("n0"), NodeId("n1"), NodeId("n2")
PROMPT = "the quick brown fox"
TOOLS = ("torch", "transformers", "onnx", "onnxruntime-gpu", "onnxruntime-genai-cuda")

Plain = dict[str, Any]


def build_store(cache: Path) -> Store:
    """A store with a tiny `llama`, `embedder` and `cnn`, made once for each state of the importer."""
    folder = cache / _fingerprint()
    if not (folder / "ready").exists():
        shutil.rmtree(cache, ignore_errors=True)
        folder.mkdir(parents=True)
        store = Store(folder / "store")
        import_model(str(model_zoo.built_folder(folder, "llama", "fp32")), store, "llama")
        import_model(str(model_zoo.built_bert(folder)), store, "embedder")
        import_model(str(model_zoo.cnn_file(folder)), store, "cnn")
        (folder / "ready").touch()
    return Store(folder / "store")


def _fingerprint() -> str:
    sources = [Path(model_zoo.__file__), *sorted(Path(models.__path__[0]).glob("*.py"))]
    tools = str([version(name) for name in TOOLS])
    return hashlib.sha256(b"".join(path.read_bytes() for path in sources) + tools.encode()).hexdigest()[:16]


class Oracle:
    """What the unsplit models answer."""

    def __init__(self, store: Store) -> None:
        self._llama = Reference(store, "llama")
        self._embedder = Reference(store, "embedder")
        self._cnn = Reference(store, "cnn")
        self.text = _text(store, self._llama)
        self._embedder_text = _text(store, self._embedder)
        self._known: dict[tuple[tuple[int, ...], int], tuple[int, ...]] = {}

    def tokens(self, prompt: str | Sequence[int], count: int) -> tuple[int, ...]:
        """The `count` greedy tokens after `prompt`, whatever they are."""
        ids = tuple(self.text.encode(prompt) if isinstance(prompt, str) else prompt)
        if (ids, count) not in self._known:
            self._known[ids, count] = self._generate(ids, count)
        return self._known[ids, count]

    def logits(self, prompt: str, count: int) -> list[Array]:
        """The logits before each of those tokens."""
        self._generate(tuple(self.text.encode(prompt)), count)
        return [logits.astype(np.float64) for logits in self._llama.logits]

    def vector(self, sentence: str) -> Array:
        """The embedder's vector for one text: the mean over its tokens, of length 1."""
        ids = np.array([self._embedder_text.encode(sentence)], np.int64)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        output = self._embedder.run({spec.name: feeds[spec.name] for spec in self._embedder.manifest.inputs})
        vector = output[self._embedder.manifest.outputs[0].name][0].mean(axis=0)
        return np.asarray(vector / np.linalg.norm(vector))

    def classes(self, image: Array) -> Array:
        """The CNN's answer."""
        return self._cnn.run({"image": image})["classes"]

    def _generate(self, ids: tuple[int, ...], count: int) -> tuple[int, ...]:
        found = self._llama.generate(list(ids), count, SETTINGS.chunk_tokens, CONTEXT, stop_at_eos=False)
        return tuple(found)


def _text(store: Store, reference: Reference) -> Text:
    spec = reference.manifest.text
    assert spec is not None
    return Text(spec, store.path(spec.tokenizer.digest))


@dataclass
class Ear:
    """Hears the audit trail from the moment it was made; believes only what its source signed."""

    identity: Identity
    heard: list[AuditEvent] = field(default_factory=list)
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    async def note(self, message: Msg) -> None:
        event, signer = open_envelope(message.data, AuditEvent, AUDIT_TYPE, self.identity.writers)
        assert signer == event.source
        self.heard.append(event)
        self._more.set()

    async def wait(self, kind: AuditKind, timeout_s: float = 10.0, **wanted: Any) -> AuditEvent:
        """The first event of this kind, heard or to come, whose attributes and fields are as `wanted`."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    self._more.clear()
                    for event in self.heard:
                        if event.kind is kind and _has(event, wanted):
                            return event
                    await self._more.wait()
        except TimeoutError:
            like = "\n".join(f"{event.at:%T.%f} {event.fields}" for event in self.heard if event.kind is kind)
            raise AssertionError(f"no {kind} with {wanted} among:\n{like or 'nothing of the kind'}") from None


def _has(event: AuditEvent, wanted: dict[str, Any]) -> bool:
    return all(event.fields.get(name, getattr(event, name, None)) == value for name, value in wanted.items())


class Bus:
    """Says to a deployment exactly the bytes it is told to, and hears every reply."""

    def __init__(self, connection: Nats) -> None:
        self.nats = connection

    async def say(
        self, deployment: str, data: bytes, content_type: str = JSON, headers: dict[str, str] | None = None
    ) -> Plain:
        """The one reply to a request, decoded as its header says."""
        given = {CONTENT_TYPE: content_type} if headers is None else headers
        message = await self.nats.request(subjects.infer(DeploymentName(deployment)), data, ANSWER_S, headers=given)
        return decoded(message)

    async def ask(self, deployment: str, request: Any, content_type: str = JSON) -> Plain:
        """The one reply to a request given as plain values."""
        data = msgpack.packb(request) if content_type == MSGPACK else json.dumps(request).encode()
        return await self.say(deployment, data, content_type)

    async def replies(self, deployment: str, request: Plain, content_type: str = JSON) -> list[Plain]:
        """Every reply up to the final one, and whatever still comes until a later request was answered."""
        inbox = self.nats.new_inbox()
        found: list[Plain] = []
        over = asyncio.Event()

        async def note(message: Msg) -> None:
            found.append(decoded(message))
            if not ("status" in found[-1] or ("token_id" in found[-1] and "finish_reason" not in found[-1])):
                over.set()

        subscription = await self.nats.subscribe(inbox, cb=note)
        data = msgpack.packb(request) if content_type == MSGPACK else json.dumps(request).encode()
        subject = subjects.infer(DeploymentName(deployment))
        await self.nats.publish(subject, data, inbox, {CONTENT_TYPE: content_type})
        async with asyncio.timeout(ANSWER_S):
            await over.wait()
        # The ingress answers in order, so whatever it sent twice arrives before this.
        await self.ask(deployment, {"prompt": "x", "max_tokens": 1})
        await subscription.unsubscribe()
        return found


def decoded(message: Msg) -> Plain:
    """A reply as plain values, by its own header."""
    content_type = (message.headers or {}).get(CONTENT_TYPE)
    plain: Plain = msgpack.unpackb(message.data) if content_type == MSGPACK else json.loads(message.data)
    return plain


@dataclass
class Serving:
    """A cluster with clients of every kind."""

    cluster: OwnedCluster
    client: Client
    bus: Bus
    ear: Ear
    oracle: Oracle
    control: Nats
    """The server's owner among those who steer, whom no list binds."""
    edge: Nats
    """The same at the edge."""

    async def answers(self) -> None:
        """The chat deployment answers as the unsplit model does, with every slot free for it."""
        count = 6
        asked = [self.client.complete(CHAT, PROMPT, max_tokens=count, ignore_eos=True) for _ in range(SLOTS)]
        for answer in await asyncio.gather(*asked):
            assert answer.token_ids == self.oracle.tokens(PROMPT, count)

    async def refused(self, deployment: str, request: Any, content_type: str = JSON) -> tuple[str, str | None]:
        """(code, field) of the typed error that `request` ends in."""
        reply = await self.bus.ask(deployment, request, content_type)
        return error_of(reply)

    async def say_raw(self, header: bytes, data: bytes, inbox: str) -> None:
        """A request in NATS' own protocol, past the checks of nats-py; returns once the server took it."""
        port = int(self.cluster.url.rsplit(":", 1)[1])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=self.cluster.tls)
        login = self.cluster.raw_login(await reader.readline())
        sizes = f"{len(header)} {len(header) + len(data)}" if header else f"{len(data)}"
        verb = "HPUB" if header else "PUB"
        writer.write(login + f"{verb} {subjects.infer(CHAT)} {inbox} {sizes}\r\n".encode())
        writer.write(header + data + b"\r\nPING\r\n")
        async with asyncio.timeout(ANSWER_S):
            while b"PONG" not in (line := await reader.readline()):
                assert line, "the server hung up"
        writer.close()
        await writer.wait_closed()

    async def deploy(self, name: str, model: str, **fields: Any) -> DeploymentStatus:
        request = DeployRequest(name=DeploymentName(name), model=model, **fields)
        return await control.deploy_and_wait(self.cluster.operator, request, SERVING_S)

    async def until(self, true: Callable[[DeploymentStatus], bool], name: str = CHAT, timeout_s: float = 60) -> None:
        """Wait until the orchestrator's view of a deployment is as wanted."""
        async with asyncio.timeout(timeout_s):
            while True:
                seen = await control.status(self.cluster.operator)
                if any(true(found) for found in seen.deployments if found.name == name):
                    return
                await asyncio.sleep(0.1)

    async def until_answering(self, timeout_s: float = 60) -> None:
        """Wait until the chat deployment answers, and rightly; what it says meanwhile are typed errors."""
        async with asyncio.timeout(timeout_s):
            while True:
                try:
                    async with Client(self.cluster.url, keys=self.cluster.client_keys, idle_timeout_s=2.0) as client:
                        answer = await client.complete(CHAT, PROMPT, max_tokens=3, ignore_eos=True)
                except RequestError as error:
                    assert error.code != "internal"
                    await asyncio.sleep(0.1)
                    continue
                assert answer.token_ids == self.oracle.tokens(PROMPT, 3)
                return

    async def accepted(self, client: Client, counts: Sequence[int]) -> list["Streaming"]:
        """Streams of so many tokens each, every one of them accepted."""
        seen = asyncio.Semaphore(0)

        async def note(message: Msg) -> None:
            if b'"accepted"' in message.data:
                seen.release()

        subscription = await self.edge.subscribe("_INBOX.>", cb=note)
        await settle(self.edge)
        streams = [Streaming(client, max_tokens=count) for count in counts]
        async with asyncio.timeout(ANSWER_S):
            for _ in streams:
                await seen.acquire()
        await subscription.unsubscribe()
        return streams

    def alive(self) -> None:
        """No process of the cluster has ended."""
        assert set(self.cluster.processes) == {"nats", "orchestrator", *self.cluster.agents}


def error_of(reply: Plain) -> tuple[str, str | None]:
    """(code, field) of an error reply; its message is one sentence."""
    error = reply["error"]
    assert error["message"]
    return error["code"], error.get("field")


def three_stages(*nodes: NodeId) -> tuple[Stage, ...]:
    """The six blocks of the tiny decoder, two on each node."""
    return tuple(Stage(node=node, first=2 * i, last=2 * i + 1) for i, node in enumerate(nodes))


async def command(*arguments: str) -> tuple[int, str, str]:
    """Run one command of `resplit` in a thread: (exit code, stdout, stderr).

    A process of its own does the same and takes most of a second of a core to start; test_cluster_adder starts some.
    """
    result = await asyncio.to_thread(CliRunner().invoke, app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@asynccontextmanager
async def serving(
    folder: Path, store: Store, oracle: Oracle, agents: int = 3, **options: Any
) -> AsyncIterator[Serving]:
    """A fresh cluster of so many agents with one thread each, nothing deployed; afterwards, nothing that any of its
    processes did was refused by the server, or by another of them."""
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(OwnedCluster(folder, store.root, agents, threads=1, **options))
        client = await stack.enter_async_context(Client(cluster.url, keys=cluster.client_keys))
        opened = [
            await open_connection(cluster.url, "bus", CONNECT_S, load_credentials(cluster.client_keys).nats_options),
            await cluster.operator.connect("ear", "operator"),
            await cluster.owner("CONTROL"),
            await cluster.owner("EDGE"),
        ]
        for connection in opened:
            stack.push_async_callback(connection.close)
        said, heard, control_owner, edge_owner = opened
        ear = Ear(load_identity(cluster.operator_keys, OPERATOR))
        await heard.subscribe(subjects.ALL_AUDIT, cb=ear.note)
        yield Serving(cluster, client, Bus(said), ear, oracle, control_owner, edge_owner)
        assert not (refused := cluster.refusals()), refused
        for agent in cluster.agents:
            lines = cluster.log(agent).read_text().splitlines()
            dropped = [line for line in lines if "dropped from" in line and "malformed" not in line]
            assert not dropped, dropped
        assert not [event for event in ear.heard if event.kind is AuditKind.FRAME_REFUSED]


class Streaming:
    """A streamed completion that runs beside the test: its tokens so far, and how it ended."""

    def __init__(self, client: Client, prompt: str = PROMPT, deployment: str = CHAT, **fields: Any) -> None:
        self.tokens: list[Token] = []
        self._arrived = asyncio.Event()
        fields = {"ignore_eos": True, **fields}
        self.ended = asyncio.create_task(self._run(client, deployment, prompt, fields))

    async def _run(self, client: Client, deployment: str, prompt: str, fields: Plain) -> RequestError | None:
        try:
            async for token in client.stream(deployment, prompt, **fields):
                self.tokens.append(token)
                self._arrived.set()
        except RequestError as error:
            return error
        finally:
            self._arrived.set()
        return None

    async def began(self, timeout_s: float = ANSWER_S) -> Self:
        """Wait for the first token; the stream must not be over with it."""
        async with asyncio.timeout(timeout_s):
            await self._arrived.wait()
        assert self.tokens, await self.ended
        assert not self.ended.done()
        return self

    async def end(self, timeout_s: float = ANSWER_S) -> RequestError | None:
        """The error it ended in, or None if it ended in output."""
        async with asyncio.timeout(timeout_s):
            return await self.ended

    @property
    def ids(self) -> tuple[int, ...]:
        return tuple(token.token_id for token in self.tokens)


def cached_store(config: pytest.Config) -> Store:
    """`build_store` in pytest's own cache folder."""
    return build_store(config.cache.mkdir("resplit-zoo") / "models") if config.cache is not None else pytest.fail()
