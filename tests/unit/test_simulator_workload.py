"""What is asked: the rates, lengths and places that a scenario says, the same for every policy and every time."""

from collections import Counter
from itertools import pairwise
from math import sqrt
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from schemas.errors import ResplitError
from simulator.draws import Draws
from simulator.files import read_scenario, shipped
from simulator.records import Arrival
from simulator.scenario import RequestClass, Scenario, SiteSpec, Workload
from simulator.traces import TraceRow
from simulator.workload import arrivals, trace_hash

CHAT = RequestClass.model_validate({"name": "chat", "share": 1.0, "prompt_tokens": 100, "output_tokens": 20})
SMALL = read_scenario(shipped()["small"])


def asked(*, duration_s: float = 1000.0, **workload: Any) -> Scenario:
    """Four nodes that are asked for `duration_s`, from 100 s on."""
    said = {"rate_per_s": 5.0, "classes": (CHAT,), **workload}
    return SMALL.model_copy(
        update={"warmup_s": 100.0, "duration_s": duration_s, "workload": Workload.model_validate(said)}
    )


def between(found: tuple[Arrival, ...], begin_s: float, end_s: float) -> int:
    return sum(begin_s <= one.at_s < end_s for one in found)


def counted(found: tuple[Arrival, ...], width_s: float, end_s: float) -> list[int]:
    """How many came in each window."""
    edges = np.arange(100.0, end_s + 1e-6, width_s)
    counts: list[int] = np.histogram([one.at_s for one in found], edges)[0].tolist()
    return counts


def dispersion(found: tuple[Arrival, ...], width_s: float, end_s: float) -> float:
    """Variance over mean of the counts in windows: 1 for Poisson, more for bursts, less for ticks."""
    counts = counted(found, width_s, end_s)
    return float(np.var(counts) / np.mean(counts))


PROCESSES: list[dict[str, Any]] = [{}, {"process": "mmpp"}, {"process": "periodic"}]


@pytest.mark.parametrize("process", PROCESSES, ids=["poisson", "mmpp", "periodic"])
def test_requests_come_in_order_at_the_rate_said_and_only_in_their_time(process: dict[str, Any]) -> None:
    found = arrivals(asked(duration_s=5000.0, **process), Draws(3))
    assert [one.number for one in found] == list(range(len(found)))
    assert all(a.at_s <= b.at_s for a, b in pairwise(found))
    assert found[0].at_s >= 100
    assert found[-1].at_s < 5000
    assert len(found) / 4900 == pytest.approx(5.0, rel=0.1)


def test_processes_differ_in_how_evenly_requests_come() -> None:
    poisson, mmpp, periodic = (
        dispersion(arrivals(asked(duration_s=3000.0, **process), Draws(4)), 10.0, 3000.0) for process in PROCESSES
    )
    assert periodic < 0.1
    assert 0.7 < poisson < 1.3
    assert mmpp > 3


def test_in_a_burst_come_as_many_more_as_said() -> None:
    found = arrivals(
        asked(duration_s=20_000.0, process="mmpp", burst_factor=10.0, burst_share=0.2, burst_s=50.0), Draws(5)
    )
    # 5 a second on average are 1.8 between bursts and 17.9 in one.
    counts = counted(found, 5.0, 20_000.0)
    calm = [count for count in counts if count < 35]
    assert len(calm) / len(counts) == pytest.approx(0.8, abs=0.08)
    assert fmean(calm) / 5 == pytest.approx(1.8, rel=0.15)


def test_ticks_stray_from_their_period_by_no_more_than_their_jitter() -> None:
    found = arrivals(asked(process="periodic", jitter=0.1), Draws(6))
    gaps = [b.at_s - a.at_s for a, b in pairwise(found)]
    assert min(gaps) >= 0.16 - 1e-3
    assert max(gaps) <= 0.24 + 1e-3
    assert max(gaps) > 0.22


