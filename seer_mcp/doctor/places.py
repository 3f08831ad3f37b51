"""Checks of folders and files: room, modes, locks, leftovers."""

from __future__ import annotations

import os
import re
import stat
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from ..backends.owners import numbers
from ..errors import BadInput
from ..files import Lock
from .findings import Finding, Fix, Patient, fail, ok, warn

MB = 1_000_000
PROBE = b"\0" * 65536
PART = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.part")  # as write_atomic names them
OURS = (".ipynb", ".json", ".jsonl", ".txt", "http-token")
NODES_WARN, NODES_FAIL = 1000, 50


def existing(path: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def places(patient: Patient) -> dict[str, Path]:
    config = patient.config
    return {"state": config.state_dir, "outputs": config.outputs_dir, "runtime": config.runtime_dir}


async def disk(patient: Patient) -> list[Finding]:
    """Free space and file entries where the server writes."""
    findings: list[Finding] = []
    told: list[str] = []
    for what, path in places(patient).items():
        low, least = (10 * MB, MB) if what == "runtime" else (1000 * MB, 50 * MB)
        info = os.statvfs(existing(path))
        free = info.f_bavail * info.f_frsize
        said = f"{free / MB:,.0f} MB free for {what} ({path})"
        mend = "free space there, or name another folder (--state, --outputs, XDG_RUNTIME_DIR)"
        if free < least:
            findings.append(fail(said, mend))
        elif free < low:
            findings.append(warn(said, mend))
        elif info.f_files and info.f_favail < NODES_WARN:
            full = fail if info.f_favail < NODES_FAIL else warn
            findings.append(full(f"{info.f_favail} file entries free for {what} ({path})", mend))
        else:
            told.append(said)
    return [*findings, *([ok("; ".join(told))] if told else [])]


async def writing(patient: Patient) -> list[Finding]:
    """Whether files can be written: tried, with a file that has no name and goes by itself."""
    findings: list[Finding] = []
    for what, path in places(patient).items():
        folder = existing(path)
        try:
            with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
                written = file.write(PROBE) or 0
            if written < len(PROBE):
                findings.append(fail(f"{folder} takes no more data", "free space there"))
        except OSError as error:
            flag = {"state": "--state", "outputs": "--outputs"}.get(what, "XDG_RUNTIME_DIR")
            mend = f"make it writable for this user, or name another folder ({flag})"
            findings.append(fail(f"{what} folder {path}: {error.strerror}", mend))
    return findings or [ok("state, outputs and runtime folders can be written")]


async def socket_path(patient: Patient) -> list[Finding]:
    """Whether a socket's address fits: its length is limited."""
    limit = 104 if sys.platform == "darwin" else 107
    longest = patient.config.runtime_dir / ("x" * 12) / "k999-5"
    length = len(os.fsencode(str(longest)))
    if length > limit:
        mend = "set XDG_RUNTIME_DIR to a shorter path (/tmp, say) in the client's env block"
        return [fail(f"socket paths would have {length} bytes, {limit} is the limit", mend)]
    return [ok(f"socket paths have at most {length} of {limit} bytes")]


def private_things(patient: Patient) -> Iterator[Path]:
    """All that must be ours alone."""
    state, runtime = patient.config.state_dir, patient.config.runtime_dir
    yield from (state, runtime, state / "audit.jsonl", state / "http-token")
    for name in ("sandboxes", "locks", "logs"):
        yield state / name
    yield from (state / "logs").glob("*.jsonl")
    for folder in (state / "sandboxes").glob("*"):
        yield from (folder, folder / "record.json", folder / "host.json")
    yield from runtime.glob("*")


async def modes(patient: Patient) -> list[Finding]:
    """Whether anybody else can look into what is private."""
    findings: list[Finding] = []
    count = 0
    try:
        shared = set(numbers(patient.config.state_dir).values())
    except (OSError, BadInput) as error:
        mend = "restore it from a copy, or a number could be given to two owners"
        return [fail(f"the users of owners cannot be read: {error}", mend)]
    for path in private_things(patient):
        try:
            info = path.lstat()
        except FileNotFoundError:
            continue
        count += 1
        wanted = 0o700 if stat.S_ISDIR(info.st_mode) else 0o600
        if shared and (info.st_uid in shared or passes(path, info)):
            continue
        if stat.S_ISLNK(info.st_mode) or info.st_uid != os.getuid():
            whose = "is a link" if stat.S_ISLNK(info.st_mode) else f"belongs to user {info.st_uid}"
            findings.append(fail(f"{path} {whose}", "look who made it, and remove it"))
        elif info.st_mode & 0o077:
            now = stat.S_IMODE(info.st_mode)
            findings.append(
                fail(
                    f"{path} has mode {now:04o}: others can reach it",
                    f"run: chmod {wanted:o} {path}",
                    tighten(path, wanted),
                )
            )
    return findings or [ok(f"{count} private files and folders are closed to others")]


def passes(path: Path, info: os.stat_result) -> bool:
    """Whether something of ours is as open as owners with users of their own need it, and not more."""
    folder, mode = stat.S_ISDIR(info.st_mode), stat.S_IMODE(info.st_mode)
    named = path.name == "host.json" and not mode & ~0o640
    return info.st_uid == os.getuid() and (named or (folder and not mode & ~0o711))


def tighten(path: Path, mode: int) -> Fix:
    async def fix() -> str:
        path.chmod(mode)
        return f"{path} has mode {mode:04o}"

    return fix


async def parts(patient: Patient) -> list[Finding]:
    """Files that were being written when their writer was killed."""
    state, outputs = patient.config.state_dir, patient.config.outputs_dir
    folders = [state, *(state / "sandboxes").glob("*"), outputs, *outputs.glob("*")]
    old = [
        path
        for folder in folders
        if folder.is_dir()
        for path in folder.glob(".*.part")
        if is_leftover(path, patient.part_age)
    ]
    if not old:
        return [ok("no half-written files are left over")]

    async def fix() -> str:
        for path in old:
            path.unlink(missing_ok=True)
        return f"removed {len(old)}: {shortly(old)}"

    said = f"{len(old)} half-written files of writers that were killed: {shortly(old)}"
    return [warn(said, "they can be removed: the whole older version is in its place", fix)]


def is_leftover(path: Path, age: float) -> bool:
    named = PART.fullmatch(path.name)
    try:
        info = path.lstat()
    except FileNotFoundError:
        return False
    return (
        named is not None
        and named["name"].endswith(OURS)
        and stat.S_ISREG(info.st_mode)
        and info.st_uid == os.getuid()
        and time.time() - info.st_mtime > age
    )


def shortly(paths: list[Path]) -> str:
    more = f" and {len(paths) - 3} more" if len(paths) > 3 else ""
    return ", ".join(map(str, paths[:3])) + more


async def locks(patient: Patient) -> list[Finding]:
    """Whether locks work where the state is, and whether who holds one of ours can still act."""
    state = patient.config.state_dir
    findings: list[Finding] = []
    try:
        with tempfile.NamedTemporaryFile(dir=existing(state), prefix=".doctor-") as file:
            first, second = Lock(Path(file.name)), Lock(Path(file.name))
            works = first.take() and not second.take()
            first.release()
            second.release()
    except OSError as error:
        works, why = False, f": {error.strerror}"
    else:
        why = ""
    if not works:
        mend = "name a state folder on a local disk (--state): two servers could write one notebook"
        findings.append(fail(f"files in {state} cannot be locked{why}", mend))
    holders = held_by([*(state / "sandboxes").glob("*/lock"), *(state / "locks").glob("*")])
    servers: set[int] = set()
    for pid, paths in sorted(holders.items()):
        try:
            stopped = psutil.Process(pid).status() in (psutil.STATUS_STOPPED, "tracing-stop")
        except psutil.NoSuchProcess:
            continue  # it ended meanwhile, and its locks with it
        servers.add(pid)
        if stopped:
            said = f"process {pid} is stopped and holds {len(paths)} locks ({shortly(paths)})"
            mend = f"let it go on (kill -CONT {pid}) or end it (kill -KILL {pid}); its sandboxes live on"
            findings.append(fail(said, mend))
    if findings:
        return findings
    said = f"held by {len(servers)} living servers" if servers else "held by nobody"
    return [ok(f"locks work; {said}")]


def held_by(paths: list[Path]) -> dict[int, list[Path]]:
    """Which processes hold a lock on which of the files, as /proc/locks tells (Linux)."""
    numbers: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            info = path.stat()
        except FileNotFoundError:
            continue
        numbers[(info.st_dev, info.st_ino)] = path
    try:
        lines = Path("/proc/locks").read_text().splitlines()
    except OSError:
        return {}
    found: dict[int, list[Path]] = {}
    for line in lines:
        words = line.split()
        if words[1] != "FLOCK" or words[2] == "->":
            continue
        major, minor, node = words[5].split(":")
        device = os.makedev(int(major, 16), int(minor, 16))
        path = numbers.get((device, int(node)))
        if path is not None and int(words[4]) > 0:
            found.setdefault(int(words[4]), []).append(path)
    return found
