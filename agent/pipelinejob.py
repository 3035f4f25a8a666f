"""One request to a pipeline: what was sent, checked against its task, and what its services make of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

import numpy as np

from agent.replies import ReplyTo
from agent.tensors import read_tensor
from agent.urgency import UNHURRIED, Urgency
from agent.usage import Meter
from schemas.base import Digest, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.journal import Handle
from schemas.manifest import Manifest
from schemas.pipeline import REQUEST, TEXT, Input, Pipeline, Task
from schemas.request import EmbeddingRequest, OipTensor, Request, StepTiming, TensorReply, TensorRequest
from schemas.slo import BEST_EFFORT, Slo
from schemas.tensor import OIP_TO_NUMPY, view

TASK = "task"
"""The parameter of a request that names it; a pipeline of one task needs none."""

Values = dict[str, dict[str, OipTensor]]
"""By what gave them, a service or `REQUEST`, and name: texts as they are, tensors as raw bytes."""


@dataclass(eq=False)
class PipelineJob:
    """The state of one request at its conductor."""

    request_id: RequestId
    request: TensorRequest
    reply: ReplyTo
    model: Digest
    manifest: Manifest
    task_name: str
    values: Values
    """What came in; what services made of it is kept while they are at it, and no longer."""
    meter: Meter
    deadline: float | None
    interrupted_at: float | None = None
    """Since when it waits to be conducted again."""
    recoveries: int = 0
    handle: Handle | None = None
    """Its number in the journal, once it is accepted."""
    slo: Slo = BEST_EFFORT
    urgency: Urgency = UNHURRIED
    steps: list[StepTiming] = field(default_factory=list)
    """Those that were done."""

    @property
    def pipeline(self) -> Pipeline:
        """The graph."""
        assert self.manifest.pipeline is not None
        return self.manifest.pipeline

    @property
    def task(self) -> Task:
        """What it asks for."""
        return self.pipeline.tasks[self.task_name]

    @property
    def has_begun(self) -> bool:
        """Whether its services were asked for anything."""
        return self.meter.started is not None

    def answer(self, values: Mapping[str, Mapping[str, OipTensor]], now: float) -> TensorReply:
        """The reply, its tensors in the form that the request used."""
        binary = any(tensor.raw is not None for tensor in self.request.inputs)
        wanted = self.task.outputs if self.request.outputs is None else [one.name for one in self.request.outputs]
        found = {name: looked_up(values, self.task.outputs[name]) for name in wanted}
        usage = self.meter.usage(0, 0, now).model_copy(update={"steps": tuple(self.steps)})
        return TensorReply(
            request_id=self.request_id,
            id=self.request.id or self.request_id,
            model_name=self.manifest.name,
            outputs=tuple(_told(tensor.model_copy(update={"name": name}), binary) for name, tensor in found.items()),
            usage=usage,
        )


def open_pipeline_job(
    request: Request,
    request_id: RequestId,
    reply: ReplyTo,
    model: Digest,
    manifest: Manifest,
    deadline: float | None,
    meter: Meter,
) -> PipelineJob:
    """Check the request against its task; raises `ResplitError` naming the field at fault."""
    if not isinstance(request, TensorRequest):
        given = "input" if isinstance(request, EmbeddingRequest) else "prompt"
        message = f"{manifest.name} is a pipeline: send `inputs`, texts among them with the datatype {TEXT}"
        raise _invalid(message, given)
    pipeline = manifest.pipeline
    assert pipeline is not None
    name = task_of(pipeline, request)
    if name is None:
        asked = (request.parameters or {}).get(TASK)
        message = f"{manifest.name} has no task {asked!r}; its tasks are {sorted(pipeline.tasks)}"
        raise _invalid(message, f"parameters.{TASK}")
    task = pipeline.tasks[name]
    for i, output in enumerate(request.outputs or ()):
        if output.name not in task.outputs:
            message = f"task {name} has no output {output.name!r}; it has {sorted(task.outputs)}"
            raise _invalid(message, f"outputs.{i}.name")
    values: Values = {REQUEST: _read_inputs(request, task, name)}
    return PipelineJob(request_id, request, reply, model, manifest, name, values, meter, deadline)


def task_of(pipeline: Pipeline, request: object) -> str | None:
    """The task that a request asks for, if there is such a one."""
    if not isinstance(request, TensorRequest):
        return None
    asked = (request.parameters or {}).get(TASK)
    if asked is None and len(pipeline.tasks) == 1:
        return next(iter(pipeline.tasks))
    return asked if isinstance(asked, str) and asked in pipeline.tasks else None


def looked_up(values: Mapping[str, Mapping[str, OipTensor]], reference: str) -> OipTensor:
    """What a reference names; raises STAGE_FAILED where a service did not give it."""
    source, name = reference.split(".", 1)
    if name not in values.get(source, {}):
        raise ResplitError(ErrorCode.STAGE_FAILED, f"service {source!r} gave no {name!r}")
    return values[source][name]


def text_of(tensor: OipTensor) -> str:
    """The one text of a `BYTES` tensor."""
    assert tensor.data is not None
    return str(tensor.data[0])


def texts(values: Sequence[str]) -> OipTensor:
    """Texts as a tensor."""
    return OipTensor(name="-", shape=(len(values),), datatype=TEXT, data=list(values))


def tensor(values: Sequence[float] | Sequence[int], datatype: str) -> OipTensor:
    """Numbers as a tensor of one row."""
    raw = np.asarray([values], OIP_TO_NUMPY[datatype]).tobytes()
    return OipTensor(name="-", shape=(1, len(values)), datatype=datatype, raw=raw)


def token_ids(tensors: Sequence[OipTensor]) -> tuple[int, ...]:
    """The numbers of INT64 tensors, one behind the other."""
    return tuple(number for one in tensors for number in _numbers(one))


def _read_inputs(request: TensorRequest, task: Task, name: str) -> dict[str, OipTensor]:
    found: dict[str, OipTensor] = {}
    for i, given in enumerate(request.inputs):
        where = f"inputs.{i}"
        wanted = task.inputs.get(given.name)
        if wanted is None:
            raise _invalid(f"task {name} has no input {given.name!r}; it has {sorted(task.inputs)}", f"{where}.name")
        if given.name in found:
            raise _invalid(f"input {given.name!r} is given twice", f"{where}.name")
        found[given.name] = _read(given, wanted, where)
    if missing := sorted(task.inputs.keys() - found.keys()):
        raise _invalid(f"task {name} also needs {missing}", "inputs")
    return found


def _read(given: OipTensor, wanted: Input, where: str) -> OipTensor:
    if given.datatype != wanted.datatype:
        raise _invalid(f"{given.name!r} is {wanted.datatype}, not {given.datatype!r}", f"{where}.datatype")
    sizes = zip(given.shape, wanted.shape, strict=False)
    if len(given.shape) != len(wanted.shape) or any(size < 1 or want not in (-1, size) for size, want in sizes):
        raise _invalid(f"{given.name!r} is {list(wanted.shape)}, not {list(given.shape)}", f"{where}.shape")
    if wanted.datatype != TEXT:
        array = read_tensor(given, OIP_TO_NUMPY[wanted.datatype], where)
        return OipTensor(name=given.name, shape=given.shape, datatype=given.datatype, raw=array.tobytes())
    if given.data is None or not all(isinstance(text, str) for text in given.data):
        raise _invalid(f"texts are given as `data`, a list of strings: {given.name!r}", f"{where}.data")
    if len(given.data) != prod(given.shape):
        message = f"shape {list(given.shape)} needs {prod(given.shape)} texts, {len(given.data)} came"
        raise _invalid(message, f"{where}.data")
    return given


def _told(found: OipTensor, binary: bool) -> OipTensor:
    """As the client asked."""
    if found.raw is None or binary:
        return found
    return found.model_copy(update={"raw": None, "data": _numbers(found)})


def _numbers(given: OipTensor) -> list[int]:
    """The values of a tensor in its binary form, flat; raises INVALID_REQUEST where a service made it up."""
    if given.raw is None:
        return list(given.data or ())
    found: list[int] = (
        view(given.raw, OIP_TO_NUMPY.get(given.datatype, ""), given.shape, given.name).reshape(-1).tolist()
    )
    return found


def _invalid(message: str, field_name: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, message, field_name)
