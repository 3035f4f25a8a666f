"""Capacity reports that must not be believed: figures that are none, and nodes that nobody enrolled."""

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from nats.aio.client import Client
from nats.aio.msg import Msg

from bus.audit import AuditTrail
from bus.connection import connect
from bus.identity import ORCHESTRATOR, Identity, load_identity
from bus.letterbox import letters_to
from bus.letters import About, seal_letter
from bus.sealed_heartbeats import CAPACITY, seal_heartbeat
from bus.stopping import end
from bus.streams import ensure_streams
from bus.together import make_members
from orchestrator.fold import CapacityReceived, Report
from orchestrator.inbox import Inbox, Rejections
from schemas import subjects
from schemas.audit import AuditEvent, AuditKind
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import (
    BlockTime,
    Capacity,
    CloudCount,
    FinishedRequest,
    LinkEstimate,
    Provider,
    Service,
    StepCount,
    TaskCount,
)
from schemas.codec import decode, encode
from schemas.envelope import AUDIT_TYPE, HEARTBEAT_TYPE, open_envelope, seal
from schemas.errors import ErrorCode, ResplitError
from schemas.heartbeat import Heartbeat, presence_of

CHAT = DeploymentName("chat")
A, B, STRANGER = NodeId("a"), NodeId("b"), NodeId("stranger")
MEASURED = (
    "load", "pressure", "memory_pressure", "io_pressure", "gpu_load", "temperature_c", "power_w", "energy_j",
    "disk_read_bytes_per_s", "memory_free_bytes", "disk_free_bytes", "disk_models_bytes",
)  # fmt: skip
NONSENSE = ("NaN", "Infinity", "-Infinity", "-1e9")
FULL = Capacity(
    node=A,
    boot="first",
    sequence=7,
    issued_at=datetime(2026, 1, 1, tzinfo=UTC),
    version="0",
    provider=Provider(name="cuda", device="test", flops_per_s=1e12, bytes_per_s=1e11),
    threads=4,
    memory_total_bytes=1 << 33,
    memory_free_bytes=1 << 32,
    disk_free_bytes=1 << 40,
    disk_models_bytes=1 << 39,
    load=0.25,
    pressure=1.0,
    memory_pressure=0.5,
    io_pressure=0.25,
    gpu_load=0.75,
    throttled=("thermal", "power"),
    temperature_c=71.0,
    power_w=212.5,
    energy_j=1e6,
    disk_read_bytes_per_s=2e9,
    block_times=(BlockTime(model=Digest("1" * 64), block=0, decode_ms=1.0, prefill_ms_per_token=0.1),),
    links=(LinkEstimate(peer=B, rtt_ms=0.5, jitter_ms=0.1, goodput_bytes_per_s=1e8, direct=True),),
    service=(
        Service(
            deployment=CHAT,
            arrived=4,
            sized=4,
            sized_prompt_tokens=40,
            sized_max_tokens=100,
            answered=3,
            answered_prompt_tokens=30,
            answered_max_tokens=75,
            prompt_tokens=30,
            output_tokens=60,
            met=3,
            missed=1,
            tasks=(TaskCount(task="look", arrived=4, met=3, missed=1),),
            steps=(StepCount(service="eyes", node=B, answers=3, compute_ms=15.0, compute_ms_squared=75.0),),
            cloud=CloudCount(asked=3, answered=2, total_ms=300.0, cost=0.5),
        ),
    ),
    finished=(
        FinishedRequest(
            number=1,
            deployment=CHAT,
            epoch=1,
            route=0,
            prompt_tokens=10,
            output_tokens=20,
            batch=1.0,
            started_ms=500.0,
            ttft_ms=90.0,
            tpot_ms=20.0,
        ),
    ),
)
"""A report with a figure in every field."""


def changed(path: str, number: str) -> bytes:
    """The report with one number replaced by what JSON parsers take for one; a dotted path leads into tuples."""
    plain: dict[str, Any] = json.loads(encode(FULL))
    holder: Any = plain
    *steps, last = path.split(".")
    for step in steps:
        holder = holder[int(step)] if step.isdecimal() else holder[step]
    assert last in holder, "the report has a figure there to replace"
    holder[last] = "@"
    return json.dumps(plain).replace('"@"', number).encode()


def heartbeat(
    payload: bytes, identity: Identity, node: NodeId = A, key: Ed25519PrivateKey | None = None, number: int = 7
) -> bytes:
    """A heartbeat of `node` as A would write it, with whatever is in its letter, signed by A unless `key` is given."""
    about = About(CAPACITY, DeploymentName("-"), f"{FULL.boot}.{number}", node)
    letters = letters_to({payload: identity.orchestrators}, identity, about)
    said = Heartbeat(**{**dict(presence_of(FULL)), "node": node, "sequence": number}, letters=letters)
    return seal(said, HEARTBEAT_TYPE, node, key or identity.key)


NESTED = (
    "links.0.rtt_ms", "links.0.jitter_ms", "links.0.goodput_bytes_per_s",
    "block_times.0.decode_ms", "block_times.0.prefill_ms_per_token",
    "provider.flops_per_s", "provider.bytes_per_s",
)  # fmt: skip
IMPOSSIBLE = [(path, number) for path in (*MEASURED, *NESTED) for number in NONSENSE]
COUNTED = (
    *(f"service.0.{name}" for name in Service.model_fields if name not in ("deployment", "tasks", "steps", "cloud")),
    *(f"service.0.cloud.{name}" for name in CloudCount.model_fields),
    *(f"service.0.tasks.0.{name}" for name in TaskCount.model_fields if name != "task"),
    *(f"service.0.steps.0.{name}" for name in StepCount.model_fields if name not in ("service", "node")),
    *(f"finished.0.{name}" for name in ("prompt_tokens", "cached_tokens", "output_tokens", "ahead_tokens")),
    *(f"finished.0.{name}" for name in ("batch", "started_ms", "ttft_ms", "tpot_ms")),
    "memory_free_bytes", "block_times.0.decode_ms", "links.0.rtt_ms",
)  # fmt: skip
IMPOSSIBLE += [(path, number) for path in COUNTED for number in ("1" + 400 * "0", "1e30")]
"""What dates and floats overflow with, and what no plan survives."""
IMPOSSIBLE += [("gpu_load", "1.5"), ("memory_pressure", "101"), ("links.0.goodput_bytes_per_s", "0")]


