"""`seer-mcp bench-techniques`: every technique on every organism and its control."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .errors import BadInput, NotFound
from .files import write_atomic
from .flags import above_one

NEEDED = ("torch", "transformers", "peft")
BEGIN, END = "<!-- bench-techniques: generated -->", "<!-- end of bench-techniques -->"


def add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench-techniques",
        help="how well each technique tells the shipped organisms from their controls",
    )
    bench.add_argument(
        "--organisms", nargs="+", metavar="NAME", default=[], help="only these (default: all eight)"
    )
    bench.add_argument(
        "--methods", nargs="+", metavar="NAME", default=[], help="only these (default: all)"
    )
    bench.add_argument(
        "--seeds",
        default="0,1,2",
        metavar="S,S",
        help="the seeds that are measured (default: 0,1,2); the others that ship choose the settings",
    )
    bench.add_argument(
        "--jobs",
        type=above_one,
        default=2,
        metavar="N",
        help="processes, one thread each (default: 2)",
    )
    bench.add_argument("--json", metavar="FILE", help="write all figures there as JSON")
    bench.add_argument(
        "--page",
        metavar="FILE",
        help="write the tables into this Markdown page, between its two marks",
    )


def run_bench(flags: argparse.Namespace) -> int:
    """Print the tables; write what was asked for. Raises SeerError."""
    if lacking := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise BadInput(
            "bench-techniques",
            ", ".join(lacking),
            "not installed here: install the server as 'seer-mcp[local]' "
            "(uvx 'seer-mcp[local]' bench-techniques)",
        )
    page = None if flags.page is None else Path(flags.page)
    if page is not None:
        around(page)  # before anything is computed
    from tool_packs.bench.cases import ORGANISMS
    from tool_packs.bench.methods import METHODS
    from tool_packs.bench.run import quiet, run
    from tool_packs.bench.table import markdown, methods_table

    names = known("organism", flags.organisms, ORGANISMS)
    methods = known("method", flags.methods, tuple(METHODS))
    seeds = seeds_of(flags.seeds)
    quiet(1)
    started = time.monotonic()

    def report(line: str) -> None:
        print(f"{time.monotonic() - started:5.0f} s  {line}", file=sys.stderr, flush=True)

    rows = run(names, [METHODS[m] for m in methods], seeds, flags.jobs, report)
    figures = [row.figures() for row in rows]
    seconds = time.monotonic() - started
    made = (
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, seer-mcp {__version__}, seeds "
        f"{', '.join(map(str, seeds))}, {len(methods)} methods, {len(names)} organisms, "
        f"{seconds:.0f} s ({burnt():.0f} s of CPU) in {flags.jobs} processes on {os.cpu_count()} cores, "
        f"{platform.system()}, Python {platform.python_version()}"
    )
    text = f"{made}\n\n{markdown(figures)}\n\n### The methods\n\n{methods_table(methods)}"
    print(text)
    if flags.json is not None:
        told = {"made": made, "seconds": round(seconds, 1), "seeds": seeds, "rows": figures}
        write_atomic(Path(flags.json), json.dumps(told, indent=1).encode())
    if page is not None:
        before, after = around(page)
        write_atomic(page, f"{before}{BEGIN}\n{text}\n{END}{after}".encode())
    return 0


def burnt() -> float:
    """Seconds of CPU of this process and of those that it has waited for."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def known(what: str, given: Sequence[str], all_of: Sequence[str]) -> list[str]:
    """Those that were asked for, in the usual order; all where none was. Raises NotFound."""
    for name in given:
        if name not in all_of:
            raise NotFound(what, name, all_of)
    return [name for name in all_of if not given or name in given]


def seeds_of(text: str) -> list[int]:
    """Seeds as in "0,2". Raises BadInput."""
    from tool_packs.organisms import SEEDS

    shipped = sorted(SEEDS)
    parts = [part.strip() for part in text.split(",")]
    if any(part not in map(str, shipped) for part in parts) or len(set(parts)) < len(parts):
        ship = ", ".join(map(str, shipped))
        raise BadInput("--seeds", text, f"give some of the seeds that ship ({ship}), each once")
    return [int(part) for part in parts]


def around(page: Path) -> tuple[str, str]:
    """What stands before and after the generated part of a page; raises BadInput if it has none."""
    if not page.exists():
        return "", "\n"
    before, found, rest = page.read_text().partition(BEGIN)
    _, closed, after = rest.partition(END)
    if not found or not closed:
        raise BadInput("--page", str(page), f"it has no part between {BEGIN!r} and {END!r}")
    return before, after
