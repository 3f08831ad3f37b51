"""Wrong input: one clear text that names the value and the way out, and nothing is left over."""

from __future__ import annotations

from typing import Any

import pytest

from ..support import Lab, read_cells, text_of
from .ground import Ground

pytestmark = pytest.mark.anyio


async def refused(lab: Lab, tool: str, *expected: str, **arguments: Any) -> str:
    text = await lab.no(tool, **arguments)
    for words in expected:
        assert words in text, f"{tool}({arguments}): {words!r} not in {text!r}"
    assert "Traceback" not in text and len(text) < 1500, text
    return text


BY_HANDLE = {
    "stop_sandbox": {},
    "restart_kernel": {},
    "extend_sandbox": {"minutes": 5},
    "snapshot_sandbox": {},
    "interrupt": {},
    "create_cell": {"source": "1"},
    "run_cell": {"cells": "all"},
    "edit_cell": {"cell": "abcd", "source": "1"},
    "delete_cell": {"cell": "abcd"},
    "move_cell": {"cell": "abcd"},
    "read_outputs": {},
    "read_notebook": {},
    "load_model": {"model": "organism:base"},
    "run_command": {"command": "true"},
    "read_file": {"path": "x"},
    "write_file": {"path": "x", "content": "x"},
    "list_files": {},
    "submit_findings": {"claim": "x", "evidence": "abcd", "confidence": 1},
}


async def test_an_unknown_handle_is_answered_with_the_known_ones(lab: Lab) -> None:
    handle = await lab.start(name="mine")
    tools = (await lab.client.list_tools()).tools
    takers = {t.name for t in tools if "sandbox" in t.input_schema["properties"]}
    assert takers == BY_HANDLE.keys()
    for tool, arguments in BY_HANDLE.items():
        for wrong in (handle[:-1], handle + "x", "", "../" + handle, handle + "\0", "mine"):
            text = await refused(
                lab, tool, "No sandbox", "list_sandboxes", sandbox=wrong, **arguments
            )
            assert f"'{handle}'" in text
    assert not (await lab.cell(handle, "1")).is_error


async def test_unknown_cells_and_runs_are_answered_with_the_known_ones(lab: Lab) -> None:
    handle = await lab.start()
    await refused(lab, "run_cell", "create_cell", sandbox=handle, cells="abcd")
    await refused(lab, "run_cell", "no code cells", "create_cell", sandbox=handle, cells="all")
    await refused(lab, "read_outputs", "No cell has run yet", sandbox=handle)
    result = await lab.cell(handle, "1")
    cell = result.meta["seer/run"]["cell"]
    for tool, key in (
        ("run_cell", "cells"),
        ("edit_cell", "cell"),
        ("delete_cell", "cell"),
        ("move_cell", "cell"),
        ("read_outputs", "cell"),
        ("read_notebook", "cells"),
    ):
        more = {"source": "2"} if tool == "edit_cell" else {}
        await refused(lab, tool, "No cell 'zzzz'", cell, sandbox=handle, **{key: "zzzz"}, **more)
    await refused(lab, "create_cell", "No cell 'zzzz'", sandbox=handle, source="2", after="zzzz")
    await refused(lab, "run_cell", "named twice", sandbox=handle, cells=f"{cell} {cell}")
    await refused(lab, "move_cell", "behind itself", sandbox=handle, cell=cell, after=cell)
    await refused(lab, "move_cell", "No cell 'zzzz'", sandbox=handle, cell=cell, after="zzzz")
    await refused(lab, "edit_cell", "either source", sandbox=handle, cell=cell)
    await refused(
        lab,
        "edit_cell",
        "does not stand in the cell",
        sandbox=handle,
        cell=cell,
        find="x",
        replace="y",
    )
    await refused(lab, "read_outputs", "No run 'rnone'", sandbox=handle, run="rnone")
    await refused(lab, "interrupt", "No run 'rnone'", sandbox=handle, run="rnone")
    await refused(
        lab, "read_outputs", "cursor = 'x'", '"0:0"', sandbox=handle, cell=cell, cursor="x"
    )
    await refused(lab, "read_outputs", "image = 3", "0 images", sandbox=handle, cell=cell, image=3)
    note = (await lab.cell(handle, "text", type="markdown")).meta["seer/cell"]
    await refused(lab, "run_cell", "markdown", "only code cells", sandbox=handle, cells=note)
    await refused(lab, "read_outputs", "markdown", sandbox=handle, cell=note)
    assert len(read_cells(await lab.notebook_path(handle))) == 2, "a refused call wrote a cell"


async def test_techniques_and_packs_that_are_not_there(lab: Lab) -> None:
    await refused(lab, "list_techniques", "logit_lenz", "logit_lens", name="logit_lenz")
    await refused(lab, "list_techniques", "nothing.at_all", name="nothing.at_all")
    await refused(lab, "list_techniques", "not both", name="a", question="b")


