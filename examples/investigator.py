"""What the scripted investigators share: a client of the `mcp` SDK that sees what any client would see.

It starts the server as a process, speaks MCP over stdio, runs cells, reads the lines `FINDING {json}`
that they print, and submits its findings. No model and no key is needed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from mcp import Client, StdioServerParameters

FINDING = "FINDING "
HERE = Path(__file__).parent


class Failed(Exception):
    """A call did not answer as it must."""


class Investigator:
    """A client with one sandbox."""

    def __init__(self, client: Client, sandbox: dict[str, Any]) -> None:
        self.client = client
        self.sandbox = sandbox["handle"]
        self.notebook = sandbox["notebook"]
        self.last_cell = ""
        self.said = ""

    async def call(self, tool: str, /, **arguments: Any) -> Any:
        result = await self.client.call_tool(tool, arguments)
        self.said = "\n".join(block.text for block in result.content if block.type == "text")
        if result.is_error:
            raise Failed(f"{tool}: {self.said}")
        return result

    async def cell(self, source: str) -> dict[str, Any]:
        """Write and run a code cell; what it found. Its id is last_cell."""
        result = await self.call("create_cell", sandbox=self.sandbox, source=source)
        run = result.meta["seer/run"]
        self.last_cell = run["cell"]
        while run["state"] in ("queued", "running"):  # one call waits 45 s at most
            result = await self.call("read_outputs", sandbox=self.sandbox, run=run["id"])
            run = result.meta["seer/run"]
        found: dict[str, Any] = {}
        for line in self.said.splitlines():
            if line.startswith(FINDING):
                found |= json.loads(line.removeprefix(FINDING))
        return found

    async def examine(self, name: str, *steps: str) -> tuple[dict[str, Any], list[str]]:
        """All steps, with {name} filled in, on one model: every number that they found, and the cells."""
        await self.note(f"## `{name}`")
        found: dict[str, Any] = {}
        cells: list[str] = []
        for step in steps:
            found |= await self.cell(step.format(name=name))
            cells.append(self.last_cell)
        return found, cells

    async def note(self, text: str) -> None:
        """Write a markdown cell."""
        await self.call("create_cell", sandbox=self.sandbox, source=text, type="markdown")

    async def submit(self, claim: str, **arguments: Any) -> dict[str, Any]:
        """Submit findings; what the server says of them."""
        result = await self.call("submit_findings", sandbox=self.sandbox, claim=claim, **arguments)
        return result.meta["seer/findings"]


@asynccontextmanager
async def investigating(
    name: str, by_a_client: Mapping[str, str] | None = None
) -> AsyncIterator[Investigator]:
    """Start the server and a sandbox of an investigation, with its opening cells run; end both.

    by_a_client: configurations that the script cannot do, and why; they are refused before anything is started.
    """
    flags = argparse.ArgumentParser()
    flags.add_argument(
        "--configuration", default="", help="another configuration of the investigation, as gpu"
    )
    flags.add_argument("--outputs", metavar="DIR", help="where the notebook is saved")
    given = flags.parse_args()
    if why := (by_a_client or {}).get(given.configuration):
        flags.error(
            f"--configuration {given.configuration}: {why}. Have a client work on it: "
            f'start_sandbox(investigation="{name}/{given.configuration}")'
        )
    outputs = ["--outputs", str(Path(given.outputs).absolute())] if given.outputs else []
    server = StdioServerParameters(
        command=sys.executable,
        args=["-m", "seer_mcp.cli", "stdio", "--on-exit", "stop", *outputs],
        env={**os.environ},
    )
    asked = f"{name}/{given.configuration}" if given.configuration else name
    async with Client(server) as client:
        who = await _started(client, asked)
        try:
            yield who
        finally:
            await who.call("stop_sandbox", sandbox=who.sandbox)


async def _started(client: Client, asked: str) -> Investigator:
    result = await client.call_tool("start_sandbox", {"investigation": asked})
    text = "\n".join(block.text for block in result.content if block.type == "text")
    if result.is_error:
        raise Failed(text)
    meta = result.meta or {}
    while "seer/sandbox" not in meta:  # it waits for a machine: a GPU, say
        handle = meta["seer/starting"]
        told = (await client.call_tool("list_sandboxes", {"wait": 45})).meta or {}
        ready = [each for each in told["seer/sandboxes"] if each["handle"] == handle]
        waiting = [each for each in told["seer/starting"] if each["handle"] == handle]
        if ready:
            meta = {"seer/sandbox": ready[0]}
        elif not waiting or waiting[0]["failed"]:
            raise Failed(waiting[0]["failed"] if waiting else f"{handle} did not start")
    who = Investigator(client, meta["seer/sandbox"])
    await who.cell("pass  # waits for the cells that load the models")
    await who.call("delete_cell", sandbox=who.sandbox, cell=who.last_cell)
    return who


def report(**facts: Any) -> None:
    """The result of a run as one line of JSON, for whoever started it."""
    print(json.dumps(facts))
