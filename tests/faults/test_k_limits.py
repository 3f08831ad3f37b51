"""FAULTS.md, K03 and K10: a cell takes all memory, or starts processes without end.

Each means of limiting that this machine permits is tried: a control group, limits that processes
inherit (a server of another user), and the watch of the kernel host.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult

from seer_mcp.backends.local import LocalBackend
from seer_mcp.kernel_host import limits
from seer_mcp.server import build_server

from ..support import Lab, processes_of, read_cells, stdio_parameters, streams, text_of, until
from .ground import Ground

pytestmark = pytest.mark.anyio

NOBODY = 65534
MEMORY = 300  # MiB
ENDS = ("cgroup v2", "cgroup v1", "watch")  # what ends the kernel; an rlimit refuses the memory
EAT = "print('before', flush=True)\nx = b'x' * 1_000_000_000\nprint(len(x))"
BESIDE = "import time\nfor i in range(30):\n    print('beside', i, flush=True)\n    time.sleep(0.1)"
# At most 700 processes, each of which only sleeps.
BOMB = """
import os, signal, time
signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # who has ended does not count any more
pids, why = [], ''
for _ in range(700):
    try:
        pid = os.fork()
    except OSError as error:
        why = type(error).__name__
        break
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        time.sleep(600)
        os._exit(0)
    pids.append(pid)
