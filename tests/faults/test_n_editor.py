"""A person has the notebook open in an editor while the agent works: nothing of either is lost.

The editors are real: a `jupyter_server` process that is spoken to as JupyterLab does, and a process of
its own that saves as VS Code does (truncate and write in pieces), as vim and git do (write beside,
rename) and as an editor does that moves the old file away first.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import nbformat
import pytest

from seer_mcp.errors import NotebookNotSaved
from seer_mcp.ipynb import read_notebook
from seer_mcp.notebook import Notebook
from seer_mcp.sharedfile import stamp

from ..support import Lab, read_cells, streams, text_of, until

pytestmark = pytest.mark.anyio

Book = dict[str, Any]


# -- editors ----------------------------------------------------------------------------------


class JupyterServer:
    """A `jupyter_server` process, and what JupyterLab asks of it."""

    def __init__(self, root: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        home = root / "jupyter"
        home.mkdir()
        places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "HOME")
        self.log = (root / "jupyter.log").open("wb")
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyter_server", "--no-browser", "--allow-root"),
                f"--ServerApp.port={port}",
                "--ServerApp.port_retries=0",
                "--ServerApp.token=t",
                f"--ServerApp.root_dir={root}",
                "--ServerApp.jpserver_extensions={}",
            ],
            env={**os.environ, **dict.fromkeys(places, str(home))},
            cwd=home,
            stdout=self.log,
            stderr=self.log,
        )
        self.root = root
        self.http = httpx2.Client(
            base_url=f"http://127.0.0.1:{port}/api/",
            headers={"Authorization": "token t"},
            timeout=30,
            trust_env=False,
        )
        self._wait()

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            assert self.process.poll() is None, (self.root / "jupyter.log").read_text()
            try:
                if self.http.get("status").status_code == 200:
                    return
            except httpx2.HTTPError:
                time.sleep(0.1)
        raise AssertionError("jupyter_server did not start")

    def get(self, path: Path) -> dict[str, Any]:
        answer = self.http.get(self._url(path), params={"content": 1, "hash": 1})
        assert answer.status_code == 200, answer.text
        return answer.json()

    def put(self, path: Path, book: Book) -> dict[str, Any]:
        model = {"type": "notebook", "format": "json", "content": book}
        answer = self.http.put(self._url(path), json=model)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def _url(self, path: Path) -> str:
        return f"contents/{path.relative_to(self.root).as_posix()}"

    def close(self) -> None:
        self.http.close()
        self.process.terminate()
        self.process.wait(20)
        self.log.close()


WRITER = """
import json, os, sys, time
for line in sys.stdin:
    order = json.loads(line)
    path, data, way = order["path"], order["data"].encode(), order["way"]
    size = max(1, len(data) // order["pieces"])
    pieces = [data[at : at + size] for at in range(0, len(data), size)]
    if way == "in place":
        target = path
        flags = os.O_WRONLY
    else:
        target = path + ".theirs"
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
    if way == "move away first":
        try:
            os.rename(path, path + "~")
        except FileNotFoundError:
            pass
        target = path
    try:
        descriptor = os.open(target, flags)
    except FileNotFoundError:
        descriptor = os.open(target, flags | os.O_CREAT)
    os.ftruncate(descriptor, 0)
    for piece in pieces:
        time.sleep(order["pause"])
        os.write(descriptor, piece)
    os.close(descriptor)
    if way == "beside":
        os.rename(target, path)
    print("saved", flush=True)
"""
WAYS = ("in place", "beside", "move away first")


class Writer:
    """A process that saves a file the way editors do."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def save(self, path: Path, data: str, way: str, pieces: int = 1, pause: float = 0.0) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"path": str(path), "data": data, "way": way, "pieces": pieces, "pause": pause}
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "saved\n"

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.wait(10)
        self.process.stdout.close()


@pytest.fixture(scope="module")
def jupyter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JupyterServer]:
    server = JupyterServer(tmp_path_factory.mktemp("root"))
    yield server
    server.close()


@pytest.fixture
def writer() -> Iterator[Writer]:
    made = Writer()
    yield made
    made.close()


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def sources(path: Path) -> list[str]:
    return [source(cell) for cell in read_cells(path)]


def read(path: Path) -> Book:
    return json.loads(path.read_text())


