"""Files that are never half written, names that stay in their folder, locks that die with us."""

from __future__ import annotations

import fcntl
import glob
import json
import os
import re
import tempfile
import unicodedata
from pathlib import Path
from typing import Any

from .errors import BadInput, PathRefused
from .kernel_host.fault import fault_point

NAME = re.compile(r"[a-z0-9](?:[a-z0-9_-]{0,38}[a-z0-9])?")
RESERVED = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"com{i}" for i in range(10)),
    *(f"lpt{i}" for i in range(10)),
}


def write_atomic(path: Path, data: bytes, mode: int = 0o644, what: str = "file") -> None:
    """Replace `path` by `data`: every reader sees the old file or the new one, whole.

    `what` names its fault points.
    """
    fault_point(f"{what}.write")
    descriptor, part = tempfile.mkstemp(
        dir=path.parent, prefix=f".{path.name[:80]}.", suffix=".part"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        fault_point(f"{what}.part")
        os.replace(part, path)
        fault_point(f"{what}.renamed")
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def clear_parts(path: Path) -> None:
    """Remove what writers of `path` left beside it when they were killed. For who may write it alone."""
    for part in path.parent.glob(f".{glob.escape(path.name[:80])}.*.part"):
        part.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any], what: str = "record") -> None:
    """A private record: mode 0600, atomic."""
    write_atomic(path, (json.dumps(value, indent=1) + "\n").encode(), mode=0o600, what=what)


def private_dir(path: Path) -> Path:
    """A folder that nobody else can look into; made if needed.

    One that others may pass through (0711, 0710) stays so: what is in it is private by itself.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    info = path.lstat()
    if path.is_symlink():
        raise BadInput("folder", str(path), "it is a link; name the folder that it leads to")
    if info.st_uid != os.getuid():
        raise BadInput(
            "folder", str(path), "it belongs to somebody else; remove it or name another"
        )
    if info.st_mode & 0o066:
        path.chmod(0o700)
    return path


def checked_name(argument: str, value: str) -> str:
    """A name that can be a file name everywhere; PathRefused says which rule it breaks."""
    if not NAME.fullmatch(value):
        raise PathRefused(
            argument,
            value,
            "a name is 1 to 40 of a-z, 0-9, '-' and '_', and begins and ends with a letter or digit",
        )
    if value in RESERVED:
        raise PathRefused(argument, value, "this name is reserved on some systems")
    return value


def resolve_inside(argument: str, value: str, base: Path, roots: list[Path]) -> Path:
    """The file that `value` names (relative to `base`), if it lies in one of `roots`.

    Symbolic links are followed before the check, so none leads out.
    """
    if (
        not value.strip()
        or "\0" in value
        or any(unicodedata.category(c) in ("Cc", "Cf", "Cs") for c in value)
    ):
        raise PathRefused(
            argument, value, "a path cannot be empty or contain control or invisible characters"
        )
    if (
        "\\" in value
        or "%2e" in value.lower()
        or len(value) > 1000
        or any(len(p.encode()) > 255 for p in value.split("/"))
    ):
        raise PathRefused(
            argument, value, "a path cannot contain '\\', '%2e' or a part longer than 255 bytes"
        )
    real = Path(os.path.realpath(base / Path(value).expanduser()))
    for root in roots:
        if real.is_relative_to(os.path.realpath(root)):
            return real
    allowed = ", ".join(str(root) for root in roots)
    raise PathRefused(argument, value, f"it is outside the folders this server may use ({allowed})")


class Lock:
    """An exclusive lock on a file. It ends with the process that holds it, however that ends."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._descriptor: int | None = None

    def take(self) -> bool:
        """True if it is ours now; False if another process has it."""
        if self._descriptor is not None:
            return True
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            return False
        self._descriptor = descriptor
        return True

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def writable(folder: Path) -> bool:
    """Whether a folder can be written to, or made. Leaves nothing behind."""
    while not os.path.lexists(folder):
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False
