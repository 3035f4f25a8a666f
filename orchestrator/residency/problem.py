"""PURE: what is known when it is decided which blocks lie where (`mathematics.md`, C1).

The unit is the piece: the weights of one block, which are there once however many models share them. A model can be
served in several ways, each of which needs some pieces on one node or on several; a request costs least where all of
them are in memory, more where they have to be loaded from disks first, and most where nothing of it is (what a cloud
costs, say, or a fetch). Costs are in seconds of one request's waiting, so that a price says how many of those a thing
is worth; rates are requests a second, sizes bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import inf

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_array

from schemas.base import NodeId
from schemas.errors import ErrorCode, ResplitError

Floats = npt.NDArray[np.float64]
Bools = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

Item = tuple[NodeId, str]
"""A piece on a node."""


@dataclass(frozen=True)
class Box:
    """What a node has."""

    name: NodeId
    disk_bytes: float
    memory_bytes: float
    work: float = inf
    """Seconds of work that may be done there in a second: rho_max, times how many requests run at once."""
    watts: float = inf
    """That serving may take on average."""
    fetch_bytes_per_s: float = inf
    """From the registry, or a cloud, to the disk."""
    load_bytes_per_s: float = inf
    """From the disk to where it computes: 1 / (1 / r_disk + 1 / r_pcie)."""
    setup_s: float = 0.0
    """Of each piece that is loaded: opening and warming a session."""


@dataclass(frozen=True)
class Piece:
    """The weights of a block."""

    name: str
    disk_bytes: float
    memory_bytes: float


@dataclass(frozen=True)
class Hosting:
    """One way to serve a model."""

    pieces: Mapping[NodeId, tuple[str, ...]]
    """What it needs, by node."""
    work_s: Mapping[NodeId, float] = field(default_factory=dict)
    """What a request takes of each node's work."""
    joules: Mapping[NodeId, float] = field(default_factory=dict)
    """And of its energy."""

    @cached_property
    def items(self) -> frozenset[Item]:
        return frozenset((node, piece) for node, pieces in self.pieces.items() for piece in pieces)


@dataclass(frozen=True, eq=False)
class Wanted:
    """A model, who asks for it, and how it can be served."""

    model: str
    hostings: tuple[Hosting, ...]
    rates: Floats
    """lambda, [callers]: requests a second."""
    resident: Floats
    """[callers, hostings]: what a request costs where everything is in memory; infinite where it cannot go there."""
    stored: Floats
    """Likewise where it has to be loaded first."""
    absent: Floats
    """[callers]: what one costs that none of these serves."""


@dataclass(frozen=True)
class Prices:
    """What makes bytes, energy and time of loading comparable with a request's waiting."""

    disk: float = 0.0
    """w_s, of a byte on a disk for a second."""
    memory: float = 0.0
    """w_g, likewise in memory."""
    joule: float = 0.0
    """w_e."""
    fetching: float = 0.0
    """w_t, of a second of fetching to a disk."""
    loading: float = 0.0
    """w_l, of a second of loading to memory."""


@dataclass(frozen=True)
class Lying:
    """What lies where."""

    stored: frozenset[Item] = frozenset()
    resident: frozenset[Item] = frozenset()
    """All of them stored, too."""


NOTHING = Lying()


