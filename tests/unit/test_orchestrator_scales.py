"""Whose turn it is to be weighed: once a planning period, and sooner where something has changed."""

from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.burn import Count
from orchestrator.scales import PERIOD, SOONEST
from schemas.base import NodeId
from tests.trigger_world import CHAT, World


def watched(noise: float = 0.0) -> World:
    """A world whose deployment has just been weighed."""
    world = World(4, 0, noise=noise)
    world.wait(60)
    assert world.turns.next(world.snapshot, world.now) == CHAT
    return world


def next_after(world: World, most: int = 20) -> int:
    """How many seconds pass until it is weighed again."""
    for second in range(1, most):
        world.wait(1)
        if world.turns.next(world.snapshot, world.now) is not None:
            return second
    return most


def test_what_does_not_change_is_weighed_once_a_planning_period() -> None:
    world = watched()
    assert world.turns.next(world.snapshot, world.now) is None, "its turn is over"
    assert timedelta(seconds=next_after(world)) == PERIOD


@pytest.mark.parametrize("factor", [5.0, 0.2])
def test_a_node_of_the_plan_that_slows_or_recovers_is_a_reason_to_weigh_at_once(factor: float) -> None:
    world = watched()
    world.slow[NodeId(world.plan.nodes[0])] = factor
    assert next_after(world) <= 2
    assert timedelta(seconds=next_after(world)) >= SOONEST


def test_a_load_that_doubles_is_a_reason_to_weigh_at_once_and_one_that_falls_is_not() -> None:
    world = watched()
    world.sequences = 8
    assert next_after(world) <= 3, "the first requests"
    world.run(90)
    world.sequences = 32
    assert next_after(world) <= 3
    world.run(90)
    world.sequences = 8
    assert timedelta(seconds=next_after(world)) == PERIOD


def test_a_budget_that_begins_to_burn_is_a_reason_to_weigh_at_once() -> None:
    world = watched()
    burn = (Count(world.now, met=30, missed=10),)
    world.snapshot = replace(world.snapshot, burns={CHAT: burn})
    assert timedelta(seconds=next_after(world)) == SOONEST
    assert timedelta(seconds=next_after(world)) == PERIOD, "that it still burns is no news"


def test_what_slows_elsewhere_waits_for_the_period() -> None:
    world = watched()
    world.slow |= {name: 5.0 for name in world.names if name not in world.plan.nodes}
    assert timedelta(seconds=next_after(world)) == PERIOD


def test_of_noise_hardly_any_turn_comes_early() -> None:
    world = watched(noise=0.2)
    early = sum(timedelta(seconds=next_after(world)) < PERIOD for _ in range(100))
    assert early <= 5


def test_another_plan_is_weighed_a_second_after_it_came() -> None:
    world = watched()
    world.adopt(world.plan.model_copy(update={"epoch": 2, "previous": world.plan.digest}))
    assert timedelta(seconds=next_after(world)) == SOONEST
