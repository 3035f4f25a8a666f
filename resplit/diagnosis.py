"""PURE: facts about a cluster and this machine, to findings: what was looked at, how it stands, what to do about it."""

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from pathlib import Path
from typing import Literal

from resplit.output import size
from resplit.view import astray, led, remarks
from schemas.base import NodeId
from schemas.capacity import HEARTBEAT_IN_PLAN_S, HEARTBEAT_SPARE_S
from schemas.control import DeploymentStatus, NodeStatus, StatusReply

CERTIFICATE_SOON = timedelta(days=30)
CLOCK_WARN_S = 2.0
CLOCK_FAIL_S = 3600.0
"""Nothing is ordered by clocks, but links need certificates that are valid, and new ones begin an hour back."""
DISK_WARN_BYTES = 2 << 30
DISK_FAIL_BYTES = 256 << 20
"""Less than one block of a model of some size: what a plan asks for cannot be fetched."""
MEMORY_WARN_SHARE = 0.02
LOAD_WARN = 0.95
PRESSURE_WARN_PERCENT = 40.0
STORAGE_WARN_SHARE, STORAGE_FAIL_SHARE = 0.8, 0.95
NO_NODES = (
    "start agents with `resplit agent`; where they run, the orchestrator may not know of them yet: "
    "`resplit roster publish` tells everybody who was enrolled"
)

Verdict = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    about: str | None
    """The node, deployment or file, where there are several of them."""
    verdict: Verdict
    fact: str
    remedy: str | None = None


@dataclass(frozen=True)
class Storage:
    """JetStream as the account of this connection sees it."""

    used_bytes: int
    limit_bytes: int | None
    """None: the account has no limit of its own; the server's disk and configuration have."""
    missing: tuple[str, ...]
    """Streams of Resplit's that are not there."""
    servers: int = 1
    """That there are, as the one that answers says."""
    kept_less: tuple[str, ...] = ()
    """Streams that fewer of them keep than could."""


@dataclass(frozen=True)
class KeyFile:
    """A file of a key folder and its permission bits, None where it is missing."""

    path: Path
    mode: int | None
    private: bool


@dataclass(frozen=True)
class Facts:
    """What was found out, each part or why it could not be."""

    url: str
    at: datetime
    version: str
    server: str | None = None
    server_fault: str | None = None
    certificate_until: datetime | None = None
    """When the server's certificate ends."""
    storage: Storage | None = None
    storage_fault: str | None = None
    status: StatusReply | None = None
    status_fault: str | None = None
    login_fault: str | None = None
    keys: tuple[KeyFile, ...] = ()
    idle_gpu: str | None = None
    """This machine's GPU, where the node asked about runs here; whether it is used is the question."""


def diagnose(facts: Facts, node: NodeId | None = None) -> tuple[Finding, ...]:
    """Every finding, about the whole cluster or about `node` and what it is part of, from the ground up.

    What cannot be known for want of something beneath it is left out: its absence was said there.
    """
    return tuple(_findings(facts, node))


def _findings(facts: Facts, node: NodeId | None) -> Iterator[Finding]:
    yield from _keys(facts.keys)
    if facts.login_fault is not None:
        remedy = "give an operator's folder with --keys; after `enroll`, carry logins.conf to the server and reload it"
        yield Finding("login", None, "fail", facts.login_fault, remedy)
        return
    if facts.server is None:
        remedy = "start nats-server, or give its address with --url; look for a firewall between"
        yield Finding("nats", None, "fail", facts.server_fault or f"no server at {facts.url}", remedy)
        return
    yield _server(facts)
    yield _jetstream(facts)
    if facts.status is None:
        remedy = (
            "`systemctl status resplit-orchestrator` and its log; agents serve on without it, nothing is re-planned"
        )
        yield Finding("orchestrator", None, "fail", facts.status_fault or "no answer", remedy)
        return
    status = facts.status
    yield Finding("orchestrator", None, "ok", f"answers: {led(status)}")
    yield from _nodes(status, facts, node)
    yield from _links(status, node)
    yield from _deployments(status, node)
    yield _versions(status, facts.version)


