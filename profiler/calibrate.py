"""Two figures that a roofline needs of a device, measured through ONNX Runtime itself.

FLOP/s: a square fp32 matrix product, which prefill resembles. Bytes/s: a matrix-vector product over weights
that no cache holds, which decoding resembles: every step streams all weights once.
"""

import time
from typing import Any, Literal

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from profiler.device import cpu_name
from profiler.gpu import gpu_name
from schemas.capacity import Provider
from schemas.errors import ErrorCode, ResplitError

MEASURE_S = 0.15
"""How long each figure is measured, after one warm-up run; the best run counts, since noise only ever slows."""
RUNS_MAX = 200
PRODUCT_SIZE = {"cpu": 768, "cuda": 8192}
"""Rows and columns of the matrix product: large enough to keep the device busy, small enough for a slow one."""
STREAMED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Weights of the matrix-vector product: more than the last-level cache of an edge device (or of a GPU)."""
VECTOR_SIZE = 4096

EXECUTION_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def calibrate(provider: Literal["cpu", "cuda"], threads: int) -> Provider:
    """Measure `provider` with `threads` CPU threads; about half a second.

    Raises `ResplitError(PROVIDER_UNAVAILABLE)` where ONNX Runtime cannot use it.
    """
    size = PRODUCT_SIZE[provider]
    product_s = _seconds(provider, threads, rows=size, inner=size, columns=size)
    columns = STREAMED_BYTES[provider] // (4 * VECTOR_SIZE)
    stream_s = _seconds(provider, threads, rows=1, inner=VECTOR_SIZE, columns=columns)
    device = (gpu_name() if provider == "cuda" else None) or cpu_name()
    return Provider(
        name=provider,
        device=device,
        flops_per_s=2 * size**3 / product_s,
        bytes_per_s=STREAMED_BYTES[provider] / stream_s,
    )


def _seconds(provider: str, threads: int, rows: int, inner: int, columns: int) -> float:
    """The shortest time of `x[rows, inner] @ w[inner, columns]` with everything already on the device."""
    session = _session(provider, threads, inner, columns)
    binding = session.io_binding()
    x = np.full((rows, inner), 0.5, np.float32)
    binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x, provider, 0))
    binding.bind_output("y", provider, 0)
    session.run_with_iobinding(binding)
    best = float("inf")
    stop = time.perf_counter() + MEASURE_S
    for _ in range(RUNS_MAX):
        before = time.perf_counter()
        session.run_with_iobinding(binding)
        after = time.perf_counter()
        best = min(best, after - before)
        if after >= stop:
            break
    return best


def _session(provider: str, threads: int, inner: int, columns: int) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4
    name = EXECUTION_PROVIDERS[provider]
    try:
        if name not in ort.get_available_providers():
            raise RuntimeError("this build of ONNX Runtime does not contain it")
        session = ort.InferenceSession(_product(inner, columns), options, providers=[name])
    except Exception as error:  # ONNX Runtime raises a dozen types; each one means that it cannot be used
        message = f"the execution provider {provider!r} cannot be used here: {error}"
        raise ResplitError(ErrorCode.PROVIDER_UNAVAILABLE, message, "provider") from error
    if name not in session.get_providers():
        # ONNX Runtime falls back to the CPU without an error where the driver or its libraries are missing.
        message = f"the execution provider {provider!r} cannot be used here: no driver, device or CUDA libraries"
        raise ResplitError(ErrorCode.PROVIDER_UNAVAILABLE, message, "provider")
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
