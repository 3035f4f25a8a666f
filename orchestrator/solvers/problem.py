"""PURE: the question every solver answers and the form of every answer (mathematics.md A1).

A chain of L blocks is cut into stages and the stages are placed on M nodes, each node at most once (the U-shaped
form lets the head node return, see `ushape`). Times are whole nanoseconds and sizes whole bytes, so equal plans
compare equal.

Links are given per *site*: nodes of one site have the same links to everybody, so S x S figures per boundary stand
for M x M. Where every node has links of its own, every node is a site (`site` left out), and `hop_ns` is dense.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import inf

import numpy as np
from numpy.typing import NDArray

from schemas.errors import ErrorCode, ResplitError

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]


@dataclass(frozen=True)
class Piece:
    """Blocks `first` to `last`, both included, on node number `node`."""

    node: int
    first: int
    last: int


@dataclass(frozen=True)
class Solution:
    """An answer with what is known about the best there could be. The unit is that of the objective, nanoseconds."""

    pieces: tuple[Piece, ...] | None
    """None where no chain was found."""
    value_ns: float
    """What `pieces` cost; infinite without them."""
    bound_ns: float
    """No chain costs less; infinite where it is proven that there is none."""
    method: str

    @property
    def proven(self) -> bool:
        """The pieces are optimal; without pieces: there is nothing to find."""
        return self.bound_ns >= self.value_ns

    @property
    def infeasible(self) -> bool:
        """Proven: no chain exists."""
        return self.bound_ns == inf

    @property
    def gap(self) -> float:
        """(UB - LB) / LB: 0 where proven, infinite where nothing was found or nothing is known."""
        if self.proven:
            return 0.0
        return (self.value_ns - self.bound_ns) / self.bound_ns if self.bound_ns > 0 else inf


@dataclass(frozen=True)
class Problem:
    """L blocks, M nodes in the order in which ties are broken, S sites. Raises INVALID_REQUEST on shapes that do
    not fit together and on negative figures."""

    time_ns: Integers
    """[M, L]: one step of a block on a node."""
    need_bytes: Integers
    """[M, L]: what a node must have free to take a block; 0 where it holds the block already."""
    free_bytes: Integers
    """[M]"""
    hop_ns: Integers
    """[D, S, S]: from a node of one site to another node of another (or the same) site, for each distinct kind of
    boundary. A node reaches itself in no time, whatever stands on the diagonal."""
    site: Integers | None = None
    """[M]: the site of each node; None where every node is a site of its own."""
    boundary: Integers | None = None
    """[L]: which of the D kinds the boundary after a block is, the last one being the way of the output back to
    the first stage; None where D = L and every boundary is its own kind."""
    allowed: Mask | None = None
    """[M, L]: whether a node may run a block at all (privacy, pinned blocks); None where every node may."""

    def __post_init__(self) -> None:
        nodes, blocks = self.time_ns.shape
        kinds, sites = self.hop_ns.shape[:2]
        expected = {
            "time_ns": (max(nodes, 1), max(blocks, 1)),
            "need_bytes": (nodes, blocks),
            "free_bytes": (nodes,),
            "hop_ns": (blocks if self.boundary is None else kinds, nodes if self.site is None else sites, sites),
            "site": (nodes,),
            "boundary": (blocks,),
            "allowed": (nodes, blocks),
        }
        for name, shape in expected.items():
            value = getattr(self, name)
            if value is None:
                continue
            if value.shape != shape:
                message = f"{name} has the shape {value.shape} and must have {shape}"
                raise ResplitError(ErrorCode.INVALID_REQUEST, message, name)
            if name != "allowed" and value.size and not (value.dtype.kind in "iu" and value.min() >= 0):
                message = f"{name} must hold whole numbers from 0, and holds {value.dtype} from {value.min()}"
                raise ResplitError(ErrorCode.INVALID_REQUEST, message, name)
        for name, limit in (("site", sites), ("boundary", kinds)):
            value = getattr(self, name)
            if value is not None and value.max() >= limit:
                message = f"{name} names number {value.max()}, hop_ns has {limit}"
                raise ResplitError(ErrorCode.INVALID_REQUEST, message, name)

    @property
    def nodes(self) -> int:
        return int(self.time_ns.shape[0])

    @property
    def blocks(self) -> int:
        return int(self.time_ns.shape[1])

    @property
    def sites(self) -> int:
        return int(self.hop_ns.shape[1])

    @cached_property
    def site_of(self) -> Integers:
        """[M]: the site of each node."""
        return np.arange(self.nodes) if self.site is None else self.site

    @cached_property
    def kind_of(self) -> Integers:
        """[L]: the kind of the boundary after each block."""
        return np.arange(self.blocks) if self.boundary is None else self.boundary

    @cached_property
    def may_run(self) -> Mask:
        """[M, L]: `allowed`, written out."""
        return np.ones((self.nodes, self.blocks), bool) if self.allowed is None else self.allowed

    @property
    def home_ns(self) -> Integers:
        """[S, S]: the way of the output back to the first stage."""
        found: Integers = self.hop_ns[self.kind_of[-1]]
        return found

    def hop(self, block: int, source: int, target: int) -> int:
        """Crossing the boundary after `block` from one node to another; 0 from a node to itself."""
        if source == target:
            return 0
        return int(self.hop_ns[self.kind_of[block], self.site_of[source], self.site_of[target]])

    def dense_hops(self) -> Integers:
        """[L, M, M] with a zero diagonal: for the solvers of few nodes."""
        hops = self.hop_ns[self.kind_of][:, self.site_of[:, None], self.site_of[None, :]].copy()
        hops[:, np.arange(self.nodes), np.arange(self.nodes)] = 0
        return hops

    def restricted(self, keep: Sequence[int] | Integers) -> "Problem":
        """The same problem with the nodes `keep` alone, numbered anew in that order."""
        keep = np.asarray(keep, np.int64)
        return Problem(
            self.time_ns[keep],
            self.need_bytes[keep],
            self.free_bytes[keep],
            self.hop_ns,
            self.site_of[keep],
            self.kind_of,
            self.may_run[keep],
        )


def site_hops(latency_ns: Floats, ns_per_byte: Floats, boundary_bytes: Sequence[int]) -> tuple[Integers, Integers]:
    """`hop_ns` and `boundary` from latency [S, S], inverse rate [S, S] and the bytes of each boundary [L]."""
    sizes, kinds = np.unique(np.asarray(boundary_bytes, np.int64), return_inverse=True)
    hops = latency_ns[None] + ns_per_byte[None] * sizes[:, None, None]
    return np.rint(hops).astype(np.int64), kinds.astype(np.int64)


def latency_ns(problem: Problem, pieces: Sequence[Piece]) -> int:
    """Time per token of a chain: compute, hops, and the way home from the last stage (TPOT of A1 without queues)."""
    compute = sum(int(problem.time_ns[p.node, p.first : p.last + 1].sum()) for p in pieces)
    hops = sum(problem.hop(a.last, a.node, b.node) for a, b in pairwise(pieces))
    return compute + hops + problem.hop(problem.blocks - 1, pieces[-1].node, pieces[0].node)


def slowest_ns(problem: Problem, pieces: Sequence[Piece]) -> int:
    """Time of the busiest node of a chain, per step: throughput is at most one step per this time."""
    busy: dict[int, int] = {}
    for p in pieces:
        busy[p.node] = busy.get(p.node, 0) + int(problem.time_ns[p.node, p.first : p.last + 1].sum())
    return max(busy.values())


def is_chain(problem: Problem, pieces: Sequence[Piece]) -> bool:
    """Whether the pieces are a chain of distinct nodes that hold it."""
    return len({p.node for p in pieces}) == len(pieces) and holds(problem, pieces)


def holds(problem: Problem, pieces: Sequence[Piece]) -> bool:
    """Whether the pieces are every block once, in order, on nodes that may run them and have the memory."""
    covered = [block for p in pieces for block in range(p.first, p.last + 1)]
    need = np.zeros(problem.nodes, np.int64)
    for p in pieces:
        if not problem.may_run[p.node, p.first : p.last + 1].all():
            return False
        need[p.node] += problem.need_bytes[p.node, p.first : p.last + 1].sum()
    return covered == list(range(problem.blocks)) and bool((need <= problem.free_bytes).all())
