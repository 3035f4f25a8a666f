"""One route as its source runs it: the driver, the slots, and the sequences of both kinds of model."""

import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from agent.driver import Answered, Prompt, RouteDriver
from agent.prefixes import Prefixes
from agent.slots import SlotTable
from agent.urgency import UNHURRIED, Urgency
from profiler.kv import length_classes
from schemas.base import NodeId
from schemas.frame import Activation, Close, Frame, Item, Result, Reuse, Sampling, SequenceId
from schemas.plan import Plan, Route
from schemas.tensor import Array

log = logging.getLogger(__name__)

TENSOR_PATIENCE_S = 30.0
"""A call of a model without caches that takes longer is driven again, once."""
TENSOR_ATTEMPTS = 2
TENSOR_QUEUE_FACTOR = 5.0
ENDED_MAX = 256
"""Sequences that may be closed a second time: more than a route's slots, so that all that are leaked are among them."""


@dataclass(slots=True)
class _Call:
    frame: Activation
    sent: float
    attempts: int


class RouteRun:
    """Admits sequences to a route of a plan, sends their frames and frees their slots."""

    def __init__(
        self,
        plan: Plan,
        route: Route,
        ingress: NodeId,
        sequences: "itertools.count[int]",
        send: Callable[[NodeId, Frame], None],
    ) -> None:
        """`ingress` is this node; `send(node, frame)` never waits."""
        self.plan = plan
        self.route = route
        self.leaving = False
        """Its plan drains: new requests go to the successor."""
        self.draining = False
        """Nothing more starts here."""
        self.closed_until = 0.0
        """Nothing starts before: its slots are taken by sequences of another ingress, or it does not answer."""
        self.lost: set[NodeId] = set()
        """Nodes of the route that are gone: nothing can run here."""
        self._send = send
        self._sequences = sequences
        self.ingress = ingress
        settings = plan.settings.model_copy(update={"max_sequences": route.max_sequences})
        self._slots = SlotTable(length_classes(settings))
        self.driver = RouteDriver(
            plan.deployment,
            plan.epoch,
            route.index,
            ingress,
            settings.chunk_tokens,
            settings.pipeline_depth,
            len(route.stages),
        )
        self._prefixes = Prefixes(settings.chunk_tokens)
        self._calls: dict[SequenceId, _Call] = {}
        self._held: set[SequenceId] = set()
        """Of a pipeline: requests that are conducted here."""
        self._ended: deque[SequenceId] = deque(maxlen=ENDED_MAX)
        """Sequences that have ended or did not come, the last ones."""
        self._typical_s = 0.0
        """What a call lately took, waiting included."""

    @property
    def is_own(self) -> bool:
        """Whether the route begins at this node, so that new requests enter here."""
        return self.route.source == self.ingress

    @property
    def replays_exactly(self) -> bool:
        """Whether what is computed anew here has the bits that it had the first time."""
        return self.plan.settings.recovery == "identical"

    @property
    def is_open(self) -> bool:
        """Whether anything may start here."""
        return not self.draining and not self.lost and not self.plan.cold

    @property
    def active(self) -> int:
        """Sequences and calls in flight."""
        return len(self._slots) - len(self._prefixes) + len(self._calls) + len(self._held)

    @property
    def slots_free(self) -> int:
        """Slots that are free, of whatever length."""
        return max(0, self.route.max_sequences - self.active) if self.is_open else 0

    def holds(self, tokens_max: int) -> bool:
        """Whether a sequence may grow to `tokens_max` here, once a slot is free."""
        return tokens_max <= self._slots.longest

    def may_start(self, tokens_max: int | None, now: float) -> bool:
        """Whether such a sequence, or (None) a call, may find room now: what was kept has to make it, perhaps."""
        if now < self.closed_until:
            return False
        if tokens_max is None:
            return len(self._calls) + len(self._held) < self.route.max_sequences
        return len(self._prefixes) > 0 or self._slots.fitting(tokens_max) is not None

    def rows_for(self, tokens_max: int) -> int:
        """Slots, free or taken, that could hold a sequence that may grow to `tokens_max`."""
        return self._slots.rows(tokens_max)

    def contends(self, other_max: int, tokens_max: int) -> bool:
        """Whether a sequence of `other_max` tokens takes a slot that one of `tokens_max` could have."""
        return other_max > self._slots.longest or self._slots.shortest(other_max) >= self._slots.shortest(tokens_max)

    def start(
        self,
        tokens: tuple[int, ...],
        tokens_max: int,
        sampling: Sampling,
        known: tuple[int, ...],
        now: float,
        urgency: Urgency = UNHURRIED,
        allowed: bytes | None = None,
    ) -> Prompt | None:
        """Admit a sequence that may grow to `tokens_max`; None if no slot is free now. `known`: see `Prompt`; where
        the deployment prefers it fast, they are prefilled with the prompt instead.

        Where the caches of its beginning were kept, it begins behind that.
        """
        if not self.is_open:
            return None
        said = 0 if self.replays_exactly else len(known)
        if said:
            tokens, known = tokens + known, ()
        old, cached = self._prefixes.longest(tokens, now) or (None, 0)
        capacity = self._room_for(tokens_max, old)
        if capacity is None:
            return None
        sequence = next(self._sequences)
        if old is None:
            self._slots.take(sequence, capacity)
        else:
            self._reuse(old, sequence, cached, capacity, sampling)
        prompt = Prompt(sequence, tokens, capacity, sampling, known, cached, said, urgency, allowed)
        self.driver.admit(prompt)
        return prompt

    def cached(self, tokens: tuple[int, ...], now: float) -> int:
        """How many of these tokens' caches were kept here."""
        return (self._prefixes.longest(tokens, now) or (None, 0))[1]

    def drop_kept(self) -> None:
        """Keep nothing of sequences that have ended."""
        self._drop(self._prefixes.all())

    def learn_from(self, before: "RouteRun") -> None:
        """What a step takes is expected to be as it was on the plan before."""
        self.driver.typical_s.update(before.driver.typical_s)

    # Crossing from one epoch to the next.

    def reserve(self, sequence: SequenceId, capacity: int) -> bool:
        """Take a slot for a sequence that is to come from another epoch; False if none is free."""
        if self.lost or self._room_for(capacity, None) != capacity:
            return False
        self._slots.take(sequence, capacity)
        return True

    def has_room(self, capacity: int) -> bool:
        """Whether a sequence of that length class could start here now."""
        return self.is_open and self._room_for(capacity, None) is not None

    def give_up(self, sequence: SequenceId) -> None:
        """It does not come: give its slot back, here and on the nodes that have begun to copy its caches."""
        self._slots.release(sequence)
        self._ended.append(sequence)
        self._close_everywhere((sequence,))

    def close_again(self) -> None:
        """A node of the route has no slot left though here there was one: a Close was lost with the link it was on."""
        if self._ended:
            self._close_everywhere(tuple(self._ended))

    def call(self, tensors: dict[str, Array], now: float) -> SequenceId | None:
        """Run a model without caches on `tensors`; None if as many calls as slots are in flight."""
        if len(self._calls) >= self.route.max_sequences or not self.is_open:
            return None
        sequence = next(self._sequences)
        item = Item(sequence, 0, 0, 0, wants_token=False, index=0, capacity=0)
        plan = self.plan
        frame = Activation(plan.deployment, plan.epoch, self.route.index, 0, "tensor", (item,), tensors, self.ingress)
        self._calls[sequence] = _Call(frame, now, 1)
        self._send_first(frame)
        return sequence

    def hold(self) -> SequenceId | None:
        """Room for one request of a pipeline, which no frame is sent for; None if all is taken."""
        if len(self._held) >= self.route.max_sequences or not self.is_open:
            return None
        sequence = next(self._sequences)
        self._held.add(sequence)
        return sequence

    def pump(self, now: float) -> None:
        """Send every frame that may leave now."""
        for frame in self.driver.frames(now):
            self._send_first(frame)

    def take(self, result: Result, now: float) -> list[Answered]:
        """What is new in a result: steps of sequences, or calls."""
        fresh = self.driver.take(result, now)
        for sequence, _ in result.done:
            if (call := self._calls.pop(sequence, None)) is not None:
                self._typical_s = max(now - call.sent, 0.9 * self._typical_s)
                self.driver.pace.call.add(1, now - call.sent, now)
                self.driver.stalled = False
                fresh.append(Answered(sequence, now - call.sent, None))
        return fresh

    def go_on(self, sequence: SequenceId, token: int, allowed: bytes | None = None) -> None:
        """Feed the token that came out last; `allowed` may come next."""
        self.driver.go_on(sequence, token, allowed)

    def finish(self, sequence: SequenceId, now: float) -> None:
        """It has ended well: keep its caches for the next turn, as long as nobody needs the slot."""
        prompt = self.driver.prompt(sequence)
        if self.is_open and self.is_own and not self.leaving and self._keep(prompt, now):
            self.driver.end((sequence,))
        else:
            self.end((sequence,))

    def end(self, sequences: Iterable[SequenceId], *, broken: bool = False) -> None:
        """Free these sequences here and along the route; where it may be `broken`, each of its nodes is told."""
        sequences = tuple(sequences)
        for sequence in sequences:
            self._calls.pop(sequence, None)
            self._held.discard(sequence)
            self._slots.release(sequence)
        ended = self.driver.end(sequences)
        self._ended.extend(ended)
        if ended:
            close = Close(self.plan.deployment, self.plan.epoch, self.route.index, 0, ended)
            self._send(self.route.stages[0].node, close)
        if ended and broken:
            self._close_everywhere(ended)

    def check(self, now: float) -> tuple[SequenceId, ...]:
        """Drive again what is overdue; returns the sequences that were driven too often in vain."""
        self._drop(self._prefixes.stale(now))
        again, lost = self.driver.overdue(now)
        for sequence, call in self._calls.items():
            # Calls queue behind each other, so each may wait for all of them.
            patience_s = max(TENSOR_PATIENCE_S, TENSOR_QUEUE_FACTOR * self._typical_s * len(self._calls))
            if now - call.sent > patience_s * call.attempts:
                self.driver.stalled = True
                if call.attempts >= TENSOR_ATTEMPTS:
                    lost = (*lost, sequence)
                else:
                    call.attempts += 1
                    again.append(call.frame)
        if again:
            of = (self.plan.deployment, self.plan.epoch, self.route.index, len(again))
            log.info("driving again what is overdue: %s, epoch %d, route %d, %d frames", *of)
        for frame in again:
            self._send_first(frame)
        return lost

    def drive_again(self, now: float) -> None:
        """Everything that is under way: a link of the route is gone, with what it had been given. Who has run a step
        answers it again."""
        for frame in (*self.driver.anew(now), *(call.frame for call in self._calls.values())):
            self._send_first(frame)

    def _keep(self, prompt: Prompt, now: float) -> bool:
        return self._prefixes.keep(prompt.sequence, prompt.tokens, prompt.capacity, now)

    def _reuse(self, old: SequenceId, new: SequenceId, cached: int, capacity: int, sampling: Sampling) -> None:
        if self._prefixes.take(old) == capacity:
            self._slots.rename(old, new)
        else:
            self._slots.take(new, capacity)
            self._slots.release(old)
        road = (self.plan.deployment, self.plan.epoch, self.route.index, 0, self.ingress)
        self._send(self.route.stages[0].node, Reuse(*road, old, new, cached, capacity, sampling))

    def _room_for(self, tokens_max: int, reused: SequenceId | None) -> int | None:
        """The length class for `tokens_max` tokens, once what was kept has made room if need be; None: no room."""
        if reused is not None and self._slots[reused].tokens >= tokens_max:
            return self._slots[reused].tokens
        while (capacity := self._slots.fitting(tokens_max)) is None:
            oldest = self._prefixes.oldest(tokens_max, reused)
            if oldest is None:
                return None
            self._drop((oldest,))
        return capacity

    def _drop(self, kept: tuple[SequenceId, ...]) -> None:
        for sequence in kept:
            self._prefixes.take(sequence)
            self._slots.release(sequence)
        self._ended.extend(kept)
        if kept:
            close = Close(self.plan.deployment, self.plan.epoch, self.route.index, 0, kept)
            self._send(self.route.stages[0].node, close)

    def _close_everywhere(self, sequences: tuple[SequenceId, ...]) -> None:
        last = len(self.route.stages) - 1  # a Close to the last stage goes no further
        for node in dict.fromkeys(stage.node for stage in self.route.stages):
            self._send(node, Close(self.plan.deployment, self.plan.epoch, self.route.index, last, sequences))

    def _send_first(self, frame: Activation) -> None:
        self._send(self.route.stages[0].node, frame)
