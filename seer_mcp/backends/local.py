"""Sandboxes on this machine: a process group with a kernel host in a session of its own.

Not a security boundary: what runs in it can do what the user can do (the server's, or one for each
owner: owners.py). It outlives the server, and ends itself when idle. Its processes are marked in
their environment with its handle, so that they can be found without a record.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Generator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import psutil

from .. import kernel_host
from ..config import Config
from ..environment import SandboxSpec
from ..errors import BadInput, SandboxStartFailed, SandboxUnreachable
from ..files import private_dir, write_json
from ..kernel_host import identity, limits
from ..kernel_host.fault import fault_point
from ..kernel_host.folder import Folder, replace
from ..money import Price
from . import Place, Progress, Record, hosting
from .hosting import LINE_LIMIT, There
from .owners import FILES, OWN, User, open_way, user_of

START_SECONDS = hosting.START_SECONDS
MEANS = limits.MEANS
PROCESSES = max(512, 16 * (os.cpu_count() or 1))
COPY_PIECE = 1 << 20
LACKING = {
    "cpu": "a local sandbox uses the cores that this machine has; leave it out",
    "gpu": "a local sandbox has the GPUs that this machine has; leave it out",
    "host": "it is for backend ssh",
    "python_packages": "install them into the interpreter that `python` names",
    "system_packages": "install them on this machine",
    "repos": "clone them on this machine",
    "docker": "a local sandbox has what this machine has; leave it out",
    "snapshot": "a local sandbox's files stay where they are; it has no snapshots",
}


class LocalSandbox:
    def __init__(self, instance: str, record: Record) -> None:
        self._instance = instance
        self._record = record
        self._handle = str(record["handle"])
        self._socket = Path(record["socket"])
        self._folder = Path(record["folder"])
        self._user = User(record["uid"]) if "uid" in record else None
        self.child = 0
        """The number of the host where it is our own child, which we have to collect."""

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        try:
            ends = await asyncio.open_unix_connection(str(self._socket), limit=LINE_LIMIT)
        except OSError as error:
            raise SandboxUnreachable(f"Sandbox {self._handle} does not answer: {error}.") from error
        if self._user is not None and not self._user.is_behind(ends[1]):
            ends[1].close()
            raise SandboxUnreachable(f"At the socket of sandbox {self._handle} is somebody else.")
        return ends

    def alive(self) -> bool:
        """Whether the host process of the record still runs (and is not another with its number)."""
        if self.child:
            try:
                if os.waitpid(self.child, os.WNOHANG)[0]:
                    self.child = 0
            except ChildProcessError:
                self.child = 0
        return identity.is_alive(self._record)

    async def put(self, local: Path, remote: str) -> None:
        await asyncio.to_thread(self._put, local, remote)

    def _put(self, local: Path, remote: str) -> None:
        info = hosting.regular(local)
        mode = 0o755 if info.st_mode & stat.S_IXUSR else 0o644
        if self._user is not None:
            asked = {"path": remote, "mode": mode & ~0o077, "size": info.st_size}
            with local.open("rb") as content, self._transfer("put", asked, content) as told:
                heard(told, remote)
            return
        try:
            target = self._files().target(remote)
        except ValueError as error:
            raise BadInput("remote", remote, str(error)) from error
        copy(local, target, mode)

    async def get(self, remote: str, local: Path) -> None:
        await asyncio.to_thread(self._get, remote, local)

    def _get(self, remote: str, local: Path) -> None:
        if self._user is not None and not local.is_dir():
            with self._transfer("get", {"path": remote}) as told:
                mode = 0o755 if heard(told, remote)["mode"] & stat.S_IXUSR else 0o644
                local.parent.mkdir(parents=True, exist_ok=True)
                replace(str(local), lambda file: shutil.copyfileobj(told, file, COPY_PIECE), mode)
            return
        try:
            source = Path(self._files().existing(remote))
        except ValueError as error:
            raise BadInput("remote", remote, str(error)) from error
        if local.is_dir():
            raise BadInput("local", str(local), "it is a folder; name a file in it")
        local.parent.mkdir(parents=True, exist_ok=True)
        copy(source, str(local), 0o755 if source.stat().st_mode & stat.S_IXUSR else 0o644)

    @contextmanager
    def _transfer(self, does: str, asked: dict[str, Any], content: Any = None) -> Generator[Any]:
        """What a program of the owner's user says that puts or gets a file: root follows none of its links."""
        if not self.alive():
            raise SandboxUnreachable(f"Sandbox {self._handle} is not there any more.")
        assert self._user is not None
        told = str(self._folder / "host.json")
        command = [hosted(self._folder)["python"], "-m", "kernel_host.transfer", told, does]
        with subprocess.Popen(
            [*command, json.dumps(asked)],
            stdin=content or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={"PYTHONPATH": str(self._folder / "host"), "PYTHONDONTWRITEBYTECODE": "1"},
            **self._user.process(),
        ) as program:
            yield program.stdout

    def _files(self) -> Folder:
        """The sandbox's folder, with the host's own rules. Raises SandboxUnreachable if it is gone."""
        if not self.alive():
            raise SandboxUnreachable(f"Sandbox {self._handle} is not there any more.")
        config = hosted(self._folder)
        return Folder(config["cwd"], config["protected"])

    async def terminate(self) -> None:
        # In a thread: once begun it is finished, even if the caller goes.
        await asyncio.to_thread(identity.end, self._record, self._instance)
        while self.alive():  # until its number is free
            await asyncio.sleep(0.02)
        if self._user is not None:
            await asyncio.to_thread(self._user.end_strays)
        shutil.rmtree(self._socket.parent, ignore_errors=True)

    async def why_gone(self) -> str:
        return "its host process ended unexpectedly"

    async def snapshot(self) -> str:
        raise BadInput(
            "sandbox",
            self._handle,
            LACKING["snapshot"],
        )

    def record(self) -> Record:
        return self._record

    def log(self) -> str:
        path = self._folder / "host.log"
        return path.read_text(errors="backslashreplace")[-8000:] if path.exists() else ""


