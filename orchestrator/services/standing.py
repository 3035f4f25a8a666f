"""PURE: how the services of one pipeline stand, from one slot to the next."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from orchestrator.services.core import Placed
from orchestrator.services.measured import Rates
from orchestrator.services.observed import Seen
from orchestrator.services.routing import Known
from schemas.base import NodeId
from schemas.deployment import Deployment
from schemas.errors import ErrorBody


@dataclass(frozen=True)
class Basis:
    """What the core services were placed for: if it is another, they are placed anew."""

    services: tuple[Deployment, ...]
    """As they are to be run, wherever,"""
    nodes: frozenset[NodeId]
    """what could be used,"""
    trusted: frozenset[NodeId]
    """and of those the ones that may hold what is sensitive."""


@dataclass(frozen=True)
class Standing:
    """What was decided last, and what is known for the next decision."""

    basis: Basis | None
    """None: what was found is kept until all nodes of it were heard."""
    placed: Placed
    """Instances of the services that are whole, core and light."""
    rates: Rates
    at: datetime
    """When what arrived was last counted."""
    seen: Seen = field(default_factory=Seen)
    debts: Mapping[str, float] = field(default_factory=dict)
    """Z, by task."""
    known: Known = field(default_factory=dict)
    """Where requests are expected to go."""
    late: Mapping[str, float] = field(default_factory=dict)
    """By task: the share of requests that is expected to be late."""
    strain: float = 1.0
    """How many times slower services are taken to be than they say: what shares their nodes, and what was forgotten."""
    turn: int = 0
    why: str = ""
    """A sentence about the last change."""
    terms: Mapping[str, float] = field(default_factory=dict)
    """And its figures."""
    error: ErrorBody | None = None
    """Why the services cannot be placed."""
    changed_at: datetime | None = None
    """When an instance was added, dropped or moved last."""
