"""Beliefs, candidates, the cost of moving, failover plans and the sentence that explains a decision."""

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest

from orchestrator.beliefs import GUESS_PRUDENCE, believed, optimism_of, smoothed
from orchestrator.candidates import slate
from orchestrator.decide import Cause, Need, Replan, decide
from orchestrator.decision import Action, Observation, Origin
from orchestrator.explaining import audited, dry_run, explained
from orchestrator.fold import DeploymentRemoved, DeploymentWritten, NodeWished, Weighed, fold
from orchestrator.moving import Live, Placed, Prices, Way, move_cost, reaches_of
from orchestrator.planner import make_plan
from orchestrator.pricing import latency_bound_ms
from orchestrator.proposing import propose
from orchestrator.reassign import reassigned
from orchestrator.rooms import rooms
from orchestrator.trigger import (
    BUDGET_BYTES_PER_S,
    DEFAULT_POLICY,
    PLANNING_PERIOD_S,
    TriggerState,
    Verdict,
    decided,
)
from orchestrator.weighing import STARVED, chosen_plan, failover_plan, weigh, weighable
from profiler.compute import CONTEXT, ROW, roofline, times_of
from profiler.forecast import forecast
from profiler.objective import Demand
from profiler.sizes import sizes_of
from schemas.base import DeploymentName, NodeId
from schemas.capacity import REFERENCE_CONTEXT_TOKENS, BlockTime, LinkEstimate
from schemas.deployment import Deployment, NodeWish, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import KvCache
from tests.trigger_world import BLOCK_MS, CHAT, MODEL, SETTINGS, START, WEIGHT, World, manifest

N0, N1, N2, N3 = (NodeId(f"n{i}") for i in range(4))


def drain_wish(node: NodeId) -> NodeWished:
    return NodeWished(NodeWish(node=node, drained=True))


def replace_node(stage: Stage, old: NodeId, new: NodeId) -> Stage:
    return stage.model_copy(update={"node": new}) if stage.node == old else stage


def quiet(nodes: int = 4, **fields: object) -> World:
    return World(nodes, 0, noise=0.0, **fields)  # type: ignore[arg-type]


def stages(*parts: tuple[NodeId, int, int]) -> tuple[Stage, ...]:
    return tuple(Stage(node=node, first=first, last=last) for node, first, last in parts)


def test_a_change_shows_within_a_planning_period_and_a_noisy_second_hardly() -> None:
    world = quiet(2)
    steady = world.heartbeat(N0)
    world.slow[N0] = 3.0
    slow = world.heartbeat(N0)
    said = times_of(slow.block_times)
    times = smoothed({}, times_of(steady.block_times), 0)
    once = smoothed(times, said, 1)[MODEL].decode_ms[0] / BLOCK_MS
    for _ in range(int(PLANNING_PERIOD_S)):
        times = smoothed(times, said, 1)
    assert once < 1.6
    assert times[MODEL].decode_ms[0] / BLOCK_MS > 2.6
    assert smoothed(times, said, -5) == times  # a clock that went back changes nothing


def test_a_node_that_never_ran_the_model_is_believed_to_be_like_those_that_did_and_a_bit_worse() -> None:
    world = quiet(2)
    promised = float(roofline(world.heartbeat(N0).provider, sizes_of(manifest())).decode_ms[0])
    measured = tuple(BlockTime(model=MODEL, block=b, decode_ms=4 * promised, prefill_ms_per_token=1) for b in (0, 1))
    known = world.heartbeat(N0).model_copy(update={"block_times": measured})
    fresh = world.heartbeat(N1).model_copy(update={"block_times": ()})
    nodes, times = {N0: known, N1: fresh}, {N0: times_of(measured)}
    optimism = optimism_of(nodes, times, manifest(), MODEL, None)
    assert optimism == pytest.approx(4)
    seen = believed(nodes, times, manifest(), MODEL, optimism)
    assert seen[N0].times.decode_ms[0] == measured[0].decode_ms
    assert seen[N0].times.decode_ms[7] == pytest.approx(4 * promised)
    assert seen[N1].times.decode_ms[7] == pytest.approx(4 * GUESS_PRUDENCE * promised)
    # When that one node is slowed, this says nothing about the others.
    slowed = {N0: times_of(time.model_copy(update={"decode_ms": 3 * time.decode_ms}) for time in measured)}
    assert optimism_of(nodes, slowed, manifest(), MODEL, optimism) == optimism


