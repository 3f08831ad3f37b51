"""The document: one .ipynb on the server's disk, and the one object that owns it.

It is valid at every instant: each save writes a new file and renames it over the old one. A cell
is serialised again only when it changed, so the size of the notebook hardly matters.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from .errors import BadInput, NotebookNotSaved, NotebookUnreadable, NotFound
from .files import write_atomic
from .ipynb import as_lines, new_id, read_notebook, storable
from .merge import merge
from .outputs import Event, Outputs, joined

SAVES_PER_SECOND = 3
THREAD_ABOVE = 1_000_000  # bytes: larger files are written from a thread
UNFINISHED = ("queued", "running")

CellType = Literal["code", "markdown", "raw"]


class Cell:
    """One cell: nbformat's dictionary, and its outputs while they may change."""

    def __init__(self, data: dict[str, Any], notebook: Notebook) -> None:
        self.data = data
        self.outputs: Outputs | None = None
        self._notebook = notebook
        self._text: str | None = None

    @property
    def id(self) -> str:
        return self.data["id"]

    @property
    def kind(self) -> CellType:
        return self.data["cell_type"]

    @property
    def source(self) -> str:
        return joined(self.data["source"])

    @property
    def seer(self) -> dict[str, Any]:
        """What we know of its last run: run, state, started, seconds, why, …"""
        return self.data["metadata"].get("seer", {})

    @property
    def state(self) -> str:
        return self.seer.get("state", "not run") if self.kind == "code" else self.kind

    def changed(self) -> None:
        self._text = None
        self._notebook.changed()

    def note(self, **facts: Any) -> None:
        """Add facts to what is known of its run; None takes one away."""
        seer = {**self.seer, **facts}
        self.data["metadata"]["seer"] = {k: v for k, v in seer.items() if v is not None}
        self.changed()

    def live(self) -> Outputs:
        """Its outputs, ready to take more."""
        if self.outputs is None:
            folder = self._notebook.path.parent
            files = {i: folder / name for i, name in self.seer.get("files", {}).items()}
            self.outputs = Outputs(self._spill_path, self.data["outputs"], files)
        return self.outputs

    def _spill_path(self, index: int) -> Path:
        run = self.seer.get("run", "old")
        return self._notebook.outputs_dir / f"{self.id}-{run}-{index}.txt"

    def begin(self, run: str, since: int) -> None:
        self.live().fold({"type": "clear", "wait": False})
        self.outputs = None
        self.data["outputs"] = []
        self.data["execution_count"] = None
        self.data["metadata"].pop("seer", None)
        self.note(run=run, state="queued", since=since)

    def json(self) -> str:
        if self._text is None:
            if self.outputs is not None:
                self.data["outputs"] = self.outputs.items()
                names = {
                    i: str(f.relative_to(self._notebook.path.parent))
                    for i, f in self.outputs.files().items()
                }
                if names or "files" in self.seer:
                    self.data["metadata"]["seer"] = {**self.seer, "files": names}
            self._text = json.dumps(
                as_lines(self.data), indent=1, ensure_ascii=False, sort_keys=True
            ).replace("\n", "\n  ")
        return self._text


