"""How many tokens of KV cache a deployment's slots hold: the one rule that planner and agent share.

A slot for the longest sequence per sequence served would waste most of the memory, so the slots come in
length classes: many short ones, a few long ones. A sequence takes the smallest free slot that fits it.
"""

from math import ceil

from schemas.deployment import Settings

ALIGNMENT_TOKENS = 16
"""Slot lengths are multiples of this, so that rows of the cache stay aligned."""
SHORTEST_CLASS_TOKENS = 64
"""Shorter slots would save less than their bookkeeping costs."""
LENGTH_RATIO = 4
"""A class is this many times longer than the one below it, and has that many times fewer slots."""
CLASSES_MAX = 3
SLOTS_MIN = 2
"""A class has at least this many rows in memory, for a lone sequence may have to run in company (`agent.probe`)."""


def length_classes(settings: Settings) -> tuple[tuple[int, int], ...]:
    """(tokens per slot, slots) of each length class, shortest first.

    The longest class holds `context_tokens`, the others a quarter and a sixteenth of it, as long as that is
    `SHORTEST_CLASS_TOKENS` or more. The shortest class has `max_sequences` slots, each longer one a quarter
    of the class below it and at least one: every admitted length has a slot.
    """
    lengths = [_aligned(ceil(settings.context_tokens / LENGTH_RATIO**step)) for step in range(CLASSES_MAX)]
    kept = [tokens for tokens in lengths[1:] if tokens >= SHORTEST_CLASS_TOKENS]
    classes = []
    slots = settings.max_sequences
    for tokens in sorted({lengths[0], *kept}):
        classes.append((tokens, slots))
        slots = max(1, ceil(slots / LENGTH_RATIO))
    return tuple(classes)


def kv_tokens(settings: Settings) -> int:
    """Tokens that all slots of a deployment hold together; a block's cache is this times its bytes per token."""
    return sum(tokens * max(slots, SLOTS_MIN) for tokens, slots in length_classes(settings))


def _aligned(tokens: int) -> int:
    return ceil(tokens / ALIGNMENT_TOKENS) * ALIGNMENT_TOKENS