def test_the_candidates_are_the_plan_itself_its_best_neighbours_and_one_without_each_node() -> None:
    world = quiet(4)
    found = slate(world.snapshot, world.wish, manifest(), world.plan, now=world.now)
    options = found.observation.options
    assert options[0].origin is Origin.CURRENT
    assert options[0].chains == world.plan.chains
    assert set(found.failovers) == set(world.plan.nodes)
    assert len(options) <= 16
    assert found.observation.bound <= min(option.phi for option in options)
    assert all(option.terms["tpot_ms"] > 0 for option in options)


def test_no_plan_beats_the_bound_on_latency() -> None:
    world = quiet(3)
    world.slow = {N0: 1.5, N1: 2.5}
    world.run(30)
    found = slate(world.snapshot, world.wish, manifest(), world.plan, now=world.now)
    free = rooms(world.snapshot, world.wish, manifest())
    bound_ms = latency_bound_ms(free, manifest(), Demand())
    assert 0 < bound_ms <= min(option.terms["tpot_ms"] for option in found.observation.options) * 1.5
    assert latency_bound_ms(free, manifest(), Demand(), 3) > bound_ms
    assert latency_bound_ms({}, manifest(), Demand()) == 0


def test_a_lone_sequence_in_company_behind_few_tokens_beats_the_bound_no_more_than_others() -> None:
    world = quiet(1, room=9.0)
    room = rooms(world.snapshot, world.wish, manifest())[N0]
    per_token = 0.005
    ms = room.host.times.ms.copy()
    ms[ROW], ms[CONTEXT] = REFERENCE_CONTEXT_TOKENS * per_token, per_token
    host = replace(room.host, times=replace(room.host.times, ms=ms, rows_min=np.full(8, 4)))
    demand = Demand(output_tokens=100)
    found = forecast((stages((N0, 0, 7)),), {N0: host}, manifest(), 1, demand=demand, settings=SETTINGS)
    bound_ms = latency_bound_ms({N0: replace(room, host=host)}, manifest(), demand, 1, 1, SETTINGS)
    assert 0.9 * found.e2e_ms / 100 < bound_ms <= found.e2e_ms / 100


def test_memory_that_a_node_holds_for_the_model_counts_for_the_bound() -> None:
    world = quiet(3)
    free = rooms(world.snapshot, world.wish, manifest())
    before = rooms(replace(world.snapshot, rollouts={}), world.wish, manifest())
    world.hear()
    after = rooms(world.snapshot, world.wish, manifest())
    assert sum(map(sum, (room.need_bytes for room in after.values()))) < sum(
        map(sum, (room.need_bytes for room in before.values()))
    )
    bounds = [latency_bound_ms(found, manifest(), Demand()) for found in (before, free, after)]
    assert bounds == [bounds[0]] * 3


def test_a_drained_node_is_no_candidate_and_its_plan_is_left_without_weighing() -> None:
    world = quiet(4)
    world.look()
    current = world.plan
    spare = next(name for name in world.names if name not in current.nodes)
    apart = fold(world.snapshot, drain_wish(spare), world.now)
    found = slate(apart, world.wish, manifest(), current, now=world.now)
    assert found.failovers
    assert all(spare not in option.nodes for option in found.observation.options)
    assert all(spare != stage.node for plan in found.failovers.values() for chain in plan for stage in chain)
    # A failover plan that was ready before the node was drained is not used either.
    lost = NodeId(current.nodes[0])
    ready = {lost: (tuple(replace_node(stage, lost, spare) for stage in current.routes[0].stages),)}
    stale = replace(apart.outlooks[CHAT], failovers=ready)
    gone = replace(apart, absent=frozenset({lost}), outlooks={CHAT: stale})
    assert failover_plan(gone, world.wish, "lost", world.now) is None
    assert failover_plan(replace(gone, drained=frozenset()), world.wish, "lost", world.now) is not None

    # A node in use: decided before anything is weighed, however much the budget for moves is overdrawn.
    indebted = replace(world.snapshot.outlooks[CHAT], state=TriggerState(debt_bytes=10**15))
    leaving = fold(fold(world.snapshot, Weighed(indebted), world.now), drain_wish(lost), world.now)
    assert weighable(leaving, world.now) == ()
    [asked] = decide(leaving, world.now)
    assert isinstance(asked, Replan)
    assert asked.need.cause is Cause.NODE_DRAINS
    assert lost not in propose(leaving, world.wish, asked.need, world.now).plan.nodes
    [said] = explained(leaving, CHAT, DEFAULT_POLICY, world.now).decisions
    assert said.action == "hard"
    assert lost not in {stage.node for stage in said.candidates[1].routes[0]}
    assert f"node {lost} is to be drained" in said.sentence


