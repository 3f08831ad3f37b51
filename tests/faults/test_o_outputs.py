"""FAULTS.md, O: outputs that are large, many, odd, late or pictures."""

import asyncio
import base64
import io
import re
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import nbformat
import pytest
from mcp.types import CallToolResult
from PIL import Image

from tests.support import Lab, open_lab, read_cells, streams, text_of

pytestmark = pytest.mark.anyio

LIMIT = 100_000  # characters of a result: about 25,000 tokens
MIB = 1024 * 1024


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def box(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[tuple[Lab, str]]:
    """One sandbox for all tests of this module."""
    async with open_lab(tmp_path_factory.mktemp("o")) as lab:
        yield lab, await lab.start(name="shared")


def run_of(result: CallToolResult) -> dict[str, Any]:
    assert result.meta is not None
    return result.meta["seer/run"]


async def saved(lab: Lab, handle: str, result: CallToolResult) -> dict[str, Any]:
    """The cell of a run as it stands in the notebook's file."""
    path = await lab.notebook_path(handle)
    return next(c for c in read_cells(path) if c["id"] == run_of(result)["cell"])


async def on_disk(lab: Lab, handle: str, result: CallToolResult) -> str:
    """All that is kept of the only stream of a cell: in the notebook, or in the file beside it."""
    path = await lab.notebook_path(handle)
    cell = await saved(lab, handle, result)
    files = cell["metadata"]["seer"].get("files")
    if not files:
        return streams(cell)
    assert list(files) == ["0"]
    assert len(streams(cell)) < 70_000
    assert files["0"] in streams(cell)
    return (path.parent / files["0"]).read_bytes().decode("utf-8")


async def pages(lab: Lab, handle: str, cursor: str = "0:0", **key: str) -> str:
    """The exact text of a run from a cursor on, page by page."""
    parts: list[str] = []
    while cursor:
        result = await lab.call("read_outputs", sandbox=handle, cursor=cursor, **key)
        assert not result.is_error
        assert len(text_of(result)) < LIMIT
        parts.append(result.content[1].text)  # type: ignore[union-attr]
        cursor = result.meta["seer/page"]["next"] or ""  # type: ignore[index]
    return "".join(parts)


def cursor_in(text: str) -> str:
    """The cursor that a result gives for what it left out."""
    found = re.search(r"cursor='(\d+:\d+)'", text)
    assert found, text[:2000]
    return found[1]


# -- O01, O02, O04: much --------------------------------------------------------------------------


async def test_o01_ten_million_characters_in_one_line(box: tuple[Lab, str]) -> None:
    lab, handle = box
    began = time.monotonic()
    result = await lab.cell(handle, 'print("x" * 10_000_000)')
    assert time.monotonic() - began < 9
    text = text_of(result)
    assert not result.is_error and len(text) <= 25_000
    assert text.count("x" * 100) > 100 and text.endswith("xxx")
    assert "characters left out" in text and "read_outputs(" in text
    assert await on_disk(lab, handle, result) == "x" * 10_000_000 + "\n"
    cell = run_of(result)["cell"]
    page = await lab.call("read_outputs", sandbox=handle, cell=cell, cursor=cursor_in(text))
    assert page.content[1].text == "x" * 16_000  # type: ignore[union-attr]
    assert page.meta["seer/page"]["total"] == 10_000_001
    last = await lab.call("read_outputs", sandbox=handle, cell=cell, cursor="0:9999990")
    assert last.content[1].text == "x" * 10 + "\n"  # type: ignore[union-attr]
    assert "This is the end" in text_of(last)


async def test_o02_a_hundred_long_lines_in_a_second(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "import time\nfor i in range(100): print(f'{i:03}' * 33_334, flush=True); time.sleep(0.01)"
    )
    result = await lab.cell(handle, source)
    assert len(text_of(result)) <= 25_000
    lines = (await on_disk(lab, handle, result)).splitlines()
    assert lines == [f"{i:03}" * 33_334 for i in range(100)]


@pytest.mark.parametrize("flush", [False, True])
async def test_o04_two_thousand_lines(box: tuple[Lab, str], flush: bool) -> None:
    lab, handle = box
    source = (
        f"import time\nfor i in range(2000): print('line', i, flush={flush}); time.sleep(0.001)"
    )
    result = await lab.cell(handle, source)
    assert run_of(result)["state"] == "complete"
    assert (await on_disk(lab, handle, result)).splitlines() == [f"line {i}" for i in range(2000)]


async def test_o04_two_thousand_displays(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(handle, "for i in range(2000): display(i)")
    outputs = (await saved(lab, handle, result))["outputs"]
    assert [o["data"]["text/plain"] for o in outputs] == [[str(i)] for i in range(2000)]
    assert len(text_of(result)) <= 25_000


async def test_o01_a_million_short_lines(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(handle, "print('\\n'.join(map(str, range(1_000_000))))")
    text = text_of(result)
    assert len(text) <= 25_000
    assert text.splitlines()[1:4] == ["0", "1", "2"] and text.endswith("\n999999")
    assert await on_disk(lab, handle, result) == "".join(f"{i}\n" for i in range(1_000_000))


# -- O03 in small: the cap ------------------------------------------------------------------------


async def test_o03_output_over_the_cap_is_counted_and_said(tmp_path: Path) -> None:
    async with open_lab(tmp_path, output_cap=100_000) as lab:
        handle = await lab.start()
        source = "print('x' * 999_999)\nimport sys; print('y' * 500_000, file=sys.stderr)\n1 / 0"
        result = await lab.cell(handle, source)
        text = text_of(result)
        assert run_of(result)["state"] == "error" and "ZeroDivisionError" in text
        assert run_of(result)["output_bytes"] == 1_500_001
        assert run_of(result)["dropped_bytes"] == 1_400_001
        assert "TRUNCATED: this run put out 1,500,001 bytes; the last 1,400,001" in text
        assert "output beyond 100,000 bytes of this run is not kept" in text
        cell = await saved(lab, handle, result)
        assert cell["metadata"]["seer"]["output_bytes"] == 1_500_001
        path = await lab.notebook_path(handle)
        assert (path.parent / cell["metadata"]["seer"]["files"]["0"]).read_text() == "x" * 100_000
        assert "not kept" in streams(cell, "stderr")
        # The next run has a cap of its own, and small output loses nothing.
        again = await lab.cell(handle, "print('z' * 99_999)")
        assert run_of(again)["dropped_bytes"] == 0 and "TRUNCATED" not in text_of(again)
        # What counts are bytes, not characters.
        wide = await lab.cell(handle, "print('é' * 100_000)")
        assert run_of(wide)["output_bytes"] == 200_001 and run_of(wide)["dropped_bytes"] > 0


async def test_o03_a_flood_is_interrupted_while_other_calls_are_answered(tmp_path: Path) -> None:
    async with open_lab(tmp_path, output_cap=5_000_000) as lab:
        handle = await lab.start()
        await lab.cell(handle, "while True: print('x' * 1000)", wait=0.5)
        slowest = 0.0
        for _ in range(10):
            began = time.monotonic()
            await lab.ok("list_sandboxes")
            slowest = max(slowest, time.monotonic() - began)
            await asyncio.sleep(0.1)
        assert slowest < 1.5
        began = time.monotonic()
        await lab.ok("interrupt", sandbox=handle)
        assert time.monotonic() - began < 6
        result = await lab.call("read_outputs", sandbox=handle)
        assert run_of(result)["state"] == "interrupted"
        assert run_of(result)["dropped_bytes"] > 0 and "TRUNCATED" in text_of(result)
        assert len(text_of(result)) <= 25_000


# -- O06: odd text --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        (r'print("\ud800 text")', r"\ud800 text"),
        (r'print("name \udc80.txt")', r"name \udc80.txt"),
        (r'import sys; print("\udfff", file=sys.stderr)', r"\udfff"),
        (r'display({"text/plain": "\ud800 text"}, raw=True)', r"\ud800 text"),
    ],
)
async def test_o06_text_that_is_not_unicode_arrives_escaped(
    box: tuple[Lab, str], source: str, wanted: str
) -> None:
    lab, handle = box
    result = await lab.cell(handle, source)
    assert not result.is_error
    assert text_of(result).splitlines()[1:] in ([wanted], [f"[stderr] {wanted}"])
    assert "Traceback" not in str(await saved(lab, handle, result))
    assert text_of(await lab.cell(handle, "6 * 7")).splitlines()[1] == "42"


async def test_o06_an_error_that_is_not_unicode(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(handle, r'raise ValueError("\ud800 \udc80")')
    assert run_of(result)["state"] == "error"
    assert text_of(result).endswith(r"ValueError: \ud800 \udc80")
    nbformat.validate(nbformat.read(await lab.notebook_path(handle), as_version=4))


async def test_o06_control_characters_and_nul(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(handle, r'print("a\x00b\x07c\u200bd")')
    assert "\x00" not in text_of(result)
    assert "a" in text_of(result) and "d" in text_of(result)
    assert (await on_disk(lab, handle, result)) == "a\x00b\x07c\u200bd\n"


async def test_o06_bytes_that_are_not_utf8_from_a_process(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = r"import subprocess; subprocess.run(['printf', r'begin\377\376end\n']); None"
    text = text_of(await lab.cell(handle, source))
    assert "begin" in text and "end" in text
    command = text_of(await lab.call("run_command", sandbox=handle, command=r"printf 'a\377b'"))
    assert r"a\xffb" in command


async def test_o06_messages_that_are_no_json_do_not_stop_the_kernel(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "import sys\n"
        "s = get_ipython().kernel.session; p = get_ipython().display_pub\n"
        "p.pub_socket.send_multipart([b'rubbish'])\n"
        "p.pub_socket.send_multipart([b'x', b'<IDS|MSG>', b'bad signature', b'{', b'', b'', b''])\n"
        "s.send(p.pub_socket, s.msg('stream', {}, parent=p.parent_header))\n"
        "s.send(p.pub_socket, s.msg('display_data', {'data': 7}, parent=p.parent_header))\n"
        "s.send(p.pub_socket, s.msg('error', {'ename': 1}, parent=p.parent_header))\n"
        "print('after')"
    )
    result = await lab.cell(handle, source)
    assert run_of(result)["state"] == "complete" and "after" in text_of(result)
    assert text_of(await lab.cell(handle, "6 * 7")).splitlines()[1] == "42"
    nbformat.validate(nbformat.read(await lab.notebook_path(handle), as_version=4))


async def test_colours_are_stripped_for_the_reader_and_kept_in_the_notebook(
    box: tuple[Lab, str],
) -> None:
    lab, handle = box
    result = await lab.cell(
        handle, r'print("\x1b[1;31mred\x1b[0m plain \x1b]8;;http://x\x07link\x1b]8;;\x07")'
    )
    assert text_of(result).splitlines()[1] == "red plain link"
    assert "\x1b[1;31m" in streams(await saved(lab, handle, result))
    error = await lab.cell(handle, "1 / 0")
    assert "\x1b" not in text_of(error) and r"\x1b" not in text_of(error)


# -- overwriting: progress bars, displays that change ---------------------------------------------


@pytest.mark.parametrize("module", ["tqdm", "tqdm.auto"])
async def test_a_progress_bar_reads_as_its_last_state(box: tuple[Lab, str], module: str) -> None:
    lab, handle = box
    source = (
        f"from {module} import tqdm\nimport time\n"
        "for i in tqdm(range(200), desc='steps'): time.sleep(0.002)\nprint('done')"
    )
    text = text_of(await lab.cell(handle, source))
    assert text.count("steps") == 1 and "200/200" in text and "done" in text
    assert len(text.splitlines()) <= 4


async def test_a_progress_bar_among_prints_reads_once(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "from tqdm import tqdm\nimport time\n"
        "for i in tqdm(range(5), desc='steps'):\n    print('at', i, flush=True); time.sleep(0.15)"
    )
    text = text_of(await lab.cell(handle, source))
    assert text.count("steps") == 1 and "5/5" in text
    assert [f"at {i}" in text for i in range(5)] == [True] * 5


async def test_a_display_is_updated_where_it_stands(box: tuple[Lab, str]) -> None:
    lab, handle = box
    first = await lab.cell(
        handle, "h = display('one', display_id='mine'); print('after')\nh.update('two')"
    )
    assert "'two'" in text_of(first) and "'one'" not in text_of(first)
    later = await lab.cell(handle, "h.update('three'); print('quiet')")
    assert "three" not in text_of(later)
    outputs = (await saved(lab, handle, first))["outputs"]
    assert [o["output_type"] for o in outputs] == ["display_data", "stream"]
    assert outputs[0]["data"]["text/plain"] == ["'three'"]
    for i in range(30):
        await lab.cell(handle, f"h.update({i})", wait=0)
    await lab.cell(handle, "1")
    assert (await saved(lab, handle, first))["outputs"][0]["data"]["text/plain"] == ["29"]
    nbformat.validate(nbformat.read(await lab.notebook_path(handle), as_version=4))


async def test_output_is_cleared_now_or_with_the_next(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "from IPython.display import clear_output\nimport time\n"
        "for i in range(20): clear_output(wait={}); print('state', i); time.sleep(0.01)"
    )
    for wait in (True, False):
        result = await lab.cell(handle, source.format(wait))
        assert streams(await saved(lab, handle, result)) == "state 19\n"
    kept = await lab.cell(
        handle, "from IPython.display import clear_output\nprint('kept'); clear_output(wait=True)"
    )
    assert "kept" in text_of(kept)
    gone = await lab.cell(
        handle, "from IPython.display import clear_output\nprint('gone'); clear_output()"
    )
    assert "gone" not in text_of(gone) and (await saved(lab, handle, gone))["outputs"] == []


async def test_clearing_a_long_output_removes_its_file(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "from IPython.display import clear_output\n"
        "print('x' * 200_000, flush=True)\nclear_output()\nprint('short')"
    )
    result = await lab.cell(handle, source)
    assert await on_disk(lab, handle, result) == "short\n"
    folder = (await lab.notebook_path(handle)).with_suffix(".outputs")
    assert not list(folder.glob(f"{run_of(result)['cell']}-*"))


async def test_stdout_and_stderr_keep_their_order(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "import sys\nfor i in range(4):\n"
        "    print('out', i, flush=True); print('err', i, file=sys.stderr, flush=True)"
    )
    result = await lab.cell(handle, source)
    outputs = (await saved(lab, handle, result))["outputs"]
    assert [(o["name"], "".join(o["text"])) for o in outputs] == [
        pair for i in range(4) for pair in (("stdout", f"out {i}\n"), ("stderr", f"err {i}\n"))
    ]
    assert text_of(result).splitlines()[1:] == [
        line for i in range(4) for line in (f"out {i}", f"[stderr] err {i}")
    ]


async def test_what_a_question_mark_shows_is_shown(box: tuple[Lab, str]) -> None:
    lab, handle = box
    assert "Return the number of items" in text_of(await lab.cell(handle, "len?"))


# -- images ---------------------------------------------------------------------------------------

NOISE = """
import io, random
from PIL import Image as P
from IPython.display import Image, display
def noise(width, height, mode="RGB", kind="PNG"):
    picture = P.frombytes(mode, (width, height), random.randbytes(width * height * len(mode)))
    buffer = io.BytesIO(); picture.save(buffer, kind)
    return Image(buffer.getvalue(), format=kind.lower())
"""


def pictures(result: CallToolResult) -> list[bytes]:
    return [base64.b64decode(block.data) for block in result.content if block.type == "image"]


@pytest.mark.parametrize(
    "drawn",
    ["3000, 2000", "2500, 300, 'RGBA'", "1100, 1100", "900, 700, 'RGB', 'JPEG'", "4000, 4000, 'L'"],
)
async def test_an_image_is_scaled_to_what_a_reader_needs(box: tuple[Lab, str], drawn: str) -> None:
    lab, handle = box
    await lab.cell(handle, NOISE)
    result = await lab.cell(handle, f"noise({drawn})")
    (data,) = pictures(result)
    assert len(data) <= 300_000
    with Image.open(io.BytesIO(data)) as image:
        image.load()
        assert max(image.size) <= 1200
    (larger,) = pictures(
        await lab.call("read_outputs", sandbox=handle, cell=run_of(result)["cell"], image=1)
    )
    assert len(larger) <= 300_000
    kept = (await saved(lab, handle, result))["outputs"][0]["data"]
    original = base64.b64decode("".join(kept.get("image/png") or kept["image/jpeg"]))
    width, height = (int(n) for n in drawn.split(", ")[:2])
    with Image.open(io.BytesIO(original)) as image:
        assert image.size == (width, height)
    await lab.ok("delete_cell", sandbox=handle, cell=run_of(result)["cell"])


async def test_many_images_are_counted_and_the_last_are_shown(box: tuple[Lab, str]) -> None:
    lab, handle = box
    await lab.cell(handle, NOISE)
    result = await lab.cell(handle, "for i in range(9): display(noise(1000, 1000))")
    assert "9 images" in text_of(result) and "last 4" in text_of(result)
    assert len(pictures(result)) == 4
    # One answer has to fit into one event of an HTTP client.
    assert sum(len(data) for data in pictures(result)) * 4 / 3 < 0.9 * MIB
    key = {"sandbox": handle, "cell": run_of(result)["cell"]}
    assert len(pictures(await lab.call("read_outputs", **key, image=9))) == 1
    assert "has 9 images" in await lab.no("read_outputs", **key, image=10)
    await lab.ok("delete_cell", **key)


async def test_a_plot_comes_back_as_one_image(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(handle, "import matplotlib.pyplot as plt\nplt.plot([1, 3, 2]);")
    (data,) = pictures(result)
    assert data.startswith(b"\x89PNG") and not result.is_error


async def test_an_image_that_is_none_is_said(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(
        handle, "display({'image/png': 'bm90IGFuIGltYWdl', 'text/plain': 'alt'}, raw=True)"
    )
    assert pictures(result) == [] and "cannot be shown" in text_of(result)


# -- O12: no result is too large, everything can be reached ----------------------------------------

TEXTS = {
    "ascii": "'\\n'.join(str(i) * 7 for i in range(200_000))",
    "mixed": "'\\n'.join('Grüße 世界 👩‍🔬 é ' * 3 + str(i) for i in range(100_000))",
    "one line": "'äöü€𝄞' * 400_000",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=list(TEXTS))
async def test_o12_pages_joined_are_the_text_to_the_byte(box: tuple[Lab, str], text: str) -> None:
    lab, handle = box
    expected: str = eval(text)
    assert 4_000_000 < len(expected.encode()) < 12_000_000
    result = await lab.cell(handle, f"text = {text}\nprint(text, end='')")
    assert len(text_of(result)) <= 25_000
    assert await on_disk(lab, handle, result) == expected
    assert await pages(lab, handle, cell=run_of(result)["cell"]) == expected


async def test_o12_the_cursor_of_a_digest_reaches_all_that_it_left_out(
    box: tuple[Lab, str],
) -> None:
    lab, handle = box
    source = "import sys\nprint('a' * 30_000); print('b' * 30_000, file=sys.stderr); 'c' * 30_000"
    result = await lab.cell(handle, source)
    text = text_of(result)
    assert len(text) <= 25_000
    whole = "a" * 30_000 + "\n" + "b" * 30_000 + "\n" + "'" + "c" * 30_000 + "'"
    key = {"cell": run_of(result)["cell"]}
    assert await pages(lab, handle, **key) == whole
    head = len(re.findall("a{1000,}", text)[0])
    assert await pages(lab, handle, cursor_in(text), **key) == whole[head:]


LARGE = {
    "stream": "print('x\\n' * 3_000_000)",
    "result": "'x' * 3_000_000",
    "display": "display({'text/markdown': 'x' * 3_000_000}, raw=True)",
    "error": "raise ValueError('x' * 300_000)",
    "many errors": "for i in range(300): get_ipython().showtraceback((ValueError, ValueError('x' * 9999), None))",
    "control characters": "print('\\x01' * 3_000_000)",
    "many streams": (
        "import sys\n"
        "for i in range(2000): print(i, 'y' * 100, file=(sys.stdout, sys.stderr)[i % 2], flush=True)"
    ),
}


@pytest.mark.parametrize("source", LARGE.values(), ids=list(LARGE))
async def test_o12_no_result_is_too_large(box: tuple[Lab, str], source: str) -> None:
    lab, handle = box
    result = await lab.cell(handle, source)
    assert run_of(result)["state"] in ("complete", "error")
    cell = run_of(result)["cell"]
    everything = [
        result,
        await lab.call("read_outputs", sandbox=handle, cell=cell),
        await lab.call("read_outputs", sandbox=handle, cell=cell, cursor="0:0"),
        await lab.call("read_notebook", sandbox=handle, cells=cell, outputs=True),
        await lab.call("read_notebook", sandbox=handle, cells="all", outputs=True),
        await lab.call("read_notebook", sandbox=handle),
        await lab.call("run_cell", sandbox=handle, cells=cell, wait=0),
        await lab.call("list_sandboxes"),
        await lab.call("interrupt", sandbox=handle, everything=True),
        await lab.cell(handle, "None"),
        await lab.call("delete_cell", sandbox=handle, cell=cell),
    ]
    assert [len(text_of(r)) for r in everything if len(text_of(r)) > LIMIT] == []


async def test_o12_files_and_commands_are_bounded_too(box: tuple[Lab, str]) -> None:
    lab, handle = box
    await lab.cell(
        handle,
        "import os\nos.makedirs('many', exist_ok=True)\n"
        "for i in range(600): open('many/' + f'{i:03}' + 'n' * 250, 'w').close()\n"
        "open('large', 'w').write('é' * 5_000_000)",
    )
    for tool, arguments in (
        ("list_files", {"path": "many"}),
        ("read_file", {"path": "large"}),
        ("read_file", {"path": "many/" + "n" * 5000}),
        ("run_command", {"command": "head -c 5000000 large"}),
        ("edit_cell", {"cell": "nothing", "source": "x" * 500_000}),
        ("create_cell", {"source": "x" * 1_100_000}),
    ):
        result = await lab.call(tool, sandbox=handle, **arguments)
        assert len(text_of(result)) < LIMIT, tool


async def test_o12_commands_page_exactly(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.call("run_command", sandbox=handle, command="seq 1 200000")
    assert len(text_of(result)) <= 25_000
    expected = "".join(f"{i}\n" for i in range(1, 200_001))
    assert await pages(lab, handle, run=run_of(result)["id"]) == expected


async def test_a_large_error_does_not_make_a_large_notebook(box: tuple[Lab, str]) -> None:
    lab, handle = box
    result = await lab.cell(handle, "raise ValueError('begin' + 'x' * 2_000_000 + 'end')")
    assert run_of(result)["state"] == "error"
    (error,) = (await saved(lab, handle, result))["outputs"]
    assert len(str(error)) < 700_000
    assert error["evalue"].startswith("begin") and error["evalue"].endswith("end")
    assert "characters left out" in error["evalue"]


# -- processes and late output --------------------------------------------------------------------


async def test_children_of_a_cell_speak_in_order(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "import multiprocessing\n"
        "def work(i):\n"
        "    for n in range(100): print('worker', i, 'line', n, '\\ud800' if n == 7 else '')\n"
        "fork = multiprocessing.get_context('fork')\n"
        "with fork.Pool(3) as pool: pool.map(work, range(3), 1)\n"
        "def long(): print('x' * 50_000, end='.')\n"
        "process = fork.Process(target=long); process.start(); process.join()"
    )
    result = await lab.cell(handle, source)
    text = streams(await saved(lab, handle, result))
    for i in range(3):
        numbers = re.findall(rf"^worker {i} line (\d+)", text, re.M)
        assert numbers == [str(n) for n in range(100)]
    assert "x" * 50_000 + "." in text and text.count("\\ud800") == 3


async def test_children_of_a_cell_are_heard(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "import multiprocessing, os, subprocess\n"
        "os.system('echo from a shell')\n"
        "subprocess.run(['echo', 'from a process'])\n"
        "def work(i): print('from a worker', i, flush=True); return i\n"
        "with multiprocessing.get_context('fork').Pool(1) as pool: print(pool.map(work, range(2)))"
    )
    result = await lab.cell(handle, source)
    text = text_of(result)
    for wanted in (
        "from a shell",
        "from a process",
        "from a worker 0",
        "from a worker 1",
        "[0, 1]",
    ):
        assert wanted in text


async def test_late_output_of_a_long_run_is_added_to_its_file(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "import threading, time\n"
        "def talk():\n    time.sleep(0.3)\n    for i in range(10): print('late', i)\n"
        "print('x' * 100_000, end='')\nthreading.Thread(target=talk).start()"
    )
    result = await lab.cell(handle, source)
    expected = "x" * 100_000 + "".join(f"late {i}\n" for i in range(10))
    end = time.monotonic() + 9
    while (found := await pages(lab, handle, cell=run_of(result)["cell"])) != expected:
        assert time.monotonic() < end, found[-200:]
        await asyncio.sleep(0.1)
    assert await on_disk(lab, handle, result) == expected


async def test_an_old_run_gives_nothing_to_a_new_run_of_its_cell(box: tuple[Lab, str]) -> None:
    lab, handle = box
    source = (
        "import threading, time\n"
        "n = globals().get('n', 0) + 1\n"
        "def talk(n):\n    time.sleep(0.5)\n    print('late of run', n)\n"
        "if n == 1: threading.Thread(target=talk, args=(n,)).start()\nprint('run', n)"
    )
    first = await lab.cell(handle, "n = 0\n")
    first = await lab.cell(handle, source)
    again = await lab.call("run_cell", sandbox=handle, cells=run_of(first)["cell"])
    assert text_of(again).splitlines()[1:] == ["run 2"]
    await lab.cell(handle, "time.sleep(1)")
    assert streams(await saved(lab, handle, again)) == "run 2\n"
