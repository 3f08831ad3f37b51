"""Hostile names and hostile notebooks: nothing is read or written outside, nothing runs unasked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import nbformat
import pytest

from ..support import Lab, read_cells, text_of
from .ground import Ground, raw_server, raw_start, raw_text

pytestmark = pytest.mark.anyio

SECRET = "the-secret-of-the-host"


def hostile_names(place: Ground, work: Path) -> list[str]:
    """120 names; `work` is the sandbox's folder, `place.folder/outside` holds the secret."""
    outside = place.folder / "outside"
    up = os.path.relpath(outside, work)
    up_project = os.path.relpath(outside, place.project)
    name = "secret.ipynb"
    targets = [
        f"{up}/{name}",
        f"{up_project}/{name}",
        f"./{up}/{name}",
        f"sub/../{up}/{name}",
        f"a/b/../../{up}/{name}",
        f"{up}//{name}",
        f"{up}/./{name}",
        f"{up}/../outside/{name}",
        str(outside / name),
        f"/{outside}/{name}",
        f"//{outside}/{name}",
        f"/./{outside}/{name}",
        f"{work}/../{up}/{name}",
        f"{work}{up}/{name}",
        f"{work}-secret/{name}",
        f"../{work.name}-secret/{name}",
        f"{place.project}-secret/{name}",
        f"../{place.project.name}-secret/{name}",
        f"link/{name}",
        "Link to file",
        f"link/../link/{name}",
        f"{up}/%2e%2e/outside/{name}",
        f"%2e%2e/%2e%2e/%2e%2e/outside/{name}",
        f"..%2f..%2f..%2foutside%2f{name}",
        f"%252e%252e/outside/{name}",
        f"..\\..\\..\\outside\\{name}",
        f"..\\/..\\/outside/{name}",
        f"file://{outside}/{name}",
        f"file:{outside}/{name}",
        f"~/../..{outside}/{name}",
        f"~root/../..{outside}/{name}",
        f"$HOME/../..{outside}/{name}",
        f"\uff0e\uff0e/\uff0e\uff0e/outside/{name}",
        f"\u2024\u2024/\u2024\u2024/outside/{name}",
        f"..\u2215..\u2215outside\u2215{name}",
        f"\u202e{name}/{up}",
        f"{up}/{name}\u200b",
        f"\ufeff{up}/{name}",
        f"{up}/{name}\n",
        f"\t{up}/{name}",
        f" {up}/{name} ",
        f"{up}/{name}\0",
        f"{up}\0/{name}",
        f"ok\0{up}/{name}",
        f"{up}/{name}/.",
        f"{up}/{name}/..",
        f"{up}",
        str(outside),
        "/etc/passwd",
        "../../../../../../../../etc/passwd",
        "/proc/self/environ",
        "/proc/self/cwd/../../../../etc/passwd",
        "/dev/stdin",
        "/dev/zero",
        "..",
        "../",
        "../..",
        "/",
        "//",
        "~",
        "~/",
        "~root",
        "~nobody/x",
        "",
        " ",
        "\n",
        "\0",
        "...",
        ".. ",
        " ..",
        "..;/",
        ".%00.",
        "a" * 300,
        "a" * 5000,
        "../" * 400 + "etc/passwd",
        "x/" * 600,
        "\u0301" * 200,
        "caf\u00e9/../" * 3 + up,
        "cafe\u0301/../" * 3 + up,
        "con",
        "nul",
        "aux",
        "prn",
        "com1",
        "lpt9",
        "CON",
        "nul.ipynb",
        "a:b",
        "C:\\Windows\\system32",
        "C:/Windows",
        "\\\\server\\share\\x",
        "//server/share/x",
        "|id",
        "; touch x",
        "$(touch x)",
        "`touch x`",
        "&& touch x",
        "-rf",
        "--help",
        "*",
        "?",
        "[a-z]",
        "{a,b}",
        "'quote'",
        '"quote"',
        "new\nline",
        "carriage\rreturn",
        "esc\x1b[31m",
        "bell\x07",
        "\ud800",
        "\x7f",
        "\u2028",
        "\U0001f600/../../x",
        "\U000e0001tag",
        "A",
        "-a",
        "a-",
        "_",
        "Ä",
        "a b",
        "a/b",
        "a.b",
        "../a-secret",
        ".ssh/../../../x",
    ]
    assert len(targets) >= 120
    return targets


def lay_out(place: Ground) -> Path:
    outside = place.folder / "outside"
    for folder in (outside, place.folder / "project-secret"):
        folder.mkdir()
        book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(SECRET)])
        nbformat.write(book, folder / "secret.ipynb")
        (folder / "only-outside").touch()
    return outside


