"""When other plans are searched for, what is kept of a search, and that nothing is missed meanwhile."""

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

import pytest

from orchestrator.burn import Count
from orchestrator.decision import Origin
from orchestrator.explaining import dry_run
from orchestrator.fold import NodeWished, Weighed, fold
from orchestrator.outlook import Outlook
from orchestrator.rooms import rooms
from orchestrator.search import fits
from orchestrator.searched import FASTER, PHI_RISE, SEARCH_PERIOD, SLOWED, Facts, Searched, is_stale
from orchestrator.trigger import DEFAULT_POLICY, PLANNING_PERIOD_S
from orchestrator.weighing import weigh
from schemas.base import NodeId
from schemas.capacity import LinkEstimate
from schemas.deployment import NodeWish, Placement
from tests.trigger_world import CHAT, START, World, manifest

A, B = NodeId("a"), NodeId("b")
THEN = Facts({A: 10.0, B: 20.0}, {A: 100, B: 200}, 50, frozenset({A}), frozenset({(A, B)}), busy=False)
SECOND = timedelta(seconds=1)
PERIOD = timedelta(seconds=PLANNING_PERIOD_S)


def searched_in(world: World) -> Searched:
    found = world.snapshot.outlooks[CHAT].searched
    assert found is not None
    return found


def looked(nodes: int = 4, noise: float = 0.0, **fields: object) -> World:
    """A world in which nothing has happened since the first look."""
    world = World(nodes, 0, noise=noise, **fields)  # type: ignore[arg-type]
    world.look()
    return world


def spare_of(world: World) -> NodeId:
    return next(name for name in world.names if name not in world.plan.nodes)


def later(world: World) -> Outlook:
    """The next look, a planning period after the last."""
    world.now += PERIOD
    world.hear()
    return weigh(world.snapshot, CHAT, world.policy, world.now)


@pytest.mark.parametrize(
    "facts",
    [
        THEN,
        replace(THEN, step_ms={A: 10.0 / FASTER, B: 60.0}),
        replace(THEN, step_ms={A: 10.0}, free_bytes={A: 100}),
        replace(THEN, free_bytes={A: 149, B: 0}),
        replace(THEN, trusted=frozenset()),
        replace(THEN, roundabout=frozenset({(A, B), (B, A)})),
    ],
)
def test_what_is_no_better_than_it_was_is_no_reason_to_search(facts: Facts) -> None:
    before = Searched(START, 2.0, THEN, ())
    assert not is_stale(before, facts, 2.0 * (1 + PHI_RISE), START + SEARCH_PERIOD - SECOND)


@pytest.mark.parametrize(
    ("facts", "phi", "after"),
    [
        (THEN, 2.0, SEARCH_PERIOD),
        (THEN, 2.0, -SECOND),
        (THEN, 2.01 * (1 + PHI_RISE), SECOND),
        (replace(THEN, step_ms={A: 9.9 / FASTER, B: 20.0}), 2.0, SECOND),
        (replace(THEN, step_ms={**THEN.step_ms, NodeId("c"): 90.0}), 2.0, SECOND),
        (replace(THEN, free_bytes={A: 150, B: 200}), 2.0, SECOND),
        (replace(THEN, trusted=frozenset({A, B})), 2.0, SECOND),
        (replace(THEN, roundabout=frozenset()), 2.0, SECOND),
        (replace(THEN, busy=True), 2.0, SECOND),
    ],
    ids=["time", "clock", "plan", "faster", "came", "roomier", "trusted", "link", "busy"],
)
def test_each_thing_that_is_better_than_it_was_is_a_reason_to_search(
    facts: Facts, phi: float, after: timedelta
) -> None:
    assert is_stale(Searched(START, 2.0, THEN, ()), facts, phi, START + after)


