"""A pipeline: a graph of services, each a model, through which requests of several kinds of task take their ways.

It is a model itself, whose one block is the graph: a manifest names it, deployments run it, plans say which nodes
conduct its requests. Its services are deployments of their own, `service_deployment(pipeline, service)`.
"""

from collections.abc import Iterable, Mapping
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from schemas.base import NAME_PATTERN, DeploymentName, Sha256, Value
from schemas.deployment import Settings
from schemas.slo import Slo

REQUEST = "request"
"""Where references find what the client sent."""
TEXT = "BYTES"
"""The Open Inference Protocol's name of the datatype of texts."""
SERVICES_MAX = 64
TASKS_MAX = 32
VALUES_MAX = 64
"""Inputs, or outputs, of one task or step."""

ServiceName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
TaskName = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
ValueName = Annotated[str, StringConstraints(pattern=r"^[!-~]{1,128}$")]
Reference = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]{0,62}\.[!-~]{1,128}$")]
"""`request.NAME`, what the client sent, or `SERVICE.NAME`, what a service of the same task gave: of a tensor model the
output of this name, of an embedder `embedding`, of a decoder `text` or `token_ids`."""


Size = Annotated[int, Field(ge=-1, le=1 << 31)]


class Input(Value):
    """What a client sends: a tensor, or texts (`BYTES`)."""

    datatype: str
    shape: tuple[Size, ...] = Field(min_length=1, max_length=8)
    """-1 where any size will do."""

    @model_validator(mode="after")
    def _has_sizes(self) -> Self:
        if 0 in self.shape:
            raise ValueError("shape: a size is 1 or more, or -1 for any")
        return self


class Service(Value):
    """One model of a pipeline."""

    model: Sha256
    kind: Literal["core", "light"]
    """Core: heavy, placed by integer program and moved seldom. Light: small and without state, as many as there is
    need for at any time."""
    settings: Settings = Settings()
    stages: int | None = Field(default=None, ge=1, le=256)
    """Of a core service that is cut over nodes: into how many stages, as of any deployment. It is planned like one, and
    split again while it runs."""
    replicas: int = Field(default=1, ge=1, le=64)
    """Nodes that have it, at least."""
    keep_cost: float = Field(default=1.0, gt=0)
    """Of one instance for a second, in whatever unit all of them are."""
    deploy_cost: float = Field(default=1.0, ge=0)
    """Of making one."""

    @model_validator(mode="after")
    def _light_ones_are_whole(self) -> Self:
        if self.kind == "light" and self.stages is not None:
            raise ValueError("a light service is one stage; say kind core, or leave stages out")
        return self


class Step(Value):
    """How a task uses a service: what it gives it. Exactly one of `inputs`, `text`, `prompt` and `token_ids`."""

    inputs: dict[ValueName, Reference] | None = Field(default=None, min_length=1, max_length=VALUES_MAX)
    """Of a tensor model."""
    text: Reference | None = None
    """Of an embedder."""
    prompt: Reference | None = None
    """Of a decoder."""
    token_ids: tuple[Reference, ...] | None = Field(default=None, min_length=1, max_length=VALUES_MAX)
    """Of a decoder: INT64 tensors, one behind the other."""
    max_tokens: int = Field(default=16, ge=1, le=1 << 20)
    """That a decoder may say."""

    @model_validator(mode="after")
    def _has_one_form(self) -> Self:
        forms = (self.inputs, self.text, self.prompt, self.token_ids)
        if sum(form is not None for form in forms) != 1:
            raise ValueError("give exactly one of inputs, text, prompt and token_ids")
        return self

    @property
    def references(self) -> tuple[str, ...]:
        """All that it uses."""
        single = (self.text, self.prompt)
        many = (*(self.inputs or {}).values(), *(self.token_ids or ()))
        return (*many, *(one for one in single if one is not None))

    @property
    def after(self) -> frozenset[str]:
        """The services that it waits for, and `REQUEST`."""
        return frozenset(source_of(reference) for reference in self.references)


class Task(Value):
    """A kind of request: what comes in, which services work on it, what goes out."""

    slo: Slo
    """The class of its requests, as far as they do not say otherwise; `deadline_ms` is what "on time" means."""
    rate_per_s: float = Field(default=1.0, gt=0, le=1e6)
    """Requests that are expected, until some were counted."""
    late_share: float = Field(default=0.05, gt=0, lt=1)
    """Of its requests, those that may be late (eps of mathematics.md B4)."""
    inputs: dict[ValueName, Input] = Field(min_length=1, max_length=VALUES_MAX)
    steps: dict[ServiceName, Step] = Field(min_length=1, max_length=SERVICES_MAX)
    """By service; each is used once at most."""
    outputs: dict[ValueName, Reference] = Field(min_length=1, max_length=VALUES_MAX)

    @model_validator(mode="after")
    def _holds_together(self) -> Self:
        if self.slo.deadline_ms is None:
            raise ValueError("a task has a deadline; give deadline_ms")
        for where, reference in self._uses():
            source, name = reference.split(".", 1)
            if source == REQUEST:
                if name not in self.inputs:
                    raise ValueError(f"{where} uses {reference!r}, and the inputs are {sorted(self.inputs)}")
            elif source not in self.steps:
                raise ValueError(f"{where} uses {reference!r}, and the steps are {sorted(self.steps)}")
        try:
            assert self.order
        except CycleError as error:
            raise ValueError(f"its steps go round in a ring: {' -> '.join(error.args[1])}") from error
        return self

    def _uses(self) -> Iterable[tuple[str, str]]:
        for name, step in self.steps.items():
            yield from ((f"step {name}", reference) for reference in step.references)
        yield from ((f"output {name}", reference) for name, reference in self.outputs.items())

    @property
    def order(self) -> tuple[str, ...]:
        """The services, none before one that it waits for."""
        return tuple(TopologicalSorter(self.after).static_order())

    @property
    def after(self) -> Mapping[str, frozenset[str]]:
        """By service: the services that it waits for."""
        return {name: step.after - {REQUEST} for name, step in self.steps.items()}


class Pipeline(Value):
    """All of it."""

    services: dict[ServiceName, Service] = Field(min_length=1, max_length=SERVICES_MAX)
    tasks: dict[TaskName, Task] = Field(min_length=1, max_length=TASKS_MAX)
    survives: Literal["none", "node", "site"] = "node"
    """What the core services are placed to do without: any one node, or all nodes of one machine."""

    @model_validator(mode="after")
    def _services_are_used(self) -> Self:
        if REQUEST in self.services:
            raise ValueError(f"a service cannot be called {REQUEST!r}: that is what the client sent")
        used = {name for task in self.tasks.values() for name in task.steps}
        if unknown := sorted(used - self.services.keys()):
            raise ValueError(f"a step uses service {unknown[0]!r}, and the services are {sorted(self.services)}")
        if idle := sorted(self.services.keys() - used):
            raise ValueError(f"no task uses service {idle[0]!r}")
        return self


def source_of(reference: str) -> str:
    """What gives it: a service, or `REQUEST`."""
    return reference.split(".", 1)[0]


def service_deployment(pipeline: DeploymentName, service: str) -> DeploymentName:
    """Under which name a service of a pipeline is deployed."""
    return DeploymentName(f"{pipeline}-{service}")
