"""How delays end, by formulas, by what was seen slot by slot, and along paths: each against queues that are run."""

from math import inf, isclose

import numpy as np
import pytest

from benchmarks.slotted import SERVERS, Floats, arrived, backlog, delays
from profiler.delays import Delays, joined, none, waiting
from profiler.effective_capacity import GammaService, PoissonJobs, Steady, Together, Work, paper_tail, tail
from profiler.observed_tail import observed

SLOTS = 400_000
SHARE = 0.01


@pytest.mark.parametrize(("shape", "scale", "size", "load"), SERVERS)
def test_the_tail_of_a_queue_is_predicted_within_a_factor_of_two_and_the_paper_s_form_is_below_it(
    shape: float, scale: float, size: float, load: float
) -> None:
    service = GammaService(shape, scale)
    jobs = PoissonJobs(load * service.mean / size, size)
    rng = np.random.default_rng(3)
    arrivals, services = arrived(rng, jobs, SLOTS), rng.gamma(shape, scale, SLOTS)
    seen = delays(arrivals, services)
    limit = float(np.quantile(seen, 1.0 - SHARE))
    share = float((seen > limit).mean())
    waits = float((backlog(arrivals - services)[arrivals > 0.0] > 0.0).mean())
    for corrected in (tail(jobs, service), tail(jobs, service, waits)):
        assert corrected is not None
        assert share / 2.0 <= corrected.over(limit) <= share * 2.0
        assert isclose(corrected.within(corrected.over(limit)), limit)
    paper = paper_tail(jobs, service)
    assert paper is not None
    assert paper.over(limit) < share


def test_on_large_jobs_the_paper_s_form_is_out_by_orders_of_magnitude() -> None:
    service, jobs = GammaService(2.0, 1.0), PoissonJobs(0.8, 2.0)
    rng = np.random.default_rng(4)
    seen = delays(arrived(rng, jobs, SLOTS), rng.gamma(2.0, 1.0, SLOTS))
    limit = float(np.quantile(seen, 1.0 - SHARE))
    paper = paper_tail(jobs, service)
    assert paper is not None
    assert paper.over(limit) < SHARE / 100.0


def test_work_that_comes_steadily_has_one_tail_and_a_steady_server_that_is_fast_enough_none() -> None:
    service = GammaService(2.0, 10.0)
    assert tail(Steady(14.0), service, 0.7) == paper_tail(Steady(14.0), service)
    never = tail(Steady(1.0), Steady(2.0))
    assert never is not None
    assert (never.theta, never.over(0.0), never.within(0.001)) == (inf, 0.0, 0.0)


def test_a_server_to_which_more_comes_than_it_does_has_no_tail() -> None:
    assert tail(PoissonJobs(10.0, 2.0), GammaService(2.0, 10.0)) is None
    assert paper_tail(PoissonJobs(10.0, 2.0), GammaService(2.0, 10.0)) is None


def test_two_streams_are_as_bad_as_one_of_both() -> None:
    service = GammaService(2.0, 10.0)
    parts: tuple[Work, ...] = (PoissonJobs(3.0, 2.0), PoissonJobs(4.0, 2.0))
    apart, at_once = tail(Together(parts), service), tail(PoissonJobs(7.0, 2.0), service)
    assert apart is not None
    assert at_once is not None
    assert isclose(apart.theta, at_once.theta) and isclose(apart.rate, at_once.rate)


# What was seen


def test_the_exponent_is_found_in_what_was_seen() -> None:
    jobs, service = PoissonJobs(7.0, 2.0), GammaService(2.0, 10.0)
    found = tail(jobs, service)
    assert found is not None
    rng = np.random.default_rng(5)
    inside = 0
    for seed in range(20):
        seen = observed(rng.poisson(7.0, 500) * 2.0 - rng.gamma(2.0, 10.0, 500), seed)
        assert seen is not None
        assert 0.6 * found.theta < seen.theta < 1.7 * found.theta
        inside += seen.low <= found.theta <= seen.high
    assert inside >= 16


