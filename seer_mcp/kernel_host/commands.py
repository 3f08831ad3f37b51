"""Shell commands in the sandbox, beside the kernel: they work while a cell runs."""

from __future__ import annotations

import asyncio
import codecs
import os
import signal
from typing import Any, Callable, Dict, Set

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
        process = await asyncio.create_subprocess_exec(
            *self._limits.wrap(["/bin/sh", "-c", command]),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            cwd=self._cwd,
            env=self._env,
            start_new_session=True,
        )
        self.running[id] = process
        self._emit(id, {"type": "start"})
        task = asyncio.ensure_future(self._follow(id, process))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _follow(self, id: str, process: asyncio.subprocess.Process) -> None:
        readers = [
            asyncio.ensure_future(self._read(id, "stdout", process.stdout)),
            asyncio.ensure_future(self._read(id, "stderr", process.stderr)),
        ]
        code = await process.wait()
        # A child left in the background holds the pipes open; the command is over all the same.
        await asyncio.wait(readers, timeout=1.0)
        for reader in readers:
            reader.cancel()
        del self.running[id]
        why = "exit code %d" % code if code >= 0 else "signal %d" % -code
        if condemned := self._condemned.pop(id, ""):
            why += "; ended by the kernel host: " + condemned
        self._emit(id, {"type": "end", "code": code, "why": why})

    async def _read(self, id: str, name: str, pipe: Any) -> None:
        decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
        while True:
            data = await pipe.read(65536)
            text = decoder.decode(data, final=not data)
            if text:
                self._emit(id, {"type": "stream", "name": name, "text": text})
            if not data:
                return

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
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)
