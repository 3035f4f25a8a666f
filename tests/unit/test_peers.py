"""What stands beside Resplit runs the same weights, cut where ours are, and is held against it as it should be."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.peers.codes import BLOCK, encoded, interleaved
from benchmarks.peers.contender import Answer
from benchmarks.peers.speed import targets
from benchmarks.peers.stage import Stage, answer
from benchmarks.peers.weights import SPLIT, WHOLE, stages_of
from models.reference import Reference
from models.store import Store
from tests.model_zoo import import_decoder

ROWS, BLOCKS = 3, 2


def as_onnx_has_it(codes: np.ndarray[Any, Any], scales: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The weights [N, K] of MatMulNBits, by its own documents."""
    each = codes if bits == 8 else np.stack((codes & 0xF, codes >> 4), axis=-1).reshape(*codes.shape[:2], BLOCK)
    return np.asarray((each.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]).reshape(len(codes), -1)


def as_llama_has_it(rows: np.ndarray[Any, Any], bits: int) -> np.ndarray[Any, Any]:
    """The weights [N, K] of Q4_0 or Q8_0, by ggml's `dequantize_row`."""
    blocks = rows.reshape(ROWS, BLOCKS, -1)
    d = blocks[..., :2].copy().view(np.float16).astype(np.float32)
    if bits == 8:
        return np.asarray(blocks[..., 2:].view(np.int8).astype(np.float32) * d).reshape(ROWS, -1)
    codes = np.concatenate((blocks[..., 2:] & 0xF, blocks[..., 2:] >> 4), axis=-1)
    return np.asarray((codes.astype(np.float32) - 8) * d).reshape(ROWS, -1)


@pytest.mark.parametrize("bits", (4, 8))
def test_encoded_weights_are_the_same_numbers(bits: int) -> None:
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 256, (ROWS, BLOCKS, BLOCK * bits // 8), np.uint8)
    scales = rng.normal(0, 0.01, (ROWS, BLOCKS)).astype(np.float16).astype(np.float32)
    found = as_llama_has_it(encoded(codes, scales, bits), bits)
    np.testing.assert_array_equal(found, as_onnx_has_it(codes, scales, bits))


def test_rows_that_are_turned_together_lie_side_by_side() -> None:
    heads, head_dim = 2, 6
    halves = np.arange(heads * head_dim)  # each head's first half goes with its second
    found = interleaved(halves, heads).reshape(heads, head_dim // 2, 2)
    assert (found[..., 1] - found[..., 0] == head_dim // 2).all()
    assert sorted(found.flatten()) == sorted(halves)


@pytest.mark.parametrize("precision", ("fp32", "int4"))
def test_whole_and_halves_answer_as_the_uncut_model(tmp_path: Path, precision: str) -> None:
    store = Store(tmp_path / "store")
    digest = import_decoder(tmp_path, store, f"llama-{precision}")
    prompt, new_tokens = [5, 9, 200, 31], 12
    expected = Reference(store, digest).generate(prompt, new_tokens, stop_at_eos=False)
    for name, described in stages_of(store, store.manifest(digest), tmp_path).items():
        stages = [Stage(one) for one in described]
        assert len(stages) == {WHOLE: 1, SPLIT: 2}[name]

        def step(position: int, ids: list[int], stages: list[Stage] = stages) -> tuple[int, int]:
            given: tuple[int, Any] = (position, np.array([ids], np.int64))
            for stage in stages:
                given = stage.step(given)
            return given

        assert list(answer(step, prompt, new_tokens)) == expected


def test_times_of_an_answer() -> None:
    found = Answer((1, 2, 3), (2.0, 2.5, 3.5), 3.6)
    assert (found.ttft_s, found.tokens_per_s) == (2.0, 2 / 1.5)
    assert [found.longest_wait_s(since) for since in (0.0, 2.6, 3.55)] == [2.0, 1.0, 0.0]


def test_resplit_is_held_against_the_better_way_of_llama() -> None:
    def row(system: str, rate: float, ratio: float) -> dict[str, Any]:
        return {"system": system, "layout": "split", "tokens_per_s": rate, "over_whole": ratio}

    rows = [row("resplit", 40, 0.8), row("llama.cpp", 28, 0.7), row("llama.cpp", 32, 0.75), row("ray", 90, 0.99)]
    ahead, faster = targets("int4", rows)
    assert (ahead["theirs"], ahead["met"]) == (0.75, True)
    assert (faster["theirs"], faster["met"]) == (32, False)
    assert len(targets("int8", rows)) == 1
    assert targets("int4", rows[:1]) == []
