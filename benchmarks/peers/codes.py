"""PURE: weights of an ONNX graph in the order and the bytes that llama.cpp has them in."""

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
BLOCK = 32
"""Weights that share a scale, on both sides."""


def encoded(codes: Array, scales: Array, bits: int) -> Array:
    """Rows [N, bytes] of Q4_0 or Q8_0 blocks from the codes [N, K / 32, bytes] and scales [N, K / 32] of MatMulNBits.

    Both count from the middle, 8 or 128. Of 4-bit codes MatMulNBits keeps neighbours in one byte, Q4_0 those that are
    16 apart.
    """
    if bits == 8:
        ordered = (codes.astype(np.int16) - 128).astype(np.int8).view(np.uint8)
    else:
        one_each = np.stack((codes & 0xF, codes >> 4), axis=-1).reshape(*codes.shape[:2], BLOCK)
        ordered = one_each[..., : BLOCK // 2] | (one_each[..., BLOCK // 2 :] << 4)
    d = scales.astype(np.float16)[..., None].view(np.uint8)
    return np.concatenate((d, ordered), axis=-1).reshape(len(codes), -1)


def interleaved(rows: Array, heads: int) -> Array:
    """Rows of a query or key projection in the order in which llama.cpp turns them: pairs side by side, not halves."""
    halves = rows.reshape(heads, 2, len(rows) // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)
