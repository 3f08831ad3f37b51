"""The first process of a sandbox: makes its namespaces and its root, then runs the entry command.

Run as root by box.py with the plan of the sandbox as its one argument (JSON). Standard library
only, and few modules of it: what this imports is the time a sandbox takes to start.
"""

import ctypes
import json
import os
import select
import signal
import sys

NEWNS, NEWUTS, NEWIPC, NEWPID, NEWNET = 0x20000, 0x4000000, 0x8000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, REMOUNT, BIND, REC, PRIVATE = 1, 2, 4, 32, 4096, 16384, 1 << 18
DETACH = 2
PR_SET_PDEATHSIG = 1
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}[os.uname().machine]

libc = ctypes.CDLL(None, use_errno=True)


def check(result, what):
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def mount(source, target, kind, flags, options=""):
    done = libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    check(done, f"mount {source} on {target} ({kind} {options})")


def bind(source, target):
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        open(target, "a").close()
    mount(source, target, "", BIND)


def make_root(plan):
    root = plan["root"]
    mount("", "/", "", REC | PRIVATE)
    lower = ":".join([*plan["layers"], "/"])
    overlay(root, lower, plan["upper"], plan["work"])
    for found in plan["interpreters"]:
        path = found["path"]
        layers = [layer + path for layer in plan["layers"] if os.path.isdir(layer + path)]
        overlay(root + path, ":".join([*layers, path]), found["upper"], found["work"])
    mount("proc", root + "/proc", "proc", NOSUID | NODEV)
    devices(root + "/dev")
    mount("/sys", root + "/sys", "", BIND)  # not recursive: control groups stay out
    mount("", root + "/sys", "", BIND | REMOUNT | RDONLY)
    for source, target in plan["binds"]:
        bind(source, root + target)
    for volume in plan["volumes"]:
        target = root + volume["path"]
        os.makedirs(target, exist_ok=True)
        flags = RDONLY if volume["read_only"] else 0
        overlay(target, volume["lower"], volume["upper"], volume["work"], flags)
    os.chdir(root)
    check(libc.syscall(PIVOT_ROOT, b".", b"."), "pivot_root")
    check(libc.umount2(b".", DETACH), "umount of the old root")
    os.chdir("/")
    os.makedirs(plan["workdir"], exist_ok=True)


def overlay(target, lower, upper, work, flags=0):
    """A folder can be renamed there whichever layer it comes from, and nothing waits for the disk."""
    options = f"lowerdir={lower},upperdir={upper},workdir={work},redirect_dir=on,volatile"
    mount("overlay", target, "overlay", flags, options)


def devices(folder):
    mount("dev", folder, "tmpfs", NOSUID, "mode=755,size=1m")
    for name in ("null", "zero", "full", "random", "urandom", "tty"):
        bind("/dev/" + name, folder + "/" + name)
    os.makedirs(folder + "/pts")
    mount("devpts", folder + "/pts", "devpts", NOSUID, "newinstance,ptmxmode=0666,mode=620")
    os.symlink("pts/ptmx", folder + "/ptmx")
    os.makedirs(folder + "/shm")
    mount("shm", folder + "/shm", "tmpfs", NOSUID | NODEV, "size=2g")
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.symlink(f"/proc/self/fd/{number}", folder + "/" + name)
    os.symlink("/proc/self/fd", folder + "/fd")


def loopback_up():
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        fcntl.ioctl(probe, 0x8914, struct.pack("16sH14s", b"lo", 0x1 | 0x40, b""))


def say(status, **words):
    os.write(status, json.dumps(words).encode() + b"\n")


def silence():
    """Let go of the entry command's pipes, or they would stay open for as long as this process lives."""
    null = os.open("/dev/null", os.O_RDWR)
    for number in (0, 1, 2):
        os.dup2(null, number)


def run_entry(plan, life, status):
    """As process 1: start the entry command, reap everything, end with the command or with the cloud."""
    ends, wakes = os.pipe()
    os.set_blocking(wakes, False)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    entry = None
    if plan["command"]:
        entry = os.fork()
        if entry == 0:
            try:
                for number in (life, status, ends, wakes):
                    os.close(number)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.setsid()
                os.chdir(plan["workdir"])
                os.execvpe(plan["command"][0], plan["command"], plan["env"])
            except OSError as error:
                os.write(2, ("{}: {}\n".format(plan["command"][0], error.strerror)).encode())
                os._exit(127)
    silence()
    say(status, ready=True)
    while True:
        readable, _, _ = select.select([life, ends], [], [])
        if life in readable and not os.read(life, 1):
            os._exit(0)  # the cloud is gone: the namespace ends with its first process
        if ends in readable:
            os.read(ends, 4096)
        while True:
            try:
                pid, code = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == entry:
                say(status, exit=os.waitstatus_to_exitcode(code))
                os._exit(0)


def main():
    with open(sys.argv[1]) as file:
        plan = json.load(file)
    life, status = plan["life"], plan["status"]
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    kinds = NEWNS | NEWPID | NEWIPC | NEWUTS | (NEWNET if plan["block_network"] else 0)
    check(libc.unshare(kinds), "unshare")
    first = os.fork()
    if first:
        say(status, pid=first)
        silence()
        _, code = os.waitpid(first, 0)
        os._exit(code >> 8 or code & 0x7F)
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        libc.sethostname(b"modal", 5)
        if plan["block_network"]:
            loopback_up()
        make_root(plan)
    except OSError as error:
        say(status, failed=str(error))
        os._exit(1)
    run_entry(plan, life, status)


if __name__ == "__main__":
    main()
