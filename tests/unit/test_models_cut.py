"""Cutting, merging and opening graphs that are made here by hand: small, fast, without torch."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from models.importer import import_model
from models.merge import merge
from models.reference import Reference
from models.session import open_session, verified_graph
from models.store import Store
from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import Manifest, ModelKind
from tests.model_split import Stages, corrupt

WIDTH = 32


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def weight(name: str, *shape: int) -> TensorProto:
    values = np.random.default_rng(len(name)).normal(0, 0.3, shape).astype(np.float32)
    return numpy_helper.from_array(values, name)


def chain(layers: int, norm: str = "SkipSimplifiedLayerNormalization", seen_sum: bool = True) -> onnx.ModelProto:
    """Pre-norm residual layers with fused skip-normalisations, as a decoder has them, without attention."""
    nodes = [helper.make_node("MatMul", ["x", "embed"], ["h"])]
    weights = [weight("embed", 8, WIDTH), weight("head", WIDTH, 10)]
    nodes.append(helper.make_node("SimplifiedLayerNormalization", ["h", "g0"], ["n0"], axis=-1, epsilon=1e-5))
    weights.append(weight("g0", WIDTH))
    residual, normed = "h", "n0"
    for i in range(layers):
        last = i == layers - 1
        nodes.append(helper.make_node("MatMul", [normed, f"w{i}"], [f"a{i}"]))
        nodes.append(helper.make_node("Tanh", [f"a{i}"], [f"t{i}"]))
        nodes.append(helper.make_node("MatMul", [f"t{i}", f"v{i}"], [f"d{i}"]))
        outputs = [f"n{i + 1}"] if last or not seen_sum else [f"n{i + 1}", "", "", f"r{i + 1}"]
        nodes.append(
            helper.make_node(norm, [residual, f"d{i}", f"g{i + 1}"], outputs, domain="com.microsoft", epsilon=1e-5)
        )
        weights += [weight(f"w{i}", WIDTH, WIDTH), weight(f"v{i}", WIDTH, WIDTH), weight(f"g{i + 1}", WIDTH)]
        residual, normed = (f"r{i + 1}" if seen_sum else f"n{i + 1}"), f"n{i + 1}"
    nodes.append(helper.make_node("MatMul", [normed, "head"], ["y"]))
    return model_of(nodes, weights, [("x", ["batch", 3, 8])], [("y", ["batch", 3, 10])])


def model_of(
    nodes: list[Any], weights: list[TensorProto], inputs: list[tuple[str, Any]], outputs: list[tuple[str, Any]]
) -> onnx.ModelProto:
    def typed(named: list[tuple[str, Any]]) -> list[Any]:
        return [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in named]

    names = {name for node in nodes for name in node.output if name} - {name for name, _ in outputs}
    # The fused operators are strangers to ONNX's own shape inference, so files that use them say the shapes.
    between = typed([(name, ["batch", 3, WIDTH]) for name in sorted(names)])
    graph = helper.make_graph(nodes, "test", typed(inputs), typed(outputs), weights, value_info=between)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def imported(model: onnx.ModelProto, store: Store, external: bool = False) -> Manifest:
    path = store.root / "source.onnx"
    onnx.save(model, str(path), save_as_external_data=external, location="source.data", size_threshold=0)
    _, digest = import_model(str(path), store, "test")
    return store.manifest(digest)


def outputs_of(store: Store, manifest: Manifest, cuts: list[int], x: Any) -> Any:
    return Stages(store, manifest, cuts).run({"x": x})["y"]


def every_cut(blocks: int) -> list[list[int]]:
    return [[], *([i] for i in range(1, blocks)), list(range(1, blocks))]


@pytest.mark.parametrize("external", [False, True])
def test_repeating_layers_become_blocks_between_embedding_and_head(store: Store, external: bool) -> None:
    manifest = imported(chain(4), store, external)
    assert [block.role for block in manifest.blocks] == ["embedding", "layer", "layer", "layer", "layer", "head"]
    assert manifest.kind is ModelKind.TENSOR and manifest.precision == "fp32"
    assert [block.flops_per_token for block in manifest.blocks] == [2 * 3 * 8 * 32] + [2 * 3 * 2048] * 4 + [2 * 3 * 320]


@pytest.mark.parametrize("norm", ["SkipSimplifiedLayerNormalization", "SkipLayerNormalization"])
def test_a_cut_through_a_skip_normalisation_changes_no_bit(store: Store, norm: str) -> None:
    manifest = imported(chain(3, norm), store)
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    whole = Reference(store, "test").run({"x": x})["y"]
    assert len(manifest.blocks) == 5
    for cuts in every_cut(len(manifest.blocks)):
        assert np.array_equal(outputs_of(store, manifest, cuts, x), whole), cuts


def test_post_norm_layers_are_cut_after_their_normalisation(store: Store) -> None:
    manifest = imported(chain(3, seen_sum=False), store)
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    whole = Reference(store, "test").run({"x": x})["y"]
    assert len(manifest.blocks) >= 3
    for cuts in every_cut(len(manifest.blocks)):
        assert np.array_equal(outputs_of(store, manifest, cuts, x), whole), cuts


def test_merging_all_blocks_gives_back_every_node_of_the_whole(store: Store) -> None:
    manifest = imported(chain(3), store)
    merged = onnx.load_from_string(merge([verified_graph(store, block) for block in manifest.blocks]))
    whole = onnx.load_from_string(store.read(manifest.whole.digest))
    assert sorted((n.op_type, *n.input) for n in merged.graph.node) == sorted(
        (n.op_type, *n.input) for n in whole.graph.node
    )


def test_merging_blocks_that_do_not_follow_each_other_is_the_callers_error(store: Store) -> None:
    manifest = imported(chain(3), store)
    graphs = [verified_graph(store, block) for block in manifest.blocks]
    with pytest.raises(ValueError, match="does not follow"):
        merge([graphs[0], graphs[2]])
    with pytest.raises(ValueError, match="does not follow"):
        merge([graphs[2], graphs[1]])
    with pytest.raises(ValueError, match="nothing"):
        merge([])


def test_merging_twenty_four_blocks_takes_milliseconds(store: Store) -> None:
    manifest = imported(chain(22), store)
    graphs = [verified_graph(store, block) for block in manifest.blocks]
    assert len(graphs) == 24

    def seconds() -> float:
        begin = time.perf_counter()
        merge(graphs)
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.05


def test_graphs_hold_no_weights_and_no_paths(store: Store) -> None:
    manifest = imported(chain(3), store)
    for digest in (manifest.whole.digest, *(block.graph.digest for block in manifest.blocks)):
        model = onnx.load_from_string(store.read(digest))
        for tensor in model.graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                entries = {entry.key: entry.value for entry in tensor.external_data}
                assert entries["offset"] == "0"
                assert store.path(entries["location"]).stat().st_size == int(entries["length"])
            else:
                assert len(tensor.raw_data) < 1024
        assert str(store.root).encode() not in store.read(digest)


def test_two_models_with_a_common_weight_store_it_once(store: Store) -> None:
    first = imported(chain(2), store)
    second = imported(chain(3), store)
    common = {ref.digest for block in first.blocks for ref in block.weights}
    assert common <= {ref.digest for block in second.blocks for ref in block.weights}


def test_a_graph_with_two_live_tensors_everywhere_is_one_block_and_says_why(store: Store) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["l"]),
        helper.make_node("Tanh", ["x"], ["r"]),
        helper.make_node("Add", ["l", "r"], ["y"]),
    ]
    model = model_of(nodes, [weight("a", WIDTH, WIDTH)], [("x", ["batch", WIDTH])], [("y", ["batch", WIDTH])])
    del model.graph.value_info[:]
    manifest = imported(model, store)
    assert [block.role for block in manifest.blocks] == ["whole"]
    assert manifest.cut == "Not cut: more than one tensor is alive at every position of the graph."
    x = np.ones((2, WIDTH), np.float32)
    assert np.array_equal(outputs_of(store, manifest, [], x), Reference(store, "test").run({"x": x})["y"])


def test_shapes_read_from_an_input_are_read_from_the_boundary_after_a_cut(store: Store) -> None:
    """A later layer that reshapes by the batch of the input must not demand the input itself."""
    nodes = [helper.make_node("Shape", ["x"], ["b"], start=0, end=1)]
    weights = [numpy_helper.from_array(np.array([-1], np.int64), "rest")]
    nodes.append(helper.make_node("Concat", ["b", "rest"], ["flat"], axis=0))
    last = "x"
    for i in range(4):
        nodes.append(helper.make_node("MatMul", [last, f"w{i}"], [f"m{i}"]))
        nodes.append(helper.make_node("Tanh", [f"m{i}"], [f"t{i}"]))
        nodes.append(helper.make_node("Reshape", [f"t{i}", "flat"], ["y" if i == 3 else f"h{i}"]))
        weights.append(weight(f"w{i}", WIDTH, WIDTH))
        last = f"h{i}"
    graph = helper.make_graph(
        nodes,
        "test",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", WIDTH])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", WIDTH])],
        weights,
        value_info=[helper.make_tensor_value_info(f"h{i}", TensorProto.FLOAT, ["batch", WIDTH]) for i in range(3)],
    )
    manifest = imported(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), store)
    assert len(manifest.blocks) == 4
    x = np.random.default_rng(1).normal(size=(5, WIDTH)).astype(np.float32)
    whole = Reference(store, "test").run({"x": x})["y"]
    for cuts in every_cut(4):
        assert np.array_equal(outputs_of(store, manifest, cuts, x), whole), cuts


def test_a_boundary_that_the_model_returns_too_survives_merging(store: Store) -> None:
    model = chain(3)
    model.graph.output.add().CopyFrom(helper.make_tensor_value_info("r2", TensorProto.FLOAT, ["batch", 3, WIDTH]))
    manifest = imported(model, store)
    assert len(manifest.blocks) == 5
    assert [block.outputs for block in manifest.blocks] == [(), (), ("r2",), (), ("y",)]
    x = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
    whole = Reference(store, "test").run({"x": x})
    for cuts in every_cut(len(manifest.blocks)):
        found = Stages(store, manifest, cuts).run({"x": x})
        assert np.array_equal(found["y"], whole["y"]) and np.array_equal(found["r2"], whole["r2"]), cuts


def flip(path: Path) -> None:
    corrupt(path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("harm", "code"), [(flip, "corrupt_file"), (truncate, "corrupt_file"), (Path.unlink, None)])
@pytest.mark.parametrize("which", ["graph", "weight"])
def test_a_harmed_block_never_reaches_onnx_runtime(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    harm: Callable[[Path], None],
    code: str | None,
    which: str,
) -> None:
    manifest = imported(chain(3), store)
    block = manifest.blocks[1]
    verified_graph(store, block)
    opened: list[Any] = []
    monkeypatch.setattr(ort, "InferenceSession", lambda *given, **options: opened.append(given))
    ref = block.graph if which == "graph" else block.weights[0]
    harm(store.path(ref.digest))
    with pytest.raises(ResplitError, match=ref.digest) as caught:
        open_session(verified_graph(store, block), store.blobs_folder, "cpu", 1)
    assert caught.value.code == (code or "missing_blob")
    with pytest.raises(ResplitError, match=ref.digest):
        Stages(store, manifest, [])
    assert opened == []


def test_a_provider_that_is_not_there_is_an_error_and_no_fallback(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = imported(chain(2), store)
    monkeypatch.setattr(ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(ResplitError) as caught:
        open_session(verified_graph(store, manifest.blocks[0]), store.blobs_folder, "cuda", 1)
    assert caught.value.code is ErrorCode.PROVIDER_UNAVAILABLE and caught.value.field == "provider"


def test_bytes_that_are_no_graph_are_a_typed_error(store: Store) -> None:
    with pytest.raises(ResplitError) as caught:
        open_session(b"garbage", store.blobs_folder, "cpu", 1)
    assert caught.value.code is ErrorCode.UNSUPPORTED_MODEL


def test_a_garbage_file_is_a_typed_error(store: Store, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"\x00garbage" * 100)
    with pytest.raises(ResplitError, match=r"bad\.onnx") as caught:
        import_model(str(tmp_path / "bad.onnx"), store)
    assert caught.value.code is ErrorCode.CORRUPT_FILE and store.names() == {}


def test_a_truncated_graph_is_a_typed_error(store: Store, tmp_path: Path) -> None:
    data = chain(3).SerializeToString()
    for keep in (10, len(data) // 2, len(data) - 5):
        (tmp_path / "cut.onnx").write_bytes(data[:keep])
        with pytest.raises(ResplitError) as caught:
            import_model(str(tmp_path / "cut.onnx"), store)
        assert caught.value.code is ErrorCode.CORRUPT_FILE


def test_a_truncated_weight_file_is_a_typed_error(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    onnx.save(chain(3), str(path), save_as_external_data=True, location="model.data", size_threshold=0)
    (tmp_path / "model.data").write_bytes((tmp_path / "model.data").read_bytes()[:5000])
    with pytest.raises(ResplitError, match="truncated") as caught:
        import_model(str(path), store)
    assert caught.value.code is ErrorCode.CORRUPT_FILE
    (tmp_path / "model.data").unlink()
    with pytest.raises(ResplitError, match="cannot be read"):
        import_model(str(path), store)


def test_weights_outside_the_models_folder_are_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"x" * 8192)
    (tmp_path / "model").mkdir()
    model = chain(2)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../secret")
    (tmp_path / "model" / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ResplitError, match="outside the model's folder"):
        import_model(str(tmp_path / "model" / "m.onnx"), store)


@pytest.mark.parametrize("source", ["/nowhere/at/all", "nothing.onnx"])
def test_a_source_that_does_not_exist_is_an_invalid_request(store: Store, source: str) -> None:
    with pytest.raises(ResplitError, match="does not exist") as caught:
        import_model(source, store)
    assert caught.value.code is ErrorCode.INVALID_REQUEST


def test_an_empty_folder_is_an_unsupported_model(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ResplitError) as caught:
        import_model(str(tmp_path), store)
    assert caught.value.code is ErrorCode.UNSUPPORTED_MODEL