@dataclass(frozen=True, eq=False)
class Setting:
    """Everything that is decided on. Raises `ResplitError(INVALID_REQUEST)` for a hosting that needs a node or a piece
    that there is not, and for figures that do not fit each other."""

    boxes: tuple[Box, ...]
    pieces: Mapping[str, Piece]
    wanted: tuple[Wanted, ...]
    prices: Prices = Prices()
    before: Lying = NOTHING
    """What lies where now."""
    period_s: float = inf
    """For how long it is decided: what changes now is paid back in that time. Infinite: changes cost nothing."""

    def __post_init__(self) -> None:
        known = {box.name for box in self.boxes}
        for one in self.wanted:
            shape = (len(one.rates), len(one.hostings))
            if one.resident.shape != shape or one.stored.shape != shape or one.absent.shape != shape[:1]:
                raise refused(f"model {one.model!r}: its costs are not of {shape[0]} callers and {shape[1]} hostings")
            if not (np.isfinite(one.rates).all() and (one.rates >= 0.0).all() and np.isfinite(one.absent).all()):
                raise refused(f"model {one.model!r}: rates are 0 or more, and a request that nothing serves costs too")
            for node, piece in (item for hosting in one.hostings for item in hosting.items):
                if node not in known or piece not in self.pieces:
                    raise refused(f"model {one.model!r} is to be served by {piece!r} on {node!r}: there is none")

    @cached_property
    def table(self) -> "Table":
        return Table(self)

    def of(self, chosen: "Chosen") -> Lying:
        """What lies where if everything lies there that some hostings need."""
        table = self.table
        resident, stored = table.needed(chosen.resident), table.needed(chosen.stored)
        return Lying(table.named(stored | resident), table.named(resident))


@dataclass(frozen=True, eq=False)
class Chosen:
    """Hostings by number, in the order of `Setting.wanted` and of each one's."""

    resident: Bools
    stored: Bools
    """From disks."""


