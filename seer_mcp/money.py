"""What a machine costs: dollars per second, part by part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Price:
    """What a running sandbox costs, whether it is used or not."""

    parts: Mapping[str, float]
    """What is paid for ("1 x H100", "8 cores", "64 GiB") -> dollars per second."""
    source: str
    """Where the rates are from: the workspace, or our table and its date."""

    @property
    def per_second(self) -> float:
        return sum(self.parts.values())

    def dollars(self, seconds: float) -> float:
        return self.per_second * seconds
