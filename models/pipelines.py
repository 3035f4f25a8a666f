"""A pipeline from its TOML file into the store: its services' models found, every step checked against its model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from models.store import Store
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Block, Manifest, ModelKind, TensorSpec
from schemas.pipeline import REQUEST, TEXT, Pipeline, Step, Task
from schemas.tensor import NUMPY_TO_OIP, OIP_TO_NUMPY
from schemas.toml import document, refused, validated

SUFFIX = ".toml"
ANY = -1
"""A size that is not fixed."""
SLO_KEYS = ("deadline_ms", "ttft_ms", "tpot_ms", "priority")
"""Of a task's table: its class."""
IDS = "INT64"


class Values(NamedTuple):
    """What is passed on under one name."""

    datatype: str
    shape: tuple[int, ...]

    def fit(self, other: "Values") -> bool:
        """Whether one may be given where the other is needed."""
        sizes = zip(self.shape, other.shape, strict=False)
        return (
            self.datatype == other.datatype
            and len(self.shape) == len(other.shape)
            and all(a == b or ANY in (a, b) for a, b in sizes)
        )

    def __str__(self) -> str:
        return f"{self.datatype}{list(self.shape)}"


def import_pipeline(path: Path, store: Store, name: str) -> tuple[str, Digest]:
    """Bring the pipeline of a file into the store and name it; its services' models must be there.

    Raises `ResplitError(INVALID_REQUEST)` that names the file and the key at fault, UNKNOWN_MODEL for a model that the
    store does not have.
    """
    pipeline = read_pipeline(path, store)
    with store.importing():
        source = store.put(path.read_bytes())
        manifest = Manifest(
            name=name,
            kind=ModelKind.PIPELINE,
            architecture="pipeline",
            precision="-",
            source=f"pipeline: {path.name}",
            cut="not cut: it is a graph of services, each a model of its own",
            inputs=(),
            outputs=(),
            blocks=(Block(index=0, role="whole", graph=source, weights=(), flops_per_token=0),),
            whole=source,
            pipeline=pipeline,
        )
        digest = store.save_manifest(manifest)
        store.name(name, digest)
    return name, digest


def read_pipeline(path: Path, store: Store) -> Pipeline:
    """The pipeline of a file, its models by digest; errors are those of `import_pipeline`."""
    plain = document(path, "pipeline")
    pipeline = validated(Pipeline, _with_digests(_with_classes(plain), path, store), str(path))
    manifests = {name: store.manifest(service.model) for name, service in pipeline.services.items()}
    for name, manifest in manifests.items():
        if manifest.kind is ModelKind.PIPELINE:
            raise refused(
                f"{path}: services.{name}.model: {manifest.name!r} is a pipeline itself; name its services' models",
                f"services.{name}.model",
            )
        if manifest.kind is ModelKind.DECODER and pipeline.services[name].kind == "light":
            raise refused(
                f"{path}: services.{name}.kind: {manifest.name!r} keeps caches, and light services keep nothing; "
                "say core",
                f"services.{name}.kind",
            )
    for name, task in pipeline.tasks.items():
        _check_task(task, manifests, f"{path}: tasks.{name}")
    return pipeline


def _with_classes(plain: Mapping[str, Any]) -> dict[str, Any]:
    """In the file a task's class stands among its other keys."""
    tasks = plain.get("tasks")
    if not isinstance(tasks, dict):
        return dict(plain)
    return {**plain, "tasks": {name: _with_class(task) for name, task in tasks.items()}}


def _with_class(task: Any) -> Any:
    if not isinstance(task, dict) or "slo" in task:
        return task
    slo = {key: task[key] for key in SLO_KEYS if key in task}
    return {**{key: value for key, value in task.items() if key not in slo}, "slo": slo}


def _with_digests(plain: Mapping[str, Any], path: Path, store: Store) -> dict[str, Any]:
    """In the file models stand by their names in the store."""
    services = plain.get("services")
    if not isinstance(services, dict):
        return dict(plain)
    found = {}
    for name, service in services.items():
        model = service.get("model") if isinstance(service, dict) else None
        if isinstance(model, str):
            try:
                found[name] = {**service, "model": str(store.resolve(model))}
            except ResplitError as error:
                key = f"services.{name}.model"
                raise ResplitError(error.code, f"{path}: {key}: {error.message}", key) from error
        else:
            found[name] = service
    return {**plain, "services": found}