print(len(pids), why, flush=True)
time.sleep(600)
"""


def run_of(result: CallToolResult) -> dict[str, Any]:
    assert result.meta is not None
    return result.meta["seer/run"]


def permitted(means: str) -> None:
    """Skip where this machine does not let this user limit by these means."""
    name = f"seer-mcp-trial-{os.getpid()}"
    try:
        plan = limits.prepare(name, MEMORY, 512, [means])
    except ValueError:
        pytest.skip(f"this machine does not permit limits by {means}")
    limits.remove(plan["groups"])


@pytest.fixture(params=ENDS)
def means(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    permitted(request.param)
    monkeypatch.setattr("seer_mcp.backends.local.MEANS", (request.param,))
    return request.param


@asynccontextmanager
async def server(place: Ground) -> AsyncIterator[Lab]:
    async with Client(build_server(place.config())) as client:
        yield Lab(client, place.folder)


async def usable(lab: Lab, handle: str) -> None:
    result = await lab.cell(handle, "6 * 7")
    assert text_of(result).splitlines()[1] == "42", text_of(result)


async def until_said(lab: Lab, handle: str, run: dict[str, Any], words: str) -> str:
    """What a run printed, once it has printed these words."""
    end = time.monotonic() + 30
    while words not in (
        text := await lab.ok("read_outputs", sandbox=handle, run=run["id"], wait=0)
    ):
        assert time.monotonic() < end, text
        await asyncio.sleep(0.1)
    return text


def group_of(process: psutil.Process) -> str:
    return Path(f"/proc/{process.pid}/cgroup").read_text()


# -- K03: memory ----------------------------------------------------------------------------------


async def test_k03_a_cell_that_takes_all_memory_ends_its_own_kernel_alone(
    place: Ground, means: str
) -> None:
    async with server(place) as lab:
        limited = await lab.start(name="limited", memory_gb=MEMORY / 1024)
        other = await lab.start(name="other")
        beside = run_of(await lab.cell(other, BESIDE, wait=0))
        us = psutil.Process()
        before = us.create_time()
        result = await lab.cell(limited, EAT)
        text = text_of(result)
        assert result.is_error and run_of(result)["state"] == "kernel_died"
        assert "out of memory" in text and f"{MEMORY} MiB" in text and "restart_kernel" in text
        if means != "watch":
            assert "signal 9" in text
        assert "before" in text.splitlines()
        shown = await lab.ok("list_sandboxes")
        assert f"memory limit {MEMORY} MiB ({means})" in shown and "kernel dead" in shown
        # The other sandbox and the server never noticed.
        await until_said(lab, other, beside, "beside 29")
        ended = await lab.call("read_outputs", sandbox=other, run=beside["id"], wait=10)
        assert run_of(ended)["state"] == "complete"
        path = await lab.notebook_path(other)
        assert streams(read_cells(path)[0]).splitlines() == [f"beside {i}" for i in range(30)]
        assert us.create_time() == before and us.is_running()
        # A new kernel has the same limit.
        await lab.ok("restart_kernel", sandbox=limited)
        await usable(lab, limited)
        again = await lab.cell(limited, EAT)
        assert run_of(again)["state"] == "kernel_died" and "out of memory" in text_of(again)
        await lab.ok("stop_sandbox", sandbox=limited)
        assert processes_of(limited) == []
    assert groups_left(place) == []


def groups_left(place: Ground) -> list[str]:
    """Control groups of sandboxes that were started from here."""
    prefix = LocalBackend(place.config())._group("")
    roots = {
        mount for controllers, mount, _ in limits._mounts() if controllers & {"", "memory", "pids"}
    }
    return [
        os.path.join(folder, name)
        for root in roots
        for folder, folders, _ in os.walk(root)
        for name in folders
        if name.startswith(prefix)
    ]


async def test_k03_a_command_that_takes_all_memory_leaves_the_kernel(
    place: Ground, means: str
) -> None:
    async with server(place) as lab:
        handle = await lab.start(memory_gb=MEMORY / 1024)
        await lab.cell(handle, "kept = 7")
        result = await lab.call(
            "run_command",
            sandbox=handle,
            command="python -c \"x = b'x' * 1_000_000_000; import time; time.sleep(5)\"",
        )
        assert run_of(result)["state"] == "error", text_of(result)
        assert text_of(await lab.cell(handle, "kept")).splitlines()[1] == "7"


async def test_k03_the_host_stays_outside_and_kernels_inside(
    place: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    permitted("cgroup v1")
    monkeypatch.setattr("seer_mcp.backends.local.MEANS", ("cgroup v1",))
    async with server(place) as lab:
        handle = await lab.start(memory_gb=1)
        for _ in range(2):  # the second time after a restart
            (host,) = [p for p in processes_of(handle) if "kernel_host" in p.cmdline()]
            inside = [p for p in processes_of(handle) if p != host]
            assert inside and all(handle in group_of(p) for p in inside)
            assert handle not in group_of(host)
            await lab.ok("restart_kernel", sandbox=handle)
        assert len(groups_left(place)) == 2  # memory and pids
        await lab.ok("stop_sandbox", sandbox=handle)
        assert groups_left(place) == []


async def test_k03_groups_of_a_killed_host_are_removed(
    place: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the server that watches, and by the next one that finds the sandbox gone."""
    permitted("cgroup v1")
    monkeypatch.setattr("seer_mcp.backends.local.MEANS", ("cgroup v1",))
    config = place.config(on_exit="keep")
    async with Client(build_server(config)) as client:
        lab = Lab(client, place.folder)
        watched, found = await lab.start(name="watched"), await lab.start(name="found")
        # Without an environment only the group tells whose it is.
        daemon = "nohup setsid env -i sleep 310 >/dev/null 2>&1 &"
        await lab.ok("run_command", sandbox=found, command=daemon)
        kill_host(watched)
        await until(lambda: not [g for g in groups_left(place) if watched in g])
        assert len(groups_left(place)) == 1
    kill_host(found)
    (group,) = groups_left(place)
    await until(lambda: len(limits.members([group])) == 1)
    async with Client(build_server(config)) as client:
        await Lab(client, place.folder).ok("list_sandboxes")
        assert groups_left(place) == [] and place.processes() == []
        assert not any((place.sockets / name).exists() for name in os.listdir(place.sockets))


def kill_host(handle: str) -> None:
    (host,) = [p for p in processes_of(handle) if "kernel_host" in p.cmdline()]
    host.kill()


async def test_k03_too_little_memory_is_refused(place: Ground) -> None:
    async with server(place) as lab:
        assert "0.25" in await lab.no("start_sandbox", memory_gb=0.01)


# -- K10: processes -------------------------------------------------------------------------------


