"""What is done on a machine that is reached by a command: one request, one answer.

This program lies nowhere there. It comes over stdin with the modules that it needs (backends/ssh.py
sends it), so it is always the server's own. A request is a line of JSON, {"op": …, …}, with content
behind it for some; the answer a line {"ok": true, …} or {"ok": false, "code": …, "error": …}.
What is brought and what hosts write lies in ~/.seer-mcp/INSTANCE, sockets in /tmp.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import time
from typing import Any, Dict, Generator, List

LOG_TAIL = 8000
KEPT_SECONDS = 7 * 86400.0  # a journal of a sandbox that has ended
PIECE = 1 << 20
ENDED = "ended"  # a file that says: nothing may be started under this handle any more

Request = Dict[str, Any]


class Refused(Exception):
    """A request that cannot be done: a code for programs and a sentence for people."""

    def __init__(self, code: str, error: str, **more: str) -> None:
        super().__init__(error)
        self.answer = {"ok": False, "code": code, "error": error, **more}


# -- places ---------------------------------------------------------------------------------------


def root_of(instance: str) -> str:
    return os.path.join(os.path.expanduser("~"), ".seer-mcp", instance)


def box_of(instance: str, handle: str) -> str:
    return os.path.join(root_of(instance), "box", handle)


def runtime_of(instance: str, handle: str) -> str:
    """Short, whatever home and handle are: a socket's address has about 100 characters."""
    name = hashlib.sha256((instance + handle).encode("utf-8")).hexdigest()[:12]
    return "/tmp/seer-mcp-%d/%s" % (os.getuid(), name)


def private(path: str) -> str:
    """A folder that nobody else can enter; made if needed."""
    os.makedirs(path, mode=0o700, exist_ok=True)
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        raise Refused("refused", "%s belongs to somebody else on this machine" % path)
    if info.st_mode & 0o077:
        os.chmod(path, 0o700)
    return path


def home(instance: str) -> str:
    root = root_of(instance)
    private(os.path.dirname(root))
    return private(root)


