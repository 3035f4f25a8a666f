"""Worlds of many models: the same requests whoever decides, each of which ends somewhere; rooms that are kept; and
nothing that is in use is ever taken away."""

import os
import subprocess
import sys
from collections.abc import Collection
from itertools import pairwise

import numpy as np
import pytest

from orchestrator.residency.memory import Rule, least_recent
from orchestrator.residency.problem import check
from simulator.contest import ContestJob
from simulator.files import read, shipped
from simulator.residency.contenders import KNOWN
from simulator.residency.drawn import Drawn, Request, drawn, popularity, rates, requests, trace_hash
from simulator.residency.results import BOUND, SYSTEM, run_one
from simulator.residency.scenario import ResidencyScenario
from simulator.residency.world import ResidencyWorld, Seen, Targets


def shipped_scenario() -> ResidencyScenario:
    found = read(shipped()["residency"])
    assert isinstance(found, ResidencyScenario)
    return found


SCENARIO = shipped_scenario()
SMALL = SCENARIO.model_copy(
    update={"servers": 5, "models": 10, "families": 5, "duration_s": 900.0, "warmup_s": 300.0, "drift_s": 400.0}
)


# What is drawn


def test_a_seed_draws_one_world_within_the_ranges_and_another_seed_another() -> None:
    one, same, other = (drawn(SCENARIO, seed) for seed in (3, 3, 4))
    assert one.models == same.models and (one.net_s == same.net_s).all()
    assert one.models != other.models
    for server in one.servers:
        assert SCENARIO.disk_gb[0] <= server.box.disk_bytes / 1e9 <= SCENARIO.disk_gb[1]
        assert SCENARIO.memory_gb[0] <= server.box.memory_bytes / 1e9 <= SCENARIO.memory_gb[1]
    for model in one.models:
        size = sum(one.pieces[piece].disk_bytes for piece in model.pieces) / 1e9
        assert SCENARIO.model_gb[0] - 1e-9 <= size <= SCENARIO.model_gb[1] + 1e-9
    assert (one.net_s == one.net_s.T).all() and (np.diag(one.net_s) == 0.0).all()


def test_models_of_a_family_share_blocks_and_each_but_the_first_has_some_of_its_own() -> None:
    world = drawn(SCENARIO, 1)
    for number, model in enumerate(world.models):
        base = world.models[number % SCENARIO.families]
        own = set(model.pieces) - set(base.pieces)
        assert bool(own) == (number >= SCENARIO.families)
        assert len(own) == sum(piece.startswith(f"m{number}-") for piece in model.pieces)


def test_as_much_is_asked_as_was_said_and_some_models_far_more_often_than_others() -> None:
    world = drawn(SCENARIO, 2)
    asked = requests(SCENARIO, world, 2)
    expected = sum(server.requests_per_s for server in world.servers) * (SCENARIO.duration_s + SCENARIO.warmup_s)
    assert abs(len(asked) / expected - 1.0) < 0.03
    assert [one.at_s for one in asked] == sorted(one.at_s for one in asked)
    shares = popularity(SCENARIO, world.order)
    assert shares.sum(axis=1) == pytest.approx(np.ones(SCENARIO.servers))
    assert (shares.max(axis=1) > 4.0 * np.median(shares, axis=1)).all()
    assert trace_hash(asked) == trace_hash(requests(SCENARIO, world, 2))


def test_popularity_drifts_by_what_was_said_and_stays_where_it_was_said_to() -> None:
    world = drawn(SCENARIO, 2)
    told = rates(SCENARIO, world, 2)
    assert [at_s for at_s, _ in told] == [1200.0 * number for number in range(7)]
    moved = [1.0 - float(np.isclose(one, other).mean()) for (_, one), (_, other) in pairwise(told)]
    assert all(0.1 < share < 0.5 for share in moved), moved
    still = SCENARIO.model_copy(update={"drift_s": None})
    assert len(rates(still, world, 2)) == 1


# What happens


class Told:
    """Says what it was told to, once."""

    uses_servers, loads, admits = True, False, False
    rule: Rule = staticmethod(least_recent)

    def __init__(self, stored: dict[int, tuple[int, ...]], resident: dict[int, tuple[int, ...]]) -> None:
        self._targets: Targets | None = Targets(stored, resident)

    def look(self, seen: Seen) -> Targets:
        told, self._targets = self._targets, None
        return told or Targets()


def asked_at(model: int, *times: float) -> tuple[Request, ...]:
    return tuple(Request(at_s, 0, model, 1.0) for at_s in times)