def world(place: Ground, work: Path | None = None) -> dict[str, bytes]:
    """Every file outside of the sandbox's own folder (and outside of what the server itself keeps)."""
    found: dict[str, bytes] = {}
    for path in place.folder.rglob("*"):
        own = work is not None and path.is_relative_to(work)
        if not own and not path.is_relative_to(place.folder / "state") and not path.is_symlink():
            found[str(path)] = path.read_bytes() if path.is_file() else b""
    return found


@pytest.mark.timeout(240)
async def test_x01_hostile_names_read_and_write_nothing_outside(lab: Lab, place: Ground) -> None:
    outside = lay_out(place)
    handle = await lab.start()
    work = (await lab.notebook_path(handle)).parent
    sibling = work.with_name(work.name + "-secret")
    sibling.mkdir()
    (sibling / "secret.ipynb").write_text(SECRET)
    (sibling / "only-outside").touch()
    for folder in (work, place.project):
        (folder / "link").symlink_to(outside)
        (folder / "Link to file").symlink_to(outside / "secret.ipynb")
    before = world(place, work)
    wrote: list[str] = []
    for name in hostile_names(place, work):
        for tool, arguments in (
            ("read_file", {"path": name}),
            ("list_files", {"path": name}),
            ("write_file", {"path": name, "content": "written by a stranger"}),
            ("write_file", {"path": name, "content": "added by a stranger", "append": True}),
        ):
            result = await lab.call(tool, sandbox=handle, **arguments)
            text = text_of(result)
            assert SECRET not in text and "only-outside" not in text, (tool, name, text)
            assert "root:x:" not in text, (tool, name)
            if not result.is_error and tool == "write_file":
                wrote.append(name)
                full = Path(result.meta["seer/file"]["path"])
                assert full.is_relative_to(work) and os.path.realpath(full) == str(full), (
                    name,
                    full,
                )
        assert world(place, work) == before, name
    assert all(".." not in Path(name).parts or name.startswith("\U0001f600") for name in wrote), (
        wrote
    )
    # An honest name still works.
    await lab.ok("write_file", sandbox=handle, path="sub/caf\u00e9.txt", content="fine")
    assert "fine" in await lab.ok("read_file", sandbox=handle, path="sub/caf\u00e9.txt")


@pytest.mark.timeout(240)
async def test_x01_hostile_sandbox_and_notebook_names_start_nothing(
    lab: Lab, place: Ground
) -> None:
    lay_out(place)
    (place.project / "link").symlink_to(place.folder / "outside")
    (place.project / "Link to file").symlink_to(place.folder / "outside" / "secret.ipynb")
    before, files = world(place), place.files()
    work = place.project / "outputs" / "some"
    for name in hostile_names(place, work):
        if name:  # an empty name asks for one to be made, an empty notebook for a new one
            text = await lab.no("start_sandbox", name=name)
            assert SECRET not in text and len(text) < 500, (name, text)
            text = await lab.no("start_sandbox", notebook=name)
            assert SECRET not in text and len(text) < 1500, (name, text)
            await lab.no("start_sandbox", notebook=name, fork=True)
            await lab.no("list_techniques", name=name)
            await lab.no("read_notebook", sandbox=name)
    assert world(place) == before
    assert place.files() == files
    assert place.processes() == []


async def test_x01_the_notebook_itself_is_not_written_by_write_file(lab: Lab) -> None:
    handle = await lab.start()
    path = await lab.notebook_path(handle)
    data = path.read_bytes()
    for name in (path.name, f"./{path.name}", f"sub/../{path.name}", str(path)):
        assert "edit_cell" in await lab.no("write_file", sandbox=handle, path=name, content="x")
    assert path.read_bytes() == data


def trap(folder: Path) -> nbformat.NotebookNode:
    """A notebook every cell of which would leave a trace if it ran, also while it is only opened."""
    book = nbformat.v4.new_notebook()
    for n in range(3):
        cell = nbformat.v4.new_code_cell(f"open({str(folder / f'ran-{n}')!r}, 'w')")
        cell.metadata["tags"] = ["init_cell"]
        book.cells.append(cell)
    book.metadata["kernelspec"] = {"name": "evil", "display_name": "x", "language": "python"}
    return book


def ran(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("ran-*"))