class Table:
    """A setting as arrays: items, hostings and the pairs of a hosting and a node that it needs."""

    def __init__(self, setting: Setting) -> None:
        boxes, prices = setting.boxes, setting.prices
        self.boxes = boxes
        self.box_of = {box.name: number for number, box in enumerate(boxes)}
        self.hostings = [hosting for one in setting.wanted for hosting in one.hostings]
        self.firsts = np.cumsum([0, *(len(one.hostings) for one in setting.wanted)])
        """Of each model the number of its first hosting, and behind the last how many there are."""
        self.items = sorted({item for hosting in self.hostings for item in hosting.items})
        self.item_of = {item: number for number, item in enumerate(self.items)}
        pieces = [setting.pieces[piece] for _, piece in self.items]
        self.at = np.array([self.box_of[node] for node, _ in self.items], dtype=np.int64)
        self.disk = np.array([piece.disk_bytes for piece in pieces], dtype=float)
        self.memory = np.array([piece.memory_bytes for piece in pieces], dtype=float)
        self.disk_room = np.array([box.disk_bytes for box in boxes], dtype=float)
        self.memory_room = np.array([box.memory_bytes for box in boxes], dtype=float)
        self.strength = np.array([*(box.work for box in boxes), *(box.watts for box in boxes)], dtype=float)
        """Work that each node may do, then the energy that it may take."""
        fetch_s = self.disk / np.array([box.fetch_bytes_per_s for box in boxes])[self.at]
        load_s = self.memory / np.array([box.load_bytes_per_s for box in boxes])[self.at]
        load_s += np.array([box.setup_s for box in boxes])[self.at]
        fresh_on_disk = 1.0 - self.flags(setting.before.stored)
        fresh_in_memory = 1.0 - self.flags(setting.before.resident)
        self.keep_disk = prices.disk * self.disk + prices.fetching * fetch_s * fresh_on_disk / setting.period_s
        """What it costs a second to have each item on its disk, getting it there included,"""
        self.keep_memory = prices.memory * self.memory + prices.loading * load_s * fresh_in_memory / setting.period_s
        """and in memory."""
        self._pairs()
        self.asks = np.zeros((len(self.hostings), 2 * len(boxes)))
        """[hostings, 2 x nodes]: what a request takes of that."""
        for number, hosting in enumerate(self.hostings):
            for taken, start in ((hosting.work_s, 0), (hosting.joules, len(boxes))):
                for node, amount in taken.items():
                    self.asks[number, start + self.box_of[node]] = amount
        energy = [prices.joule * sum(hosting.joules.values()) for hosting in self.hostings]
        self.costs: list[tuple[Floats, Floats]] = []
        """Of each model what requests cost, resident and stored, energy included."""
        for one, first in zip(setting.wanted, self.firsts, strict=False):
            more = np.array(energy[first : first + len(one.hostings)])[None, :]
            self.costs.append((one.resident + more, one.stored + more))

    def _pairs(self) -> None:
        """Each hosting with each node that it needs, hosting by hosting, and the items of each pair."""
        found = [(number, node) for number, hosting in enumerate(self.hostings) for node in sorted(hosting.pieces)]
        self.pair_hosting = np.array([number for number, _ in found], dtype=np.int64)
        self.pair_box = np.array([self.box_of[node] for _, node in found], dtype=np.int64)
        ends, columns = [0], []
        for number, node in found:
            columns += [self.item_of[node, piece] for piece in dict.fromkeys(self.hostings[number].pieces[node])]
            ends.append(len(columns))
        shape = (len(found), len(self.items))
        self.needs = csr_array((np.ones(len(columns)), np.array(columns, dtype=np.int64), np.array(ends)), shape=shape)
        """[pairs, items], 1 where it needs the item."""

    def by_hosting(self, by_pair: Floats) -> Floats:
        """The sum over the nodes of each hosting."""
        return np.asarray(np.bincount(self.pair_hosting, by_pair, minlength=len(self.hostings)), float)

    def every(self, by_pair: Bools) -> Bools:
        """Whether it holds at all nodes of each hosting."""
        return np.asarray(np.bincount(self.pair_hosting, ~by_pair, minlength=len(self.hostings)) == 0)

    def needed(self, hostings: Bools) -> Bools:
        """The items that any of these hostings needs."""
        return np.asarray(self.needs.T @ hostings[self.pair_hosting].astype(float) > 0.0)

    def used(self, items: Bools, sizes: Floats) -> Floats:
        """Bytes that these items take of each node."""
        return np.asarray(np.bincount(self.at, sizes * items, minlength=len(self.boxes)), float)

    def flags(self, items: Iterable[Item]) -> Bools:
        """By item, whether it is among these; others than the table has count for nothing."""
        found = np.zeros(len(self.items), dtype=bool)
        found[[self.item_of[item] for item in items if item in self.item_of]] = True
        return found

    def named(self, items: Bools) -> frozenset[Item]:
        return frozenset(self.items[number] for number in np.flatnonzero(items))

    def able(self, lying: Lying) -> Chosen:
        """The hostings that can serve from memory, and those that can from disks."""
        resident, stored = self.flags(lying.resident), self.flags(lying.stored)
        needs = self.needs.sum(axis=1)
        return Chosen(
            self.every(self.needs @ resident.astype(float) >= needs),
            self.every(self.needs @ stored.astype(float) >= needs),
        )


def check(setting: Setting, lying: Lying) -> None:
    """Raises `ResplitError(INFEASIBLE)` where more lies somewhere than there is room for, or something is in memory and
    not on the disk."""
    if strange := sorted(lying.resident - lying.stored):
        raise ResplitError(
            ErrorCode.INFEASIBLE, f"{strange[0][1]!r} is in the memory of {strange[0][0]}, not on its disk"
        )
    for box in setting.boxes:
        for what, items, room in (
            ("disk", lying.stored, box.disk_bytes),
            ("memory", lying.resident, box.memory_bytes),
        ):
            taken = sum(getattr(setting.pieces[piece], f"{what}_bytes") for node, piece in items if node == box.name)
            if taken > room * (1.0 + 1e-9):
                raise ResplitError(
                    ErrorCode.INFEASIBLE,
                    f"{taken:.0f} bytes are to lie on the {what} of {box.name}, which has {room:.0f}",
                )


def refused(message: str) -> ResplitError:
    return ResplitError(ErrorCode.INVALID_REQUEST, message, "residency")
