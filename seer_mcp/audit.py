"""Who ran what, where, and with which outcome: lines that are only ever added.

One file for all servers of a state folder. It is opened for each line, so an operator may move it
away at any time; the next line begins a new one. We never delete or shorten it.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import time
from pathlib import Path
from typing import Any

from .logs import Log, add_line, as_line, now, open_for_lines
from .redact import Redactor

VALUE_CHARACTERS = 200
TURNS, TURN_SECONDS = 50, 0.001
TEXTS = frozenset(["source", "find", "replace", "command", "content", "question"])


class Audit:
    """The audit file of a state folder, as one server writes it."""

    def __init__(self, path: Path, instance: str, code_characters: int, log: Log) -> None:
        self.path = path
        self.lost = 0
        """Lines that could not be written since the last that could."""
        self._instance = instance
        self._code_characters = code_characters
        self._log = log

    def add(self, event: str, **fields: Any) -> str:
        """Write one line; '' or, if that failed, why. The work goes on: the caller says it."""
        head = {"t": now(), "event": event, "server": self._instance, "pid": os.getpid()}
        lines = as_line({**head, **self._log.redactor.value(fields)})
        if self.lost:
            lines = as_line({**head, "event": "lost", "lines": self.lost}) + lines
        try:
            descriptor = open_for_lines(self.path)
            try:
                take_turn(descriptor)
                add_line(descriptor, lines)
            finally:
                os.close(descriptor)
        except OSError as error:
            why = str(error.strerror or error)
            self.lost += 1
            self._log.write(
                "audit_not_written", logging.ERROR, path=str(self.path), why=why, lines=self.lost
            )
            return why
        self.lost = 0
        return ""

    def code(self, text: str) -> dict[str, Any]:
        """What was run: its hash and length, and its text up to the limit."""
        clean = self._log.redactor.text(text)  # before it is cut: a part of a value is not found
        kept = clean[: self._code_characters]
        return {**digest(text), "code": kept or None, "cut": len(kept) < len(clean) or None}


def take_turn(descriptor: int) -> None:
    """Wait until no other server is just writing; not for ever, for it may have been stopped."""
    for _ in range(TURNS):
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(TURN_SECONDS)


def digest(text: str) -> dict[str, Any]:
    """SHA-256 and length in bytes of a text's UTF-8."""
    data = text.encode("utf-8", "surrogatepass")
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def described(
    arguments: dict[str, Any], known: frozenset[str], redactor: Redactor
) -> dict[str, Any]:
    """A call's arguments: texts by their hash, other values short, unknown names not at all."""
    told: dict[str, Any] = {}
    for name in sorted(known & arguments.keys()):
        value = arguments[name]
        if name in TEXTS:
            told[name] = digest(value if isinstance(value, str) else repr(value))
        elif isinstance(value, (bool, int, float)):
            told[name] = value
        else:
            told[name] = redactor.text(str(value))[:VALUE_CHARACTERS]
    return told