async def test_what_is_too_much_for_one_request_is_said_at_once(lab: Lab) -> None:
    """The host drops such a line; sent again and again it would keep the caller for half a minute."""
    handle = await lab.start()
    await lab.cell(handle, "kept = 1")
    much = "x" * 60_000_000
    await refused(lab, "write_file", "in pieces", sandbox=handle, path="much", content=much)
    for _ in range(12):
        await lab.ok("create_cell", sandbox=handle, source="'" + "é" * 999_000 + "'", run=False)
    await refused(lab, "run_cell", "fewer cells", sandbox=handle, cells="all")
    cells = read_cells(await lab.notebook_path(handle))
    assert {c["metadata"]["seer"]["state"] for c in cells} == {"not_run"}
    assert text_of(await lab.cell(handle, "kept")).endswith("1")


@pytest.mark.timeout(240)
async def test_a_model_that_does_not_load_says_so_and_the_kernel_stays_usable(lab: Lab) -> None:
    handle = await lab.start()
    await lab.cell(handle, "kept = 1")
    work = (await lab.notebook_path(handle)).parent
    empty = work / "empty-model"
    empty.mkdir()
    for model, named in (
        ("organism:nothing", "organism:nothing"),
        ("no-such-owner/no-such-model", "no-such-owner/no-such-model"),
        (str(work / "missing-folder"), "missing-folder"),
        (str(empty), "empty-model"),
    ):
        result = await lab.call("load_model", sandbox=handle, model=model)
        text = text_of(result)
        while ": running for" in text or ": queued" in text:
            result = await lab.call("read_outputs", sandbox=handle)
            text = text_of(result)
        assert result.is_error and named in text, (model, text)
    for wrong in ("1x", "class", "a b", "m;import os"):
        await refused(
            lab,
            "load_model",
            "variable = ",
            "not a Python name",
            sandbox=handle,
            model="m",
            variable=wrong,
        )
    await refused(lab, "load_model", "model = ''", "hub id", sandbox=handle, model="")
    await refused(lab, "load_model", "quantization", sandbox=handle, model="m", quantization="2bit")
    assert (await lab.ok("create_cell", sandbox=handle, source="kept")).endswith("1")


WRONG_STARTS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"backend": "modl"}, ("No backend 'modl'", "'local'")),
    ({"name": "../x"}, ("name = '../x'", "a-z, 0-9")),
    ({"name": "a\0b"}, ("name = ", "a-z, 0-9")),
    ({"name": "Ünï"}, ("name = ", "a-z, 0-9")),
    ({"name": "con"}, ("name = 'con'", "reserved")),
    ({"name": "x" * 41}, ("1 to 40",)),
    ({"notebook": "missing.ipynb"}, ("No notebook 'missing.ipynb'",)),
    ({"notebook": "no/such/folder/x.ipynb"}, ("No notebook 'no/such/folder/x.ipynb'",)),
    ({"notebook": "."}, ("No notebook '.'",)),
    ({"notebook": "../x.ipynb"}, ("notebook = '../x.ipynb'", "outside")),
    ({"notebook": "a\0.ipynb"}, ("notebook = ", "control or invisible")),
    ({"python": "/no/such/python"}, ("python = '/no/such/python'", "no such program")),
    ({"python": "a\0b"}, ("python = ",)),
    ({"python": "/bin/true"}, ("did not start", "/bin/true", "Nothing was left")),
    ({"python": "/etc/hostname"}, ("did not start", "/etc/hostname")),
    ({"idle_minutes": -1}, ("idle_minutes",)),
    ({"idle_minutes": "nan"}, ("idle_minutes",)),
    ({"idle_minutes": "soon"}, ("idle_minutes", "'soon'")),
    ({"fork": "perhaps"}, ("fork", "perhaps")),
    ({"name": 3}, ("name", "3")),
    ({"name": None}, ("name",)),
    ({"gpus": "A100"}, ("no parameter 'gpus'", "Did you mean gpu", "Parameters of start_sandbox")),
    ({"gpu": "A100"}, ("gpu = 'A100'", "the GPUs that this machine has", "backend local")),
    ({"gpu": "A100-80GBB", "backend": "modal"}, ("gpu = 'A100-80GBB'", "A100-80GB")),
    ({"gpu": "T4:9", "backend": "modal"}, ("gpu", "9")),
    ({"host": "lab"}, ("host = 'lab'", "ssh")),
    ({"host": "-oProxyCommand=true", "backend": "ssh"}, ("host = ", "may not begin with '-'")),
    ({"hours": -1}, ("hours",)),
    ({"hours": 8000}, ("hours", "2592000")),
    ({"budget_dollars": -1}, ("budget_dollars",)),
    ({"memory_gb": 0.01}, ("memory_gb = 0.01", "0.25 or more")),
    ({"from_snapshot": "im-1"}, ("snapshot = 'im-1'", "no snapshots")),
    ({"investigation": "missing"}, ("No investigation", "investigation.toml")),
    ({"investigation": "../x"}, ("investigation = '../x'", "outside")),
]


