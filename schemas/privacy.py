"""What a node could read of the prompts whose activations it sees: a curve over the depths at which a model is cut."""

from typing import Literal

from pydantic import Field

from schemas.base import Sha256, Value

Lookup = Literal["embedding", "state"]
"""How a token was read off a state: the nearest row of the embedding table, or the nearest state seen before."""

STATES_PER_FEATURE = 10
"""A probe of fewer calibration states for each number in one is short of them: more recover more."""

Share = float
"""A part of the test tokens, 0 to 1."""


class Recovery(Value):
    """How many of the prompt tokens that it never saw a probe read off their states."""

    top1: Share = Field(ge=0, le=1)
    """It named the token."""
    low: Share = Field(ge=0, le=1)
    """`low` to `high` is the 95 % percentile bootstrap interval of `top1` over test sequences."""
    high: Share = Field(ge=0, le=1)
    top5: Share = Field(ge=0, le=1)
    """The token was among the five that it named first."""
    chance: Share = Field(ge=0, le=1)
    """What `top1` would be without a look at the states: always the commonest token of the calibration sequences."""
    lookup: Lookup


class Depth(Value):
    """The boundary behind one block: what its node sends to the next, and the next one sees."""

    block: int = Field(ge=0)
    role: str
    """Of the block behind which this is."""
    recovered: Recovery
    shows_answer: bool
    """Only the head follows: whoever sees this and has the head's weights has the logits, and so the output token."""


class PrivacyCurve(Value):
    """What the fixed probe recovers behind each block of a model but the last, whose logits are the answer itself."""

    model: Sha256
    drawn: Literal["text", "rank"]
    """Whether the tokens come from a text or were drawn by rank (`models.excerpts`)."""
    text: Sha256 | None = None
    """Of the text's bytes, as UTF-8."""
    seed: int
    calibration: int
    """Sequences that the probe was fitted on."""
    test: int
    """Sequences that it was tried on, none of them among those."""
    tokens: int
    """Of each sequence, without the opening token that the tokenizer puts before every text."""
    candidates: int
    """Tokens whose embeddings the probe chose among; all others it cannot name."""
    nameable: Share = Field(ge=0, le=1)
    """How many of the test tokens are among those: no `Recovery` can be higher."""
    width: int
    """Numbers in a state, at the widest cut."""
    depths: tuple[Depth, ...] = Field(min_length=1)

    @property
    def is_starved(self) -> bool:
        """Whether more sequences would raise the curve, and with it what `blocks_to_keep` answers."""
        return self.calibration * self.tokens < STATES_PER_FEATURE * self.width

    def blocks_to_keep(self, below: Share) -> int | None:
        """The fewest first blocks that must stay on trusted nodes for recovery to be below a share; None if all.

        What counts is the upper end of the interval, and every later depth too: a node that sees one boundary and
        has the weights can run the blocks behind it itself and read wherever that is easiest.
        """
        safe_from = len(self.depths)
        while safe_from > 0 and self.depths[safe_from - 1].recovered.high < below:
            safe_from -= 1
        return None if safe_from == len(self.depths) else self.depths[safe_from].block + 1
