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
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from seer_mcp.backends import Place, Record, Sandbox
from seer_mcp.backends.ssh import SshBackend
from seer_mcp.environment import SandboxSpec
from seer_mcp.errors import BadInput, EndUnconfirmed, SandboxStartFailed, SandboxUnreachable
from seer_mcp.kernel_host import limits
from seer_mcp.kernel_host.identity import marked
from seer_mcp.kernel_host.remote import runtime_of
from seer_mcp.packs import Packs
from seer_mcp.sessions import Register

from ..support import config_for, open_lab, read_cells, streams, text_of
from . import sshd
from .contract import (
    CANARY,
    CHECKS,
    HIDDEN,
    OF_THE_HOST,
    OUTPUT_CAP,
    PACK,
    SLEEPS,
    Bench,
    Box,
    Check,
    refused,
    until,
)

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
        made.close()


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
        machine.end_shared(sockets)
        shutil.rmtree(sockets, ignore_errors=True)
        assert marked(made.harness.backend._instance) == []


def listed() -> Iterator[Any]:
    for check in CHECKS:
        name = check.__name__
        marks = [pytest.mark.slow] if OF_THE_HOST.match(name) else []
        yield pytest.param(check, id=name, marks=marks)


@pytest.mark.parametrize("check", list(listed()))
async def test_contract(bench: Bench, check: Check) -> None:
    await check(bench)


# -- bad days -------------------------------------------------------------------------------------


@pytest.fixture
def harness(tmp_path: Path, machine: sshd.Machine) -> Iterator[SshHarness]:
    """For a test of its own: nothing of it may be left."""
    sockets = Path(tempfile.mkdtemp(prefix="seer-s-"))
    made = SshHarness(tmp_path, sockets, machine)
    try:
        yield made
        assert marked(made.backend._instance) == []
    finally:
        for process, _ in marked(made.backend._instance):
            process.kill()
        machine.end_shared(sockets)
        shutil.rmtree(sockets, ignore_errors=True)


async def started(harness: SshHarness, handle: str = "own", **changes: Any) -> Sandbox:
    return await harness.backend.start(
        harness.spec(**changes), harness.place(handle, ""), lambda _: None
    )


BAD_DAYS = {
    "nowhere.invalid": "there is no such host. Name one of ~/.ssh/config, or user@machine",
    "closed": "no ssh server listens there (connection refused)",
    "silent": "it did not answer in time",
    "stranger": "it refused the login (",
    "unknown-key": "its host key is not known here. Log in once in a terminal (ssh unknown-key)",
    "changed-key": "its host key is not the one that is known here",
}


@pytest.mark.parametrize("host", BAD_DAYS)
async def test_a_machine_that_cannot_be_reached_is_one_sentence(
    harness: SshHarness, host: str
) -> None:
    config = replace(harness.config, ssh=(*harness.machine.ssh, "-o", "ConnectTimeout=2"))
    backend = SshBackend(config)
    began = time.monotonic()
    text = await refused(
        backend.start(harness.spec(host=host), harness.place("bad", ""), lambda _: None),
        SandboxStartFailed,
        f"The machine {host} cannot be reached: {BAD_DAYS[host]}",
        "Nothing was left running.",
    )
    assert time.monotonic() - began < 15 and "\n" not in text and ".." not in text


async def test_no_interpreter_is_one_sentence(harness: SshHarness) -> None:
    for python in ("python9", "/nowhere/python", "~/none/python"):
        await refused(started(harness, python=python), BadInput, "no program", "Python there")


@pytest.mark.parametrize(
    "host", ["-oProxyCommand=touch {canary}", "a b", "a;touch {canary}", "$(touch {canary})", ""]
)
async def test_what_is_no_host_is_refused(harness: SshHarness, host: str) -> None:
    canary = harness.folder / "canary"
    spec = harness.spec().model_copy(update={"host": host.format(canary=canary)})
    await refused(harness.backend.price(spec), BadInput, "host = ")
    start = harness.backend.start(spec, harness.place("own", ""), lambda _: None)
    await refused(start, BadInput, "host = ")
    assert not canary.exists()


WISHES: list[dict[str, Any]] = [
    {"python_packages": ("numpy",)},
    {"system_packages": ("git",)},
    {"snapshot": "im-1"},
    {"network": ("github.com",)},
    {"cpu": 250.0},
    {"gpu": "H100"},
]


@pytest.mark.parametrize("wish", WISHES, ids=lambda wish: next(iter(wish)))
async def test_a_wish_that_cannot_be_met_is_refused(
    harness: SshHarness, wish: dict[str, Any]
) -> None:
    await refused(started(harness, **wish), BadInput, next(iter(wish)))


