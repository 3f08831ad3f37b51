"""Exposed functions as a module in another sandbox's notebook: data goes over, and nothing else."""

from __future__ import annotations

import re
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from seer_mcp.interface import module_source, read_interface

from ..support import Lab, open_lab, processes_of, read_cells, text_of, until
from .interface import SECRET

pytestmark = pytest.mark.anyio
HERE = Path(__file__).parent


def investigation(folder: Path, more: str = "") -> Path:
    place = folder / "project" / "asking"
    (place / "inside").mkdir(parents=True)
    shutil.copy(HERE / "interface.py", place / "inside" / "interface.py")
    (place / "task.md").write_text("Ask.")
    (place / "investigation.toml").write_text(f'{more}\n[scoped]\nfar = "inside/interface.py"\n')
    return place


@pytest.fixture
async def asking(tmp_path: Path) -> AsyncIterator[tuple[Lab, str]]:
    async with open_lab(tmp_path) as lab:
        yield lab, await lab.start(investigation=str(investigation(tmp_path)))


async def printed(lab: Lab, sandbox: str, source: str) -> str:
    result = await lab.cell(sandbox, source)
    assert not result.is_error, text_of(result)
    return text_of(result).partition("\n")[2].strip()


def scoped_handle(told: str) -> str:
    line = next(line for line in told.splitlines() if "scoped, for" in line)
    return line.partition(":")[0]


async def test_functions_of_a_scoped_sandbox_are_called_from_a_notebook(
    asking: tuple[Lab, str],
) -> None:
    lab, sandbox = asking
    said = await printed(lab, sandbox, "import far\nprint(far.add(1), far.add(1, b=5))")
    assert said == "3 6"
    code = """\
import numpy as np
v = far.embed("abba", scale=0.5)
print(type(v).__name__, v.dtype, v.shape, v[:3].tolist())
print(round(far.cosine(v, 2 * v), 4), far.cosine(v, 0 * v))
print(far.remember("a"), far.remember("b", tags=["c"])["kept"])
big = far.zeros(300, 300)
print(big.shape, far.add.__doc__.splitlines()[0])"""
    assert (await printed(lab, sandbox, code)).splitlines() == [
        "ndarray float32 (26,) [1.0, 1.0, 0.0]",
        "1.0 nan",
        "{'kept': 1, 'tags': []} 2",
        "(300, 300) The sum of two whole numbers.",
    ]
    handle = scoped_handle(await lab.ok("list_sandboxes"))
    notebook = next((lab.folder / "project" / "outputs").glob("interface*/*.ipynb"))
    calls = ["".join(c["source"]) for c in read_cells(notebook)]
    assert sum("seer_scoped.call(" in call for call in calls) == 8
    # A large result does not stay there.
    await until(lambda: notebook.stat().st_size < 100_000)
    asked = await lab.notebook_path(sandbox)
    assert "vnd.seer.asked" not in asked.read_text()
    assert [p.name for p in (asked.parent / ".scoped").iterdir()] == []
    assert "No sandbox" in await lab.no("create_cell", sandbox=handle, source="1")
    assert "No sandbox" in await lab.no("read_notebook", sandbox=handle)
    await lab.ok("stop_sandbox", sandbox=sandbox)
    await until(lambda: not processes_of(handle))


async def test_errors_cross_as_sentences_and_nothing_else_can_be_asked_for(
    asking: tuple[Lab, str],
) -> None:
    lab, sandbox = asking
    code = """\
import far
from functools import partial
from tool_packs.scoped_client import MIME, ask
ask = partial(ask, torch=False, numeric=False)
from IPython.display import publish_display_data

def no(do):
    try:
        print("answered", do())
    except Exception as error:
        print(f"{type(error).__name__}: {error}")

here = far._FOLDER
no(lambda: far.fail("file"))
no(lambda: far.fail("die"))
no(lambda: far.add("1"))
no(lambda: far.add(1, c=2))
no(lambda: far.add(object()))
no(lambda: far.zeros(1000, 1000))
no(lambda: ask(here, "far", "hidden", {"code": "1"}))
no(lambda: ask(here, "far", "__import__", {"name": "os"}))
no(lambda: ask(here, "near", "add", {"a": 1}))
no(lambda: ask(here, "../far", "add", {"a": 1}))
for said in ("x", {"ask": "../x"}, {"ask": "0" * 16}, {"ask": 3}, {"cancel": "0" * 16}, None):
    publish_display_data({MIME: said, "text/plain": ""})
print("kept", far.remember("x")["kept"])"""
    told = await printed(lab, sandbox, code)
    assert told.count("NOTE: the sandbox had ended and was started anew") == 1
    said = re.compile(r"\w+Error: |CannotCross: |kept")
    lines = [line for line in told.splitlines() if said.match(line)]
    expected = (
        "ScopedError: FileNotFoundError: [Errno 2] No such file or directory: '(a path)'",
        "ScopedError: fail: the kernel died while it ran",
        "ScopedError: a = '1': it must be a whole number.",
        "TypeError: ",
        "CannotCross: something of type object",
        "ScopedError: zeros returned an array of shape [1000, 1000]",
        "ScopedError: No function 'hidden'.",
        "ScopedError: No function '__import__'.",
        "ScopedError: No scope 'near'.",
        "ScopedError: No scope '../far'.",
        "kept 1",
    )
    assert len(lines) == len(expected), "\n".join(lines)
    for line, begins in zip(lines, expected, strict=True):
        assert line.startswith(begins)


async def test_an_interrupted_call_is_cancelled_there(asking: tuple[Lab, str]) -> None:
    lab, sandbox = asking
    result = await lab.cell(sandbox, "import far\nfar.add(1)\nfar.fail('sleep')", wait=0)
    notebooks = lab.folder / "project" / "outputs"

    def running() -> bool:
        found = [*notebooks.glob("interface*/*.ipynb")]
        cells = read_cells(found[0]) if found else []
        return any(
            "sleep" in "".join(c["source"])
            and c["metadata"]["seer"]["state"] == "running"
            and "seer_scoped.call" in "".join(c["source"])
            for c in cells
            if c["cell_type"] == "code"
        )

    await until(running, 30)
    stopped = await lab.ok("interrupt", sandbox=sandbox)
    assert "interrupted" in stopped, text_of(result)
    assert await printed(lab, sandbox, "print(far.add(2))") == "4"


async def test_the_inside_of_a_scope_is_not_started_as_an_investigation(lab: Lab) -> None:
    place = investigation(lab.folder)
    (place / "inside" / "investigation.toml").write_text('interface = "interface.py"\n')
    said = await lab.no("start_sandbox", investigation=str(place / "inside"))
    assert "inside of a scoped sandbox" in said


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ('[sandbox.files]\n"x.py" = "inside/interface.py"', "the inside of a scoped sandbox"),
        ('[sandbox.files]\n"x" = "inside"', "the inside of a scoped sandbox"),
        ('[sandbox.files]\n"far.py" = "task.md"', "choose another name"),
    ],
)
async def test_the_interface_file_is_put_into_no_sandbox_that_asks(
    lab: Lab, more: str, said: str
) -> None:
    place = investigation(lab.folder, more)
    assert said in await lab.no("start_sandbox", investigation=str(place))


def test_the_module_of_an_interface_holds_no_code_of_it() -> None:
    source = module_source("far", read_interface(HERE / "interface.py"))
    compile(source, "far.py", "exec")
    assert SECRET not in source and "hidden" not in source and "np.zeros" not in source
    assert "def embed(text: str, scale: float=1.0, kind: Literal['sum', 'mean']='sum')" in source
