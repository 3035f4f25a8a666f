"""Connections as the gateway holds them: a request's head is bounded in bytes and in time, like its body after it."""

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

HEAD_BYTES_MAX = 1 << 19
"""What may come before a head is complete; a read of a socket may bring as much of a body along."""
HEAD_S = 30.0
"""Within which it is complete, from its first byte or from when the connection was made."""


class BoundedProtocol(HttpToolsProtocol):
    """uvicorn's own, which takes heads of any length, as slowly as they come."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._in_head = True
        self._seen = 0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_over()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._in_head:
            self._seen += len(data)
            if self._timer is None:
                self._expect_head()
            if self._seen > HEAD_BYTES_MAX:
                self.transport.abort()
                return
        super().data_received(data)

    def on_headers_complete(self) -> None:
        self._head_is_over()
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._in_head, self._seen = True, 0
        super().on_message_complete()

    def _expect_head(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(HEAD_S, self.transport.abort)

    def _head_is_over(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
