"""The blocks of a slow node go, in pieces, to whoever has room beside the plan in force."""

from collections.abc import Mapping
from dataclasses import replace

from orchestrator.relief import PIECES_MAX, relieved
from orchestrator.rooms import Room, rooms
from orchestrator.search import fits
from schemas.base import NodeId
from schemas.deployment import Chain, Stage
from tests.trigger_world import BLOCK_BYTES, World, manifest

N0, N1, N2, N3 = (NodeId(f"n{i}") for i in range(4))
NOTHING = frozenset[int]()


def chain(*parts: tuple[NodeId, int, int]) -> Chain:
    return tuple(Stage(node=node, first=first, last=last) for node, first, last in parts)


def beside(current: Chain, free: Mapping[NodeId, int], slow: Mapping[NodeId, float]) -> dict[NodeId, Room]:
    """Equal nodes but for those that are `slow`, with so many blocks' room beside what `current` has there."""
    world = World(4, 0, noise=0.0, room=9.0)
    found = {}
    for name, room in rooms(world.snapshot, world.wish, manifest()).items():
        here = {block for stage in current if stage.node == name for block in stage.blocks}
        need = tuple(0 if block in here else 2 * BLOCK_BYTES for block in range(8))
        host = room.host.slower(slow.get(name, 1.0))
        found[name] = replace(room, host=host, free_bytes=2 * BLOCK_BYTES * free.get(name, 0), need_bytes=need)
    return found


CURRENT = chain((N0, 0, 1), (N1, 2, 4), (N2, 5, 7))


def test_what_a_slow_node_holds_is_shared_out_and_the_route_may_come_by_a_node_twice() -> None:
    left = beside(CURRENT, {N0: 2, N3: 1}, {N2: 5.0, N3: 2.0})
    found = relieved(CURRENT, manifest(), left, NOTHING)
    assert found is not None
    assert fits((found,), left, NOTHING, (CURRENT,))
    assert [(stage.first, stage.last) for stage in found[:2]] == [(0, 1), (2, 4)], "the others stay where they are"
    assert {stage.node: len(stage.blocks) for stage in found[2:]} == {N0: 2, N3: 1}


def test_what_a_node_has_of_the_route_already_counts_where_it_is_not_loaded_yet() -> None:
    left = beside(CURRENT, {N0: 3}, {N2: 5.0})
    left[N0] = replace(left[N0], need_bytes=left[N3].need_bytes)
    found = relieved(CURRENT, manifest(), left, NOTHING)
    assert found is not None
    assert fits((found,), left)
    assert {stage.node: len(stage.blocks) for stage in found[2:]} == {N0: 1, N2: 2}


def test_a_part_stays_where_there_is_not_room_for_all() -> None:
    found = relieved(CURRENT, manifest(), beside(CURRENT, {N0: 2}, {N2: 5.0}), NOTHING)
    assert found is not None
    assert {stage.node: len(stage.blocks) for stage in found[2:]} == {N0: 2, N2: 1}


def test_a_piece_beside_the_stage_before_it_is_one_stage_with_it() -> None:
    current = chain((N0, 0, 3), (N2, 4, 7))
    found = relieved(current, manifest(), beside(current, {N0: 4}, {N2: 5.0}), NOTHING)
    assert found == chain((N0, 0, 7))


def test_nothing_is_moved_that_takes_no_less_elsewhere() -> None:
    assert relieved(CURRENT, manifest(), beside(CURRENT, {N3: 8}, {N3: 1.2}), NOTHING) is None
    assert relieved(CURRENT, manifest(), beside(CURRENT, {}, {N2: 5.0}), NOTHING) is None


def test_what_is_sensitive_goes_to_no_node_that_is_not_trusted() -> None:
    left = beside(CURRENT, {N0: 2, N3: 3}, {N2: 5.0})
    left[N3] = replace(left[N3], trusted=False)
    found = relieved(CURRENT, manifest(), left, frozenset({0, 7}))
    assert found is not None
    assert N3 not in {stage.node for stage in found}


def test_a_stage_of_which_every_node_takes_one_block_is_cut_into_no_more_pieces_than_a_few() -> None:
    current = chain((N2, 0, 7))
    assert PIECES_MAX == 3
    assert relieved(current, manifest(), beside(current, {N0: 1, N1: 1, N3: 1}, {N2: 5.0}), NOTHING) is not None
    gone = {name: room for name, room in beside(current, {N0: 2, N1: 2, N3: 2}, {}).items() if name != N2}
    assert relieved(current, manifest(), gone, NOTHING) is None, "eight blocks do not fit in three pieces of two"
