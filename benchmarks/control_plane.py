"""What very many nodes cost an orchestrator: a real one, on a real NATS server, hears heartbeats of up to 10,000.

    python -m benchmarks.control_plane [--nodes N ...] [--seconds S]

Each synthetic node is a member of the roster with keys of its own; its heartbeats are what a real agent said of itself,
under its name, sealed for the orchestrator and signed by it. So many in a hundred as `IN_PLANS` says come every second,
as from nodes in a plan, the others every ten. They are published over one connection, whose login may speak for all:
ten thousand would cost nats-server more, and the orchestrator hears the same over its own. Three agents are real, and
two of them serve the adder: what is decided is decided about them.

The cost of a heartbeat is the slope of the orchestrator's processor time over two rates; what is left at no rate at all
are its ticks. A decision is an operator's `resplit plan`, which changes nothing; the model is for trusted nodes alone,
which the synthetic ones are not, since nobody would load what is put on them. How long a search among thousands takes
that are able is measured in `benchmarks.shortlist`. Silence is an agent that is stopped (SIGSTOP).
"""

import argparse
import asyncio
import copy
import heapq
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from pathlib import Path

import psutil
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from nats.aio.client import Client as Nats

from benchmarks.faults.load import DEPLOYMENT, SETTINGS
from benchmarks.faults.measure import quantile
from benchmarks.faults.scene import Ear
from benchmarks.table import Row, report
from bus.cluster_folder import open_cluster
from bus.connection import connect
from bus.credentials import SEED_BYTES, nkey_seed, public_nkey
from bus.enrolment import next_roster
from bus.folders import ROSTER
from bus.founding import load_holder
from bus.identity import ORCHESTRATOR, Identity, load_credentials, load_identity
from bus.natsconf import LOGINS_FILE
from bus.remembered import PUBLIC, write_durably
from bus.sealed_heartbeats import seal_heartbeat
from bus.together import CLUSTER, make_members
from resplit import control
from resplit.child import Child
from resplit.cluster import LocalCluster
from resplit.demo import shipped_store
from resplit.server import NATS
from schemas import subjects
from schemas.audit import AuditKind
from schemas.base import NodeId
from schemas.capacity import HEARTBEAT_IN_PLAN_S, HEARTBEAT_SPARE_S, Capacity
from schemas.codec import decode, encode
from schemas.control import DeployRequest, PlanReply, PlanRequest
from schemas.errors import ResplitError
from schemas.plan import PlanEvent, PlanPhase
from schemas.roster import ROSTER_TYPE, Member, spelled
from schemas.signed import key_id, sign

NODES = (100, 1000, 3000, 10_000)
SPEAKER = NodeId("speaker")
"""Whose login may publish every node's heartbeats; it runs nothing."""
AGENTS = 3
IN_PLANS = 0.03
SECONDS = 20.0
RATES = (1.0, 0.3)
"""Of what these nodes would send: at the one they are measured, the other is for the slope."""
DECISIONS = 5
SILENCES = 2
KNOWN_S = 900.0
SERVES_S = 60.0
LOST_S = 60.0
ANSWER_S = 30.0
REST_S = 10.0
STILL_S = 3.0
LOOKS = 3
TURN_S = 0.02
BURST = 50
RATE, SENT = "rate", "sent"


