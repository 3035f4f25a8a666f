"""Buffers outside the sessions: what is claimed of their memory."""

import sys

import psutil
import pytest

from agent.memory import allocate

HEADS, TOKENS, DIM = 4, 4096, 128
ROWS = 16
MIB = 1 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads what Linux counts")
def test_a_row_commits_only_the_pages_that_its_tokens_touch() -> None:
    buffer = allocate("cpu", (ROWS, HEADS, TOKENS, DIM), "float32")
    before = _private_bytes()
    buffer.owner[:, :, :8] = 1.0
    assert buffer.row_bytes * ROWS == 128 * MIB
    assert _private_bytes() - before < 4 * MIB


def test_a_buffer_is_zero_and_may_be_empty_or_a_scalar() -> None:
    assert not allocate("cpu", (3, 5), "int64").owner.any()
    assert allocate("cpu", (2, 0, 4), "float32").read().shape == (2, 0, 4)
    scalar = allocate("cpu", (), "int64")
    scalar.owner[...] = 7
    assert scalar.read() == 7


def _private_bytes() -> int:
    info = psutil.Process().memory_info()
    return int(info.rss - info.shared)
