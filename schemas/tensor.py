"""Tensors as bytes: what every frame, request and reply that carries one agrees on."""

from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ErrorCode, ResplitError

# The Open Inference Protocol's names of datatypes, and numpy's.
OIP_TO_NUMPY = {
    "BOOL": "bool",
    "UINT8": "uint8",
    "UINT16": "uint16",
    "UINT32": "uint32",
    "UINT64": "uint64",
    "INT8": "int8",
    "INT16": "int16",
    "INT32": "int32",
    "INT64": "int64",
    "FP16": "float16",
    "FP32": "float32",
    "FP64": "float64",
}
NUMPY_TO_OIP = {name: oip for oip, name in OIP_TO_NUMPY.items()}
# numpy composes a type's name anew at every look: once a frame, that is a tenth of the work of sending it.
NAME_OF_DTYPE = {np.dtype(name): name for name in NUMPY_TO_OIP}
MAX_RANK = 8

Array = NDArray[Any]


def view(data: memoryview | bytes, dtype: str, shape: tuple[int, ...], field: str) -> Array:
    """A read-only array over `data`, little-endian and row-major, without a copy.

    Raises `ResplitError(INVALID_REQUEST)` if the type is unknown or the bytes are not exactly as many
    as the shape needs; nothing is allocated before that is known.
    """
    if dtype not in NUMPY_TO_OIP:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"tensors of type {dtype!r} do not travel", field)
    if len(shape) > MAX_RANK or any(size < 0 for size in shape):
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"shape {list(shape)} is not a tensor's", field)
    needed = prod(shape) * np.dtype(dtype).itemsize
    if needed != len(data):
        message = f"{dtype}{list(shape)} needs {needed} bytes, {len(data)} came"
        raise ResplitError(ErrorCode.INVALID_REQUEST, message, field)
    return np.frombuffer(data, dtype=dtype).reshape(shape)