def enrolled(keys: Path, count: int) -> list[Ed25519PrivateKey]:
    """Put so many synthetic nodes into the roster of a cluster, all at once; the keys with which they sign."""
    now = datetime.now(UTC)
    cluster = open_cluster(keys / CLUSTER)
    root = load_holder(keys / CLUSTER / "root-0.key").signing
    signing = [Ed25519PrivateKey.generate() for _ in range(count)]
    members = tuple(
        Member(
            name=name_of(number),
            role="agent",
            tier="edge",
            signing=spelled(key.public_key()),
            sealing=spelled(X25519PrivateKey.generate().public_key()),
            bus=public_nkey(nkey_seed(number.to_bytes(SEED_BYTES, "big"))),
            link=sha256(name_of(number).encode()).hexdigest(),
            not_before=now - timedelta(hours=1),
            not_after=now + timedelta(days=1),
        )
        for number, key in enumerate(signing)
    )
    roster = next_roster(cluster, cluster.root, (*cluster.roster.members, *members), cluster.roster.policy, now)
    data = sign(roster, ROSTER_TYPE, {key_id(root.public_key()): root})
    for folder in keys.iterdir():
        write_durably(folder / ROSTER, data, PUBLIC)
    # The server lets in those that connect: it need not know ten thousand logins that nobody uses.
    logins = keys / CLUSTER / LOGINS_FILE
    own, all_ = f'"{subjects.capacity(SPEAKER)}"', f'"{subjects.ALL_CAPACITY}"'
    said = logins.read_text()
    assert own in said, "an agent may publish its own heartbeat"
    logins.write_text(said.replace(own, all_))
    return signing


def name_of(number: int) -> NodeId:
    return NodeId(f"s{number}")


# The generator, in a process of its own.


