"""A pipeline's file: what is right is imported, what is wrong is named with file and key, and nothing is stored."""

import tomllib
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from models.importer import import_model
from models.sealer import import_sealed, seal_model
from models.store import Store
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import ModelKind
from tests import model_zoo

SERVICES: dict[str, dict[str, Any]] = {
    "eyes": {"model": "double", "kind": "core", "replicas": 2},
    "words": {"model": "double", "kind": "light"},
    "meaning": {"model": "embedder", "kind": "core"},
}
TASK: dict[str, Any] = {
    "deadline_ms": 500,
    "inputs": {"x": {"datatype": "FP32", "shape": [1, 8]}, "said": {"datatype": "BYTES", "shape": [1]}},
    "steps": {
        "eyes": {"inputs": {"x": "request.x"}},
        "words": {"inputs": {"x": "eyes.y"}},
        "meaning": {"text": "request.said"},
    },
    "outputs": {"y": "words.y", "meaning": "meaning.embedding"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """`double`, which takes `x` of 8 numbers and gives `y`, and a small `embedder`."""
    folder = tmp_path_factory.mktemp("models")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 8]) for name in "xy")
    model = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", [x], [y])
    onnx.save(
        helper.make_model(model, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "double.onnx"
    )
    store = Store(folder / "store")
    import_model(str(folder / "double.onnx"), store)
    import_model(str(model_zoo.built_bert(folder)), store, "embedder")
    return store


def as_toml(value: Any) -> str:
    match value:
        case dict():
            return "{" + ", ".join(f'"{key}" = {as_toml(one)}' for key, one in value.items()) + "}"
        case list():
            return "[" + ", ".join(map(as_toml, value)) + "]"
        case bool():
            return str(value).lower()
        case str():
            return f'"{value}"'
    return str(value)


def written(folder: Path, services: dict[str, Any], task: dict[str, Any], **more: Any) -> Path:
    path = folder / "look.toml"
    tables = {**more, "services": services, "tasks": {"say": task}}
    path.write_text("\n".join(f"{key} = {as_toml(value)}" for key, value in tables.items()))
    tomllib.loads(path.read_text())
    return path


def test_a_pipeline_is_a_model_of_one_block_that_names_others(models: Store, tmp_path: Path) -> None:
    name, digest = import_model(str(written(tmp_path, SERVICES, TASK)), models)
    manifest = models.manifest(digest)
    assert (name, manifest.kind, len(manifest.blocks)) == ("look", ModelKind.PIPELINE, 1)
    assert manifest.pipeline is not None
    assert manifest.pipeline.services["words"].model == models.resolve("double")
    assert manifest.pipeline.tasks["say"].slo.deadline_ms == 500
    assert set(manifest.pipeline.tasks["say"].order) == {"eyes", "words", "meaning"}
    models.verify_model(name)


def test_what_a_pipeline_needs_stays_in_the_store(models: Store, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for kept in ("double", "embedder"):
        for digest in (models.resolve(kept), *models.manifest(kept).blobs):
            store.put(models.read(digest))  # type: ignore[arg-type]
        store.name(kept, models.resolve(kept))
    _, digest = import_model(str(written(tmp_path, SERVICES, TASK)), store)
    store.remove("double")
    pipeline = store.manifest(digest).pipeline
    assert pipeline is not None
    assert store.manifest(pipeline.services["eyes"].model).name == "double"
    store.remove("look")
    assert not store.has(pipeline.services["eyes"].model)


def _changed(value: dict[str, Any], path: str, to: Any) -> dict[str, Any]:
    key, _, rest = path.partition("/")
    if not rest:
        return {other: one for other, one in value.items() if other != key} if to is None else {**value, key: to}
    return {**value, key: _changed(value.get(key, {}), rest, to)}


@pytest.mark.parametrize(
    ("path", "to", "said"),
    [
        ("services/eyes/model", "nobody", "services.eyes.model: no model 'nobody' here"),
        ("services/eyes/kind", "heavy", "services.eyes.kind"),
        ("services/eyes/stagse", 2, "there is no key 'stagse'; did you mean 'stages'?"),
        ("services/words/stages", 2, "a light service is one stage"),
        ("services/eyes/replicas", 0, "services.eyes.replicas"),
        ("services/request", {"model": "double", "kind": "core"}, "a service cannot be called 'request'"),
        ("services/idle", {"model": "double", "kind": "core"}, "no task uses service 'idle'"),
        ("task/deadline_ms", None, "a task has a deadline; give deadline_ms"),
        ("task/deadline_ms", -5, "tasks.say.slo.deadline_ms"),
        ("task/rate_per_s", 0, "tasks.say.rate_per_s"),
        ("task/inputs/x/datatype", "FP8", "tasks.say.inputs.x.datatype: there is no such datatype"),
        ("task/inputs/x/shape", [1, 9], "tasks.say.steps.eyes.inputs.x: FP32[1, 9] is given, FP32[-1, 8] is needed"),
        ("task/inputs/x/shape", [1, 0], "tasks.say.inputs.x.shape: a size is 1 or more"),
        ("task/inputs/said/shape", [-1], "tasks.say.steps.meaning.text: BYTES[-1] is given, BYTES[1] is needed"),
        ("task/inputs/said/shape", [2], "tasks.say.steps.meaning.text: BYTES[2] is given, BYTES[1] is needed"),
        ("task/steps/eyes/inputs/x", "request.z", "step eyes uses 'request.z', and the inputs are ['said', 'x']"),
        ("task/steps/eyes/inputs/x", "nose.y", "step eyes uses 'nose.y', and the steps are"),
        ("task/steps/eyes/inputs/x", "words.y", "its steps go round in a ring"),
        ("task/steps/words/inputs/x", "eyes.z", "tasks.say.steps.words.inputs.x: 'eyes' gives y (got 'eyes.z')"),
        ("task/steps/words/inputs/x", "eyes", "tasks.say.steps.words.inputs.x"),
        ("task/steps/words", {"inputs": {"q": "eyes.y"}}, "'double' takes ['x'] (got ['q'])"),
        ("task/steps/words", {"text": "request.said"}, "'double' is a model of kind tensor; give inputs"),
        ("task/steps/meaning", {"prompt": "request.said"}, "'embedder' is a model of kind embedder; give text"),
        ("task/steps/words", {"inputs": {"x": "eyes.y"}, "text": "request.said"}, "give exactly one of inputs, text"),
        ("task/steps/nose", {"text": "request.said"}, "a step uses service 'nose'"),
        ("task/outputs/y", "words.z", "tasks.say.outputs.y: 'words' gives y (got 'words.z')"),
        ("task/outputs", {}, "tasks.say.outputs"),
        ("survives", "everything", "survives"),
    ],
)
def test_what_is_wrong_is_named_and_nothing_is_stored(
    models: Store, tmp_path: Path, path: str, to: Any, said: str
) -> None:
    whole = _changed({"services": SERVICES, "task": TASK}, path, to)
    services, task = whole.pop("services"), whole.pop("task")
    file = written(tmp_path, services, task, **whole)
    before = models.names()
    with pytest.raises(ResplitError) as refused:
        import_model(str(file), models, "wrong")
    assert said in refused.value.message
    assert str(file) in refused.value.message
    assert refused.value.code in (ErrorCode.INVALID_REQUEST, ErrorCode.UNKNOWN_MODEL)
    assert models.names() == before


def test_a_pipeline_in_a_pipeline_is_refused(models: Store, tmp_path: Path) -> None:
    import_model(str(written(tmp_path, SERVICES, TASK)), models, "inner")
    services = {**SERVICES, "eyes": {"model": "inner", "kind": "core"}}
    with pytest.raises(ResplitError, match="'inner' is a pipeline itself"):
        import_model(str(written(tmp_path, services, TASK)), models, "outer")


def test_a_decoder_cannot_be_a_light_service(models: Store, tmp_path: Path) -> None:
    model_zoo.import_decoder(tmp_path, models, "llama-fp32")
    services = {**SERVICES, "words": {"model": "llama-fp32", "kind": "light"}}
    with pytest.raises(ResplitError, match="light services keep nothing; say core"):
        import_model(str(written(tmp_path, services, TASK)), models, "outer")


def test_what_has_no_weights_is_not_sealed(models: Store, tmp_path: Path) -> None:
    path = written(tmp_path, SERVICES, TASK)
    import_model(str(path), models)
    with pytest.raises(ResplitError, match="is a pipeline, which has no weights"):
        seal_model(models, "look", models)
    with pytest.raises(ResplitError, match="is a pipeline, which has no weights"):
        import_sealed(str(path), models)


def test_what_a_pipeline_uses_in_the_open_is_not_sealed_beside_it(models: Store, tmp_path: Path) -> None:
    import_model(str(written(tmp_path, SERVICES, TASK)), models, "user")
    with pytest.raises(ResplitError, match="uses 'double' in the open; remove it, seal 'double'"):
        seal_model(models, "double", models)
    assert not models.manifest("double").is_sealed


def test_a_file_that_is_not_there_or_no_toml_is_told_in_a_line(models: Store, tmp_path: Path) -> None:
    with pytest.raises(ResplitError, match=r"cannot read .*nothing\.toml: No such file"):
        import_model(str(tmp_path / "nothing.toml"), models)
    (tmp_path / "odd.toml").write_text("services = [")
    with pytest.raises(ResplitError, match=r"odd\.toml is not valid TOML"):
        import_model(str(tmp_path / "odd.toml"), models)
