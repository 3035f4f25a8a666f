"""`--private`: no untrusted node holds a private block, and a plan is found wherever there is one at all.

What there is, is found by trying every assignment of blocks to nodes, also of those that come back to a node more often
than a chain or a U does.
"""

from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.chain import best_chain
from orchestrator.rooms import rooms
from schemas.deployment import Deployment, sensitive_blocks
from schemas.errors import ErrorCode, ResplitError
from tests.trigger_world import BLOCKS, CHAT, MODEL, SETTINGS, World, manifest

WORLDS = {nodes: World(nodes, 0) for nodes in (2, 3, 4)}
PRIVATE = ("ends", "ends:1", "ends:2", "ends:3", "ends:9")


def exists(need: Sequence[int], free: Sequence[int], may_run: Sequence[Sequence[bool]], block: int = 0) -> bool:
    """Whether blocks from `block` on can be given to nodes at all."""
    if block == len(need):
        return True
    for node, room in enumerate(free):
        if may_run[node][block] and need[block] <= room:
            left = [*free[:node], room - need[block], *free[node + 1 :]]
            if exists(need, left, may_run, block + 1):
                return True
    return False


@settings(max_examples=250, deadline=None)
@given(
    nodes=st.lists(st.tuples(st.booleans(), st.floats(0.5, 7.5)), min_size=2, max_size=4),
    private=st.sampled_from(PRIVATE),
)
def test_a_plan_keeps_what_is_private_and_is_found_wherever_there_is_one(
    nodes: list[tuple[bool, float]], private: str
) -> None:
    world = WORLDS[len(nodes)]
    wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, sensitive=private)
    offered = rooms(replace(world.snapshot, rollouts={}), wish, manifest())
    need = next(iter(offered.values())).need_bytes
    found = {
        name: replace(room, trusted=trusted, free_bytes=int(blocks * max(need)))
        for (name, room), (trusted, blocks) in zip(offered.items(), nodes, strict=True)
    }
    kept = sensitive_blocks(private, BLOCKS)
    may_run = [[room.trusted or block not in kept for block in range(BLOCKS)] for room in found.values()]
    there_is_one = exists(need, [room.free_bytes for room in found.values()], may_run)
    try:
        chain, _ = best_chain(wish, manifest(), found)
    except ResplitError as error:
        assert not there_is_one
        assert error.code in (ErrorCode.INFEASIBLE, ErrorCode.MODEL_TOO_LARGE)
        if error.code is ErrorCode.INFEASIBLE and not all(room.trusted for room in found.values()):
            assert error.field == "sensitive"
            assert "resplit trust" in error.message
        return
    assert there_is_one
    assert [block for stage in chain for block in stage.blocks] == list(range(BLOCKS))
    for stage in chain:
        assert found[stage.node].trusted or not kept.intersection(stage.blocks)


def test_one_trusted_node_takes_both_ends_and_the_middle_goes_to_the_edge() -> None:
    wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, sensitive="ends:1")
    (trusted, here), (edge, there) = rooms(replace(WORLDS[2].snapshot, rollouts={}), wish, manifest()).items()
    size = max(here.need_bytes)
    found = {
        trusted: replace(here, free_bytes=4 * size),
        edge: replace(there, trusted=False, free_bytes=BLOCKS * size),
    }
    chain, _ = best_chain(wish, manifest(), found)
    assert [(stage.node, stage.first, stage.last) for stage in chain] == [
        (trusted, 0, 1),
        (edge, 2, BLOCKS - 3),
        (trusted, BLOCKS - 2, BLOCKS - 1),
    ]
