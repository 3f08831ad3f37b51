"""What processes print and read, kept so that a client can ask for it again by its offset."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

KEPT = 64 << 20
"""Bytes of one stream that stay readable; older ones go once there are twice as many."""
PIECE = 256 << 10


class Output:
    """A stream of bytes with a beginning, an end, and any number of readers at any offset."""

    def __init__(self) -> None:
        self.start = 0
        """Offset of the oldest byte that is kept."""
        self.end = 0
        self.closed = False
        self._bytes = bytearray()
        self._grown = asyncio.Event()

    async def fill(self, stream: asyncio.StreamReader) -> None:
        """Take everything that a process prints until it closes the stream."""
        try:
            while data := await stream.read(PIECE):
                self.append(data)
        finally:
            self.close()

    def append(self, data: bytes) -> None:
        self._bytes += data
        self.end += len(data)
        if len(self._bytes) > 2 * KEPT:
            del self._bytes[:-KEPT]
            self.start = self.end - KEPT
        self._wake()

    def close(self) -> None:
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()

    def read(self, offset: int, size: int = PIECE) -> bytes:
        at = max(offset, self.start) - self.start
        return bytes(self._bytes[at : at + size])

    async def wait_beyond(self, offset: int, timeout: float | None = None) -> None:
        """Returns when there are bytes after `offset`, at the end, or after `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while self.end <= offset and not self.closed:
                    await self._grown.wait()

    async def follow(self, offset: int) -> AsyncIterator[tuple[int, bytes]]:
        """Pieces with their offsets, from `offset` until the stream ends."""
        while True:
            await self.wait_beyond(offset)
            data = self.read(offset)
            if not data:
                return
            offset = max(offset, self.start)
            yield offset, data
            offset += len(data)


class Input:
    """A process's stdin, written at offsets: what was taken already is not written twice."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.taken = 0
        self.closed = False
        self._writer = writer
        self._turn = asyncio.Lock()

    async def write(self, offset: int, data: bytes, eof: bool) -> None:
        """Raises ValueError for a gap, BrokenPipeError if nothing can be written any more."""
        async with self._turn:
            if offset > self.taken:
                raise ValueError(f"offset {offset} is beyond the {self.taken} bytes written so far")
            fresh = data[self.taken - offset :]
            if self.closed:
                if fresh:
                    raise BrokenPipeError("stdin is closed")
                return
            if fresh:
                if self._writer.is_closing():
                    raise BrokenPipeError("the process has closed its stdin")
                self._writer.write(fresh)
                await self._writer.drain()
                self.taken += len(fresh)
            if eof:
                self.closed = True
                self._writer.close()

    def close(self) -> None:
        self.closed = True
        self._writer.close()
