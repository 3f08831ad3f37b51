"""Owners whose local sandboxes run as users of their own: nothing of one is open to the other's kernel."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from seer_mcp.backends.local import LocalBackend, LocalSandbox
from seer_mcp.backends.owners import BOOK, refuse_unable, user_of
from seer_mcp.doctor.findings import Patient
from seer_mcp.doctor.places import modes
from seer_mcp.errors import BadInput, Conflict, SandboxUnreachable

from ..faults.ground import Ground, ground
from ..support import Lab, config_for, processes_of, streams, text_of, until
from .test_tenancy import team

pytestmark = pytest.mark.anyio
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
UIDS = range(
    64100 + 10 * WORKER, 64110 + 10 * WORKER
)  # whose processes no other worker's test ends
needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0,
    reason="only root on Linux has other users' processes",
)
# What a kernel may try, knowing all paths and numbers: for each, what came of it.
TRIES = """
import json, os, signal, socket
def connect(path):
    with socket.socket(socket.AF_UNIX) as end:
        end.connect(path)
def note(path):
    with open(os.path.join(path, "planted"), "w"):
        pass
TRIES = dict(list=os.listdir, read=lambda path: open(path, "rb").read(9), connect=connect, write=note,
    kill=lambda pid: os.kill(int(pid), 0), link=os.readlink, become=lambda uid: os.setuid(int(uid)))
def tried(how, what):
    try:
        TRIES[how](what)
    except OSError as error:
        return type(error).__name__
    return "done"
