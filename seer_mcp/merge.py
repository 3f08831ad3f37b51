"""Two versions of one notebook become one again: merge by cell id, or keep both. Never a silent loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

# Each version is its cells in order: id -> source. `base` is what both came from.
Version = Mapping[str, str]


@dataclass
class Merge:
    """What became of it. `order` names cells by id; those in `theirs` are to be taken from them."""

    order: list[str] = field(default_factory=list[str])
    theirs: set[str] = field(default_factory=set[str])
    """Cells that only they have."""
    sources: dict[str, str] = field(default_factory=dict[str, str])
    """Cells of ours that take their source."""
    conflicts: dict[str, str] = field(default_factory=dict[str, str])
    """Cells that both changed, with their source: ours stays, theirs goes behind it as a new cell."""
    deleted: list[str] = field(default_factory=list[str])


def merge(base: Version, ours: Version, theirs: Version, busy: AbstractSet[str]) -> Merge:
    """Three-way merge. Cells in `busy` (queued or running) keep our source and stay."""
    found = Merge()
    kept: list[str] = []
    for id, source in theirs.items():
        if id in ours:
            kept.append(id)
            if source in (base.get(id), ours[id]):
                continue
            if ours[id] == base.get(id) and id not in busy:
                found.sources[id] = source
            else:
                found.conflicts[id] = source
        elif id not in base or source != base[id]:  # new, or changed while we deleted it
            kept.append(id)
            found.theirs.add(id)
    alive: list[str] = []
    for id, source in ours.items():
        if id in theirs or id not in base or source != base[id] or id in busy:
            alive.append(id)
        else:
            found.deleted.append(id)
    we_moved = _common_order(ours, base) != _common_order(base, ours)
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
