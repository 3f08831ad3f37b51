"""The contract of all backends, for sandboxes on this machine."""

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
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from seer_mcp.backends import Place, Record, Sandbox
from seer_mcp.backends.local import LocalBackend
from seer_mcp.environment import SandboxSpec
from seer_mcp.kernel_host import limits
from seer_mcp.kernel_host.identity import marked

from ..support import config_for
from .contract import CANARY, CHECKS, HIDDEN, OUTPUT_CAP, PACK, SLEEPS, Bench, Check

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


FIND = """
import asyncio, json, sys
from pathlib import Path
from tests.support import config_for
from seer_mcp.backends.local import LocalBackend
backend = LocalBackend(config_for(Path(sys.argv[1])))
print(asyncio.run(backend.find(json.loads(sys.argv[2]))) is not None)
"""


class LocalHarness:
    patience = 20.0

    def __init__(self, folder: Path, sockets: Path) -> None:
        self.folder = folder
        self._sockets = sockets
        self._config = config_for(folder, runtime_dir=sockets, output_cap=OUTPUT_CAP)
        self.backend = LocalBackend(self._config)
        elsewhere = folder / "elsewhere"
        elsewhere.mkdir()
        self.other = LocalBackend(config_for(elsewhere, runtime_dir=sockets / "other"))
        self._pack = folder / f"{PACK}.py"
        self._pack.write_text("ANSWER = 42\n")
        self.lacks: dict[str, str] = {}
        if not limits.without_network():
            self.lacks["network"] = "this machine lets nobody shut the network out"

    def spec(self, **changes: Any) -> SandboxSpec:
        return SandboxSpec(backend="local", **changes)

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
            self._config.state_dir / "sandboxes" / handle,
            self._runtime(handle),
            work,
            (work / "notebook.ipynb",),
            {PACK: self._pack},
            owner,
        )

    def _runtime(self, handle: str) -> Path:
        return self._sockets / handle

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
        found = [f"process {p.pid}" for p, its in marked(self.backend._instance) if its == handle]
        groups = limits.find_groups(self.backend._group(handle))
        found += [f"process {pid}" for pid in limits.members(groups)] + groups
        found += [p.info["name"] for p in psutil.process_iter(["name", "cmdline"]) if sleeps(p)]
        return found + [str(p) for p in self._runtime(handle).glob("*")]

    async def find_elsewhere(self, record: Record) -> bool:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            FIND,
            str(self.folder),
            json.dumps(record),
            stdout=asyncio.subprocess.PIPE,
            cwd=Path(__file__).parent.parent.parent,
        )
        out, _ = await process.communicate()
        return {b"True": True, b"False": False}[out.strip()]


def sleeps(process: psutil.Process) -> bool:
    """Whether it is one of the contract's daemons, which may have no environment to know it by."""
    return " ".join(process.info["cmdline"] or []) in SLEEPS


@pytest.fixture(scope="module")
async def bench(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Bench]:
    folder = tmp_path_factory.mktemp("contract")
    sockets = Path(tempfile.mkdtemp(prefix="seer-c-"))
    os.environ[CANARY] = "of-the-server-alone"
    made = Bench(LocalHarness(folder, sockets))
    try:
        yield made
    finally:
        await made.close()
        del os.environ[CANARY]
        shutil.rmtree(sockets, ignore_errors=True)
        assert marked(made.harness.backend._instance) == []


@pytest.mark.parametrize("check", CHECKS, ids=lambda c: c.__name__)
async def test_contract(bench: Bench, check: Check) -> None:
    await check(bench)


async def test_no_file_holds_a_secret(bench: Bench) -> None:
    box = await bench.box()
    files = [path for path in box.place.state_dir.rglob("*") if path.is_file()]
    assert box.place.state_dir / "host.json" in files
    holders = [path.name for path in files if HIDDEN.encode() in path.read_bytes()]
    assert holders in ([], ["journal.jsonl"])  # where a check has printed it


def test_the_contract_is_whole() -> None:
    names = [check.__name__ for check in CHECKS]
    assert len(names) == len(set(names)) >= 60
