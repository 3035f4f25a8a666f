"""Pure: driving the sequences of one route, from the ingress that is the route's source.

The driver says which frames to send next and takes in what comes back. It reads no clock and sends
nothing; `now` is seconds of any monotonic clock. A step that stays unanswered is driven again: every
stage computes a repeated step to the same bytes, and an answer that comes twice is counted once.
"""

from collections.abc import Container, Iterable
from dataclasses import dataclass, field, replace
from math import ceil

import numpy as np

from agent.pace import Pace
from agent.urgency import UNHURRIED, Urgency
from schemas.frame import Activation, Item, Kind, Result, Sampling, SequenceId, Token

STALL_FLOOR_S = 1.0
"""A step is suspect when it takes five times as long as its kind lately did, and at least this long."""
STALL_FACTOR = 5.0
STALL_FIRST_S = 30.0
"""Before any step of a kind was timed: a cold first chunk on a slow machine is no fault."""
ATTEMPTS_MAX = 4
REPLAY_TOKENS_MAX = 16
"""In one frame: sequences that run wait for as many steps at most."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sequence as it is admitted. `capacity` is the length class of its slots.

    `known` are tokens that came out of it before, elsewhere: they are replayed one step at a time, in the same calls
    that made them (a prefill of them would give other bits), and what comes out next is token number `len(known)`.
    """

    sequence: SequenceId
    tokens: tuple[int, ...]
    capacity: int
    sampling: Sampling
    known: tuple[int, ...] = ()
    cached: int = 0
    """The first tokens whose caches are on the route already."""
    said: int = 0
    """How many of the last `tokens` came out of it before, where they are prefilled instead of replayed: faster, and
    equivalent, not identical."""
    urgency: Urgency = UNHURRIED
    allowed: bytes | None = None
    """Of an output that is constrained: which tokens may come out first, after those that are `known` or `said`."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A sequence between two steps: what it takes to go on with it over another route that has its caches."""

    prompt: Prompt
    tokens: tuple[int, ...]
    """Every token that came out of it."""
    driven: int
    """Positions whose caches are written."""
    step: int
    allowed: bytes | None = None


@dataclass(frozen=True, slots=True)
class Answered:
    """A step that came back: after how long, and the token it yielded if it was to yield one."""

    sequence: SequenceId
    elapsed_s: float
    token: Token | None


@dataclass(slots=True, eq=False)
class _Running:
    prompt: Prompt
    out: list[int]
    """The tokens that came out, as far as they are to be fed."""
    driven: int = 0
    """Tokens sent into the route so far; also the absolute position of the next one."""
    step: int = 0
    held: bool = False
    """Nothing more is sent for it."""
    allowed: bytes | None = None
    """Which tokens may come out next; None: any."""
    answered: float = 0.0
    """When its last step was."""
    unanswered: dict[int, "_Flight"] = field(default_factory=dict)

    @property
    def prefilled(self) -> bool:
        return self.driven >= len(self.prompt.tokens)

    @property
    def is_ready(self) -> bool:
        """Whether a decode step can leave: there is one token to feed, and no step is under way."""
        return not self.unanswered and not self.held and self.prefilled and self.unfed == 1

    @property
    def is_recovering(self) -> bool:
        """Whether its prompt is computed anew, so that what came out of it before can follow."""
        return bool(self.prompt.known or self.prompt.said) and not self.prefilled and not self.held

    @property
    def index(self) -> int:
        """Of the next token that comes out."""
        return self.prompt.said + len(self.out)

    @property
    def next_due(self) -> float:
        """When its next token is."""
        return self.answered + self.prompt.urgency.pace_s

    @property
    def unfed(self) -> int:
        """Tokens that came out and were not fed."""
        return len(self.out) - (self.driven - len(self.prompt.tokens))

    @property
    def replayable(self) -> int:
        """Those of them whose successor is known too: they need no answer to leave."""
        fed = self.driven - len(self.prompt.tokens)
        return max(0, len(self.out) - fed - 1) if fed >= 0 and not self.held else 0


@dataclass(slots=True, eq=False)
class _Flight:
    kind: Kind
    frame: Activation
    sent: float
    attempts: int
    missing: int
    """Items of the frame that are not answered yet."""
    ahead: int = 0
    """Of a prefill chunk: how many others were on their way when it was sent."""
    anew: float | None = None
    """When it was sent as if for the first time, because a link was gone."""


