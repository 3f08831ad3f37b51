"""Tools: start, list and stop sandboxes; restart and interrupt their kernels."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult

from ..environment import SandboxSpec
from ..errors import BadInput, SandboxUnreachable
from ..notebook import UNFINISHED
from ..render import Answer
from ..sessions import Register, Session
from .answers import call, notes, run_meta, seconds
from .seam import Gigabytes, Minutes, heartbeat, owner, tool


def sandbox_meta(session: Session) -> dict[str, Any]:
    return {
        "handle": session.handle,
        "name": session.name,
        "backend": session.backend_name,
        "notebook": str(session.notebook.path),
        "ended": session.ended,
        "kernel": session.kernel_state,
        "cells": None if session.unread else len(session.notebook.cells),
    }


async def described(session: Session) -> str:
    """A sandbox in two lines: state, and where its notebook is."""
    if session.ended is not None:
        return f"{session.handle}: ended ({session.ended})\n    notebook {session.notebook.path}{notes(session)}"
    try:
        status = await session.status()
    except SandboxUnreachable as error:
        return f"{session.handle}: {error}\n    notebook {session.notebook.path}"
    running = [c.id for c in session.notebook.cells if c.state in UNFINISHED]
    kernel = status["kernel"] + (f" ({status['how']})" if status["how"] else "")
    busy = f"; running or queued: {', '.join(running)}" if running else ""
    busy += f"; commands: {', '.join(status['commands'])}" if status["commands"] else ""
    left = ""
    if status["idle_limit"] and not busy:
        left = f"; ends itself after {seconds(status['idle_limit'] - status['idle_for'])} more without use"
    if (limits := status.get("limits")) and limits["memory"]:
        busy += f"; memory limit {limits['memory']} MiB ({limits['means']})"
    up = seconds(time.time() - session.created)
    return (
        f"{session.handle}: {session.backend_name}, up {up}, kernel {kernel}{busy}{left}\n"
        f"    notebook {session.notebook.path} ({len(session.notebook.cells)} cells){notes(session)}"
    )


def tools(register: Register) -> list[Tool]:
    async def start_sandbox(
        context: Context[Any, Any],
        name: str = "",
        backend: str = "local",
        notebook: str = "",
        fork: bool = False,
        python: str = "",
        idle_minutes: Minutes = 0,
        memory_gb: Gigabytes = 0,
    ) -> CallToolResult:
        """Start a sandbox: a machine with an IPython kernel, and a notebook that records everything. Returns the
        handle that other tools take as `sandbox`. notebook: open an existing .ipynb (runs nothing); fork: work on a
        copy. python: another interpreter (needs ipykernel). memory_gb: limit. Tool packs are importable in it: see
        list_techniques."""
        if 0 < memory_gb < 0.25:
            raise BadInput("memory_gb", memory_gb, "a kernel needs 0.25 or more; 0 sets no limit")
        beat = heartbeat(context)
        spec = SandboxSpec(
            backend=backend,
            python=python or None,
            idle_limit=idle_minutes * 60 or None,
            memory=round(memory_gb * 1024) or None,
        )
        reports: asyncio.Queue[str] = asyncio.Queue()
        teller = asyncio.create_task(tell(reports, beat))
        began = time.monotonic()
        try:
            session = await register.start(owner(), name, spec, notebook, fork, reports.put_nowait)
        finally:
            teller.cancel()
        cells = len(session.notebook.cells)
        opened = f" It has {cells} cells; none was run." if notebook else ""
        handle = session.handle
        following = (
            call("run_cell", sandbox=handle, cells="all")
            if cells
            else call("create_cell", sandbox=handle, source="...")
        )
        return Answer(
            f"sandbox {handle}: ready in {seconds(time.monotonic() - began)} ({backend}).{opened}\n"
            f"notebook: {session.notebook.path}\n"
            f"Next: {following}; load_model loads a model, list_techniques shows what can be imported.",
            meta={"sandbox": sandbox_meta(session)},
        ).result()

    async def list_sandboxes() -> CallToolResult:
        """Your sandboxes with their handles, kernels, running cells and notebooks, also those that ended recently."""
        sessions, problems = await register.list(owner())
        live = [s for s in sessions if s.ended is None]
        ended = [s for s in sessions if s.ended is not None][-8:]
        lines = [f"{len(live)} running, {len(sessions) - len(live)} ended"]
        lines += await asyncio.gather(*map(described, [*live, *ended]))  # each asks its host
        lines += problems
        if not live:
            lines.append(f"Next: {call('start_sandbox', name='my-question')}.")
        return Answer(
            "\n".join(lines), meta={"sandboxes": [sandbox_meta(s) for s in sessions]}
        ).result()

    async def stop_sandbox(sandbox: str) -> CallToolResult:
        """End a sandbox: its kernel, variables and processes are gone, its notebook stays."""
        session = await register.get(sandbox, owner())
        await register.stop(session)
        return Answer(
            f"sandbox {sandbox}: stopped; nothing of it runs any more. The notebook stays: {session.notebook.path}"
            f"{notes(session)}",
            meta={"sandbox": sandbox_meta(session)},
        ).result()

    async def restart_kernel(sandbox: str) -> CallToolResult:
        """A new, empty kernel: variables are lost, notebook and files stay. Ends what runs, also a cell that ignores
        interrupt and a kernel that died."""
        session = await register.get(sandbox, owner())
        began = time.monotonic()
        await session.restart()
        return Answer(
            f"sandbox {sandbox}: new kernel in {seconds(time.monotonic() - began)}; all variables are gone. "
            f"Next: {call('run_cell', sandbox=sandbox, cells='all')} runs the notebook again from "
            f"the top.{notes(session)}",
            meta={"sandbox": sandbox_meta(session)},
        ).result()

    async def interrupt(sandbox: str, run: str = "", everything: bool = False) -> CallToolResult:
        """Stop the running cell (KeyboardInterrupt; variables are kept). run: a certain run or command. everything:
        also take out what waits in the queue."""
        session = await register.get(sandbox, owner())
        stopped, did, waiting = await session.interrupt(run, everything)
        queue = f" {waiting} more in the queue." if waiting else ""
        if stopped is None:
            return Answer(f"sandbox {sandbox}: nothing was running.{queue}").result()
        what = f"cell {stopped.subject}" if stopped.kind == "cell" else f"command {stopped.id}"
        if not did:
            return Answer(
                f"{what}: did not stop; it ignores the interrupt and is still running.{queue} "
                f"Next: {call('restart_kernel', sandbox=sandbox)} ends it for certain (variables are lost).",
                meta={"run": run_meta(stopped)},
                is_error=True,
            ).result()
        return Answer(
            f"{what}: {stopped.state} after {seconds(stopped.seconds)}.{queue} "
            f"{'The kernel is usable and its variables are kept.' if stopped.kind == 'cell' else ''}{notes(session)}",
            meta={"run": run_meta(stopped)},
        ).result()

    return [
        tool(start_sandbox, "Start a sandbox", open_world=True, core=True),
        tool(list_sandboxes, "List sandboxes", read_only=True, idempotent=True, core=True),
        tool(stop_sandbox, "Stop a sandbox", destructive=True, idempotent=True),
        tool(restart_kernel, "Restart the kernel", destructive=True),
        tool(interrupt, "Interrupt a run", destructive=True, idempotent=True),
    ]


async def tell(reports: asyncio.Queue[str], beat: Any) -> None:
    """Pass reports on as progress, and repeat the last one so that the client sees life."""
    last = "starting"
    while True:
        try:
            async with asyncio.timeout(5.0):
                last = await reports.get()
        except TimeoutError:
            pass
        await beat(last)
