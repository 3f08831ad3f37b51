"""What the server holds in memory: of what is over, little more than its JSON, and once."""

from __future__ import annotations

import asyncio
import gc
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import FunctionType, MethodType, ModuleType
from typing import Any

import pytest
from mcp import Client

from seer_mcp.notebook import AWAKE, Notebook
from seer_mcp.server import SeerServer, build_server
from seer_mcp.sessions.session import KNOWN_COMMANDS, KNOWN_RUNS

from .support import Lab, config_for, text_of

pytestmark = pytest.mark.anyio

ELSEWHERE = (type, ModuleType, FunctionType, MethodType, asyncio.Future, asyncio.AbstractEventLoop)
OF_A_CELL = 3_000  # bytes of a cell's own objects, beside its JSON


def held(root: object) -> Iterator[object]:
    """Everything that is held by it, once each; what belongs to the program is left out."""
    seen, pending = {id(root)}, [root]
    while pending:
        found = pending.pop()
        yield found
        for other in gc.get_referents(found):
            if id(other) not in seen and not isinstance(other, ELSEWHERE):
                seen.add(id(other))
                pending.append(other)


def size(root: object) -> int:
    return sum(map(sys.getsizeof, held(root)))


def count(root: object) -> Counter[str]:
    return Counter(type(found).__name__ for found in held(root))


class Host:
    """Numbers events as a kernel host does."""

    def __init__(self, notebook: Notebook) -> None:
        self.notebook = notebook

    def say(self, type: str, run: str, **more: Any) -> None:
        self.notebook.fold({"n": self.notebook.folded + 1, "type": type, "run": run, **more})

    def run(self, number: int, text: str, display: str | None = None) -> None:
        run = f"r{number}"
        self.notebook.begin(self.notebook.insert("code", f"print({number})"), run)
        self.say("start", run, t=1.0)
        self.say("stream", run, name="stdout", text=text)
        if display:
            data = {"text/html": text}
            self.say("display", run, data=data, metadata={}, display_id=display)
        self.end(run)

    def end(self, run: str) -> None:
        ended = {"state": "complete", "seconds": 0.1, "why": "", "count": 1}
        self.say("end", run, **ended, output_bytes=1, dropped_bytes=0)


async def saved(folder: Path, runs: int, characters: int) -> Notebook:
    notebook = Notebook(folder / "held.ipynb")
    host = Host(notebook)
    for number in range(runs):
        host.run(number, f"{number} ".ljust(characters, "é"), display=f"d{number}")
        await notebook.save()
    return notebook


@pytest.mark.parametrize("characters", [10, 20_000, pytest.param(200_000, marks=pytest.mark.slow)])
async def test_outputs_of_runs_that_are_over_are_held_once(tmp_path: Path, characters: int) -> None:
    notebook = await saved(tmp_path, 10 * AWAKE, characters)
    parts = [len(cell.encoded()) for cell in notebook.cells]
    assert count(notebook)["Outputs"] == AWAKE
    awake = 8 * sum(parts[-AWAKE:])  # as text, of up to four bytes a character, and as JSON
    allowed = sum(parts) + awake + OF_A_CELL * len(parts)
    assert size(notebook) < allowed
    for cell in notebook.cells:  # who reads does not make it more
        assert len(cell.pieces()) == 2 and cell.data["outputs"]
    assert count(notebook)["Outputs"] == AWAKE
    assert size(notebook) < allowed
    again = Notebook(notebook.path, [dict(cell.data) for cell in notebook.cells])
    again.changed()
    await again.save()
    assert size(again) < sum(parts) + OF_A_CELL * len(parts)


async def test_what_comes_late_wakes_a_cell_and_it_rests_again(tmp_path: Path) -> None:
    notebook = await saved(tmp_path, 4 * AWAKE, 10)
    host = Host(notebook)
    for number in range(2 * AWAKE):
        run = f"r{number}"
        host.say("stream", run, name="stdout", text="late", late=True)
        host.say("update", run, data={"text/plain": "new"}, metadata={}, display_id=f"d{number}")
        assert count(notebook)["Outputs"] <= AWAKE
    await notebook.save()
    for cell in notebook.cells[: 2 * AWAKE]:
        first, display, late = cell.data["outputs"]
        assert first["text"].startswith(cell.source[6:-1]) and late["text"] == "late"
        assert display["data"] == {"text/plain": "new"}
    again = [cell.json() for cell in notebook.cells]
    for cell in notebook.cells:
        cell.note(stale=True)
        cell.note(stale=None)
    assert [cell.json() for cell in notebook.cells] == again


