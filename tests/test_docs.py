"""What the docs say is what the code does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from seer_mcp.cli import parser

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "docs"))

import clients  # noqa: E402 (scripts of docs/, which is no package)
import tables  # noqa: E402


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_the_tables_are_those_of_the_code(page: Path) -> None:
    assert tables.filled(page) == page.read_text(), "run: uv run python docs/tables.py"


@pytest.mark.parametrize(
    "path", clients.files(), ids=lambda path: path.relative_to(ROOT).as_posix()
)
def test_what_clients_are_added_by_is_that_of_the_code(path: Path) -> None:
    assert clients.files()[path] == path.read_text(), "run: uv run python docs/clients.py"


def test_no_command_is_left_of_an_investigation_that_is_gone() -> None:
    there = set((ROOT / ".clients" / "claude-code" / "commands").iterdir())
    assert there <= clients.files().keys()


def test_the_first_block_of_the_readme_holds_the_two_commands() -> None:
    block = re.search(r"```console\n(.*?)```", README, re.S)
    assert block is not None
    commands = [line.split("#")[0].strip() for line in block[1].splitlines()]
    assert commands == ["pip install uv", "uv run seer-mcp demo", "uv run pytest"]


def test_links_between_our_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name} -> {target}"


def test_the_json_for_a_desktop_client_is_json() -> None:
    (block,) = re.findall(r"```json\n(.*?)```", README, re.S)
    server = json.loads(block)["mcpServers"]["seer"]
    parser().parse_args(["stdio", *server["args"]])
    assert Path(server["command"]).is_absolute()


def test_the_version_is_the_same_everywhere() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    done = subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"seer-mcp {project['version']}"
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.parametrize("name", ["torch", "ipykernel", "jupyter-client"])
def test_the_server_alone_does_not_need(name: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert not [d for d in project["dependencies"] if d.lower().startswith(name)]
    assert all("<" in d for d in project["dependencies"]), "every dependency has an upper bound"


def test_every_row_of_the_faults_has_a_test_and_every_test_a_row() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text()
    rows = re.findall(r"^\| `([A-Z]\d\d)` \|", page, re.M)
    assert len(rows) == len(set(rows)) >= 46
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    named = {name.upper() for name in re.findall(r"def test_([bknopcdmxlsht]\d\d)_", tests)}
    assert named == set(rows)
