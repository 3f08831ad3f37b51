"""The record of a sandbox on disk: what another server needs to find it again, and whether it is whole.

A damaged record must not be acted on: a wrong number in it could point to another's process, and a
sandbox that is not found is cleared away.
"""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path
from typing import Any

from ..backends import Record


def sealed(record: Record) -> Record:
    """The record with a checksum of itself."""
    return {**record, "check": _digest(record)}


def intact(record: dict[str, Any]) -> bool:
    """Whether nothing changed since it was sealed (one that never was counts as whole)."""
    return "check" not in record or record["check"] == _digest(record)


def _digest(record: dict[str, Any]) -> str:
    facts = {key: value for key, value in record.items() if key != "check"}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def read_record(folder: Path) -> Record:
    """The record of the sandbox in `folder`. Raises ValueError or OSError if it cannot be trusted."""
    path = folder / "record.json"
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
        raise ValueError("it is not a regular file")
    record: Any = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(record, dict):
        raise ValueError("it is not an object")
    if not intact(record):
        raise ValueError("it was changed or damaged since it was written")
    if record["handle"] != folder.name:
        raise ValueError(f"it is that of {record['handle']!r}")
    return record
