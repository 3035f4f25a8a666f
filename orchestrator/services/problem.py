"""PURE: what is known when services are placed: services, the tasks that use them, nodes, and the ways between them.

Times are milliseconds, work and data megabytes, rates megabytes a millisecond, as in the paper's table
(arXiv 2601.19563, Table I); resources are in whatever unit a node has of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from math import inf

from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

SOURCE = "-"
"""In a task's graph: what the user sends."""


@dataclass(frozen=True)
class ServiceKind:
    """One service: what an instance needs, and how it works."""

    name: str
    is_core: bool
    needs: Mapping[str, float]
    """Resources of one instance, by name."""
    work: float
    """Of one request, MB."""
    output: float
    """What it passes on, MB."""
    rate: float
    """At which an instance works, MB/ms; of one whose rate varies, the mean."""
    keep_cost: float = 0.0
    """Of keeping one for a slot."""
    deploy_cost: float = 0.0
    """Of making one."""

    @property
    def mean_ms(self) -> float:
        """What a request takes at an instance that does nothing else."""
        return self.work / self.rate


@dataclass(frozen=True)
class TaskKind:
    """A way through the services, which requests of one kind take."""

    name: str
    after: Mapping[str, tuple[str, ...]]
    """By service: those whose outputs it waits for, `SOURCE` for what the user sends."""
    input: float
    """What the user sends, MB."""
    deadline_ms: float

    def __post_init__(self) -> None:
        unknown = {name for before in self.after.values() for name in before} - self.after.keys() - {SOURCE}
        if unknown:
            raise ResplitError(
                ErrorCode.INVALID_REQUEST, f"task {self.name!r} waits for {sorted(unknown)[0]!r}, which it does not use"
            )
        try:
            assert self.order
        except CycleError as error:
            ring = " -> ".join(error.args[1])
            raise ResplitError(ErrorCode.INVALID_REQUEST, f"task {self.name!r} goes round in a ring: {ring}") from error

    @cached_property
    def order(self) -> tuple[str, ...]:
        """Its services, none before one that it waits for."""
        return tuple(name for name in TopologicalSorter(self.after).static_order() if name != SOURCE)


@dataclass(frozen=True)
class Host:
    """A node, as services see it."""

    name: NodeId
    site: str
    has: Mapping[str, float]
    """Resources, by name."""
    fails: float = 0.0
    """The probability that it is away when it is needed."""


@dataclass(frozen=True)
class Ways:
    """How data gets from one node to another."""

    mb_per_ms: Mapping[tuple[NodeId, NodeId], float] = field(default_factory=dict)
    """By pair, in the order of travel; a pair that is not there is not joined. Nothing takes no time on one node."""
    delay_ms: Mapping[tuple[NodeId, NodeId], float] = field(default_factory=dict)
    """What a byte travels; 0 where it is not said."""

    def ms(self, data: float, source: NodeId, target: NodeId) -> float:
        """What so many MB take; infinite where no way leads."""
        if source == target:
            return 0.0
        rate = self.mb_per_ms.get((source, target), 0.0)
        return inf if rate <= 0.0 else data / rate + self.delay_ms.get((source, target), 0.0)


@dataclass(frozen=True)
class Stream:
    """Requests of one kind that come in at one node."""

    task: str
    at: NodeId
    per_slot: float
    """Expected requests."""


@dataclass(frozen=True)
class Setting:
    """All of it."""

    services: Mapping[str, ServiceKind]
    tasks: Mapping[str, TaskKind]
    hosts: Mapping[NodeId, Host]
    ways: Ways
    streams: tuple[Stream, ...]
