"""The model in Ray actors, driven by a loop. Runs in the peers' environment, which has `ray`.

    python ray_driver.py STAGES.json ...

Each file's stages are a chain, an actor for each. A chain is called in one of two ways: `loop` calls one actor after
the other, the reference of what each returns handed to the next; `compiled` has Ray compile the chain
(`experimental_compile`). Ray starts actors that die again. Commands and answers are those of `stage.py`, with the
`chain` (a number) and the `way`; `pids` tells the processes of a chain, `compile` and `tear_down` begin and end the
compiled way, `restart` ends and starts its actors.
"""

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.dag import InputNode
from stage import Stage, answer, own_output, serve

FOREVER = -1
STEP_S = 14.0
"""A step that takes longer is given up."""
STARTS_S = 60.0
POLL_S = 0.05


@ray.remote(num_cpus=0, max_restarts=FOREVER)
class Actor(Stage):  # type: ignore[misc]  # found beside this file, not as a module of a package
    """A stage in a process of its own."""

    def pid(self) -> int:
        """Of that process."""
        return os.getpid()


class Chain:
    """The actors of consecutive stages, and how they are called."""

    def __init__(self, stages: list[dict[str, Any]]) -> None:
        self._stages = stages
        self._compiled: Any = None
        self._actors: list[Any] = []
        self.start()

    def start(self) -> None:
        """Every actor anew."""
        self.tear_down()
        for actor in self._actors:
            ray.kill(actor)
        self._actors = [Actor.remote(stage) for stage in self._stages]
        self.pids()

    def pids(self) -> list[int]:
        """The processes of the actors, first stage first; waits until all are there."""
        return [self._pid(actor) for actor in self._actors]

    def _pid(self, actor: Any) -> int:
        until = time.monotonic() + STARTS_S
        while True:
            try:
                return int(ray.get(actor.pid.remote(), timeout=STARTS_S))
            except ray.exceptions.ActorUnavailableError:  # it was killed, and Ray starts it again
                if time.monotonic() > until:
                    raise
                time.sleep(POLL_S)

    def compile(self) -> None:
        """The chain as Ray compiles it, over the actors that there are."""
        self.tear_down()
        with InputNode() as node:
            for actor in self._actors:
                node = actor.step.bind(node)  # noqa: PLW2901 - as Ray's documents have it
        self._compiled = node.experimental_compile()

    def tear_down(self) -> None:
        """End what was compiled: its actors wait for the next call by asking again and again, a core each."""
        compiled, self._compiled = self._compiled, None
        if compiled is not None:
            compiled.teardown()

    def loop(self, position: int, ids: list[int]) -> tuple[int, int]:
        """A step through calls of the actors."""
        given: Any = (position, np.array([ids], np.int64))
        for actor in self._actors:
            given = actor.step.remote(given)
        return ray.get(given, timeout=STEP_S)  # type: ignore[no-any-return]

    def compiled(self, position: int, ids: list[int]) -> tuple[int, int]:
        """A step through the chain as Ray compiled it."""
        return ray.get(self._compiled.execute((position, np.array([ids], np.int64))), timeout=STEP_S)  # type: ignore[no-any-return]


def main() -> None:
    out = own_output()
    # Ray has its workers give way to everything else on the machine, which nobody beside it does.
    os.environ.setdefault("RAY_worker_niceness", "0")
    ray.init(include_dashboard=False, log_to_driver=False)
    chains = [Chain(json.loads(Path(path).read_text())) for path in sys.argv[1:]]

    def perform(command: dict[str, Any]) -> Iterator[dict[str, Any]]:
        chain = chains[command.pop("chain")]
        match command.pop("op"):
            case "answer":
                step = {"loop": chain.loop, "compiled": chain.compiled}[command.pop("way")]
                for token in answer(step, **command):
                    yield {"token": token}
            case "pids":
                yield {"pids": chain.pids()}
            case "compile":
                chain.compile()
            case "tear_down":
                chain.tear_down()
            case "restart":
                chain.start()

    serve(perform, out)


if __name__ == "__main__":
    main()
