"""What the fault tests stand on: HTTP servers, raw stdio servers, and a count of what is left over."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from queue import Empty, Queue
from typing import Any

import httpx2
import psutil
import uvicorn
from mcp import Client
from mcp.client.streamable_http import streamable_http_client

from seer_mcp.backends.local import LocalBackend
from seer_mcp.http import Serving, build_app
from seer_mcp.http.slow import Prompt
from seer_mcp.kernel_host.identity import MARK
from seer_mcp.kernel_host.limits import remove

from ..support import Lab, config_for, stdio_parameters

TOKEN = "a-token-for-tests-0123456789"
ERAS = ("legacy", "auto")


class Ground:
    """A folder for one server, with a socket folder of its own, and what is left in them."""

    def __init__(self, folder: Path, sockets: Path) -> None:
        self.folder = folder
        self.sockets = sockets

    @property
    def project(self) -> Path:
        return self.folder / "project"

    def config(self, **changes: Any) -> Any:
        return config_for(self.folder, **{"runtime_dir": self.sockets, **changes})

    def processes(self) -> list[psutil.Process]:
        """Every living process of any sandbox that was started from here."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            try:
                environ = process.environ()
                ours = MARK in environ and str(self.folder) in environ.get("PYTHONPATH", "")
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
        return found

    def files(self) -> set[str]:
        """Records, sockets, notebooks and empty folders, by path."""
        roots = (self.folder / "state" / "sandboxes", self.sockets, self.project)
        # os.walk passes over a folder that vanishes meanwhile; Path.rglob would raise.
        walks = (walk for root in roots for walk in os.walk(root))
        return {
            os.path.join(folder, n) for folder, folders, files in walks for n in folders + files
        }

    def kill_all(self) -> None:
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        # A host that was killed cannot remove its control groups.
        ours = LocalBackend(self.config())._group("")
        remove(
            os.path.join(folder, name)  # os.walk passes over what vanishes meanwhile
            for folder, names, _ in os.walk("/sys/fs/cgroup")
            for name in names
            if name.startswith(ours)
        )


@contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    """Whatever a test leaves running here is ended with it."""
    (folder / "project").mkdir(exist_ok=True)
    sockets = Path(tempfile.mkdtemp(prefix="seer-t-"))
    made = Ground(folder, sockets)
    try:
        yield made
    finally:
        made.kill_all()
        shutil.rmtree(sockets, ignore_errors=True)


# -- HTTP -------------------------------------------------------------------------------------


class Endpoint:
    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self.port = port
        self.url = f"http://127.0.0.1:{port}/mcp"
        self.register: Any = None
        """That of a server in this process, and what it answers."""
        self.routes: list[Any] = []

    @asynccontextmanager
    async def lab(
        self, mode: Any = "auto", token: str = TOKEN, **options: Any
    ) -> AsyncIterator[Lab]:
        headers = {"Authorization": f"Bearer {token}"}
        async with (
            httpx2.AsyncClient(headers=headers, timeout=60.0) as http,
            Client(
                streamable_http_client(self.url, http_client=http), mode=mode, **options
            ) as client,
        ):
            yield Lab(client, self.folder)


@asynccontextmanager
async def http_server(config: Any, **serving: Any) -> AsyncIterator[Endpoint]:
    """`seer-mcp serve` in this process, on a free port of the loopback, with TOKEN or as `serving` says."""
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    app = build_app(config, Serving("127.0.0.1", port, **(serving or {"token": TOKEN})))
    settings = uvicorn.Config(
        app, log_level="error", timeout_graceful_shutdown=1, lifespan="on", http=Prompt, ws="none"
    )
    server = uvicorn.Server(settings)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with asyncio.timeout(20):
            while not server.started:
                assert not task.done(), "the HTTP server ended at once"
                await asyncio.sleep(0.01)
        endpoint = Endpoint(config.project_dir.parent, port)
        endpoint.register = app.state.seer.register
        endpoint.routes = app.routes
        yield endpoint
    finally:
        server.should_exit = True
        async with asyncio.timeout(30):
            await task
        listener.close()


# -- stdio, byte by byte ----------------------------------------------------------------------


class RawServer:
    """Our server as a process in a session of its own, spoken to in lines of JSON.

    `before`: code that runs in it first, to shorten what would take a test too long.
    """

    def __init__(
        self, ground: Ground, *flags: str, env: dict[str, str] | None = None, before: str = ""
    ) -> None:
        parameters = stdio_parameters(
            ground.folder, *flags, env={"XDG_RUNTIME_DIR": str(ground.sockets), **(env or {})}
        )
        if before:
            code = f"{before}\nimport sys\nfrom seer_mcp.cli import main\nsys.exit(main())"
            parameters.args = ["-c", code, *parameters.args[2:]]
        self.log = (ground.folder / "server.log").open("ab")
        self.process = subprocess.Popen(
            [parameters.command, *parameters.args],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            env=parameters.env,
            cwd=parameters.cwd,
            start_new_session=True,
        )
        self.lines: list[bytes] = []
        self._queue: Queue[dict[str, Any]] = Queue()
        self._number = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)
            with contextlib.suppress(ValueError):
                self._queue.put(json.loads(line))

    def send(self, method: str, *, notify: bool = False, **params: Any) -> int:
        message: dict[str, Any] = {"jsonrpc": "2.0", "method": method, "params": params}
        if not notify:
            self._number += 1
            message["id"] = self._number
        assert self.process.stdin is not None
        self.process.stdin.write((json.dumps(message) + "\n").encode())
        self.process.stdin.flush()
        return self._number

    def answer(self, number: int, seconds: float = 30.0) -> dict[str, Any]:
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            try:
                message = self._queue.get(timeout=left)
            except Empty:
                break
            if message.get("id") == number and "method" not in message:
                return message
        raise AssertionError(f"no answer to request {number} in {seconds} s")

    def begin(self) -> None:
        self.answer(
            self.send(
                "initialize",
                protocolVersion="2025-06-18",
                capabilities={},
                clientInfo={"name": "raw", "version": "1"},
            )
        )
        self.send("notifications/initialized", notify=True)

    def call(self, tool: str, /, **arguments: Any) -> dict[str, Any]:
        answer = self.answer(self.send("tools/call", name=tool, arguments=arguments))
        return answer["result"]

    def ended_in(self, seconds: float) -> float:
        """How long the process still took to end; fails after `seconds`."""
        began = time.monotonic()
        self.process.wait(seconds)
        return time.monotonic() - began

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(10)
        self._reader.join(10)
        for pipe in (self.process.stdin, self.process.stdout, self.log):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


@contextmanager
def raw_server(
    ground: Ground, *flags: str, env: dict[str, str] | None = None, before: str = ""
) -> Iterator[RawServer]:
    server = RawServer(ground, *flags, env=env, before=before)
    try:
        server.begin()
        yield server
    finally:
        server.close()


def raw_text(result: dict[str, Any]) -> str:
    return "\n".join(block["text"] for block in result["content"] if block["type"] == "text")


def raw_start(server: RawServer, **arguments: Any) -> str:
    result = server.call("start_sandbox", **arguments)
    assert not result.get("isError"), raw_text(result)
    return result["_meta"]["seer/sandbox"]["handle"]
