"""What this server holds: its sandboxes, its backends, its books. Starting and finding work on it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import shutil
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ..backends import Backend, open_backend
from ..config import Config
from ..errors import EndUnconfirmed, SandboxUnavailable, SeerError
from ..files import Lock, private_dir, write_json
from ..kernel_host.fault import fault_point
from ..notebook import Notebook, why_not
from ..observe import Observer
from ..packs import Packs
from ..spend import SpendBook
from .meter import Meter
from .session import RunInfo, Session
from .snapshots import Snapshots
from .starting import Starting

# What damaged files of a sandbox can raise. It is said in a note: the other sandboxes are well.
DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, SeerError)
T = TypeVar("T")


@dataclass
class Leftover:
    """What a start that failed may have left: a machine that may still run, and cost money."""

    owner: str
    reason: str
    """Why the start failed."""
    unsure: EndUnconfirmed
    meter: Meter | None

    def error(self) -> SandboxUnavailable:
        cost = f" It cost {self.meter.so_far()}." if self.meter is not None else ""
        return SandboxUnavailable(f"{self.reason} {self.unsure}{cost}")

    def over(self) -> SandboxUnavailable:
        """The same when its end is confirmed."""
        cost = f" It cost {self.meter.so_far()}." if self.meter is not None else ""
        return SandboxUnavailable(f"{self.reason} What it had left has ended.{cost}")


class Holdings:
    def __init__(self, config: Config, packs: Packs, only: str | None = None) -> None:
        """`only`: the owner whose sandboxes are taken over from servers that are gone; None: everybody's."""
        self.config = config
        self.only = only
        self.packs = packs
        self.on_change: Callable[[Session, str], None] = lambda session, cell: None
        self.on_asked: Callable[[Session, Any], None] = lambda session, asked: None
        self.on_ended: Callable[[Session], None] = lambda session: None
        self.sessions: dict[str, Session] = {}
        self.starting: dict[str, Starting] = {}
        """What is being started, and what failed to within the last hour."""
        self.ending: dict[str, Leftover] = {}
        """Failed starts that may have left a machine."""
        self.observer = Observer(config.state_dir, config.audit_code, config.log_redactor)
        self.book = SpendBook(config.state_dir / "spend.jsonl", self.observer.instance)
        self.snapshots = Snapshots(config.state_dir / "snapshots.jsonl")
        self.work: set[asyncio.Task[Any]] = set()
        self._backends: dict[str, Backend] = {}

    @property
    def live(self) -> list[Session]:
        return [session for session in self.sessions.values() if session.ended is None]

    def knows(self, handle: str) -> bool:
        """Whether this server has it, starts it, or is about to be rid of it."""
        return handle in self.sessions or handle in self.starting or handle in self.ending

    async def backend(self, name: str) -> Backend:
        if name not in self._backends:  # a cloud's client takes a second to import
            made = await asyncio.to_thread(open_backend, name, self.config)
            self._backends.setdefault(name, made)
        return self._backends[name]

    def own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that belongs to the server, not to the call that began it."""
        task = asyncio.create_task(work)
        self.work.add(task)
        task.add_done_callback(self.work.discard)
        return task

    def session(
        self,
        handle: str,
        name: str,
        owner: str,
        backend: str,
        document: Notebook,
        folder: Path,
        lock: Lock,
        created: float,
    ) -> Session:
        session = Session(
            handle,
            name,
            owner,
            backend,
            document,
            folder,
            lock,
            created,
            self.config.redactor.child(),
        )
        session.on_change = lambda s, cell: self.on_change(s, cell)
        session.on_asked = lambda s, asked: self.on_asked(s, asked)
        session.on_end = self._ended
        session.on_stopping = self._stopping
        session.on_run_begun = lambda s, run, code: self.observer.run_begun(s.facts(run), code)
        session.on_run_over = self._run_over
        return session

    def _run_over(self, session: Session, run: RunInfo) -> None:
        self.observer.run_over(
            session.facts(run), run.state, run.started, run.seconds, run.output_bytes, run.code
        )

    def note(self, did: str, session: Session) -> None:
        path = str(session.notebook.path)
        self.observer.sandbox(
            did, session.handle, session.owner, session.backend_name, path, session.ended
        )

    def sandbox_dir(self, handle: str) -> Path:
        """Where its record and its lock are."""
        return self.config.state_dir / "sandboxes" / handle

    def runtime_dir(self, handle: str) -> Path:
        """Where its sockets are: a path that is short, whatever the handle is."""
        return self.config.runtime_dir / hashlib.sha256(handle.encode()).hexdigest()[:12]

    def lock_notebook(self, path: Path) -> Lock | None:
        """The right to write that file, among all servers that share this state folder."""
        locks = private_dir(self.config.state_dir / "locks")
        lock = Lock(locks / hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32])
        return lock if lock.take() else None

    def restore(self) -> list[str]:
        """Make folders and records anew that somebody removed; what hinders, in sentences.

        A lock whose file is gone keeps nobody out: it is taken again.
        """
        notes: list[str] = []
        private_dir(self.config.state_dir)
        private_dir(self.config.state_dir / "sandboxes")
        for session in self.live:
            if (session.state_dir / "record.json").exists():
                continue
            try:
                private_dir(session.state_dir)
                session.lock.release()
                if not session.lock.take():
                    notes.append(f"{session.handle}: another server has taken its folder")
                    continue
                if session.notebook_lock is not None:
                    session.notebook_lock.release()
                    session.notebook_lock = self.lock_notebook(session.notebook.path)
                    if session.notebook_lock is None:
                        notes.append(
                            f"{session.handle}: another server writes its notebook as well"
                        )
                write_json(session.state_dir / "record.json", session.record())
            except OSError as error:
                notes.append(f"{session.handle}: its record is gone ({why_not(error)})")
            else:
                self.note("noted again", session)
        return notes

    async def stop_quietly(self, session: Session, why: str) -> None:
        try:
            await session.terminate(why)
        except EndUnconfirmed:
            return  # kept in session.unconfirmed, which every answer shows; it is asked again and again

    def _stopping(self, session: Session) -> None:
        """Whoever finds this record later ends the sandbox, if we cannot."""
        try:
            write_json(session.state_dir / "record.json", session.record())
        except OSError as error:
            session.notebook.notices.append(
                f"that {session.handle} is being stopped could not be noted ({why_not(error)})"
            )

    def _ended(self, session: Session) -> None:
        """The record stays for a while, so that the handle can be asked about; the rest goes."""
        self.note("ended", session)
        self.on_ended(session)
        if session.meter is not None:
            session.meter.note(closed=True)
        try:
            write_json(session.state_dir / "record.json", session.record())
        except OSError:  # the disk is full: what goes makes room
            clear_ended(session.state_dir)
            try:
                write_json(session.state_dir / "record.json", session.record())
            except OSError as error:
                session.notebook.notices.append(
                    f"that {session.handle} has ended could not be noted ({why_not(error)}); the next server finds out"
                )
        fault_point("stop.recorded")
        clear_ended(session.state_dir)


def clear_ended(folder: Path) -> None:
    """Of a sandbox that is gone only the record stays, so that its handle can be asked about."""
    for entry in folder.iterdir() if folder.is_dir() else ():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name not in ("record.json", "lock"):
            entry.unlink(missing_ok=True)


def release(*locks: Lock | None) -> None:
    for lock in locks:
        if lock is not None:
            lock.release()