def test_an_edge_fault_between_two_stages_is_left() -> None:
    world = quiet(3)
    a, b = map(NodeId, world.plan.nodes)
    link = LinkEstimate(peer=b, rtt_ms=2, direct=False, up=False)
    node = world.snapshot.nodes[a]
    faulty = replace(node, capacity=node.capacity.model_copy(update={"links": (link,)}))
    world.snapshot = replace(world.snapshot, nodes={**world.snapshot.nodes, a: faulty})
    options = slate(world.snapshot, world.wish, manifest(), world.plan, now=world.now).observation.options
    assert options[0].phi > 2 * min(option.phi for option in options)
    assert not {a, b} <= min(options, key=lambda option: option.phi).nodes
    planned = make_plan(world.wish, manifest(), rooms(world.snapshot, world.wish, manifest()), 2, None, "a test").plan
    assert not {a, b} <= set(planned.nodes)


def test_an_operators_placement_never_moves_by_itself_and_stages_stay_as_many() -> None:
    placed = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, placement=stages((N0, 0, 3), (N1, 4, 7)))
    world = quiet(4, wish=placed)
    world.slow[N0] = 5.0
    world.run(60)
    assert world.moves == []
    assert "an operator placed it" in world.decisions[-1].sentence
    three = quiet(4, wish=Deployment(name=CHAT, model=MODEL, settings=SETTINGS, stages=3))
    three.slow[NodeId(three.plan.nodes[1])] = 5.0
    three.run(60)
    assert len(three.moves) == 1
    assert len(three.plan.routes[0].stages) == 3


def test_stages_go_to_the_fastest_nodes_and_what_shares_a_node_goes_on_sharing_it() -> None:
    world = quiet(4, room=9.0)
    world.slow = {N0: 4.0, N1: 3.0}
    world.run(20)
    free = rooms(world.snapshot, world.wish, manifest())
    u_shaped = stages((N0, 0, 0), (N1, 1, 6), (N0, 7, 7))
    found = reassigned(u_shaped, manifest(), free)
    assert found is not None
    assert [(s.first, s.last) for s in found] == [(0, 0), (1, 6), (7, 7)]
    assert found[0].node == found[2].node
    assert {s.node for s in found} == {N2, N3}
    assert reassigned(u_shaped, manifest(), {N0: free[N0]}) is None


def placed(*parts: tuple[NodeId, int, int]) -> Placed:
    return Placed((stages(*parts),), prefill_ms_per_token=2.0, tpot_ms=40.0)


def test_only_blocks_that_are_neither_loaded_nor_on_disk_travel() -> None:
    world = quiet(2)
    nodes = {name: world.heartbeat(name) for name in world.names}
    before, after = placed((N0, 0, 3), (N1, 4, 7)), placed((N0, 0, 5), (N1, 6, 7))
    staged = move_cost(before, after, reaches_of(nodes, MODEL), manifest(), Live(), Prices())
    assert [(node.node, node.blocks, node.fetch_bytes) for node in staged.nodes] == [(N0, 2, 0)]
    bare = {name: one.model_copy(update={"on_disk": ()}) for name, one in nodes.items()}
    cold = move_cost(before, after, reaches_of(bare, MODEL), manifest(), Live(), Prices())
    assert cold.bytes == 2 * WEIGHT
    assert cold.seconds > staged.seconds
    assert cold.total == pytest.approx(cold.price + cold.slowdown + cold.pause + cold.fixed)
    link = LinkEstimate(peer=N1, rtt_ms=1, direct=True, goodput_bytes_per_s=1e6)
    fast = LinkEstimate(peer=N2, rtt_ms=1, direct=True, goodput_bytes_per_s=1e9)  # pieces come from either
    slow = {name: one.model_copy(update={"links": (fast, link)}) for name, one in bare.items()}
    assert move_cost(before, after, reaches_of(slow, MODEL), manifest(), Live(), Prices()).nodes[
        0
    ].fetch_s == pytest.approx(10, rel=0.01)
    assert move_cost(before, before, reaches_of(nodes, MODEL), manifest(), Live(), Prices()).total == Prices().fixed
    read = {name: one.model_copy(update={"disk_read_bytes_per_s": 1e6}) for name, one in nodes.items()}
    assert move_cost(before, after, reaches_of(read, MODEL), manifest(), Live(), Prices()).nodes[
        0
    ].read_s == pytest.approx(20)


