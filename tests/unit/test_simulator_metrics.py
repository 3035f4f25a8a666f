"""What one run amounts to, definition by definition (mathematics.md, part D)."""

from dataclasses import replace

import pytest

from orchestrator.decision import Action
from schemas.base import NodeId
from simulator.metrics import Incident, Metrics, Quantiles, actions, in_transition, incidents, jain, measure, met
from simulator.records import NodeUse, Outcome, RunResult, Spell
from tests.synthetic_run import CLASSES, DRONE, GUIDE, TIMEOUT_S, chain, epochs, outcome, result, synthetic

HERE = chain(("a", 0, 5), ("b", 6, 11))


def measured(*outcomes: Outcome, end_s: float = 3600.0, **more: object) -> Metrics:
    return measure(result(outcomes, end_s, **more), CLASSES)


def down(*outcomes: Outcome, end_s: float = 3600.0) -> list[tuple[float, float, float]]:
    found = incidents(result(outcomes, end_s=end_s), outcomes)
    return [(each.begin_s, each.down_s, each.end_s) for each in found]


def test_latency_is_from_arrival_to_the_last_token() -> None:
    assert measured(outcome(100, 0.25)).latency_ms == Quantiles(mean=250, p50=250, p95=250, p99=250)


@pytest.mark.parametrize(
    "lost",
    [
        outcome(10, None),
        replace(outcome(10, 2, "guide", 0.5, 16), error="node_lost"),
        replace(outcome(10, 2, "guide", 0.5, 16), last_s=None),
        outcome(10, TIMEOUT_S + 0.1),
    ],
    ids=["rejected", "failed after its first token", "unfinished", "later than the timeout"],
)
def test_what_is_not_served_counts_as_the_timeout_and_is_never_dropped(lost: Outcome) -> None:
    metrics = measured(lost)
    assert (metrics.arrived, metrics.completed) == (1, 0)
    assert metrics.latency_ms is not None and metrics.latency_ms.p50 == TIMEOUT_S * 1e3
    assert metrics.ttft_ms is not None and metrics.ttft_ms.p50 == TIMEOUT_S * 1e3


def test_one_refusal_in_ten_shows_in_the_99th_percentile_and_not_in_the_median() -> None:
    metrics = measured(*(outcome(at, 0.1) for at in range(9)), outcome(9, None))
    assert metrics.latency_ms is not None
    assert metrics.latency_ms.p50 == pytest.approx(100)
    assert metrics.latency_ms.p99 > 50_000
    assert metrics.latency_ms.mean == pytest.approx((9 * 100 + 60_000) / 10)


def test_time_per_token_is_of_the_tokens_after_the_first_and_of_requests_that_have_some() -> None:
    metrics = measured(outcome(0, 2.0, "guide", 0.5, 16), outcome(1, 0.1))
    assert metrics.tpot_ms is not None and metrics.tpot_ms.mean == pytest.approx(100)
    refused = measured(outcome(0, None, "guide", tokens=16), outcome(1, None))
    assert refused.tpot_ms is not None and refused.tpot_ms.mean == TIMEOUT_S * 1e3
    assert measured(outcome(1, 0.1)).tpot_ms is None


def test_a_request_meets_its_class_only_if_it_meets_every_target_of_it() -> None:
    assert met(outcome(0, 2.0, "guide", 0.5, 16), GUIDE.slo, TIMEOUT_S)
    assert not met(outcome(0, 2.0, "guide", 1.5, 16), GUIDE.slo, TIMEOUT_S)
    assert not met(outcome(0, 3.0, "guide", 0.5, 16), GUIDE.slo, TIMEOUT_S)
    assert met(outcome(0, 0.3), DRONE.slo, TIMEOUT_S)
    assert not met(outcome(0, 0.31), DRONE.slo, TIMEOUT_S)


def test_qos_compliance_counts_all_that_arrived_and_names_the_worst_class() -> None:
    drones = [outcome(at, 0.1) for at in range(6)] + [outcome(6, 1.0), outcome(7, None)]
    guides = [outcome(8, 1.0, "guide", 0.5, 16), outcome(9, None, "guide", tokens=16)]
    metrics = measured(*drones, *guides)
    assert metrics.qos == 7 / 10
    assert metrics.qos_worst == 1 / 2
    assert [(each.name, each.arrived, each.completed, each.met) for each in metrics.classes] == [
        ("drone", 8, 7, 6),
        ("guide", 2, 1, 1),
    ]


def test_a_class_that_nobody_asked_for_is_neither_met_nor_missed() -> None:
    metrics = measured(outcome(0, 0.1))
    assert metrics.classes[1].qos is None
    assert metrics.qos_worst == 1.0


def test_downtime_is_from_the_first_arrival_that_failed_to_the_next_that_completes() -> None:
    assert down(outcome(10, 0.1), outcome(12, None), outcome(15, None), outcome(20, 0.1)) == [(10, 12, 20)]


def test_less_than_a_second_without_service_is_no_incident() -> None:
    assert down(outcome(10, 0.1), outcome(10.4, None), outcome(10.9, 0.1)) == []
    assert down(outcome(10, 0.1), outcome(10.4, None), outcome(11.0, 0.1)) == [(10, 10.4, 11)]


def test_nobody_asking_is_no_downtime() -> None:
    assert down(outcome(10, 0.1), outcome(1000, 0.1)) == []


