"""Sandboxes on a machine of one's own that is reached by ssh: a lab's GPU box.

The kernel host is a process there in a session of its own, so it outlives the connection and this
server, and ends itself when idle. It is no security boundary: what runs in it can do what the user
can do there. Which process it is, is asked there; a machine that cannot be asked may come back.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import stat
import tempfile
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import Config
from ..environment import SandboxSpec
from ..errors import (
    BadInput,
    EndUnconfirmed,
    SandboxStartFailed,
    SandboxUnreachable,
)
from ..files import private_dir, write_json
from ..kernel_host.fault import fault_point
from ..money import Price
from . import Place, Progress, Record, hosting
from .hosting import START_SECONDS, There
from .sshline import HOST, Line, NoProgram, Refusal

PYTHON = "python3"
PATIENCE = 2 * START_SECONDS  # for a host: the first import from a network disk takes its time
END_SECONDS = 60.0
UNDO_SECONDS = 30.0
PIECE = 1 << 18
LACKING = {
    "python_packages": "install them there (pip install in the environment of `python`)",
    "system_packages": "ask who looks after the machine to install them",
    "repos": "clone them there; run_command does it",
    "models": "load_model fetches them there, with that machine's own token",
    "snapshot": "files of such a machine stay where they are; it has no snapshots",
}


class SshSandbox:
    def __init__(self, line: Line, instance: str, record: Record, log: str = "") -> None:
        self._line = line
        self._instance = instance
        self._record = record
        self._handle = str(record["handle"])
        self._log = log

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        return await self._line.open("attach", socket=self._record["socket"])

    async def put(self, local: Path, remote: str) -> None:
        info = hosting.regular(local)
        size, mode = info.st_size, 0o755 if info.st_mode & stat.S_IXUSR else 0o644

        async def send(writer: StreamWriter) -> None:
            with local.open("rb") as file:
                left = size
                while left and (data := await asyncio.to_thread(file.read, min(left, PIECE))):
                    writer.write(data)
                    await writer.drain()
                    left -= len(data)
            writer.write_eof()

        await self._about_file("put", remote, feed=send, path=remote, size=size, mode=mode)

    async def get(self, remote: str, local: Path) -> None:
        if local.is_dir():
            raise BadInput("local", str(local), "it is a folder; name a file in it")

        async def receive(answer: dict[str, Any], reader: StreamReader) -> None:
            mode = 0o755 if answer["mode"] & stat.S_IXUSR else 0o644
            await received(reader, answer["size"], local, mode)

        await self._about_file("get", remote, take=receive, path=remote)

    async def _about_file(self, op: str, remote: str, **more: Any) -> None:
        try:
            await self._line.ask(op, record=self._record, **more)
        except Refusal as refusal:
            if refusal.code == "refused":
                raise BadInput("remote", remote, str(refusal)) from refusal
            raise self._unreachable(refusal) from refusal

    def _unreachable(self, refusal: Refusal) -> SandboxUnreachable:
        return unreachable(self._line.host, self._handle, refusal)

    async def terminate(self) -> None:
        end = time.monotonic() + END_SECONDS
        while True:
            try:
                await self._line.ask("end", record=self._record, instance=self._instance)
                return
            except Refusal as refusal:
                why = str(self._unreachable(refusal))
            except SandboxUnreachable as error:
                why = str(error)
            if time.monotonic() > end:
                raise EndUnconfirmed(
                    self._handle, where(self._record), why.rstrip("."), billed=False
                )
            await asyncio.sleep(2.0)

    async def why_gone(self) -> str:
        return "its host process ended unexpectedly"

    async def snapshot(self) -> str:
        raise BadInput("sandbox", self._handle, LACKING["snapshot"])

    def record(self) -> Record:
        return self._record

    def log(self) -> str:
        """What was heard of it last."""
        return self._log


async def received(reader: StreamReader, size: int, local: Path, mode: int) -> None:
    """Write what comes to `local`: all of it, or nothing."""
    local.parent.mkdir(parents=True, exist_ok=True)
    descriptor, part = tempfile.mkstemp(
        dir=local.parent, prefix=f".{local.name[:80]}.", suffix=".part"
    )
    try:
        with os.fdopen(descriptor, "wb") as file:
            left = size
            while left:
                data = await reader.read(min(left, PIECE))
                if not data:
                    raise ConnectionResetError
                await asyncio.to_thread(file.write, data)
                left -= len(data)
            os.fchmod(file.fileno(), mode)
        os.replace(part, local)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise


def where(record: Record) -> str:
    return f"process {record['pid']} on {record['host']}"


def unreachable(host: str, handle: str, refusal: Refusal) -> SandboxUnreachable:
    """What the program there says, where it is no fault of the caller's."""
    if refusal.code == "gone":
        return SandboxUnreachable(f"Sandbox {handle} is not there any more.")
    if refusal.code == "elsewhere":
        return SandboxUnreachable(
            f"Sandbox {handle} was started on the machine {refusal}, and {host} now leads to another one. Give the "
            "machines names of their own in ~/.ssh/config."
        )
    return SandboxUnreachable(f"On the machine {host}: {refusal}.")


