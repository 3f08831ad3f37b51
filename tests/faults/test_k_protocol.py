"""FAULTS.md, K: a kernel that says things in an order, or of a shape, that no kernel should.

The kernel is the stub of stub_kernel/: a real process behind the real host, that plays a script.
Whatever it says, a run ends in exactly one true state, what it puts out lands in its own cell, and
nothing hangs.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import nbformat
import pytest

from seer_mcp.notebook import UNFINISHED

from ..support import Lab, open_lab, read_cells, streams
from .stub_kernel import script, stub_python

pytestmark = pytest.mark.anyio

Step = dict[str, Any]
BUSY: Step = {"busy": 1}
IDLE: Step = {"idle": 1}
OK: Step = {"reply": "ok"}
ERROR: Step = {"reply": "error", "content": {"ename": "Boom", "evalue": "b", "traceback": ["Boom"]}}


def out(text: str, **more: Any) -> Step:
    return {"stdout": text + "\n", **more}


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def shared(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Lab, str]]:
    folder = tmp_path_factory.mktemp("protocol")
    async with open_lab(folder, python=str(stub_python(folder))) as lab:
        yield lab, await lab.start(name="stub")


@pytest.fixture
async def box(shared: tuple[Lab, str]) -> tuple[Lab, str]:
    lab, handle = shared
    listed = await lab.ok("list_sandboxes")
    if "kernel ready" not in listed or "running or queued" in listed:  # as a failed test left it
        await lab.ok("restart_kernel", sandbox=handle)
    return lab, handle


async def saved(lab: Lab, handle: str, cell: str) -> dict[str, Any]:
    path = await lab.notebook_path(handle)
    nbformat.validate(nbformat.read(path, 4))
    return next(c for c in read_cells(path) if c["id"] == cell)


async def play(lab: Lab, handle: str, *steps: Step, wait: float = 10.0) -> tuple[str, str, str]:
    """Run a script: the cell's id, its state as the file has it, and what stands on its stdout."""
    result = await lab.cell(handle, script(*steps), wait=wait)
    run = result.meta["seer/run"]
    for _ in range(50):  # a busy machine may not have begun it
        if run["state"] != "queued":
            break
        result = await lab.call("read_outputs", sandbox=handle, run=run["id"], wait=0.4)
        run = result.meta["seer/run"]
    cell = await saved(lab, handle, run["cell"])
    for _ in range(50 if run["state"] in UNFINISHED else 0):
        if cell["metadata"]["seer"]["state"] == run["state"]:
            break
        await asyncio.sleep(0.1)  # what goes on is saved from time to time, what has ended at once
        cell = await saved(lab, handle, run["cell"])
    assert cell["metadata"]["seer"]["state"] == run["state"]
    return run["cell"], run["state"], streams(cell)


async def echoes(lab: Lab, handle: str) -> None:
    """The next cell is whole and has only its own output."""
    text = await lab.ok("create_cell", sandbox=handle, source="next one")
    assert "complete" in text
    assert text.splitlines()[1:] == ["next one", "8"]


