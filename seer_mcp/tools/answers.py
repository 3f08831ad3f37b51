"""How a run, a cell, a sandbox read in a result."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from ..errors import show
from ..notebook import UNFINISHED, Cell
from ..outputs import Piece
from ..render import (
    ANSWER_BYTES,
    IMAGE_BYTES,
    IMAGES,
    TEXT_BUDGET,
    Answer,
    Part,
    digest,
    images_of,
    scaled,
)
from ..sessions import RunInfo, Session


def seconds(value: float | None) -> str:
    if value is None:
        return "?"
    return (
        f"{value:.2f} s"
        if value < 10
        else f"{value:.0f} s"
        if value < 600
        else f"{value / 60:.0f} min"
    )


def call(tool: str, /, **arguments: object) -> str:
    """A tool call as text that an agent can repeat."""
    inside = ", ".join(f"{k}={show(v, 200)}" for k, v in arguments.items())
    return f"{tool}({inside})"


def reading_on(session: Session, **key: str) -> str:
    """The call that reads on where a digest left something out; {cursor} is filled in there."""
    asked = call("read_outputs", sandbox=session.handle, **key)
    return f"read on with {asked[:-1]}, cursor='{{cursor}}')"


def headline(session: Session, run: RunInfo, waited: float) -> str:
    """What happened, and the next call."""
    what = f"cell {run.subject}" if run.kind == "cell" else f"command {run.id}"
    handle = session.handle
    key = {"cell": run.subject} if run.kind == "cell" else {"run": run.id}
    read_on = call("read_outputs", sandbox=handle, **key)
    if run.state == "queued" and run.unanswered:
        return (
            f"{what}: queued; the sandbox does not answer now. It is sent until the sandbox takes it, and runs "
            f"once: do not repeat it. Next: {read_on} waits for it, list_sandboxes shows the sandbox's state."
        )
    if run.state == "queued":
        return (
            f"{what}: queued, other runs are before it. It will run by itself. Next: {read_on} waits for it, "
            f"{call('interrupt', sandbox=handle, run=run.id)} takes it out."
        )
    if run.state == "running":
        since = time.time() - run.started if run.started else waited
        return (
            f"{what}: running for {seconds(since)} and goes on by itself; below is what it printed so far. "
            f"Next: {read_on} waits for the rest, {call('interrupt', sandbox=handle)} stops it."
        )
    why = f" ({run.why})" if run.why else ""
    ends = {
        "complete": f"{what}: complete in {seconds(run.seconds)}",
        "error": f"{what}: error after {seconds(run.seconds)}{why}",
        "interrupted": f"{what}: interrupted after {seconds(run.seconds)}{why}",
        "kernel_died": (
            f"{what}: the kernel died{why}; its variables are gone. What it printed before is kept. "
            f"Next: {call('restart_kernel', sandbox=handle)} starts a new, empty kernel; then run the "
            "cells you need again."
        ),
        "sandbox_lost": (
            f"{what}: the sandbox was lost{why}; its variables are gone, the notebook is kept. "
            f"Next: {call('start_sandbox', **session.start_again())}."
        ),
        "expired": f"{what}: cut off when the sandbox ended{why}. The notebook is kept.",
        "not_run": f"{what}: was not run{why}.",
        "not run": f"{what}: not run yet. Next: {call('run_cell', sandbox=handle, cells=run.subject)}.",
    }
    return ends.get(run.state, f"{what}: {run.state}")


def notes(session: Session, run: RunInfo | None = None) -> str:
    """What else a careful reader must know."""
    lines: list[str] = []
    if session.notebook.trouble:
        lines.append(
            f"NOT SAVED: {session.notebook.path}: {session.notebook.trouble}. The file is the last whole "
            "version; outputs "
            "are kept in the sandbox. Once that is mended, the next save will be complete."
        )
    lines += session.warnings()
    told, session.notebook.notices[:] = list(session.notebook.notices), []
    lines += [f"NOTE: {notice}" for notice in told]
    if session.lost_bytes:
        lines.append(
            f"OUTPUT LOST: the sandbox's disk was full; {session.lost_bytes:,} bytes of output could not be kept."
        )
    if session.damage:
        lines.append(f"OUTPUT DAMAGED: {session.damage}.")
    if run and run.dropped_bytes:
        lines.append(
            f"TRUNCATED: this run put out {run.output_bytes:,} bytes; the last {run.dropped_bytes:,} are "
            "over the cap and not kept."
        )
    return "".join(f"\n{line}" for line in lines)


def pieces_of(session: Session, run: RunInfo) -> list[Piece]:
    if run.kind == "command":
        return run.outputs.pieces() if run.outputs else []
    return session.notebook.cell(run.subject).pieces()


async def of_run(
    session: Session, run: RunInfo, waited: float, budget: int = TEXT_BUDGET, alone: bool = True
) -> Answer:
    """The result of one run (`alone`: the only one of the answer): headline, output, images."""
    pieces = pieces_of(session, run)
    key = {"cell": run.subject} if run.kind == "cell" else {"run": run.id}
    how = reading_on(session, **key)
    head = headline(session, run, waited)
    late = session.notebook.cell(run.subject).seer.get("late") if run.kind == "cell" else None
    if late:
        pieces_word = "piece" if late == 1 else "pieces"
        head += f"\nIncludes {late} {pieces_word} of output that arrived late, after the cell had ended."
    body = digest(pieces, budget - len(head), how)
    found = images_of(pieces)
    if len(found) > IMAGES:
        head += f"\n{len(found)} images, the last {IMAGES} of them below; "
        head += f"read_outputs with image=1 to {len(found)} shows any."
    shown = found[-IMAGES:]
    limit = min(IMAGE_BYTES, ANSWER_BYTES // (len(shown) if alone else IMAGES) if shown else 0)
    made = await asyncio.to_thread(lambda: [scaled(*image, limit=limit) for image in shown])
    lines = [head + notes(session, run), *(m for m in made if isinstance(m, str))]
    if run.state == "complete" and not body and not found:
        lines.append("(no output)")
    failed = run.state in (
        "error",
        "interrupted",
        "kernel_died",
        "sandbox_lost",
        "expired",
        "not_run",
    )
    return Answer(
        "\n".join(line for line in lines if line),
        [m for m in made if not isinstance(m, str)],
        [Part(body, f"output of {run.kind} {next(iter(key.values()))}")] if body else [],
        meta={"run": run_meta(run), "notebook": str(session.notebook.path)},
        is_error=failed,
    )


async def of_runs(session: Session, runs: list[RunInfo], waited: float) -> Answer:
    """The result of several runs: each reported, the budget shared."""
    if len(runs) == 1:
        return await of_run(session, runs[0], waited)
    each = max(600, TEXT_BUDGET // len(runs) - 50)
    answers = [await of_run(session, run, waited, each, alone=False) for run in runs]
    states = [run.state for run in runs]
    counts = ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(states))
    text = f"{len(runs)} cells: {counts}"
    parts = [part for a in answers for part in (Part(a.text), *a.parts)]
    if len(text) + sum(len(part.text) + 1 for part in parts) > TEXT_BUDGET:
        brief = "\n".join(headline(session, run, waited)[:160] for run in runs)
        text = f"{text}. Read any one with read_outputs.\n{brief}"[:TEXT_BUDGET]
        parts = []
    return Answer(
        text,
        [image for a in answers for image in a.images][-IMAGES:],
        parts,
        meta={"runs": [run_meta(run) for run in runs], "notebook": str(session.notebook.path)},
        is_error=any(a.is_error for a in answers),
    )


def run_meta(run: RunInfo) -> dict[str, Any]:
    return {
        "id": run.id,
        "kind": run.kind,
        "cell": run.subject if run.kind == "cell" else None,
        "state": run.state,
        "seconds": run.seconds,
        "output_bytes": run.output_bytes,
        "dropped_bytes": run.dropped_bytes,
        "code": run.code,
    }


def cell_line(number: int, cell: Cell) -> str:
    """A cell in one line of the outline."""
    first = next((line.strip() for line in cell.source.splitlines() if line.strip()), "(empty)")
    state = cell.state if cell.kind == "code" else cell.kind
    extra = ""
    if cell.kind == "code":
        count = cell.execution_count
        extra = f" [{count}]" if count else ""
        if "seconds" in cell.seer and cell.state not in UNFINISHED:
            extra += f" {seconds(cell.seer['seconds'])}"
        if cell.seer.get("stale"):
            extra += ", edited since"
        if cell.seer.get("earlier"):
            extra += ", in an earlier kernel"
    return f"{number:>3}  {cell.id}  {state}{extra}  {first[:80]}"