def test_live_sequences_cross_the_cheapest_way() -> None:
    cache = KvCache(
        layout="shared",
        heads=8,
        head_dim=64,
        dtype="float16",
        past_key="a",
        past_value="b",
        present_key="c",
        present_value="d",
    )
    caching = manifest().model_copy(
        update={"blocks": tuple(block.model_copy(update={"kv": (cache,)}) for block in manifest().blocks)}
    )
    per_token = caching.blocks[0].kv_bytes_per_token
    world = quiet(2)
    nodes = {name: world.heartbeat(name) for name in world.names}
    before, after = placed((N0, 0, 3), (N1, 4, 7)), placed((N0, 0, 5), (N1, 6, 7))

    def way(live: Live, rate: float) -> tuple[Way, int]:
        link = LinkEstimate(peer=N1, rtt_ms=1, direct=True, goodput_bytes_per_s=rate)
        linked = {name: one.model_copy(update={"links": (link,)}) for name, one in nodes.items()}
        found = move_cost(before, after, reaches_of(linked, MODEL), caching, live, Prices())
        assert (found.pause == 0) is (found.way is Way.DRAIN)
        return found.way, found.kv_bytes

    assert way(Live(4, 1000, 500), 1e9) == (Way.KV, 4 * 1000 * 2 * per_token)
    assert way(Live(4, 1000, 500), 1e5) == (Way.RECOMPUTE, 0)
    assert way(Live(4, 1000, 2), 1e5) == (Way.DRAIN, 0)
    assert move_cost(before, after, reaches_of(nodes, MODEL), caching, Live(), Prices()).way is Way.NONE


def test_a_lost_node_is_answered_with_the_plan_that_was_ready() -> None:
    world = quiet(4)
    world.run(PLANNING_PERIOD_S)
    lost = NodeId(world.plan.nodes[0])
    (ready,) = world.snapshot.outlooks[CHAT].failovers[lost]
    gone = replace(world.snapshot, absent=frozenset({lost}))
    found = propose(gone, world.wish, Need(Cause.NODE_LOST, f"lost: {lost}"), world.now)
    assert found.plan.routes[0].stages == ready
    assert found.plan.reason == f"lost: {lost}; the plan without it was ready"
    assert found.plan.epoch == world.plan.epoch + 1
    # Facts that have changed since: another node is lost too, or has refused, or the plan is not the one weighed.
    assert (
        failover_plan(replace(gone, absent=frozenset(map(NodeId, world.plan.nodes))), world.wish, "lost", world.now)
        is None
    )
    unusable = replace(gone, absent=frozenset({lost, ready[0].node}))
    other = propose(unusable, world.wish, Need(Cause.NODE_LOST, "lost"), world.now)
    assert not {stage.node for stage in other.plan.routes[0].stages} & unusable.absent
    refused = replace(gone.rollouts[CHAT], refused={ready[0].node: world.now})
    assert failover_plan(replace(gone, rollouts={CHAT: refused}), world.wish, "lost", world.now) is None


def test_a_failover_plan_for_which_the_memory_is_gone_is_not_used() -> None:
    world = quiet(4)
    world.look()
    lost = NodeId(world.plan.nodes[0])
    world.room = 2.5
    world.hear()
    gone = replace(world.snapshot, absent=frozenset({lost}))
    assert failover_plan(gone, world.wish, "lost", world.now) is None


def test_a_node_without_memory_for_ten_seconds_is_left_at_once() -> None:
    world = quiet(4)
    starving = NodeId(world.plan.nodes[0])
    world.look()

    def starve() -> None:
        node = world.snapshot.nodes[starving]
        empty = node.capacity.model_copy(update={"memory_free_bytes": 0, "memory_pressure": 40.0})
        world.snapshot = replace(
            world.snapshot, nodes={**world.snapshot.nodes, starving: replace(node, capacity=empty)}
        )

    starve()
    outlook = weigh(world.snapshot, CHAT, DEFAULT_POLICY, world.now)
    assert not outlook.decision.acts
    world.snapshot = fold(world.snapshot, Weighed(outlook), world.now)
    outlook = weigh(world.snapshot, CHAT, DEFAULT_POLICY, world.now + STARVED)
    assert outlook.decision.action is Action.HARD
    assert starving not in outlook.decision.chosen.nodes
    assert "no memory left for 10 s" in chosen_plan(world.snapshot, outlook).plan.reason


