"""How much slower serving makes nodes: learned by place, forgotten slowly, never taken for what one node suffers."""

from datetime import UTC, datetime, timedelta

import pytest

from orchestrator.strain import LEARNED_S, REMEMBERED_S, UNSTRAINED, Strain, learned
from schemas.base import NodeId
from schemas.deployment import Placement, Stage
from tests.trigger_world import CHAT, World, manifest

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
CHAINS: Placement = ((Stage(node=A, first=0, last=1), Stage(node=B, first=2, last=3)),)
START = datetime(2026, 1, 1, tzinfo=UTC)


def seconds(count: float) -> datetime:
    return START + timedelta(seconds=count)


def test_before_anything_served_nobody_bears_anything() -> None:
    assert learned(UNSTRAINED, {}, CHAINS, START) == UNSTRAINED
    assert (UNSTRAINED.on(A, CHAINS), UNSTRAINED.on(C, CHAINS), UNSTRAINED.least) == (1.0, 1.0, 1.0)


def test_the_first_that_is_seen_is_believed_and_each_place_has_its_own() -> None:
    strain = learned(UNSTRAINED, {A: 3.0, B: 2.0}, CHAINS, START)
    assert (strain.on(A, CHAINS), strain.on(B, CHAINS)) == (3.0, 2.0)
    assert not strain.own, "what all in their places bear is nobody's own"
    moved: Placement = ((Stage(node=C, first=0, last=1), Stage(node=A, first=2, last=3)),)
    assert (strain.on(C, moved), strain.on(A, moved)) == (3.0, 2.0), "it is of the place, not of the node"
    assert strain.least == 2.0


def test_a_node_that_slows_is_slow_of_its_own_for_long_enough_to_be_left() -> None:
    strain = learned(UNSTRAINED, {A: 1.5, B: 1.5}, CHAINS, START)
    after = learned(strain, {A: 1.5, B: 4.5}, CHAINS, seconds(10))
    assert after.on(B, CHAINS) < 2.0, "a sixth of the way at most"
    excess, at = after.own[B]
    assert excess > 2.0
    assert at == seconds(10)
    assert A not in after.own
    late, usual = strain, strain
    for second in range(0, int(10 * LEARNED_S), 5):
        late = learned(late, {A: 1.5, B: 4.5}, CHAINS, seconds(second))
        usual = learned(usual, {A: 4.5, B: 4.5}, CHAINS, seconds(second))
    assert late.own[B][0] == pytest.approx(3.0, rel=0.01), "no other node bears more than an ingress does"
    assert usual.on(B, CHAINS) == pytest.approx(4.5, rel=0.01), "what lasts and comes to all is usual"


def test_what_was_slow_is_remembered_at_rest_and_forgiven_in_time() -> None:
    strain = Strain(1.0, 1.0, {B: (3.0, START)}, START)
    world = World(2, 0, noise=0)
    resting = world.heartbeat(NodeId("n0"))
    without: Placement = ((Stage(node=A, first=0, last=3),),)
    assert strain.at_rest(B, resting, without, seconds(0)) == 3.0
    assert 1.5 < strain.at_rest(B, resting, without, seconds(REMEMBERED_S)) < 2.0
    kept = learned(strain, {A: 1.0}, without, seconds(REMEMBERED_S - 1))
    assert B in kept.own
    assert B not in learned(strain, {A: 1.0}, without, seconds(REMEMBERED_S)).own


def test_nodes_that_all_slow_by_serving_move_nothing_and_one_that_slows_besides_is_left() -> None:
    world = World(4, 0, noise=0.1, strain=3.0, sequences=1)
    world.run(120)
    assert world.moves == []
    assert len(manifest().blocks) > 0
    victim = NodeId(world.plan.nodes[-1])
    world.slow[victim] = 3.0
    world.run(15)
    assert len(world.moves) == 1
    assert victim not in world.plan.nodes
    world.run(120)
    assert len(world.moves) == 1, "and it is not gone back to"
    assert world.snapshot.outlooks[CHAT].strain.own[victim][0] > 2


def test_what_a_node_at_rest_measures_counts_before_what_is_remembered_of_it() -> None:
    strain = Strain(1.0, 1.0, {B: (3.0, START)}, START)
    resting = World(2, 0, noise=0).heartbeat(NodeId("n0"))
    without: Placement = ((Stage(node=A, first=0, last=3),),)
    freed, taken = (resting.model_copy(update={"contention": factor}) for factor in (1.1, 5.0))
    assert strain.at_rest(B, freed, without, START) == 1.0, "a tenth is noise"
    assert strain.at_rest(B, taken, without, START) == 5.0
    assert strain.at_rest(B, taken, without, START, beside=True) == 3.0, "that may be the plan itself"
