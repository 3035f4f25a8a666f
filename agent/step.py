"""Pure: what an agent does about the plans it is told, as `step(state, event, now) -> (state, instructions)`.

An event says the whole state of a deployment as far as this node sees it, so `step` compares what should be loaded and
served with what is, and says only the difference. Lost and repeated events cost nothing. Of one plan a node may see
more or less from event to event; it is the same plan if its digest is.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import assert_never

from schemas.base import DeploymentName, NodeId, NodeName
from schemas.capacity import HostedStage, HostedState
from schemas.plan import ReceiptStatus
from schemas.section import EventSection, SeenPlan


class Phase(StrEnum):
    """Where this node stands with one plan."""

    LOADING = "loading"
    READY = "ready"
    SERVING = "serving"
    DRAINING = "draining"
    DRAINED = "drained"
    FAILED = "failed"


@dataclass(frozen=True, slots=True)
class Hosted:
    """One plan on this node. `since`: when the event that first named it arrived, in seconds."""

    plan: SeenPlan
    phase: Phase
    since: float


@dataclass(frozen=True, slots=True)
class DeploymentState:
    """The last event of a deployment, and this node's part in its plans, by epoch."""

    event: EventSection
    hosted: Mapping[int, Hosted] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class State:
    """Everything `step` remembers."""

    node: NodeId
    deployments: Mapping[DeploymentName, DeploymentState] = field(default_factory=lambda: MappingProxyType({}))


# What happens.


@dataclass(frozen=True, slots=True)
class PlanArrived:
    """What a plan event tells this node; its signature was verified."""

    event: EventSection


@dataclass(frozen=True, slots=True)
class Loaded:
    """`Load` succeeded."""

    plan: SeenPlan


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """`Load` did not succeed; nothing of it is left."""

    plan: SeenPlan
    error: str


@dataclass(frozen=True, slots=True)
class Emptied:
    """A draining plan has no sequence left at this ingress."""

    deployment: DeploymentName
    epoch: int


Event = PlanArrived | Loaded | LoadFailed | Emptied

# What to do about it.


@dataclass(frozen=True, slots=True)
class Load:
    """Fetch, verify, load and warm this node's blocks of `plan`; then `Loaded` or `LoadFailed`."""

    plan: SeenPlan


@dataclass(frozen=True, slots=True)
class Follow:
    """The requests that this node answers may run over what is in force now, wherever that is, and nothing else."""

    event: EventSection


@dataclass(frozen=True, slots=True)
class Serve:
    """Admit new sequences to `plan` if this node is the source of one of its routes."""

    plan: SeenPlan


@dataclass(frozen=True, slots=True)
class Drain:
    """Admit nothing more to `plan`; report `Emptied` once its last sequence here has ended."""

    plan: SeenPlan


@dataclass(frozen=True, slots=True)
class Free:
    """Unload what only `plan` uses."""

    plan: SeenPlan


@dataclass(frozen=True, slots=True)
class Answer:
    """Publish a receipt. `elapsed_s`: since the event that first named the plan."""

    plan: SeenPlan
    status: ReceiptStatus
    elapsed_s: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Ignore:
    """The event is older than what this node acted on already."""

    event: EventSection
    why: str


HOSTED: Mapping[Phase, HostedState] = {Phase.LOADING: "loading", Phase.READY: "ready", Phase.SERVING: "serving"}
"""What a heartbeat calls a phase; the others are `draining`."""


def plans_of(state: State) -> list[SeenPlan]:
    """Every plan that this node has a part in."""
    return [held.plan for deployment in state.deployments.values() for held in deployment.hosted.values()]


def is_loading(state: State) -> bool:
    """Whether a plan is being loaded."""
    return any(
        held.phase is Phase.LOADING for deployment in state.deployments.values() for held in deployment.hosted.values()
    )


def hosted(state: State, sequences: Callable[[SeenPlan], int]) -> tuple[HostedStage, ...]:
    """What a heartbeat says of those that did not fail, given how many sequences run on each."""
    return tuple(
        HostedStage(
            deployment=held.plan.deployment,
            epoch=held.plan.epoch,
            model=held.plan.model,
            blocks=held.plan.blocks_on(state.node),
            state=HOSTED.get(held.phase, "draining"),
            sequences=sequences(held.plan),
        )
        for deployment in state.deployments.values()
        for held in deployment.hosted.values()
        if held.phase is not Phase.FAILED
    )


def plan_of(state: State, deployment: DeploymentName, epoch: int) -> SeenPlan | None:
    """A plan as the last event told of it; None where it told nothing of that epoch, or no more."""
    held = state.deployments.get(deployment)
    return None if held is None else next((plan for plan in held.event.plans if plan.epoch == epoch), None)


def ingresses(state: State, deployment: DeploymentName) -> tuple[NodeName, ...]:
    """Who may drive the sequences of a deployment that this node has a part in."""
    held = state.deployments.get(deployment)
    return () if held is None else held.event.ingresses


