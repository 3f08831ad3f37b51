"""What outlives the machine: a copy of the journal and the log in a folder that does (a volume).

It is made when the host closes, and grows with the journal until then, because a machine can be taken
away without a word.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any, Callable, Dict

from .folder import replace
from .journal import Journal

SYNC_SECONDS = 60.0
GROW_SECONDS = 15.0  # what is lost at most with a machine that is taken away, and Modal's own delay
JOURNAL = "journal.jsonl"


def grow(folder: str, lines: bytes) -> bool:
    """Add whole lines of the journal to its copy, or nothing; False (and why on stderr) if it cannot."""
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        with open(os.path.join(folder, JOURNAL), "ab", buffering=0, opener=_private) as file:
            size = file.tell()
            try:
                if file.write(lines) != len(lines):
                    raise OSError("no room for all of it")
            except OSError:
                os.ftruncate(file.fileno(), size)
                raise
    except OSError as error:
        print("the journal could not be copied to %s: %s" % (folder, error), file=sys.stderr)
        return False
    return True


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def keep(journal: Journal, log: str, folder: str) -> None:
    """Copy both; what cannot be kept is said on stderr, which is the log of the machine."""

    def events(file: Any) -> None:  # by its numbers: what found no room on the disk as well
        start = 1
        while True:
            lines, start = journal.read(start)
            if not lines:
                return
            file.write(lines)

    def text(file: Any) -> None:
        with open(log, "rb") as source:
            shutil.copyfileobj(source, file)

    wanted: Dict[str, Callable[[Any], None]] = {JOURNAL: events}
    if os.path.exists(log):
        wanted["host.log"] = text
    for name, fill in wanted.items():
        try:
            os.makedirs(folder, mode=0o700, exist_ok=True)
            replace(os.path.join(folder, name), fill, 0o600)
        except OSError as error:
            print("%s could not be kept in %s: %s" % (name, folder, error), file=sys.stderr)
    # A volume of Modal's is committed by this; anywhere else it does no harm.
    try:
        done = subprocess.run(
            ["sync", folder],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            timeout=SYNC_SECONDS,
        )
        said = done.stderr.decode("utf-8", "backslashreplace").strip() if done.returncode else ""
    except (OSError, subprocess.TimeoutExpired) as error:
        said = str(error)
    if said:
        print("what was kept in %s may not be safe there: %s" % (folder, said), file=sys.stderr)
