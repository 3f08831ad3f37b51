"""Between a notebook and its scoped sandboxes: what its code asks for by number is called there, and answered.

The notebook's code can name a function and give data, as any client of a scope; it is no way to run other
code there. A scoped sandbox begins with the first call, and ends with the sandbox that it belongs to.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Coroutine
from typing import Any

from ..environment import read_investigation
from ..errors import BadInput, NotFound, ScopeStarting, SeerError
from .register import Register
from .scope import Limits, Outcome, Request, Scope
from .session import FILE_PIECE, Session

FOLDER = ".scoped"  # as in tool_packs/scoped_client.py
NUMBER = re.compile("[0-9a-f]{16}")
SIGN_SECONDS = 15.0  # between two signs that it is still worked on
LIMITS = Limits(numbers=200_000, characters=4_000_000, arguments=4_000_000)


class Bridges:
    def __init__(self, register: Register) -> None:
        self._register = register
        self._scopes: dict[str, dict[str, Scope]] = {}
        self._requests: dict[tuple[str, str], tuple[Scope, Request] | None] = {}
        """What is under way, by sandbox and number; None before it is called."""
        self._work: set[asyncio.Task[None]] = set()
        register.asked(self._asked, self._ended)

    async def close(self) -> None:
        """End all scoped sandboxes."""
        for task in self._work:
            task.cancel()
        scopes = [scope for of_one in self._scopes.values() for scope in of_one.values()]
        self._scopes.clear()
        await asyncio.gather(*(scope.close() for scope in scopes))

    def _own(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    def _ended(self, session: Session) -> None:
        for scope in self._scopes.pop(session.handle, {}).values():
            self._own(scope.close())

    def _asked(self, session: Session, asked: Any) -> None:
        """What a kernel shows is data of strangers: anything else is passed over."""
        if not isinstance(asked, dict) or session.investigation is None:
            return
        number, cancelled = asked.get("ask"), asked.get("cancel")
        if isinstance(number, str) and NUMBER.fullmatch(number):
            if (key := (session.handle, number)) not in self._requests:
                self._requests[key] = None
                self._own(self._answer(session, number))
        elif isinstance(cancelled, str) and (
            under_way := self._requests.get((session.handle, cancelled))
        ):
            scope, request = under_way
            scope.abandon(request)

    async def _answer(self, session: Session, number: str) -> None:
        key = (session.handle, number)
        try:
            try:
                asked = await self._question(session, number)
            except SeerError:
                return  # it was answered or given up: a server that begins reads old outputs again
            try:
                outcome = await self._called(session, number, asked)
            except SeerError as error:
                outcome = Outcome("failed", error=str(error))
            told = {"error": outcome.error} if outcome.error else {"value": outcome.value}
            told |= {"note": outcome.note} if outcome.note else {}
            await self._tell(session, number, told)
        except SeerError:
            return  # the asking sandbox is gone, or cannot be reached: its kernel gives up by itself
        finally:
            del self._requests[key]

    async def _question(self, session: Session, number: str) -> str:
        path = f"{FOLDER}/{number}.ask"
        data, size = await session.read_file(path)
        if size > LIMITS.arguments + 10_000:
            raise BadInput("arguments", f"{size:,} bytes", f"a call may have {LIMITS.arguments:,}")
        while len(data) < size:
            more, _ = await session.read_file(path, len(data), FILE_PIECE)
            if not more:
                break
            data += more
        return data.decode("utf-8", "replace")

    async def _called(self, session: Session, number: str, question: str) -> Outcome:
        try:
            asked: Any = json.loads(question)
            name, function, given = asked["scope"], asked["function"], asked["arguments"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInput("request", number, "it is none that this server knows") from error
        if not (isinstance(name, str) and isinstance(function, str) and isinstance(given, dict)):
            raise BadInput("request", number, "it is none that this server knows")
        scope = await self._scope(session, name)
        while True:
            try:
                request = await scope.call(function, given, session.owner, SIGN_SECONDS)
                break
            except ScopeStarting:
                await self._tell(session, number, {"running": "starting"})
        self._requests[session.handle, number] = scope, request
        try:
            while (outcome := await scope.wait(request, SIGN_SECONDS, _unheard)).state == "running":
                await self._tell(session, number, {"running": request.run.state})
        except asyncio.CancelledError:
            scope.abandon(request)
            raise
        scope.forget(request)
        return outcome

    async def _tell(self, session: Session, number: str, told: dict[str, Any]) -> None:
        text = json.dumps(self._register.config.redactor.value(told))
        await session.write_file(f"{FOLDER}/{number}.answer", text.encode())

    async def _scope(self, session: Session, name: str) -> Scope:
        mine = self._scopes.setdefault(session.handle, {})
        if name not in mine:
            assert session.investigation is not None
            known = read_investigation(session.investigation).scoped
            if name not in known:
                raise NotFound("scope", name, known)
            scope = Scope(self._register, known[name], f"scope:{session.handle}:{name}", LIMITS)
            mine[name] = scope
            await scope.open()
        return mine[name]


async def _unheard(_: str) -> None:
    """Progress is told by signs."""
