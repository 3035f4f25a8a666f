"""PURE: what is worth its place on a disk, in hindsight (`mathematics.md`, C3).

RetroRenting (Narayana and Moharir 2021): what is not there is fetched as soon as having had it, from some moment on
until now, would have paid for the fetch; what is there goes once not having had it would have. Neither looks ahead.
Room that others want costs rent too: what a byte of the least useful thing on a full disk is worth.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

K = TypeVar("K")


@dataclass(frozen=True)
class Ledger(Generic[K]):
    """What having, or not having, each would have saved so far."""

    had: Mapping[K, float] = field(default_factory=dict)
    """Of those that are not there, and"""
    not_had: Mapping[K, float] = field(default_factory=dict)
    """of those that are."""


@dataclass(frozen=True)
class Term:
    """One thing over the last time."""

    saved: float
    """What it saved, or would have, in that time."""
    rent: float
    """What its place cost."""
    fetch: float
    """What it costs to get it there."""


def renewed(ledger: Ledger[K], terms: Mapping[K, Term], there: frozenset[K]) -> Ledger[K]:
    """After another time."""
    had = {key: max(0.0, ledger.had.get(key, 0.0) + t.saved - t.rent) for key, t in terms.items() if key not in there}
    not_had = {
        key: max(0.0, ledger.not_had.get(key, 0.0) + t.rent - t.saved) for key, t in terms.items() if key in there
    }
    return Ledger(had, not_had)


def to_fetch(ledger: Ledger[K], terms: Mapping[K, Term]) -> list[K]:
    """What would have paid for its fetch, that first which would have by most."""
    due = [
        (sum_ - terms[key].fetch, key) for key, sum_ in ledger.had.items() if sum_ > 0.0 and sum_ >= terms[key].fetch
    ]
    return [key for _, key in sorted(due, key=lambda one: -one[0])]


def to_drop(ledger: Ledger[K], terms: Mapping[K, Term]) -> list[K]:
    """What costs more than it saves, and has for so long that fetching it again would have been cheaper."""
    return [key for key, sum_ in ledger.not_had.items() if sum_ > 0.0 and sum_ >= terms[key].fetch]
