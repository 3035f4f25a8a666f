"""The order of a stream: each token once, in order, whatever the wire repeats or overtakes."""

from resplit.replies import RequestError, Token

AHEAD_MAX = 4096
"""Tokens that may arrive before one that is missing; no deployment has as many in flight."""


class InOrder:
    """Puts the tokens of one request in order and drops repetitions."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._delivered: list[int] = []
        self._ahead: dict[int, Token] = {}

    def accept(self, token: Token) -> list[Token]:
        """The tokens that may be delivered now that this one has come."""
        known = self._known(token.index)
        if known is not None and known != token.token_id:
            raise self._broken(f"token {token.index} came as {known} and as {token.token_id}")
        if token.index < len(self._delivered):
            return []
        if len(self._ahead) >= AHEAD_MAX:
            raise self._broken(f"token {len(self._delivered)} is missing while {AHEAD_MAX} later ones came")
        self._ahead[token.index] = token
        due: list[Token] = []
        while (following := self._ahead.pop(len(self._delivered), None)) is not None:
            self._delivered.append(following.token_id)
            due.append(following)
        return due

    def _known(self, index: int) -> int | None:
        if index < len(self._delivered):
            return self._delivered[index]
        return self._ahead[index].token_id if index in self._ahead else None

    def _broken(self, why: str) -> RequestError:
        return RequestError("internal", f"the stream is inconsistent: {why}", None, self.request_id)
