"""A matrix product as an ONNX Runtime session: the calculation by which devices are measured."""

from typing import Any

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from models.providers import Provider, require, unavailable


def product_session(provider: Provider, threads: int, inner: int, columns: int) -> Any:
    """A session of `y[rows, columns] = x[rows, inner] @ w`. Raises `ResplitError(PROVIDER_UNAVAILABLE)`."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    name = require(provider)
    try:
        session = ort.InferenceSession(_product(inner, columns), options, providers=[name])
    except Exception as error:  # ONNX Runtime raises a dozen types; each one means that it cannot be used
        raise unavailable(provider, str(error)) from error
    if name not in session.get_providers():
        # ONNX Runtime falls back to the CPU without an error where the driver or its libraries are missing.
        raise unavailable(provider, "there is no device, or its libraries are missing")
    return session


def _product(inner: int, columns: int) -> bytes:
    """The graph `y = x @ w`, whose weights ONNX Runtime makes (and packs) itself when it folds constants."""
    shape = numpy_helper.from_array(np.array([inner, columns], np.int64), "shape")
    value = numpy_helper.from_array(np.array([0.25], np.float32))
    graph = helper.make_graph(
        [
            helper.make_node("ConstantOfShape", ["shape"], ["w"], value=value),
            helper.make_node("MatMul", ["x", "w"], ["y"]),
        ],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", columns])],
        [shape],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    data: bytes = model.SerializeToString()
    return data
