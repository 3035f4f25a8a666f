"""Petals' rule over what production knows: who hosts what, when a server moves, and the paths over it."""

from datetime import timedelta

import numpy as np
import pytest

from orchestrator.fold import NodeWished, fold
from orchestrator.planner import make_plan
from orchestrator.rooms import believed_rooms
from schemas.base import NodeId
from schemas.deployment import Deployment, NodeWish, Placement
from simulator.petals import Swarm, balanced
from tests.trigger_world import BLOCKS, CHAT, MODEL, SETTINGS, World, manifest

N0, N1, N2 = (NodeId(f"n{i}") for i in range(3))
FRONT, BACK = range(1, 4), range(4, 7)
HALF = 8.5
"""Blocks for which a node has room where its run is three: both ends, and half of the others."""


def world(nodes: int, room: float = HALF, *, slow: dict[NodeId, float] | None = None, **wish: object) -> World:
    """Nodes that have shown for long enough how slow they are."""
    deployment = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, **wish)
    found = World(nodes, 0, noise=0.0, room=room, wish=deployment)
    found.slow.update(slow or {})
    for _ in range(60):
        found.now += timedelta(seconds=1)
        found.hear()
    return found


def looked(seen: World, before: Swarm | None = None, seed: int = 0) -> Swarm:
    return balanced(seen.snapshot, seen.wish, before or Swarm(), np.random.default_rng(seed))


def check(seen: World, placement: Placement) -> None:
    """The planner refuses what is not every block once, does not fit, or shows what is sensitive."""
    insisted = seen.wish.model_copy(update={"placement": placement})
    plan = make_plan(
        insisted, manifest(), believed_rooms(seen.snapshot, seen.wish, manifest()), 2, None, "checked"
    ).plan
    assert plan.chains == placement


@pytest.mark.parametrize("room", [4.5, 5.5, HALF, 20.0])
def test_every_block_is_placed_and_fits_beside_what_serves(room: float) -> None:
    seen = world(4, room)
    check(seen, looked(seen).placement)


def test_a_client_holds_both_ends_and_is_trusted_where_they_are_sensitive() -> None:
    seen = world(4, sensitive="ends")
    for name in seen.names:
        seen.snapshot = fold(seen.snapshot, NodeWished(NodeWish(node=name, trusted=name == N1)), seen.now)
    found = looked(seen).placement
    check(seen, found)
    assert {stage.node for chain in found for stage in chain if {0, BLOCKS - 1} & set(stage.blocks)} == {N1}


def test_a_sensitive_block_in_the_middle_is_hosted_by_a_trusted_server_alone() -> None:
    seen = world(4, 20.0, sensitive=(3,))
    for name in seen.names:
        seen.snapshot = fold(seen.snapshot, NodeWished(NodeWish(node=name, trusted=name == N2)), seen.now)
    swarm = looked(seen)
    check(seen, swarm.placement)
    assert {node for node, run in swarm.runs.items() if 3 in run} == {N2}


@pytest.mark.parametrize(("slow", "where"), [(N0, FRONT), (N1, BACK)])
def test_who_joins_takes_the_run_that_the_slower_server_hosts(slow: NodeId, where: range) -> None:
    two = world(2, slow={slow: 2.0})
    assert looked(two).runs == {N0: FRONT, N1: BACK}
    assert looked(world(3, slow={slow: 2.0})).runs == {N0: FRONT, N1: BACK, N2: where}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("factor", "moves"), [(1.0, False), (1.25, False), (1.45, True), (3.0, True)])
def test_a_server_moves_where_three_quarters_of_what_there_could_be_is_more_than_there_is(
    factor: float, moves: bool, seed: int
) -> None:
    before = Swarm({N0: FRONT, N1: BACK, N2: FRONT})
    after = looked(world(3, slow={N1: factor}), before, seed).runs
    assert after[N1] == BACK
    assert sorted((after[N0], after[N2]), key=lambda run: run.start) == ([FRONT, BACK] if moves else [FRONT, FRONT])


def test_nobody_moves_whom_the_model_needs_where_he_is() -> None:
    before = Swarm({N0: FRONT, N1: BACK})
    assert looked(world(2, slow={N1: 5.0}), before).runs == before.runs


def test_paths_stay_as_they_are_until_others_are_so_much_faster() -> None:
    first = looked(world(3))
    assert looked(world(3), first) == first
    a_bit = looked(world(3, slow={N0: 1.1}), first)
    assert a_bit.placement == first.placement


def test_where_servers_cannot_hold_the_model_what_is_placed_stays() -> None:
    first = looked(world(3))
    seen = world(1, 9.5)
    assert looked(seen, first).runs[N0] == range(1, 7)
    tight = world(3)
    tight.room = 0.0
    tight.now += timedelta(seconds=1)
    tight.hear()
    tight.snapshot = fold(tight.snapshot, NodeWished(NodeWish(node=N0, drained=True)), tight.now)
    assert looked(tight, first).placement == first.placement
    nobody = world(1)
    nobody.snapshot = fold(nobody.snapshot, NodeWished(NodeWish(node=N0, drained=True)), nobody.now)
    assert looked(nobody, first) == Swarm({}, first.placement)
