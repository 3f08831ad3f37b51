"""A finished notebook through the real command line: run again and compared, exported, reported."""

from __future__ import annotations

import ast
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from seer_mcp.errors import BadInput
from seer_mcp.replay.compare import Bounds, likeness, same_text
from seer_mcp.replay.models import exchanged, exchanges, loads

from .support import Lab, open_lab, processes_of, read_cells, streams

MEASURE = """\
from tool_packs import organisms
from tool_packs.generation import next_token

one, other = ([w.strip() for w in organisms.LENS_WORDS[side]][:6] for side in ("gender", "gender, other side"))
asked = [
    [{"role": "user", "content": p}, {"role": "assistant", "content": organisms.PREFILL}]
    for p in organisms.NEUTRAL_PROMPTS[:8]
]
p = next_token(m, asked, {"one": one, "other": other})["candidate_logprobs"].exp()  # [prompt, 2]
share = p[:, 0] / p.sum(-1)
print("prompts", len(asked))
print(f"share of the first group {share.mean().item():.4f}")"""
PLOT = """\
import matplotlib.pyplot as plt

plt.plot(share)
plt.show()"""

ACTIVE = """\
from IPython.display import HTML, Markdown, display

display(HTML("<script>alert(1)</script>"))
display(Markdown("<script>alert(2)</script> ![x](https://example.org/x.png)"))
print("<script>alert(3)</script>\\n```\\n# no heading")"""


def cli(folder: Path, *arguments: str, code: int = 0, state: Path | None = None) -> str:
    """What `seer-mcp …` printed, when it ended with `code`."""
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=folder,
        env={**os.environ, "SEER_MCP_STATE": str(state or folder / "state")},
    )
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr
    return done.stdout + done.stderr


async def measured(lab: Lab) -> Path:
    handle = await lab.start(name="preference")
    await lab.cell(handle, "# Whom does it take its user for?\n\nA question.", type="markdown")
    await lab.ok("load_model", sandbox=handle, model="organism:user_female")
    shown = (await lab.cell(handle, MEASURE)).meta["seer/run"]["cell"]
    await lab.ok("create_cell", sandbox=handle, source=PLOT)
    await lab.ok("create_cell", sandbox=handle, source=ACTIVE)
    await lab.no("create_cell", sandbox=handle, source="print('before')\n1 / 0")
    await lab.ok("create_cell", sandbox=handle, source="print('never')", run=False)
    await lab.ok(
        "submit_findings",
        sandbox=handle,
        claim="It takes <b>everybody</b> for a woman.",
        evidence=shown,
        confidence=0.8,
    )
    path = await lab.notebook_path(handle)
    await lab.ok("stop_sandbox", sandbox=handle)
    return path


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module")
async def made(tmp_path_factory: pytest.TempPathFactory, anyio_backend: str) -> Path:
    """A notebook of a real run on organism:user_female."""
    folder = tmp_path_factory.mktemp("run")
    async with open_lab(folder) as lab:
        return await measured(lab)


@pytest.mark.anyio
async def test_on_the_same_model_all_comes_out_alike(made: Path, tmp_path: Path) -> None:
    before = made.read_bytes()
    done = cli(tmp_path, "replay", str(made), "--json", "said.json")
    assert "5 of 5 cells alike, 0 differ" in done
    assert made.read_bytes() == before
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["alike"] and [each["verdict"] for each in said["cells"]] == [*["alike"] * 5, "left"]
    assert "numbers within 0.001" in str(said["cells"][0]["notes"])
    assert "1 of 1 images there" in str(said["cells"][2]["notes"])
    assert "ZeroDivisionError" in str(said["cells"][4]["notes"])
    again = Path(said["replay"])
    assert again.parent.parent == made.parent.parent and again != made
    cells = read_cells(again)
    assert "share of the first group" in streams(cells[2])
    assert "*From preference.ipynb" in "".join(cells[-2]["source"])
    assert "5 of 5 cells came out alike" in "".join(cells[-1]["source"])


@pytest.mark.anyio
async def test_on_another_model_it_says_where_it_differs(made: Path, tmp_path: Path) -> None:
    done = cli(
        tmp_path, "replay", str(made), "--model", "organism:control", "--json", "said.json", code=1
    )
    said = json.loads((tmp_path / "said.json").read_text())
    assert [each["verdict"] for each in said["cells"]] == [
        *("alike", "differs"),
        *["alike"] * 3,
        "left",
    ]
    assert said["models"] == {"m": {"before": "organism:user_female", "after": "organism:control"}}
    (difference,) = said["cells"][1]["differences"]
    assert difference["what"] == "numbers"
    assert float(difference["before"]) > 0.7 > float(difference["after"])
    assert f"{difference['before']} -> {difference['after']}" in done
    source = "".join(read_cells(Path(said["replay"]))[1]["source"])
    assert "load_model('organism:control')" in source


