"""One sandbox and its notebook: run, wait, interrupt, restart, end."""

from __future__ import annotations

import asyncio
import base64
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..backends import Backend, Record, Sandbox
from ..errors import (
    BadInput,
    EndUnconfirmed,
    KernelDead,
    KernelStartFailed,
    NotebookNotSaved,
    NotFound,
    SandboxLost,
    SandboxUnreachable,
    SeerError,
    Unanswered,
)
from ..files import Lock
from ..ipynb import read_notebook
from ..kernel import NUMBER, Event, Events, Link
from ..kernel_host.fault import fault_point
from ..notebook import UNFINISHED, Cell, Notebook
from ..observe import Call, RunFacts, current_call
from ..outputs import Outputs
from ..redact import EventRedactor, Redactor
from ..sharedfile import stamp
from .lease import Lease
from .meter import Meter
from .recall import recall
from .record import sealed

Heartbeat = Callable[[str], Awaitable[None]]
KNOWN_RUNS = 64  # of cells, that are over: the last run of a cell is in the notebook as well
KNOWN_COMMANDS = 64  # that are over: of others the sandbox's journal tells, as long as it lives
SANDBOX_GONE = f" Of commands in a sandbox that has ended the last {KNOWN_COMMANDS} can be read."
HEARTBEAT_SECONDS = 5.0
INTERRUPT_SECONDS = 5.0
TAKEN_SECONDS = 10.0  # that a call waits for the sandbox to take a run
ASK_SECONDS = 3600.0  # after which a run that is not answered is sent again
FRESH_SECONDS = 0.05  # that a look waits for what was put out before it
SAVE_AGAIN_SECONDS = 2.0
INSIST_SECONDS = 60.0  # between two tries to end a machine
FILE_PIECE = 2_000_000
ASKED = "application/vnd.seer.asked+json"  # of tool_packs/scoped_client.py
OBSERVED = "application/vnd.seer.observed+json"  # of tool_packs/blind.py
SLICE = 0.02  # seconds of folding after which other tasks get a turn


@dataclass(slots=True)
class RunInfo:
    """One run as this server knows it."""

    id: str
    kind: str
    """"cell" or "command"."""
    subject: str
    """The cell's id, or the command."""
    state: str = "queued"
    started: float | None = None
    seconds: float | None = None
    why: str = ""
    code: int | None = None
    """A command's exit code."""
    output_bytes: int = 0
    dropped_bytes: int = 0
    outputs: Outputs | None = None
    """A command's outputs (a cell's are in the notebook)."""
    call: Call | None = None
    """The tool call that began it, if that was one of this server."""
    whole: bool = True
    """Whether its first event came to this server."""
    unanswered: bool = False
    """It was sent, and the sandbox has not said yet that it took it: it is sent until it does."""
    recalled: int = 0
    """Up to which event it was read from the journal (see recall.py)."""
    over: asyncio.Event = field(default_factory=asyncio.Event)


async def nothing() -> None:
    """What was left behind by a sandbox that never was."""