class RouteDriver:
    """All sequences that this ingress runs over one route of one epoch."""

    def __init__(
        self, deployment: str, epoch: int, route: int, ingress: str, chunk_tokens: int, depth: int, stages: int = 1
    ) -> None:
        """`depth`: decode groups, and prefill chunks, in flight at once. `stages` of the route: so many frames of what
        is computed anew are in flight at least, since none of them waits for an answer."""
        self._head = (deployment, epoch, route)
        self._ingress = ingress
        self._chunk = chunk_tokens
        self._depth = depth
        self._lanes = max(depth, stages)
        self._running: dict[SequenceId, _Running] = {}
        self._flights: list[_Flight] = []
        self._chunk_answered = 0.0
        """When the last prefill chunk was."""
        self.typical_s: dict[str, float] = {}
        """What a step of each kind lately took, in seconds."""
        self.pace = Pace()
        self.stalled = False
        """Whether a step has been overdue since the last answer came: some node of the route may hang."""
        self._changed = False
        """Whether anything happened since it was last asked for frames: without that there are no more."""

    def __len__(self) -> int:
        return len(self._running)

    @property
    def recovering(self) -> int:
        """Sequences whose prompts are being computed anew."""
        return sum(running.is_recovering for running in self._running.values())

    @property
    def decoding(self) -> int:
        """Sequences whose prompts are through."""
        return sum(running.prefilled for running in self._running.values())

    @property
    def unfilled_tokens(self) -> int:
        """Of prompts that were admitted: tokens that were not sent into the route yet."""
        return sum(max(0, len(r.prompt.tokens) - r.driven) for r in self._running.values())

    def admit(self, prompt: Prompt) -> None:
        """Start a sequence. The most urgent one's chunks go out first; among equals, in order of admission."""
        self._changed = True
        assert prompt.tokens, "an empty prompt is refused before admission"
        self._running[prompt.sequence] = _Running(prompt, list(prompt.known), prompt.cached, allowed=prompt.allowed)

    def go_on(self, sequence: SequenceId, token: int, allowed: bytes | None = None) -> None:
        """Feed `token`, the last one that came out, as the next step; `allowed` may come out of that."""
        if (running := self._running.get(sequence)) is not None:
            running.out.append(token)
            running.allowed = allowed
            self._changed = True

    def prompt(self, sequence: SequenceId) -> Prompt:
        """As it was admitted."""
        return self._running[sequence].prompt

    @property
    def chunks_in_flight(self) -> int:
        """Prefill chunks that are on their way."""
        return sum(flight.kind == "prefill" for flight in self._flights)

    def unfilled(self, sequence: SequenceId) -> int:
        """Tokens of its prompt that are still to be sent."""
        running = self._running.get(sequence)
        return 0 if running is None else max(0, len(running.prompt.tokens) - running.driven)

    def written(self, sequence: SequenceId) -> int | None:
        """Positions that every stage has surely written; None until these hold the prompt and what is replayed."""
        running = self._running.get(sequence)
        if running is None:
            return None
        under_way = [i for f in running.unanswered.values() for i in f.frame.items if i.sequence == sequence]
        written = min([running.driven, *(item.position for item in under_way)])
        return written if written >= len(running.prompt.tokens) + len(running.prompt.known) else None

    def hold(self, sequence: SequenceId) -> None:
        """Send nothing more for it; once its last step is answered it stands at a token boundary."""
        if (running := self._running.get(sequence)) is not None:
            running.held = self._changed = True

    def let_go(self, sequence: SequenceId) -> None:
        """Undo `hold`."""
        if (running := self._running.get(sequence)) is not None:
            running.held, self._changed = False, True

    def standing(self, sequence: SequenceId) -> Standing | None:
        """Where a held sequence stands, or None while a step of it is under way or its last token is not known yet."""
        running = self._running.get(sequence)
        if running is None or running.unanswered or running.driven >= len(running.prompt.tokens) + len(running.out):
            return None
        return Standing(running.prompt, tuple(running.out), running.driven, running.step, running.allowed)

    def join(self, standing: Standing) -> None:
        """Go on with a sequence whose caches this route has."""
        prompt, self._changed = standing.prompt, True
        self._running[prompt.sequence] = _Running(
            prompt, list(standing.tokens), standing.driven, standing.step, allowed=standing.allowed
        )

    def end(self, sequences: Iterable[SequenceId]) -> tuple[SequenceId, ...]:
        """Forget sequences; returns those that were running. Answers still on their way are ignored."""
        ended, self._changed = [], True
        for sequence in sequences:
            if (running := self._running.pop(sequence, None)) is not None:
                ended.append(sequence)
                for flight in running.unanswered.values():
                    self._answered(flight)
        return tuple(ended)

    def frames(self, now: float) -> list[Activation]:
        """Every frame that may leave now, in order."""
        out: list[Activation] = []
        if not self._changed:
            return out
        self._changed = False
        while (flight := self._next_decode(now) or self._next_replay(now) or self._next_prefill(now)) is not None:
            self._flights.append(flight)
            out.append(flight.frame)
        return out

    def take(self, result: Result, now: float) -> list[Answered]:
        """The steps of `result` that are new; a sequence that yielded a token waits for `go_on` or `end`."""
        fresh = []
        tokens: list[tuple[SequenceId, int, Token | None]] = [(t.sequence, t.step, t) for t in result.tokens]
        for sequence, step, token in tokens + [(sequence, step, None) for sequence, step in result.done]:
            elapsed_s = self._take_step(sequence, step, now)
            if elapsed_s is None:
                continue
            if token is not None:
                assert token.index == self._running[sequence].index, "a step yields the token it was driven for"
            fresh.append(Answered(sequence, elapsed_s, token))
        return fresh

    def overdue(self, now: float) -> tuple[list[Activation], tuple[SequenceId, ...]]:
        """Frames to drive again, and the sequences whose step stayed unanswered too often."""
        again, lost = [], []
        for flight in self._flights:
            since = flight.sent if flight.anew is None else flight.anew
            if now - since < self._patience_s(flight.kind) * flight.attempts:
                continue
            self.stalled = True
            if flight.attempts >= ATTEMPTS_MAX:
                lost += [item.sequence for item in flight.frame.items]
                continue
            flight.attempts += 1
            frame = _only(flight.frame, self._running.keys())
            if frame.items:
                again.append(frame)
        return again, tuple(sequence for sequence in dict.fromkeys(lost) if sequence in self._running)

    def anew(self, now: float) -> list[Activation]:
        """Every frame that is under way, to be driven again and waited for as if it had not been sent."""
        again = []
        for flight in self._flights:
            flight.anew, flight.attempts = now, 1
            frame = _only(flight.frame, self._running.keys())
            if frame.items:
                again.append(frame)
        return again

    def _next_decode(self, now: float) -> _Flight | None:
        flying = [flight for flight in self._flights if flight.kind == "decode"]
        if len(flying) >= self._depth:
            return None
        ready = [running for running in self._running.values() if running.is_ready]
        if not ready:
            return None
        active = len(ready) + sum(flight.missing for flight in flying)
        size = ceil(active / self._depth)
        if size < len(ready):
            ready.sort(key=lambda running: running.next_due)
        group = ready[:size]
        items, tokens = [], []
        for running in group:
            tokens.append(running.out[-1])
            items.append(self._item(running, 1, wants_token=True))
        ids = np.asarray(tokens, np.int64)[:, None]
        return self._launch("decode", group, items, ids, now)

    def _next_replay(self, now: float) -> _Flight | None:
        """Known tokens of all sequences that have some left, as many of each as the one with the fewest has, at most a
        frame's worth: so all of them together take as many steps as the longest alone.

        For the same reason nothing is replayed while there is a prompt to compute before its sequence can join.
        """
        group = [running for running in self._running.values() if running.replayable]
        if not group or any(running.is_recovering for running in self._running.values()):
            return None
        if sum(flight.kind == "replay" for flight in self._flights) >= self._lanes:
            return None
        count = min((REPLAY_TOKENS_MAX, *(running.replayable for running in group)))
        starts = [running.driven - len(running.prompt.tokens) for running in group]
        ids = np.asarray([r.out[fed : fed + count] for r, fed in zip(group, starts, strict=True)], np.int64)
        return self._launch("replay", group, [self._item(r, count, wants_token=False) for r in group], ids, now)

    def _next_prefill(self, now: float) -> _Flight | None:
        unfilled = [r for r in self._running.values() if not r.prefilled and not r.held]
        if not unfilled:
            return None
        # Earliest due first: whatever set of prompts can be in time, is. The least slack first would alternate between
        # two prompts as each gets ahead of the other, and make both late.
        running = min(unfilled, key=lambda r: r.prompt.urgency.due)
        if self.chunks_in_flight >= (self._lanes if running.is_recovering else self._depth):
            return None
        tokens = running.prompt.tokens
        # A chunk ends at the next absolute multiple of the chunk size, whatever else is going on: results
        # then never depend on load.
        end = min((running.driven // self._chunk + 1) * self._chunk, len(tokens))
        ids = np.asarray(tokens[running.driven : end], np.int64)[None, :]
        item = self._item(running, end - running.driven, wants_token=end == len(tokens) and not running.out)
        return self._launch("prefill", [running], [item], ids, now)

    def _item(self, running: _Running, count: int, *, wants_token: bool) -> Item:
        prompt = running.prompt
        item = Item(
            prompt.sequence, running.step, running.driven, count, wants_token, running.index, prompt.capacity,
            None if running.prefilled else prompt.sampling, running.allowed if wants_token else None,
        )  # fmt: skip
        running.driven += count
        running.step += 1
        return item

    def _launch(self, kind: Kind, group: list[_Running], items: list[Item], ids: np.ndarray, now: float) -> _Flight:
        frame = Activation(*self._head, 0, kind, tuple(items), {"x": ids}, self._ingress)
        flight = _Flight(kind, frame, now, 1, len(items), self.chunks_in_flight if kind == "prefill" else 0)
        for running, item in zip(group, items, strict=True):
            running.unanswered[item.step] = flight
        return flight

    def _take_step(self, sequence: SequenceId, step: int, now: float) -> float | None:
        """How long the step took; None if it was answered before, or its sequence is over."""
        running = self._running.get(sequence)
        flight = running.unanswered.pop(step, None) if running is not None else None
        if flight is None:
            return None
        assert running is not None
        for earlier in [s for s in running.unanswered if s < step]:
            # Stages run a sequence's steps in order: this one's answer is theirs too, if theirs was lost.
            self._answered(running.unanswered.pop(earlier))
        took = now - flight.sent
        self.stalled, self._changed = False, True
        running.answered = now
        if flight.attempts == 1 and flight.anew is None:
            self._measured(flight, took, now)
            self.typical_s[flight.kind] = max(took, 0.9 * self.typical_s.get(flight.kind, 0.0))
        self._answered(flight)
        return took

    def _measured(self, flight: _Flight, took_s: float, now: float) -> None:
        items = flight.frame.items
        if flight.missing < len(items):
            return  # by another of its answers
        if flight.kind == "prefill":
            self.pace.chunk_took(
                items[0].count, took_s, flight.ahead, now - max(flight.sent, self._chunk_answered), now
            )
            self._chunk_answered = now
        elif flight.kind == "decode":
            self.pace.step.add(len(items), took_s, now)

    def _answered(self, flight: _Flight) -> None:
        flight.missing -= 1
        if flight.missing == 0:
            self._flights.remove(flight)

    def _patience_s(self, kind: str) -> float:
        typical = self.typical_s.get(kind)
        if typical is None and kind == "replay" and "decode" in self.typical_s:
            typical = REPLAY_TOKENS_MAX * self.typical_s["decode"]
        return STALL_FIRST_S if typical is None else max(STALL_FLOOR_S, STALL_FACTOR * typical)


def _only(frame: Activation, alive: Container[SequenceId]) -> Activation:
    """The frame with the rows of sequences that still run."""
    keep = [i for i, item in enumerate(frame.items) if item.sequence in alive]
    if len(keep) == len(frame.items):
        return frame
    tensors = {name: array[keep] for name, array in frame.tensors.items()}
    return replace(frame, items=tuple(frame.items[i] for i in keep), tensors=tensors)
