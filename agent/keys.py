"""The keys of sealed blocks that plans give this node: as they come with plan events, opened when a block is loaded.

They are not written to the disk: an agent that restarts finds them where it finds its plans, in the log.
"""

from bus.hpke import block_info, unwrap
from bus.identity import Identity
from schemas.base import DeploymentId, Digest
from schemas.errors import ErrorCode, ResplitError
from schemas.section import EventSection

Wraps = dict[tuple[Digest, int], bytes]
"""By model and block."""


class BlockKeys:
    """What the newest event of each deployment lets this node open, and nothing else."""

    def __init__(self, identity: Identity) -> None:
        self._identity = identity
        self._wraps: dict[DeploymentId, Wraps] = {}

    def follow(self, event: EventSection) -> None:
        """Take the keys of a verified event in place of those that came with the one before it."""
        found = {(keys.model, wrap.block): wrap.data for keys in event.keys for wrap in keys.wraps}
        self._wraps[event.deployment] = found

    def key(self, model: Digest, block: int) -> bytes:
        """The key of a block of a sealed model.

        Raises `ResplitError`: MISSING_KEYS where none was given to this node, BAD_SIGNATURE where it was made for
        another one, or for another purpose.
        """
        wrapped = next((wraps[model, block] for wraps in self._wraps.values() if (model, block) in wraps), None)
        if wrapped is None:
            message = (
                f"the plan came without a key to block {block} of model {model} for {self._identity.name!r}: the "
                "orchestrator has none, or its roster says that this node must not hold the block"
            )
            raise ResplitError(ErrorCode.MISSING_KEYS, message, "keys")
        info = block_info(self._identity.root.cluster, model, block, self._identity.name)
        return unwrap(wrapped, self._identity.sealing, info)