ENDING_ORDERS: dict[str, tuple[list[Step], str, str]] = {
    "in order": ([BUSY, out("a"), OK, IDLE], "complete", "a\n"),
    "idle before reply": ([BUSY, out("a"), IDLE, OK], "complete", "a\n"),
    "reply before outputs": ([BUSY, OK, out("a"), IDLE], "complete", "a\n"),
    "reply first of all": ([OK, BUSY, out("a"), IDLE], "complete", "a\n"),
    "never busy": ([out("a"), OK, IDLE], "complete", "a\n"),
    "idle twice": ([BUSY, out("a"), IDLE, IDLE, OK, IDLE], "complete", "a\n"),
    "reply twice": ([BUSY, out("a"), OK, OK, IDLE], "complete", "a\n"),
    "reply after the end, of another kind": (
        [BUSY, out("a"), OK, IDLE, ERROR, IDLE],
        "complete",
        "a\n",
    ),
    "two replies, the first counts": (
        [BUSY, out("a"), OK, ERROR, {"sleep": 0.2}, IDLE],
        "complete",
        "a\n",
    ),
    "reply late": ([BUSY, out("a"), IDLE, {"sleep": 0.3}, OK], "complete", "a\n"),
    "idle late": ([BUSY, out("a"), OK, {"sleep": 0.3}, IDLE], "complete", "a\n"),
    "busy again": ([BUSY, out("a"), OK, IDLE, BUSY], "complete", "a\n"),
    "error": ([BUSY, out("a"), ERROR, IDLE], "error", "a\n"),
    "error, idle first": ([BUSY, IDLE, out("a"), ERROR], "error", "a\n"),
    "aborted": ([BUSY, {"reply": "aborted"}, IDLE], "not_run", ""),
    "a status nobody knows": ([BUSY, {"reply": "perhaps"}, IDLE], "not_run", ""),
    "a state nobody knows": (
        [BUSY, {"say": "status", "content": {"execution_state": "asleep"}}, OK, IDLE],
        "complete",
        "",
    ),
    "another parent's idle": (
        [OK, {"idle": 1, "parent": "unknown"}, out("a"), IDLE],
        "complete",
        "a\n",
    ),
    "no parent": ([out("a", parent="none"), OK, IDLE], "complete", "a\n"),
    "unknown parent": ([out("a", parent="unknown"), OK, IDLE], "complete", "a\n"),
    "huge parent": ([out("a", parent={"huge": 5_000_000}), OK, IDLE], "complete", "a\n"),
    "ends": ([BUSY, out("a"), {"exit": 3}], "kernel_died", "a\n"),
    "ends between reply and idle": ([BUSY, out("a"), OK, {"exit": 3}], "kernel_died", "a\n"),
    "ends between idle and reply": ([BUSY, out("a"), IDLE, {"exit": 0}], "kernel_died", "a\n"),
    "ends after all was said": ([BUSY, out("a"), OK, IDLE, {"kill": 9}], "complete", "a\n"),
}


@pytest.mark.parametrize("order", ENDING_ORDERS)
async def test_k_order_that_ends_a_run(box: tuple[Lab, str], order: str) -> None:
    lab, handle = box
    steps, state, text = ENDING_ORDERS[order]
    _, found, printed = await play(lab, handle, *steps)
    assert (found, printed) == (state, text)
    if any("exit" in step or "kill" in step for step in steps):
        await until_dead(lab, handle)
        assert "kernel died" in await lab.no("create_cell", sandbox=handle, source="more")
        await lab.ok("restart_kernel", sandbox=handle)
    await echoes(lab, handle)


async def until_dead(lab: Lab, handle: str) -> None:
    for _ in range(200):
        if "kernel dead" in await lab.ok("list_sandboxes"):
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the death was not noticed")


NESTED = 30_000
BROKEN: dict[str, Step] = {
    "signed with another key": out("forged", sign="wrong"),
    "not signed": out("forged", sign="none"),
    "no parts": {"raw": ["x"]},
    "no JSON": {"raw": ["<IDS|MSG>", "", "{", "{", "{", "{"]},
    "too few parts": {"raw": ["<IDS|MSG>", "", "{}"]},
    "empty parts": {"raw": ["<IDS|MSG>", "", "", "", "", ""]},
    "no reply": {"raw": ["x"], "on": "shell"},
    "parent is a list": out("x", parent={"literal": [1, 2]}),
    "parent's id is a list": {"idle": 1, "parent": {"literal": {"msg_id": [1]}}},
    "parent's id is an object": {"reply": "ok", "parent": {"literal": {"msg_id": {}}}},
    "parent's date is no date": out("x", parent={"literal": {"date": "9999-99-99T99:99:99.9Z"}}),
    "status without a state": {"say": "status"},
    "status that is a list": {"say": "status", "content": [1]},
    "stream without text": {"say": "stream", "content": {"name": "stdout"}},
    "stream whose text is a number": {"say": "stream", "content": {"name": "stdout", "text": 5}},
    "display without data": {"say": "display_data", "content": {}},
    "display whose data is text": {"say": "display_data", "content": {"data": "x"}},
    "error without a name": {"say": "error", "content": {"traceback": 5}},
    "reply that is a list": {"say": "execute_reply", "on": "shell", "content": [1]},
    "reply whose payload is a number": {
        "say": "execute_reply",
        "on": "shell",
        "content": {"status": "ok", "payload": 7},
    },
    "reply with a page that is a number": {
        "say": "execute_reply",
        "on": "shell",
        "content": {"status": "ok", "payload": [{"source": "page", "data": 5}, 7]},
    },
    "reply with a count that is none": {
        "say": "execute_reply",
        "on": "shell",
        "content": {"status": "ok", "execution_count": [-1]},
    },
    "result with a count below zero": {
        "say": "execute_result",
        "content": {"data": {"text/plain": "7"}, "metadata": {}, "execution_count": -1},
    },
    "display of a kind that must be text": {
        "say": "display_data",
        "content": {"data": {"text/json": {"x": [1]}, "no mime": 5}, "metadata": {}},
    },
    "display whose id is a list": {
        "say": "display_data",
        "content": {"data": {"text/plain": "7"}, "transient": {"display_id": [1]}},
    },
    "display whose transient is text": {
        "say": "update_display_data",
        "content": {"data": {"text/plain": "7"}, "transient": "x"},
    },
    "update of no display": {
        "say": "update_display_data",
        "content": {"data": {"text/plain": "7"}, "metadata": {}},
    },
    "stream whose name is a number": {"say": "stream", "content": {"name": 5, "text": "x"}},
    "a kind nobody knows": {"say": "surprise", "content": {"x": 1}},
    "a kind that is no text": {"say": ["stream"], "content": {"name": "stdout", "text": "x"}},
    "nested beyond any parser": {"say": "display_data", "json": "[" * NESTED + "]" * NESTED},
    "a number too long": {"say": "status", "json": '{"execution_state": ' + "9" * 10_000 + "}"},
    "a sending that was none": {
        "say": "status",
        "content": {"execution_state": "busy"},
        "parent": {"literal": {"seer_sending": "x"}},
    },
}


