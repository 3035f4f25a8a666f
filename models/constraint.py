"""Output that must follow a grammar: which tokens may come next, after those that came.

The ingress of a request keeps the grammar's state, since it alone sees every token; what it says to the head is a mask,
with the step that the mask is for. So stages know of no grammar, and a sequence that moves or is computed anew takes
nothing with it that could be lost. The grammar itself is llguidance's.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import llguidance
from tokenizers import Tokenizer

from schemas.errors import ErrorCode, ResplitError
from schemas.manifest import TextSpec
from schemas.request import Constraint

LIMITS = llguidance.LLParserLimits(
    initial_lexer_fuel=500_000, step_lexer_fuel=50_000, step_max_items=20_000, max_grammar_size=100_000
)
"""A grammar is a program of a stranger's: at this it costs an event loop some ten milliseconds to read, and a few for a
token, at worst."""
FASTEST = 1
"""Of zlib's levels: a mask is nearly empty, or nearly full, or not worth the time."""


class Vocabulary:
    """The tokens of one model, as grammars see them."""

    def __init__(self, spec: TextSpec, tokenizer_path: Path) -> None:
        eos = list(spec.eos_token_ids)
        try:
            known = llguidance.LLTokenizer(str(tokenizer_path), n_vocab=spec.vocab_size, eos_token=eos)
        except ValueError:  # one that decodes in an unusual way: each token is what it decodes to
            wrapper = llguidance.TokenizerWrapper(_Spelled(Tokenizer.from_file(str(tokenizer_path)), spec))
            known = llguidance.LLTokenizer(wrapper, n_vocab=spec.vocab_size, eos_token=eos)
        self._tokenizer = known

    def constrained(self, constraint: Constraint) -> "Constrained":
        """The output that `constraint` allows, before its first token. Raises `ResplitError(INVALID_REQUEST)` for one
        that is no grammar, is too complex, or that this model has no tokens for."""
        matcher = llguidance.LLMatcher(self._tokenizer, _grammar(constraint), log_level=0, limits=LIMITS)
        found = Constrained(matcher)
        if matcher.is_error() or not found.is_possible():
            why = matcher.get_error().splitlines()[0][:300] if matcher.is_error() else ""
            if not why or "NoExtension" in why:  # llguidance's word for a dead end
                why = "with the tokens that it has nothing meets it"
            message = f"this model cannot be held to the constraint: {why}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "constraint")
        return found


class Constrained:
    """One output and the grammar it follows."""

    def __init__(self, matcher: llguidance.LLMatcher) -> None:
        self._matcher = matcher
        self._came: list[int] = []

    def after(self, tokens: Sequence[int]) -> bytes:
        """Which tokens may follow these, packed; they may be fewer than were said before, or others.

        Raises `ResplitError(INTERNAL)` where the grammar does not allow them."""
        same = next((i for i, (a, b) in enumerate(zip(self._came, tokens, strict=False)) if a != b), None)
        common = min(len(self._came), len(tokens)) if same is None else same
        if common < len(self._came):
            self._matcher.rollback(len(self._came) - common)
            del self._came[common:]
        for token in tokens[common:]:
            self._take(token)
        return self._mask()

    def follow(self, index: int, token: int) -> bytes:
        """Which may follow `token`, the `index`-th of the output; raises as `after`."""
        if index < len(self._came):
            return self.after([*self._came[:index], token])
        assert index == len(self._came), "tokens come in order"
        self._take(token)
        return self._mask()

    def is_possible(self) -> bool:
        """Whether any token may come next."""
        return any(self._matcher.compute_bitmask()) and not self._matcher.is_error()

    def _take(self, token: int) -> None:
        if not self._matcher.is_stopped() and not self._matcher.consume_token(token):
            message = f"token {token} came, which the constraint does not allow: {self._matcher.get_error()[:200]}"
            raise ResplitError(ErrorCode.INTERNAL, message)
        self._came.append(token)

    def _mask(self) -> bytes:
        if self._matcher.is_error():
            message = f"the constraint has become too complex here: {self._matcher.get_error()[:200]}"
            raise ResplitError(ErrorCode.INVALID_REQUEST, message, "constraint")
        return zlib.compress(self._matcher.compute_bitmask(), FASTEST)


class _Spelled:
    """A tokenizer as llguidance takes one whose file it cannot read."""

    def __init__(self, tokenizer: Tokenizer, spec: TextSpec) -> None:
        self._tokenizer = tokenizer
        self.eos_token_id = min(spec.eos_token_ids)
        self.bos_token_id = None
        self.special_token_ids = [i for i, one in tokenizer.get_added_tokens_decoder().items() if one.special]
        count = tokenizer.get_vocab_size()
        self.tokens = [
            tokenizer.decode([i], skip_special_tokens=False).encode() if i < count else b""
            for i in range(spec.vocab_size)
        ]

    def __call__(self, text: str | bytes) -> list[int]:
        plain = text if isinstance(text, str) else text.decode()
        found = list(self._tokenizer.encode(plain, add_special_tokens=False).ids)
        # What it has no tokens for it encodes as something else: an unknown token is no way to write it.
        return found if b"".join(self.tokens[one] for one in found) == plain.encode() else []


def _grammar(constraint: Constraint) -> str:
    if constraint.json_schema is not None:
        schema = json.dumps(constraint.json_schema)
        return str(llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False}))
    if constraint.regex is not None:
        return str(llguidance.LLMatcher.grammar_from_regex(constraint.regex))
    return str(llguidance.LLMatcher.grammar_from_lark(constraint.lark or ""))
