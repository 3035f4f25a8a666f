"""The next token from logits."""

import numpy as np
import pytest

from agent.sampling import choose, uniform
from schemas.frame import Sampling

LOGITS = np.array([0.5, 2.0, -1.0, 2.0, 1.5], np.float32)


def frequencies(sampling: Sampling, draws: int = 4000) -> np.ndarray:
    tokens = [choose(LOGITS, sampling, i).token for i in range(draws)]
    return np.bincount(tokens, minlength=len(LOGITS)) / draws


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max())
    probabilities: np.ndarray = e / e.sum()
    return probabilities


def test_greedy_takes_the_largest_logit_and_the_lowest_id_among_equals() -> None:
    assert choose(LOGITS, Sampling(), 0).token == 1


def test_draws_follow_the_softmax() -> None:
    assert np.allclose(frequencies(Sampling(temperature=1.0, seed=3)), softmax(LOGITS), atol=0.03)


def test_temperature_sharpens() -> None:
    assert np.allclose(frequencies(Sampling(temperature=0.5, seed=3)), softmax(LOGITS / 0.5), atol=0.03)


def test_top_k_keeps_the_k_likeliest() -> None:
    seen = frequencies(Sampling(temperature=1.0, top_k=2, seed=1))
    assert seen[1] + seen[3] == 1.0
    assert abs(seen[1] - 0.5) < 0.03


def test_top_p_keeps_the_smallest_set_that_reaches_p() -> None:
    p = softmax(LOGITS)
    seen = frequencies(Sampling(temperature=1.0, top_p=float(p[1] + p[3] - 0.01), seed=1))
    assert set(np.flatnonzero(seen)) == {1, 3}
    assert set(np.flatnonzero(frequencies(Sampling(temperature=1.0, top_p=1e-6, seed=1)))) == {1}


def test_min_p_drops_what_is_unlikely_beside_the_likeliest() -> None:
    seen = frequencies(Sampling(temperature=1.0, min_p=0.5, seed=1))
    assert set(np.flatnonzero(seen)) == {1, 3, 4}


def test_a_token_that_is_drawn_again_is_the_same_token() -> None:
    sampling = Sampling(temperature=1.0, seed=42)
    once = [choose(LOGITS, sampling, i).token for i in range(50)]
    assert once == [choose(LOGITS, sampling, i).token for i in range(50)]
    assert once != [choose(LOGITS, Sampling(temperature=1.0, seed=43), i).token for i in range(50)]


def test_uniform_numbers_are_spread_over_the_unit_interval() -> None:
    numbers = np.array([uniform(seed, index) for seed in range(40) for index in range(50)])
    assert numbers.min() >= 0.0
    assert numbers.max() < 1.0
    assert np.allclose(np.histogram(numbers, bins=10, range=(0, 1))[0] / len(numbers), 0.1, atol=0.03)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probabilities_are_those_of_the_unmodified_logits(temperature: float) -> None:
    choice = choose(LOGITS, Sampling(temperature=temperature, seed=5, logprobs=3), 0)
    expected = np.log(softmax(LOGITS.astype(np.float64)))
    assert choice.logprob == pytest.approx(expected[choice.token])
    assert [token for token, _ in choice.top] == [1, 3, 4]
    assert [p for _, p in choice.top] == pytest.approx([expected[1], expected[3], expected[4]])


def test_half_precision_logits_are_sampled_without_overflow() -> None:
    logits = np.array([60000.0, 0.0], np.float16)
    assert choose(logits, Sampling(temperature=0.1, seed=1, logprobs=1), 0).logprob == pytest.approx(0.0)
