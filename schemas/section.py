"""PURE: what one node is told of a plan event: its own stages, the nodes next to them, and no more.

An ingress drives whole routes, fails over to others and inherits from other ingresses, so it sees whole plans. A node
that is none sees, of each route that it is on, the stages that it runs, those before and after each of them, and the
source. Of the others it knows neither node nor blocks, and of routes that it is not on nothing but who drives them: any
ingress may drive its own too, and goes by its heartbeats.
"""

from collections.abc import Mapping
from typing import Self

from pydantic import AwareDatetime, Field, model_validator

from schemas.base import DeploymentId, Digest, NodeId, NodeName, Sha256, Value
from schemas.deployment import Settings, Stage
from schemas.plan import Place, Plan, PlanEvent, Route, blocks_on, family_of
from schemas.sealed import LETTERS_MAX, Letter, NodeKeys


class SealedEvent(Value):
    """A plan event as it is signed and travels: for everybody that there is one, for each reader what it says."""

    deployment: DeploymentId
    term: int = Field(ge=1)
    """Fences leaders: an agent ignores an event of a lower term than it has seen."""
    revision: int = Field(ge=1)
    """Grows with every event of the deployment: an agent ignores what it has seen already."""
    issued_at: AwareDatetime
    letters: tuple[Letter, ...] = Field(min_length=1, max_length=LETTERS_MAX)
    """To the orchestrators all of it (`PlanEvent`), and to each node its part (`EventSection`). Nodes that are told the
    same share a letter."""


