"""Sequences that cross from a plan that drains to the one in force, as their ingress sees it.

Copy first: the nodes of the new route fetch the caches of the blocks that moved while the sequence goes on where it is.
Then hold it at a token boundary, have the few tokens since copied too, and go on over the new route. What goes wrong
before the last step leaves the sequence where it was; after it, the sequence is recomputed on the new route.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from agent.run import RouteRun
from schemas.base import NodeId
from schemas.frame import Adopt, Adopted, Frame, Move, SequenceId
from schemas.plan import Route

CROSSINGS_MAX = 8
"""Sequences whose caches are copied at once: more would only wait for each other on the same links."""
BEHIND_TOKENS_MAX = 8
"""What may be left to copy at the boundary: a few tokens' caches are a frame or two."""
ROUNDS_MAX = 6
"""Copies while it runs. Each is shorter than the one before, unless the link is slower than the decoding."""
ASK_AGAIN_S = 1.0
GIVE_UP_S = 20.0
"""Without an answer for so long, a copy is not coming; a sequence that is held is given up much sooner."""
GIVE_UP_HELD_S = 2.0
GIVE_UP_HELD_STEPS = 20
"""On a machine whose steps are slow a copy is slow too, and computing anew slower still."""


@dataclass(slots=True, eq=False)
class _Crossing:
    sequence: SequenceId
    old: RouteRun
    new: RouteRun
    began: float
    asked: float
    tokens: int = 0
    rounds: int = 0
    final: bool = False
    held_at: float | None = None
    waiting: set[str] = field(default_factory=set)
    frames: dict[str, Adopt] = field(default_factory=dict)
    moved_bytes: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Crossed:
    """A sequence that goes on over its new route."""

    sequence: SequenceId
    new: RouteRun
    moved_bytes: int
    held_s: float
    """From the last answer it waited for to its first step over the new route."""


