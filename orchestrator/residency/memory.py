"""PURE: what leaves a memory to make room (`mathematics.md`, C3).

GreedyDual-Size (Cao and Irani 1997; Landlord, Young 2002): what is used gets a credit of what loading it again would
cost for each byte, on top of the level; the least credit goes first, and the level rises to it. LRU and LFU are the
same with another credit.
"""

from collections.abc import Callable, Collection, Mapping, Set
from dataclasses import dataclass, field, replace
from typing import Generic, Literal, TypeVar

K = TypeVar("K", bound=str)


@dataclass(frozen=True)
class Use:
    """What is known of one that was used."""

    uses: float
    at_s: float
    """The last time."""
    credit: float


@dataclass(frozen=True)
class Memory(Generic[K]):
    """What was used, by whom it may be asked for again."""

    used: Mapping[K, Use] = field(default_factory=dict)
    level: float = 0.0

    def use(self, key: K, load_s: float, size_bytes: float, now_s: float) -> "Memory[K]":
        """After one was used that takes so long to load, for so many bytes."""
        before = self.used.get(key)
        credit = self.level + load_s / max(size_bytes, 1.0)
        use = Use(1.0 if before is None else before.uses + 1.0, now_s, credit)
        return replace(self, used={**self.used, key: use})

    def without(self, gone: Collection[K]) -> "Memory[K]":
        """After these left: whatever comes next must be worth as much as they were."""
        left = [self.used[key].credit for key in gone if key in self.used]
        kept = {key: use for key, use in self.used.items() if key not in gone}
        return Memory(kept, max([self.level, *left]))


Rule = Callable[[Use], float]
"""What is least goes first."""
UNUSED = Use(0.0, float("-inf"), float("-inf"))


def greedy_dual(use: Use) -> float:
    return use.credit


def least_recent(use: Use) -> float:
    return use.at_s


def least_frequent(use: Use) -> float:
    return use.uses


Keeping = Literal["worth", "recent"]
"""Whom memories keep: what is worth most for its bytes, loaded ahead of need too; or what was used last (LRU), and
nothing before it is asked for."""
RULES: Mapping[Keeping, Rule] = {"worth": greedy_dual, "recent": least_recent}


def leaving(
    memory: Memory[K], held: Collection[K], rule: Rule, enough: Callable[[Set[K]], bool], kept: Collection[K] = ()
) -> tuple[K, ...] | None:
    """Who goes, the least first, until there is `enough` room without them; None if there never is. `kept` stay. One
    that went for nothing, since others freed what it was to free, stays too."""
    gone: list[K] = []
    for key in sorted(
        (key for key in held if key not in kept), key=lambda key: (rule(memory.used.get(key, UNUSED)), key)
    ):
        if enough(set(gone)):
            break
        gone.append(key)
    if not enough(set(gone)):
        return None
    for key in reversed(gone[:-1]):
        if enough(set(gone) - {key}):
            gone.remove(key)
    return tuple(gone)
