"""Which blocks lie where: what is shared is counted once, each rule keeps to itself, and every solver keeps within what
nodes have."""

from dataclasses import replace
from math import inf, isclose

import numpy as np
import pytest

from orchestrator.residency import genetic, greedy, program
from orchestrator.residency.memory import Memory, greedy_dual, least_frequent, least_recent, leaving
from orchestrator.residency.popularity import UNHEARD, UNHEARD_S, Popularity
from orchestrator.residency.problem import (
    Box,
    Chosen,
    Hosting,
    Lying,
    Piece,
    Prices,
    Setting,
    Wanted,
    check,
)
from orchestrator.residency.reckoning import reckon
from orchestrator.residency.renting import Ledger, Term, renewed, to_drop, to_fetch
from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError
from simulator.files import read, shipped
from simulator.residency.drawn import drawn, rates
from simulator.residency.scenario import ResidencyScenario

A, B = NodeId("a"), NodeId("b")


def wanted(model: str, hostings: tuple[Hosting, ...], rate: float, served: float = 1.0, load_s: float = 4.0) -> Wanted:
    """Asked for by one caller, who waits 10 s where nothing serves it."""
    shape = (1, len(hostings))
    resident = np.full(shape, served)
    return Wanted(model, hostings, np.array([rate]), resident, resident + load_s, np.array([10.0]))


def family(memory: float, disk: float = 100.0, memory_price: float = 0.0) -> Setting:
    """Two models that share two of three blocks, on a node each or on both."""
    pieces = {name: Piece(name, 10.0, 10.0) for name in ("base-0", "base-1", "one-2", "two-2", "lone-0")}
    boxes = (Box(A, disk, memory), Box(B, disk, memory))
    models = {"one": ("base-0", "base-1", "one-2"), "two": ("base-0", "base-1", "two-2"), "lone": ("lone-0",)}
    found = tuple(
        wanted(name, tuple(Hosting({box.name: blocks}) for box in boxes), rate)
        for (name, blocks), rate in zip(models.items(), (1.0, 0.5, 0.1), strict=True)
    )
    return Setting(boxes, pieces, found, Prices(memory=memory_price))


# What it costs


def test_blocks_that_models_share_lie_there_once() -> None:
    setting = family(memory=40.0)
    both = setting.of(Chosen(np.array([True, False, True, False, False, False]), np.zeros(6, bool)))
    assert both.resident == {(A, "base-0"), (A, "base-1"), (A, "one-2"), (A, "two-2")}
    assert both.stored == both.resident
    check(setting, both)
    assert reckon(setting, both).from_memory == pytest.approx(1.5 / 1.6)
    assert reckon(setting, both).cost == pytest.approx(1.5 * 1.0 + 0.1 * 10.0)


def test_what_lies_on_disks_alone_serves_at_the_price_of_loading_it() -> None:
    setting = family(memory=40.0)
    found = reckon(setting, Lying(stored=frozenset({(B, "lone-0")})))
    assert found.from_disk == pytest.approx(0.1 / 1.6)
    assert found.serving == pytest.approx(1.5 * 10.0 + 0.1 * 5.0)


def test_keeping_and_changing_cost_what_they_are_priced_at() -> None:
    prices = Prices(disk=0.001, memory=0.01, fetching=2.0, loading=3.0)
    boxes = (Box(A, 100.0, 100.0, fetch_bytes_per_s=5.0, load_bytes_per_s=10.0, setup_s=0.5),)
    one = wanted("one", (Hosting({A: ("x",)}),), 1.0)
    fresh = Setting(boxes, {"x": Piece("x", 10.0, 20.0)}, (one,), prices, period_s=100.0)
    lying = Lying(frozenset({(A, "x")}), frozenset({(A, "x")}))
    kept = 0.001 * 10.0 + 0.01 * 20.0
    assert reckon(fresh, lying).keeping == pytest.approx(kept + (2.0 * 10.0 / 5.0 + 3.0 * (20.0 / 10.0 + 0.5)) / 100.0)
    assert reckon(replace(fresh, before=lying), lying).keeping == pytest.approx(kept)