def _server(facts: Facts) -> Finding:
    fact, until = f"{facts.server} at {facts.url}", facts.certificate_until
    if until is None or until - facts.at > CERTIFICATE_SOON:
        return Finding("nats", None, "ok", fact)
    remedy = "`resplit certify` where the root is, carry the certificate and its key to the server, and reload it"
    return Finding("nats", None, "warn", f"{fact}: its certificate ends at {until}, and then nobody connects", remedy)


def _keys(files: tuple[KeyFile, ...]) -> Iterator[Finding]:
    wrong = [finding for file in files if (finding := _key_file(file)) is not None]
    yield from wrong
    if files and not wrong:
        private = sum(file.private for file in files)
        fact = f"{len(files)} files are there, {private} of them private, in {files[0].path.parent}"
        yield Finding("keys", None, "ok", fact)


def _key_file(file: KeyFile) -> Finding | None:
    if file.mode is None:
        remedy = "join again with a bundle of this member (`resplit rotate`, `resplit join`)"
        return Finding("keys", file.path.name, "fail", f"{file.path} is missing or cannot be read", remedy)
    if file.private and stat.S_IMODE(file.mode) & 0o077:
        fact = f"{file.path} has mode {stat.S_IMODE(file.mode):04o}: others may read this private key"
        return Finding("keys", file.path.name, "fail", fact, f"chmod 600 {file.path}")
    return None


def _jetstream(facts: Facts) -> Finding:
    storage = facts.storage
    if storage is None:
        remedy = "start nats-server with JetStream (`jetstream {}` in its configuration, or -js)"
        return Finding("jetstream", None, "fail", facts.storage_fault or "JetStream does not answer", remedy)
    if storage.missing:
        fact = f"not there: {', '.join(storage.missing)}"
        return Finding("jetstream", None, "fail", fact, "start an orchestrator: it makes what is missing")
    if storage.kept_less:
        fact = (
            f"of {storage.servers} servers not all keep {', '.join(storage.kept_less)}: what is lost with one is lost"
        )
        remedy = "an orchestrator sees to that once all servers are there, an archivist to the trail's (`audit spread`)"
        return Finding("jetstream", None, "warn", fact, remedy)
    each = f", on each of {storage.servers} servers" if storage.servers > 1 else ""
    if storage.limit_bytes is None:
        return Finding("jetstream", None, "ok", f"{size(storage.used_bytes)} stored{each}, the account sets no limit")
    share = storage.used_bytes / max(1, storage.limit_bytes)
    fact = f"{size(storage.used_bytes)} of {size(storage.limit_bytes)} stored{each}"
    if share < STORAGE_WARN_SHARE:
        return Finding("jetstream", None, "ok", fact)
    verdict: Verdict = "fail" if share >= STORAGE_FAIL_SHARE else "warn"
    return Finding("jetstream", None, verdict, fact, "raise the limit; what grows is the audit stream")


def _nodes(status: StatusReply, facts: Facts, node: NodeId | None) -> Iterator[Finding]:
    heard = {found.capacity.node for found in status.nodes}
    planned = {name for found in status.deployments for name in _nodes_of(found)}
    wanted = [found for found in status.nodes if node in (None, found.capacity.node)]
    for found in wanted:
        yield from _node(found, status, facts, found.capacity.node in planned)
    remedy = "start its agent; its key must be of this cluster (`resplit events` shows `event_rejected` if it is not)"
    for name in sorted(planned - heard):
        if node in (None, name):
            yield Finding("heartbeat", name, "fail", "is in a plan and was never heard", remedy)
    if node is not None and node not in heard | planned:
        known = ", ".join(sorted(heard)) or "none"
        yield Finding("heartbeat", node, "fail", f"has not reported; the nodes are: {known}", remedy)
    if node is None and not heard:
        yield Finding("heartbeat", None, "fail", "no node has reported", NO_NODES)


