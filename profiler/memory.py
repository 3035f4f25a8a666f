"""PURE: what a node must have free to host a block (mathematics.md A1). In bytes."""

from math import ceil

from profiler.kv import kv_tokens
from schemas.deployment import Settings
from schemas.manifest import Block

RESIDENT_PER_WEIGHT_BYTE = 1.1
"""ONNX Runtime repacks matrices for its kernels and lets go of the originals: measured 1.01 for fp32, and some air."""
SESSION_BYTES = 2 << 20
"""A session's graph, plan and work buffers, per block."""


def session_memory_bytes(block: Block) -> int:
    """What a session of a block takes, which others of the same graph share."""
    return ceil(block.session_bytes * RESIDENT_PER_WEIGHT_BYTE) + SESSION_BYTES


def weight_memory_bytes(block: Block) -> int:
    """What a node must have free to load a block, before any cache."""
    return session_memory_bytes(block) + block.adapter_bytes


def kv_memory_bytes(block: Block, settings: Settings) -> int:
    """What a block's cache takes for all slots of a deployment (`profiler.kv`)."""
    return block.kv_bytes_per_token * kv_tokens(settings)


def memory_bytes(block: Block, settings: Settings) -> int:
    """What a node must have free to host a block of a deployment: W_b + kappa_b * T_max (mathematics.md A1)."""
    return weight_memory_bytes(block) + kv_memory_bytes(block, settings)