@pytest.mark.parametrize("broken", BROKEN)
async def test_k_a_message_that_breaks_the_protocol_is_passed_over(
    box: tuple[Lab, str], broken: str
) -> None:
    lab, handle = box
    _, state, printed = await play(lab, handle, BUSY, BROKEN[broken], out("after"), OK, IDLE)
    assert (state, printed) == ("complete", "after\n")
    await echoes(lab, handle)


# -- runs that the kernel does not end ----------------------------------------------------------

ENDLESS: dict[str, list[Step]] = {
    "replied, never idle": [BUSY, out("a"), OK],
    "idle, never replied": [BUSY, out("a"), IDLE],
    "busy only": [BUSY, out("a")],
    "nothing but an output": [out("a")],
    "idle of another parent": [BUSY, out("a"), OK, {"idle": 1, "parent": "unknown"}],
    "reply to nobody": [BUSY, out("a"), {"reply": "ok", "parent": "none"}, IDLE],
    "reply on the wrong channel": [
        out("a"),
        {"say": "execute_reply", "on": "iopub", "content": {"status": "ok"}},
        IDLE,
    ],
}


@pytest.mark.parametrize("order", ENDLESS)
async def test_k_a_run_that_is_not_ended_can_be_interrupted(
    box: tuple[Lab, str], order: str
) -> None:
    """`complete` only after the reply and idle; until then it runs, and an interrupt gets out of it."""
    lab, handle = box
    cell, state, printed = await play(lab, handle, *ENDLESS[order], wait=0.4)
    assert (state, printed) == ("running", "a\n")
    waiting = await lab.call("create_cell", sandbox=handle, source="waits", wait=0)
    assert waiting.meta["seer/run"]["state"] == "queued"
    text = await lab.ok("interrupt", sandbox=handle)
    assert f"cell {cell}: interrupted" in text
    found = await saved(lab, handle, cell)
    assert found["metadata"]["seer"]["state"] == "interrupted" and streams(found) == "a\n"
    replied = order in ("replied, never idle", "idle of another parent")
    assert ("had answered" if replied else "never said how") in found["metadata"]["seer"]["why"]
    await lab.ok("read_outputs", sandbox=handle, run=waiting.meta["seer/run"]["id"], wait=10)
    queued = await saved(lab, handle, waiting.meta["seer/run"]["cell"])
    assert streams(queued) == "waits\n", "the queue goes on behind it"
    await echoes(lab, handle)


async def test_k_a_run_that_is_not_ended_ends_with_a_restart(box: tuple[Lab, str]) -> None:
    lab, handle = box
    cell, state, _ = await play(lab, handle, {"deaf": 1}, out("a"), {"sleep": 60}, wait=0.4)
    assert state == "running"
    waiting = await lab.call("create_cell", sandbox=handle, source="waits", wait=0)
    await lab.ok("restart_kernel", sandbox=handle)
    found = await saved(lab, handle, cell)
    assert found["metadata"]["seer"]["state"] == "interrupted" and streams(found) == "a\n"
    queued = await saved(lab, handle, waiting.meta["seer/run"]["cell"])
    assert queued["metadata"]["seer"]["state"] == "not_run" and not queued["outputs"]
    await echoes(lab, handle)


