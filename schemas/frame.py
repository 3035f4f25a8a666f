"""Frames: what agents send each other while they serve, over a link or, as a fallback, the bus.

Every hop carries deployment, epoch, route and, for each sequence in it, the step: a stage that sees a step twice
computes the same bytes twice, so a lost frame is simply driven again. How frames travel is in `schemas.framing`.
"""

from dataclasses import dataclass
from typing import Literal

from schemas.tensor import Array

Kind = Literal["prefill", "decode", "replay", "tensor"]
"""`replay`: several known tokens of each of some sequences, computed one step at a time, in the calls of `decode`."""

SequenceId = int
"""Unique among everything an ingress process ever started: its boot number and a counter."""


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the head picks the next token of a sequence; travels with the sequence, wherever it goes."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    logprobs: int = 0
    trace: str = ""
    """The `traceparent` of its request, if that is traced: by it each stage says what its part took."""


@dataclass(frozen=True, slots=True)
class Item:
    """One sequence's share of a frame.

    `step` counts the frames that the ingress drove for the sequence, from 0: the prefill chunks, then
    one per token. `position` is the absolute position of its first token here, `count` how many there are.
    `wants_token` is set on the last prefill chunk and on every decode step; the token's index is then
    `index` (0 for the first one). `capacity` is the number of tokens the sequence may grow to, which
    decides the KV length class; `sampling` is what the head needs. Both travel in every prefill frame.
    `allowed` goes with a step that wants a token of an output that is constrained: one bit for each token of the
    vocabulary, the lowest first, compressed by zlib.
    """

    sequence: SequenceId
    step: int
    position: int
    count: int
    wants_token: bool
    index: int
    capacity: int
    sampling: Sampling | None = None
    allowed: bytes | None = None


@dataclass(frozen=True, slots=True)
class StageTime:
    """What one stage spent on one frame, in microseconds."""

    stage: int
    compute_us: int
    queue_us: int


@dataclass(frozen=True, slots=True)
class Activation:
    """The input of stage `stage`: a prefill chunk of one sequence, one decode step of several, or tensors.

    Tensors: the boundary tensor (or `input_ids` for the first stage), [B, S, ...] with the items' rows in
    order; in a `tensor` frame, also the graph inputs and finished outputs that later stages still need.
    """

    deployment: str
    epoch: int
    route: int
    stage: int
    kind: Kind
    items: tuple[Item, ...]
    tensors: dict[str, Array]
    ingress: str
    """Who drives these sequences, and wants the result."""
    times: tuple[StageTime, ...] = ()


@dataclass(frozen=True, slots=True)
class Token:
    """What the head chose for one sequence."""

    sequence: SequenceId
    step: int
    index: int
    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Result:
    """From the last stage to the ingress: tokens (`prefill`, `decode`) or output tensors (`tensor`).

    A prefill chunk that is not the last yields an item in `done` instead of a token: the chunk arrived.
    """

    deployment: str
    epoch: int
    route: int
    tokens: tuple[Token, ...]
    done: tuple[tuple[SequenceId, int], ...]
    tensors: dict[str, Array]
    ingress: str
    times: tuple[StageTime, ...]


@dataclass(frozen=True, slots=True)
class Close:
    """Along a route, behind its activations: on this epoch these sequences are over; `stage` frees their caches."""

    deployment: str
    epoch: int
    route: int
    stage: int
    sequences: tuple[SequenceId, ...]


@dataclass(frozen=True, slots=True)
class Reuse:
    """Along a route, ahead of its first chunk: sequence `new` begins with the first `tokens` tokens of `old`, which has
    ended, and takes their caches and its slot. `capacity` is the length class of `new`."""

    deployment: str
    epoch: int
    route: int
    stage: int
    ingress: str
    old: SequenceId
    new: SequenceId
    tokens: int
    capacity: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Failure:
    """From a stage to the ingress: these sequences (none named: all of the route) cannot go on, and why."""

    deployment: str
    epoch: int
    route: int
    sequences: tuple[SequenceId, ...]
    ingress: str
    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Move:
    """Blocks `first` to `last`, both included, whose caches are to come from `source`."""

    first: int
    last: int
    source: str


@dataclass(frozen=True, slots=True)
class Adopt:
    """From the ingress to a node of another epoch's route: take over a sequence that has run `tokens` tokens.

    Caches are only ever appended to, so most of them are copied while the sequence still runs on the epoch `before`;
    the `final` one comes at a token boundary, for the few tokens since, and from then on the sequence is of `epoch`.
    """

    deployment: str
    before: int
    epoch: int
    route: int
    ingress: str
    sequence: SequenceId
    tokens: int
    capacity: int
    sampling: Sampling
    moves: tuple[Move, ...]
    """What this node did not run before."""
    final: bool


@dataclass(frozen=True, slots=True)
class Adopted:
    """From that node to the ingress: every cache of the first `tokens` tokens is here, or why that cannot be."""

    deployment: str
    epoch: int
    route: int
    ingress: str
    node: str
    sequence: SequenceId
    tokens: int
    final: bool
    moved_bytes: int
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Fetch:
    """Between two nodes: send me what the tokens from `start` up to `stop` left in the caches of these blocks."""

    deployment: str
    before: int
    epoch: int
    node: str
    """Who asks."""
    sequence: SequenceId
    first: int
    last: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Cache:
    """The answer to a `Fetch`: tensors `BLOCK.LAYER.k` and `.v`, [heads, stop - start, dim]; none if not there."""

    deployment: str
    epoch: int
    node: str
    """Who gives them."""
    sequence: SequenceId
    first: int
    last: int
    start: int
    stop: int
    tensors: dict[str, Array]


Frame = Activation | Result | Close | Reuse | Failure | Adopt | Adopted | Fetch | Cache


def on_stage(frame: Activation, stage: int, tensors: dict[str, Array], time: StageTime) -> Activation:
    """The frame as the next stage receives it."""
    f = frame
    return Activation(f.deployment, f.epoch, f.route, stage, f.kind, f.items, tensors, f.ingress, (*f.times, time))
