"""What is not what it says: files that rotted, words that nobody signed or that are old, bytes of all kinds."""

import asyncio
import json
import os
import random
import ssl
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgpack
import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from agent.fetching import block_files
from benchmarks.faults.load import DEPLOYMENT
from benchmarks.faults.measure import Seen
from benchmarks.faults.owned import ACCOUNTS
from benchmarks.faults.scene import Scene
from bus.connection import settle
from bus.credentials import Account
from bus.identity import load_credentials
from models.store import Store
from resplit import control
from resplit.exchange import open_connection
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import Digest, NodeId, RequestId
from schemas.deployment import Stage
from schemas.envelope import pae

HEARD_S = 2.0
"""So long is listened before something is forged: everybody speaks once a second."""
FORGED = 24
"""Of what was heard in a run, so many are said again otherwise."""
MALFORMED = 60
HUGE_EVERY = 20
"""Each of so many is as large as the bus carries, and that takes the bus itself a while."""
SMALL_BYTES = 4000
REFUSED_S = 10.0
ANSWER_S = 5.0
POLL_S = 0.02
GROWN_BYTES = 64 << 20
"""What a process may take for what it refuses: one message at most, and what its allocator keeps."""
STRANGER = Ed25519PrivateKey.from_private_bytes(b"\7" * 32)
ROT = ("first byte", "byte in the middle", "last byte", "page of zeros", "end missing", "nothing left", "longer")


async def file_rotten(scene: Scene) -> Seen:
    """A file of the stage that the spare node is to load next, which lies on its disk and looks as it did."""
    first, last = await scene.stages()
    spare = NodeId(await scene.spare())
    there = (first, Stage(node=spare, first=last.first, last=last.last))
    await scene.place(there)
    await scene.place((first, last))
    await scene.whole()
    blobs = Store(scene.cluster.folder / spare / "store")
    manifest = blobs.manifest(Store(scene.cluster.store).resolve(DEPLOYMENT))
    digest = scene.draw.choice(block_files(manifest, range(last.first, last.last + 1))).digest
    how = ROT[scene.index % len(ROT)]
    affected = tuple(scene.load.live)
    at = time.monotonic()
    _rot(blobs.path(digest), how, scene.draw)
    await scene.place(there)
    took_s = time.monotonic() - at
    until = await scene.went_on(affected)
    broken = []
    if spare not in {event.source for when, event in scene.ear.audit if when >= at and _is_rot(event, digest)}:
        broken.append(f"{how}: nobody noticed")
    return Seen(at, affected, until, took_s=took_s, broken=tuple(broken), step=how)


def _is_rot(event: Any, digest: Digest) -> bool:
    return event.kind is AuditKind.BLOB_CORRUPT and digest in event.fields.values()


def _rot(path: Path, how: str, draw: random.Random) -> None:
    """Change a file in place, and its times not."""
    times, data = path.stat(), bytearray(path.read_bytes())
    match how:
        case "first byte" | "last byte" | "byte in the middle":
            place = {"first byte": 0, "last byte": len(data) - 1}.get(how, draw.randrange(len(data)))
            data[place] ^= 1 << draw.randrange(8)
        case "page of zeros":
            place = draw.randrange(0, len(data), 4096)
            zeros = bytes(min(4096, len(data) - place))
            data[place : place + 4096] = zeros if data[place : place + 4096] != zeros else b"\1" * len(zeros)
        case "end missing":
            del data[draw.randrange(1, len(data)) :]
        case "nothing left":
            data.clear()
        case _:
            data += b"\0"
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@dataclass(frozen=True)
class Heard:
    """One message under Resplit's root, in the account in which it was said."""

    account: Account
    subject: str
    data: bytes


async def words_forged(scene: Scene) -> Seen:
    """By somebody who owns the bus and no key: what processes of this cluster said a moment ago, damaged, changed,
    signed by a stranger, in another's name, on another's subject; and what they said before, again."""
    async with _owners(scene) as owners:
        heard = await _overheard(owners)
        before = await control.status_on(scene.connection)
        affected = tuple(scene.load.live)
        at = time.monotonic()
        for account, subject, data in _forgeries(heard, scene.draw):
            await owners[account].publish(subject, data)
        for owner in owners.values():
            await settle(owner)
        refused_s = await _refused(scene, at)
        until = await scene.went_on(affected)
    after = await control.status_on(scene.connection)
    broken = [f"{node} was called lost" for node in scene.ear.audited(AuditKind.NODE_LOST, at)]
    if refused_s is None:
        broken.append("nobody refused anything")
    if _state(before) != _state(after):
        broken.append(f"the state was {_state(before)} and is {_state(after)}")
    return Seen(at, affected, until, took_s=refused_s, broken=tuple(broken))


