"""The end of a world: once its faults are over, whatever was accepted ends, and it serves again, soon."""

from collections.abc import Sequence

from simulator.client import SimClient
from simulator.records import Arrival
from simulator.world import World

CHECK_S = 0.5
PROBES = 3


class Calm:
    """Waits for a world to come to rest, asks a few fresh requests, and lets it end as soon as all of them succeed.

    A round of them in which one fails is followed by another: what holds is that one succeeds before the world's time
    is over, not that the first does.
    """

    def __init__(self, world: World, begin_s: float) -> None:
        """To be made before `world` runs; nothing is asked before `begin_s`."""
        self._world = world
        self._begin_s = begin_s
        self._asked: list[SimClient] = []
        world.kernel.at(begin_s, lambda: world.kernel.every(CHECK_S, self._look, 0.0))

    @property
    def rounds(self) -> int:
        """How often it was asked."""
        return len(self._asked) // PROBES

    @property
    def served(self) -> bool:
        """Whether the whole of the last round was served."""
        last = self._asked[-PROBES:]
        return bool(last) and all(client.outcome.last_s is not None for client in last)

    def shortcomings(self) -> list[str]:
        """What is wrong at the end of the run."""
        found = [
            f"{client.request_id}, accepted, never ended ({client.outcome.tokens} tokens)"
            for client in self._world.clients
            if _owed(client)
        ]
        if not self.served:  # one that was served while a plan drained still is enough
            ends = ", ".join(f"{one.request_id}: {_end(one)}" for one in self._asked[-PROBES:])
            rest = "at rest" if self._world.at_rest else "not at rest"
            found.append(
                f"{self.rounds} rounds of requests in the calm, the world is {rest}; the last: {ends or 'none'}"
            )
        return found

    def _look(self) -> bool:
        last: Sequence[SimClient] = self._asked[-PROBES:]
        if any(not client.over for client in last) or any(map(_owed, self._world.clients)) or not self._world.at_rest:
            return True
        if self.served:
            self._world.kernel.stop()
            return False
        self._ask()
        return True

    def _ask(self) -> None:
        world, workload = self._world, self._world.scenario.workload
        for number in range(PROBES):
            what = workload.classes[number % len(workload.classes)]
            site = world.scenario.sites[number % len(world.scenario.sites)].name
            arrival = Arrival(
                len(world.clients), world.kernel.now, what.name, site, what.prompt_tokens, what.output_tokens
            )
            client = world.client(arrival)
            self._asked.append(client)
            world.ask(client)


def _end(client: SimClient) -> str:
    return "served" if client.outcome.last_s is not None else client.outcome.error or "no end"


def _owed(client: SimClient) -> bool:
    return bool(client.accepted) and not client.over
