"""What goes wrong: as a scenario says it, the same for every policy, however it overlaps."""

from itertools import pairwise
from math import inf, log
from statistics import fmean
from typing import Any

import numpy as np
import pytest

from schemas.base import NodeId
from schemas.errors import ResplitError
from simulator.draws import Draws
from simulator.files import read_scenario, shipped
from simulator.records import Spell
from simulator.scenario import Churn, Fault, LinkSpec, NetworkSpec, Scenario, SiteSpec
from simulator.truth import Change, Truth, timeline

SMALL = read_scenario(shipped()["small"])
A0, A1, B0, B1, C0 = (NodeId(name) for name in ("a-0", "a-1", "b-0", "b-1", "c-0"))
STEADY = LinkSpec(rtt_ms=1.0, mbit_per_s=100.0)


def world(*faults: dict[str, Any], **said: Any) -> Scenario:
    """Sites a and b of two nodes, c of one in the cloud, for 1000 s; links do not vary."""
    sites = [SiteSpec(name=NodeId(name), nodes=nodes, node=kind) for name, nodes, kind in SITES]
    kinds = {"box": SMALL.kinds["box"], "cloud": SMALL.kinds["box"].model_copy(update={"tier": "cloud"})}
    settled = {
        "sites": tuple(sites),
        "kinds": kinds,
        "network": NetworkSpec(within=STEADY, between=STEADY, cloud=STEADY),
        "faults": tuple(Fault.model_validate(fault) for fault in faults),
        "duration_s": 1000.0,
        "drain_s": 0.0,
    }
    return SMALL.model_copy(update={**settled, **said})


SITES = (("a", 2, "box"), ("b", 2, "box"), ("c", 1, "cloud"))


def truth(*faults: dict[str, Any], seed: int = 1, **said: Any) -> Truth:
    return timeline(world(*faults, **said), Draws(seed))


def many(count: int) -> tuple[SiteSpec, ...]:
    return (SiteSpec(name=NodeId("s"), nodes=count, node="box"),)


def test_a_fault_holds_from_its_beginning_until_its_end() -> None:
    found = truth({"kind": "kill", "at_s": 10.0, "lasts_s": 5.0, "where": {"nodes": ["a-0"]}})
    assert [found.alive(A0, t) for t in (0, 9.999, 10, 14.999, 15, 999)] == [True, True, False, False, True, True]
    assert found.alive(A1, 12)
    assert found.spells == (Spell("a-0", "kill", 10, 15),)
    assert found.changes == (Change(10, "a-0", "kill", True, 1), Change(15, "a-0", "kill", False, 1))


def test_a_fault_without_an_end_lasts_until_the_run_ends() -> None:
    found = truth({"kind": "hang", "at_s": 10.0, "where": {"sites": ["a"]}})
    assert found.hangs(A1, 1e9)
    assert not found.hangs(B0, 1e9)
    assert found.spells == (Spell("a", "hang", 10, 1000),)
    assert [(change.what, change.begins) for change in found.changes] == [("a-0", True), ("a-1", True)]


def test_slow_times_multiply_and_a_throttled_node_says_so() -> None:
    found = truth(
        {"kind": "slow", "at_s": 10.0, "lasts_s": 20.0, "factor": 2.0, "where": {"nodes": ["a-0"]}},
        {"kind": "throttle", "at_s": 20.0, "lasts_s": 20.0, "factor": 3.0, "where": {"sites": ["a"]}},
    )
    assert [found.node_factor(A0, t) for t in (0, 10, 20, 30, 40)] == [1, 2, 6, 3, 1]
    assert [found.throttled(A0, t) for t in (10, 20, 40)] == [False, True, False]
    assert found.node_factor(A1, 25) == 3


def test_a_node_lives_only_while_nothing_kills_it() -> None:
    found = truth(
        {"kind": "kill", "at_s": 10.0, "lasts_s": 20.0, "where": {"nodes": ["a-0"]}},
        {"kind": "kill", "at_s": 15.0, "lasts_s": 5.0, "where": {"sites": ["a"]}},
    )
    assert [found.alive(A0, t) for t in (9, 10, 20, 29, 30)] == [True, False, False, False, True]
    assert [change.at_s for change in found.changes] == [10, 15, 15, 20, 20, 30]


