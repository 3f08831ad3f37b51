"""FAULTS.md, K: what kernels do to the cells that run in them."""

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from mcp.types import CallToolResult

from seer_mcp.sessions import session as sessions
from tests.support import (
    Lab,
    config_for,
    open_lab,
    processes_of,
    read_cells,
    streams,
    text_of,
    until,
)

from .ground import Ground

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Lab, str]]:
    """One sandbox for all tests of this module that leave it whole."""
    async with open_lab(tmp_path_factory.mktemp("k")) as lab:
        yield lab, await lab.start(name="shared")


@pytest.fixture
async def box(shared: tuple[Lab, str]) -> tuple[Lab, str]:
    """The shared sandbox with a kernel that is alive and has nothing to do."""
    lab, handle = shared
    if "kernel ready" not in await lab.ok("list_sandboxes"):
        await lab.ok("restart_kernel", sandbox=handle)
    return lab, handle


def run_of(result: CallToolResult) -> dict[str, Any]:
    assert result.meta is not None
    return result.meta["seer/run"]


async def saved(lab: Lab, handle: str, cell: str) -> dict[str, Any]:
    """A cell as it stands in the notebook's file."""
    path = await lab.notebook_path(handle)
    return next(c for c in read_cells(path) if c["id"] == cell)


def state_of(cell: dict[str, Any]) -> str:
    return cell["metadata"]["seer"]["state"]


async def kernel_pid(lab: Lab, handle: str) -> int:
    result = await lab.cell(handle, "import os; os.getpid()")
    return int(text_of(result).splitlines()[1])


async def works(lab: Lab, handle: str) -> None:
    """A cell runs as if nothing had been."""
    result = await lab.cell(handle, "6 * 7")
    assert not result.is_error
    assert text_of(result).splitlines()[1] == "42"


async def died(lab: Lab, handle: str, result: CallToolResult, how: str) -> None:
    """The rule of K01: said as an error with its cause, output kept, no silent new kernel."""
    text = text_of(result)
    assert result.is_error
    assert run_of(result)["state"] == "kernel_died"
    assert how in text and "kernel died" in text and "variables are gone" in text
    assert "restart_kernel" in text
    assert "before" in text.splitlines()
    cell = await saved(lab, handle, run_of(result)["cell"])
    assert state_of(cell) == "kernel_died"
    assert streams(cell) == "before\n"
    count = len(read_cells(await lab.notebook_path(handle)))
    for _ in range(2):
        again = await lab.no("run_cell", sandbox=handle, cells=run_of(result)["cell"])
        assert "kernel died" in again and how in again and "restart_kernel" in again
    refused = await lab.no("create_cell", sandbox=handle, source="1 + 1")
    assert "kernel died" in refused and "restart_kernel" in refused
    assert len(read_cells(await lab.notebook_path(handle))) == count
    assert f"kernel dead ({how}" in await lab.ok("list_sandboxes")
    await lab.ok("restart_kernel", sandbox=handle)
    await works(lab, handle)


# -- K01, K02: it dies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("os._exit(7)", "exit code 7"),
        ("os._exit(0)", "exit code 0"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "signal 9, SIGKILL; most likely out of memory"),
        ("ctypes.string_at(0)", "signal 11, SIGSEGV"),
        ("os.abort()", "signal 6, SIGABRT"),
        ("os.killpg(0, signal.SIGKILL)", "signal 9, SIGKILL"),
    ],
)
async def test_k01_a_kernel_that_dies_in_a_cell(box: tuple[Lab, str], death: str, how: str) -> None:
    lab, handle = box
    began = time.monotonic()
    result = await lab.cell(handle, f"import ctypes, os, signal\nprint('before')\n{death}")
    assert time.monotonic() - began < 9
    await died(lab, handle, result, how)


