"""Where to cut: at the repeating layers where a graph has them, else into balanced segments.

Only shapes of computation are compared, never names: the sequence of operators and weight shapes between
two positions is one letter, and the layers are the longest stretch of the resulting word that repeats.
"""

import itertools
from dataclasses import dataclass
from typing import Literal

from models.analysis import Analysis, group_reads
from models.flops import node_flops
from models.graph import attribute
from models.weights import byte_size

Role = Literal["embedding", "layer", "head", "segment", "whole"]

MAX_SEGMENTS = 16
# A stretch of equal layers that covers less of the graph than this is an accident (two equal
# convolutions of a CNN), not what the model is made of.
MIN_REPEATING_SHARE = 0.5
NORMS = frozenset(
    {"SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "LayerNormalization", "SkipLayerNormalization"}
)


@dataclass(frozen=True)
class Range:
    """A stretch of the body, `body[start:stop]`, that becomes one block."""

    start: int
    stop: int
    role: Role


@dataclass(frozen=True)
class Cut:
    """All ranges in order, and one sentence that says how they came about."""

    ranges: tuple[Range, ...]
    sentence: str


@dataclass(frozen=True)
class Repeat:
    """`count` equal layers; `bounds` are the body indices around them, one more than the count."""

    bounds: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.bounds) - 1


def choose_cut(analysis: Analysis) -> Cut:
    """Divide the body into blocks, each joined to the next by one tensor."""
    length = len(analysis.body)
    if not analysis.positions:
        return uncut(analysis, "more than one tensor is alive at every position of the graph")
    repeat = find_repeat(analysis)
    if repeat is not None and repeat.bounds[-1] - repeat.bounds[0] >= MIN_REPEATING_SHARE * length:
        return _at_layers(repeat, length)
    cuts = balanced_cuts(analysis, MAX_SEGMENTS)
    bounds = (0, *cuts, length)
    ranges = tuple(Range(a, b, "segment") for a, b in itertools.pairwise(bounds))
    return Cut(
        ranges,
        f"No repeating layers: {len(ranges)} segments of balanced cost, cut at {len(cuts)} of the "
        f"{len(analysis.positions)} positions where one tensor is alive.",
    )


def uncut(analysis: Analysis, reason: str) -> Cut:
    """The whole body as one block, and why."""
    return Cut((Range(0, len(analysis.body), "whole"),), f"Not cut: {reason}.")


def find_repeat(analysis: Analysis) -> Repeat | None:
    """The stretch of equal layers that covers most of the body; of equal ones the shortest layer, then the latest.

    The latest start leaves a normalisation that ends the embedding with the embedding, and so keeps it
    next to the sum it normalises.
    """
    bounds = [0, *sorted(analysis.positions), len(analysis.body)]
    letters = _letters(analysis, bounds)
    best: tuple[tuple[int, int, int], Repeat] | None = None
    for period in range(1, len(letters) // 2 + 1):
        run = 0
        for i in range(len(letters) - period - 1, -1, -1):
            run = run + 1 if letters[i] == letters[i + period] else 0
            count = run // period + 1
            if count < 2:
                continue
            found = tuple(bounds[i + k * period] for k in range(count + 1))
            score = (found[-1] - found[0], -period, i)
            if best is None or score > best[0]:
                best = (score, Repeat(found))
    return best[1] if best else None


def balanced_cuts(analysis: Analysis, segments: int) -> list[int]:
    """At most `segments - 1` positions that divide arithmetic plus weights as evenly as positions allow."""
    costs = _costs(analysis)
    total = sum(costs) or 1.0
    before = [0.0]
    for cost in costs:
        before.append(before[-1] + cost / total)
    chosen: set[int] = set()
    for k in range(1, segments):
        target = k / segments
        nearest = min(analysis.positions, key=lambda p: (abs(before[p] - target), p))
        # A position far from its target belongs to another one; cutting there again gains nothing.
        if abs(before[nearest] - target) <= 0.5 / segments or not chosen:
            chosen.add(nearest)
    return sorted(chosen)


def body_flops(analysis: Analysis) -> list[int]:
    """The arithmetic of each group of the body, by `models.flops`."""
    constants = {tensor.name for tensor in analysis.model.graph.initializer} | set(analysis.helpers)
    return [sum(node_flops(node, analysis.types, constants) for node in group) for group in analysis.body]


def _at_layers(repeat: Repeat, length: int) -> Cut:
    ranges = [Range(a, b, "layer") for a, b in zip(repeat.bounds, repeat.bounds[1:], strict=False)]
    described = [f"{repeat.count} equal layers"]
    if repeat.bounds[0] > 0:
        ranges.insert(0, Range(0, repeat.bounds[0], "embedding"))
        described.insert(0, "what precedes them as the embedding")
    if repeat.bounds[-1] < length:
        ranges.append(Range(repeat.bounds[-1], length, "head"))
        described.append("what follows them as the head")
    return Cut(tuple(ranges), f"Cut at the repeating layers: {', '.join(described)}.")


def _letters(analysis: Analysis, bounds: list[int]) -> list[int]:
    """One number for each stretch between neighbouring positions, equal where the stretches compute alike."""
    shapes = {tensor.name: tuple(tensor.dims) for tensor in analysis.model.graph.initializer if len(tensor.dims) > 1}
    words: dict[object, int] = {}
    signatures = []
    for group in analysis.body:
        node = group[-1]
        operator = "norm" if node.op_type in NORMS else node.op_type
        if operator == "MatMulNBits":
            # Layers quantised to different widths are equal layers: their logical shape is what counts.
            size: object = (attribute(node, "K", 0), attribute(node, "N", 0))
        else:
            size = tuple(shapes[name] for name in node.input if name in shapes)
        signatures.append((operator, size))
    return [words.setdefault(tuple(signatures[a:b]), len(words)) for a, b in itertools.pairwise(bounds)]


def _costs(analysis: Analysis) -> list[float]:
    sizes = {tensor.name: byte_size(tensor) for tensor in analysis.model.graph.initializer if tensor.data_type != 8}
    flops = body_flops(analysis)
    weights = [sum(sizes.get(name, 0) for name in group_reads(group)) for group in analysis.body]
    return [f / (sum(flops) or 1) + w / (sum(weights) or 1) for f, w in zip(flops, weights, strict=True)]
