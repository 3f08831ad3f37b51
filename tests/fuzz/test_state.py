"""Damaged state: one sandbox's broken files hide nothing else, end nothing that lives, and are named."""

from __future__ import annotations

import asyncio
import os
import shutil
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from random import Random

import psutil
import pytest
from mcp import Client

from seer_mcp.config import Config
from seer_mcp.errors import SeerError
from seer_mcp.http import kept_token
from seer_mcp.http.serving import checked_token
from seer_mcp.packs import Packs
from seer_mcp.server import build_server
from seer_mcp.sessions import Register, finds

from ..faults.ground import Ground, ground, raw_server, raw_start
from ..faults.stub_kernel import stub_python
from ..support import Lab, processes_of
from .mutate import cases, damaged, put_strange, remove, report

pytestmark = pytest.mark.anyio
HANG = 30.0
FILES = ("record.json", "record.json", "record.json", "host.json", "lock", "locks", "http-token")


@asynccontextmanager
async def server(place: Ground, config: Config) -> AsyncIterator[Lab]:
    async with Client(build_server(config)) as client:
        yield Lab(client, place.folder)


def begun(place: Ground, *names: str) -> list[str]:
    """Sandboxes whose server was killed; each has run a cell."""
    with raw_server(place, "--python", str(stub_python(place.folder))) as first:
        handles = [raw_start(first, name=name) for name in names]
        for handle in handles:
            first.call("create_cell", sandbox=handle, source="before")
    return handles


def damage(random: Random, state: Path, victim: str) -> str:
    """Break one file of the state; which."""
    name = random.choice(FILES)
    folder = state / "sandboxes" / victim
    if name == "locks":
        path = random.choice([*(state / "locks").iterdir(), state / "locks"])
    else:
        path = state / name if name == "http-token" else folder / name
    if path.is_dir():
        shutil.rmtree(path)
        path.write_bytes(b"no folder")
        return f"{name} is a file"
    if random.random() < 0.15:
        return f"{name} is {put_strange(random, path)}"
    path.write_bytes(damaged(random, path.read_bytes()))
    return f"{name}: {path.read_bytes()[:1500]!r}"


async def look(config: Config, good: str, victim: str) -> str:
    """What a new server makes of it: both found, or the damaged one named."""
    register = Register(config, Packs(config.packs))
    await register.open()
    try:
        async with asyncio.timeout(HANG):
            sessions, notes = await register.list("local")
            alive = {s.handle for s in sessions if s.ended is None}
            ended = {s.handle: s.ended for s in sessions if s.ended is not None}
            assert not ended, ended
            named = [note for note in notes if victim in note]
            assert alive <= {good, victim}
            assert victim in alive or named, f"not found and not named: {notes}"
            assert all(len(note) < 3000 and "Traceback" not in note for note in notes)
            if good not in alive:  # only where what both use is broken
                assert [note for note in notes if good in note], notes
                return "both named"
            return "found" if victim in alive else "named"
    finally:
        await register.close()


async def fuzz(folder: Path, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    with ground(folder) as place:
        config = place.config(on_exit="keep", python=str(stub_python(folder)))
        good, victim = begun(place, "good", "victim")
        state = config.state_dir
        kept_token(state)
        pids = {h: {p.pid for p in processes_of(h)} for h in (good, victim)}
        assert all(len(found) == 2 for found in pids.values())
        copy = folder / "copy"
        shutil.copytree(state, copy, symlinks=True)  # the packs are links, to files of the checkout
        for name, random in cases("state", count):
            what = damage(random, state, victim)
            try:
                began = time.monotonic()
                outcome = await look(config, good, victim)
                assert time.monotonic() - began < HANG
                told = check_token(state)
                living = {p for found in pids.values() for p in found if psutil.pid_exists(p)}
                assert living == pids[good] | pids[victim], "something that lived was ended"
                assert outcome != "both named" or what.startswith("locks")
            except BaseException as error:
                error.add_note(f"case {name}: {what}")
                raise
            found[f"{outcome}{told}"] += 1
            restore(copy, state)
        async with server(place, config) as lab:
            for handle in (good, victim):
                assert "after" in await lab.ok("create_cell", sandbox=handle, source="after")
                text = await lab.ok("read_notebook", sandbox=handle, cells="all", outputs=True)
                assert "before" in text
                await lab.ok("stop_sandbox", sandbox=handle)
    return found


def check_token(state: Path) -> str:
    """The HTTP token is refused in a sentence, or it is a token."""
    try:
        path = kept_token(state)
        if not path.is_file():
            return ", token not a file"
        checked_token(path.read_text())
    except (SeerError, ValueError, OSError):
        return ", token refused"
    return ""


def restore(copy: Path, state: Path) -> None:
    for path in [*copy.rglob("*")]:
        if (
            path.is_file()
            and not path.is_symlink()
            and path.name not in ("journal.jsonl", "kernel.log", "host.log")
        ):
            place = state / path.relative_to(copy)
            same = place.is_file() and not place.is_symlink() and place.stat().st_mode == 33152
            if not (same and place.read_bytes() == path.read_bytes()):
                for above in reversed(place.parents):
                    if above.is_relative_to(state) and not above.is_dir():
                        remove(above)
                        above.mkdir(mode=0o700)
                if place.is_symlink() or place.exists():
                    remove(place)
                shutil.copy2(path, place)
                os.chmod(place, 0o600)


async def test_damaged_state_is_named_and_hides_nothing(tmp_path: Path) -> None:
    found = await fuzz(tmp_path, 100)
    assert found["named"] > 10 and found["found"] > 10


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_a_thousand_damaged_states(tmp_path: Path) -> None:
    found = await fuzz(tmp_path, 1000)
    report("state files", {"cases": found.total(), **found, "failures": 0})


async def test_a_host_that_hangs_holds_nobody_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new server finds the others, says which one does not answer, and takes it on when it wakes."""
    monkeypatch.setattr(finds, "FOLLOW_SECONDS", 1.0)
    with ground(tmp_path) as place:
        config = place.config(on_exit="keep", python=str(stub_python(tmp_path)))
        good, hung = begun(place, "good", "hung")
        host = min(processes_of(hung), key=lambda p: p.create_time())
        host.suspend()
        try:
            async with server(place, config) as lab:
                began = time.monotonic()
                assert "complete" in await lab.ok("create_cell", sandbox=good, source="after")
                assert "gave no answer" in await lab.ok("list_sandboxes")
                assert time.monotonic() - began < HANG
                host.resume()
                async with asyncio.timeout(HANG):
                    while f"{hung}: local" not in await lab.ok("list_sandboxes"):
                        await asyncio.sleep(0.1)
                assert "complete" in await lab.ok("create_cell", sandbox=hung, source="after")
                for handle in (good, hung):
                    await lab.ok("stop_sandbox", sandbox=handle)
        finally:
            if host.is_running():
                host.resume()
