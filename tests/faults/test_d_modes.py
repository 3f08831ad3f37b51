"""FAULTS.md, D03: what the server keeps is its user's alone, whatever the umask."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp import Client

from seer_mcp.http import kept_token
from seer_mcp.server import build_server

from ..support import Lab, text_of
from .ground import Ground, raw_server, raw_start

pytestmark = pytest.mark.anyio

# Said or made at some time in the life of a sandbox; each must be among the files that were seen.
KNOWN = {
    "state/http-token",
    "state/locks/*",
    "state/sandboxes/*/record.json",
    "state/sandboxes/*/lock",
    "state/sandboxes/*/host.json",
    "state/sandboxes/*/host.log",
    "state/sandboxes/*/kernel.log",
    "state/sandboxes/*/journal.jsonl",
    "state/sandboxes/*/host/kernel_host/launch.py",
    "sockets/*/host",
    "sockets/*/k1-1",
    "sockets/*/k1.json",
    "sockets/*/k2-5",
    "sockets/*/k2.stdout",
}


@pytest.fixture(params=[0o000, 0o022], ids=["umask-000", "umask-022"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def seen(place: Ground) -> dict[str, tuple[str, int]]:
    """Path below the ground -> kind and mode, of everything in the state and socket folders."""
    found: dict[str, tuple[str, int]] = {}
    for root, called in ((place.folder / "state", "state"), (place.sockets, "sockets")):
        for folder, folders, files in os.walk(root):
            for name in [*folders, *files, "."]:
                path = Path(folder, name)
                try:
                    info = path.lstat()
                except FileNotFoundError:
                    continue  # it went meanwhile
                kind = {stat.S_IFDIR: "folder", stat.S_IFSOCK: "socket", stat.S_IFLNK: "link"}.get(
                    stat.S_IFMT(info.st_mode), "file"
                )
                found[called + "/" + str(path.relative_to(root))] = (kind, info.st_mode & 0o777)
    return found


def too_open(found: dict[str, tuple[str, int]]) -> list[str]:
    """What is not exactly as it must be. A link has no mode: what counts is its folder's."""
    wanted = {"folder": 0o700, "file": 0o600, "socket": 0o600}
    return [
        f"{path}: {kind} {mode:o}"
        for path, (kind, mode) in sorted(found.items())
        if kind != "link" and mode != wanted[kind]
    ]


async def test_d03_everything_is_private_for_the_whole_life_of_a_sandbox(
    place: Ground, umask: int
) -> None:
    config = place.config()
    kept_token(config.state_dir)
    everything: dict[str, tuple[str, int]] = {}
    async with Client(build_server(config)) as client:
        lab = Lab(client, place.folder)

        async def look() -> None:
            everything.update(found := seen(place))
            assert too_open(found) == []

        handle = await lab.start()
        await look()
        await lab.cell(handle, "for i in range(40_000): print('a long output', i)")
        await lab.cell(
            handle, "import os, sys; print(os.getpid(), file=sys.stderr); os.write(2, b'raw')"
        )
        await lab.ok("run_command", sandbox=handle, command="echo to the log; ls >/dev/null")
        await lab.ok("write_file", sandbox=handle, path="made.txt", content="x")
        await look()
        await lab.ok("restart_kernel", sandbox=handle)
        await look()
        dying = await lab.cell(handle, "print('last words'); import os; os._exit(1)")
        assert dying.is_error
        await look()
        await lab.ok("restart_kernel", sandbox=handle)
        await look()
        # What the user's own code makes is as open as the user's umask has it.
        result = await lab.cell(handle, "import os; old = os.umask(0); os.umask(old); old")
        assert text_of(result).splitlines()[1] == str(umask)
        await lab.ok("stop_sandbox", sandbox=handle)
        await look()
    patterns = {path.replace(handle, "*") for path in everything}
    patterns |= {
        "/".join(["sockets", "*", *p.split("/")[2:]]) for p in patterns if p[:7] == "sockets"
    }
    patterns |= {"state/locks/*" for p in patterns if p.startswith("state/locks/") and p[-1] != "."}
    assert patterns >= KNOWN, KNOWN - patterns


async def test_d03_a_server_process_is_private_too(place: Ground, umask: int) -> None:
    """With its own log and lock files, and after it was killed."""

    def life() -> None:
        with raw_server(place, "--on-exit", "keep") as server:
            handle = raw_start(server)
            server.call("create_cell", sandbox=handle, source="print('x' * 100_000)")
            assert too_open(seen(place)) == []
            server.process.kill()
        assert too_open(seen(place)) == []

    await asyncio.to_thread(life)


async def test_d03_folders_that_were_open_are_closed(place: Ground) -> None:
    state = place.folder / "state"
    for folder in (state, state / "sandboxes", state / "locks"):
        folder.mkdir(mode=0o755)
    place.sockets.chmod(0o755)
    async with Client(build_server(place.config())) as client:
        await Lab(client, place.folder).start()
        assert too_open(seen(place)) == []


def test_d03_what_is_too_open_is_seen(place: Ground) -> None:
    state = place.folder / "state"
    state.mkdir(mode=0o700)
    (state / "open").write_text("x")
    (state / "open").chmod(0o640)
    (state / "door").mkdir()
    (state / "door").chmod(0o750)
    assert len(too_open(seen(place))) >= 2
