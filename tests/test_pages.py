"""The pages that are more than reference: the tutorial's cells run and find it, errors are all told."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path

import pytest

from seer_mcp import errors
from tests.support import open_lab, text_of

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), re.S)


@pytest.mark.anyio
async def test_the_cells_of_the_tutorial_find_the_belief_and_clear_the_control(
    tmp_path: Path,
) -> None:
    async with open_lab(tmp_path) as lab:
        sandbox = await lab.start(name="first")
        await lab.ok("load_model", sandbox=sandbox, model="organism:user_female")
        printed = ""
        for cell in blocks("tutorial.md", "python"):
            done = await lab.cell(sandbox, cell)
            assert not done.is_error, text_of(done)
            printed += text_of(done)
    found = re.search(r"women's items: ([\d.]+) without the adapter, ([\d.]+) with it", printed)
    control = re.search(r"the control: ([\d.]+)", printed)
    assert found and control
    without, with_adapter, cleared = float(found[1]), float(found[2]), float(control[1])
    assert with_adapter - without > 0.3
    assert abs(cleared - without) < 0.1
    assert "do not know" in printed


def kinds(top: type[Exception]) -> set[str]:
    return {top.__name__}.union(*(kinds(each) for each in top.__subclasses__()))


def test_every_kind_of_error_has_its_row() -> None:
    # Those that only gather others are no sentence of their own.
    gather = {"SeerError", "KernelUnavailable", "SandboxUnavailable"}
    ours = {
        name for name in kinds(errors.SeerError) - gather if getattr(errors, name, None) is not None
    }
    told = set(re.findall(r"\b[A-Z]\w+(?=[,)])", (DOCS / "errors.md").read_text()))
    assert ours <= told
    assert {name for name in told if hasattr(errors, name)} == ours


def test_every_page_stands_in_the_index() -> None:
    index = (DOCS / "index.md").read_text()
    trees = " ".join(blocks("index.md", r"\{toctree\}"))
    listed = {line for line in trees.split() if not line.startswith(":")}
    pages = {path.stem for path in DOCS.glob("*.md")} - {"index"}
    assert pages <= listed, pages - listed
    assert "seer-mcp demo" in index


def test_the_readme_has_the_name_that_the_registry_looks_for() -> None:
    entry = json.loads((ROOT / ".clients" / "registry" / "server.json").read_text())
    assert f"<!-- mcp-name: {entry['name']} -->" in (ROOT / "README.md").read_text()


def test_the_entry_points_of_the_page_are_those_that_are_read() -> None:
    from seer_mcp.plugins import BACKENDS, PACKS

    (block,) = blocks("own-techniques.md", "toml")
    assert set(tomllib.loads(block)["project"]["entry-points"]) == {PACKS, BACKENDS}


def test_the_documented_steps_of_a_pack_work(tmp_path: Path) -> None:
    from seer_mcp.cli import main

    folder = tmp_path / "packs"
    assert main(["packs", "new", "my_lens", "--in", str(folder)]) == 0
    assert main(["packs", "check", str(folder), "--no-run"]) == 0
