"""The link to a kernel host: requests that survive a broken line, events that come exactly once."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from typing import Any

from .errors import (
    KernelDead,
    KernelStartFailed,
    SandboxUnreachable,
    SeerError,
    Unanswered,
)
from .ipynb import DEPTH, STATES, is_kind, nested_deeper
from .kernel_host.door import LINE_LIMIT
from .kernel_host.fault import fault_point

Event = dict[str, Any]
Damage = Callable[[int, int], None]
Dial = Callable[[], Awaitable[tuple[StreamReader, StreamWriter]]]

# Sending these twice does the same as sending them once, so they are sent again after a break.
REPEATABLE = frozenset(
    [
        "ping",
        "touch",
        "status",
        "run",
        "runs",
        "command",
        "interrupt",
        "read_file",
        "list_files",
        "stop",
        "extend",
    ]
)
PING_SECONDS = 15.0
SLICE = 0.005  # seconds of folding after which other tasks get a turn
ENDS = STATES - {"queued", "running"}
SIGNALLED = range(-64, 0)  # the `count` of a command (run c…) that a signal ended

# What an event must have, and of which kind, before anything relies on it; and what it may have.
BUNDLE: dict[str, type] = {"data": dict, "metadata": dict}
REQUIRED: dict[str, dict[str, type]] = {
    "kernel": {"state": str, "generation": int},
    "closing": {"why": str},
    "lost": {"bytes": int},
    "start": {"run": str, "t": float},
    "end": {"run": str, "state": str, "why": str, "output_bytes": int, "dropped_bytes": int},
    "stream": {"run": str, "name": str, "text": str},
    "display": {"run": str, **BUNDLE},
    "result": {"run": str, **BUNDLE},
    "update": BUNDLE,
    "error": {"run": str, "ename": str, "evalue": str, "traceback": list},
    "clear": {"run": str, "wait": bool},
    "capped": {"run": str, "cap": int},
}
OPTIONAL: dict[str, type] = {
    "run": str,
    "display_id": str,
    "count": int,
    "how": str,
    "command": str,
    "late": bool,
}
# What an answer must have, by its operation, if it is not a refusal.
ANSWERS: dict[str, dict[str, type]] = {
    "status": {
        "kernel": str,
        "how": str,
        "stderr": str,
        "generation": int,
        "commands": list,
        "queued": list,
        "idle_for": float,
    },
    "run": {"runs": list},
    "runs": {"runs": list},
    "command": {"runs": list},
    "interrupt": {"waiting": int},
    "extend": {"now": float},
    "restart": {"kernel": str, "how": str, "stderr": str},
    "read_file": {"data": str, "size": int},
    "write_file": {"path": str},
    "list_files": {"entries": list, "total": int},
}
NUMBER = re.compile(rb'\{"n": (\d{1,15}),')  # as a journal's lines begin
NOT_STORABLE = re.compile(rb"\\u[dD][89a-fA-F]|[eE]\+?\d{3}")  # surrogates, numbers beyond a float


def _refused(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


DECODER = json.JSONDecoder(parse_constant=_refused)


def parse_line(line: bytes) -> dict[str, Any]:
    """One line of a host as an event or an answer, checked. Raises ValueError for anything else."""
    try:
        message: Any = DECODER.decode(line.decode("utf-8"))
    except RecursionError as error:
        raise ValueError("nested too deep") from error
    if not isinstance(message, dict):
        raise ValueError("not an object")
    if line.count(b"[") + line.count(b"{") > DEPTH and nested_deeper(message, DEPTH):
        raise ValueError("nested too deep")
    if NOT_STORABLE.search(line):
        json.dumps(message, ensure_ascii=False, allow_nan=False).encode("utf-8")
    if "n" in message:
        _check_event(message)
    elif not is_kind(message.get("id"), int):
        raise ValueError("neither an event nor an answer")
    return message


def _check_event(event: Event) -> None:
    kind = event.get("type")
    if not is_kind(event["n"], int) or event["n"] == 0 or not isinstance(kind, str):
        raise ValueError("an event without a number or a type")
    for name, wanted in REQUIRED.get(kind, {}).items():
        if not is_kind(event.get(name), wanted):
            raise ValueError(f"{kind}: {name} is not a {wanted.__name__}")
    for name, wanted in OPTIONAL.items():
        if name == "count" and event.get(name) in SIGNALLED and str(event.get("run"))[:1] == "c":
            continue
        if event.get(name) is not None and not is_kind(event[name], wanted):
            raise ValueError(f"{kind}: {name} is not a {wanted.__name__}")
    if kind == "end":
        if event["state"] not in ENDS:
            raise ValueError(f"a run cannot end as {event['state']!r}")
        took = event.get("seconds")  # below zero where the clock was set back
        event["seconds"] = took if is_kind(took, float) else 0.0
    if kind in ("end", "result"):
        event.setdefault("count", None)


class Events:
    """Passes events on, each once and in order, and tells what is damaged: lines and their bytes.

    Numbers that are missing count as lines of no bytes, unless a damaged line stood for them.
    """

    def __init__(self, start: int, on_event: Callable[[Event], None], on_damage: Damage) -> None:
        self.next = start
        self._on_event = on_event
        self._on_damage = on_damage
        self._unnumbered = 0

    def take(self, line: bytes) -> dict[str, Any] | None:
        """The line's message, if it is not an event but an answer."""
        try:
            message = parse_line(line)
        except ValueError:
            self.damaged(len(line))
            return None
        if "n" not in message:
            return message
        if message["n"] >= self.next:
            missing = message["n"] - self.next - self._unnumbered
            self._unnumbered = 0
            self.next = message["n"] + 1
            if missing > 0:
                self._on_damage(missing, 0)
            self._on_event(message)
        return None

    def damaged(self, size: int) -> None:
        self._unnumbered += 1
        self._on_damage(1, size)


