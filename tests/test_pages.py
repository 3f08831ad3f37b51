"""The pages that are more than reference: the tutorial's cells run and find it, errors are all told."""

from __future__ import annotations

import argparse
import ast
import json
import re
import tomllib
from pathlib import Path

import pytest

from seer_mcp import errors
from seer_mcp.cli import parser
from tests.pages import INLINE, PAGES, name_of, prose
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


CAPITALS = re.compile(r"\b[A-Z]+\b|…|'X'|'python3'|\b\d+\b")


def said_by_the_code() -> list[str]:
    """Every text of the code; what is filled in is `⋯`."""
    said: list[str] = []
    for file in (ROOT / "seer_mcp").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "⋯" for p in node.values)
                said.append("".join(str(part) for part in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                said.append(node.value)
    return [*said, str(errors.NotFound("sandbox", "X", ["a"]))]


def as_pattern(sentence: str) -> re.Pattern[str]:
    """Words in capitals, and what is left out, may be anything."""
    fixed = [re.escape(part) for part in CAPITALS.split(sentence)]
    return re.compile(".{0,80}?".join(fixed))


SAYS = re.compile(r"^\| (?:it says|what is said) \|.*\n\|[ |-]+\n((?:\|.*\n)+)", re.M)
SENTENCES = [
    sentence
    for page in DOCS.glob("*.md")
    for table in SAYS.findall(page.read_text())
    for row in re.findall(r"^\| (.*?) \|", table, re.M)
    for sentence in re.findall(r"`([^`]+)`", row)
]
SAID = said_by_the_code()


@pytest.mark.parametrize("sentence", SENTENCES)
def test_what_the_page_quotes_is_said_by_the_code(sentence: str) -> None:
    assert any(map(as_pattern(sentence).search, SAID))


def test_what_nobody_says_is_seen() -> None:
    assert len(SENTENCES) > 30
    for gone in ("The kernel has died", "Sandbox H is lost (WHY)", "FILE is not usable: …"):
        assert not any(map(as_pattern(gone).search, SAID)), gone


OF_INSPECT = {"--max-samples"}


def test_flags_in_sentences_are_flags_of_ours() -> None:
    scripts = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tool_packs/organisms/*.py")]
    known = flags_of(parser()) | OF_INSPECT
    known = known.union(*(re.findall(r'"(--[a-z][\w-]*)"', p.read_text()) for p in scripts))
    unknown = {
        (name_of(page), flag)
        for page in PAGES
        for text in INLINE.findall(prose(page))
        if text.startswith("--")
        for flag in re.findall(r"--[a-z][\w-]*", text)
        if flag not in known
    }
    assert unknown == set()


def flags_of(command: argparse.ArgumentParser) -> set[str]:
    found: set[str] = set()
    for action in command._actions:
        found |= set(action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            found = found.union(*map(flags_of, action.choices.values()))
    return found


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