def copy(source: Path, target: str, mode: int) -> None:
    """`target` is the whole of `source`, or as it was."""

    def fill(file: Any) -> None:
        with source.open("rb") as content:
            shutil.copyfileobj(content, file, COPY_PIECE)

    replace(target, fill, mode)


def heard(told: Any, remote: str) -> dict[str, Any]:
    """The first line of who puts or gets a file. Raises BadInput."""
    answer = json.loads(told.readline() or b'{"ok": false, "error": "it could not be transferred"}')
    if not answer["ok"]:
        raise BadInput("remote", remote, str(answer["error"]))
    return answer


def hosted(folder: Path) -> dict[str, Any]:
    """What the host of a sandbox was told at its start."""
    return json.loads((folder / "host.json").read_text())


def remove_if_empty(folder: Path) -> None:
    with suppress(OSError):  # what the owner has in it stays
        folder.rmdir()


def make_private(folder: Path) -> None:
    """Everything in a folder is its owner's alone, whatever the umask was."""
    for here, folders, files in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(here, name), 0o700)
        for name in files:
            os.chmod(os.path.join(here, name), 0o600)


class LocalBackend:
    has_secrets = False

    def __init__(self, config: Config) -> None:
        self._config = config
        self._instance = hosting.instance_of(config)

    async def start(self, spec: SandboxSpec, place: Place, report: Progress) -> LocalSandbox:
        hosting.refuse(spec, "local", LACKING)
        python = spec.python or self._config.python
        if shutil.which(python) is None:
            raise BadInput(
                "python", python, "no such program; give the path of a Python interpreter"
            )
        self._check_room(place.runtime_dir)
        user = await asyncio.to_thread(user_of, self._config, place.owner)
        with nullcontext() if user is None else user.starting():
            return await self._start(spec, place, report, python, user)

    async def _start(
        self, spec: SandboxSpec, place: Place, report: Progress, python: str, user: User | None
    ) -> LocalSandbox:
        process = {} if user is None else user.process()
        if isinstance(spec.network, tuple) and not spec.blocked:
            raise BadInput(
                "network",
                list(spec.network),
                "a local sandbox cannot tell domains apart; use true, false, or another backend",
            )
        prefix = limits.without_network(**process) if spec.blocked else []
        if spec.blocked and not prefix:
            raise BadInput(
                "network",
                spec.network,
                "this machine lets nobody shut the network out (unshare --net fails); "
                "use another backend, or allow the network",
            )
        folder = private_dir(place.state_dir)
        runtime = private_dir(place.runtime_dir)
        code = private_dir(folder / "host")
        shutil.copytree(
            Path(kernel_host.__file__).parent,
            code / "kernel_host",
            ignore=shutil.ignore_patterns("__pycache__"),
            dirs_exist_ok=True,
        )
        make_private(code)
        packs = private_dir(folder / "packs")
        for name, source in place.packs.items():
            link = packs / (name if source.is_dir() else f"{name}.py")
            link.unlink(missing_ok=True)
            link.symlink_to(source)
        work, base, more = place.work_dir, self._config.sandbox_env, dict[str, Any]()
        if user is not None:
            work = await asyncio.to_thread(self._settle, user, spec, place, python)
            base = user.environment(base, folder / OWN)
            more = {"uid": user.uid, "own": str(folder / OWN), "python": shutil.which(python)}
        plan = limits.prepare(
            self._group(place.handle),
            spec.memory,
            spec.processes or PROCESSES,
            MEANS,
            None if user is None else user.uid,
        )
        there = There(
            str(folder),
            str(runtime),
            str(work),
            str(packs),
            [str(path) for path in place.protected],
        )
        config = hosting.host_config(
            self._config,
            spec,
            place,
            there,
            base=base,
            limits={**plan, "prefix": prefix},
            kernel_timeout=START_SECONDS - 5,
            **more,
        )
        # The host needs what a kernel does to start (HOME, LD_LIBRARY_PATH, …), and hands the secrets on.
        env = {**config["env"], **place.secrets}
        try:
            sandbox = await self._launch(python, env, config, place.handle, report)
            try:
                await hosting.place_files(sandbox, spec)
            except BaseException:
                await asyncio.shield(sandbox.terminate())
                raise
            return sandbox
        except BaseException:
            shutil.rmtree(runtime, ignore_errors=True)
            limits.remove(plan["groups"])
            if user is not None:
                remove_if_empty(work)
            raise

    def _settle(self, user: User, spec: SandboxSpec, place: Place, python: str) -> Path:
        """Give the owner's user what is its own, and see that it reaches the rest; the kernel's folder."""
        state = place.state_dir
        open_way(self._config)
        home = self._config.home(place.owner).base
        way = [folder for folder in place.work_dir.parents if folder.is_relative_to(home)]
        for folder in (*way, place.work_dir, state):
            user.let_in(folder)
        for folder in (state / "host", state / "packs"):
            user.let_read(folder)
        owned = [
            user.give(folder) for folder in (state / OWN, place.runtime_dir, place.work_dir / FILES)
        ]
        if (state / "blind").is_dir():  # histories and caches; the copies in it stay the server's
            user.give(state / "blind")
        models = [("-r", self._config.models_dir), ("-x", self._config.models_dir)]
        try:
            user.must(
                [
                    ("-x", shutil.which(python) or python),
                    *(("-r", source) for source in place.packs.values()),
                    *(("-x", source) for source in place.packs.values() if source.is_dir()),
                    *(models if spec.models and self._config.models_dir.is_dir() else ()),
                    *(("-w", folder) for folder in owned),
                ]
            )
        except BadInput:
            remove_if_empty(owned[-1])
            raise
        return owned[-1]

    async def _launch(
        self,
        python: str,
        env: dict[str, str],
        config: dict[str, Any],
        handle: str,
        report: Progress,
    ) -> LocalSandbox:
        folder = Path(config["directory"])
        write_json(folder / "host.json", config, what="host-config")
        process: dict[str, Any] = {}
        if "uid" in config:
            user = User(config["uid"])
            await asyncio.to_thread(user.let_read, folder / "host.json")
            process = user.process()
        report("starting the kernel host")
        fault_point("sandbox.create")
        with open(folder / "host.log", "ab", opener=private) as log:
            try:
                # A few milliseconds. From a thread it would be left running when this is cancelled.
                child = subprocess.Popen(  # noqa: ASYNC220
                    [python, "-m", "kernel_host", str(folder / "host.json")],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=config.get("own", folder),
                    env={
                        **env,
                        "PYTHONPATH": str(folder / "host"),
                        "PYTHONDONTWRITEBYTECODE": "1",
                    },
                    start_new_session=True,
                    **process,
                )
            except OSError as error:
                raise SandboxStartFailed(f"{python} could not be started: {error}") from error
        fault_point("sandbox.created")
        try:
            process = identity.of_process(child.pid)
        except psutil.NoSuchProcess:  # it ended already; the wait below says so, with its log
            process = {"pid": child.pid, "started": time.time()}
        sandbox = LocalSandbox(self._instance, identity.record_of(handle, config, process))
        sandbox.child = child.pid
        child.returncode = 0  # it outlives this object, and who knows it collects it
        try:
            await self._answering(sandbox, python)
            fault_point("sandbox.answers")
        except BaseException:
            await asyncio.shield(sandbox.terminate())
            raise
        return sandbox

    def _group(self, handle: str) -> str:
        return f"seer-mcp-{self._instance}-{handle}"

    async def _answering(self, sandbox: LocalSandbox, python: str) -> None:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if not sandbox.alive():
                log = sandbox.log()
                why = f"the kernel host ended at once under {python}"
                if "No module named" in log:
                    why += "; that interpreter needs ipykernel and jupyter_client: " + (
                        'install the server as "seer-mcp[local]" (uvx "seer-mcp[local]"), or name another '
                        "interpreter with --python"
                        if python == sys.executable
                        else "pip install ipykernel there"
                    )
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

    async def price(self, spec: SandboxSpec) -> Price | None:
        return None

    async def find(self, record: Record) -> LocalSandbox | None:
        sandbox = LocalSandbox(self._instance, record)
        if (machine := identity.elsewhere(record)) is not None:
            raise SandboxUnreachable(
                f"It was started on the machine {machine} and may still run there: use it from a server on that "
                f"machine. If the machine is gone for good, remove {record['folder']}."
            )
        return sandbox if sandbox.alive() else None

    async def clear(self, handle: str) -> None:
        groups = await asyncio.to_thread(limits.find_groups, self._group(handle))
        await asyncio.to_thread(identity.clear, handle, self._instance, groups)
        try:
            config = hosted(Path(self._folder(handle)))
        except FileNotFoundError:
            return  # it was cut off before it had any
        if "uid" in config:
            await asyncio.to_thread(User(config["uid"]).end_strays)
        shutil.rmtree(config["ipc_directory"], ignore_errors=True)

    async def sweep(self, owner: str) -> list[Record]:
        return await asyncio.to_thread(identity.running, self._instance, owner, self._folder)

    def _folder(self, handle: str) -> str:
        return str(self._config.state_dir / "sandboxes" / handle)

    async def left_behind(self, record: Record, local: Path) -> Path | None:
        journal = Path(record["folder"]) / "journal.jsonl"
        if "uid" in record:
            return await asyncio.to_thread(self._fetched, record, local)
        return journal if journal.exists() else None

    def _fetched(self, record: Record, local: Path) -> Path | None:
        source = User(record["uid"]).open(Path(record["folder"]) / OWN / "journal.jsonl")
        if source is None:
            return None
        with os.fdopen(source, "rb") as file:
            replace(str(local), lambda copy: shutil.copyfileobj(file, copy, COPY_PIECE), 0o600)
        return local


def private(path: str, flags: int) -> int:
    """An opener of files that are their owner's alone."""
    return os.open(path, flags, 0o600)