def _node(found: NodeStatus, status: StatusReply, facts: Facts, planned: bool) -> Iterator[Finding]:
    capacity, name = found.capacity, found.capacity.node
    drained = name in status.drained
    age = f"heard {found.age_s:.1f} s ago"
    standing = "drained" + (", still in a plan" if planned else "") if drained else "in a plan" if planned else "spare"
    if found.lost and drained and not planned:
        yield Finding("heartbeat", name, "ok", f"{age}; drained, so it may be off")
        return
    if found.lost:
        remedy = f"is the machine on, does it reach NATS? `journalctl -u resplit-agent@{name}`"
        yield Finding("heartbeat", name, "fail", f"lost, {age}", remedy)
        return
    late = found.age_s > 3 * (HEARTBEAT_IN_PLAN_S if planned else HEARTBEAT_SPARE_S)
    remedy = "look at its load and at the network to it"
    yield Finding("heartbeat", name, "warn" if late else "ok", f"{age}, {standing}", remedy if late else None)
    yield from _guidance(found)
    yield from _clock(found, facts.at)
    yield from _tier(found)
    yield from _resources(found)
    if facts.idle_gpu is not None and capacity.provider.name == "cpu":
        fact = f"computes on the CPU while this machine has {facts.idle_gpu}"
        remedy = "run it with --provider cuda: it then says what is missing, often the libraries of '.[cuda]'"
        yield Finding("provider", name, "warn", fact, remedy)
    else:
        yield Finding("provider", name, "ok", f"{capacity.provider.name}, {capacity.provider.device}")


def _guidance(found: NodeStatus) -> Iterator[Finding]:
    """Said only of nodes that something keeps from what is newest."""
    guidance, name = found.capacity.guidance, found.capacity.node
    said = "; ".join(astray(found))
    if guidance is None:
        return
    if guidance.withheld or guidance.withheld_roster is not None:
        remedy = (
            f"`resplit events` says whether {name} refused it (`event_rejected`); if not, who runs NATS keeps it back"
        )
        yield Finding("guidance", name, "fail", said, remedy)
    else:
        remedy = (
            "its login may be of an older release (`resplit roster renew`, reload NATS); else who runs NATS keeps them"
        )
        yield Finding("guidance", name, "warn", f"{said}: it serves on, and hears no beacon of the leader", remedy)


def _clock(found: NodeStatus, at: datetime) -> Iterator[Finding]:
    # A heartbeat says when it was made, and the orchestrator how long ago it came: the difference is the clocks'.
    skew_s = (found.capacity.issued_at - at).total_seconds() + found.age_s
    ahead = "ahead of" if skew_s > 0 else "behind"
    fact = f"{abs(skew_s):.1f} s {ahead} this machine's clock"
    if abs(skew_s) <= CLOCK_WARN_S:
        yield Finding("clock", found.capacity.node, "ok", fact)
        return
    harm = "its links are refused" if abs(skew_s) > CLOCK_FAIL_S else "times in the events mislead"
    verdict: Verdict = "fail" if abs(skew_s) > CLOCK_FAIL_S else "warn"
    yield Finding("clock", found.capacity.node, verdict, f"{fact}; {harm}", "synchronise both with chrony or NTP")


def _tier(found: NodeStatus) -> Iterator[Finding]:
    """Said of nodes that are not simply of the edge and trusted, and of prices that look like a mistake."""
    capacity, name = found.capacity, found.capacity.node
    if capacity.tier == "edge" and found.trusted and not capacity.price_per_hour:
        return
    trust = "may hold sensitive blocks" if found.trusted else "may hold no sensitive block"
    fact = f"{capacity.tier} at {capacity.price_per_hour:g} an hour, {trust}"
    if capacity.tier == "cloud" and not capacity.price_per_hour:
        remedy = "give its --price-per-hour: without one the planner takes it for free"
        yield Finding("tier", name, "warn", fact, remedy)
        return
    yield Finding("tier", name, "ok", fact)