def private_file(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


@contextlib.contextmanager
def locked(instance: str, handle: str) -> "Generator[None, None, None]":
    """Starting and ending exclude each other: what begins late must find that it has ended."""
    home(instance)
    box = box_of(instance, handle)
    private(os.path.dirname(box))
    with open(os.path.join(private(box), "lock"), "wb", opener=private_file) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def log_of(box: str) -> str:
    try:
        with open(os.path.join(box, "host.log"), "rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - LOG_TAIL))
            return file.read().decode("utf-8", "backslashreplace")
    except OSError:
        return ""


# -- before a start -------------------------------------------------------------------------------


def look(request: Request) -> Request:
    """What this machine is, and which of the `wanted` things are not there yet."""
    code = private(os.path.join(home(request["instance"]), "code"))
    tidy(request["instance"])
    return {
        "home": os.path.expanduser("~"),
        "box": box_of(request["instance"], request["handle"]),
        "runtime": runtime_of(request["instance"], request["handle"]),
        "code": code,
        "machine": os.uname().nodename,
        "cores": os.cpu_count() or 1,
        "gpus": gpus() if request["gpu"] else [],
        "docker": shutil.which("docker") is not None,
        "missing": [name for name in request["wanted"] if not arrived(os.path.join(code, name))],
    }


def arrived(path: str) -> bool:
    """Whether something brought is there; if so, it is used now, and stays."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def tidy(instance: str) -> None:
    """Remove what ended sandboxes left long ago, and the code and packs that no other one uses."""
    boxes = os.path.join(root_of(instance), "box")
    names = os.listdir(boxes) if os.path.isdir(boxes) else []
    old = {name for name in names if is_old(os.path.join(boxes, name))}
    if old:
        from .identity import marked

        for name in old - {handle for _, handle in marked(instance)}:
            shutil.rmtree(os.path.join(boxes, name), ignore_errors=True)
            shutil.rmtree(runtime_of(instance, name), ignore_errors=True)  # of a killed host
    used = set()
    for name in os.listdir(boxes) if os.path.isdir(boxes) else []:
        try:
            with open(os.path.join(boxes, name, "uses.json")) as file:
                used.update(json.load(file))
        except (OSError, ValueError):
            continue  # nothing was started there
    code = os.path.join(root_of(instance), "code")
    for name in set(os.listdir(code)) - used:
        if is_old(os.path.join(code, name)):
            shutil.rmtree(os.path.join(code, name), ignore_errors=True)


def is_old(path: str) -> bool:
    newest = 0.0
    for one in (path, os.path.join(path, "journal.jsonl")):
        with contextlib.suppress(OSError):
            newest = max(newest, os.stat(one).st_mtime)
    return time.time() - newest > KEPT_SECONDS


def gpus() -> List[Request]:
    """The GPUs of this machine, those with the most free memory first."""
    query = ["nvidia-smi", "--query-gpu=index,name,memory.used,memory.total"]
    try:
        done = subprocess.run(
            [*query, "--format=csv,noheader,nounits"],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=20,
        )
    except (OSError, subprocess.TimeoutExpired):
        return []
    found = []
    for line in done.stdout.decode("utf-8", "replace").splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) == 4 and parts[2].isdigit() and parts[3].isdigit():
            found.append({"index": parts[0], "name": parts[1], "used": int(parts[2])})
    return sorted(found, key=lambda gpu: int(gpu["used"]))


def bring(request: Request) -> Request:
    """Unpack what comes behind the request: each thing is there as a whole, or not at all."""
    code = os.path.join(root_of(request["instance"]), "code")
    os.umask(0o077)
    part = tempfile.mkdtemp(dir=code, prefix=".", suffix=".part")
    try:
        with tarfile.open(fileobj=sys.stdin.buffer, mode="r|gz") as tar:
            for info in tar:
                path = os.path.join(part, info.name)
                os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
                content = tar.extractfile(info)
                with open(path, "wb", opener=private_file) as file:
                    shutil.copyfileobj(content, file, PIECE)  # type: ignore[arg-type]
        for name in os.listdir(part):
            with contextlib.suppress(FileExistsError, OSError):  # another start brought it
                os.rename(os.path.join(part, name), os.path.join(code, name))
    except (tarfile.TarError, EOFError) as error:
        raise Refused("failed", "what was brought did not arrive whole: %s" % error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return {}


# -- start ----------------------------------------------------------------------------------------


def start(request: Request) -> Request:
    """A kernel host in a session of its own, which outlives this program; answers when it does."""
    from . import identity

    instance, handle, config = request["instance"], request["handle"], request["config"]
    box, runtime = config["directory"], config["ipc_directory"]
    code = os.path.join(root_of(instance), "code")
    with locked(instance, handle):
        if os.path.exists(os.path.join(box, ENDED)):
            raise Refused("ended", "it was ended before it began")
        private(os.path.dirname(runtime))
        private(runtime)
        os.makedirs(config["cwd"], mode=0o700, exist_ok=True)
        packs = private(os.path.join(box, "packs"))
        for digest, file in request["packs"]:
            os.symlink(os.path.join(code, digest, file), os.path.join(packs, file))
        uses = [request["code"], *(digest for digest, _ in request["packs"])]
        write(os.path.join(box, "uses.json"), uses)
        config["limits"] = limits_for(request)
        path = os.path.join(box, "host.json")
        write(path, config)
        try:
            child = launch(path, config, request["secrets"], os.path.join(code, request["code"]))
        except BaseException:
            identity.clear(handle, instance, config["limits"]["groups"])
            raise
        found = identity.of_process(child.pid)
    why = wait(child, config["socket"], request["patience"])
    if why is not None:
        identity.clear(handle, instance, config["limits"]["groups"])
        child.wait()
        shutil.rmtree(runtime, ignore_errors=True)
        raise Refused("start", why, log=log_of(box))
    return identity.record_of(handle, config, found)


def limits_for(request: Request) -> Request:
    from . import limits

    prefix = limits.without_network() if request["blocked"] else []
    if request["blocked"] and not prefix:
        raise Refused("network", "it lets nobody shut the network out (unshare --net fails there)")
    processes = request["processes"] or max(512, 16 * (os.cpu_count() or 1))
    plan = limits.prepare(group_of(request), request["memory"], processes)
    return {**plan, "prefix": prefix}


def group_of(request: Request) -> str:
    return "seer-mcp-%s-%s" % (request["instance"], request["handle"])


def launch(
    path: str, config: Request, secrets: Dict[str, str], code: str
) -> "subprocess.Popen[bytes]":
    # What is told of the way here, and a forwarded agent above all, is not for what runs in it.
    env = {name: value for name, value in os.environ.items() if not name.startswith("SSH_")}
    os.environ.clear()
    os.environ.update(env)
    with open(os.path.join(os.path.dirname(path), "host.log"), "ab", opener=private_file) as log:
        return subprocess.Popen(
            [sys.executable, "-B", "-m", "kernel_host", path],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=os.path.dirname(path),
            env={**env, **config["env"], **secrets, "PYTHONPATH": code},
            start_new_session=True,
        )


def wait(child: "subprocess.Popen[bytes]", address: str, patience: float) -> "str | None":
    """Wait until the host answers; why it does not, or None."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if child.poll() is not None:
            return "the kernel host ended at once"
        with socket.socket(socket.AF_UNIX) as line:
            try:
                line.connect(address)
                return None
            except OSError:
                time.sleep(0.02)
    return "the kernel host did not answer within %.0f s" % patience


def write(path: str, value: Any) -> None:
    with open(path + ".part", "w", opener=private_file) as file:
        json.dump(value, file)
    os.replace(path + ".part", path)


# -- find and end ---------------------------------------------------------------------------------


def find(request: Request) -> Request:
    from . import identity

    record = request["record"]
    other = identity.elsewhere(record)
    if other is not None:
        raise Refused("elsewhere", other)
    return {"alive": identity.is_alive(record), "log": log_of(record["folder"])}


def end(request: Request) -> Request:
    from . import identity

    record = request["record"]
    other = identity.elsewhere(record)
    if other is not None:
        raise Refused("elsewhere", other)
    never_again({**request, "handle": record["handle"]})
    identity.end(record, request["instance"])
    shutil.rmtree(runtime_of(request["instance"], record["handle"]), ignore_errors=True)
    return {}


def clear(request: Request) -> Request:
    from . import identity, limits

    never_again(request)
    groups = limits.find_groups(group_of(request))
    identity.clear(request["handle"], request["instance"], groups)
    shutil.rmtree(runtime_of(request["instance"], request["handle"]), ignore_errors=True)
    return {}


def never_again(request: Request) -> None:
    """A start under this handle that was cut off, and whose program still runs, must not go on."""
    instance, handle = request["instance"], request["handle"]
    with locked(instance, handle):
        open(os.path.join(box_of(instance, handle), ENDED), "wb", opener=private_file).close()


def sweep(request: Request) -> Request:
    """What runs there of this instance's: a record's facts for each sandbox."""
    from . import identity

    def folder(handle: str) -> str:
        return box_of(request["instance"], handle)

    return {"found": identity.running(request["instance"], request["owner"], folder)}


# -- files and the bridge -------------------------------------------------------------------------


def put(request: Request) -> None:
    from . import transfer

    transfer.put(folder_of(request), request)


def get(request: Request) -> None:
    from . import transfer

    transfer.get(folder_of(request), request)


def folder_of(request: Request) -> Any:
    from .folder import Folder

    if not find(request)["alive"]:
        raise Refused("gone", "it is not there any more")
    with open(os.path.join(request["record"]["folder"], "host.json")) as file:
        config = json.load(file)
    return Folder(config["cwd"], config["protected"])


def journal(request: Request) -> None:
    """The size of a sandbox's journal and the journal, or -1 if there is none."""
    path = os.path.join(request["record"]["folder"], "journal.jsonl")
    if not os.path.exists(path):
        say({"ok": True, "size": -1})
        return
    with open(path, "rb") as file:
        left = os.fstat(file.fileno()).st_size
        say({"ok": True, "size": left})
        while left:
            data = file.read(min(left, PIECE))
            sys.stdout.buffer.write(data)
            left -= len(data)
    sys.stdout.buffer.flush()


def attach(request: Request) -> None:
    """A bridge to the host: an empty line when it is reached, then its lines."""
    import asyncio

    from .attach import SILENCE_SECONDS, bridge

    work = bridge(request["socket"], SILENCE_SECONDS, 0.0)
    # A write that nobody reads must not keep the bridge here.
    os._exit(asyncio.new_event_loop().run_until_complete(work))


def say(answer: Request) -> None:
    sys.stdout.buffer.write((json.dumps(answer) + "\n").encode("ascii"))
    sys.stdout.buffer.flush()


OPERATIONS = {
    "look": look,
    "bring": bring,
    "start": start,
    "find": find,
    "end": end,
    "clear": clear,
    "sweep": sweep,
    "put": put,
    "get": get,
    "journal": journal,
    "attach": attach,
}


def main() -> None:
    request = json.loads(sys.stdin.buffer.readline())
    try:
        answer = OPERATIONS[request["op"]](request)
    except Refused as error:
        say(error.answer)
    except ValueError as error:
        say({"ok": False, "code": "refused", "error": str(error)})
    except OSError as error:
        say({"ok": False, "code": "failed", "error": str(error)})
    else:
        if answer is not None:
            say({"ok": True, **answer})
