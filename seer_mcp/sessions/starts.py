"""Start a sandbox: in a task that belongs to no call, so that whatever fails, nothing is left."""

from __future__ import annotations

import asyncio
import secrets
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .. import __version__
from ..backends import Backend, Place, Progress
from ..backends.owners import only_ours
from ..environment import Investigation, SandboxSpec, opening_cells
from ..errors import (
    NOTHING_LEFT,
    BadInput,
    Conflict,
    EndUnconfirmed,
    NotFound,
    PathRefused,
    SandboxStartFailed,
    SeerError,
    show,
)
from ..files import Lock, checked_name, private_dir, resolve_inside, write_json
from ..findings import record_path
from ..interface import module_source
from ..ipynb import read_notebook
from ..kernel_host.fault import fault_point
from ..kernel_host.limits import without_network
from ..model_store import ModelStore
from ..money import Price, hard_stop, terms
from ..notebook import Notebook, why_not
from ..sharedfile import stamp
from .blinding import Blinding, hidden, refuse_what_tells
from .holdings import Holdings, Leftover, release
from .meter import Meter
from .session import INSIST_SECONDS, Session
from .starting import Starting
from .turns import Turns

READY_SECONDS = 40.0
STOP_SECONDS = 40.0  # that a call waits for an end; clients cut calls that take longer
LIFETIME = 4 * 3600.0  # of a sandbox that is billed, if nobody says otherwise; it can be extended
IDLE_LIMIT = 30 * 60.0  # and without use
LONGEST = 24 * 3600.0
FAILURES_KEPT = 3600.0  # seconds for which it is said why a start failed
ALPHABET = "abcdefghjkmnpqrstuvwxyz23456789"


@dataclass(frozen=True)
class Order:
    """What is to be started."""

    backend: Backend
    spec: SandboxSpec
    source: Path | None
    """The notebook that is opened."""
    fork: bool
    """Whether a copy of it is."""
    packs: Mapping[str, Path]
    """What the kernel can import, by name."""
    investigation: Investigation | None = None


