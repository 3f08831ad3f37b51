"""What happens, one line each: JSON in a file of this server's own, sentences on stderr.

Lines say who, what, where and how long; never a source, an output, a token or a value of the
environment. Several servers share a folder of logs: each writes only its own files, and holds a
lock on the one it writes, so that the others prune around it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import queue
import sys
import threading
import time
import traceback
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import show
from .files import private_dir
from .redact import Redactor

LOGGER = logging.getLogger("seer_mcp")
PART_BYTES = 4_000_000
TOTAL_BYTES = 64_000_000
FILES = 200
STDERR_LINES = 2000
DRAIN_SECONDS = 0.5


def open_for_lines(path: Path) -> int:
    """A descriptor for add_line; the file is made private (0600)."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    return os.open(path, flags, 0o600)


def add_line(descriptor: int, line: bytes) -> None:
    """Append one line with one write. Raises OSError, also if the disk took only a part of it.

    Who shares the file takes turns: another's write is seen page by page.
    """
    size = os.fstat(descriptor).st_size
    if size and os.pread(descriptor, 1, size - 1) != b"\n":
        line = b"\n" + line  # an earlier line was cut short: this one must not stick to it
    if os.write(descriptor, line) < len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def as_line(fields: dict[str, Any]) -> bytes:
    """One JSON object in ASCII, without what is None."""
    kept = {key: value for key, value in fields.items() if value is not None}
    return (json.dumps(kept) + "\n").encode("ascii")


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def frames(error: BaseException) -> str:
    """An exception by its types and places. Not by its texts, which can hold what a user wrote."""
    told: list[str] = []
    cause: BaseException | None = error
    while cause is not None and len(told) < 8:
        places = [
            f"{Path(f.filename).name}:{f.lineno}" for f in traceback.extract_tb(cause.__traceback__)
        ]
        why = f" {cause.strerror}" if isinstance(cause, OSError) and cause.strerror else ""
        told.append(f"{type(cause).__qualname__}{why} at {' > '.join(places[-12:]) or '?'}")
        cause = cause.__cause__ or cause.__context__
    return "; from ".join(told)


class Log:
    """The log files of one server. Nothing that goes wrong here reaches a caller."""

    def __init__(self, folder: Path, instance: str, redactor: Redactor | None = None) -> None:
        self.folder = folder
        self.redactor = redactor or Redactor()
        self.lost = 0
        """Lines that could not be written since the last that could."""
        self._instance = instance
        self._began = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
        self._part = 0
        self._size = 0
        self._descriptor: int | None = None
        self._opened = False
        self._lock = threading.Lock()
        self._libraries = Libraries(self)

    def open(self) -> None:
        """Begin a file, prune old ones, and listen to what libraries warn of."""
        self._opened = True
        logging.getLogger().addHandler(self._libraries)
        try:
            self._next_part()
        except OSError as error:
            self._trouble(error)

    def close(self) -> None:
        logging.getLogger().removeHandler(self._libraries)
        with self._lock:
            self._opened = False
            if self._descriptor is not None:
                os.close(self._descriptor)
                self._descriptor = None

    def write(self, event: str, level: int = logging.INFO, **fields: Any) -> None:
        """One event: a line in the file, and a sentence on stderr if that is asked for this level."""
        if LOGGER.isEnabledFor(level):
            clean = self.redactor.value(
                fields
            )  # before show() cuts: a part of a value is not found
            told = (f"{k}={show(v)}" for k, v in clean.items() if v is not None)
            LOGGER.log(level, "%s: %s", event, " ".join(told))
        self.keep(event, level, fields)

    def keep(self, event: str, level: int, fields: dict[str, Any]) -> None:
        """One event in the file only."""
        if not self._opened:
            return
        head = {"t": now(), "level": logging.getLevelName(level).lower(), "event": event}
        line = as_line({**head, "server": self._instance, **self.redactor.value(fields)})
        with self._lock:
            try:
                self._add(line)
            except OSError as error:
                self._trouble(error)

    def _add(self, line: bytes) -> None:
        if self._descriptor is None or self._size >= PART_BYTES:
            try:
                self._next_part()
            except OSError:
                if self._descriptor is None:
                    raise  # else the part that is open serves on, over its size
        assert self._descriptor is not None
        if self.lost:
            said = as_line({"t": now(), "level": "error", "event": "lost", "lines": self.lost})
            add_line(self._descriptor, said)
            self.lost = 0
        add_line(self._descriptor, line)
        self._size += len(line)

    def _trouble(self, error: OSError) -> None:
        self.lost += 1
        if self.lost == 1:
            LOGGER.error(
                "the log in %s cannot be written (%s); the server goes on, and lines are counted "
                "until it can",
                self.folder,
                error.strerror or error,
            )

    def _next_part(self) -> None:
        folder = private_dir(self.folder)
        name = f"{self._began}-{os.getpid()}-{self._instance}-{self._part:04}.jsonl"
        descriptor = open_for_lines(folder / name)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._size = descriptor, os.fstat(descriptor).st_size
        self._part += 1
        prune(folder)


