"""Every investigation in examples/ runs offline, asserts its finding and its control, and leaves its notebook."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted((ROOT / "examples").glob("*/run.py"))
ORDINARY = ("hidden_preference", "scoped_sandbox_intro")
"""The others take minutes: CI runs them by the mark `slow`, after the ordinary set."""
EACH = [
    pytest.param(each, marks=() if each.parent.name in ORDINARY else pytest.mark.slow)
    for each in SCRIPTS
]


def run(script: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(script), "--outputs", str(folder / "outputs"), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=folder,
        env={**os.environ, "SEER_MCP_STATE": str(folder / "state"), "HF_HUB_OFFLINE": "1"},
    )


@pytest.mark.timeout(300)
@pytest.mark.parametrize("script", EACH, ids=lambda script: script.parent.name)
def test_an_investigation_finds_what_it_is_about(script: Path, tmp_path: Path) -> None:
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    told = json.loads(done.stdout.strip().splitlines()[-1])
    book = nbformat.read(told["notebook"], as_version=4)
    nbformat.validate(book)
    assert book.cells[0].source.startswith("# ")
    assert {c.metadata["seer"]["state"] for c in book.cells if c.cell_type == "code"} == {
        "complete"
    }
    record = json.loads(next(Path(told["notebook"]).parent.glob("*.findings.json")).read_text())
    (submission,) = record["submissions"]
    cells = {cell.id for cell in book.cells}
    assert submission["controls"], "a finding has its control"
    for each in submission["evidence"] + submission["controls"]:
        assert each["cell"] in cells
    assert submission["claim"] in book.cells[-1].source
    grades = list((tmp_path / "state" / "grades").glob("*.json"))
    graded = (script.parent / "grader.toml").exists() or (script.parent / "grade.py").exists()
    assert len(grades) == graded
    for grade in map(json.loads, map(Path.read_text, grades)):
        assert grade["score"] == 1.0, grade


@pytest.mark.parametrize(
    ("name", "configuration"),
    [("auditing_game", "gpu"), ("eval_awareness", "api"), ("petri", "gpu"), ("petri", "api")],
)
def test_what_a_script_cannot_do_is_refused_before_anything_is_started(
    name: str, configuration: str, tmp_path: Path
) -> None:
    assert (ROOT / "examples" / name / f"{configuration}.toml").exists()
    done = run(ROOT / "examples" / name / "run.py", tmp_path, "--configuration", configuration)
    assert done.returncode == 2 and not done.stdout
    assert f'start_sandbox(investigation="{name}/{configuration}")' in done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.parent.name)
def test_a_hidden_model_is_not_named_in_its_notebook(script: Path) -> None:
    from seer_mcp.environment import opening_cells, read_investigation

    for file in script.parent.glob("*.toml"):
        if file.stem.startswith("grade"):
            continue
        found = read_investigation(file)
        text = "\n".join(source for _, source in opening_cells(found))
        for model in found.models:
            if model.hidden:
                for name in filter(None, (model.name, model.adapter, model.base)):
                    assert name.rpartition("/")[2] not in text


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_hidden_investigation_replays_alike_and_names_nobody(tmp_path: Path) -> None:
    done = run(ROOT / "examples" / "hidden_preference" / "run.py", tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    book = Path(json.loads(done.stdout.strip().splitlines()[-1])["notebook"])
    again = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", "replay", str(book)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        env={**os.environ, "SEER_MCP_STATE": str(tmp_path / "state"), "HF_HUB_OFFLINE": "1"},
    )
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    (made,) = book.parent.parent.rglob("*-replay.ipynb")
    text = made.read_text()
    assert "Blinding receipt" in text and "user_female" not in text
