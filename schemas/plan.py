"""Plans: who runs which blocks of a deployment in one epoch, and the events that carry them."""

from collections.abc import Collection, Mapping
from enum import StrEnum
from hashlib import sha256
from typing import Self

from pydantic import AwareDatetime, Field, model_validator

from schemas.base import DeploymentId, DeploymentName, Digest, NodeName, Sha256, Value
from schemas.codec import encode
from schemas.deployment import Cloud, Placement, Settings, Stage
from schemas.sealed import NodeKeys
from schemas.slo import Slo

Place = tuple[int, int]
"""Where a stage stands in a plan: its route's index, and its number on that route. Frames name stages so."""


class Route(Value):
    """One chain of stages that covers every block, in order. A node may appear in it more than once."""

    index: int = Field(ge=0)
    source: NodeName
    """The ingress that drives this route: it tokenises, feeds the first stage and streams the output."""
    stages: tuple[Stage, ...] = Field(min_length=1)
    max_sequences: int = Field(ge=1)
    """This route's share of the deployment's slots."""

    @model_validator(mode="after")
    def _stages_are_consecutive(self) -> Self:
        expected = 0
        for stage in self.stages:
            if stage.first != expected:
                raise ValueError(f"route {self.index}: a stage starts at block {stage.first}, not at {expected}")
            expected = stage.last + 1
        return self

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes of the route, each once, in the order in which they first appear."""
        return tuple(dict.fromkeys((self.source, *(stage.node for stage in self.stages))))


class Plan(Value):
    """The whole placement of one deployment in one epoch.

    A sequence is bound at admission to one route of one epoch, so several chains, hand-over and
    failover need no other shape.
    """

    deployment: DeploymentId
    model: Sha256
    epoch: int = Field(ge=1)
    """Grows by at least one with every plan of the deployment."""
    previous: Sha256 | None = None
    """Digest of the plan of the epoch that this one replaces."""
    block_count: int = Field(ge=1)
    settings: Settings
    routes: tuple[Route, ...] = Field(min_length=1)
    reason: str
    """One sentence for the audit: why this plan and not another."""
    slo: Slo | None = None
    """The class of the deployment's requests (`Deployment.slo`). It says nothing about how the model runs, so plans
    of another class are of the same `family`."""
    sealed: bool = False
    """Whether ingresses take only sealed requests (`Deployment.sealed`)."""
    cold: bool = False
    """Nothing is loaded: the sources of its routes, each of which stands for all blocks on its own, take requests,
    which wait for the next plan."""
    loads_s: float | None = Field(default=None, ge=0)
    """Of a cold one: how long it last took from being asked for to being loaded."""
    cloud: Cloud | None = None
    """Who answers what the nodes cannot (`Deployment.outside`)."""

    @model_validator(mode="after")
    def _routes_cover_every_block(self) -> Self:
        for position, route in enumerate(self.routes):
            if route.index != position:
                raise ValueError(f"route {position} carries index {route.index}")
            if route.stages[-1].last != self.block_count - 1:
                raise ValueError(f"route {position} ends at block {route.stages[-1].last} of {self.block_count}")
            if self.cold and route.nodes != (route.source,):
                raise ValueError(f"route {position} of a cold plan is on more than its source")
        if sum(route.max_sequences for route in self.routes) > self.settings.max_sequences:
            raise ValueError("the routes share out more sequences than the deployment has")
        return self

    @property
    def chains(self) -> Placement:
        """The stages of each route."""
        return tuple(route.stages for route in self.routes)

    @property
    def digest(self) -> Digest:
        return Digest(sha256(encode(self)).hexdigest())

    @property
    def family(self) -> Digest:
        """What `family_of` says."""
        return family_of(self.deployment, self.model, self.settings)

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(node for route in self.routes for node in route.nodes))

    @property
    def placed(self) -> Mapping[Place, Stage]:
        """Every stage, by its place; none of a cold plan."""
        if self.cold:
            return {}
        return {(route.index, i): stage for route in self.routes for i, stage in enumerate(route.stages)}

    def blocks_on(self, node: str) -> tuple[int, ...]:
        """Every block that `node` hosts under this plan, over all routes, ascending; none of a cold plan."""
        return blocks_on(self.placed, node)


def family_of(deployment: DeploymentName, model: Digest, settings: Settings) -> Digest:
    """Equal for plans that run a model in the same way: a sequence can cross between them with its caches."""
    return Digest(sha256(f"{deployment} {model} ".encode() + encode(settings)).hexdigest())


def blocks_on(placed: Mapping[Place, Stage], node: str) -> tuple[int, ...]:
    """The blocks of all stages of `node`, ascending."""
    return tuple(sorted({block for stage in placed.values() if stage.node == node for block in stage.blocks}))


def spans(blocks: Collection[int]) -> str:
    """Ascending blocks as people read them, `0-3,7`."""
    starts = [b for b in blocks if b - 1 not in blocks]
    ends = [b for b in blocks if b + 1 not in blocks]
    return ",".join(f"{a}-{b}" if a != b else str(a) for a, b in zip(starts, ends, strict=True))


class PlanPhase(StrEnum):
    """The step of a reconfiguration that an event announces (`mathematics.md`, A5)."""

    PREPARE = "prepare"
    COMMIT = "commit"
    ABORT = "abort"
    RETIRE = "retire"
    RESEAL = "reseal"


class PlanEvent(Value):
    """The plans of one deployment that matter now, as the orchestrator writes them down.

    Orchestrators read all of it, each node its part (`schemas.section`).

    An event is the whole state, not a difference: an agent that missed any number of events acts on the
    last one alone. It loads `candidate`, serves `current`, lets sequences finish on `draining`, and frees
    whatever stands in none of the three. (`phase`, `reason`) say what changed, for people and the audit.
    """

    deployment: DeploymentId
    term: int = Field(ge=1)
    """Fences leaders: an agent ignores an event of a lower term than it has seen."""
    revision: int = Field(ge=1)
    """Grows with every event of the deployment: an agent ignores what it has seen already."""
    phase: PlanPhase
    reason: str
    issued_at: AwareDatetime
    current: Plan | None = None
    candidate: Plan | None = None
    draining: tuple[Plan, ...] = ()
    lost: tuple[NodeName, ...] = ()
    """Nodes of these plans, or of one that ends with this event, that are lost: what ran over them is to be computed
    elsewhere, and what they had accepted is another's to answer. One that runs its part all the same says so in its
    heartbeat."""
    keys: tuple[NodeKeys, ...] | None = None
    """Of sealed models, the keys of the blocks that these plans give to each node, which alone can open them."""
    answering: tuple[NodeName, ...] = ()
    """Nodes at which routes of plans in force began, now or earlier: they may still answer requests, and let them go
    over to whatever is in force."""
    epoch: int = Field(default=0, ge=0)
    """The highest epoch that was ever proposed: the next plan's is higher."""
    roster: int = Field(default=0, ge=0)
    """The version of the roster by which keys and letters were made for the nodes. Where there is a newer one, they
    are to be made anew."""

    @model_validator(mode="after")
    def _plans_belong_together(self) -> Self:
        epochs = [plan.epoch for plan in self.plans]
        if len(set(epochs)) != len(epochs):
            raise ValueError(f"two plans of one epoch among {epochs}")
        if any(plan.deployment != self.deployment for plan in self.plans):
            raise ValueError("a plan of another deployment")
        if self.current is not None and self.candidate is not None and self.candidate.epoch <= self.current.epoch:
            raise ValueError(f"candidate epoch {self.candidate.epoch} does not follow {self.current.epoch}")
        return self

    @property
    def plans(self) -> tuple[Plan, ...]:
        """Every plan whose blocks an agent must keep loaded."""
        found = (*self.draining, self.current, self.candidate)
        return tuple(plan for plan in found if plan is not None)

    @property
    def ingresses(self) -> frozenset[str]:
        """Nodes that may answer requests: they see all of these plans."""
        served = (*self.draining, *((self.current,) if self.current is not None else ()))
        return frozenset(self.answering).union(route.source for plan in served for route in plan.routes)


class ReceiptStatus(StrEnum):
    """An agent's answer to a plan event."""

    READY = "ready"
    """Every block of the plan on this node is loaded, verified and warm."""
    REFUSED = "refused"
    """The plan cannot run here; `error` says why."""
    APPLIED = "applied"
    """The plan is this node's current one."""
    DRAINED = "drained"
    """This node has no request left that runs over the plan."""
    RETIRED = "retired"
    """Nothing of the plan is loaded on this node any more."""


class Receipt(Value):
    """Where one agent stands with one plan."""

    node: NodeName
    deployment: DeploymentId
    epoch: int = Field(ge=1)
    plan: Sha256
    status: ReceiptStatus
    error: str | None = None
    """Why the plan was refused."""
    elapsed_ms: float = Field(ge=0)
    """Time from the event's arrival to this receipt."""
