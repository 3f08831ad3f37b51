"""How much memory and how many processes a sandbox may take, by the best means of this machine.

The kernel and the commands are limited, not the host: it must live to say what happened. The means,
the best first:

- "cgroup v2", "cgroup v1": a control group of the sandbox's own. Memory counts over all of its
  processes; the kernel's out-of-memory killer ends one of them when it is used up.
- "rlimit" (not for root, whom the number of processes does not bind): limits that each process
  inherits. Memory counts for each process alone, and is refused (MemoryError) rather than ended.
- "watch": the host looks a few times a second and ends what has grown too large.

`prepare` is called by whoever starts the host, and its answer is passed on to `Limits` in the host;
`remove` by both, because a host can be killed.
"""

from __future__ import annotations

import os
import resource
import shlex
import subprocess
import sys
import time
from typing import Any, Dict, Iterable, List, Optional, Set, Tuple

import psutil

MEANS = ("cgroup v2", "cgroup v1", "rlimit", "watch")
MIB = 1024 * 1024
WATCH_SECONDS = 0.2
REMOVE_SECONDS = 2.0
# $0 is a command that takes its arguments; a limit that cannot be set must not be passed over.
ENTER = 'for group in %s; do echo $$ > "$group/cgroup.procs" || exit 126; done; exec "$@"'
SET = 'ulimit -u %d 2>/dev/null || ulimit -p %d || exit 126; %sexec "$@"'  # bash, dash

Plan = Dict[str, Any]


def prepare(
    name: str,
    memory: Optional[int],
    processes: int,
    means: Iterable[str] = MEANS,
    user: Optional[int] = None,
) -> Plan:
    """The first of `means` that works here, with its control groups made. `memory` is in MiB.

    `user`: as whom the host will run, if it is another. That one cannot enter groups of ours.
    """
    plan: Plan = {"memory": memory, "processes": processes, "groups": []}
    for mean in means:
        if mean.startswith("cgroup"):
            if user is not None:
                continue
            parents = _parents_v2(memory) if mean == "cgroup v2" else _parents_v1(memory)
            groups = _make(name, parents, memory, processes, mean) if parents else []
            if not groups:
                continue
            plan["groups"] = groups
        elif mean == "rlimit" and (os.getuid() if user is None else user) == 0:
            continue
        return {**plan, "means": mean}
    raise ValueError("none of %s can be used here" % ", ".join(means))


def without_network(**process: Any) -> List[str]:
    """A command that takes another one and runs it where there is no network; [] if none may.

    `process`: what subprocess is told of the user who will run it, if it is another.
    """
    for command in (["unshare", "--net"], ["unshare", "--map-current-user", "--net"]):
        try:
            done = subprocess.run(
                [*command, "true"],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                **process,
            )
        except OSError:
            return []
        if done.returncode == 0:
            return command
    return []


def remove(groups: Iterable[str]) -> None:
    """Remove control groups whose processes are gone, or are about to be."""
    end = time.monotonic() + REMOVE_SECONDS
    for group in groups:
        while True:
            try:
                os.rmdir(group)
            except FileNotFoundError:
                pass
            except OSError as error:  # busy: an ended process takes a moment to leave
                if time.monotonic() < end:
                    time.sleep(0.01)
                    continue
                print("control group %s stays: %s" % (group, error), file=sys.stderr)
            break


def members(groups: Iterable[str]) -> Set[int]:
    """Process numbers of all that is in the groups, whatever it has made of its environment."""
    texts = [_read(os.path.join(group, "cgroup.procs")) for group in groups]
    found = {int(line) for text in texts for line in text.split()}
    return found - {0}  # a process that cannot be seen from here


def find_groups(name: str) -> List[str]:
    """Control groups of that name, wherever they are: for a sandbox whose record is lost."""
    found: List[str] = []
    for controllers, mount, _ in _mounts():
        if controllers & {"", "memory", "pids"}:
            for folder, folders, _files in os.walk(mount):
                if name in folders:
                    found.append(os.path.join(folder, name))
    return found


