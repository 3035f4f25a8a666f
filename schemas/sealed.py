"""What travels sealed inside values that are signed: letters, and the keys that open the blocks of a sealed model.

Which sealed files a block has stands in the model's manifest (`Block.sealed`). Each block has one key; whoever sealed
the model keeps all of them (`ModelKeys`), and a host of a block gets that block's key wrapped for it alone
(`bus.hpke`). A wrap by itself does not say who made it: it is believed only inside a signed envelope.
"""

import base64
from collections.abc import Iterable
from itertools import pairwise
from typing import Annotated, Self

from pydantic import Field, StringConstraints, model_validator

from schemas.base import NodeName, Sha256, Value
from schemas.errors import ErrorCode, ResplitError

MAX_BLOCKS = 4096
LETTERS_MAX = 2048
"""More than there are members of a cluster."""
Letter = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
"""A letter of `bus.letters`, in base64."""

# Bytes have one spelling: the bits that the last digit has over are zero.
_KEY = r"^[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=$"
_WRAPPED_KEY = r"^[A-Za-z0-9+/]{106}[AEIMQUYcgkosw048]=$"


class Wrap(Value):
    """A block's key, for one node: HPKE's encapsulated key (32 bytes), then the key and its tag (48), in base64."""

    block: int = Field(ge=0)
    wrapped: Annotated[str, StringConstraints(pattern=_WRAPPED_KEY)]

    @classmethod
    def of(cls, block: int, wrapped: bytes) -> "Wrap":
        """The bytes that `bus.hpke.wrap` made, of the key of `block`."""
        return cls(block=block, wrapped=base64.b64encode(wrapped).decode())

    @property
    def data(self) -> bytes:
        """The bytes that `bus.hpke.unwrap` opens."""
        return base64.b64decode(self.wrapped)


class NodeKeys(Value):
    """The keys of the blocks of one sealed model that one node hosts, each wrapped for it."""

    model: Sha256
    node: NodeName
    wraps: tuple[Wrap, ...] = Field(min_length=1, max_length=MAX_BLOCKS)

    @model_validator(mode="after")
    def _is_in_order(self) -> Self:
        blocks = [wrap.block for wrap in self.wraps]
        if any(after <= before for before, after in pairwise(blocks)):
            raise ValueError(f"the keys for node {self.node} are not of ascending blocks: {blocks}")
        return self


class ModelKeys(Value):
    """Every key of one sealed model, as whoever sealed it keeps them; a secret."""

    model: Sha256
    keys: tuple[Annotated[str, StringConstraints(pattern=_KEY)], ...] = Field(
        min_length=1, max_length=MAX_BLOCKS, repr=False
    )
    """32 bytes each, in base64, in the order of the blocks."""

    @classmethod
    def of(cls, model: Sha256, keys: Iterable[bytes]) -> "ModelKeys":
        """The keys of the blocks of `model`, in their order."""
        return cls(model=model, keys=tuple(base64.b64encode(key).decode() for key in keys))

    def key(self, block: int) -> bytes:
        """The key of one block. Raises INVALID_REQUEST where the model has no such block."""
        if not 0 <= block < len(self.keys):
            message = f"model {self.model} has no block {block}: its last one is {len(self.keys) - 1}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "block")
        return base64.b64decode(self.keys[block])
