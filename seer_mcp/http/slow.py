"""Connections of clients that are slow, by fault or on purpose, do not stay open."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

REQUEST_SECONDS = 12.0
"""From the first byte of a request, or from the connection, to the last byte of the request."""
READ_SECONDS = 30.0
"""For which a client may leave what it was sent unread."""
COMING = (h11.IDLE, h11.SEND_BODY)  # of the client: its request is not whole yet


class Prompt(H11Protocol):
    """HTTP/1.1 as uvicorn speaks it, with an end for requests that do not come and answers that are not read."""

    _request_ends: asyncio.TimerHandle | None = None
    _read_ends: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect()

    def data_received(self, data: bytes) -> None:
        if self._request_ends is None and self.conn.their_state in COMING:
            self._expect()
        super().data_received(data)
        if self.conn.their_state not in COMING:
            self._come()

    def connection_lost(self, exc: Exception | None) -> None:
        self._come()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._read_ends is None:
            self._read_ends = self.loop.call_later(READ_SECONDS, self._drop)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._read_ends is not None:
            self._read_ends.cancel()
            self._read_ends = None

    def _expect(self) -> None:
        self._request_ends = self.loop.call_later(REQUEST_SECONDS, self._drop)

    def _come(self) -> None:
        if self._request_ends is not None:
            self._request_ends.cancel()
            self._request_ends = None

    def _drop(self) -> None:
        self.transport.abort()
