"""A full disk, under the notebook and under the journal: nothing half written, nothing lost unsaid.

The disks are small tmpfs, which only root can mount; without root these tests are skipped, and the
limit on the size of a file (RLIMIT_FSIZE on a server process) is what remains of them.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nbformat
import pytest
from mcp import Client

from seer_mcp.server import build_server

from ..support import Lab, read_cells, streams, text_of, until
from .ground import Ground, raw_server, raw_start, raw_text

pytestmark = pytest.mark.anyio

needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="only root can mount a small disk"
)


class Disk:
    """A small file system of its own."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.filler = path / "filler"

    def fill(self, leave: int = 0) -> None:
        """Take all room but `leave` bytes."""
        with self.filler.open("ab", buffering=0) as file:
            room = os.statvfs(self.path).f_bavail * os.statvfs(self.path).f_frsize - leave
            file.write(b"x" * max(0, room))

    def free(self) -> None:
        self.filler.unlink(missing_ok=True)

    def resize(self, size: str) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(self.path)], check=True)


@contextmanager
def small_disk(path: Path, size: str) -> Iterator[Disk]:
    path.mkdir(parents=True)
    kind = ["mount", "-t", "tmpfs", "-o", f"size={size},mode=0700", "tmpfs", str(path)]
    subprocess.run(kind, check=True)
    try:
        yield Disk(path)
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def lab_of(place: Ground, **changes: object) -> Client:
    return Client(build_server(place.config(**changes)))


# -- N02: under the notebook ------------------------------------------------------------------


@needs_root
async def test_n02_a_full_disk_leaves_the_old_file_or_the_new_one_whole(place: Ground) -> None:
    with small_disk(place.folder / "small", "256k") as disk:
        async with lab_of(place, outputs_dir=disk.path) as client:
            lab = Lab(client, place.folder)
            handle = await lab.start()
            path = await lab.notebook_path(handle)
            first = (await lab.cell(handle, "print('before')")).meta["seer/run"]["cell"]
            disk.fill()
            before = path.read_bytes()

            result = await lab.cell(handle, "print('z' * 50_000); 6 * 7")
            text = text_of(result)
            assert not result.is_error and ": complete in" in text and text.endswith("42")
            assert f"NOT SAVED: {path}: the disk is full (No space left on device)" in text
            assert path.read_bytes() == before, "the old file is as it was"
            second = result.meta["seer/run"]["cell"]
            for tool, arguments in (
                ("read_outputs", {"cell": first}),
                ("read_notebook", {}),
                ("restart_kernel", {}),
                ("run_cell", {"cells": first}),
            ):
                assert "NOT SAVED" in await lab.ok(tool, sandbox=handle, **arguments), tool
            assert "NOT SAVED" in await lab.ok("list_sandboxes")
            for tool, arguments in (
                ("edit_cell", {"cell": first, "source": "print('edited')"}),
                ("create_cell", {"source": "# made on a full disk", "run": False}),
            ):
                text = await lab.no(tool, sandbox=handle, **arguments)
                assert "the disk is full" in text and "do not repeat it" in text
            assert path.read_bytes() == before
            assert os.listdir(path.parent) == [path.name], "nothing half written beside it"

            disk.free()
            await until(lambda: path.read_bytes() != before)  # by itself
            text = await lab.ok("read_notebook", sandbox=handle)
            assert "NOT SAVED" not in text
            book = nbformat.read(path, as_version=4)
            nbformat.validate(book)
            assert [c.source for c in book.cells] == [
                "print('edited')",
                "print('z' * 50_000); 6 * 7",
                "# made on a full disk",
            ]
            assert streams(read_cells(path)[1]) == "z" * 50_000 + "\n"
            assert book.cells[1].id == second


@needs_root
async def test_n02_long_output_waits_for_room_and_is_whole_after(place: Ground) -> None:
    with small_disk(place.folder / "small", "512k") as disk:
        async with lab_of(place, outputs_dir=disk.path) as client:
            lab = Lab(client, place.folder)
            handle = await lab.start()
            path = await lab.notebook_path(handle)
            wanted = "".join(f"line {i} {'é' * 50}\n" for i in range(12_000))
            code = "for i in range(12_000): print('line', i, 'é' * 50)"
            result = await lab.cell(handle, code)
            text = text_of(result)
            assert ": complete in" in text and "NOT SAVED" in text
            cell = result.meta["seer/run"]["cell"]
            assert f"output of cell {cell} waits in memory" in text
            assert await pages(lab, handle, cell=cell) == wanted, "all of it can be read at once"
            command = await lab.call(
                "run_command", sandbox=handle, command="seq 1 100000 | sed 's/$/ of a command/'"
            )
            counted = "".join(f"{i} of a command\n" for i in range(1, 100_001))
            run = command.meta["seer/run"]["id"]
            assert await pages(lab, handle, run=run) == counted
            answer = await lab.ok("create_cell", sandbox=handle, source="'the link lives'")
            assert "the link lives" in answer
            noted = read_cells(path)[0]["metadata"]["seer"]
            assert noted["state"] in ("queued", "running"), "another server would fold it again"

            disk.resize("16m")
            spill = next(path.with_name(f"{path.stem}.outputs").glob(f"{cell}-*"))
            await until(lambda: spill.read_text() == wanted)
            assert await pages(lab, handle, cell=cell) == wanted
            assert await pages(lab, handle, run=run) == counted
            assert "NOT SAVED" not in await lab.ok("read_notebook", sandbox=handle)
            await until(lambda: read_cells(path)[0]["metadata"]["seer"]["state"] == "complete")