def added(text: str, id: str, kind: str = "markdown") -> dict[str, Any]:
    cell: dict[str, Any] = {"cell_type": kind, "id": id, "metadata": {}, "source": text}
    return {**cell, "outputs": [], "execution_count": None} if kind == "code" else cell


async def made(lab: Lab, handle: str, text: str, **arguments: Any) -> str:
    """A new cell that is not run; its id."""
    result = await lab.cell(handle, text, run=False, **arguments)
    assert not result.is_error, text_of(result)
    return result.meta["seer/cell"]


# -- random interleavings ---------------------------------------------------------------------


@dataclass
class Desk:
    """An agent and a person at one notebook. Every edit adds a line of its own; none may vanish."""

    lab: Lab
    handle: str
    path: Path
    rng: random.Random
    save: Callable[[Book], None]
    """How the person's editor saves."""
    said: list[str] = field(default_factory=list[str])
    lines: set[str] = field(default_factory=set[str])
    deleted: set[str] = field(default_factory=set[str])
    printed: dict[str, int] = field(default_factory=dict[str, int])
    number: int = 0

    def line(self, who: str) -> str:
        self.number += 1
        made = f"# {who}{self.number}."
        self.lines.add(made)
        return made

    async def call(self, tool: str, **arguments: Any) -> Any:
        result = await self.lab.call(tool, sandbox=self.handle, **arguments)
        self.said.append(text_of(result))
        return result

    async def agent(self, times: int) -> None:
        for _ in range(times):
            await asyncio.sleep(self.rng.random() * 0.05)
            what = self.rng.choice(["edit", "edit", "create", "run", "move", "for deletion"])
            cells = [
                c for c in read_cells_of(self.lab, await self.outline()) if c not in self.deleted
            ]
            if what == "run":
                await self.run()
            elif what == "create":
                await self.call("create_cell", source=self.line("agent"), run=False)
            elif what == "for deletion":
                result = await self.call("create_cell", source="to be deleted", run=False)
                self.deleted.add(result.meta["seer/cell"])
            elif what == "move" and len(cells) > 1:
                one, other = self.rng.sample(cells, 2)
                await self.call("move_cell", cell=one, after=other)
            elif cells:
                await self.edit(self.rng.choice(cells))

    async def outline(self) -> Any:
        return await self.call("read_notebook")

    async def edit(self, cell: str) -> None:
        shown = text_of(await self.call("read_notebook", cells=cell))
        if "--- cell " not in shown:
            return  # the person has just deleted it
        text = shown.partition(" ---\n")[2]
        line = self.line("agent")
        result = await self.call("edit_cell", cell=cell, source=f"{text}\n{line}")
        if result.is_error:
            self.lines.discard(line)
            assert "it is running" in text_of(result) or "it is queued" in text_of(result), text_of(
                result
            )

    async def run(self) -> None:
        line = self.line("agent")
        code = f"{line}\nimport time\nfor i in range(60):\n    print('{line}', i)\n    time.sleep(0.004)"
        result = await self.call("create_cell", source=code, wait=0)
        self.printed[result.meta["seer/run"]["cell"]] = 60

    async def person(self, times: int) -> None:
        """Edits of one open editor, which seldom loads the file again."""
        book = await self.loaded()
        for _ in range(times):
            await asyncio.sleep(self.rng.random() * 0.08)
            if self.rng.random() < 0.3:
                book = await self.loaded()
            self.change(book)
            await asyncio.to_thread(self.save, json.loads(json.dumps(book)))

    async def loaded(self) -> Book:
        while True:
            try:
                return read(self.path)
            except (ValueError, FileNotFoundError):  # their own other editor is saving
                await asyncio.sleep(0.01)

    def change(self, book: Book) -> None:
        cells = book["cells"]
        what = self.rng.choice(["edit", "edit", "insert", "delete", "move", "stale"])
        if what == "edit" and cells:
            cell = self.rng.choice(cells)
            cell["source"] = f"{source(cell)}\n{self.line('person')}"
        elif what == "insert":
            line = self.line("person")
            cells.insert(self.rng.randrange(len(cells) + 1), added(line, f"p{self.number}"))
        elif what == "delete":
            for cell in [c for c in cells if source(c) == "to be deleted"]:
                cells.remove(cell)
        elif what == "move" and cells:
            cells.append(cells.pop(self.rng.randrange(len(cells))))

    async def check(self) -> None:
        """All runs are over: every line is there, every output whole, the file valid."""
        for cell in self.printed:
            await self.call("read_outputs", cell=cell)
        await asyncio.sleep(0.05)
        await self.call("create_cell", source=self.line("agent"), run=False)
        book = nbformat.read(self.path, as_version=4)
        nbformat.validate(book)
        ids = [cell.id for cell in book.cells]
        assert len(set(ids)) == len(ids)
        asides = sorted(self.path.parent.glob(f"{self.path.stem}.conflict-*.ipynb"))
        for aside in asides:
            assert aside.name in "".join(self.said), "an unnamed conflict copy"
        texts = "\n".join([*map(source, book.cells), *(a.read_text() for a in asides)])
        assert {line for line in self.lines if line not in texts} == set()
        by_id = {cell.id: cell for cell in book.cells}
        for id, count in self.printed.items():
            cell = by_id[id]
            assert cell.metadata["seer"]["state"] == "complete"
            assert streams(cell).count("\n") == count, (id, streams(cell)[-300:])