def test_a_liar_and_a_dead_orchestrator_are_told() -> None:
    found = truth(
        {"kind": "lie", "at_s": 10.0, "lasts_s": 5.0, "factor": 4.0, "where": {"nodes": ["b-0"]}},
        {"kind": "leader", "at_s": 20.0, "lasts_s": 30.0},
    )
    assert [found.lies(B0, t) for t in (9, 10, 15)] == [1, 4, 1]
    assert found.node_factor(B0, 10) == 1
    assert found.spells[1] == Spell("orchestrator", "leader", 20, 50)


def test_slow_links_are_slow_once_whoever_is_at_both_ends() -> None:
    found = truth({"kind": "links", "at_s": 10.0, "lasts_s": 5.0, "factor": 4.0, "where": {"sites": ["a", "b"]}})
    factors = {
        pair: found.link_factor(*pair, 12) for pair in (("a", "b"), ("b", "a"), ("c", "a"), ("a", "a"), ("c", "c"))
    }
    assert factors == {("a", "b"): 4, ("b", "a"): 4, ("c", "a"): 4, ("a", "a"): 4, ("c", "c"): 1}
    assert found.link_factor("a", "b", 15) == found.link_factor("a", "b", 9) == 1


def test_a_cut_is_between_its_victims_and_the_others() -> None:
    found = truth({"kind": "cut", "at_s": 10.0, "lasts_s": 5.0, "where": {"sites": ["a", "b"]}})
    assert [found.link_factor(*pair, 12) for pair in (("a", "c"), ("b", "c"), ("a", "b"), ("a", "a"))] == [
        inf,
        inf,
        1,
        1,
    ]
    assert found.path_factor(A0, C0, 12) == inf
    assert found.link_factor("a", "c", 15) == 1


def test_a_cut_node_is_cut_from_its_own_site_too() -> None:
    found = truth({"kind": "cut", "at_s": 10.0, "lasts_s": 5.0, "where": {"nodes": ["a-0"]}})
    assert [found.path_factor(A0, other, 12) for other in (A0, A1, B0, C0)] == [1, inf, inf, inf]
    assert found.path_factor(A1, B0, 12) == found.link_factor("a", "b", 12) == 1
    assert found.path_factor(B0, A0, 15) == 1


def test_the_backhaul_is_what_leads_to_the_cloud() -> None:
    found = truth({"kind": "cloud-links", "at_s": 10.0, "factor": 20.0})
    assert [found.link_factor(*pair, 12) for pair in (("a", "c"), ("c", "b"), ("a", "b"), ("c", "c"))] == [20, 20, 1, 1]
    assert found.changes == (Change(10, "cloud-links", "cloud-links", True, 20),)


def test_what_depends_on_the_plan_is_left_to_the_world() -> None:
    fault = {"kind": "kill", "at_s": 10.0, "where": {"in_plan": 1}}
    found = truth(fault)
    assert found.late == (Fault.model_validate(fault),)
    assert (found.spells, found.changes) == ((), ())


def test_a_quarter_of_the_nodes_is_two_of_eight_sites_in_the_city() -> None:
    city = read_scenario(shipped()["smart-city"])
    dead = set()
    for seed in range(10):
        found = timeline(city, Draws(seed))
        lost = [spell.what for spell in found.spells if spell.kind == "kill" and spell.begin_s == 90]
        assert len(lost) == 2
        assert sum(not found.alive(node, 90) for node in found.sites) == 10
        dead.add(tuple(lost))
    assert len(dead) > 5


def test_a_share_of_single_nodes_is_drawn_with_the_seed() -> None:
    fault = {"kind": "kill", "at_s": 10.0, "where": {"share": 0.3}}
    drawn = [frozenset(spell.what for spell in truth(fault, seed=seed, sites=many(100)).spells) for seed in (1, 1, 2)]
    assert [len(names) for names in drawn] == [30, 30, 30]
    assert drawn[0] == drawn[1] != drawn[2]


