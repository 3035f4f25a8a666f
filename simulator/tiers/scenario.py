"""A two-tier scenario as a value: what nodes have, what services and tasks are like, and how much is asked of them.

Quantities are ranges, from which a world is drawn in `drawn.py`: those of the paper's Table I (arXiv 2601.19563), and
what that leaves open is said beside it in the file.
"""

from typing import Annotated, Self

from pydantic import Field, model_validator

from orchestrator.services.problem import TaskKind
from schemas.base import Value
from schemas.errors import ResplitError
from simulator.contest import ContestScenario
from simulator.scenario import NAME_LENGTH_MAX

Span = tuple[Annotated[float, Field(ge=0, le=1e9)], Annotated[float, Field(ge=0, le=1e9)]]
"""From and to, uniformly drawn between."""
SLOTS_MAX = 1_000_000


class TierSpec(Value):
    """What services of a tier are like."""

    needs: dict[str, Span]
    """Resources of an instance."""
    work: Span
    """MB of a request."""
    output: Span
    """MB that are passed on."""
    rate: Span | None = None
    """MB/ms, of an instance whose rate is steady."""
    shape: Span | None = None
    """With `scale`: of the Gamma distribution from which an instance's rate is drawn in each slot."""
    scale: Span | None = None
    """MB/ms."""
    deploy_cost: float = Field(ge=0)
    keep_cost: float = Field(ge=0)
    """Of a slot: maintenance and parallelism."""

    @model_validator(mode="after")
    def _one_kind_of_rate(self) -> Self:
        if (self.rate is None) == (self.shape is None or self.scale is None):
            raise ValueError("rate: say either rate, or shape and scale")
        return self


class ServiceSpec(Value):
    """A service of the graph."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH_MAX)
    core: bool = False


class TaskSpec(Value):
    """A kind of request: which services it goes through."""

    name: str = Field(min_length=1, max_length=NAME_LENGTH_MAX)
    after: dict[str, tuple[str, ...]] = Field(min_length=1)
    """By service: those that it waits for; `-` for what the user sends."""


class BurstSpec(Value):
    """Times in which a task is asked for more often; in the others it is less often, so that the mean stays."""

    factor: float = Field(gt=1, le=100)
    share: float = Field(gt=0, lt=1)
    """Of the time."""
    slots: float = Field(gt=0, le=SLOTS_MAX)
    """Of a burst, in the mean."""

    @model_validator(mode="after")
    def _leaves_something(self) -> Self:
        if self.factor * self.share >= 1.0:
            raise ValueError("factor: times share it must be below 1, or nothing is left for the other times")
        return self


class TwoTierScenario(ContestScenario):
    """A world of two tiers, of which every seed draws another."""

    slot_ms: float = Field(default=1.0, gt=0)
    slots: int = Field(ge=10, le=SLOTS_MAX)
    """In which requests arrive that count."""
    steer_slots: int = Field(default=5, ge=1, le=10_000)
    """So often is decided."""
    warmup_slots: int = Field(default=100, ge=0, le=SLOTS_MAX)
    devices: int = Field(ge=1, le=1000)
    """End devices; one user is at each."""
    servers: int = Field(ge=1, le=1000)
    device: dict[str, Span]
    """Resources of an end device."""
    server: dict[str, Span]
    core: TierSpec
    light: TierSpec
    services: tuple[ServiceSpec, ...] = Field(min_length=1)
    tasks: tuple[TaskSpec, ...] = Field(min_length=1)
    arrivals: Span
    """Requests of a user in a millisecond, of all tasks together, at a load of 1."""
    deadline_ms: Span
    input: Span
    """MB that the user sends."""
    link: Span
    """MB/ms, of the way between two nodes and of each user's share of the spectrum."""
    delay_ms: Span = (0.0, 0.0)
    """What a byte travels between two nodes."""
    fading_shape: Span
    """Of the Nakagami distribution of the amplitude on the way from the user, drawn for each request."""
    fading_spread: Span
    """Mean of the square of that amplitude: the signal-to-noise ratio."""
    bursts: BurstSpec | None = None
    cloud_delay_ms: float = Field(default=25.0, ge=0)
    """From any node to the cloud, which one of the policies has and no other."""
    paper_eps: float = Field(default=0.2, gt=0, lt=1)
    """Of the paper's delays: the probability that one is longer."""
    allowed_late: float = Field(default=0.02, gt=0, lt=1)
    """eps: the share of a task's requests that may be late."""
    cost_weight: float = Field(default=0.05, gt=0, le=1e6)
    """V: how many late requests a unit of cost is worth."""

    @model_validator(mode="after")
    def _graphs_are_of_services(self) -> Self:
        known = {service.name for service in self.services}
        for number, task in enumerate(self.tasks):
            if other := sorted(task.after.keys() - known):
                raise ValueError(f"tasks.{number}.after: there is no service {other[0]!r}")
            try:
                TaskKind(task.name, dict(task.after), 0.0, 0.0)
            except ResplitError as error:
                raise ValueError(f"tasks.{number}.after: {error.message}") from error
        return self
