"""One sandbox at Modal: reach its host, copy files, end it and make sure of that."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import time
from asyncio import StreamReader, StreamWriter
from contextlib import suppress
from pathlib import Path
from typing import Any

import modal
import modal.exception
from modal.stream_type import StreamType

from ...errors import BadInput, EndUnconfirmed, NotFound, SandboxUnreachable, SeerError
from .. import Record
from ..hosting import LINE_LIMIT, There
from .account import ASK_SECONDS, BROKEN, said, unreachable, why
from .bridge import Bridge, open_streams
from .image import CODE, WORK

THERE = There("/seer/host", "/seer/run", WORK, f"{CODE}/packs")
PYTHON = ("python", "-B", "-m")
ENV = {"PYTHONPATH": CODE}
SILENCE_SECONDS = 60.0
DIAL_SECONDS = 20.0
POLITE_SECONDS = 5.0  # for the host to hear that it is to close
CLOSING_SECONDS = 30.0  # for it to close, and to keep its journal
END_SECONDS = 60.0
POLL_SECONDS = 0.25
LOG_SECONDS = 3.0
TIMED_OUT, TERMINATED = 124, 137  # Modal's own exit codes
COPY_PIECE = 1 << 20
SNAPSHOT_SECONDS = 300


class ModalSandbox:
    """`there` is modal's own Sandbox."""

    def __init__(self, record: Record, there: Any) -> None:
        self._record = record
        self._handle = str(record["handle"])
        self._there = there
        self._log = ""
        self._ending: asyncio.Task[None] | None = None
        self._first: tuple[StreamReader, StreamWriter] | None = None

    # -- the line -------------------------------------------------------------------------------

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        if self._first is not None:
            (reader, writer), self._first = self._first, None
            if not reader.at_eof() and not writer.is_closing():
                return reader, writer
        return await self._dial(0.0, DIAL_SECONDS)

    async def await_host(self, patience: float) -> None:
        """Wait for a host that is starting; the first dial() gets this line.

        Raises SandboxUnreachable if it does not come, or has ended.
        """
        self._first = await self._dial(patience, patience + DIAL_SECONDS)

    async def _dial(self, patience: float, limit: float) -> tuple[StreamReader, StreamWriter]:
        writer: StreamWriter | None = None
        try:
            async with asyncio.timeout(limit):
                process = await self._exec(
                    "kernel_host.attach", THERE.socket, str(SILENCE_SECONDS), str(patience)
                )
                reader, writer = open_streams(process, LINE_LIMIT)
                if await reader.readline() == b"\n":
                    return reader, writer
        except BROKEN as error:
            if writer is not None:
                writer.close()
            raise unreachable(self._handle, error) from error
        except BaseException:
            if writer is not None:
                writer.close()
            raise
        writer.close()
        raise SandboxUnreachable(f"Sandbox {self._handle} does not answer: its host is not there.")

    async def _exec(self, module: str, *arguments: str) -> Any:
        return await self._there.exec.aio(
            *PYTHON, module, *arguments, env=ENV, stderr=StreamType.DEVNULL, text=False
        )

    # -- files ----------------------------------------------------------------------------------

    async def put(self, local: Path, remote: str) -> None:
        try:
            info = local.stat()
        except FileNotFoundError:
            raise NotFound("file", str(local)) from None
        if not stat.S_ISREG(info.st_mode):
            raise BadInput("local", str(local), "it is not a file")
        mode = 0o755 if info.st_mode & stat.S_IXUSR else 0o644
        with local.open("rb") as file:
            async with Transfer(self, "put", remote, mode=mode, size=info.st_size) as transfer:
                left = info.st_size
                while left and (data := file.read(min(left, COPY_PIECE))):
                    left -= len(data)
                    if not await transfer.send(data):
                        break  # refused: the answer says why
                await transfer.answer()

    async def get(self, remote: str, local: Path) -> None:
        if local.is_dir():
            raise BadInput("local", str(local), "it is a folder; name a file in it")
        async with Transfer(self, "get", remote) as transfer:
            answer = await transfer.answer()
            local.parent.mkdir(parents=True, exist_ok=True)
            part = local.parent / f".{local.name[:40]}.{time.monotonic_ns()}.part"
            try:
                left = int(answer["size"])
                with part.open("wb") as file:
                    while left and (data := await transfer.reader.read(min(left, COPY_PIECE))):
                        file.write(data)
                        left -= len(data)
                if left:
                    raise SandboxUnreachable(
                        f"The line to sandbox {self._handle} broke while {remote} came. Try again."
                    )
                part.chmod(0o755 if answer["mode"] & stat.S_IXUSR else 0o644)
                os.replace(part, local)
            except BaseException:
                part.unlink(missing_ok=True)
                raise

    # -- the end --------------------------------------------------------------------------------

    async def terminate(self, politely: bool = True) -> None:
        """`politely`: the host is asked first, so that it keeps its journal and its last words."""
        if self._ending is None or (self._ending.done() and not _went_well(self._ending)):
            self._ending = asyncio.create_task(self._terminate(politely))
        await asyncio.shield(self._ending)

    async def _terminate(self, politely: bool) -> None:
        if self._first is not None:
            self._first[1].close()
        if politely:
            with suppress(*BROKEN, SeerError):  # what follows ends it anyway
                await self._ask_to_stop()
        end = time.monotonic() + END_SECONDS
        pause, error = POLL_SECONDS, ""
        while time.monotonic() < end:
            try:
                async with asyncio.timeout(ASK_SECONDS):
                    if await self._there.poll.aio() is not None:
                        return
                    await self._there.terminate.aio()
                    if await self._there.poll.aio() is not None:
                        return
                error = "it still runs"
            except modal.exception.NotFoundError:
                return
            except BROKEN as failure:
                error = why(failure)
            await asyncio.sleep(pause)
            pause = min(pause * 2, 5.0)
        raise EndUnconfirmed(self._handle, str(self._record["id"]), error)

    async def _ask_to_stop(self) -> None:
        async with asyncio.timeout(POLITE_SECONDS):
            if await self._there.poll.aio() is not None:
                return
            reader, writer = await self._dial(0.0, POLITE_SECONDS)
        try:
            async with asyncio.timeout(POLITE_SECONDS):
                writer.write(b'{"id": 1, "op": "stop", "why": "stopped"}\n')
                while await reader.readline():
                    pass
        finally:
            writer.close()
        async with asyncio.timeout(CLOSING_SECONDS):
            while await self._there.poll.aio() is None:
                await asyncio.sleep(POLL_SECONDS)

    # -- the rest -------------------------------------------------------------------------------

    async def why_gone(self) -> str:
        try:
            code = await self.ended()
        except BROKEN as error:
            return f"its machine ended, and Modal cannot be asked why now: {said(error)}"
        if code == TIMED_OUT:
            return "Modal ended its machine: its time limit was over"
        if code == TERMINATED:
            return (
                "its machine was ended from outside: Modal took it away, or somebody ended it there"
            )
        return f"its kernel host ended with {code}, and its machine with it"

    async def snapshot(self) -> str:
        try:
            image = await self._there.snapshot_filesystem.aio(timeout=SNAPSHOT_SECONDS)
        except BROKEN as error:
            raise unreachable(self._handle, error) from error
        return str(image.object_id)

    def record(self) -> Record:
        return self._record

    def log(self) -> str:
        return self._log

    async def ended(self) -> int | None:
        """Its exit code, or None while it runs. Raises modal's errors."""
        async with asyncio.timeout(ASK_SECONDS):
            return await self._there.poll.aio()

    async def read_log(self) -> str:
        """What the host wrote before it ended; also what log() says from now on."""

        async def read(stream: Any) -> str:
            try:
                async with asyncio.timeout(LOG_SECONDS):
                    return await stream.read.aio()
            except BROKEN as error:
                return f"(its log cannot be read: {said(error)})"

        texts = await asyncio.gather(read(self._there.stdout), read(self._there.stderr))
        self._log = "\n".join(text for text in texts if text.strip())[-8000:]
        return self._log


