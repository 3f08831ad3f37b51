"""The sandbox's working folder: files are read and written inside it and nowhere else."""

from __future__ import annotations

import base64
import os
import stat
import tempfile
from typing import Any, Callable, Dict, List, Optional

from .fault import fault_point

READ_LIMIT = 4_000_000
MANY = 500


def replace(path: str, fill: "Callable[[Any], Any]", mode: Optional[int] = None) -> None:
    """Put what `fill` writes in the place of `path`; no reader sees a part of it.

    The file keeps its mode, or gets `mode`; a new one is as open as any new file of this user.
    """
    folder, name = os.path.split(path)
    descriptor, part = tempfile.mkstemp(dir=folder, prefix=".%s." % name[:40], suffix=".part")
    try:
        with os.fdopen(descriptor, "wb") as file:
            fill(file)
        os.chmod(part, _mode_of(path) if mode is None else mode)
        fault_point("host.file.part")
        os.replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _mode_of(path: str) -> int:
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask


class Folder:
    def __init__(self, root: str, protected: List[str]) -> None:
        self.root = os.path.realpath(root)
        self.protected = [os.path.realpath(path) for path in protected]

    def existing(self, path: str) -> str:
        """Where the file `path` is. Raises ValueError if it is no file in here."""
        real = self._inside(path)
        if not os.path.isfile(real):
            raise ValueError(self._no_file(path, real))
        return real

    def target(self, path: str) -> str:
        """Where a file `path` can be written; its folders are made. Raises ValueError if none can."""
        real = self._inside(path)
        if real == self.root or os.path.isdir(real) or path.endswith("/"):
            raise ValueError("%r is a folder; name a file in it" % path)
        if real in self.protected:
            raise ValueError("%r is the notebook itself; change it with edit_cell" % path)
        try:
            os.makedirs(os.path.dirname(real), exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise ValueError("%r: a part of this path is a file, not a folder" % path) from None
        return real

    def _inside(self, path: str) -> str:
        if "\0" in path:
            raise ValueError("a path cannot contain a NUL character")
        real = os.path.realpath(os.path.join(self.root, path))
        if real != self.root and not real.startswith(self.root.rstrip(os.sep) + os.sep):
            raise ValueError("the path leads out of the sandbox's folder %s" % self.root)
        return real

    def read(self, path: str, offset: int, limit: Optional[int]) -> Dict[str, Any]:
        real = self.existing(path)
        with open(real, "rb") as file:
            file.seek(offset)
            data = file.read(min(limit or READ_LIMIT, READ_LIMIT))
        return {"data": base64.b64encode(data).decode("ascii"), "size": os.path.getsize(real)}

    def write(self, path: str, data: str, append: bool) -> Dict[str, Any]:
        real = self.target(path)
        content = base64.b64decode(data)
        if append:
            with open(real, "ab") as file:
                file.write(content)
        else:
            replace(real, lambda file: file.write(content))
        fault_point("host.file.written")
        return {"size": os.path.getsize(real), "path": real}

    def list(self, path: str) -> Dict[str, Any]:
        real = self._inside(path)
        if not os.path.isdir(real):
            raise ValueError(self._no_file(path, real))
        entries: List[Dict[str, Any]] = []
        names = sorted(os.listdir(real))
        for name in names[:MANY]:
            full = os.path.join(real, name)
            info = os.lstat(full)
            entries.append(
                {
                    "name": name,
                    "folder": os.path.isdir(full),
                    "size": info.st_size,
                    "time": info.st_mtime,
                }
            )
        return {"entries": entries, "total": len(names), "path": real}

    def _no_file(self, path: str, real: str) -> str:
        if os.path.isdir(real):
            return "%r is a folder; list it with list_files" % path
        if os.path.exists(real):
            return "%r is not a folder" % path
        parent = os.path.dirname(real)
        near = sorted(os.listdir(parent))[:12] if os.path.isdir(parent) else []
        there = " There: %s." % ", ".join(near) if near else ""
        return "no file or folder %r.%s" % (path, there)
