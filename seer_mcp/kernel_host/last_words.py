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
OPEN = 0xFFFFFFFF  # for bytes of text: all that is used


class Ring:
    """The writing end. Not thread-safe: the stream's own lock guards it.

    It is on the path of every print, so the common case (more from the same parent) is one copy
    and one number. The length of a record is written when the next one begins; that of the last
    follows from the bytes used.
    """

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
        if done and self._parent:
            self._close_record()
        self._number += 1
        self._base = self._number % SLOTS * SIZE
        self._used = HEAD.size
        self._parent = ""
        HEAD.pack_into(self._map, self._base, self._number, self._used)
        return done

    def add(self, parent: str, text: str) -> bool:
        """Keep a text until its sending has arrived; False if there is no room: send it now."""
        data = text.encode("utf-8", "surrogatepass")
        if parent is not self._parent and not self._begin_record(parent, len(data)):
            return False
        used = self._used + len(data)
        if used > SIZE:
            return False
        base = self._base
        self._map[base + self._used : base + used] = data
        self._used = used
        HEAD.pack_into(self._map, base, self._number, used)
        return True

    def _begin_record(self, parent: str, room: int) -> bool:
        id = parent.encode("utf-8")
        if self._used + RECORD.size + len(id) + room > SIZE:
            return False
        if self._parent:
            self._close_record()
        at = self._record = self._base + self._used
        RECORD.pack_into(self._map, at, len(id), OPEN)
        self._map[at + RECORD.size : at + RECORD.size + len(id)] = id
        self._used += RECORD.size + len(id)
        self._begin = self._used
        self._parent = parent
        return True

    def _close_record(self) -> None:
        id_length, _ = RECORD.unpack_from(self._map, self._record)
        RECORD.pack_into(self._map, self._record, id_length, self._used - self._begin)


def read(path: str) -> Iterator[Tuple[int, str, str]]:
    """(number of its sending, parent's message id, text) of all that is kept, oldest first."""
    try:
        with open(path, "rb") as file:
            data = file.read()
    except OSError:
        return  # it died before it had streams, or its folder was taken away
    slots = [data[at : at + SIZE] for at in range(0, len(data), SIZE)]
    for slot in sorted(slots, key=lambda slot: HEAD.unpack_from(slot)[0]):
        number, used = HEAD.unpack_from(slot)
        at = HEAD.size
        while at < used:
            id_length, length = RECORD.unpack_from(slot, at)
            at += RECORD.size
            parent = slot[at : at + id_length].decode("utf-8")
            at += id_length
            if length == OPEN:
                length = used - at
            text = slot[at : at + length].decode("utf-8", "surrogatepass")
            at += length
            yield number, parent, text
