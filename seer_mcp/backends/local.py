"""Sandboxes on this machine: a process group with a kernel host in a session of its own.

Not a security boundary: what runs in it can do what the user can do. It outlives the server, and
ends itself when idle.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter
from pathlib import Path

import psutil

from .. import kernel_host
from ..config import Config
from ..environment import SandboxSpec
from ..errors import BadInput, SandboxStartFailed, SandboxUnreachable
from ..files import private_dir, write_json
from ..kernel_host.fault import fault_point, in_host
from . import Place, Progress, Record

MARK = "SEER_MCP_SANDBOX"  # in the environment of every process of a sandbox
LINE_LIMIT = 256 * 1024 * 1024
START_SECONDS = 30.0


class LocalSandbox:
    def __init__(self, handle: str, socket: Path, folder: Path, pid: int, started: float) -> None:
        self._handle = handle
        self._socket = socket
        self._folder = folder
        self._pid = pid
        self._started = started
        self.child: subprocess.Popen[bytes] | None = None

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        try:
            return await asyncio.open_unix_connection(str(self._socket), limit=LINE_LIMIT)
        except OSError as error:
            raise SandboxUnreachable(f"Sandbox {self._handle} does not answer: {error}.") from error

    def alive(self) -> bool:
        """Whether the host process of the record still runs (and is not another with its number)."""
        if self.child is not None and self.child.poll() is not None:
            return False
        try:
            process = psutil.Process(self._pid)
            same = abs(process.create_time() - self._started) < 1.0
            return same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    async def terminate(self) -> None:
        if self.alive():
            os.kill(self._pid, signal.SIGTERM)
            for _ in range(60):
                if not self.alive():
                    break
                await asyncio.sleep(0.05)
        if self.alive():
            os.kill(self._pid, signal.SIGKILL)
        while await asyncio.to_thread(kill_marked, self._handle) or self.alive():
            await asyncio.sleep(0.02)
        shutil.rmtree(self._socket.parent, ignore_errors=True)

    def record(self) -> Record:
        return {
            "handle": self._handle,
            "pid": self._pid,
            "started": self._started,
            "socket": str(self._socket),
            "folder": str(self._folder),
        }

    def log(self) -> str:
        path = self._folder / "host.log"
        return path.read_text(errors="backslashreplace")[-8000:] if path.exists() else ""


def kill_marked(handle: str) -> int:
    """SIGKILL every process that carries the sandbox's mark; how many there were."""
    count = 0
    for process in psutil.process_iter():
        try:
            if process.environ().get(MARK) == handle and process.status() != psutil.STATUS_ZOMBIE:
                process.kill()
                count += 1
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return count


class LocalBackend:
    def __init__(self, config: Config) -> None:
        self._config = config

    async def start(self, spec: SandboxSpec, place: Place, report: Progress) -> LocalSandbox:
        python = spec.python or self._config.python
        if shutil.which(python) is None:
            raise BadInput(
                "python", python, "no such program; give the path of a Python interpreter"
            )
        self._check_room(place.runtime_dir)
        folder = private_dir(place.state_dir)
        runtime = private_dir(place.runtime_dir)
        hosted = folder / "host" / "kernel_host"
        shutil.copytree(
            Path(kernel_host.__file__).parent,
            hosted,
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
        packs = folder / "packs"
        packs.mkdir(exist_ok=True)
        for name, source in place.packs.items():
            link = packs / (name if source.is_dir() else f"{name}.py")
            link.unlink(missing_ok=True)
            link.symlink_to(source)
        base = {**self._config.sandbox_env, **spec.env, MARK: place.handle}
        # `python` in a cell or command is the kernel's own.
        found = str(Path(str(shutil.which(python))).absolute().parent)
        base["PATH"] = os.pathsep.join(filter(None, [found, base.get("PATH")]))
        path = [str(packs), *filter(None, [spec.env.get("PYTHONPATH")])]
        config = {
            "directory": str(folder),
            "ipc_directory": str(runtime),
            "socket": str(runtime / "host"),
            "cwd": str(place.work_dir),
            "protected": [str(p) for p in place.protected],
            "env": {**base, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"},
            "idle_limit": spec.idle_limit or self._config.idle_limit,
            "end_at": time.time() + spec.lifetime if spec.lifetime else None,
            "output_cap": self._config.output_cap,
            "kernel_timeout": START_SECONDS - 5,
            "fault": self._config.fault if in_host(self._config.fault) else "",
        }
        write_json(folder / "host.json", config, what="host-config")
        report("starting the kernel host")
        fault_point("sandbox.create")
        with open(folder / "host.log", "ab") as log:
            try:
                # A few milliseconds. From a thread it would be left running when this is cancelled.
                child = subprocess.Popen(  # noqa: ASYNC220
                    [python, "-m", "kernel_host", str(folder / "host.json")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=folder,
                    env={**base, "PYTHONPATH": str(hosted.parent), "PYTHONDONTWRITEBYTECODE": "1"},
                    start_new_session=True,
                )
            except OSError as error:
                shutil.rmtree(runtime, ignore_errors=True)
                raise SandboxStartFailed(f"{python} could not be started: {error}") from error
        fault_point("sandbox.created")
        started = time.time()
        try:
            started = psutil.Process(child.pid).create_time()
        except psutil.NoSuchProcess:
            pass  # it ended already; the wait below says so, with its log
        sandbox = LocalSandbox(place.handle, runtime / "host", folder, child.pid, started)
        sandbox.child = child
        try:
            await self._answering(sandbox, python)
            fault_point("sandbox.answers")
        except BaseException:
            await asyncio.shield(sandbox.terminate())
            raise
        return sandbox

    async def _answering(self, sandbox: LocalSandbox, python: str) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if not sandbox.alive():
                log = sandbox.log()
                why = f"the kernel host ended at once under {python}"
                if "No module named" in log:
                    why += "; that interpreter needs ipykernel and jupyter_client (pip install ipykernel)"
                raise SandboxStartFailed(why, log)
            try:
                _, writer = await sandbox.dial()
            except SandboxUnreachable:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return
        raise SandboxStartFailed(
            f"the kernel host did not answer within {START_SECONDS:.0f} s", sandbox.log()
        )

    def _check_room(self, runtime: Path) -> None:
        limit = 104 if sys.platform == "darwin" else 107
        longest = runtime / "k999-5"
        if len(os.fsencode(str(longest))) > limit:
            raise BadInput(
                "runtime folder",
                str(runtime),
                f"too long for a socket ({limit} bytes); set XDG_RUNTIME_DIR to a shorter one",
            )

    async def find(self, record: Record) -> LocalSandbox | None:
        sandbox = LocalSandbox(
            str(record["handle"]),
            Path(record["socket"]),
            Path(record["folder"]),
            int(record["pid"]),
            float(record["started"]),
        )
        return sandbox if sandbox.alive() else None

    async def clear(self, handle: str) -> None:
        while await asyncio.to_thread(kill_marked, handle):
            await asyncio.sleep(0.02)