def test_incidents_less_than_five_seconds_apart_are_one() -> None:
    outages = [outcome(at, None) for at in (10, 20)]
    near = [outcome(at, 0.1) for at in (8, 12, 16.9, 22)]
    assert down(*outages, *near) == [(8, 10, 22)]
    far = [outcome(at, 0.1) for at in (8, 12, 17, 22)]
    assert down(*outages, *far) == [(8, 10, 12), (17, 20, 22)]


def test_an_incident_that_nothing_ends_lasts_until_the_run_does() -> None:
    assert down(outcome(10, 0.1), outcome(20, None), end_s=100) == [(10, 20, 100)]


def test_one_class_may_be_down_while_another_is_served() -> None:
    drones = [outcome(at, 0.1) for at in range(0, 100, 2)]
    guides = [outcome(at, None, "guide", tokens=16) for at in range(10, 30, 2)]
    served = [outcome(at, 1.0, "guide", 0.5, 16) for at in (8, 30)]
    metrics = measured(*drones, *guides, *served, spells=[Spell("a", "kill", 10, 20), Spell("b", "kill", 10, 20)])
    assert [each.incidents for each in metrics.classes] == [0, 1]
    assert metrics.incidents_per_hour == 1
    assert metrics.incidents_per_fault == 0.5
    assert (metrics.mttr_s, metrics.down_s_max, metrics.down_s_per_hour) == (20, 20, 20)
    assert measured(*drones).mttr_s is None


def test_repair_is_reckoned_from_the_first_failure_that_is_known() -> None:
    assert Incident(begin_s=10, down_s=12, end_s=20).repair_s == 8


def test_utilisation_is_of_the_nodes_that_host_and_goodput_of_requests_that_met_their_class() -> None:
    nodes = [
        NodeUse(NodeId("a"), alive_s=100, hosting_s=50, busy_s=60, good_s=30, memory_peak=0.8),
        NodeUse(NodeId("b"), alive_s=100, hosting_s=100, busy_s=20, good_s=20, memory_peak=0.2),
        NodeUse(NodeId("idle"), alive_s=100),
    ]
    metrics = measured(outcome(0, 0.1), nodes=nodes)
    assert metrics.utilisation == pytest.approx(80 / 200)
    assert metrics.goodput_utilisation == pytest.approx(50 / 200)
    assert metrics.jain == pytest.approx(0.8**2 / (2 * (0.6**2 + 0.2**2)))
    assert (metrics.memory, metrics.memory_peak) == (0.5, 0.8)


def test_the_jain_index_is_one_among_equals_and_one_in_n_where_one_does_it_all() -> None:
    assert jain([0.4, 0.4, 0.4]) == pytest.approx(1)
    assert jain([0.4, 0, 0, 0]) == pytest.approx(1 / 4)
    assert jain([0, 0]) is None


def test_changes_of_plans_are_told_apart_as_the_trigger_does_and_the_first_plan_is_none() -> None:
    plans = epochs(
        (0, HERE),
        (100, chain(("a", 0, 5), ("c", 6, 11))),
        (200, chain(("a", 0, 7), ("c", 8, 11))),
        (300, HERE),
        (400, HERE),
        (500, HERE + HERE),
    )
    kinds = [action for _, action in actions(plans)]
    assert kinds == [Action.REDISTRIBUTE, Action.RESPLIT, Action.RESPLIT, Action.KEEP, Action.ROUTES]
    metrics = measured(outcome(0, 0.1), end_s=1800.0, epochs=plans)
    assert metrics.redistributes_per_hour == 2
    assert metrics.resplits_per_hour == 4
    assert metrics.routes_per_hour == 2
    assert metrics.kept_per_hour == 2
    assert metrics.reconfigurations_per_hour == 8


def test_changes_while_nobody_asks_yet_are_not_counted() -> None:
    plans = epochs((0, HERE), (5, chain(("c", 0, 11))))
    assert measured(outcome(40, 0.1), begin_s=30.0, epochs=plans).reconfigurations_per_hour == 0


def test_a_request_is_in_transition_if_any_of_its_time_is_within_five_seconds_of_a_change() -> None:
    plans = epochs((0, HERE), (100, chain(("c", 0, 11))), (200, chain(("c", 0, 11))))
    long, before, after, apart = outcome(80, 15.0), outcome(94, 0.5), outcome(104.9, 0.1), outcome(200, 0.1)
    run = result([long, before, after, apart], epochs=plans)
    assert in_transition(run) == [long, after]
    metrics = measure(run, CLASSES)
    assert metrics.transition_ms is not None and metrics.transition_ms.p50 == pytest.approx((15_000 + 100) / 2)


def test_exposure_is_a_share_of_requests_and_every_broken_invariant_counts() -> None:
    outcomes = [outcome(at, 0.1) for at in range(4)]
    outcomes[0].exposed = True
    metrics = measured(*outcomes, violations=["block 0 on an untrusted node"])
    assert (metrics.exposed, metrics.violations) == (0.25, 1)


def test_energy_spent_in_vain_is_charged_to_the_requests_that_completed() -> None:
    failed = replace(outcome(1, None), energy_j=6.0)
    assert measured(outcome(0, 0.1), failed).energy_j == 8.0
    assert measured(failed).energy_j is None


def test_a_run_in_which_nobody_asked_has_metrics_too() -> None:
    metrics = measured()
    assert (metrics.latency_ms, metrics.qos, metrics.utilisation, metrics.transition_ms) == (None, None, None, None)
    assert metrics.incidents_per_hour == 0


def test_metrics_are_a_function_of_the_run_alone() -> None:
    def once() -> RunResult:
        return synthetic("full", 3, 1.1, 0.2)

    assert measure(once(), CLASSES) == measure(once(), CLASSES)