@pytest.mark.parametrize("process", PROCESSES, ids=["poisson", "mmpp", "periodic"])
def test_a_ramp_multiplies_the_rate_while_it_stays(process: dict[str, Any]) -> None:
    ramps = ({"at_s": 2000.0, "rise_s": 1000.0, "stay_s": 3000.0, "factor": 3.0},)
    found = arrivals(asked(duration_s=8100.0, rate_per_s=4.0, ramps=ramps, burst_s=5.0, **process), Draws(7))
    assert between(found, 100, 2000) / 1900 == pytest.approx(4, rel=0.1)
    assert between(found, 2000, 3000) / 1000 == pytest.approx(8, rel=0.1)
    assert between(found, 3000, 6000) / 3000 == pytest.approx(12, rel=0.1)
    assert between(found, 7000, 8100) / 1100 == pytest.approx(4, rel=0.1)


def test_ramps_multiply_and_may_stop_everything() -> None:
    ramps = (
        {"at_s": 200.0, "stay_s": 200.0, "factor": 2.0},
        {"at_s": 300.0, "stay_s": 200.0, "factor": 3.0},
        {"at_s": 600.0, "stay_s": 100.0, "factor": 0.0},
    )
    found = arrivals(asked(rate_per_s=50.0, ramps=ramps), Draws(8))
    rates = [between(found, at, at + 100) / 100 for at in (100, 200, 300, 400, 500, 600, 700)]
    assert rates == [pytest.approx(rate, rel=0.1) for rate in (50, 100, 300, 150, 50, 0, 50)]


def test_classes_have_their_share_and_lengths_the_mean_said() -> None:
    classes = (
        CHAT.model_copy(update={"name": "a", "share": 3.0, "prompt_tokens": 40, "spread": 0.6}),
        CHAT.model_copy(update={"name": "b", "share": 1.0}),
    )
    found = arrivals(asked(rate_per_s=20.0, classes=classes), Draws(9))
    mixed = [one for one in found if one.name == "a"]
    assert len(mixed) / len(found) == pytest.approx(0.75, abs=0.02)
    assert fmean(one.prompt_tokens for one in mixed) == pytest.approx(40, rel=0.03)
    assert fmean(one.output_tokens for one in mixed) == pytest.approx(20, rel=0.03)
    assert len({one.prompt_tokens for one in mixed}) > 100
    assert {(one.prompt_tokens, one.output_tokens) for one in found if one.name == "b"} == {(100, 20)}


def test_no_request_is_longer_than_the_context_or_empty() -> None:
    wild = CHAT.model_copy(update={"prompt_tokens": 100, "output_tokens": 100, "spread": 2.0})
    found = arrivals(asked(rate_per_s=20.0, classes=(wild,)), Draws(10))
    sizes = [one.prompt_tokens + one.output_tokens for one in found]
    assert max(sizes) == SMALL.served.settings.context_tokens == 256
    assert min(min(one.prompt_tokens, one.output_tokens) for one in found) == 1


def test_larger_sites_have_more_clients_and_some_have_none() -> None:
    sites = tuple(
        SiteSpec.model_validate({"name": name, "nodes": nodes, "node": "box", "clients": name != "c"})
        for name, nodes in (("a", 3), ("b", 1), ("c", 5))
    )
    found = arrivals(asked(rate_per_s=20.0).model_copy(update={"sites": sites}), Draws(11))
    counts = Counter(one.site for one in found)
    assert set(counts) == {"a", "b"}
    assert counts["a"] / len(found) == pytest.approx(0.75, abs=0.02)


def test_a_moving_source_is_at_one_site_at_a_time_and_goes_to_the_next() -> None:
    sites = tuple(SiteSpec.model_validate({"name": f"s{i}", "nodes": 1, "node": "box"}) for i in range(5))
    scenario = asked(rate_per_s=20.0, moves_s=(10.0, 40.0)).model_copy(update={"sites": sites})
    found = arrivals(scenario, Draws(12))
    moves = [(a, b) for a, b in pairwise(found) if a.site != b.site]
    assert len(moves) == pytest.approx(900 / 25, rel=0.3)
    assert all(abs(int(a.site[1:]) - int(b.site[1:])) == 1 for a, b in moves)
    stays = [b[0].at_s - a[0].at_s for a, b in pairwise(moves)]
    assert 9 < min(stays) < max(stays) < 41


