"""PURE: how many prompt tokens a fixed probe reads off the states at one depth (mathematics.md D, Privacy c).

The attacker knows the model, embeddings included, and sees one vector a token. It makes calibration sequences itself,
runs them through the first blocks, and so has pairs of state and token without ever seeing a prompt. With these it
reads the states of others in two ways, and keeps the one that does better on a tenth of its own sequences:

- *embedding*: one affine map from states to embeddings, fitted by ridge regression in closed form, then the nearest
  row of the embedding table by cosine. It names tokens that it never calibrated on;
- *state*: the token of the nearest calibration state by cosine. It needs no straight way back to the embeddings, and
  names only what it calibrated on.

This is a floor of what an attack recovers, not the best one, and it ranks depths rather than making one safe. Trained
inverters, which also use a token's neighbours, recovered 88.4 % of prompt tokens from deep activations (mathematics.md
A1). And whoever has the weights of all blocks before the cut needs no inverter: attention is causal, so with the tokens
before it known, a state is a function of one token, and trying the vocabulary until the state is the same finds it, at
any depth, for as many runs of the first blocks as there are tokens to try. What bounds both is not to have the weights.

Memory beside the states that are given:
two copies of them in float32, two of the table, a square matrix of the width in float64 (twice, while it is
solved), and `ROWS` rows of scores.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from models.excerpts import Ids, zipf
from schemas.privacy import Lookup, Recovery

Floats = NDArray[np.float32]

RIDGE = 1e-2
"""The penalty over the number of calibration states, features having variance one: what is known of a feature that
carries no more than a hundredth of the average is noise to the fit."""
CHECK_ONE_IN = 10
ROWS = 512
RESAMPLES = 2000
LEVEL = 0.95
TOP = 5
TINY = 1e-12


@dataclass(frozen=True, eq=False)
class Sample:
    """Token ids [sequences, tokens] and the states that they became at one depth, [sequences, tokens, width]."""

    ids: Ids
    states: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class Table:
    """Rows of the embedding table: ascending ids [candidates] and embeddings [candidates, width]."""

    ids: Ids
    embeddings: NDArray[np.floating]


@dataclass(frozen=True, eq=False)
class _Probe:
    """One way to read: scores [rows, ids] of states [rows, width], the best token's the highest."""

    lookup: Lookup
    ids: Ids
    scores: Callable[[Floats], Floats]


def candidates(vocab_size: int, calibration: Ids, most: int, seed: int) -> Ids:
    """The ids that a probe chooses among, ascending: every token it calibrates on and, as far as `most` allows, all
    others or a sample of them, in which the commoner are the likelier (`models.excerpts`)."""
    known = np.unique(calibration)
    others = np.setdiff1d(np.arange(vocab_size), known)
    room = max(0, most - known.size)
    if others.size > room:
        others = np.random.default_rng(seed).choice(others, room, replace=False, p=zipf(others.size))
    return np.union1d(known, others)


