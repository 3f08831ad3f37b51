"""`seer-mcp replay`: a finished notebook again, in a fresh sandbox, compared cell by cell."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import BadInput
from ..files import write_atomic
from ..flags import above_zero, checked
from ..ipynb import notebook_at
from .compare import Bounds
from .run import Replay, Step, Wanted, replayed

INTERRUPTED = 130  # the exit status of a program that was ended by Ctrl-C


def share(text: str) -> float:
    return checked(float, text, lambda value: 0 <= value <= 1, "a number from 0 to 1")


def add_replay(commands: Any, common: argparse.ArgumentParser) -> None:
    """The command line of `replay`."""
    bounds = Bounds()
    top = commands.add_parser(
        "replay",
        parents=[common],
        help="run a finished notebook again, and say what came out alike",
    )
    top.add_argument("notebook", metavar="NOTEBOOK", help="the .ipynb; it is never written")
    top.add_argument(
        "--model",
        metavar="[VARIABLE=]MODEL",
        action="append",
        default=[],
        help="load this instead (a hub id, a folder, organism:NAME); without VARIABLE in place of the "
        "first model that is loaded",
    )
    top.add_argument("--backend", metavar="NAME", default="", help="where: local, modal or ssh")
    top.add_argument("--gpu", metavar="GPU", default="", help="at modal, as A100-80GB")
    top.add_argument(
        "--investigation",
        metavar="NAME",
        default="",
        help="whose machine, files and models it needs (default: what the notebook says)",
    )
    top.add_argument(
        "--tolerance",
        type=above_zero,
        default=bounds.tolerance,
        metavar="R",
        help=f"how far numbers may lie apart, relative (default: {bounds.tolerance:g}); whole numbers not at all",
    )
    top.add_argument(
        "--similarity",
        type=share,
        default=bounds.similarity,
        metavar="R",
        help="how alike texts must be that differ in more than numbers, 0 to 1 (default: 1, the same)",
    )
    top.add_argument(
        "--cell-minutes",
        type=above_zero,
        default=60.0,
        metavar="N",
        help="a cell that runs longer is interrupted, and the replay ends (default: 60)",
    )
    top.add_argument("--json", metavar="FILE", help="write the comparison there as JSON, too")


def run_replay(flags: argparse.Namespace, config: Config) -> int:
    """0 if all came out alike, 1 if something differs, 130 after Ctrl-C. Raises SeerError."""
    wanted = Wanted(
        notebook_at(flags.notebook),
        tuple(flags.model),
        flags.backend,
        flags.gpu,
        flags.investigation,
        flags.cell_minutes * 60,
        Bounds(flags.tolerance, flags.similarity),
    )
    file = Path(flags.json) if flags.json else None
    if file is not None and not file.absolute().parent.is_dir():
        raise BadInput("json", flags.json, "there is no such folder to write it into")
    result, halted = asyncio.run(_run(config, wanted))
    if file is not None:
        write_atomic(file.absolute(), (json.dumps(as_json(result), indent=1) + "\n").encode())
    if halted:
        return INTERRUPTED
    return 0 if result.alike else 1


async def _run(config: Config, wanted: Wanted) -> tuple[Replay, bool]:
    halt = asyncio.Event()
    for signum in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # the sandbox must end, and what was seen be told
        asyncio.get_running_loop().add_signal_handler(signum, halt.set)

    def tell(text: str) -> None:
        if text:
            print(f"{text} …", file=sys.stderr, flush=True)

    result = await replayed(config, wanted, halt, tell, show)
    show_end(result)
    return result, halt.is_set()


def show(step: Step) -> None:
    """A cell in a line, and what differs below it."""
    took = "" if step.seconds_after is None else f"{step.seconds_after:.1f} s"
    notes = "; ".join(dict.fromkeys(step.compared.notes))
    if step.verdict == "left":
        notes = "it was never run"
    print(f"{step.number:>3}  {step.cell}  {step.verdict:<7}  {took:>8}  {step.says}", flush=True)
    if notes:
        print(f"     {notes}", flush=True)
    for difference in step.compared.differences:
        print(f"     {difference.what}: {difference.says}", flush=True)


def show_end(result: Replay) -> None:
    for variable, (old, new) in result.exchanged.items():
        print(f"model {variable}: {old} was exchanged for {new}")
    for note in result.notes:
        print(f"note: {note}")
    total = len(result.steps) - result.count("left")
    cost = f"; {result.cost}" if result.cost else ""
    print(f"{result.count('alike')} of {total} cells alike, {result.count('differs')} differ{cost}")
    if result.stopped:
        print(f"It did not reach the end: {result.stopped}")
    print(f"notebook: {result.notebook}")


def as_json(result: Replay) -> dict[str, Any]:
    return {
        "notebook": str(result.original),
        "replay": str(result.notebook),
        "backend": result.backend,
        "alike": result.alike,
        "models": {v: {"before": old, "after": new} for v, (old, new) in result.exchanged.items()},
        "stopped": result.stopped or None,
        "cost": result.cost or None,
        "notes": result.notes,
        "cells": [
            {
                "number": step.number,
                "cell": step.cell,
                "says": step.says,
                "verdict": step.verdict,
                "state": {"before": step.before, "after": step.after or None},
                "seconds": {"before": step.seconds_before, "after": step.seconds_after},
                "differences": [asdict(each) for each in step.compared.differences],
                "notes": step.compared.notes,
            }
            for step in result.steps
        ],
    }
