"""The learned policy: what it shares with the others, what it is told, and the file that it comes from."""

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.decision import Action
from orchestrator.fold import NodeWished, fold
from orchestrator.trigger import EwmaThreshold
from schemas.base import NodeId
from schemas.deployment import Deployment, NodeWish, Stage
from schemas.errors import ErrorCode, ResplitError
from simulator.learned import COUNT, FEATURES, HIDDEN, SHIPPED, Learned, imitation, read, read_parameters
from simulator.learning import SEEDS
from tests.trigger_world import BLOCKS, CHAT, MODEL, SETTINGS, World

IMITATES = Learned(imitation([0.0] * (HIDDEN * len(FEATURES))))
NEVER = Learned((*[0.0] * len(FEATURES), -1e3, *[0.0] * (COUNT - len(FEATURES) - 1)))
ALWAYS = Learned((*[0.0] * len(FEATURES), 1e3, *[0.0] * (COUNT - len(FEATURES) - 1)))


def slowed(policy: Any, seed: int = 0, seconds: float = 30.0) -> World:
    """A node that serves becomes three times slower after a while."""
    world = World(4, seed, noise=0.05, policy=policy)
    world.run(10)
    world.slow[NodeId(world.plan.nodes[0])] = 3.0
    world.run(seconds)
    return world


@pytest.mark.parametrize("seed", range(2))
def test_before_any_training_it_does_what_the_smoothed_threshold_does(seed: int) -> None:
    imitated, threshold = slowed(IMITATES, seed), slowed(EwmaThreshold(), seed)
    assert threshold.moves
    assert [one.chosen.key for one in imitated.decisions] == [one.chosen.key for one in threshold.decisions]


def test_the_same_is_decided_again_for_the_same_reasons() -> None:
    assert slowed(read()).decisions == slowed(read()).decisions


def test_scores_decide_what_moves_and_nothing_moves_below_zero() -> None:
    assert not slowed(NEVER).moves
    moved = slowed(ALWAYS).moves
    assert moved
    assert "its learned score, 1000.00" in moved[0].why_now


def test_a_hard_trigger_is_obeyed_whatever_the_score() -> None:
    world = World(4, 0, noise=0.0, policy=NEVER)
    leaves = NodeId(world.plan.nodes[0])
    world.snapshot = fold(world.snapshot, NodeWished(NodeWish(node=leaves, drained=True)), world.now)
    world.look()
    assert world.decisions[-1].action is Action.HARD
    assert leaves not in world.plan.nodes


def test_what_an_operator_placed_stays_whatever_the_score() -> None:
    placed = (Stage(node="n0", first=0, last=3), Stage(node="n1", first=4, last=BLOCKS - 1))
    wish = Deployment(name=CHAT, model=MODEL, settings=SETTINGS, placement=placed)
    world = World(4, 0, policy=ALWAYS, wish=wish)
    world.run(10)
    assert not world.moves


def test_the_file_that_is_shipped_was_trained_on_seeds_that_are_not_reported() -> None:
    found = read_parameters(SHIPPED)
    assert found.training.seeds == SEEDS == (1000, 1999)
    assert len(found.training.generations) >= 2
    assert found.values != imitation(found.values[len(FEATURES) + 1 :][: HIDDEN * len(FEATURES)])


def written(path: Path, **changes: object) -> Path:
    path.write_text(json.dumps({**json.loads(SHIPPED.read_text()), **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"values": [0.0] * 3}, "these are 3 numbers"),
        ({"values": [float("nan")] * COUNT}, "finite"),
        ({"features": ["gain"]}, "of another network"),
        ({"layers": 3}, "layers"),
    ],
)
def test_a_file_of_another_network_is_refused_with_what_is_wrong_and_what_to_do(
    tmp_path: Path, changes: dict[str, object], why: str
) -> None:
    with pytest.raises(ResplitError, match=why) as refused:
        read(written(tmp_path / "other.json", **changes))
    assert refused.value.code is ErrorCode.CORRUPT_FILE
    assert "other.json" in refused.value.message
    assert "python -m simulator.learning" in refused.value.message


def test_a_file_that_is_missing_or_no_json_is_refused_likewise(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_text("{")
    for name in ("missing.json", "broken.json"):
        with pytest.raises(ResplitError, match=name) as refused:
            read(tmp_path / name)
        assert refused.value.code is ErrorCode.CORRUPT_FILE
