"""Investigations by name: those that ship, those of the operator; prompts, opening cells, workspaces."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from mcp import MCPError

from seer_mcp.environment import Investigations, read_investigation
from seer_mcp.environment.shelf import SHIPPED
from seer_mcp.errors import InvestigationRefused, NotFound

from .support import Lab, open_lab, read_cells, streams, text_of

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.anyio

TOML = """
title = "Does it count?"
packs = ["./packs"]
setup = "setup.py"
skills = ["skills/counting"]

[sandbox.files]
"data" = "data"
"""
SETUP = """\
# %% the words
words = open("data/words.txt").read().split()
print(len(words), "words")

# %% and what is done with them
import tallies
print("tally", tallies.tally(words))
"""
PACK = '''"""Counting what is there."""

__all__ = ["tally"]


def tally(words: list[str]) -> int:
    """How many different words are there?

    Use when:
        Repeated words must not count twice.
    """
    return len(set(words))
'''
SKILL = """\
---
name: counting
description: How to count words so that the number can be trusted.
---
Count twice, once from the end. Treat `zebra-marker` as a word.
"""


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder with one investigation that brings a workspace."""
    here = tmp_path / "shelf" / "counting"
    for name in ("packs", "data", "skills/counting"):
        (here / name).mkdir(parents=True)
    (here / "investigation.toml").write_text(TOML)
    (here / "task.md").write_text("# Count\n\nCount the words. Then stop.\n\nMore.\n")
    (here / "setup.py").write_text(SETUP)
    (here / "packs" / "tallies.py").write_text(PACK)
    (here / "data" / "words.txt").write_text("one two two three")
    (here / "skills" / "counting" / "SKILL.md").write_text(SKILL)
    return here.parent


# -- the shelf --------------------------------------------------------------------------------


def test_every_shipped_investigation_can_be_read_in_every_configuration() -> None:
    shelf = Investigations([]).read()
    assert shelf.problems == ()
    assert {"sandbox_intro", "hidden_preference"} <= set(shelf.names())
    for each in shelf.found:
        assert each.file.parent.name == each.name, "the folder is called like the investigation"
        assert each.title != each.name and each.task, each.name
        assert {"gpu", "api"} & set(each.variants), f"{each.name} has one for the real model"
        for variant in each.variants:
            other = read_investigation(each.file.with_name(f"{variant}.toml"))
            assert (other.name, other.task) == (each.name, each.task)


def test_a_folder_of_ones_own_is_found_beside_the_shipped_ones(shelf: Path) -> None:
    for folder in (shelf, shelf / "counting"):
        found = Investigations([folder])
        assert "counting" in found.read().names()
        assert found.file("counting") == shelf / "counting" / "investigation.toml"
        assert found.file("no-such") is None


def test_a_variant_is_another_file_and_an_unknown_one_is_told(shelf: Path) -> None:
    (shelf / "counting" / "large.toml").write_text('name = "counting"\n[sandbox]\nmemory = 8\n')
    found = Investigations([shelf])
    assert found.file("counting/large") == shelf / "counting" / "large.toml"
    with pytest.raises(NotFound, match="counting/large"):
        found.file("counting/lrage")
    with pytest.raises(NotFound):
        found.file("counting/../counting/large")


def test_a_bad_folder_hides_no_other(shelf: Path, tmp_path: Path) -> None:
    broken = shelf / "broken"
    broken.mkdir()
    (broken / "investigation.toml").write_text("nmae = 1")
    taken = shelf / "taken"
    taken.mkdir()
    (taken / "investigation.toml").write_text('name = "sandbox_intro"')
    found = Investigations([shelf, tmp_path / "nowhere"]).read()
    assert "counting" in found.names()
    assert found.get("sandbox_intro").file.parent == SHIPPED / "sandbox_intro"
    assert len(found.problems) == 3
    assert "Did you mean 'name'" in found.problems[0]
    assert "taken" in found.problems[1] and "nowhere" in found.problems[2]


@pytest.mark.parametrize(
    ("head", "said"),
    [
        ("no head", "must begin with a head"),
        ("---\nname: x y\ndescription: z\n---\n", "its name 'x y'"),
        (None, "there is no SKILL.md"),
    ],
)
def test_a_skill_that_cannot_be_used_is_refused(shelf: Path, head: str | None, said: str) -> None:
    file = shelf / "counting" / "skills" / "counting" / "SKILL.md"
    file.unlink() if head is None else file.write_text(head)
    with pytest.raises(InvestigationRefused, match=said):
        read_investigation(shelf / "counting")


@pytest.mark.parametrize("name", ["run.py", "large.toml"])
def test_what_knows_the_answer_does_not_get_into_a_sandbox(shelf: Path, name: str) -> None:
    folder = shelf / "counting"
    (folder / name).write_text("")
    (folder / "investigation.toml").write_text("[sandbox.files]\nall = '.'\n")
    with pytest.raises(InvestigationRefused, match="into the sandbox"):
        read_investigation(folder)
    (folder / "investigation.toml").write_text(f"[sandbox.files]\nx = '{name}'\n")
    with pytest.raises(InvestigationRefused, match="into the sandbox"):
        read_investigation(folder)


