"""The sandbox behind an interface: started, called through the queue of its kernel, started anew if it ends.

Each call is a cell of the sandbox's notebook, which the operator reads and no client does. What a client
hears is the value that the function returned, or a sentence.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from ..environment import Investigation
from ..errors import BadInput, Conflict, NotFound, ScopeStarting, ScopeUnavailable, SeerError
from ..interface import Exposed, Interface
from ..notebook import Cell
from .register import Register
from .session import RunInfo, Session

MIME = "application/vnd.seer.scoped+json"  # of tool_packs/scoped.py
INLINE = 64_000  # characters of a result that stay in the notebook
WAITING = 64  # calls that are under way at once
OF_ONE = 16  # of one owner
KEPT = 256  # calls whose results can be read again
KEPT_CELLS = 1000  # calls in the notebook; the audit file has all
AGAIN_SECONDS = 20.0  # after a start that failed
ANEW = "NOTE: the sandbox had ended and was started anew: what earlier calls left in it is gone."
ENDS = {
    "interrupted": "it was cancelled",
    "kernel_died": "the kernel died while it ran; perhaps it needed more memory than there is",
    "sandbox_lost": "the sandbox was lost while it ran",
    "expired": "the sandbox ended while it ran",
    "not_run": "it was not run",
    "error": "it ended without an answer",
}

Beat = Callable[[str], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """How much may cross: numbers of an array, and characters of arguments and of a result as JSON."""

    numbers: int = 20_000
    characters: int = 200_000
    arguments: int = 1_000_000


@dataclass
class Request:
    """One call of an exposed function."""

    id: str
    function: Exposed
    owner: str
    session: Session
    cell: Cell
    run: RunInfo
    note: str = ""
    """What the caller must know beside the result."""
    answer: dict[str, Any] | None = None
    """{"value": …} or {"error": …}, once it is there."""

    @property
    def over(self) -> bool:
        return self.run.over.is_set()


@dataclass(frozen=True)
class Outcome:
    """What came of a call."""

    state: str
    """"complete", "failed" or "running"."""
    value: Any = None
    error: str = ""
    note: str = ""


class Scope:
    def __init__(
        self, register: Register, found: Investigation, owner: str, limits: Limits | None = None
    ) -> None:
        """`owner`: whose its sandbox is; no client can be that one."""
        assert found.interface is not None
        self.interface: Interface = found.interface
        self.owner = owner
        self._register = register
        self._found = found
        self._limits = limits or Limits()
        self._session: Session | None = None
        self._start: asyncio.Task[Session] | None = None
        self._failed_at = 0.0
        self._generation = 0
        """How many sandboxes it had; and the one of each owner's last call."""
        self._seen: dict[str, int] = {}
        self._requests: dict[str, Request] = {}
        self._cells: list[tuple[Session, Cell]] = []
        self._work: set[asyncio.Task[Any]] = set()

    # -- the sandbox --------------------------------------------------------------------------

    async def open(self) -> None:
        """End what an earlier server of the same interface left, and begin to start."""
        sessions, _ = await self._register.list(self.owner)
        for session in sessions:
            if session.ended is None:
                self._own(self._end(session, "its server is gone"))
        self._begin()

    async def close(self) -> None:
        for task in [*self._work, *filter(None, [self._start])]:
            task.cancel()
        if self._session is not None:
            await self._end(self._session, "its server ended")

    @property
    def ready(self) -> bool:
        return self._session is not None and self._usable(self._session)

    @property
    def session(self) -> Session | None:
        """For the operator: the sandbox, once it is there."""
        return self._session

    def _usable(self, session: Session) -> bool:
        return session.ended is None and not session.stopping and session.kernel_state == "ready"

    def _begin(self) -> asyncio.Task[Session]:
        if self._start is None or self._start.done():
            self._start = asyncio.create_task(self._started(), name=f"start of {self.owner}")
            self._start.add_done_callback(self._heard)
        return self._start

    def _heard(self, task: asyncio.Task[Session]) -> None:
        if task.cancelled():
            return
        if (error := task.exception()) is None:
            self._session = task.result()
            self._generation += 1
            return
        self._failed_at = time.monotonic()
        self._log("scope_not_started", str(error))

    async def _started(self) -> Session:
        """A sandbox in which the file has run. Raises what hinders, in full, for the operator."""
        found = self._found
        start = await self._register.begin(self.owner, "", found.sandbox, "", False, found)
        session = await start.wait(None, lambda report: None)
        try:
            for run in session.opening:
                await run.over.wait()
            if bad := next((run for run in session.opening if run.state != "complete"), None):
                why = f" ({bad.why})" if bad.why else ""
                raise SeerError(
                    f"{self.interface.path.name} could not be run: cell {bad.subject} of "
                    f"{session.notebook.path} ended with {bad.state}{why}; the notebook has its output."
                )
        except BaseException:
            self._own(self._end(session, "its interface did not start"))
            raise
        return session

    async def _at_hand(self, seconds: float) -> Session:
        """The sandbox, started anew if it ended. Raises ScopeUnavailable."""
        session = self._session
        if session is not None and self._usable(session):
            return session
        if session is not None:
            self._session = None
            why = session.ended or session.stopping or f"kernel {session.kernel_state}"
            self._log("scope_started_anew", why)
            self._own(self._end(session, "it is started anew"))
        failed = self._start is not None and self._start.done() and self._session is None
        waited = time.monotonic() - self._failed_at
        if session is None and failed and waited < AGAIN_SECONDS:
            raise ScopeUnavailable(
                "The sandbox behind these functions did not start. It is tried again "
                f"{AGAIN_SECONDS - waited:.0f} s from now; the server's log tells its operator why."
            )
        try:
            async with asyncio.timeout(seconds):
                return await asyncio.shield(self._begin())
        except TimeoutError:
            raise ScopeStarting from None
        except SeerError as error:
            raise ScopeUnavailable(
                "The sandbox behind these functions did not start. Nothing was called; the server's log tells "
                "its operator why."
            ) from error

    async def _end(self, session: Session, why: str) -> None:
        try:
            await session.terminate(why)
        except SeerError as error:  # asked for again and again, by the session
            self._log("scope_not_ended", str(error))

    # -- calls --------------------------------------------------------------------------------

    async def call(
        self, name: str, arguments: dict[str, Any], owner: str, seconds: float
    ) -> Request:
        """Queue a call. Raises NotFound, BadInput, Conflict or ScopeUnavailable; then nothing was run."""
        function = self.interface.functions.get(name)
        if function is None:
            raise NotFound("function", name, self.interface.functions)
        if wrong := function.wrong(arguments):
            known = ", ".join(p.name for p in function.parameters) or "none"
            raise SeerError(f"{' '.join(wrong[:6])} Parameters of {name}: {known}.")
        given = json.dumps(arguments, allow_nan=False)
        limits = self._limits
        if len(given) > limits.arguments:
            raise BadInput(
                "arguments",
                f"{len(given):,} characters",
                f"a call may have {limits.arguments:,}; send less at once",
            )
        self._admit(owner)
        session = await self._at_hand(seconds)
        self._admit(owner)  # others may have waited as well
        anew = self._seen.get(owner, self._generation) < self._generation
        self._seen[owner] = self._generation
        cell = session.notebook.insert(
            "code",
            f"seer_scoped.call({name!r}, {given!a}, {limits.numbers}, {limits.characters})",
        )
        self._remember(session, cell)
        try:
            (run,) = await session.run_cells([cell])
        except SeerError as error:
            self._log("scope_call_refused", str(error))
            raise ScopeUnavailable(
                "The sandbox behind these functions cannot be reached. Nothing is known to have run; call again "
                "in a moment."
            ) from error
        request = Request(
            f"c{secrets.token_hex(8)}", function, owner, session, cell, run, ANEW if anew else ""
        )
        self._requests[request.id] = request
        for old in [r.id for r in self._requests.values() if r.over][: -KEPT or None]:
            del self._requests[old]
        return request

    def _admit(self, owner: str) -> None:
        waiting = [r for r in self._requests.values() if not r.over]
        own = sum(r.owner == owner for r in waiting)
        if own >= OF_ONE or len(waiting) >= WAITING:
            raise Conflict(
                f"{own} of your calls and {len(waiting)} of all are under way, and at most {OF_ONE} and {WAITING} "
                "may be. Nothing was called; wait for one of them first."
            )

    def _remember(self, session: Session, cell: Cell) -> None:
        """Keep the notebook at a size that can be opened."""
        self._cells = [(s, c) for s, c in self._cells if s is session]
        self._cells.append((session, cell))
        for _, old in self._cells[:-KEPT_CELLS]:
            if old.state not in ("queued", "running"):
                session.notebook.delete(old)
        self._cells = self._cells[-KEPT_CELLS:]

    def find(self, id: str, owner: str) -> Request:
        """A call of the owner's. A foreign one answers like one that never was."""
        request = self._requests.get(id)
        if request is None or request.owner != owner:
            own = [r.id for r in self._requests.values() if r.owner == owner][-6:]
            raise NotFound("call", id, own)
        return request

    async def wait(self, request: Request, seconds: float, beat: Beat) -> Outcome:
        """What came of it within so many seconds. The run goes on regardless."""

        async def tell(_: str) -> None:  # what a function prints is for the operator
            await beat(f"{request.function.name} is {request.run.state}")

        await request.session.wait([request.run], seconds, tell)
        return self.outcome(request)

    async def cancel(self, request: Request) -> Outcome:
        """Stop it, or take it out of the queue. Raises ScopeUnavailable."""
        if not request.over:
            try:
                await request.session.interrupt(request.run.id, False)
            except SeerError as error:
                self._log("scope_not_cancelled", str(error))
                raise ScopeUnavailable(
                    "The sandbox behind these functions cannot be reached; whether it stopped is not known."
                ) from error
        return self.outcome(request)

    def forget(self, request: Request) -> None:
        """Its result was passed on."""
        self._requests.pop(request.id, None)

    def abandon(self, request: Request) -> None:
        """Nobody waits for it any more: it is cancelled."""
        if not request.over:
            self._own(self._abandoned(request))

    async def _abandoned(self, request: Request) -> None:
        try:
            await self.cancel(request)
        except ScopeUnavailable:
            return  # it is in the log, and its sandbox cannot be reached

    def outcome(self, request: Request) -> Outcome:
        run, function = request.run, request.function
        if not request.over:
            return Outcome("running", note=request.note)
        if run.state != "complete":
            why = ENDS.get(run.state, "it ended without an answer")
            return self._failed(request, f"{function.name}: {why}.")
        if request.answer is None:
            request.answer = taken(request.cell)
        answer = request.answer
        if answer is None:
            return self._failed(request, f"{function.name}: it ended without an answer.")
        if "error" in answer:
            return self._failed(request, str(answer["error"]))
        value = answer.get("value")
        if wrong := function.returns.wrong(value, "what it returned", returned=True):
            return self._failed(
                request, f"{function.name} returned what it does not declare: {wrong}"
            )
        return Outcome("complete", value, note=request.note)

    def _failed(self, request: Request, error: str) -> Outcome:
        return Outcome("failed", error=error, note=request.note)

    def _own(self, work: Any) -> None:
        task: asyncio.Task[Any] = asyncio.ensure_future(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _log(self, event: str, why: str) -> None:
        first = why.partition("\n")[0]  # what follows could be output
        self._register.observer.log.write(
            event, logging.WARNING, interface=self.interface.path.name, why=first[:600]
        )


def taken(cell: Cell) -> dict[str, Any] | None:
    """What tool_packs.scoped showed at the end of the call; a large one does not stay in the notebook."""
    outputs = cell.data["outputs"]
    for at in reversed(range(len(outputs))):
        data = outputs[at].get("data", {})
        if isinstance(found := data.get(MIME), dict):
            if (size := len(json.dumps(found))) > INLINE:
                lean = {**outputs[at], "data": {**data, MIME: {"left_out": size}}}
                cell.put_outputs([*outputs[:at], lean, *outputs[at + 1 :]])
            return found
    return None
