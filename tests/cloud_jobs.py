"""Requests as an ingress holds them that puts them to a cloud."""

from collections import deque
from typing import cast

import numpy as np

from agent.generation import Generation
from agent.replies import ReplyTo
from agent.tensorjob import TensorJob
from agent.usage import Meter
from schemas.base import Digest, RequestId
from schemas.manifest import TensorSpec
from schemas.request import EmbeddingRequest, TextRequest, read_request
from schemas.tensor import Array
from simulator.ingress import SILENT
from tests.trigger_world import manifest

NOWHERE = cast(ReplyTo, None)
MODEL = Digest("1" * 64)


def generation() -> Generation:
    request = TextRequest(prompt="a", max_tokens=4)
    return Generation(RequestId("r"), request, NOWHERE, MODEL, (1,), 4, frozenset(), 0, Meter(0.0), SILENT, None)


def embedding_job(texts: list[str], size: int) -> TensorJob:
    outputs = (TensorSpec(name="y", dtype="float32", shape=(1, size)),)
    embedder = manifest().model_copy(update={"outputs": outputs})
    calls: deque[tuple[int, dict[str, Array]]] = deque((i, {}) for i in range(len(texts)))
    return TensorJob(
        RequestId("r"), EmbeddingRequest(input=tuple(texts)), NOWHERE, MODEL, embedder, Meter(0.0), None, calls
    )


def tensor_job() -> TensorJob:
    """One input, and one output of two numbers a row."""
    x, y = (TensorSpec(name=name, dtype="float32", shape=("rows", 2)) for name in "xy")
    model = manifest().model_copy(update={"inputs": (x,), "outputs": (y,)})
    request = read_request({"inputs": [{"name": "x", "shape": [1, 2], "datatype": "FP32", "data": [1.0, 2.0]}]})
    calls: deque[tuple[int, dict[str, Array]]] = deque([(0, {"x": np.ones((1, 2), np.float32)})])
    job = TensorJob(RequestId("r"), request, NOWHERE, MODEL, model, Meter(0.0), None, calls)  # type: ignore[arg-type]
    job.outputs = ("y",)
    return job
