"""Which process, and which machine, a record means; which processes belong to a sandbox; their end.

Numbers that no change of the clock moves tell one process from the next with its number. All
processes of a sandbox carry two marks in their environment, so that they are found without a record.
"""

from __future__ import annotations

import json
import os
import platform
import re
import signal
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Tuple

import psutil

from . import limits

MARK = "SEER_MCP_SANDBOX"  # the handle of the sandbox
INSTANCE = "SEER_MCP_INSTANCE"  # whose it is: a digest of the server's state folder
GIVEN = "SEER_MCP_HOST"  # a host's configuration as JSON, in its environment
HANDLE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
GRACE_SECONDS = 3.0  # for a host to end by itself
PROC = Path("/proc")


def of_process(pid: int) -> Dict[str, Any]:
    """What tells the process from every other one with its number, now or later.

    Raises psutil.NoSuchProcess.
    """
    found: Dict[str, Any] = {"pid": pid, "started": psutil.Process(pid).create_time()}
    ticks = started_ticks(pid)
    if ticks is not None:
        found.update(ticks=ticks, boot=boot(), machine=platform.node())
    return found


def is_alive(record: Dict[str, Any]) -> bool:
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


def elsewhere(record: Dict[str, Any]) -> Optional[str]:
    """The machine of the record if it is another one (a home folder may be shared by several)."""
    if "boot" not in record or record["boot"] == boot() or record["machine"] == platform.node():
        return None
    return str(record["machine"])


def started_ticks(pid: int) -> Optional[int]:
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


# -- families -------------------------------------------------------------------------------------


def marked(instance: str) -> List[Tuple[psutil.Process, str]]:
    """Living processes of this instance's sandboxes, with the handles they carry."""
    found: List[Tuple[psutil.Process, str]] = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            # A handle is a name: whatever runs can carry anything as its mark.
            named = HANDLE.fullmatch(environ.get(MARK, ""))
            ours = named and environ.get(INSTANCE) == instance
            if ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append((process, environ[MARK]))
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def running(instance: str, owner: str, folder: Callable[[str], str]) -> List[Dict[str, Any]]:
    """What there is of each of the instance's sandboxes: what a record says of its host, with pid 0
    where only remains are left. `owner`: whose sandboxes, "" for all; `folder` is that of a handle."""
    found: Dict[str, Dict[str, Any]] = {}
    for process, handle in marked(instance):
        facts = _facts(process, handle, owner, folder(handle))
        if facts is not None and (handle not in found or facts["pid"]):
            found[handle] = facts
    return list(found.values())


def _facts(
    process: psutil.Process, handle: str, owner: str, folder: str
) -> Optional[Dict[str, Any]]:
    """None if the process has ended, or its sandbox is another owner's."""
    bare = {"handle": handle, "pid": 0, "started": 0.0, "socket": "", "folder": folder}
    try:
        command = process.cmdline()
        if "kernel_host" in command:
            folder = os.path.dirname(command[-1])
        if os.stat(os.path.join(folder, "host.json")).st_uid != os.getuid():
            return bare  # not written by who asks: anybody can carry the marks
        with open(os.path.join(folder, "host.json"), encoding="utf-8") as file:
            config = json.load(file)
        if owner and config["owner"] != owner:
            return None
        # Who runs as another user than the sandbox's only pretends to be its host.
        theirs = config.get("uid", os.getuid()) == process.uids().real
        theirs = theirs and ("uid" not in config or os.path.basename(folder) == handle)
        if "kernel_host" in command and theirs:
            return record_of(handle, config, of_process(process.pid))
    except psutil.NoSuchProcess:
        return None
    except (OSError, ValueError):
        return bare  # its folder is gone as well
    return bare


def record_of(handle: str, config: Dict[str, Any], process: Dict[str, Any]) -> Dict[str, Any]:
    """What finds a host again, from its configuration and its process. Holds no secret."""
    return {
        "handle": handle,
        **({"uid": config["uid"]} if "uid" in config else {}),
        **process,
        "socket": config["socket"],
        "folder": config["directory"],
        "groups": config["limits"]["groups"],
        "limits": config["limits"]["means"],
    }


def kill_all(handle: str, instance: str, groups: Iterable[str]) -> int:
    """SIGKILL every process that carries the sandbox's mark or is in its groups; how many there were."""
    ours = {process.pid for process, its in marked(instance) if its == handle}
    ours |= limits.members(groups)
    for pid in ours:
        send(pid, signal.SIGKILL)
    return len(ours)


def send(pid: int, number: int) -> None:
    """A signal for a process that may have ended meanwhile."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


def end(record: Dict[str, Any], instance: str) -> None:
    """End the host of a record, kindly at first, and all that is the sandbox's; returns when it is gone.

    A parent of the host must collect it: until then it counts as gone, although its number is taken.
    """
    pid, groups = int(record["pid"]), [str(group) for group in record.get("groups", [])]
    for number in (signal.SIGTERM, signal.SIGKILL):
        until = time.monotonic() + GRACE_SECONDS
        if is_alive(record):
            send(pid, number)
        while is_alive(record) and time.monotonic() < until:
            time.sleep(0.02)
    clear(str(record["handle"]), instance, groups)


def clear(handle: str, instance: str, groups: List[str]) -> None:
    """End all that is the sandbox's, without asking, and remove its control groups."""
    while kill_all(handle, instance, groups):
        time.sleep(0.02)
    limits.remove(groups)
