"""A control plane on loopback, a client of it, and what the contract of all backends needs of both."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from seer_mcp.backends import Place, Record, Sandbox
from seer_mcp.backends.modal import ModalBackend
from seer_mcp.backends.modal.account import BROKEN
from seer_mcp.environment import SandboxSpec

from ..support import config_for
from .contract import OUTPUT_CAP, PACK, SLEEPS

ROOT = Path(__file__).parent.parent.parent
GPU = "T4"  # a machine with a GPU goes another way through the client (version 1 of sandboxes)
FIND = """
import asyncio, json, sys
from pathlib import Path
from tests.support import config_for
from seer_mcp.backends.modal import ModalBackend
backend = ModalBackend(config_for(Path(sys.argv[1])))
print(asyncio.run(backend.find(json.loads(sys.argv[2]))) is not None)
"""


def token_there() -> bool:
    """Whether this process has a token for Modal itself."""
    import modal.config

    there = modal.config.config.get("token_id") and modal.config.config.get("token_secret")
    return bool(there) and "127.0.0.1" not in os.environ.get("MODAL_SERVER_URL", "")


class ModalHarness:
    patience = 30.0

    def __init__(self, control: Any, folder: Path, gpu: str | None) -> None:
        self.control = control
        self.folder = folder
        self.gpu = gpu
        self.config = config_for(folder, output_cap=OUTPUT_CAP)
        self.backend = ModalBackend(self.config)
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir(exist_ok=True)
        self.other = ModalBackend(config_for(elsewhere))
        self._pack = folder / f"{PACK}.py"
        self._pack.write_text("ANSWER = 42\n")
        self.lacks = {
            "processes": "Modal sets no such limit",
            "last words": "the disk of a machine whose host was killed is gone with it",
        }

    def spec(self, **changes: Any) -> SandboxSpec:
        return SandboxSpec(backend="modal", gpu=self.gpu, **changes)

    async def make_broken(self) -> None:
        """A snapshot of a sandbox in which somebody removed what the host needs."""
        sandbox = await self.backend.start(self.spec(), self.place("c-broken-made", ""), print)
        try:
            process = await sandbox._there.exec.aio(
                "sh", "-c", "rm -r $(python -c 'import jupyter_client as j; print(j.__path__[0])')"
            )
            assert await process.wait.aio() == 0
            self._broken = await sandbox.snapshot()
        finally:
            await sandbox.terminate()

    def broken(self) -> SandboxSpec:
        return self.spec(snapshot=self._broken)

    def impossible(self) -> SandboxSpec:
        return self.spec(python="/nowhere/python")

    def place(self, handle: str, owner: str, **more: Any) -> Place:
        work = self.folder / "work" / handle
        work.mkdir(parents=True, exist_ok=True)
        return Place(
            handle,
            self.config.state_dir / "sandboxes" / handle,
            self.folder / "sockets",
            work,
            (work / "notebook.ipynb",),
            {PACK: self._pack},
            owner,
            **more,
        )

    def stale(self, record: Record) -> Record:
        return {**record, "id": record["id"][:-6] + "000000"}

    def host(self, sandbox: Sandbox) -> psutil.Process:
        """The kernel host's process, as this machine sees it."""
        psutil.process_iter.cache_clear()  # it may know a number by a process that had it before
        ours = self.processes(sandbox.record()["id"])
        (host,) = [
            process
            for process in psutil.process_iter(["cmdline"])
            if process.pid in ours and (process.info["cmdline"] or [])[-2:] == ["-m", "kernel_host"]
        ]
        return host

    def processes(self, sandbox: str) -> list[int]:
        return self.control.processes(sandbox=sandbox)

    async def kill_host(self, sandbox: Sandbox) -> None:
        self.host(sandbox).kill()

    @asynccontextmanager
    async def frozen(self, sandbox: Sandbox) -> AsyncGenerator[None]:
        host = self.host(sandbox)
        host.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            with suppress(psutil.NoSuchProcess):  # it was ended meanwhile
                host.send_signal(signal.SIGCONT)

    async def left(self, handle: str) -> list[str]:
        ours = [row["id"] for row in self.alive() if row["name"] == handle]
        found = [f"sandbox {id}" for id in ours]
        found += [f"process {pid}" for id in ours for pid in self.processes(id)]
        running = psutil.process_iter(["name", "cmdline"])
        return found + [
            p.info["name"] for p in running if " ".join(p.info["cmdline"] or []) in SLEEPS
        ]

    async def find_elsewhere(self, record: Record) -> bool:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            FIND,
            str(self.folder),
            json.dumps(record),
            stdout=asyncio.subprocess.PIPE,
            cwd=ROOT,
        )
        out, _ = await process.communicate()
        return {b"True": True, b"False": False}[out.strip()]

    def alive(self) -> list[dict[str, Any]]:
        """Rows of the ledger that are not closed, billed already or not."""
        return [row for row in self.control.ledger() if row["ended"] is None]


class LiveHarness(ModalHarness):
    """Does its harm with commands in the sandbox: nobody has a hand on the machine itself there."""

    patience = 300.0
    public = ("1.1.1.1", 443)
    """An address that a machine anywhere reaches."""

    async def within(self, sandbox: Sandbox, *command: str) -> str:
        there: Any = sandbox._there  # type: ignore[attr-defined]
        process = await there.exec.aio(*command)
        said = await process.stdout.read.aio()
        await process.wait.aio()
        return said

    async def kill_host(self, sandbox: Sandbox) -> None:
        with suppress(*BROKEN):  # the machine may end before the command's answer is read
            await self.within(sandbox, "pkill", "-9", "-f", "kernel_host$")

    @asynccontextmanager
    async def frozen(self, sandbox: Sandbox) -> AsyncGenerator[None]:
        await self.within(sandbox, "pkill", "-STOP", "-f", "kernel_host$")
        try:
            yield
        finally:
            await self.within(sandbox, "pkill", "-CONT", "-f", "kernel_host$")

    async def left(self, handle: str) -> list[str]:
        found: list[str] = []
        for record in await self.backend.sweep(""):
            if record["handle"] == handle and (there := await self.backend.find(record)):
                listed = await self.within(there, "ps", "-eo", "args")
                found += [f"sandbox {record['id']}", *listed.splitlines()]
        return found
