"""A split as a file: which node runs which blocks of a deployment, in TOML or JSON, read and written alike.

deployment = "chat"

[[stages]]
node = "n0"
first = 0
last = 13

Several routes are several such lists, `[[routes]]` each with its `[[routes.stages]]`.
"""

import json
import tomllib
from pathlib import Path
from typing import Self

from pydantic import Field, ValidationError, model_validator

from schemas.base import DeploymentId, Value
from schemas.control import DeploymentStatus
from schemas.deployment import Chain, Placement
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import Plan

FILE_BYTES_MAX = 1 << 20
"""A split of thousands of blocks is a few hundred kilobytes; whatever is larger is another file."""


class TopologyRoute(Value):
    """The stages of one route, in the order of its blocks."""

    stages: Chain = Field(min_length=1)


class Topology(Value):
    """Which node runs which blocks of one deployment: the stages of its one route, or each of its routes."""

    deployment: DeploymentId
    stages: Chain | None = Field(default=None, min_length=1)
    routes: tuple[TopologyRoute, ...] | None = Field(default=None, min_length=1)

    @model_validator(mode="after")
    def _is_one_or_the_other(self) -> Self:
        if (self.stages is None) == (self.routes is None):
            raise ValueError("give either stages, or routes that have stages")
        return self

    @property
    def placement(self) -> Chain | Placement:
        """The same as the orchestrator takes it."""
        if self.stages is not None:
            return self.stages
        return tuple(route.stages for route in self.routes or ())


def read_topology(path: Path) -> Topology:
    """Read a file, JSON if its name ends in `.json`, TOML otherwise.

    Raises `ResplitError(INVALID_REQUEST)` naming the file and, where it is well-formed, the field and its value.
    """
    try:
        with path.open("rb") as file:
            data = file.read(FILE_BYTES_MAX + 1)
    except OSError as error:
        message = f"cannot read {path}: {error.strerror}; `resplit topology show` prints such a file"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "file") from error
    if len(data) > FILE_BYTES_MAX:
        message = f"{path} has more than {FILE_BYTES_MAX} bytes and is no topology"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "file")
    form = "JSON" if path.suffix.lower() == ".json" else "TOML"
    try:
        text = data.decode()
        plain = json.loads(text) if form == "JSON" else tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        message = f"{path} is not valid {form}: {error}"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, "file") from error
    try:
        return Topology.model_validate(plain)
    except ValidationError as error:
        raise ResplitError.from_validation(error, str(path)) from error


def in_file(error: ResplitError, path: Path) -> ResplitError:
    """An error of the orchestrator about a placement, in the words of the file that it came from."""
    field = error.field
    if field == "name":
        field = "deployment"
    elif field is not None and field.split(".")[0] == "placement":
        parts = field.split(".")[1:]
        # A route has a position of its own, then comes the stage's.
        listed = len(parts) in (1, 3)
        shown = ["routes", parts[0], *(["stages", *parts[1:]] if parts[1:] else [])] if listed else ["stages", *parts]
        field = ".".join(shown)
    return ResplitError(error.code, f"{path}: {error.message}", field)


def current_topology(found: DeploymentStatus) -> Topology:
    """The split that runs now; raises `ResplitError(INFEASIBLE)` while there is none."""
    if found.current is None:
        why = "" if found.reason is None else f": {found.reason}"
        raise ResplitError(ErrorCode.INFEASIBLE, f"{found.name} has no split now, it is {found.state}{why}")
    chains = found.current.chains
    if len(chains) == 1:
        return Topology(deployment=found.name, stages=chains[0])
    return Topology(deployment=found.name, routes=tuple(TopologyRoute(stages=chain) for chain in chains))


def as_toml(found: DeploymentStatus) -> str:
    """The split that runs now as a file that `read_topology` reads; what else is worth knowing is in comments."""
    topology, plan = current_topology(found), found.current
    assert plan is not None
    lines = [f"# {comment}" for comment in _comments(found, plan)]
    lines += [f"deployment = {json.dumps(topology.deployment)}"]
    if topology.stages is not None:
        lines += _listed("stages", topology.stages)
    for route in topology.routes or ():
        lines += ["", "[[routes]]", *_listed("routes.stages", route.stages)]
    return "\n".join(lines) + "\n"


def _listed(name: str, stages: Chain) -> list[str]:
    return [
        line
        for stage in stages
        for line in (
            "",
            f"[[{name}]]",
            f"node = {json.dumps(stage.node)}",
            f"first = {stage.first}",
            f"last = {stage.last}",
        )
    ]


def _comments(found: DeploymentStatus, plan: Plan) -> list[str]:
    locked = found.deployment is not None and found.deployment.placement is not None
    said = [f"{found.model_name or plan.model}, {plan.block_count} blocks, epoch {plan.epoch}"]
    said.append("locked by an operator" if locked else "as planned")
    if len(plan.routes) > 1:
        said.append(f"{len(plan.routes)} routes, each with its share of the requests")
    return said