async def test_k01_everything_printed_before_a_death_is_kept(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = "import os, sys\nfor i in range(3000): print('line', i)\nprint('last', file=sys.stderr)\nos._exit(1)"
    result = await lab.cell(handle, source)
    cell = await saved(lab, handle, run_of(result)["cell"])
    assert streams(cell).splitlines() == [f"line {i}" for i in range(3000)]
    assert streams(cell, "stderr") == "last\n"


async def test_k02_a_kernel_killed_from_outside(box: tuple[Lab, str]) -> None:
    lab, handle = box
    pid = await kernel_pid(lab, handle)
    call = asyncio.create_task(
        lab.cell(handle, "import time\nprint('before', flush=True)\ntime.sleep(60)")
    )
    await until(lambda: text_now(lab, handle) == "before\n")
    os.kill(pid, signal.SIGKILL)
    await died(
        lab, handle, await asyncio.wait_for(call, 9), "signal 9, SIGKILL; most likely out of memory"
    )


def text_now(lab: Lab, handle: str) -> str:
    """The standard output of the last cell as it is in the notebook's file now."""
    name = handle.rpartition("-")[0]
    cells = read_cells(lab.folder / "project" / "outputs" / name / f"{name}.ipynb")
    return streams(cells[-1]) if cells else ""


async def test_k02_a_kernel_killed_while_idle_is_said_before_the_next_cell(
    box: tuple[Lab, str],
) -> None:
    lab, handle = box
    os.kill(await kernel_pid(lab, handle), signal.SIGKILL)
    end = time.monotonic() + 3
    while "kernel dead (signal 9" not in await lab.ok("list_sandboxes"):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    for _ in range(2):
        assert "kernel died (signal 9" in await lab.no("create_cell", sandbox=handle, source="1")
    await lab.ok("restart_kernel", sandbox=handle)
    await works(lab, handle)


async def test_k01_quit_ends_the_kernel_and_it_is_said(box: tuple[Lab, str]) -> None:
    lab, handle = box
    await lab.cell(handle, "quit()")
    end = time.monotonic() + 9
    while "kernel dead (exit code 0)" not in await lab.ok("list_sandboxes"):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)
    assert "kernel died (exit code 0)" in await lab.no("create_cell", sandbox=handle, source="1")


async def test_k01_cells_behind_the_one_that_killed_the_kernel_are_not_run(
    box: tuple[Lab, str],
) -> None:
    lab, handle = box
    ids = [
        (await lab.call("create_cell", sandbox=handle, source=source, run=False)).meta["seer/cell"]
        for source in ("'first'", "import os; os._exit(3)", "'third'")
    ]
    result = await lab.call("run_cell", sandbox=handle, cells=" ".join(ids))
    assert result.is_error
    states = [run["state"] for run in result.meta["seer/runs"]]
    assert states == ["complete", "kernel_died", "not_run"]
    assert [state_of(await saved(lab, handle, id)) for id in ids] == states


async def test_k01_a_dead_kernel_takes_its_background_processes_with_it(
    box: tuple[Lab, str],
) -> None:
    lab, handle = box
    source = (
        "import os, subprocess\n"
        "subprocess.Popen(['sleep', '301'])\n"
        "subprocess.Popen(['sleep', '301'], start_new_session=True)\n"
        "subprocess.run('setsid sleep 301 &', shell=True)\n"
        "print('before')\n"
    )
    await lab.cell(handle, source)
    assert sleepers(handle) == 3
    await lab.cell(handle, "os._exit(1)")
    await until(lambda: sleepers(handle) == 0)


def sleepers(handle: str) -> int:
    return sum("301" in process.cmdline() for process in processes_of(handle))


# -- K05, K06: it does not end --------------------------------------------------------------------


async def test_k05_an_endless_cell_is_answered_and_interrupted(box: tuple[Lab, str]) -> None:
    lab, handle = box
    await lab.cell(handle, "kept = 'still here'")
    began = time.monotonic()
    result = await lab.cell(handle, "print('begun')\nwhile True: pass", wait=2)
    assert 1.9 < time.monotonic() - began < 7.5
    assert not result.is_error
    run = run_of(result)
    assert run["state"] == "running" and run["id"]
    assert "running for" in text_of(result) and "begun" in text_of(result)
    assert "read_outputs(" in text_of(result) and "interrupt(" in text_of(result)
    began = time.monotonic()
    assert "interrupted" in await lab.ok("interrupt", sandbox=handle)
    assert time.monotonic() - began < 6
    read = await lab.call("read_outputs", sandbox=handle, run=run["id"])
    assert read.is_error and run_of(read)["state"] == "interrupted"
    assert "KeyboardInterrupt" in text_of(read) and "begun" in text_of(read)
    assert state_of(await saved(lab, handle, run["cell"])) == "interrupted"
    assert text_of(await lab.cell(handle, "kept")).splitlines()[1] == "'still here'"