async def test_k_an_interrupt_that_is_heard(box: tuple[Lab, str]) -> None:
    lab, handle = box
    cell, state, _ = await play(lab, handle, BUSY, out("a"), {"sleep": 60}, wait=0.4)
    assert state == "running"
    await lab.ok("interrupt", sandbox=handle)
    found = await saved(lab, handle, cell)
    assert found["metadata"]["seer"]["state"] == "interrupted"
    assert [o.get("ename") for o in found["outputs"]] == [None, "KeyboardInterrupt"]
    await echoes(lab, handle)


# -- whose output it is -------------------------------------------------------------------------


async def test_k_output_goes_to_the_cell_that_it_names(box: tuple[Lab, str]) -> None:
    lab, handle = box
    first, state, _ = await play(lab, handle, BUSY, out("one"), OK, IDLE)
    assert state == "complete"
    second, state, printed = await play(
        lab,
        handle,
        out("of the first", parent="previous"),
        BUSY,
        out("two"),
        out("of the first too", parent="previous"),
        {"idle": 1, "parent": "previous"},
        {"reply": "error", "parent": "previous"},
        out("two more"),
        OK,
        IDLE,
    )
    assert (state, printed) == ("complete", "two\ntwo more\n")
    earlier = await saved(lab, handle, first)
    assert streams(earlier) == "one\nof the first\nof the first too\n"
    assert earlier["metadata"]["seer"]["state"] == "complete", "what ended stays as it ended"
    assert earlier["metadata"]["seer"]["late"] == 2
    assert second != first


async def test_k_an_update_without_an_id_changes_no_display(box: tuple[Lab, str]) -> None:
    lab, handle = box
    first, _, _ = await play(lab, handle, {"display": {"text/plain": "kept"}}, OK, IDLE)
    update = {"data": {"text/plain": "another"}, "metadata": {}, "transient": {}}
    await play(lab, handle, {"say": "update_display_data", "content": update}, OK, IDLE)
    found = await saved(lab, handle, first)
    assert [o["data"]["text/plain"] for o in found["outputs"]] == [["kept"]]


async def test_k_output_after_idle_is_kept_where_it_belongs(box: tuple[Lab, str]) -> None:
    lab, handle = box
    late = [out("late 1"), {"result": "7"}, out("late 2", times=2)]
    first, state, printed = await play(
        lab, handle, out("in time"), {"later": 0.3, "steps": late}, OK, IDLE, out("at once")
    )
    assert state == "complete" and printed.startswith("in time\n")
    result = await lab.cell(handle, script(BUSY, out("mine"), {"sleep": 0.6}, OK, IDLE))
    assert result.meta["seer/run"]["state"] == "complete"
    await echoes(lab, handle)
    earlier = await saved(lab, handle, first)
    assert streams(earlier) == "in time\nat once\nlate 1\nlate 2\nlate 2\n"
    assert earlier["metadata"]["seer"]["late"] in (4, 5)
    own = await saved(lab, handle, result.meta["seer/run"]["cell"])
    assert streams(own) == "mine\n"


async def test_k_cells_of_one_call_stop_at_the_first_that_fails(box: tuple[Lab, str]) -> None:
    lab, handle = box
    sources = [script(OK, IDLE), script(ERROR, IDLE), "never"]
    cells = [
        (await lab.cell(handle, source, run=False)).meta["seer/cell"]  # written, not run
        for source in sources
    ]
    result = await lab.call("run_cell", sandbox=handle, cells=" ".join(cells))
    assert result.is_error
    states = [(await saved(lab, handle, c))["metadata"]["seer"]["state"] for c in cells]
    assert states == ["complete", "error", "not_run"]
    await echoes(lab, handle)


async def test_k_what_is_nested_too_deep_is_cut_and_says_so(box: tuple[Lab, str]) -> None:
    lab, handle = box
    deep: Any = "at the bottom"
    for _ in range(300):
        deep = [deep]
    cell, state, _ = await play(lab, handle, {"display": {"application/json": deep}}, OK, IDLE)
    assert state == "complete"
    text = str((await saved(lab, handle, cell))["outputs"])
    assert "nested deeper than 100 levels: left out" in text and "at the bottom" not in text
    await echoes(lab, handle)
