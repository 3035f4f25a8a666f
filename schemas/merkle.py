"""PURE: the Merkle tree hash of RFC 6962, section 2.1, grown leaf by leaf in O(log n) memory."""

from dataclasses import dataclass
from hashlib import sha256

from schemas.base import Digest


@dataclass(frozen=True, slots=True)
class Tree:
    """The tree over `count` leaves, as the roots of its perfect subtrees, the largest first.

    A leaf and an inner node are hashed with different prefixes, so neither can be passed off as the other.
    """

    count: int = 0
    peaks: tuple[bytes, ...] = ()

    def with_leaf(self, leaf: bytes) -> "Tree":
        """The tree with one leaf more, behind the others."""
        node, peaks, even = sha256(b"\x00" + leaf).digest(), list(self.peaks), self.count
        while even & 1:
            node = sha256(b"\x01" + peaks.pop() + node).digest()
            even >>= 1
        return Tree(self.count + 1, (*peaks, node))

    @property
    def root(self) -> Digest:
        """The tree hash of all leaves; that of no leaves is the hash of nothing."""
        if not self.peaks:
            return Digest(sha256(b"").hexdigest())
        *left, node = self.peaks
        for peak in reversed(left):
            node = sha256(b"\x01" + peak + node).digest()
        return Digest(node.hex())