print(json.dumps([[how, what, tried(how, what)] for how, what in json.loads(%r)]))
"""


@pytest.fixture
def open_place() -> Iterator[Ground]:
    """A ground through which other users may pass (pytest's own folders are closed)."""
    folder = Path(tempfile.mkdtemp(prefix="seer-o-"))
    folder.chmod(0o711)
    try:
        with ground(folder) as made:
            made.project.chmod(0o711)
            yield made
    finally:
        shutil.rmtree(folder)


@pytest.fixture
def python(open_place: Ground) -> str:
    """An interpreter like ours that a user of the range can execute."""

    def runs(path: str) -> bool:
        command = [path, "-c", "import ipykernel, zmq"]
        try:
            done = subprocess.run(
                command, user=UIDS[0], group=UIDS[0], extra_groups=[], capture_output=True, cwd="/"
            )
        except PermissionError:
            return False
        return done.returncode == 0

    if runs(sys.executable):
        return sys.executable
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    other = shutil.which(version, path="/usr/local/bin:/usr/bin")
    if other is not None:
        made = open_place.folder / "env"
        subprocess.run([other, "-m", "venv", "--without-pip", made], check=True)
        site = made / "lib" / version / "site-packages"
        (site / "ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if runs(str(made / "bin" / "python")):
            return str(made / "bin" / "python")
    pytest.skip(f"user {UIDS[0]} can execute no {version} with ipykernel here")


def of_users() -> list[int]:
    """Processes that run as any user of the range."""
    found = psutil.process_iter(["uids", "status"])
    return [
        p.pid
        for p in found
        if p.info["uids"].real in UIDS and p.info["status"] != psutil.STATUS_ZOMBIE
    ]


async def sandbox_of(server: Any, handle: str, owner: str) -> LocalSandbox:
    sandbox = (await server.register.get(handle, owner))._sandbox
    assert isinstance(sandbox, LocalSandbox)
    return sandbox


def everything(
    place: Ground, handle: str, notebook: Path, sandbox: LocalSandbox
) -> list[list[str]]:
    """(how, what) of all that is an owner's, or the server's."""
    state = place.folder / "state" / "sandboxes" / handle
    sockets = Path(sandbox.record()["socket"]).parent
    files = notebook.parent / "files"
    tries = [["list", f] for f in (files, state, state / "own", sockets, notebook.parent)]
    tries += [["list", f] for f in (state.parent, state.parent.parent, place.sockets)]
    tries += [["read", p] for p in (notebook, files / "mine.txt", *state.glob("*.json"))]
    tries += [
        ["read", p]
        for p in (*state.glob("own/*.*"), state / "host.log", *state.glob("host/*/*.py"))
    ]
    tries += [["read", place.folder / "state" / BOOK], ["read", place.folder / "tokens.json"]]
    tries += [["connect" if p.is_socket() else "read", p] for p in sockets.iterdir()]
    tries += [["write", f] for f in (files, state, state / "own", sockets, notebook.parent)]
    for process in processes_of(handle):
        tries += [["read", f"/proc/{process.pid}/{name}"] for name in ("environ", "maps", "mem")]
        tries += [["list", f"/proc/{process.pid}/fd"], ["link", f"/proc/{process.pid}/cwd"]]
        tries += [["kill", str(process.pid)]]
    tries += [["kill", str(os.getpid())], ["become", "0"], ["become", str(os.stat(files).st_uid)]]
    return [[how, str(what)] for how, what in tries]


async def tried(lab: Lab, handle: str, tries: list[list[str]]) -> list[list[str]]:
    path = await lab.notebook_path(handle)
    await lab.cell(handle, TRIES % json.dumps(tries))
    return json.loads(streams(json.loads(path.read_text())["cells"][-1]))


@needs_root
async def test_t02_a_kernel_reaches_nothing_of_another_owner(
    open_place: Ground, python: str
) -> None:
    place = open_place
    async with team(place, owner_uids=UIDS, python=python) as (server, anna, ben):
        hers, his = await anna.start(name="hers"), await ben.start(name="his")
        await anna.ok("write_file", sandbox=hers, path="mine.txt", content="a secret of anna's")
        await anna.cell(hers, "print('printed by anna')")
        notebook = await anna.notebook_path(hers)
        sandbox = await sandbox_of(server, hers, "anna")
        tries = everything(place, hers, notebook, sandbox)
        assert len(tries) > 60
        outcome = await tried(ben, his, tries)
        assert [each for each in outcome if each[2] != "PermissionError"] == []
        # The same tries do succeed for her own kernel, but for what is the server's.
        own = {(how, what) for how, what, came in await tried(anna, hers, tries) if came == "done"}
        kinds = {how for how, _ in own}
        assert kinds == {"list", "read", "connect", "write", "kill", "link", "become"}
        assert (
            "read",
            str(place.folder / "state" / "sandboxes" / hers / "own/journal.jsonl"),
        ) in own
        assert not any("record.json" in what or BOOK in what for _, what in own)
        # And both go on.
        for lab, handle in ((anna, hers), (ben, his)):
            assert text_of(await lab.cell(handle, "6 * 7")).endswith("42")
        assert await anna.ok("read_file", sandbox=hers, path="mine.txt")
    assert of_users() == []


@needs_root
async def test_t02_what_a_kernel_puts_in_place_of_its_files_opens_nothing(
    open_place: Ground, python: str
) -> None:
    """The server is root: it must not follow what leads to another owner."""
    place = open_place
    async with team(place, owner_uids=UIDS, python=python) as (server, anna, ben):
        hers, his = await anna.start(name="hers"), await ben.start(name="his")
        await anna.cell(hers, "print('only ' + 'anna knows')")
        theirs, mine = [await sandbox_of(server, *each) for each in ((hers, "anna"), (his, "ben"))]
        journals = [Path(each.record()["folder"]) / "own/journal.jsonl" for each in (theirs, mine)]
        book = await anna.notebook_path(hers)
        await ben.cell(
            his,
            f"import os, shutil\nos.symlink({str(book)!r}, 'linked.ipynb')\n"
            'open(\'own.ipynb\', \'w\').write(\'{"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}\')',
        )
        assert "outside" in await ben.no("start_sandbox", notebook="his/files/linked.ipynb")
        assert "a kernel can write there" in await ben.no(
            "start_sandbox", notebook="his/files/own.ipynb"
        )
        # Processes that carry her marks, or a path as theirs, are not taken for her host.
        state = place.folder / "state" / "sandboxes"
        for handle, config in (
            (hers, state / hers),
            (hers, state / his),
            ("../../evil", state / his),
        ):
            command = (
                f"[sys.executable, '-c', 'input()', 'kernel_host', {str(config / 'host.json')!r}]"
            )
            await ben.cell(
                his,
                "import os, subprocess, sys\nsubprocess.Popen("
                + command
                + ", stdin=subprocess.PIPE, "
                f"env=dict(os.environ, SEER_MCP_SANDBOX={handle!r}))",
            )
        found = await LocalBackend(place.config(owner_uids=UIDS)).sweep("")
        assert {each["handle"]: each["pid"] for each in found} == {
            each.record()["handle"]: each.record()["pid"] for each in (theirs, mine)
        }
        here, there = (str(each.record()["socket"]) for each in (mine, theirs))
        journal = f"os.unlink({str(journals[1])!r}); os.symlink({str(journals[0])!r}, {str(journals[1])!r})"
        assert not (
            await ben.cell(his, f"os.unlink({here!r}); os.symlink({there!r}, {here!r}); {journal}")
        ).is_error
        with pytest.raises(SandboxUnreachable, match="somebody else"):
            await mine.dial()
        path = await ben.notebook_path(his)
        os.kill(mine.record()["pid"], signal.SIGKILL)
        session = await server.register.get(his, "ben")
        await until(lambda: session.ended is not None, 20)
        assert "only anna knows" in json.dumps(journals[0].read_text())
        assert "only anna knows" not in path.read_text()
        backend = LocalBackend(place.config(owner_uids=UIDS))
        assert await backend.left_behind(mine.record(), place.folder / "copy") is None
        copy = await backend.left_behind(theirs.record(), place.folder / "copy")
        assert copy is not None and "only anna knows" in copy.read_text()
        assert text_of(await anna.cell(hers, "6 * 7")).endswith("42")
    assert of_users() == []


@needs_root
async def test_t02_sandboxes_of_owners_with_users_of_their_own_do_all_that_others_do(
    open_place: Ground, python: str
) -> None:
    place = open_place
    options = {"owner_uids": UIDS, "python": python, "on_exit": "keep"}
    async with team(place, **options) as (server, anna, ben):
        hers, his = await anna.start(name="hers"), await ben.start(name="his")
        said = text_of(
            await anna.cell(hers, "import os; os.getuid(), os.getgroups(), os.umask(63)")
        )
        assert f"({user_of(place.config(owner_uids=UIDS), 'anna').uid}, [], 63)" in said  # type: ignore[union-attr]
        home = text_of(
            await anna.cell(
                hers, "import getpass, tool_packs; getpass.getuser(), os.path.expanduser('~')"
            )
        )
        assert f"{hers}/own" in home
        await anna.cell(hers, "open('from_kernel.txt', 'w').write('k'); x = 5")
        await anna.ok("write_file", sandbox=hers, path="to_kernel.txt", content="w")
        assert "k" in await anna.ok("read_file", sandbox=hers, path="from_kernel.txt")
        assert "w" in text_of(await anna.cell(hers, "open('to_kernel.txt').read()"))
        sandbox = await sandbox_of(server, hers, "anna")
        (place.folder / "put").write_bytes(b"put" * 999)
        await sandbox.put(place.folder / "put", "there/put")
        await sandbox.get("there/put", place.folder / "got")
        assert (place.folder / "got").read_bytes() == b"put" * 999
        with pytest.raises(BadInput, match="leads out"):
            await sandbox.get("../hers.ipynb", place.folder / "no")
        assert f"owner-{sandbox.record()['uid']}" in await anna.ok(
            "run_command", sandbox=hers, command="echo $USER"
        )
        slow = asyncio.create_task(anna.cell(hers, "import time; time.sleep(60)"))
        await asyncio.sleep(1)
        await anna.ok("interrupt", sandbox=hers)
        assert "KeyboardInterrupt" in text_of(await slow)
        told = await modes(Patient(place.config(), {}, place.folder))
        assert [each.status for each in told] == ["ok"], told
    assert of_users()
    async with team(place, **options) as (server, anna, ben):  # found again
        assert text_of(await anna.cell(hers, "x")).endswith("5")
        await anna.ok("restart_kernel", sandbox=hers)
        assert "NameError" in text_of(await anna.cell(hers, "x"))
        # What puts off its mark and its parents ends with the owner's last sandbox.
        await ben.ok(
            "run_command", sandbox=his, command="env -i setsid sleep 600 >/dev/null 2>&1 &"
        )
        await ben.ok("stop_sandbox", sandbox=his)
        path = await anna.notebook_path(hers)
        await anna.ok("stop_sandbox", sandbox=hers)
        assert of_users() == []
        again = await anna.start(notebook="hers/hers.ipynb")
        assert "from_kernel.txt" in await anna.ok("list_files", sandbox=again)
        await anna.ok("stop_sandbox", sandbox=again)
    assert of_users() == [] and list(place.sockets.iterdir()) == []
    kept = {p.name for p in (place.folder / "state" / "sandboxes" / hers).iterdir()}
    assert kept == {"record.json", "lock"}
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o710


@needs_root
async def test_what_an_owners_user_cannot_reach_is_said_and_nothing_is_left(
    open_place: Ground, python: str
) -> None:
    closed = open_place.folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "python").symlink_to(python)
    (closed / "a_pack.py").write_text(
        '"""A pack."""\n__all__ = ["f"]\n\ndef f() -> int:\n    """One."""\n    return 1\n'
    )
    for options, verb in (
        ({"python": str(closed / "python")}, "enter or execute"),
        ({"python": python, "packs": (closed,)}, "read"),
    ):
        async with team(open_place, owner_uids=UIDS, **options) as (_, anna, _ben):
            said = await anna.no("start_sandbox")
            assert f"may not {verb} {closed}" in said and f"({closed} is closed)" in said
    assert of_users() == []
    assert not [f for f in open_place.files() if f.endswith((".ipynb", "record.json", "files"))]


def test_each_owner_has_a_number_that_is_never_given_twice(tmp_path: Path) -> None:
    config = config_for(tmp_path, team=True, owner_uids=UIDS[:3])
    config.state_dir.mkdir()
    given = {owner: user_of(config, owner) for owner in ("anna", "ben", "oidc:anna", "ben")}
    numbers = [user.uid for user in given.values() if user is not None]
    assert sorted(numbers) == list(UIDS[:3])
    assert stat.S_IMODE((config.state_dir / BOOK).stat().st_mode) == 0o600
    with pytest.raises(Conflict, match="larger range"):
        user_of(config, "carl")
    with pytest.raises(BadInput, match="not among them"):
        user_of(replace(config, owner_uids=UIDS[5:]), "anna")
    (config.state_dir / BOOK).write_text('{"anna": "0"}')
    with pytest.raises(BadInput, match="damaged"):
        user_of(config, "anna")
    assert user_of(replace(config, owner_uids=range(0)), "anna") is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root may")
def test_only_root_can_be_told_to_use_other_users() -> None:
    with pytest.raises(BadInput, match="only root"):
        refuse_unable(UIDS, sys.executable)
