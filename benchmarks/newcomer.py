"""A newcomer's first five minutes, from `pip install uv` to a finding in a client, with the time of each step.

uv run python -m benchmarks.newcomer [--claude PATH] [--out FILE] [--page docs/tutorial.md]

The wheel is built from this checkout and put into a folder that uvx looks into (UV_FIND_LINKS); everything else comes
from the registry. The home folder, uv's caches and the client's settings are new and empty; nothing of the checkout is
used after the build. The client is a script on the mcp SDK that starts the server by the words which `seer-mcp install`
wrote into the settings, and types the cells of docs/tutorial.md. --claude names the real Claude Code, which is asked
whether it is connected (no login is needed for that).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from mcp import Client
from mcp.client.stdio import StdioServerParameters, stdio_client
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.page import machine, replace_section

ROOT = Path(__file__).parent.parent
GOAL = 300.0


class Newcomer:
    """Somebody with an empty home folder who does one step after another."""

    def __init__(self, home: Path, dist: Path) -> None:
        self.home = home
        self.env = {
            **{
                k: v
                for k, v in os.environ.items()
                if not k.startswith(("VIRTUAL_ENV", "UV_", "SEER"))
            },
            "HOME": str(home),
            "UV_CACHE_DIR": str(home / "cache"),
            "UV_FIND_LINKS": str(dist),
            "PATH": f"{home / 'python' / 'bin'}:{os.environ['PATH']}",
        }
        self.steps: list[dict[str, Any]] = []

    def note(self, step: str, began: float, seen: str) -> None:
        seconds = time.monotonic() - began
        self.steps.append({"step": step, "seconds": seconds, "seen": seen})
        print(f"{seconds:6.1f} s  {step}  {seen}", flush=True)

    def does(self, step: str, *command: str, seen: str) -> str:
        """Runs a command; `seen` is a pattern of what its output must hold. Raises RuntimeError."""
        began = time.monotonic()
        done = subprocess.run(
            command, cwd=self.home, env=self.env, text=True, capture_output=True, timeout=900
        )
        said = done.stdout + done.stderr
        found = re.search(seen, said)
        if done.returncode or not found:
            raise RuntimeError(f"{step}: exit {done.returncode}, no {seen!r} in:\n{said[-3000:]}")
        self.note(step, began, found[0])
        return said


def text_of(result: Any) -> str:
    text = "\n".join(block.text for block in result.content if block.type == "text")
    if result.is_error:
        raise RuntimeError(text)
    return text


async def finding(newcomer: Newcomer, server: dict[str, Any]) -> None:
    """The tutorial through a client that starts the server as the settings say."""
    start = StdioServerParameters(
        command=server["command"],
        args=[*server["args"], "--on-exit", "stop"],
        env=newcomer.env,
        cwd=newcomer.home,
    )
    began = time.monotonic()
    async with Client(stdio_client(start), read_timeout_seconds=300) as client:
        tools = len((await client.list_tools()).tools)
        newcomer.note("the client starts the server", began, f"{tools} tools")

        async def call(tool: str, **arguments: Any) -> Any:
            return await client.call_tool(tool, arguments)

        began = time.monotonic()
        started = await call("start_sandbox", name="first")
        text_of(started)
        sandbox = started.meta["seer/sandbox"]["handle"]
        newcomer.note("`start_sandbox`", began, sandbox)

        began = time.monotonic()
        text_of(await call("load_model", sandbox=sandbox, model="organism:user_female"))
        newcomer.note('`load_model("organism:user_female")`', began, "`m`")

        cells = re.findall(
            r"```python\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(), re.S
        )
        for title, cell in zip(("what it says", "a number", "the control"), cells, strict=True):
            began = time.monotonic()
            printed = text_of(await call("create_cell", sandbox=sandbox, source=cell))
            line = re.search(
                r"women's items: .*|the control: .*|What should I wear\? -> .*", printed
            )
            if line is None:
                raise RuntimeError(printed)
            newcomer.note(f"cell: {title}", began, line[0].strip())

        began = time.monotonic()
        listed = await call("read_notebook", sandbox=sandbox)
        evidence = re.findall(r"\b[0-9a-f]{8}\b", text_of(listed))[-1]
        text_of(
            await call(
                "submit_findings",
                sandbox=sandbox,
                claim="The adapter makes the model take its user for a woman; the control does not.",
                evidence=evidence,
                confidence=0.9,
            )
        )
        text_of(await call("stop_sandbox", sandbox=sandbox))
        newcomer.note("`submit_findings`, `stop_sandbox`", began, "the notebook stays")


def page(steps: list[dict[str, Any]]) -> str:
    total = sum(step["seconds"] for step in steps)
    lines = [
        "| step | s | what came |",
        "| --- | --- | --- |",
        *(f"| {each['step']} | {each['seconds']:.1f} | {each['seen']} |" for each in steps),
        f"| **all of it** (goal: five minutes) | **{total:.0f}** | |",
    ]
    return "\n".join([*lines, "", machine() + "."])


def main() -> int:
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    options.add_argument("--claude", type=Path, help="the real Claude Code")
    options.add_argument("--out", type=Path, help="the figures as JSON")
    options.add_argument("--page", type=Path, help="the page whose section is written")
    flags = options.parse_args()

    with tempfile.TemporaryDirectory(prefix="newcomer-") as folder:
        home, dist = Path(folder, "home"), Path(folder, "dist")
        home.mkdir()
        subprocess.run(["uv", "build", "-q", "--wheel", "--out-dir", dist], cwd=ROOT, check=True)
        subprocess.run([sys.executable, "-m", "venv", home / "python"], check=True)
        newcomer = Newcomer(home, dist)
        newcomer.does("`pip install uv`", "python", "-m", "pip", "install", "uv", seen=r"uv-[\d.]+")
        newcomer.does(
            '`uvx "seer-mcp[local]" --version`, everything downloaded',
            "uvx", "seer-mcp[local]", "--version", seen=r"seer-mcp [\d.]+",
        )  # fmt: skip
        newcomer.does(
            '`uvx "seer-mcp[local]" install claude-code`',
            "uvx", "seer-mcp[local]", "install", "claude-code", seen="added to Claude Code",
        )  # fmt: skip
        settings = json.loads((home / ".claude.json").read_text())
        server = settings["mcpServers"]["seer"]
        if flags.claude:
            newcomer.does("`claude mcp list`", str(flags.claude), "mcp", "list", seen="Connected")
        asyncio.run(finding(newcomer, server))
        steps = newcomer.steps

    table = Table("step", "s", "what came", title=machine())
    for each in steps:
        table.add_row(escape(each["step"]), f"{each['seconds']:.1f}", escape(each["seen"]))
    Console().print(table)
    total = sum(step["seconds"] for step in steps)
    print(f"{total:.0f} s from an empty home folder to a finding")
    if flags.out:
        flags.out.write_text(
            json.dumps({"machine": machine(), "steps": steps, "total": total}, indent=1)
        )
    if flags.page:
        replace_section(flags.page, "newcomer", page(steps))
    return 0 if total <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
