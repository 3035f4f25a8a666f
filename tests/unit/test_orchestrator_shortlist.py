"""Among which of very many nodes plans are looked for: `orchestrator.shortlist`."""

from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pytest

from benchmarks.shortlist import MANIFEST, NOW, WISH, Cluster, among_likeliest
from orchestrator.decision import Origin
from orchestrator.fold import (
    CapacityReceived,
    DeploymentWritten,
    ManifestKnown,
    NodeWished,
    RolloutAdvanced,
    Snapshot,
    Weighed,
    fold,
)
from orchestrator.rollout import Proceed, Propose, note, step
from orchestrator.searched import SEARCH_PERIOD
from orchestrator.shortlist import NODES_MAX, OTHERS_MIN, Shortlist, planned_anew, shortlisted
from orchestrator.trigger import DEFAULT_POLICY
from orchestrator.weighing import weigh
from profiler.memory import memory_bytes
from schemas.base import Digest, NodeId
from schemas.capacity import StoredBlocks
from schemas.deployment import NodeWish, Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import BlobRef, Manifest
from schemas.plan import Plan, Receipt, ReceiptStatus, Route

MANY = Cluster(150, 10, 1)
SECOND = timedelta(seconds=1)


def changed(snapshot: Snapshot, *names: NodeId, **fields: object) -> Snapshot:
    """The same after another heartbeat of some nodes, in which some fields are others."""
    for name in names:
        before = snapshot.nodes[name].capacity
        update = {"sequence": before.sequence + 1, **fields}
        snapshot = fold(snapshot, CapacityReceived(before.model_copy(update=update)), NOW)
    return snapshot


def in_force(snapshot: Snapshot, plan: Plan) -> Snapshot:
    rollout, _ = step(snapshot.rollout(plan.deployment), Propose(plan, True), NOW) or pytest.fail("it is not proposed")
    for node in plan.nodes:
        said = Receipt(
            node=node,
            deployment=WISH.name,
            epoch=plan.epoch,
            plan=plan.digest,
            status=ReceiptStatus.READY,
            elapsed_ms=1,
        )
        rollout = note(rollout, said, NOW)
    taken = step(rollout, Proceed(), NOW) or pytest.fail("it is not committed")
    return fold(snapshot, RolloutAdvanced(taken[0]), NOW)


def test_of_a_few_dozen_nodes_all_are_looked_at() -> None:
    snapshot = Cluster(NODES_MAX, 4, 0).seen()
    assert shortlisted(snapshot, WISH, MANIFEST, NOW) == Shortlist(snapshot)


def test_of_many_the_nodes_in_use_and_the_likeliest_are() -> None:
    snapshot = MANY.seen()
    plan = among_likeliest(snapshot).plan
    slow = snapshot.among(sorted(snapshot.nodes, key=MANY.speed)[:40])
    bad = planned_anew(slow, WISH, MANIFEST, NOW, "all of them are slow").plan
    few = shortlisted(in_force(snapshot, bad), WISH, MANIFEST, NOW).snapshot
    assert len(few.nodes) <= NODES_MAX
    assert {*bad.nodes} <= few.nodes.keys()
    assert len({*plan.nodes} & few.nodes.keys()) >= len(plan.nodes) - 1


def test_the_shortlist_stays_from_one_search_to_the_next() -> None:
    snapshot = MANY.seen()
    snapshot = in_force(snapshot, among_likeliest(snapshot).plan)
    outlook = weigh(snapshot, WISH.name, DEFAULT_POLICY, NOW)
    assert outlook.searched is not None
    snapshot = fold(snapshot, Weighed(outlook), NOW)
    chosen = outlook.searched.facts.step_ms.keys()
    others = [name for name in snapshot.nodes if name not in chosen]
    provider = snapshot.nodes[others[0]].capacity.provider
    faster = provider.model_copy(update={"flops_per_s": 1e14, "bytes_per_s": 1e13})
    snapshot = changed(snapshot, others[0], provider=faster, memory_free_bytes=1 << 40)
    assert shortlisted(snapshot, WISH, MANIFEST, NOW + SECOND, outlook.searched).snapshot.nodes.keys() == chosen
    later = shortlisted(snapshot, WISH, MANIFEST, NOW + SEARCH_PERIOD, outlook.searched).snapshot
    assert others[0] in later.nodes
    found = weigh(snapshot, WISH.name, DEFAULT_POLICY, NOW + SEARCH_PERIOD).searched
    assert found is not None
    assert any(others[0] in {s.node for chain in chains for s in chain} for chains, _ in found.found)
    assert any(origin is Origin.RESPLIT for _, origin in found.found)


