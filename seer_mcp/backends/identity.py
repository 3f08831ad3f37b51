"""Which process, and which machine, a record means: numbers that no change of the clock moves."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import psutil

PROC = Path("/proc")


def of_process(pid: int) -> dict[str, Any]:
    """What tells the process from every other one with its number, now or later.

    Raises psutil.NoSuchProcess.
    """
    found: dict[str, Any] = {"pid": pid, "started": psutil.Process(pid).create_time()}
    if (ticks := started_ticks(pid)) is not None:
        found.update(ticks=ticks, boot=boot(), machine=platform.node())
    return found


def is_alive(record: dict[str, Any]) -> bool:
    """Whether the process of the record runs on this machine."""
    pid = int(record["pid"])
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        if "ticks" in record:
            return record["boot"] == boot() and record["ticks"] == started_ticks(pid)
        # A clock that is set moves this time: where ticks are known, they decide.
        return abs(process.create_time() - float(record["started"])) < 1.0
    except psutil.NoSuchProcess:
        return False


def elsewhere(record: dict[str, Any]) -> str | None:
    """The machine of the record if it is another one (a home folder may be shared by several)."""
    if "boot" not in record or record["boot"] == boot() or record["machine"] == platform.node():
        return None
    return str(record["machine"])


def started_ticks(pid: int) -> int | None:
    """When a process began, in ticks since the machine did; None where that is not told."""
    try:
        stat = (PROC / str(pid) / "stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def boot() -> str:
    """This start of this machine; "" where that is not told."""
    try:
        return (PROC / "sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
