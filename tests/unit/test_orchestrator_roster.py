"""What the root says, the orchestrator plans by, whatever operators wrote."""

from typing import Literal

import pytest

from orchestrator.decide import Cause, Replan, decide, exposed_by, what_is_needed
from orchestrator.fold import DeploymentWritten, NodeWished, RosterTaken, fold
from orchestrator.planner import check_shape
from orchestrator.proposing import propose
from orchestrator.standby import bystander
from orchestrator.trial import check_trustable, trial
from orchestrator.view import status
from schemas.base import Digest, NodeId
from schemas.codec import encode
from schemas.deployment import NodeWish, Sensitive
from schemas.errors import ErrorCode, ResplitError
from schemas.roster import Member, Policy, Roster, forbidden
from tests.trigger_world import CHAT, World, manifest
from tests.unit.test_roster import member, roster

N0, N1, N2 = (NodeId(f"n{i}") for i in range(3))
Tier = Literal["trusted", "edge"]
OTHER = Digest("e" * 64)


def enrolled(version: int, sensitive: dict[str, Sensitive] | None = None, **tiers: Tier) -> Roster:
    members: list[Member] = [member(name, 20 + i, tier=tier) for i, (name, tier) in enumerate(tiers.items())]
    return roster(version, *members, policy=Policy(sensitive=sensitive or {}))


def under(world: World, found: Roster) -> World:
    world.snapshot = fold(world.snapshot, RosterTaken(found), world.now)
    return world


def quiet(nodes: int = 3) -> World:
    return World(nodes, 0, noise=0.0, room=9.0)


def test_an_operator_may_trust_less_than_the_root_and_never_more() -> None:
    world = under(quiet(), enrolled(1, n0="trusted", n1="edge"))
    assert [world.snapshot.trusts(node) for node in (N0, N1, N2)] == [True, False, False]
    assert [world.snapshot.distrusts(NodeId(name)) for name in ("n1", "stranger")] == [True, True]
    for node, said in ((N0, False), (N1, True)):
        world.snapshot = fold(world.snapshot, NodeWished(NodeWish(node=node, trusted=said)), world.now)
    assert [world.snapshot.trusts(node) for node in (N0, N1)] == [False, False]
    check_trustable(world.snapshot, N0)
    with pytest.raises(ResplitError, match="'n1' is no trusted member by roster 1") as caught:
        check_trustable(world.snapshot, N1)
    assert (caught.value.code, caught.value.field) == (ErrorCode.FORBIDDEN, "node")


def test_a_policy_that_arrives_moves_blocks_at_once_and_outlasts_what_is_deployed_after_it() -> None:
    world = quiet()
    holder = NodeId(world.plan.nodes[0])
    tiers: dict[str, Tier] = {name: "edge" if name == holder else "trusted" for name in (N0, N1, N2)}
    rules = enrolled(2, {"*": "ends"}, **tiers)
    under(world, rules)
    [asked] = decide(world.snapshot, world.now)
    assert isinstance(asked, Replan)
    assert (asked.need.cause, asked.need.hard) == (Cause.TRUST_CHANGED, True)
    plan = propose(world.snapshot, world.snapshot.deployments[CHAT], asked.need, world.now).plan
    for stage in (stage for chain in plan.chains for stage in chain):
        assert not forbidden(rules.policy, rules, CHAT, plan.block_count, stage.node, stage.blocks)
    # A wish that is written anew does not take the policy back, even where it says that it has none.
    bare = world.wish.model_copy(update={"ruled": ()})
    world.snapshot = fold(world.snapshot, DeploymentWritten(bare), world.now)
    assert exposed_by(world.snapshot, world.snapshot.deployments[CHAT], world.plan) is not None
    under(world, enrolled(3, None, **tiers))
    assert exposed_by(world.snapshot, world.snapshot.deployments[CHAT], world.plan) is None


def test_a_rule_that_names_blocks_which_a_model_has_not_is_no_fault_of_the_operator() -> None:
    world = under(quiet(), enrolled(1, {"*": (0, 500)}, n0="trusted", n1="trusted", n2="trusted"))
    ruled = world.snapshot.deployments[CHAT]
    check_shape(ruled, manifest())
    assert ruled.sensitive_of(8) == {0}
    with pytest.raises(ResplitError):
        check_shape(ruled.model_copy(update={"sensitive": (500,)}), manifest())


def test_a_leader_that_was_deposed_still_knows_the_roster() -> None:
    world = under(quiet(), enrolled(4, n0="trusted"))
    assert bystander(world.snapshot).roster == world.snapshot.roster


def pinning(version: int, *models: Digest) -> Roster:
    tiers: dict[str, Tier] = {"n0": "trusted", "n1": "trusted", "n2": "trusted"}
    members = enrolled(version, None, **tiers).members
    return roster(version, *members, policy=Policy(models={CHAT: models} if models else None))


def test_a_model_that_the_root_does_not_name_is_not_planned_whatever_was_wished() -> None:
    world = under(quiet(), pinning(1, OTHER))
    wish = world.snapshot.deployments[CHAT]
    assert wish.is_barred
    need = what_is_needed(world.snapshot, wish, world.snapshot.rollout(CHAT))
    assert need is not None and (need.cause, need.hard) == (Cause.MODEL_BARRED, True)
    for tried in (
        lambda: check_shape(wish, manifest()),
        lambda: trial(world.snapshot, wish, manifest(), world.now),
        lambda: propose(world.snapshot, wish, need, world.now),
    ):
        with pytest.raises(
            ResplitError, match=f"does not let 'chat' run model .* only {OTHER[:12]}.*roster policy"
        ) as e:
            tried()
        assert (e.value.code, e.value.field) == (ErrorCode.FORBIDDEN, "model")
    bare = world.wish.model_copy(update={"models": None})
    world.snapshot = fold(world.snapshot, DeploymentWritten(bare), world.now)
    assert world.snapshot.deployments[CHAT].is_barred, "a wish that is written anew does not take the policy back"


def test_a_model_that_the_root_comes_to_name_is_planned_again() -> None:
    world = under(quiet(), pinning(1, OTHER))
    under(world, pinning(2, OTHER, world.plan.model))
    wish = world.snapshot.deployments[CHAT]
    assert not wish.is_barred
    assert what_is_needed(world.snapshot, wish, world.snapshot.rollout(CHAT)) is None
    assert b"models" not in encode(wish), "the policy of the day is in nobody's wish"


def test_who_left_is_lost_at_once_and_is_not_shown_once_nothing_needs_it() -> None:
    world = under(quiet(), enrolled(1, n0="trusted", n1="trusted", n2="trusted"))
    holder, *others = (NodeId(name) for name in sorted((N0, N1, N2), key=lambda name: name not in world.plan.nodes))
    assert set(world.plan.nodes) == {holder}
    rest: dict[str, Tier] = dict.fromkeys(others, "trusted")
    under(world, enrolled(2, None, **rest))
    assert world.snapshot.absent == {holder}
    [asked] = decide(world.snapshot, world.now)
    assert isinstance(asked, Replan)
    assert asked.need.cause is Cause.NODE_LOST
    shown = {node.capacity.node: node.lost for node in status(world.snapshot, world.now).nodes}
    assert shown == {holder: True, others[0]: False, others[1]: False}, "a plan is still on it"
    rest = dict.fromkeys((holder, others[0]), "trusted")
    under(world, enrolled(3, None, **rest))
    assert {node.capacity.node for node in status(world.snapshot, world.now).nodes} == {holder, others[0]}
