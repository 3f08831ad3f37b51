"""Tools: read what runs put out, and read the notebook."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult

from ..errors import BadInput, NotFound
from ..notebook import UNFINISHED, Cell
from ..render import TEXT_BUDGET, Answer, Part, digest, exact_page, images_of, scaled
from ..sessions import Register, RunInfo, Session
from .answers import call, cell_line, notes, of_run, pieces_of, reading_on, run_meta
from .seam import Count, Seconds, heartbeat, owner, tool

PAGE = 16_000
LARGE_SIDE = 2000


def wanted_run(session: Session, cell: str, run: str) -> RunInfo:
    """The run that is meant: named, of the cell, the one that runs now, or the last."""
    if run:
        return session.find_run(run)
    if cell:
        target = session.notebook.cell(cell)
        if target.kind != "code":
            raise BadInput(
                "cell",
                cell,
                f"it is a {target.kind} cell and has no outputs; read_notebook shows its text",
            )
        return session.run_of(target)
    code = [c for c in session.notebook.cells if c.kind == "code" and c.seer.get("run")]
    busy = [c for c in code if c.state in UNFINISHED]
    if busy:
        return session.run_of(next((c for c in busy if c.state == "running"), busy[0]))
    if not code:
        raise NotFound(
            "run", "the last one", then="No cell has run yet: call create_cell or run_cell."
        )
    return session.run_of(max(code, key=lambda c: c.seer.get("started", 0)))


def outline(session: Session) -> str:
    cells = session.notebook.cells
    lines = [cell_line(number, cell) for number, cell in enumerate(cells, 1)]
    return "\n".join(lines) or "(no cells yet)"


def whole(session: Session, cells: list[Cell], with_outputs: bool) -> str:
    """Sources (and outputs) of the cells."""
    parts: list[str] = []
    each = max(500, TEXT_BUDGET // max(1, len(cells)))
    for cell in cells:
        parts.append(f"--- cell {cell.id} ({cell.state}) ---\n{cell.source}")
        if with_outputs and cell.kind == "code":
            pieces = cell.pieces()
            text = digest(pieces, each, reading_on(session, cell=cell.id))
            count = len(images_of(pieces))
            pictures = (
                f"\n[{count} image{'s' if count > 1 else ''}: read_outputs shows them]"
                if count
                else ""
            )
            if text or pictures:
                parts.append(f"--- output of {cell.id} ---\n{text}{pictures}")
    return "\n".join(parts)


def tools(register: Register) -> list[Tool]:
    async def read_outputs(
        context: Context[Any, Any],
        sandbox: str,
        cell: str = "",
        run: str = "",
        wait: Seconds = 45,
        cursor: str = "",
        image: Count = 0,
    ) -> CallToolResult:
        """The output of a cell's last run, of a run or command by its id, or (neither given) of what runs now. Waits up
        to `wait` seconds for it to end. cursor reads one page of the exact text ("0:0" is the beginning); image=N
        shows the Nth image larger."""
        session = await register.get(sandbox, owner())
        if run:
            await session.recall(run)
        found = wanted_run(session, cell, run)
        began = time.monotonic()
        if not cursor and not image:
            await session.touch()
            await session.wait([found], min(wait, register.config.max_wait), heartbeat(context))
            return (await of_run(session, found, time.monotonic() - began)).result()
        pieces = pieces_of(session, found)
        what = f"cell {found.subject}" if found.kind == "cell" else f"command {found.id}"
        if image:
            pictures = images_of(pieces)
            if not 1 <= image <= len(pictures):
                raise BadInput("image", image, f"{what} has {len(pictures)} images, counted from 1")
            made = await asyncio.to_thread(scaled, *pictures[image - 1], LARGE_SIDE)
            shown = [] if isinstance(made, str) else [made]
            problem = f"\n{made}" if isinstance(made, str) else ""
            return Answer(
                f"{what}: image {image} of {len(pictures)}{problem}", shown, is_error=bool(problem)
            ).result()
        page = exact_page(pieces, cursor, PAGE)
        key = {"cell": found.subject} if found.kind == "cell" else {"run": found.id}
        runs_on = found.state in UNFINISHED
        following = page.next or (page.end if runs_on else None)
        state = " so far (it still runs)" if runs_on else ""
        after = "This is the end."
        if following:
            more = "Next page" if page.next else "What comes next"
            after = f"{more}: {call('read_outputs', sandbox=sandbox, **key, cursor=following)}"
        return Answer(
            f"{what}: exact text from {cursor} on, of {page.total:,} in all{state}. {after}",
            parts=[Part(page.text, f"output of {what}")],
            meta={
                "run": run_meta(found),
                "page": {"cursor": cursor, "next": following, "total": page.total},
            },
        ).result()

    async def read_notebook(
        sandbox: str, cells: str = "", outputs: bool = False, cursor: Count = 0
    ) -> CallToolResult:
        """The notebook: without `cells` an outline with each cell's id and state; with ids or "all" their sources, and
        with outputs=true their outputs."""
        session = await register.get(sandbox, owner())
        notebook = session.notebook
        ended = f"; its sandbox has ended ({session.ended})" if session.ended is not None else ""
        title = f"notebook {notebook.path}, {len(notebook.cells)} cells{ended}{notes(session)}"
        if not cells.strip():
            text = outline(session)
        else:
            chosen = (
                notebook.cells
                if cells.strip() == "all"
                else [notebook.cell(id) for id in cells.replace(",", " ").split()]
            )
            text = whole(session, list(chosen), outputs)
        if not 0 <= cursor <= len(text):
            raise BadInput("cursor", cursor, f"the text has {len(text):,} characters")
        part = text[cursor : cursor + TEXT_BUDGET - 500]
        end = cursor + len(part)
        if end < len(text):
            title += f"\nCharacters {cursor:,} to {end:,} of {len(text):,}. Next: cursor={end}."
        listed = [
            {"id": c.id, "type": c.kind, "state": c.state, "run": c.seer.get("run")}
            for c in notebook.cells[:2000]
        ]
        return Answer(
            title,
            parts=[Part(part, "the notebook")] if part else [],
            meta={"notebook": str(notebook.path), "cells": listed},
        ).result()

    return [
        tool(read_outputs, "Read outputs", read_only=True, idempotent=True, core=True),
        tool(
            read_notebook,
            "Read the notebook",
            read_only=True,
            idempotent=True,
            core=True,
            app=True,
        ),
    ]