async def test_k10_a_fork_bomb_stops_at_the_cap(
    place: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the default of 512, where a control group can be made."""
    try:
        limits.remove(limits.prepare("seer-mcp-trial", None, 512, limits.MEANS[:2])["groups"])
    except ValueError:
        pytest.skip("this machine does not permit control groups")
    monkeypatch.setattr("seer_mcp.backends.local.MEANS", limits.MEANS[:2])
    monkeypatch.setattr("seer_mcp.backends.local.PROCESSES", 512)
    async with server(place) as lab:
        handle, other = await lab.start(name="bomb"), await lab.start(name="other")
        bomb = run_of(await lab.cell(handle, BOMB, wait=0))
        slowest = 0.0
        while "BlockingIOError" not in (
            text := await lab.ok("read_outputs", sandbox=handle, run=bomb["id"], wait=0)
        ):
            began = time.monotonic()
            assert handle in await lab.ok("list_sandboxes")
            slowest = max(slowest, time.monotonic() - began)
        count = int(
            next(line for line in text.splitlines() if "BlockingIOError" in line).split()[0]
        )
        assert 400 < count < 512
        assert slowest < 2.0  # the row says 0.5 s, on a machine that does nothing else
        await usable(lab, other)
        # At the cap: the cell can be interrupted, and its kernel goes on.
        await lab.ok("interrupt", sandbox=handle)
        await usable(lab, handle)
        # At the cap again: a restart ends what it started, and gets a whole kernel.
        bomb = run_of(await lab.cell(handle, BOMB, wait=0))
        await until_said(lab, handle, bomb, "BlockingIOError")
        await lab.ok("restart_kernel", sandbox=handle)
        await usable(lab, handle)
        assert len(processes_of(handle)) < 10
        bomb = run_of(await lab.cell(handle, BOMB, wait=0))
        await until_said(lab, handle, bomb, "BlockingIOError")
        await lab.ok("stop_sandbox", sandbox=handle)
        assert processes_of(handle) == []
    assert place.processes() == [] and groups_left(place) == []


async def test_k10_a_command_that_forks_stops_at_the_cap(
    place: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    permitted("cgroup v1")
    monkeypatch.setattr("seer_mcp.backends.local.MEANS", ("cgroup v1",))
    monkeypatch.setattr("seer_mcp.backends.local.PROCESSES", 64)
    async with server(place) as lab:
        handle = await lab.start()
        command = (
            "i=0; while [ $i -lt 100 ]; do sleep 311 >/dev/null 2>&1 & i=$((i+1)); done; echo all"
        )
        text = text_of(await lab.call("run_command", sandbox=handle, command=command))
        assert "annot fork" in text and "all" not in text.splitlines()
        assert 20 < len(processes_of(handle)) <= 65
        await lab.ok("stop_sandbox", sandbox=handle)
        assert processes_of(handle) == []


async def test_k10_without_any_limit_the_host_ends_what_became_too_many(
    place: Ground, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seer_mcp.backends.local.MEANS", ("watch",))
    monkeypatch.setattr("seer_mcp.backends.local.PROCESSES", 64)
    async with server(place) as lab:
        handle = await lab.start()
        result = await lab.cell(handle, BOMB)
        text = text_of(result)
        assert run_of(result)["state"] == "kernel_died"
        assert "ended by the kernel host" in text and "more than the 64 processes" in text
        await until(lambda: len(processes_of(handle)) == 1)  # the host
        await lab.ok("restart_kernel", sandbox=handle)
        await usable(lab, handle)
        await lab.ok("stop_sandbox", sandbox=handle)
        assert processes_of(handle) == []


# -- limits that processes inherit: a server of a user who is not root ----------------------------


@pytest.fixture
def commoner() -> Iterator[Ground]:
    """A ground for a user who is not root."""
    folder = Path(tempfile.mkdtemp(prefix="seer-u-"))
    folder.chmod(0o755)
    for name in ("project", "sockets", "home"):
        (folder / name).mkdir()
        if os.getuid() == 0:
            os.chown(folder / name, NOBODY, NOBODY)
    if os.getuid() == 0:
        os.chown(folder, NOBODY, NOBODY)
    made = Ground(folder, folder / "sockets")
    try:
        yield made
    finally:
        made.kill_all()
        shutil.rmtree(folder)


def commoners_python(place: Ground) -> list[str]:
    """A command that is an interpreter with everything that we have, for a user who is not root."""
    if os.getuid() != 0:
        return [sys.executable]
    if shutil.which("setpriv") is None:
        pytest.skip("no setpriv to become another user with")
    # Through a shell: what setpriv itself starts, it still finds as root.
    become = ["setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups"]
    become += ["sh", "-c", 'exec "$@"', "sh"]
    name = "python{}.{}".format(*sys.version_info)
    for base in (sys._base_executable, f"/usr/bin/{name}", f"/usr/local/bin/{name}"):  # type: ignore[attr-defined]
        ours = place.folder / "venv"
        shutil.rmtree(ours, ignore_errors=True)
        made = subprocess.run([base, "-m", "venv", "--without-pip", ours], capture_output=True)
        if made.returncode != 0:
            continue
        shared = [str(Path(psutil.__file__).parent.parent), str(Path(__file__).parents[2])]
        (ours / "lib" / name / "site-packages" / "shared.pth").write_text("\n".join(shared))
        python = [*become, str(ours / "bin" / "python")]
        if subprocess.run([*python, "-c", "import seer_mcp, ipykernel"]).returncode == 0:
            return python
    pytest.skip("another user may not read any interpreter that has what we need")


def commoners_server(place: Ground) -> StdioServerParameters:
    ours = stdio_parameters(
        place.folder,
        "--on-exit",
        "stop",
        env={"XDG_RUNTIME_DIR": str(place.sockets), "HOME": str(place.folder / "home")},
    )
    command = [*commoners_python(place), *ours.args]
    return StdioServerParameters(command=command[0], args=command[1:], env=ours.env, cwd=ours.cwd)


@pytest.mark.slow
async def test_k03_k10_a_user_who_is_not_root_is_limited_too(commoner: Ground) -> None:
    async with Client(commoners_server(commoner)) as client:
        lab = Lab(client, commoner.folder)
        limited = await lab.start(name="limited", memory_gb=MEMORY / 1024)
        other = await lab.start(name="other")
        shown = await lab.ok("list_sandboxes")
        if f"memory limit {MEMORY} MiB (cgroup" in shown:
            pytest.skip("this user may make control groups, which are tried above")
        assert f"memory limit {MEMORY} MiB (rlimit)" in shown
        eaten = await lab.cell(limited, EAT)
        assert run_of(eaten)["state"] == "error" and "MemoryError" in text_of(eaten)
        await usable(lab, limited)
        bomb = run_of(await lab.cell(limited, BOMB, wait=0))
        text = await until_said(lab, limited, bomb, "BlockingIOError")
        line = next(line for line in text.splitlines() if "BlockingIOError" in line)
        assert 300 < int(line.split()[0]) <= max(512, 16 * (os.cpu_count() or 1))
        # The host and the server, of the same user, are not bound by it.
        await usable(lab, other)
        await lab.ok("restart_kernel", sandbox=limited)
        await usable(lab, limited)
        for handle in (limited, other):
            await lab.ok("stop_sandbox", sandbox=handle)
            assert processes_of(handle) == []


# -- how a group is chosen where this machine cannot make one -------------------------------------


def tree(folder: Path, **files: str) -> Path:
    """A folder that looks like a group of version 2."""
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("enabled", "limit", "expected"),
    [
        ("cpu memory pids", "max", "around"),  # what a desktop session of systemd is like
        ("cpu", "max", None),  # nobody made them available
        ("memory pids", "1000000000", None),  # to go beside it would escape its own limit
    ],
)
def test_k03_version_2_goes_beside_our_own_group_or_nowhere(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    enabled: str,
    limit: str,
    expected: str | None,
) -> None:
    around = tree(tmp_path / "around", cgroup_subtree_control=enabled, cgroup_controllers=enabled)
    own = tree(
        around / "own",
        cgroup_subtree_control="",
        cgroup_controllers="",
        memory_max=limit,
    )
    monkeypatch.setattr(limits, "_own_group", lambda controller: str(own))
    found = limits._parents_v2(MEMORY)
    assert found == ([str(tmp_path / expected)] if expected else [])
