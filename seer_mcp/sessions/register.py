"""All sandboxes of this server: start, find again, list, end.

One folder per sandbox under the state folder holds its record (0600, atomic) and a lock. The lock,
not the state folder, is what belongs to one server: several servers (a desktop client's and an
editor's, say) share a state folder, each follows the sandboxes that it holds, and takes over those
whose server is gone.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from ..backends import Backend, Place, Progress, open_backend
from ..config import Config
from ..environment import SandboxSpec
from ..errors import (
    BadInput,
    Conflict,
    NotFound,
    SandboxStartFailed,
    SandboxUnreachable,
    SeerError,
    show,
)
from ..files import Lock, checked_name, clear_parts, private_dir, resolve_inside, write_json
from ..ipynb import read_notebook
from ..kernel_host.fault import fault_point
from ..notebook import Notebook, why_not
from ..observe import Observer
from ..packs import Packs
from ..sharedfile import stamp
from .record import read_record
from .session import RunInfo, Session

FORGET_SECONDS = 7 * 86400.0
CUT_OFF_SECONDS = 60.0
READY_SECONDS = 40.0
FOLLOW_SECONDS = 10.0
# What damaged files of a sandbox can raise. It is said in a note: the other sandboxes are well.
DAMAGE = (ArithmeticError, AttributeError, LookupError, OSError, RecursionError, SeerError)
T = TypeVar("T")
ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"


class Register:
    def __init__(self, config: Config, packs: Packs) -> None:
        self.config = config
        self.packs = packs
        self.on_change: Callable[[Session, str], None] = lambda session, cell: None
        self._sessions: dict[str, Session] = {}
        self._names: set[tuple[str, str]] = set()  # being started
        self._starting: set[str] = set()  # their handles
        self._backends: dict[str, Backend] = {}
        self._scanning = asyncio.Lock()
        self._first_scan: asyncio.Task[None] | None = None
        self._elsewhere: dict[str, str] = {}  # handles that another server holds -> owner
        self._work: set[asyncio.Task[Any]] = set()
        self.closed = asyncio.Event()
        self.observer = Observer(config.state_dir, config.audit_code)

    # -- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the folders, and begin to look for sandboxes of earlier servers."""
        private_dir(self.config.state_dir)
        private_dir(self.config.state_dir / "sandboxes")
        private_dir(self.config.runtime_dir)
        self.observer.open(on_exit=self.config.on_exit)
        try:
            self.config.outputs_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a start says it to the client
            self.observer.not_made(self.config.outputs_dir, error)
        self._first_scan = asyncio.create_task(self._scan(), name="find sandboxes again")

    async def close(self) -> None:
        """Let go of every sandbox, or end them, as configured."""
        busy = {*self._work, *([self._first_scan] if self._first_scan else [])}
        if busy:
            await asyncio.wait(busy, timeout=2.0)
        live = [s for s in self._sessions.values() if s.ended is None]
        if self.config.on_exit == "stop":
            await asyncio.gather(*(s.terminate("the server ended") for s in live))
        else:
            await asyncio.gather(*(s.let_go() for s in live))
        await self.observer.close()
        self.closed.set()

    def backend(self, name: str) -> Backend:
        if name not in self._backends:
            self._backends[name] = open_backend(name, self.config)
        return self._backends[name]

    # -- start --------------------------------------------------------------------------------

    async def start(
        self, owner: str, name: str, spec: SandboxSpec, notebook: str, fork: bool, report: Progress
    ) -> Session:
        """A sandbox with a kernel that is ready. Whatever fails, or if the caller goes, nothing is left."""
        backend = self.backend(spec.backend)
        await self.all_found()
        live = [s for s in self._sessions.values() if s.ended is None]
        if len(live) + len(self._names) >= self.config.max_sandboxes:
            raise Conflict(
                f"{len(live)} sandboxes are running, which is this server's limit. Stop one with stop_sandbox first."
            )
        source = self._existing(notebook) if notebook else None
        name = self._free_name(owner, name, source)
        handle = f"{name}-{''.join(secrets.choice(ALPHABET) for _ in range(6))}"
        self._names.add((owner, name))
        self._starting.add(handle)
        # A call that is cancelled is cancelled at every await: it could not clean up after itself.
        work = self._own(self._start(handle, owner, name, backend, spec, source, fork, report))

        def started(_: asyncio.Task[Session]) -> None:
            self._names.discard((owner, name))
            self._starting.discard(handle)

        work.add_done_callback(started)
        try:
            return await asyncio.shield(work)
        except asyncio.CancelledError:
            work.cancel()
            raise
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise SandboxStartFailed(f"{why_not(error)}{where}") from error

    def _own(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """A task that belongs to the register, not to the call that began it."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    def _existing(self, notebook: str) -> Path:
        config = self.config
        roots = [config.project_dir, config.outputs_dir, *config.notebook_roots]
        path = resolve_inside("notebook", notebook, config.project_dir, roots)
        if not path.is_file():
            known = [
                str(p.relative_to(config.outputs_dir.parent))
                for p in config.outputs_dir.glob("*/*.ipynb")
            ]
            raise NotFound("notebook", notebook, known)
        return path

    def _free_name(self, owner: str, name: str, source: Path | None) -> str:
        taken = {s.name: s for s in self._sessions.values() if s.ended is None and s.owner == owner}
        starting = {n for o, n in self._names if o == owner}
        if name:
            checked_name("name", name)
            if name in taken:
                raise Conflict(
                    f"A sandbox named {show(name)} is running: {taken[name].handle}. Use that handle, choose another "
                    f"name, or end it with stop_sandbox(sandbox={show(taken[name].handle)})."
                )
            if name in starting:
                raise Conflict(
                    f"A sandbox named {show(name)} is being started. Choose another name."
                )
            return name
        kept = "".join(
            c if c.isascii() and c.isalnum() else "-"
            for c in (source.stem if source else "sandbox").lower()
        )
        stem = kept.strip("-")[:32] or "sandbox"
        number = 1
        while (found := stem if number == 1 else f"{stem}-{number}") in taken or found in starting:
            number += 1
        return found

    async def _start(
        self,
        handle: str,
        owner: str,
        name: str,
        backend: Backend,
        spec: SandboxSpec,
        source: Path | None,
        fork: bool,
        report: Progress,
    ) -> Session:
        seen = stamp(source) if source and not fork else None
        cells, metadata = read_notebook(source, as_copy=fork) if source else ([], None)
        path = source if source and not fork else self._new_folder(name)
        state_dir = self.config.state_dir / "sandboxes" / handle
        lock, notebook_lock = Lock(state_dir / "lock"), None
        try:
            notebook_lock = self._lock_notebook(path)
            if notebook_lock is None:
                raise Conflict(
                    f"The notebook {path} is open in another sandbox. Use that one (list_sandboxes), or open a copy "
                    "with fork=true."
                )
            private_dir(state_dir)
            lock.take()
        except BaseException:
            release(notebook_lock)
            shutil.rmtree(state_dir, ignore_errors=True)
            self._remove_if_empty(path, source)
            raise
        fault_point("start.locked")
        document = Notebook(path, cells, metadata, seen)
        document.hold()  # a sandbox that does not start leaves the file as it was
        document.forget_runs()
        session = Session(handle, name, owner, spec.backend, document, state_dir, lock, time.time())
        session.notebook_lock = notebook_lock
        place = Place(
            handle,
            state_dir,
            self._runtime_dir(handle),
            path.parent,
            (path,),
            self.packs.read().importable(),
            owner,
        )
        attached = False
        try:
            write_json(state_dir / "record.json", session.record())
            if source and fork:
                await asyncio.to_thread(document.copy_long_outputs, source)
            sandbox = await backend.start(spec, place, report)
            session.attach(backend, sandbox, 1)
            attached = True
            fault_point("start.attached")
            write_json(state_dir / "record.json", session.record())
            report("starting the kernel")
            await session.kernel_ready(READY_SECONDS)
            fault_point("start.ready")
            document.metadata["seer"] = {"sandbox": handle, "backend": spec.backend}
            document.unhold()
            await session.save()
        except BaseException:
            if attached:
                await session.terminate("it did not start")
            session.release()
            shutil.rmtree(state_dir, ignore_errors=True)
            shutil.rmtree(self._runtime_dir(handle), ignore_errors=True)
            self._remove_if_empty(path, source)
            raise
        self._watch(session)
        self._sessions[handle] = session
        self._note("started", session)
        return session

    def _watch(self, session: Session) -> None:
        session.on_change = lambda s, cell: self.on_change(s, cell)
        session.on_end = self._ended
        session.on_run_begun = lambda s, run, code: self.observer.run_begun(s.facts(run), code)
        session.on_run_over = self._run_over

    def _run_over(self, session: Session, run: RunInfo) -> None:
        self.observer.run_over(
            session.facts(run), run.state, run.started, run.seconds, run.output_bytes, run.code
        )

    def _note(self, did: str, session: Session) -> None:
        path = str(session.notebook.path)
        self.observer.sandbox(
            did, session.handle, session.owner, session.backend_name, path, session.ended
        )

    def _runtime_dir(self, handle: str) -> Path:
        """Where its sockets are: a path that is short, whatever the handle is."""
        return self.config.runtime_dir / hashlib.sha256(handle.encode()).hexdigest()[:12]

    def _new_folder(self, name: str) -> Path:
        """The path of a new notebook in a folder of its own; an older one is never touched."""
        number = 1
        while True:
            stem = name if number == 1 else f"{name}-{number}"
            folder = self.config.outputs_dir / stem
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                continue
            return folder / f"{stem}.ipynb"

    def _remove_if_empty(self, path: Path, source: Path | None) -> None:
        if path == source:
            return
        path.unlink(missing_ok=True)
        try:
            path.parent.rmdir()
        except OSError:
            return  # the kernel left files there: they stay

    def _lock_notebook(self, path: Path) -> Lock | None:
        """The right to write that file, among all servers that share this state folder."""
        locks = private_dir(self.config.state_dir / "locks")
        lock = Lock(locks / hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:32])
        return lock if lock.take() else None

    # -- find ---------------------------------------------------------------------------------

    async def get(self, handle: str, owner: str) -> Session:
        """The session of a handle, if it is the caller's. Foreign handles answer like unknown ones."""
        session = self._sessions.get(handle)
        if session is None or session.owner != owner:
            await self.all_found()
            session = self._sessions.get(handle)
        if session is None and self._elsewhere.get(handle) == owner:
            raise Conflict(
                f"Sandbox {show(handle)} is used by another seer-mcp server that runs now. Work with it there, or "
                "end that server: then it is found again here."
            )
        if session is None or session.owner != owner:
            mine = [
                s.handle for s in self._sessions.values() if s.owner == owner and s.ended is None
            ]
            raise NotFound(
                "sandbox", handle, mine, "list_sandboxes shows what runs; start_sandbox starts one."
            )
        if session.unread:
            path = session.notebook.path
            seen = stamp(path)
            cells, metadata = read_notebook(path) if path.exists() else ([], None)
            session.notebook = Notebook(path, cells, metadata, seen)
            session.unread = False
        await session.notebook.refresh()
        return session

    async def list(self, owner: str) -> tuple[list[Session], list[str]]:
        """The caller's sandboxes, the newest last; and notes on those that cannot be used."""
        notes = await self.all_found()
        mine = [s for s in self._sessions.values() if s.owner == owner]
        return sorted(mine, key=lambda s: s.created), notes

    async def all_found(self) -> list[str]:
        if self._first_scan is not None:
            await asyncio.wait([self._first_scan])
        return await asyncio.shield(self._own(self._scan_notes()))

    async def _scan(self) -> None:
        await self._scan_notes()

    async def _scan_notes(self) -> list[str]:
        """Take over what no living server holds; what is wrong with the rest, in sentences."""
        notes: list[str] = []
        async with self._scanning:
            folders = sorted((self.config.state_dir / "sandboxes").iterdir())
            ours = self._sessions.keys() | self._starting
            unknown = [f for f in folders if f.name not in ours and f.is_dir()]
            new = [f for f in unknown if (f / "record.json").exists()]
            cut_off = [self._forget_cut_off(f) for f in unknown if f not in new]
            outcomes = await asyncio.gather(*(self._adopt(folder) for folder in new))
            notes.extend(outcome for outcome in [*cut_off, *outcomes] if outcome)
        return notes

    async def settle(self, folder: Path) -> str | None:
        """Take over the one sandbox of `folder`, as a server would at its start; what hinders, or None."""
        return await self._adopt(folder)

    async def _adopt(self, folder: Path) -> str | None:
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
        self._elsewhere.pop(folder.name, None)
        try:
            record = read_record(folder)
            handle, backend_name = str(record["handle"]), str(record["backend"])
            path, created = Path(record["notebook"]), float(record["created"])
            owner, name, ended = str(record["owner"]), str(record["name"]), record["ended"]
            sandbox_record = record["sandbox"]
        except (*DAMAGE, TypeError, ValueError) as error:
            lock.release()
            return (
                f"{folder.name}: its record cannot be used ({brief(error)}). `seer-mcp doctor --fix` writes it anew if "
                f"the sandbox runs; else remove {folder}."
            )
        if held:
            self._elsewhere[handle] = owner
            return f"{folder.name}: another seer-mcp server uses it."
        if ended is not None and time.time() - created > FORGET_SECONDS:
            lock.release()
            shutil.rmtree(folder, ignore_errors=True)
            return None
        if ended is not None:
            clear_ended(folder)  # its server may have been killed just before
            past = Session(handle, name, owner, backend_name, Notebook(path), folder, lock, created)
            past.ended, past.unread = str(ended), True
            past.release()
            self._sessions[handle] = past
            return None
        notebook_lock = self._lock_notebook(path)
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
        session = Session(handle, name, owner, backend_name, document, folder, lock, created)
        session.notebook_lock = notebook_lock
        self._watch(session)
        try:
            backend = self.backend(backend_name)
            if sandbox_record:
                sandbox = await backend.find(sandbox_record)
            else:  # its server died while it started
                sandbox = None
                await backend.clear(handle)
                shutil.rmtree(self._runtime_dir(handle), ignore_errors=True)
        except SandboxUnreachable as error:
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
                "it ended while no server was there", backend, sandbox_record
            )
        else:
            session.attach(backend, sandbox, document.rewind())
            await session.follow_again(FOLLOW_SECONDS)
            fault_point("find.followed")
            self._note("found again", session)
        self._sessions[handle] = session
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

    def _ended(self, session: Session) -> None:
        """The record stays for a while, so that the handle can be asked about; the rest goes."""
        self._note("ended", session)
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

    async def stop(self, session: Session) -> None:
        if session.ended is None:
            await session.terminate("stopped by stop_sandbox")
        else:
            raise BadInput("sandbox", session.handle, f"it has ended already ({session.ended})")


def clear_ended(folder: Path) -> None:
    """Of a sandbox that is gone only the record stays, so that its handle can be asked about."""
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name not in ("record.json", "lock"):
            entry.unlink(missing_ok=True)


def brief(error: Exception) -> str:
    """An error in a few words; some quote the whole file."""
    text = f"{type(error).__name__}: {error}"
    return text if len(text) <= 300 else f"{text[:300]} …"


def release(*locks: Lock | None) -> None:
    for lock in locks:
        if lock is not None:
            lock.release()
