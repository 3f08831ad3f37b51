"""Versions of a notebook's file, as far as a person can change it: many of them, in little room."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .merge import Face

FEWEST = 3


@dataclass(frozen=True)
class Written:
    """One version of the file, as far as a person can change it."""

    cells: dict[str, Face]
    metadata: str
    """As JSON, without what we note."""
    order: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", tuple(self.cells))  # which == of a dict passes over

    @property
    def sources(self) -> dict[str, tuple[str, str]]:
        return {id: face.source for id, face in self.cells.items()}


@dataclass(frozen=True, slots=True)
class Step:
    """How one version leads back to the one before it."""

    cells: tuple[tuple[str, Face | None], ...]
    """Those that were different; None: was not there."""
    order: tuple[str, ...] | None
    """None: the same, without those that were not there."""
    metadata: str

    @property
    def size(self) -> int:
        return 1 + len(self.cells) + len(self.order or ())

    def back(self, cells: dict[str, Face]) -> dict[str, Face]:
        """The cells of the version before; may change `cells` itself."""
        for id, face in self.cells:
            if face is None:
                del cells[id]
            else:
                cells[id] = face
        return cells if self.order is None else {id: cells[id] for id in self.order}


def step(newer: Written, older: Written) -> Step:
    changed: dict[str, Face | None] = {
        id: face for id, face in older.cells.items() if newer.cells.get(id) != face
    }
    changed |= {id: None for id in newer.cells if id not in older.cells}
    found = Step(tuple(changed.items()), None, older.metadata)
    if tuple(found.back(dict(newer.cells))) == older.order:
        return found
    return Step(found.cells, older.order, older.metadata)


class Versions:
    """The last versions by their marks. Only the newest is whole, the others are steps back from it."""

    def __init__(self, most: int, most_cells: int) -> None:
        self._most = most
        self._most_cells = most_cells
        self._size = 0
        self._newest = Written({}, "{}")
        self._marks: deque[str] = deque()
        self._steps: deque[Step] = deque()  # from each version but the oldest to the one before

    def remember(self, mark: str, written: Written) -> None:
        """Keep it as the newest; what was known under that mark counts no more."""
        if self._marks:
            self._steps.append(step(written, self._newest))
            self._size += self._steps[-1].size
        self._marks.append(mark)
        self._newest = written
        while len(self._marks) > FEWEST and (
            len(self._marks) > self._most or self._size > self._most_cells
        ):
            self._marks.popleft()
            self._size -= self._steps.popleft().size

    def get(self, mark: str) -> Written | None:
        cells, metadata = self._newest.cells, self._newest.metadata
        steps = reversed(self._steps)
        for known in reversed(self._marks):
            if known == mark:
                return Written(cells, metadata)
            if (back := next(steps, None)) is not None:
                cells = back.back(dict(cells) if cells is self._newest.cells else cells)
                metadata = back.metadata
        return None
