"""The chain to begin with: searching everywhere first finds what searching the edge first would."""

from dataclasses import replace

import numpy as np
import pytest

from orchestrator.chain import best_chain, fastest_chain, on_the_edge, ways_of, within
from orchestrator.rooms import Room, rooms
from profiler.host import hosts_of
from schemas.base import NodeId
from schemas.capacity import BlockTime, LinkEstimate
from schemas.deployment import Deployment
from schemas.errors import ResplitError
from tests.trigger_world import BLOCK_BYTES, CHAT, MODEL, SETTINGS, World, manifest

SEEDS = range(15)


def drawn(seed: int, clouded: bool) -> dict[NodeId, Room]:
    """Nodes whose speeds, memory, links and trust differ, some of them of the cloud."""
    rng = np.random.default_rng(seed)
    world = World(int(rng.integers(2, 6)), seed)
    found = rooms(replace(world.snapshot, rollouts={}), world.wish, manifest())
    for number, (name, room) in enumerate(found.items()):
        times = tuple(
            BlockTime(model=MODEL, block=block, decode_ms=float(rng.uniform(1, 20)), prefill_ms_per_token=1.0)
            for block in range(len(manifest().blocks))
        )
        links = tuple(
            LinkEstimate(peer=peer, rtt_ms=float(rng.uniform(0.1, 10)), direct=True, up=bool(rng.random() < 0.9))
            for peer in found
            if peer > name and rng.random() < 0.8
        )
        cloud = clouded and (number == 0 or rng.random() < 0.3)
        capacity = room.capacity.model_copy(
            update={
                "block_times": times,
                "links": links,
                "tier": "cloud" if cloud else "edge",
                "price_per_hour": float(rng.uniform(0, 0.3)) if cloud else 0.0,
            }
        )
        free = int(rng.uniform(1, 7) * BLOCK_BYTES)
        host = hosts_of({name: capacity}, manifest(), MODEL)[name]
        found[name] = replace(room, host=host, free_bytes=free, trusted=not cloud and rng.random() < 0.8)
    return found


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("clouded", [False, True])
@pytest.mark.parametrize("secret", [False, True])
def test_the_chain_is_the_edges_own_wherever_the_best_of_all_needs_no_cloud(
    seed: int, clouded: bool, secret: bool
) -> None:
    offered = drawn(seed, clouded)
    wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, sensitive="ends" if secret else ())
    edge = on_the_edge(offered)
    own, anywhere = (fastest_chain(wish, manifest(), some) for some in (edge, offered))
    try:
        chain, _ = best_chain(wish, manifest(), offered)
    except ResplitError:
        assert own is None
        assert anywhere is None
        return
    assert anywhere is not None
    if within(anywhere, edge):
        assert chain == own == anywhere
    else:
        assert chain in (own, anywhere)
    if own is None:
        assert chain == anywhere
    assert best_chain(wish, manifest(), offered, ways=ways_of(offered, manifest()))[0] == chain
    every = {**offered, NodeId("other"): next(iter(offered.values()))}
    assert best_chain(wish, manifest(), offered, ways=ways_of(every, manifest()))[0] == chain
    assert best_chain(wish, manifest(), offered, known=chain)[0] == chain
