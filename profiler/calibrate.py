"""Two figures that a roofline needs of a device, measured through ONNX Runtime itself.

FLOP/s: a square fp32 matrix product, which prefill resembles. Bytes/s: a matrix-vector product over weights
that no cache holds, which decoding resembles: every step streams all weights once.
"""

import time
from typing import Literal

import numpy as np
import onnxruntime as ort

from profiler.device import cpu_name
from profiler.gpu import gpu_name
from profiler.product import product_session
from schemas.capacity import Provider

MEASURE_S = 0.15
"""How long each figure is measured, after one warm-up run; the best run counts, since noise only ever slows."""
RUNS_MAX = 200
PRODUCT_SIZE = {"cpu": 768, "cuda": 8192}
"""Rows and columns of the matrix product: large enough to keep the device busy, small enough for a slow one."""
STREAMED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Weights of the matrix-vector product: more than the last-level cache of an edge device (or of a GPU)."""
VECTOR_SIZE = 4096


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


def _seconds(provider: Literal["cpu", "cuda"], threads: int, rows: int, inner: int, columns: int) -> float:
    """The shortest time of `x[rows, inner] @ w[inner, columns]` with everything already on the device."""
    session = product_session(provider, threads, inner, columns)
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
