"""A user of this machine for each owner of a team, so that their local sandboxes are closed to each other.

The server is root and gives every owner a number from a range in which nobody else is. It is noted
in the state folder and never given again. Host and kernel of a sandbox run under it, as its group
too and in no other, and it owns the folders that they write: the host's (`own` in the sandbox's
folder of the state), the kernel's (`files` beside the notebook) and the sockets'. All else is
root's: where a sandbox can write, root follows no link and trusts no name.
"""

from __future__ import annotations

import fcntl
import grp
import json
import os
import pwd
import signal
import socket
import stat
import struct
import subprocess
import sys
from asyncio import StreamWriter
from collections import Counter
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ..config import Config
from ..errors import BadInput, Conflict
from ..files import write_json
from ..kernel_host.identity import MARK, send

BOOK = "owner-uids.json"
OWN = "own"  # the host's folder in that of the sandbox: journal, the kernel's log, HOME
FILES = "files"  # the kernel's folder beside the notebook
# What names places of the server's user: without them programs use HOME.
PLACES = (
    *("TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "TORCH_HOME", "HF_HOME"),
    *("HF_HUB_CACHE", "HF_DATASETS_CACHE", "TRANSFORMERS_CACHE", "TRITON_CACHE_DIR"),
)
VERBS = {"-x": "enter or execute", "-r": "read", "-w": "write to"}
_starting: Counter[int] = Counter()  # by number, of this server
LACKS = (
    'while [ $# -gt 0 ]; do [ "$1" "$2" ] || { printf "%s\\n" "$1" "$2"; exit 1; }; shift 2; done'
)


@dataclass(frozen=True)
class User:
    """Whom an owner's sandboxes run as; the group has the same number."""

    uid: int

    def process(self) -> dict[str, Any]:
        """For subprocess: what makes a process this user's, and nobody else's."""
        return {"user": self.uid, "group": self.uid, "extra_groups": [], "umask": 0o077}

    def environment(self, base: Mapping[str, str], home: Path) -> dict[str, str]:
        """That of the server's user, as far as it is not about its home."""
        kept = {name: value for name, value in base.items() if name not in PLACES}
        name = f"owner-{self.uid}"  # getpass looks here; the number is in no list of users
        return {**kept, "HOME": str(home), "USER": name, "LOGNAME": name}

    def give(self, path: Path) -> Path:
        """The folder is made, and is this user's alone. Raises BadInput if it is somebody else's."""
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid not in (os.getuid(), self.uid):
            raise BadInput("folder", str(path), "it is no folder of this owner's; move it away")
        os.chown(path, self.uid, self.uid, follow_symlinks=False)
        return path

    def let_in(self, path: Path) -> Path:
        """Through a folder of ours this user may go, who may not list it."""
        os.chown(path, -1, self.uid)
        path.chmod(0o710)
        return path

    def let_read(self, path: Path) -> None:
        """A file or folder of ours with all that is in it, but for what links lead to."""
        for here, _, files in os.walk(path):
            for each in (Path(here), *(Path(here, name) for name in files)):
                if not each.is_symlink():
                    os.chown(each, -1, self.uid)
                    each.chmod(0o750 if each.is_dir() else 0o640)
        if path.is_file():
            os.chown(path, -1, self.uid)
            path.chmod(0o640)

    def must(self, needs: Iterable[tuple[str, str | Path]]) -> None:
        """Raise BadInput for the first path that this user may not use so ("-r", "-w", "-x")."""
        asked = [str(part) for need in needs for part in need]
        try:
            done = subprocess.run(
                ["/bin/sh", "-c", LACKS, "sh", *asked],
                cwd="/",
                capture_output=True,
                text=True,
                **self.process(),
            )
        except OSError as error:
            why = f"no process can be started as that user ({error.strerror}); root needs CAP_SETUID and CAP_SETGID"
            raise BadInput("owner-uids", self.uid, why) from error
        if done.returncode:
            how, path = done.stdout.split("\n")[:2]
            raise BadInput(
                "owner-uids",
                self.uid,
                f"that user, as whom an owner's sandboxes run, may not {VERBS[how]} {path}"
                f"{self._closed(Path(path))}. Open it and the folders above it to others (chmod o+rX), or let the "
                "operator name another place (--python, --packs, --models, --state, --outputs).",
            )

    def _closed(self, path: Path) -> str:
        """Which folder above a path is in the way, if it is one that modes close."""
        real = Path(os.path.realpath(path))
        for folder in [*reversed(path.absolute().parents), *reversed(real.parents)]:
            info = folder.stat()
            bits = 0o010 if info.st_gid == self.uid else 0o001
            if info.st_uid != self.uid and not info.st_mode & bits:
                return f" ({folder} is closed)"
        return ""

    def is_behind(self, writer: StreamWriter) -> bool:
        """Whether this user's program listens at a unix socket that was dialled: its name may have been
        made to lead to another's."""
        end = writer.get_extra_info("socket")
        told = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return struct.unpack("3i", told)[1] == self.uid

    def open(self, path: Path) -> int | None:
        """A file of this user's, to be read by root, whatever has been put in its place; None if it is none."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return None
        info = os.fstat(descriptor)
        if stat.S_ISREG(info.st_mode) and info.st_uid == self.uid:
            return descriptor
        os.close(descriptor)
        return None

    @contextmanager
    def starting(self) -> Generator[None]:
        """Entered while a sandbox of this user is started, before the first process is."""
        _starting[self.uid] += 1
        try:
            yield
        finally:
            _starting[self.uid] -= 1

    def end_strays(self) -> int:
        """End what has put off its mark and its parents, once no sandbox of this owner is left, nor one is
        being started (what is just made has no mark yet); how many."""
        found: list[tuple[int, bool]] = []
        for process in psutil.process_iter():
            try:
                if process.uids().real == self.uid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process.pid, MARK in process.environ()))
            except psutil.Error:
                continue  # gone
        if _starting[self.uid] or any(marked for _, marked in found):
            return 0
        for pid, _ in found:
            send(pid, signal.SIGKILL)
        return len(found)


def user_of(config: Config, owner: str) -> User | None:
    """Whom an owner's sandboxes run as: always the same. None: as the server, where no range is given.

    Raises BadInput or Conflict if there can be none.
    """
    if not config.owner_uids:
        return None
    path = config.state_dir / BOOK
    lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # other servers may share the state folder
        given = numbers(config.state_dir)
        if owner not in given:
            write_json(path, {**given, owner: _free(config, set(given.values()))}, what="owners")
            given = numbers(config.state_dir)
    finally:
        os.close(lock)
    if given[owner] not in config.owner_uids:
        raise BadInput(
            "owner-uids",
            shown(config.owner_uids),
            f"this owner's files belong to user {given[owner]}, which is not among them; give a range that has it",
        )
    return User(given[owner])


def numbers(state_dir: Path) -> dict[str, int]:
    """Owner -> number, of all that ever had one. Raises BadInput if the file is damaged."""
    path = state_dir / BOOK
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        found = None
    if not isinstance(found, dict) or not all(type(uid) is int for uid in found.values()):
        why = "it is damaged; restore it from a copy, or a number could be given to two owners"
        raise BadInput(BOOK, str(path), why)
    return found


def _free(config: Config, given: set[int]) -> int:
    folders = config.outputs_dir.glob("*") if config.outputs_dir.is_dir() else ()
    given |= {folder.lstat().st_gid for folder in folders}  # of a state folder that was lost
    given |= {user.pw_uid for user in pwd.getpwall()} | {group.gr_gid for group in grp.getgrall()}
    for uid in config.owner_uids:
        if uid not in given:
            return uid
    raise Conflict(
        f"All users of --owner-uids {shown(config.owner_uids)} are given away. The operator must name a larger range."
    )


def shown(uids: range) -> str:
    return f"{uids.start}-{uids.stop - 1}"


def refuse_unable(uids: range, python: str) -> None:
    """Raise BadInput where no owner could have a sandbox; asked when a server starts."""
    if sys.platform != "linux" or os.geteuid() != 0:
        why = "only root on Linux can start processes of other users: start the server as root, or without it"
        raise BadInput("owner-uids", shown(uids), why)
    User(uids.start).must([("-x", python)])


def open_way(config: Config) -> None:
    """Owners may pass through the folders around theirs, and may not list them."""
    for folder in (
        config.state_dir,
        config.state_dir / "sandboxes",
        config.runtime_dir,
        config.outputs_dir,
    ):
        folder.chmod(0o711)


def only_ours(path: Path, base: Path) -> bool:
    """Whether all on the way from `base` to a file is the server's: nobody can put a link there."""
    real, root = Path(os.path.realpath(path)), Path(os.path.realpath(base))
    way: Sequence[Path] = [real, *(folder for folder in real.parents if folder != root)]
    inside = [each for each in way if each.is_relative_to(root)]
    return all(each.lstat().st_uid == os.getuid() for each in inside)