def test_only_a_deployment_that_serves_with_nothing_under_way_is_weighed() -> None:
    world = quiet(3)
    assert weighable(world.snapshot, START) == (CHAT,)
    rollout = world.snapshot.rollouts[CHAT]
    waiting = replace(rollout, retry_at=START + timedelta(seconds=9))
    assert weighable(replace(world.snapshot, rollouts={CHAT: waiting}), START) == ()
    assert weighable(replace(world.snapshot, absent=frozenset({NodeId(world.plan.nodes[0])})), START) == ()
    assert weighable(fold(world.snapshot, DeploymentRemoved(CHAT), START), START) == ()


def test_what_was_weighed_is_forgotten_with_the_wish_it_was_about() -> None:
    world = quiet(3)
    world.look()
    outlook = world.snapshot.outlooks[CHAT]
    changed = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, stages=3)
    assert fold(world.snapshot, DeploymentWritten(changed), START).outlooks == {}
    removed = fold(world.snapshot, DeploymentRemoved(CHAT), START)
    assert removed.outlooks == {}
    assert fold(removed, Weighed(outlook), START).outlooks == {}


def test_a_decision_reads_as_a_reason() -> None:
    world = quiet(4)
    first = world.plan.routes[0].stages[0]
    slowed = first.node
    world.slow[slowed] = 3.0
    world.run(30)
    [moved] = world.moves
    assert moved.sentence.startswith(f"Move blocks 0-{first.last} from {slowed} to ")
    assert "cuts unchanged: by now staying has cost more than going there and back would; it saves" in moved.sentence
    assert "A token took" in moved.sentence
    assert world.plan.reason == moved.sentence
    fields = audited(moved)
    assert fields["action"] == "redistribute"
    assert all(len(value) <= 500 for value in fields.values() if isinstance(value, str))
    assert float(fields["phi_before"] or 0) > float(fields["phi_after"] or 0)
    kept = world.decisions[-1]
    assert kept.sentence.startswith(f"Epoch {world.plan.epoch} stays (")


def test_what_is_explained_is_the_last_decision_and_a_dry_run_changes_nothing() -> None:
    world = quiet(3)
    fresh = explained(world.snapshot, None, DEFAULT_POLICY, START)
    assert [one.epoch for one in fresh.decisions] == [1]
    world.look()
    assert explained(world.snapshot, CHAT, DEFAULT_POLICY, START).decisions[0].at == world.decisions[-1].at
    reply = dry_run(world.snapshot, CHAT, DEFAULT_POLICY, world.now).decision
    assert reply.candidates[0].routes == world.plan.chains
    assert reply.candidates[0].why_not is None
    assert all(one.why_not for one in reply.candidates[1:])
    lost = replace(world.snapshot, absent=frozenset({NodeId(world.plan.nodes[0])}))
    now = dry_run(lost, CHAT, DEFAULT_POLICY, world.now).decision
    assert now.action == "hard" or "is lost, and no other plan" in now.sentence
    with pytest.raises(ResplitError) as unknown:
        dry_run(world.snapshot, DeploymentName("nobody"), DEFAULT_POLICY, START)
    assert unknown.value.code is ErrorCode.UNKNOWN_DEPLOYMENT


def test_the_budget_is_paid_back_by_time_that_nobody_looked_in() -> None:
    world = quiet()
    world.look()
    outlook = world.snapshot.outlooks[CHAT]
    owing = replace(outlook, state=replace(outlook.state, debt_bytes=120.0 * BUDGET_BYTES_PER_S))
    world.snapshot = fold(world.snapshot, Weighed(owing), world.now)
    world.now += timedelta(seconds=100)
    world.look()
    assert world.snapshot.outlooks[CHAT].state.debt_bytes == pytest.approx(20 * BUDGET_BYTES_PER_S)


def test_a_move_of_the_whole_model_overdraws_the_budget_of_a_large_one_no_more_than_of_a_small_one() -> None:
    world = quiet()
    world.look()
    owed = {}
    for copies, model_bytes in ((1, 1 << 30), (1, 1 << 34), (4, 1 << 30)):
        state = TriggerState(at=world.now, debt_bytes=float(copies * model_bytes))
        told: list[float] = []

        def rule(
            state: TriggerState, seen: Observation, elapsed_s: float, scale: float, told: list[float] = told
        ) -> Verdict:
            told.append(scale)
            return Verdict({}, (), "")

        seen = replace(world.observed(), model_bytes=model_bytes, bound=0.0)
        decided(state, seen, world.now, None, 0.15, rule)
        owed[copies, model_bytes] = told[0]
    assert owed == {(1, 1 << 30): 2.0, (1, 1 << 34): 2.0, (4, 1 << 30): 5.0}
