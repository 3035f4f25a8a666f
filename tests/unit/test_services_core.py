"""Core services are placed at the least cost, and what the program promises of failures holds."""

from collections import Counter
from dataclasses import replace

import pytest

from orchestrator.services.core import CorePlacement, Rules, load_of, place_core
from orchestrator.services.problem import SOURCE, Host, ServiceKind, Setting, Stream, TaskKind, Ways
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

NODES = tuple(NodeId(f"n{number}") for number in range(4))


def service(name: str, needs: float = 1.0, *, is_core: bool = True, keep: float = 1.0) -> ServiceKind:
    return ServiceKind(name, is_core, {"memory": needs}, work=4.0, output=1.0, rate=2.0, keep_cost=keep)


TASK = TaskKind("ask", {"encode": (SOURCE,), "head": ("encode",)}, input=1.0, deadline_ms=100.0)


def setting(memory: float = 4.0, per_slot: float = 6.0) -> Setting:
    """Four nodes at two sites; requests come in at the first."""
    hosts = {node: Host(node, f"site-{i // 2}", {"memory": memory}) for i, node in enumerate(NODES)}
    pairs = {(a, b): 1.0 for a in NODES for b in NODES}
    delays = {(a, b): 0.0 if hosts[a].site == hosts[b].site else 10.0 for a, b in pairs}
    services = {"encode": service("encode"), "head": service("head", is_core=False)}
    return Setting(services, {"ask": TASK}, hosts, Ways(pairs, delays), (Stream("ask", NODES[0], per_slot),))


def rules(**changes: object) -> Rules:
    return replace(Rules({"encode": 2.0, "head": 2.0}, {}, survives_node=False, reserve=0.0), **changes)  # type: ignore[arg-type]


def nodes_of(found: CorePlacement, name: str) -> Counter[NodeId]:
    return Counter({node: count for (node, of), count in found.placed.items() if of == name})


def test_as_many_instances_as_the_load_takes_where_requests_reach_them_soonest() -> None:
    found = place_core(setting(), rules(latency_cost=0.1))
    assert found.is_optimal
    assert nodes_of(found, "encode") == {NODES[0]: 3}, "light services are not placed here"
    assert load_of(setting()) == {"encode": 6.0, "head": 6.0}
    small = place_core(setting(memory=1.0), rules(latency_cost=0.1))
    assert set(nodes_of(small, "encode")) > {NODES[0], NODES[1]}, "the site where they come in is full"


def test_what_is_left_after_any_node_or_site_has_failed_does_the_work() -> None:
    whole = setting()
    of_node = nodes_of(place_core(whole, rules(survives_node=True)), "encode")
    of_site = nodes_of(place_core(whole, rules(survives_node=True, survives_site=True)), "encode")
    for lost in NODES:
        assert sum(count for node, count in of_node.items() if node != lost) >= 3
    for site in ("site-0", "site-1"):
        assert sum(count for node, count in of_site.items() if whole.hosts[node].site != site) >= 3
    assert sum(of_node.values()) == 4, "and no more than that takes"


def test_a_service_is_on_as_many_nodes_and_as_seldom_away_as_is_asked() -> None:
    assert len(nodes_of(place_core(setting(per_slot=1.0), rules(replicas={"encode": 3})), "encode")) == 3
    failing = {node: replace(host, fails=0.1) for node, host in setting().hosts.items()}
    found = place_core(replace(setting(per_slot=1.0), hosts=failing), rules(away_share=0.0011))
    assert len(nodes_of(found, "encode")) == 3


def test_a_share_of_each_node_is_left_for_light_services() -> None:
    found = place_core(setting(memory=2.0), rules(reserve=0.5))
    assert max(nodes_of(found, "encode").values()) == 1
    assert sum(nodes_of(found, "encode").values()) == 3


@pytest.mark.parametrize(
    ("memory", "asked", "why"),
    [
        (1.0, {"survives_node": True, "survives_site": True}, "the loss of a whole site"),
        (0.9, {}, "'encode' alone, with 6 requests a slot"),
        (1.0, {"replicas": {"encode": 5}}, "how many nodes are to have a service"),
        (1.0, {"reserve": 0.2}, "what is kept for light services"),
    ],
)
def test_a_rule_that_cannot_be_kept_is_named(memory: float, asked: dict[str, object], why: str) -> None:
    with pytest.raises(ResplitError, match=why) as caught:
        place_core(setting(memory), rules(**asked))
    assert caught.value.code is ErrorCode.INFEASIBLE


def test_an_instance_that_does_nothing_is_refused() -> None:
    with pytest.raises(ResplitError, match="'encode' does 0 requests a slot") as caught:
        place_core(setting(), rules(capacity={"encode": 0.0}))
    assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, "capacity")


@pytest.mark.parametrize(
    ("after", "why"),
    [({"a": ("b",), "b": ("a",)}, "goes round in a ring"), ({"a": ("c",)}, "waits for 'c', which it does not use")],
)
def test_a_task_that_cannot_be_done_is_none(after: dict[str, tuple[str, ...]], why: str) -> None:
    with pytest.raises(ResplitError, match=why):
        TaskKind("wrong", after, 1.0, 1.0)
