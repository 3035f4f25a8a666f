"""What operators ask the orchestrator, and what it answers (subjects `control(verb)`).

Any request may be answered with `schemas.request.ErrorReply` instead.
"""

from typing import Literal

from pydantic import AwareDatetime, Field

from schemas.base import DeploymentId, NodeName, Sha256, Value
from schemas.capacity import Capacity
from schemas.deployment import ROUTES_MAX, Chain, Cloud, Deployment, Placement, Sensitive, Settings
from schemas.errors import ErrorBody
from schemas.leader import Leadership
from schemas.plan import Plan
from schemas.slo import Slo


class DeployRequest(Value):
    """A deployment as people write it; a `Deployment` is one too.

    A `context_tokens` left at its default becomes the model's own context where that is shorter.
    """

    name: DeploymentId
    model: str = Field(min_length=1, max_length=128)
    """A name in the orchestrator's store, or the digest of a manifest in it."""
    settings: Settings = Settings()
    stages: int | None = Field(default=None, ge=1, le=256)
    placement: Chain | Placement | None = None
    slo: Slo | None = None
    routes: int | None = Field(default=None, ge=1, le=ROUTES_MAX)
    sensitive: Sensitive | None = None
    sealed: bool = False
    on_demand: bool = False
    cloud: Cloud | None = None


class DeployReply(Value):
    """The deployment is stored and will be planned; that it fits the nodes present now was checked."""

    deployment: Deployment
    model_name: str
    routes: Placement
    """The stages of each route that a plan made now would have; of one that would be cold, its doors."""
    cold: bool = False
    """Whether there is no room for it now, so that it is cold until it is asked for."""
    estimate: dict[str, float]
    """What that plan is predicted to cost: `ttft_ms`, `tpot_ms` and the terms they are made of."""


class PlaceRequest(Value):
    """Insist on a placement of a deployment, or leave it to the planner again; answered as a deploy is."""

    name: DeploymentId
    placement: Chain | Placement | None = None
    """None: automatic planning. What runs goes on until another plan is worth the move."""


class RemoveRequest(Value):
    """End a deployment: its sequences finish, new requests are refused."""

    name: DeploymentId


class RemoveReply(Value):
    """The deployment is not desired any more; it drains."""

    name: DeploymentId


class DrainRequest(Value):
    """Use a node no more, so that it can be serviced; it stays so until it is undrained, whatever restarts."""

    node: NodeName


class DrainReply(Value):
    """The wish is stored; that every deployment on the node can go on without it was checked."""

    node: NodeName
    deployments: tuple[DeploymentId, ...]
    """Those of which a plan uses the node now; it may be switched off once none does."""


class UndrainRequest(Value):
    """Let plans use a node again."""

    node: NodeName


class UndrainReply(Value):
    """The node is offered to the planner again; nothing moves back by that alone."""

    node: NodeName


class TrustRequest(Value):
    """Say whether a node may hold sensitive blocks; this holds until it is said otherwise, whatever restarts."""

    node: NodeName
    trusted: bool


class TrustReply(Value):
    """The word is stored; that every deployment can keep its sensitive blocks to trusted nodes was checked."""

    node: NodeName
    trusted: bool
    deployments: tuple[DeploymentId, ...]
    """Those whose sensitive blocks are on the node now although it is not trusted; they move at once."""


class WhereRequest(Value):
    """Where are the blocks of a model?"""

    model: str = Field(min_length=1, max_length=128)
    """A name in the orchestrator's store, or the digest of a manifest."""


MemoryTier = Literal["gpu", "memory", "disk"]


class BlocksAt(Value):
    """Blocks that a node has, and for whom."""

    node: NodeName
    tier: MemoryTier
    ranges: tuple[tuple[int, int], ...]
    """First and last, both included."""
    why: tuple[str, ...]


class WhereReply(Value):
    """Every node that has some of it; the orchestrator that answers has all."""

    model: Sha256
    name: str
    blocks: int
    at: tuple[BlocksAt, ...]


class NodeStatus(Value):
    """One node as the orchestrator sees it."""

    capacity: Capacity
    """Its last heartbeat."""
    age_s: float
    """Since that heartbeat arrived."""
    lost: bool
    trusted: bool = True
    """Whether it may hold sensitive blocks."""


class Attainment(Value):
    """Requests of the last minutes that met every target of their deployment's class, and those that missed one."""

    met: int = Field(ge=0)
    missed: int = Field(ge=0)
    burn: tuple[float, float] | None = None
    """How many times too fast the error budget is used up, over the short and the long window; None while too few
    requests ended to say."""

    @property
    def share(self) -> float | None:
        """Of those that met them; None where nothing was counted."""
        return self.met / (self.met + self.missed) if self.met + self.missed else None


class CloudStatus(Value):
    """What the cloud of a deployment was asked by the agents that are present, since each began."""

    nodes: tuple[str, ...]
    """Those that can ask it."""
    asked: int
    answered: int
    mean_ms: float | None = None
    """From asking to the answer."""
    cost: float
    """By the endpoints' prices."""


