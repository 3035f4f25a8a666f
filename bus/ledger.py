"""What one life of an ingress owes, as its journal will state it: sealed where the request came so. No I/O."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

from bus.sealed_requests import Seal
from schemas.journal import Accepted, AcceptedRequest, Handle, Likely, Record, Run, Statement, Tokens

RUN_TOKENS_MAX = 2048
"""Tokens in one record of a statement: with 20 alternatives each, half a megabyte."""


@dataclass(slots=True)
class _Owed:
    request: AcceptedRequest
    arrived: float
    seal: Seal | None
    tokens: list[int] = field(default_factory=list)
    likely: list[Likely] = field(default_factory=list)


class Ledger:
    """The live requests and their tokens. `now` is in seconds of any monotonic clock."""

    def __init__(self) -> None:
        self._owed: dict[Handle, _Owed] = {}
        self._opened = 0

    def __len__(self) -> int:
        return len(self._owed)

    def open(
        self,
        request: AcceptedRequest,
        tokens: tuple[int, ...],
        likely: tuple[Likely, ...],
        now: float,
        seal: Seal | None = None,
    ) -> Handle:
        """Owe one more request an answer; a predecessor may have said its first tokens. With `seal` its tokens are
        stated sealed."""
        self._opened += 1
        self._owed[self._opened] = _Owed(request, now - request.age_ms / 1e3, seal, list(tokens), list(likely))
        return self._opened

    def add(self, runs: Iterable[Run]) -> Tokens:
        """Take in tokens, and the record that says so; each run begins where its request's tokens ended. Requests that
        have ended take none."""
        said = []
        for run in runs:
            if (owed := self._owed.get(run.handle)) is not None:
                assert run.first == len(owed.tokens), f"token {run.first} after {len(owed.tokens)} tokens"
                owed.tokens += run.tokens
                owed.likely += run.likely
                said.append(run if owed.seal is None else owed.seal.seal_run(run))
        return Tokens(tuple(said))

    def close(self, handles: Iterable[Handle]) -> None:
        """Owe these nothing more."""
        for handle in handles:
            self._owed.pop(handle, None)

    def statement(self, now: float) -> Iterator[Record]:
        """Records that say all of it, whatever was said before.

        The ledger may change between two of them: each is true when it comes.
        """
        live = tuple(self._owed)
        yield Statement(self._opened, live)
        for handle in live:
            if handle in self._owed:
                yield from self.statement_of(handle, now)

    def statement_of(self, handle: Handle, now: float) -> Iterator[Record]:
        """Records that say what one live request is owed, and had already."""
        owed = self._owed[handle]
        yield Accepted(handle, replace(owed.request, age_ms=max(0, round((now - owed.arrived) * 1e3))))
        for first in range(0, len(owed.tokens), RUN_TOKENS_MAX):
            part = slice(first, first + RUN_TOKENS_MAX)
            run = Run(handle, first, tuple(owed.tokens[part]), tuple(owed.likely[part]))
            yield Tokens((run if owed.seal is None else owed.seal.seal_run(run),))