class Ending:
    """Ends machines that help a start; those whose end is not confirmed are kept until it is."""

    def __init__(self) -> None:
        self._left: dict[str, ModalSandbox] = {}

    async def end(self, name: str, there: Any) -> None:
        """Raises EndUnconfirmed."""
        self._left[name] = ModalSandbox({"handle": name, "id": there.object_id}, there)
        await asyncio.shield(self._left[name].terminate(politely=False))
        self._left.pop(name, None)

    async def again(self) -> None:
        """End what is left. Raises EndUnconfirmed."""
        for name, sandbox in list(self._left.items()):
            await sandbox.terminate(politely=False)
            self._left.pop(name, None)


class Transfer:
    """One run of kernel_host.transfer in the sandbox, as a context."""

    def __init__(self, sandbox: ModalSandbox, what: str, path: str, **more: Any) -> None:
        self._sandbox = sandbox
        self._what = what
        self._path = path
        self._asked = {"path": path, **more}

    async def __aenter__(self) -> Transfer:
        try:
            async with asyncio.timeout(DIAL_SECONDS):
                process = await self._sandbox._exec(  # pyright: ignore[reportPrivateUsage]
                    "kernel_host.transfer", THERE.config, self._what, json.dumps(self._asked)
                )
        except BROKEN as error:
            raise unreachable(self._sandbox.record()["handle"], error) from error
        self.reader, self._writer = open_streams(process, LINE_LIMIT)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        transport = self._writer.transport
        if isinstance(transport, Bridge):
            await transport.wait_closed()

    async def send(self, data: bytes) -> bool:
        """False if the other side takes no more."""
        if self.reader.at_eof() or self._writer.is_closing():
            return False
        try:
            self._writer.write(data)
            await self._writer.drain()
        except ConnectionError:
            return False
        return True

    async def answer(self) -> dict[str, Any]:
        """Raises BadInput, or an error that says what the sandbox's disk says."""
        handle = self._sandbox.record()["handle"]
        try:
            line = await self.reader.readline()
        except ConnectionError as error:
            raise unreachable(handle, error) from error
        if not line.endswith(b"\n"):
            raise SandboxUnreachable(
                f"The line to sandbox {handle} broke during {self._what} of {self._path}. Try again."
            )
        answer: dict[str, Any] = json.loads(line)
        if not answer["ok"]:
            if answer["code"] == "refused":
                raise BadInput("remote", self._path, answer["error"])
            raise SeerError(f"{self._path} in sandbox {handle}: {answer['error']}.")
        return answer


def _went_well(task: asyncio.Task[None]) -> bool:
    return not task.cancelled() and task.exception() is None