def _check_task(task: Task, manifests: Mapping[str, Manifest], where: str) -> None:
    known: dict[str, Mapping[str, Values]] = {
        REQUEST: {name: Values(one.datatype, one.shape) for name, one in task.inputs.items()}
    }
    for name, value in known[REQUEST].items():
        if value.datatype != TEXT and value.datatype not in OIP_TO_NUMPY:
            choice = ", ".join((TEXT, *OIP_TO_NUMPY))
            raise _wrong(
                where, f"inputs.{name}.datatype", f"there is no such datatype, only {choice} (got {value.datatype!r})"
            )
    for service in task.order:
        _check_step(task.steps[service], manifests[service], known, f"{where}.steps.{service}")
        known[service] = _given(task.steps[service], manifests[service])
    for name, reference in task.outputs.items():
        _look_up(known, reference, where, f"outputs.{name}")


def _check_step(step: Step, manifest: Manifest, known: Mapping[str, Mapping[str, Values]], where: str) -> None:
    takes = {ModelKind.TENSOR: ("inputs",), ModelKind.EMBEDDER: ("text", "inputs")}.get(
        manifest.kind, ("prompt", "token_ids")
    )
    form = next(key for key in ("inputs", "text", "prompt", "token_ids") if getattr(step, key) is not None)
    if form not in takes:
        raise _wrong(where, form, f"{manifest.name!r} is a model of kind {manifest.kind.value}; give {takes[0]}")
    if step.inputs is not None:
        wanted = {spec.name: values_of(spec) for spec in manifest.inputs}
        if wanted.keys() != step.inputs.keys():
            message = f"{manifest.name!r} takes {sorted(wanted)} (got {sorted(step.inputs)})"
            raise _wrong(where, "inputs", message)
        for name, reference in step.inputs.items():
            _check_fits(_look_up(known, reference, where, f"inputs.{name}"), wanted[name], where, f"inputs.{name}")
    text = step.text if step.text is not None else step.prompt
    if text is not None:
        given = _look_up(known, text, where, form)
        if given != Values(TEXT, (1,)):  # of several only one could be used
            raise _wrong(where, form, f"{given} is given, {Values(TEXT, (1,))} is needed")
    for number, reference in enumerate(step.token_ids or ()):
        key = f"token_ids.{number}"
        given = _look_up(known, reference, where, key)
        if given.datatype != IDS:
            raise _wrong(where, key, f"{reference!r} is {given}, and tokens are {IDS}")


def _given(step: Step, manifest: Manifest) -> Mapping[str, Values]:
    """What a service of this model gives, asked like that: an embedder that is given tensors is a tensor model."""
    if step.text is not None:
        width = manifest.outputs[0].shape[-1]
        return {"embedding": Values("FP32", (1, width if isinstance(width, int) else ANY))}
    if step.inputs is None:
        return {"text": Values(TEXT, (1,)), "token_ids": Values(IDS, (1, ANY))}
    return {spec.name: values_of(spec) for spec in manifest.outputs}


def values_of(spec: TensorSpec) -> Values:
    """A tensor of a graph."""
    shape = tuple(size if isinstance(size, int) else ANY for size in spec.shape)
    return Values(NUMPY_TO_OIP.get(spec.dtype, spec.dtype), shape)


def _look_up(known: Mapping[str, Mapping[str, Values]], reference: str, where: str, key: str) -> Values:
    source, name = reference.split(".", 1)
    if name not in known[source]:
        raise _wrong(where, key, f"{source!r} gives {_listed([*known[source]])} (got {reference!r})")
    return known[source][name]


def _check_fits(given: Values, wanted: Values, where: str, key: str) -> None:
    if not given.fit(wanted):
        raise _wrong(where, key, f"{given} is given, {wanted} is needed")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "nothing"


def _wrong(where: str, key: str, message: str) -> ResplitError:
    full = f"{where}.{key}"
    return ResplitError(ErrorCode.INVALID_REQUEST, f"{full}: {message}", full.split(": ", 1)[1])