def fitting(world: Drawn, count: int) -> list[int]:
    """The smallest models."""
    sizes = [sum(world.pieces[piece].memory_bytes for piece in model.pieces) for model in world.models]
    return sorted(range(len(sizes)), key=lambda number: sizes[number])[:count]


def test_a_request_waits_for_its_model_to_be_loaded_and_the_next_one_does_not() -> None:
    world = drawn(SMALL, 3)
    (model,) = fitting(world, 1)
    run = ResidencyWorld(SMALL, world, asked_at(model, 1000.0, 1100.0), Told({0: (model,)}, {}))
    went = run.run()
    work = world.models[model].work_s / world.servers[0].speed
    assert (went.stalls, went.from_memory, went.cloud) == (1, 1, 0)
    assert 2 * went.latency_s == pytest.approx(2 * work + world.load_s[model, 0])
    assert went.serving == pytest.approx(2 * went.latency_s)


def test_what_is_nowhere_goes_to_the_cloud_at_its_price() -> None:
    world = drawn(SMALL, 3)
    went = ResidencyWorld(SMALL, world, asked_at(4, 1000.0), Told({}, {})).run()
    assert (went.asked, went.cloud) == (1, 1)
    assert went.serving == pytest.approx(world.absent[0, 4])
    assert went.latency_s == pytest.approx(world.absent[0, 4] - world.models[4].cloud_price)
    assert went.keeping == went.switching == went.energy == 0.0


def test_what_lies_somewhere_is_paid_for_as_long_as_it_does() -> None:
    world = drawn(SMALL, 3)
    (model,) = fitting(world, 1)
    went = ResidencyWorld(SMALL, world, (), Told({0: (model,)}, {0: (model,)})).run()
    disk, memory = (
        sum(getattr(world.pieces[p], f"{of}_bytes") for p in world.models[model].pieces) for of in ("disk", "memory")
    )
    each = world.prices.disk * disk + world.prices.memory * memory
    there_s = SMALL.warmup_s + SMALL.duration_s - disk / world.servers[0].box.fetch_bytes_per_s
    assert went.keeping == pytest.approx(each * min(there_s, SMALL.duration_s))


def test_memories_hold_what_fits_and_what_is_in_use_stays() -> None:
    world = drawn(SMALL, 3)
    models = fitting(world, 6)
    times = [Request(1000.0 + 0.01 * turn, 0, models[turn % 6], 1.0) for turn in range(600)]
    run = ResidencyWorld(SMALL, world, tuple(times), Told({0: tuple(models)}, {}))
    went = run.run()
    assert went.evicted_in_use == 0
    assert went.asked == 600 == went.stalls + went.from_memory + went.cloud
    check(world.setting(np.zeros((5, 10))), run.lying)


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_contender_keeps_rooms_and_ends_every_request(name: str) -> None:
    if name == "program":
        pytest.skip("it takes seconds for each decision; the comparison runs it")
    world = drawn(SMALL, 5)
    asked = requests(SMALL, world, 5)
    counted = sum(SMALL.warmup_s <= one.at_s for one in asked)
    run = ResidencyWorld(SMALL, world, asked, KNOWN[name].made(SMALL, world, 5))
    went = run.run()
    assert went.asked == counted == went.stalls + went.from_memory + went.cloud
    assert went.evicted_in_use == 0
    check(world.setting(np.zeros((5, 10))), run.lying)
    if name == "cloud-only":
        assert went.cloud == counted
    else:
        assert went.cloud < counted


def test_ours_costs_less_than_what_expects_nothing_and_than_the_cloud() -> None:
    costs = {name: cost(name) for name in (SYSTEM, "lru", "random", "cloud-only")}
    assert min(costs, key=lambda name: costs[name]) == SYSTEM, costs


def cost(name: str, seeds: Collection[int] = (1, 2)) -> float:
    return sum(run_one(ContestJob(SMALL, name, seed, 1.0)).cost for seed in seeds)


@pytest.mark.parametrize("name", [SYSTEM, BOUND, "retro", "genetic", "lru"])
def test_a_run_of_many_models_is_the_same_in_every_process(name: str) -> None:
    """Names hash differently in each."""
    code = (
        "from tests.unit.test_simulated_residency import SMALL\n"
        "from simulator.contest import ContestJob\n"
        "from simulator.residency.results import run_one\n"
        f"print(run_one(ContestJob(SMALL, {name!r}, 3, 1.0)).model_dump(exclude={{'decide_s'}}))"
    )
    told = {
        subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(told) == 1
