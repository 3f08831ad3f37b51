"""The document: one .ipynb on the server's disk, and the one object that owns it.

It is valid at every instant: each save writes a new file and puts it in the place of the old one. A
cell is serialised again only when it changed, so the size of the notebook hardly matters.

A person may have it open in an editor meanwhile. What they save is merged (see merge.py). From
which of our versions their copy comes is told by a mark in the notebook's metadata, which editors
carry along: so an old copy that is saved again takes nothing back.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from .errors import BadInput, NotebookNotSaved, NotebookUnreadable, NotFound
from .ipynb import as_lines, join_outputs, new_id, parse_notebook, storable
from .merge import Face, Merge, changed_keys, face_of, give_ids_back, merge, outputs_digest
from .outputs import Event, Outputs, Piece, display_id, joined
from .sharedfile import Displaced, Stamp, free_name, recover_parts, replace, stamp
from .versions import Versions, Written

SAVES_PER_SECOND = 3
THREAD_ABOVE = 1_000_000  # bytes: larger files are written from a thread
UNFINISHED = ("queued", "running")
SETTLE_SECONDS = 1.0  # a file that is no notebook is judged when it was left alone for so long
GONE_SECONDS = 0.3  # and one that is missing after this
PATIENCE_SECONDS = 10.0  # never wait longer for somebody to finish writing
MERGES = 5  # in one save; what comes after that is merged by the next
REMEMBERED = 400  # versions of the file, as far as what a person can change goes
REMEMBERED_CELLS = 20_000  # that are different from one version to the next, in all of them
AWAKE = 16  # cells that are ready to take more output after their runs
TOLD = 50  # notices that wait for the next answer

CellType = Literal["code", "markdown", "raw"]


class Cell:
    """One cell: nbformat's dictionary, and its outputs while they may change.

    Of a cell that is written and may not change any more the outputs are kept once: in its JSON.
    """

    __slots__ = ("_data", "_face", "_notebook", "_text", "_written", "outputs", "since")

    def __init__(self, data: dict[str, Any], notebook: Notebook) -> None:
        self._data = data
        self.outputs: Outputs | None = None
        self.since: int | None = None
        """From behind which event on its last run can be folded again, if it began in this sandbox."""
        self._notebook = notebook
        self._text: bytes | None = None
        self._face: Face | None = None
        self._written: Face | None = None  # when it was last made into JSON

    @property
    def data(self) -> dict[str, Any]:
        """nbformat's dictionary, whole, to be read; `put` changes it."""
        if self.kind != "code":
            return self._data
        return {**self._data, "outputs": self._kept()}

    def _kept(self) -> list[dict[str, Any]]:
        """Its outputs as the file keeps them."""
        if self.outputs is not None:
            return self.outputs.items()
        if "outputs" in self._data:
            return self._data["outputs"]
        assert self._text is not None
        return join_outputs(json.loads(self._text)["outputs"])

    def put(self, **fields: Any) -> None:
        """Change fields of nbformat's dictionary; None takes one away."""
        self.changed()  # before its JSON goes, what only that holds is taken from it
        self._data.update(fields)
        for name in [name for name, value in fields.items() if value is None]:
            del self._data[name]

    def put_count(self, count: int | None) -> None:
        self._data["execution_count"] = count
        self.changed()

    def become(self, data: dict[str, Any]) -> None:
        """Another cell's content, also of another kind, under this one's id."""
        self._data, self.outputs, self._text = data, None, None
        self.changed()

    def put_outputs(self, outputs: list[dict[str, Any]]) -> None:
        """These instead of those that it has."""
        self.outputs = None
        self._data["outputs"] = outputs
        self.changed()

    def forget_run(self) -> None:
        self.metadata.pop("seer", None)
        self.changed()

    @property
    def id(self) -> str:
        return self._data["id"]

    @property
    def kind(self) -> CellType:
        return self._data["cell_type"]

    @property
    def source(self) -> str:
        return joined(self._data["source"])

    @property
    def metadata(self) -> dict[str, Any]:
        return self._data["metadata"]

    @property
    def execution_count(self) -> int | None:
        return self._data.get("execution_count")

    @property
    def seer(self) -> dict[str, Any]:
        """What we know of its last run: run, state, started, seconds, why, …"""
        return self.metadata.get("seer", {})

    @property
    def state(self) -> str:
        return self.seer.get("state", "not run") if self.kind == "code" else self.kind

    @property
    def face(self) -> Face:
        if self._text is not None and self._face is not None:
            return self._face
        found = face_of(self.data)
        if self._face is None or found != self._face:  # one object as long as it is the same
            self._face = found
        return self._face

    def changed(self) -> None:
        if self.outputs is None and self.kind == "code":
            self._data["outputs"] = self._kept()
        self._text = None
        self._notebook.touched()

    def note(self, **facts: Any) -> None:
        """Add facts to what is known of its run; None takes one away."""
        seer = {**self.seer, **facts}
        self.metadata["seer"] = {k: v for k, v in seer.items() if v is not None}
        self.changed()

    def live(self) -> Outputs:
        """Its outputs, ready to take more."""
        if self.outputs is None:
            self.outputs = self._opened()
            self._data.pop("outputs", None)
        return self.outputs

    def pieces(self) -> list[Piece]:
        """Its outputs, to be read."""
        return (self.outputs or self._opened()).pieces() if self.kind == "code" else []

    def _opened(self) -> Outputs:
        folder = self._notebook.path.parent
        files = {i: folder / name for i, name in self.seer.get("files", {}).items()}
        return Outputs(self._spill_path, self._kept(), files)

    def rest(self) -> None:
        """Its run was over long ago: its outputs can take no more until they are wanted."""
        if self.outputs is None or self.state in UNFINISHED or self.outputs.behind():
            return
        self.encoded()
        self.outputs = None

    def shows(self, display: str | None) -> bool:
        """Whether displays of that id are among its outputs."""
        if display is None:
            return False  # or it would be those of every display without an id
        if self.outputs is not None:
            return self.outputs.shows(display)
        if "outputs" not in self._data and json.dumps(display, ensure_ascii=False).encode() not in (
            self._text or b""
        ):
            return False
        return any(display_id(output) == display for output in self.data.get("outputs", ()))

    def _spill_path(self, index: int) -> Path:
        run = self.seer.get("run", "old")
        return self._notebook.outputs_dir / f"{self.id}-{run}-{index}.txt"

    def begin(self, run: str, since: int) -> None:
        self.live().fold({"type": "clear", "wait": False})
        self.put_outputs([])
        self.put_count(None)
        self.forget_run()
        self.since = since
        self.note(run=run, state="queued", since=since)

    def json(self) -> str:
        return self.encoded().decode("utf-8")

    def encoded(self) -> bytes:
        """Its JSON as it stands in the file, made anew only when the cell changed."""
        if self._text is None:
            self._notebook.reshaped |= self.face is not self._written
            self._written = self.face
            if self.outputs is not None:
                names = {
                    i: str(f.relative_to(self._notebook.path.parent))
                    for i, f in self.outputs.files().items()
                }
                if names or "files" in self.seer:
                    self.metadata["seer"] = {**self.seer, "files": names}
            data = self.data
            if self.seer.get("run"):
                self.metadata["seer"] = {**self.seer, "digest": outputs_digest(data)}
            text = json.dumps(
                as_lines(self._to_be_folded_again(data)),
                indent=1,
                ensure_ascii=False,
                sort_keys=True,
            )
            self._text = text.replace("\n", "\n  ").encode("utf-8")
            self._data.pop("outputs", None)
        return self._text

    def _to_be_folded_again(self, data: dict[str, Any]) -> dict[str, Any]:
        """Its data for the file. While output waits for room, the file must not say that the run is over.

        If this server ends before there is room, the next one then folds the run again.
        """
        if self.outputs is None or self.since is None or not self.outputs.behind():
            return data
        noted = {**self.seer, "state": "running", "since": self.since}
        return {**data, "metadata": {**self.metadata, "seer": noted}}