def test_what_was_found_is_priced_anew_without_a_search() -> None:
    world = looked()
    first = weigh(world.snapshot, CHAT, world.policy, world.now)
    spare = spare_of(world)
    world.slow[spare] = 1.3
    second = later(world)
    assert second.searched == searched_in(world) == first.searched

    def phis(outlook: Outlook) -> dict[str, float]:
        return {one.option.key: one.option.phi for one in outlook.decision.runners_up}

    before, now = phis(first), phis(second)
    assert before.keys() == now.keys()
    assert all(now[key] > before[key] for key in now if spare in key)


def wished(drained: bool = False, trusted: bool | None = None) -> Callable[[World], None]:
    """An operator's word on the node that no plan uses, the same at each time."""

    def change(world: World) -> None:
        wish = NodeWish(node=spare_of(world), drained=drained, trusted=trusted)
        world.snapshot = fold(world.snapshot, NodeWished(wish), world.now)

    return change


def slowed(factor: float, in_use: bool) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.slow[NodeId(world.plan.nodes[0]) if in_use else spare_of(world)] = factor

    return change


def roomy(blocks: float) -> Callable[[World], None]:
    def change(world: World) -> None:
        world.room = blocks

    return change


def working(world: World) -> None:
    world.sequences = 4


def burning(world: World) -> None:
    world.snapshot = replace(world.snapshot, burns={CHAT: (Count(world.now, 80, 20),)})


def as_it_is(_: World) -> None:
    """Nothing happens."""


@pytest.mark.parametrize(
    ("before", "change"),
    [
        (as_it_is, slowed(3.0, in_use=True)),
        (slowed(3.0, in_use=False), slowed(1.0, in_use=False)),
        (wished(drained=True), wished()),
        (wished(trusted=False), wished()),
        (roomy(4.5), roomy(5.5)),
        (as_it_is, working),
        (as_it_is, burning),
    ],
    ids=["slowed", "recovered", "undrained", "trusted", "roomier", "busy", "burning"],
)
def test_a_change_that_matters_is_answered_with_a_search_at_the_next_look(
    before: Callable[[World], None], change: Callable[[World], None]
) -> None:
    world = World(4, 0, noise=0.0)
    before(world)
    for _ in range(20):
        world.now += SECOND
        world.hear()
    world.look()
    assert later(world).searched == searched_in(world)
    change(world)
    found = later(world).searched
    assert found is not None
    assert found.at == world.now


def test_a_new_plan_is_searched_for_others_and_all_its_nodes_have_a_failover_at_once() -> None:
    world = looked()
    before = world.plan
    world.slow[NodeId(before.nodes[0])] = 3.0
    world.run(3 * PLANNING_PERIOD_S)
    assert world.plan != before
    outlook = weigh(world.snapshot, CHAT, world.policy, world.now)
    assert set(outlook.failovers) == set(world.plan.nodes)
    assert outlook.searched is not None
    assert all(placement != world.plan.chains for placement in outlook.failovers.values())


def test_what_lies_on_disks_is_a_candidate_beside_what_is_better_and_has_to_be_fetched() -> None:
    wanting = {NodeId("n1"): 2.0, NodeId("n2"): 2.0}
    world = looked(slow=wanting, bare=(NodeId("n3"),), room=9.0)
    assert world.plan.nodes == ("n0",)
    world.slow[NodeId("n0")] = 9.0
    world.bare = (NodeId("n3"),)
    world.wait(8)
    seen = world.observed()
    [near] = [x for x in seen.options if x.origin is Origin.AT_HAND]
    best = min(seen.options, key=lambda x: x.phi)
    assert best.nodes == {NodeId("n3")}
    assert near.nodes <= wanting.keys()
    assert seen.moves[seen.current.key, near.key].bytes == 0 < seen.moves[seen.current.key, best.key].bytes
    world.bare = ()
    world.wait(1)
    world.now += SEARCH_PERIOD
    world.hear()
    assert all(x.origin is not Origin.AT_HAND for x in world.observed().options), "everything lies on disks"