@pytest.mark.slow
def test_a_wheel_carries_the_investigations(tmp_path: Path) -> None:
    build = ["uv", "build", "--wheel", "--quiet", "--out-dir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    code = (
        "from seer_mcp.environment import Investigations; "
        "shelf = Investigations([]).read(); print(*shelf.names(), *shelf.problems)"
    )
    done = subprocess.run(
        [sys.executable, "-S", "-c", f"import sys; sys.path[:0] = {[str(tmp_path / 'site'), *sys.path]}; {code}"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {"sandbox_intro", "hidden_preference"} <= set(done.stdout.split())


# -- through a client -------------------------------------------------------------------------


async def test_each_investigation_is_a_prompt_with_its_task_and_how_to_work(
    shelf: Path, tmp_path: Path
) -> None:
    (shelf / "counting" / "large.toml").write_text('name = "counting"\n')
    async with open_lab(tmp_path, investigations=(shelf,)) as lab:
        listed = {prompt.name: prompt for prompt in (await lab.client.list_prompts()).prompts}
        assert listed.keys() >= {"methodology", "sandbox_intro", "hidden_preference", "counting"}
        assert listed["counting"].title == "Does it count?"
        assert listed["counting"].description == "Count the words."
        (message,) = (await lab.client.get_prompt("counting")).messages
        text = message.content.text
        assert 'start_sandbox(investigation="counting")' in text
        assert "Then stop." in text and "## 3. Measure beside a control" in text
        other = await lab.client.get_prompt("counting", {"configuration": "large"})
        assert 'investigation="counting/large"' in other.messages[0].content.text
        for name, arguments in (
            ("conting", {}),
            ("counting", {"configuration": "small"}),
            ("counting", {"model": "x"}),
        ):
            with pytest.raises(MCPError, match=r"counting|large"):
                await lab.client.get_prompt(name, arguments)


async def test_how_to_work_is_a_prompt_and_a_resource(lab: Lab) -> None:
    prompt = (await lab.client.get_prompt("methodology")).messages[0].content.text
    resource = (await lab.client.read_resource("seer://methodology")).contents[0]
    assert (resource.text, resource.mime_type) == (prompt, "text/markdown")
    assert "seer://methodology" in {r.uri for r in (await lab.client.list_resources()).resources}


async def test_an_unknown_name_is_answered_with_all_that_there_are(lab: Lab) -> None:
    said = await lab.no("start_sandbox", investigation="hiden_preference")
    assert "Did you mean 'hidden_preference'?" in said
    assert "sandbox_intro: A first look at a model (also sandbox_intro/gpu)" in said


async def test_a_workspace_is_set_up(shelf: Path, tmp_path: Path) -> None:
    async with open_lab(tmp_path, investigations=(shelf,)) as lab:
        result = await lab.call("start_sandbox", investigation="counting")
        said = text_of(result)
        assert not result.is_error, said
        assert "Count the words." in said and "tally 3" in said
        handle = result.meta["seer/sandbox"]["handle"]
        cells = read_cells(Path(result.meta["seer/sandbox"]["notebook"]))
        assert "".join(cells[0]["source"]).startswith("# Does it count?")
        assert [streams(cell) for cell in cells[1:]] == ["4 words\n", "tally 3\n"]
        assert "zebra-marker" in await lab.ok(
            "read_file", sandbox=handle, path="skills/counting/SKILL.md"
        )
        overview = await lab.ok("list_techniques")
        assert "tallies" in overview and "skill counting: How to count" in overview
        assert len(overview.encode()) < 4_000
        assert "How many different words" in await lab.ok("list_techniques", name="tallies.tally")
        told = await lab.ok("list_techniques", name="counting")
        assert "zebra-marker" in told and "skills/counting/" in told
        assert "tallies.tally" in await lab.ok("list_techniques", question="repeated words twice")
        await lab.ok("stop_sandbox", sandbox=handle)
        assert "tallies" not in await lab.ok("list_techniques")
        assert "No pack or technique" in await lab.no("list_techniques", name="counting")


async def test_a_hidden_model_is_loaded_by_a_name_that_says_nothing(tmp_path: Path) -> None:
    """What a client sees and the notebook keeps; the kernel's own files and environment are another matter."""
    async with open_lab(tmp_path) as lab:
        result = await lab.call("start_sandbox", investigation="hidden_preference")
        handle = result.meta["seer/sandbox"]["handle"]
        while "running for" in (said := await lab.ok("read_outputs", sandbox=handle)):
            continue
        shown = await lab.ok("read_notebook", sandbox=handle, cells="all", outputs=True)
        assert 'm = load_model("model_1", alias="model_1")' in shown
        assert "6 layers" in shown
        for text in (result.model_dump_json(), said, shown, await lab.ok("list_sandboxes")):
            assert "user_female" not in text and "organism:" not in text