@asynccontextmanager
async def served(folder: Path):
    server = build_server(config_for(folder))
    async with Client(server) as client:
        yield server, Lab(client, folder)


def session_of(server: SeerServer, handle: str) -> Any:
    return server.register._held.sessions[handle]


async def test_runs_and_commands_that_are_over_are_known_for_a_while_only(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, lab):
        handle = await lab.start(name="many")
        source = "for i in range(100): print(i)"
        cell = (await lab.cell(handle, source)).meta["seer/run"]["cell"]
        first = await lab.call("run_command", sandbox=handle, command="echo first")
        old = first.meta["seer/run"]["id"]
        for number in range(KNOWN_RUNS + 20):
            await lab.ok("run_cell", sandbox=handle, cells=cell)
            said = await lab.ok("run_command", sandbox=handle, command=f"echo c{number}")
            assert f"c{number}" in said
        session = session_of(server, handle)
        kinds = Counter(run.kind for run in session.runs.values())
        assert kinds == {"cell": KNOWN_RUNS, "command": KNOWN_COMMANDS}
        assert not any(run.call for run in session.runs.values())
        assert "first" in await lab.ok("read_outputs", sandbox=handle, run=old)  # from the journal
        assert len(session.runs) == KNOWN_RUNS + KNOWN_COMMANDS
        last = said.split("command ")[1].split(":")[0].split()[0]
        assert f"c{number}" in await lab.ok("read_outputs", sandbox=handle, run=last)
        await lab.ok("stop_sandbox", sandbox=handle)
        said = await lab.no("read_outputs", sandbox=handle, run="c0000000000")
        assert "the last 64 can be read" in said


async def test_the_notebook_of_an_ended_sandbox_is_held_only_while_it_is_wanted(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as (server, lab):
        handle = await lab.start(name="ended")
        cell = (await lab.cell(handle, "print('to be kept')")).meta["seer/run"]["cell"]
        session = session_of(server, handle)
        session.put_away(-1)
        assert not session.unread, "it lives"
        await lab.ok("stop_sandbox", sandbox=handle)
        session.put_away(60)
        assert not session.unread, "somebody asked for it a moment ago"
        held_before = weakref.ref(session.notebook)
        session.put_away(-1)
        gc.collect()
        assert session.unread and held_before() is None
        assert f"{handle}: ended" in await lab.ok("list_sandboxes")
        assert session.unread
        assert "to be kept" in await lab.ok("read_outputs", sandbox=handle, cell=cell)
        assert "to be kept" in text_of(await lab.call("read_notebook", sandbox=handle, cells="all"))
        session.put_away(-1)
        assert session.unread
        path = await lab.notebook_path(handle)
        other = await lab.start(notebook=str(path))
        assert "to be kept" in await lab.ok("read_outputs", sandbox=other, cell=cell)


async def test_a_notebook_that_could_not_be_saved_is_not_put_away(tmp_path: Path) -> None:
    async with served(tmp_path) as (server, lab):
        handle = await lab.start(name="unsaved")
        cell = (await lab.cell(handle, "1")).meta["seer/run"]["cell"]
        await lab.ok("stop_sandbox", sandbox=handle)
        path = await lab.notebook_path(handle)
        path.chmod(0o444)
        said = await lab.no("edit_cell", sandbox=handle, cell=cell, source="2")
        assert "read-only" in said
        session = session_of(server, handle)
        session.put_away(-1)
        assert not session.unread and session.notebook.cell(cell).source == "2"
        path.chmod(0o644)
        await lab.ok("edit_cell", sandbox=handle, cell=cell, source="3")
        session.put_away(-1)
        assert session.unread
