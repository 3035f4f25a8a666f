"""The probe reads what is there to be read, nothing that is not, and the same every time."""

import itertools
from functools import partial

import numpy as np
import pytest

from models import excerpts
from models.excerpts import Excerpts, Ids, by_rank, from_text
from models.inversion import Sample, Table, candidates, recover
from schemas.base import Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.privacy import Depth, PrivacyCurve, Recovery

VOCAB, WIDTH, SEQUENCES, TOKENS = 200, 32, 80, 16
RNG = np.random.default_rng(1)
EMBEDDINGS = RNG.normal(size=(VOCAB, WIDTH)).astype(np.float32)
ROTATION = np.linalg.qr(RNG.normal(size=(WIDTH, WIDTH)))[0].astype(np.float32)


def drawn(shape: tuple[int, int] = (SEQUENCES, TOKENS), seed: int = 0) -> Ids:
    return np.random.default_rng(seed).integers(0, VOCAB, shape)


def rotated(ids: Ids) -> np.ndarray:
    return EMBEDDINGS[ids] @ ROTATION


def noise(ids: Ids, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(*ids.shape, WIDTH)).astype(np.float32)


def recovered(calibration: np.ndarray, test: np.ndarray, table: Table | None = None) -> Recovery:
    ids, others = drawn(seed=2), drawn(seed=3)
    everything = Table(np.arange(VOCAB), EMBEDDINGS)
    return recover(Sample(ids, calibration), Sample(others, test), table or everything, seed=0)


def test_a_rotation_of_the_embeddings_is_recovered_in_full() -> None:
    found = recovered(rotated(drawn(seed=2)), rotated(drawn(seed=3)))
    assert (found.top1, found.low, found.high, found.top5) == (1, 1, 1, 1)


def test_a_rotation_with_an_offset_and_unequal_scales_is_recovered_too() -> None:
    rng = np.random.default_rng(5)
    offset, scales = rng.normal(size=WIDTH), np.geomspace(0.03, 3, WIDTH)

    def states(ids: Ids) -> np.ndarray:
        return rotated(ids) * scales + offset

    assert recovered(states(drawn(seed=2)), states(drawn(seed=3))).top1 > 0.98


def test_noise_is_at_chance() -> None:
    ids, others = drawn(seed=2), drawn(seed=3)
    found = recovered(noise(ids, 7), noise(others, 8))
    assert found.low <= 1 / VOCAB <= found.high < 0.02
    assert found.chance < 0.02 and found.top5 < 0.05


def test_states_that_are_all_equal_tell_nothing() -> None:
    equal = np.ones((SEQUENCES, TOKENS, WIDTH), np.float32)
    assert recovered(equal, equal).top1 < 0.02


def test_more_noise_at_every_depth_is_a_falling_curve() -> None:
    ids, others = drawn(seed=2), drawn(seed=3)
    curve = [
        recovered(rotated(ids) + level * noise(ids, 7), rotated(others) + level * noise(others, 8)).top1
        for level in (0.0, 1.0, 2.0, 3.0, 4.0)
    ]
    assert curve[0] == 1 and curve[-1] < 0.2
    assert all(after < before for before, after in itertools.pairwise(curve))


