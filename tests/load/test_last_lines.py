"""What a cell printed last is kept, also if its kernel is ended on purpose in the middle of it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from ..support import Lab, read_cells, streams

pytestmark = pytest.mark.anyio

PRINTING = """\
import os, time
truth = os.open({truth!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for i in range(10_000):
    print("line", i)
    os.write(truth, b"line %d\\n" % i)
    time.sleep(0.003)
"""


@pytest.mark.parametrize("tool", ["restart_kernel", "stop_sandbox"])
async def test_lines_printed_just_before_the_end_are_kept(
    lab: Lab, tmp_path: Path, tool: str
) -> None:
    handle = await lab.start()
    path = await lab.notebook_path(handle)
    truth = tmp_path / "truth"
    await lab.cell(handle, PRINTING.format(truth=str(truth)), wait=0)
    await asyncio.sleep(0.7)
    await lab.ok(tool, sandbox=handle)
    (cell,) = read_cells(path)
    printed, kept = truth.read_text().splitlines(), streams(cell).splitlines()
    assert len(printed) > 10
    assert kept[: len(printed)] == printed  # one more may have been printed and not counted
    assert len(kept) <= len(printed) + 1
    assert cell["metadata"]["seer"]["state"] == "interrupted"
