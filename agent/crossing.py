"""Sequences that cross from a plan that drains to the one in force, as their ingress sees it.

Copy first: the nodes of the new route fetch the caches of the blocks that moved while the sequence goes on where it is.
Then hold it at a token boundary, have the few tokens since copied too, and go on over the new route. What goes wrong
before the last step leaves the sequence where it was; after it, the sequence is recomputed on the new route.

Whether it is handed over at all is `agent.ways`'s to say.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import groupby

from agent.driver import REPLAY_TOKENS_MAX
from agent.run import RouteRun
from agent.ways import Position
from profiler.network import DEFAULT_LINK_BYTES_PER_S
from schemas.base import NodeId
from schemas.frame import Adopt, Adopted, Frame, Move, SequenceId
from schemas.manifest import Manifest
from schemas.plan import Route

CROSSINGS_MAX = 8
"""Sequences whose caches are copied at once: more would only wait for each other on the same links."""
QUICK_S = 0.25
"""A crossing that took less is followed by twice as many at once, one that took longer by half as many."""
BEHIND_TOKENS_MAX = 8
"""What may be left to copy at the boundary: a few tokens' caches are a frame or two."""
ROUNDS_MAX = 6
"""Copies while it runs. Each is shorter than the one before, unless the link is slower than the decoding."""
ASK_AGAIN_S = 1.0
GIVE_UP_S = 20.0
"""Without an answer for so long, a copy is not coming; a sequence that is held is given up much sooner."""
GIVE_UP_HELD_S = 2.0
GUESSED_STEP_S = 0.05
"""Where no step was timed yet."""
TELLING_BYTES = 256 << 10
"""Fewer say more about round trips than about a link's rate, unless they took longer than `QUICK_S`."""
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


@dataclass(slots=True)
class _Passage:
    """What the way to one epoch was like so far: whoever went first tells whether many can go at once, and how fast."""

    epoch: int
    at_once: int = 1
    bytes_per_s: float = DEFAULT_LINK_BYTES_PER_S
    """What sequences' caches were copied at, whatever else was copied beside them."""
    hold_s: float | None = None
    """What a sequence lately stood still for."""

    def arrived(self, moved_bytes: int, took_s: float, held_s: float) -> None:
        """Somebody has, and this is what it took."""
        self.hold_s = held_s if self.hold_s is None else (self.hold_s + held_s) / 2
        quick = took_s < QUICK_S
        self.at_once = min(CROSSINGS_MAX, 2 * self.at_once) if quick else max(1, self.at_once // 2)
        if took_s > 0 and (moved_bytes >= TELLING_BYTES or (moved_bytes and not quick)):
            # The mean is of times, not of rates: one slow link among fast ones is to show.
            self.bytes_per_s = 2 / (1 / self.bytes_per_s + took_s / moved_bytes)


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
        """(sequence, epoch): what could not cross to that epoch, or need not, finishes where it is."""
        self._passage = _Passage(epoch=-1)
        """To the epoch that sequences cross to now; links to another may be others."""

    def __len__(self) -> int:
        return len(self._under_way)

    def __contains__(self, sequence: SequenceId) -> bool:
        return sequence in self._under_way

    def lead_to(self, epoch: int) -> bool:
        """Whether some sequence is on its way to that epoch."""
        return any(crossing.new.plan.epoch == epoch for crossing in self._under_way.values())

    def may_begin(self, sequence: SequenceId, old: RouteRun, new: RouteRun) -> bool:
        """Whether it has still to be decided how this sequence leaves `old`, and can be: its prompt is through, and
        one more may be on its way."""
        epoch = new.plan.epoch
        if sequence in self._under_way or (sequence, epoch) in self._staying:
            return False
        return len(self._under_way) < self._passage_to(epoch).at_once and old.driver.written(sequence) is not None

    def position(
        self, sequence: SequenceId, old: RouteRun, new: RouteRun, manifest: Manifest, to_come: int
    ) -> Position:
        """What there is to know before it is chosen how a sequence leaves `old`; at most `to_come` tokens of it are to
        come. What was never timed is guessed from what was."""
        prompt, written = old.driver.prompt(sequence), old.driver.written(sequence)
        assert written is not None, "a sequence whose prompt is not through cannot leave"
        step_s = old.driver.typical_s.get("decode", GUESSED_STEP_S)
        # What is computed anew is computed there, and until something was, as it would be here.
        there, passage = new.driver.typical_s, self._passage_to(new.plan.epoch)
        moved = [b for _, found in _moves(old.route, new.route) for m in found for b in range(m.first, m.last + 1)]
        return Position(
            prompt_tokens=len(prompt.tokens) - prompt.said,
            known_tokens=max(0, written - len(prompt.tokens)) + prompt.said,
            tokens_to_come=to_come,
            moved_bytes_per_token=sum(manifest.blocks[block].kv_bytes_per_token for block in moved),
            chunk_tokens=old.plan.settings.chunk_tokens,
            step_s=step_s,
            new_step_s=there.get("decode", step_s),
            prefill_s=there.get("prefill", step_s),
            replay_s=there["replay"] / REPLAY_TOKENS_MAX if "replay" in there else there.get("decode", step_s),
            hold_s=2 * step_s if passage.hold_s is None else passage.hold_s,
            bytes_per_s=passage.bytes_per_s,
            beside=new.driver.recovering,
            exact=new.replays_exactly,
        )

    def stay(self, sequence: SequenceId, new: RouteRun) -> None:
        """It finishes where it is, as far as the epoch of `new` is concerned."""
        self._staying.add((sequence, new.plan.epoch))

    def begin(self, sequence: SequenceId, old: RouteRun, new: RouteRun, now: float) -> bool:
        """Start to copy; False if it cannot begin (yet): its prompt is not through, or there is no slot."""
        if not self.may_begin(sequence, old, new):
            return False
        if not new.reserve(sequence, old.driver.prompt(sequence).capacity):
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
                for node, frame in crossing.frames.items():
                    if node in crossing.waiting:
                        self._send(NodeId(node), frame)
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
        moved_bytes = sum(crossing.moved_bytes.values())
        self._passage_to(crossing.new.plan.epoch).arrived(moved_bytes, now - crossing.began, held_s)
        return Crossed(crossing.sequence, crossing.new, moved_bytes, held_s)

    def _passage_to(self, epoch: int) -> _Passage:
        if epoch != self._passage.epoch:
            self._passage = _Passage(epoch)
        return self._passage

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
