"""A file that other programs write as well: replaced as a whole, and nothing of theirs unseen.

A save exchanges the new file with the one in place, in one step of the kernel. So whatever was
displaced can still be looked at: if it is not the version that was known, somebody saved in the
moment before, and that is an edit to merge. A program that still has the displaced file open (an
editor that writes in place) goes on writing into it: it is watched until it lets go.

Where a file system cannot exchange, the old file is held open while it is replaced. Then only
a rename by somebody else within the same few microseconds can be missed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import os
import secrets
import signal
import stat
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from .kernel_host.fault import fault_point

WATCH_SECONDS = 60.0  # how long a displaced file is watched that somebody has open for writing
BLIND_SECONDS = 5.0  # the same where the system does not tell who has it open
NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM)


class Stamp(NamedTuple):
    """What tells that a file was written again."""

    mtime_ns: int
    size: int
    inode: int


def stamp_of(info: os.stat_result) -> Stamp:
    return Stamp(info.st_mtime_ns, info.st_size, info.st_ino)


def stamp(path: Path) -> Stamp | None:
    """The stamp of the file at `path` itself (no link is followed); None if nothing is there."""
    try:
        return stamp_of(path.lstat())
    except OSError:
        return None


class Displaced:
    """A file that was replaced by ours and has no name any more, while somebody may write into it."""

    def __init__(self, descriptor: int, known: Stamp | None) -> None:
        self._descriptor = descriptor
        self._since = time.monotonic()
        self.seen = known
        """The version that is merged already."""

    def stamp(self) -> Stamp:
        return stamp_of(os.fstat(self._descriptor))

    def edited(self) -> bool:
        return self.stamp() != self.seen

    def final(self) -> bool:
        """Whether nobody can write into it any more, or it was watched for long enough."""
        held = _held_for_writing(self._descriptor)
        limit = 0.0 if held is False else BLIND_SECONDS if held is None else WATCH_SECONDS
        return time.monotonic() - self._since >= limit

    def look(self) -> tuple[Displaced, bool, Stamp, bytes | None]:
        """Itself, whether it is final, its stamp, and what is in it if that is not merged yet."""
        final = self.final()  # asked first: what is written after that is not missed
        now = self.stamp()
        return self, final, now, None if now == self.seen else self._read()

    def _read(self) -> bytes:
        size = os.fstat(self._descriptor).st_size
        parts: list[bytes] = []
        at = 0
        while at < size and (part := os.pread(self._descriptor, size - at, at)):
            parts.append(part)
            at += len(part)
        return b"".join(parts)

    def close(self) -> None:
        os.close(self._descriptor)


def _held_for_writing(descriptor: int) -> bool | None:
    """Whether another program has the file open for writing; None where that cannot be asked.

    Linux grants a read lease only if nobody has. Nobody knows the file's name any more, so nobody
    opens it while we hold the lease; SIGURG, which does nothing, is what would tell us.
    """
    if sys.platform != "linux":
        return None
    try:
        fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGURG)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_RDLCK)
        fcntl.fcntl(descriptor, fcntl.F_SETLEASE, fcntl.F_UNLCK)
    except BlockingIOError:
        return True
    except OSError:  # not our file, or a file system without leases
        return None
    return False


def replace(
    path: Path, data: Iterable[bytes], known: Stamp | None
) -> tuple[Stamp, Displaced | None]:
    """Put the pieces of `data` at `path`: every reader sees the old file or the new one, whole.

    `known` is the version that `data` was made from. Returns the new file's stamp, and what was
    displaced if it is another version or may still become one. Raises OSError, and then the place
    is as it was.
    """
    fault_point("notebook.write")
    path.parent.mkdir(parents=True, exist_ok=True)
    before = _replaceable(path)
    part = path.with_name(_part_name(path.name, known))
    try:
        made = _write(part, data, 0o644 if before is None else stat.S_IMODE(before.st_mode))
        fault_point("notebook.part")
        displaced = _put_in_place(part, path, before is not None, known)
        fault_point("notebook.renamed")
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    if displaced is not None and displaced.final() and not displaced.edited():
        displaced.close()
        displaced = None
    part.unlink(missing_ok=True)
    return made, displaced


def _replaceable(path: Path) -> os.stat_result | None:
    """What is at `path`, if it may be replaced."""
    try:
        found = path.lstat()
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        raise _not_a_file(found)
    if not found.st_mode & 0o222:
        raise OSError(errno.EACCES, "the file was made read-only; make it writable (chmod u+w)")
    return found


def _not_a_file(found: os.stat_result) -> OSError:
    kind = "folder" if stat.S_ISDIR(found.st_mode) else "link or device"
    return OSError(errno.EEXIST, f"a {kind} stands in its place; move that away")


def _write(part: Path, data: Iterable[bytes], mode: int) -> Stamp:
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, mode)
        file.writelines(data)
        file.flush()
        os.fsync(descriptor)
        return stamp_of(os.fstat(descriptor))


def _put_in_place(part: Path, path: Path, exists: bool, known: Stamp | None) -> Displaced | None:
    if not exists:
        try:
            os.link(part, path)  # unlike a rename, this does not replace what appears meanwhile
        except FileExistsError:
            return _put_in_place(part, path, True, known)
        except OSError:  # a file system without hard links
            os.replace(part, path)
            return None
        return None
    try:
        exchanged = _exchange(part, path)
    except FileNotFoundError:  # it was deleted this very moment
        return _put_in_place(part, path, False, known)
    if not exchanged:
        held = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        os.replace(part, path)
        return Displaced(held, known)
    fault_point("notebook.exchanged")
    try:
        found = part.lstat()
        if not stat.S_ISREG(found.st_mode):  # it was put there this very moment
            raise _not_a_file(found)
        descriptor = os.open(part, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        _exchange(part, path)  # what cannot be looked at is given back
        raise
    return Displaced(descriptor, known)


_libc = ctypes.CDLL(None, use_errno=True)


def _exchange(one: Path, other: Path) -> bool:
    """Let two names change places in one step; False where that does not exist."""
    names = os.fsencode(one), os.fsencode(other)
    if sys.platform == "linux" and hasattr(_libc, "renameat2"):
        at_fdcwd, rename_exchange = -100, 2
        failed = _libc.renameat2(at_fdcwd, names[0], at_fdcwd, names[1], rename_exchange)
    elif sys.platform == "darwin":
        rename_swap = 2
        failed = _libc.renamex_np(names[0], names[1], rename_swap)
    else:
        return False
    if not failed:
        return True
    number = ctypes.get_errno()
    if number in NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(other))


def _part_name(name: str, known: Stamp | None) -> str:
    """A free name that says which version it is to displace."""
    expected = "-".join(f"{n:x}" for n in known or (0, 0, 0))
    return f".{name[:80]}.{expected}.{secrets.token_hex(4)}.part"


def recover_parts(path: Path) -> list[Path]:
    """Clear what savers of `path` left beside it when they were killed; for who alone may save it.

    Killed between the exchange and the look at what was displaced, such a part may be somebody's
    edit. That is kept under the name that is returned; all other parts were only ours.
    """
    kept: list[Path] = []
    current = stamp(path)
    for part in path.parent.glob(f".{glob.escape(path.name[:80])}.*.part"):
        found = stamp(part)
        expected = _expected(part.name)
        ours = (
            found == expected  # the version we had just replaced
            or expected is None  # of another writer of ours
            or expected == (0, 0, 0)
            # Not exchanged yet, or a second name of what is in place. (A number alone tells
            # nothing: the next file may get it.)
            or current in (expected, found)
        )
        if ours:
            part.unlink(missing_ok=True)
        else:
            copy = free_name(path)
            part.rename(copy)
            kept.append(copy)
    return kept


def _expected(name: str) -> Stamp | None:
    fields = name.split(".")[-3].split("-")
    try:
        return Stamp(*(int(field, 16) for field in fields)) if len(fields) == 3 else None
    except ValueError:
        return None


def free_name(path: Path) -> Path:
    """Where another version of `path` can be kept: beside it, under a name that nothing has."""
    number = 1
    while os.path.lexists(found := path.with_name(f"{path.stem}.conflict-{number}{path.suffix}")):
        number += 1
    return found
