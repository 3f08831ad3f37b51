"""Sandboxes as local processes: a namespace of their own where the machine allows it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

from .pipes import Input, Output

HERE = Path(__file__).parent
PYTHON_FOLDER = Path(sys.executable).parent
PATH = f"{PYTHON_FOLDER}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
CLEARED = ("tmp", "run", "var/tmp")
"""Folders of this machine that a sandbox finds empty."""


def hidden_interpreter() -> list[Path]:
    """The folders of this interpreter that lie where a sandbox finds nothing, as they would in a checkout in /tmp."""
    folders = {Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}
    return sorted(f for f in folders if any(f.is_relative_to(f"/{name}") for name in CLEARED))


def can_isolate() -> bool:
    """Whether this process may make namespaces and overlays (root on Linux, outside a jail)."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("nsenter"):
        return False
    probe = "import ctypes,sys; sys.exit(ctypes.CDLL(None).unshare(0x20020000))"
    return subprocess.run([sys.executable, "-I", "-S", "-c", probe], check=False).returncode == 0


def make_base_layer(folder: Path) -> None:
    """The layer over this machine's `/` that all sandboxes share: what is hidden, and Modal's tools.

    The checkout is hidden (all but its virtual environment): a sandbox in the cloud has only what
    was sent to it, and here too code must fail that forgot to send something.
    """
    for name in CLEARED:
        cleared = folder / name
        cleared.mkdir(parents=True)
        cleared.chmod(0o1777)
        os.setxattr(cleared, "trusted.overlay.opaque", b"y")
    for interpreter in hidden_interpreter():  # a box mounts it there
        (folder / interpreter.relative_to("/")).mkdir(parents=True)
    checkout = Path(sys.prefix).parent
    if (checkout / "pyproject.toml").is_file():
        copy = folder / checkout.relative_to("/")
        copy.mkdir(parents=True, exist_ok=True)
        for entry in checkout.iterdir():
            if entry != Path(sys.prefix):
                os.mknod(copy / entry.name, 0o600 | 0o020000, 0)  # a whiteout
    tools = folder / "__modal/.bin"
    tools.mkdir(parents=True)
    write_tool(tools / "modal-sandbox-fs-tools", HERE / "fstools.py")
    local = folder / "usr/bin"
    local.mkdir(parents=True)
    write_tool(local / "sync", HERE / "syncing.py")


def write_tool(path: Path, source: Path) -> None:
    path.write_text(f"#!{PYTHON_FOLDER / 'python'} -IS\n{source.read_text()}")
    path.chmod(0o755)


@dataclass
class VolumeMount:
    path: str
    lower: Path
    upper: Path
    work: Path
    read_only: bool = False


@dataclass
class Plan:
    """What one sandbox is made of."""

    command: list[str]
    env: dict[str, str]
    workdir: str
    layers: list[Path]
    """Over this machine's `/`, the top first."""
    volumes: list[VolumeMount] = field(default_factory=list)
    binds: list[tuple[str, str]] = field(default_factory=list)
    block_network: bool = False


