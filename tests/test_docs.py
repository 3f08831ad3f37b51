"""What the docs say is what the code does."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml

from seer_mcp.cli import parser

from .pages import PAGES, ROOT, marked, name_of

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


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    dead = [link for link in marked(page).links if not leads_somewhere(page, link)]
    assert dead == []


def leads_somewhere(page: Path, link: str) -> bool:
    """A file and an anchor that are there; of another site only that the address can be one."""
    parts = urlsplit(unquote(link))
    if parts.scheme:
        plain = not re.search(r"[\s<>\"]", link)
        return plain and parts.scheme == "https" and "." in parts.netloc
    target = (page.parent / parts.path).resolve() if parts.path else page
    there = target.exists() and target.is_relative_to(ROOT)
    return there and (not parts.fragment or parts.fragment in marked(target).anchors)


@pytest.mark.parametrize(
    "dead",
    [
        "gone.md",
        "docs/team.md#gone",
        "#gone",
        "../../outside",
        "https://nowhere",
        "https://a b.org",
    ],
)
def test_a_link_that_leads_nowhere_is_seen(dead: str) -> None:
    assert leads_somewhere(ROOT / "README.md", "docs/team.md#where-kernels-run")
    assert not leads_somewhere(ROOT / "README.md", dead)


def test_pages_that_the_code_names_are_there() -> None:
    files = [
        path
        for top in ("seer_mcp", "tool_packs", "examples")
        for path in (ROOT / top).rglob("*.py")
    ]
    named = {
        found
        for path in files
        for found in re.findall(r"docs/[\w/-]+\.md(?:#[\w-]+)?", path.read_text())
    }
    assert len(named) >= 5
    assert [name for name in sorted(named) if not leads_somewhere(ROOT / "README.md", name)] == []


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


def test_the_workflow_runs_the_whole_check_on_every_python_and_knows_no_secret() -> None:
    text = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    (job,) = yaml.safe_load(text)["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    (pythons,) = (step["with"]["python-version"] for step in job["steps"] if "with" in step)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    assert sorted(pythons.split()) == sorted(named) and pythons.split()[-1] == named[0]
    (tried,) = (step["env"]["SEER_MCP_CI_PYTHONS"] for step in job["steps"] if "env" in step)
    assert tried.split() == named[1:]
    assert "secrets." not in text


def test_what_the_whole_check_calls_is_there_and_can_be_run() -> None:
    steps = re.findall(r"^\.ci/\w+$", (ROOT / ".ci" / "run").read_text(), re.M)
    scripts = {path for path in (ROOT / ".ci").iterdir() if path.is_file() and not path.suffix}
    assert {ROOT / step for step in steps} == scripts - {ROOT / ".ci" / "run"}
    assert all(os.access(script, os.X_OK) for script in scripts)
