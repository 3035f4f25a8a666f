"""PURE: decremental state-space relaxation, the exact solver of production (mathematics.md A2, A3).

A pass solves the chain with visited bits for a critical set of nodes alone; other nodes may return. If the best chain
repeats a node, the node becomes critical and the pass is done again, until the best chain repeats none: it is then
optimal. Each pass is a lower bound, and never lower than the one before. States that cannot beat the best chain known
(the beam's, to begin with) even by the completion bound are dropped, and so are nodes left without a state.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from orchestrator.solvers import fees
from orchestrator.solvers.baselines import edgeshard_pieces
from orchestrator.solvers.chains import Cases, Chains, Completion, chains_of
from orchestrator.solvers.dominance import core_nodes
from orchestrator.solvers.lb0 import lb0_by_start
from orchestrator.solvers.passes import Pass, Rows, run
from orchestrator.solvers.problem import Floats, Integers, Piece, Problem, Solution, is_chain, latency_ns

LABELS_MAX = 20_000_000
"""States that passes may visit before the answer is given with the gap that is left: about a second."""
TABLE_CELLS = 4_000_000
"""Figures per table of one batch of starts: 32 MB."""
CORE_NODES = 250
"""From here on a promising few of the nodes are solved first."""
QUICK_NODES_MAX, QUICK_GAP = 1000, 0.05
"""A gap from which EdgeShard's programme is tried on all nodes as well, and how many it can take: it needs a second."""
CORE_RIVALS = 3
"""A promising node has fewer rivals than this on its site that are as fast and as roomy."""
_TOGETHER_CELLS = 3_000
"""Rows times nodes up to which all cases share a pass: numpy's calls cost more than their work until then."""
_NEW_CRITICAL = 4
"""Nodes that become critical after one pass, at most: each doubles the states."""


@dataclass(frozen=True)
class Found:
    """The best chain over some cases, and what is proven about them."""

    value: float
    case: int
    """-1 where nothing better than the cut-off was found."""
    pieces: tuple[Piece, ...]
    bounds: Floats
    """[A]: no chain of the case costs less; not raised past the value."""
    labels: int
    """States visited."""


def fastest(
    problem: Problem,
    stages: int | None = None,
    slowest_ns: float | None = None,
    labels_max: int = LABELS_MAX,
    known: Sequence[Piece] = (),
) -> Solution:
    """The chain of least latency: of exactly `stages` stages and with none slower than `slowest_ns`, where given.

    `known` is a chain to begin with, if it is one of this problem (of distinct nodes, which hold it): only what takes
    less is looked for. It is left out where stages are counted or bounded.

    Proven optimal or proven infeasible, unless `labels_max` ends the search first; the gap then says what is left.
    """
    most = min(problem.nodes, problem.blocks)
    if stages is not None and not 1 <= stages <= most:
        return Solution(None, inf, inf, "dssr")
    if stages is None and slowest_ns is None and is_chain(problem, known):
        return _fastest(problem, stages, slowest_ns, labels_max, (float(latency_ns(problem, known)), tuple(known)))[0]
    return _fastest(problem, stages, slowest_ns, labels_max)[0]


