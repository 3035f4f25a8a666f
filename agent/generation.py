"""One text request from acceptance to its end: what each new token means to the client."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from agent.replies import ReplyTo
from agent.urgency import UNHURRIED, Urgency
from agent.usage import Meter
from models.constraint import Constrained
from models.text import StopText, Text
from schemas.base import Digest, RequestId
from schemas.errors import ErrorCode, ResplitError
from schemas.frame import Sampling, Token
from schemas.journal import Handle
from schemas.manifest import TextSpec
from schemas.request import CompletionReply, TextRequest, TokenLogprob, TokenReply
from schemas.slo import BEST_EFFORT, Slo

FinishReason = Literal["stop", "length"]


@dataclass(eq=False)
class Generation:
    """The state of one completion at its ingress."""

    request_id: RequestId
    request: TextRequest
    reply: ReplyTo
    model: Digest
    """Whose tokens `prompt` are."""
    prompt: tuple[int, ...]
    max_tokens: int
    eos: frozenset[int]
    seed: int
    meter: Meter
    text: Text
    deadline: float | None
    """When its last token must be out, in the ingress' monotonic seconds."""
    interrupted_at: float | None = None
    """Since when it waits to go on, as what ran it is gone."""
    recoveries: int = 0
    """How often it was recomputed since its last token."""
    handle: Handle | None = None
    """Its number in the journal, once it is accepted."""
    owed: list[Token] = field(default_factory=list)
    """The tokens that came out, handed to the journal; they are said in this order once it has them."""
    tokens: list[Token] = field(default_factory=list)
    """Those that were said."""
    pieces: list[str] = field(default_factory=list)
    slo: Slo = BEST_EFFORT
    urgency: Urgency = UNHURRIED
    constrained: Constrained | None = None
    """The state of the grammar that the output follows; None where it is free."""

    def __post_init__(self) -> None:
        self._detokenizer = self.text.stream()
        self._stop = StopText(self.request.stop)

    @property
    def sampling(self) -> Sampling:
        r = self.request
        return Sampling(r.temperature, r.top_k, r.top_p, r.min_p, self.seed, r.logprobs, self.meter.trace.header)

    @property
    def known(self) -> tuple[int, ...]:
        """The tokens that came out so far."""
        return tuple(token.token for token in self.owed)

    @property
    def has_begun(self) -> bool:
        """Whether it ran before, here or at another ingress."""
        return self.meter.started is not None or bool(self.owed)

    @property
    def tokens_left(self) -> int:
        """As many as may still come out."""
        return self.max_tokens - len(self.owed)

    @property
    def slots_needed(self) -> int:
        return len(self.prompt) + self.max_tokens

    @property
    def allowed(self) -> bytes | None:
        """Which tokens may follow those that came out so far; None: any. Raises what `Constrained.after` raises."""
        return None if self.constrained is None else self.constrained.after(self.known)

    def allowed_after(self, token: Token) -> bytes | None:
        """Which may follow `token`, the newest. Raises what `Constrained.follow` raises."""
        return None if self.constrained is None else self.constrained.follow(token.index, token.token)

    def ends_with(self, token: Token) -> FinishReason | None:
        """Whether `token`, by its id and index alone, is the last one."""
        if token.token in self.eos and not self.request.ignore_eos:
            return "stop"
        return "length" if token.index + 1 >= self.max_tokens else None

    def take(self, token: Token, finish: FinishReason | None, now: float) -> TokenReply:
        """Count `token` and say it in text; a stop string may end the request here although `finish` is None.

        Text that might be the beginning of a stop string is held back until it is not.
        """
        self.meter.token(now)
        self.interrupted_at, self.recoveries = None, 0
        self.tokens.append(token)
        is_eos = token.token in self.eos and finish == "stop"
        emitted = self._stop.push("" if is_eos else self._detokenizer.push(token.token))
        text = emitted.text
        if finish is not None and not emitted.stopped:
            emitted = self._stop.push(self._detokenizer.flush())
            text += emitted.text + self._stop.flush()
        if emitted.stopped:
            finish = "stop"
        self.pieces.append(text)
        return TokenReply(
            request_id=self.request_id,
            index=token.index,
            token_id=token.token,
            text=text,
            logprob=token.logprob,
            top_logprobs=self._top(token) if self.request.logprobs else None,
            finish_reason=finish,
            usage=None if finish is None else self.meter.usage(len(self.prompt), len(self.tokens), now),
        )

    def resume(self, tokens: Sequence[Token], now: float) -> list[TokenReply]:
        """Say anew what an earlier ingress may have said; the last reply may be the final one."""
        replies: list[TokenReply] = []
        for token in tokens:
            if replies and replies[-1].finish_reason is not None:
                break
            self.owed.append(token)
            replies.append(self.take(token, self.ends_with(token), now))
        return replies

    def whole(self, last: TokenReply) -> CompletionReply:
        """The one reply of a request that is not streamed."""
        assert last.finish_reason is not None
        assert last.usage is not None
        wants_logprobs = self.request.logprobs > 0
        return CompletionReply(
            request_id=self.request_id,
            token_ids=tuple(token.token for token in self.tokens),
            text="".join(self.pieces),
            logprobs=tuple(t.logprob for t in self.tokens if t.logprob is not None) if wants_logprobs else None,
            top_logprobs=tuple(self._top(token) for token in self.tokens) if wants_logprobs else None,
            finish_reason=last.finish_reason,
            usage=last.usage,
        )

    def _top(self, token: Token) -> tuple[TokenLogprob, ...]:
        return tuple(TokenLogprob(token_id=i, logprob=p, text=self.text.spelled(i)) for i, p in token.top)


def prompt_ids(request: TextRequest, text: Text, spec: TextSpec, context_tokens: int) -> tuple[int, ...]:
    """The prompt as token ids, checked. Raises `ResplitError` naming the field at fault."""
    if request.token_ids is not None:
        for i, token in enumerate(request.token_ids):
            if not 0 <= token < spec.vocab_size:
                message = f"token id {token} is outside the vocabulary of {spec.vocab_size}"
                raise ResplitError(ErrorCode.TOKEN_OUT_OF_RANGE, message, f"token_ids.{i}")
        ids, field_name = list(request.token_ids), "token_ids"
    elif request.messages is not None:
        messages = [message.model_dump() for message in request.messages]
        ids, field_name = text.encode_messages(messages, request.tools), "messages"
    else:
        assert request.prompt is not None
        ids, field_name = text.encode(request.prompt), "prompt"
    if not ids:
        raise ResplitError(ErrorCode.INVALID_REQUEST, "the prompt has no tokens", field_name)
    if len(ids) >= context_tokens:
        message = f"the prompt has {len(ids)} tokens; with one to generate, {context_tokens - 1} fit"
        raise ResplitError(ErrorCode.CONTEXT_EXCEEDED, message, field_name)
    return tuple(ids)