def test_a_shortlist_of_which_most_are_gone_is_drawn_anew() -> None:
    snapshot = MANY.seen()
    snapshot = in_force(snapshot, among_likeliest(snapshot).plan)
    searched = weigh(snapshot, WISH.name, DEFAULT_POLICY, NOW).searched
    assert searched is not None
    gone = frozenset(list(searched.facts.step_ms)[: NODES_MAX // 2 + 1])
    few = shortlisted(replace(snapshot, absent=gone), WISH, MANIFEST, NOW + SECOND, searched).snapshot
    assert len(few.offered) > NODES_MAX // 2
    plan = planned_anew(replace(snapshot, absent=gone), WISH, MANIFEST, NOW + SECOND, "half of them are gone").plan
    assert not gone.intersection(plan.nodes)


def test_what_has_the_blocks_is_on_it_and_what_is_drained_or_away_is_not() -> None:
    snapshot = MANY.seen()
    usual = shortlisted(snapshot, WISH, MANIFEST, NOW).snapshot.nodes.keys()
    stocked = next(name for name in snapshot.nodes if name not in usual)
    stored = StoredBlocks(model=WISH.model, ranges=((0, len(MANIFEST.blocks) - 1),))
    snapshot = changed(snapshot, stocked, on_disk=(stored,))
    drained = next(iter(usual))
    snapshot = fold(snapshot, NodeWished(NodeWish(node=drained, drained=True)), NOW)
    few = shortlisted(snapshot, WISH, MANIFEST, NOW).snapshot
    assert stocked in few.nodes
    assert drained not in few.nodes


def test_private_blocks_find_the_few_that_are_trusted() -> None:
    snapshot = MANY.seen()
    trusted = sorted(snapshot.nodes, key=MANY.speed)[20:40]  # slow ones: no others are looked for among these
    for name in snapshot.nodes:
        snapshot = fold(snapshot, NodeWished(NodeWish(node=name, trusted=name in trusted)), NOW)
    private = WISH.model_copy(update={"sensitive": (0, len(MANIFEST.blocks) - 1)})
    plan = planned_anew(snapshot, private, MANIFEST, NOW, "a test").plan
    stages = plan.routes[0].stages
    assert {stages[0].node, stages[-1].node} <= {*trusted}
    assert not {stage.node for stage in stages} <= {*trusted}


def test_all_blocks_private_find_a_plan_on_the_trusted_alone() -> None:
    snapshot = MANY.seen()
    trusted = sorted(snapshot.nodes, key=MANY.speed)[:30]
    for name in snapshot.nodes:
        snapshot = fold(snapshot, NodeWished(NodeWish(node=name, trusted=name in trusted)), NOW)
    private = WISH.model_copy(update={"sensitive": tuple(range(len(MANIFEST.blocks)))})
    assert {*planned_anew(snapshot, private, MANIFEST, NOW, "a test").plan.nodes} <= {*trusted}


def apart(manifest: Manifest, number: int) -> Manifest:
    """The same with blocks that it shares with no other model."""
    blocks = tuple(
        block.model_copy(update={"graph": BlobRef(digest=Digest(f"{number:032x}{block.index:032x}"), size_bytes=0)})
        for block in manifest.blocks
    )
    return manifest.model_copy(update={"blocks": blocks})


def test_what_is_promised_elsewhere_is_no_room_here() -> None:
    snapshot = MANY.seen()
    taken = Counter[str]()
    for number in range(6):  # within a second all of them see the same memory
        wish = WISH.model_copy(update={"name": f"model-{number}", "model": Digest(f"{number:064x}")})
        own = apart(MANIFEST, number)
        snapshot = fold(fold(snapshot, ManifestKnown(wish.model, own), NOW), DeploymentWritten(wish), NOW)
        plan = planned_anew(snapshot, wish, own, NOW, "a test").plan
        for stage in plan.routes[0].stages:
            taken[stage.node] += sum(memory_bytes(MANIFEST.blocks[block], wish.settings) for block in stage.blocks)
        snapshot = in_force(snapshot, plan)
    assert all(size <= snapshot.nodes[NodeId(node)].capacity.memory_free_bytes for node, size in taken.items())


def test_a_deployment_that_lost_all_of_very_many_nodes_finds_others() -> None:
    snapshot = Cluster(200, 4, 2).seen()
    wish = WISH.model_copy(update={"settings": Settings(context_tokens=1024, max_sequences=16)})
    snapshot = fold(snapshot, DeploymentWritten(wish), NOW)
    plan = planned_anew(snapshot, wish, MANIFEST, NOW, "a test").plan
    stages = plan.routes[0].stages
    placed = [*snapshot.nodes][: 16 * len(stages)]
    routes = tuple(_route(number, stages, placed[number * len(stages) :]) for number in range(16))
    snapshot = in_force(snapshot, plan.model_copy(update={"routes": routes}))
    few = shortlisted(snapshot, wish, MANIFEST, NOW).snapshot
    assert len(few.nodes) >= len(placed) + OTHERS_MIN
    lost = replace(snapshot, absent=frozenset(placed))
    anew = planned_anew(lost, wish, MANIFEST, NOW, "all of them are lost").plan
    assert not {*placed}.intersection(anew.nodes)


def _route(number: int, stages: tuple[Stage, ...], nodes: list[NodeId]) -> Route:
    """The same cuts on other nodes."""
    moved = tuple(stage.model_copy(update={"node": node}) for stage, node in zip(stages, nodes, strict=False))
    return Route(index=number, source=moved[0].node, stages=moved, max_sequences=1)


def test_who_refused_a_moment_ago_is_asked_again_where_nobody_else_has_room() -> None:
    snapshot = MANY.seen()
    roomy = next(iter(snapshot.nodes))
    snapshot = changed(snapshot, *snapshot.nodes, memory_free_bytes=1000)
    snapshot = changed(snapshot, roomy, memory_free_bytes=1 << 40)
    rollout = replace(snapshot.rollout(WISH.name), refused={roomy: NOW})
    snapshot = fold(snapshot, RolloutAdvanced(rollout), NOW)
    assert roomy in snapshot.rollout(WISH.name).shunned(NOW)
    assert planned_anew(snapshot, WISH, MANIFEST, NOW, "a test").plan.nodes == (roomy,)


def test_an_error_says_that_not_all_were_looked_at() -> None:
    snapshot = MANY.seen()
    snapshot = changed(snapshot, *snapshot.nodes, memory_free_bytes=1000)
    with pytest.raises(ResplitError, match=r"\(of 150 nodes the \d+ roomiest were looked at\)") as caught:
        planned_anew(snapshot, WISH, MANIFEST, NOW, "a test")
    assert caught.value.code is ErrorCode.MODEL_TOO_LARGE
