"""Somebody edits the notebook in an editor while the agent works: both edits survive."""

import asyncio
import json
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from seer_mcp.merge import merge

from .support import Lab, read_cells, text_of


def edit(path: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Save another version as an editor does: read, change, replace."""
    book = json.loads(path.read_text())
    change(book["cells"])
    part = path.with_suffix(".editor")
    part.write_text(json.dumps(book))
    os.replace(part, path)


def sources(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in read_cells(path)]


ids = st.sampled_from("abcdef")
version = st.dictionaries(ids, st.sampled_from(["1", "2", "3"]))


@given(version, version, version)
def test_no_changed_source_is_lost(base: dict, ours: dict, theirs: dict) -> None:
    found = merge(base, ours, theirs, set())
    assert len(set(found.order)) == len(found.order)
    assert set(found.order) <= ours.keys() | theirs.keys()
    result = {
        id: theirs[id] if id in found.theirs or id in found.changed else ours[id]
        for id in found.order
    }
    for mine, source in ours.items():
        if source != base.get(mine):
            assert result[mine] == source
    for id, source in theirs.items():
        if source != base.get(id):
            assert result[id] == source or id in found.conflicts


@given(version, version)
def test_one_sided_changes_are_taken_as_they_are(base: dict, changed: dict) -> None:
    for ours, theirs in ((base, changed), (changed, base)):
        found = merge(base, ours, theirs, set())
        assert found.conflicts == []
        assert set(found.order) == changed.keys()


@pytest.mark.anyio
async def test_n04_edits_of_a_person_and_of_the_agent_both_survive(lab: Lab) -> None:
    handle = await lab.start(name="shared")
    a = (await lab.cell(handle, "a = 1")).meta["seer/run"]["cell"]
    b = (await lab.cell(handle, "b = 1")).meta["seer/run"]["cell"]
    path = await lab.notebook_path(handle)

    def person(cells: list) -> None:
        cells[0]["source"] = "a = 2"
        cells.append({"cell_type": "markdown", "id": "mine", "metadata": {}, "source": "a note"})

    edit(path, person)
    text = await lab.ok("edit_cell", sandbox=handle, cell=b, source="b = 2")
    assert sources(path) == ["a = 2", "b = 2", "a note"]
    seen = text + await lab.ok("read_notebook", sandbox=handle)
    assert f"cells changed from outside: 1 changed ({a}), 1 added (mine)" in seen

    edit(path, lambda cells: cells[0].update(source="a = 'person'"))
    # The agent's edit of the same cell is made on what it knew.
    server_side = asyncio.create_task(
        lab.call("edit_cell", sandbox=handle, cell=a, source="a = 'agent'")
    )
    await server_side
    assert "a = 'agent'" in sources(path)


@pytest.mark.anyio
async def test_n04_a_version_that_cannot_be_read_is_kept_aside(lab: Lab) -> None:
    handle = await lab.start(name="broken")
    await lab.cell(handle, "x = 1")
    path = await lab.notebook_path(handle)
    path.write_text("{ half a file")
    answer = text_of(await lab.cell(handle, "x + 1"))
    assert "broken.conflict-1.ipynb" in answer
    assert path.with_name("broken.conflict-1.ipynb").read_text() == "{ half a file"
    assert sources(path) == ["x = 1", "x + 1"]


@pytest.mark.anyio
async def test_n04_random_interleavings_lose_nothing(lab: Lab) -> None:
    handle = await lab.start(name="both")
    path = await lab.notebook_path(handle)
    await lab.cell(handle, "0")
    rng = random.Random(0)
    written: set[str] = set()
    for i in range(50):
        line = f"# edit {i}"
        written.add(line)
        if rng.random() < 0.5:
            await lab.ok("create_cell", sandbox=handle, source=line, run=False)
        else:

            def add(cells: list, line: str = line, i: int = i) -> None:
                cell = {"cell_type": "markdown", "id": f"p{i}", "metadata": {}, "source": line}
                cells.insert(rng.randrange(len(cells) + 1), cell)

            edit(path, add)
    await lab.ok("create_cell", sandbox=handle, source="# last", run=False)
    assert written <= set(sources(path))