def test_nodes_die_and_come_back_as_often_as_said() -> None:
    churn = Churn(mtbf_s=300.0, mttr_s=100.0)
    found = truth(sites=many(400), duration_s=20_000.0, churn=churn)
    up = [found.alive(node, t) for node in found.sites for t in range(2000, 20_000, 500)]
    assert fmean(up) == pytest.approx(0.75, abs=0.02)
    assert len(found.spells) == pytest.approx(400 * 20_000 / 400, rel=0.05)
    assert fmean(spell.end_s - spell.begin_s for spell in found.spells) == pytest.approx(100, rel=0.05)


def test_a_site_dies_as_one() -> None:
    found = truth(churn=Churn(site_mtbf_s=100.0, site_mttr_s=50.0, after_s=200.0, until_s=800.0))
    assert {spell.what for spell in found.spells} <= {"a", "b", "c"}
    assert len(found.spells) > 5
    assert all(200 <= spell.begin_s < 800 for spell in found.spells)
    assert all(found.alive(A0, t) == found.alive(A1, t) for t in range(1000))
    assert any(found.alive(A0, t) != found.alive(B0, t) for t in range(1000))


def test_slow_times_have_the_factors_said() -> None:
    churn = Churn(slow_every_s=90.0, slow_s=30.0, slow_factors=(2.0, 5.0))
    found = truth(sites=many(200), duration_s=10_000.0, churn=churn)
    seen = [found.node_factor(node, t) for node in found.sites for t in range(1000, 10_000, 500)]
    shares = [seen.count(factor) / len(seen) for factor in (1, 2, 5)]
    assert shares == [pytest.approx(share, abs=0.03) for share in (0.75, 0.125, 0.125)]


def varying(link: LinkSpec, seed: int = 1) -> Truth:
    return truth(seed=seed, duration_s=50_000.0, network=NetworkSpec(within=STEADY, between=link, cloud=STEADY))


def test_a_link_is_bad_for_the_share_and_the_length_said() -> None:
    found = varying(STEADY.model_copy(update={"bad_share": 0.2, "bad_factor": 10.0, "bad_s": 20.0}))
    seen = [found.link_factor("a", "b", t) for t in range(50_000)]
    assert set(seen) == {1, 10}
    assert seen.count(10) / 50_000 == pytest.approx(0.2, abs=0.04)
    spells = sum(a == 1 and b == 10 for a, b in pairwise(seen))
    assert seen.count(10) / spells == pytest.approx(20, rel=0.2)


def test_a_rate_drifts_and_forgets() -> None:
    found = varying(STEADY.model_copy(update={"drift": 0.4, "drift_s": 50.0}))
    logs = np.array([log(found.link_factor("a", "b", t)) for t in range(0, 50_000, 5)])
    assert logs.std() == pytest.approx(0.4, rel=0.15)
    centred = (logs - logs.mean()) / logs.std()
    # exp(-1) is left after drift_s, 0.2 % after six times that.
    assert (centred[:-10] * centred[10:]).mean() == pytest.approx(0.37, abs=0.12)
    assert abs((centred[:-60] * centred[60:]).mean()) < 0.15


def test_what_is_on_its_way_feels_what_becomes_of_the_link() -> None:
    link = STEADY.model_copy(update={"drift": 0.4, "drift_s": 20.0, "bad_share": 0.2, "bad_factor": 10.0, "bad_s": 5.0})
    cut = {"kind": "cut", "at_s": 40.0, "lasts_s": 5.0, "where": {"sites": ["a"]}}
    found = truth(cut, network=NetworkSpec(within=link, between=link, cloud=link))
    step_s = 1e-3
    for begin_s in (0.0, 7.3, 38.0, 44.9):
        left_s, t = 6.0, begin_s
        while left_s > 0:
            left_s -= step_s / min(found.path_factor(A0, B0, t), 20.0)
            t += step_s
        assert found.passing_s(A0, B0, begin_s, 6.0) == pytest.approx(t - begin_s, abs=0.05)