@pytest.mark.slow
async def test_a_quoted_interpreter_and_a_home_folder_work(harness: SshHarness) -> None:
    odd = harness.machine.home / "it's-$odd"
    odd.mkdir(exist_ok=True)
    wrapper = odd / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    wrapper.chmod(0o755)
    for handle, python in {"whole": str(wrapper), "home": "~/it's-$odd/python"}.items():
        sandbox = await started(harness, handle, python=python)
        await sandbox.terminate()


LINES = """
import time
for i in range(1500):
    print('line', i, flush=True)
    if i % 25 == 0: time.sleep(0.05)
"""


async def test_a_connection_that_is_cut_in_mid_cell_loses_nothing(harness: SshHarness) -> None:
    box = Box(harness, await started(harness), harness.place("own", ""), [])
    await box.ready()
    (id,) = await box.submit(LINES)
    cut = 0
    for at in (100, 600):
        await box.until(lambda at=at: f"line {at}\n" in box.said(id))
        cut += harness.machine.cut()
    await box.over(id)
    assert cut >= 2 and box.damage == []
    assert box.said(id) == "".join(f"line {i}\n" for i in range(1500))
    await box.end()


async def test_a_login_that_prints_does_no_harm(harness: SshHarness) -> None:
    noise = harness.machine.home / ".bashrc"
    noise.write_text("echo welcome to the lab; echo; echo '{\"ok\": true}'; echo warning >&2\n")
    try:
        box = Box(harness, await started(harness), harness.place("own", ""), [])
        await box.ready()
        assert await box.value("6 * 7") == 42 and box.damage == []
        (harness.folder / "x").write_text("content")
        await box.sandbox.put(harness.folder / "x", "x")
        await box.sandbox.get("x", harness.folder / "y")
        assert (harness.folder / "y").read_text() == "content"
        await box.end()
    finally:
        noise.unlink()


