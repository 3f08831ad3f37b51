"""The socket at which clients of the host come in.

A logout takes a user's runtime folder away, and a cleaner may take what lies in the folder for
temporary files; what runs goes on. So the socket is made anew when it is gone.
"""

from __future__ import annotations

import asyncio
import os
from typing import Any, Awaitable, Callable, Optional

LINE_LIMIT = 64 * 1024 * 1024  # one request
LOOK_SECONDS = 1.0

Client = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Door:
    def __init__(self, address: str, client: Client) -> None:
        self.address = address
        self._client = client
        self._server: Optional[Any] = None
        self._closed = False

    async def open(self) -> None:
        """Listen. Raises OSError."""
        old = os.umask(0o077)
        try:
            os.makedirs(os.path.dirname(self.address), exist_ok=True)
            os.umask(0o177)
            self._server = await asyncio.start_unix_server(
                self._client, self.address, limit=LINE_LIMIT
            )
        finally:
            os.umask(old)

    async def keep_open(self) -> None:
        """Listen again at the same address whenever nothing is there; connections that are open stay."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._closed:
                return
            if os.path.lexists(self.address):
                continue
            if self._server is not None:
                self._server.close()
            try:
                await self.open()
            except OSError:
                continue  # its folder cannot be made yet

    def close(self) -> None:
        """Nobody new comes in."""
        self._closed = True
        if self._server is not None:
            self._server.close()

    def remove(self) -> None:
        try:
            os.unlink(self.address)
        except FileNotFoundError:
            return  # taken away, or by Python 3.13's own close
