"""Queues at a server whose rate varies, run slot by slot: what predictions of delays are held against."""

import numpy as np
import numpy.typing as npt

from profiler.effective_capacity import PoissonJobs

Floats = npt.NDArray[np.float64]

SERVERS = (
    (1.5, 4.0, 1.0, 0.5),
    (1.5, 4.0, 1.0, 0.9),
    (2.0, 10.0, 2.0, 0.7),
    (1.0, 20.0, 2.0, 0.85),
    (1.0, 2.0, 0.5, 0.6),
    (2.0, 1.0, 2.0, 0.8),
    (1.0, 1.0, 2.0, 0.5),
)
"""Shape and scale of a Gamma server, size of a job, utilisation: within the paper's Table I, and at its corners."""
UNFINISHED = 2000
"""Of the last slots, whose work may not be done when the run ends."""


def arrived(rng: np.random.Generator, jobs: PoissonJobs, slots: int) -> Floats:
    """Work that comes in each slot."""
    return np.asarray(rng.poisson(jobs.rate, slots) * jobs.size, np.float64)


def backlog(increments: Floats) -> Floats:
    """What is left over at the end of each slot, by what came less what could be done."""
    walked = np.cumsum(increments)
    return np.asarray(walked - np.minimum.accumulate(np.minimum(walked, 0.0)))


def delays(arrivals: Floats, services: Floats) -> Floats:
    """In slots, of the last work of each slot in which some came."""
    left, done = backlog(arrivals - services), np.cumsum(services)
    slots = np.flatnonzero(arrivals[: len(arrivals) - UNFINISHED])
    return np.asarray(np.searchsorted(done, done[slots] + left[slots]) - slots, dtype=float)
