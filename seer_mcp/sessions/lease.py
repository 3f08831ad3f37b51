"""When a sandbox ends by itself, as its host said last."""

from __future__ import annotations

import time
from typing import Any, TypeGuard

from ..money import duration

WARN_SECONDS = 600.0


class Lease:
    """Times are this side's own, so that a clock that is wrong on either side does not matter."""

    def __init__(self) -> None:
        self.ends: float | None = None
        """time.monotonic() at the end of its lifetime, or None if it has none."""
        self.hard_ends: float | None = None
        """Beyond which that cannot be moved."""
        self.idle_limit: float | None = None

    def heard(self, answer: dict[str, Any]) -> None:
        """Take what the host answered: its own clock, and the times by that."""
        now = answer.get("now")
        if not is_number(now):
            return  # a host of an older version
        there = time.monotonic() - now

        def here(name: str) -> float | None:
            value = answer.get(name)
            return float(value) + there if is_number(value) else None

        self.ends, self.hard_ends = here("end_at"), here("hard_end_at")
        limit = answer.get("idle_limit")
        self.idle_limit = limit if is_number(limit) else None

    def left(self) -> float | None:
        """Seconds until it ends whatever happens, or None."""
        ends = [end for end in (self.ends, self.hard_ends) if end is not None]
        return max(0.0, min(ends) - time.monotonic()) if ends else None

    def can_move(self) -> float | None:
        """Seconds from now to which its end can be moved; None: to any."""
        return None if self.hard_ends is None else max(0.0, self.hard_ends - time.monotonic())

    def warnings(self, handle: str) -> list[str]:
        left = self.left()
        if left is None or left > WARN_SECONDS:
            return []
        can = self.can_move()
        if can is not None and can - left < 60:
            then = "and that cannot be moved. Save what you need: the notebook stays, variables and files go"
        else:
            then = f'; extend_sandbox(sandbox="{handle}", minutes=60) moves that'
        return [
            f"ENDS SOON: this sandbox ends in {duration(left)}{' ' if then[0] == 'a' else ''}{then}."
        ]


def is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