def _resources(found: NodeStatus) -> Iterator[Finding]:
    capacity, name = found.capacity, found.capacity.node
    free, total = capacity.memory_free_bytes, capacity.memory_total_bytes
    fact = f"{size(free)} of {size(total)} free for more blocks"
    if free < MEMORY_WARN_SHARE * total:
        remedy = "another plan finds no room here beside the one that runs: fewer --sequences, or more nodes"
        yield Finding("memory", name, "warn", fact, remedy)
    else:
        yield Finding("memory", name, "ok", fact)
    disk = capacity.disk_free_bytes
    remedy = "make room: blocks that a plan asks for are fetched to this disk"
    verdict: Verdict = "fail" if disk < DISK_FAIL_BYTES else "warn" if disk < DISK_WARN_BYTES else "ok"
    yield Finding("disk", name, verdict, f"{size(disk)} free", None if verdict == "ok" else remedy)
    busy = capacity.load >= LOAD_WARN or (capacity.pressure or 0) >= PRESSURE_WARN_PERCENT
    fact = f"{100 * capacity.load:.0f} % of its cores busy"
    if capacity.pressure is not None:
        fact += f", tasks waited for a core {capacity.pressure:.0f} % of the time"
    remedy = "what else runs there? several agents on one machine need --threads or --cores"
    yield Finding("load", name, "warn" if busy else "ok", fact, remedy if busy else None)


def _links(status: StatusReply, node: NodeId | None) -> Iterator[Finding]:
    here = {found.capacity.node: found for found in status.nodes if not found.lost}
    for source, target in _hops(status):
        if (node is not None and node not in (source, target)) or source not in here or target not in here:
            continue
        estimate = next((one for one in here[source].capacity.links if one.peer == target), None)
        about = f"{source} > {target}"
        if estimate is not None and estimate.direct:
            yield Finding("link", about, "ok", f"direct, {estimate.rtt_ms:.2f} ms there and back")
            continue
        address = here[target].capacity.link or "no address at all"
        fact = f"no direct link (yet): frames go through NATS; {target} gives {address}"
        remedy = f"let {target} --listen on an address that {source} reaches (--advertise behind NAT), open its port"
        yield Finding("link", about, "warn", fact, remedy)


def _hops(status: StatusReply) -> list[tuple[NodeId, NodeId]]:
    """Every (from, to) that frames of a plan in force take: along each route and back to its source."""
    found: set[tuple[NodeId, NodeId]] = set()
    for deployment in status.deployments:
        for route in deployment.current.routes if deployment.current is not None else ():
            way = [route.source, *(stage.node for stage in route.stages), route.source]
            found.update((a, b) for a, b in pairwise(way) if a != b)
    return sorted(found)


def _deployments(status: StatusReply, node: NodeId | None) -> Iterator[Finding]:
    for found in status.deployments:
        if node is None or node in _nodes_of(found):
            yield _deployment(found)


def _deployment(found: DeploymentStatus) -> Finding:
    said = remarks(found)
    fact = found.state if not said else f"{found.state}: {said}"
    if found.state in ("degraded", "waiting"):
        remedy = "bring the node back or add one; or deploy it again with less demanded (`resplit topology unlock`)"
        return Finding("deployment", found.name, "fail", fact, remedy)
    if found.error is not None:
        return Finding("deployment", found.name, "warn", fact, f"`resplit events --deployment {found.name}`")
    if found.current is not None:
        fact += f", epoch {found.current.epoch} on {', '.join(found.current.nodes)}"
        unconfirmed = sorted(set(found.current.nodes) - set(found.applied))
        if unconfirmed and found.state == "serving":
            remedy = "look at the logs of these agents; a restarted one loads its blocks first"
            return Finding("deployment", found.name, "warn", f"{fact}; no word from {', '.join(unconfirmed)}", remedy)
    return Finding("deployment", found.name, "ok", fact)


def _nodes_of(found: DeploymentStatus) -> set[str]:
    plans = (found.current, found.candidate, *found.draining)
    return {node for plan in plans if plan is not None for node in plan.nodes}


def _versions(status: StatusReply, version: str) -> Finding:
    running: dict[str, list[str]] = {version: ["this command"]}
    for found in status.nodes:
        if not found.lost:
            running.setdefault(found.capacity.version, []).append(found.capacity.node)
    if len(running) == 1:
        return Finding("versions", None, "ok", f"{version} everywhere")
    fact = "; ".join(f"{one}: {', '.join(who)}" for one, who in sorted(running.items()))
    return Finding("versions", None, "warn", fact, "bring every machine to one version")
