"""Tools: start, list and stop sandboxes; restart and interrupt their kernels."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult
from pydantic import ValidationError

from ..environment import Investigation, SandboxSpec, parse_gpu
from ..errors import BadInput, SandboxUnavailable, StillStarting, show
from ..money import duration
from ..notebook import UNFINISHED
from ..render import Answer, Part
from ..sessions import Register, Session, Starting
from .answers import call, notes, of_runs, run_meta, seconds
from .seam import Dollars, Gigabytes, Hours, Minutes, Seconds, heartbeat, owner, tool

TASK_CHARACTERS = 8_000  # of a task that a result shows; the notebook has all of it


def sandbox_meta(session: Session) -> dict[str, Any]:
    return {
        "handle": session.handle,
        "name": session.name,
        "backend": session.backend_name,
        "notebook": str(session.notebook.path),
        "ended": session.ended,
        "kernel": session.kernel_state,
        "cost": session.meter.so_far() if session.meter is not None else None,
        "cells": None if session.unread else len(session.notebook.cells),
    }


def start_meta(start: Starting) -> dict[str, Any]:
    return {
        "handle": start.handle,
        "backend": start.backend,
        "report": start.report,
        "failed": str(start.failed) if start.failed is not None else None,
    }


async def described(session: Session) -> str:
    """A sandbox in two lines: state, and where its notebook is."""
    cost = f"; {session.meter.so_far()}" if session.meter is not None else ""
    if session.unconfirmed is not None:
        return (
            f"{session.handle}: {session.unconfirmed}{cost}\n    notebook {session.notebook.path}"
        )
    if session.ended is not None:
        return f"{session.handle}: ended ({session.ended}){cost}\n    notebook {session.notebook.path}{notes(session)}"
    try:
        status = await session.status()
    except SandboxUnavailable as error:  # it cannot be reached, or is being ended just now
        why = str(error).removesuffix(".") if cost else str(error)
        return f"{session.handle}: {why}{cost}\n    notebook {session.notebook.path}"
    running = [c.id for c in session.notebook.cells if c.state in UNFINISHED]
    kernel = status["kernel"] + (f" ({status['how']})" if status["how"] else "")
    busy = f"; running or queued: {', '.join(running)}" if running else ""
    busy += f"; commands: {', '.join(status['commands'])}" if status["commands"] else ""
    left = cost
    if (lives := session.lease.left()) is not None:
        left += f"; ends in {seconds(lives)} at the latest"
    if status["idle_limit"] and not busy:
        left += f"; ends itself after {seconds(status['idle_limit'] - status['idle_for'])} more without use"
    if (limits := status.get("limits")) and limits["memory"]:
        busy += f"; memory limit {limits['memory']} MiB ({limits['means']})"
    up = seconds(time.time() - session.created)
    return (
        f"{session.handle}: {session.backend_name}, up {up}, kernel {kernel}{busy}{left}\n"
        f"    notebook {session.notebook.path} ({len(session.notebook.cells)} cells){notes(session)}"
    )


def described_start(start: Starting) -> str:
    """A sandbox that is being started, or failed to, in a line."""
    if start.failed is not None:
        return f"{start.handle}: {start.failed}"
    since = seconds(time.time() - start.began)
    terms = f"\n    {start.terms}" if start.terms else ""
    return f"{start.handle}: {start.backend}, starting for {since}: {start.report}{terms}"


async def opened(
    session: Session, found: Investigation, spec: SandboxSpec, began: float, terms: str
) -> Answer:
    """A sandbox of an investigation: its task, and what came of the cells that begin its notebook."""
    handle = session.handle
    cost = terms if session.meter is not None else ""
    answer = Answer(
        f"sandbox {handle}: ready in {seconds(time.monotonic() - began)} ({spec.backend}), for the investigation "
        f"{found.name}.{told(cost)}\nnotebook: {session.notebook.path}\n"
        f"Its task follows. Next: {call('create_cell', sandbox=handle, source='...')}; list_techniques shows what can "
        f"be imported; {call('submit_findings', sandbox=handle, claim='...')} ends it.",
        parts=[Part(found.task[:TASK_CHARACTERS], f"task of the investigation {found.name}")],
        meta={"sandbox": sandbox_meta(session)},
    )
    if session.opening:
        ran = await of_runs(session, session.opening, time.monotonic() - began)
        answer.parts += [Part(ran.text), *ran.parts]
        answer.images, answer.is_error = ran.images, ran.is_error
    return answer


# The fields of a spec that an argument of start_sandbox sets, where it has another name.
ARGUMENTS = {
    "lifetime": "hours",
    "idle_limit": "idle_minutes",
    "memory": "memory_gb",
    "budget": "budget_dollars",
    "snapshot": "from_snapshot",
}


def spec_of(asked: dict[str, Any], base: SandboxSpec | None) -> SandboxSpec:
    """What is asked for, over what the investigation says. Raises BadInput."""
    given = {key: value for key, value in asked.items() if value}
    if memory := given.get("memory"):
        if memory < 0.25:
            raise BadInput("memory_gb", memory, "a kernel needs 0.25 or more; 0 sets no limit")
        given["memory"] = round(memory * 1024)
    if (gpu := given.get("gpu")) and given.get("backend", base.backend if base else "") != "ssh":
        given["gpu"], given["gpu_count"] = parse_gpu(gpu)
    before = {key: getattr(base, key) for key in SandboxSpec.model_fields} if base else {}
    try:
        return SandboxSpec.model_validate({**before, **given})
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "sandbox"
        why = problem["msg"].removeprefix("Value error, ")
        raise BadInput(ARGUMENTS.get(name, name), problem["input"], why) from error


def tools(register: Register) -> list[Tool]:
    async def start_sandbox(
        context: Context[Any, Any],
        name: str = "",
        backend: str = "",
        gpu: str = "",
        investigation: str = "",
        notebook: str = "",
        fork: bool = False,
        python: str = "",
        host: str = "",
        hours: Hours = 0,
        idle_minutes: Minutes = 0,
        memory_gb: Gigabytes = 0,
        budget_dollars: Dollars = 0,
        from_snapshot: str = "",
        estimate: bool = False,
    ) -> CallToolResult:
        """Start a sandbox: a machine with an IPython kernel, and a notebook that records everything. Returns the
        handle that other tools take as `sandbox`. backend: local, modal (cloud, billed: gpu="A100-80GB" or "H100:2",
        hours, budget_dollars; estimate=true only says what it would cost) or ssh (host). investigation: its name, or a
        folder with investigation.toml; its models are loaded and its task is told. notebook: open an existing .ipynb
        (runs nothing); fork: work on a copy. python: another interpreter (needs ipykernel). memory_gb: limit. Tool
        packs are importable in it: see list_techniques."""
        asked: dict[str, Any] = {
            "backend": backend,
            "gpu": gpu,
            "python": python,
            "host": host,
            "lifetime": hours * 3600,
            "idle_limit": idle_minutes * 60,
            "memory": memory_gb,
            "budget": budget_dollars,
            "snapshot": from_snapshot,
        }
        found = register.investigation(investigation, owner()) if investigation else None
        spec = spec_of(asked, found.sandbox if found else None)
        if estimate:
            price, terms = await register.price(spec, owner())
            return Answer(
                f"{terms} Nothing was started.",
                meta={"dollars_per_hour": price.per_second * 3600 if price else 0.0},
            ).result()
        beat = heartbeat(context)
        reports: asyncio.Queue[str] = asyncio.Queue()
        teller = asyncio.create_task(tell(reports, beat))
        began = time.monotonic()
        start = await register.begin(owner(), name, spec, notebook, fork, found)
        try:
            session = await start.wait(register.config.max_wait, reports.put_nowait)
        except StillStarting as still:
            return Answer(f"{still}{told(start.terms)}", meta={"starting": start.handle}).result()
        finally:
            teller.cancel()
        if found is not None and not notebook:
            left = max(0.0, register.config.max_wait - (time.monotonic() - began))
            await session.wait(session.opening, left, beat)
            return (await opened(session, found, spec, began, start.terms)).result()
        cells = len(session.notebook.cells)
        cost = start.terms if session.meter is not None else ""
        if spec.snapshot:
            cost += (
                " It has the files of the snapshot; kernel memory is not in one: variables are gone, run the cells "
                "that made them again."
            )
        unrun = f" It has {cells} cells; none was run." if notebook else ""
        handle = session.handle
        following = (
            call("run_cell", sandbox=handle, cells="all")
            if cells
            else call("create_cell", sandbox=handle, source="...")
        )
        return Answer(
            f"sandbox {handle}: ready in {seconds(time.monotonic() - began)} ({spec.backend}).{unrun}{told(cost)}"
            f"\nnotebook: {session.notebook.path}\n"
            f"Next: {following}; load_model loads a model, list_techniques shows what can be imported.",
            meta={"sandbox": sandbox_meta(session)},
        ).result()

    async def list_sandboxes(wait: Seconds = 0) -> CallToolResult:
        """Your sandboxes with their handles, kernels, running cells, cost and notebooks, also those that are starting
        or ended recently. wait: seconds to wait for one that is starting."""
        starting = [s for s in register.starts(owner()) if not s.over.is_set()]
        if starting and wait:
            over = [asyncio.ensure_future(s.over.wait()) for s in starting]
            limit = min(wait, register.config.max_wait)
            await asyncio.wait(over, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            for waiting in over:
                waiting.cancel()
        sessions, problems = await register.list(owner())
        starts = register.starts(owner())
        live = [s for s in sessions if s.ended is None]
        ended = [s for s in sessions if s.ended is not None][-8:]
        under_way = sum(not s.over.is_set() for s in starts)
        more = f", {under_way} starting" if under_way else ""
        lines = [f"{len(live)} running{more}, {len(sessions) - len(live)} ended"]
        lines += await asyncio.gather(*map(described, [*live, *ended]))  # each asks its host
        lines += [*map(described_start, starts), *problems]
        if not live and not under_way:
            lines.append(f"Next: {call('start_sandbox', name='my-question')}.")
        meta = {
            "sandboxes": [sandbox_meta(s) for s in sessions],
            "starting": [start_meta(start) for start in starts],
        }
        return Answer("\n".join(lines), meta=meta).result()

    async def stop_sandbox(sandbox: str) -> CallToolResult:
        """End a sandbox: its kernel, variables and processes are gone, its notebook stays."""
        if await register.give_up(sandbox, owner()):
            return Answer(
                f"sandbox {sandbox}: its start was given up; nothing of it runs."
            ).result()
        session = await register.get(sandbox, owner())
        await register.stop(session)
        return Answer(
            f"sandbox {sandbox}: stopped; nothing of it runs any more. The notebook stays: {session.notebook.path}"
            f"{told(session.meter.so_far() if session.meter else '')}{notes(session)}",
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

    async def extend_sandbox(
        sandbox: str, minutes: Minutes = 0, idle_minutes: Minutes = 0
    ) -> CallToolResult:
        """Let a sandbox live longer: minutes from now to its end, and minutes without use after which it ends itself.
        What is billed can only be extended within its budget and time limit."""
        if not minutes and not idle_minutes:
            raise BadInput("minutes", minutes, "name minutes or idle_minutes")
        session = await register.get(sandbox, owner())
        for name, wanted in (("minutes", minutes), ("idle_minutes", idle_minutes)):
            if 0 < wanted < 1:  # it would be over before the next call
                raise BadInput(
                    name,
                    wanted,
                    f"give 1 or more; {call('stop_sandbox', sandbox=sandbox)} ends it now",
                )
        lease = await session.extend(minutes * 60 or None, idle_minutes * 60 or None)
        left = lease.left()
        ends = "has no end of its own" if left is None else f"ends in {duration(left)}"
        idle = f", or after {duration(lease.idle_limit)} without use" if lease.idle_limit else ""
        short = left is not None and left < minutes * 60 - 30
        why = " That is as far as its time limit or budget allows." if short else ""
        return Answer(f"sandbox {sandbox}: {ends}{idle}.{why}{notes(session)}").result()

    async def snapshot_sandbox(sandbox: str) -> CallToolResult:
        """Keep the files of a cloud sandbox, to start another from them (start_sandbox from_snapshot=id). Kernel memory
        is not kept: variables are gone there."""
        session = await register.get(sandbox, owner())
        id = await register.snapshot(session)
        again = call("start_sandbox", backend=session.backend_name, from_snapshot=id)
        opened = f"notebook={show(str(session.notebook.path))}, fork=true"
        return Answer(
            f"sandbox {sandbox}: snapshot {id} holds its files. It does not hold the kernel's memory: in a sandbox "
            f"that is started from it the variables are gone. Next, when you need it: {again[:-1]}, {opened}); then "
            f"run_cell(sandbox=…, cells='all') makes the variables again.{notes(session)}",
            meta={"snapshot": id},
        ).result()

    return [
        tool(start_sandbox, "Start a sandbox", open_world=True, core=True, app=True),
        tool(list_sandboxes, "List sandboxes", read_only=True, idempotent=True, core=True),
        tool(stop_sandbox, "Stop a sandbox", destructive=True, idempotent=True),
        tool(extend_sandbox, "Extend a sandbox's life", idempotent=True),
        tool(snapshot_sandbox, "Snapshot a sandbox's files"),
        tool(restart_kernel, "Restart the kernel", destructive=True),
        tool(interrupt, "Interrupt a run", destructive=True, idempotent=True),
    ]


def told(text: str) -> str:
    return f"\n{text}" if text else ""


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