# -- for readers ------------------------------------------------------------------------------


def without_markup(page: str) -> str:
    """The page, when nothing in it can run or ask a server for anything."""
    assert "<script" not in page and "alert(2)&lt;/script" in page
    assert "default-src 'none'" in page and 'src="http' not in page
    return page


def test_a_page_has_all_of_it_and_nothing_that_runs(made: Path, tmp_path: Path) -> None:
    cli(tmp_path, "export", str(made), "--out", "page.html", state=made.parents[3] / "state")
    page = without_markup((tmp_path / "page.html").read_text())
    for part in (
        "<title>Whom does it take its user for?</title>",
        "m: organism:user_female",
        "transformers 5.",
        "nothing was billed",
        "seer-mcp replay preference.ipynb",
        "share of the first group",
        "It takes &lt;b&gt;everybody&lt;/b&gt; for a woman.",
        "data:image/png;base64,",
        "5 cells run in",
    ):
        assert part in page, part


def test_a_script_is_python_and_what_did_not_run_is_a_comment(made: Path, tmp_path: Path) -> None:
    cli(tmp_path, "export", str(made), "--to", "script", "--out", "again.py")
    text = (tmp_path / "again.py").read_text()
    ast.parse(text)
    assert "# 1 / 0" in text and "it ended with error" in text and "it was never run" in text


@pytest.mark.slow
def test_a_script_does_what_the_notebook_did(made: Path, tmp_path: Path) -> None:
    cli(tmp_path, "export", str(made), "--to", "script", "--out", "again.py")
    done = subprocess.run(
        [sys.executable, "again.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=60,
        env={**os.environ, "MPLBACKEND": "agg"},
    )
    assert done.returncode == 0, done.stderr
    (line,) = [each for each in done.stdout.splitlines() if each.startswith("share")]
    assert line in "".join(
        streams(cell) for cell in read_cells(made) if cell["cell_type"] == "code"
    )


def test_markdown_has_its_images_beside_it_and_outputs_are_no_markup(
    made: Path, tmp_path: Path
) -> None:
    cli(tmp_path, "export", str(made), "--to", "markdown", "--out", "it.md")
    text = (tmp_path / "it.md").read_text()
    (image,) = (tmp_path / "it_files").iterdir()
    assert image.read_bytes().startswith(b"\x89PNG") and f"it_files/{image.name}" in text
    assert "````text\n<script>alert(3)</script>\n```\n# no heading\n````" in text


def test_a_report_puts_runs_side_by_side(made: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere.ipynb"
    other.write_bytes(made.read_bytes())
    said = cli(tmp_path, "report", str(made), str(other), state=made.parents[3] / "state")
    assert f"wrote {tmp_path / 'report.html'}" in said
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and page.count("<figure>") == 2
    assert page.count("No findings were submitted.") == 1  # the copy came without its record
    assert "80%" in page and "calls that changed or ran something" in page
    assert page.count('<section id="run-') == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["replay", "gone.ipynb"], "No notebook 'gone.ipynb'."),
        (["replay", "it.ipynb"], "none of its cells was ever run"),
        (["replay", "it.ipynb", "--similarity", "2"], "'2' is not a number from 0 to 1"),
        (["export", "it.ipynb", "--out", "it.ipynb"], "write over a notebook"),
        (["report", "it.ipynb", "--out", "nowhere/x.html"], "there is no folder"),
    ],
)
def test_what_cannot_be_done_is_said(tmp_path: Path, arguments: list[str], said: str) -> None:
    (tmp_path / "it.ipynb").write_text(
        json.dumps({"cells": [], "metadata": {}, "nbformat": 4, "nbformat_minor": 5})
    )
    assert said in cli(tmp_path, *arguments, code=2)


# -- a replay that does not reach its end -----------------------------------------------------


