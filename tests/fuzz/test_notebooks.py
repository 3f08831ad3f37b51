"""Damaged notebooks: opened whole or refused in a sentence, and never made worse."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import nbformat
import pytest

from seer_mcp.errors import NotebookUnreadable
from seer_mcp.ipynb import read_notebook
from seer_mcp.notebook import Notebook
from seer_mcp.sharedfile import stamp

from ..faults.stub_kernel import stub_python
from ..support import open_lab, text_of
from .mutate import cases, damaged, put_strange, remove, report

pytestmark = pytest.mark.anyio
SLOW = 5.0  # seconds for one small file


def whole() -> bytes:
    seer = {"run": "r0123456789", "state": "complete", "started": 1.5, "seconds": 0.2, "since": 3}
    files = {"0": "n.outputs/a-r0123456789-0.txt"}
    outputs: list[dict[str, Any]] = [
        {"output_type": "stream", "name": "stdout", "text": ["a\n", "b\n"]},
        {
            "output_type": "execute_result",
            "data": {"text/plain": ["1"], "application/json": {"x": [1]}, "image/png": "aGk="},
            "metadata": {"seer": {"display_id": "d"}},
            "execution_count": 1,
        },
        {"output_type": "error", "ename": "E", "evalue": "v", "traceback": ["t"]},
    ]
    code = {"cell_type": "code", "metadata": {}, "outputs": [], "execution_count": None}
    cells: list[dict[str, Any]] = [
        {**code, "id": "a", "source": ["x = 1\n", "x"], "outputs": outputs, "execution_count": 1}
        | {"metadata": {"seer": {**seer, "files": files}, "tags": ["t"]}},
        {**code, "id": "b", "source": "y", "metadata": {"seer": {**seer, "state": "running"}}},
        {"cell_type": "markdown", "id": "c", "metadata": {}, "source": "# é \N{SNOWMAN}"},
        {**code, "id": "d", "source": "z"},
    ]
    metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "seer": {"sandbox": "s-abc", "backend": "local", "folded": 17},
    }
    document = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(document, indent=1, ensure_ascii=False).encode()


async def open_and_save(path: Path, as_copy: bool) -> str:
    """What became of it: refused, or opened, worked on and saved."""
    try:
        seen = stamp(path)
        cells, metadata = read_notebook(path, as_copy=as_copy)
    except NotebookUnreadable as error:
        assert str(path) in str(error) and len(str(error)) < 3000
        return "refused"
    document = Notebook(path, cells, metadata, seen)
    document.rewind()
    document.forget_runs()
    before = [(cell.id, cell.source) for cell in document.cells]
    made = document.insert("code", "new")
    document.begin(made, "rabcdefabcd")
    first = document.folded + 1
    run = {"run": "rabcdefabcd"}
    stream = {"type": "stream", "name": "stdout", "text": "out\n"}
    update = {"type": "update", "data": {"text/plain": "2"}, "metadata": {}, "display_id": "d"}
    for n, event in enumerate(({"type": "start", "t": 1.0}, stream, update), first):
        document.fold({"n": n, **run, **event})
    document.finish("rabcdefabcd", "complete", "")
    for cell in document.cells:
        if cell.kind == "code":
            cell.live().pieces()
    await document.save()
    nbformat.validate(json.loads(path.read_text()))
    again, _ = read_notebook(path)
    assert [(c["id"], c["source"]) for c in again] == [*before, (made.id, "new")]
    return "opened"


async def fuzz(folder: Path, count: int) -> Counter[str]:
    found: Counter[str] = Counter()
    original = whole()
    for name, random in cases("notebook", count):
        path = folder / "n.ipynb"
        strange = random.random() < 0.05
        data = damaged(random, original)
        what = put_strange(random, path) if strange else ""
        if not strange:
            path.write_bytes(data)
        began = time.monotonic()
        try:
            outcome = await open_and_save(path, random.random() < 0.3)
            assert time.monotonic() - began < SLOW
            assert not (strange and outcome == "opened")
            if outcome == "refused" and not strange:
                assert path.read_bytes() == data, "a refused file was changed"
        except BaseException as error:
            error.add_note(f"case {name}, {what or data[:2000]!r}")
            raise
        remove(path)
        found[outcome] += 1
    return found


async def test_damaged_notebooks_are_opened_whole_or_refused(tmp_path: Path) -> None:
    found = await fuzz(tmp_path, 100)
    assert found["refused"] > 20 and found["opened"] > 5


@pytest.mark.slow
async def test_a_thousand_damaged_notebooks(tmp_path: Path) -> None:
    found = await fuzz(tmp_path, 1000)
    report("notebooks", {"cases": found.total(), **found, "failures": 0})


async def test_damaged_notebooks_through_the_whole_server(tmp_path: Path) -> None:
    """Of twenty, those that can be opened work; those that cannot leave nothing behind."""
    found: Counter[str] = Counter()
    original = whole()
    async with open_lab(tmp_path, python=str(stub_python(tmp_path))) as lab:
        for name, random in cases("served", 20):
            path = tmp_path / "project" / f"{name}.ipynb"
            data = damaged(random, original)
            path.write_bytes(data)
            result = await lab.call("start_sandbox", notebook=path.name)
            if result.is_error:
                assert "Traceback" not in text_of(result) and path.name in text_of(result), name
                assert path.read_bytes() == data, name
                found["refused"] += 1
                continue
            handle = result.meta["seer/sandbox"]["handle"]
            assert "hello" in await lab.ok("create_cell", sandbox=handle, source="hello"), name
            await lab.ok("read_notebook", sandbox=handle, cells="all", outputs=True)
            await lab.ok("stop_sandbox", sandbox=handle)
            nbformat.validate(json.loads(path.read_text()))
            found["opened"] += 1
        assert "0 running" in await lab.ok("list_sandboxes")
    assert found["refused"] and found["opened"]


async def test_what_is_nested_too_deep_to_be_written_again_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "n.ipynb"
    for depth in (100, 250, 600, 950, 5000):
        head, tail = whole().split(b'"tags"')
        path.write_bytes(head + b'"deep": ' + b"[" * depth + b"]" * depth + b', "tags"' + tail)
        assert await open_and_save(path, False) == ("opened" if depth == 100 else "refused")
