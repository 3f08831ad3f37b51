"""What remains of a sandbox can be opened again: as a fork, or by the handle of one that ended."""

import json
import shutil
from pathlib import Path

import pytest

from .support import Lab, open_lab, stdio_lab, text_of

pytestmark = pytest.mark.anyio
LONG = "print('é' * 50_000, 'the end')\nfor i in range(20_000): print(i)"


async def test_a_fork_keeps_long_outputs_whole(lab: Lab) -> None:
    first = await lab.start(name="long")
    await lab.cell(first, LONG)
    path = await lab.notebook_path(first)
    fork = await lab.start(name="copy", notebook=str(path), fork=True)
    cell = (await lab.call("read_notebook", sandbox=fork)).meta["seer/cells"][0]["id"]
    pages, cursor = "", "0:0"
    while cursor:
        page = await lab.call("read_outputs", sandbox=fork, cell=cell, cursor=cursor)
        pages += page.content[1].text
        cursor = page.meta["seer/page"]["next"]
    assert pages == "é" * 50_000 + " the end\n" + "".join(f"{i}\n" for i in range(20_000))
    (kept,) = (await lab.notebook_path(fork)).parent.glob("copy.outputs/*.txt")
    assert kept.stat().st_size > 100_000


async def test_the_notebook_of_an_ended_sandbox_is_read_by_its_handle_by_a_later_server(
    tmp_path: Path,
) -> None:
    async with open_lab(tmp_path) as lab:
        handle = await lab.start(name="past")
        await lab.cell(handle, "print('kept')")
        await lab.ok("stop_sandbox", sandbox=handle)
    async with open_lab(tmp_path) as lab:
        listed = await lab.ok("list_sandboxes")
        assert handle in listed and "stopped by stop_sandbox" in listed
        assert "kept" in await lab.ok("read_notebook", sandbox=handle, cells="all", outputs=True)


async def test_a_record_that_names_no_sandbox_is_told_and_others_are_found(tmp_path: Path) -> None:
    async with stdio_lab(tmp_path) as lab:
        good, bad = await lab.start(name="good"), await lab.start(name="bad")
    file = tmp_path / "state" / "sandboxes" / bad / "record.json"
    record = json.loads(file.read_text())
    whole = dict(record)
    for wrong in ({"pid": "x"}, [1], "y", {**record["sandbox"], "pid": None}):
        file.write_text(json.dumps({**record, "sandbox": wrong}))
        async with open_lab(tmp_path, on_exit="keep") as lab:
            listed = await lab.ok("list_sandboxes")
            assert good in listed and "its record cannot be used" in listed
    file.write_text(json.dumps(whole))
    async with open_lab(tmp_path) as lab:
        assert text_of(await lab.cell(bad, "1 + 1")).endswith("2")
        assert text_of(await lab.cell(good, "1 + 1")).endswith("2")


async def test_pages_of_a_run_that_goes_on_join_to_its_exact_text(lab: Lab) -> None:
    """Also where the text is not ASCII and moves into a file between two pages."""
    handle = await lab.start(name="grows")
    source = "import time\nfor i in range(40):\n    print('é' * 3000, i, flush=True)\n    time.sleep(0.05)"
    run = (await lab.cell(handle, source, wait=0)).meta["seer/run"]
    pages, cursor = [], "0:0"
    while cursor:
        page = await lab.call("read_outputs", sandbox=handle, cell=run["cell"], cursor=cursor)
        pages.append(page.content[1].text)
        cursor = page.meta["seer/page"]["next"]
    assert "".join(pages) == "".join(f"{'é' * 3000} {i}\n" for i in range(40))
    assert len(pages) > 8


async def test_a_state_folder_that_was_removed_is_made_anew_and_the_next_server_finds_all(
    tmp_path: Path,
) -> None:
    async with open_lab(tmp_path, on_exit="keep") as lab:
        handle = await lab.start(name="kept")
        await lab.cell(handle, "x = 7")
        shutil.rmtree(tmp_path / "state")
        assert f"{handle}: local" in await lab.ok("list_sandboxes")
        assert "7" in text_of(await lab.cell(handle, "x"))
        async with open_lab(tmp_path) as other:  # what was locked is locked
            assert "another seer-mcp server" in await other.ok("list_sandboxes")
    async with open_lab(tmp_path) as lab:
        assert "7" in text_of(await lab.cell(handle, "x"))
        shutil.rmtree(tmp_path / "state")
        assert "stopped" in await lab.ok("stop_sandbox", sandbox=handle)
        assert (tmp_path / "state").exists() is False
        assert "1 ended" in await lab.ok("list_sandboxes")
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700
