"""PURE: what the root forbids, whoever signed the plan.

A node that is trusted with a block also hands on what comes out of it. So an agent refuses a plan for what it puts on
any node that it sees and not only on its own: then no trusted node sends anything to one that a stolen orchestrator's
key chose. An ingress sees the whole plan, and a host the stages next to its own with their blocks, which follow on its
own (`schemas.section`): whatever others are told, what it computed goes to a node that may hold the next block. A model
can hand on what it reads as well; where the root says which ones a deployment may run, agents run no other.
"""

from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest
from schemas.roster import Roster, forbidden
from schemas.section import SeenPlan


def check_allowed(roster: Roster, plan: SeenPlan) -> None:
    """Raise `ResplitError(FORBIDDEN)` where `plan` runs a model that its deployment must not run, or puts a block on a
    node that must not hold it."""
    models = roster.policy.models_of(plan.deployment)
    if models is not None and plan.model not in models:
        message = (
            f"{plan.deployment!r} must not run model {plan.model[:12]}, which roster {roster.version} does not name"
        )
        raise ResplitError(ErrorCode.FORBIDDEN, message, "plan")
    for stage in plan.placed.values():
        wrong = forbidden(roster.policy, roster, plan.deployment, plan.block_count, stage.node, stage.blocks)
        if not wrong:
            continue
        member = roster.member(stage.node)
        why = "is no agent of this cluster" if member is None or member.role != "agent" else "is not trusted"
        message = f"block {min(wrong)} of {plan.deployment!r} must not be on {stage.node!r}, which {why}"
        raise ResplitError(ErrorCode.FORBIDDEN, f"{message} by roster {roster.version}", "plan")


def check_block_count(plan: SeenPlan, manifest: Manifest) -> None:
    """Raise `ResplitError(FORBIDDEN)` where `plan` says that its model has more or fewer blocks than it has: then the
    model's last block would not count as the last."""
    if plan.block_count != len(manifest.blocks):
        message = f"{manifest.name!r} has {len(manifest.blocks)} blocks, not {plan.block_count} as the plan says"
        raise ResplitError(ErrorCode.FORBIDDEN, message, "plan")
