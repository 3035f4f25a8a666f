"""Plans, weights and peers that are not to be believed: refused or passed over, audited, and serving goes on."""

import asyncio
import contextlib
import shutil
import ssl
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgpack
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import resplit
from agent.busroad import PIECE_TYPE
from bus.connection import connect
from bus.following import publish_roster
from bus.identity import ORCHESTRATOR, load_credentials, load_identity
from bus.letters import About, seal_letter
from bus.natsconf import LOGINS_FILE
from bus.sealed_plans import seal_event
from bus.server_certificate import server_files
from bus.streams import ensure_streams
from bus.together import CLUSTER, add_member, make_members
from models.store import Store
from resplit import control
from resplit.child import Child
from resplit.cluster import LocalCluster
from resplit.exits import Exit
from resplit.server import NatsServer
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import DeploymentName, Digest, NodeId
from schemas.control import DeployRequest
from schemas.deployment import Settings, Stage
from schemas.envelope import PLAN_TYPE, RECEIPT_TYPE, pae
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Close
from schemas.framing import pack
from schemas.plan import PlanEvent, PlanPhase
from schemas.request import MAX_REQUEST_BYTES
from tests.integration.cluster_fixtures import (
    CHAT,
    EMBED,
    N0,
    N1,
    N2,
    SETTINGS,
    Oracle,
    Serving,
    command,
    error_of,
    serving,
    three_stages,
)

pytestmark = pytest.mark.asyncio(loop_scope="session")

ROOT = Path(resplit.__file__).parents[1]
STEP_S = 60
N9 = NodeId("n9")
"""A member that never runs."""


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def exposed(tmp_path_factory: pytest.TempPathFactory, zoo_store: Store, oracle: Oracle) -> AsyncIterator[Serving]:
    """A cluster of this module alone: its agents are killed, and its stores and streams hold rubbish in the end."""
    async with serving(
        tmp_path_factory.mktemp("exposed") / "cluster", zoo_store, oracle, max_payload_bytes=2 << 20
    ) as running:
        await running.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
        await running.deploy(EMBED, "embedder", placement=(Stage(node=N0, first=0, last=2),))
        yield running
        running.alive()


def forged(kind: str, serving_: Serving, elsewhere: Path) -> bytes:
    """A plan event that would end the deployment, as various people would send it."""
    event = PlanEvent(
        deployment=CHAT,
        term=1000,
        revision=1000,
        phase=PlanPhase.RETIRE,
        reason="mischief",
        issued_at=datetime.now(UTC),
    )
    ours = load_identity(serving_.cluster.keys / ORCHESTRATOR, ORCHESTRATOR)

    def resigned(payload_type: str, key: Ed25519PrivateKey) -> bytes:
        _, payload, signer, _ = msgpack.unpackb(seal_event(event, ours))
        return bytes(msgpack.packb([payload_type, payload, signer, key.sign(pae(payload_type, payload))]))

    match kind:
        case "garbage":
            return b"\xff" * 100
        case "nothing":
            return b""
        case "one flipped bit":
            data = bytearray(seal_event(event, ours))
            data[len(data) // 2] ^= 1
            return bytes(data)
        case "a node's key":
            node = load_identity(serving_.cluster.keys / N0, N0)
            return seal_event(event, node)
        case "a node's key in the orchestrator's name":
            node = load_identity(serving_.cluster.keys / N0, N0)
            return resigned(PLAN_TYPE, node.key)
        case "another cluster's orchestrator":
            make_members(elsewhere, [N0])
            return seal_event(event, load_identity(elsewhere / ORCHESTRATOR, ORCHESTRATOR))
        case "another type":
            return resigned(RECEIPT_TYPE, ours.key)
        case _:
            raise AssertionError(kind)


FORGERIES = (
    "garbage",
    "nothing",
    "one flipped bit",
    "a node's key",
    "a node's key in the orchestrator's name",
    "another cluster's orchestrator",
    "another type",
)


@pytest.mark.parametrize("kind", FORGERIES)
async def test_a_forged_plan_changes_nothing_and_is_audited(exposed: Serving, tmp_path: Path, kind: str) -> None:
    exposed.ear.heard.clear()
    # Core NATS, not JetStream, would do for an agent that listens; the stream keeps it for those that come later.
    await exposed.control.publish(subjects.plan(CHAT), forged(kind, exposed, tmp_path))
    for node in exposed.cluster.agents:
        event = await exposed.ear.wait(AuditKind.EVENT_REJECTED, source=node)
        assert (event.fields["code"], event.fields["subject"]) == ("bad_signature", subjects.plan(CHAT))
    await exposed.answers()


async def test_a_replayed_plan_changes_nothing(exposed: Serving) -> None:
    js = exposed.control.jetstream()
    first = await js.get_msg(subjects.STREAM_PLANS, subject=subjects.plan(CHAT), seq=1, next=True)
    assert first.data
    await exposed.control.publish(subjects.plan(CHAT), first.data)
    await exposed.control.publish(subjects.plan(CHAT), first.data)
    await exposed.answers()
    await exposed.until(lambda found: found.state == "serving")


async def test_a_plan_of_another_deployment_is_refused(exposed: Serving) -> None:
    js = exposed.control.jetstream()
    exposed.ear.heard.clear()
    last = await js.get_last_msg(subjects.STREAM_PLANS, subjects.plan(EMBED))
    assert last.data
    await exposed.control.publish(subjects.plan(CHAT), last.data)
    await exposed.ear.wait(AuditKind.EVENT_REJECTED, source=N0)
    await exposed.answers()


async def test_after_forgeries_the_orchestrator_still_plans_and_new_agents_still_learn(exposed: Serving) -> None:
    """What a stranger left in the log must not stand in the way of the next plan or of an agent that starts."""
    await exposed.control.publish(subjects.plan(CHAT), b"junk that stands last in the log")
    await exposed.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS.model_copy(
        update={"max_queued": SETTINGS.max_queued + 1}
    ))  # fmt: skip
    await exposed.answers()
    await exposed.control.publish(subjects.plan(CHAT), b"and again")
    await exposed.cluster.kill(N2)
    await exposed.cluster.start(N2)
    await exposed.until_answering()
    await exposed.deploy(CHAT, "llama", placement=three_stages(N0, N1, N2), settings=SETTINGS)
    await exposed.answers()