async def test_k05_an_interrupt_reaches_what_the_cell_started(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(handle, "import subprocess\nsubprocess.run(['sleep', '302'])", wait=0.5)
    assert run_of(result)["state"] == "running"
    await lab.ok("interrupt", sandbox=handle)
    await until(lambda: not any("302" in p.cmdline() for p in processes_of(handle)))
    await works(lab, handle)


async def test_k05_an_interrupt_with_nothing_running(box: tuple[Lab, str]) -> None:
    lab, handle = box
    assert "nothing was running" in await lab.ok("interrupt", sandbox=handle)
    await works(lab, handle)


async def test_k05_an_interrupt_of_a_queued_run_leaves_the_running_one(
    box: tuple[Lab, str],
) -> None:
    lab, handle = box
    first = run_of(await lab.cell(handle, "import time\ntime.sleep(1.5)\n'first'", wait=0.1))
    second = run_of(await lab.cell(handle, "print('never')", wait=0))
    assert (first["state"], second["state"]) == ("running", "queued")
    assert "not_run" in await lab.ok("interrupt", sandbox=handle, run=second["id"])
    read = await lab.call("read_outputs", sandbox=handle, run=second["id"])
    assert read.is_error and run_of(read)["state"] == "not_run"
    cell = await saved(lab, handle, second["cell"])
    assert state_of(cell) == "not_run" and cell["outputs"] == []
    assert "'first'" in await lab.ok("read_outputs", sandbox=handle, run=first["id"])


async def test_k05_an_interrupt_of_everything_empties_the_queue(box: tuple[Lab, str]) -> None:
    lab, handle = box
    runs = [run_of(await lab.cell(handle, "while True: pass", wait=0.2)) for _ in range(3)]
    await lab.ok("interrupt", sandbox=handle, everything=True)
    states = [
        run_of(await lab.call("read_outputs", sandbox=handle, run=run["id"]))["state"]
        for run in runs
    ]
    assert states == ["interrupted", "not_run", "not_run"]
    await works(lab, handle)


async def test_k06_a_cell_that_ignores_the_interrupt_is_ended_by_a_restart(
    box: tuple[Lab, str],
) -> None:
    lab, handle = box
    source = (
        "import os, signal, subprocess\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "subprocess.Popen(['sleep', '301'], start_new_session=True)\n"
        "subprocess.run('setsid sleep 301 &', shell=True)\n"
        "print(os.getpid(), flush=True)\n"
        "while True: pass"
    )
    result = await lab.cell(handle, source, wait=1)
    pid = int(text_of(result).splitlines()[1])
    assert sleepers(handle) == 2
    began = time.monotonic()
    text = await lab.no("interrupt", sandbox=handle)
    assert time.monotonic() - began < 20
    assert "did not stop" in text and "restart_kernel" in text
    began = time.monotonic()
    await lab.ok("restart_kernel", sandbox=handle)
    assert time.monotonic() - began < 15
    assert not psutil.pid_exists(pid)
    assert sleepers(handle) == 0
    read = await lab.call("read_outputs", sandbox=handle, run=run_of(result)["id"])
    assert run_of(read)["state"] == "interrupted" and "restarted" in text_of(read)
    assert str(pid) in text_of(read)
    await works(lab, handle)


async def test_k06_a_stopped_kernel_is_ended_by_a_restart(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)"
    assert run_of(await lab.cell(handle, source, wait=0.3))["state"] == "running"
    await lab.ok("restart_kernel", sandbox=handle)
    await works(lab, handle)


# -- a host that does not answer ------------------------------------------------------------------


@asynccontextmanager
async def frozen_host(handle: str) -> AsyncIterator[None]:
    found = processes_of(handle)
    host = next(p for p in found if p.ppid() not in {other.pid for other in found})
    host.suspend()
    try:
        yield
    finally:
        if host.is_running():
            host.resume()


async def test_k_a_run_that_is_not_answered_runs_once(
    box: tuple[Lab, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab, handle = box
    monkeypatch.setattr(sessions, "TAKEN_SECONDS", 0.3)
    monkeypatch.setattr(sessions, "ASK_SECONDS", 0.3)
    marks = tmp_path / "marks"
    async with frozen_host(handle):
        source = f"with open({str(marks)!r}, 'a') as file: file.write('cell ')"
        cell = await lab.cell(handle, source, wait=0)
        command = await lab.call(
            "run_command", sandbox=handle, command=f"echo command >> {marks}", wait=0
        )
        for result in (cell, command):
            text = text_of(result)
            assert not result.is_error, text
            assert "queued; the sandbox does not answer now" in text
            assert "do not repeat it" in text and "read_outputs(" in text
            assert "ry again" not in text and "not run" not in text
            assert run_of(result)["state"] == "queued"
        assert run_of(cell)["cell"] in text_of(cell) and run_of(command)["id"] in text_of(command)
        assert state_of(await saved(lab, handle, run_of(cell)["cell"])) == "queued"
        await asyncio.sleep(1.6)  # sent a second time meanwhile
    for result in (cell, command):
        read = await lab.call("read_outputs", sandbox=handle, run=run_of(result)["id"])
        assert run_of(read)["state"] == "complete"
    assert state_of(await saved(lab, handle, run_of(cell)["cell"])) == "complete"
    await works(lab, handle)
    assert sorted(marks.read_text().split()) == ["cell", "command"]


async def test_k_a_run_that_was_never_answered_ends_with_its_sandbox(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "TAKEN_SECONDS", 0.3)
    async with open_lab(tmp_path) as lab:
        handle = await lab.start()
        async with frozen_host(handle):
            cell = run_of(await lab.cell(handle, "1", wait=0))
            await lab.ok("stop_sandbox", sandbox=handle)
            read = await lab.call("read_outputs", sandbox=handle, run=cell["id"])
        assert run_of(read)["state"] in ("not_run", "interrupted")
        assert state_of(await saved(lab, handle, cell["cell"])) == run_of(read)["state"]


# -- restarts -------------------------------------------------------------------------------------


async def test_a_restart_while_a_cell_runs_interrupts_it_and_drops_the_queue(
    box: tuple[Lab, str],
) -> None:
    lab, handle = box
    running = run_of(
        await lab.cell(handle, "print('begun', flush=True)\nwhile True: pass", wait=0.5)
    )
    queued = run_of(await lab.cell(handle, "1", wait=0))
    await lab.cell(handle, "gone = 1", run=False)
    await lab.ok("restart_kernel", sandbox=handle)
    read = await lab.call("read_outputs", sandbox=handle, run=running["id"])
    assert read.is_error and "begun" in text_of(read)
    assert state_of(await saved(lab, handle, running["cell"])) == "interrupted"
    assert state_of(await saved(lab, handle, queued["cell"])) == "not_run"
    assert "NameError" in await lab.no("create_cell", sandbox=handle, source="gone")


async def test_restarts_in_a_row_and_at_once(box: tuple[Lab, str]) -> None:
    lab, handle = box
    await lab.cell(handle, "gone = 1")
    await lab.ok("restart_kernel", sandbox=handle)
    await lab.ok("restart_kernel", sandbox=handle)
    both = await asyncio.gather(*(lab.call("restart_kernel", sandbox=handle) for _ in range(2)))
    assert sorted(result.is_error for result in both) == [False, True]
    assert "starting already" in "".join(text_of(result) for result in both)
    assert "NameError" in await lab.no("create_cell", sandbox=handle, source="gone")
    kernels = [p for p in processes_of(handle) if any("launch.py" in part for part in p.cmdline())]
    assert len(kernels) == 1


async def test_a_cell_sent_during_a_restart_runs_in_the_new_kernel(box: tuple[Lab, str]) -> None:
    lab, handle = box
    old = await kernel_pid(lab, handle)
    restart = asyncio.create_task(lab.ok("restart_kernel", sandbox=handle))
    await asyncio.sleep(0.1)
    assert await kernel_pid(lab, handle) != old
    await restart


# -- K08: it asks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("question", ["input('name?')", "import getpass; getpass.getpass()"])
async def test_k08_a_question_is_an_error_at_once(box: tuple[Lab, str], question: str) -> None:
    lab, handle = box
    began = time.monotonic()
    result = await lab.cell(handle, question)
    assert time.monotonic() - began < 6
    assert result.is_error and run_of(result)["state"] == "error"
    assert "StdinNotImplementedError" in text_of(result)
    await works(lab, handle)


async def test_k08_a_debugger_does_not_wait_for_anybody(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(handle, "breakpoint()\n1", wait=6)
    assert run_of(result)["state"] != "running"
    await works(lab, handle)


# -- K13, K14: many -------------------------------------------------------------------------------

LINES = "for i in range(20): print(i)"


async def first_cells(lab: Lab, handle: str, kernels: int) -> None:
    """The first cell of each of so many fresh kernels has all its output."""
    for _ in range(kernels):
        await lab.ok("restart_kernel", sandbox=handle)
        result = await lab.cell(handle, LINES)
        assert run_of(result)["state"] == "complete"
        assert text_of(result).splitlines()[1:] == [str(i) for i in range(20)]


async def test_k13_the_first_cell_of_a_fresh_kernel(box: tuple[Lab, str]) -> None:
    await first_cells(*box, 10)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_k13_the_first_cell_of_a_hundred_fresh_kernels(box: tuple[Lab, str]) -> None:
    await first_cells(*box, 100)


async def test_k14_300_cells_back_to_back(tmp_path: Path) -> None:
    async with open_lab(tmp_path) as lab:
        handle = await lab.start()
        await lab.cell(handle, "n = 0")
        for i in range(1, 301):
            result = await lab.cell(handle, "n += 1; n")
            assert text_of(result).splitlines()[1] == str(i)
        cells = read_cells(await lab.notebook_path(handle))[1:]
        assert [state_of(cell) for cell in cells] == ["complete"] * 300
        assert [cell["outputs"][0]["data"]["text/plain"] for cell in cells] == [
            [str(i)] for i in range(1, 301)
        ]


async def test_k14_one_call_runs_100_cells(tmp_path: Path) -> None:
    async with open_lab(tmp_path) as lab:
        handle = await lab.start()
        for i in range(100):
            await lab.call("create_cell", sandbox=handle, source=f"print({i})", run=False)
        result = await lab.call("run_cell", sandbox=handle, cells="all")
        assert not result.is_error
        assert text_of(result).startswith("100 cells: 100 complete")
        cells = read_cells(await lab.notebook_path(handle))
        assert [streams(cell) for cell in cells] == [f"{i}\n" for i in range(100)]


# -- K15: it speaks late --------------------------------------------------------------------------

LATE_THREAD = """
import threading, time
def talk():
    for i in range(20):
        time.sleep(0.1)
        print("late", i)
threading.Thread(target=talk).start()
"""
LATE_TASK = """
import asyncio
async def talk():
    for i in range(20):
        await asyncio.sleep(0.05)
        print("late", i)
task = asyncio.create_task(talk())
"""


@pytest.mark.parametrize("source", [LATE_THREAD, LATE_TASK], ids=["thread", "task"])
async def test_k15_output_after_the_end_of_a_cell_stays_with_it(
    box: tuple[Lab, str], source: str
) -> None:
    lab, handle = box
    result = await lab.cell(handle, source)
    assert run_of(result)["state"] == "complete"
    cell = run_of(result)["cell"]
    # Meanwhile another cell runs and speaks for itself.
    other = await lab.cell(
        handle,
        "import time, asyncio\nfor i in range(5): print('mine', i); await asyncio.sleep(0.1)",
    )
    wanted = [f"late {i}" for i in range(20)]
    end = time.monotonic() + 9
    while not set(wanted) <= set(
        (text := await lab.ok("read_outputs", sandbox=handle, cell=cell)).splitlines()
    ):
        assert time.monotonic() < end, text
        await asyncio.sleep(0.1)
    assert "arrived late" in text
    assert text_of(other).splitlines()[1:] == [f"mine {i}" for i in range(5)]
    end = time.monotonic() + 9
    while wanted[-1] not in streams(kept := await saved(lab, handle, cell)):
        assert time.monotonic() < end
        await asyncio.sleep(0.1)
    assert streams(kept).splitlines() == wanted
    assert kept["metadata"]["seer"]["late"] >= 1
    again = await saved(lab, handle, run_of(other)["cell"])
    assert streams(again).splitlines() == [f"mine {i}" for i in range(5)]


async def test_k15_output_of_a_background_process_is_not_lost(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(
        handle, "import subprocess\np = subprocess.Popen('sleep 0.5; echo from behind', shell=True)"
    )
    end = time.monotonic() + 9
    while "from behind" not in await lab.ok(
        "read_outputs", sandbox=handle, cell=run_of(result)["cell"]
    ):
        assert time.monotonic() < end
        await asyncio.sleep(0.1)


# -- K19: it does not start -----------------------------------------------------------------------


def nothing_left(folder: Path, processes: set[int]) -> None:
    """No new process of a sandbox, no record, no socket, no notebook."""
    marked = [p for p in psutil.process_iter() if p.pid not in processes and is_ours(p, folder)]
    assert marked == []
    assert list((folder / "state" / "sandboxes").iterdir()) == []
    assert [p for p in (folder / "run").rglob("*") if p.is_socket()] == []
    assert list((folder / "run").iterdir()) == []
    assert list((folder / "project").rglob("*.ipynb")) == []


def is_ours(process: psutil.Process, folder: Path) -> bool:
    try:
        here = str(folder) in " ".join(process.cmdline())
        return here and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ipython_folder(folder: Path, startup: str) -> dict[str, str]:
    """An environment in which every kernel first runs `startup`."""
    scripts = folder / "ipython" / "profile_default" / "startup"
    scripts.mkdir(parents=True)
    (scripts / "00.py").write_text(startup)
    return {**config_for(folder).sandbox_env, "IPYTHONDIR": str(folder / "ipython")}


async def refused_start(folder: Path, **changes: Any) -> str:
    """The text of a start that fails; nothing is left of it."""
    before = set(psutil.pids())
    start = changes.pop("start", {})
    async with open_lab(folder, runtime_dir=folder / "run", **changes) as lab:
        began = time.monotonic()
        text = await lab.no("start_sandbox", **start)
        assert time.monotonic() - began < 40
        nothing_left(folder, before)
        assert "0 running" in await lab.ok("list_sandboxes")
    return text


async def test_k19_an_interpreter_without_ipykernel(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    text = await refused_start(
        tmp_path, start={"python": str(tmp_path / "bare" / "bin" / "python")}
    )
    assert "needs ipykernel" in text and "No module named" in text


async def test_k19_an_interpreter_that_is_not_there_or_not_python(tmp_path: Path) -> None:
    assert "no such program" in await refused_start(tmp_path, start={"python": "/nowhere/python"})
    text = await refused_start(tmp_path, start={"python": "/bin/false"})
    assert "ended at once" in text


async def test_k19_a_kernel_that_exits_at_once(tmp_path: Path) -> None:
    startup = (
        "import os, time\n"
        "os.write(2, b'\\n'.join(b'reason %d' % i for i in range(40)))\n"
        "time.sleep(0.3)\n"
        "os._exit(5)"
    )
    text = await refused_start(tmp_path, sandbox_env=ipython_folder(tmp_path, startup))
    assert "exit code 5" in text
    for i in range(21, 40):
        assert f"reason {i}" in text


async def test_k19_a_kernel_that_never_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("seer_mcp.backends.local.START_SECONDS", 8.0)
    startup = "import subprocess, time\nsubprocess.Popen(['sleep', '303'], start_new_session=True)\ntime.sleep(1000)"
    text = await refused_start(tmp_path, sandbox_env=ipython_folder(tmp_path, startup))
    assert "no sign of life" in text
    assert not any(p.info["cmdline"] == ["sleep", "303"] for p in psutil.process_iter(["cmdline"]))


async def test_k19_a_startup_file_that_raises_or_prints_does_not_stop_the_kernel(
    tmp_path: Path,
) -> None:
    startup = "print('hello from startup')\nimport no_such_module_anywhere"
    async with open_lab(tmp_path, sandbox_env=ipython_folder(tmp_path, startup)) as lab:
        handle = await lab.start()
        result = await lab.cell(handle, "1 + 1")
        assert text_of(result).splitlines()[1] == "2"
        await lab.ok("restart_kernel", sandbox=handle)
        await works(lab, handle)
        # What the second start said is not an output of a cell of the first.
        cells = read_cells(await lab.notebook_path(handle))
        assert [len(cell["outputs"]) for cell in cells] == [1, 1]


async def test_k19_a_kernel_that_cannot_start_again_says_so(tmp_path: Path) -> None:
    env = ipython_folder(tmp_path, "")
    async with open_lab(tmp_path, sandbox_env=env) as lab:
        handle = await lab.start()
        script = Path(env["IPYTHONDIR"]) / "profile_default" / "startup" / "00.py"
        script.write_text(
            "import os\nos.write(2, b'broken on purpose')\nimport time; time.sleep(0.3); os._exit(9)"
        )
        text = await lab.no("restart_kernel", sandbox=handle)
        assert "exit code 9" in text and "broken on purpose" in text
        assert "did not start" in await lab.no("create_cell", sandbox=handle, source="1")
        script.write_text("")
        await lab.ok("restart_kernel", sandbox=handle)
        await works(lab, handle)


async def test_k19_a_kernel_whose_files_cannot_be_made_can_start_later(place: Ground) -> None:
    async with open_lab(place.folder, runtime_dir=place.sockets) as lab:
        handle = await lab.start()
        (sockets,) = place.sockets.iterdir()
        shutil.rmtree(sockets)
        sockets.write_text("")  # where a folder has to be
        text = await lab.no("restart_kernel", sandbox=handle)
        assert "did not start" in text and "Not a directory" in text
        sockets.unlink()
        await until(lambda: (sockets / "host").exists())
        await lab.ok("restart_kernel", sandbox=handle)
        await works(lab, handle)


# -- the host -------------------------------------------------------------------------------------


async def test_a_killed_host_is_said_and_leaves_nothing(tmp_path: Path) -> None:
    async with open_lab(tmp_path) as lab:
        handle = await lab.start(name="lost")
        source = (
            "import subprocess, time\n"
            "subprocess.Popen(['sleep', '301'], start_new_session=True)\n"
            "for i in range(1000): print('line', i, flush=True); time.sleep(0.02)"
        )
        call = asyncio.create_task(lab.cell(handle, source))
        await until(lambda: "line 20\n" in text_now(lab, handle))
        (host,) = [p for p in processes_of(handle) if "kernel_host" in p.cmdline()]
        host.kill()
        result = await asyncio.wait_for(call, 30)
        assert result.is_error and run_of(result)["state"] == "sandbox_lost"
        text = text_of(result)
        assert "the sandbox was lost" in text and "start_sandbox(" in text and "line 20" in text
        await until(lambda: processes_of(handle) == [])
        path = tmp_path / "project" / "outputs" / "lost" / "lost.ipynb"
        (cell,) = read_cells(path)
        assert state_of(cell) == "sandbox_lost"
        lines = streams(cell).splitlines()
        assert len(lines) > 20 and lines == [f"line {i}" for i in range(len(lines))]
        refused = await lab.no("create_cell", sandbox=handle, source="1")
        assert "is gone" in refused and str(path) in refused
        # The notebook goes on in a new sandbox.
        await works(lab, await lab.start(notebook=str(path)))


async def test_an_idle_sandbox_ends_itself_and_its_notebook_says_so(tmp_path: Path) -> None:
    async with open_lab(tmp_path, idle_limit=2.0) as lab:
        handle = await lab.start(name="idle")
        # A cell that runs longer than the limit keeps it alive, though nobody asks for it.
        result = await lab.cell(handle, "import time\ntime.sleep(5)\nprint('done')", wait=0)
        path = tmp_path / "project" / "outputs" / "idle" / "idle.ipynb"
        await until(lambda: state_of(read_cells(path)[0]) == "complete", 15)
        assert streams(read_cells(path)[0]) == "done\n"
        await until(lambda: processes_of(handle) == [], 15)
        assert "idle for 2 s" in await lab.no("create_cell", sandbox=handle, source="1")
        assert "ended (idle for 2 s)" in await lab.ok("list_sandboxes")
        assert "done" in await lab.ok("read_outputs", sandbox=handle, cell=run_of(result)["cell"])
        assert "idle for 2 s" in await lab.ok("read_notebook", sandbox=handle)
        notebook = json.loads(path.read_text())
        assert notebook["metadata"]["seer"]["ended"] == "idle for 2 s"


async def test_k05_an_interrupt_at_the_moment_a_cell_begins_never_loses_the_queue(
    tmp_path: Path,
) -> None:
    """A kernel may drop a request that is interrupted before it began; the run ends all the same."""
    async with open_lab(tmp_path) as lab:
        handle = await lab.start()
        for _ in range(20):
            run = run_of(await lab.cell(handle, "import time; time.sleep(30)", wait=0))
            await lab.ok("interrupt", sandbox=handle, everything=True)
            ended = await lab.call("read_outputs", sandbox=handle, run=run["id"], wait=10)
            assert run_of(ended)["state"] == "interrupted"
        assert text_of(await lab.cell(handle, "6 * 7", wait=10)).endswith("42")
