"""The contract of all backends on a machine that is reached by ssh, and the bad days of such a machine."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from seer_mcp.backends import Place, Record, Sandbox
from seer_mcp.backends.ssh import SshBackend
from seer_mcp.environment import SandboxSpec
from seer_mcp.kernel_host import limits
from seer_mcp.kernel_host.identity import marked

from ..support import config_for
from . import sshd
from .contract import CANARY, CHECKS, OUTPUT_CAP, PACK, SLEEPS, Bench, Check

pytestmark = [pytest.mark.anyio, pytest.mark.skipif(bool(sshd.ABSENT), reason=sshd.ABSENT)]


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


FIND = """
import asyncio, json, sys
from pathlib import Path
from tests.support import config_for
from seer_mcp.backends.ssh import SshBackend
config = config_for(Path(sys.argv[1]), runtime_dir=Path(sys.argv[2]), ssh=tuple(json.loads(sys.argv[3])))
print(asyncio.run(SshBackend(config).find(json.loads(sys.argv[4]))) is not None)
"""


class SshHarness:
    patience = 30.0

    def __init__(self, folder: Path, sockets: Path, machine: sshd.Machine) -> None:
        self.folder = folder
        self.machine = machine
        self.sockets = sockets
        changes = {"runtime_dir": sockets, "ssh": machine.ssh}
        self.config = config_for(folder, output_cap=OUTPUT_CAP, **changes)
        self.backend = SshBackend(self.config)
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        # It knows the machine too, so that a sweep of it asks there.
        (elsewhere / "state").mkdir()
        (elsewhere / "state" / "ssh").symlink_to(self.config.state_dir / "ssh")
        self.other = SshBackend(config_for(elsewhere, **changes))
        self._pack = folder / f"{PACK}.py"
        self._pack.write_text("ANSWER = 42\n")
        self.lacks: dict[str, str] = {}
        if not limits.without_network():
            self.lacks["network"] = "this machine lets nobody shut the network out"

    def spec(self, **changes: Any) -> SandboxSpec:
        given = {"backend": "ssh", "host": "lab", "python": sys.executable, **changes}
        return SandboxSpec(**given)

    def broken(self) -> SandboxSpec:
        bare = self.folder / "bare"
        if not bare.exists():
            subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
        return self.spec(python=str(bare / "bin" / "python"))

    def impossible(self) -> SandboxSpec:
        return self.spec(python="/nowhere/python")

    def place(self, handle: str, owner: str) -> Place:
        work = self.folder / "work" / handle
        work.mkdir(parents=True, exist_ok=True)
        return Place(
            handle,
            self.config.state_dir / "sandboxes" / handle,
            self.sockets / handle,
            work,
            (work / "notebook.ipynb",),
            {PACK: self._pack},
            owner,
        )

    def stale(self, record: Record) -> Record:
        return {**record, "pid": os.getpid()}

    async def kill_host(self, sandbox: Sandbox) -> None:
        os.kill(sandbox.record()["pid"], signal.SIGKILL)

    @contextlib.asynccontextmanager
    async def frozen(self, sandbox: Sandbox) -> AsyncIterator[None]:
        os.kill(sandbox.record()["pid"], signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(sandbox.record()["pid"], signal.SIGCONT)

    async def left(self, handle: str) -> list[str]:
        instance = self.backend._instance
        found = [f"process {p.pid}" for p, its in marked(instance) if its == handle]
        groups = limits.find_groups(f"seer-mcp-{instance}-{handle}")
        found += [f"process {pid}" for pid in limits.members(groups)] + groups
        found += [p.info["name"] for p in psutil.process_iter(["name", "cmdline"]) if sleeps(p)]
        return found + [str(path) for path in self.sockets_there(handle)]

    def sockets_there(self, handle: str) -> list[Path]:
        from seer_mcp.kernel_host.remote import runtime_of

        return list(Path(runtime_of(self.backend._instance, handle)).glob("*"))

    async def find_elsewhere(self, record: Record) -> bool:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            FIND,
            str(self.folder),
            str(self.sockets),
            json.dumps(self.machine.ssh),
            json.dumps(record),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent.parent,
        )
        out, _ = await process.communicate()
        return {b"True": True, b"False": False}[out.strip()]


def sleeps(process: psutil.Process) -> bool:
    return " ".join(process.info["cmdline"] or []) in SLEEPS


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sshd.Machine]:
    made = sshd.Machine(tmp_path_factory.mktemp("machine"))
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture(scope="module")
async def bench(
    tmp_path_factory: pytest.TempPathFactory, machine: sshd.Machine
) -> AsyncIterator[Bench]:
    sockets = Path(tempfile.mkdtemp(prefix="seer-s-"))
    os.environ[CANARY] = "of-the-server-alone"
    made = Bench(SshHarness(tmp_path_factory.mktemp("contract"), sockets, machine))
    try:
        yield made
    finally:
        await made.close()
        del os.environ[CANARY]
        machine.close(sockets)
        shutil.rmtree(sockets, ignore_errors=True)
        assert marked(made.harness.backend._instance) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
async def test_contract(bench: Bench, check: Check) -> None:
    await check(bench)