class Crossings:
    """All crossings of one deployment at one ingress."""

    def __init__(self, send: Callable[[NodeId, Frame], None]) -> None:
        self._send = send
        self._under_way: dict[SequenceId, _Crossing] = {}
        self._staying: set[tuple[SequenceId, int]] = set()
        """(sequence, epoch): what could not cross to that epoch finishes where it is."""

    def __contains__(self, sequence: SequenceId) -> bool:
        return sequence in self._under_way

    @property
    def has_room(self) -> bool:
        return len(self._under_way) < CROSSINGS_MAX

    def lead_to(self, epoch: int) -> bool:
        """Whether some sequence is on its way to that epoch."""
        return any(crossing.new.plan.epoch == epoch for crossing in self._under_way.values())

    def begin(self, sequence: SequenceId, old: RouteRun, new: RouteRun, now: float) -> bool:
        """Start to copy; False if it cannot begin (yet): its prompt is not through, or there is no slot."""
        if sequence in self._under_way or (sequence, new.plan.epoch) in self._staying or not self.has_room:
            return False
        if old.driver.written(sequence) is None or not new.reserve(sequence, old.driver.prompt(sequence).capacity):
            return False
        crossing = self._under_way[sequence] = _Crossing(sequence, old, new, now, now)
        self._next_round(crossing, now)
        return True

    def take(self, frame: Adopted, now: float) -> SequenceId | None:
        """A node's answer. Returns a sequence that can neither go on nor back, and must be recomputed."""
        crossing = self._under_way.get(frame.sequence)
        if crossing is None or crossing.new.plan.epoch != frame.epoch or frame.final != crossing.final:
            return None
        if frame.error is not None:
            return self._fail(crossing)
        if frame.tokens < crossing.tokens:
            return None
        crossing.waiting.discard(frame.node)
        crossing.moved_bytes[frame.node] = frame.moved_bytes
        if not crossing.waiting and not crossing.final:
            self._next_round(crossing, now)
        return None

    def finished(self, now: float) -> list[Crossed]:
        """Take held sequences on that stand at their boundary, and return those that have arrived."""
        crossed = []
        for crossing in list(self._under_way.values()):
            if crossing.new.leaving and not crossing.final:
                self._turn_back(crossing)  # there is a newer plan to go to
            elif crossing.held_at is not None and not crossing.final:
                self._ask_finally(crossing, now)
            elif crossing.final and not crossing.waiting:
                crossed.append(self._arrive(crossing, now))
        return crossed

    def check(self, now: float) -> list[SequenceId]:
        """Ask again what is overdue; returns what must be recomputed (`take`)."""
        lost = []
        for crossing in list(self._under_way.values()):
            if crossing.old.lost or crossing.new.lost or self._is_late(crossing, now):
                if (sequence := self._fail(crossing)) is not None:
                    lost.append(sequence)
            elif now - crossing.asked >= ASK_AGAIN_S:
                crossing.asked = now
                for node in crossing.waiting:
                    self._send(NodeId(node), crossing.frames[node])
        return lost

    def forget(self, sequence: SequenceId) -> None:
        """It has ended, or is recomputed."""
        crossing = self._under_way.pop(sequence, None)
        if crossing is not None:
            crossing.new.give_up(sequence)
        self._staying = {(s, epoch) for s, epoch in self._staying if s != sequence}

    def _next_round(self, crossing: _Crossing, now: float) -> None:
        written = crossing.old.driver.written(crossing.sequence)
        if written is None:
            return  # it has ended, and `forget` follows
        behind = written - crossing.tokens
        moves = {node: found for node, found in _moves(crossing.old.route, crossing.new.route) if found}
        if crossing.rounds >= ROUNDS_MAX or not moves or (crossing.rounds and behind <= BEHIND_TOKENS_MAX):
            crossing.old.driver.hold(crossing.sequence)
            crossing.held_at = crossing.asked = now
            self._ask_finally(crossing, now)
            return
        crossing.rounds += 1
        self._ask(crossing, written, moves, now)

    def _ask_finally(self, crossing: _Crossing, now: float) -> None:
        standing = crossing.old.driver.standing(crossing.sequence)
        if standing is None:
            return
        crossing.final = True
        crossing.held_at = now
        self._ask(crossing, standing.driven, dict(_moves(crossing.old.route, crossing.new.route)), now)

    def _ask(self, crossing: _Crossing, tokens: int, moves: dict[str, tuple[Move, ...]], now: float) -> None:
        old, new = crossing.old, crossing.new
        prompt = old.driver.prompt(crossing.sequence)
        crossing.tokens, crossing.asked = tokens, now
        crossing.frames = {
            node: Adopt(
                deployment=new.plan.deployment,
                before=old.plan.epoch,
                epoch=new.plan.epoch,
                route=new.route.index,
                ingress=new.ingress,
                sequence=crossing.sequence,
                tokens=tokens,
                capacity=prompt.capacity,
                sampling=prompt.sampling,
                moves=found,
                final=crossing.final,
            )
            for node, found in moves.items()
        }
        crossing.waiting = set(crossing.frames)
        for node, frame in crossing.frames.items():
            self._send(NodeId(node), frame)

    def _arrive(self, crossing: _Crossing, now: float) -> Crossed:
        del self._under_way[crossing.sequence]
        standing = crossing.old.driver.standing(crossing.sequence)
        assert standing is not None, "nothing moves a sequence that is held"
        crossing.old.end([crossing.sequence])
        crossing.new.driver.join(standing)
        held_s = now - (now if crossing.held_at is None else crossing.held_at)
        return Crossed(crossing.sequence, crossing.new, sum(crossing.moved_bytes.values()), held_s)

    def _fail(self, crossing: _Crossing) -> SequenceId | None:
        if crossing.final or crossing.old.lost:
            # Some node may have gone over already, and would refuse its next step.
            del self._under_way[crossing.sequence]
            crossing.new.give_up(crossing.sequence)
            return crossing.sequence
        self._turn_back(crossing)
        self._staying.add((crossing.sequence, crossing.new.plan.epoch))
        return None

    def _turn_back(self, crossing: _Crossing) -> None:
        del self._under_way[crossing.sequence]
        crossing.new.give_up(crossing.sequence)
        crossing.old.driver.let_go(crossing.sequence)

    def _is_late(self, crossing: _Crossing, now: float) -> bool:
        if crossing.final and crossing.held_at is not None:
            step_s = crossing.old.driver.typical_s.get("decode", 0.0)
            return now - crossing.held_at >= max(GIVE_UP_HELD_S, GIVE_UP_HELD_STEPS * step_s)
        return now - crossing.began >= GIVE_UP_S * max(1, crossing.rounds)


def _moves(old: Route, new: Route) -> Iterator[tuple[str, tuple[Move, ...]]]:
    """What each node of the new route has to fetch, and from whom: blocks that stay are not named."""
    before: dict[int, str] = {block: stage.node for stage in old.stages for block in stage.blocks}
    for node in dict.fromkeys(stage.node for stage in new.stages):
        blocks = [b for stage in new.stages if stage.node == node for b in stage.blocks if before[b] != node]
        yield node, tuple(_runs(blocks, before))


def _runs(blocks: list[int], before: dict[int, str]) -> Iterator[Move]:
    """Consecutive blocks from one source are one move."""
    for (source, _), group in groupby(enumerate(blocks), key=lambda pair: (before[pair[1]], pair[1] - pair[0])):
        members = [block for _, block in group]
        yield Move(members[0], members[-1], source)