class Limits:
    """What the host does about the limits of its sandbox."""

    def __init__(self, plan: Optional[Plan]) -> None:
        self.plan: Plan = plan or {"means": "none", "memory": None, "processes": 0, "groups": []}
        self.memory: Optional[int] = self.plan["memory"]
        self.processes: int = self.plan["processes"]
        self.means: str = self.plan["means"]
        self._oom_file = _oom_file(self.plan["groups"])

    def wrap(self, argv: List[str]) -> List[str]:
        """A command line that sets the limits for itself and then becomes `argv`."""
        argv = [*self.plan.get("prefix", []), *argv]
        if self.plan["groups"]:
            quoted = " ".join(map(shlex.quote, self.plan["groups"]))
            return ["/bin/sh", "-c", ENTER % quoted, "sh", *argv]
        if self.means == "rlimit":
            hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
            count = _tasks_of_user() + self.processes
            count = count if hard == resource.RLIM_INFINITY else min(count, hard)
            data = ""
            if self.memory and not self._watches_memory:
                data = "ulimit -d %d || exit 126; " % (self.memory * 1024)
            return ["/bin/sh", "-c", SET % (count, count, data), "sh", *argv]
        return argv

    def oom_kills(self) -> int:
        """How many processes the OOM killer has ended in this group (0 where it cannot be told)."""
        try:
            with open(self._oom_file) as file:
                return next(
                    (int(line.split()[1]) for line in file if line.startswith("oom_kill ")), 0
                )
        except OSError:
            return 0

    @property
    def _watches_memory(self) -> bool:
        # Elsewhere than on Linux a limit on data does not bind what is mapped.
        return bool(self.memory) and (
            self.means == "watch" or (self.means == "rlimit" and sys.platform != "linux")
        )

    @property
    def watched(self) -> bool:
        return self.means == "watch" or self._watches_memory

    def breach(self, family: "List[psutil.Process]") -> Optional[str]:
        """Which limit a family of processes is over, as a phrase; None if none."""
        if self.means == "watch" and len(family) > self.processes:
            return "it had more than the %d processes that it may have" % self.processes
        if self._watches_memory and _memory(family, self.memory or 0) > (self.memory or 0):
            return "out of memory: it took more than the %d MiB that it may use" % self.memory
        return None

    def may_breach(self) -> bool:
        """Whether it is worth looking: a machine with few processes has no sandbox with many."""
        return self._watches_memory or len(psutil.pids()) > self.processes

    def out_of_memory(self) -> str:
        """The cause, for a process that the OOM killer ended."""
        if self.memory and self.plan["groups"]:
            return "out of memory: this sandbox may use %d MiB" % self.memory
        return "the system's out-of-memory killer ended a process of this sandbox just now"

    def described(self) -> Plan:
        """What the limits are, for the sandbox's status."""
        return {"memory": self.memory, "processes": self.processes, "means": self.means}


def _memory(family: "List[psutil.Process]", enough: int) -> int:
    """MiB that the processes hold. Pages that they share are counted once, if it matters."""
    total = shared = 0
    for process in family:
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # gone, or out of reach
    if total <= enough * MIB:
        return total // MIB
    for process in family:
        try:
            full = process.memory_full_info()
            shared += getattr(full, "pss", full.uss)
        except psutil.Error:
            continue
    return shared // MIB


def _tasks_of_user() -> int:
    """Threads of all processes of this user: what RLIMIT_NPROC is compared with."""
    count = 0
    for process in psutil.process_iter(["uids", "num_threads"]):
        uids = process.info["uids"]
        if uids is not None and uids.real == os.getuid():
            count += process.info["num_threads"] or 1
    return count


# -- control groups -------------------------------------------------------------------------------