class DeploymentStatus(Value):
    """One deployment as the orchestrator sees it."""

    name: DeploymentId
    state: Literal["waiting", "preparing", "cold", "serving", "changing", "degraded", "draining"]
    """waiting: no plan yet. preparing: the first plan loads, or the next one of a deployment that was cold. cold:
    nothing is loaded, requests are taken and wait. serving: as desired. changing: serving, while another plan loads or
    the one before drains. degraded: the current plan misses a node or cannot run. draining: removed."""
    deployment: Deployment | None = None
    """None once it was removed and drains."""
    model_name: str | None = None
    current: Plan | None = None
    candidate: Plan | None = None
    draining: tuple[Plan, ...]
    ready: tuple[str, ...]
    """Nodes on which the candidate is ready."""
    applied: tuple[str, ...]
    """Nodes that confirmed the current plan."""
    cloud: CloudStatus | None = None
    """None where no cloud may answer for it."""
    estimate: dict[str, float] | None = None
    """What the current plan is predicted to cost now."""
    attainment: Attainment | None = None
    """How the requests under the current plan fared against the deployment's class; None where nothing was counted."""
    prediction: str | None = None
    """How far predictions were from what requests then met; None before any ended."""
    prediction_error: dict[str, float] | None = None
    """The same as figures: medians of |error| and of the error (its bias) of `tpot` and `ttft`, as shares."""
    reason: str | None = None
    """Why the state is not `serving`."""
    error: ErrorBody | None = None
    """What the last attempt to plan or prepare failed with, while it matters."""
    revision: int


class StatusReply(Value):
    """The whole view of the orchestrator. The request is empty."""

    term: int
    leader: Leadership | None = None
    """Which of the orchestrators answers, and since when it leads."""
    standbys: tuple[str, ...] = ()
    """Orchestrators that would take over, by name; nobody signs for that."""
    nodes: tuple[NodeStatus, ...]
    deployments: tuple[DeploymentStatus, ...]
    drained: tuple[NodeName, ...] = ()
    """Nodes that no new plan uses, present or not, because an operator said so."""


class CandidateReport(Value):
    """One plan that was weighed."""

    routes: Placement
    """The stages of each of its routes."""
    origin: Literal[
        "current", "reassigned", "resplit", "edge", "at hand", "route added", "route given back", "failover",
        "being prepared",
    ]  # fmt: skip
    """How it came to be on the list: it serves; other nodes for the same cuts; other cuts; the best without the cloud;
    the best of blocks that lie on disks; one route more; fewer routes; the best without a node; it is on its way."""
    without: NodeName | None = None
    """The node that a failover plan does without."""
    phi: float
    """What it costs (mathematics.md A1), 1 being the reference latency with nothing else to be said against it."""
    terms: dict[str, float]
    """The terms of Phi, and the latencies and loads they come from."""
    move: dict[str, float] | None = None
    """What moving there would cost, term by term, in Phi x seconds; None for the current plan."""
    why_not: str | None = None
    """Why it was not chosen; None for the one that was."""


class DecisionReport(Value):
    """Why a deployment runs as it does, and why not otherwise."""

    deployment: DeploymentId
    epoch: int
    """The epoch that was current."""
    plan_reason: str
    """Why that epoch's plan was made."""
    at: AwareDatetime
    action: Literal["keep", "redistribute", "resplit", "routes", "hard"]
    sentence: str
    """The decision, as a person would give it."""
    certified: bool
    """Kept because no plan at all could repay a move, not only none of the candidates."""
    bound: float
    """No plan has a smaller Phi."""
    candidates: tuple[CandidateReport, ...]
    """The current plan first, then the chosen one if it is another, then the others, the best first."""
    prediction: str | None = None
    """How far predictions of this deployment were from what requests then met; None before any ended."""


class TaskReport(Value):
    """What is known of one task of a pipeline."""

    per_s: float
    """Requests that come in."""
    late: float | None = None
    """The share of them that is expected to be late; None before it was reckoned."""
    owed: float
    """Late requests beyond those that may be: the more, the more instances they are worth (Z of mathematics.md B4)."""


class PipelineReport(Value):
    """Why the services of a pipeline are where they are."""

    pipeline: DeploymentId
    sentence: str
    """The last change, as a person would give it."""
    at: AwareDatetime | None = None
    """When that was; None where this orchestrator has changed nothing."""
    services: dict[str, tuple[NodeName, ...]]
    """The nodes of each: those of its instances, or of the stages of one that is cut."""
    tasks: dict[str, TaskReport]
    strain: float
    """How many times slower services are taken to be than they say."""
    terms: dict[str, float]
    """What the last placement by program cost, and what none costs less than; or the last change of light services."""
    error: ErrorBody | None = None
    """Why they cannot be placed."""


class ExplainRequest(Value):
    """Why do deployments run as they do? The last decision about one of them, or about each."""

    name: DeploymentId | None = None


class ExplainReply(Value):
    """By name, ascending."""

    decisions: tuple[DecisionReport, ...]
    pipelines: tuple[PipelineReport, ...] = ()
    """Of pipelines instead: their services are placed together, and neither they nor who conducts are weighed."""


class PlanRequest(Value):
    """What would be done about this deployment now? Nothing is changed."""

    name: DeploymentId


class PlanReply(Value):
    """The decision that would be made now."""

    decision: DecisionReport