def test_a_token_that_was_never_calibrated_on_is_recovered_by_its_embedding() -> None:
    known = np.random.default_rng(2).integers(0, VOCAB // 2, (SEQUENCES, TOKENS))
    unknown = np.random.default_rng(3).integers(VOCAB // 2, VOCAB, (SEQUENCES, TOKENS))
    table = Table(np.arange(VOCAB), EMBEDDINGS)
    found = recover(Sample(known, rotated(known)), Sample(unknown, rotated(unknown)), table, seed=0)
    assert (found.lookup, found.top1) == ("embedding", 1)


def test_states_that_lost_the_embeddings_are_recovered_by_the_states_seen_before() -> None:
    others = np.random.default_rng(11).normal(size=(VOCAB, WIDTH)).astype(np.float32)
    found = recovered(others[drawn(seed=2)], others[drawn(seed=3)])
    assert found.lookup == "state" and found.top1 > 0.95


def test_a_token_outside_of_the_table_and_the_calibration_counts_as_missed() -> None:
    ids = drawn() // 2
    table = Table(np.arange(VOCAB // 2), EMBEDDINGS[: VOCAB // 2])
    unknown = ids + VOCAB // 2
    found = recover(Sample(ids, rotated(ids)), Sample(unknown, rotated(unknown)), table, seed=0)
    assert (found.top1, found.top5) == (0, 0)


def test_the_same_arguments_recover_the_same() -> None:
    ids, others = drawn(seed=2), drawn(seed=3)
    states = rotated(ids) + noise(ids, 7), rotated(others) + noise(others, 8)
    first, second = recovered(*states), recovered(*states)
    assert first == second and first.low < first.top1 < first.high


def test_the_table_holds_every_calibration_token_and_a_sample_of_the_others() -> None:
    known = np.array([[999, 5], [7, 5]])
    found = candidates(1000, known, most=50, seed=3)
    assert found.size == 50 and {5, 7, 999} <= set(found.tolist())
    assert np.array_equal(found, np.unique(found))
    assert np.array_equal(found, candidates(1000, known, most=50, seed=3))
    assert not np.array_equal(found, candidates(1000, known, most=50, seed=4))
    assert candidates(1000, known, most=1, seed=3).tolist() == [5, 7, 999]
    assert np.array_equal(candidates(20, known % 20, most=50, seed=3), np.arange(20))


def is_disjoint(found: Excerpts) -> bool:
    return not {row.tobytes() for row in found.calibration} & {row.tobytes() for row in found.test}


def test_no_sequence_is_both_calibrated_and_tested_on() -> None:
    # So few tokens that sequences of four recur.
    found = by_rank(8, {0}, 400, 4, seed=0)
    assert is_disjoint(found) and 0 < len(found.test) < 50 and len(found.calibration) == 350


def test_windows_of_a_text_do_not_overlap() -> None:
    found = from_text(range(1000), 100, 10, seed=0)
    both = np.concatenate((found.calibration, found.test))
    assert (len(found.calibration), len(found.test)) == (88, 12)
    assert sorted(both.ravel().tolist()) == list(range(1000))


def test_a_seed_draws_the_same_sequences_again_and_another_seed_others() -> None:
    for draw in (partial(by_rank, 100, {1}, 40, 8), partial(from_text, range(999), 40, 8)):
        first, again, other = draw(seed=0), draw(seed=0), draw(seed=1)
        assert np.array_equal(first.calibration, again.calibration) and np.array_equal(first.test, again.test)
        assert not np.array_equal(first.calibration, other.calibration)


def test_tokens_drawn_by_rank_are_the_commoner_the_lower_and_never_special() -> None:
    counts = np.bincount(by_rank(50, {0, 3}, 1000, 64, seed=0).calibration.ravel(), minlength=50)
    assert counts[0] == counts[3] == 0 and counts[1] > 3 * counts[20] > 0


@pytest.mark.parametrize(
    ("sequences", "tokens", "field"),
    [(excerpts.SEQUENCES_MIN - 1, 8, "sequences"), (5000, 8, "sequences"), (40, 3, "tokens"), (40, 513, "tokens")],
)
def test_numbers_out_of_range_are_named(sequences: int, tokens: int, field: str) -> None:
    for draw in (partial(by_rank, 100, ()), partial(from_text, [1])):
        with pytest.raises(ResplitError, match="ask for") as caught:
            draw(sequences, tokens, seed=0)
        assert (caught.value.code, caught.value.field) == (ErrorCode.INVALID_REQUEST, field)


def test_a_text_that_is_too_short_or_repeats_itself_is_refused() -> None:
    with pytest.raises(ResplitError, match="has 319 tokens, and 40 sequences of 8 need 320"):
        from_text(range(319), 40, 8, seed=0)
    with pytest.raises(ResplitError, match="one to calibrate with as well"):
        from_text([1, 2] * 160, 40, 8, seed=0)


def curve(*highs: float) -> PrivacyCurve:
    depths = tuple(
        Depth(
            block=block,
            role="layer",
            recovered=Recovery(top1=high / 2, low=0, high=high, top5=1, chance=0, lookup="state"),
            shows_answer=False,
        )
        for block, high in enumerate(highs)
    )
    return PrivacyCurve(
        model=Digest("0" * 64),
        drawn="rank",
        seed=0,
        calibration=35,
        test=5,
        tokens=4,
        candidates=9,
        nameable=1,
        width=14,
        depths=depths,
    )


def test_a_probe_with_few_states_for_their_width_says_so() -> None:
    assert not curve(0.5).is_starved
    assert curve(0.5).model_copy(update={"width": 15}).is_starved


def test_the_first_blocks_to_keep_are_counted_to_the_depth_behind_which_nothing_is_recovered_again() -> None:
    assert curve(0.9, 0.5, 0.05, 0.04).blocks_to_keep(0.1) == 3
    assert curve(0.9, 0.05, 0.5, 0.04).blocks_to_keep(0.1) == 4
    assert curve(0.05, 0.04).blocks_to_keep(0.1) == 1
    assert curve(0.05, 0.9).blocks_to_keep(0.1) is None
    assert curve(0.1).blocks_to_keep(0.1) is None