Instruction = Follow | Load | Serve | Drain | Free | Answer | Ignore
Step = tuple[State, tuple[Instruction, ...]]


def step(state: State, event: Event, now: float) -> Step:
    """The next state and what the shell is to do, in order. `now` in seconds of any monotonic clock."""
    match event:
        case PlanArrived(plan_event):
            return _plan_arrived(state, plan_event, now)
        case Loaded(plan):
            return _loaded(state, plan, now)
        case LoadFailed(plan, error):
            return _load_failed(state, plan, error, now)
        case Emptied(deployment, epoch):
            return _emptied(state, deployment, epoch, now)
        case _:
            assert_never(event)


def _plan_arrived(state: State, event: EventSection, now: float) -> Step:
    known = state.deployments.get(event.deployment)
    if known is not None and (event.term, event.revision) <= (known.event.term, known.event.revision):
        seen = f"term {known.event.term}, revision {known.event.revision}"
        return state, (Ignore(event, f"term {event.term}, revision {event.revision} came after {seen}"),)
    before = {} if known is None else dict(known.hosted)
    hosted: dict[int, Hosted] = {}
    todo: list[Instruction] = [Follow(event)]
    wanted = {plan.epoch: plan for plan in event.plans if state.node in plan.nodes}
    # Freeing comes first: its memory may be what the new plan needs.
    todo += [
        Free(held.plan) for epoch, held in before.items() if epoch not in wanted and held.phase is not Phase.FAILED
    ]
    todo += [
        Answer(held.plan, ReceiptStatus.RETIRED, now - held.since)
        for epoch, held in before.items()
        if epoch not in wanted
    ]
    for epoch, plan in wanted.items():
        held = before.get(epoch)
        if held is None or (held.phase is Phase.FAILED and _same(plan, event.current)):
            hosted[epoch] = Hosted(plan, Phase.LOADING, now)
            todo.append(Load(plan))
        else:
            hosted[epoch], more = _towards(held, event, now)
            todo += more
    return _with(state, DeploymentState(event, MappingProxyType(hosted))), tuple(todo)


def _towards(held: Hosted, event: EventSection, now: float) -> tuple[Hosted, list[Instruction]]:
    """Bring a loaded plan to the phase that the event gives it."""
    plan = held.plan
    if held.phase in (Phase.LOADING, Phase.FAILED):
        return held, []
    if _same(plan, event.current) and held.phase is not Phase.SERVING:
        served: list[Instruction] = [Serve(plan), Answer(plan, ReceiptStatus.APPLIED, now - held.since)]
        return replace(held, phase=Phase.SERVING), served
    if any(_same(plan, old) for old in event.draining) and held.phase not in (Phase.DRAINING, Phase.DRAINED):
        return replace(held, phase=Phase.DRAINING), [Drain(plan)]
    return held, []


def _loaded(state: State, plan: SeenPlan, now: float) -> Step:
    known, held = _find(state, plan)
    if known is None or held is None:
        return state, (Free(plan),)  # retired while it was loading
    ready = replace(held, phase=Phase.READY)
    answer = Answer(plan, ReceiptStatus.READY, now - held.since)
    advanced, more = _towards(ready, known.event, now)
    return _put(state, known, advanced), (answer, *more)


def _load_failed(state: State, plan: SeenPlan, error: str, now: float) -> Step:
    known, held = _find(state, plan)
    if known is None or held is None:
        return state, ()
    answer = Answer(plan, ReceiptStatus.REFUSED, now - held.since, error)
    return _put(state, known, replace(held, phase=Phase.FAILED)), (answer,)


def _emptied(state: State, deployment: DeploymentName, epoch: int, now: float) -> Step:
    known = state.deployments.get(deployment)
    held = None if known is None else known.hosted.get(epoch)
    if known is None or held is None or held.phase is not Phase.DRAINING:
        return state, ()
    # Said once: a node that says it at every turn drives its other receipts out of the stream, and with them what a
    # new leader has to know.
    answer = Answer(held.plan, ReceiptStatus.DRAINED, now - held.since)
    return _put(state, known, replace(held, phase=Phase.DRAINED)), (answer,)


def _find(state: State, plan: SeenPlan) -> tuple[DeploymentState | None, Hosted | None]:
    known = state.deployments.get(plan.deployment)
    held = None if known is None else known.hosted.get(plan.epoch)
    return known, held if held is not None and _same(held.plan, plan) else None


def _same(plan: SeenPlan, other: SeenPlan | None) -> bool:
    return other is not None and plan.epoch == other.epoch and plan.digest == other.digest


def _put(state: State, known: DeploymentState, held: Hosted) -> State:
    hosted = MappingProxyType({**known.hosted, held.plan.epoch: held})
    return _with(state, replace(known, hosted=hosted))


def _with(state: State, deployment: DeploymentState) -> State:
    return replace(state, deployments=MappingProxyType({**state.deployments, deployment.event.deployment: deployment}))