class Notebook:
    """Owns the file at `path`. Every change goes through here."""

    def __init__(
        self,
        path: Path,
        cells: Iterable[dict[str, Any]] = (),
        metadata: dict[str, Any] | None = None,
    ) -> None:
        self.path = path
        self.outputs_dir = path.with_name(f"{path.stem}.outputs")
        self.cells = [Cell(data, self) for data in cells]
        self._by_id = {cell.id: cell for cell in self.cells}
        self._by_run = {cell.seer["run"]: cell for cell in self.cells if "run" in cell.seer}
        self.metadata = metadata or {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
        self.folded = 0
        """Number of the last event of the sandbox's journal that is in this document."""
        self.trouble: str | None = None
        """Why the last save failed, or None."""
        self.notices: list[str] = []
        """What the client must hear about changes from outside."""
        self._stamp: tuple[int, int, int] | None = stamp(path)
        self._written = [json.dumps(cell.data) for cell in self.cells]  # as the file has them
        self._dirty = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._saving = asyncio.Lock()
        self._version = 0
        self._saved_version = -1
        self._last_save = 0.0
        self._save_seconds = 0.0

    # -- cells --------------------------------------------------------------------------------

    def cell(self, id: str) -> Cell:
        """The cell of that id (or the only one whose id begins so)."""
        if id in self._by_id:
            return self._by_id[id]
        found = [c for c in self.cells if c.id.startswith(id)] if len(id) >= 3 else []
        if len(found) == 1:
            return found[0]
        if not self.cells:
            raise NotFound("cell", id, then="The notebook has no cells yet: call create_cell.")
        raise NotFound(
            "cell", id, [c.id for c in self.cells[-12:]], "read_notebook lists all cells."
        )

    def index(self, cell: Cell) -> int:
        return next(i for i, other in enumerate(self.cells) if other is cell)

    def insert(self, kind: CellType, source: str, after: str = "", at_top: bool = False) -> Cell:
        """A new cell at the end, at the top, or after the cell `after`."""
        index = 0 if at_top else self.index(self.cell(after)) + 1 if after else len(self.cells)
        data: dict[str, Any] = {
            "cell_type": kind,
            "id": self._free_id(),
            "metadata": {},
            "source": storable(source),
        }
        if kind == "code":
            data.update(outputs=[], execution_count=None)
        cell = Cell(data, self)
        self.cells.insert(index, cell)
        self._by_id[cell.id] = cell
        self.changed()
        return cell

    def _free_id(self) -> str:
        while (id := new_id()) in self._by_id:
            continue
        return id

    def rewrite(self, cell: Cell, source: str) -> None:
        self._settled(cell, "edited")
        if cell.source != source:
            cell.data["source"] = storable(source)
            if cell.kind == "code" and cell.seer.get("run"):
                cell.note(stale=True)
            cell.changed()

    def delete(self, cell: Cell) -> None:
        self._settled(cell, "deleted")
        self.cells.remove(cell)
        del self._by_id[cell.id]
        self._by_run = {run: other for run, other in self._by_run.items() if other is not cell}
        self.changed()

    def move(self, cell: Cell, after: str) -> None:
        """Behind the cell `after`, or to the top if that is empty."""
        if after and self.cell(after) is cell:
            raise BadInput("after", after, "a cell cannot be moved behind itself")
        self.cells.remove(cell)
        self.cells.insert(self.index(self.cell(after)) + 1 if after else 0, cell)
        self.changed()

    def _settled(self, cell: Cell, verb: str) -> None:
        if cell.state in UNFINISHED:
            raise BadInput(
                "cell", cell.id, f"it is {cell.state}; interrupt it before it can be {verb}"
            )

    def by_run(self, run: str) -> Cell | None:
        return self._by_run.get(run)

    def begin(self, cell: Cell, run: str) -> None:
        """A new run of a cell: the old outputs go, as they do in every notebook."""
        self._by_run.pop(cell.seer.get("run", ""), None)  # what it still says is not this run's
        self._by_run[run] = cell
        cell.begin(run, self.folded)

    # -- events -------------------------------------------------------------------------------

    def fold(self, event: Event) -> None:
        """Take one event of the journal into the cell of its run. Numbers already folded pass."""
        cell = self._by_run.get(event.get("run", ""))
        kind = event["type"]
        if event["n"] > self.folded:
            self.folded = event["n"]
            self.changed()
        elif cell is None or cell.state not in UNFINISHED:
            return
        if kind == "update":
            for other in self.cells:
                if other.kind == "code" and other.live().update(event):
                    other.changed()
            return
        if cell is None:
            return
        if kind == "start":
            cell.note(state="running", started=event["t"])
        elif kind == "end":
            cell.live().close()
            cell.data["execution_count"] = event["count"]
            kept: dict[str, Any] = {"why": event["why"] or None}
            if event["dropped_bytes"]:
                kept["output_bytes"] = event["output_bytes"]
                kept["dropped_bytes"] = event["dropped_bytes"]
            cell.note(state=event["state"], seconds=round(event["seconds"], 3), since=None, **kept)
        elif kind in ("stream", "display", "result", "error", "clear", "capped"):
            cell.live().fold(event)
            if event.get("late"):
                cell.note(late=cell.seer.get("late", 0) + 1)
                cell.live().close()
            cell.changed()

    def rewind(self) -> int:
        """After a restart: from which event on the journal has to be folded again.

        A run that was not over is folded anew from its first event, so that its text is exact.
        """
        start = self.folded + 1
        for cell in self.cells:
            if cell.state in UNFINISHED:
                start = min(start, cell.seer.get("since", self.folded) + 1)
                cell.data["outputs"] = []
                cell.outputs = None
                cell.note(state="queued", files=None)
        return start

    def forget_runs(self) -> None:
        """For a notebook opened in a new sandbox: its runs belong to a kernel that is gone."""
        self.folded = 0
        for cell in self.cells:
            if cell.state in UNFINISHED:
                cell.note(state="sandbox_lost", why="its sandbox is gone", since=None)
            if cell.seer.get("run"):
                cell.note(earlier=True)

    def copy_long_outputs(self, source: Path) -> None:
        """For a copy of the notebook `source`: take along the files of its long outputs."""
        for cell in self.cells:
            taken: dict[str, str] = {}
            for index, name in cell.seer.get("files", {}).items():
                old = source.parent / name
                if old.is_file():
                    self.outputs_dir.mkdir(exist_ok=True)
                    shutil.copyfile(old, self.outputs_dir / old.name)
                    taken[index] = f"{self.outputs_dir.name}/{old.name}"
            if "files" in cell.seer:
                cell.note(files=taken)

    def finish(self, run: str, state: str, why: str) -> None:
        """End a run whose end the kernel host cannot tell any more."""
        cell = self.by_run(run)
        if cell is not None and cell.state in UNFINISHED:
            cell.live().close()
            cell.note(state=state, why=why, since=None)

    # -- the file -----------------------------------------------------------------------------

    def hold(self) -> None:
        """Write nothing until `unhold`."""
        self._writable.clear()

    def unhold(self) -> None:
        self._writable.set()
        self.changed()

    def changed(self) -> None:
        self._version += 1
        self._dirty.set()

    def text(self, cells: list[str] | None = None) -> str:
        """The file as it would be written now."""
        metadata = {
            **self.metadata,
            "seer": {**self.metadata.get("seer", {}), "folded": self.folded},
        }
        body = ",\n  ".join([cell.json() for cell in self.cells] if cells is None else cells)
        rest = json.dumps(metadata, indent=1, ensure_ascii=False, sort_keys=True).replace(
            "\n", "\n "
        )
        whole = f"[\n  {body}\n ]" if body else "[]"
        return f'{{\n "cells": {whole},\n "metadata": {rest},\n "nbformat": 4,\n "nbformat_minor": 5\n}}\n'

    def refresh(self) -> None:
        """Take over what somebody saved into the file meanwhile, cell by cell."""
        now = stamp(self.path)
        if now == self._stamp or now is None or self._saving.locked():
            return
        self._stamp = now
        try:
            cells, _ = read_notebook(self.path)
        except NotebookUnreadable as error:
            aside = self._aside()
            self.notices.append(
                f"{self.path.name} was changed from outside into something that is not a notebook; that version "
                f"is kept as {aside.name} ({error})"
            )
            self.changed()
            return
        self._merge(cells)

    def _aside(self) -> Path:
        """A copy of the file as it is now, under a free name."""
        number = 1
        while (path := self.path.with_name(f"{self.path.stem}.conflict-{number}.ipynb")).exists():
            number += 1
        path.write_bytes(self.path.read_bytes())
        return path

    def _merge(self, cells: list[dict[str, Any]]) -> None:
        theirs = {cell["id"]: cell for cell in cells}
        busy = {cell.id for cell in self.cells if cell.state in UNFINISHED}
        ours = {cell.id: cell for cell in self.cells}
        sources = {id: cell["source"] for id, cell in theirs.items()}
        base = {cell["id"]: joined(cell["source"]) for cell in map(json.loads, self._written)}
        found = merge(base, {cell.id: cell.source for cell in self.cells}, sources, busy)
        for id, source in found.sources.items():
            self.rewrite(ours[id], source)
        for id in found.deleted:
            self.delete(ours[id])
        self.cells = [
            Cell(theirs[id], self) if id in found.theirs else ours[id] for id in found.order
        ]
        self._by_id = {cell.id: cell for cell in self.cells}
        for id, source in found.conflicts.items():
            copy = self.insert(ours[id].kind, source, after=id)
            self.notices.append(
                f"cell {id} was changed here and from outside: this version stays, the other one is cell {copy.id}"
            )
        told = (
            (len(found.sources), "changed"),
            (len(found.theirs), "added"),
            (len(found.deleted), "deleted"),
        )
        if counts := ", ".join(f"{n} {what}" for n, what in told if n):
            self.notices.append(f"cells changed from outside: {counts}")
        self._written = [json.dumps(cell) for cell in cells]
        self.changed()

    async def save(self) -> None:
        """Write what changed; when this returns, it is on disk. Raises NotebookNotSaved."""
        # A caller that goes must not leave a thread behind that writes an older version later.
        saving = asyncio.create_task(self._save(self._version))
        saving.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(saving)

    async def _save(self, wanted: int) -> None:
        self.refresh()
        async with self._saving:
            if self._saved_version >= wanted or not self._writable.is_set():
                return
            began = time.monotonic()
            version = self._version
            self._dirty.clear()
            written = [cell.json() for cell in self.cells]
            data = self.text(written).encode("utf-8")
            try:
                if len(data) > THREAD_ABOVE:
                    await asyncio.to_thread(write_atomic, self.path, data, what="notebook")
                else:
                    write_atomic(self.path, data, what="notebook")
            except OSError as error:
                self._dirty.set()
                self.trouble = os.strerror(error.errno) if error.errno else str(error)
                raise NotebookNotSaved(str(self.path), self.trouble) from error
            finally:
                self._last_save = time.monotonic()
                self._save_seconds = self._last_save - began
            self._saved_version = version
            self._stamp, self._written = stamp(self.path), written
            self.trouble = None

    async def keep_saved(self) -> None:
        """Save whatever changes, about three times a second at most; runs until cancelled."""
        while True:
            await self._writable.wait()
            await self._dirty.wait()
            pause = max(1 / SAVES_PER_SECOND, 10 * self._save_seconds, 2.0 if self.trouble else 0.0)
            await asyncio.sleep(max(0.0, self._last_save + pause - time.monotonic()))
            try:
                await self.save()
            except NotebookNotSaved:
                continue  # kept in `trouble`, which every answer shows


def stamp(path: Path) -> tuple[int, int, int] | None:
    """What tells that a file was written again, or None if there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
