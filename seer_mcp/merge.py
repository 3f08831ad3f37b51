"""Two versions of one notebook become one again: merge by cell id, or keep both. Never a silent loss.

What belongs to whom:
- Source, kind, order, attachments and metadata of a cell belong to whoever changed them since the
  version that both came from. If both changed a source, ours stays and theirs becomes a new cell
  behind it; if both changed the order, ours stays.
- A cell that they deleted goes, unless we changed it or ran it since.
- Outputs and execution count belong to the run. An editor also saves its older view of what we ran:
  that never counts. What they ran in a kernel of their own counts (a digest beside our outputs
  tells), unless we ran the cell since, or run it now.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any, NamedTuple

# Each version is its cells in order: id -> what of it counts as its source. `base` is what both
# came from; empty if that is not known.
Version = Mapping[str, Hashable]


@dataclass
class Merge:
    """What became of it. `order` names cells by id; those in `theirs` are to be taken from them."""

    order: list[str] = field(default_factory=list[str])
    theirs: set[str] = field(default_factory=set[str])
    """Cells that only they have."""
    changed: list[str] = field(default_factory=list[str])
    """Cells of ours that take their source."""
    conflicts: list[str] = field(default_factory=list[str])
    """Cells that both changed: ours stays, theirs goes behind it as a new cell."""
    deleted: list[str] = field(default_factory=list[str])
    stay: list[str] = field(default_factory=list[str])
    """Cells that they deleted, but that we changed or ran."""
    both_moved: bool = False


def merge(
    base: Version,
    ours: Version,
    theirs: Version,
    busy: AbstractSet[str],
    ran: AbstractSet[str] = frozenset(),
) -> Merge:
    """Three-way merge. Cells in `busy` (queued or running) keep our source; they and `ran` stay."""
    found = Merge()
    kept: list[str] = []
    for id, source in theirs.items():
        if id in ours:
            kept.append(id)
            if source in (base.get(id), ours[id]):
                continue
            if ours[id] == base.get(id) and id not in busy:
                found.changed.append(id)
            else:
                found.conflicts.append(id)
        elif id not in base or source != base[id]:  # new, or changed while we deleted it
            kept.append(id)
            found.theirs.add(id)
    alive: list[str] = []
    for id, source in ours.items():
        if id in theirs or id not in base:
            alive.append(id)
        elif source != base[id] or id in busy or id in ran:
            alive.append(id)
            found.stay.append(id)
        else:
            found.deleted.append(id)
    we_moved = not base or _common_order(ours, base) != _common_order(base, ours)
    they_moved = _common_order(theirs, base) != _common_order(base, theirs)
    found.both_moved = bool(base) and we_moved and they_moved
    first, second = (alive, kept) if we_moved else (kept, alive)
    found.order = _woven(first, second)
    return found


def _common_order(one: Version, other: Version) -> list[str]:
    return [id for id in one if id in other]


def _woven(first: Sequence[str], second: Sequence[str]) -> list[str]:
    """`first` in its order, and what only `second` has behind what is before it there."""
    order = list(first)
    present = set(order)
    previous: str | None = None
    for id in second:
        if id not in present:
            order.insert(0 if previous is None else order.index(previous) + 1, id)
            present.add(id)
        previous = id
    return order


class Face(NamedTuple):
    """What is remembered of a cell as it was in one version of the file."""

    source: tuple[str, str]
    """Its kind, and a digest of its source."""
    metadata: str
    """As JSON, without what we note."""
    attachments: str
    outputs: str
    """A digest, if they are of no run of ours."""
    run: str


def face_of(cell: dict[str, Any]) -> Face:
    metadata = {k: v for k, v in cell["metadata"].items() if k != "seer"}
    run = cell["metadata"].get("seer", {}).get("run", "")
    return Face(
        (cell["cell_type"], _digest(_text(cell["source"]))),
        json.dumps(metadata, sort_keys=True) if metadata else "{}",
        _digest(json.dumps(cell["attachments"], sort_keys=True)) if "attachments" in cell else "",
        "" if run else outputs_digest(cell),
        run,
    )


def outputs_digest(cell: dict[str, Any]) -> str:
    """Outputs and execution count as a digest, the same however an editor lays them out in JSON."""
    if cell["cell_type"] != "code":
        return ""
    found = hashlib.blake2b(str(cell.get("execution_count")).encode(), digest_size=8)
    stream = ""
    for output in cell["outputs"]:
        kind = output["output_type"]
        name = output["name"] if kind == "stream" else ""
        if not name or name != stream:
            found.update(f"\0{kind} {name}\0".encode("utf-8", "surrogatepass"))
        stream = name
        if kind == "stream":
            found.update(_text(output["text"]).encode("utf-8", "surrogatepass"))
        elif kind == "error":
            told = [output["ename"], output["evalue"], *output["traceback"]]
            found.update("\n".join(told).encode("utf-8", "surrogatepass"))
        else:
            for mime, value in sorted(output["data"].items()):
                plain = json.dumps(value, sort_keys=True) if mime.endswith("json") else _text(value)
                found.update(f"{mime}\0{plain}\0".encode("utf-8", "surrogatepass"))
    return found.hexdigest()


def changed_keys(base: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
    """Keys that they set to another value than `base` has; None for those that they took away."""
    keys = base.keys() | theirs.keys()
    return {key: theirs.get(key) for key in sorted(keys) if theirs.get(key) != base.get(key)}


def give_ids_back(cells: list[dict[str, Any]], base: Version) -> None:
    """For the file of a program that drops cell ids: the cells get them back by their text."""
    if not base or any(cell["id"] in base for cell in cells):
        return
    known, sources = list(base), [face_of(cell).source for cell in cells]
    matcher = SequenceMatcher(None, list(base.values()), sources, autojunk=False)
    for tag, start, end, first, last in matcher.get_opcodes():
        if tag == "equal" or (tag == "replace" and end - start == last - first):
            for id, cell in zip(known[start:end], cells[first:last], strict=True):
                cell["id"] = id


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def _text(value: Any) -> str:
    if isinstance(value, list):
        return "".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
