"""What a run leaves behind: what became of every request, what every node did, and when what was decided.

Times are seconds of virtual time since the beginning of the run.
"""

from dataclasses import dataclass, field
from hashlib import sha256
from typing import Literal

from schemas.base import NodeId
from schemas.deployment import Placement


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request as it comes, the same for every policy."""

    number: int
    at_s: float
    name: str
    """Its class."""
    site: str
    prompt_tokens: int
    output_tokens: int


@dataclass(slots=True)
class Outcome:
    """What became of it. Times are those at its client."""

    arrival: Arrival
    first_s: float | None = None
    """When its first token was there."""
    last_s: float | None = None
    """When its last one was; None if it did not end in output."""
    tokens: int = 0
    error: str | None = None
    """The code it was refused or ended with."""
    gap_s: float = 0.0
    """The longest time between two of its tokens."""
    exposed: bool = False
    """Whether what it computed reached an untrusted node."""
    recovered: int = 0
    """How often it was computed anew."""
    compute_s: float = 0.0
    """Seconds of nodes' time spent on it, what was computed in vain included."""
    energy_j: float = 0.0


@dataclass(frozen=True, slots=True)
class Epoch:
    """A plan from when it came into force to when another did (or the run ended)."""

    epoch: int
    begin_s: float
    end_s: float
    placement: Placement
    cause: str
    """As the audit names it: `first_plan`, `node_lost`, `better_plan`, and so on."""
    reason: str


@dataclass(frozen=True, slots=True)
class Spell:
    """A node or a link was not as it should be."""

    what: str
    """A node, a site, `cloud-links` or `orchestrator`."""
    kind: str
    """A `Fault.kind`."""
    begin_s: float
    end_s: float
    factor: float = 1.0


@dataclass(slots=True)
class NodeUse:
    """What one node did over the whole run."""

    node: NodeId
    alive_s: float = 0.0
    hosting_s: float = 0.0
    """It was part of the plan in force."""
    busy_s: float = 0.0
    good_s: float = 0.0
    """Of that, for requests that met all that they were held to."""
    energy_j: float = 0.0
    memory_peak: float = 0.0
    """Share of its memory."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The state of a whole second, for plots."""

    at_s: float
    running: int
    waiting: int
    busy: float
    """Mean over the nodes of the plan in force."""


@dataclass
class RunResult:
    """One run of one policy on one seed."""

    scenario: str
    policy: str
    seed: int
    trace_hash: str
    """Of all that was drawn: two runs of one seed have the same world, whatever decides in it."""
    begin_s: float
    end_s: float
    """Between these, requests arrived."""
    timeout_s: float
    outcomes: list[Outcome]
    epochs: list[Epoch] = field(default_factory=list)
    spells: list[Spell] = field(default_factory=list)
    nodes: list[NodeUse] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)
    moved_bytes: float = 0.0
    """Of weights and caches, because a plan moved."""
    aborts: int = 0
    planner_s: float = 0.0
    """Processor time spent deciding (real, not virtual)."""
    gap: float | None = None
    """By how much more the plans in force truly cost than the cheapest at every time (`simulator.pricing`)."""
    phi: float | None = None
    """Mean over time of what the plan in force truly cost, the price of its moves included."""
    phi_bound: float | None = None
    """The same of the cheapest candidate at every time, moves being free: a bound, not a policy."""
    violations: list[str] = field(default_factory=list)
    """Invariants broken: there must be none."""
    events: int = 0
    wall_s: float = 0.0
    finished: Literal["whole", "cut short"] = "whole"

    @property
    def fingerprint(self) -> str:
        """Equal for two runs in which the same happened to everybody at the same time."""
        fates = [(o.arrival.number, o.first_s, o.last_s, o.tokens, o.error) for o in self.outcomes]
        plans = [(one.epoch, one.begin_s, one.cause, one.reason) for one in self.epochs]
        busy = [(use.node, use.busy_s) for use in self.nodes]
        return sha256(repr((self.trace_hash, self.events, fates, plans, busy)).encode()).hexdigest()