class Stranger:
    """Somebody who can reach an agent's link port."""

    def __init__(self, serving_: Serving, address: str) -> None:
        self.host, _, port = address.rpartition(":")
        self.port = int(port)

    async def sends(self, data: bytes, tls: ssl.SSLContext | None = None) -> bytes:
        """What the agent answers until it hangs up, which it does."""
        name = None if tls is None else "n1"
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=tls, server_hostname=name)
        answer = b""
        with contextlib.suppress(OSError, ssl.SSLError):
            writer.write(data)
            await writer.drain()
            if tls is None:
                writer.write_eof()
            async with asyncio.timeout(10):
                answer = await reader.read()
        writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
        return answer


async def link_of(exposed: Serving, node: NodeId) -> Stranger:
    seen = await control.status(exposed.cluster.operator)
    address = next(n.capacity.link for n in seen.nodes if n.capacity.node == node)
    assert address is not None
    return Stranger(exposed, address)


def any_server(context: ssl.SSLContext) -> ssl.SSLContext:
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


async def test_a_link_without_a_certificate_is_dropped(exposed: Serving) -> None:
    stranger = await link_of(exposed, N1)
    frame = b"".join(bytes(piece) for piece in pack(Close(CHAT, 1, 0, 0, (1,))))
    message = struct.pack("<IB", len(frame), 0) + frame
    assert await stranger.sends(message, any_server(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))) == b""
    await exposed.answers()


async def test_a_link_with_a_certificate_of_another_authority_is_dropped(exposed: Serving, tmp_path: Path) -> None:
    make_members(tmp_path, [N0])
    theirs = any_server(load_identity(tmp_path / N0, N0).tls(ssl.Purpose.SERVER_AUTH))
    assert await (await link_of(exposed, N1)).sends(struct.pack("<IBQ", 8, 1, 0), theirs) == b""
    await exposed.answers()


async def test_garbage_at_the_link_port_is_dropped(exposed: Serving) -> None:
    stranger = await link_of(exposed, N1)
    for data in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\0" * 70_000, b"\xff" * 5):
        await stranger.sends(data)
    await exposed.answers()