def _fastest(
    problem: Problem,
    stages: int | None,
    slowest_ns: float | None,
    labels_max: int,
    known: tuple[float, tuple[Piece, ...]] = (inf, ()),
) -> tuple[Solution, Floats]:
    """The solution, and the fees [S, M] that proved its bound, by the site of the first stage."""
    fee = np.zeros((problem.sites, problem.nodes))
    chains = chains_of(problem, slowest_ns)
    if chains.longest.sum() < problem.blocks:
        return Solution(None, inf, inf, "dssr"), fee
    value, pieces = _alone(chains) if stages in (None, 1) else (inf, ())
    if stages == 1:
        return Solution(pieces or None, value, value, "dssr"), fee
    if known[0] < value:
        value, pieces = known
    cases, bounds, sites = _starts(problem, chains)
    chains = chains.node_by_node() if chains.nodes <= fees.FEW_NODES else chains
    labels = 0
    plain = stages is None and slowest_ns is None
    core = core_nodes(problem, CORE_RIVALS) if problem.nodes > CORE_NODES else np.arange(problem.nodes)
    if len(core) < problem.nodes:
        # The best chain over a promising few, and their fees, let most of the many be left out at once.
        few, fee[:, core] = _fastest(problem.restricted(core), stages, slowest_ns, labels_max // 3)
        if few.value_ns < value and few.pieces is not None:
            value = few.value_ns
            pieces = tuple(Piece(int(core[p.node]), p.first, p.last) for p in few.pieces)
    elif problem.nodes > fees.FEW_NODES and plain:
        value, pieces = _quicker(problem, value, pieces)
    for batch in _batches(np.argsort(bounds, kind="stable"), chains, stages):
        some = batch[bounds[batch] < value]
        if not len(some):
            continue
        where = np.ix_(sites[some], chains.node)
        found, fee[where] = settle(
            chains, cases.only(some), bounds[some], stages, value, labels_max - labels, fee[where]
        )
        bounds[some] = found.bounds
        labels += found.labels
        if found.case >= 0:
            value, pieces = found.value, found.pieces
    bound = float(bounds.min(initial=inf))
    if plain and len(core) < problem.nodes <= QUICK_NODES_MAX and value > bound * (1 + QUICK_GAP):
        value, pieces = _quicker(problem, value, pieces)
    return Solution(pieces or None, value, min(value, bound), "dssr"), fee


def _quicker(problem: Problem, value: float, pieces: tuple[Piece, ...]) -> tuple[float, tuple[Piece, ...]]:
    """EdgeShard's chain where it is better: where many stages are needed the beam may find none as good."""
    quick = edgeshard_pieces(problem)
    if quick is None or latency_ns(problem, quick) >= value:
        return value, pieces
    return float(latency_ns(problem, quick)), quick


def settle(
    chains: Chains,
    cases: Cases,
    bounds: Floats,
    stages: int | None,
    cutoff: float,
    labels_max: int,
    fee: Floats | None = None,
) -> tuple[Found, Floats]:
    """The best chain of distinct nodes over all cases that costs less than `cutoff`: fees (beginning with `fee`) and
    beam, then `refine`; and the fees [A, M]."""
    tight = fees.climb(chains, cases, stages, cutoff, labels_max // 2, fee)
    bounds = np.maximum(bounds, tight.bounds)
    now = tight.open_cases
    found = refine(tight.chains, tight.cases, tight.table, bounds[now], tight.value, labels_max - tight.labels)
    bounds[now] = np.maximum(bounds[now], found.bounds)
    value, case, pieces = tight.value, tight.case, tight.pieces
    if found.case >= 0:
        value, case, pieces = found.value, int(now[found.case]), found.pieces
    return Found(value, case, pieces, np.minimum(bounds, value), found.labels + tight.labels), tight.fee


def refine(chains: Chains, cases: Cases, table: Completion, bounds: Floats, cutoff: float, labels_max: int) -> Found:
    """The best chain of distinct nodes over all cases that costs less than `cutoff`, by passes over a growing
    critical set, until it is proven or the next pass would exceed `labels_max`. `bounds` [A] is what is known.

    With fees in `table` a pass minimises cost + sum fee * (stages - 1) over the nodes that are not critical: a chain of
    distinct nodes is optimal once it leaves no fee unspent, so nodes with unspent fees become critical as well.
    """
    bounds = bounds.copy()
    value, case = cutoff, -1
    pieces: tuple[Piece, ...] = ()
    rows = Rows.first(np.flatnonzero(bounds < value), table.stages)
    critical: list[int] = []
    labels = 0
    while len(rows.case):
        labels += len(rows.case) * chains.nodes * chains.blocks
        if labels > labels_max:
            break
        done = run(chains, cases, table, rows, tuple(critical), value)
        repeated: Counter[int] = Counter()
        open_cases = sorted(set(rows.case.tolist()), key=lambda a: done.values[a])
        for a in open_cases:
            bounds[a] = max(bounds[a], done.values[a])
            if bounds[a] >= value:
                continue
            path = done.path(a)
            times = Counter(piece.node for piece in path)
            if len(times) == len(path):
                spare = _unspent(chains, table, a, times, critical)
                if done.values[a] + spare.total() < value:
                    value, case, pieces = float(done.values[a] + spare.total()), a, path
                repeated = repeated or spare
            elif not repeated:
                repeated.update({node: count for node, count in times.items() if count > 1})
        new = [node for node, _ in repeated.most_common(_NEW_CRITICAL)]
        keep = done.live_nodes
        rows = rows.only(done.live_rows & (bounds[rows.case] < value))
        rows = rows.with_bits(range(len(critical), len(critical) + len(new)))
        critical += new
        # The nodes of the critical set stay: their bits are in the rows.
        keep |= np.isin(chains.node, critical)
        together = np.unique(rows.case)
        if len(together) > 1 and len(rows.case) * chains.nodes > _TOGETHER_CELLS:
            apart = _apart(done, chains, cases, table, bounds, value, labels_max - labels)
            bounds, labels = apart.bounds, labels + apart.labels
            if apart.case >= 0:
                value, case, pieces = apart.value, apart.case, apart.pieces
            break
        if keep.sum() < 0.8 * chains.nodes:
            chains, cases, table = chains.kept(keep), cases.kept(keep), table.kept(keep)
    return Found(value, case, pieces, np.minimum(bounds, value), labels)


def _apart(
    done: Pass, chains: Chains, cases: Cases, table: Completion, bounds: Floats, cutoff: float, labels_max: int
) -> Found:
    """Case by case, each with the nodes that it can still use and a critical set of its own. The one with the least
    bound comes last: what the others leave of their states is its."""
    bounds, value, case, labels = bounds.copy(), cutoff, -1, 0
    pieces: tuple[Piece, ...] = ()
    order = [int(a) for a in np.argsort(-bounds, kind="stable") if bounds[a] < cutoff]
    for position, a in enumerate(order):
        if bounds[a] >= value:
            continue
        one, keep = np.array([a]), done.live_nodes_of(a)
        share = (labels_max - labels) // (len(order) - position)
        found = refine(
            chains.kept(keep), cases.only(one).kept(keep), table.only(one).kept(keep), bounds[one], value, share
        )
        bounds[a] = max(bounds[a], float(found.bounds[0]))
        labels += found.labels
        if found.case >= 0:
            value, case, pieces = found.value, a, found.pieces
    return Found(value, case, pieces, bounds, labels)


def _unspent(chains: Chains, table: Completion, case: int, times: Counter[int], critical: list[int]) -> Counter[int]:
    """By node: fees that a chain of distinct nodes was credited for and did not pay."""
    dear = np.flatnonzero(table.fee[case])
    return Counter(
        {
            int(chains.node[c]): int(table.fee[case, c])
            for c in dear
            if int(chains.node[c]) not in times and int(chains.node[c]) not in critical
        }
    )


def _alone(chains: Chains) -> tuple[float, tuple[Piece, ...]]:
    """The fastest node that holds everything; it is at home already."""
    whole = np.where(chains.high[0] == chains.blocks, chains.prefix[-1], inf)
    value = float(whole.min())
    if value == inf:
        return inf, ()
    node = int(chains.node[whole == value].min())
    return value, (Piece(node, 0, chains.blocks - 1),)


def _starts(problem: Problem, chains: Chains) -> tuple[Cases, Floats, Integers]:
    """The ways to begin a chain of several stages, LB0 and the (first) site of each: one per site that has nodes, or a
    single one where home is equally far from everywhere."""
    home = chains.hops[chains.kind[-1]]
    sites = np.arange(len(home))
    several = np.bincount(chains.site) > 1
    matters = home[(sites[:, None] != sites[None, :]) | several[:, None]]
    present = np.unique(problem.site_of)
    bounds = lb0_by_start(problem)[present]
    if matters.size == 0 or (matters == matters[0]).all():
        cost = matters[0] if matters.size else 0.0
        free = np.zeros((1, chains.nodes))
        single = Cases(np.zeros(1, np.int64), free, free, {chains.blocks: free + cost})
        return single, bounds.min(keepdims=True), present[:1]
    here = chains.site == sites[:, None]
    entry = np.where(here, 0.0, inf)
    barred = np.where(here & ~several[:, None], inf, 0.0)
    exits = {chains.blocks: home.T[:, chains.site]}
    return Cases(np.zeros(len(sites), np.int64), entry, barred, exits), bounds, present


def _batches(order: Integers, chains: Chains, stages: int | None) -> list[Integers]:
    """The starts in batches whose tables fit."""
    size = max(1, TABLE_CELLS // max(1, chains.nodes * chains.blocks * (stages or 1)))
    return [order[a : a + size] for a in range(0, len(order), size)]
