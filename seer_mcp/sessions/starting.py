"""A sandbox that is being started, in a task that belongs to no call."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ..errors import StillStarting
from .session import Session


class Starting:
    def __init__(self, handle: str, name: str, owner: str, backend: str) -> None:
        self.handle = handle
        self.name = name
        self.owner = owner
        self.backend = backend
        self.began = time.time()
        self.report = "asked for"
        """What is being waited for, as the backend said last."""
        self.terms = ""
        """What it will cost."""
        self.failed: BaseException | None = None
        """Why it did not start."""
        self.detached = False
        """Whether the call that began it has been answered: how it ends is then told by others."""
        self.over = asyncio.Event()
        self.task: asyncio.Task[Session] | None = None
        self._heard: list[Callable[[str], None]] = []

    def say(self, report: str) -> None:
        self.report = report
        for hear in self._heard:
            hear(report)

    def follow(self, task: asyncio.Task[Session]) -> None:
        self.task = task
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[Session]) -> None:
        self.failed = asyncio.CancelledError() if task.cancelled() else task.exception()
        self.over.set()

    async def wait(self, seconds: float | None, hear: Callable[[str], None]) -> Session:
        """The session when it is ready. Raises StillStarting after so many seconds, or why it failed.

        Whoever is cancelled while it waits here gives the start up.
        """
        assert self.task is not None
        hear(self.report)
        self._heard.append(hear)
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self.task)
        except TimeoutError:
            if self.task.done():  # a time limit of its own
                return self.task.result()
            self.detached = True
            raise self.still() from None
        except asyncio.CancelledError:
            self.task.cancel()
            raise
        finally:
            self._heard.remove(hear)

    def still(self) -> StillStarting:
        return StillStarting(self.handle, self.report, time.time() - self.began)

    def give_up(self) -> None:
        if self.task is not None:
            self.task.cancel()
