"""The notebook file: valid at every instant, never half written, opened without loss or not at all."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import pytest

from ..support import Lab, read_cells, streams, text_of
from .ground import Ground, http_server

pytestmark = pytest.mark.anyio


class Reader(threading.Thread):
    """Somebody who reads the file all the time, as an editor or a syncing folder does."""

    def __init__(self, path: Path) -> None:
        super().__init__(daemon=True)
        self.path = path
        self.reads = 0
        self.bad: list[str] = []
        self.most_outputs = 0
        self._stop_now = threading.Event()

    def run(self) -> None:
        while not self._stop_now.is_set():
            data = self.path.read_bytes()
            try:
                book = json.loads(data)
                if self.reads % 20 == 0:
                    nbformat.validate(book)
                self.most_outputs = max(
                    [self.most_outputs, *(len(c.get("outputs", ())) for c in book["cells"])]
                )
            except (ValueError, KeyError, nbformat.ValidationError) as error:
                self.bad.append(f"{len(data)} bytes: {error!r}")
            self.reads += 1
            time.sleep(0.001)

    def finish(self) -> None:
        self._stop_now.set()
        self.join(10)


async def test_n01_a_reader_never_sees_a_broken_file_while_2000_outputs_stream(lab: Lab) -> None:
    handle = await lab.start()
    reader = Reader(await lab.notebook_path(handle))
    reader.start()
    source = (
        "import time\nfrom IPython.display import display\n"
        "for i in range(1000):\n    print('line', i)\n    display(i)\n    time.sleep(0.001)"
    )
    result = await lab.cell(handle, source)
    for number in range(20):
        await lab.ok("create_cell", sandbox=handle, source=f"# {number}", type="markdown")
    reader.finish()
    assert ": complete in" in text_of(result)
    assert reader.bad == []
    assert reader.reads > 100
    assert reader.most_outputs == 2000  # 1000 stream pieces between 1000 displays


def notebook(**changes: Any) -> dict[str, Any]:
    cell = {
        "cell_type": "code",
        "id": "aaaa",
        "metadata": {},
        "source": ["open('it-ran', 'w')"],
        "outputs": [],
        "execution_count": None,
    }
    return {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5, **changes}


def with_cell(**changes: Any) -> dict[str, Any]:
    book = notebook()
    book["cells"][0].update(changes)
    return book


OLD = {
    "metadata": {"name": ""},
    "nbformat": 3,
    "nbformat_minor": 0,
    "worksheets": [
        {
            "cells": [
                {
                    "cell_type": "code",
                    "collapsed": False,
                    "input": ["1 + 1"],
                    "language": "python",
                    "metadata": {},
                    "outputs": [],
                    "prompt_number": 1,
                }
            ],
            "metadata": {},
        }
    ],
}
TWICE = notebook(cells=notebook()["cells"] * 2)
whole = json.dumps(notebook(), indent=1).encode()
BROKEN: dict[str, bytes] = {
    "empty": b"",
    "blank": b" \n\n",
    "truncated": whole[: len(whole) // 2],
    "byte order mark": b"\xef\xbb\xbf" + whole,
    "utf-16": json.dumps(notebook()).encode("utf-16"),
    "latin-1": json.dumps(with_cell(source="'\u00e9'"), ensure_ascii=False).encode("latin-1"),
    "binary": bytes(range(256)) * 20,
    "nested too deep": b"[" * 200_000,
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "no format": b'{"cells": []}',
    "format 3": json.dumps(OLD).encode(),
    "format 5": json.dumps(notebook(nbformat=5)).encode(),
    "format is text": json.dumps(notebook(nbformat="4")).encode(),
    "format is true": json.dumps(notebook(nbformat=True)).encode(),
    "minor is text": json.dumps(notebook(nbformat_minor="5")).encode(),
    "cells is text": json.dumps(notebook(cells="abc")).encode(),
    "cells is null": json.dumps(notebook(cells=None)).encode(),
    "no cells": json.dumps({k: v for k, v in notebook().items() if k != "cells"}).encode(),
    "a cell is a number": json.dumps(notebook(cells=[1])).encode(),
    "metadata is a list": json.dumps(notebook(metadata=[])).encode(),
    "no metadata": json.dumps({k: v for k, v in notebook().items() if k != "metadata"}).encode(),
    "id twice": json.dumps(TWICE).encode(),
    "id is a path": json.dumps(with_cell(id="../../x")).encode(),
    "id is a number": json.dumps(with_cell(id=7)).encode(),
    "id is empty": json.dumps(with_cell(id="")).encode(),
    "no id": json.dumps(
        notebook(cells=[{k: v for k, v in notebook()["cells"][0].items() if k != "id"}])
    ).encode(),
    "source is a number": json.dumps(with_cell(source=3)).encode(),
    "source has a number": json.dumps(with_cell(source=["a", 3])).encode(),
    "outputs is a dict": json.dumps(with_cell(outputs={})).encode(),
    "an output of no kind": json.dumps(with_cell(outputs=[{"text": "x"}])).encode(),
    "unknown cell type": json.dumps(with_cell(cell_type="prompt")).encode(),
}
MENDED_IN_A_COPY = ("format 3", "id twice")


async def test_n06_a_corrupted_notebook_is_refused_and_left_as_it_is(
    lab: Lab, place: Ground
) -> None:
    for label, data in BROKEN.items():
        (place.project / "bad.ipynb").write_bytes(data)
        before = place.files()
        text = await lab.no("start_sandbox", notebook="bad.ipynb")
        assert "bad.ipynb" in text and "Repair it" in text, (label, text)
        assert len(text) < 700, (label, len(text))
        if label not in MENDED_IN_A_COPY:
            await lab.no("start_sandbox", notebook="bad.ipynb", fork=True)
        else:
            assert "fork=true" in text
        assert (place.project / "bad.ipynb").read_bytes() == data, label
        assert place.files() == before, label
    assert place.processes() == []
    assert "0 running, 0 ended" in await lab.ok("list_sandboxes")


@pytest.mark.parametrize("label", MENDED_IN_A_COPY)
async def test_n06_a_copy_of_an_old_or_doubled_notebook_is_mended(
    lab: Lab, place: Ground, label: str
) -> None:
    original = place.project / "old.ipynb"
    original.write_bytes(BROKEN[label])
    handle = await lab.start(notebook="old.ipynb", fork=True)
    copy = await lab.notebook_path(handle)
    assert copy != original
    nbformat.validate(nbformat.read(copy, as_version=4))
    assert original.read_bytes() == BROKEN[label]
    assert len({c["id"] for c in read_cells(copy)}) == len(read_cells(copy)) >= 1


async def test_n06_a_start_that_fails_leaves_the_notebook_to_the_byte(
    lab: Lab, place: Ground
) -> None:
    file = place.project / "mine.ipynb"
    file.write_text(json.dumps(notebook()))  # not as we would write it
    data, before = file.read_bytes(), place.files()
    program = place.folder / "no-kernel"
    program.write_text("#!/bin/sh\necho no such module >&2\nexit 3\n")
    program.chmod(0o755)
    text = await lab.no("start_sandbox", notebook="mine.ipynb", python=str(program))
    assert "no such module" in text
    assert file.read_bytes() == data
    assert place.files() == before
    assert place.processes() == []
    await lab.start(notebook="mine.ipynb")  # and it is not locked for ever


async def test_n09_four_clients_write_and_run_in_one_notebook(place: Ground) -> None:
    each = 50
    async with http_server(place.config()) as endpoint, endpoint.lab() as first:
        handle = await first.start()

        async def work(mode: str, who: int) -> list[str]:
            ids: list[str] = []
            async with endpoint.lab(mode) as lab:
                for n in range(each):
                    result = await lab.cell(handle, f"print('client {who} cell {n}')")
                    assert not result.is_error, text_of(result)
                    assert f"client {who} cell {n}" in text_of(result)
                    ids.append(result.meta["seer/run"]["cell"])
            return ids

        async with asyncio.timeout(100):
            written = await asyncio.gather(
                *(work(("auto", "legacy")[who % 2], who) for who in range(4))
            )
        cells = read_cells(await first.notebook_path(handle))
    assert len(cells) == 4 * each
    for who, ids in enumerate(written):
        mine = [cell for cell in cells if f"client {who} " in "".join(cell["source"])]
        assert [cell["id"] for cell in mine] == ids
        assert [streams(cell) for cell in mine] == [f"client {who} cell {n}\n" for n in range(each)]
    assert sorted(cell["execution_count"] for cell in cells) == list(range(1, 4 * each + 1))


ALL_KINDS = [
    "print('out'); import sys; print('err', file=sys.stderr)",
    "1/0",
    "from IPython.display import *; display(HTML('<b>x</b>')); display(Markdown('*m*')); display(SVG('<svg/>'))",
    "display({'application/json': {'a': [1]}, 'text/plain': 'json'}, raw=True)",
    "h = display('first', display_id=True); h.update('second'); 'last'",
    "import base64; display(Image(base64.b64decode('iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9Q"
    "DwADhgGAWjR9awAAAABJRU5ErkJggg==')))",
    "print('x' * 100_000)",
    "print('\\ud800 \\u202e \\x1b[31mred\\x1b[0m \\r over')",
    "",
    "for i in range(3): print(i, end='\\r')",
    "def broken(:",
    "%time 1\n!echo shell",
    "'\\u0000'",
]


async def test_n11_every_save_is_valid_opens_in_nbconvert_and_keeps_the_ids(lab: Lab) -> None:
    from nbconvert import HTMLExporter

    handle = await lab.start()
    path = await lab.notebook_path(handle)
    ids: list[str] = []

    def check() -> None:
        book = nbformat.read(path, as_version=4)
        nbformat.validate(book)
        assert [c["id"] for c in book.cells] == ids

    for source in ALL_KINDS:
        result = await lab.cell(handle, source)
        ids.append(result.meta["seer/run"]["cell"])
        check()
    for kind, source in (
        ("markdown", "# title"),
        ("markdown", "\ud83d\ude00 caf\u00e9"),
        ("code", "never_run"),
    ):
        result = await lab.cell(handle, source, type=kind, run=False)
        ids.append(result.meta["seer/cell"])
        check()
    await lab.ok("edit_cell", sandbox=handle, cell=ids[0], source="print('new')")
    check()
    await lab.ok("move_cell", sandbox=handle, cell=ids[0], after=ids[4])
    ids.insert(4, ids.pop(0))
    check()
    await lab.ok("delete_cell", sandbox=handle, cell=ids.pop(2))
    check()
    await lab.call("run_cell", sandbox=handle, cells="all", stop_on_error=False)
    check()
    html, _ = HTMLExporter().from_notebook_node(nbformat.read(path, as_version=4))
    assert "ZeroDivisionError" in html and "caf\u00e9" in html
    await lab.ok("restart_kernel", sandbox=handle)
    check()
    await lab.ok("stop_sandbox", sandbox=handle)
    check()


async def test_an_existing_notebook_keeps_what_we_do_not_know(lab: Lab, place: Ground) -> None:
    book = notebook(
        metadata={
            "kernelspec": {"name": "other", "display_name": "Other", "language": "python"},
            "colab": {"provenance": [1, {"x": None}]},
            "seer": "somebody else's",
        },
        nbformat_minor=5,
    )
    book["cells"][0].update(
        metadata={"tags": ["keep"], "jupyter": {"source_hidden": True}}, source=["x = 1\n", "x"]
    )
    book["cells"].append(
        {
            "cell_type": "markdown",
            "id": "pic",
            "metadata": {"my": {"own": 1}},
            "source": "![a](attachment:a.png)",
            "attachments": {"a.png": {"image/png": "AAAA"}},
        }
    )
    book["cells"].append(
        {"cell_type": "raw", "id": "raw", "metadata": {"format": "text/latex"}, "source": "\\x"}
    )
    file = place.project / "theirs.ipynb"
    file.write_text(json.dumps(book))
    handle = await lab.start(notebook="theirs.ipynb")
    assert await lab.notebook_path(handle) == file
    await lab.ok("edit_cell", sandbox=handle, cell="aaaa", find="x = 1", replace="x = 2")
    answer = await lab.ok("run_cell", sandbox=handle, cells="aaaa")
    assert answer.endswith("2")
    await lab.ok("stop_sandbox", sandbox=handle)
    saved = json.loads(file.read_text())
    nbformat.validate(saved)
    assert saved["metadata"]["colab"] == book["metadata"]["colab"]
    assert saved["metadata"]["kernelspec"] == book["metadata"]["kernelspec"]
    code, picture, raw = saved["cells"]
    assert code["metadata"]["tags"] == ["keep"] and code["metadata"]["jupyter"] == {
        "source_hidden": True
    }
    assert code["source"] == ["x = 2\n", "x"]
    assert picture["attachments"] == {"a.png": {"image/png": "AAAA"}} and picture["metadata"] == {
        "my": {"own": 1}
    }
    assert raw["metadata"] == {"format": "text/latex"} and "".join(raw["source"]) == "\\x"


async def test_run_all_reports_each_cell_of_an_existing_notebook(lab: Lab, place: Ground) -> None:
    cells = [nbformat.v4.new_code_cell(f"print('cell {n}')") for n in range(3)]
    cells.insert(1, nbformat.v4.new_markdown_cell("between"))
    cells.append(nbformat.v4.new_code_cell("1/0"))
    cells.append(nbformat.v4.new_code_cell("print('after')"))
    nbformat.write(nbformat.v4.new_notebook(cells=cells), place.project / "all.ipynb")
    handle = await lab.start(notebook="all.ipynb")
    result = await lab.call("run_cell", sandbox=handle, cells="all")
    text = text_of(result)
    assert result.is_error
    assert "5 cells: 3 complete, 1 error, 1 not_run" in text
    for cell in (c for c in cells if c.cell_type == "code"):
        assert f"cell {cell.id}: " in text
    assert "ZeroDivisionError" in text and "\nafter" not in text
    result = await lab.call("run_cell", sandbox=handle, cells="all", stop_on_error=False)
    assert "5 cells: 4 complete, 1 error" in text_of(result)
    assert [r["state"] for r in result.meta["seer/runs"]] == ["complete"] * 3 + [
        "error",
        "complete",
    ]
