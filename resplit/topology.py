"""A split as a file: which node runs which blocks of a deployment, in TOML or JSON, read and written alike.

deployment = "chat"

[[stages]]
node = "n0"
first = 0
last = 13
"""

import json
import tomllib
from pathlib import Path

from pydantic import Field, ValidationError

from schemas.base import DeploymentId, Value
from schemas.control import DeploymentStatus
from schemas.deployment import Stage
from schemas.errors import ErrorCode, ResplitError
from schemas.plan import Plan

FILE_BYTES_MAX = 1 << 20
"""A split of thousands of blocks is a few hundred kilobytes; whatever is larger is another file."""


class Topology(Value):
    """The stages of one deployment, in the order of its blocks."""

    deployment: DeploymentId
    stages: tuple[Stage, ...] = Field(min_length=1)


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
        field = f"stages{field.removeprefix('placement')}"
    return ResplitError(error.code, f"{path}: {error.message}", field)


def current_topology(found: DeploymentStatus) -> Topology:
    """The split that runs now; raises `ResplitError(INFEASIBLE)` while there is none."""
    if found.current is None:
        why = "" if found.reason is None else f": {found.reason}"
        raise ResplitError(ErrorCode.INFEASIBLE, f"{found.name} has no split now, it is {found.state}{why}")
    return Topology(deployment=found.name, stages=found.current.routes[0].stages)


def as_toml(found: DeploymentStatus) -> str:
    """The split that runs now as a file that `read_topology` reads; what else is worth knowing is in comments."""
    topology, plan = current_topology(found), found.current
    assert plan is not None
    lines = [f"# {comment}" for comment in _comments(found, plan)]
    lines += [f"deployment = {json.dumps(topology.deployment)}"]
    for stage in topology.stages:
        lines += [
            "",
            "[[stages]]",
            f"node = {json.dumps(stage.node)}",
            f"first = {stage.first}",
            f"last = {stage.last}",
        ]
    return "\n".join(lines) + "\n"


def _comments(found: DeploymentStatus, plan: Plan) -> list[str]:
    locked = found.deployment is not None and found.deployment.placement is not None
    said = [f"{found.model_name or plan.model}, {plan.block_count} blocks, epoch {plan.epoch}"]
    said.append("locked by an operator" if locked else "as planned")
    if len(plan.routes) > 1:
        said.append(f"the first of {len(plan.routes)} routes; a lock keeps this one alone")
    return said
