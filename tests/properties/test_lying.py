"""Whatever servers and models are drawn: what is to lie where fits, nothing is better than the program proves, and what
is in use never leaves a memory."""

from typing import cast

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.residency import genetic, greedy, program
from orchestrator.residency.memory import RULES, Memory, leaving
from orchestrator.residency.problem import Lying, Setting, check
from orchestrator.residency.reckoning import reckon
from simulator.files import read, shipped
from simulator.residency.drawn import drawn, rates
from simulator.residency.scenario import ResidencyScenario

SHIPPED = cast(ResidencyScenario, read(shipped()["residency"]))
SLACK = 2e-3
"""HiGHS' tolerances, of the cost."""


@st.composite
def worlds(draw: st.DrawFn) -> Setting:
    """A few servers and models, with disks and memories from hopeless to roomy, and something lying there already."""
    servers, models = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    disk, memory = draw(st.floats(0.5, 40.0)), draw(st.floats(0.2, 20.0))
    scenario = SHIPPED.model_copy(
        update={
            "servers": servers,
            "models": models,
            "families": draw(st.integers(1, models)),
            "disk_gb": (disk, 2.0 * disk),
            "memory_gb": (memory, 2.0 * memory),
        }
    )
    seed = draw(st.integers(0, 1000))
    found = drawn(scenario, seed)
    asked = rates(scenario, found, seed)[0][1]
    before = greedy.place(found.setting(np.roll(asked, 1, axis=1)))
    return found.setting(asked, before if draw(st.booleans()) else Lying(), 900.0)


@settings(max_examples=30, deadline=None)
@given(setting=worlds(), seed=st.integers(0, 100))
def test_every_way_fits_and_none_is_better_than_the_program_proves(setting: Setting, seed: int) -> None:
    solved = program.place(setting, 5.0)
    costs = []
    for lying in (greedy.place(setting), genetic.place(setting, seed, generations=6), solved.lying):
        check(setting, lying)
        costs.append(reckon(setting, lying).cost)
    least = min(solved.bound, solved.cost)
    assert all(cost >= least - SLACK * abs(least) for cost in costs)
    assert program.bound(setting) <= solved.cost + SLACK * abs(solved.cost)


@settings(max_examples=200, deadline=None)
@given(
    uses=st.lists(st.tuples(st.sampled_from("abcdef"), st.floats(0.1, 10.0), st.floats(1.0, 100.0)), max_size=20),
    may=st.sets(st.sampled_from("abcdef")),
    needed=st.integers(0, 6),
    rule=st.sampled_from(sorted(RULES)),
)
def test_only_who_may_leaves_and_no_more_than_makes_room(
    uses: list[tuple[str, float, float]], may: set[str], needed: int, rule: str
) -> None:
    memory: Memory[str] = Memory()
    for at, (name, load_s, size) in enumerate(uses):
        memory = memory.use(name, load_s, size, float(at))
    gone = leaving(memory, sorted(may), RULES[rule], lambda left: len(left) >= needed)  # type: ignore[index]
    if needed > len(may):
        assert gone is None
        return
    assert gone is not None
    assert set(gone) <= may
    assert len(gone) == len(set(gone)) == needed
