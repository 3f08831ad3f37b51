"""What a kernel wrote but may not have sent when it died, in memory that outlives it.

A kernel sends its output a moment after it was written. What was not sent when the process is
killed would be gone, and it is what tells why. So each stream also writes into a small ring of
slots in a mapped file: one slot for each sending, numbered. The host knows the last number that
arrived and reads the slots after it.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import Iterator, Tuple

SLOTS = 8  # sendings that may be under way at once
SIZE = 65536
HEAD = struct.Struct("<QI")  # number, bytes used
RECORD = struct.Struct("<HI")  # bytes of the parent's message id, bytes of text


class Ring:
    """The writing end. Not thread-safe: the stream's own lock guards it."""

    def __init__(self, path: str) -> None:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        os.ftruncate(descriptor, SLOTS * SIZE)
        self._map = mmap.mmap(descriptor, SLOTS * SIZE)
        os.close(descriptor)
        self._number = 0
        self.turn()

    def turn(self) -> int:
        """What was added since the last turn is being sent under the number that is returned."""
        done = self._number
        self._number += 1
        self._base = self._number % SLOTS * SIZE
        self._used = HEAD.size
        self._parent = b""
        HEAD.pack_into(self._map, self._base, self._number, self._used)
        return done

    def add(self, parent: str, text: str) -> bool:
        """Keep a text until its sending has arrived; False if there is no room: send it now."""
        id, data = parent.encode("utf-8"), text.encode("utf-8", "surrogatepass")
        extends = self._parent == id
        if self._used + len(data) + (0 if extends else RECORD.size + len(id)) > SIZE:
            return False
        if not extends:
            self._record, self._length, self._parent = self._base + self._used, 0, id
            at = self._record + RECORD.size
            self._map[at : at + len(id)] = id
            self._used += RECORD.size + len(id)
        at = self._base + self._used
        self._map[at : at + len(data)] = data
        self._length += len(data)
        self._used += len(data)
        RECORD.pack_into(self._map, self._record, len(id), self._length)
        HEAD.pack_into(self._map, self._base, self._number, self._used)
        return True


def read(path: str) -> Iterator[Tuple[int, str, str]]:
    """(number of its sending, parent's message id, text) of all that is kept, oldest first."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return  # it died before it had streams
    slots = [data[at : at + SIZE] for at in range(0, len(data), SIZE)]
    for slot in sorted(slots, key=lambda slot: HEAD.unpack_from(slot)[0]):
        number, used = HEAD.unpack_from(slot)
        at = HEAD.size
        while at < used:
            id_length, length = RECORD.unpack_from(slot, at)
            at += RECORD.size
            parent = slot[at : at + id_length].decode("utf-8")
            at += id_length
            text = slot[at : at + length].decode("utf-8", "surrogatepass")
            at += length
            yield number, parent, text
