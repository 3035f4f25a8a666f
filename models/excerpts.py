"""PURE: the token sequences that a probe is fitted on and tried on, drawn from a seed and never the same ones twice.

From a text: its ids cut into windows that do not overlap, as many as are asked for at random. It should be like what
the deployment is asked, as recovery depends on what is written.

Without one: tokens drawn independently, the token of rank r with probability proportional to 1 / (r + ZIPF_SHIFT)
(Zipf-Mandelbrot). The rank is the id: byte-pair vocabularies are in the order of their merges, which roughly is that
of frequency. Such a sequence means nothing. A probe profits from nothing that language would tell it of a token's
neighbours, and a trained model does not transform these states as it does those of sentences; so the figure may be off
in either direction, and a text is to be preferred where there is one.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ErrorCode, ResplitError

Ids = NDArray[np.int64]

ZIPF_SHIFT = 2.7
TEST_ONE_IN = 8
SEQUENCES_MIN = 40
"""Fewer leave less than five sequences to be tried on, and an interval of those says little."""
SEQUENCES_MAX = 4096
TOKENS_MIN = 4
TOKENS_MAX = 512


@dataclass(frozen=True, eq=False)
class Excerpts:
    """Ids [sequences, tokens]. No row of `test` is one of `calibration`."""

    calibration: Ids
    test: Ids


def from_text(ids: Sequence[int], sequences: int, tokens: int, seed: int) -> Excerpts:
    """Windows of a text. Raises INVALID_REQUEST for numbers out of range and for a text that has too few of them."""
    _require_in_range(sequences, tokens)
    found = len(ids) // tokens
    if found < sequences:
        raise ResplitError(
            ErrorCode.INVALID_REQUEST,
            f"the text has {len(ids)} tokens, and {sequences} sequences of {tokens} need {sequences * tokens}; "
            "give a longer text, or ask for fewer or shorter sequences",
            "text",
        )
    windows = np.array(ids[: found * tokens], np.int64).reshape(found, tokens)
    chosen = np.random.default_rng(seed).permutation(found)[:sequences]
    return _divided(windows[chosen])


def by_rank(vocab_size: int, without: Collection[int], sequences: int, tokens: int, seed: int) -> Excerpts:
    """Tokens drawn by rank from ids 0 to `vocab_size` - 1 less those in `without`, of which at least one is left.

    Raises INVALID_REQUEST for numbers out of range.
    """
    _require_in_range(sequences, tokens)
    drawable = np.setdiff1d(np.arange(vocab_size), np.array(sorted(without), np.int64))
    assert drawable.size, "a vocabulary has more than special tokens"
    draw = np.random.default_rng(seed).choice(drawable, (sequences, tokens), p=zipf(drawable.size))
    return _divided(draw)


def zipf(count: int) -> NDArray[np.float64]:
    """The probabilities of the ranks 0 to `count` - 1."""
    weights = 1 / (np.arange(count) + 1 + ZIPF_SHIFT)
    found: NDArray[np.float64] = weights / weights.sum()
    return found


def _divided(sequences: Ids) -> Excerpts:
    """One in `TEST_ONE_IN` for testing, less those that are among the others as well."""
    count = len(sequences) // TEST_ONE_IN
    test, calibration = sequences[:count], sequences[count:]
    seen = {row.tobytes() for row in calibration}
    new = [row.tobytes() not in seen for row in test]
    if not any(new):
        raise ResplitError(
            ErrorCode.INVALID_REQUEST,
            "every sequence to test with is one to calibrate with as well, so recovering it would show nothing; "
            "give a text that repeats itself less, or ask for longer sequences",
            "text",
        )
    return Excerpts(calibration, test[new])


def _require_in_range(sequences: int, tokens: int) -> None:
    for name, value, least, most in (
        ("sequences", sequences, SEQUENCES_MIN, SEQUENCES_MAX),
        ("tokens", tokens, TOKENS_MIN, TOKENS_MAX),
    ):
        if not least <= value <= most:
            message = f"{name} is {value}; ask for {least} to {most}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, name)
