"""A client of the cluster in virtual time: asks as `resplit.client` does, and writes down what became of it."""

from collections.abc import Callable
from typing import Any

from schemas.base import RequestId
from schemas.errors import ResplitError
from schemas.request import ErrorReply, TextRequest, TokenReply
from simulator.engine import token_at
from simulator.kernel import Kernel
from simulator.records import Outcome
from simulator.scenario import RequestClass

ASK_AGAIN_S = (0.75, 1.0)
"""As `resplit.exchange` does."""
ASK_AGAIN_MAX = 40


class SimClient:
    """One streamed request."""

    def __init__(
        self, outcome: Outcome, what: RequestClass, kernel: Kernel, publish: Callable[["SimClient"], bool], until: float
    ) -> None:
        """`publish` gives the request to some ingress; False if nobody listens. After `until` nothing counts."""
        slo = what.slo
        number = outcome.arrival.number
        self.outcome = outcome
        self.request_id = RequestId(f"r{number}")
        self.request = TextRequest(
            token_ids=(number,) * outcome.arrival.prompt_tokens,
            max_tokens=outcome.arrival.output_tokens,
            ignore_eos=True,
            stream=True,
            ttft_ms=slo.ttft_ms,
            tpot_ms=slo.tpot_ms,
            deadline_ms=None if slo.deadline_ms is None else round(slo.deadline_ms),
            priority=slo.priority or None,
        )
        self.accepted = 0
        """How many ingresses said that they had accepted it."""
        self.over = False
        self.conflicts = 0
        """Wrong tokens, tokens out of order, and ends behind the first."""
        self.nodes: frozenset[str] = frozenset()
        """That computed it, as its bill says."""
        self.why = ""
        """The message of the error it ended in."""
        self._kernel = kernel
        self._publish = publish
        self._until = until
        self._heard = False
        self._left = False
        self._asked = 0
        self._seen: dict[int, int] = {}
        self._last_s = 0.0

    def ask(self) -> None:
        """Ask, and again while nobody accepts."""
        if self._heard or self.over or self._asked > ASK_AGAIN_MAX:
            return
        self._asked += 1
        if not self._publish(self):
            self._left = True
            self._end("unknown_deployment")
            return
        self._kernel.after(ASK_AGAIN_S[min(self._asked, len(ASK_AGAIN_S)) - 1], self.ask)

    def take_early(self, reply: TokenReply, at_s: float) -> bool:
        """Note a token that will arrive at `at_s`; False where it may change what else happens until then.

        That spares the world an event for all but the first and the last: what is in between is only written down.
        """
        if not self._heard or reply.finish_reason is not None:
            return False
        if at_s < self._until:
            self._token(reply.index, reply.token_id, at_s)
        return True

    def take(self, what: Any) -> None:
        """A reply has arrived; whoever found nobody to ask has left, and hears nothing of what it asked before."""
        if self._left:
            return
        if what == "accepted":
            self._heard = True
            self.accepted += 1
            return
        error = what.error if isinstance(what, ErrorReply) else what.body if isinstance(what, ResplitError) else None
        if error is not None:
            if self._asked > 1 and (error.field == "request_id" or self._heard):
                return
            self._heard = True
            self.why = error.message
            self._end(str(error.code))
            return
        self._heard = True
        if isinstance(what, TokenReply):
            self._token(what.index, what.token_id, self._kernel.now)
            if what.finish_reason is not None:
                self._finished(what)

    def _token(self, index: int, token: int, now: float) -> None:
        expected = token_at(self.outcome.arrival.prompt_tokens - 1 + index)
        if token != expected or index > len(self._seen):
            self.conflicts += 1  # a wrong token, or one that comes before another
        if index in self._seen:
            return
        self._seen[index] = token
        outcome = self.outcome
        outcome.tokens += 1
        if outcome.first_s is None:
            outcome.first_s = now
        else:
            outcome.gap_s = max(outcome.gap_s, now - self._last_s)
        self._last_s = now

    def _finished(self, last: TokenReply) -> None:
        if self.over:
            return
        self.over = True
        if last.usage is not None:
            self.nodes = frozenset(stage.node for stage in last.usage.stages)
            self.outcome.recovered = int(last.usage.recovered is not None)
        if self.outcome.tokens == self.outcome.arrival.output_tokens and self.outcome.error is None:
            self.outcome.last_s = self._kernel.now

    def _end(self, code: str) -> None:
        if self.over:
            self.conflicts += 1
            return
        self.over = True
        self.outcome.error = code
