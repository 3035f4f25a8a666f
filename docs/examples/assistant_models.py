"""Makes the small models of `assistant.toml` that stand around its encoders and its decoder:

    python docs/examples/assistant_models.py FOLDER

Their weights are drawn, so that what they say means nothing; what it takes to say it is what larger ones would take on
larger machines.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

FEATURES, MEANING, FUSED = 32, 384, 64
TOKENS, CODES = 6, 200
"""Tokens that an image and a text become, out of so many."""
WIDTH, DEPTH = 512, 200
"""Of the classifier."""
ONNX_OPSET, ONNX_IR = 17, 8

Array = Any
Shapes = dict[str, list[int | str]]
"""By tensor."""


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


def write(folder: Path) -> list[Path]:
    """A file for each, and their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, model in services().items():
        written.append(folder / f"{name}.onnx")
        onnx.save(model, written[-1])
    return written


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


if __name__ == "__main__":
    for path in write(Path(sys.argv[1])):
        print(path)