class Libraries(logging.Handler):
    """Warnings of libraries: where in their code, not their texts, which can quote a message."""

    def __init__(self, log: Log) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        if record.name.split(".")[0] == LOGGER.name:
            return  # written by Log.write already
        where = f"{record.name} at {Path(record.pathname).name}:{record.lineno}"
        error = record.exc_info[1] if record.exc_info else None
        fields = {"where": where, "error": frames(error) if error else None}
        self._log.keep("library", record.levelno, fields)


def prune(folder: Path) -> None:
    """Remove the oldest files over the limits, but none that a living server writes."""
    sizes: dict[Path, int] = {}
    for path in sorted(folder.glob("*.jsonl")):  # by name, which begins with the time
        try:
            sizes[path] = path.stat().st_size
        except FileNotFoundError:
            continue  # another server prunes too
    total, count = sum(sizes.values()), len(sizes)
    for path, size in sizes.items():
        if total <= TOTAL_BYTES and count <= FILES:
            return
        if not held(path):
            path.unlink(missing_ok=True)
            total, count = total - size, count - 1


def held(path: Path) -> bool:
    """Whether a living process has a lock on the file."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)


# -- stderr -----------------------------------------------------------------------------------


class Plain(logging.Formatter):
    def __init__(self, form: str, redactor: Redactor) -> None:
        super().__init__(form)
        self._redactor = redactor

    def format(self, record: logging.LogRecord) -> str:
        return self._redactor.text(super().format(record))

    def formatException(self, ei: Any) -> str:
        return frames(ei[1])


class Stderr(logging.Handler):
    """stderr by way of a thread: a client that does not read it cannot hold the server up."""

    def __init__(self) -> None:
        super().__init__()
        self._queue: queue.Queue[str] = queue.Queue(STDERR_LINES)
        self._dropped = 0
        threading.Thread(target=self._write, name="stderr", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._queue.put_nowait(self.format(record))
        except queue.Full:
            self._dropped += 1

    def _write(self) -> None:
        while True:
            text = self._queue.get()
            dropped, self._dropped = self._dropped, 0
            if dropped:
                text += f"\n({dropped} lines were dropped here: nobody read them)"
            try:
                sys.stderr.write(text + "\n")
                sys.stderr.flush()
            except (OSError, ValueError):
                return  # the client closed it; what follows waits in the queue and is dropped
            finally:
                self._queue.task_done()

    def flush(self) -> None:
        """Wait until what was said is written, if somebody reads; also called when Python ends."""
        end = time.monotonic() + DRAIN_SECONDS
        while self._queue.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)


def log_to_stderr(level: str, redactor: Redactor | None = None) -> None:
    """Our events from `level` on, and warnings of libraries (their debug texts quote messages)."""
    handler = Stderr()
    handler.setFormatter(
        Plain("%(asctime)s %(levelname)s %(name)s: %(message)s", redactor or Redactor())
    )
    logging.getLogger().addHandler(handler)
    logging.getLogger().setLevel(logging.WARNING)
    LOGGER.setLevel(level.upper())


def drain_stderr() -> None:
    """Before the process ends without clean-up."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, Stderr):
            handler.flush()
