"""`seer-mcp doctor`: each fault is made for real, found, and mended where that loses nothing."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import venv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from mcp import Client

from seer_mcp.backends import Place
from seer_mcp.backends.local import LocalBackend
from seer_mcp.config import Config
from seer_mcp.doctor import CHECKS, Line, Patient, examine
from seer_mcp.doctor.machine import requirements, within
from seer_mcp.environment import SandboxSpec
from seer_mcp.errors import BadInput, SandboxStartFailed
from seer_mcp.logs import held
from seer_mcp.server import build_server
from seer_mcp.sessions import Session

from .faults.ground import Ground, RawServer, ground, raw_server, raw_start, raw_text
from .support import Lab, processes_of, read_cells, streams, until
from .test_logs import fill, mode, small_disk

pytestmark = pytest.mark.anyio


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Ground]:
    with ground(tmp_path) as made:
        yield made


def runtime_of(here: Ground) -> Path:
    """Where a server process puts its sockets."""
    return here.sockets / f"seer-mcp-{os.getuid()}"


def config_of(here: Ground) -> Config:
    return replace(here.config(), runtime_dir=runtime_of(here))


async def report(here: Ground, *names: str, fix: bool = False, **options: Any) -> list[Line]:
    patient = Patient(config_of(here), {}, here.folder, **{"grace": 0.0, **options})
    return [line async for line in examine(patient, names, fix)]


async def one(here: Ground, name: str, fix: bool = False, **options: Any) -> Line:
    (line,) = await report(here, name, fix=fix, **options)
    return line


def command_line(
    here: Ground, *flags: str, prefix: str = "", env: dict[str, str] | None = None
) -> tuple[int, dict[str, Any]]:
    """Exit code and JSON of the command as a process, started as its server was."""
    state = ["--state", str(here.folder / "state"), "--outputs", str(here.project / "outputs")]
    command = [sys.executable, "-m", "seer_mcp.cli", "doctor", "--json", *state, *flags]
    done = subprocess.run(
        ["bash", "-c", f'{prefix}exec "$@"', "bash", *command] if prefix else command,
        env={**os.environ, "XDG_RUNTIME_DIR": str(here.sockets), **(env or {})},
        cwd=here.project,
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def status_of(told: dict[str, Any], check: str) -> list[str]:
    return [line["status"] for line in told["lines"] if line["check"] == check]


def kill_server(server: RawServer) -> None:
    os.killpg(server.process.pid, signal.SIGKILL)
    server.process.wait(10)


def state_of(here: Ground, sandbox: str) -> Path:
    return here.folder / "state" / "sandboxes" / sandbox


def record_of(here: Ground, sandbox: str) -> dict[str, Any]:
    return json.loads((state_of(here, sandbox) / "record.json").read_text())


# -- the whole --------------------------------------------------------------------------------


def test_a_sound_machine_passes_with_a_real_kernel(here: Ground) -> None:
    code, told = command_line(here)
    failed = [line for line in told["lines"] if line["status"] == "fail"]
    assert failed == [] and code == 0 and told["ok"] is True
    assert {line["check"] for line in told["lines"]} == set(CHECKS)
    (kernel,) = [line for line in told["lines"] if line["check"] == "kernel"]
    assert "computed 1 + 1" in kernel["says"]
    assert here.processes() == []
    assert not (here.folder / "state").exists(), "a look leaves no state behind"


def test_a_look_leaves_nothing_in_the_folder_it_is_called_from(here: Ground) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "seer_mcp.cli", "doctor"),
            *("--only", "writing", "--state", str(here.folder / "state")),
        ],
        env={**os.environ, "XDG_RUNTIME_DIR": str(here.sockets)},
        cwd=here.project,
        capture_output=True,
    )
    assert done.returncode == 0
    assert list(here.project.iterdir()) == list(here.sockets.iterdir()) == []


def test_a_check_that_does_not_exist_is_refused(here: Ground) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", "doctor", "--only", "sokets"],
        capture_output=True,
        text=True,
        cwd=here.project,
    )
    assert done.returncode == 2
    assert "sokets" in done.stderr and "sockets" in done.stderr


def test_the_docs_list_the_checks() -> None:
    page = (Path(__file__).parent.parent / "docs" / "operating.md").read_text()
    table = page.partition("<!-- checks -->")[2].partition("<!-- end of checks -->")[0]
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| `")]
    assert rows == [f"`{name}`" for name in CHECKS]


def test_people_get_one_line_each(here: Ground) -> None:
    (here.folder / "state").mkdir(mode=0o755)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "seer_mcp.cli", "doctor"),
            *("--only", "python", "--only", "modes", "--state", str(here.folder / "state")),
        ],
        capture_output=True,
        text=True,
        cwd=here.project,
    )
    assert done.returncode == 1
    first, second, mend, total = done.stdout.splitlines()
    assert first.startswith("ok    python       Python 3.")
    assert second.startswith("fail  modes") and "mode 0755" in second
    assert mend.strip() == f"-> run: chmod 700 {here.folder / 'state'}"
    assert total == "1 failed, 0 warnings; seer-mcp doctor --fix repairs some of it"


# -- what lives is left alone -----------------------------------------------------------------


def test_a_living_sandbox_survives_repairs_beside_its_server(here: Ground) -> None:
    with raw_server(here) as server:
        sandbox = raw_start(server, name="alive")
        server.call("create_cell", sandbox=sandbox, source="x = 41")
        source = "import time\nfor i in range(40): print('line', i, flush=True); time.sleep(0.1)"
        server.call("create_cell", sandbox=sandbox, source=source, wait=0)
        before = (record_of(here, sandbox), {p.pid for p in processes_of(sandbox)})
        code, told = command_line(here, "--fix")
        assert code == 0, told
        assert [line for line in told["lines"] if line["status"] == "fixed"] == []
        assert (record_of(here, sandbox), {p.pid for p in processes_of(sandbox)}) == before
        result = server.call("read_outputs", sandbox=sandbox)
        assert not result["isError"] and "line 39" in raw_text(result)
        result = server.call("create_cell", sandbox=sandbox, source="x + 1")
        assert raw_text(result).endswith("42")
        cells = read_cells(here.project / "outputs" / "alive" / "alive.ipynb")
        lines = [f"line {i}" for i in range(40)]
        assert streams(cells[1]).splitlines() == lines
        server.call("stop_sandbox", sandbox=sandbox)


def test_a_sandbox_between_two_servers_survives_repairs(here: Ground) -> None:
    with raw_server(here) as server:
        sandbox = raw_start(server, name="between")
        server.call("create_cell", sandbox=sandbox, source="x = 41")
        kill_server(server)
    code, told = command_line(here, "--fix", "--only", "records", "--only", "processes")
    assert code == 0 and "1 living sandboxes" in told["lines"][0]["says"]
    code, told = command_line(here, "--fix", "--only", "sockets")
    assert code == 0
    with raw_server(here) as server:
        assert raw_text(server.call("create_cell", sandbox=sandbox, source="x + 1")).endswith("42")
        server.call("stop_sandbox", sandbox=sandbox)


def test_repairs_find_nothing_while_a_server_starts_and_stops_sandboxes(here: Ground) -> None:
    said: list[Line] = []
    over = threading.Event()

    async def again_and_again() -> None:
        names = ("records", "processes", "sockets", "modes", "locks", "parts")
        while not over.is_set():
            lines = await report(here, *names, fix=True, grace=60.0)
            said.extend(line for line in lines if line.status != "ok")

    with raw_server(here) as server:
        doctor = threading.Thread(target=lambda: asyncio.run(again_and_again()))
        doctor.start()
        try:
            for _ in range(3):
                sandbox = raw_start(server, name="again")
                result = server.call("create_cell", sandbox=sandbox, source="40 + 2")
                assert raw_text(result).endswith("42")
                server.call("stop_sandbox", sandbox=sandbox)
        finally:
            over.set()
            doctor.join()
    assert said == []


async def test_a_record_says_that_it_ended_before_its_lock_goes(here: Ground) -> None:
    """Else whoever takes the lock in between holds a sandbox that seems to have died alone."""
    server = build_server(here.config())
    seen: list[tuple[bool, bool]] = []
    async with Client(server) as client:
        lab = Lab(client, here.folder)
        session = await server.register.get(await lab.start(name="ending"), "local")
        lock, on_end = session.state_dir / "lock", session.on_end

        def watched(ended: Session) -> None:
            before = held(lock)
            on_end(ended)
            seen.append((before, held(lock)))

        session.on_end = watched
        await lab.ok("stop_sandbox", sandbox=session.handle)
        assert seen == [(True, True)]
        assert not held(lock)


# -- records and processes --------------------------------------------------------------------


async def test_a_sandbox_that_died_alone_is_settled_without_losing_a_line(here: Ground) -> None:
    with raw_server(here) as server:
        sandbox = raw_start(server, name="alone")
        source = "import time\nfor i in range(20): print('line', i, flush=True); time.sleep(0.1)"
        server.call("create_cell", sandbox=sandbox, source=source, wait=0.3)
        kill_server(server)
    pid = record_of(here, sandbox)["sandbox"]["pid"]
    journal = state_of(here, sandbox) / "journal.jsonl"
    await until(lambda: "line 19" in journal.read_text())
    os.kill(pid, signal.SIGKILL)
    await until(lambda: not processes_of(sandbox))
    found = await one(here, "records")
    assert found.status == "warn" and sandbox in found.says and found.fixable
    assert record_of(here, sandbox)["ended"] is None, "without --fix nothing is changed"
    fixed, after = await report(here, "records", fix=True)
    assert fixed.status == "fixed" and after.status == "ok"
    assert record_of(here, sandbox)["ended"] is not None
    (cell,) = read_cells(here.project / "outputs" / "alone" / "alone.ipynb")
    assert streams(cell).splitlines() == [f"line {i}" for i in range(20)]


async def test_a_damaged_record_of_a_living_sandbox_is_written_anew(here: Ground) -> None:
    with raw_server(here) as server:
        sandbox = raw_start(server, name="torn")
        server.call("create_cell", sandbox=sandbox, source="x = 41")
        kill_server(server)
    before = record_of(here, sandbox)
    path = state_of(here, sandbox) / "record.json"
    pid = before["sandbox"]["pid"]
    path.write_text(path.read_text().replace(f'"pid": {pid}', f'"pid": {os.getpid()}'))
    found = await one(here, "records")
    assert found.status == "fail" and "lives" in found.says
    fixed, after = await report(here, "records", fix=True)
    assert fixed.status == "fixed" and after.status == "ok"
    made = record_of(here, sandbox)
    own = {"created": 0, "check": ""}
    assert {**made, **own} == {**before, **own}
    assert abs(made["created"] - before["created"]) < 5
    assert mode(path) == 0o600
    with raw_server(here) as server:
        assert raw_text(server.call("create_cell", sandbox=sandbox, source="x + 1")).endswith("42")
        server.call("stop_sandbox", sandbox=sandbox)


async def test_a_damaged_record_of_nothing_is_put_aside(here: Ground) -> None:
    folder = state_of(here, "gone-abcdef")
    folder.mkdir(parents=True)
    (folder / "record.json").write_text('{"handle": ')
    (folder / "journal.jsonl").write_text('{"n": 1}\n')
    assert (await one(here, "records")).status == "warn"
    fixed, after = await report(here, "records", fix=True)
    assert fixed.status == "fixed" and after.status == "ok"
    (aside,) = (here.folder / "state" / "damaged").iterdir()
    assert (aside / "journal.jsonl").read_text() == '{"n": 1}\n'
    assert not folder.exists()


async def test_a_damaged_record_that_a_server_holds_is_left(here: Ground) -> None:
    with raw_server(here) as server:
        sandbox = raw_start(server, name="held")
        path = state_of(here, sandbox) / "record.json"
        path.write_text("{")
        assert [x.status for x in await report(here, "records", "processes", fix=True)] == [
            "ok",
            "ok",
        ]
        assert path.read_text() == "{"
        server.call("stop_sandbox", sandbox=sandbox)


async def test_processes_without_an_owner_are_ended(here: Ground) -> None:
    with raw_server(here) as server:
        sandbox = raw_start(server, name="orphan")
        kill_server(server)
    shutil.rmtree(state_of(here, sandbox))
    assert processes_of(sandbox)
    found = await one(here, "processes")
    assert found.status == "fail" and sandbox in found.says
    fixed, after = await report(here, "processes", fix=True)
    assert fixed.status == "fixed" and after.status == "ok"
    assert processes_of(sandbox) == []


async def test_what_a_killed_host_left_behind_is_ended(here: Ground) -> None:
    with raw_server(here) as server:
        sandbox = raw_start(server, name="left")
        source = "import subprocess; subprocess.Popen(['sleep', '300'], start_new_session=True)"
        server.call("create_cell", sandbox=sandbox, source=source)
        kill_server(server)
    os.kill(record_of(here, sandbox)["sandbox"]["pid"], signal.SIGKILL)
    await until(lambda: [p.name() for p in processes_of(sandbox)] == ["sleep"])
    (folder,) = runtime_of(here).iterdir()
    assert {"host", "k1-1", "k1.json"} <= {path.name for path in folder.iterdir()}
    found, sockets = await report(here, "processes", "sockets")
    assert found.status == "fail"
    assert sockets.fixable and str(folder) in sockets.says
    await report(here, "sockets", fix=True)
    assert list(runtime_of(here).iterdir()) == []
    lines = await report(here, "records", "processes", fix=True)
    assert [line.status for line in lines if line.status != "fixed"] == ["ok", "ok"]
    assert processes_of(sandbox) == []


async def test_records_of_long_ago_are_forgotten(here: Ground) -> None:
    folder = state_of(here, "old-abcdef")
    folder.mkdir(parents=True)
    base = {"handle": "old-abcdef", "backend": "local", "notebook": "/n.ipynb", "owner": "local"}
    record = {**base, "name": "old", "ended": "stopped", "sandbox": None}
    (folder / "record.json").write_text(json.dumps({**record, "created": time.time() - 86400}))
    assert (await one(here, "records", fix=True)).status == "ok"
    assert folder.exists()
    (folder / "record.json").write_text(json.dumps({**record, "created": 1.0}))
    assert (await one(here, "records")).status == "warn"
    fixed, _ = await report(here, "records", fix=True)
    assert fixed.status == "fixed" and not folder.exists()


# -- sockets and files ------------------------------------------------------------------------


async def test_stale_sockets_go_and_others_stay(here: Ground) -> None:
    runtime = runtime_of(here)
    runtime.mkdir(mode=0o700)
    sockets: list[socket.socket] = []
    for name in ("0123456789ab", "fedcba987654"):
        (runtime / name).mkdir(mode=0o700)
        made = socket.socket(socket.AF_UNIX)
        made.bind(str(runtime / name / "host"))
        made.listen()
        sockets.append(made)
    sockets[0].close()  # its file stays: nobody listens any more
    (runtime / "notes").mkdir()
    (runtime / "notes" / "mine.txt").write_text("mine")
    (runtime / "aaaaaaaaaaaa").mkdir()
    (runtime / "aaaaaaaaaaaa" / "letter").write_text("not a socket")
    assert (await one(here, "sockets", grace=60.0)).status == "ok", "perhaps one is starting"
    stale, strange = await report(here, "sockets")
    assert stale.status == "warn" and "0123456789ab" in stale.says
    assert "fedcba987654" not in stale.says + strange.says
    assert "notes" in strange.says and "aaaaaaaaaaaa" in strange.says and not strange.fixable
    fixed, left = await report(here, "sockets", fix=True)
    assert fixed.status == "fixed" and left.says == strange.says
    assert sorted(p.name for p in runtime.iterdir()) == ["aaaaaaaaaaaa", "fedcba987654", "notes"]
    sockets[1].close()


async def test_open_modes_are_found_and_closed(here: Ground) -> None:
    state = here.folder / "state"
    state.mkdir()
    state.chmod(0o755)
    (state / "http-token").write_text("t")
    (state / "http-token").chmod(0o644)
    victim = here.folder / "victim"
    victim.mkdir(mode=0o755)
    (state / "locks").symlink_to(victim)
    lines = await report(here, "modes")
    assert [line.status for line in lines] == ["fail"] * 3
    lines = await report(here, "modes", fix=True)
    assert [line.status for line in lines] == ["fixed", "fixed", "fail"]
    assert "is a link" in lines[-1].says
    assert (mode(state), mode(state / "http-token"), mode(victim)) == (0o700, 0o600, 0o755)


async def test_only_old_parts_of_ours_are_removed(here: Ground) -> None:
    folder = here.project / "outputs" / "mine"
    folder.mkdir(parents=True)
    names = {
        "old": ".mine.ipynb.a1b2c3d4.part",
        "young": ".mine.ipynb.zzzzzzzz.part",
        "users": "film.part",
        "hidden": ".film.mp4.a1b2c3d4.part",
    }
    for name in names.values():
        (folder / name).write_text("half")
    for kind in ("old", "users", "hidden"):
        os.utime(folder / names[kind], (1, 1))
    notebook = folder / "mine.ipynb"
    notebook.write_text("whole")
    assert (await one(here, "parts")).status == "warn"
    fixed, after = await report(here, "parts", fix=True)
    assert fixed.status == "fixed" and after.status == "ok"
    left = {path.name for path in folder.iterdir()}
    assert left == {names["young"], names["users"], names["hidden"], "mine.ipynb"}


async def test_a_stopped_server_that_holds_locks_is_named(here: Ground) -> None:
    with raw_server(here) as server:
        sandbox = raw_start(server, name="stopped")
        assert "held by 1 living servers" in (await one(here, "locks")).says
        os.kill(server.process.pid, signal.SIGSTOP)
        await until(lambda: psutil.Process(server.process.pid).status() == psutil.STATUS_STOPPED)
        found = await one(here, "locks", fix=True)
        assert found.status == "fail"
        assert (
            str(server.process.pid) in found.says
            and f"kill -CONT {server.process.pid}" in found.mend
        )
        os.kill(server.process.pid, signal.SIGCONT)
        server.call("stop_sandbox", sandbox=sandbox)
        assert (await one(here, "locks")).status == "ok"


async def test_a_full_disk_is_found(here: Ground) -> None:
    with small_disk(here.folder / "state", "64k") as folder:
        filler = fill(folder)
        disk, _ = await report(here, "disk")
        assert disk.status == "fail" and f"0 MB free for state ({folder})" in disk.says
        writing = await one(here, "writing")
        assert writing.status == "fail" and str(folder) in writing.says
        code, _ = command_line(here, "--only", "disk")
        assert code == 1
        filler.unlink()
        assert (await one(here, "writing")).status == "ok"


async def test_a_disk_that_cannot_be_written_is_found(here: Ground) -> None:
    with small_disk(here.folder / "state", "64k") as folder:
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        found = await one(here, "writing")
        assert found.status == "fail" and "Read-only file system" in found.says
    assert (await one(here, "writing")).status == "ok"


async def test_the_longest_socket_path_is_the_backends(here: Ground) -> None:
    """Both say no from the same length on."""
    config = config_of(here)
    room = 107 if sys.platform != "darwin" else 104
    for extra, good in ((0, True), (1, False)):
        name = "p" * (room - len(f"{here.sockets}//xxxxxxxxxxxx/k999-5") + extra)
        parent = here.sockets / name
        long = replace(config, runtime_dir=parent, python="/bin/false")
        lines = [x async for x in examine(Patient(long, {}, here.folder), ["socket-path"])]
        assert (lines[0].status == "ok") is good
        place = Place("h", here.folder / "s", parent / ("x" * 12), here.folder, (), {})
        with pytest.raises(BadInput if not good else SandboxStartFailed) as caught:
            await LocalBackend(long).start(SandboxSpec(), place, lambda text: None)
        assert ("too long" in str(caught.value)) is not good


# -- the machine ------------------------------------------------------------------------------


def test_too_few_open_files_are_found(here: Ground) -> None:
    flags = ("--only", "ulimits")
    code, told = command_line(here, *flags, prefix="ulimit -n 64; ")
    assert code == 1 and status_of(told, "ulimits")[0] == "fail"
    assert (
        "64 open files" in told["lines"][0]["says"] and "ulimit -n 1024" in told["lines"][0]["mend"]
    )
    code, told = command_line(here, *flags, prefix="ulimit -n 200; ")
    assert code == 0 and status_of(told, "ulimits")[0] == "warn"
    assert "about 34 of 60 sandboxes" in told["lines"][0]["says"]


def test_too_few_processes_are_found(here: Ground) -> None:
    group = Path("/sys/fs/cgroup/pids/seer-mcp-test-doctor")
    try:
        group.mkdir()
        (group / "pids.max").write_text("40")
    except OSError as error:
        pytest.skip(f"no control group for processes (version 1) can be made here: {error}")
    try:
        enter = f"echo $$ > {group}/cgroup.procs; "
        code, told = command_line(here, "--only", "ulimits", prefix=enter)
        line = told["lines"][1]
        assert code == 1 and line["status"] == "fail" and str(group) in line["says"]
    finally:
        group.rmdir()


async def test_an_interpreter_without_ipykernel_is_found(here: Ground) -> None:
    venv.create(here.folder / "bare", with_pip=False)
    python = str(here.folder / "bare" / "bin" / "python")
    patient = Patient(replace(config_of(here), python=python), {}, here.folder)
    lines = [x async for x in examine(patient, ["interpreter", "gpu", "kernel"])]
    told = {line.check: line for line in lines if line.status == "fail"}
    assert "ipykernel" in lines[0].says and lines[0].status == "fail"
    assert f"{python} -m pip install ipykernel" in lines[0].mend
    assert "no kernel can be started" in told["kernel"].says
    assert next(x.says for x in lines if x.check == "gpu").startswith("no torch;")
    missing = Patient(replace(config_of(here), python="/no/such/python"), {}, here.folder)
    (line,) = [x async for x in examine(missing, ["interpreter"])]
    assert line.status == "fail" and "/no/such/python" in line.says


def test_a_package_out_of_range_is_found(here: Ground) -> None:
    info = here.folder / "older" / "pillow-9.5.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pillow\nVersion: 9.5.0\n")
    flags = ("--only", "packages")
    code, told = command_line(here, *flags, env={"PYTHONPATH": str(here.folder / "older")})
    assert code == 1 and "pillow 9.5.0 (needed: " in told["lines"][0]["says"]
    code, _ = command_line(here, *flags)
    assert code == 0


@pytest.mark.parametrize(
    ("version", "line", "good"),
    [
        ("2.3.0", "mcp<2.4,>=2.3", True),
        ("2.4", "mcp<2.4,>=2.3", False),
        ("2.10.1", "mcp<2.4,>=2.3", False),
        ("2.2.9", "mcp<2.4,>=2.3", False),
        ("2.4rc1", "mcp<2.4,>=2.3", False),
        ("2.15.0+cu128", "torch<3,>=2.8; extra == 'local'", True),
        ("3", "torch<3,>=2.8; extra == 'local'", False),
        ("3.0", "x==3", True),
        ("3.0.1", "x!=3.0.1", False),
        ("7", "plain", True),
    ],
)
def test_versions_are_compared_by_their_numbers(version: str, line: str, good: bool) -> None:
    (need,) = requirements([line])
    assert within(version, need.bounds) is good
    assert need.extra == ("local" if "extra" in line else "")


def test_the_bounds_of_the_installed_metadata_are_all_understood() -> None:
    """Each bound of ours is one that `requirements` reads; none is passed over in silence."""
    import importlib.metadata

    for line in importlib.metadata.requires("seer-mcp") or []:
        (need,) = requirements([line])
        text = re.sub(r"\[.*?\]", "", line.partition(";")[0].removeprefix(need.name)).strip()
        assert sorted(text.split(",")) == sorted(sign + bound for sign, bound in need.bounds)


async def test_a_token_for_modal_is_told_and_never_shown(here: Ground) -> None:
    async def line(environ: dict[str, str]) -> Line:
        patient = Patient(config_of(here), environ, here.folder)
        (found,) = [x async for x in examine(patient, ["modal"])]
        assert "canary" not in found.says + found.mend
        return found

    assert (await line({})).says.startswith("no token;")
    half = await line({"MODAL_TOKEN_ID": "canary"})
    assert half.status == "warn" and "one half" in half.says
    both = {"MODAL_TOKEN_ID": "canary", "MODAL_TOKEN_SECRET": "canary"}
    assert "a token is in the environment" in (await line(both)).says
    (here.folder / ".modal.toml").write_text("[default]\ntoken_id = 'canary'\n")
    assert f"a token is in {here.folder / '.modal.toml'}" in (await line({})).says


def test_a_driver_that_fails_is_told(here: Ground) -> None:
    tools = here.folder / "tools"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'driver/library version mismatch'; exit 18\n"
    )
    (tools / "nvidia-smi").chmod(0o755)
    path = f"{tools}:{os.environ['PATH']}"
    code, told = command_line(here, "--only", "gpu", env={"PATH": path})
    assert code == 0 and told["lines"][0]["status"] == "warn"
    assert "driver/library version mismatch" in told["lines"][0]["says"]


async def test_looking_does_not_import_torch() -> None:
    code = (
        "import asyncio, sys; from pathlib import Path\n"
        "from seer_mcp.config import Config; from seer_mcp.doctor import Patient, examine\n"
        "async def main():\n"
        "    patient = Patient(Config(Path(), Path(), Path(), Path()), {}, Path())\n"
        "    return [x async for x in examine(patient, ['interpreter', 'gpu', 'packages'])]\n"
        "lines = asyncio.run(main()); print(sorted({'torch', 'modal', 'ipykernel'} & set(sys.modules)), len(lines))"
    )
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder
        )
    assert done.stdout.strip() == "[] 3"