async def speak(url: str, keys: Path, folder: Path) -> None:
    """Publish heartbeats of all nodes until ended, as fast as the file `rate` says; `sent` says how many so far."""
    identity = load_identity(keys, SPEAKER)
    template = decode(Capacity, (folder / "capacity.json").read_bytes(), "capacity")
    raw = (folder / "signing.keys").read_bytes()
    nodes = [_node(identity, template, i, raw[32 * i : 32 * (i + 1)]) for i in range(len(raw) // 32)]
    often = round(IN_PLANS * len(nodes))
    due = [(i / max(1, often)) * HEARTBEAT_IN_PLAN_S for i in range(often)]
    due += [i / max(1, len(nodes) - often) * HEARTBEAT_SPARE_S for i in range(len(nodes) - often)]
    client = await connect(url, "speaker", credentials=load_credentials(keys))
    sent, clock, before = 0, 0.0, time.monotonic()
    queue = [(at, i) for i, at in enumerate(due)]
    heapq.heapify(queue)
    while True:
        rate, now = float((folder / RATE).read_text()), time.monotonic()
        clock, before = clock + rate * (now - before), now
        for _ in range(BURST):
            at, i = queue[0]
            if at > clock:
                break
            who, capacity = nodes[i]
            capacity = capacity.model_copy(update={"sequence": capacity.sequence + 1, "issued_at": datetime.now(UTC)})
            nodes[i] = (who, capacity)
            await client.publish(subjects.capacity(who.name), seal_heartbeat(capacity, lambda _: (), who))
            sent += 1
            heapq.heapreplace(queue, (at + (HEARTBEAT_IN_PLAN_S if i < often else HEARTBEAT_SPARE_S), i))
        _put(folder / SENT, f"{sent} {max(0.0, clock - queue[0][0])}")
        await asyncio.sleep(TURN_S if queue[0][0] > clock else 0)


def _put(path: Path, text: str) -> None:
    """Write a small file that another process reads, whole."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.rename(path)


def _node(identity: Identity, template: Capacity, number: int, raw: bytes) -> tuple[Identity, Capacity]:
    """One node as it signs, and what it says; whom it believes it shares with the others."""
    name = name_of(number)
    who = copy.copy(identity)
    who.name, who.key = name, Ed25519PrivateKey.from_private_bytes(raw)
    more = {"node": name, "boot": f"{number:016x}", "sequence": 0, "link": None, "machine": name}
    return who, template.model_copy(update=more)


# What is measured.


@dataclass(frozen=True)
class Spent:
    """What processes took of the processor between two moments."""

    seconds: float
    heartbeats: float
    behind_s: float
    """How late the generator was in the end."""
    cpu_s: dict[str, float]


async def level(count: int, seconds: float, folder: Path, store: Path) -> Row:
    """A cluster of three agents that hears of so many more."""
    keys = folder / "keys"
    make_members(keys, [NodeId(f"n{i}") for i in range(AGENTS)] + [SPEAKER], hosts=["127.0.0.1"])
    began = time.perf_counter()
    signing = enrolled(keys, count)
    enrolled_s = time.perf_counter() - began
    async with AsyncExitStack() as stack:
        cluster = await stack.enter_async_context(LocalCluster(folder, store, AGENTS, threads=1))
        connection = await cluster.operator.connect("resplit-bench", "operator")
        stack.push_async_callback(connection.close)
        ear = Ear(load_identity(cluster.keys / ORCHESTRATOR, ORCHESTRATOR))
        await ear.listen(connection)
        request = DeployRequest(name=DEPLOYMENT, model=DEPLOYMENT, settings=SETTINGS, stages=2, sensitive="all")
        await control.deploy_and_wait(cluster.operator, request, SERVES_S)
        status = await control.status_on(connection)
        capacity = next(node.capacity for node in status.nodes if not node.capacity.stages)
        (folder / "capacity.json").write_bytes(encode(capacity.model_copy(update={"links": (), "on_disk": ()})))
        (folder / "signing.keys").write_bytes(b"".join(key.private_bytes_raw() for key in signing))
        speaker = Child(
            SPEAKER,
            [sys.executable, "-m", "benchmarks.control_plane", "--speak", cluster.url, str(folder)],
            folder / "speaker.log",
        )
        _put(folder / RATE, str(RATES[0]))
        stack.push_async_callback(speaker.kill)
        known_s = await _known(ear, speaker, count)
        print(f"{count:,} nodes are known after {known_s:.1f} s", flush=True)
        spent = []
        for rate in RATES:
            _put(folder / RATE, str(rate))
            await asyncio.sleep(STILL_S)
            spent.append(await _spent(cluster, speaker, folder, seconds))
        _put(folder / RATE, str(RATES[0]))
        print(f"{spent}", flush=True)
        lost = [await _silence(cluster, ear) for _ in range(SILENCES)]
        print(f"lost, planned: {lost}", flush=True)
        asked = [await _timed(_planned(connection)) for _ in range(DECISIONS)]
        seen = [await _timed(control.status_on(connection)) for _ in range(LOOKS)]
        memory = {name: psutil.Process(pid).memory_info().rss for name, pid in cluster.processes.items()}
    return _row(count, spent, lost, asked, seen, memory, enrolled_s, known_s)


async def _known(ear: Ear, speaker: Child, count: int) -> float:
    """Wait until the orchestrator has taken in that so many nodes are there; for how long."""
    began = time.monotonic()
    await speaker.start()
    async with asyncio.timeout(KNOWN_S):
        while sum(event.kind is AuditKind.NODE_JOINED for _, event in ear.audit) < count:
            assert speaker.pid is not None, speaker.tail()
            await asyncio.sleep(0.2)
    return time.monotonic() - began


async def _spent(cluster: LocalCluster, speaker: Child, folder: Path, seconds: float) -> Spent:
    assert speaker.pid is not None, speaker.tail()
    pids = {**cluster.processes, SPEAKER: speaker.pid}
    before, sent, at = {name: _cpu_s(pid) for name, pid in pids.items()}, _sent(folder)[0], time.monotonic()
    await asyncio.sleep(seconds)
    took = time.monotonic() - at
    after, (now_sent, behind_s) = {name: _cpu_s(pid) for name, pid in pids.items()}, _sent(folder)
    return Spent(took, now_sent - sent, behind_s, {name: after[name] - before[name] for name in pids})


def _cpu_s(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def _sent(folder: Path) -> tuple[float, float]:
    sent, behind_s = (folder / SENT).read_text().split()
    return float(sent), float(behind_s)


async def _silence(cluster: LocalCluster, ear: Ear) -> tuple[float, float]:
    """Stop the node of the last stage: until it is called lost, and until a plan without it is in force."""
    plans = [word for _, word in ear.heard if isinstance(word, PlanEvent) and word.current is not None]
    current = plans[-1].current
    assert current is not None
    node = current.routes[0].stages[-1].node
    ear.audit.clear()
    at = time.monotonic()
    await cluster.pause(node)
    try:
        planned, _ = await ear.wait(
            lambda word: (
                isinstance(word, PlanEvent)
                and word.phase is PlanPhase.COMMIT
                and word.current is not None
                and node not in word.current.nodes
            ),
            at,
            LOST_S,
        )
    finally:
        await cluster.resume(node)
    lost = next(when for when, event in ear.audit if event.kind is AuditKind.NODE_LOST and event.fields["node"] == node)
    await asyncio.sleep(REST_S)
    return lost - at, planned - at


async def _planned(connection: Nats) -> PlanReply:
    """What the orchestrator would do now."""
    body = encode(PlanRequest(name=DEPLOYMENT))
    message = await connection.request(subjects.control("plan"), body, timeout=ANSWER_S)
    return control.read_reply(message.data, PlanReply)


async def _timed(asked: Awaitable[object]) -> float | None:
    """Seconds until an answer; None where there was none."""
    began = time.perf_counter()
    try:
        await asked
    except ResplitError as error:
        print(f"no answer: {error.message}", flush=True)
        return None
    return time.perf_counter() - began


def _row(
    count: int,
    spent: Sequence[Spent],
    lost: Sequence[tuple[float, float]],
    asked: Sequence[float | None],
    seen: Sequence[float | None],
    memory: dict[str, int],
    enrolled_s: float,
    known_s: float,
) -> Row:
    full, less = spent
    row: Row = {
        "name": f"{count:,} nodes",
        "nodes": count,
        "heartbeats_per_s": round(full.heartbeats / full.seconds, 1),
        "behind_s": round(full.behind_s, 2),
    }
    for who, name in (("orchestrator", ORCHESTRATOR), ("agent", "n2"), ("nats", NATS), ("generator", SPEAKER)):
        each, base = _line(full, less, name)
        row |= {f"{who}_us": round(1e6 * each), f"{who}_cores": round(full.cpu_s[name] / full.seconds, 3)}
        if who == "orchestrator":
            row["ticks_cores"] = round(base, 3)
    for what, found in (("decision", asked), ("status", seen)):
        times = [one for one in found if one is not None]
        row[f"{what}_failed"] = len(found) - len(times)
        for share in (0.5, 0.95):
            row[f"{what}_p{100 * share:.0f}_ms"] = round(1e3 * quantile(times, share), 1) if times else None
    return {
        **row,
        "lost_s": round(statistics.median(one for one, _ in lost), 2),
        "planned_s": round(statistics.median(one for _, one in lost), 2),
        "orchestrator_mb": round(memory[ORCHESTRATOR] / 1e6),
        "agent_mb": round(memory["n2"] / 1e6),
        "enrolled_s": round(enrolled_s, 2),
        "known_s": round(known_s, 1),
    }


def _line(full: Spent, less: Spent, name: str) -> tuple[float, float]:
    """Seconds of the processor for a heartbeat, and for a second without any."""
    rates = [one.heartbeats / one.seconds for one in (full, less)]
    cores = [one.cpu_s[name] / one.seconds for one in (full, less)]
    each = (cores[0] - cores[1]) / (rates[0] - rates[1])
    return each, cores[0] - each * rates[0]


async def measure(counts: Sequence[int], seconds: float) -> list[Row]:
    rows = []
    for count in counts:
        with tempfile.TemporaryDirectory(prefix="resplit-control-") as scratch:
            store = Path(shutil.copytree(shipped_store(), Path(scratch) / "store"))
            rows.append(await level(count, seconds, Path(scratch) / "cluster", store))
            print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--nodes", nargs="+", type=int, default=NODES, metavar="N", help="synthetic ones, a run for each"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"at each rate ({SECONDS:g})")
    parser.add_argument("--speak", nargs=2, metavar=("URL", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.speak is not None:
        url, folder = given.speak[0], Path(given.speak[1])
        asyncio.run(speak(url, folder / "keys" / SPEAKER, folder))
        return
    rows = asyncio.run(measure(given.nodes, given.seconds))
    report(
        "control_plane",
        f"an orchestrator that hears up to {max(given.nodes):,} nodes, {IN_PLANS:.0%} of them every second",
        rows,
        load_average=os.getloadavg(),
    )


if __name__ == "__main__":
    main()