async def test_garbage_from_a_trusted_peer_ends_its_link_and_nothing_else(exposed: Serving) -> None:
    stranger = await link_of(exposed, N1)
    roster = add_member(exposed.cluster.keys, N9, "agent", "trusted")
    await exposed.cluster.reload()
    await publish_roster(exposed.control.jetstream(), roster)
    await exposed.ear.wait(AuditKind.ROSTER_TAKEN, source=N1)
    trusted = load_identity(exposed.cluster.keys / N9, N9).tls(ssl.Purpose.SERVER_AUTH)
    assert await stranger.sends(struct.pack("<IB", (1 << 32) - 1, 0), trusted) == b""  # announces 4 GiB
    bodies = [b"", b"\xff" * 9, b"\x04\0\0\0\x91\xa1a\xc0", b"".join(map(bytes, pack(Close("nobody", 1, 9, 9, (1,)))))]
    reader, writer = await asyncio.open_connection(stranger.host, stranger.port, ssl=trusted, server_hostname="n1")
    for kind in (0, 1, 2, 77):
        for body in bodies:
            writer.write(struct.pack("<IB", len(body), kind) + body)
    writer.write(struct.pack("<IBQ", 8, 1, 42))
    async with asyncio.timeout(10):
        pongs = b""
        while not pongs.endswith(struct.pack("<IBQ", 8, 2, 42)):
            pongs += await reader.read(1000)
    writer.close()
    with contextlib.suppress(OSError, ssl.SSLError):
        await writer.wait_closed()
    await exposed.answers()


async def test_garbage_on_the_activation_subject_is_dropped(exposed: Serving) -> None:
    bus, there = exposed.edge, subjects.activation(N1)
    for data in (b"", b"x", b"\0" * 64, b"\0" * 65, b"\x90" * 200, b"\xff" * 100_000):
        await bus.publish(there, data)
    frame = b"".join(bytes(piece) for piece in pack(Close(CHAT, 1, 0, 1, (1,))))
    stranger = Ed25519PrivateKey.generate()
    known = load_identity(exposed.cluster.keys / N0, N0)
    for sender, key in ((N0, stranger), ("nobody", stranger), ([], known.key), ({"a": 1}, known.key)):
        body = msgpack.packb([sender, N1, 1 << 40, 0, 1, frame])
        await bus.publish(there, key.sign(pae(PIECE_TYPE, body)) + body)
    # Signed by a peer, and still nonsense.
    reader = {N1: load_identity(exposed.cluster.keys / N1, N1).sealing.public_key()}
    letter = seal_letter(frame, reader, About("activation", DeploymentName("-"), "7.0.1", N0))
    pieces: tuple[Any, ...] = (
        [N0, N2, 1, 0, 1, frame],
        [N0, N1, 2, 5, 2, b""],
        [N0, N1, 3, "a", "b", b""],
        [N0, N1, None, 0, 1, 7],
        [N0, N1, 4, 0, 2, b"a"],
        [N0, N1, 4, 2, 3, b"b"],
        [N0, N1, 5, 0, 1 << 60, b""],
        [N0, N1, 6, 0, 1, frame],  # in the open
        [N0, N1, 7, 0, 1, letter[:-1]],
        [N0, N1, 8, 0, 1, letter],  # which is of another number
        [N0],
        [],
        5,
    )
    for piece in pieces:
        body = msgpack.packb(piece)
        await bus.publish(there, known.key.sign(pae(PIECE_TYPE, body)) + body)
    await bus.publish(subjects.receipt(N0), b"junk")
    await bus.publish(subjects.capacity(N0), b"junk")
    await exposed.control.publish(subjects.control("deploy"), b"junk")
    await exposed.answers()


async def test_a_model_larger_than_all_nodes_is_refused_with_the_bytes_short(tmp_path: Path, zoo_store: Store) -> None:
    async with LocalCluster(tmp_path / "cluster", zoo_store.root, 1, memory_bytes=1 << 20) as cluster:
        with pytest.raises(ResplitError, match=r"needs \d+ bytes, the nodes have \d+, \d+ bytes short") as caught:
            await control.deploy(cluster.operator, DeployRequest(name="large", model="llama"))
        assert caught.value.code is ErrorCode.MODEL_TOO_LARGE
        assert (await control.status(cluster.operator)).deployments == ()
        code, _, error = await command("deploy", "llama", "--url", cluster.url, "--keys", str(cluster.operator_keys))
        assert (code, error.count("\n")) == (Exit.REFUSED, 1)


async def test_a_request_over_the_limit_is_refused_where_the_server_lets_it_through(exposed: Serving) -> None:
    reply = await exposed.bus.say(CHAT, b" " * (MAX_REQUEST_BYTES + 1))
    assert error_of(reply) == ("payload_too_large", None)
    await exposed.answers()


