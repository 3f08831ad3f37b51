"""`seer-mcp serve` as a process of its own, clients that call it, and what the processes take."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import psutil

from ..faults.ground import TOKEN, Endpoint, Ground

VERSION = "2026-07-28"
ANSWER_SECONDS = 120.0  # no call may take longer, whatever happens to the server meanwhile


class Broken(Exception):
    """The line to the server broke during a call: it may have been carried out or not."""


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


class ServerProcess(Endpoint):
    """The server at one port, in one process after the other."""

    def __init__(self, ground: Ground, *flags: str, on_exit: str = "keep") -> None:
        super().__init__(ground.folder, free_port())
        token = ground.folder / "token"
        token.write_text(TOKEN)
        self.ground = ground
        self.generation = 0
        self.process: subprocess.Popen[bytes] | None = None
        self._command = [
            *(sys.executable, "-m", "seer_mcp.cli", "serve", "--port", str(self.port)),
            *("--token-file", str(token), "--state", str(ground.folder / "state")),
            *("--on-exit", on_exit, *flags),
        ]

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    async def start(self) -> float:
        """Start the process; seconds until it answers."""
        began = time.monotonic()
        environment = {
            **os.environ,
            "CLAUDE_PROJECT_DIR": str(self.ground.project),
            "XDG_RUNTIME_DIR": str(self.ground.sockets),
        }
        with (self.ground.folder / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                cwd=self.ground.project,
                start_new_session=True,
            )
        self.generation += 1
        while time.monotonic() - began < 60:
            assert self.process.poll() is None, (self.ground.folder / "server.log").read_text()
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return time.monotonic() - began
        raise AssertionError("the server did not answer within 60 s")

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait(10)

    def end(self) -> int:
        """SIGTERM; the exit code."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        return self.process.wait(20)


class Caller:
    """Calls tools without a session: one POST each, as clients of the 2026 protocol do."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._ids = itertools.count(1)
        self._http = httpx2.AsyncClient(
            timeout=httpx2.Timeout(10, read=ANSWER_SECONDS),
            limits=httpx2.Limits(max_connections=None, max_keepalive_connections=20),
        )

    async def close(self) -> None:
        await self._http.aclose()

    async def call(self, tool: str, /, **arguments: Any) -> dict[str, Any]:
        """The result of a tool call. Raises Broken."""
        number = next(self._ids)
        body, headers = request(number, tool, arguments)
        try:
            answer = await self._http.post(self._url, json=body, headers=headers)
        except httpx2.HTTPError as error:
            raise Broken(f"{tool}: {type(error).__name__}: {error}") from error
        message = message_of(answer.text, number)
        if message is None:
            raise Broken(f"{tool}: HTTP {answer.status_code}: {answer.text[:200]}")
        assert "result" in message, message
        return message["result"]


def request(
    number: int, tool: str, arguments: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    """Body and headers of the POST that calls a tool."""
    prefix = "io.modelcontextprotocol"
    meta = {
        f"{prefix}/protocolVersion": VERSION,
        f"{prefix}/clientInfo": {"name": "load", "version": "1"},
        f"{prefix}/clientCapabilities": {},
    }
    body = {
        "jsonrpc": "2.0",
        "id": number,
        "method": "tools/call",
        "params": {"name": tool, "arguments": arguments, "_meta": meta},
    }
    headers = {
        "Authorization": f"Bearer {TOKEN}",
        "Accept": "application/json, text/event-stream",
        "Content-Type": "application/json",
        "MCP-Protocol-Version": VERSION,
        "Mcp-Method": "tools/call",
        "Mcp-Name": tool,
    }
    return body, headers


def message_of(text: str, number: int) -> dict[str, Any] | None:
    """The answer with that number in a body of JSON or of events."""
    lines = [line[5:] for line in text.splitlines() if line.startswith("data:")] or [text]
    for line in lines:
        try:
            message = json.loads(line)
        except ValueError:
            continue
        if message.get("id") == number and "method" not in message:
            return message
    return None


def texts(result: dict[str, Any]) -> list[str]:
    return [block["text"] for block in result["content"] if block["type"] == "text"]


def meta(result: dict[str, Any], key: str) -> Any:
    return (result.get("_meta") or {}).get(f"seer/{key}")


@dataclass(frozen=True)
class Memory:
    """Of several processes together, in bytes. PSS counts shared pages once."""

    processes: int
    rss: int
    pss: int


def memory_of(processes: list[psutil.Process]) -> Memory:
    count = rss = pss = 0
    for process in processes:
        try:
            rss += process.memory_info().rss
            rollup = Path(f"/proc/{process.pid}/smaps_rollup")
            if rollup.exists():
                line = next(x for x in rollup.read_text().splitlines() if x.startswith("Pss:"))
                pss += int(line.split()[1]) * 1024
        except (psutil.NoSuchProcess, ProcessLookupError, FileNotFoundError):
            continue
        count += 1
    return Memory(count, rss, pss)


def percentile(samples: list[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))]