def test_failovers_that_stand_are_kept_and_with_each_search_the_oldest_is_looked_for_anew() -> None:
    world = looked()
    first = searched_in(world).ready
    assert set(first) == set(world.plan.nodes)
    for turn, _ in enumerate(first, start=1):
        world.now += SEARCH_PERIOD
        world.hear()
        world.look()
        ready = searched_in(world).ready
        assert sum(one.at == world.now for one in ready.values()) == 1
        assert sum(one.at > START for one in ready.values()) == turn
    assert {node: one.chains for node, one in ready.items()} == {node: one.chains for node, one in first.items()}


@pytest.mark.parametrize("gone", [wished(drained=True), slowed(2 * SLOWED, in_use=False)], ids=["drained", "slowed"])
def test_a_failover_that_stands_no_more_is_replaced_at_the_next_look(gone: Callable[[World], None]) -> None:
    world = looked()
    spare = spare_of(world)
    first = world.snapshot.outlooks[CHAT].failovers
    assert all(uses(placement, spare) for placement in first.values())
    gone(world)
    outlook = later(world)
    assert set(outlook.failovers) == set(world.plan.nodes)
    assert not any(uses(placement, spare) for placement in outlook.failovers.values())


def uses(placement: Placement, node: NodeId) -> bool:
    return any(stage.node == node for chain in placement for stage in chain)


def test_a_link_that_is_back_is_a_reason_to_search() -> None:
    world = World(4, 0, noise=0.0)
    here, there = (name for name in world.names if name not in world.plan.nodes)
    node = world.snapshot.nodes[here]
    link = LinkEstimate(peer=there, rtt_ms=1, direct=True, up=False)
    faulty = replace(node, capacity=node.capacity.model_copy(update={"links": (link,)}))
    world.snapshot = replace(world.snapshot, nodes={**world.snapshot.nodes, here: faulty})
    world.look()
    outlook = later(world)
    assert outlook.searched is not None
    assert outlook.searched.at == world.now


def test_what_was_found_is_left_once_it_fits_no_more() -> None:
    world = looked(nodes=4)
    world.slow[NodeId(world.plan.nodes[0])] = 1.5
    world.run(PLANNING_PERIOD_S)
    found = searched_in(world).found
    others = {stage.node for chains, _ in found for chain in chains for stage in chain} - set(world.plan.nodes)
    assert others
    for node in others:
        world.snapshot = fold(world.snapshot, NodeWished(NodeWish(node=NodeId(node), drained=True)), world.now)
    outlook = later(world)
    assert outlook.searched is not None
    assert outlook.searched.at == world.now
    assert not others & {node for one in outlook.decision.runners_up for node in one.option.nodes}


def test_a_dry_run_searches_whatever_is_remembered() -> None:
    world = looked()
    world.slow[NodeId(world.plan.nodes[0])] = 1.1
    world.run(PLANNING_PERIOD_S)
    outlook = world.snapshot.outlooks[CHAT]
    assert outlook.searched is not None
    forgetful = replace(outlook, searched=replace(outlook.searched, found=(), ready={}))
    world.snapshot = fold(world.snapshot, Weighed(forgetful), world.now)
    assert not weigh(world.snapshot, CHAT, DEFAULT_POLICY, world.now).decision.runners_up
    assert dry_run(world.snapshot, CHAT, DEFAULT_POLICY, world.now).decision.candidates[1:]


def test_a_plan_fits_by_its_memory_its_trust_and_its_nodes_and_what_is_there_stays() -> None:
    world = World(3, 0, noise=0.0, room=4.5)
    free = rooms(replace(world.snapshot, rollouts={}), world.wish, manifest())
    chains = world.plan.chains
    node = chains[0][0].node
    full = {**free, node: replace(free[node], free_bytes=0)}
    distrusted = {**free, node: replace(free[node], trusted=False)}
    without = {name: room for name, room in free.items() if name != node}
    assert fits(chains, free)
    assert fits(chains, distrusted)
    assert not fits(chains, distrusted, frozenset({chains[0][0].first}))
    assert not fits(chains, full)
    assert not fits(chains, without)
    assert fits(chains, without, current=chains)