async def _overheard(owners: dict[Account, Nats]) -> list[Heard]:
    """Signed words of all kinds, each as it was said."""
    heard: list[Heard] = []
    listening = []
    for account, owner in owners.items():

        async def note(message: Msg, account: Account = account) -> None:
            heard.append(Heard(account, message.subject, message.data))

        listening.append(await owner.subscribe(f"{subjects.ROOT}.>", cb=note))
    js = owners["CONTROL"].jetstream()
    for stream in (subjects.STREAM_PLANS, subjects.STREAM_RECEIPTS):
        last = (await js.stream_info(stream)).state.last_seq
        for sequence in range(max(1, last - 20), last + 1):
            stored = await js.get_msg(stream, seq=sequence)
            heard.append(Heard("CONTROL", stored.subject or "", stored.data or b""))
    await asyncio.sleep(HEARD_S)
    for one in listening:
        await one.unsubscribe()
    return [one for one in heard if _parts(one.data) is not None]


def _forgeries(heard: list[Heard], draw: random.Random) -> Iterator[tuple[Account, str, bytes]]:
    """Where each is to be said. As many of each kind of subject, whatever is said most."""
    by_kind: dict[str, list[Heard]] = {}
    for one in heard:
        by_kind.setdefault(".".join(one.subject.split(".")[:3]), []).append(one)
    for _ in range(FORGED):
        one, other = draw.choice(by_kind[draw.choice(sorted(by_kind))]), draw.choice(heard)
        kind, payload, signer, signature = _parts(one.data) or ("", b"", "", b"")
        changed = payload.replace(b'"term":', b'"term":9', 1) if b'"term":' in payload else payload[:-1] + b" }"
        match draw.randrange(6):
            case 0:
                data = bytearray(one.data)
                data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
                found = bytes(data)
            case 1:
                found = msgpack.packb([kind, changed, signer, signature])
            case 2:
                found = msgpack.packb([kind, changed, signer, STRANGER.sign(pae(kind, changed))])
            case 3:
                theirs = _parts(other.data) or (kind, payload, signer, signature)
                found = msgpack.packb([kind, payload, theirs[2], theirs[3]])
            case 4:
                found = other.data  # on a subject that is not its own
            case _:
                found = one.data  # again
        yield one.account, one.subject, found


def _parts(data: bytes) -> tuple[str, bytes, str, bytes] | None:
    try:
        kind, payload, signer, signature = msgpack.unpackb(data)
    except (ValueError, TypeError, msgpack.UnpackException):
        return None
    return (kind, payload, signer, signature) if isinstance(kind, str) and isinstance(payload, bytes) else None


async def _refused(scene: Scene, at: float) -> float | None:
    """When the first word of a refusal came."""
    while time.monotonic() - at < REFUSED_S:
        for when, event in scene.ear.audit:
            if when >= at and event.kind is AuditKind.EVENT_REJECTED:
                return when - at
        await asyncio.sleep(POLL_S)
    return None


def _state(status: Any) -> Any:
    return [
        (one.name, one.revision, None if one.current is None else one.current.epoch, one.candidate is None)
        for one in status.deployments
    ]


