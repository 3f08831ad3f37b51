"""What a check knows and what it says."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..config import Config

Status = Literal["ok", "warn", "fail"]
Fix = Callable[[], Awaitable[str]]


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    status: Status
    says: str
    mend: str = ""
    """What to do about it."""
    fix: Fix | None = None
    """Does it, and says what it did. Only where nothing that lives or is wanted can be lost."""


def ok(says: str) -> Finding:
    return Finding("ok", says)


def warn(says: str, mend: str, fix: Fix | None = None) -> Finding:
    return Finding("warn", says, mend, fix)


def fail(says: str, mend: str, fix: Fix | None = None) -> Finding:
    return Finding("fail", says, mend, fix)


@dataclass(frozen=True)
class Patient:
    """What is examined: a configuration, and the machine as its environment describes it."""

    config: Config
    environ: Mapping[str, str]
    home: Path
    grace: float = 60.0
    """Seconds for which something without an owner may be about to get one: a start under way."""
    part_age: float = 3600.0
    """Seconds after which a file that was being written is a leftover."""
    kept: dict[str, Any] = field(default_factory=dict[str, Any])
    """What one check found out and another uses."""


Check = Callable[[Patient], Awaitable[list[Finding]]]