def test_slots_that_are_like_their_neighbours_are_summed_and_the_tail_is_not_taken_for_a_short_one() -> None:
    """A server that is slow for twenty slots on end, a fifth of the time."""
    rng = np.random.default_rng(6)
    slow = np.repeat(rng.random(SLOTS // 20) < 0.2, 20)
    increments: Floats = np.asarray(rng.poisson(6.0, SLOTS) - np.where(slow, 3.0, 10.0), np.float64)
    left = backlog(increments)
    far, further = np.quantile(left, [1.0 - 1e-2, 1.0 - 1e-3])
    theta = np.log(10.0) / (further - far)
    found = observed(increments[:20_000], 0)
    one_by_one = observed(rng.permutation(increments[:20_000]), 0)
    assert found is not None
    assert one_by_one is not None
    assert found.block > 1
    assert 0.5 * theta < found.theta < 2.0 * theta < one_by_one.theta


def test_what_was_never_left_over_has_no_end_and_what_is_too_much_has_none_either() -> None:
    never = observed(np.full(100, -1.0), 0)
    assert never is not None
    assert never.theta == never.low == inf
    ever = observed(np.random.default_rng(0).normal(0.5, 1.0, 400), 0)
    assert ever is not None
    assert ever.theta == ever.low == 0.0
    assert observed(np.full(10, -1.0), 0) is None


def test_what_is_newer_counts_for_more() -> None:
    rng = np.random.default_rng(7)
    calm, busy = rng.normal(-3.0, 1.0, 1000), rng.normal(-1.0, 1.0, 1000)
    both = np.concatenate([calm, busy])
    weights = 0.5 ** (np.arange(2000)[::-1] / 200.0)
    newest, alone = observed(both, 0, weights), observed(busy, 0)
    assert newest is not None
    assert alone is not None
    assert abs(newest.theta - alone.theta) < 0.25 * alone.theta


# Along paths


def waited(rng: np.random.Generator, waits: float, at: float, count: int = 400_000) -> Floats:
    return np.asarray(np.where(rng.random(count) < waits, rng.exponential(1.0 / at, count), 0.0))


def column(value: float) -> Floats:
    return np.array([value])


def path(*servers: tuple[float, float]) -> Delays:
    found = none(1)
    for waits, at in servers:
        found = found.then(column(waits), column(at))
    return found


def test_delays_add_up_along_a_path_and_the_latest_counts_where_paths_meet() -> None:
    found = tail(PoissonJobs(7.0, 2.0), GammaService(2.0, 10.0), 0.8)
    assert found is not None
    waits, at = waiting(found, 2.0)
    assert isclose(path((waits, at)).over(column(6.0))[0], found.over(3.0)), "slots of two of the unit"
    one, two = path((waits, at), (0.5, 0.9)), path((0.9, 0.4))
    both = joined([one, two.before(column(1.0)), none(1)]).then(column(0.3), column(2.0))
    rng = np.random.default_rng(8)
    summed = waited(rng, waits, at) + waited(rng, 0.5, 0.9)
    latest = np.maximum(summed, np.maximum(waited(rng, 0.9, 0.4) - 1.0, 0.0)) + waited(rng, 0.3, 2.0)
    for limit in (0.0, 1.0, 3.0, 6.0, 9.0):
        assert isclose(one.over(column(limit))[0], float((summed > limit).mean()), rel_tol=0.05, abs_tol=1e-3)
        assert isclose(both.over(column(limit))[0], float((latest > limit).mean()), rel_tol=0.05, abs_tol=1e-3)
    assert isclose(one.means[0], float(summed.mean()), rel_tol=0.02)


@pytest.mark.parametrize("count", [2, 4, 8])
def test_servers_that_are_alike_are_no_trap(count: int) -> None:
    """Their exponents are equal, and the difference of two is what the sum is divided by."""
    rng = np.random.default_rng(9)
    summed = np.sum([waited(rng, 0.7, 0.5) for _ in range(count)], axis=0)
    found = path(*[(0.7, 0.5)] * count)
    for limit in (1.0, 5.0, 10.0, 20.0):
        seen = float((summed > limit).mean())
        assert isclose(found.over(column(limit))[0], seen, rel_tol=0.15, abs_tol=2e-3)


def test_the_latest_of_many_parts_is_taken_for_no_less_than_it_is() -> None:
    rng = np.random.default_rng(10)
    servers = [(0.5, 0.3 + 0.1 * number) for number in range(9)]
    two = joined([path(*servers), path(*servers)])
    one, other = (sum(waited(rng, *server) for server in servers) for _ in range(2))
    latest = np.maximum(one, other)
    for limit in (10.0, 20.0):
        seen = float((latest > limit).mean())
        assert 0.9 * seen - 1e-3 <= two.over(column(limit))[0] <= 2.0 * seen + 1e-3


def test_where_nothing_ever_waits_there_is_no_delay() -> None:
    never = tail(Steady(1.0), Steady(2.0))
    assert never is not None
    assert path(waiting(never, 1.0)).over(column(0.0))[0] == 0.0


def test_many_paths_are_reckoned_as_each_alone() -> None:
    waits, at = np.array([0.2, 0.9]), np.array([1.0, 0.3])
    found = none(2).then(waits, at).then(at, waits)
    limits = np.array([2.0, 4.0])
    for number in range(2):
        alone = path((waits[number], at[number]), (at[number], waits[number]))
        assert isclose(found.over(limits)[number], alone.over(limits[number : number + 1])[0])