def recover(calibration: Sample, test: Sample, table: Table, seed: int) -> Recovery:
    """Fit the probe on `calibration` (two sequences or more), whose tokens are all in `table`, and try it on `test`.

    States are finite, and ids of the table ascend. The same arguments give the same result. `seed` is for the
    resamples of the interval alone.
    """
    kept = max(1, len(calibration.ids) // CHECK_ONE_IN)
    check = Sample(calibration.ids[:kept], calibration.states[:kept])
    ids, states = calibration.ids[kept:].ravel(), _unit_rows(calibration.states[kept:])
    probes = (_nearest_embedding(ids, states, table), _nearest_state(ids, states))
    chosen = max(probes, key=lambda probe: (_ranks(probe, check) == 0).mean())
    ranks = _ranks(chosen, test)
    hits = ranks == 0
    low, high = _interval(hits.mean(axis=1), seed)
    return Recovery(
        top1=float(hits.mean()),
        low=low,
        high=high,
        top5=float((ranks < TOP).mean()),
        chance=float((test.ids == np.bincount(calibration.ids.ravel()).argmax()).mean()),
        lookup=chosen.lookup,
    )


def _nearest_embedding(ids: Ids, states: Floats, table: Table) -> _Probe:
    """Ridge regression of unit embeddings, less their mean, on standardised unit states; then cosine.

    Directions are all that a cosine asks for, and lengths in trained models span orders of magnitude: first positions
    and a few tokens of punctuation would outweigh all others in a sum of squares.
    """
    rows = _unit_rows(table.embeddings)
    centre = rows.mean(axis=0)
    rows -= centre
    targets = rows[np.searchsorted(table.ids, ids)]
    mean, spread = states.mean(axis=0), states.std(axis=0) + TINY
    offset = targets.mean(axis=0)
    square = np.zeros((states.shape[1], states.shape[1]))
    product = np.zeros((states.shape[1], rows.shape[1]))
    for start in range(0, len(states), ROWS):
        features = (states[start : start + ROWS] - mean) / spread
        square += features.T @ features
        product += features.T @ (targets[start : start + ROWS] - offset)
    square[np.diag_indices_from(square)] += RIDGE * len(states)
    slope = (np.linalg.solve(square, product) / spread[:, None]).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + TINY

    def scores(states: Floats) -> Floats:
        # The length of what is looked up changes no order among the rows.
        found: Floats = ((states - mean) @ slope + offset) @ rows.T
        return found

    return _Probe("embedding", table.ids, scores)


def _nearest_state(ids: Ids, states: Floats) -> _Probe:
    """A token's score is the cosine with the nearest of its calibration states, all less their mean: states of a
    trained model share most of their direction."""
    mean = states.mean(axis=0)
    order = np.argsort(ids, kind="stable")
    known, starts = np.unique(ids[order], return_index=True)
    sorted_states = _unit_rows(states[order] - mean)

    def scores(states: Floats) -> Floats:
        found: Floats = np.maximum.reduceat((states - mean) @ sorted_states.T, starts, axis=1)
        return found

    return _Probe("state", known, scores)


def _ranks(probe: _Probe, sample: Sample) -> NDArray[np.int64]:
    """How many tokens the probe scores at least as high as the right one, [sequences, tokens]: 0 names it. Ties count
    against the probe, or states that tell nothing would be read perfectly. A token that it does not know is last."""
    ids, states = sample.ids.ravel(), _unit_rows(sample.states)
    ranks = np.full(ids.size, probe.ids.size)
    columns = np.minimum(np.searchsorted(probe.ids, ids), probe.ids.size - 1)
    known = np.flatnonzero(probe.ids[columns] == ids)
    for start in range(0, known.size, ROWS):
        rows = known[start : start + ROWS]
        scores = probe.scores(states[rows])
        own = np.take_along_axis(scores, columns[rows, None], axis=1)
        ranks[rows] = (scores >= own).sum(axis=1) - 1
    return ranks.reshape(sample.ids.shape)


def _interval(shares: NDArray[np.float64], seed: int) -> tuple[float, float]:
    """The percentile bootstrap interval of a mean: sequences are drawn, as tokens of one are not independent. Of equal
    shares, such as none at all, it is a point, and says less than it seems to."""
    drawn = np.random.default_rng(seed).integers(0, shares.size, (RESAMPLES, shares.size))
    tail = (1 - LEVEL) / 2
    low, high = np.quantile(shares[drawn].mean(axis=1), (tail, 1 - tail))
    return float(np.clip(low, 0, 1)), float(np.clip(high, 0, 1))


def _unit_rows(vectors: NDArray[np.floating]) -> Floats:
    """Vectors of the last axis as rows of length one, [rows, width]; a null vector stays one."""
    rows = vectors.reshape(-1, vectors.shape[-1]).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True) + TINY
    return rows
