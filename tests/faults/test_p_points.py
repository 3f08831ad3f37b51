"""The server or the kernel host is killed at each named point where state changes hands."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from collections import Counter
from pathlib import Path
from queue import Empty
from typing import Any

import nbformat
import psutil
import pytest

from seer_mcp.kernel_host.fault import POINTS, parse

from ..support import streams
from .ground import Ground, RawServer, raw_text

SOURCE = Path(__file__).parent.parent.parent / "seer_mcp"
COUNTED = """import time
with open('truth', 'a') as truth:
    for i in range(40):
        truth.write(f'a{i}\\n'); truth.flush()
        print(f'line a{i}', flush=True)
        time.sleep(0.004)
"""
LONG = """with open('truth', 'a') as truth:
    for i in range(2500):
        truth.write(f'b{i}\\n')
        print(f'line b{i}', 'x' * 40)
"""
ENDLESS = """import time
with open('truth', 'a') as truth:
    truth.write('c0\\n')
print('line c0', flush=True)
while True:
    time.sleep(0.01)
"""
LINES = {"a": 40, "b": 2500, "c": 1}
# Killed here, the server has not told anybody that the cell exists.
BEFORE_ANY_WORD = ("run.noted",)
LIFE: list[tuple[str, dict[str, Any]]] = [
    ("create_cell", {"source": COUNTED}),
    ("create_cell", {"source": LONG}),
    ("create_cell", {"source": ENDLESS, "wait": 0.3}),
    ("interrupt", {}),
    ("restart_kernel", {}),
    ("write_file", {"path": "note.txt", "content": "kept"}),
    ("stop_sandbox", {}),
]
SERVER = [p for p in POINTS if not p.startswith(("host.", "find."))]
HOST = [p for p in POINTS if p.startswith("host.")]
FIND = [p for p in POINTS if p.startswith("find.")]
# One of each kind of step for every day; all of them in the slow set.
OFTEN = [
    ("sandbox.created", 1),
    ("record.part", 2),
    ("run.saved", 1),
    ("run.accepted", 1),
    ("event.folded", 30),
    ("notebook.part", 3),
    ("spill.written", 1),
    ("stop.gone", 1),
]
OFTEN_HOST = [("host.kernel.created", 1), ("host.sent", 1), ("host.journal.written", 20)]


def call(server: RawServer, tool: str, **arguments: Any) -> dict[str, Any] | None:
    """The answer of a tool, or None if the server died of its fault."""
    number = server.send("tools/call", name=tool, arguments=arguments)
    end = time.monotonic() + 60
    while time.monotonic() < end:
        try:
            message = server._queue.get(timeout=0.05)
        except Empty:
            if server.process.poll() is not None:
                return None
            continue
        if message.get("id") == number and "method" not in message:
            return message["result"]
    raise AssertionError(f"{tool}: no answer, and the server lives")


def open_server(place: Ground, plan: str = "") -> RawServer | None:
    server = RawServer(place, env={"SEER_MCP_FAULT": plan})
    try:
        server.begin()
    except (AssertionError, BrokenPipeError):
        if server.process.poll() != -signal.SIGKILL:
            raise
        server.close()
        return None
    return server


def live(server: RawServer) -> list[dict[str, Any]]:
    """Start a sandbox and do one of everything with it, until the server dies or all is done."""
    answers: list[dict[str, Any]] = []
    try:
        started = call(server, "start_sandbox", name="life")
        if started is None or started.get("isError"):
            return [started] if started else []
        handle = started["_meta"]["seer/sandbox"]["handle"]
        for tool, arguments in LIFE:
            answer = call(server, tool, sandbox=handle, **arguments)
            if answer is None:
                return answers
            answers.append(answer)
    except BrokenPipeError:  # it died between two calls
        server.process.wait(10)
    return answers


def settle(server: RawServer, handle: str) -> None:
    """Wait until no run of the sandbox is open; the endless one is interrupted."""
    end = time.monotonic() + 30
    while time.monotonic() < end:
        book = call(server, "read_notebook", sandbox=handle)
        assert book is not None
        cells = json.loads(Path(book["_meta"]["seer/notebook"]).read_text())["cells"]
        open_cells = [
            c for c in cells if c["metadata"].get("seer", {}).get("state") in ("queued", "running")
        ]
        if not open_cells:
            return
        if any("while True" in "".join(c["source"]) for c in open_cells):
            call(server, "interrupt", sandbox=handle)
        time.sleep(0.1)
    raise AssertionError("a run never ended")


def check(place: Ground, point: str, *, host_died: bool = False) -> None:
    """After the death: the file is whole, the next server tells the truth, nothing ran twice."""
    books = sorted(place.project.glob("outputs/*/*.ipynb"))
    for book in books:
        nbformat.validate(json.loads(book.read_text()))
    server = open_server(place)
    assert server is not None
    try:
        listed = call(server, "list_sandboxes")
        assert listed is not None
        text = raw_text(listed)
        assert "cannot be read" not in text and "names no sandbox" not in text, text
        handles = re.findall(r"\blife-[a-z0-9]{6}\b", text)
        running = {p.environ()["SEER_MCP_SANDBOX"] for p in place.processes()}
        assert running <= set(handles), f"{running} run, {handles} are listed"
        for handle in running:
            settle(server, handle)
            told = call(server, "create_cell", sandbox=handle, source="'still here'")
            assert told is not None and "still here" in raw_text(told)
        counted = Counter(
            line
            for truth in place.project.glob("outputs/*/truth")
            for line in truth.read_text().split()
        )
        assert [line for line, times in counted.items() if times > 1] == [], "something ran twice"
        for book in books:
            check_cells(book, counted, point, host_died)
        for handle in running:
            stopped = call(server, "stop_sandbox", sandbox=handle)
            assert stopped is not None and not stopped.get("isError"), raw_text(stopped)
    finally:
        server.close()
    assert place.processes() == []
    # The folder of a start cut off before its record goes a minute later (the test below).
    cut_off = {f for f in place.files() if f.endswith(".json.part") or "/sandboxes/" in f}
    cut_off = {f for f in cut_off if not (Path(f).parent / "record.json").exists()}
    if point == "host.file.part":  # a file of the user's, in the user's folder: it stays
        cut_off |= {f for f in place.files() if f.endswith(".part") and "note.txt" in f}
    assert [f for f in place.files() - cut_off if f.endswith((".part", "/host"))] == []


def check_cells(book: Path, counted: Counter[str], point: str, host_died: bool) -> None:
    seen: set[str] = set()
    for cell in nbformat.read(book, 4).cells:
        kind = re.search(r"write\(f?'([abc])", cell.source)
        if kind is None:
            continue
        letter = kind[1]
        seen.add(letter)
        facts = cell.metadata.get("seer", {})
        text = streams(cell)
        for name in facts.get("files", {}).values():
            text = (book.parent / name).read_text()
        lines = re.findall(rf"^line ({letter}\d+)", text, re.M)
        assert lines == [f"{letter}{i}" for i in range(len(lines))], "a line twice, or out of order"
        executed = sum(1 for line in counted if line[0] == letter)
        state = facts.get("state", "not_run")
        assert state not in ("queued", "running"), f"{letter} is {state} for ever"
        if state == "complete":
            assert len(lines) == LINES[letter]
        if host_died and point == "host.sent" and letter == "a":
            assert state == "sandbox_lost", "the kernel had it, and nobody knows how far it came"
        if state == "not_run":
            assert executed == 0, f"{letter} is called not run, and it ran"
        if not host_died:
            assert len(lines) == executed, f"{executed} lines printed, {len(lines)} kept ({state})"
        assert len(lines) <= executed
    lost = {line[0] for line in counted} - seen
    assert not lost, f"{point}: {lost} ran and is in no notebook"


def kill_at(place: Ground, point: str, number: int) -> None:
    """The server comes to the point and dies there; all that must hold afterwards holds."""
    plan = f"after:{point}:{number}"
    if point.startswith("find."):
        first = open_server(place)
        assert first is not None
        started = call(first, "start_sandbox", name="life")
        assert started is not None
        handle = started["_meta"]["seer/sandbox"]["handle"]
        call(first, "create_cell", sandbox=handle, source=COUNTED, wait=0.05)
        first.close()
    server = open_server(place, plan)
    if server is not None:
        try:
            if point.startswith("find."):
                call(server, "list_sandboxes")
            live(server)
            died = server.process.poll()
        finally:
            server.close()
        assert died == -signal.SIGKILL, f"{point} was not reached {number} times"
    check(place, point)


def kill_host_at(place: Ground, point: str, number: int) -> None:
    """The kernel host dies at the point: its server says so, and nothing of it is left."""
    server = open_server(place, f"after:{point}:{number}")
    assert server is not None
    try:
        answers = live(server)
        assert server.process.poll() is None, "the server died, not the host"
        texts = [raw_text(answer) for answer in answers]
        gone = [t for t in texts if re.search(r"gone|sandbox_lost|did not start|ended at once", t)]
        stopped = point in ("host.closing", "host.closed")
        assert gone or (stopped and answers), (
            f"{point}: nobody said that the sandbox is gone: {texts}"
        )
        end = time.monotonic() + 15
        while place.processes() and time.monotonic() < end:
            time.sleep(0.05)
        assert [p.cmdline() for p in place.processes()] == []
        assert call(server, "list_sandboxes") is not None
    finally:
        server.close()
    check(place, point, host_died=True)


@pytest.mark.parametrize(("point", "number"), OFTEN)
def test_p01_the_server_is_killed_at(place: Ground, point: str, number: int) -> None:
    kill_at(place, point, number)


@pytest.mark.parametrize(("point", "number"), OFTEN_HOST)
def test_p01_the_host_is_killed_at(place: Ground, point: str, number: int) -> None:
    kill_host_at(place, point, number)


@pytest.mark.slow
@pytest.mark.parametrize("point", [*SERVER, *FIND])
def test_p01_the_server_is_killed_at_every_point(place: Ground, point: str) -> None:
    kill_at(place, point, 1)


# How often one life of a sandbox comes to a point at least.
LATER = {
    "notebook": (2, 5),
    "spill": (2,),
    "link.sen": (2, 5),
    "event": (2, 17),
    "answer": (2, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("point", "number"),
    [
        (p, n)
        for begin, numbers in LATER.items()
        for p in SERVER
        if p.startswith(begin)
        for n in numbers
    ],
)
def test_p01_the_server_is_killed_later_at(place: Ground, point: str, number: int) -> None:
    kill_at(place, point, number)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 4])
@pytest.mark.parametrize("point", HOST)
def test_p01_the_host_is_killed_at_every_point(place: Ground, point: str, number: int) -> None:
    often = ("host.message", "host.journal", "host.page", "host.answer")
    kill_host_at(place, point, number if point.startswith(often) else 1)


def test_every_point_is_one_place_in_the_code() -> None:
    """A point that nobody passes, or a name that is in no list, would test nothing."""
    # The backends pass the same points, each on its way to a machine of its own.
    others = {"ssh.py", "backend.py"}
    files = [p for p in SOURCE.rglob("*.py") if p.name != "fault.py" and p.name not in others]
    text = "\n".join(path.read_text() for path in files)
    named = Counter(re.findall(r'fault_point\("([a-z.-]+)"\)', text))
    stages = re.findall(r'fault_point\(f"\{what\}\.([a-z]+)"\)', text)
    whats = {*re.findall(r'what="([a-z-]+)"', text), "record"} & {p.split(".")[0] for p in POINTS}
    named.update(f"{what}.{stage}" for what in whats for stage in stages)
    assert set(named) == set(POINTS)
    assert [point for point, times in named.items() if times > 1] == []


@pytest.mark.parametrize(
    "plan", ["after", "after:nowhere:1", "after:run.saved:0", "after:run.saved:x", "at:run.saved:1"]
)
def test_a_plan_that_cannot_be_is_refused(place: Ground, plan: str) -> None:
    with pytest.raises(ValueError, match="SEER_MCP_FAULT"):
        parse(plan)
    server = RawServer(place, env={"SEER_MCP_FAULT": plan})
    assert server.process.wait(20) == 2
    server.close()
    assert b"SEER_MCP_FAULT" in (place.folder / "server.log").read_bytes()


def test_a_sandbox_never_hears_of_the_plan(place: Ground) -> None:
    server = open_server(place, "after:host.closed:99")
    assert server is not None
    started = call(server, "start_sandbox", name="life")
    assert started is not None
    handle = started["_meta"]["seer/sandbox"]["handle"]
    code = "import os; [n for n in os.environ if 'FAULT' in n]"
    told = call(server, "create_cell", sandbox=handle, source=code)
    assert told is not None and "[]" in raw_text(told)
    server.close()
    for process in place.processes():
        assert "SEER_MCP_FAULT" not in process.environ()
        assert psutil.pid_exists(os.getpid())


def test_the_folder_of_a_start_that_was_cut_off_goes(place: Ground) -> None:
    server = open_server(place, "after:start.locked:1")
    assert server is not None
    call(server, "start_sandbox", name="life")
    server.close()
    (folder,) = (place.folder / "state" / "sandboxes").iterdir()
    for age, left in ((0, [folder]), (120, [])):
        os.utime(folder, (time.time() - age, time.time() - age))
        again = open_server(place)
        assert again is not None
        call(again, "list_sandboxes")
        again.close()
        assert list(folder.parent.iterdir()) == left