def test_a_node_does_no_more_work_than_it_can_and_the_dearest_requests_go_first() -> None:
    boxes = (Box(A, 100.0, 100.0, work=0.5, watts=inf),)
    hosting = Hosting({A: ("x",)}, {A: 1.0})
    callers = Wanted(
        "one",
        (hosting,),
        np.array([0.5, 0.5]),
        np.array([[1.0], [1.0]]),
        np.array([[2.0], [2.0]]),
        np.array([9.0, 3.0]),
    )
    setting = Setting(boxes, {"x": Piece("x", 1.0, 1.0)}, (callers,))
    lying = setting.of(Chosen(np.array([True]), np.array([False])))
    found = reckon(setting, lying)
    assert found.serving == pytest.approx(0.5 * 1.0 + 0.5 * 3.0)
    assert found.from_memory == pytest.approx(0.5)
    hungry = replace(setting, boxes=(Box(A, 100.0, 100.0, watts=1.0),), wanted=(
        replace(callers, hostings=(Hosting({A: ("x",)}, {A: 1.0}, {A: 8.0}),)),
    ))  # fmt: skip
    assert reckon(hungry, lying).from_memory == pytest.approx(1.0 / 8.0)


def test_a_model_may_be_half_here_and_half_there() -> None:
    pieces = {name: Piece(name, 10.0, 10.0) for name in ("x", "y")}
    split = Hosting({A: ("x",), B: ("y",)})
    setting = Setting((Box(A, 10.0, 10.0), Box(B, 10.0, 10.0)), pieces, (wanted("one", (split,), 1.0),))
    found = greedy.place(setting)
    assert found.resident == {(A, "x"), (B, "y")}
    assert reckon(setting, found).from_memory == 1.0
    assert reckon(setting, replace(found, resident=frozenset({(A, "x")}))).from_memory == 0.0


# What is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hostings": (Hosting({NodeId("c"): ("x",)}),)}, "'x' on 'c'"),
        ({"hostings": (Hosting({A: ("z",)}),)}, "'z' on 'a'"),
        ({"rates": np.array([-1.0])}, "rates are 0 or more"),
        ({"absent": np.array([inf])}, "rates are 0 or more"),
        ({"stored": np.zeros((2, 1))}, "are not of 1 callers and 1 hostings"),
    ],
)
def test_figures_that_do_not_fit_are_refused_by_the_model_they_are_of(change: dict[str, object], words: str) -> None:
    good = wanted("one", (Hosting({A: ("x",)}),), 1.0)
    with pytest.raises(ResplitError, match=words) as refused:
        Setting((Box(A, 1.0, 1.0),), {"x": Piece("x", 1.0, 1.0)}, (replace(good, **change),))  # type: ignore[arg-type]
    assert refused.value.code is ErrorCode.INVALID_REQUEST
    assert "'one'" in refused.value.message


def test_what_lies_where_there_is_no_room_is_refused_and_so_is_memory_without_a_disk() -> None:
    setting = family(memory=10.0, disk=10.0)
    two = frozenset({(A, "base-0"), (A, "base-1")})
    with pytest.raises(ResplitError, match="20 bytes are to lie on the disk of a, which has 10"):
        check(setting, Lying(two))
    with pytest.raises(ResplitError, match="in the memory of a, not on its disk"):
        check(setting, Lying(frozenset(), frozenset({(A, "base-0")})))


def test_a_model_larger_than_any_disk_stays_where_it_is_and_the_others_are_served() -> None:
    setting = family(memory=15.0, disk=15.0)
    found = greedy.place(setting)
    check(setting, found)
    assert {piece for _, piece in found.resident} == {"lone-0"}
    assert isclose(reckon(setting, found).from_memory, 0.1 / 1.6)


# Solvers


def test_the_greedy_takes_a_second_model_of_a_family_for_its_own_block_alone() -> None:
    found = greedy.place(family(memory=40.0, memory_price=0.001))
    at = {node for node, piece in found.resident if piece.startswith("base")}
    assert len(at) == 1
    assert {(node, piece) for node, piece in found.resident if node in at} == {
        (node, piece) for node in at for piece in ("base-0", "base-1", "one-2", "two-2")
    }