class SshBackend:
    has_secrets = False

    def __init__(self, config: Config) -> None:
        self._config = config
        self._instance = hosting.instance_of(config)
        self._lines: dict[tuple[str, str], Line] = {}

    def _line(self, host: str, python: str) -> Line:
        if (host, python) not in self._lines:
            private_dir(self._config.runtime_dir)
            self._lines[host, python] = Line(
                self._config.ssh, host, python, self._config.runtime_dir
            )
        return self._lines[host, python]

    # -- start --------------------------------------------------------------------------------

    def _check(self, spec: SandboxSpec) -> None:
        if not spec.host:
            raise BadInput("host", "", "name the machine: one of ~/.ssh/config, or user@machine")
        if not HOST.fullmatch(spec.host):
            raise BadInput(
                "host",
                spec.host,
                "it is no name of a machine; use one of ~/.ssh/config, or user@machine",
            )
        hosting.refuse(spec, "ssh", LACKING)
        if isinstance(spec.network, tuple) and not spec.blocked:
            raise BadInput(
                "network",
                list(spec.network),
                "a machine of one's own cannot tell domains apart; use true, false, or another backend",
            )

    async def price(self, spec: SandboxSpec) -> Price | None:
        self._check(spec)
        return None

    async def start(self, spec: SandboxSpec, place: Place, report: Progress) -> SshSandbox:
        self._check(spec)
        line = self._line(spec.host, spec.python or PYTHON)
        folder = private_dir(place.state_dir)
        code = hosting.code_files()
        packs = {n: hosting.pack_files({n: source}) for n, source in place.packs.items()}
        bundles = {hosting.digest(files): files for files in (code, *packs.values())}
        try:
            report(f"connecting to {spec.host}")
            there = await self._look(line, spec, place, list(bundles))
            chosen = self._checked(spec, there)
            missing = {name: bundles[name] for name in there["missing"]}
            if missing:
                count = sum(map(len, missing.values()))
                report(f"bringing {count} files of the kernel host and the packs to {spec.host}")
                await self._bring(line, missing)
        except NoProgram as error:
            raise BadInput(
                "python", line.python, f"{error} Give the path of a Python there"
            ) from None
        except SandboxUnreachable as error:
            raise SandboxStartFailed(str(error).rstrip(".")) from error
        except Refusal as refusal:
            raise self._not_started(line, refusal) from refusal
        note = {"host": line.host, "python": line.python}
        remember(self._config.state_dir / "ssh", note)
        write_json(
            folder / "ssh.json", note
        )  # for `clear`, should this server end before its record
        request = {
            "instance": self._instance,
            "handle": place.handle,
            "config": self._host_config(spec, place, there, chosen),
            "secrets": dict(place.secrets),
            "code": hosting.digest(code),
            "packs": [(hosting.digest(files), file_of(files)) for files in packs.values()],
            "memory": spec.memory,
            "processes": spec.processes,
            "blocked": spec.blocked,
            "patience": PATIENCE,
        }
        report(f"starting the kernel host on {spec.host}")
        fault_point("sandbox.create")
        try:
            record = await self._start(line, request)
            fault_point("sandbox.answers")
            sandbox = SshSandbox(line, self._instance, record)
            await hosting.place_files(sandbox, spec)
            return sandbox
        except BaseException as error:
            await asyncio.shield(self._undo(place.handle, line, error))
            raise

    async def _look(
        self, line: Line, spec: SandboxSpec, place: Place, wanted: list[str]
    ) -> dict[str, Any]:
        return await line.ask(
            "look",
            instance=self._instance,
            handle=place.handle,
            gpu=spec.gpu is not None,
            wanted=wanted,
        )

    def _checked(self, spec: SandboxSpec, there: dict[str, Any]) -> dict[str, str]:
        """The variables that choose GPUs. Raises BadInput if the machine is not what the spec asks for."""
        host = spec.host
        if spec.cpu is not None and spec.cpu > there["cores"]:
            raise BadInput("cpu", spec.cpu, f"{host} has {there['cores']} cores")
        if spec.docker and not there["docker"]:
            raise BadInput("docker", True, f"{host} has no program docker")
        if spec.gpu is None:
            return {}
        wanted = parts(spec.gpu)
        fitting = [gpu for gpu in there["gpus"] if wanted <= parts(gpu["name"])]
        if len(fitting) < spec.gpu_count:
            names = ", ".join(sorted(gpu["name"] for gpu in there["gpus"])) or "none"
            raise BadInput(
                "gpu",
                f"{spec.gpu}:{spec.gpu_count}",
                f"{host} has not that many of them. It has: {names}",
            )
        indices = sorted(int(gpu["index"]) for gpu in fitting[: spec.gpu_count])
        return {
            "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
            "CUDA_VISIBLE_DEVICES": ",".join(map(str, indices)),
        }

    async def _bring(self, line: Line, missing: Mapping[str, Mapping[str, Path]]) -> None:
        files = {
            f"{digest}/{name.removeprefix(f'{hosting.PACKS}/')}": path
            for digest, its in missing.items()
            for name, path in its.items()
        }
        content = await asyncio.to_thread(hosting.packed, files)

        async def send(writer: StreamWriter) -> None:
            writer.write(content)
            await writer.drain()
            writer.write_eof()

        await line.ask("bring", feed=send, instance=self._instance)

    def _host_config(
        self, spec: SandboxSpec, place: Place, there: dict[str, Any], chosen: dict[str, str]
    ) -> dict[str, Any]:
        box = there["box"]
        cwd = f"{there['home']}/seer-mcp/{place.handle}"
        # The notebook is not there; a file of its name would only mislead.
        protected = [f"{cwd}/{path.name}" for path in place.protected]
        lies = There(box, there["runtime"], cwd, f"{box}/packs", protected)
        spec = spec.model_copy(update={"env": {**chosen, **spec.env}})
        return hosting.host_config(self._config, spec, place, lies, kernel_timeout=PATIENCE - 5)

    async def _start(self, line: Line, request: dict[str, Any]) -> Record:
        try:
            answer = await line.ask("start", PATIENCE + 20, **request)
        except Refusal as refusal:
            raise self._not_started(line, refusal) from refusal
        except SandboxUnreachable as error:
            raise SandboxStartFailed(str(error).rstrip(".")) from error
        fault_point("sandbox.created")
        facts = {key: value for key, value in answer.items() if key != "ok"}
        return {**facts, "host": line.host, "python": line.python}

    def _not_started(self, line: Line, refusal: Refusal) -> Exception:
        if refusal.code == "needs":
            return SandboxStartFailed(
                f"{line.python} on {line.host} needs ipykernel and jupyter_client (pip install ipykernel there, or "
                "name another interpreter with `python`)",
                f"No module named: {refusal}",
            )
        if refusal.code == "network":
            return BadInput("network", False, f"{line.host} cannot do that: {refusal}")
        log = str(refusal.answer.get("log", ""))
        return SandboxStartFailed(f"on {line.host}: {refusal}", log)

    async def _undo(self, handle: str, line: Line, error: BaseException) -> None:
        """After a failed start: nothing of it runs. Raises EndUnconfirmed if that cannot be made sure."""
        end = time.monotonic() + UNDO_SECONDS
        while True:
            try:
                await self._clear(handle, line)
                return
            except SandboxUnreachable as problem:
                if time.monotonic() > end:
                    raise EndUnconfirmed(
                        handle, f"on {line.host}", str(problem).rstrip("."), billed=False
                    ) from error
            await asyncio.sleep(1.0)

    # -- find and end -------------------------------------------------------------------------

    async def find(self, record: Record) -> SshSandbox | None:
        line = self._line(str(record["host"]), str(record["python"]))
        try:
            answer = await line.ask("find", 30.0, record=record)
        except Refusal as refusal:
            raise unreachable(line.host, str(record["handle"]), refusal) from refusal
        return SshSandbox(line, self._instance, record, answer["log"]) if answer["alive"] else None

    async def clear(self, handle: str) -> None:
        try:
            note = json.loads(
                (self._config.state_dir / "sandboxes" / handle / "ssh.json").read_text()
            )
        except FileNotFoundError:
            return  # it was cut off before it began
        await self._clear(handle, self._line(note["host"], note["python"]))

    async def _clear(self, handle: str, line: Line) -> None:
        try:
            await line.ask("clear", handle=handle, instance=self._instance)
        except Refusal as refusal:
            raise unreachable(line.host, handle, refusal) from refusal

    async def sweep(self, owner: str) -> list[Record]:
        """On all machines where this state folder ever had a sandbox. One that is away is passed over,
        unless all are: then SandboxUnreachable."""
        notes = [json.loads(p.read_text()) for p in (self._config.state_dir / "ssh").glob("*.json")]
        lines = [self._line(note["host"], note["python"]) for note in notes]
        outcomes = await asyncio.gather(
            *(self._sweep(line, owner) for line in lines), return_exceptions=True
        )
        found = {r["handle"]: r for o in outcomes if not isinstance(o, BaseException) for r in o}
        failed = [o for o in outcomes if isinstance(o, BaseException)]
        for error in failed:
            if len(failed) == len(lines) or not isinstance(error, SandboxUnreachable):
                raise error
        return list(found.values())

    async def _sweep(self, line: Line, owner: str) -> list[Record]:
        try:
            answer = await line.ask("sweep", 30.0, instance=self._instance, owner=owner)
        except Refusal as refusal:
            raise unreachable(line.host, "", refusal) from refusal
        return [{**facts, "host": line.host, "python": line.python} for facts in answer["found"]]

    async def left_behind(self, record: Record, local: Path) -> Path | None:
        line = self._line(str(record["host"]), str(record["python"]))
        there = False

        async def receive(answer: dict[str, Any], reader: StreamReader) -> None:
            nonlocal there
            if there := answer["size"] >= 0:
                await received(reader, answer["size"], local, 0o600)

        try:
            await line.ask("journal", take=receive, record=record)
        except Refusal as refusal:
            raise unreachable(line.host, str(record["handle"]), refusal) from refusal
        return local if there else None


def parts(gpu: str) -> set[str]:
    """What a GPU's name says: "A100-80GB" is in "NVIDIA A100-SXM4-80GB", "H100!" is "H100"."""
    return set(re.split(r"[^A-Z0-9]+", gpu.upper())) - {""}


def file_of(files: Mapping[str, Path]) -> str:
    """What a pack is called in the folder that the kernel imports from: NAME or NAME.py."""
    return next(iter(files)).split("/")[1]


def remember(folder: Path, note: dict[str, str]) -> None:
    """Note a machine for sweeps of later servers."""
    digest = hashlib.sha256(json.dumps(note, sort_keys=True).encode()).hexdigest()[:12]
    path = private_dir(folder) / f"{digest}.json"
    if not path.exists():
        write_json(path, note)