async def test_a_start_that_cannot_be_leaves_nothing_behind(lab: Lab, place: Ground) -> None:
    broken = place.folder / "broken-python"
    broken.write_text("\x7fELF no program")
    broken.chmod(0o755)
    before = place.files()
    for arguments, expected in [
        *WRONG_STARTS,
        ({"python": str(broken)}, ("did not start", "broken-python")),
    ]:
        await refused(lab, "start_sandbox", *expected, **arguments)
        assert place.files() == before, arguments
        assert place.processes() == [], arguments
    assert await lab.ok("list_sandboxes") == (
        "0 running, 0 ended\nNext: start_sandbox(name='my-question')."
    )


async def test_a_second_start_of_the_same_name_names_the_first(lab: Lab, place: Ground) -> None:
    handle = await lab.start(name="twice")
    before = place.files()
    await refused(lab, "start_sandbox", "'twice'", handle, "stop_sandbox", name="twice")
    assert place.files() == before
    await lab.ok("stop_sandbox", sandbox=handle)
    second = await lab.start(name="twice")
    assert second != handle
    # The first notebook stays; the second has a folder of its own.
    assert await lab.notebook_path(second) != await lab.notebook_path(handle)
    assert (await lab.notebook_path(handle)).exists()


async def test_two_starts_of_one_name_at_once_make_one_sandbox(lab: Lab) -> None:
    import asyncio

    results = await asyncio.gather(*(lab.call("start_sandbox", name="race") for _ in range(3)))
    assert [r.is_error for r in results].count(False) == 1
    assert all("being started" in text_of(r) for r in results if r.is_error)


async def test_the_limit_of_sandboxes_is_said(place: Ground) -> None:
    from mcp import Client

    from seer_mcp.server import build_server

    async with Client(build_server(place.config(max_sandboxes=1))) as client:
        lab = Lab(client, place.folder)
        handle = await lab.start()
        await refused(lab, "start_sandbox", "1 sandboxes are running", "stop_sandbox")
        await lab.ok("stop_sandbox", sandbox=handle)
        await lab.start()


async def test_code_with_a_syntax_error_is_a_result_with_its_traceback(lab: Lab) -> None:
    handle = await lab.start()
    result = await lab.cell(handle, "x = (")
    text = text_of(result)
    assert (
        result.is_error
        and text.startswith("cell ")
        and "error after" in text
        and "SyntaxError" in text
    )
    assert not (await lab.cell(handle, "x = 1")).is_error


async def test_what_cannot_be_used_again_says_so(lab: Lab) -> None:
    handle = await lab.start()
    path = await lab.notebook_path(handle)
    await lab.cell(handle, "1")
    await lab.ok("stop_sandbox", sandbox=handle)
    await refused(lab, "stop_sandbox", handle, "ended already", sandbox=handle)
    for tool, more in BY_HANDLE.items():
        if tool in (
            "stop_sandbox",
            "read_outputs",
            "read_notebook",
            "edit_cell",
            "delete_cell",
            "move_cell",
            "submit_findings",
        ):
            continue
        await refused(lab, tool, "is gone", "start_sandbox", str(path), sandbox=handle, **more)
    assert "complete" in await lab.ok("read_outputs", sandbox=handle)  # what is on disk can be read


async def test_files_that_cannot_be_read_or_written(lab: Lab) -> None:
    handle = await lab.start()
    work = (await lab.notebook_path(handle)).parent
    (work / "folder").mkdir()
    (work / "binary").write_bytes(b"\xff\xfe\x00\x01" * 10)
    (work / "fake.png").write_bytes(b"no image")
    (work / "locked").mkdir()
    await refused(lab, "read_file", "nothing.txt", "folder", sandbox=handle, path="nothing.txt")
    await refused(lab, "read_file", "folder", "list_files", sandbox=handle, path="folder")
    await refused(
        lab, "read_file", "binary", "not UTF-8", "run_command", sandbox=handle, path="binary"
    )
    await refused(lab, "read_file", "fake.png", sandbox=handle, path="fake.png")
    await refused(lab, "list_files", "binary", "not a folder", sandbox=handle, path="binary")
    await refused(lab, "list_files", "missing", sandbox=handle, path="missing")
    await refused(
        lab, "write_file", "folder", "name a file", sandbox=handle, path="folder", content="x"
    )
    await refused(lab, "write_file", "path = ''", sandbox=handle, path="", content="x")
    await refused(
        lab, "write_file", "binary/x", "not a folder", sandbox=handle, path="binary/x", content="x"
    )
    await refused(
        lab, "write_file", "base64", sandbox=handle, path="x", content="***", encoding="base64"
    )
    await refused(
        lab, "write_file", "encoding", sandbox=handle, path="x", content="x", encoding="hex"
    )
    await refused(lab, "run_command", "command = ' '", sandbox=handle, command=" ")
    await refused(lab, "run_command", "command = ", sandbox=handle, command="a\0b")
    long = "echo " + "x" * 3_000_000
    await refused(lab, "run_command", "could not be started", sandbox=handle, command=long)
    result = await lab.call("run_command", sandbox=handle, command="echo no >&2; exit 3")
    assert result.is_error and "exit code 3" in text_of(result) and "no" in text_of(result)
    assert sorted(p.name for p in work.iterdir() if p.suffix == ".part") == []
