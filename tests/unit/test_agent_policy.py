"""What the root forbids is in no plan that an agent loads, on its own node or on another, whoever signed it."""

from datetime import UTC, datetime, timedelta

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from agent.policy import check_allowed, check_block_count
from bus.credentials import nkey_seed, public_nkey
from schemas.base import DeploymentName, Digest, NodeId
from schemas.deployment import Cloud, Sensitive, Settings, Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import Plan, Route
from schemas.roster import ClusterId, Member, Policy, Role, Roster, TrustTier, spelled
from tests import trigger_world

NOW = datetime(2026, 7, 1, tzinfo=UTC)
DAY = timedelta(days=1)
CHAT, EMBED = DeploymentName("chat"), DeploymentName("embed")
SAFE, EDGE, LEADER, STRANGER = NodeId("safe"), NodeId("edge"), NodeId("leader"), NodeId("stranger")


def member(name: NodeId, number: int, role: Role, tier: TrustTier | None) -> Member:
    raw = bytes([number]) * 32
    return Member(
        name=name,
        role=role,
        tier=tier,
        signing=spelled(Ed25519PrivateKey.from_private_bytes(raw).public_key()),
        sealing=spelled(X25519PrivateKey.from_private_bytes(raw).public_key()),
        bus=public_nkey(nkey_seed(raw)),
        link=raw.hex(),
        not_before=NOW,
        not_after=NOW + DAY,
    )


def roster(models: dict[str, tuple[Digest, ...]] | None = None, **sensitive: Sensitive) -> Roster:
    """Of one trusted agent, one at the edge and an orchestrator; `every` stands for `*`."""
    rules = {"*" if name == "every" else name: blocks for name, blocks in sensitive.items()}
    return Roster(
        cluster=ClusterId("a" * 32),
        root_version=1,
        version=3,
        issued_at=NOW,
        expires_at=NOW + DAY,
        authority="0" * 64,
        members=(
            member(SAFE, 1, "agent", "trusted"),
            member(EDGE, 2, "agent", "edge"),
            member(LEADER, 3, "orchestrator", None),
        ),
        policy=Policy(sensitive=rules, models=models),
    )


def plan(*routes: str, deployment: DeploymentName = CHAT) -> Plan:
    """Six blocks; each route as `node:first-last node:first-last`."""
    made = []
    for index, text in enumerate(routes):
        stages = []
        for part in text.split():
            node, _, blocks = part.partition(":")
            first, last = blocks.split("-")
            stages.append(Stage(node=NodeId(node), first=int(first), last=int(last)))
        made.append(Route(index=index, source=stages[0].node, stages=tuple(stages), max_sequences=1))
    return Plan(
        deployment=deployment,
        model=Digest("d" * 64),
        epoch=1,
        block_count=6,
        settings=Settings(max_sequences=len(made)),
        routes=tuple(made),
        reason="a test",
    )


def model(blocks: int) -> Manifest:
    whole = trigger_world.manifest()
    return whole.model_copy(update={"blocks": whole.blocks[:blocks]})


def refused(found: Roster, asked: Plan, why: str) -> None:
    with pytest.raises(ResplitError, match=why) as caught:
        check_allowed(found, asked)
    assert (caught.value.code, caught.value.field) == (ErrorCode.FORBIDDEN, "plan")


def test_where_nothing_is_sensitive_every_agent_holds_everything() -> None:
    check_allowed(roster(), plan("edge:0-5"))
    check_allowed(roster(), plan("safe:0-2 edge:3-5"))


def test_the_ends_stay_on_trusted_nodes_and_the_middle_goes_anywhere() -> None:
    found = roster(every="ends")
    check_allowed(found, plan("safe:0-0 edge:1-4 safe:5-5"))
    refused(
        found, plan("edge:0-2 safe:3-5"), r"block 0 of 'chat' must not be on 'edge', which is not trusted.*roster 3"
    )
    refused(found, plan("safe:0-2 edge:3-5"), "block 5 of 'chat' must not be on 'edge'")


def test_where_any_block_is_sensitive_no_plan_lets_requests_leave() -> None:
    asked = plan("safe:0-5").model_copy(update={"cloud": Cloud(name="eu", model="big-1")})
    check_allowed(roster(), asked)
    check_allowed(roster(embed="all"), asked)
    refused(roster(chat="ends"), asked, "must not leave the cluster.*'eu'")
    refused(roster(every=(3,)), asked, "must not leave the cluster")


def test_who_must_not_hold_the_first_block_answers_no_requests() -> None:
    def answered_at(asked: Plan, source: str) -> Plan:
        return asked.model_copy(
            update={"routes": tuple(route.model_copy(update={"source": source}) for route in asked.routes)}
        )

    there_and_back = plan("safe:0-0 edge:1-4 safe:5-5")
    why = r"requests for 'chat' must not be answered at 'edge', which is not trusted by roster 3"
    refused(roster(every="ends"), answered_at(there_and_back, "edge"), why)
    check_allowed(roster(every="ends"), answered_at(there_and_back, "safe"))
    check_allowed(roster(every=(5,)), answered_at(there_and_back, "edge"))
    refused(roster(), answered_at(there_and_back, "nobody"), "answered at 'nobody', which is no agent of this cluster")


def test_every_route_of_a_plan_is_looked_at() -> None:
    refused(roster(every="ends"), plan("safe:0-5", "safe:0-1 edge:2-5"), "block 5 .* on 'edge'")


def test_a_deployment_s_own_rule_adds_to_that_of_every_deployment() -> None:
    found = roster(every="ends", chat=(2,))
    check_allowed(found, plan("safe:0-0 edge:1-4 safe:5-5", deployment=EMBED))
    refused(found, plan("safe:0-0 edge:1-4 safe:5-5"), "block 2 of 'chat'")
    check_allowed(found, plan("safe:0-2 edge:3-4 safe:5-5"))
    refused(roster(chat="all"), plan("safe:0-4 edge:5-5"), "block 5")


@pytest.mark.parametrize("name", [STRANGER, LEADER])
def test_who_is_no_agent_of_the_cluster_holds_nothing_though_nothing_is_sensitive(name: NodeId) -> None:
    refused(roster(), plan(f"safe:0-2 {name}:3-5"), f"block 3 .* on '{name}', which is no agent of this cluster")


@pytest.mark.parametrize("blocks", [5, 7])
def test_a_plan_does_not_hide_which_block_of_its_model_is_the_last(blocks: int) -> None:
    check_block_count(plan("safe:0-5"), model(6))
    with pytest.raises(ResplitError, match=f"has {blocks} blocks, not 6 as the plan says") as caught:
        check_block_count(plan("safe:0-5"), model(blocks))
    assert (caught.value.code, caught.value.field) == (ErrorCode.FORBIDDEN, "plan")


def test_a_deployment_runs_the_models_that_the_root_names_and_no_other() -> None:
    ran, other = plan("safe:0-5").model, Digest("e" * 64)
    check_allowed(roster({CHAT: (other, ran)}), plan("safe:0-5"))
    refused(
        roster({CHAT: (other,)}), plan("safe:0-5"), "'chat' must not run model dddddddddddd, which roster 3 does not"
    )


def test_a_deployment_s_own_models_take_the_place_of_those_of_every_other() -> None:
    ran, other = plan("safe:0-5").model, Digest("e" * 64)
    found = roster({"*": (other,), CHAT: (ran,)})
    check_allowed(found, plan("safe:0-5"))
    refused(found, plan("safe:0-5", deployment=EMBED), "'embed' must not run model")
    check_allowed(roster({EMBED: (other,)}), plan("safe:0-5"))
