"""The bill: what every sandbox cost, from when it was scheduled until it ended."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, field
from typing import Any

GPU_PER_SECOND = {
    "T4": 0.000164,
    "L4": 0.000222,
    "A10": 0.000306,
    "A10G": 0.000306,
    "L40S": 0.000542,
    "A100": 0.000583,
    "A100-40GB": 0.000583,
    "A100-80GB": 0.000694,
    "RTX-PRO-6000": 0.000842,
    "H100": 0.001097,
    "H100!": 0.001097,
    "H200": 0.001261,
    "B200": 0.001736,
    "B200+": 0.001736,
}
"""Dollars for one GPU and second; price page of 2026-07."""
CORE_SECOND = 0.00003942
GIB_SECOND = 0.0000067
LEAST_CORES = 0.125
LEAST_MIB = 128
"""What a sandbox is billed for that requests nothing. Use above the request is not measured here."""


@dataclass
class Entry:
    id: str
    name: str
    app: str
    tags: dict[str, str]
    version: int
    gpu: str
    gpus: int
    cores: float
    memory_mib: int
    created: float
    scheduled: float | None = None
    ended: float | None = None
    why: str = ""
    """How it ended: exit, terminated, timeout, idle, preempted, unscheduled, cloud stopped."""

    @property
    def seconds(self) -> float:
        """Billed so far."""
        if self.scheduled is None:
            return 0.0
        return (self.ended or time.time()) - self.scheduled

    @property
    def rate(self) -> float:
        """Dollars per second."""
        gpu = GPU_PER_SECOND.get(self.gpu.upper(), 0.0) * self.gpus
        return gpu + self.cores * CORE_SECOND + self.memory_mib / 1024 * GIB_SECOND

    @property
    def running(self) -> bool:
        return self.scheduled is not None and self.ended is None

    def row(self) -> dict[str, Any]:
        return asdict(self) | {
            "seconds": self.seconds,
            "dollars": self.seconds * self.rate,
            "running": self.running,
        }


@dataclass
class Ledger:
    entries: list[Entry] = field(default_factory=list)

    def rows(self) -> list[dict[str, Any]]:
        return [entry.row() for entry in self.entries]