class Session:
    def __init__(
        self,
        handle: str,
        name: str,
        owner: str,
        backend_name: str,
        notebook: Notebook,
        state_dir: Path,
        lock: Lock,
        created: float,
        redactor: Redactor | None = None,
    ) -> None:
        self.handle = handle
        self.name = name
        self.owner = owner
        self.backend_name = backend_name
        self.notebook = notebook
        self.state_dir = state_dir
        self.lock = lock
        self.notebook_lock: Lock | None = None
        self.created = created
        self.runs: dict[str, RunInfo] = {}
        self._past: dict[str, deque[str]] = {"cell": deque(), "command": deque()}
        """Runs that are over, by their kind, the latest last."""
        self.kernel_state = "starting"
        self.kernel_how = ""
        self.generation = 0
        self.ended: str | None = None
        """Why the sandbox is gone, or None while it lives."""
        self.stopping: str | None = None
        """Why its end was asked for: whoever finds it later ends it."""
        self.unconfirmed: EndUnconfirmed | None = None
        """Its machine may still run, and cost money, although its end was asked for."""
        self.meter: Meter | None = None
        """What it costs; None where nothing is billed."""
        self.lease = Lease()
        self.shared = False
        """Whether others of the team may read its notebook."""
        self.secrets: tuple[str, ...] = ()
        """Names of the secrets that were given to it."""
        self.investigation: Path | None = None
        """The investigation.toml that it was started with."""
        self.opening: list[RunInfo] = []
        """Runs of the cells that its notebook began with."""
        self.unread = False
        """It ended: its notebook is read when somebody asks for it."""
        self.wanted = time.monotonic()
        """When somebody asked for its notebook last."""
        self.lost_bytes = 0
        """Bytes of output that the host could not keep because its disk was full."""
        self.damaged_lines = 0
        """Lines of the host's that could not be read, and …"""
        self.damaged_bytes = 0
        """… their size, as far as they were there at all."""
        self.on_change: Callable[[Session, str], None] = lambda session, cell: None
        self.on_end: Callable[[Session], None] = lambda session: None
        self.on_stopping: Callable[[Session], None] = lambda session: None
        self.on_run_begun: Callable[[Session, RunInfo, str], None] = lambda session, run, code: None
        self.on_run_over: Callable[[Session, RunInfo], None] = lambda session, run: None
        self.on_asked: Callable[[Session, Any], None] = lambda session, asked: None
        """Hears what the notebook asks of its scoped sandboxes, perhaps again after a restart."""
        self.redactor = redactor or Redactor()
        """What must not be shown of it: secrets, and the names of its hidden models."""
        self.observed: dict[str, Any] | None = None
        """What the probes of hidden models found, as they said it: for the server alone, and …"""
        self.observing = False
        """… only while it asks for that."""
        self._events = EventRedactor(self.redactor, self._fold)
        self._sandbox: Sandbox | None = None
        self._left_behind: Callable[[], Awaitable[Path | None]] = nothing
        self._link: Link | None = None
        self._saver: asyncio.Task[None] | None = None
        self._closing_why = ""
        self._ending: asyncio.Task[None] | None = None
        self._asking: asyncio.Task[None] | None = None
        self._kernel_changed = asyncio.Event()
        self._work: set[asyncio.Task[Any]] = set()
        self._touching: set[asyncio.Task[None]] = set()
        self._sending: set[asyncio.Task[None]] = set()

    # -- life ---------------------------------------------------------------------------------

    def attach(self, backend: Backend, sandbox: Sandbox, start: int) -> None:
        """Begin to follow a sandbox from event `start` on."""
        self._sandbox = sandbox
        record = sandbox.record()
        self._find_left_behind(backend, record)

        async def is_gone() -> str | None:
            found = await backend.find(record)
            if found is not None:
                return None
            return self._closing_why or await sandbox.why_gone()

        self._link = Link(sandbox.dial, start, self._take, self._damaged, is_gone, self._lost)
        self._link.open()
        self._saver = asyncio.create_task(
            self.notebook.keep_saved(), name=f"saver of {self.handle}"
        )

    async def follow_again(self, patience: float) -> None:
        """After a restart of the server: the true state of every run that was not over.

        Waits for it at most `patience` seconds; a sandbox that does not answer is asked further.
        """
        self._asking = asyncio.create_task(self._ask_again())
        await asyncio.wait([self._asking], timeout=patience)

    async def _ask_again(self) -> None:
        while self.ended is None:
            try:
                await self._ask_how_it_is()
                return
            except SandboxUnreachable:  # it hangs, is stopped, or makes no sense
                await asyncio.sleep(1.0)

    async def _ask_how_it_is(self) -> None:
        assert self._link is not None
        await self._link.caught_up()
        if self.ended is not None:
            return
        status = await self._link.request("status")  # its last change may have been folded before
        self.lease.heard(status)
        self.kernel_state, self.kernel_how = status["kernel"], status["how"]
        self.generation = status["generation"]
        open_runs = [cell.seer["run"] for cell in self.notebook.cells if cell.state in UNFINISHED]
        if not open_runs or self.ended is not None:
            return
        answer = await self._link.request("runs", runs=open_runs)
        known = {run.get("run") for run in answer["runs"] if isinstance(run, dict)}
        for run in open_runs:
            if run not in known:
                self._finish(run, "not_run", "the server ended before the kernel heard of it")

    async def declare_lost(self, why: str, backend: Backend, record: Record | None) -> None:
        """After a restart of the server: the machine is not there any more."""
        if record:
            self._find_left_behind(backend, record)
        journal = await self._left_behind()
        await self._end_lost(why, self.notebook.rewind() if journal else 0)

    async def _end_lost(self, why: str, start: int) -> None:
        if journal := await self._left_behind():
            await self._read_left_behind(journal, start)
        closed = self._closing_why
        said = "; ".join(part for part in (closed or why, self.damage) if part)
        await self._end(said, "expired" if closed else "sandbox_lost")

    def _find_left_behind(self, backend: Backend, record: Record) -> None:
        async def left_behind() -> Path | None:
            try:
                return await backend.left_behind(record, self.state_dir / "left-behind.jsonl")
            except SandboxUnreachable:
                return None  # what was fetched before is all that can be had

        self._left_behind = left_behind

    async def _read_left_behind(self, journal: Path, start: int, stopped: str = "") -> None:
        """From event `start` on, what the host wrote down and nobody fetched.

        `stopped`: why this server ended it, so that what was cut off then was interrupted by us.
        """
        began = time.monotonic()

        def fold(event: Event) -> None:
            if stopped and event["type"] == "end" and event["state"] == "expired":
                event.update(state="interrupted", why=stopped)
            if not stopped or event["type"] != "closing":
                self._take(event)

        events = Events(start, fold, self._damaged)
        try:
            with journal.open("rb") as file:
                for line in file:
                    if not line.endswith(b"\n"):
                        events.damaged(len(line))  # the host was killed while it wrote this line
                    elif not ((number := NUMBER.match(line)) and int(number[1]) < start):
                        events.take(line)
                    if time.monotonic() - began > SLICE:
                        await asyncio.sleep(0)
                        began = time.monotonic()
        except OSError:
            events.damaged(0)
        self._events.flush()

    @property
    def damage(self) -> str:
        """What of the sandbox's journal could not be read, as a clause; empty if all could."""
        if not self.damaged_lines:
            return ""
        lines = "1 line" if self.damaged_lines == 1 else f"{self.damaged_lines:,} lines"
        return (
            f"{lines} of the sandbox's journal ({self.damaged_bytes:,} bytes) could not be read, and what "
            "they said is missing here"
        )

    def _damaged(self, lines: int, size: int) -> None:
        """Something that the host wrote is lost: said of the sandbox, and of what runs."""
        self.damaged_lines += lines
        self.damaged_bytes += size
        for cell in self.notebook.cells:
            if cell.state == "running":
                cell.note(damaged=cell.seer.get("damaged", 0) + lines)

    async def kernel_ready(self, timeout: float) -> None:
        """Wait for the kernel's first start. Raises KernelStartFailed."""
        try:
            async with asyncio.timeout(timeout):
                while self.kernel_state == "starting" and self.ended is None:
                    self._kernel_changed.clear()
                    await self._kernel_changed.wait()
        except TimeoutError:
            raise KernelStartFailed(f"it was not ready after {timeout:.0f} s", "") from None
        if self.ended is not None:
            raise KernelStartFailed(self.ended, self._sandbox.log() if self._sandbox else "")
        if self.kernel_state == "failed":
            status = await self._linked().request("status")
            raise KernelStartFailed(self.kernel_how, status["stderr"])

    async def let_go(self) -> None:
        """This server stops following; the sandbox lives on."""
        await self._stop_following()
        self.release()

    async def terminate(self, why: str) -> None:
        """End the sandbox; the notebook stays. Once begun it is finished, even if the caller goes.

        Raises EndUnconfirmed if that could not be made sure; it is tried again until it can.
        """
        if self.ended is None and self._ending is None:
            self._ending = asyncio.create_task(self._terminate(why))
        if self._ending is not None:
            await asyncio.shield(self._ending)

    def still_ending(self, seconds: float) -> EndUnconfirmed:
        """What is said of an end that is asked for and has not come in this time."""
        sandbox = self._sandbox.record() if self._sandbox is not None else {}
        id = str(sandbox.get("id", self.backend_name))
        why = f"no word that it has ended came in {seconds:g} s"
        return EndUnconfirmed(self.handle, id, why, billed=self.meter is not None)

    async def _terminate(self, why: str) -> None:
        sandbox = self._sandbox
        assert sandbox is not None
        self._closing_why = self.stopping = why
        self.on_stopping(self)
        fault_point("stop.begun")
        await self._stop_following()
        try:
            await sandbox.terminate()
        except EndUnconfirmed as error:
            self.unconfirmed = error
            self._own(self._insist(sandbox, lambda: self._terminated(sandbox, why)))
            raise
        await self._terminated(sandbox, why)

    async def _insist(self, sandbox: Sandbox, then: Callable[[], Awaitable[None]]) -> None:
        """Ask for the end again until it is confirmed."""
        pause = 1.0
        while self.unconfirmed is not None:
            await asyncio.sleep(pause)
            pause = min(pause * 2, INSIST_SECONDS)
            try:
                await sandbox.terminate()
            except EndUnconfirmed as error:
                self.unconfirmed = error
            else:
                self.unconfirmed = None
        await then()

    async def _terminated(self, sandbox: Sandbox, why: str) -> None:
        fault_point("stop.gone")
        self._sandbox = sandbox
        if journal := await self._left_behind():  # what was said after we had stopped following
            await self._read_left_behind(journal, self.notebook.folded + 1, why)
        await self._end(why, "interrupted")

    async def _stop_following(self) -> None:
        if self._asking is not None:
            self._asking.cancel()
        for sending in self._sending:
            sending.cancel()
        if self._work:
            await asyncio.wait(self._work, timeout=2.0)
        if self._link is not None:
            await self._link.close()
        self._events.flush()
        if self._saver is not None:
            self._saver.cancel()
            await asyncio.wait([self._saver])
        await self._save_quietly(last=True)

    def release(self) -> None:
        self.lock.release()
        if self.notebook_lock is not None:
            self.notebook_lock.release()

    def _lost(self, why: str) -> None:
        if self.ended is None and self._ending is None:
            self._ending = self._own(self._end_lost(why, self.notebook.folded + 1))

    async def _end(self, why: str, state: str) -> None:
        self._events.flush()
        self.ended = why
        perhaps = self._perhaps_begun()
        for cell in self.notebook.cells:
            if cell.state in UNFINISHED:
                run = cell.seer["run"]
                if run in perhaps:
                    self._finish(run, state, f"{why}; whether it had begun is not known")
                else:
                    self._finish(run, state if cell.state == "running" else "not_run", why)
        for other in self.runs.values():
            if not other.over.is_set():
                self._finish(other.id, state, why)
        self._kernel_changed.set()
        self.notebook.metadata["seer"] = {**self.notebook.metadata.get("seer", {}), "ended": why}
        self.note_cost()
        self.notebook.changed()
        await self._save_quietly(last=True)
        if self._saver is not None:
            self._saver.cancel()
        saved = self.notebook.trouble is None
        if self.notebook_lock is not None and saved:
            self.notebook_lock.release()  # the next sandbox may open it at once, as our answers say
        if self._sandbox is not None:
            try:
                await self._sandbox.terminate()  # also what a killed host left behind
            except EndUnconfirmed as error:
                self.unconfirmed = error
                self._own(self._insist(self._sandbox, self._end_once_saved))
                return
        if saved:
            self._end_for_good()
        else:  # the record says that it lives, and the journal stays: the next server could finish
            self._own(self._end_once_saved())

    def _perhaps_begun(self) -> set[str]:
        """Runs that the kernel may have had without our hearing of it.

        The host gives it the next one and then says so; if it dies between the two nobody says it.
        """
        open_cells = [cell for cell in self.notebook.cells if cell.state in UNFINISHED]
        if any(cell.state == "running" for cell in open_cells):
            return set()  # one at a time
        waiting = {cell.seer["run"] for cell in open_cells}
        in_order = [id for id in self.runs if id in waiting]
        return set(in_order[:1]) or waiting

    async def _end_once_saved(self) -> None:
        while self.notebook.trouble is not None:
            await asyncio.sleep(SAVE_AGAIN_SECONDS)
            await self._save_quietly(last=True)
        self._end_for_good()

    def _end_for_good(self) -> None:
        fault_point("stop.saved")
        try:
            self.on_end(self)  # before the locks go: who takes them must read that it has ended
        finally:
            self.wanted = time.monotonic()
            self.release()

    def want_notebook(self) -> None:
        """Somebody asks for the notebook: read it, if it is not held. Raises NotebookUnreadable."""
        if self.unread:
            path, notices = self.notebook.path, self.notebook.notices
            seen = stamp(path)
            cells, metadata = read_notebook(path) if path.exists() else ([], None)
            self.notebook, self.unread = Notebook(path, cells, metadata, seen), False
            self.notebook.notices = notices
        self.wanted = time.monotonic()

    def put_away(self, unwanted: float) -> None:
        """It ended, and nobody asked for its notebook in so many seconds: it is read again for who does."""
        calm = time.monotonic() - self.wanted > unwanted
        if self.ended is None or self.unread or self._work or not (calm and self.notebook.settled):
            return
        notices = self.notebook.notices
        self.notebook, self.unread = Notebook(self.notebook.path), True
        self.notebook.notices = notices
        self._left_behind = nothing
        self._link = self._saver = self._ending = self._asking = None

    def _finish(self, id: str, state: str, why: str) -> None:
        self.notebook.finish(id, state, why)
        cell = self.notebook.by_run(id)
        run = self.runs.get(id) or (self.run_of(cell) if cell else None)
        if run is not None:
            run.state, run.why = state, why
            self._over(run)

    def _over(self, run: RunInfo) -> None:
        run.over.set()
        self.on_run_over(self, run)
        run.call = None
        self._past_by_one(run)

    def _past_by_one(self, run: RunInfo) -> None:
        past = self._past[run.kind]
        past.append(run.id)
        if len(past) > (KNOWN_RUNS if run.kind == "cell" else KNOWN_COMMANDS):
            self.runs.pop(past.popleft(), None)

    def _own(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """A task that belongs to the session, not to the call that began it."""
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)
        return task

    # -- events -------------------------------------------------------------------------------

    def _take(self, event: Event) -> None:
        """The first to hear of an event. What probes found is judged as it is, and goes no further."""
        if event["type"] == "display" and OBSERVED in event["data"]:
            if self.observing:
                self.observed = event["data"][OBSERVED]
            event = {"n": event["n"], "type": "asked", "run": event.get("run")}
        self._events.take(event)

    def _fold(self, event: Event) -> None:
        kind = event["type"]
        if kind == "display" and ASKED in event["data"]:
            self.on_asked(self, event["data"][ASKED])
            event = {
                "n": event["n"],
                "type": "asked",
                "run": event.get("run"),
            }  # the document has none of it
        self.notebook.fold(event)
        if kind == "kernel":
            self.kernel_state, self.kernel_how = event["state"], event.get("how", "")
            self.generation = event["generation"]
            self._kernel_changed.set()
        elif kind == "closing":
            self._closing_why = event["why"]
        elif kind == "lost":
            self.lost_bytes += event["bytes"]
        id = event.get("run")
        if id is None:
            return
        cell = self.notebook.by_run(id)
        run = self.runs.get(id)
        if run is None:
            if cell is None and event.get("late"):
                return  # of a run that is forgotten: its cell ran again, or it was a command of long ago
            run = self.runs[id] = RunInfo(
                id, "cell" if cell else "command", cell.id if cell else "", whole=kind == "start"
            )
        if event["n"] > run.recalled:
            self._fold_into(run, event)
            if kind == "end":
                self._over(run)
        self.on_change(self, cell.id if cell else "")

    def _fold_into(self, run: RunInfo, event: Event) -> None:
        kind = event["type"]
        if kind == "start":
            run.state, run.started = "running", event["t"]
            run.subject = event.get("command", run.subject)
        elif kind == "end":
            run.state, run.seconds, run.why = event["state"], event["seconds"], event["why"]
            run.output_bytes, run.dropped_bytes = event["output_bytes"], event["dropped_bytes"]
            run.code = event["count"] if run.kind == "command" else None
            if run.outputs:
                run.outputs.close()
        elif run.kind == "command":
            if run.outputs is None:
                folder = self.notebook.outputs_dir
                run.outputs = Outputs(lambda i: folder / f"{run.id}-{i}.txt")
            run.outputs.fold(event)
            self.notebook.look_after(f"command {run.id}", run.outputs)

    async def recall(self, id: str) -> None:
        """Know a command again that is over, of an earlier server or of long ago, if it was one of here.

        Raises SandboxUnreachable.
        """
        here = self.runs.get(id)
        if here is not None and (here.whole or here.kind == "cell" or not here.over.is_set()):
            return
        if self.ended is not None or not id.startswith("c"):
            return
        link, sandbox = self._linked(), self._sandbox
        answer = await link.request("runs", runs=[id])
        known = next(iter(answer["runs"]), None)
        if sandbox is None or known is None or known["state"] in UNFINISHED:
            return
        run = RunInfo(id, "command", "")

        def fold(event: Event) -> None:
            self._fold_into(run, event)

        first = known["first"]
        run.recalled = await recall(sandbox.dial, self.redactor, id, first, lambda: link.last, fold)
        run.over.set()
        if self.runs.get(id) is here:
            self.runs[id] = run
            if here is None:
                self._past_by_one(run)

    # -- runs ---------------------------------------------------------------------------------

    async def run_cells(self, cells: Sequence[Cell], stop_on_error: bool = True) -> list[RunInfo]:
        """Queue the cells in this order. What is begun here is finished even if the caller goes."""
        self._linked()
        for cell in cells:
            if cell.kind != "code":
                raise BadInput("cell", cell.id, f"it is a {cell.kind} cell; only code cells run")
            if cell.state in UNFINISHED and not self._settled(cell):
                raise BadInput(
                    "cell",
                    cell.id,
                    f"it is {cell.state} already; wait with read_outputs or stop it with interrupt",
                )
        if self.kernel_state == "dead":
            raise KernelDead(self.kernel_how)
        runs: list[RunInfo] = []
        for cell in cells:
            run = RunInfo("r" + secrets.token_hex(5), "cell", cell.id, call=current_call())
            self.runs[run.id] = run
            self.notebook.begin(cell, run.id)
            self.on_run_begun(self, run, cell.source)
            runs.append(run)
        fault_point("run.noted")
        await asyncio.shield(self._own(self._submit(cells, runs, stop_on_error)))
        return runs

    async def _submit(
        self, cells: Sequence[Cell], runs: Sequence[RunInfo], stop_on_error: bool
    ) -> None:
        await self._save_quietly()  # on disk before the kernel hears of it
        fault_point("run.saved")
        wanted = [
            {"run": run.id, "code": cell.source} for cell, run in zip(cells, runs, strict=True)
        ]
        await self._send(runs, "run", {"runs": wanted, "stop_on_error": stop_on_error})
        fault_point("run.accepted")

    async def _send(self, runs: Sequence[RunInfo], op: str, fields: dict[str, Any]) -> None:
        """Let the host begin these runs. Raises its refusal: then they are not run.

        Where it does not answer it may have heard: it is asked again, and begins each run once.
        """
        try:
            await self._linked().request(op, timeout=TAKEN_SECONDS, **fields)
        except Unanswered:
            for run in runs:
                run.unanswered = True
            sending = asyncio.create_task(self._send_again(runs, op, fields))
            self._sending.add(sending)
            sending.add_done_callback(self._sending.discard)
        except SeerError as error:
            await self._refused(runs, error)
            raise

    async def _send_again(self, runs: Sequence[RunInfo], op: str, fields: dict[str, Any]) -> None:
        while self._link is not None and self.ended is None and self._ending is None:
            try:
                await self._link.request(op, timeout=ASK_SECONDS, **fields)
            except Unanswered:
                await asyncio.sleep(1.0)
            except SandboxUnreachable:
                return  # lost, and its end tells of these runs; or followed no more, as answers say
            except SeerError as error:
                await self._refused(runs, error)
                return
            else:
                for run in runs:
                    run.unanswered = False
                return

    async def _refused(self, runs: Sequence[RunInfo], error: SeerError) -> None:
        for run in runs:
            if not run.over.is_set():
                self._finish(run.id, "not_run", str(error))
        await self._save_quietly()

    def facts(self, run: RunInfo) -> RunFacts:
        """What is noted of a run in log and audit."""
        cell = run.subject if run.kind == "cell" else None
        path = str(self.notebook.path)
        return RunFacts(run.id, run.kind, self.handle, cell, self.owner, path, run.call)

    def _settled(self, cell: Cell) -> bool:
        run = self.runs.get(cell.seer.get("run", ""))
        return run is not None and run.over.is_set()

    async def command(self, command: str) -> RunInfo:
        """Start a shell command in the sandbox, beside the kernel."""
        run = RunInfo("c" + secrets.token_hex(5), "command", command, call=current_call())
        self.runs[run.id] = run
        self.on_run_begun(self, run, command)
        await asyncio.shield(self._own(self._start_command(run)))
        return run

    async def _start_command(self, run: RunInfo) -> None:
        try:
            await self._send([run], "command", {"run": run.id, "command": run.subject})
        except SeerError:
            del self.runs[run.id]  # nobody was told its id
            raise

    async def wait(self, runs: Sequence[RunInfo], seconds: float, heartbeat: Heartbeat) -> bool:
        """Wait until all are over, at most `seconds`; whether they are. The runs go on regardless."""
        end = time.monotonic() + seconds
        for run in runs:
            while not run.over.is_set():
                left = end - time.monotonic()
                if left <= 0:
                    return False
                try:
                    async with asyncio.timeout(min(left, HEARTBEAT_SECONDS)):
                        await run.over.wait()
                except TimeoutError:
                    await heartbeat(self._now(runs))
        await self._save_quietly()  # the answer may name the file: then it is there
        return True

    def _now(self, runs: Sequence[RunInfo]) -> str:
        """One line on what runs and what it said last."""
        over = sum(run.over.is_set() for run in runs)
        current = next((run for run in runs if not run.over.is_set()), runs[-1])
        prefix = f"{over}/{len(runs)} " if len(runs) > 1 else ""
        return f"{prefix}{current.subject[:40]} {current.state}: {self.last_line(current)[-200:]}"

    def last_line(self, run: RunInfo) -> str:
        outputs = run.outputs if run.kind == "command" else self.notebook.cell(run.subject).outputs
        for piece in reversed(outputs.pieces() if outputs else []):
            text = piece.rest or (piece.text if piece.file is None else "")
            for line in reversed(text[-2000:].splitlines()):
                if line.strip():
                    return line.strip()
        return ""

    def find_run(self, id: str) -> RunInfo:
        if id in self.runs:
            return self.runs[id]
        cell = self.notebook.by_run(id)
        if cell is None:
            raise NotFound(
                "run",
                id,
                list(self.runs)[-12:],
                "read_notebook shows the last run of each cell."
                + (SANDBOX_GONE if self.ended is not None else ""),
            )
        return self.run_of(cell)

    def run_of(self, cell: Cell) -> RunInfo:
        """The last run of a cell, also one of an earlier server."""
        seer = cell.seer
        if seer.get("run") in self.runs:
            return self.runs[seer["run"]]
        run = RunInfo(
            seer.get("run", ""),
            "cell",
            cell.id,
            cell.state,
            seer.get("started"),
            seer.get("seconds"),
            seer.get("why", ""),
            output_bytes=seer.get("output_bytes", 0),
            dropped_bytes=seer.get("dropped_bytes", 0),
        )
        if run.state not in UNFINISHED:
            run.over.set()
        if run.id:
            self.runs[run.id] = run
        return run

    async def interrupt(self, run: str, everything: bool) -> tuple[RunInfo | None, bool, int]:
        """Stop a run (default: the one that runs now): it, whether it stopped, how many wait."""
        if run:
            self.find_run(run)
        answer = await self._linked().request("interrupt", run=run, everything=everything)
        fault_point("interrupt.sent")
        stopped = self.runs.get(str(answer.get("interrupted")))
        if stopped is None:
            return None, True, answer["waiting"]
        for patience in (2.0, INTERRUPT_SECONDS - 2.0):
            try:
                async with asyncio.timeout(patience):
                    await stopped.over.wait()
                break
            except TimeoutError:
                # Once more: a first Ctrl-C can fall between two statements that swallow it.
                await self._linked().request("interrupt", run=stopped.id)
        await self._save_quietly()
        return stopped, stopped.over.is_set(), answer["waiting"]

    async def restart(self) -> None:
        """A new, empty kernel. Raises KernelStartFailed."""
        answer = await asyncio.shield(self._own(self._linked().request("restart", timeout=60.0)))
        fault_point("restart.sent")
        await self._save_quietly()
        if answer["kernel"] != "ready":
            raise KernelStartFailed(answer["how"], answer["stderr"])

    # -- files --------------------------------------------------------------------------------

    async def read_file(
        self, path: str, offset: int = 0, limit: int = FILE_PIECE
    ) -> tuple[bytes, int]:
        """Bytes of a file in the sandbox, and its size."""
        answer = await self._linked().request("read_file", path=path, offset=offset, limit=limit)
        return base64.b64decode(answer["data"]), answer["size"]

    async def write_file(self, path: str, data: bytes, append: bool = False) -> str:
        """Write a file in the sandbox; its full path there."""
        answer = await self._linked().request(
            "write_file", path=path, data=base64.b64encode(data).decode("ascii"), append=append
        )
        fault_point("file.sent")
        return answer["path"]

    async def list_files(self, path: str) -> tuple[list[dict[str, Any]], int]:
        answer = await self._linked().request("list_files", path=path)
        return answer["entries"], answer["total"]

    async def touch(self) -> None:
        """Somebody looks: that counts as use. What was put out can be read all the same.

        The host's answer stands behind what was put out before it, so waiting for it makes the look
        a fresh one; behind a flood it would be a long wait, so there is an end to it.
        """
        if self.ended is None and self._link is not None:
            touching = asyncio.create_task(self._touch(self._link))
            self._touching.add(touching)
            touching.add_done_callback(self._touching.discard)
            await asyncio.wait({touching}, timeout=FRESH_SECONDS)

    async def _touch(self, link: Link) -> None:
        try:
            await link.request("touch", timeout=2.0)
        except SandboxUnreachable:
            return

    def check_usable(self, to_run: bool) -> None:
        """Before a cell is written: raise now what running it would raise."""
        if to_run:
            self._linked()
            if self.kernel_state == "dead":
                raise KernelDead(self.kernel_how)

    # -- state --------------------------------------------------------------------------------

    async def status(self) -> dict[str, Any]:
        """What the host says now: kernel, active run, queue, idle time, lease."""
        found = await self._linked().request("status", timeout=5.0)
        self.lease.heard(found)
        return found

    async def installed(self) -> dict[str, Any]:
        """Versions of what the kernel can import: python, machine, packages."""
        found = await self._linked().request("installed")
        return {key: found[key] for key in ("python", "machine", "packages") if key in found}

    async def extend(self, lifetime: float | None, idle_limit: float | None) -> Lease:
        """Move the end of the lease: seconds from now, and without use. The host knows the bound."""
        wanted = {"lifetime": lifetime, "idle_limit": idle_limit}
        answer = await self._linked().request(
            "extend", **{key: value for key, value in wanted.items() if value is not None}
        )
        self.lease.heard(answer)
        return self.lease

    async def snapshot(self) -> str:
        """Keep the sandbox's files; the id to start another from. Raises BadInput where that cannot be."""
        self._linked()
        assert self._sandbox is not None
        return await self._sandbox.snapshot()

    def note_cost(self) -> None:
        """Write what it cost up to now into the book and the notebook."""
        if self.meter is None:
            return
        self.meter.note()
        link = self._sandbox.record().get("link") if self._sandbox is not None else None
        told = {
            "cost": self.meter.so_far(),
            "price": self.meter.price.sentence(),
            **({"link": link} if link else {}),
        }
        self.notebook.metadata["seer"] = {**self.notebook.metadata.get("seer", {}), **told}
        self.notebook.changed()

    def warnings(self) -> list[str]:
        """What is about to happen to it, in sentences."""
        said = [str(self.unconfirmed)] if self.unconfirmed is not None else []
        if self.ended is None and self.unconfirmed is None:
            said += self.lease.warnings(self.handle)
            if self.meter is not None:
                said += self.meter.warnings()
        return said

    def start_again(self) -> dict[str, str]:
        """What start_sandbox is told to open its notebook on such a machine again."""
        made = self.notebook.metadata.get("seer", {}).get("environment", {})
        gpu = str(made.get("gpu", "")) if isinstance(made, dict) else ""  # as 2 x H100
        count, _, kind = gpu.partition(" x ")
        host = self._sandbox.record().get("host") if self._sandbox is not None else None
        asked = {
            "notebook": str(self.notebook.path),
            "backend": self.backend_name if self.backend_name != "local" else "",
            "gpu": (kind if count == "1" else f"{kind}:{count}") if kind else "",
            "host": str(host or ""),
        }
        return {name: value for name, value in asked.items() if value}

    def record(self) -> Record:
        sandbox = self._sandbox.record() if self._sandbox is not None else None
        return sealed(
            {
                "handle": self.handle,
                "name": self.name,
                "owner": self.owner,
                "backend": self.backend_name,
                "notebook": str(self.notebook.path),
                "created": self.created,
                "ended": self.ended,
                "stopping": self.stopping,
                "price": self.meter.kept() if self.meter is not None else None,
                "secrets": list(self.secrets),
                "shared": self.shared,
                "investigation": str(self.investigation) if self.investigation else None,
                "sandbox": sandbox,
            }
        )

    async def save(self) -> None:
        """The document on disk now. Raises NotebookNotSaved."""
        await self.notebook.save()

    async def _save_quietly(self, last: bool = False) -> None:
        """Save; a full disk is kept in notebook.trouble, which every answer shows."""
        try:
            await (self.notebook.close() if last else self.notebook.save())
        except NotebookNotSaved:
            return

    def _linked(self) -> Link:
        if self.ended is not None or self._ending is not None:
            if self.unconfirmed is not None:
                raise self.unconfirmed
            why = self.ended or self._closing_why or "its host is gone"
            raise SandboxLost(self.handle, why, self.start_again())
        if self._link is None:
            raise SandboxUnreachable(
                f"Sandbox {self.handle} is still starting. Try again in a moment."
            )
        return self._link
