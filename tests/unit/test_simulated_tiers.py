"""Worlds of two tiers: what is drawn is the same whoever decides, queues do what they are told, costs add up, and each
contender keeps to its rule."""

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from math import isclose, log

import numpy as np
import pytest

from orchestrator.services.core import Placed, load_of
from orchestrator.services.problem import SOURCE, Setting
from profiler.effective_capacity import GammaService
from schemas.base import NodeId
from simulator.contest import ContestJob
from simulator.files import read, shipped
from simulator.kernel import Kernel
from simulator.tiers.contenders import at_load, backbone
from simulator.tiers.drawn import Drawn, Request, drawn, requests, trace_hash, with_cloud
from simulator.tiers.paper import COPIES, behind, delay_ms
from simulator.tiers.paper import backbone as paper_backbone
from simulator.tiers.queues import SharedPool, SteadyPool
from simulator.tiers.results import BOUND, KNOWN, SYSTEM, run_one
from simulator.tiers.scenario import BurstSpec, TwoTierScenario
from simulator.tiers.world import Going, Seen, TierWorld


def table_one() -> TwoTierScenario:
    found = read(shipped()["two-tier"])
    assert isinstance(found, TwoTierScenario)
    return found


SCENARIO = table_one()
SHORT = SCENARIO.model_copy(update={"slots": 60, "warmup_slots": 20})


# What is drawn


def test_a_seed_draws_one_world_within_the_ranges_and_another_seed_another() -> None:
    one, same, other = (drawn(SCENARIO, seed) for seed in (3, 3, 4))
    assert one == same
    assert one.setting != other.setting
    assert len(one.setting.hosts) == 10 and len(one.users) == 7
    for kind in one.setting.services.values():
        tier = SCENARIO.core if kind.is_core else SCENARIO.light
        assert tier.work[0] <= kind.work <= tier.work[1]
        assert tier.output[0] <= kind.output <= tier.output[1]
    for user in one.users:
        total = sum(stream.per_slot for stream in one.setting.streams if stream.at == user.at)
        assert SCENARIO.arrivals[0] <= total <= SCENARIO.arrivals[1]


def test_as_much_comes_as_was_said_and_twice_of_it_at_twice_the_load() -> None:
    long = SCENARIO.model_copy(update={"slots": 4000})
    world = drawn(long, 1)
    expected = sum(stream.per_slot for stream in world.setting.streams) * 4100
    for load in (1.0, 2.0):
        sent = requests(long, world, load, 1)
        assert abs(len(sent) / expected - load) < 0.05 * load
        assert [one.sent_ms for one in sent] == sorted(one.sent_ms for one in sent)
    assert trace_hash(requests(long, world, 1.0, 1)) == trace_hash(requests(long, world, 1.0, 1))


def test_the_way_from_a_user_is_as_old_as_its_quantiles_say() -> None:
    world = drawn(SCENARIO, 2)
    stream = max(world.setting.streams, key=lambda one: one.per_slot)
    long = SCENARIO.model_copy(update={"slots": 20_000})
    ages = [one.age_ms for one in requests(long, world, 1.0, 2) if (one.task, one.at) == (stream.task, stream.at)]
    assert isclose(float(np.median(ages)), float(np.median(stream.ages_ms)), rel_tol=0.1)


