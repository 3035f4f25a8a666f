"""Who answers for the requests of an ingress that is gone: `agent.heirs` in virtual time, on the same journal."""

from collections.abc import Callable, Mapping
from typing import Any, cast

from agent.desk import Desk
from agent.generation import Generation
from agent.heirs import goes_on, life_name, process_of
from agent.intake import Job
from agent.served import Served
from bus.journal import Journal
from schemas.base import DeploymentName, LifeId, NodeId, RequestId
from schemas.errors import ResplitError
from schemas.frame import Token
from schemas.plan import Plan
from schemas.request import TextRequest
from simulator.journal import Life, Owed, SimJournal, Stream, fence
from simulator.machine import Machine

LOOK_AGAIN_S = (0.003, 0.3, 1.0)
FENCE_S = 0.006
"""A fence, and to read what it closed."""

MakeJob = Callable[[TextRequest, RequestId, Any, float, Plan], Generation]


class Heirs:
    """The lives of one process as an ingress, and those that it takes over."""

    def __init__(
        self,
        machine: Machine,
        boot: str,
        stream: Stream,
        served: Mapping[DeploymentName, Served],
        in_flight: dict[RequestId, tuple[Served, Job]],
        desk: Desk,
        is_over: Callable[[NodeId, str], bool],
        reaches_bus: Callable[[], bool],
        job: MakeJob,
    ) -> None:
        """`served` and `in_flight` are its ingress', which has them change; `job(request, id, client, arrived, plan)`
        is a request as it runs."""
        self._machine = machine
        self._boot = boot
        self._stream = stream
        self._served = served
        self._in_flight = in_flight
        self._desk = desk
        self._is_over = is_over
        self._reaches_bus = reaches_bus
        self._job = job
        self._lives = 0
        self._own: set[LifeId] = set()
        self._taken: dict[tuple[LifeId, LifeId], set[RequestId]] = {}
        """Requests of the second that the first has taken over."""

    def begin_life(self, name: DeploymentName) -> tuple[LifeId, Journal]:
        life = life_name(self._machine.name, self._boot, self._lives)
        self._lives += 1
        self._own.add(life)
        journal = SimJournal(
            self._stream, Life(life, name), self._machine, self._reaches_bus, lambda: self._superseded(name, life)
        )
        return life, cast(Journal, journal)

    def _superseded(self, name: DeploymentName, life: LifeId) -> None:
        served = self._served.get(name)
        self._own.discard(life)
        if served is None or served.life != life:
            return
        served.superseded()
        served.life, served.journal = self.begin_life(name)

    def look(self) -> None:
        """Something began or ended: see, now and a few times after, whether there is anything to take over."""
        for delay_s in LOOK_AGAIN_S:
            self._machine.later(delay_s, self.see)

    def see(self) -> None:
        """Take over what is over, of the deployments that are served here."""
        if not self._reaches_bus():
            return
        for served in self._served.values():
            every = [life for life in self._stream.values() if life.deployment == served.name]
            fences = {life.name: life.fenced_by for life in every}
            found = [life for life in every if not life.done]
            heirs = {life.fenced_by for life in found}
            for life in sorted(found, key=lambda life: life.name not in heirs):
                mine = life.name in self._own
                over = life.fenced_by is not None or (not mine and self._is_over(*process_of(life.name)))
                if life.name != served.life and over:
                    self._take_over(served, life, goes_on(life.fenced_by, fences))

    def _take_over(self, served: Served, life: Life, begun_by: LifeId | None) -> None:
        by = life.fenced_by
        others = by is not None and by != served.life
        over = begun_by is None or self._is_over(*process_of(begun_by))
        if begun_by != served.life and (not served.runs.current or not over):
            return
        if by == served.life and (served.life, life.name) in self._taken:
            return
        try:
            owed = fence(self._stream, life.name, served.life, by if others else None)
        except ResplitError:
            return
        taken = self._taken.setdefault((served.life, life.name), set())
        self._machine.later(FENCE_S, lambda: self._adopt(served, life, owed, taken))

    def _adopt(self, served: Served, life: Life, owed: tuple[Owed, ...], taken: set[RequestId]) -> None:
        if served.runs.newest is None:
            return
        plan, journal = served.runs.newest.plan, cast(SimJournal, served.journal)
        new = [one for one in owed if one.job.request_id not in self._in_flight.keys() | taken]
        new.sort(key=lambda one: not one.tokens)
        left = len(new)
        jobs: list[tuple[Generation, list[Token]]] = []

        def all_stored() -> None:
            for other in self._stream.values():
                if other.fenced_by == life.name and not other.done:  # it may owe the same requests still
                    self._taken.setdefault((served.life, other.name), set()).update(taken)
            served.resume([(job, said) for job, said in jobs if self._desk.holds(job)])
            life.owed.clear()
            life.done = True

        def one_stored(job: Generation, tokens: list[int], handle: int | None) -> None:
            nonlocal left
            left -= 1
            if handle is None:
                self._desk.drop(job)
            else:
                job.handle = handle
                taken.add(job.request_id)
                jobs.append((job, [Token(0, 0, i, token) for i, token in enumerate(tokens)]))
            if left == 0 and len(jobs) == len(new):
                all_stored()

        if not new:
            # What is in flight here is answered here only if this life is not over too, which it may not have heard.
            journal.confirm(all_stored)
        for one in new:
            before = one.job
            job = self._job(before.request, before.request_id, before.reply, before.meter.arrived, plan)
            job.max_tokens = before.max_tokens
            self._in_flight[job.request_id] = (served, job)
            tokens = list(one.tokens)
            journal.accept(job, tokens, lambda handle, job=job, tokens=tokens: one_stored(job, tokens, handle))  # type: ignore[misc]
