"""The streams of a command that runs in a sandbox, as a StreamReader and a StreamWriter.

The client's own streams live on an event loop of its own, in another thread, and its stdin may not be
written to while it is drained: what came meanwhile would be lost. So there is one task for each
direction here, and whoever writes only fills a buffer.
"""

from __future__ import annotations

import asyncio
from asyncio import StreamReader, StreamReaderProtocol, StreamWriter
from typing import Any

from .account import BROKEN

PIECE = 1 << 20  # of stdin at once; the client's buffer holds 16 MiB
HIGH, LOW = 4 << 20, 1 << 20  # bytes that wait to be sent: from here on drain() waits, until there
ENDING_SECONDS = 5.0


class Bridge(asyncio.Transport):
    """`process` is a ContainerProcess with bytes for streams (text=False)."""

    def __init__(self, process: Any, protocol: asyncio.Protocol) -> None:
        super().__init__()
        self._process = process
        self._protocol = protocol
        self._buffer = bytearray()
        self._wake = asyncio.Event()
        self._reads = asyncio.Event()
        self._reads.set()
        self._paused = False
        self._eof = False
        self._closing = False
        self._lost = False
        protocol.connection_made(self)
        self._task = asyncio.create_task(self._run(), name="bridge to a sandbox")

    # -- what a StreamWriter and a StreamReader ask of it ---------------------------------------

    def write(self, data: Any) -> None:
        if self._closing or self._eof or not data:
            return
        self._buffer += data
        self._wake.set()
        if not self._paused and len(self._buffer) > HIGH:
            self._paused = True
            self._protocol.pause_writing()

    def write_eof(self) -> None:
        self._eof = True
        self._wake.set()

    def can_write_eof(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return len(self._buffer)

    def pause_reading(self) -> None:
        self._reads.clear()

    def resume_reading(self) -> None:
        self._reads.set()

    def is_reading(self) -> bool:
        return self._reads.is_set() and not self._closing

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        """What was written is still sent; what comes from now on is dropped."""
        self._closing = True
        self.write_eof()
        self._reads.set()

    def abort(self) -> None:
        self._buffer.clear()
        self.close()
        self._lose(None)

    async def wait_closed(self) -> None:
        """Until nothing here holds the command any more."""
        await asyncio.wait([self._task])

    # -- the two directions ---------------------------------------------------------------------

    async def _run(self) -> None:
        reading = asyncio.create_task(self._read())
        writing = asyncio.create_task(self._write())
        try:
            await asyncio.wait([reading, writing], return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                # It has the end of its input, or takes no more; what it still says is read.
                hurry = self._closing or writing.exception() is not None
                await asyncio.wait([reading], timeout=ENDING_SECONDS if hurry else None)
        finally:
            self._closing = True
            left = [task for task in (reading, writing) if not task.done()]
            for task in left:
                task.cancel()
            if left:
                await asyncio.wait(left)
            failed = [t.exception() for t in (reading, writing) if not t.cancelled()]
            error = next((e for e in failed if e is not None), None)
            if reading.done() and not reading.cancelled() and reading.exception() is None:
                error = None  # it ended: that what we wrote last did not arrive any more is no news
            if isinstance(error, BROKEN):
                error = ConnectionResetError(str(error))
            self._lose(error)
        if error is not None and not isinstance(error, ConnectionError):
            raise error

    async def _read(self) -> None:
        async for data in self._process.stdout:
            if not self._lost:
                await self._reads.wait()
                self._protocol.data_received(data)

    async def _write(self) -> None:
        stdin = self._process.stdin
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._buffer:
                piece = bytes(self._buffer[:PIECE])
                del self._buffer[:PIECE]
                stdin.write(piece)
                await stdin.drain.aio()
                if self._paused and len(self._buffer) <= LOW:
                    self._paused = False
                    self._protocol.resume_writing()
            if self._eof:
                stdin.write_eof()
                await stdin.drain.aio()
                return

    def _lose(self, error: BaseException | None) -> None:
        if not self._lost:
            self._lost = True
            self._protocol.connection_lost(error if isinstance(error, Exception) else None)


def open_streams(process: Any, limit: int) -> tuple[StreamReader, StreamWriter]:
    """The command's output to read and its input to write; to close the writer ends the command's input."""
    loop = asyncio.get_running_loop()
    reader = StreamReader(limit=limit, loop=loop)
    protocol = StreamReaderProtocol(reader, loop=loop)
    return reader, StreamWriter(Bridge(process, protocol), protocol, reader, loop)
