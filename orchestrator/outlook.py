"""PURE: what is kept of the last time a deployment's plan was weighed against others."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from orchestrator.decision import Decision
from orchestrator.searched import Searched
from orchestrator.strain import UNSTRAINED, Strain
from orchestrator.trigger import TriggerState
from schemas.base import DeploymentName, Digest, NodeId
from schemas.deployment import Placement


@dataclass(frozen=True)
class Outlook:
    """The last decision about one deployment, why it was made, and what is ready should a node fail."""

    deployment: DeploymentName
    plan: Digest
    """The current plan that was weighed; of another plan the decision says nothing."""
    decision: Decision
    state: TriggerState
    failovers: Mapping[NodeId, Placement] = field(default_factory=dict)
    """For each node in use, the best plan without it, computed before it fails: routes that do not need the node stay
    as they are."""
    optimism: float = 1.0
    """`orchestrator.beliefs.optimism_of`"""
    strain: Strain = UNSTRAINED
    """How much slower nodes are while they serve it."""
    starved_since: Mapping[NodeId, datetime] = field(default_factory=dict)
    """Nodes in use that have no memory left, and since when."""
    searched: Searched | None = None
    """The last search for other plans than this one."""
    load: float | None = None
    """How many sequences run on average (`orchestrator.demand.averaged`); None before anybody looked."""
    regret: tuple[int, str] | None = None
    """The epoch that was being prepared and is not to be prepared any further, if it is not, and why."""
