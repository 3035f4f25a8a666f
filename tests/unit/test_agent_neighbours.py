"""Which processes of its peers are over for a node: `agent.neighbours`."""

import pytest

from agent.neighbours import BOOTS_KEPT, IN_FLIGHT_S, NOBODY, SILENT_S, Neighbours
from agent.numbers import boot_number_of, sequence_numbers
from schemas.base import NodeId
from schemas.heartbeat import presence_of
from tests.unit.test_profiler_cost import capacity

PEER = NodeId("n1")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def node(clock: Clock) -> Neighbours:
    async def probe(_: NodeId) -> None:
        raise AssertionError("nobody is looked for here")

    return Neighbours(NodeId("n0"), "own", clock, probe, lambda _: None, lambda _: None)


def beat(node: Neighbours, boot: str, sequence: int) -> bool:
    return node.heard(presence_of(capacity(PEER, boot=boot, sequence=sequence)))


def test_a_process_that_is_heard_is_not_over_and_one_before_it_is(node: Neighbours) -> None:
    assert beat(node, "old", 7)
    assert not node.is_over(PEER, "old")
    assert beat(node, "new", 0)
    assert node.is_over(PEER, "old")
    assert not node.is_over(PEER, "new")
    assert not beat(node, "old", 8), "it was on its way"
    assert not node.is_over(PEER, "new")


def test_what_the_orchestrator_holds_for_lost_is_over_also_where_it_was_never_heard(node: Neighbours) -> None:
    assert not node.is_over(PEER, "any")
    node.declared([PEER])
    assert node.is_over(PEER, "any")


def test_a_heartbeat_that_was_on_its_way_does_not_revive_the_dead(node: Neighbours, clock: Clock) -> None:
    beat(node, "b", 1)
    node.declared([PEER])
    clock.now += IN_FLIGHT_S / 2
    assert beat(node, "b", 2)
    assert node.is_over(PEER, "b")


def test_nor_does_the_first_one_that_is_heard_of_it(node: Neighbours, clock: Clock) -> None:
    node.declared([PEER])
    clock.now += IN_FLIGHT_S / 2
    assert beat(node, "b", 1)
    assert node.is_over(PEER, "b")


@pytest.mark.parametrize("lose", [Neighbours.lose, lambda node, peer: node.declared([peer])])
def test_one_that_was_thought_lost_is_back_once_it_goes_on_speaking(
    node: Neighbours, clock: Clock, lose: object
) -> None:
    beat(node, "b", 1)
    assert callable(lose)
    lose(node, PEER)
    assert node.is_over(PEER, "b")
    clock.now += IN_FLIGHT_S
    beat(node, "b", 2)
    assert not node.is_over(PEER, "b")
    assert not node.lost


def test_a_new_process_of_a_lost_node_is_not_over(node: Neighbours, clock: Clock) -> None:
    beat(node, "old", 1)
    node.lose(PEER)
    clock.now += IN_FLIGHT_S / 2
    beat(node, "new", 0)
    assert node.is_over(PEER, "old")
    assert not node.is_over(PEER, "new")


def test_silence_says_it_too_in_the_end(node: Neighbours, clock: Clock) -> None:
    beat(node, "b", 1)
    clock.now += SILENT_S + 1
    assert node.is_over(PEER, "b")


def test_what_a_process_that_was_replaced_drove_is_gone(node: Neighbours) -> None:
    old, new = (next(sequence_numbers(PEER, boot)) for boot in ("old", "new"))
    assert not node.is_gone(PEER, old), "nobody was heard yet"
    beat(node, "old", 0)
    assert not node.is_gone(PEER, old)
    assert not node.is_gone(PEER, new), "frames may overtake the first heartbeat"
    beat(node, "new", 0)
    assert node.is_gone(PEER, old)
    assert not node.is_gone(PEER, new)
    assert node.numbers[PEER] == boot_number_of(new)


def test_what_a_process_that_was_found_gone_drives_counts_and_is_nobodys_if_it_stands_still(
    node: Neighbours, clock: Clock
) -> None:
    sequence = next(sequence_numbers(PEER, "b"))
    beat(node, "b", 0)
    assert node.lose(PEER)
    assert not node.is_gone(PEER, sequence), "it may be cut off from the bus alone"
    assert node.numbers[PEER] == NOBODY
    clock.now += IN_FLIGHT_S
    beat(node, "b", 1)
    assert node.numbers[PEER] == boot_number_of(sequence)


def test_only_so_many_processes_of_a_node_are_remembered(node: Neighbours) -> None:
    boots = [f"b{number}" for number in range(BOOTS_KEPT + 2)]
    for boot in boots:
        beat(node, boot, 0)
    drove = [next(sequence_numbers(PEER, boot)) for boot in boots]
    assert [node.is_gone(PEER, one) for one in drove] == [False, False, *[True] * (BOOTS_KEPT - 1), False]


def test_what_an_earlier_process_of_its_own_drove_is_gone(node: Neighbours) -> None:
    assert not node.is_gone(NodeId("n0"), next(sequence_numbers(NodeId("n0"), "own")))
    assert node.is_gone(NodeId("n0"), next(sequence_numbers(NodeId("n0"), "before")))