async def test_a_deployment_that_makes_no_sense_names_its_field(exposed: Serving) -> None:
    wrong = [
        (DeployRequest(name="wrong", model="llama", stages=7), "stages"),
        (DeployRequest(name="wrong", model="llama", placement=three_stages(N0, N1)), "placement.1.last"),
        (DeployRequest(name="wrong", model="llama", placement=three_stages(N0, N1, N9)), "placement.2.node"),
        (DeployRequest(name="wrong", model="llama", settings=Settings(context_tokens=4096)), "settings.context_tokens"),
        (DeployRequest(name="wrong", model="unknown"), "model"),
    ]
    for request, field in wrong:
        with pytest.raises(ResplitError) as caught:
            await control.deploy(exposed.cluster.operator, request)
        assert caught.value.field == field
    assert caught.value.code is ErrorCode.UNKNOWN_MODEL
    assert "wrong" not in {found.name for found in (await control.status(exposed.cluster.operator)).deployments}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x40
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize("damage", [flip, cut])
async def test_a_damaged_weight_file_never_reaches_the_runtime(
    exposed: Serving, zoo_store: Store, damage: Callable[[Path], None]
) -> None:
    """The agent holds the file already, damaged; it is refused or fetched anew, and audited."""
    manifest = zoo_store.manifest("embedder")
    weight = manifest.blocks[-1].weights[0]
    name = DeploymentName(f"hurt-{damage.__name__}")
    # On n2 the last block of the embedder is damaged before it is asked for.
    there = exposed.cluster.folder / N2 / "store" / "blobs" / weight.digest
    there.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(zoo_store.path(Digest(weight.digest)), there)
    damage(there)
    exposed.ear.heard.clear()
    await exposed.cluster.kill(N2)
    await exposed.cluster.start(N2)
    placement = (Stage(node=N2, first=0, last=len(manifest.blocks) - 1),)
    await control.deploy(exposed.cluster.operator, DeployRequest(name=name, model="embedder", placement=placement))
    event = await exposed.ear.wait(AuditKind.BLOB_CORRUPT, source=N2, timeout_s=30)
    assert event.fields["digest"] == weight.digest
    await control.remove(exposed.cluster.operator, name)
    await exposed.until_answering()


class Alone:
    """One agent as an operator runs it."""

    def __init__(self, folder: Path, keys: Path, url: str, *options: str) -> None:
        command = [sys.executable, "-m", "resplit", "agent", N0, "--url", url, "--keys", str(keys), *options]
        self.child = Child(N0, [*command, "--store", str(folder / "store")], folder / "log")

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Child]:
        await self.child.start()
        try:
            yield self.child
        finally:
            await self.child.stop()

    async def says(self, text: str) -> None:
        async with asyncio.timeout(STEP_S):
            while text not in self.child.log.read_text():  # noqa: ASYNC110 (a log file sends no events)
                await asyncio.sleep(0.05)


async def test_an_agent_without_a_server_says_so_once_and_joins_when_there_is_one(tmp_path: Path) -> None:
    make_members(tmp_path / "keys", [N0])
    cluster = tmp_path / "keys" / CLUSTER
    server = NatsServer(tmp_path / "nats", (cluster / LOGINS_FILE).read_text, server_files(cluster))
    await server.start()
    url = server.url
    await server.child.kill()
    agent = Alone(tmp_path, tmp_path / "keys" / N0, url, "--provider", "cpu")
    async with agent.running():
        await agent.says("no NATS server at")
        await asyncio.sleep(1.2)  # several of its attempts
        assert agent.child.log.read_text().count("no NATS server at") == 1
        await server.start()
        orchestrator = await connect(
            server.url, "orchestrator", credentials=load_credentials(tmp_path / "keys" / ORCHESTRATOR)
        )
        heartbeats = await orchestrator.subscribe(subjects.ALL_CAPACITY)
        await agent.says("connected to")
        await ensure_streams(orchestrator)
        assert (await heartbeats.next_msg(STEP_S)).subject == subjects.capacity(N0)
        await orchestrator.close()
    await server.child.stop()


async def test_cuda_that_is_not_there_is_a_typed_error_and_never_cpu(tmp_path: Path) -> None:
    make_members(tmp_path / "keys", [N0])
    command = [sys.executable, "-m", "resplit", "agent", N0, "--url", "nats://127.0.0.1:1", "--provider", "cuda"]
    command += ["--keys", str(tmp_path / "keys" / N0), "--store", str(tmp_path / "store")]
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin", "PYTHONPATH": str(ROOT)}
    process = await asyncio.create_subprocess_exec(
        *command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    async with asyncio.timeout(STEP_S):
        _, error = await process.communicate()
    assert process.returncode == Exit.REFUSED
    assert "provider_unavailable" in error.decode()