async def pages(lab: Lab, handle: str, **which: str) -> str:
    """The exact text of a run, read page by page."""
    cursor, parts = "0:0", []
    while cursor:
        result = await lab.call("read_outputs", sandbox=handle, **which, cursor=cursor)
        assert not result.is_error, text_of(result)
        parts.append(result.content[1].text)
        cursor = result.meta["seer/page"]["next"]
    return "".join(parts)


@needs_root
async def test_n02_the_next_server_completes_what_had_no_room(place: Ground) -> None:
    with small_disk(place.folder / "small", "512k") as disk:
        settings = {"outputs_dir": disk.path, "on_exit": "detach"}
        async with lab_of(place, **settings) as client:
            lab = Lab(client, place.folder)
            handle = await lab.start()
            path = await lab.notebook_path(handle)
            code = "for i in range(20_000): print('line', i, 'y' * 50)"
            result = await lab.cell(handle, code)
            assert "NOT SAVED" in text_of(result)
        disk.resize("16m")
        async with lab_of(place, **settings) as client:
            lab = Lab(client, place.folder)
            cell = result.meta["seer/run"]["cell"]
            wanted = "".join(f"line {i} {'y' * 50}\n" for i in range(20_000))
            assert await pages(lab, handle, cell=cell) == wanted
            assert ": complete in" in await lab.ok("read_outputs", sandbox=handle, cell=cell)
            await until(lambda: read_cells(path)[0]["metadata"]["seer"]["state"] == "complete")
            await lab.ok("stop_sandbox", sandbox=handle)


@needs_root
@pytest.mark.parametrize("who", ["this server", "the next server"])
async def test_n02_a_sandbox_stopped_on_a_full_disk_is_saved_later(place: Ground, who: str) -> None:
    with small_disk(place.folder / "small", "256k") as disk:
        async with lab_of(place, outputs_dir=disk.path) as client:
            lab = Lab(client, place.folder)
            handle = await lab.start()
            path = await lab.notebook_path(handle)
            # The code is on the disk before the disk is full, so that only its end is not.
            (place.folder / "go").unlink(missing_ok=True)
            wait = f"import os, time\nwhile not os.path.exists({str(place.folder / 'go')!r}): time.sleep(0.01)\n"
            result = await lab.cell(handle, f"{wait}print('the end')", wait=0)
            await until(lambda: read_cells(path)[0]["metadata"]["seer"]["state"] == "running")
            disk.fill()
            before = path.read_bytes()
            (place.folder / "go").touch()
            cell = result.meta["seer/run"]["cell"]
            assert "the end" in await lab.ok("read_outputs", sandbox=handle, cell=cell)
            text = await lab.ok("stop_sandbox", sandbox=handle)
            assert "NOT SAVED" in text and path.read_bytes() == before
            assert place.processes() == []
            if who == "this server":
                disk.free()
                await until(lambda: path.read_bytes() != before)
        if who == "the next server":
            assert path.read_bytes() == before
            disk.free()
            async with lab_of(place, outputs_dir=disk.path) as client:
                await Lab(client, place.folder).ok("list_sandboxes")
                await until(lambda: path.read_bytes() != before)
        saved = read_cells(path)[0]
        assert streams(saved) == "the end\n"
        assert saved["metadata"]["seer"]["state"] == "complete"
        record = json.loads((place.folder / "state/sandboxes" / handle / "record.json").read_text())
        assert record["ended"]


async def test_n02_a_limit_on_file_size_is_said_and_no_file_is_half_written(place: Ground) -> None:
    """What works without root: the kernel refuses to let the server's files grow."""
    with raw_server(place) as server:
        handle = raw_start(server)
        path = Path(server.call("read_notebook", sandbox=handle)["_meta"]["seer/notebook"])
        before = path.read_bytes()
        pid, unlimited = server.process.pid, resource.RLIM_INFINITY
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (len(before) + 1000, unlimited))
        answer = server.call("create_cell", sandbox=handle, source="print('z' * 200_000)")
        text = raw_text(answer)
        assert ": complete in" in text and "NOT SAVED" in text and "too large" in text
        assert nbformat.read(path, as_version=4).cells[0].source == "print('z' * 200_000)"
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (unlimited, unlimited))
        assert not server.call("create_cell", sandbox=handle, source="1").get("isError")
        text = raw_text(server.call("read_notebook", sandbox=handle))
        assert "NOT SAVED" not in text
        seer = read_cells(path)[0]["metadata"]["seer"]
        assert (path.parent / seer["files"]["0"]).read_text() == "z" * 200_000 + "\n"
        assert not server.call("stop_sandbox", sandbox=handle).get("isError")


