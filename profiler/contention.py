"""How much of a device others take, while this process leaves it alone: a small calculation, timed now and then.

A node that runs blocks shows in their times that something slows it. One at rest shows nothing, and what it was
promised or measured to do long ago may be a fraction of that by now: whoever moves there finds it out too late.
"""

import time
from collections import deque
from statistics import median
from typing import Literal

import numpy as np
import onnxruntime as ort

from profiler.product import product_session

SIZE = {"cpu": 384, "cuda": 2048}
"""Rows and columns of the product: a few milliseconds of a slow device, every few seconds."""
RUNS = 3
"""The least of these counts: one may be held up."""
LOOKS = 3
"""The median of so many looks, for whatever takes a second is no slowdown."""


class Contention:
    """One device. One thread at a time may measure."""

    def __init__(self, provider: Literal["cpu", "cuda"], threads: int) -> None:
        """Raises `ResplitError(PROVIDER_UNAVAILABLE)` where ONNX Runtime cannot use it."""
        size = SIZE[provider]
        self._session = product_session(provider, threads, size, size)
        self._binding = self._session.io_binding()
        x = np.full((size, size), 0.5, np.float32)
        self._binding.bind_ortvalue_input("x", ort.OrtValue.ortvalue_from_numpy(x, provider, 0))
        self._binding.bind_output("y", provider, 0)
        self._session.run_with_iobinding(self._binding)
        self._best_s = self._least_s()
        self._looks: deque[float] = deque(maxlen=LOOKS)

    def measure(self) -> float:
        """How many times longer than at its best the calculation takes now, at least 1."""
        least_s = self._least_s()
        self._best_s = min(self._best_s, least_s)
        self._looks.append(least_s)
        return max(1.0, median(self._looks) / self._best_s)

    def _least_s(self) -> float:
        found = []
        for _ in range(RUNS):
            before = time.perf_counter()
            self._session.run_with_iobinding(self._binding)
            found.append(time.perf_counter() - before)
        return max(min(found), 1e-9)