TRACE = tuple(TraceRow(2.0 * i, 10 + i, 5) for i in range(100))


def test_a_trace_is_told_as_it_is_or_at_the_rate_said() -> None:
    plain = arrivals(asked(process="trace", trace="t.csv", rate_per_s=None), Draws(13), TRACE)
    assert [(one.at_s, one.prompt_tokens, one.output_tokens) for one in plain] == [
        (100 + row.at_s, row.prompt_tokens, row.output_tokens) for row in TRACE
    ]
    fast = arrivals(asked(process="trace", trace="t.csv", rate_per_s=5.0), Draws(13), TRACE)
    assert fast[-1].at_s - fast[0].at_s == pytest.approx(99 / 5)
    cut = arrivals(asked(process="trace", trace="t.csv", rate_per_s=None, duration_s=150.0), Draws(13), TRACE)
    assert cut == plain[:25]


def test_a_ramp_runs_through_a_trace_faster() -> None:
    ramps = ({"at_s": 120.0, "stay_s": 20.0, "factor": 4.0},)
    found = arrivals(asked(process="trace", trace="t.csv", rate_per_s=None, ramps=ramps), Draws(13), TRACE)
    assert [between(found, at, at + 20) for at in (100, 120, 140)] == [10, 40, 10]


def test_one_seed_asks_the_same_and_another_does_not() -> None:
    scenario = asked(process="mmpp")
    first, again, other = (arrivals(scenario, Draws(seed)) for seed in (1, 1, 2))
    assert first == again
    assert trace_hash(first) == trace_hash(again) != trace_hash(other)
    assert trace_hash(first[1:]) != trace_hash(first)


HASH_OF_SEED_7 = "56089cd831d7d93a624e8bd03c37590a971a44088aec4ecba16826a0a5fe5513"


def test_the_small_scenario_asks_what_it_asked_on_other_machines() -> None:
    assert trace_hash(arrivals(SMALL, Draws(7))) == HASH_OF_SEED_7


def test_what_is_asked_does_not_depend_on_what_goes_wrong() -> None:
    scenario = read_scenario(shipped()["smart-city"])
    calm = scenario.model_copy(update={"faults": ()})
    assert trace_hash(arrivals(calm, Draws(1))) == trace_hash(arrivals(scenario, Draws(1)))


def test_streams_of_one_seed_are_independent_of_each_other_and_of_the_order_asked() -> None:
    one, two = Draws(5), Draws(5)
    two.stream("b").random(100)
    a, b = one.stream("a").standard_normal(4000), one.stream("b").standard_normal(4000)
    assert (two.stream("a").standard_normal(4000) == a).all()
    assert abs(float((a * b).mean())) < 4 / sqrt(4000)
    assert (Draws(6).stream("a").standard_normal(4000) != a).all()


@pytest.mark.parametrize(
    ("workload", "words"),
    [
        ({"rate_per_s": 1e6}, r"workload\.rate_per_s = 1e\+06 makes about 9e\+08 requests"),
        ({"ramps": ({"at_s": 0.0, "stay_s": 900.0, "factor": 1e4},) * 90}, r"makes about inf requests"),
        ({"process": "mmpp", "burst_s": 1e-5}, r"workload\.burst_s = 1e-05"),
        ({"moves_s": (1e-5, 2e-5)}, r"workload\.moves_s"),
        ({"process": "trace", "trace": "t.csv"}, r"workload\.trace: the rows of 't\.csv' are needed"),
    ],
)
def test_what_would_never_end_is_refused_by_its_key(workload: dict[str, Any], words: str) -> None:
    with pytest.raises(ResplitError, match=words):
        arrivals(asked(**workload), Draws(1))
