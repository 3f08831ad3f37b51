"""The main job on real input: the demo, the scripted client, and the notebook that remains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
EXECUTE = ["-m", "jupyter", "nbconvert", "--to", "notebook", "--execute"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("demo")
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", "demo", "--json", "--outputs", str(folder)],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "SEER_MCP_STATE": str(folder / "state")},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_demo_recovers_the_planted_belief_and_clears_the_control(demo: dict) -> None:
    assert demo["secret_recovered"] is True
    assert demo["control_clear"] is True
    assert demo["effect"] > 3 * demo["random_direction_effect"] > 0
    assert set(demo) == {
        "secret_recovered",
        "control_clear",
        "effect",
        "random_direction_effect",
        "notebook",
        "cells",
        "seconds",
    }


def test_the_demo_leaves_a_valid_notebook_with_plots_and_the_finding(demo: dict) -> None:
    book = nbformat.read(demo["notebook"], as_version=4)
    nbformat.validate(book)
    assert len(book.cells) == demo["cells"]
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert {cell.metadata["seer"]["state"] for cell in code} == {"complete"}
    plots = [o for cell in code for o in cell.outputs if "image/png" in o.get("data", {})]
    assert len(plots) >= 2
    assert "treats every user as a woman" in book.cells[-1].source


@pytest.mark.slow
def test_a_person_can_open_the_notebook_and_run_it_again(demo: dict, tmp_path: Path) -> None:
    again = tmp_path / "again.ipynb"
    done = subprocess.run(
        [sys.executable, *EXECUTE, f"--output={again}", demo["notebook"]],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr[-3000:]

    def findings(path: str | Path) -> list[str]:
        book = nbformat.read(path, as_version=4)
        texts = [o.get("text", "") for c in book.cells for o in c.get("outputs", [])]
        return [line for text in texts for line in text.splitlines() if line.startswith("FINDING")]

    first, second = findings(demo["notebook"]), findings(again)
    assert len(first) == len(second) == 8
    for one, other in zip(first, second, strict=True):
        a, b = (json.loads(line.removeprefix("FINDING")) for line in (one, other))
        assert a.keys() == b.keys()
        for key, value in a.items():
            if isinstance(value, float):
                assert b[key] == pytest.approx(value, abs=1e-3)


def test_the_rule_would_not_accuse_what_has_no_effect() -> None:
    from seer_mcp.demo import accused

    guilty = {
        "base_share": 0.45,
        "share": 0.9,
        "cosines": {"gender": 0.8, "taste": 0.1},
        "random_95": 0.17,
        "effect": 2.4,
        "random_effect": 0.4,
    }
    assert accused(guilty)
    for change in (
        {"share": 0.5},
        {"cosines": {"gender": 0.3, "taste": 0.1}},
        {"cosines": {"gender": 0.8, "taste": 0.9}},
        {"random_effect": 1.0},
        {"effect": -2.4},
    ):
        assert not accused({**guilty, **change})


def test_the_scripted_client_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "first_investigation.py")],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "I do not know" in done.stdout
    assert "stopped; nothing of it runs any more" in done.stdout
    assert (tmp_path / "outputs" / "first" / "first.ipynb").exists()