def test_bursts_keep_the_mean_and_make_slots_uneven() -> None:
    long = SCENARIO.model_copy(update={"slots": 30_000, "bursts": BurstSpec(factor=3.0, share=0.2, slots=50.0)})
    world = drawn(long, 5)
    expected = sum(stream.per_slot for stream in world.setting.streams) * 30_100
    sent = requests(long, world, 1.0, 5)
    assert abs(len(sent) / expected - 1.0) < 0.1
    counts = np.bincount([int(one.sent_ms) // 50 for one in sent])
    assert counts.var() > 2.0 * counts.mean()


# Queues


def test_one_instance_takes_one_request_after_another_and_two_take_two() -> None:
    for count, ends, then in ((1, [2.0, 4.0, 6.0], 8.0), (2, [2.0, 2.0, 4.0], 4.0)):
        kernel, done = Kernel(), list[float]()
        pool = SteadyPool(kernel, count, 2.0, lambda _, k=kernel, d=done: d.append(k.now))  # type: ignore[misc]
        for job in range(3):
            pool.put(job)
        assert (pool.done_ms(0.0), pool.done_ms(9.0)) == (then, 11.0)
        kernel.run(100.0)
        assert done == ends


def test_instances_that_share_do_in_each_slot_what_was_drawn_and_one_that_goes_ends_what_it_has() -> None:
    kernel, done = Kernel(), list[tuple[object, float]]()
    pool = SharedPool(kernel, 1.0, 3.0, lambda number, slot: 1.0 + slot, lambda job: done.append((job, kernel.now)))
    pool.resize(1)
    for job in "ab":
        pool.put(job)  # 1 MB in slot 0, 2 in slot 1: the first ends at 2; then 3 in slot 2
    assert pool.done_ms(0.0) == pytest.approx(3.75)
    kernel.run(1.5)
    pool.resize(2)  # twice as fast: 1 MB of the first is left at 1.5 and takes a quarter of a slot
    kernel.run(1.9)
    pool.resize(0)
    assert pool.count == 1, "until nothing waits"
    kernel.run(10.0)
    assert [job for job, _ in done] == ["a", "b"]
    assert done[0][1] == pytest.approx(1.75)
    # 0.15 slots of 4 MB, 0.1 of 2, and the rest of 2.2 at 3.
    assert done[1][1] == pytest.approx(2.0 + 2.2 / 3.0)
    assert pool.count == 0


# Runs


class Fixed:
    """Instances where they are told to be, and requests to the first of them."""

    every_slots = 1

    def __init__(self, core: Placed, by_slot: Mapping[int, Placed]) -> None:
        self.core, self._by_slot = core, by_slot
        self._now: Placed = {}

    def slot(self, seen: Seen) -> Placed:
        self._now = dict(self._by_slot.get(seen.slot, self._now))
        return self._now

    def host(self, world: TierWorld, going: Going, service: str, inputs: Mapping[str, NodeId]) -> NodeId | None:
        return min(world.hosts[service])


def small() -> tuple[Drawn, Setting]:
    world = drawn(SHORT, 0)
    return world, world.setting


def everything(setting: Setting, node: str, core: bool) -> dict[tuple[NodeId, str], int]:
    return {(NodeId(node), name): 1 for name, kind in setting.services.items() if kind.is_core is core}


def test_a_request_takes_its_ways_and_its_work_and_no_longer_where_nothing_waits() -> None:
    world, setting = small()
    steady = {name: GammaService(1e9, kind.rate / 1e9) for name, kind in setting.services.items()}
    world = replace(world, speeds=replace(world.speeds, one={**world.speeds.one, **steady}))
    node = NodeId("server-0")
    request = Request(0, 5.0, "driving", NodeId("device-1"), 1.5)
    contender = Fixed(everything(setting, node, True), {0: everything(setting, node, False)})
    run = TierWorld(world, [request], contender, 0)
    run.run(0, 60, 200)
    task, at = setting.tasks["driving"], {SOURCE: 6.5 + setting.ways.ms(0.0, request.at, request.at)}
    for name in task.order:
        way = setting.ways.ms(task.input, request.at, node) if SOURCE in task.after[name] else 0.0
        at[name] = max(at[each] for each in task.after[name]) + way + setting.services[name].mean_ms
    # Both of what the user sends come to one node at once; neither waits for the other.
    [going] = run.all
    assert going.done_ms == pytest.approx(at[task.last[0]], rel=1e-6)


def test_what_is_paid_is_what_is_kept_and_what_is_made() -> None:
    world, setting = small()
    light = everything(setting, "server-1", False)
    contender = Fixed(everything(setting, "server-0", True), {0: {}, 30: light, 50: {}})
    went = TierWorld(world, [], contender, 0).run(20, 60, 10)
    count, kept, made = len(light), SHORT.light.keep_cost, SHORT.light.deploy_cost
    assert went.light_cost == pytest.approx((20 * count * kept + count * made) / 60)
    assert went.deployed == count
    cores = len(contender.core)
    assert went.core_cost == pytest.approx(cores * (SHORT.core.keep_cost + SHORT.core.deploy_cost / 60))


def test_what_was_sent_to_an_instance_that_is_gone_goes_on_from_there() -> None:
    world, setting = small()
    sent = requests(SHORT, world, 1.0, 0)
    core = backbone(setting, world.speeds)
    here, there = (everything(setting, node, False) for node in ("server-0", "server-1"))
    moves = {slot: here if slot // 5 % 2 else there for slot in range(0, 400, 5)}
    went = TierWorld(world, sent, Fixed(core, moves), 0).run(20, 60, 300)
    assert went.finished == sum(went.arrived.values()) > 50


@pytest.mark.parametrize("name", list(KNOWN))
def test_every_contender_serves_the_world_and_keeps_within_what_nodes_have(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    def checked(self: TierWorld, wanted: Placed, resize=TierWorld._resize) -> None:  # type: ignore[no-untyped-def]
        nonlocal asked
        asked += 1
        fits(self.setting, {**self.contender.core, **wanted})
        resize(self, wanted)

    monkeypatch.setattr(TierWorld, "_resize", checked)
    found = run_one(ContestJob(SHORT, name, 0, 1.0))
    assert asked
    assert found.finished == sum(found.arrived.values())
    assert found.on_time_percent > 90.0
    assert found.cost > 0.0


def fits(setting: Setting, placed: Placed) -> None:
    for node, host in setting.hosts.items():
        for key, has in host.has.items():
            used = sum(
                count * setting.services[name].needs.get(key, 0.0) for (at, name), count in placed.items() if at == node
            )
            assert used <= has + 1e-6, (node, key)


def test_the_same_world_is_met_by_all_and_who_knows_everything_is_hardly_beaten() -> None:
    runs = {name: run_one(ContestJob(SHORT, name, 1, 2.0)) for name in (SYSTEM, BOUND, "round-robin")}
    assert len({run.trace_hash for run in runs.values()}) == 1
    assert runs[BOUND].on_time_percent >= max(run.on_time_percent for run in runs.values()) - 1.0
    assert run_one(ContestJob(SHORT, SYSTEM, 1, 2.0)).model_dump(exclude={"decide_ms"}) == runs[SYSTEM].model_dump(
        exclude={"decide_ms"}
    )


@pytest.mark.parametrize("name", [SYSTEM, "paper", "round-robin", "genetic"])
def test_a_run_is_the_same_in_every_process(name: str) -> None:
    """Names hash differently in each."""
    code = (
        "from simulator.files import read, shipped\n"
        "from simulator.contest import ContestJob\n"
        "from simulator.tiers.results import run_one\n"
        "short = read(shipped()['two-tier-bursts']).model_copy(update={'slots': 60, 'warmup_slots': 20})\n"
        f"print(run_one(ContestJob(short, {name!r}, 3, 2.0)).model_dump(exclude={{'decide_ms'}}))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1


# The paper's


def test_the_paper_s_core_program_keeps_its_constraints() -> None:
    setting = at_load(drawn(SCENARIO, 3), 2.0).setting
    placed = paper_backbone(setting)
    fits(setting, placed)
    names = [name for name, kind in setting.services.items() if kind.is_core]
    for name in names:
        assert sum(count for (_, each), count in placed.items() if each == name) >= load_of(setting)[name] - 1e-6
    assert len(placed) >= COPIES * len(names)


def test_the_paper_s_delay_is_its_formula() -> None:
    speed, eps = GammaService(1.5, 4.0), 0.2
    found = delay_ms(speed, 1.0, 1.0, 5, eps, uses_capacity=True)
    # EC(theta) = 5 for Gamma(1.5, 4): 1.5 log(1 + 4 theta) / theta.
    theta = next(t for t in np.arange(1e-4, 5.0, 1e-5) if 1.5 * log(1.0 + 4.0 * t) / t <= 5.0)
    assert found == pytest.approx(max(1.0, 5.0 / 6.0, log(5.0 / (6.0 * eps)) / (theta * 5.0)), rel=1e-2)
    assert delay_ms(speed, 1.0, 1.0, 12, eps, uses_capacity=False) == pytest.approx(2.0), "two slots' work"
    assert delay_ms(speed, 1.0, 1.0, 1, eps, uses_capacity=False) == 1.0, "no less than a slot"


def test_what_is_behind_a_service_is_all_that_waits_for_it() -> None:
    task = drawn(SCENARIO, 0).setting.tasks["driving"]
    assert behind(task, "projection") == {"fusion", "reasoning", "steering-head"}


def test_the_cloud_is_as_far_as_the_scenario_says() -> None:
    world = with_cloud(SCENARIO, drawn(SCENARIO, 0))
    assert world.setting.ways.ms(0.0, NodeId("device-0"), NodeId("cloud")) == SCENARIO.cloud_delay_ms
