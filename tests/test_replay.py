"""A finished notebook is run again through the real command line, and what differs is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from .support import Lab, open_lab, read_cells, streams

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


def cli(
    folder: Path, *arguments: str, code: int = 0, **more: Any
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", *arguments],
        capture_output=True,
        text=True,
        timeout=110,
        cwd=folder,
        env={**os.environ, "SEER_MCP_STATE": str(folder / "state")},
        **more,
    )
    assert done.returncode == code, done.stdout + done.stderr[-3000:]
    assert "Traceback" not in done.stderr, done.stderr
    return done


async def measured(lab: Lab) -> Path:
    handle = await lab.start(name="preference")
    await lab.cell(handle, "# Whom does it take its user for?\n\nA question.", type="markdown")
    await lab.ok("load_model", sandbox=handle, model="organism:user_female")
    shown = (await lab.cell(handle, MEASURE)).meta["seer/run"]["cell"]
    await lab.ok("create_cell", sandbox=handle, source=PLOT)
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
    assert "4 of 4 cells alike, 0 differ" in done.stdout
    assert made.read_bytes() == before
    said = json.loads((tmp_path / "said.json").read_text())
    assert said["alike"] and [each["verdict"] for each in said["cells"]] == [*["alike"] * 4, "left"]
    assert "numbers within 0.001" in str(said["cells"][0]["notes"])
    assert "1 of 1 images there" in str(said["cells"][2]["notes"])
    assert "ZeroDivisionError" in str(said["cells"][3]["notes"])
    again = Path(said["replay"])
    assert again.parent.parent == made.parent.parent and again != made
    cells = read_cells(again)
    assert "share of the first group" in streams(cells[2])
    assert "*From preference.ipynb" in "".join(cells[-2]["source"])
    assert "4 of 4 cells came out alike" in "".join(cells[-1]["source"])


@pytest.mark.anyio
async def test_on_another_model_it_says_where_it_differs(made: Path, tmp_path: Path) -> None:
    done = cli(
        tmp_path, "replay", str(made), "--model", "organism:control", "--json", "said.json", code=1
    )
    said = json.loads((tmp_path / "said.json").read_text())
    assert [each["verdict"] for each in said["cells"]] == [
        "alike",
        "differs",
        "alike",
        "alike",
        "left",
    ]
    assert said["models"] == {"m": {"before": "organism:user_female", "after": "organism:control"}}
    (difference,) = said["cells"][1]["differences"]
    assert difference["what"] == "numbers"
    assert float(difference["before"]) > 0.7 > float(difference["after"])
    assert f"{difference['before']} -> {difference['after']}" in done.stdout
    source = "".join(read_cells(Path(said["replay"]))[1]["source"])
    assert "load_model('organism:control')" in source
