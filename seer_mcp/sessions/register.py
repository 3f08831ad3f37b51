"""All sandboxes of this server: start, find again, list, end.

One folder per sandbox under the state folder holds its record (0600, atomic) and a lock. The lock,
not the state folder, is what belongs to one server: several servers (a desktop client's and an
editor's, say) share a state folder, each follows the sandboxes that it holds, and takes over those
whose server is gone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..backends import Progress
from ..config import Config
from ..environment import (
    Investigation,
    Investigations,
    SandboxSpec,
    Skill,
    read_investigation,
)
from ..errors import BadInput, Conflict, NotFound, SandboxUnreachable, SeerError, show
from ..files import private_dir, resolve_inside, write_json
from ..money import Price
from ..observe import Observer
from ..packs import Listing, Packs
from ..redact import Redactor
from ..spend import SpendBook
from .finds import Finds
from .holdings import Holdings
from .session import Session
from .starting import Starting
from .starts import STOP_SECONDS, Starts
from .sweep import sweep

UNWANTED_SECONDS = 60.0  # after which a notebook of an ended sandbox is not held any more
METER_SECONDS = 15.0  # between two looks at what was spent
SWEEP_SECONDS = 60.0  # between two tries to ask what runs
SCOPED = "scope:"  # how owners of scoped sandboxes begin; no user is called so
BILLED = "modal"  # the backend that costs money, and its folder under the state folder
NOTED_SECONDS = 300.0  # and two notes of it


def behind(session: Session) -> str:
    """A scoped sandbox in a line: what it is for, and what it costs."""
    cost = f"; {session.meter.so_far()}" if session.meter is not None else ""
    whose = session.owner.removeprefix(SCOPED)
    return f"{session.handle}: {session.backend_name}, scoped, for {whose}; it ends with that{cost}"


def make_folders(config: Config) -> None:
    """The private folders of a server. Raises BadInput for one that cannot be used."""
    for folder in (config.state_dir, config.state_dir / "sandboxes", config.runtime_dir):
        try:
            private_dir(folder)
        except OSError as error:
            why = f"it cannot be made or used ({error.strerror}); name another"
            raise BadInput("folder", str(folder), why) from error


class Register:
    def __init__(self, config: Config, packs: Packs, only: str | None = None) -> None:
        """`only`: the owner whose sandboxes of earlier servers it takes over; None: everybody's."""
        self.config = config
        self.packs = packs
        self.shelf = Investigations(config.investigations)
        self.closed = asyncio.Event()
        self._held = Holdings(config, packs, only)
        self._starts = Starts(self._held)
        self._finds = Finds(self._held)
        self._first_scan: asyncio.Task[list[str]] | None = None
        self._metering: asyncio.Task[None] | None = None
        self._sweeping: asyncio.Task[None] | None = None
        self._putting_away: asyncio.Task[None] | None = None
        self._swept: list[str] = []

    @property
    def observer(self) -> Observer:
        return self._held.observer

    @property
    def book(self) -> SpendBook:
        return self._held.book

    @property
    def sessions(self) -> list[Session]:
        """Everybody's: for figures, never for a caller."""
        return list(self._held.sessions.values())

    @property
    def starting(self) -> int:
        """How many sandboxes are being started, for everybody."""
        return len(self._starts.under_way())

    @property
    def ready(self) -> bool:
        """Whether the sandboxes of earlier servers were looked for, and the server has not begun to end."""
        return self._first_scan is not None and self._first_scan.done() and not self.closed.is_set()

    def heard(self, on_change: Callable[[Session, str], None]) -> None:
        """Call `on_change` for each change of a notebook, with the id of the cell."""
        self._held.on_change = on_change

    def asked(
        self, on_asked: Callable[[Session, Any], None], on_ended: Callable[[Session], None]
    ) -> None:
        """Call `on_asked` for what a notebook asks of its scoped sandboxes, `on_ended` when it has ended."""
        self._held.on_asked, self._held.on_ended = on_asked, on_ended

    # -- life ---------------------------------------------------------------------------------

    async def open(self) -> None:
        """Make the folders, and begin to look for sandboxes of earlier servers."""
        make_folders(self.config)
        self.observer.open(on_exit=self.config.on_exit)
        try:
            self.config.outputs_dir.mkdir(parents=True, exist_ok=True)
        except OSError as error:  # a start says it to the client
            self.observer.not_made(self.config.outputs_dir, error)
        self._first_scan = asyncio.create_task(self._finds.scan(), name="find sandboxes again")
        self._metering = asyncio.create_task(self._meter(), name="what sandboxes cost")
        self._putting_away = asyncio.create_task(self._put_away(), name="put notebooks away")
        self._sweeping = asyncio.create_task(self._sweep(), name="sweep what is billed")

    async def close(self) -> None:
        """Let go of every sandbox, or end them, as configured."""
        for task in (self._metering, self._sweeping, self._putting_away):
            if task is not None:
                task.cancel()
        for start in self._starts.under_way():
            start.give_up()
        busy = {*self._held.work, *([self._first_scan] if self._first_scan else [])}
        if busy:
            await asyncio.wait(busy, timeout=2.0)
        live = self._held.live
        if self.config.on_exit == "stop":
            await asyncio.gather(
                *(self._held.stop_quietly(session, "the server ended") for session in live)
            )
        else:
            await asyncio.gather(*(session.let_go() for session in live))
        await self.observer.close()
        self.closed.set()

    # -- start --------------------------------------------------------------------------------

    def investigation(self, asked: str, owner: str) -> Investigation:
        """The investigation of a name, or of a folder that may be read.

        Raises NotFound (with those that there are), PathRefused or InvestigationRefused.
        """
        if file := self.shelf.file(asked):
            return self._to_start(read_investigation(file), asked, owner)
        home = self.config.home(owner)
        roots = [*home.roots, *self.config.investigations]
        path = resolve_inside("investigation", asked, home.base, roots)
        if not path.exists():
            raise self.shelf.unknown(asked)
        return self._to_start(read_investigation(path), asked, owner)

    def _to_start(self, found: Investigation, asked: str, owner: str) -> Investigation:
        if found.interface is not None:
            raise BadInput(
                "investigation",
                asked,
                "it is the inside of a scoped sandbox: serve it with `seer-mcp --scope`, or name it under [scoped] of "
                "an investigation",
            )
        if found.scoped and self.config.team:
            raise BadInput(
                "investigation",
                asked,
                "a team's server starts no scoped sandboxes for investigations",
            )
        return found

    def workspace(self, owner: str) -> tuple[Listing, tuple[Skill, ...]]:
        """All packs, and the skills, that the caller's running sandboxes have."""
        folders: list[Path] = []
        skills: dict[str, Skill] = {}
        problems: list[str] = []
        for file in {
            s.investigation for s in self._held.live if s.owner == owner and s.investigation
        }:
            try:
                found = read_investigation(file)
            except SeerError as error:  # it was changed since it was started
                problems.append(" ".join(str(error).split()))
                continue
            folders += found.pack_folders
            skills |= {skill.name: skill for skill in found.skills}
        if not folders and not problems:
            return self.packs.read(), tuple(skills.values())
        listing = self.packs.with_folders(sorted(folders)).read()
        listing = replace(listing, problems=(*listing.problems, *problems))
        return listing, tuple(skills.values())

    async def price(self, spec: SandboxSpec, owner: str) -> tuple[Price | None, str]:
        """What such a sandbox costs, and that in a sentence. Raises BadInput or BudgetSpent."""
        _, price, _, terms = await self._starts.price(spec, owner)
        return price, terms

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
        await self.all_found()
        return await self._starts.begin(owner, name, spec, notebook, fork, investigation)

    async def start(
        self, owner: str, name: str, spec: SandboxSpec, notebook: str, fork: bool, report: Progress
    ) -> Session:
        """A sandbox with a kernel that is ready. Whatever fails, or if the caller goes, nothing is left."""
        return await (await self.begin(owner, name, spec, notebook, fork)).wait(None, report)

    def starts(self, owner: str) -> list[Starting]:
        """The caller's that are being started, and those that failed to lately."""
        return self._starts.starts(owner)

    async def give_up(self, handle: str, owner: str) -> bool:
        """End a start of the caller's that is under way; whether there was one."""
        return await self._starts.give_up(handle, owner)

    # -- find ---------------------------------------------------------------------------------

    async def readable(self, handle: str, owner: str) -> Session:
        """The session of a handle whose notebook the caller may read: an own one, or one that is shared."""
        session = self._held.sessions.get(handle)
        shared = self.config.team and session is not None and session.shared
        return await self.get(handle, session.owner if session and shared else owner)

    def redactor_of(self, owner: str, *told: Mapping[str, Any] | None) -> Redactor:
        """What must not be shown in the answer to a call: of the sandbox that arguments or answer name.

        Nothing of a sandbox that the caller may not read: an answer in which something of it is hidden would
        say that it is there.
        """
        for each in told:
            named = (each or {}).get("sandbox") or (each or {}).get("seer/sandbox")
            handle = named.get("handle") if isinstance(named, dict) else named
            if isinstance(handle, str) and (session := self._held.sessions.get(handle)):
                return session.redactor if self._reads(session, owner) else self.config.redactor
        return self.config.redactor

    def may_read(self, uri: str, owner: str) -> bool:
        """Whether the resource of a sandbox is the caller's, or shared with the team."""
        session = self._held.sessions.get(uri.removeprefix("seer://sandboxes/").partition("/")[0])
        return session is not None and self._reads(session, owner)

    def _reads(self, session: Session, owner: str) -> bool:
        return session.owner == owner or (self.config.team and session.shared)

    def shared(self, owner: str) -> list[Session]:
        """Sandboxes of others whose notebooks the caller may read."""
        if not self.config.team:
            return []
        return [s for s in self._held.sessions.values() if s.shared and s.owner != owner]

    def share(self, session: Session, shared: bool) -> None:
        """Let the team read its notebook, or no longer. Raises OSError."""
        before, session.shared = session.shared, shared
        try:
            write_json(session.state_dir / "record.json", session.record())
        except OSError:
            session.shared = before
            raise
        self._held.note("shared" if shared else "unshared", session)

    async def get(self, handle: str, owner: str) -> Session:
        """The session of a handle, if it is the caller's. Foreign handles answer like unknown ones."""
        session = self._held.sessions.get(handle)
        if session is None:
            self._starts.raise_if_not_there(handle, owner)
        if session is None or session.owner != owner:
            await self.all_found()
            session = self._held.sessions.get(handle)
        if session is None and self._finds.elsewhere.get(handle) == owner:
            raise Conflict(
                f"Sandbox {show(handle)} is used by another seer-mcp server that runs now. Work with it there, or "
                "end that server: then it is found again here."
            )
        if session is None or session.owner != owner:
            mine = [s.handle for s in self._held.live if s.owner == owner]
            raise NotFound(
                "sandbox", handle, mine, "list_sandboxes shows what runs; start_sandbox starts one."
            )
        session.want_notebook()
        await session.notebook.refresh()
        return session

    async def list(self, owner: str) -> tuple[list[Session], list[str]]:
        """The caller's sandboxes, the newest last; and notes on those that cannot be used."""
        notes = await self.all_found()
        if (
            self.config.team
        ):  # what is wrong with others' is for the operator: `seer-mcp doctor` says it
            notes = [
                n for h, n in self._finds.elsewhere_notes() if self._finds.elsewhere[h] == owner
            ]
        else:
            notes += self._swept
        notes += [str(left.error()) for left in self._held.ending.values() if left.owner == owner]
        notes += self._spending(owner)
        mine = [s for s in self._held.sessions.values() if s.owner == owner]
        notes += [
            behind(s)
            for s in self._held.live
            if s.owner.startswith(SCOPED) and not self.config.team
        ]
        return sorted(mine, key=lambda s: s.created), notes

    async def all_found(self) -> list[str]:
        """Look for sandboxes of servers that are gone; what is wrong with those that cannot be used."""
        if self._first_scan is not None:
            await asyncio.wait([self._first_scan])
        return await asyncio.shield(self._held.own(self._finds.scan()))

    async def _sweep(self) -> None:
        """End what is billed and in no record, once; a cloud that cannot be asked is asked again."""
        await self.all_found()
        while (self.config.state_dir / BILLED).is_dir():
            try:
                backend = await self._held.backend(BILLED)
                self._swept = await sweep(backend, self.config.state_dir, self._held.knows)
                return
            except SandboxUnreachable as error:
                self._swept = [str(error)]
            await asyncio.sleep(SWEEP_SECONDS)

    async def _put_away(self) -> None:
        """Hold no notebooks of sandboxes that have ended; no call that asked for one still uses it."""
        while True:
            await asyncio.sleep(METER_SECONDS)
            for session in self._held.sessions.values():
                session.put_away(self.config.max_wait + UNWANTED_SECONDS)

    async def settle(self, folder: Path) -> str | None:
        """Take over the one sandbox of `folder`, as a server would at its start; what hinders, or None."""
        return await self._finds.adopt(folder)

    async def snapshot(self, session: Session) -> str:
        """Keep a sandbox's files; the id that its owner can start another from. Raises BadInput or OSError."""
        id = await session.snapshot()
        self._held.snapshots.note(id, session.owner, session.handle)
        return id

    # -- money --------------------------------------------------------------------------------

    def _spending(self, owner: str) -> list[str]:
        """What is to be said of what sandboxes may cost, if anything is billed."""
        book, now, config = self._held.book, time.time(), self.config
        own = book.verdicts(config.owner_allowances, now, owner)
        if config.team:
            return [f"BUDGET: {v.says}" for v in own if v.says]
        said = [f"BUDGET: {v.says}" for v in book.verdicts(config.allowances, now) if v.says]
        return [*said, *filter(None, [book.damage()])]

    async def _meter(self) -> None:
        """Note what runs costs, and end what has no budget left."""
        noted = time.monotonic()
        while True:
            await asyncio.sleep(METER_SECONDS)
            due = time.monotonic() - noted > NOTED_SECONDS
            if due:
                noted = time.monotonic()
            for session in self._held.live:
                if session.meter is None:
                    continue
                if due:
                    session.note_cost()
                spent = [v for v in session.meter.verdicts() if v.level == "spent"]
                if spent and session.stopping is None:
                    self._held.own(self._held.stop_quietly(session, spent[0].says))

    # -- end ----------------------------------------------------------------------------------

    async def end(self, folder: Path) -> tuple[int, str]:
        """Take over the one sandbox of `folder` and end it: 0 if it has ended, and a sentence.

        Raises EndUnconfirmed.
        """
        note = await self._finds.adopt(folder)
        session = self._held.sessions.get(folder.name)
        if session is None:
            return 1, note or f"{folder.name}: there is no such sandbox"
        if session.ended is not None:
            return 0, f"{folder.name}: it had ended already ({session.ended})"
        await session.terminate("stopped by `seer-mcp sandboxes stop`")
        return 0, f"{folder.name}: ended; its notebook stays: {session.notebook.path}"

    async def stop(self, session: Session) -> None:
        """Raises EndUnconfirmed, also where the end takes longer than a call may: it goes on then."""
        if session.unconfirmed is not None:
            raise session.unconfirmed
        if session.ended is None:
            try:
                async with asyncio.timeout(STOP_SECONDS):
                    await session.terminate("stopped by stop_sandbox")
            except TimeoutError as error:
                raise session.still_ending(STOP_SECONDS) from error
        else:
            raise BadInput("sandbox", session.handle, f"it has ended already ({session.ended})")