async def test_a_machine_that_is_away_may_come_back(
    harness: SshHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seer_mcp.backends.ssh.END_SECONDS", 0.5)
    box = Box(harness, await started(harness), harness.place("own", ""), [])
    await box.ready()
    (id,) = await box.submit(
        "import time\nprint('before', flush=True)\ntime.sleep(3)\nprint('after')"
    )
    await box.until(lambda: "before" in box.said(id))
    harness.machine.stop()
    try:
        await refused(harness.backend.find(box.record), SandboxUnreachable, "connection refused")
        await refused(box.sandbox.put(Path(__file__), "x"), SandboxUnreachable)
        await refused(
            harness.backend.left_behind(box.record, harness.folder / "j"), SandboxUnreachable
        )
        await refused(harness.backend.clear("own"), SandboxUnreachable)
        await refused(harness.backend.sweep(""), SandboxUnreachable)
        await refused(
            box.sandbox.terminate(), EndUnconfirmed, "process", "on lab", "connection refused"
        )
        assert box.gone is None
    finally:
        harness.machine.start()
    assert (await box.over(id)).text() == "before\nafter\n"
    await box.end()
    assert await harness.left("own") == []


@pytest.mark.parametrize("how", ["cut", "cancelled"])
async def test_a_start_that_is_cut_off_leaves_nothing(harness: SshHarness, how: str) -> None:
    for number, wait in enumerate((0.0, 0.2, 0.4)):
        handle, sent = f"cut-{number}", asyncio.Event()

        def report(text: str, sent: asyncio.Event = sent) -> None:
            if text.startswith("starting"):
                sent.set()

        place = harness.place(handle, "")
        start = asyncio.create_task(harness.backend.start(harness.spec(), place, report))
        await sent.wait()
        await asyncio.sleep(wait)
        _ = harness.machine.cut() if how == "cut" else start.cancel()
        try:
            await (await start).terminate()  # it was there in time
        except (SandboxStartFailed, asyncio.CancelledError):
            pass
        await asyncio.sleep(0.5)  # for what would begin late
        assert await harness.left(handle) == []


async def test_what_was_ended_before_it_began_never_begins(harness: SshHarness) -> None:
    await (await started(harness, "first")).terminate()
    note = harness.config.state_dir / "sandboxes" / "first" / "ssh.json"
    late = harness.config.state_dir / "sandboxes" / "late"
    late.mkdir()
    (late / "ssh.json").write_bytes(note.read_bytes())
    await harness.backend.clear("late")
    await refused(started(harness, "late"), SandboxStartFailed, "ended before it began")


async def test_another_server_clears_what_a_killed_one_had_begun(harness: SshHarness) -> None:
    sandbox = await started(harness)
    await SshBackend(harness.config).clear("own")
    assert await harness.left("own") == [] and await harness.backend.find(sandbox.record()) is None


async def test_a_name_that_leads_to_another_machine_is_said(harness: SshHarness) -> None:
    sandbox = await started(harness)
    other = {**sandbox.record(), "machine": "gpu-7", "boot": "another"}
    await refused(harness.backend.find(other), SandboxUnreachable, "gpu-7", "~/.ssh/config")
    await sandbox.terminate()


# -- what is where --------------------------------------------------------------------------------


async def test_what_is_there_already_is_not_brought_again(harness: SshHarness) -> None:
    reports: list[list[str]] = []
    for change in ("", "", "ANSWER = 43\n"):
        if change:
            harness._pack.write_text(change)
        reports.append([])
        place = harness.place(f"n{len(reports)}", "")
        sandbox = await harness.backend.start(harness.spec(), place, reports[-1].append)
        await sandbox.terminate()
    assert [len(said) for said in reports] == [3, 2, 3]
    assert "bringing 1 files" in reports[2][1]


async def test_no_file_and_no_command_line_there_holds_a_secret(harness: SshHarness) -> None:
    seen: set[str] = set()

    async def watch() -> None:
        while True:
            for process in psutil.process_iter(["cmdline"]):
                seen.add(" ".join(process.info["cmdline"] or []))
            await asyncio.sleep(0.01)

    watching = asyncio.create_task(watch())
    place = replace(harness.place("own", ""), secrets={"TOKEN": HIDDEN})
    spec = harness.spec(secrets=("TOKEN",), env={"PLAIN": "plain-value"})
    sandbox = await harness.backend.start(spec, place, lambda _: None)
    box = await Box(harness, sandbox, place, []).ready()
    watching.cancel()
    environ = await box.value("dict(__import__('os').environ)")
    assert (environ["TOKEN"], environ["PLAIN"]) == (HIDDEN, "plain-value")
    assert not [name for name in environ if name.startswith("SSH_")]
    assert any("exec(zlib" in line for line in seen) and HIDDEN not in " ".join(seen)
    await box.run("open('result.txt', 'w').write('kept')")
    await box.end()
    files = [p for f in (harness.machine.home, harness.folder) for p in f.rglob("*") if p.is_file()]
    holders = [p.name for p in files if HIDDEN.encode() in p.read_bytes()]
    assert len(files) > 20 and set(holders) <= {"journal.jsonl"}
    ours = harness.machine.home / ".seer-mcp" / harness.backend._instance
    assert [
        p for p in (ours, *ours.rglob("*")) if p.lstat().st_mode & 0o077 and not p.is_symlink()
    ] == []
    result = harness.machine.home / "seer-mcp" / "own" / "result.txt"
    assert result.read_text() == "kept"  # the work outlives the sandbox


GPUS = """#!/bin/sh
echo "0, NVIDIA A100-SXM4-80GB, 70000, 81920"
echo "1, NVIDIA A100-SXM4-80GB, 5, 81920"
echo "2, NVIDIA H100 80GB HBM3, 0, 81559"
echo "3, NVIDIA A100-SXM4-80GB, 0, 81920"
"""


async def test_the_gpus_with_most_room_are_taken(harness: SshHarness) -> None:
    program = harness.machine.programs / "nvidia-smi"
    program.write_text(GPUS)
    program.chmod(0o755)
    try:
        sandbox = await started(harness, gpu="A100-80GB", gpu_count=2)
        told = json.loads(Path(sandbox.record()["folder"], "host.json").read_text())
        assert told["env"]["CUDA_VISIBLE_DEVICES"] == "1,3"
        await sandbox.terminate()
        text = await refused(started(harness, gpu="H100", gpu_count=2), BadInput, "gpu = 'H100:2'")
        assert "NVIDIA H100 80GB HBM3" in text
        await refused(started(harness, gpu="B200"), BadInput, "gpu")
    finally:
        program.unlink()


@pytest.mark.slow
async def test_a_long_runtime_folder_does_without_a_shared_connection(harness: SshHarness) -> None:
    long = harness.folder / ("long" * 30)
    backend = SshBackend(replace(harness.config, runtime_dir=long))
    sandbox = await backend.start(harness.spec(), harness.place("own", ""), lambda _: None)
    assert list(long.glob("ssh-*")) == []
    await sandbox.terminate()


@pytest.mark.slow
async def test_old_remains_are_removed_by_a_later_start(harness: SshHarness) -> None:
    await (await started(harness, "old")).terminate()
    boxes = harness.machine.home / ".seer-mcp" / harness.backend._instance / "box"
    code = boxes.parent / "code"
    (code / "unused").mkdir()
    for path in (boxes / "old", boxes / "old" / "journal.jsonl", code / "unused"):
        os.utime(path, (1, 1))
    sockets = Path(runtime_of(harness.backend._instance, "old"))
    sockets.mkdir()
    await (await started(harness, "new")).terminate()
    assert not sockets.exists()
    assert [path.name for path in boxes.iterdir()] == ["new"]
    assert not (code / "unused").exists() and len(list(code.iterdir())) == 2


async def test_a_line_that_is_closed_leaves_no_process(harness: SshHarness) -> None:
    sandbox = await started(harness)
    before = clients()
    for _ in range(3):
        reader, writer = await sandbox.dial()
        writer.write(b'{"id": 1, "op": "ping"}\n')
        assert json.loads(await reader.readline())["ok"]
        writer.close()
    await until(lambda: clients() == before, 10)
    await sandbox.terminate()


def clients() -> int:
    """Children of this process that run; ssh clients, here."""
    found = 0
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += process.status() != psutil.STATUS_ZOMBIE
    return found


# Half of it is said while a server is killed, and half when the next one follows.
TWO_HALVES = """
import os, time
for i in range(2000):
    print('line', i, flush=True)
    while i == 1000 and not os.path.exists('go'): time.sleep(0.01)
"""

# -- the next server ------------------------------------------------------------------------------

SERVER = """
import asyncio, json, sys
from pathlib import Path
from seer_mcp.environment import SandboxSpec
from seer_mcp.packs import Packs
from seer_mcp.sessions import Register
from tests.support import config_for

async def main():
    config = config_for(Path(sys.argv[1]), runtime_dir=Path(sys.argv[2]), ssh=tuple(json.loads(sys.argv[3])))
    register = Register(config, Packs([]))
    await register.open()
    spec = SandboxSpec(backend="ssh", host="lab", python=sys.executable)
    session = await register.start("me", "lost", spec, "", False, lambda _: None)
    cell = session.notebook.insert("code", sys.argv[4])
    (run,) = await session.run_cells([cell])
    while not session.last_line(run):
        await asyncio.sleep(0.01)
    print(session.handle, cell.id, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""


async def test_the_next_server_follows_a_cell_of_a_killed_one_and_loses_nothing(
    harness: SshHarness,
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-c", SERVER, str(harness.folder), str(harness.sockets)),
        *(json.dumps(harness.machine.ssh), TWO_HALVES),
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parent.parent.parent,
    )
    assert process.stdout is not None
    async with asyncio.timeout(40):
        handle, cell = (await process.stdout.readline()).decode().split()
    process.kill()
    await process.wait()
    register = Register(harness.config, Packs([]))
    await register.open()
    try:
        session = await register.get(handle, "me")
        run = session.run_of(session.notebook.cell(cell))
        assert not run.over.is_set()
        (harness.machine.home / "seer-mcp" / handle / "go").touch()
        async with asyncio.timeout(40):
            await run.over.wait()
        assert run.state == "complete" and session.damage == ""
        text = "".join(
            piece.file.read_text() if piece.file else piece.text
            for piece in session.notebook.cell(cell).outputs.pieces()
        )
        assert text == "".join(f"line {i}\n" for i in range(2000))
    finally:
        await register.close()
    assert await harness.left(handle) == []


async def test_one_word_makes_a_sandbox_on_a_machine_of_ones_own(
    machine: sshd.Machine, tmp_path: Path
) -> None:
    sockets = Path(tempfile.mkdtemp(prefix="seer-t-"))
    asked: dict[str, Any] = {"backend": "ssh", "host": "lab", "python": sys.executable}
    try:
        async with open_lab(tmp_path, runtime_dir=sockets, ssh=machine.ssh) as lab:
            assert "Nothing is billed" in await lab.ok("start_sandbox", **asked, estimate=True)
            handle = await lab.start(**asked)
            where = text_of(await lab.cell(handle, "import os; print(os.getcwd())"))
            assert f"{machine.home}/seer-mcp/{handle}" in where
            assert f"{handle}: ssh, up" in await lab.ok("list_sandboxes")
            path = await lab.notebook_path(handle)
            assert "nothing of it runs" in await lab.ok("stop_sandbox", sandbox=handle)
            assert "host = ''" in await lab.no("start_sandbox", backend="ssh")
            models = tmp_path / "project" / "asks"
            models.mkdir()
            (models / "investigation.toml").write_text(
                '[sandbox]\nbackend = "ssh"\nhost = "lab"\n[[models]]\nname = "lab/model"\n'
            )
            assert "models = " in await lab.no("start_sandbox", investigation="asks")
    finally:
        machine.end_shared(sockets)
        shutil.rmtree(sockets, ignore_errors=True)
    assert str(machine.home) in streams(read_cells(path)[0])