def _mounts() -> List[Tuple[Set[str], str, str]]:
    """(controllers, where it is mounted, which part is seen there) of each hierarchy.

    Version 2 has the one controller "", as in /proc/self/cgroup.
    """
    found: List[Tuple[Set[str], str, str]] = []
    try:
        with open("/proc/self/mountinfo") as file:
            for line in file:
                before, _, after = line.partition(" - ")
                kind, _, options = after.split()[:3]
                if kind in ("cgroup", "cgroup2"):
                    controllers = {""} if kind == "cgroup2" else set(options.split(","))
                    found.append((controllers, before.split()[4], before.split()[3]))
    except OSError:
        return []  # not Linux
    return found


def _own_group(controller: str) -> Optional[str]:
    """The folder of the group that this process is in; controller "" is version 2."""
    try:
        with open("/proc/self/cgroup") as file:
            lines = [line.strip().split(":", 2) for line in file]
    except OSError:
        return None
    path = next((path for _, names, path in lines if controller in names.split(",")), None)
    if path is None:
        return None
    for controllers, mount, root in _mounts():
        if controller not in controllers:
            continue
        inside = path[len(root.rstrip("/")) :] if path.startswith(root) else path
        folder = os.path.join(mount, inside.lstrip("/")).rstrip("/")
        if os.path.isdir(folder):
            return folder
    return None


def _parents_v1(memory: Optional[int]) -> List[str]:
    """Where the sandbox's groups can be made, one folder for each controller; [] if not everywhere."""
    found = [_own_group(name) for name in (["pids", "memory"] if memory else ["pids"])]
    return [f for f in found if f] if all(f and os.access(f, os.W_OK) for f in found) else []


def _parents_v2(memory: Optional[int]) -> List[str]:
    """A group in which ours can be made: our own, or the one around it (a group with processes in
    it can hold no limited groups, so that ours becomes a neighbour of our own)."""
    own = _own_group("")
    if own is None:
        return []
    needed = {"pids", "memory"} if memory else {"pids"}
    limit = _read(os.path.join(own, "memory.max")).strip()
    # To leave a group that is limited itself would be an escape from that limit.
    for folder in [own] + ([os.path.dirname(own)] if limit == "max" else []):
        if not os.access(folder, os.W_OK):
            continue
        control = os.path.join(folder, "cgroup.subtree_control")
        missing = needed - set(_read(control).split())
        if not missing:
            return [folder]
        there = set(_read(os.path.join(folder, "cgroup.controllers")).split())
        if missing <= there and _write(control, " ".join("+" + name for name in sorted(missing))):
            return [folder]
    return []


def _make(
    name: str, parents: List[str], memory: Optional[int], processes: int, means: str
) -> List[str]:
    """The groups with their limits set; [] if this user may not have them."""
    groups = [os.path.join(parent, name) for parent in parents]
    try:
        for group in groups:
            os.makedirs(group, exist_ok=True)
    except OSError:
        remove(groups)
        return []
    size = (memory or 0) * MIB
    v2 = means == "cgroup v2"
    good = _write(os.path.join(groups[0], "pids.max"), str(processes))
    if memory:
        hard = "memory.max" if v2 else "memory.limit_in_bytes"
        swap = "memory.swap.max" if v2 else "memory.memsw.limit_in_bytes"
        good = good and _write(os.path.join(groups[-1], hard), str(size))
        # A machine may have no swap, or not count it.
        _write(os.path.join(groups[-1], swap), "0" if v2 else str(size))
    if good:
        quoted = " ".join(map(shlex.quote, groups))
        trial = ["/bin/sh", "-c", ENTER % quoted, "sh", "true"]
        done = subprocess.run(trial, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        good = done.returncode == 0
    if not good:
        remove(groups)
        return []
    return groups


def _oom_file(groups: List[str]) -> str:
    """Where the OOM killer counts, for these groups or else for our own."""
    own = (_own_group(""), _own_group("memory"))
    for group in [*groups, *(group for group in own if group)]:
        for name in ("memory.events", "memory.oom_control"):
            path = os.path.join(group, name)
            if os.path.exists(path):
                return path
    return os.devnull


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except OSError:
        return ""  # a file that this kernel does not have says nothing


def _write(path: str, text: str) -> bool:
    try:
        with open(path, "w") as file:
            file.write(text)
    except OSError:
        return False
    return True
