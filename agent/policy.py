"""PURE: what the root forbids, whoever signed the plan.

A node that is trusted with a block also hands on what comes out of it. So an agent refuses a plan for what it puts on
any node that it sees and not only on its own: then no trusted node sends anything to one that a stolen orchestrator's
key chose. An ingress sees the whole plan, and a host the stages next to its own with their blocks, which follow on its
own (`schemas.section`): whatever others are told, what it computed goes to a node that may hold the next block. A model
can hand on what it reads as well; where the root says which ones a deployment may run, agents run no other.
"""

from collections.abc import Collection, Iterable

from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.plan import Plan
from schemas.roster import Roster, forbidden
from schemas.section import SeenPlan

INPUT = (0,)
"""The block that reads what the source of a route reads: prompts, and every token that came of them."""


def check_allowed(roster: Roster, plan: SeenPlan) -> None:
    """Raise `ResplitError(FORBIDDEN)` where `plan` runs a model that its deployment must not run, puts a block on a
    node that must not hold it, has requests answered at one that must not hold the first, or outside the cluster where
    any block is sensitive."""
    models = roster.policy.models_of(plan.deployment)
    if models is not None and plan.model not in models:
        message = (
            f"{plan.deployment!r} must not run model {plan.model[:12]}, which roster {roster.version} does not name"
        )
        raise ResplitError(ErrorCode.FORBIDDEN, message, "plan")

    if isinstance(plan, Plan) and plan.cloud is not None and roster.policy.rules_of(plan.deployment):
        message = f"requests to {plan.deployment!r} must not leave the cluster, as roster {roster.version} rules it"
        raise ResplitError(ErrorCode.FORBIDDEN, f"{message}; its plan names cloud {plan.cloud.name!r}", "plan")

    for stage in plan.placed.values():
        check_holder(roster, plan, stage.node, stage.blocks)
    for route in plan.routes:
        check_driver(roster, plan, (route.source,), route.source)


def check_holder(roster: Roster, plan: SeenPlan, node: NodeId, blocks: Iterable[int]) -> None:
    """Raise `ResplitError(FORBIDDEN)` where `node` must not hold one of `blocks`, nor what they keep of sequences."""
    if wrong := forbidden(roster.policy, roster, plan.deployment, plan.block_count, node, blocks):
        raise _forbidden(roster, f"block {min(wrong)} of {plan.deployment!r} must not be on {node!r}", node)


def check_driver(roster: Roster, plan: SeenPlan, ingresses: Collection[str], node: NodeId) -> None:
    """Raise `ResplitError(FORBIDDEN)` where `node` is none of `ingresses`, or must not read what comes in and out."""
    if node not in ingresses:
        message = f"{node!r} does not drive {plan.deployment!r}: the orchestrator did not name it"
        raise ResplitError(ErrorCode.FORBIDDEN, message, "ingress")
    if forbidden(roster.policy, roster, plan.deployment, plan.block_count, node, INPUT):
        raise _forbidden(roster, f"requests for {plan.deployment!r} must not be answered at {node!r}", node)


def _forbidden(roster: Roster, what: str, node: NodeId) -> ResplitError:
    member = roster.member(node)
    why = "is no agent of this cluster" if member is None or member.role != "agent" else "is not trusted"
    return ResplitError(ErrorCode.FORBIDDEN, f"{what}, which {why} by roster {roster.version}", "plan")


def check_block_count(plan: SeenPlan, manifest: Manifest) -> None:
    """Raise `ResplitError(FORBIDDEN)` where `plan` says that its model has more or fewer blocks than it has: then the
    model's last block would not count as the last."""
    if plan.block_count != len(manifest.blocks):
        message = f"{manifest.name!r} has {len(manifest.blocks)} blocks, not {plan.block_count} as the plan says"
        raise ResplitError(ErrorCode.FORBIDDEN, message, "plan")
