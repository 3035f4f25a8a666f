"""Lost words of plans in a world: `simulator.beacons`."""

from agent import guidance
from bus.streams import RETRY_S
from schemas.base import DeploymentName, NodeId
from schemas.beacon import BEACON_EVERY_S
from schemas.plan import PlanEvent, PlanPhase
from schemas.section import EventSection, nothing_of
from simulator.beacons import Beacons, Guide
from simulator.kernel import EPOCH, Kernel
from simulator.machine import Machine
from simulator.scenario import NodeSpec
from simulator.wishes import DEPLOYMENT

SPEC = NodeSpec(flops_per_s=1e12, bytes_per_s=1e10, memory_bytes=1 << 30)


class Process:
    """One that reads the log when it is told to."""

    def __init__(self, log: list[PlanEvent]) -> None:
        self.kernel, self.log = Kernel(), log
        self.taken: dict[DeploymentName, EventSection] = {}
        self.looked: list[float] = []
        self.connected = True
        machine = Machine(NodeId("a"), "home", SPEC, self.kernel)
        machine.start()
        self.guide = Guide(machine, lambda: self.kernel.now, lambda: self.taken, lambda: self.connected, self._look)

    def _look(self) -> None:
        self.looked.append(self.kernel.now)
        self.take()

    def take(self) -> None:
        self.taken = {event.deployment: nothing_of(event) for event in self.log}


def event(revision: int) -> PlanEvent:
    return PlanEvent(
        deployment=DEPLOYMENT, term=1, revision=revision, phase=PlanPhase.RETIRE, reason="it ends", issued_at=EPOCH
    )


def test_what_a_beacon_names_and_did_not_come_is_read_in_the_log() -> None:
    process, beacons = Process([event(1)]), Beacons()
    assert process.guide.misses(process.log)
    process.guide.heard(beacons.next(1, process.log, EPOCH))
    process.kernel.run(BEACON_EVERY_S)
    assert len(process.looked) == 1
    assert process.looked[0] <= 2 * guidance.TICK_S + RETRY_S
    assert not process.guide.misses(process.log)


def test_what_was_only_on_its_way_is_not_looked_for() -> None:
    process, beacons = Process([event(1)]), Beacons()
    process.guide.heard(beacons.next(1, process.log, EPOCH))
    process.kernel.after(guidance.TICK_S / 2, process.take)
    process.kernel.run(20.0)
    assert process.looked == []


def test_who_is_cut_off_looks_once_it_is_back() -> None:
    process, beacons = Process([event(1)]), Beacons()
    process.guide.heard(beacons.next(1, process.log, EPOCH))
    process.connected = False
    process.kernel.run(10.0)
    assert process.looked == []
    process.connected = True
    process.kernel.run(12.0)
    assert len(process.looked) == 1


def test_a_later_event_is_looked_for_too() -> None:
    process, beacons = Process([event(1)]), Beacons()
    process.guide.heard(beacons.next(1, process.log, EPOCH))
    process.kernel.run(3.0)
    process.log[:] = [event(2)]
    process.guide.heard(beacons.next(1, process.log, EPOCH))
    process.kernel.run(6.0)
    assert len(process.looked) == 2