class Notebook:
    """Owns the file at `path`. Every change goes through here."""

    def __init__(
        self,
        path: Path,
        cells: Iterable[dict[str, Any]] = (),
        metadata: dict[str, Any] | None = None,
        seen: Stamp | None = None,
    ) -> None:
        """`seen`: the file's stamp, taken before `cells` were read from it."""
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
        self._stamp = seen
        self.reshaped = True
        """Whether a person may see another version than the one that was written last."""
        self._base = self._as_written()
        self._mark: str = self.metadata.get("seer", {}).get("version", "")
        self._remembered = Versions(REMEMBERED, REMEMBERED_CELLS)
        self._remembered.remember(self._mark, self._base)
        self._displaced: list[Displaced] = []
        self._behind: dict[str, Outputs] = {}  # whose output waits for room on the disk
        self._left: set[tuple[str, str]] = set()  # outputs from elsewhere that were not taken
        self._awake: dict[Cell, None] = {}  # whose runs ended last: they may still say something
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
            cell.put(source=storable(source))
            if cell.kind == "code" and cell.seer.get("run"):
                cell.note(stale=True)

    def delete(self, cell: Cell) -> None:
        self._settled(cell, "deleted")
        self.cells.remove(cell)
        del self._by_id[cell.id]
        self._awake.pop(cell, None)
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
            self.touched()
        elif cell is None or cell.state not in UNFINISHED:
            return
        if kind == "update":
            for other in self.cells:
                if other.shows(event.get("display_id")) and other.live().update(event):
                    other.changed()
                    self._keep_awake(other)
            return
        if cell is None:
            return
        if kind == "start":
            cell.note(state="running", started=event["t"])
        elif kind == "end":
            cell.live().close()
            self.look_after(f"cell {cell.id}", cell.live())
            cell.put_count(event["count"])
            kept: dict[str, Any] = {"why": event["why"] or None}
            if event["dropped_bytes"]:
                kept["output_bytes"] = event["output_bytes"]
                kept["dropped_bytes"] = event["dropped_bytes"]
            cell.note(state=event["state"], seconds=round(event["seconds"], 3), since=None, **kept)
            self._keep_awake(cell)
        elif kind in ("stream", "display", "result", "error", "clear", "capped"):
            cell.live().fold(event)
            self.look_after(f"cell {cell.id}", cell.live())
            if event.get("late"):
                cell.note(late=cell.seer.get("late", 0) + 1)
                cell.live().close()
                self._keep_awake(cell)
            cell.changed()

    def _keep_awake(self, cell: Cell) -> None:
        """It may say more: of those whose runs are over, the last few are ready for it."""
        if cell.state in UNFINISHED:
            return
        self._awake.pop(cell, None)
        self._awake[cell] = None
        if len(self._awake) > AWAKE:
            longest = next(iter(self._awake))
            del self._awake[longest]
            longest.rest()

    def rewind(self) -> int:
        """After a restart: from which event on the journal has to be folded again.

        A run that was not over is folded anew from its first event, so that its text is exact.
        """
        start = self.folded + 1
        for cell in self.cells:
            if cell.state in UNFINISHED:
                since: int = cell.seer.get("since", self.folded)
                cell.since = since
                start = min(start, since + 1)
                cell.put_outputs([])
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

    def look_after(self, what: str, outputs: Outputs) -> None:
        """Output for which there was no room is written, and said, with the next saves."""
        if outputs.behind():
            self._behind[what] = outputs
            self.touched()

    def _catch_up(self) -> str | None:
        """Write the outputs that wait for room; why some still wait, or None."""
        failed: OSError | None = None
        for what, outputs in list(self._behind.items()):
            if error := outputs.flush():
                failed = error
            else:
                del self._behind[what]
                for cell in self.cells:
                    if cell.outputs is outputs:
                        cell.changed()
        return None if failed is None else why_not(failed) + self._waiting()

    def _waiting(self) -> str:
        return f"; output of {', '.join(self._behind)} waits in memory" if self._behind else ""

    def finish(self, run: str, state: str, why: str) -> None:
        """End a run whose end the kernel host cannot tell any more."""
        cell = self.by_run(run)
        if cell is not None and cell.state in UNFINISHED:
            cell.live().close()
            cell.note(state=state, why=why, since=None)
            self._keep_awake(cell)

    # -- the file -----------------------------------------------------------------------------

    def hold(self) -> None:
        """Write nothing until `unhold`."""
        self._writable.clear()

    def unhold(self) -> None:
        self._writable.set()
        self.changed()

    @property
    def settled(self) -> bool:
        """Whether all of it is on disk, and nobody may still write into an older file of it."""
        unsaved = self._saved_version < self._version or self._saving.locked() or self.trouble
        return not (unsaved or self._displaced or self._behind)

    def touched(self) -> None:
        """Something is to be saved."""
        self._version += 1
        self._dirty.set()

    def changed(self) -> None:
        """Which cells there are, or their order, or what is not of a cell, may be another."""
        self.reshaped = True
        self.touched()

    def text(self) -> str:
        """The file as it would be written now."""
        return b"".join(self._pieces()).decode("utf-8")

    def _pieces(self) -> list[bytes]:
        """The file in pieces, which are the cells' own: a large one is never copied as a whole."""
        metadata = {
            **self.metadata,
            "seer": {
                **self.metadata.get("seer", {}),
                "folded": self.folded,
                "version": self._mark,
            },
        }
        rest = json.dumps(metadata, indent=1, ensure_ascii=False, sort_keys=True)
        rest = rest.replace("\n", "\n ").encode("utf-8")
        pieces = [b'{\n "cells": [']
        for cell in self.cells:
            pieces += [b",\n  " if len(pieces) > 1 else b"\n  ", cell.encoded()]
        end = b"\n ]" if self.cells else b"]"
        return [
            *pieces,
            end + b',\n "metadata": ' + rest + b',\n "nbformat": 4,\n "nbformat_minor": 5\n}\n',
        ]

    async def save(self) -> None:
        """Write what changed; when this returns, it is on disk. Raises NotebookNotSaved."""
        # A caller that goes must not leave a thread behind that writes an older version later.
        saving = asyncio.create_task(self._save(self._version))
        saving.add_done_callback(lambda task: task.cancelled() or task.exception())
        await asyncio.shield(saving)

    async def _save(self, wanted: int) -> None:
        async with self._saving:
            if not self._writable.is_set():
                return
            try:
                if await self._take_in(patient=True):
                    wanted = self._version
            except OSError as error:  # what they saved could not be kept: write nothing over it
                raise self._not_saved(error) from error
            for _ in range(MERGES):
                if self._saved_version >= wanted:
                    return
                await self._write()
                if await self._look_at_displaced():
                    wanted = self._version  # an edit came in the moment before: it goes in as well

    async def _write(self) -> None:
        began = time.monotonic()
        behind = self._catch_up()
        version = self._version
        self._dirty.clear()
        for cell in self.cells:
            cell.encoded()  # tells whether it is reshaped
        written = self._as_written() if self.reshaped else self._base
        self.reshaped = False
        if written != self._base or not self._mark:
            self._mark = secrets.token_hex(4)
        data = self._pieces()
        try:
            if sum(map(len, data)) > THREAD_ABOVE:
                made = await asyncio.to_thread(replace, self.path, data, self._stamp)
            else:
                made = replace(self.path, data, self._stamp)
        except OSError as error:
            raise self._not_saved(error) from error
        finally:
            self._last_save = time.monotonic()
            self._save_seconds = self._last_save - began
        self._stamp, displaced = made
        if displaced is not None:
            self._displaced.append(displaced)
        if written is not self._base:
            self._remembered.remember(self._mark, written)
        self._saved_version, self._base = version, written
        self.trouble = behind
        if behind:
            self._dirty.set()

    def _not_saved(self, error: OSError) -> NotebookNotSaved:
        self._dirty.set()
        self.reshaped = True
        self.trouble = why_not(error) + self._waiting()
        return NotebookNotSaved(str(self.path), self.trouble)

    async def keep_saved(self) -> None:
        """Save whatever changes, about three times a second at most; runs until cancelled."""
        while True:
            await self._writable.wait()
            await self._next_change()
            pause = max(1 / SAVES_PER_SECOND, 10 * self._save_seconds, 2.0 if self.trouble else 0.0)
            await asyncio.sleep(max(0.0, self._last_save + pause - time.monotonic()))
            try:
                await self.save()
            except NotebookNotSaved:
                continue  # kept in `trouble`, which every answer shows

    async def _next_change(self) -> None:
        while not self._dirty.is_set():
            if not self._displaced:
                await self._dirty.wait()
                return
            async with self._saving:
                await self._look_at_displaced()
            await asyncio.sleep(0.1)

    async def close(self) -> None:
        """The last save, with what somebody is still writing if that ends within two seconds."""
        end = time.monotonic() + 2.0
        await self.save()
        while self._displaced and time.monotonic() < end:
            async with self._saving:
                await self._look_at_displaced()
            await asyncio.sleep(0.05)
        await self.save()
        while self._displaced:
            self._displaced.pop().close()

    # -- other programs -----------------------------------------------------------------------

    async def refresh(self) -> None:
        """Take over what somebody saved into the file meanwhile; never waits for a save of ours."""
        if stamp(self.path) == self._stamp or self._saving.locked():
            return
        async with self._saving:
            try:
                await self._take_in(patient=False)
            except OSError as error:
                self.trouble = why_not(error)

    async def _take_in(self, patient: bool) -> bool:
        """Merge what others made of the file, once it is whole; whether there was anything.

        A file that is not a notebook may be half written: if `patient`, wait until it is whole or
        was left alone for a while, else look again the next time.
        """
        began = since = time.monotonic()
        last: Stamp | None = None
        while (now := stamp(self.path)) != self._stamp:
            reason = "it is missing"
            if now is not None:
                if not self.path.is_file() or self.path.is_symlink():
                    return False  # the save says so
                try:
                    raw = self.path.read_bytes()
                except FileNotFoundError:
                    continue
                if stamp(self.path) != now:
                    continue
                try:
                    cells, metadata = await self._parsed(raw)
                except NotebookUnreadable as error:
                    reason = str(error)
                else:
                    # What they had saved before this into a file of before comes first.
                    await self._look_at_displaced()
                    self._stamp = now
                    self._base = self._merge(cells, metadata)
                    # Unmarked, nothing tells later from which version a copy comes: mark it anew.
                    self._mark = metadata.get("seer", {}).get("version", "")
                    return True
            if not patient:
                return False
            moment = time.monotonic()
            if now != last:
                last, since = now, moment
            quiet = moment - since
            if now is not None:  # that clock may be another machine's
                quiet = max(quiet, min(time.time() - now.mtime_ns / 1e9, SETTLE_SECONDS))
            limit = GONE_SECONDS if now is None else SETTLE_SECONDS
            if quiet >= limit or moment - began >= PATIENCE_SECONDS:
                self._give_up(now, reason)
                return True
            await asyncio.sleep(0.03)
        return False

    async def _parsed(self, raw: bytes) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if not raw.rstrip().endswith(b"}"):
            raise NotebookUnreadable(str(self.path), "it is cut off")
        return await asyncio.to_thread(parse_notebook, raw, self.path, as_copy=True)

    def _give_up(self, now: Stamp | None, reason: str) -> None:
        """What is in place is no notebook: say so, and write ours again."""
        if now is None:
            old = self._stamp.inode if self._stamp else 0
            self._tell(
                f"{self.path.name} was deleted or moved from outside{self._moved_to(old)}; "
                f"it is written again, complete, at {self.path}"
            )
        else:
            aside = self._aside(self.path.read_bytes())
            self._tell(
                f"{self.path.name} was changed from outside into something that is not a notebook; that "
                f"version is kept as {aside.name} ({reason})"
            )
        self._stamp = now
        self.changed()

    def _moved_to(self, inode: int) -> str:
        try:
            names = [e.name for e in os.scandir(self.path.parent) if e.inode() == inode]
        except OSError:
            return " together with its folder"
        return f" (the old one is {names[0]!r})" if names else ""

    def _aside(self, data: bytes) -> Path:
        """Another version of the file, kept beside it under a free name."""
        path = free_name(self.path)
        path.write_bytes(data)
        return path

    def recover(self) -> None:
        """Clear what a server left beside the file that was killed while it saved."""
        for edit in recover_parts(self.path):
            self._tell(
                f"a server was killed while it saved {self.path.name}; what somebody else had saved in that moment "
                f"is kept as {edit.name}"
            )

    async def _look_at_displaced(self) -> bool:
        """Merge what was written into files that ours took the place of; whether there was anything."""
        found = False
        # The newest is read first and merged last: whoever saved into it was done with the others.
        for displaced, final, now, raw in reversed([d.look() for d in reversed(self._displaced)]):
            if raw is not None:
                try:
                    cells, metadata = await self._parsed(raw)
                except NotebookUnreadable as error:
                    if not final:
                        continue
                    if raw.strip():
                        try:
                            aside = self._aside(raw)
                        except OSError as no_room:
                            self.trouble = why_not(no_room)
                            continue  # it is held until it can be kept
                        self._tell(
                            f"somebody saved something that is not a notebook over {self.path.name}; it is kept "
                            f"as {aside.name} ({error})"
                        )
                else:
                    self._merge(cells, metadata)
                    found = True
                displaced.seen = now
            if final:
                self._displaced.remove(displaced)
                displaced.close()
        return found

    def _tell(self, notice: str) -> None:
        self.notices.append(notice)
        del self.notices[:-TOLD]

    def _as_written(self) -> Written:
        return Written({cell.id: cell.face for cell in self.cells}, plain(self.metadata))

    def _merge(self, cells: list[dict[str, Any]], metadata: dict[str, Any]) -> Written:
        """Merge their version into ours (see merge.py for what belongs to whom); returns theirs."""
        mark = metadata.get("seer", {}).get("version")
        base = (self._remembered.get(mark) or Written({}, "{}")) if mark else self._base
        give_ids_back(cells, base.sources or {cell.id: cell.face.source for cell in self.cells})
        theirs = {cell["id"]: cell for cell in cells}
        faces = {id: face_of(cell) for id, cell in theirs.items()}
        seen = Written(faces, plain(metadata))
        if mark:
            self._remembered.remember(mark, seen)  # what that editor saves next comes from this
        ours = {cell.id: cell for cell in self.cells}
        busy = {cell.id for cell in self.cells if cell.state in UNFINISHED}
        known = base.cells
        ran = {id for id, cell in ours.items() if id in known and cell.face.run != known[id].run}
        mine = {id: cell.face.source for id, cell in ours.items()}
        found = merge(base.sources, mine, seen.sources, busy, ran)

        others = [
            cell.id
            for cell in self.cells
            if cell.id in theirs
            and cell.id not in found.conflicts
            and self._take_over(cell, theirs[cell.id], known.get(cell.id), faces[cell.id])
        ]
        for id in found.deleted:
            self.delete(ours[id])
        for id in found.changed:
            self._take_source(ours[id], theirs[id])
        self.cells = [
            self._adopted(theirs[id]) if id in found.theirs else ours[id] for id in found.order
        ]
        self._by_id = {cell.id: cell for cell in self.cells}
        for id in found.conflicts:
            self._add_conflict(ours[id], theirs[id], faces[id])
        for key, value in changed_keys(
            json.loads(base.metadata), json.loads(seen.metadata)
        ).items():
            if value is not None:
                self.metadata[key] = value
            elif base.cells:
                self.metadata.pop(key, None)
        self._tell_of(found, others, old=bool(mark) and mark != self._mark and seen == base)
        folded = metadata.get("seer", {}).get("folded")
        same = self._as_written() == seen and all(c.data == theirs[c.id] for c in self.cells)
        self.reshaped = True
        if not same or (mark, folded) != (self._mark, self.folded):
            self.changed()
        return seen

    def _take_source(self, cell: Cell, theirs: dict[str, Any]) -> None:
        if theirs["cell_type"] == cell.kind:
            self.rewrite(cell, joined(theirs["source"]))
            return
        self._by_run.pop(cell.seer.get("run", ""), None)
        theirs["metadata"].pop("seer", None)
        cell.become(theirs)

    def _take_over(self, cell: Cell, theirs: dict[str, Any], base: Face | None, face: Face) -> bool:
        """What they changed of a cell beside its source; whether there was anything."""
        old = json.loads(base.metadata) if base else {}
        own = cell.metadata
        new = {
            k: v
            for k, v in changed_keys(old, json.loads(face.metadata)).items()
            if v != own.get(k) and (v is not None or base)
        }
        for key, value in new.items():
            if value is None:
                del own[key]
            else:
                own[key] = value
        attached = face.attachments not in (base.attachments if base else "", cell.face.attachments)
        if attached:
            cell.put(attachments=theirs.get("attachments"))
        elif new:
            cell.changed()
        return self._take_outputs(cell, theirs, base) or bool(new) or attached

    def _take_outputs(self, cell: Cell, theirs: dict[str, Any], base: Face | None) -> bool:
        """Take what they ran in a kernel of their own; whether they did."""
        if cell.kind != "code" or theirs["cell_type"] != "code":
            return False
        now, noted = outputs_digest(theirs), theirs["metadata"].get("seer", {})
        elsewhere = base.outputs if base and not base.run else now
        told = noted.get("digest", now) if noted.get("run") else elsewhere
        current = self._digest_of(cell)
        if now in (told, current):
            return False  # as we wrote it: their view of our run
        newer = cell.state in UNFINISHED or cell.seer.get("run", "") != noted.get("run", "")
        if newer or (noted.get("run") and current != told):
            if (cell.id, now) not in self._left:
                self._left.add((cell.id, now))
                self._tell(
                    f"outputs of cell {cell.id} that were saved from outside are not taken: it ran here since"
                )
            return False
        self._by_run.pop(cell.seer.get("run", ""), None)
        cell.forget_run()
        cell.put_outputs(theirs["outputs"])
        cell.put_count(theirs.get("execution_count"))
        return True

    def _digest_of(self, cell: Cell) -> str:
        cell.encoded()  # brings its data up to date
        return outputs_digest(cell.data)

    def _adopted(self, data: dict[str, Any]) -> Cell:
        """A cell that only they have. A copy of a cell of ours is no run of ours."""
        seer = data["metadata"].get("seer", {})
        if not seer.get("run") or seer["run"] in self._by_run or seer["state"] in UNFINISHED:
            data["metadata"].pop("seer", None)
        cell = Cell(data, self)
        if cell.seer:
            self._by_run[cell.seer["run"]] = cell
        return cell

    def _add_conflict(self, ours: Cell, theirs: dict[str, Any], face: Face) -> None:
        """Their version of a cell that both changed, as a new cell behind ours."""
        seer = theirs["metadata"].pop("seer", {})
        if theirs["cell_type"] == "code" and seer.get("digest") == outputs_digest(theirs):
            theirs.update(outputs=[], execution_count=None)  # our outputs, of another source
        copy = Cell({**theirs, "id": self._free_id()}, self)
        self.cells.insert(self.index(ours) + 1, copy)
        self._by_id[copy.id] = copy
        self._tell(
            f"cell {ours.id} was changed here and from outside: this version stays, the other one is cell {copy.id}"
        )

    def _tell_of(self, found: Merge, others: list[str], old: bool) -> None:
        more = [id for id in others if id not in found.changed]
        told = (
            (found.changed, "changed"),
            (more, "changed beside the source"),
            ([id for id in found.order if id in found.theirs], "added"),
            (found.deleted, "deleted"),
        )
        if counts := ", ".join(f"{len(ids)} {what} ({named(ids)})" for ids, what in told if ids):
            self._tell(f"cells changed from outside: {counts}")
        if found.stay:
            self._tell(
                f"deleted from outside, but changed or run here, so they stay: {named(found.stay)}"
            )
        if found.both_moved:
            self._tell("cells were moved here and from outside: the order here stays")
        if old:
            self._tell(
                f"an older version of {self.path.name} was put in its place from outside; nothing in it was new, "
                "so the current one is written again"
            )


def plain(metadata: dict[str, Any]) -> str:
    """A notebook's metadata as JSON, without what we note."""
    return json.dumps({k: v for k, v in metadata.items() if k != "seer"}, sort_keys=True)


def named(ids: list[str]) -> str:
    return ", ".join(ids[:6]) + (f" and {len(ids) - 6} more" if len(ids) > 6 else "")


def why_not(error: OSError) -> str:
    """Why a file was not written, for people."""
    said = (error.strerror or str(error))[:300]
    return f"the disk is full ({said})" if error.errno in (errno.ENOSPC, errno.EDQUOT) else said
