"""Facts to findings: each fault is found under its name with a remedy, and a healthy cluster has none."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from resplit.diagnosis import Facts, KeyFile, Storage, diagnose
from resplit.examine import STREAMS, key_files
from resplit.view import node_state
from schemas import subjects
from schemas.base import DeploymentName, Digest, NodeId
from schemas.capacity import Capacity, Guidance, LinkEstimate, Provider
from schemas.control import DeploymentStatus, NodeStatus, StatusReply
from schemas.deployment import Settings, Stage
from schemas.errors import ErrorBody, ErrorCode
from schemas.plan import Plan, Route

NOW = datetime(2026, 1, 1, tzinfo=UTC)
A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
GIB = 1 << 30


def node(name: NodeId, *peers: NodeId, age_s: float = 0.5, lost: bool = False, **fields: Any) -> NodeStatus:
    known: dict[str, Any] = {
        "issued_at": NOW - timedelta(seconds=age_s),
        "version": "1",
        "link": f"10.0.0.1:{7410}",
        "provider": Provider(name="cpu", device="d", flops_per_s=1e12, bytes_per_s=1e10),
        "memory_total_bytes": 8 * GIB,
        "memory_free_bytes": 4 * GIB,
        "disk_free_bytes": 50 * GIB,
        "load": 0.3,
        "pressure": 1.0,
        "links": tuple(LinkEstimate(peer=peer, rtt_ms=0.4, direct=True) for peer in peers),
    }
    capacity = Capacity(node=name, boot="one", sequence=1, threads=4, **{**known, **fields})
    return NodeStatus(capacity=capacity, age_s=age_s, lost=lost)


def chat(**fields: Any) -> DeploymentStatus:
    """A deployment over a and b."""
    stages = (Stage(node=A, first=0, last=1), Stage(node=B, first=2, last=3))
    plan = Plan(
        deployment=DeploymentName("chat"),
        model=Digest("1" * 64),
        epoch=3,
        block_count=4,
        settings=Settings(),
        routes=(Route(index=0, source=A, stages=stages, max_sequences=1),),
        reason="-",
    )
    known = {"state": "serving", "current": plan, "draining": (), "ready": (), "applied": (A, B), "revision": 1}
    return DeploymentStatus(name=DeploymentName("chat"), **{**known, **fields})


HEALTHY = Facts(
    url="nats://here",
    at=NOW,
    version="1",
    server="nats-server 2",
    storage=Storage(1000, None, ()),
    status=StatusReply(term=1, nodes=(node(A, B), node(B, A), node(C, age_s=9)), deployments=(chat(),)),
    keys=(KeyFile(Path("k/a.key"), 0o100600, True), KeyFile(Path("k/ca.pem"), 0o100644, False)),
)


def seen(**fields: Any) -> Facts:
    assert HEALTHY.status is not None
    return replace(HEALTHY, status=HEALTHY.status.model_copy(update=fields))


def wrong(facts: Facts, about: NodeId | None = None) -> list[tuple[str, str | None, str]]:
    """(check, about, verdict) of every finding that is not ok; each of them has a remedy, and no other has one."""
    findings = diagnose(facts, about)
    assert all((finding.verdict == "ok") == (finding.remedy is None) for finding in findings)
    return [(f.check, f.about, f.verdict) for f in findings if f.verdict != "ok"]


def fact(facts: Facts, check: str, about: str | None) -> str:
    (found,) = [f.fact for f in diagnose(facts) if (f.check, f.about) == (check, about)]
    return found


def test_a_node_of_the_cloud_is_told_with_its_price_and_trust() -> None:
    rented = node(C, tier="cloud", price_per_hour=0.4).model_copy(update={"trusted": False})
    facts = seen(nodes=(node(A, B), node(B, A), rented))
    assert fact(facts, "tier", C) == "cloud at 0.4 an hour, may hold no sensitive block"
    assert wrong(facts) == []
    free = node(C, tier="cloud").model_copy(update={"trusted": False})
    assert wrong(seen(nodes=(node(A, B), node(B, A), free))) == [("tier", C, "warn")]


def test_nothing_is_wrong_with_a_healthy_cluster() -> None:
    assert wrong(HEALTHY) == []
    checks = {finding.check for finding in diagnose(HEALTHY)}
    assert checks == {
        *("keys", "nats", "jetstream", "orchestrator", "heartbeat", "clock", "memory", "disk", "load"),
        *("provider", "link", "deployment", "versions"),
    }
    assert fact(HEALTHY, "heartbeat", "c") == "heard 9.0 s ago, spare"


NODES: list[tuple[NodeStatus, tuple[str, str | None, str]]] = [
    (node(A, B, age_s=6, lost=True), ("heartbeat", "a", "fail")),
    (node(A, B, age_s=4), ("heartbeat", "a", "warn")),
    (node(A, B, issued_at=NOW + timedelta(seconds=30)), ("clock", "a", "warn")),
    (node(A, B, issued_at=NOW - timedelta(hours=2)), ("clock", "a", "fail")),
    (node(A, B, memory_free_bytes=GIB // 10), ("memory", "a", "warn")),
    (node(A, B, disk_free_bytes=GIB), ("disk", "a", "warn")),
    (node(A, B, disk_free_bytes=GIB // 8), ("disk", "a", "fail")),
    (node(A, B, load=1.0), ("load", "a", "warn")),
    (node(A, B, pressure=60.0), ("load", "a", "warn")),
    (node(A, B, guidance=Guidance(silent_s=40)), ("guidance", "a", "warn")),
    (node(A, B, guidance=Guidance(withheld=("chat",))), ("guidance", "a", "fail")),
    (node(A, B, guidance=Guidance(silent_s=40, withheld_roster=7)), ("guidance", "a", "fail")),
    (node(A), ("link", "a > b", "warn")),
    (node(A, B, version="0"), ("versions", None, "warn")),
]


@pytest.mark.parametrize(("changed", "expected"), NODES)
def test_each_fault_of_a_node_is_found(changed: NodeStatus, expected: tuple[str, str | None, str]) -> None:
    assert wrong(seen(nodes=(changed, node(B, A)))) == [expected]


def test_what_a_node_does_not_get_is_named() -> None:
    astray = node(A, B, guidance=Guidance(silent_s=40, withheld=("chat", "embed"), withheld_roster=7))
    assert (
        fact(seen(nodes=(astray, node(B, A))), "guidance", "a") == "unguided for 40 s; withheld: chat, embed, roster 7"
    )
    assert node_state(astray, ()) == "up, unguided for 40 s, withheld: chat, embed, roster 7"


def test_a_link_over_the_bus_says_where_the_peer_can_be_reached() -> None:
    over_the_bus = LinkEstimate(peer=B, rtt_ms=9, direct=False)
    facts = seen(nodes=(node(A, links=(over_the_bus,)), node(B, A, link=None)))
    assert wrong(facts) == [("link", "a > b", "warn")]
    assert fact(facts, "link", "a > b").endswith("b gives no address at all")


def test_a_node_that_is_drained_may_be_off_once_no_plan_uses_it() -> None:
    off = node(C, age_s=500, lost=True)
    assert wrong(seen(nodes=(node(A, B), node(B, A), off))) == [("heartbeat", "c", "fail")]
    assert wrong(seen(nodes=(node(A, B), node(B, A), off), drained=(C,))) == []
    assert wrong(seen(nodes=(node(A, B, age_s=9, lost=True), node(B, A)), drained=(A,))) == [("heartbeat", "a", "fail")]


def test_a_node_in_a_plan_that_was_never_heard_is_missed() -> None:
    assert wrong(seen(nodes=(node(A, B),))) == [("heartbeat", "b", "fail")]
    assert wrong(seen(nodes=(), deployments=())) == [("heartbeat", None, "fail")]


DEPLOYMENTS: list[tuple[DeploymentStatus, tuple[str, str | None, str]]] = [
    (chat(state="degraded", reason="lost: b"), ("deployment", "chat", "fail")),
    (chat(state="waiting", current=None), ("deployment", "chat", "fail")),
    (
        chat(state="changing", error=ErrorBody(code=ErrorCode.STAGE_FAILED, message="no")),
        ("deployment", "chat", "warn"),
    ),
    (chat(applied=(A,)), ("deployment", "chat", "warn")),
]


@pytest.mark.parametrize(("changed", "expected"), DEPLOYMENTS)
def test_each_fault_of_a_deployment_is_found(changed: DeploymentStatus, expected: tuple[str, str, str]) -> None:
    assert wrong(seen(deployments=(changed,))) == [expected]


@pytest.mark.parametrize(
    ("facts", "expected"),
    [
        (replace(HEALTHY, server=None, server_fault="no"), ("nats", None, "fail")),
        (replace(HEALTHY, certificate_until=NOW + timedelta(days=29)), ("nats", None, "warn")),
        (replace(HEALTHY, storage=None, storage_fault="off"), ("jetstream", None, "fail")),
        (replace(HEALTHY, storage=Storage(0, None, ("KV_x",))), ("jetstream", None, "fail")),
        (replace(HEALTHY, storage=Storage(85, 100, ())), ("jetstream", None, "warn")),
        (replace(HEALTHY, storage=Storage(0, None, (), 3, ("RESPLIT_AUDIT",))), ("jetstream", None, "warn")),
        (replace(HEALTHY, storage=Storage(96, 100, ())), ("jetstream", None, "fail")),
        (replace(HEALTHY, status=None, status_fault="silent"), ("orchestrator", None, "fail")),
        (replace(HEALTHY, keys=(KeyFile(Path("k/a.key"), None, True),)), ("keys", "a.key", "fail")),
        (replace(HEALTHY, keys=(KeyFile(Path("k/a.key"), 0o100640, True),)), ("keys", "a.key", "fail")),
        (replace(HEALTHY, version="2"), ("versions", None, "warn")),
    ],
)
def test_each_fault_beneath_the_nodes_is_found(facts: Facts, expected: tuple[str, str | None, str]) -> None:
    assert wrong(facts) == [expected]


def test_asked_about_one_node_it_speaks_of_that_node_alone() -> None:
    broken = seen(nodes=(node(A, B, load=1.0), node(B, disk_free_bytes=0), node(C, load=1.0)))
    assert wrong(broken, C) == [("load", "c", "warn")]
    assert wrong(broken, A) == [("load", "a", "warn"), ("link", "b > a", "warn")]
    assert {f.about for f in diagnose(broken, C) if f.check == "deployment"} == set()
    assert wrong(HEALTHY, NodeId("x")) == [("heartbeat", "x", "fail")]


def test_a_gpu_that_its_node_does_not_use_is_mentioned() -> None:
    facts = replace(HEALTHY, idle_gpu="some GPU")
    assert wrong(facts, C) == [("provider", "c", "warn")]


def test_the_key_files_of_a_machine_are_those_of_its_nodes(tmp_path: Path) -> None:
    own = [f"a.{kind}" for kind in ("key", "sealing.key", "nk", "tls.key", "tls.pem")]
    for name in ("known.json", "roster.signed", "ca.pem", *own):
        (tmp_path / name).touch(mode=0o600)
    assert [file.path.name for file in key_files(tmp_path, None) if file.mode is None] == []
    assert sum(file.private for file in key_files(tmp_path, A)) == 5
    missing = [file.path.name for file in key_files(tmp_path, B) if file.mode is None]
    assert sorted(missing) == ["b.key", "b.nk", "b.sealing.key", "b.tls.key", "b.tls.pem"]
    gone = key_files(tmp_path / "nowhere", None)
    assert [file.mode for file in gone] == [None, None, None]


def test_a_doctor_looks_for_everything_that_jetstream_is_to_keep() -> None:
    names = vars(subjects).items()
    streams = {name for key, name in names if key.startswith("STREAM_")}
    buckets = {f"KV_{name}" for key, name in names if key.startswith("BUCKET_")}
    assert set(STREAMS) == streams | buckets