async def test_n02_what_a_killed_server_had_no_room_for_is_folded_again(place: Ground) -> None:
    """The notebook can be saved, the long output beside it cannot; then the server is killed."""
    wanted = "".join(f"line {i} {'y' * 50}\n" for i in range(20_000))
    with raw_server(place, "--on-exit", "keep") as server:
        handle = raw_start(server)
        path = Path(server.call("read_notebook", sandbox=handle)["_meta"]["seer/notebook"])
        resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (300_000, -1))
        code = "for i in range(20_000): print('line', i, 'y' * 50)"
        answer = server.call("create_cell", sandbox=handle, source=code)
        cell = answer["_meta"]["seer/run"]["cell"]
        assert f"output of cell {cell} waits in memory" in raw_text(answer)
        noted = read_cells(path)[0]["metadata"]["seer"]
        spill = path.parent / noted["files"]["0"]
        assert noted["state"] == "running" and spill.stat().st_size < len(wanted)
    with raw_server(place, "--on-exit", "stop") as server:
        answer = server.call("read_outputs", sandbox=handle, cell=cell)
        assert ": complete in" in raw_text(answer) and "NOT SAVED" not in raw_text(answer)
        assert spill.read_text() == wanted
        assert not server.call("stop_sandbox", sandbox=handle).get("isError")
    assert read_cells(path)[0]["metadata"]["seer"]["state"] == "complete"


# -- D01: under journal and state -------------------------------------------------------------


@needs_root
async def test_d01_a_full_disk_under_the_journal_stops_no_cell_and_the_loss_is_counted(
    place: Ground,
) -> None:
    with small_disk(place.folder / "state", "4m") as disk:
        async with lab_of(place) as client:
            lab = Lab(client, place.folder)
            handle = await lab.start()
            disk.fill()
            # 20 MB: far more than the host keeps in memory.
            code = "for i in range(200): print(f'{i:06} ' + 'w' * 100_000)\nkept = 1"
            result = await lab.cell(handle, code)
            text = text_of(result)
            assert ": complete in" in text, text[:500]
            lost = re.search(r"OUTPUT LOST: .* ([\d,]+) bytes of output could not be kept", text)
            assert lost is not None, "the loss is said in the answer"
            cell = result.meta["seer/run"]["cell"]
            kept = await pages(lab, handle, cell=cell)
            missing = 200 * 100_008 - len(kept)
            assert 0 < missing <= int(lost[1].replace(",", "")) < missing * 1.1 + 100_000
            assert kept.startswith("000000 www") and len(kept) > 4_000_000
            assert ": complete in" in await lab.ok("create_cell", sandbox=handle, source="kept")
            assert "1 running" in await lab.ok("list_sandboxes")
            disk.resize("64m")
            text = await lab.ok("create_cell", sandbox=handle, source="print('w' * 300_000); kept")
            assert text.endswith("1")
            after = json.loads("[" + ",".join(_journal(place, handle)) + "]")
            assert [event["n"] for event in after] == list(range(1, len(after) + 1))
            assert [e["bytes"] for e in after if e["type"] == "lost"]
            await lab.ok("stop_sandbox", sandbox=handle)
            assert place.processes() == []


def _journal(place: Ground, handle: str) -> list[str]:
    path = place.folder / "state" / "sandboxes" / handle / "journal.jsonl"
    return path.read_text().splitlines()


@needs_root
@pytest.mark.parametrize("room", [0, 8_192, 65_536])
async def test_d01_a_start_on_a_full_disk_fails_clearly_and_leaves_nothing(
    place: Ground, room: int
) -> None:
    with small_disk(place.folder / "state", "2m") as disk:
        async with lab_of(place) as client:
            lab = Lab(client, place.folder)
            await lab.ok("list_sandboxes")
            disk.fill(leave=room)
            before = place.files()
            text = await lab.no("start_sandbox", name="full")
            assert "the disk is full" in text or "No space left" in text, text
            assert "Nothing was left running" in text and len(text) < 2000
            assert place.processes() == []
            assert place.files() == before
            disk.free()
            handle = await lab.start(name="full")
            assert (await lab.ok("create_cell", sandbox=handle, source="6 * 7")).endswith("42")
            disk.fill()
            await lab.ok("stop_sandbox", sandbox=handle)
            assert place.processes() == []
            assert "0 running" in await lab.ok("list_sandboxes")
            await asyncio.sleep(0)
