"""What sequences are told by: a number of the process that drives them, and a counter behind it."""

import itertools
import secrets
from hashlib import sha256

from schemas.base import NodeId
from schemas.frame import SequenceId


def boot_number(node: NodeId, boot: str) -> int:
    """Of a process, below 2^31. Two have the same with a chance of one in two billion."""
    return int(sha256(f"{node} {boot}".encode()).hexdigest()[:8], 16) >> 1


def sequence_numbers(node: NodeId, boot: str, first: int | None = None) -> "itertools.count[SequenceId]":
    """Sequence ids no other process, and no earlier one of this node, hands out. The `first` is below 2^31, and drawn
    if it is not given: who knows the process could else name sequences of others (decision 0033)."""
    return itertools.count((boot_number(node, boot) << 32) + (secrets.randbits(31) if first is None else first))


def boot_number_of(sequence: SequenceId) -> int:
    """That of the process which drives a sequence."""
    return sequence >> 32
