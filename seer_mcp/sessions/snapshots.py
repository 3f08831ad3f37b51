"""Whose snapshots are: a line for each that was made here. The cloud's account knows no owners."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from ..audit import take_turn
from ..logs import add_line, as_line, now, open_for_lines


class Snapshots:
    """One file for all servers of a state folder; lines are only ever added."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def note(self, id: str, owner: str, sandbox: str) -> None:
        """Raises OSError."""
        line = as_line({"snapshot": id, "owner": owner, "sandbox": sandbox, "time": now()})
        descriptor = open_for_lines(self.path)
        try:
            take_turn(descriptor)
            add_line(descriptor, line)
        finally:
            os.close(descriptor)

    def of(self, owner: str) -> list[str]:
        """The ids of an owner's, the oldest first. Raises OSError if there is a file that cannot be read."""
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        noted = filter(None, map(parsed, lines))
        return [str(each["snapshot"]) for each in noted if each.get("owner") == owner]


def parsed(line: bytes) -> dict[str, Any] | None:
    """None for a line that was cut short or is damaged."""
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and "snapshot" in found else None