@pytest.mark.parametrize("memory", [0.0, 10.0, 30.0, 40.0, 50.0])
def test_on_a_family_all_that_look_for_the_best_find_it(memory: float) -> None:
    setting = family(memory)
    solved = program.place(setting)
    assert solved.gap < 1e-6
    assert reckon(setting, solved.lying).cost == pytest.approx(solved.cost)
    for lying in (greedy.place(setting), genetic.place(setting, 1)):
        check(setting, lying)
        assert reckon(setting, lying).cost == pytest.approx(solved.cost)
    assert program.bound(setting) <= solved.cost + 1e-9


def test_what_is_changed_has_to_pay_for_itself_within_the_period() -> None:
    prices = Prices(fetching=1.0, loading=1.0)
    boxes = (Box(A, 20.0, 20.0, fetch_bytes_per_s=1.0, load_bytes_per_s=1.0),)
    pieces = {name: Piece(name, 20.0, 20.0) for name in ("x", "y")}
    here = frozenset({(A, "x")})
    two = (wanted("one", (Hosting({A: ("x",)}),), 1.0), wanted("two", (Hosting({A: ("y",)}),), 1.2))
    brief = Setting(boxes, pieces, two, prices, Lying(here, here), period_s=20.0)
    assert greedy.place(brief).resident == here
    assert greedy.place(replace(brief, period_s=1000.0)).resident == {(A, "y")}
    assert program.place(brief).lying.resident == here
    assert program.place(replace(brief, period_s=1000.0)).lying.resident == {(A, "y")}


def test_a_drawn_world_is_solved_within_what_nodes_have_and_near_the_bound() -> None:
    scenario = read(shipped()["residency"])
    assert isinstance(scenario, ResidencyScenario)
    small = scenario.model_copy(update={"servers": 5, "models": 10, "families": 5})
    world = drawn(small, 3)
    setting = world.setting(rates(small, world, 3)[0][1])
    low = program.bound(setting)
    nothing = reckon(setting, Lying()).cost
    costs = {}
    for name, lying in {"greedy": greedy.place(setting), "genetic": genetic.place(setting, 1)}.items():
        check(setting, lying)
        costs[name] = reckon(setting, lying).cost
    assert low <= costs["greedy"] <= min(costs["genetic"], 0.5 * nothing)
    assert genetic.place(setting, 1) == genetic.place(setting, 1)


@pytest.mark.parametrize("seed", [10, 11])
def test_what_the_program_proves_holds_in_gigabytes(seed: int) -> None:
    scenario = read(shipped()["residency"])
    assert isinstance(scenario, ResidencyScenario)
    small = scenario.model_copy(update={"servers": 4, "models": 6, "families": 3})
    world = drawn(small, seed)
    setting = world.setting(rates(small, world, seed)[0][1])
    solved = program.place(setting, 30.0)
    check(setting, solved.lying)
    assert solved.gap < 1e-3
    assert reckon(setting, solved.lying).cost == pytest.approx(solved.cost, rel=1e-3)
    best = solved.cost * (1.0 - 2e-3)
    assert best <= reckon(setting, greedy.place(setting)).cost <= 1.05 * solved.cost
    assert best <= reckon(setting, genetic.place(setting, 1)).cost


# Memory


def test_greedy_dual_keeps_what_takes_long_to_load_for_its_size_until_it_was_not_used_for_long() -> None:
    memory: Memory[str] = Memory()
    memory = memory.use("slow", 10.0, 10.0, 0.0).use("quick", 1.0, 10.0, 1.0)
    held = {"slow", "quick"}
    for turn in range(9):
        gone = leaving(memory, held, greedy_dual, lambda left: len(left) == 1)
        assert gone == ("quick",), "what is quick to load goes, used lately or not"
        memory = memory.without(gone).use("quick", 1.0, 10.0, 2.0 + turn)
    memory = memory.use("quick", 1.0, 10.0, 20.0)
    memory = memory.without(["quick"]).use("quick", 1.0, 10.0, 21.0)
    assert leaving(memory, held, greedy_dual, lambda left: len(left) == 1) == ("slow",)