class Starts:
    def __init__(self, held: Holdings) -> None:
        self._held = held
        self._turns = Turns(held.config.starts_at_once)

    async def begin(
        self,
        owner: str,
        name: str,
        spec: SandboxSpec,
        notebook: str,
        fork: bool,
        investigation: Investigation | None = None,
    ) -> Starting:
        """Begin to start a sandbox. What can be told at once is told at once, by raising."""
        self._allowed(owner, spec, investigation)
        refuse_what_tells(spec)
        backend = await self._held.backend(spec.backend)
        source = self._existing(notebook, owner) if notebook else None
        stem = source.stem if source else investigation.name if investigation else "sandbox"
        name = self._free_name(owner, name, stem)
        handle = f"{name}-{''.join(secrets.choice(ALPHABET) for _ in range(6))}"
        folders = investigation.pack_folders if investigation else ()
        packs = self._held.packs.with_folders(folders).read().importable()
        order = Order(backend, spec, source, fork, packs, investigation)
        start = self._held.starting[handle] = Starting(handle, name, owner, spec.backend)

        def started(task: asyncio.Task[Session]) -> None:
            if task.cancelled() or task.exception() is None or not start.detached:
                del self._held.starting[handle]

        # A call that is cancelled is cancelled at every await: it could not clean up after itself.
        task = self._held.own(self._start(start, order))
        start.follow(task)
        task.add_done_callback(started)
        return start

    def _allowed(
        self, owner: str, spec: SandboxSpec, investigation: Investigation | None = None
    ) -> None:
        """Raises Conflict at a limit, BadInput or NotFound for what the operator has not given to all."""
        config = self._held.config
        starting = self.under_way()
        if len(self._held.live) + len(starting) >= config.max_sandboxes:
            raise Conflict(
                f"{config.max_sandboxes} sandboxes are running, which is this server's limit. Stop one with "
                "stop_sandbox first, or wait until others end."
            )
        if not config.team:
            return
        own = sum(s.owner == owner for s in [*self._held.live, *starting])
        if own >= config.owner_sandboxes:
            raise Conflict(
                f"You have {own} sandboxes, which is this server's limit for one person. Stop one with stop_sandbox "
                "first."
            )
        if spec.backend not in config.team_backends:
            why = {
                "local": "the kernels of all would run as one user of the server's machine (--owner-uids gives each "
                "owner their own)",
                "ssh": "it would use the operator's keys",
            }.get(spec.backend, "the operator has not allowed it")
            raise BadInput(
                "backend",
                spec.backend,
                f"this server is a team's: {why}. It offers {', '.join(config.team_backends) or 'none'}; the operator "
                f"allows more with --team-backend {spec.backend}",
            )
        if spec.python and spec.backend == "local":
            raise BadInput(
                "python", spec.python, "the interpreter of a team's server is the operator's choice"
            )
        if kept := [name for name in spec.secrets if name not in config.team_secrets]:
            raise BadInput(
                "secrets",
                kept[0],
                "it is the operator's; this server gives "
                f"{', '.join(config.team_secrets) or 'none'} to all (--team-secret NAME)",
            )
        if spec.snapshot and not self._operators(spec.snapshot, investigation):
            own = self._held.snapshots.of(owner)
            if spec.snapshot not in own:  # it may be another's: the cloud's account is the same
                then = "snapshot_sandbox makes one of a sandbox of yours."
                raise NotFound("snapshot", spec.snapshot, own, then)

    def _operators(self, snapshot: str, investigation: Investigation | None) -> bool:
        """Whether an investigation of the operator's names it."""
        if investigation is None or investigation.sandbox.snapshot != snapshot:
            return False
        file, folders = investigation.file.resolve(), self._held.config.investigations
        return any(file.is_relative_to(folder.resolve()) for folder in folders)

    def under_way(self) -> list[Starting]:
        return [start for start in self._held.starting.values() if not start.over.is_set()]

    async def price(
        self, spec: SandboxSpec, owner: str
    ) -> tuple[SandboxSpec, Price | None, float | None, str]:
        """The spec with its limits, what it costs, the seconds that it can last, and that in a sentence.

        Raises BudgetSpent.
        """
        price = await (await self._held.backend(spec.backend)).price(spec)
        if price is None:
            return spec, None, spec.lifetime, terms(None, None)
        config, book, now = self._held.config, self._held.book, time.time()
        both = [
            book.admit(config.allowances, price, now),
            book.admit(config.owner_allowances, price, now, owner),
        ]
        allowed = min((seconds for seconds in both if seconds is not None), default=None)
        lifetime = min(x for x in (spec.lifetime or LIFETIME, allowed, LONGEST) if x is not None)
        limits = {"lifetime": lifetime, "idle_limit": spec.idle_limit or IDLE_LIMIT}
        spec = spec.model_copy(update=limits)
        lasts = hard_stop(price, lifetime, spec.limit(), LONGEST)
        return spec, price, lasts, terms(price, lasts, spec.limit())

    def _existing(self, notebook: str, owner: str) -> Path:
        home = self._held.config.home(owner)
        path = resolve_inside("notebook", notebook, home.base, list(home.roots))
        if not path.is_file():
            known = [
                str(p.relative_to(home.outputs.parent)) for p in home.outputs.glob("*/*.ipynb")
            ]
            raise NotFound("notebook", notebook, known)
        if self._held.config.owner_uids and not only_ours(path, home.base):
            why = "a kernel can write there; notebooks are opened where only this server writes"
            raise PathRefused("notebook", notebook, why)
        return path

    def _free_name(self, owner: str, name: str, stem: str) -> str:
        taken = {s.name: s for s in self._held.live if s.owner == owner}
        starting = {s.name for s in self.under_way() if s.owner == owner}
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
        kept = "".join(c if c.isascii() and c.isalnum() else "-" for c in stem.lower())
        stem = kept.strip("-")[:32] or "sandbox"
        number = 1
        while (found := stem if number == 1 else f"{stem}-{number}") in taken or found in starting:
            number += 1
        return found

    async def _start(self, start: Starting, order: Order) -> Session:
        def in_line(place: int, length: int) -> None:
            start.say(f"waiting for its turn: place {place} of {length}")

        try:
            async with self._turns.take(in_line):
                return await self._make(start, order)
        except OSError as error:
            where = f" ({error.filename})" if error.filename else ""
            raise SandboxStartFailed(f"{why_not(error)}{where}") from error

    async def _make(self, start: Starting, order: Order) -> Session:
        backend, spec, source, fork = order.backend, order.spec, order.source, order.fork
        handle, name, owner = start.handle, start.name, start.owner
        config = self._held.config
        found = config.secrets.find(spec.secrets)
        config.redactor.know(found.values)
        if found.missing and not backend.has_secrets:
            raise BadInput("secrets", list(found.missing), config.secrets.missing(found.missing))

        shown = config.redactor

        def report(text: str) -> None:
            text = shown.text(text)
            start.say(text)
            if blinding is not None:
                blinding.said.append(text)

        blinding: Blinding | None = None
        spec, price, lasts, start.terms = await self.price(spec, owner)
        report(start.terms)
        seen = stamp(source) if source and not fork else None
        cells, metadata = read_notebook(source, as_copy=fork) if source else ([], None)
        path = source if source and not fork else self._new_folder(name, owner)
        state_dir = self._held.sandbox_dir(handle)
        lock, notebook_lock = self._locked(state_dir, path, source)
        fault_point("start.locked")
        document = Notebook(path, cells, metadata, seen)
        document.hold()  # a sandbox that does not start leaves the file as it was
        document.forget_runs()
        session = self._held.session(
            handle, name, owner, spec.backend, document, state_dir, lock, start.began
        )
        session.notebook_lock = notebook_lock
        session.secrets = spec.secrets
        shown = session.redactor
        if hidden(spec.models):
            blinding = Blinding(session, config.log_redactor, spec)
        if order.investigation is not None:
            session.investigation = order.investigation.file
        if price is not None:
            now = time.time()
            ends_by = None if lasts is None else now + lasts
            session.meter = Meter(
                self._held.book,
                self._held.config.allowances,
                handle,
                owner,
                price,
                now,
                ends_by,
                spec.limit(),
                self._held.config.owner_allowances,
            )
        place = Place(
            handle,
            state_dir,
            self._held.runtime_dir(handle),
            path.parent,
            (path, record_path(path)),
            order.packs,
            owner,
            found.values,
            blinding.prepared if blinding is not None else lambda made: None,
        )
        attached = False
        try:
            write_json(state_dir / "record.json", session.record())
            if source and fork:
                await asyncio.to_thread(document.copy_long_outputs, source)
            spec = await self._with_models(spec, found.values, report, blinding)
            if session.meter is not None:
                session.meter.note()  # before the machine is asked for
            sandbox = await backend.start(spec, place, report)
            session.attach(backend, sandbox, 1)
            attached = True
            if session.meter is not None:  # a queue costs nothing
                session.meter.began = float(sandbox.record().get("since", session.meter.began))
            fault_point("start.attached")
            write_json(state_dir / "record.json", session.record())
            report("starting the kernel")
            await session.kernel_ready(READY_SECONDS)
            await session.status()
            fault_point("start.ready")
            document.metadata["seer"] = {
                "sandbox": handle,
                "backend": spec.backend,
                "environment": await self._environment(session, spec),
            }
            if order.investigation is not None:
                document.metadata["seer"]["investigation"] = order.investigation.asked
            session.note_cost()
            document.unhold()
            if order.investigation is not None:
                await self._open_with(
                    session, order.investigation, source is None, report, blinding
                )
            await session.save()
        except BaseException as failure:
            if blinding is not None:
                blinding.without_names(failure)
            try:
                if isinstance(failure, EndUnconfirmed):
                    raise
                if attached:
                    await session.terminate("it did not start")
            except EndUnconfirmed as unsure:
                why = unsure.__cause__ if failure is unsure else failure
                left = self._give_up(session, backend, unsure, start_failed(why), path, source)
                raise left.error() from unsure
            self._cleared(session, path, source)
            raise
        self._held.sessions[handle] = session
        self._held.note("started", session)
        return session

    async def _environment(self, session: Session, spec: SandboxSpec) -> dict[str, object]:
        """What the notebook says that it was made with."""
        gpu = {"gpu": f"{spec.gpu_count} x {spec.gpu}"} if spec.gpu else {}
        return {"seer-mcp": __version__, **gpu, **await session.installed()}

    async def _open_with(
        self,
        session: Session,
        found: Investigation,
        empty: bool,
        report: Progress,
        blinding: Blinding | None,
    ) -> None:
        """What its notebook imports; an empty one begins with the task and the cells that load models and set up."""
        for name, scope in found.scoped.items():
            assert scope.interface is not None
            text = module_source(name, scope.interface)
            await session.write_file(f"{name}.py", text.encode())
        if not empty:
            return
        if blinding is not None:
            await blinding.open_with(opening_cells(found), found, report)
            return
        cells = [session.notebook.insert(kind, source) for kind, source in opening_cells(found)]
        if code := [cell for cell in cells if cell.kind == "code"]:
            session.opening = await session.run_cells(code)

    def _locked(self, state_dir: Path, path: Path, source: Path | None) -> tuple[Lock, Lock]:
        """The locks of the sandbox and of its notebook. Raises Conflict if the notebook is taken."""
        lock, notebook_lock = Lock(state_dir / "lock"), None
        try:
            notebook_lock = self._held.lock_notebook(path)
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
            remove_if_empty(path, source)
            raise
        return lock, notebook_lock

    async def _with_models(
        self,
        spec: SandboxSpec,
        secrets: Mapping[str, str],
        report: Progress,
        blinding: Blinding | None,
    ) -> SandboxSpec:
        """Local sandboxes find their models on this disk: they are fetched now, and named in the environment."""
        if spec.backend != "local" or not spec.models:
            return spec
        config = self._held.config
        store = ModelStore(config.models_dir, spec.python or config.python, config.fetch_env)
        made = await store.fetch_all(
            spec.models,
            report,
            here=config.project_dir,
            token=secrets.get("HF_TOKEN", ""),
            copies=blinding.place / "models" if blinding is not None else None,
        )
        changes: dict[str, object] = {}
        env = {**spec.env, **store.environment(made.told)}
        if blinding is not None:
            blinding.prepared(made)
            env |= blinding.environment()
            if spec.blocked and not await asyncio.to_thread(without_network):
                blinding.netless, changes["network"] = False, True  # the receipt says it
        return spec.model_copy(update={**changes, "env": env})

    def _cleared(self, session: Session, path: Path, source: Path | None) -> None:
        """Nothing of a start that failed is left."""
        if session.meter is not None:
            session.meter.note(closed=True)
        session.release()
        shutil.rmtree(session.state_dir, ignore_errors=True)
        shutil.rmtree(self._held.runtime_dir(session.handle), ignore_errors=True)
        remove_if_empty(path, source)

    def _give_up(
        self,
        session: Session,
        backend: Backend,
        unsure: EndUnconfirmed,
        reason: str,
        path: Path,
        source: Path | None,
    ) -> Leftover:
        """A failed start left what may run: its end is asked for until it is confirmed."""
        left = Leftover(session.owner, reason, unsure, session.meter)
        self._held.ending[session.handle] = left

        async def insist() -> None:
            pause = 1.0
            while session.handle in self._held.ending:
                await asyncio.sleep(pause)
                pause = min(pause * 2, INSIST_SECONDS)
                try:
                    await backend.clear(session.handle)
                except EndUnconfirmed as error:
                    left.unsure = error
                    if left.meter is not None:
                        left.meter.note()
                else:
                    del self._held.ending[session.handle]
                    if session.meter is not None:
                        session.meter.note(closed=True)
                    start = self._held.starting.get(session.handle)
                    if start is not None:
                        start.failed = left.over()
            self._cleared(session, path, source)

        self._held.own(insist())
        return left

    def _new_folder(self, name: str, owner: str) -> Path:
        """The path of a new notebook in a folder of its own; an older one is never touched."""
        number = 1
        while True:
            stem = name if number == 1 else f"{name}-{number}"
            folder = self._held.config.home(owner).outputs / stem
            folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
                continue
            return folder / f"{stem}.ipynb"

    def raise_if_not_there(self, handle: str, owner: str) -> None:
        """Say of a sandbox of the caller's why it cannot be used, if it did not start (yet)."""
        ending = self._held.ending.get(handle)
        if ending is not None and ending.owner == owner:
            raise ending.error()
        start = self._held.starting.get(handle)
        if start is not None and start.owner == owner:
            if start.failed is not None:
                raise SeerError(f"{start.failed}")
            raise start.still()

    def starts(self, owner: str) -> list[Starting]:
        """The caller's that are being started, and those that failed to lately."""
        late = time.time() - FAILURES_KEPT
        for handle in [h for h, s in self._held.starting.items() if s.failed and s.began < late]:
            del self._held.starting[handle]
        return [s for s in self._held.starting.values() if s.owner == owner]

    async def give_up(self, handle: str, owner: str) -> bool:
        """End a start of the caller's that is under way; whether there was one."""
        start = self._held.starting.get(handle)
        if start is None or start.owner != owner or start.task is None or start.over.is_set():
            return False
        start.task.cancel()
        await asyncio.wait([start.task], timeout=STOP_SECONDS)
        if not start.task.done():
            why = f"its start is given up, and no word that nothing runs came in {STOP_SECONDS:g} s"
            raise EndUnconfirmed(handle, "not started yet", why, billed=bool(start.terms))
        if start.task.cancelled():
            return True
        if (failure := start.task.exception()) is not None:
            raise failure
        return False  # it was ready that very moment


def start_failed(why: BaseException | None) -> str:
    """Why a start failed, in one sentence that says nothing of what is left."""
    if isinstance(why, SeerError):
        reason = str(why).partition(NOTHING_LEFT)[0].strip()
        return reason if reason.endswith(".") else f"{reason}."
    if isinstance(why, asyncio.CancelledError):
        return "The sandbox did not start: it was given up."
    return "The sandbox did not start."


def remove_if_empty(path: Path, source: Path | None) -> None:
    """Take the folder back that was made for a new notebook."""
    if path == source:
        return
    path.unlink(missing_ok=True)
    try:
        path.parent.rmdir()
    except OSError:
        return  # the kernel left files there: they stay
