"""The journal: every event once, numbered from 1, one JSON line each, on disk.

Readers page through it from any number, so a slow reader costs no memory. When the disk is full,
events wait in a small backlog, which readers get as well; bulk output that does not fit there is
counted and said in a `lost` event, before the next event that is kept.
"""

from __future__ import annotations

import json
import os
from typing import Any

from .fault import fault_point

EVERY = 64  # an offset is remembered for every 64th event
BACKLOG_BYTES = 8_000_000


class Journal:
    def __init__(self, path: str) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_CLOEXEC", 0)
        self._fd = os.open(path, flags, 0o600)
        self._size = 0
        self._offsets: list[int] = []  # offset of event 1 + i * EVERY
        self._on_disk = 0
        self._backlog: list[bytes] = []
        self._backlog_bytes = 0
        self._lost = 0
        self.last = 0

    def append(self, event: dict[str, Any]) -> int:
        """Number `event`, keep it, and return its number."""
        self._flush()
        # State changes are always kept; only bulk output is given up.
        bulky = event["type"] in ("stream", "display", "result", "update")
        if self._lost and not (self._backlog and bulky):
            lost, self._lost = self._lost, 0
            self._keep({"type": "lost", "bytes": lost}, False)
        return self._keep(event, bulky)

    def _keep(self, event: dict[str, Any], bulky: bool) -> int:
        line = (json.dumps({"n": self.last + 1, **event}, ensure_ascii=True) + "\n").encode("ascii")
        if self._backlog or not self._write(line):
            if bulky and self._backlog_bytes + len(line) > BACKLOG_BYTES:
                self._lost += len(line)
                return self.last
            self._backlog.append(line)
            self._backlog_bytes += len(line)
        self.last += 1
        return self.last

    def _flush(self) -> None:
        while self._backlog and self._write(self._backlog[0]):
            self._backlog_bytes -= len(self._backlog.pop(0))

    def _write(self, line: bytes) -> bool:
        """Append one whole line to the file, or nothing."""
        fault_point("host.journal.write")
        try:
            done = os.write(self._fd, line)
            while done < len(line):
                done += os.write(self._fd, line[done:])
        except OSError:
            os.ftruncate(self._fd, self._size)
            return False
        if self._on_disk % EVERY == 0:
            self._offsets.append(self._size)
        self._on_disk += 1
        self._size += len(line)
        fault_point("host.journal.written")
        return True

    def read(self, start: int, limit: int = 1_000_000) -> tuple[bytes, int]:
        """Whole lines from event `start` on, about `limit` bytes; and the next number to ask for.

        At least one line comes back when there is one, however long it is.
        """
        self._flush()
        start = max(start, 1)
        if start > self.last:
            return b"", start
        if start > self._on_disk:
            lines = self._backlog[start - self._on_disk - 1 :]
            return b"".join(lines), self.last + 1
        slot = (start - 1) // EVERY
        offset = self._offsets[slot]
        number = slot * EVERY + 1
        chunk = b""
        while True:
            more = os.pread(
                self._fd, min(limit, self._size - offset - len(chunk)), offset + len(chunk)
            )
            chunk += more
            while number < start:  # lines before the one asked for
                cut = chunk.find(b"\n") + 1
                if not cut:
                    break
                chunk, offset, number = chunk[cut:], offset + cut, number + 1
            cut = chunk.rfind(b"\n") + 1
            if (number == start and cut) or not more:
                whole = chunk[:cut]
                return whole, start + whole.count(b"\n")

    def close(self) -> None:
        os.close(self._fd)
