"""Remembered versions of a notebook are what they were, and take room for what changed alone."""

from __future__ import annotations

import random

import pytest

from seer_mcp.merge import Face
from seer_mcp.versions import Versions, Written


def face(text: str) -> Face:
    return Face(("code", text), "{}", "", "", "")


def changed(chance: random.Random, cells: dict[str, Face]) -> dict[str, Face]:
    """The next version: a cell added, edited, deleted or moved."""
    ids = list(cells)
    what = chance.choice(["add", "add", "edit", "delete", "move"]) if ids else "add"
    found = dict(cells)
    if what == "add":
        ids.insert(chance.choice([len(ids), chance.randrange(len(ids) + 1)]), f"c{chance.random()}")
    elif what == "move":
        ids.insert(chance.randrange(len(ids)), ids.pop(chance.randrange(len(ids))))
    elif what == "delete":
        ids.remove(chance.choice(ids))
    else:
        found[chance.choice(ids)] = face(str(chance.random()))
    return {id: found.get(id, face("new")) for id in ids}


@pytest.mark.parametrize("seed", range(20))
def test_every_remembered_version_is_what_it_was(seed: int) -> None:
    chance = random.Random(seed)
    versions = Versions(30, 10_000)
    true: dict[str, Written] = {}
    cells: dict[str, Face] = {}
    for number in range(80):
        cells = changed(chance, cells)
        mark = f"m{chance.randrange(number + 1)}"  # some marks come again
        true.pop(mark, None)
        true[mark] = Written(cells, f"metadata {number}")
        versions.remember(mark, true[mark])
        for known in list(true)[-12:]:
            assert versions.get(known) == true[known]
    assert versions.get("never") is None
    assert sum(versions.get(mark) is not None for mark in true) <= 30


def test_room_is_for_what_changed() -> None:
    versions = Versions(400, 1000)
    cells = {f"c{n}": face(str(n)) for n in range(5000)}
    for number in range(400):
        cells = {**cells, f"n{number}": face("new")}
        versions.remember(str(number), Written(cells, "{}"))
    assert versions.get("0") is not None  # a step of one cell each
    for number in range(5):
        cells = {id: face(f"{number} {id}") for id in cells}
        versions.remember(f"all {number}", Written(cells, "{}"))
    kept = [n for n in range(5) if versions.get(f"all {n}") is not None]
    assert kept == [2, 3, 4]  # too much changed for more
    assert versions.get("399") is None