def read_cells_of(lab: Lab, outline: Any) -> list[str]:
    return [cell["id"] for cell in outline.meta["seer/cells"]]


async def interleave(desk: Desk, trials: int) -> None:
    for trial in range(trials):
        await asyncio.gather(desk.agent(4), desk.person(4))
        if trial % 5 == 4:
            await desk.check()
    await desk.check()


def seeded(number: int) -> random.Random:
    return random.Random(int(os.environ.get("SEER_TEST_SEED", "0")) * 1000 + number)


async def through_jupyter(lab: Lab, jupyter: JupyterServer, trials: int) -> None:
    handle = await lab.start()
    path = await lab.notebook_path(handle)
    link = jupyter.root / f"project-{handle}"
    link.symlink_to(path.parent)  # the same folder, as the other server's root has it
    seen = link / path.name

    def save(book: Book) -> None:
        jupyter.put(seen, book)

    await interleave(Desk(lab, handle, path, seeded(1), save), trials)


async def through_files(lab: Lab, writer: Writer, trials: int) -> None:
    handle = await lab.start()
    path = await lab.notebook_path(handle)
    rng = seeded(2)

    def save(book: Book) -> None:
        pieces = rng.choice([1, 2, 5])
        pause = rng.choice([0.0, 0.01, 0.05])
        writer.save(path, json.dumps(book, indent=1), rng.choice(WAYS), pieces, pause)

    await interleave(Desk(lab, handle, path, rng, save), trials)


async def test_n04_edits_in_jupyterlab_and_of_the_agent_both_survive(
    lab: Lab, jupyter: JupyterServer
) -> None:
    await through_jupyter(lab, jupyter, 10)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_n04_fifty_interleavings_with_jupyterlab(lab: Lab, jupyter: JupyterServer) -> None:
    await through_jupyter(lab, jupyter, 50)


async def test_n04_edits_saved_by_vscode_vim_and_git_survive(lab: Lab, writer: Writer) -> None:
    await through_files(lab, writer, 8)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_n04_fifty_interleavings_with_files(lab: Lab, writer: Writer) -> None:
    await through_files(lab, writer, 50)


# -- the same moment --------------------------------------------------------------------------

ADDER = """
import json, os, sys, time
path, way, many = sys.argv[1], sys.argv[2], int(sys.argv[3])
for number in range(many):
    time.sleep(0.005)
    while True:
        try:
            book = json.load(open(path))
            break
        except (ValueError, FileNotFoundError):
            time.sleep(0.001)
    cell = {"cell_type": "markdown", "id": f"p{number}", "metadata": {}, "source": f"person {number}"}
    book["cells"].append(cell)
    data = json.dumps(book)
    if way == "in place":
        with open(path, "w") as file:
            file.write(data)
    else:
        with open(path + ".theirs", "w") as file:
            file.write(data)
        os.rename(path + ".theirs", path)
"""