class Link:
    """Keeps one connection to the host, for as long as the session wants it.

    `on_event` is called once for each event, in order, beginning with number `start`; of commands
    that run when we first come, beginning with their first event. `on_damage` is called with how
    many lines of how many bytes could not be read.
    `is_gone` is asked after a failed dial: it returns why the machine is gone for good, or None.
    """

    def __init__(
        self,
        dial: Dial,
        start: int,
        on_event: Callable[[Event], None],
        on_damage: Damage,
        is_gone: Callable[[], Awaitable[str | None]],
        on_gone: Callable[[str], None],
    ) -> None:
        self._dial = dial
        self._on_event = on_event
        self._events = Events(start, self._come, on_damage)
        self._start = start
        self._running: frozenset[str] | None = None
        """Commands that ran when we first came."""
        self._is_gone = is_gone
        self._on_gone = on_gone
        self._ids = itertools.count(1)
        # Operation, line and answer of each request.
        self._waiting: dict[int, tuple[str, bytes, asyncio.Future[dict[str, Any]]]] = {}
        self._writer: StreamWriter | None = None
        self._heard = 0  # lines that made sense
        self._gone: str | None = None
        self._caught_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def open(self) -> None:
        self._task = asyncio.create_task(self._stay_connected(), name="kernel link")
        self._task.add_done_callback(self._stopped)

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        self._gone = "this server let go of it"
        self._fail_waiting(self._gone)

    async def request(self, op: str, timeout: float = 30.0, **fields: Any) -> dict[str, Any]:
        """Ask the host. Raises SandboxUnreachable, or the host's refusal as an error of ours.

        It is Unanswered where the host may have heard the request.
        """
        if self._gone is not None:
            raise SandboxUnreachable(f"The sandbox is gone ({self._gone}).")
        number = next(self._ids)
        line = encoded({"id": number, "op": op, **fields})
        if len(line) > LINE_LIMIT:  # the host would drop the line, again and again
            raise SeerError(
                f"This is too much for one request to the sandbox ({len(line):,} bytes, at most {LINE_LIMIT:,}). "
                "Nothing was done; do it in pieces (write_file with append=true, run_cell with fewer cells)."
            )
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (op, line, future)
        if self._writer is not None:
            self._send(self._writer, line)
        try:
            async with asyncio.timeout(timeout):  # wait_for of Python 3.11 can swallow a cancel
                answer = await future
        except TimeoutError:
            then = (
                "Try again"
                if op in REPEATABLE
                else "It may still be done: look before you repeat it"
            )
            raise Unanswered(
                f"The sandbox gave no answer to {op!r} in {timeout:.0f} s. {then}; list_sandboxes shows its state."
            ) from None
        finally:
            self._waiting.pop(number, None)
        if answer.get("ok") is not True:
            raise refusal(answer)
        if any(not is_kind(answer.get(name), kind) for name, kind in ANSWERS.get(op, {}).items()):
            raise Unanswered(
                f"The sandbox's answer to {op!r} cannot be understood. If that goes on, end it with stop_sandbox."
            )
        return answer

    @property
    def last(self) -> int:
        """Number of the event that came last."""
        return self._events.next - 1

    async def caught_up(self) -> None:
        """Wait until every event that existed when we connected has been folded."""
        await self._caught_up.wait()

    def _send(self, writer: StreamWriter, line: bytes) -> None:
        if not writer.is_closing():
            fault_point("link.send")
            writer.write(line)
            fault_point("link.sent")

    async def _stay_connected(self) -> None:
        pause = 0.05
        while True:
            fault_point("link.dial")
            try:
                reader, writer = await self._dial()
            except SandboxUnreachable:
                if (why := await self._why_gone()) is not None:
                    self._lose(why)
                    return
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)
                continue
            fault_point("link.dialled")
            heard = self._heard
            pinger = asyncio.create_task(self._ping(writer))
            try:
                await self._talk(reader, writer)
            except ConnectionError:
                pass  # the reason does not matter: dial again, and go on from the number we have
            finally:
                pinger.cancel()
                self._writer = None
                writer.close()
            self._drop_unrepeatable()
            if self._heard > heard:
                pause = 0.05
                # A host that ends on purpose closes its connections: look before dialling again.
                await asyncio.sleep(0.02)
            else:  # it takes the connection and says nothing that can be understood
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)

    async def _why_gone(self) -> str | None:
        """Why the machine is gone for good; None while it is there, or while nobody can tell."""
        try:
            return await self._is_gone()
        except SandboxUnreachable:  # who could tell is away as well
            return None

    async def _talk(self, reader: StreamReader, writer: StreamWriter) -> None:
        wanted = {"from": self._events.next, "running": self._running is None}
        self._send(writer, encoded({"id": 0, "op": "subscribe", **wanted}))
        for _, line, _ in list(self._waiting.values()):
            self._send(writer, line)
        self._writer = writer
        known = 0
        began = time.monotonic()
        while True:
            try:
                line = await reader.readline()
            except ValueError:  # longer than the reader's limit: what was read is passed over
                self._events.damaged(0)
                continue
            if not line.endswith(b"\n"):
                return
            before = self._events.next
            answer = self._events.take(line)
            if answer is not None:
                known = self._answered(answer, known)
            if answer is not None or self._events.next > before:
                self._heard += 1
            if self._events.next > known:
                self._caught_up.set()
            if time.monotonic() - began > SLICE:
                await asyncio.sleep(0)
                began = time.monotonic()

    def _come(self, event: Event) -> None:
        fault_point("event.come")
        if event["n"] >= self._start or event.get("run") in (self._running or ()):
            self._on_event(event)
        fault_point("event.folded")

    def _answered(self, answer: dict[str, Any], known: int) -> int:
        """Pass an answer to whom it is for; how many events there were when we subscribed."""
        if answer["id"] == 0:
            if self._running is None:
                self._begin_with(answer)
            return answer["last"] if is_kind(answer.get("last"), int) else known
        _, _, future = self._waiting.get(answer["id"], (None, None, None))
        if future is not None and not future.done():
            future.set_result(answer)
        return known

    def _begin_with(self, answer: dict[str, Any]) -> None:
        """The host also tells what runs, from its first event on; one of an earlier version does not."""
        start: Any = answer.get("from")
        running: Any = answer.get("running")
        if not is_kind(running, list) or not is_kind(start, int) or start < 1:
            running = []
        self._running = frozenset(id for id in running if isinstance(id, str))
        if self._running:
            self._events.next = min(start, self._events.next)

    async def _ping(self, writer: StreamWriter) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            self._send(writer, encoded({"id": next(self._ids), "op": "ping"}))

    def _drop_unrepeatable(self) -> None:
        for op, _, future in self._waiting.values():
            if op not in REPEATABLE and not future.done():
                future.set_exception(
                    Unanswered(
                        f"The line to the sandbox broke during {op!r}; look before you repeat it."
                    )
                )

    def _stopped(self, task: asyncio.Task[None]) -> None:
        """A failure of ours while following: said in every answer, so that nobody waits for ever."""
        if task.cancelled() or (error := task.exception()) is None:
            return
        self._gone = f"this server can no longer follow it: {error!r}; restart the server to go on"
        self._caught_up.set()
        self._fail_waiting(self._gone)
        context = {"message": "the link to a sandbox failed", "exception": error}
        task.get_loop().call_exception_handler(context)

    def _lose(self, why: str) -> None:
        self._gone = why
        self._caught_up.set()
        self._fail_waiting(why)
        self._on_gone(why)

    def _fail_waiting(self, why: str) -> None:
        for _, _, future in self._waiting.values():
            if not future.done():
                future.set_exception(Unanswered(f"The sandbox is gone ({why})."))


def encoded(message: dict[str, Any]) -> bytes:
    return (json.dumps(message) + "\n").encode("ascii")


def refusal(answer: dict[str, Any]) -> SeerError:
    """The host's "no" as one of our errors."""
    code, text = answer.get("code"), answer.get("error")
    if not isinstance(text, str) or not text:
        text = "it does not say why"
    if code == "kernel_dead":
        return KernelDead(text)
    if code == "kernel_failed":
        return KernelStartFailed(text, "")
    if code == "failed":
        return SeerError(text[0].upper() + text[1:] + ("" if text.endswith(".") else "."))
    return SeerError(f"The sandbox refused: {text}.")