class RouteSection(Value):
    """What one node sees of a route that it is on."""

    index: int = Field(ge=0)
    source: NodeName
    stages: dict[int, Stage] = Field(min_length=1)
    """By their number on the route, ascending. Those that are missing are hidden."""

    @model_validator(mode="after")
    def _could_be_of_a_route(self) -> Self:
        number, follows = -1, 0
        for found, stage in self.stages.items():
            hidden = found - number - 1
            # A stage that is hidden has a block at least; where none is, the blocks follow on each other.
            if hidden < 0 or stage.first < follows + hidden or (hidden == 0 and stage.first != follows):
                raise ValueError(f"route {self.index}: stage {found} cannot start at block {stage.first}")
            number, follows = found, stage.last + 1
        return self

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that are seen, each once."""
        return tuple(dict.fromkeys((self.source, *(stage.node for stage in self.stages.values()))))


class PlanSection(Value):
    """What one node sees of a plan at which it is not the ingress of any route. It is used as a `Plan` is."""

    deployment: DeploymentId
    model: Sha256
    epoch: int = Field(ge=1)
    digest: Sha256
    """Of the whole plan: receipts name it."""
    block_count: int = Field(ge=1)
    settings: Settings
    routes: tuple[RouteSection, ...] = Field(min_length=1)
    """Those that the node is on."""

    @model_validator(mode="after")
    def _could_be_of_a_plan(self) -> Self:
        indices = [route.index for route in self.routes]
        if indices != sorted(set(indices)):
            raise ValueError(f"routes out of order: {indices}")
        for route in self.routes:
            if (last := max(stage.last for stage in route.stages.values())) >= self.block_count:
                raise ValueError(f"route {route.index} has block {last} of {self.block_count}")
        return self

    @property
    def family(self) -> Digest:
        return family_of(self.deployment, self.model, self.settings)

    @property
    def nodes(self) -> tuple[str, ...]:
        """The nodes that are seen, each once."""
        return tuple(dict.fromkeys(node for route in self.routes for node in route.nodes))

    @property
    def placed(self) -> Mapping[Place, Stage]:
        """Every stage that is seen, by its place in the plan."""
        return {(route.index, number): stage for route in self.routes for number, stage in route.stages.items()}

    def blocks_on(self, node: str) -> tuple[int, ...]:
        """The blocks that `node` is seen to host, ascending: of the node whose section this is, all that it hosts."""
        return blocks_on(self.placed, node)


SeenPlan = Plan | PlanSection
"""A plan as far as a node sees it."""


class EventSection(Value):
    """What one node is told of a plan event. Like the event it is all that matters now, not a difference."""

    deployment: DeploymentId
    term: int = Field(ge=1)
    revision: int = Field(ge=1)
    current: SeenPlan | None = None
    candidate: SeenPlan | None = None
    draining: tuple[SeenPlan, ...] = ()
    ingresses: tuple[NodeName, ...] = ()
    """Who may drive its sequences, now or once the candidate is in force: they alone are given what comes of them, and
    are told by heartbeats what runs for them."""
    lost: tuple[NodeName, ...] = ()
    """Of the nodes that are lost, those that it sees, and every ingress: their sequences may hold slots here."""
    keys: tuple[NodeKeys, ...] = ()
    """Those for this node."""

    @model_validator(mode="after")
    def _plans_belong_together(self) -> Self:
        if any(plan.deployment != self.deployment for plan in self.plans):
            raise ValueError("a plan of another deployment")
        if len({plan.epoch for plan in self.plans}) != len(self.plans):
            raise ValueError("two plans of one epoch")
        return self

    @property
    def plans(self) -> tuple[SeenPlan, ...]:
        """Every plan that this node has to do with."""
        found = (*self.draining, self.current, self.candidate)
        return tuple(plan for plan in found if plan is not None)


def readers(event: PlanEvent) -> tuple[NodeId, ...]:
    """Every node that has a section, ascending."""
    if not event.plans:
        return ()
    return tuple(sorted({NodeId(node) for node in (*event.ingresses, *(n for p in event.plans for n in p.nodes))}))


def nothing_of(event: PlanEvent | SealedEvent) -> EventSection:
    """What an event means to a node that has no section: nothing of the deployment is to be loaded."""
    return EventSection(deployment=event.deployment, term=event.term, revision=event.revision)


def section_of(event: PlanEvent, node: NodeId) -> EventSection | None:
    """What `node` is told of `event`; None where nothing of it concerns the node."""
    answers = node in event.ingresses

    def seen(plan: Plan | None) -> SeenPlan | None:
        return None if plan is None else plan if answers else _seen(plan, node)

    current, candidate = seen(event.current), seen(event.candidate)
    draining = tuple(found for plan in event.draining if (found := seen(plan)) is not None)
    plans = (*draining, current, candidate)
    if not any(plans):
        return None
    coming = () if event.candidate is None else (route.source for route in event.candidate.routes)
    known = {*event.ingresses, *(seen for plan in plans if plan is not None for seen in plan.nodes)}
    return EventSection(
        deployment=event.deployment,
        term=event.term,
        revision=event.revision,
        current=current,
        candidate=candidate,
        draining=draining,
        ingresses=tuple(sorted(event.ingresses.union(coming))),
        lost=event.lost if answers else tuple(lost for lost in event.lost if lost in known),
        keys=tuple(keys for keys in event.keys or () if keys.node == node),
    )


def _seen(plan: Plan, node: NodeId) -> SeenPlan | None:
    if any(route.source == node for route in plan.routes):
        return plan
    routes = tuple(_route_seen(route, node) for route in plan.routes if node in route.nodes)
    if not routes:
        return None
    return PlanSection(
        deployment=plan.deployment,
        model=plan.model,
        epoch=plan.epoch,
        digest=plan.digest,
        block_count=plan.block_count,
        settings=plan.settings,
        routes=routes,
    )


def _route_seen(route: Route, node: NodeId) -> RouteSection:
    own = [number for number, stage in enumerate(route.stages) if stage.node == node]
    near = {number + step for number in own for step in (-1, 0, 1)}
    stages = {number: stage for number, stage in enumerate(route.stages) if number in near}
    return RouteSection(index=route.index, source=route.source, stages=stages)
