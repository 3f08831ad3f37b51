"""Shell commands in the sandbox, beside the kernel: they work while a cell runs."""

from __future__ import annotations

import asyncio
import codecs
import os
import signal
from typing import Any, Callable, Dict, Set

from .kernel import kill_tree

Emit = Callable[[str, Dict[str, Any]], None]


class Commands:
    def __init__(self, cwd: str, env: Dict[str, str], emit: Emit) -> None:
        self._cwd = cwd
        self._env = env
        self._emit = emit
        self.running: Dict[str, asyncio.subprocess.Process] = {}
        self._tasks: Set[asyncio.Task] = set()

    def pids(self) -> Set[int]:
        return {process.pid for process in self.running.values()}

    async def start(self, id: str, command: str) -> None:
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            command,
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

    async def stop_all(self) -> None:
        for process in list(self.running.values()):
            await kill_tree(process.pid)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=2.0)