@pytest.mark.parametrize(("path", "number"), IMPOSSIBLE)
def test_a_figure_that_is_none_is_refused_by_the_name_of_its_field(path: str, number: str) -> None:
    with pytest.raises(ResplitError) as caught:
        decode(Capacity, changed(path, number), "capacity")
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, path)


def test_every_real_number_in_a_report_has_a_lower_bound() -> None:
    """One that somebody adds without a bound would let a negative one in."""
    found: list[dict[str, Any]] = []

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            if schema.get("type") == "number":
                found.append(schema)
            schema = list(schema.values())
        if isinstance(schema, list):
            for inner in schema:
                walk(inner)

    walk(Capacity.model_json_schema())
    assert len(found) == 32
    assert [schema for schema in found if not schema.keys() & {"minimum", "exclusiveMinimum"}] == []


@dataclass
class Hearing:
    """An orchestrator's inbox on a real bus, and what it delivered."""

    client: Client
    identity: Identity
    reports: list[Report] = field(default_factory=list)
    audited: list[AuditEvent] = field(default_factory=list)
    news: asyncio.Event = field(default_factory=asyncio.Event)

    def take(self, report: Report) -> None:
        self.reports.append(report)
        self.news.set()

    async def note(self, message: Msg) -> None:
        event, _ = open_envelope(message.data, AuditEvent, AUDIT_TYPE, self.identity.writers)
        self.audited.append(event)
        self.news.set()


@pytest_asyncio.fixture
async def hearing(tmp_path: Path, nats_url: str) -> AsyncIterator[Hearing]:
    make_members(tmp_path, [A, B])
    client = await connect(nats_url, "test")
    found = Hearing(client, load_identity(tmp_path / ORCHESTRATOR, ORCHESTRATOR))
    trail = AuditTrail(await ensure_streams(client), found.identity)
    await client.subscribe(subjects.ALL_AUDIT, cb=found.note)
    await Inbox(found.identity, Rejections(trail), found.take).hear_capacity(client)
    telling = asyncio.create_task(trail.run())
    yield found
    await end([telling])
    await client.close()


async def test_what_cannot_be_believed_reaches_no_state_and_is_audited(hearing: Hearing, tmp_path: Path) -> None:
    a, stranger = load_identity(tmp_path / A, A), Ed25519PrivateKey.generate()
    sound = encode(FULL)
    of_a, of_b, of_stranger = (subjects.capacity(name) for name in (A, B, STRANGER))
    believed_by_nobody = (
        (of_stranger, heartbeat(sound, a, STRANGER, stranger)),
        (of_a, heartbeat(sound, a, A, stranger)),
        (of_b, heartbeat(sound, a)),
        (of_a, heartbeat(changed("power_w", "NaN"), a)),
        (of_a, heartbeat(changed("links.0.goodput_bytes_per_s", "-5"), a)),
        (of_a, heartbeat(sound, a, number=8)),
    )
    for subject, data in believed_by_nobody:
        await hearing.client.publish(subject, data)
    await hearing.client.publish(of_a, seal_heartbeat(FULL, lambda _: (), a))
    async with asyncio.timeout(10):
        while len(hearing.audited) < len(believed_by_nobody) or not hearing.reports:
            hearing.news.clear()
            await hearing.news.wait()
    assert hearing.reports == [CapacityReceived(FULL)]
    assert [event.kind for event in hearing.audited] == [AuditKind.EVENT_REJECTED] * 6
    codes = [event.fields["code"] for event in hearing.audited]
    assert codes == [ErrorCode.BAD_SIGNATURE] * 3 + [ErrorCode.INVALID_REQUEST] * 3
    assert "'stranger', who is not trusted here" in str(hearing.audited[0].fields["why"])


async def test_a_heartbeat_that_is_sealed_for_others_or_for_a_former_key_is_not_read_and_nobodys_fault(
    hearing: Hearing, tmp_path: Path
) -> None:
    """Its node has not heard yet who is an orchestrator now."""
    a = load_identity(tmp_path / A, A)
    about = About(CAPACITY, DeploymentName("-"), f"{FULL.boot}.{FULL.sequence}", A)
    former = {ORCHESTRATOR: X25519PrivateKey.generate().public_key()}
    stale = base64.b64encode(seal_letter(encode(FULL), former, about)).decode()
    for letters in ((), letters_to({encode(FULL): [B]}, a, about), (stale,)):
        said = Heartbeat(**dict(presence_of(FULL)), letters=letters)
        await hearing.client.publish(subjects.capacity(A), seal(said, HEARTBEAT_TYPE, A, a.key))
    later = FULL.model_copy(update={"sequence": 8})
    await hearing.client.publish(subjects.capacity(A), seal_heartbeat(later, lambda _: (), a))
    async with asyncio.timeout(10):
        while not hearing.reports:
            hearing.news.clear()
            await hearing.news.wait()
    assert hearing.reports == [CapacityReceived(later)]
    assert hearing.audited == []
