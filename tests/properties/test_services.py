"""What holds of any placement of services: resources suffice, what is said to be survived is, and in every run what was
late is within its bound."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from orchestrator.services.core import Placed, Rules, load_of, place_core
from orchestrator.services.light import Steering, owed, steer
from orchestrator.services.problem import SOURCE, Host, ServiceKind, Setting, Stream, TaskKind, Ways
from orchestrator.services.routing import Speeds
from profiler.effective_capacity import GammaService, Steady
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

RESOURCES = ("cpu", "memory")


@st.composite
def worlds(draw: st.DrawFn) -> tuple[Setting, Speeds]:
    """Two to five nodes at two sites, alike or not, two core services and three light ones, two tasks; some nodes may
    not have every service, and some services are once on a node."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nodes = [NodeId(f"n{number}") for number in range(draw(st.integers(2, 5)))]
    services, one = {}, dict[str, Steady | GammaService]()
    for name in ("encode", "think", "cut", "join", "say"):
        core = name in ("encode", "think")
        scale = float(rng.uniform(2.0, 10.0))
        one[name] = Steady(scale) if core else GammaService(2.0, scale)
        needs = {key: float(rng.uniform(0.5, 3.0)) for key in RESOURCES}
        work = float(rng.uniform(0.5, 4.0))
        limits: dict[str, Any] = {}
        if rng.random() < 0.3:
            limits = {"most": 1.0, "nodes": frozenset(node for node in nodes if rng.random() < 0.8)}
        services[name] = ServiceKind(
            name, core, needs, work, 0.5, one[name].mean, keep_cost=1.0, deploy_cost=4.0, **limits
        )
    tasks = {
        "ask": TaskKind("ask", {"cut": (SOURCE,), "think": ("cut",), "say": ("think",)}, 1.0, 20.0),
        "look": TaskKind("look", {"cut": (SOURCE,), "encode": (SOURCE,), "join": ("cut", "encode")}, 1.0, 15.0),
    }
    has = {node: {key: float(rng.uniform(4.0, 20.0)) for key in RESOURCES} for node in nodes}
    speeds = (
        {node: float(rng.uniform(0.5, 2.0)) for node in nodes} if draw(st.booleans()) else dict.fromkeys(nodes, 1.0)
    )
    hosts = {node: Host(node, f"site-{number % 2}", has[node], 0.05, speeds[node]) for number, node in enumerate(nodes)}
    pairs = {(a, b): float(rng.uniform(0.2, 2.0)) for a in nodes for b in nodes if a != b and rng.random() < 0.9}
    streams = tuple(
        Stream(task, node, float(rng.uniform(0.01, 0.8))) for task in tasks for node in nodes if rng.random() < 0.7
    )
    assume(streams)
    return Setting(services, tasks, hosts, Ways(pairs), streams), Speeds(1.0, one)


def rules_of(setting: Setting, speeds: Speeds, survives_site: bool) -> Rules:
    capacity = {name: 0.7 * speeds.one[name].mean / kind.work for name, kind in setting.services.items()}
    return Rules(capacity, {"think": 2}, survives_node=True, survives_site=survives_site, reserve=0.1)


def assert_fits(setting: Setting, placed: Placed, share: float = 1.0) -> None:
    for (node, name), count in placed.items():
        assert 0 < count <= setting.services[name].most
        assert setting.services[name].may_be_at(node)
    for node, host in setting.hosts.items():
        for key, has in host.has.items():
            counts = ((count, setting.services[name]) for (at, name), count in placed.items() if at == node)
            assert sum(count * kind.needs[key] for count, kind in counts) <= share * has + 1e-6


@given(worlds(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_a_core_placement_fits_and_survives_every_failure_that_it_was_to_survive(
    world: tuple[Setting, Speeds], survives_site: bool
) -> None:
    setting, speeds = world
    rules = rules_of(setting, speeds, survives_site)
    try:
        found = place_core(setting, rules)
    except ResplitError as error:
        assert error.code is ErrorCode.INFEASIBLE
        return
    assert found.is_optimal
    assert_fits(setting, found.placed, 0.9)
    lost = [frozenset[NodeId](), *(frozenset({node}) for node in setting.hosts)]
    if survives_site:
        sites = {host.site for host in setting.hosts.values()}
        lost += [frozenset(node for node, host in setting.hosts.items() if host.site == site) for site in sites]
    for name, load in load_of(setting).items():
        if not setting.services[name].is_core or not load:
            continue
        for away in lost:
            left = sum(
                count * setting.hosts[at].speed
                for (at, each), count in found.placed.items()
                if each == name and at not in away
            )
            assert left * rules.capacity[name] >= load - 1e-6, (name, away)
    assert len([at for at, name in found.placed if name == "think"]) >= 2
    assert place_core(setting, replace(rules, before=found.placed)).placed == found.placed, "nothing speaks for a move"


@given(worlds(), st.lists(st.floats(0.0, 50.0), min_size=1, max_size=4), st.floats(0.001, 2.0))
@settings(deadline=None, max_examples=60)
def test_light_instances_fit_beside_the_core_whatever_is_owed(
    world: tuple[Setting, Speeds], debts: list[float], cost_weight: float
) -> None:
    setting, speeds = world
    rules = Rules(rules_of(setting, speeds, False).capacity, {}, survives_node=False)
    try:
        core = place_core(setting, rules).placed
    except ResplitError:
        assume(False)
    steering = Steering(dict.fromkeys(setting.tasks, 0.05), cost_weight=cost_weight)
    before: Placed = {}
    known = None
    for debt in debts:
        found = steer(setting, speeds, steering, dict.fromkeys(setting.tasks, debt), core, before, known)
        assert_fits(setting, found.placed)
        assert {place: found.placed[place] for place in core} == core, "the core stays where it is"
        for stream, route in found.routes.items():
            assert route.keys() <= setting.tasks[stream.task].after.keys()
            assert all(found.placed.get((node, name), 0) > 0 for name, node in route.items())
        assert all(0.0 <= share <= 1.0 for share in found.late.values())
        before = {place: count for place, count in found.placed.items() if place not in core}
        known = found.known


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 50)), max_size=60), st.floats(0.0, 1.0))
def test_in_any_run_what_was_late_is_at_most_what_may_be_and_the_debt(slots: list[tuple[int, int]], eps: float) -> None:
    debts: Mapping[str, float] = {}
    arrived = missed = 0
    for came, over in slots:
        late = min(came, over)
        arrived, missed = arrived + came, missed + late
        debts = owed(debts, {"ask": eps}, {"ask": came}, {"ask": late})
    assert missed <= eps * arrived + debts.get("ask", 0.0) + 1e-6
    assert debts.get("ask", 0.0) >= 0.0
