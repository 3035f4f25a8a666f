"""Worlds in which somebody else decides: Petals' rule, no make-before-break, and the learned policy."""

from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest

from schemas.deployment import Stage
from simulator import learning
from simulator.files import read_scenario, shipped
from simulator.learned import read
from simulator.metrics import completed
from simulator.policies import CONTENDERS
from simulator.records import RunResult
from simulator.world import World

SMALL = read_scenario(shipped()["small"])
CALM = SMALL.model_copy(update={"faults": ()})
MOVED_S = 12.0


@cache
def moved(policy: str, seed: int) -> RunResult:
    """A calm world in which an operator moves everything to the nodes that are spare, which have none of it yet."""
    world = World(CALM, CONTENDERS[policy], seed)

    def move() -> None:
        plan = world.plan
        assert plan is not None
        spare = [node for node in world.machines if node not in plan.nodes]
        world.place((Stage(node=spare[0], first=0, last=4), Stage(node=spare[1], first=5, last=9)))

    world.kernel.at(MOVED_S, move)
    return world.run()


def test_who_stops_serving_while_blocks_are_loaded_has_requests_wait_and_loses_none() -> None:
    full, without = moved("full", 7), moved("no-make-before-break", 7)
    for result in (full, without):
        assert len(result.epochs) == 2
        assert {outcome.error for outcome in result.outcomes} == {None}
        assert all(completed(outcome, result.timeout_s) for outcome in result.outcomes)
        assert not result.violations
    waits = [max(outcome.gap_s for outcome in result.outcomes) for result in (full, without)]
    assert waits[0] < 0.5 < waits[1]


def test_the_first_plan_comes_as_soon_without_make_before_break() -> None:
    begins = [moved(policy, 7).epochs[0].begin_s for policy in ("full", "no-make-before-break")]
    assert begins[0] == begins[1]


def test_a_swarm_serves_and_goes_round_a_server_that_is_lost() -> None:
    result = World(SMALL, CONTENDERS["petals"], 10).run()
    assert not result.violations
    first, *later = result.epochs
    assert "left-0" in {stage.node for chain in first.placement for stage in chain}
    assert later
    assert "left-0" not in {stage.node for chain in later[0].placement for stage in chain}
    assert all(before.placement != after.placement for before, after in pairwise(result.epochs))
    ended = [outcome for outcome in result.outcomes if outcome.arrival.at_s > later[0].begin_s]
    assert ended
    assert all(completed(outcome, result.timeout_s) for outcome in ended)


def test_a_training_of_a_seed_writes_the_same_file_again_which_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    short = CALM.model_copy(update={"duration_s": 8.0, "drain_s": 2.0})
    monkeypatch.setattr(learning, "training_world", lambda seed: short)
    files = [tmp_path / "one.json", tmp_path / "other.json"]
    for path in files:
        learning.main(
            ["--seed", "3", "--generations", "2", "--pairs", "1", "--worlds", "1", "--jobs", "1", "--output", str(path)]
        )
    assert files[0].read_bytes() == files[1].read_bytes()
    assert read(files[0]) == read(files[1])
    assert len(capsys.readouterr().out.splitlines()) == 4
