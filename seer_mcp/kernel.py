"""The link to a kernel host: requests that survive a broken line, events that come exactly once."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from asyncio import StreamReader, StreamWriter
from collections.abc import Awaitable, Callable
from typing import Any

from .errors import (
    KernelDead,
    KernelStartFailed,
    SandboxUnreachable,
    SeerError,
)
from .kernel_host.fault import fault_point

Event = dict[str, Any]
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
    ]
)
PING_SECONDS = 15.0
SLICE = 0.005  # seconds of folding after which other tasks get a turn


class Link:
    """Keeps one connection to the host, for as long as the session wants it.

    `on_event` is called once for each event, in order, beginning with number `start`.
    `is_gone` is asked after a failed dial: it returns why the machine is gone for good, or None.
    """

    def __init__(
        self,
        dial: Dial,
        start: int,
        on_event: Callable[[Event], None],
        is_gone: Callable[[], Awaitable[str | None]],
        on_gone: Callable[[str], None],
    ) -> None:
        self._dial = dial
        self._next = start
        self._on_event = on_event
        self._is_gone = is_gone
        self._on_gone = on_gone
        self._ids = itertools.count(1)
        self._waiting: dict[int, tuple[dict[str, Any], asyncio.Future[dict[str, Any]]]] = {}
        self._writer: StreamWriter | None = None
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
        """Ask the host. Raises SandboxUnreachable, or the host's refusal as an error of ours."""
        if self._gone is not None:
            raise SandboxUnreachable(f"The sandbox is gone ({self._gone}).")
        number = next(self._ids)
        message = {"id": number, "op": op, **fields}
        future: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._waiting[number] = (message, future)
        if self._writer is not None:
            self._send(self._writer, message)
        try:
            answer = await asyncio.wait_for(future, timeout)
        except TimeoutError:
            raise SandboxUnreachable(
                f"The sandbox gave no answer to {op!r} in {timeout:.0f} s. Try again; list_sandboxes shows its state."
            ) from None
        finally:
            self._waiting.pop(number, None)
        if answer["ok"]:
            return answer
        raise refusal(answer)

    async def caught_up(self) -> None:
        """Wait until every event that existed when we connected has been folded."""
        await self._caught_up.wait()

    def _send(self, writer: StreamWriter, message: dict[str, Any]) -> None:
        if not writer.is_closing():
            fault_point("link.send")
            writer.write((json.dumps(message) + "\n").encode("ascii"))
            fault_point("link.sent")

    async def _stay_connected(self) -> None:
        pause = 0.05
        while True:
            fault_point("link.dial")
            try:
                reader, writer = await self._dial()
            except SandboxUnreachable:
                if (why := await self._is_gone()) is not None:
                    self._lose(why)
                    return
                await asyncio.sleep(pause)
                pause = min(pause * 2, 5.0)
                continue
            fault_point("link.dialled")
            pause = 0.05
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
            # A host that ends on purpose closes its connections: look before dialling again.
            await asyncio.sleep(0.02)

    async def _talk(self, reader: StreamReader, writer: StreamWriter) -> None:
        self._send(writer, {"id": 0, "op": "subscribe", "from": self._next})
        for message, _ in list(self._waiting.values()):
            self._send(writer, message)
        self._writer = writer
        known = 0
        began = time.monotonic()
        while line := await reader.readline():
            if not line.endswith(b"\n"):
                return
            message: dict[str, Any] = json.loads(line)
            if "n" in message:
                if message["n"] >= self._next:
                    self._next = message["n"] + 1
                    fault_point("event.come")
                    self._on_event(message)
                    fault_point("event.folded")
            elif message["id"] == 0:
                known = message["last"]
            elif (waiting := self._waiting.get(message["id"])) is not None and not waiting[
                1
            ].done():
                waiting[1].set_result(message)
            if self._next > known:
                self._caught_up.set()
            if time.monotonic() - began > SLICE:
                await asyncio.sleep(0)
                began = time.monotonic()

    async def _ping(self, writer: StreamWriter) -> None:
        while True:
            await asyncio.sleep(PING_SECONDS)
            self._send(writer, {"id": next(self._ids), "op": "ping"})

    def _drop_unrepeatable(self) -> None:
        for message, future in self._waiting.values():
            if message["op"] not in REPEATABLE and not future.done():
                future.set_exception(
                    SandboxUnreachable(
                        f"The line to the sandbox broke during {message['op']!r}; look before you repeat it."
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
        for _, future in self._waiting.values():
            if not future.done():
                future.set_exception(SandboxUnreachable(f"The sandbox is gone ({why})."))


def refusal(answer: dict[str, Any]) -> SeerError:
    """The host's "no" as one of our errors."""
    code, text = answer["code"], answer["error"]
    if code == "kernel_dead":
        return KernelDead(text)
    if code == "kernel_failed":
        return KernelStartFailed(text, "")
    if code == "failed":
        return SeerError(text[0].upper() + text[1:] + ("" if text.endswith(".") else "."))
    return SeerError(f"The sandbox refused: {text}.")
