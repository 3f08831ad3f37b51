"""Only so many at a time; the others wait in line and hear their place."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager


class Turns:
    def __init__(self, at_once: int) -> None:
        self._free = at_once
        self._line: OrderedDict[asyncio.Future[None], Callable[[int, int], None]] = OrderedDict()

    @asynccontextmanager
    async def take(self, say: Callable[[int, int], None]) -> AsyncGenerator[None]:
        """Wait for a turn and keep it; `say` hears place and length of the line while it waits."""
        if self._free and not self._line:
            self._free -= 1
        else:
            await self._wait(say)
        try:
            yield
        finally:
            self._free += 1
            self._next()

    async def _wait(self, say: Callable[[int, int], None]) -> None:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line[turn] = say
        self._tell()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # it came at that very moment
                self._free += 1
            self._line.pop(turn, None)
            self._next()
            raise

    def _next(self) -> None:
        while self._free and self._line:
            turn, _ = self._line.popitem(last=False)
            if not turn.done():
                self._free -= 1
                turn.set_result(None)
        self._tell()

    def _tell(self) -> None:
        for place, say in enumerate(self._line.values(), 1):
            say(place, len(self._line))
