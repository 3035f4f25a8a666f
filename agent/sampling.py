"""Pure: the next token from the logits of the last position.

Random numbers are keyed by (seed, index of the token), so a token that is computed twice - because a
frame was lost, or a stage moved - is the same token.
"""

import zlib
from dataclasses import dataclass

import numpy as np

from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Sampling
from schemas.tensor import Array

GOLDEN = 0x9E3779B97F4A7C15
MASK = (1 << 64) - 1
MASK_SPARE_BYTES = 64
"""A mask is made of whole words."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A token, the natural logarithm of its probability under the unmodified logits, and the likeliest others.

    `logprob` and `top` are given only where the request asked for log probabilities.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def masked(logits: Array, allowed: bytes) -> Array:
    """`logits` ([vocabulary]) with what is not in the mask of `schemas.frame.Item.allowed` put out of reach.

    Raises `ResplitError(INVALID_REQUEST)` for a mask that is none, or that allows nothing."""
    size = (len(logits) + 7) // 8
    try:
        unpacker = zlib.decompressobj()
        bits = np.frombuffer(unpacker.decompress(allowed, size + MASK_SPARE_BYTES), np.uint8)
    except zlib.error as error:
        raise ResplitError(ErrorCode.INVALID_REQUEST, f"a mask of tokens that is not packed: {error}") from error
    may = np.unpackbits(bits, bitorder="little")[: len(logits)].astype(bool)
    # A model may have more logits than its tokenizer has tokens: those stand for nothing.
    may = np.concatenate([may, np.zeros(len(logits) - len(may), bool)])
    if not may.any():
        raise ResplitError(ErrorCode.INVALID_REQUEST, "a mask that allows no token of this model")
    return np.where(may, logits, -np.inf)


def choose(logits: Array, sampling: Sampling, index: int, allowed: bytes | None = None) -> Choice:
    """Pick token number `index` of a sequence from `logits` (shape [vocabulary], any float type), among those that
    are `allowed`; log probabilities are those without that.

    Temperature 0 takes the largest logit, the lowest id among equals. Otherwise, in this order:
    temperature, top-k, top-p (the smallest set whose probability reaches p), min-p (relative to the
    likeliest token), then one draw. The likeliest token always survives the filters.
    """
    scores = logits.astype(np.float64) if sampling.temperature or sampling.logprobs else logits
    open_ = scores if allowed is None else masked(scores, allowed)
    token = int(np.argmax(open_)) if sampling.temperature == 0 else _draw(open_, sampling, index)
    if not sampling.logprobs:
        return Choice(token)
    logprobs = scores - _log_sum_exp(scores)
    count = min(sampling.logprobs, len(logprobs))
    likeliest = np.argpartition(-logprobs, count - 1)[:count]
    likeliest = likeliest[np.lexsort((likeliest, -logprobs[likeliest]))]
    top = tuple((int(i), float(logprobs[i])) for i in likeliest)
    return Choice(token, float(logprobs[token]), top)


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) that depends on (seed, index) alone: two rounds of splitmix64."""
    state = (_splitmix(seed & MASK) + index * GOLDEN) & MASK
    return _splitmix(state) / 2.0**64


def _draw(scores: Array, sampling: Sampling, index: int) -> int:
    scaled = scores / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    kept = scaled[order]
    probabilities = np.exp(kept - kept[0])
    probabilities /= probabilities.sum()
    if sampling.top_p < 1.0:
        needed = int(np.searchsorted(np.cumsum(probabilities), sampling.top_p)) + 1
        probabilities = probabilities[:needed]
    if sampling.min_p > 0.0:
        probabilities = probabilities[probabilities >= sampling.min_p * probabilities[0]]
    cumulative = np.cumsum(probabilities)
    place = int(np.searchsorted(cumulative, uniform(sampling.seed, index) * cumulative[-1], side="right"))
    return int(order[min(place, len(cumulative) - 1)])


def _log_sum_exp(scores: Array) -> float:
    largest = scores.max()
    return float(largest + np.log(np.exp(scores - largest).sum()))


def _splitmix(value: int) -> int:
    value = (value + GOLDEN) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)
