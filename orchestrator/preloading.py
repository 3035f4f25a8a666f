"""PURE: which deployment on demand is loaded before it is asked for, and who goes cold for it (`mathematics.md`, C3).

What memory holds is worth what requests would wait without it: how often they are expected, times how long waking took.
The cold one that is worth most is loaded if it fits; else in the place of such that run nothing and are worth less
together, by more than what loading it costs, over the time in which that is to be paid back.
"""

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta

from orchestrator.cold import may_go_cold, size_bytes, without
from orchestrator.fold import Snapshot
from orchestrator.residency.memory import Memory, Use, greedy_dual, leaving
from orchestrator.residency.popularity import Popularity
from schemas.base import DeploymentName

LOOK = timedelta(seconds=10)
"""Between two looks."""
PAID_BACK_S = 300.0
"""In which what is loaded ahead of need is to be worth what loading it costs."""
PRICE = 3.0
"""What loading costs, in waits: nodes read, verify and warm blocks while others compute."""
WAKES_S = 1.0
"""How long waking takes where nobody has seen it."""
TRIED = 3
"""Cold deployments that are looked at, those worth most: each takes some plans."""
LIKELY = 0.5
"""Requests that must be expected in that time: what next to nobody asks for is not loaded for nobody."""


@dataclass(frozen=True, eq=False)
class Expected:
    """How often each deployment on demand is asked for."""

    names: tuple[DeploymentName, ...] = ()
    popularity: Popularity = field(default_factory=lambda: Popularity.unheard(1, 0))
    at: datetime | None = None

    def heard(self, snapshot: Snapshot, now: datetime) -> "Expected":
        """After what arrived since."""
        names = tuple(sorted(name for name, one in snapshot.deployments.items() if one.on_demand))
        popularity = self.popularity if names == self.names else self._of(names)
        if self.at is None:
            return Expected(names, popularity, now)
        fresh = [_since(snapshot, name, self.at) for name in names]
        counts = popularity.counts.copy()
        counts[0, :] = fresh
        return Expected(names, popularity.after(counts, (now - self.at).total_seconds()), now)

    def rates(self) -> Mapping[DeploymentName, float]:
        """Requests a second."""
        return dict(zip(self.names, self.popularity.rates[0].tolist(), strict=True)) if self.names else {}

    def _of(self, names: tuple[DeploymentName, ...]) -> Popularity:
        """The same of other deployments: what is known of those that stay is kept."""
        fresh = Popularity.unheard(1, len(names))
        known = dict(zip(self.names, self.popularity.counts[0].tolist(), strict=True)) if self.names else {}
        fresh.counts[0, :] = [known.get(name, 0.0) for name in names]
        return replace(fresh, seconds=self.popularity.seconds)


@dataclass(frozen=True)
class Preload:
    """What is to be loaded, and who goes cold first."""

    name: DeploymentName
    leaving: tuple[DeploymentName, ...]
    why: str


def _since(snapshot: Snapshot, name: DeploymentName, at: datetime) -> float:
    arrivals = snapshot.arrivals.get(name)
    return 0.0 if arrivals is None else float(sum(count for when, count in arrivals.counts if when > at))


def wakes_s(snapshot: Snapshot, name: DeploymentName) -> float:
    """How long a request waits for a deployment that is cold."""
    rollout = snapshot.rollout(name)
    found = rollout.loads_s if rollout.woke_s is None else rollout.woke_s
    return WAKES_S if found is None else found


def to_preload(
    snapshot: Snapshot,
    rates: Mapping[DeploymentName, float],
    fits: Callable[[Snapshot, DeploymentName], bool],
    now: datetime,
) -> Preload | None:
    """What is worth loading now, if anything is. `fits`: whether a deployment could be planned in a snapshot."""
    worth = {name: rate * wakes_s(snapshot, name) for name, rate in rates.items()}
    cold = [name for name in worth if _is_idle_and_cold(snapshot, name) and rates[name] * PAID_BACK_S >= LIKELY]
    for name in sorted(cold, key=lambda one: (-worth[one], one))[:TRIED]:
        said = f"{60.0 * rates[name]:.2f} requests a minute are expected"
        if fits(snapshot, name):
            return Preload(name, (), said)
        idle = [other for other in worth if may_go_cold(snapshot, other, now, while_busy=False)]
        gone = leaving(_by_worth(snapshot, worth, idle), idle, greedy_dual, _enough(snapshot, name, fits))
        if not gone:
            continue
        lost = sum(worth[other] for other in gone)
        gain = worth[name] - lost - PRICE * (snapshot.rollout(name).loads_s or WAKES_S) / PAID_BACK_S
        if gain > 0.0:
            return Preload(name, gone, f"{said}, of {', '.join(gone)} fewer")
    return None


def _is_idle_and_cold(snapshot: Snapshot, name: DeploymentName) -> bool:
    rollout = snapshot.rollout(name)
    return rollout.current is not None and rollout.current.cold and rollout.candidate is None and not rollout.draining


def _by_worth(
    snapshot: Snapshot, worth: Mapping[DeploymentName, float], names: list[DeploymentName]
) -> Memory[DeploymentName]:
    """Credits by what each is worth for its bytes."""
    return Memory({name: Use(0.0, 0.0, worth[name] / max(1, size_bytes(snapshot, name))) for name in names})


def _enough(
    snapshot: Snapshot, name: DeploymentName, fits: Callable[[Snapshot, DeploymentName], bool]
) -> Callable[[Set[DeploymentName]], bool]:
    return lambda gone: fits(without(snapshot, gone), name)
