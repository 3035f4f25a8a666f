"""What leaves this node by the word of another: results, to who drives sequences, and caches, to who adopts them.

Both are asked for in frames, which any agent can send: a host in the middle of a route could name itself as the one who
wants the tokens, or ask for what the first blocks kept of a prompt. So results go only to the ingresses that the
orchestrator named, of whom the root lets each hold the first block, which reads the same; and caches of a block only to
who may hold that block. What is refused is audited.
"""

import logging
from collections.abc import Callable, Collection, Iterable
from typing import Protocol

from agent.policy import check_driver, check_holder
from bus.audit import AuditTrail
from bus.identity import Identity
from schemas.audit import AuditKind
from schemas.base import DeploymentName, NodeId
from schemas.errors import ResplitError
from schemas.section import SeenPlan

REFUSED_MAX = 100
"""Refusals that are audited in the life of a process; one who goes on asking must not fill the trail."""

log = logging.getLogger(__name__)


class Guard(Protocol):
    """Who may be given what."""

    def may_drive(self, plan: SeenPlan, node: NodeId, /) -> bool: ...
    def may_hold(self, plan: SeenPlan, node: NodeId, blocks: Iterable[int], /) -> bool: ...


class RosterGuard:
    """By the roster of the root, and by what the orchestrator said of the deployment last."""

    def __init__(
        self,
        identity: Identity,
        ingresses: Callable[[DeploymentName], Collection[str]],
        audit: Callable[[], AuditTrail],
    ) -> None:
        """`ingresses`: who may drive a deployment; `audit`: the trail, which there is before the first frame."""
        self._identity = identity
        self._ingresses = ingresses
        self._audit = audit
        self._refused = 0

    def may_drive(self, plan: SeenPlan, node: NodeId) -> bool:
        """Whether `node` is given what comes of the plan's sequences."""
        named = self._ingresses(DeploymentName(plan.deployment))
        return self._holds(plan, node, lambda: check_driver(self._identity.roster, plan, named, node))

    def may_hold(self, plan: SeenPlan, node: NodeId, blocks: Iterable[int]) -> bool:
        """Whether `node` is given what sequences left in the caches of these blocks."""
        return self._holds(plan, node, lambda: check_holder(self._identity.roster, plan, node, blocks))

    def _holds(self, plan: SeenPlan, node: NodeId, check: Callable[[], None]) -> bool:
        if node == self._identity.name:
            return True
        try:
            check()
        except ResplitError as error:
            self._refused += 1
            if self._refused <= REFUSED_MAX:
                log.warning("refused %s: %s", node, error.message)
                self._audit().record(
                    AuditKind.FRAME_REFUSED,
                    "a peer asked for what it must not have, and was given nothing",
                    deployment=plan.deployment,
                    epoch=plan.epoch,
                    peer=node,
                    error=error.message,
                )
            return False
        return True