async def test_x03_opening_a_notebook_in_place_or_as_a_copy_runs_nothing(
    lab: Lab, place: Ground
) -> None:
    file = place.project / "trap.ipynb"
    nbformat.write(trap(place.folder), file)
    data = file.read_bytes()
    copied = await lab.start(notebook="trap.ipynb", fork=True)
    assert file.read_bytes() == data
    opened = await lab.start(notebook="trap.ipynb")
    for handle in (copied, opened):
        await lab.ok("read_notebook", sandbox=handle, cells="all", outputs=True)
        assert "In [" not in await lab.ok("create_cell", sandbox=handle, source="len(In)")
        assert (await lab.ok("create_cell", sandbox=handle, source="len(In)")).endswith("3")
        await lab.ok("restart_kernel", sandbox=handle)
    assert ran(place.folder) == []
    cells = read_cells(file)
    assert [c["execution_count"] for c in cells[:3]] == [None] * 3
    await lab.ok("run_cell", sandbox=opened, cells=cells[1]["id"])
    assert ran(place.folder) == ["ran-1"]


async def test_x03_the_next_server_runs_nothing_again(place: Ground) -> None:
    nbformat.write(trap(place.folder), place.project / "trap.ipynb")
    with raw_server(place) as server:
        handle = raw_start(server, notebook="trap.ipynb")
    with raw_server(place) as server:
        assert "1 running" in raw_text(server.call("list_sandboxes"))
        answer = server.call("create_cell", sandbox=handle, source="len(In)")
        assert raw_text(answer).endswith("\n2")
    assert ran(place.folder) == []


CLAIMS: list[Any] = [
    {"files": {"0": "../../outside/precious.txt"}, "run": "r0123456780", "state": "complete"},
    {"files": {"0": "ABSOLUTE"}, "run": "r0123456781", "state": "complete"},
    {
        "files": {"0": "trap.outputs/../../outside/precious.txt"},
        "run": "r0123456782",
        "state": "complete",
    },
    {"files": {"0": "link.outputs"}, "run": "r0123456783", "state": "complete"},
    {"files": {"0": "trap.outputs/link"}, "run": "r0123456784", "state": "complete"},
    {"files": ["a"], "run": 3, "state": ["x"]},
    {
        "files": {"0": 3},
        "run": "../../../outside/run",
        "state": "running",
        "since": "x",
        "started": "y",
    },
    {
        "run": "r1",
        "state": "queued",
        "since": 10**30,
        "started": -1e300,
        "seconds": "nan",
        "late": "many",
    },
    {
        "run": "r0123456785",
        "state": "running",
        "since": 10**30,
        "started": -1e300,
        "files": {"x": "y"},
    },
    "text",
    [1, 2],
    None,
]


@pytest.mark.parametrize(
    ("fork", "of_the_document"),
    [(False, {"folded": 10**40, "sandbox": []}), (True, "text"), (False, None)],
)
async def test_x01_what_a_notebook_says_of_its_runs_leads_nowhere(
    lab: Lab, place: Ground, fork: bool, of_the_document: Any
) -> None:
    """A notebook from a stranger may claim that its outputs lie in any file of ours."""
    outside = place.folder / "outside"
    outside.mkdir()
    precious = outside / "precious.txt"
    precious.write_text(SECRET)
    (place.project / "link.outputs").symlink_to(precious)
    (place.project / "trap.outputs").mkdir()
    (place.project / "trap.outputs" / "link").symlink_to(precious)
    cells = [
        {
            "cell_type": "code",
            "id": f"cell{number:02}",
            "metadata": {"seer": facts},
            "source": f"print('mine', {number})",
            "outputs": [
                {"output_type": "stream", "name": "stdout", "text": "short"},
                {
                    "output_type": "display_data",
                    "data": {"text/plain": "d"},
                    "metadata": {"seer": facts},
                },
            ],
            "execution_count": 1,
        }
        for number, facts in enumerate(CLAIMS)
    ]
    book = {
        "cells": cells,
        "metadata": {"seer": of_the_document},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    claims = json.dumps(book).replace("ABSOLUTE", str(precious))
    (place.project / "trap.ipynb").write_text(claims)
    handle = await lab.start(notebook="trap.ipynb", fork=fork)
    texts = [await lab.ok("read_notebook", sandbox=handle, cells="all", outputs=True)]
    texts += [
        text_of(await lab.call("read_outputs", sandbox=handle, cell=cell["id"], wait=0, **more))
        for cell in cells
        for more in ({}, {"cursor": "0:0"})
    ]
    texts.append(
        await lab.ok(
            "create_cell", sandbox=handle, source="h = display(1, display_id='x'); h.update(2)"
        )
    )
    texts.append(await lab.ok("run_cell", sandbox=handle, cells="all"))
    for number in range(len(cells)):
        assert f"mine {number}" in texts[-1]
    assert not any(SECRET in text for text in texts)
    assert precious.read_text() == SECRET
    assert list(outside.iterdir()) == [precious]
