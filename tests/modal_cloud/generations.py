"""Volumes on disk: each commit is a folder of its own, which nothing changes any more."""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Change = Callable[[Path], None]
Signature = tuple[int, int, int]
"""Inode, time of change and size: a file with the same was committed already."""


@dataclass
class Volume:
    id: str
    name: str
    version: int
    folder: Path
    limit: int | None = None
    """Bytes that one sandbox can write to it, and that fit in it."""
    generation: int = 0
    created: float = field(default_factory=time.time)
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def newest(self) -> Path:
        return self.folder / str(self.generation)

    async def change(self, apply: Change) -> None:
        """Makes the next generation: the files of the newest one, changed by `apply`.

        Files are linked, so `apply` must replace a file, never write into one.
        """
        async with self.turn:
            await asyncio.to_thread(self._change, apply)

    def _change(self, apply: Change) -> None:
        fresh = self.folder / str(self.generation + 1)
        shutil.rmtree(fresh, ignore_errors=True)
        shutil.copytree(self.newest, fresh, symlinks=True, copy_function=os.link)
        apply(fresh)
        if self.limit is not None and size_of(fresh) > self.limit:
            shutil.rmtree(fresh)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.name)
        self.generation += 1


def size_of(folder: Path) -> int:
    return sum(entry.stat().st_size for entry in folder.rglob("*") if entry.is_file())


def replace(target: Path, data: bytes, mode: int = 0o644) -> None:
    """Write a file that others may have linked."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    part.write_bytes(data)
    part.chmod(mode & 0o777 or 0o644)
    part.replace(target)


def remove(target: Path) -> None:
    if not target.parent.is_dir():
        return
    if target.is_dir() and not target.is_symlink():
        shutil.rmtree(target)
    else:
        target.unlink(missing_ok=True)


@dataclass
class Changes:
    written: dict[str, Signature]
    """By the path in the volume."""
    gone: set[str]
    """Paths that were committed from here and are no more; the overlay has no trace of them."""

    def __bool__(self) -> bool:
        return bool(self.written or self.gone)


@dataclass
class Overlay:
    """What one sandbox wrote to a volume: the upper folder of an overlay, and what of it is committed."""

    upper: Path
    lower: Path
    """The commit that it was mounted over."""
    done: dict[str, Signature] = field(default_factory=dict)

    def fresh(self) -> Changes:
        """What was not committed yet; a folder only if it is new."""
        found = dict(self._walk(self.upper))
        written = {path: what for path, what in found.items() if self.done.get(path) != what}
        return Changes(written, self.done.keys() - found.keys())

    def note(self, changes: Changes) -> None:
        """These are committed."""
        self.done |= changes.written
        for path in changes.gone:
            self.done.pop(path, None)

    def _walk(self, folder: Path) -> Iterator[tuple[str, Signature]]:
        for entry in os.scandir(folder):
            info = entry.stat(follow_symlinks=False)
            path = os.path.relpath(entry.path, self.upper)
            if stat.S_ISDIR(info.st_mode):
                yield path, (info.st_ino, 0, 0)
                yield from self._walk(Path(entry.path))
            else:
                yield path, (info.st_ino, info.st_mtime_ns, info.st_size)

    def apply(self, changes: Changes, generation: Path) -> None:
        """Bring the changes into a generation; a folder comes before what is in it."""
        for path in changes.gone:
            remove(generation / path)
        for path in sorted(changes.written, key=lambda path: path.count("/")):
            source, target = self.upper / path, generation / path
            try:
                info = source.lstat()
            except FileNotFoundError:  # changed again meanwhile; the next commit has it
                continue
            if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:  # a whiteout: it was removed
                remove(target)
            elif stat.S_ISDIR(info.st_mode):
                self._folder(path, target)
                shutil.copystat(source, target)
            elif stat.S_ISLNK(info.st_mode):
                remove(target)
                os.symlink(os.readlink(source), target)
            elif stat.S_ISREG(info.st_mode):
                part = target.with_name(target.name + ".part")
                shutil.copy2(source, part)
                if target.is_dir():
                    remove(target)
                part.replace(target)

    def _folder(self, path: str, target: Path) -> None:
        """Make a folder as the overlay shows it, but for what is in the upper one."""
        if _attribute(self.upper / path, "redirect"):  # it was renamed: it has the old one's files
            remove(target)
            shutil.copytree(
                self.lower / self._origin(path), target, symlinks=True, copy_function=os.link
            )
        elif (
            _attribute(self.upper / path, "opaque") == "y"
            or target.is_symlink()
            or not target.is_dir()
        ):
            remove(target)
        target.mkdir(parents=True, exist_ok=True)

    def _origin(self, path: str) -> str:
        """Where in the lower folder the files of an upper one come from."""
        if not path:
            return ""
        parent, _, name = path.rpartition("/")
        renamed = _attribute(self.upper / path, "redirect")
        if renamed.startswith("/"):
            return renamed[1:]
        return os.path.join(self._origin(parent), renamed or name)


def _attribute(folder: Path, name: str) -> str:
    try:
        return os.fsdecode(os.getxattr(folder, f"trusted.overlay.{name}"))
    except OSError:
        return ""
