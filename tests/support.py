"""How tests drive the server: through a real client, in memory or over stdio, on real kernels."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
from mcp import Client, StdioServerParameters
from mcp.types import CallToolResult

from seer_mcp.config import Config, from_environment
from seer_mcp.kernel_host.identity import MARK
from seer_mcp.server import build_server


def text_of(result: CallToolResult) -> str:
    return "\n".join(block.text for block in result.content if block.type == "text")


@dataclass
class Lab:
    """A connected client, and where its server keeps things."""

    client: Client
    folder: Path

    async def call(self, tool: str, /, **arguments: Any) -> CallToolResult:
        return await self.client.call_tool(tool, arguments)

    async def ok(self, tool: str, /, **arguments: Any) -> str:
        """The text of a call that must succeed."""
        result = await self.call(tool, **arguments)
        assert not result.is_error, text_of(result)
        return text_of(result)

    async def no(self, tool: str, /, **arguments: Any) -> str:
        """The text of a call that must fail, with isError true."""
        result = await self.call(tool, **arguments)
        assert result.is_error, f"{tool}({arguments}) succeeded: {text_of(result)[:500]}"
        return text_of(result)

    async def start(self, **arguments: Any) -> str:
        """A new sandbox that is ready; its handle."""
        result = await self.call("start_sandbox", **arguments)
        assert not result.is_error, text_of(result)
        if "seer/sandbox" in result.meta:
            return result.meta["seer/sandbox"]["handle"]
        handle = result.meta["seer/starting"]  # the call's wait was over before the start
        for _ in range(30):
            told = (await self.call("list_sandboxes", wait=5)).meta
            if any(each["handle"] == handle for each in told["seer/sandboxes"]):
                return handle
        raise AssertionError(f"{handle} did not start")

    async def cell(self, sandbox: str, source: str, /, **arguments: Any) -> CallToolResult:
        return await self.call("create_cell", sandbox=sandbox, source=source, **arguments)

    async def notebook_path(self, sandbox: str) -> Path:
        result = await self.call("read_notebook", sandbox=sandbox)
        return Path(result.meta["seer/notebook"])


def config_for(folder: Path, **changes: Any) -> Config:
    project = folder / "project"
    project.mkdir(exist_ok=True)
    config = from_environment(os.environ, project, state=str(folder / "state"))
    changes = {
        "project_dir": project,
        "outputs_dir": project / "outputs",
        "on_exit": "stop",
        **changes,
    }
    return Config(**{**config.__dict__, **changes})


@asynccontextmanager
async def open_lab(folder: Path, **changes: Any) -> AsyncIterator[Lab]:
    """A server in this process with a client in memory."""
    async with Client(build_server(config_for(folder, **changes))) as client:
        yield Lab(client, folder)


def stdio_parameters(
    folder: Path, *flags: str, env: dict[str, str] | None = None
) -> StdioServerParameters:
    """How a client would start our server as a process."""
    project = folder / "project"
    project.mkdir(exist_ok=True)
    return StdioServerParameters(
        command=sys.executable,
        args=["-m", "seer_mcp.cli", "stdio", "--state", str(folder / "state"), *flags],
        env={**os.environ, "CLAUDE_PROJECT_DIR": str(project), **(env or {})},
        cwd=str(project),
    )


@asynccontextmanager
async def stdio_lab(folder: Path, *flags: str) -> AsyncIterator[Lab]:
    """Our server as a process, with a client over stdio. Its sandboxes are left as --on-exit says."""
    async with Client(stdio_parameters(folder, *flags)) as client:
        yield Lab(client, folder)


def read_cells(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text())["cells"]


def streams(cell: dict[str, Any], name: str = "stdout") -> str:
    """All text of one stream of a cell as saved in a notebook."""
    return "".join("".join(o["text"]) for o in cell["outputs"] if o.get("name") == name)


def processes_of(handle: str) -> list[psutil.Process]:
    """Living processes of a sandbox."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            if process.status() != psutil.STATUS_ZOMBIE and process.environ().get(MARK) == handle:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


async def until(condition: Callable[[], Any], seconds: float = 10.0) -> Any:
    """Wait for something to become true; fail after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        await asyncio.sleep(0.02)
    raise AssertionError(f"still not true after {seconds} s")