async def bytes_malformed(scene: Scene) -> Seen:
    """On every subject that somebody listens to, and at every agent's port; some as large as the bus carries."""
    pids = scene.cluster.processes
    memory = {name: psutil.Process(pid).memory_info().rss for name, pid in pids.items()}
    affected = tuple(scene.load.live)
    at = time.monotonic()
    refusals = await _thrown(scene)
    await asyncio.gather(*(_knock(scene, link) for link in await _links(scene)))
    until = await scene.went_on(affected)
    broken = [said for _, said in refusals if said is not None]
    if scene.cluster.processes != pids:
        broken.append(f"ended: {', '.join(set(pids) - set(scene.cluster.processes))}")
    for name, pid in scene.cluster.processes.items():
        if (grown := psutil.Process(pid).memory_info().rss - memory.get(name, 0)) > GROWN_BYTES:
            broken.append(f"{name} took {grown >> 20} MiB more")
    broken += [f"{node} was called lost" for node in scene.ear.audited(AuditKind.NODE_LOST, at)]
    took_s = sorted(took_s for took_s, _ in refusals)
    told = {"slowest refusal ms": round(1e3 * took_s[-1], 1)}
    return Seen(at, affected, until, took_s=took_s[len(took_s) // 2], broken=tuple(broken), told=told)


async def _thrown(scene: Scene) -> list[tuple[float, str | None]]:
    """Throw it all, and after each piece ask for something that makes no sense: how long each refusal took, and what
    was wrong with it."""
    found: list[tuple[float, str | None]] = []
    async with _owners(scene) as owners, _connected(scene) as client:
        for number in range(MALFORMED):
            size = client.max_payload if number % HUGE_EVERY == 0 else SMALL_BYTES
            account, subject = scene.draw.choice(_listened(scene))
            await owners[account].publish(subject, _junk(scene.draw, size))
            await owners[account].flush()
            asked = time.monotonic()
            wrong = None
            try:
                reply = await client.request(subjects.infer(DEPLOYMENT), _bad_request(scene.draw), ANSWER_S)
                if "error" not in json.loads(reply.data):
                    wrong = f"taken: {reply.data[:100]!r}"
            except (TimeoutError, NatsError) as error:
                wrong = f"a malformed request was not answered: {type(error).__name__}"
            found.append((time.monotonic() - asked, wrong))
    return found


@asynccontextmanager
async def _owners(scene: Scene) -> AsyncIterator[dict[Account, Nats]]:
    """Whoever owns the server, in each account."""
    async with AsyncExitStack() as stack:
        owners: dict[Account, Nats] = {}
        for account in ACCOUNTS:
            owners[account] = await scene.cluster.owner(account)
            stack.push_async_callback(owners[account].close)
        yield owners


@asynccontextmanager
async def _connected(scene: Scene) -> AsyncIterator[Nats]:
    """A client."""
    options = load_credentials(scene.cluster.client_keys).nats_options
    client = await open_connection(scene.cluster.url, "resplit-bench", ANSWER_S, options)
    try:
        yield client
    finally:
        await client.close()


def _listened(scene: Scene) -> list[tuple[Account, str]]:
    """Who listens takes what comes from there for a message of its kind. Logs with one writer are left out: whoever
    owns the bus may fill them until nothing else is in them, which nobody promises to prevent."""
    node = scene.draw.choice(scene.cluster.agents)
    edge = [
        subjects.capacity(node),
        subjects.activation(node),
        subjects.infer(DEPLOYMENT),
        subjects.cancel(RequestId("none")),
        subjects.blob(Digest("0" * 64)),
        subjects.blob_of_all(Digest("0" * 64)),
        subjects.BEACON,
        subjects.staging(node),
        subjects.ROSTER_NEWEST,
    ]
    verbs = ("deploy", "place", "remove", "drain", "undrain", "trust", "status", "explain", "plan", "where")
    return [*(("EDGE", one) for one in edge), *(("CONTROL", subjects.control(verb)) for verb in verbs)]


def _junk(draw: random.Random, size: int) -> bytes:
    """Noise, or what is well formed and makes no sense, or what unpacks to a hundred times its size."""
    match draw.randrange(4):
        case 0:
            return draw.randbytes(draw.randrange(size) if size <= SMALL_BYTES else size)
        case 1:
            return json.dumps({"name": [[]] * draw.randrange(1, size // 4), "model": None}).encode()[:size]
        case 2:
            return (b"\xdd" + (size - 5).to_bytes(4, "big") + b"\x90" * (size - 5))[:size]
        case _:
            return b"[" * size


def _bad_request(draw: random.Random) -> bytes:
    return draw.choice(
        [
            b"",
            b"{",
            b"\xff\xfe\xfd",
            b'{"prompt": 7}',
            b'{"prompt": "1+1=", "max_tokens": -1}',
            b'{"prompt": "1+1=", "max_tokens": 1e999}',
            b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1099511627776], "data": []}]}',
            b'{"prompt": "1+1=", "temperature": "hot"}',
            b"[" * 100_000,
        ]
    )


async def _links(scene: Scene) -> list[str]:
    status = await control.status_on(scene.connection)
    return [node.capacity.link for node in status.nodes if node.capacity.link is not None]


async def _knock(scene: Scene, link: str) -> None:
    """At an agent's port: a stranger's noise, and a member's, whose certificate is not an agent's."""
    host, _, port = link.rpartition(":")
    tls = load_credentials(scene.cluster.client_keys).tls
    for context in (None, tls):
        try:
            reader, writer = await asyncio.open_connection(
                host, int(port), ssl=context, server_hostname="" if context is not None else None
            )
            writer.write((1 << 31).to_bytes(4, "little") + scene.draw.randbytes(SMALL_BYTES))
            await asyncio.wait_for(reader.read(100), 1.0)
            writer.close()
        except (OSError, ssl.SSLError, TimeoutError, ValueError):
            pass  # as it should be: nobody speaks with it
