"""A model version as it lies in the registry: the sealed files of each block, and who can open them.

Each block has one key, and each host of the block has that key wrapped for it alone (`bus.hpke`). A file that two
blocks share is sealed once for each: under one key, whoever may open the one block could open the other's file.
The manifest is believed only inside a signed envelope: a wrap by itself does not say who made it.
"""

import base64
from collections.abc import Iterable
from typing import Annotated, Literal, Self

from pydantic import Field, StringConstraints, model_validator

from schemas.base import NodeId, NodeName, Sha256, Value
from schemas.manifest import BlobRef

MAX_BLOCKS = 4096
MAX_FILES = 65_536
"""Of one block."""
MAX_WRAPS = 1024
"""Hosts of one block."""

# 80 bytes have one spelling: the two bits that the last digit has over are zero.
_WRAPPED_KEY = r"^[A-Za-z0-9+/]{106}[AEIMQUYcgkosw048]=$"


class SealedFile(Value):
    """One file as it is (`plain`) and as it lies in the registry and travels (`sealed`)."""

    plain: BlobRef
    sealed: BlobRef

    @model_validator(mode="after")
    def _is_sealed(self) -> Self:
        if self.sealed.size_bytes <= self.plain.size_bytes or self.sealed.digest == self.plain.digest:
            raise ValueError(f"file {self.plain.digest} is not sealed: its sealed form is no longer than itself")
        return self


class Wrap(Value):
    """A block's key, for one node: HPKE's encapsulated key (32 bytes), then the key and its tag (48), in base64."""

    node: NodeName
    wrapped: Annotated[str, StringConstraints(pattern=_WRAPPED_KEY)]

    @classmethod
    def of(cls, node: NodeId, wrapped: bytes) -> "Wrap":
        """The bytes that `bus.hpke.wrap` made, for `node`."""
        return cls(node=node, wrapped=base64.b64encode(wrapped).decode())

    @property
    def data(self) -> bytes:
        """The bytes that `bus.hpke.unwrap` opens."""
        return base64.b64decode(self.wrapped)


class SealedBlock(Value):
    """One block: its files under one key, and that key for each of its hosts."""

    index: int = Field(ge=0)
    epoch: int = Field(ge=1)
    """Grows with every new key of this block. A host more is a wrap more; a host less takes a new key, and all
    files sealed again, or it can open them for ever."""
    files: tuple[SealedFile, ...] = Field(min_length=1, max_length=MAX_FILES)
    wraps: tuple[Wrap, ...] = Field(max_length=MAX_WRAPS)

    @model_validator(mode="after")
    def _names_each_once(self) -> Self:
        if twice := _repeated(file.plain.digest for file in self.files):
            raise ValueError(f"block {self.index} has file {twice} twice")
        if twice := _repeated(wrap.node for wrap in self.wraps):
            raise ValueError(f"block {self.index} has two keys for node {twice}")
        return self

    def wrap_for(self, node: NodeId) -> Wrap | None:
        """The key of this block as `node` can open it; None where `node` is no host of it."""
        return next((wrap for wrap in self.wraps if wrap.node == node), None)


class SealedManifest(Value):
    """All sealed blocks of one model version; whoever made it signs it."""

    version: Literal[1] = 1
    cluster: NodeName
    model: Sha256
    """The digest of the model's manifest."""
    revision: int = Field(ge=1)
    """Grows with every sealed manifest of this model: of two, the higher one holds."""
    blocks: tuple[SealedBlock, ...] = Field(min_length=1, max_length=MAX_BLOCKS)

    @model_validator(mode="after")
    def _is_whole(self) -> Self:
        for i, block in enumerate(self.blocks):
            if block.index != i:
                raise ValueError(f"block {i} carries index {block.index}")
        # One sealed file in two blocks would mean that the key of the one opens a file of the other.
        if twice := _repeated(file.sealed.digest for block in self.blocks for file in block.files):
            raise ValueError(f"sealed file {twice} is named twice")
        return self


def _repeated(names: Iterable[str]) -> str | None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            return name
        seen.add(name)
    return None