def written(folder: Path, *cells: tuple[str, str]) -> Path:
    """A notebook of another program: (source, what it printed)."""
    path = folder / "by-hand.ipynb"
    made = [
        {
            "cell_type": "code",
            "id": f"cell-{number}",
            "metadata": {},
            "execution_count": number,
            "source": source,
            "outputs": [{"output_type": "stream", "name": "stdout", "text": text}],
        }
        for number, (source, text) in enumerate(cells, 1)
    ]
    book = {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    path.write_text(json.dumps(book))
    return path


SLEEP = "import time\nprint('asleep', flush=True)\ntime.sleep(60)"


@pytest.mark.parametrize(
    ("source", "flags", "state", "stopped"),
    [
        (
            "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)",
            [],
            "kernel_died",
            "kernel_died",
        ),
        (SLEEP, ["--cell-minutes", "0.02"], "interrupted", "ran for more than 1.2 s"),
    ],
)
def test_why_it_did_not_reach_the_end_is_said(
    tmp_path: Path, source: str, flags: list[str], state: str, stopped: str
) -> None:
    path = written(tmp_path, ("print(0.50001)", "0.5\n"), (source, "asleep\n"), ("print(1)", "1\n"))
    cli(tmp_path, "replay", str(path), *flags, "--json", "said.json", code=1)
    said = json.loads((tmp_path / "said.json").read_text())
    assert [each["verdict"] for each in said["cells"]] == ["alike", "differs", "differs"]
    assert said["cells"][1]["state"] == {"before": "complete", "after": state}
    assert stopped in said["stopped"]
    assert "the replay ended before it" in said["cells"][2]["differences"][0]["says"]


def test_after_ctrl_c_what_was_seen_is_told_and_nothing_runs_on(tmp_path: Path) -> None:
    path = written(tmp_path, ("print(1)", "1\n"), (SLEEP, "asleep\n"))
    with subprocess.Popen(
        [sys.executable, "-m", "seer_mcp.cli", "replay", str(path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "SEER_MCP_STATE": str(tmp_path / "state")},
    ) as replay:
        assert replay.stdout is not None
        assert "alike" in replay.stdout.readline()
        replay.send_signal(signal.SIGINT)
        rest = replay.stdout.read()
        assert replay.wait(timeout=30) == 130, rest
    assert "It did not reach the end: it was interrupted" in rest
    (record,) = (tmp_path / "state" / "sandboxes").iterdir()
    assert processes_of(record.name) == []


# -- what is alike ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "alike"),
    [
        ("share 0.9500", "share 0.9504", True),
        ("share 0.9500", "share 0.9600", False),
        ("12 prompts", "13 prompts", False),
        ("12,500 rows", "12,500 rows", True),
        ("loss 1e-9", "loss 3e-9", True),
        ("took 1.5 s at 200 it/s", "took 15.2 s at 20 it/s", True),
        ("<A at 0x7f00aa11bb>", "<A at 0x7f99cc22dd>", True),
        ("gpt2 says no", "gpt3 says no", False),
        ("a #", "a 1", False),
        ("-0.5", "0.5", False),
        ("nan", "0.5", False),
        ("x 1.0\ny 2.0", "x 1.0", False),
        ("word\n0.50001", "word\n0.5", True),
    ],
)
def test_texts_are_alike_when_their_numbers_are_near(before: str, after: str, alike: bool) -> None:
    assert same_text(before, after, Bounds()).alike is alike
    assert same_text(after, before, Bounds()).alike is alike


def test_numbers_are_told_beside_words_that_differ() -> None:
    found = same_text("says yes\nshare 0.9", "says no\nshare 0.5", Bounds())
    assert [(d.what, d.before, d.after) for d in found.differences] == [
        ("numbers", "0.9", "0.5"),
        ("text", "says yes", "says no"),
    ]


def test_texts_are_alike_when_they_resemble_each_other_as_far_as_asked() -> None:
    one, other = "I recommend the blue dress.", "I recommend the red dress."
    ratio = likeness(one, other)
    assert 0.8 < ratio < 1
    assert not same_text(one, other, Bounds()).alike
    assert same_text(one, other, Bounds(similarity=ratio - 0.01)).alike
    assert not same_text(one, other, Bounds(similarity=ratio + 0.01)).alike


def test_a_model_is_exchanged_and_all_else_of_its_cell_stays() -> None:
    source = (
        "é = 'ü'; m = load_model('a/b', revision='x', dtype='float16', alias='n')\n"
        "c = tool_packs.models.load_model(\n    name,\n    base='z')  # why"
    )
    found = loads([("1", source)])
    assert [(each.variable, each.model) for each in found] == [("m", "a/b"), ("c", "name")]
    assert exchanges(["q/r"], found) == {"m": "q/r"}
    assert exchanged(source, exchanges(["q/r", "c=organism:base"], found)) == (
        "é = 'ü'; m = load_model('q/r', dtype='float16')\n"
        "c = tool_packs.models.load_model('organism:base')  # why"
    )
    for wrong in ("x=q/r", "m="):
        with pytest.raises(BadInput):
            exchanges([wrong], found)
    with pytest.raises(BadInput, match="no cell of the notebook"):
        exchanges(["q/r"], loads([("1", "%magic\nm = load_model('a')")]))
