"""PURE: other plans than the one in force: its neighbours, and for each node in use the best plan without it.

For its slowest routes the best reassignment with their cuts, the best re-split and the best of blocks that lie on disks
already; nodes exchanged between routes of the same cuts; a route more, and fewer. `stages` and `routes` bound them, and
none shows a sensitive block to an untrusted node (I6).
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property, partial
from math import inf

from orchestrator.chain import Ways, beside, fastest_chain, on_the_edge, ways_of, within
from orchestrator.decision import OPTIONS_MAX, Origin
from orchestrator.planner import further_chain
from orchestrator.reassign import reassigned
from orchestrator.relief import relieved
from orchestrator.rooms import Room, at_hand
from orchestrator.searched import Facts, Ready, Searched, is_slowed, is_stale, longest_ago
from orchestrator.trust import exposed
from schemas.base import NodeId
from schemas.deployment import ROUTES_MAX, Chain, Deployment, Placement, Stage, blocks_by_node, nodes_of
from schemas.manifest import Manifest

FAILOVERS_MAX = OPTIONS_MAX - 3
"""The current plan, a reassignment and a re-split stand on the list too."""
MOVED_ROUTES_MAX = 2
"""Routes that are moved by themselves, the slowest: the others are looked at once these are well placed."""

Found = tuple[Placement, Origin]


@dataclass(frozen=True)
class Search:
    """What other plans are looked for with."""

    deployment: Deployment
    manifest: Manifest
    willing: Mapping[NodeId, Room]
    """The nodes that other plans may use, as they are at rest, with a time for every block (`beliefs.believed`)."""
    strain: float
    """How much slower serving makes them: which of them a search makes the ingress is not known before it ends, so
    all bear what the others do."""
    current: Placement
    phi: float
    """What the current plan costs."""
    slowest: tuple[int, ...]
    """The routes of the current plan, the slowest first."""
    busy: bool
    """Whether more than one sequence runs: a further route is of no use to fewer."""
    sensitive: frozenset[int]
    trusted: frozenset[NodeId]

    @cached_property
    def rooms(self) -> Mapping[NodeId, Room]:
        """The willing as they are while they serve."""
        return {name: replace(room, host=room.host.slower(self.strain)) for name, room in self.willing.items()}

    @cached_property
    def ways(self) -> Ways:
        """Between all of them."""
        return ways_of(self.willing, self.manifest)

    @cached_property
    def facts(self) -> Facts:
        """What could make a search find something better."""
        roundabout = frozenset(
            (name, NodeId(link.peer))
            for name, room in self.willing.items()
            for link in room.capacity.links
            if not (link.up and link.direct)
        )
        rooms = self.willing
        return Facts(
            {name: float(room.host.times.decode_ms.sum()) for name, room in rooms.items()},
            # More than the whole model needs is of no use.
            {name: min(room.free_bytes, sum(room.need_bytes)) for name, room in rooms.items()},
            max((1, *(max(room.need_bytes) for room in rooms.values()))),
            frozenset(name for name, room in rooms.items() if room.trusted),
            roundabout,
            self.busy,
        )

    def stage_ms(self, first: int, last: int, node: NodeId) -> float:
        """What a step of these blocks takes on a node; one that other plans may not use is the slowest."""
        room = self.rooms.get(node)
        return inf if room is None else float(room.host.times.decode_ms[first : last + 1].sum())

    @property
    def protected(self) -> tuple[NodeId, ...]:
        """The nodes in use for whose failure a plan is ready."""
        return nodes_of(self.current)[:FAILOVERS_MAX]

    def private(self, chain: Chain) -> bool:
        """Whether no untrusted node holds a sensitive block of it."""
        return not any(exposed(self.sensitive, stage.blocks, stage.node in self.trusted) for stage in chain)

    def allows(self, chains: Placement) -> bool:
        """Whether no untrusted node holds a sensitive block, and every route brings a node of its own."""
        used: set[NodeId] = set()
        for chain in chains:
            nodes = {stage.node for stage in chain}
            if nodes <= used or not self.private(chain):
                return False
            used |= nodes
        return True


def fits(
    chains: Placement,
    rooms: Mapping[NodeId, Room],
    sensitive: frozenset[int] = frozenset(),
    current: Placement = (),
) -> bool:
    """Whether a plan can run on the rooms: its nodes are there, and have the memory and the trust. What `current` puts
    on a node is there already, wherever that is."""
    here = blocks_by_node(current)
    for node, blocks in blocks_by_node(chains).items():
        if node in here and blocks <= here[node]:
            continue
        room = rooms.get(node)
        if room is None or exposed(sensitive, blocks, room.trusted):
            return False
        if sum(room.need_bytes[block] for block in blocks) > room.free_bytes:
            return False
    return True


def step_ms(chains: Placement, rooms: Mapping[NodeId, Room]) -> float:
    """What all stages of a plan take for one step; all its nodes are among the rooms."""
    found = (rooms[s.node].host.times.decode_ms[s.first : s.last + 1] for chain in chains for s in chain)
    return float(sum(times.sum() for times in found))


def neighbours(search: Search) -> tuple[Found, ...]:
    """The plans next to the current one that are allowed, the likeliest first."""
    return tuple(one for one in (*_moves(search), *_regrouped(search), *_counts(search)) if search.allows(one[0]))


def looked_around(
    search: Search, before: Searched | None, anew: bool, unfit: frozenset[NodeId], now: datetime
) -> Searched:
    """What there is besides the current plan: what was found `before` while that will do, else what is found now.
    `before` is about the same plan; `anew` and any `unfit` node ask for a search whatever it says.

    A failover plan that can still run, and is about as fast as it was, is kept; with each search the one that was
    looked for the longest ago is looked for anew, and so are those of unfit nodes.
    """
    ready = dict(before.ready) if before is not None else {}
    rooms, secret = search.willing, search.sensitive
    standing = {
        node
        for node, one in ready.items()
        if one.chains and fits(one.chains, rooms, secret) and not is_slowed(one, step_ms(one.chains, rooms))
    }
    useful = before is not None and all(fits(chains, rooms, secret, search.current) for chains, _ in before.found)
    if before is None or anew or unfit or not useful or is_stale(before, search.facts, search.phi, now):
        wanted = [node for node in search.protected if node not in standing - unfit or node in longest_ago(ready)]
        before = Searched(now, search.phi, search.facts, neighbours(search))
    else:
        # Where there was none there is none: nothing has become better.
        wanted = [node for node, one in ready.items() if one.chains and node not in standing]
    found = failovers(search, wanted, ready) if wanted else {}
    fresh = {node: Ready(chains, now, step_ms(chains, rooms)) for node, chains in found.items()}
    return replace(before, ready={**ready, **fresh})


def failovers(search: Search, nodes: Sequence[NodeId], before: Mapping[NodeId, Ready]) -> dict[NodeId, Placement]:
    """For each of these nodes the best plan without it, empty where there is none: the routes without it stay, the
    others are placed anew or dropped. `before` is what was ready for them the last time."""
    found: dict[NodeId, Placement] = {}
    for node in nodes:
        # What does without one node of a route often does without its others.
        hints = [*([before[node].chains] if node in before else []), *found.values()]
        found[node] = _without(search, node, hints)
    return found


def _moves(search: Search) -> Iterator[Found]:
    """As many routes as now, one of them elsewhere."""
    deployment, manifest = search.deployment, search.manifest
    for number in search.slowest[:MOVED_ROUTES_MAX]:
        chain = search.current[number]
        others = (*search.current[:number], *search.current[number + 1 :])
        left = beside(search.rooms, others)
        moved = reassigned(chain, manifest, left, search.sensitive)
        if moved is not None:
            yield _swapped(search.current, number, moved), Origin.REASSIGNED
        split = fastest_chain(deployment, manifest, left, search.ways, chain)
        if split is not None:
            yield _swapped(search.current, number, split), Origin.RESPLIT
        shared_out = relieved(chain, manifest, left, search.sensitive) if deployment.stages is None else None
        if shared_out is not None:
            yield _swapped(search.current, number, shared_out), Origin.RESPLIT
        quick = fastest_chain(deployment, manifest, at_hand(left, deployment.model), search.ways)
        if quick is not None:
            yield _swapped(search.current, number, quick), Origin.AT_HAND
        edge = on_the_edge(left)
        if split is not None and within(split, edge):
            continue  # the best of all is the best of the edge
        home = fastest_chain(deployment, manifest, edge, search.ways, chain)
        if home is not None:
            yield _swapped(search.current, number, home), Origin.EDGE


def _regrouped(search: Search) -> Iterator[Found]:
    """Routes of the same cuts exchange nodes, so that slow ones are together and a route is without them. They hold the
    same blocks, so nothing has to be loaded."""
    groups: dict[tuple[tuple[int, int], ...], list[int]] = {}
    for number in reversed(search.slowest):
        groups.setdefault(tuple((stage.first, stage.last) for stage in search.current[number]), []).append(number)
    placement = list(search.current)
    for cuts, alike in groups.items():
        columns = [
            sorted((search.current[number][position].node for number in alike), key=partial(search.stage_ms, *cut))
            for position, cut in enumerate(cuts)
        ]
        for number, nodes in zip(alike, zip(*columns, strict=True), strict=True):
            placement[number] = tuple(
                Stage(node=node, first=first, last=last) for node, (first, last) in zip(nodes, cuts, strict=True)
            )
    if tuple(placement) != search.current:
        yield tuple(placement), Origin.REASSIGNED


def _counts(search: Search) -> Iterator[Found]:
    """A route more where there is work for it, and fewer where the planner decides how many there are."""
    deployment, current = search.deployment, search.current
    if deployment.routes is not None:
        return
    if search.busy and len(current) < min(ROUTES_MAX, deployment.settings.max_sequences):
        more = further_chain(deployment, search.manifest, search.rooms, current, ways=search.ways)
        if more is not None:
            yield (*current, more), Origin.ROUTE_ADDED
        used = frozenset(nodes_of(current))
        apart = further_chain(deployment, search.manifest, search.rooms, current, used, search.ways)
        if apart is not None and apart != more:
            yield (*current, apart), Origin.ROUTE_ADDED
        near = at_hand(search.rooms, deployment.model)
        quick = further_chain(deployment, search.manifest, near, current, ways=search.ways)
        if quick is not None and quick not in (more, apart):
            yield (*current, quick), Origin.AT_HAND
    if len(current) > 1:
        for number in search.slowest[:MOVED_ROUTES_MAX]:
            yield (*current[:number], *current[number + 1 :]), Origin.ROUTE_GIVEN_BACK
    if len(current) > 2:
        # Of many routes one alone takes less than the margin, and none would ever be given back.
        yield (current[search.slowest[-1]],), Origin.ROUTE_GIVEN_BACK


def _without(search: Search, node: NodeId, hints: Sequence[Placement]) -> Placement:
    """The best plan without a node, empty where there is none; `hints` are plans whose routes may do."""
    rest = {name: room for name, room in search.rooms.items() if name != node}
    chains = tuple(chain for chain in search.current if within(chain, rest) and search.private(chain))
    if not chains:
        first = _first(search, rest, _hint(hints, (), rest))
        chains = () if first is None else (first,)
    while chains and len(chains) < len(search.current):
        hint = _hint(hints, chains, rest)
        further = further_chain(search.deployment, search.manifest, rest, chains, ways=search.ways, known=hint)
        if further is None:
            break
        chains = (*chains, further)
    return chains


def _hint(hints: Sequence[Placement], chains: Placement, rooms: Mapping[NodeId, Room]) -> Chain:
    """A route that is not among `chains` and may do: to begin with it is enough that its nodes are there."""
    routes = (chain for placement in hints for chain in placement if chain not in chains)
    return next((chain for chain in routes if within(chain, rooms)), ())


def _first(search: Search, offered: Mapping[NodeId, Room], known: Chain) -> Chain | None:
    """The edge's own chain where there is one: a node that fails is no reason to rent another."""
    home = fastest_chain(search.deployment, search.manifest, on_the_edge(offered), search.ways, known)
    return home or fastest_chain(search.deployment, search.manifest, offered, search.ways, known)


def _swapped(chains: Placement, number: int, chain: Chain) -> Placement:
    return (*chains[:number], chain, *chains[number + 1 :])
