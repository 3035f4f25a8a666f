"""PURE: what is known when services are placed: services, the tasks that use them, nodes, and the ways between them.

Times are milliseconds, work and data megabytes, rates megabytes a millisecond, as in the paper's table
(arXiv 2601.19563, Table I); resources are in whatever unit a node has of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from graphlib import CycleError, TopologicalSorter
from math import inf

import numpy as np
import numpy.typing as npt

from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

NOTHING = 1e-12
"""MB: what is sent where a service passes nothing on. No way is infinitely long even for that."""
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
    least: int = 0
    """Instances that there are to be at least, over all nodes,"""
    most: float = inf
    """and at most on one node."""
    nodes: frozenset[NodeId] | None = None
    """Nodes that may have it; None: any."""

    def may_be_at(self, node: NodeId) -> bool:
        """Whether the node may have it."""
        return self.nodes is None or node in self.nodes

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

    @cached_property
    def last(self) -> tuple[str, ...]:
        """Those that nothing waits for: when all of them are done, a request is."""
        inner = {before for befores in self.after.values() for before in befores}
        return tuple(name for name in self.order if name not in inner)


@dataclass(frozen=True)
class Host:
    """A node, as services see it."""

    name: NodeId
    site: str
    has: Mapping[str, float]
    """Resources, by name."""
    fails: float = 0.0
    """The probability that it is away when it is needed."""
    speed: float = 1.0
    """How many times as fast services work here as they are said to."""


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
        per_mb = self._ms_per_mb(source, target)
        return inf if per_mb == inf else data * per_mb + self.delay_ms.get((source, target), 0.0)

    def _ms_per_mb(self, source: NodeId, target: NodeId) -> float:
        if source == target:
            return 0.0
        rate = self.mb_per_ms.get((source, target), 0.0)
        return 1.0 / rate if rate > 0.0 else inf

    def table(self, nodes: tuple[NodeId, ...]) -> "Table":
        """The same as arrays, made once."""
        if (found := self._tables.get(nodes)) is None:
            found = Table(
                {node: number for number, node in enumerate(nodes)},
                np.array([[self._ms_per_mb(a, b) for b in nodes] for a in nodes]),
                np.array([[0.0 if a == b else self.delay_ms.get((a, b), 0.0) for b in nodes] for a in nodes]),
            )
            self._tables[nodes] = found
        return found

    @cached_property
    def _tables(self) -> dict[tuple[NodeId, ...], "Table"]:
        return {}


@dataclass(frozen=True, eq=False)
class Table:
    """Ways between nodes that are numbered."""

    number: Mapping[NodeId, int]
    ms_per_mb: Floats
    """[source, target], infinite where no way leads."""
    delay_ms: Floats

    def all_ms(self, data: float, source: int) -> Floats:
        """What so many MB take from one node to each."""
        return np.asarray(max(data, NOTHING) * self.ms_per_mb[source] + self.delay_ms[source])

    def ms(self, data: float, sources: Ints, targets: Ints) -> Floats:
        """What so many MB take from each of `sources` to the same one of `targets`."""
        return max(data, NOTHING) * self.ms_per_mb[sources, targets] + self.delay_ms[sources, targets]


@dataclass(frozen=True)
class Stream:
    """Requests of one kind that come in at one node."""

    task: str
    at: NodeId
    per_slot: float
    """Expected requests."""
    ages_ms: tuple[float, ...] = (0.0,)
    """How old a request is when it comes in, each of these as likely: what it took from the user."""
    part: int = 0
    """Which of several parts it is of what comes in there, each of which goes its own way."""

    def in_parts(self, count: int) -> tuple["Stream", ...]:
        """So many equal parts."""
        return tuple(replace(self, per_slot=self.per_slot / count, part=part) for part in range(count))


@dataclass(frozen=True)
class Setting:
    """All of it."""

    services: Mapping[str, ServiceKind]
    tasks: Mapping[str, TaskKind]
    hosts: Mapping[NodeId, Host]
    ways: Ways
    streams: tuple[Stream, ...]

    def passed_on(self, task: TaskKind, before: str) -> float:
        """MB that a service passes on, or for `SOURCE` the user."""
        return task.input if before == SOURCE else self.services[before].output

    def room(self, placed: Mapping[tuple[NodeId, str], int]) -> dict[NodeId, dict[str, float]]:
        """What instances leave of each node's resources."""
        left = {node: dict(host.has) for node, host in self.hosts.items()}
        for (node, name), count in placed.items():
            for key, need in self.services[name].needs.items():
                left[node][key] = left[node].get(key, 0.0) - count * need
        return left

    @cached_property
    def nodes(self) -> tuple[NodeId, ...]:
        return tuple(self.hosts)

    @cached_property
    def speeds(self) -> Floats:
        """Of the nodes, in the order of `hosts`."""
        return np.array([host.speed for host in self.hosts.values()])

    @cached_property
    def resources(self) -> tuple[str, ...]:
        """All that any service needs, in one order."""
        return tuple(dict.fromkeys(key for kind in self.services.values() for key in kind.needs))

    @cached_property
    def numbers(self) -> Mapping[NodeId, int]:
        """Of the nodes, in the order of `hosts`."""
        return self.table.number

    @cached_property
    def table(self) -> Table:
        """The ways between the nodes, numbered."""
        return self.ways.table(self.nodes)
