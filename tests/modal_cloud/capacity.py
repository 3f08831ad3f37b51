"""What machines there are: how many GPUs of a type are free, and how long placing a sandbox takes."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from grpclib import Status

from .errors import refuse
from .ledger import GPU_PER_SECOND

CPU = "cpu"


@dataclass
class Capacity:
    """`free` has how many of a type can be given out; a type that is not named is never short."""

    free: dict[str, int] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds that placing takes even if something is free."""
    patience: float | None = None
    """Seconds in the queue after which the client is told RESOURCE_EXHAUSTED; None: never."""
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @staticmethod
    def kind(gpu_type: str) -> str:
        return gpu_type.upper() or CPU

    def check(self, gpu_type: str, count: int) -> None:
        """Refuses what Modal does not have."""
        if gpu_type and gpu_type.upper() not in GPU_PER_SECOND:
            refuse(Status.INVALID_ARGUMENT, f"unknown GPU type {gpu_type!r}")
        if count > (4 if gpu_type.upper() in ("A10", "A10G") else 8):
            refuse(Status.INVALID_ARGUMENT, f"{count} GPUs of type {gpu_type} are too many")

    async def set(self, **free: int) -> None:
        async with self._changed:
            self.free |= free
            self._changed.notify_all()

    async def take(self, kind: str, count: int) -> None:
        """Returns when `count` of them are given to the caller; cancel to leave the queue."""
        await asyncio.sleep(self.delay)
        async with self._changed:
            await self._changed.wait_for(lambda: self.free.get(kind, count) >= count)
            if kind in self.free:
                self.free[kind] -= count

    async def give_back(self, kind: str, count: int) -> None:
        async with self._changed:
            if kind in self.free:
                self.free[kind] += count
            self._changed.notify_all()
