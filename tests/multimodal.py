"""The multimodal pipeline of `docs/examples/assistant.toml`: small models for its services, and all of it composed in
one process."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from agent.tensors import pool, text_inputs
from models.importer import import_model
from models.reference import Reference
from models.store import Store
from models.text import Text
from schemas.tensor import Array

PIPELINE = Path(__file__).parents[1] / "docs" / "examples" / "assistant.toml"
FEATURES, MEANING, FUSED = 32, 384, 64
TOKENS, CODES = 6, 200
"""Tokens that an image and a text become, out of so many."""
WIDTH, DEPTH = 512, 200
"""Of the classifier."""
CHUNK_TOKENS, CONTEXT_TOKENS = 128, 256
ONNX_OPSET, ONNX_IR = 17, 8

Shapes = dict[str, list[int | str]]
"""By tensor."""


def import_assistant(folder: Path, store: Store) -> None:
    """The models of the services into a store that has `minilm` and `llama`, and the pipeline as `assistant`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, model in services().items():
        path = folder / f"{name}.onnx"
        onnx.save(model, path)
        import_model(str(path), store, name)
    import_model(str(PIPELINE), store)


def services() -> dict[str, onnx.ModelProto]:
    """What stands around the two encoders and the decoder."""
    return {
        "vision": _vision(),
        "projection": _projection(),
        "fusion": _dense("fusion", {"features": FEATURES, "meaning": MEANING}, (128, FUSED), "fused"),
        "answer": _dense("answer", {"fused": FUSED}, (32, 8), "scores"),
        "classes": _deep(),
        "controls": _dense("controls", {"fused": FUSED}, (16, 2), "scores"),
    }


class Composed:
    """The services one after another in this process, each model unsplit."""

    def __init__(self, store: Store) -> None:
        self._models = {name: Reference(store, name) for name in ("vision", "minilm", "llama", *services())}
        spec = self._models["minilm"].manifest.text
        assert spec is not None
        self._text = Text(spec, store.path(spec.tokenizer.digest))

    def features(self, image: Array) -> Array:
        return self._models["vision"].run({"image": image})["features"]

    def meaning(self, text: str) -> Array:
        manifest = self._models["minilm"].manifest
        output = self._models["minilm"].run(text_inputs(self._text, manifest, text, "text"))
        return pool(output[manifest.outputs[0].name], manifest)[None, :].astype(np.float32)

    def fused(self, image: Array, text: str) -> Array:
        both = {"features": self.features(image), "meaning": self.meaning(text)}
        return self._models["fusion"].run(both)["fused"]

    def tokens(self, image: Array, text: str, count: int) -> list[int]:
        both = {"features": self.features(image), "meaning": self.meaning(text)}
        prompt = self._models["projection"].run(both)["tokens"][0].tolist()
        return self._models["llama"].generate(prompt, count, CHUNK_TOKENS, CONTEXT_TOKENS)

    def answer(self, image: Array, text: str) -> Array:
        return self._models["answer"].run({"fused": self.fused(image, text)})["scores"]

    def classes(self, image: Array) -> Array:
        return self._models["classes"].run({"features": self.features(image)})["scores"]

    def controls(self, image: Array, text: str) -> Array:
        return self._models["controls"].run({"fused": self.fused(image, text)})["scores"]


def image(seed: int) -> Array:
    """A picture of nothing."""
    return np.random.default_rng(seed).normal(size=(1, 3, 32, 32)).astype(np.float32)


def _vision() -> onnx.ModelProto:
    rng = np.random.default_rng(1)
    weights = {
        "kernel": rng.normal(size=(16, 3, 5, 5), scale=0.2),
        "mix": rng.normal(size=(16, FEATURES), scale=0.5),
    }
    nodes = [
        helper.make_node("Conv", ["image", "kernel"], ["seen"], strides=[2, 2]),
        helper.make_node("Relu", ["seen"], ["lit"]),
        helper.make_node("GlobalAveragePool", ["lit"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("MatMul", ["flat", "mix"], ["mixed"]),
        helper.make_node("Tanh", ["mixed"], ["features"]),
    ]
    return _model("vision", nodes, {"image": ["batch", 3, 32, 32]}, {"features": ["batch", FEATURES]}, weights)


def _projection() -> onnx.ModelProto:
    """Features and a meaning to the nearest of some codes, a few times over: tokens that a decoder can read."""
    rng = np.random.default_rng(2)
    weights = {"codes": rng.normal(size=(FEATURES + MEANING, TOKENS * CODES)), "shape": np.array([-1, TOKENS, CODES])}
    nodes = [
        helper.make_node("Concat", ["features", "meaning"], ["both"], axis=1),
        helper.make_node("MatMul", ["both", "codes"], ["near"]),
        helper.make_node("Reshape", ["near", "shape"], ["each"]),
        helper.make_node("ArgMax", ["each"], ["tokens"], axis=2, keepdims=0),
    ]
    given: Shapes = {"features": ["batch", FEATURES], "meaning": ["batch", MEANING]}
    return _model("projection", nodes, given, {"tokens": ["batch", TOKENS]}, weights, TensorProto.INT64)


def _dense(name: str, given: dict[str, int], widths: tuple[int, int], output: str) -> onnx.ModelProto:
    rng = np.random.default_rng(len(name))
    width = sum(given.values())
    weights = {
        "first": rng.normal(size=(width, widths[0]), scale=width**-0.5),
        "second": rng.normal(size=widths, scale=widths[0] ** -0.5),
    }
    nodes = [
        helper.make_node("Concat", [*given], ["together"], axis=1),
        helper.make_node("MatMul", ["together", "first"], ["inner"]),
        helper.make_node("Relu", ["inner"], ["kept"]),
        helper.make_node("MatMul", ["kept", "second"], [output]),
    ]
    shapes: Shapes = {one: ["batch", size] for one, size in given.items()}
    return _model(name, nodes, shapes, {output: ["batch", widths[1]]}, weights)


def _deep() -> onnx.ModelProto:
    """A classifier that takes its time, over and over through the same layer: some milliseconds of a core."""
    rng = np.random.default_rng(3)
    weights = {
        "first": rng.normal(size=(FEATURES, WIDTH), scale=FEATURES**-0.5),
        "again": rng.normal(size=(WIDTH, WIDTH), scale=WIDTH**-0.5),
        "last": rng.normal(size=(WIDTH, 10), scale=WIDTH**-0.5),
    }
    nodes = [helper.make_node("MatMul", ["features", "first"], ["layer0"])]
    for i in range(DEPTH):
        nodes.append(helper.make_node("MatMul", [f"layer{i}", "again"], [f"sum{i}"]))
        nodes.append(helper.make_node("Tanh", [f"sum{i}"], [f"layer{i + 1}"]))
    nodes.append(helper.make_node("MatMul", [f"layer{DEPTH}", "last"], ["scores"]))
    return _model("classes", nodes, {"features": ["batch", FEATURES]}, {"scores": ["batch", 10]}, weights)


def _model(
    name: str,
    nodes: list[onnx.NodeProto],
    inputs: Shapes,
    outputs: Shapes,
    weights: dict[str, Array],
    gives: int = TensorProto.FLOAT,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        name,
        [helper.make_tensor_value_info(one, TensorProto.FLOAT, shape) for one, shape in inputs.items()],
        [helper.make_tensor_value_info(one, gives, shape) for one, shape in outputs.items()],
        [
            numpy_helper.from_array(value if value.dtype.kind == "i" else value.astype(np.float32), one)
            for one, value in weights.items()
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", ONNX_OPSET)], ir_version=ONNX_IR)
    onnx.checker.check_model(model)
    return model
