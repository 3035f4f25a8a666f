"""Virtual time: `simulator.kernel` and `simulator.machine`."""

from schemas.base import NodeId
from simulator.kernel import EPOCH, Kernel
from simulator.machine import Machine
from simulator.scenario import NodeSpec

SPEC = NodeSpec(flops_per_s=1e12, bytes_per_s=1e10, memory_bytes=1 << 30)


def test_what_is_due_happens_in_order_of_time_and_then_of_asking() -> None:
    kernel, seen = Kernel(), list[str]()
    kernel.at(2.0, lambda: seen.append("late"))
    kernel.at(1.0, lambda: seen.append("first"))
    kernel.at(1.0, lambda: seen.append("second"))
    kernel.run(1.5)
    assert seen == ["first", "second"]
    assert kernel.now == 1.5
    kernel.run(3.0)
    assert seen == ["first", "second", "late"]
    assert (kernel.date - EPOCH).total_seconds() == 3.0


def test_what_is_asked_for_in_the_past_happens_now() -> None:
    kernel, seen = Kernel(), list[float]()
    kernel.at(1.0, lambda: kernel.at(0.5, lambda: seen.append(kernel.now)))
    kernel.run(2.0)
    assert seen == [1.0]


def test_what_comes_again_and_again_ends_when_it_says_so() -> None:
    kernel, seen = Kernel(), list[float]()

    def call() -> bool:
        seen.append(kernel.now)
        return len(seen) < 3

    kernel.every(1.0, call)
    kernel.run(10.0)
    assert seen == [1.0, 2.0, 3.0]


def test_a_machine_that_hangs_does_later_what_was_due_and_one_that_died_never() -> None:
    kernel, seen = Kernel(), list[tuple[str, float]]()
    machine = Machine(NodeId("a-0"), "a", SPEC, kernel)
    machine.start()
    machine.later(1.0, lambda: seen.append(("hung", kernel.now)))
    kernel.at(0.5, machine.hang)
    kernel.at(2.0, machine.go_on)
    kernel.run(3.0)
    assert seen == [("hung", 2.0)]
    machine.later(1.0, lambda: seen.append(("dead", kernel.now)))
    machine.kill()
    machine.start()
    kernel.run(5.0)
    assert seen == [("hung", 2.0)], "what an earlier process wanted is not done by a later one"