def test_lru_and_lfu_are_the_same_with_another_credit() -> None:
    memory: Memory[str] = Memory()
    memory = memory.use("often", 1.0, 1.0, 0.0).use("often", 1.0, 1.0, 1.0).use("lately", 1.0, 1.0, 2.0)
    assert leaving(memory, {"often", "lately"}, least_recent, lambda gone: len(gone) == 1) == ("often",)
    assert leaving(memory, {"often", "lately"}, least_frequent, lambda gone: len(gone) == 1) == ("lately",)
    assert leaving(memory, {"often", "lately", "never"}, least_recent, lambda gone: len(gone) == 1) == ("never",)


def test_what_is_kept_never_leaves_and_nobody_leaves_for_nothing() -> None:
    memory: Memory[str] = Memory()
    sizes = {"small": 1.0, "large": 10.0, "used": 10.0}
    for at, key in enumerate(sizes):
        memory = memory.use(key, 1.0, 1.0, float(at))

    def enough(gone: object) -> bool:
        assert isinstance(gone, set)
        return sum(sizes[key] for key in gone) >= 10.0

    assert leaving(memory, sizes, least_recent, enough) == ("large",), "the small one alone was not enough, and stays"
    assert leaving(memory, sizes, least_recent, enough, kept=["large"]) == ("used",)
    assert leaving(memory, sizes, least_recent, enough, kept=["large", "used"]) is None
    assert leaving(memory, sizes, least_recent, lambda gone: True) == ()


# Disks


def test_what_would_have_paid_for_its_fetch_is_fetched_and_what_would_have_paid_to_lack_goes() -> None:
    ledger: Ledger[str] = Ledger()
    busy = {"x": Term(saved=3.0, rent=1.0, fetch=5.0)}
    quiet = {"x": Term(saved=0.0, rent=1.0, fetch=5.0)}
    nowhere, here = frozenset[str](), frozenset({"x"})
    for _ in range(2):
        ledger = renewed(ledger, busy, nowhere)
        assert not to_fetch(ledger, busy)
    ledger = renewed(ledger, busy, nowhere)
    assert to_fetch(ledger, busy) == ["x"]
    ledger = renewed(ledger, quiet, here)
    for _ in range(3):
        ledger = renewed(ledger, quiet, here)
        assert not to_drop(ledger, quiet)
    ledger = renewed(ledger, quiet, here)
    assert to_drop(ledger, quiet) == ["x"]


def test_what_is_asked_for_now_and_then_is_never_fetched() -> None:
    ledger: Ledger[str] = Ledger()
    now_and_then = [Term(4.0, 1.0, 5.0), *[Term(0.0, 1.0, 5.0)] * 4]
    for turn in range(100):
        terms = {"x": now_and_then[turn % 5]}
        ledger = renewed(ledger, terms, frozenset())
        assert not to_fetch(ledger, terms)


# Popularity


def test_nothing_heard_is_the_same_little_of_everything_and_very_unsure() -> None:
    unheard = Popularity.unheard(2, 3)
    assert unheard.rates == pytest.approx(np.full((2, 3), UNHEARD / UNHEARD_S / 2))
    low, high = unheard.interval()
    assert (low < unheard.rates).all() and (unheard.rates < high).all()
    assert (high / np.maximum(low, 1e-12) > 3.0).all()


def test_rates_follow_what_came_and_what_came_long_ago_is_forgotten() -> None:
    found = Popularity.unheard(1, 2, half_s=600.0)
    for _ in range(100):
        found = found.after(np.array([[10.0, 0.0]]), 100.0)
    assert found.rates[0] == pytest.approx([0.1, 0.0], abs=0.002)
    low, high = found.interval(0.9)
    assert low[0, 0] < 0.1 < high[0, 0]
    for _ in range(100):
        found = found.after(np.array([[0.0, 10.0]]), 100.0)
    assert found.rates[0] == pytest.approx([0.0, 0.1], abs=0.002)


def test_who_asked_little_is_taken_to_ask_for_what_everybody_does() -> None:
    counts = np.zeros((5, 2))
    counts[:4, 0] = 400.0
    counts[4] = [0.0, 2.0]
    found = Popularity.unheard(5, 2).after(counts, 100.0)
    assert found.rates[0, 0] > 100 * found.rates[0, 1]
    assert found.rates[4, 1] > found.rates[0, 1], "what it asked for itself counts"
    assert found.rates[4, 0] > 0.0, "what everybody asks for counts as well"
