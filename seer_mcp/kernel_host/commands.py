"""Shell commands in the sandbox, beside the kernel: they work while a cell runs."""

from __future__ import annotations

import asyncio
import codecs
import os
import signal
from typing import Any, Callable, Coroutine, Dict, List, Set

from .kernel import kill_tree
from .limits import Limits

Emit = Callable[[str, Dict[str, Any]], None]


class Commands:
    def __init__(self, cwd: str, env: Dict[str, str], limits: Limits, emit: Emit) -> None:
        self._cwd = cwd
        self._env = env
        self._limits = limits
        self._condemned: Dict[str, str] = {}
        self._emit = emit
        self.running: Dict[str, asyncio.subprocess.Process] = {}
        self._tasks: Set[asyncio.Task] = set()

    def pids(self) -> Set[int]:
        return {process.pid for process in self.running.values()}

    async def start(self, id: str, command: str) -> None:
        # Pipes of our own: with asyncio's a command would not be over while a child in the
        # background holds them open.
        out, err = os.pipe(), os.pipe()
        try:
            process = await asyncio.create_subprocess_exec(
                *self._limits.wrap(["/bin/sh", "-c", command]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=out[1],
                stderr=err[1],
                cwd=self._cwd,
                env=self._env,
                start_new_session=True,
            )
        except BaseException:
            os.close(out[0])
            os.close(err[0])
            raise
        finally:
            os.close(out[1])
            os.close(err[1])
        self.running[id] = process
        self._emit(id, {"type": "start"})
        readers = [
            self._spawn(self._read(id, "stdout", out[0])),
            self._spawn(self._read(id, "stderr", err[0])),
        ]
        self._spawn(self._follow(id, process, readers))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _follow(
        self, id: str, process: asyncio.subprocess.Process, readers: "List[asyncio.Task[None]]"
    ) -> None:
        code = await process.wait()
        # What a child in the background prints after this comes late, and still belongs to it.
        await asyncio.wait(readers, timeout=1.0)
        del self.running[id]
        why = "exit code %d" % code if code >= 0 else "signal %d" % -code
        if condemned := self._condemned.pop(id, ""):
            why += "; ended by the kernel host: " + condemned
        self._emit(id, {"type": "end", "code": code, "why": why})

    async def _read(self, id: str, name: str, descriptor: int) -> None:
        pipe = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(pipe), os.fdopen(descriptor, "rb", 0)
        )
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        try:
            while True:
                data = await pipe.read(65536)
                text = decoder.decode(data, final=not data)
                if text:
                    self._emit(id, {"type": "stream", "name": name, "text": text})
                if not data:
                    return
        finally:
            transport.close()

    def interrupt(self, id: str) -> None:
        process = self.running.get(id)
        if process:
            os.killpg(process.pid, signal.SIGINT)

    async def condemn(self, why: str) -> None:
        """End all, because together they are over a limit."""
        for id, process in list(self.running.items()):
            self._condemned[id] = why
            await kill_tree(process.pid)

    async def stop_all(self) -> None:
        for process in list(self.running.values()):
            await kill_tree(process.pid)
        for _ in range(100):
            if not self.running:
                break
            await asyncio.sleep(0.02)
        for task in self._tasks:  # readers of what a child in the background still holds
            task.cancel()