@pytest.mark.parametrize("way", ["in place", "beside"])
async def test_n04_saves_of_both_in_the_same_moment_both_count(tmp_path: Path, way: str) -> None:
    book = Notebook(tmp_path / "a.ipynb")
    book.insert("markdown", "the first")
    await book.save()
    many = 150
    person = await asyncio.create_subprocess_exec(
        sys.executable, "-c", ADDER, str(book.path), way, str(many)
    )
    ours = 0
    while person.returncode is None:
        ours += 1
        book.insert("markdown", f"agent {ours}")
        await book.save()
        await asyncio.sleep(0)
    await book.close()
    wanted = {f"person {n}" for n in range(many)} | {f"agent {n + 1}" for n in range(ours)}
    assert wanted - set(sources(book.path)) == set()
    assert ours > 20
    assert [name for name in os.listdir(tmp_path) if name != "a.ipynb"] == []


async def test_n04_a_half_written_file_is_waited_for(tmp_path: Path, writer: Writer) -> None:
    book = Notebook(tmp_path / "a.ipynb")
    book.insert("markdown", "the first")
    await book.save()
    theirs = read(book.path)
    theirs["cells"].append(added("from the person", "mine"))
    data = json.dumps(theirs, indent=1)
    inode = book.path.stat().st_ino
    saving = asyncio.create_task(
        asyncio.to_thread(writer.save, book.path, data, "in place", 5, 0.15)
    )
    await until(lambda: book.path.stat().st_size < len(data) // 2)
    await book.refresh()  # a tool call does not wait for it
    assert not saving.done() and book.notices == []
    book.insert("markdown", "from the agent")
    await book.save()
    assert saving.done() or book.path.stat().st_ino == inode, "saved over a file being written"
    await saving
    await book.close()
    assert set(sources(book.path)) == {"the first", "from the person", "from the agent"}
    assert os.listdir(tmp_path) == ["a.ipynb"]


async def test_n04_what_is_written_into_the_file_that_we_replaced_is_merged(tmp_path: Path) -> None:
    book = Notebook(tmp_path / "a.ipynb")
    book.insert("markdown", "the first")
    await book.save()
    theirs = read(book.path)
    theirs["cells"].append(added("from the person", "mine"))
    saver = asyncio.create_task(book.keep_saved())
    with book.path.open("r+") as editor:  # opened before our save, written after it
        book.insert("markdown", "from the agent")
        await book.save()
        await asyncio.sleep(0.3)
        editor.truncate(0)
        editor.write(json.dumps(theirs))
    await until(lambda: "from the person" in sources(book.path), 5)
    assert set(sources(book.path)) == {"the first", "from the person", "from the agent"}
    saver.cancel()
    descriptors = os.listdir("/proc/self/fd") if sys.platform == "linux" else []
    kept = [d for d in descriptors if _target(d).startswith(str(tmp_path))]
    assert kept == [], "the replaced file is still held"


def _target(descriptor: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{descriptor}")
    except FileNotFoundError:
        return ""


async def test_n04_an_edit_in_the_moment_a_server_is_killed_is_kept(tmp_path: Path) -> None:
    book = Notebook(tmp_path / "a.ipynb")
    book.insert("markdown", "the first")
    await book.save()
    code = (
        "import json, os, sys; from pathlib import Path; from seer_mcp.sharedfile import replace, stamp\n"
        "from seer_mcp.kernel_host import fault; fault.arm(sys.argv[3])\n"
        "path = Path(sys.argv[1]); known = stamp(path); data = path.read_bytes()\n"
        "if sys.argv[2] == 'edited':\n"
        "    book = json.loads(data); book['cells'][0]['source'] = 'an edit'\n"
        "    (path.parent / 'b').write_text(json.dumps(book)); os.rename(path.parent / 'b', path)\n"
        "replace(path, [data], known)"
    )
    for point in ("part", "renamed"):
        for edit in ("not edited", "edited"):
            plan = f"after:notebook.{point}:1"
            done = subprocess.run([sys.executable, "-c", code, str(book.path), edit, plan])
            assert done.returncode == -signal.SIGKILL
            assert len(list(tmp_path.glob(".a.ipynb.*.part"))) == 1
            found = Notebook(book.path, seen=stamp(book.path))
            found.recover()
            assert not list(tmp_path.glob("*.part"))
            asides = list(tmp_path.glob("*.conflict-*"))
            texts = [sources(book.path), *map(sources, asides)]
            assert (["an edit"] in texts) == (edit == "edited")
            assert len(asides) == (edit == "edited")
            for aside in asides:
                assert aside.name in found.notices[0]
                aside.unlink()
            book.path.unlink()
            book.changed()
            await book.save()
            book.notices.clear()


# -- what belongs to whom ---------------------------------------------------------------------


def ran(book: Notebook, cell: str, run: str, text: str, count: int = 1) -> None:
    """The events of a whole run."""
    start(book, cell, run)
    say(book, run, text)
    end(book, run, count)


def start(book: Notebook, cell: str, run: str) -> None:
    book.begin(book.cell(cell), run)
    book.fold({"n": book.folded + 1, "type": "start", "run": run, "t": 1.0})


def say(book: Notebook, run: str, text: str) -> None:
    event = {"n": book.folded + 1, "type": "stream", "run": run, "name": "stdout", "text": text}
    book.fold(event)


def end(book: Notebook, run: str, count: int = 1) -> None:
    sizes = {"output_bytes": 1, "dropped_bytes": 0}
    more = {"state": "complete", "why": "", "count": count, "seconds": 0.1}
    book.fold({"n": book.folded + 1, "type": "end", "run": run, **more, **sizes})


@pytest.fixture
async def book(tmp_path: Path) -> Notebook:
    """A saved notebook of two code cells, the first one run."""
    made = Notebook(tmp_path / "a.ipynb")
    first = made.insert("code", "print('one')")
    made.insert("code", "print('two')")
    ran(made, first.id, "r0000000001", "one\n")
    await made.save()
    return made


async def both_save(book: Notebook, theirs: Book) -> list[dict[str, Any]]:
    """They save their copy, we save after them; the cells that are then in the file."""
    book.path.write_text(json.dumps(theirs))
    await book.save()
    nbformat.validate(nbformat.read(book.path, as_version=4))
    return read_cells(book.path)


async def test_n04_an_old_view_of_outputs_takes_nothing_back(book: Notebook) -> None:
    first, second = (cell.id for cell in book.cells)
    start(book, second, "r0000000002")
    say(book, "r0000000002", "line 1\n")
    await book.save()
    old = read(book.path)  # the editor has it while the cell runs
    say(book, "r0000000002", "line 2\n")
    end(book, "r0000000002", 2)
    ran(book, first, "r0000000003", "one, again\n", 3)
    await book.save()
    old["cells"].append(added("a note", "note"))
    cells = await both_save(book, old)
    assert [streams(cell) for cell in cells[:2]] == ["one, again\n", "line 1\nline 2\n"]
    assert [cell["execution_count"] for cell in cells[:2]] == [3, 2]
    assert {cell["metadata"]["seer"]["state"] for cell in cells[:2]} == {"complete"}
    assert source(cells[2]) == "a note"
    assert not any("not taken" in notice for notice in book.notices), "nobody ran anything there"


async def test_n04_what_they_ran_in_their_own_kernel_is_kept(book: Notebook) -> None:
    theirs = read(book.path)
    output = {"output_type": "stream", "name": "stdout", "text": ["by their kernel\n"]}
    for cell in theirs["cells"]:
        cell.update(outputs=[output], execution_count=7)
    cells = await both_save(book, theirs)
    assert [streams(cell) for cell in cells] == ["by their kernel\n"] * 2
    assert [cell["execution_count"] for cell in cells] == [7, 7]
    assert "seer" not in cells[0]["metadata"], "it is no run of ours any more"
    # The cell runs here; then they save their outputs of before once more.
    ran(book, cells[0]["id"], "r0000000009", "by our kernel\n")
    await book.save()
    book.notices.clear()
    theirs["cells"][0]["outputs"] = [{**output, "text": "by their kernel, again\n"}]
    cells = await both_save(book, theirs)
    assert [streams(cell) for cell in cells] == ["by our kernel\n", "by their kernel\n"]
    told = f"outputs of cell {cells[0]['id']} that were saved from outside are not taken"
    assert [notice for notice in book.notices if told in notice] != []
    await both_save(book, theirs)
    assert len([notice for notice in book.notices if told in notice]) == 1, "told again and again"


async def test_n04_metadata_attachments_kinds_and_order_are_kept(book: Notebook) -> None:
    note = book.insert("markdown", "a note")
    await book.save()
    theirs = read(book.path)
    first, second, third = theirs["cells"]
    first["metadata"].update(tags=["keep"], collapsed=True)
    second.update(cell_type="markdown", metadata={"mine": 1})
    second.pop("outputs"), second.pop("execution_count")
    third["attachments"] = {"a.png": {"image/png": "AAAA"}}
    theirs["cells"] = [third, first, second]
    theirs["metadata"]["language_info"]["version"] = "3.11"
    theirs["metadata"]["theirs"] = {"x": [1]}
    await book.save()
    book.rewrite(book.cell(note.id), "a better note")  # ours, of the cell with the attachment
    cells = await both_save(book, theirs)
    assert [c["id"] for c in cells] == [third["id"], first["id"], second["id"]]
    assert cells[0]["attachments"] == third["attachments"] and source(cells[0]) == "a better note"
    assert cells[1]["metadata"]["tags"] == ["keep"] and cells[1]["metadata"]["collapsed"] is True
    assert cells[1]["metadata"]["seer"]["run"] == "r0000000001" and streams(cells[1]) == "one\n"
    assert cells[2]["cell_type"] == "markdown" and cells[2]["metadata"] == {"mine": 1}
    metadata = read(book.path)["metadata"]
    assert metadata["theirs"] == {"x": [1]} and metadata["language_info"]["version"] == "3.11"
    # What they take away again goes.
    theirs = read(book.path)
    theirs["metadata"].pop("theirs")
    theirs["cells"][1]["metadata"].pop("tags")
    theirs["cells"][0].pop("attachments")
    cells = await both_save(book, theirs)
    assert "theirs" not in read(book.path)["metadata"] and "attachments" not in cells[0]
    assert cells[1]["metadata"].keys() == {"collapsed", "seer"}


async def test_n04_a_copy_of_a_cell_is_no_run_of_ours(book: Notebook) -> None:
    theirs = read(book.path)
    copy = {**theirs["cells"][0], "id": "copied"}
    start(book, book.cells[1].id, "r0000000002")
    await book.save()
    running = read(book.path)["cells"][1]
    theirs = read(book.path)
    theirs["cells"] += [copy, {**running, "id": "of-running"}]
    cells = await both_save(book, theirs)
    assert [c["id"] for c in cells[2:]] == ["copied", "of-running"]
    assert not any("seer" in cell["metadata"] for cell in cells[2:])
    say(book, "r0000000002", "out\n")
    end(book, "r0000000002")
    await book.save()
    assert [streams(cell) for cell in read_cells(book.path)] == ["one\n", "out\n", "one\n", ""]


async def test_n04_a_stale_copy_deletes_and_reverts_nothing(book: Notebook) -> None:
    stale = read(book.path)
    book.rewrite(book.cells[0], "print('one, edited')")
    book.insert("code", "the agent's new cell")
    await book.save()
    book.move(book.cells[1], "")
    await book.save()
    before = sources(book.path)
    await both_save(book, stale)
    assert sources(book.path) == before
    assert any("an older version" in notice for notice in book.notices)
    # Edited in that copy, saved every second as editors do: one conflict, one copy.
    stale["cells"][0]["source"] = "print('one, by the person')"
    for _ in range(4):
        cells = await both_save(book, stale)
    assert [source(cell) for cell in cells].count("print('one, by the person')") == 1
    assert len(cells) == 4 and "print('one, edited')" in map(source, cells)


async def test_n04_a_deletion_counts_unless_the_cell_ran_here_since(book: Notebook) -> None:
    stale = read(book.path)
    first, second = (cell.id for cell in book.cells)
    ran(book, second, "r0000000005", "ran since\n")
    await book.save()
    stale["cells"] = []
    cells = await both_save(book, stale)
    assert [cell["id"] for cell in cells] == [second] and streams(cells[0]) == "ran since\n"
    assert any(f"1 deleted ({first})" in notice for notice in book.notices), book.notices
    assert any("they stay: " + second in notice for notice in book.notices), book.notices


async def test_n04_after_a_restart_of_the_server_a_stale_copy_still_takes_nothing(
    book: Notebook,
) -> None:
    stale = read(book.path)
    book.rewrite(book.cells[1], "the agent's edit")
    book.insert("code", "the agent's new cell")
    await book.save()
    seen = stamp(book.path)
    again = Notebook(book.path, *read_notebook(book.path), seen)  # knows the last version only
    stale["cells"][0]["source"] = "the person's edit"
    cells = await both_save(again, stale)
    assert {"the agent's edit", "the agent's new cell", "the person's edit"} <= set(
        map(source, cells)
    )


async def test_n04_a_program_that_drops_cell_ids_changes_none(book: Notebook) -> None:
    theirs = read(book.path)
    ids = [cell.pop("id") for cell in theirs["cells"]]
    theirs["nbformat_minor"] = 4
    theirs["cells"][1]["source"] = "print('two, edited')"
    theirs["metadata"].pop("seer")
    cells = await both_save(book, theirs)
    assert [cell["id"] for cell in cells] == ids
    assert [source(cell) for cell in cells] == ["print('one')", "print('two, edited')"]
    assert cells[0]["metadata"]["seer"]["state"] == "complete"


async def test_n04_a_cell_id_that_occurs_twice_is_mended(book: Notebook) -> None:
    theirs = read(book.path)
    theirs["cells"].append({**theirs["cells"][0], "source": "pasted by hand"})
    cells = await both_save(book, theirs)
    assert [source(c) for c in cells] == ["print('one')", "print('two')", "pasted by hand"]
    assert len({cell["id"] for cell in cells}) == 3


# -- moved, deleted, replaced -----------------------------------------------------------------


async def test_n04_a_deleted_or_renamed_file_is_written_again_and_said(book: Notebook) -> None:
    book.path.unlink()
    book.insert("code", "after")
    await book.save()
    assert sources(book.path) == ["print('one')", "print('two')", "after"]
    assert "deleted or moved" in book.notices.pop()
    book.path.rename(book.path.with_name("renamed.ipynb"))
    book.insert("code", "after that")
    await book.save()
    assert sources(book.path)[-1] == "after that"
    assert "(the old one is 'renamed.ipynb')" in book.notices.pop()
    assert sources(book.path.with_name("renamed.ipynb"))[-1] == "after"


async def test_n04_a_moved_folder_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    book = Notebook(tmp_path / "here" / "a.ipynb")
    book.insert("code", "one")
    await book.save()
    (tmp_path / "here").rename(tmp_path / "there")
    book.insert("code", "two")
    await book.save()
    assert sources(book.path) == ["one", "two"]
    assert sources(tmp_path / "there" / "a.ipynb") == ["one"]
    assert "together with its folder" in book.notices.pop()


@pytest.mark.parametrize("what", ["folder", "link", "read-only"])
async def test_n04_what_must_not_be_overwritten_is_not(book: Notebook, what: str) -> None:
    other = book.path.with_name("other.ipynb")
    if what == "read-only":
        book.path.chmod(0o444)
    else:
        book.path.rename(other)
    if what == "folder":
        book.path.mkdir()
        (book.path / "inside").touch()
    elif what == "link":
        book.path.symlink_to(other)
    kept = other if what != "read-only" else book.path
    before = kept.read_bytes()
    book.insert("code", "after")
    with pytest.raises(NotebookNotSaved) as told:
        await book.save()
    wanted = "read-only" if what == "read-only" else "stands in its place"
    assert wanted in str(told.value) and wanted in str(book.trouble)
    assert kept.read_bytes() == before
    assert not list(book.path.parent.glob(".*"))
    if what == "read-only":
        book.path.chmod(0o600)
    elif what == "link":
        book.path.unlink()
    else:
        (book.path / "inside").unlink()
        book.path.rmdir()
    await book.save()
    assert book.trouble is None and sources(book.path)[-1] == "after"
    if what == "read-only":
        assert book.path.stat().st_mode & 0o777 == 0o600, "a private notebook stays private"


async def test_n04_git_checkout_of_an_older_version_is_said(book: Notebook, tmp_path: Path) -> None:
    def git(*words: str) -> None:
        who = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True)

    git("init", "-q")
    git("add", "a.ipynb")
    git("commit", "-qm", "first")
    book.rewrite(book.cells[1], "print('two, edited')")
    book.insert("code", "the agent's new cell")
    await book.save()
    git("checkout", "-q", "--", "a.ipynb")
    assert len(sources(book.path)) == 2
    await book.refresh()
    await book.save()
    assert sources(book.path) == ["print('one')", "print('two, edited')", "the agent's new cell"]
    assert "an older version" in book.notices[-1]


# -- the other way ----------------------------------------------------------------------------


async def test_n04_an_open_jupyterlab_sees_our_saves_as_changes_of_the_file(
    lab: Lab, jupyter: JupyterServer
) -> None:
    handle = await lab.start()
    path = await lab.notebook_path(handle)
    link = jupyter.root / f"project-{handle}"
    link.symlink_to(path.parent)
    seen = link / path.name
    models = [jupyter.get(seen)]
    for number, code in enumerate(
        ("print('one')", "1/0", "display({'text/html': '<b>x</b>'}, raw=True)")
    ):
        await lab.cell(handle, code)
        model = jupyter.get(seen)
        assert model["format"] == "json" and "message" not in model, "not a valid notebook to it"
        assert model["last_modified"] > models[-1]["last_modified"]
        assert model["hash"] not in [earlier["hash"] for earlier in models]
        assert [source(c) for c in model["content"]["cells"]][number] == code
        models.append(model)
    url = f"contents/{seen.relative_to(jupyter.root).as_posix()}/checkpoints"
    checkpoint = jupyter.http.post(url)
    assert checkpoint.status_code == 201, checkpoint.text
    await lab.cell(handle, "# after the checkpoint")
    restored = jupyter.http.post(f"{url}/{checkpoint.json()['id']}")
    assert restored.status_code == 204, restored.text
    text = await lab.ok("read_notebook", sandbox=handle)
    assert "an older version" in text
    await lab.ok("edit_cell", sandbox=handle, cell=(await first_cell(lab, handle)), source="# new")
    assert sources(path)[-1] == "# after the checkpoint" and sources(path)[0] == "# new"
    saved = jupyter.put(seen, {**jupyter.get(seen)["content"]})
    assert saved["last_modified"] >= models[-1]["last_modified"]
    assert "cells changed" not in await lab.ok("read_notebook", sandbox=handle)


async def first_cell(lab: Lab, handle: str) -> str:
    return read_cells_of(lab, await lab.call("read_notebook", sandbox=handle))[0]


# -- where files cannot be exchanged ----------------------------------------------------------

WITHOUT_EXCHANGE = """
import ctypes, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
RENAMEAT2, ENOSYS = 316, 38
program = b"".join(struct.pack("HBBI", *line) for line in [
    (0x20, 0, 0, 0),                    # the number of the system call
    (0x15, 0, 1, RENAMEAT2),
    (0x06, 0, 0, 0x00050000 | ENOSYS),  # fail
    (0x06, 0, 0, 0x7FFF0000),           # allow
])
buffer = ctypes.create_string_buffer(program)
filter = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(filter)) == 0

import asyncio, json, os
from pathlib import Path
from seer_mcp.notebook import Notebook
from seer_mcp.sharedfile import _exchange

async def main():
    path = Path(sys.argv[1])
    book = Notebook(path)
    book.insert("markdown", "the first")
    await book.save()
    (path.parent / "other").touch()
    assert not _exchange(path, path.parent / "other"), "this system still exchanges"
    os.unlink(path.parent / "other")

    def edited(text):
        theirs = json.loads(path.read_text())
        theirs["cells"].append(
            {"cell_type": "markdown", "id": text, "metadata": {}, "source": text}
        )
        return json.dumps(theirs)

    path.write_text(edited("in-place"))
    book.insert("markdown", "agent 1")
    await book.save()
    Path(f"{path}.new").write_text(edited("beside"))
    os.rename(f"{path}.new", path)
    book.insert("markdown", "agent 2")
    await book.save()
    with path.open("r+") as editor:
        data = edited("late")
        book.insert("markdown", "agent 3")
        await book.save()
        editor.truncate(0)
        editor.write(data)
    await book.close()
    print(json.dumps(sorted(cell["source"][0] for cell in json.loads(path.read_text())["cells"])))

asyncio.run(main())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="it numbers a system call"
)
def test_n04_edits_survive_where_files_cannot_be_exchanged(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXCHANGE, str(tmp_path / "a.ipynb")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    wanted = ["agent 1", "agent 2", "agent 3", "beside", "in-place", "late", "the first"]
    assert json.loads(done.stdout) == wanted
    assert os.listdir(tmp_path) == ["a.ipynb"]
