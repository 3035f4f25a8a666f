"""PURE: which sensitive blocks a node would see without being trusted (I6)."""

from collections.abc import Iterable


def exposed(secret: frozenset[int], blocks: Iterable[int], trusted: bool) -> list[int]:
    """The blocks of `secret` among `blocks`, ascending; none where the node that holds them is trusted."""
    return [] if trusted else sorted(secret.intersection(blocks))