class Box:
    """One sandbox's processes. `ended` is set, with `code`, when the entry command or the box is gone."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self.folder = folder
        self.plan = plan
        self.upper = folder / "upper"
        self.interpreters = [
            (path, folder / f"interpreter{number}")
            for number, path in enumerate(hidden_interpreter())
        ]
        self.stdout = Output()
        self.stderr = Output()
        self.ended = asyncio.Event()
        self.code: int | None = None
        """The entry command's exit status, negative for a signal; None if the box was killed."""
        self.pid = 0
        """Process 1 of the box, as this machine numbers it."""
        self._up = asyncio.Event()
        """It is whole, or it has ended: whoever knows of it early waits for that."""
        self._life = -1
        self._handle = -1
        """Of process 1: unlike its number, it never means another process."""
        self._launcher: asyncio.subprocess.Process | None = None
        self._tasks: list[asyncio.Task[None]] = []

    async def start(self) -> None:
        """Raises RuntimeError with the reason if the box could not be made."""
        work = self.folder / "work"
        root = self.folder / "root"
        for made in (self.upper, work, root):
            made.mkdir(parents=True)
        for _, upper in self.interpreters:
            upper.mkdir()
            Path(f"{upper}-work").mkdir()
        alive, self._life = os.pipe()
        said, says = os.pipe()
        plan = {
            "command": self.plan.command,
            "env": self.plan.env,
            "workdir": self.plan.workdir,
            "layers": [str(layer) for layer in self.plan.layers],
            "upper": str(self.upper),
            "work": str(work),
            "root": str(root),
            "interpreters": [
                {"path": str(path), "upper": str(upper), "work": str(upper) + "-work"}
                for path, upper in self.interpreters
            ],
            "binds": self.plan.binds,
            "volumes": [
                {
                    "path": volume.path,
                    "lower": str(volume.lower),
                    "upper": str(volume.upper),
                    "work": str(volume.work),
                    "read_only": volume.read_only,
                }
                for volume in self.plan.volumes
            ],
            "block_network": self.plan.block_network,
            "life": alive,
            "status": says,
        }
        written = self.folder / "plan.json"
        written.touch(0o600)
        written.write_text(json.dumps(plan))
        try:
            self._launcher = await asyncio.create_subprocess_exec(
                sys.executable,
                "-I",
                "-S",
                str(HERE / "init.py"),
                str(written),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(alive, says),
                start_new_session=True,
                env={},
            )
        finally:
            os.close(alive)
            os.close(says)
        reader = await _reader(said)
        try:
            await self._hear_start(reader)
        except BaseException:
            self.kill()
            self._finish()
            raise
        finally:
            written.unlink()
        assert self._launcher.stdin and self._launcher.stdout and self._launcher.stderr
        self.stdin = Input(self._launcher.stdin)
        self._tasks = [
            asyncio.create_task(self.stdout.fill(self._launcher.stdout)),
            asyncio.create_task(self.stderr.fill(self._launcher.stderr)),
            asyncio.create_task(self._watch(reader)),
        ]
        self._up.set()

    async def _hear_start(self, reader: asyncio.StreamReader) -> None:
        """Two processes say these words, in any order: the launcher the number, process 1 that it is ready."""
        assert self._launcher is not None and self._launcher.stderr is not None
        ready = False
        while line := await reader.readline():
            word = json.loads(line)
            if "pid" in word:
                self.pid = word["pid"]
                with contextlib.suppress(ProcessLookupError):  # it has ended already
                    self._handle = os.pidfd_open(self.pid)
            elif "exit" in word:
                self.code = word["exit"]
            elif "failed" in word:
                await self._launcher.wait()
                raise RuntimeError(word["failed"])
            ready = ready or "ready" in word
            if ready and self.pid:
                return
        await self._launcher.wait()
        said = (await self._launcher.stderr.read()).decode(errors="replace")
        raise RuntimeError(f"the sandbox's first process ended: {said}")

    async def _watch(self, reader: asyncio.StreamReader) -> None:
        assert self._launcher is not None
        try:
            while line := await reader.readline():
                self.code = json.loads(line).get("exit", self.code)
            await self._launcher.wait()
            await asyncio.gather(*self._tasks[:2])  # what it printed, to the end
        finally:
            self._finish()

    def _finish(self) -> None:
        for descriptor in (self._life, self._handle):
            if descriptor >= 0:
                os.close(descriptor)
        self._life = self._handle = -1
        self.ended.set()
        self._up.set()

    async def copy_files(self, layer: Path) -> bool:
        """Copy what the box has written; False if a file went while it was copied."""
        parts = [(self.upper, layer)]
        for path, upper in self.interpreters:
            if any(upper.iterdir()):
                parts.append((upper, layer / path.relative_to("/")))
        for source, target in parts:
            for parent in reversed(target.relative_to(layer).parents):
                if not (layer / parent).exists():
                    (layer / parent).mkdir()
                    (layer / parent).chmod(0o1777 if str(parent) in CLEARED else 0o755)
            copy = await asyncio.create_subprocess_exec("cp", "-aT", str(source), str(target))
            if await copy.wait():
                return False
        return True

    def kill(self) -> None:
        """End every process of the box at once; `ended` follows."""
        if self._handle >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._handle, signal.SIGKILL)

    async def run(
        self, argv: list[str], env: dict[str, str], workdir: str, **pipes: int
    ) -> asyncio.subprocess.Process:
        """A further process in the box."""
        await self._up.wait()
        spaces = ["-m", "-p", "-u", "-i", *(["-n"] if self.plan.block_network else [])]
        return await asyncio.create_subprocess_exec(
            "/usr/bin/nsenter",
            "-t",
            str(self.pid),
            *spaces,
            f"--wdns={workdir}",
            "--",
            *argv,
            env=env,
            start_new_session=True,
            limit=1 << 20,
            **pipes,
        )

    def processes(self) -> list[int]:
        space = os.readlink(f"/proc/{self.pid}/ns/pid")
        found: list[int] = []
        for name in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if os.readlink(f"/proc/{name}/ns/pid") == space:
                    found.append(int(name))
        return found

    async def remove(self) -> None:
        """Take the box's folder away; call it when it has ended and nothing more is read from it."""
        await asyncio.to_thread(shutil.rmtree, self.folder, True)


async def _reader(descriptor: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(descriptor, "rb", 0)
    )
    return reader
