"""Find the sandboxes of earlier servers, and take over those that no living server holds."""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from ..errors import EndUnconfirmed, SandboxUnreachable, SeerError
from ..files import Lock, clear_parts
from ..ipynb import read_notebook
from ..kernel_host.fault import fault_point
from ..notebook import Notebook
from ..sharedfile import stamp
from .blinding import hide_again
from .holdings import DAMAGE, Holdings, clear_ended, release
from .meter import taken_up
from .record import read_record

FORGET_SECONDS = 7 * 86400.0
CUT_OFF_SECONDS = 60.0
FOLLOW_SECONDS = 10.0
CUT_OFF = (
    "its server ended before its start was over; what was there of it was ended by the next server"
)
ELSEWHERE = "another seer-mcp server uses it."


class Finds:
    def __init__(self, held: Holdings) -> None:
        self._held = held
        self._scanning = asyncio.Lock()
        self.elsewhere: dict[str, str] = {}
        """Handles that another server holds -> their owner."""

    def elsewhere_notes(self) -> list[tuple[str, str]]:
        """Of each handle that another server holds, that it does."""
        return [(handle, f"{handle}: {ELSEWHERE}") for handle in self.elsewhere]

    async def scan(self) -> list[str]:
        """Take over what no living server holds; what is wrong with the rest, in sentences."""
        notes: list[str] = []
        async with self._scanning:
            notes += self._held.restore()
            folders = sorted((self._held.config.state_dir / "sandboxes").iterdir())
            ours = (
                self._held.sessions.keys() | self._held.starting.keys() | self._held.ending.keys()
            )
            unknown = [f for f in folders if f.name not in ours and f.is_dir()]
            new = [f for f in unknown if (f / "record.json").exists()]
            cut_off = [self._forget_cut_off(f) for f in unknown if f not in new]
            outcomes = await asyncio.gather(*(self.adopt(folder) for folder in new))
            notes.extend(outcome for outcome in [*cut_off, *outcomes] if outcome)
        return notes

    async def adopt(self, folder: Path) -> str | None:
        """Take over the sandbox of a folder; what is wrong with it, if it cannot be."""
        locks: list[Lock] = []
        try:
            return await self._take_over(folder, locks)
        except (*DAMAGE, TypeError, ValueError) as error:
            release(*locks)
            return f"{folder.name}: it cannot be taken over ({brief(error)}). `seer-mcp doctor` shows more."

    async def _take_over(self, folder: Path, locks: list[Lock]) -> str | None:
        lock = Lock(folder / "lock")
        locks.append(lock)
        held = not lock.take()
        self.elsewhere.pop(folder.name, None)
        try:
            record = read_record(folder)
            handle, backend_name = str(record["handle"]), str(record["backend"])
            path, created = Path(record["notebook"]), float(record["created"])
            owner, name, ended = str(record["owner"]), str(record["name"]), record["ended"]
            sandbox_record = record["sandbox"]
            config = self._held.config
            meter = taken_up(
                self._held.book,
                config.allowances,
                handle,
                owner,
                record.get("price"),
                config.owner_allowances,
            )
            shared = record.get("shared") is True
            investigation = Path(str(given)) if (given := record.get("investigation")) else None
            stopping, named = record.get("stopping"), tuple(map(str, record.get("secrets", ())))
        except (*DAMAGE, TypeError, ValueError) as error:
            lock.release()
            return (
                f"{folder.name}: its record cannot be used ({brief(error)}). `seer-mcp doctor --fix` writes it anew if "
                f"the sandbox runs; else remove {folder}."
            )
        if self._held.only not in (None, owner):
            lock.release()
            return None
        if held:
            self.elsewhere[handle] = owner
            return f"{folder.name}: {ELSEWHERE}"
        if ended is not None and time.time() - created > FORGET_SECONDS:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)
            return None
        if ended is not None:
            clear_ended(folder)  # its server may have been killed just before
            past = self._held.session(
                handle, name, owner, backend_name, Notebook(path), folder, lock, created
            )
            past.meter, past.shared, past.investigation = meter, shared, investigation
            if meter is not None:
                meter.closed = self._held.book.closed(handle)
            past.ended, past.unread = str(ended), True
            past.release()
            self._held.sessions[handle] = past
            return None
        notebook_lock = self._held.lock_notebook(path)
        if notebook_lock is None:
            lock.release()
            return f"{handle}: its notebook {path} is open in another sandbox; stop that one first."
        locks.append(notebook_lock)
        fault_point("find.locked")
        try:
            seen = stamp(path)
            cells, metadata = read_notebook(path) if path.exists() else ([], None)
        except SeerError as error:
            release(lock, notebook_lock)
            return f"{handle}: {error}"
        clear_parts(folder / "record.json")
        document = Notebook(path, cells, metadata, seen)
        document.recover()
        document.folded = int((metadata or {}).get("seer", {}).get("folded", 0))
        session = self._held.session(
            handle, name, owner, backend_name, document, folder, lock, created
        )
        session.notebook_lock, session.meter, session.secrets = notebook_lock, meter, named
        session.shared = shared
        session.investigation = investigation
        self._held.config.redactor.know(self._held.config.secrets.at_hand(named))
        if investigation is not None:
            hide_again(session.redactor, investigation)
        try:
            backend = await self._held.backend(backend_name)
            if sandbox_record:
                sandbox = await backend.find(sandbox_record)
            else:  # its server died while it started
                sandbox = None
                await backend.clear(handle)
                shutil.rmtree(self._held.runtime_dir(handle), ignore_errors=True)
        except (SandboxUnreachable, EndUnconfirmed) as error:
            release(lock, notebook_lock)
            return f"{handle}: {error}"
        except (SeerError, KeyError, TypeError, ValueError) as error:
            release(lock, notebook_lock)
            return f"{handle}: its record names no sandbox ({brief(error)}); remove {folder} when nothing of it runs."
        fault_point("find.found")
        if sandbox is None:
            if sandbox_record:
                await backend.clear(handle)  # a killed host may leave what it started
            await session.declare_lost(
                "it ended while no server was there" if sandbox_record else CUT_OFF,
                backend,
                sandbox_record,
            )
        else:
            session.attach(backend, sandbox, document.rewind())
            await session.follow_again(FOLLOW_SECONDS)
            fault_point("find.followed")
            self._held.note("found again", session)
        self._held.sessions[handle] = session
        if stopping and sandbox is not None:  # its server was ended before it could
            self._held.own(self._held.stop_quietly(session, str(stopping)))
        return None

    def _forget_cut_off(self, folder: Path) -> str | None:
        """Remove the folder of a start that was cut off before its record: nothing of it runs."""
        if (folder / "host.json").exists():  # which comes after the record: something may run
            return f"{folder.name}: its record is missing. `seer-mcp doctor --fix` writes it anew if it runs."
        try:
            if time.time() - folder.stat().st_mtime < CUT_OFF_SECONDS:
                return None  # perhaps another server is about to write the record
        except OSError:
            return None
        lock = Lock(folder / "lock")
        if lock.take():
            shutil.rmtree(folder, ignore_errors=True)
            lock.release()
        return None


def brief(error: Exception) -> str:
    """An error in a few words; some quote the whole file."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 300 else f"{text[:300]} …"