def test_what_comes_over_a_steady_link_takes_what_it_should() -> None:
    slow = {"kind": "links", "at_s": 10.0, "lasts_s": 5.0, "factor": 4.0, "where": {"sites": ["a", "b"]}}
    found = truth(slow)
    assert found.passing_s(A0, B0, 0.0, 6.0) == found.passing_s(A0, A0, 12.0, 6.0) == 6.0
    assert found.passing_s(A0, B0, 11.0, 0.5) == 2.0
    assert found.passing_s(A0, B0, 9.0, 3.0) == 1 + 5 + 0.75


def test_links_vary_each_for_itself_and_not_by_who_asked_first() -> None:
    link = STEADY.model_copy(update={"drift": 0.4, "bad_share": 0.2})
    one, two = (varying(link) for _ in range(2))
    ab, bc = [one.link_factor("a", "b", t) for t in range(100)], [one.link_factor("b", "c", t) for t in range(100)]
    assert [two.link_factor("c", "b", t) for t in range(100)] == bc
    assert [two.path_factor(B1, A0, t) for t in range(100)] == ab
    assert len(set(ab)) > 3
    assert set(bc) == {1}
    assert [varying(link, seed=2).link_factor("a", "b", t) for t in range(100)] != ab


def test_the_same_seed_brings_the_same_whatever_was_asked_before() -> None:
    city = read_scenario(shipped()["smart-city"])
    one, two, other = (timeline(city, draws) for draws in (Draws(3), asked_before(3), Draws(4)))
    assert (one.spells, one.changes) == (two.spells, two.changes)
    assert one.spells != other.spells


def asked_before(seed: int) -> Draws:
    draws = Draws(seed)
    draws.stream("fault 1").random(10)
    return draws


def test_five_thousand_nodes_are_drawn_and_each_change_is_told_in_order() -> None:
    churn = Churn(mtbf_s=3600.0, mttr_s=120.0, slow_every_s=1800.0)
    found = truth(sites=many(5000), duration_s=3600.0, churn=churn)
    times = [change.at_s for change in found.changes]
    assert times == sorted(times)
    assert len(found.spells) > 10_000
    for change in found.changes[:200]:
        if change.kind == "kill":
            assert found.alive(NodeId(change.what), change.at_s) != change.begins


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"churn": Churn(mtbf_s=1e-6, mttr_s=1e-6)}, r"churn\.mtbf_s = 1e-06 makes about 2\.5e\+09 spells"),
        ({"churn": Churn(slow_every_s=1e-6, slow_s=1e-6)}, r"churn\.slow_every_s"),
        (
            {
                "network": NetworkSpec(
                    within=STEADY, between=STEADY, cloud=STEADY.model_copy(update={"bad_share": 0.5, "bad_s": 1e-4})
                )
            },
            r"network\.cloud\.bad_s = 0\.0001 makes a link change about 1e\+07 times",
        ),
    ],
)
def test_what_changes_too_often_is_refused_by_its_key(said: dict[str, Any], words: str) -> None:
    with pytest.raises(ResplitError, match=words):
        truth(**said)


def test_what_happens_again_and_again_meets_the_same_nodes_each_time_until_requests_end() -> None:
    again = world(
        {"kind": "slow", "at_s": 400.0, "every_s": 250.0, "lasts_s": 50.0, "factor": 3.0, "where": {"share": 0.4}}
    )
    spells = timeline(again, Draws(3)).spells
    victims = {spell.what for spell in spells if spell.begin_s == 400}
    assert len(victims) == 2
    assert [(at_s, {spell.what for spell in spells if spell.begin_s == at_s}) for at_s in (400, 650, 900)] == [
        (at_s, victims) for at_s in (400, 650, 900)
    ]
    assert len(spells) == 6
    assert {spell.end_s - spell.begin_s for spell in spells} == {50}
