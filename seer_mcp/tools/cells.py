"""Tools: write and run the cells of a notebook."""

from __future__ import annotations

import time
from typing import Any, Literal

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult

from ..errors import BadInput
from ..notebook import Cell
from ..render import Answer
from ..sessions import Register, Session
from .answers import call, notes, of_runs
from .seam import Seconds, heartbeat, owner, tool

SOURCE_CHARACTERS = 1_000_000


def checked_source(source: str) -> str:
    if len(source) > SOURCE_CHARACTERS:
        raise BadInput(
            "source",
            f"{len(source):,} characters",
            f"a cell has at most {SOURCE_CHARACTERS:,}; write a file instead",
        )
    return source


async def run_and_wait(
    register: Register,
    context: Context[Any, Any],
    session: Session,
    cells: list[Cell],
    wait: float,
    stop_on_error: bool = True,
) -> CallToolResult:
    """Run cells and wait for them, as far as one call may wait."""
    runs = await session.run_cells(cells, stop_on_error)
    began = time.monotonic()
    await session.wait(runs, min(wait, register.config.max_wait), heartbeat(context))
    return (await of_runs(session, runs, time.monotonic() - began)).result()


def wanted_cells(session: Session, cells: str) -> list[Cell]:
    notebook = session.notebook
    if cells.strip() == "all":
        found = [cell for cell in notebook.cells if cell.kind == "code"]
        if not found:
            raise BadInput("cells", cells, "the notebook has no code cells; call create_cell")
        return found
    ids = cells.replace(",", " ").split()
    if not ids:
        raise BadInput("cells", cells, 'give a cell id, several, or "all"')
    found = [notebook.cell(id) for id in ids]
    if len({cell.id for cell in found}) < len(found):
        raise BadInput("cells", cells, "a cell is named twice")
    return found


def tools(register: Register) -> list[Tool]:
    async def create_cell(
        context: Context[Any, Any],
        sandbox: str,
        source: str,
        type: Literal["code", "markdown"] = "code",
        run: bool = True,
        after: str = "",
        at_top: bool = False,
        wait: Seconds = 45,
    ) -> CallToolResult:
        """Write a cell and, if it is code, run it at once (run=false only writes). It goes to the end, behind the cell
        `after`, or at_top. The answer has the cell's id and output; what takes longer than `wait` seconds (at most
        45) runs on and is read with read_outputs."""
        session = await register.get(sandbox, owner())
        session.check_usable(run and type == "code")
        cell = session.notebook.insert(type, checked_source(source), after, at_top)
        if run and type == "code":
            return await run_and_wait(register, context, session, [cell], wait)
        await session.save()
        following = (
            f" Next: {call('run_cell', sandbox=sandbox, cells=cell.id)}." if type == "code" else ""
        )
        return Answer(
            f"cell {cell.id}: {type} cell written, not run.{following}{notes(session)}"
            if type == "code"
            else f"cell {cell.id}: markdown cell written.{notes(session)}",
            meta={"cell": cell.id, "notebook": str(session.notebook.path)},
        ).result()

    async def edit_cell(
        context: Context[Any, Any],
        sandbox: str,
        cell: str,
        source: str = "",
        find: str = "",
        replace: str = "",
        run: bool = False,
        wait: Seconds = 45,
    ) -> CallToolResult:
        """Change a cell: a whole new source, or replace the one place where `find` stands by `replace`; run=true runs
        it afterwards."""
        session = await register.get(sandbox, owner())
        target = session.notebook.cell(cell)
        session.check_usable(run)
        if bool(source) == bool(find):
            raise BadInput(
                "source", source, "give either source (the whole new text) or find and replace"
            )
        if find:
            count = target.source.count(find)
            if count != 1:
                where = (
                    "does not stand in the cell"
                    if not count
                    else f"stands {count} times in the cell; give more of its surroundings"
                )
                raise BadInput(
                    "find", find, f"it {where}. The cell's source is:\n{target.source[:4000]}"
                )
            source = target.source.replace(find, replace)
        session.notebook.rewrite(target, checked_source(source))
        if run:
            return await run_and_wait(register, context, session, [target], wait)
        await session.save()
        kept = " Its outputs are those of the old source." if target.pieces() else ""
        return Answer(
            f"cell {target.id}: changed, not run.{kept}{notes(session)}", meta={"cell": target.id}
        ).result()

    async def delete_cell(sandbox: str, cell: str) -> CallToolResult:
        """Delete a cell and its outputs. The kernel's variables stay."""
        session = await register.get(sandbox, owner())
        target = session.notebook.cell(cell)
        session.notebook.delete(target)
        await session.save()
        return Answer(
            f"cell {target.id}: deleted.{notes(session)} Its source was:\n{target.source[:2000]}",
            meta={"cell": target.id},
        ).result()

    async def move_cell(sandbox: str, cell: str, after: str = "") -> CallToolResult:
        """Move a cell behind the cell `after` (empty: to the top)."""
        session = await register.get(sandbox, owner())
        target = session.notebook.cell(cell)
        session.notebook.move(target, after)
        await session.save()
        position = session.notebook.index(target) + 1
        return Answer(
            f"cell {target.id}: now number {position} of {len(session.notebook.cells)}.{notes(session)}",
            meta={"cell": target.id},
        ).result()

    async def run_cell(
        context: Context[Any, Any],
        sandbox: str,
        cells: str,
        wait: Seconds = 45,
        stop_on_error: bool = True,
    ) -> CallToolResult:
        """Run one cell (its id), several (ids, in this order), or "all" code cells from the top. Each is reported. What
        takes longer than `wait` seconds (at most 45) runs on and is read with read_outputs."""
        session = await register.get(sandbox, owner())
        return await run_and_wait(
            register, context, session, wanted_cells(session, cells), wait, stop_on_error
        )

    return [
        tool(create_cell, "Write and run a cell", open_world=True, core=True),
        tool(run_cell, "Run cells", open_world=True, core=True),
        tool(edit_cell, "Change a cell", destructive=True, open_world=True, core=True),
        tool(delete_cell, "Delete a cell", destructive=True),
        tool(move_cell, "Move a cell", idempotent=True),
    ]
