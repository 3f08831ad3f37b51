"""`seer-mcp sandboxes`: what runs, what it costs, and its end, without a client."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from .backends import known_backends, open_backend
from .config import Config
from .errors import EndUnconfirmed, NotFound, SandboxUnreachable, SeerError
from .files import Lock
from .flags import above_one
from .money import money
from .packs import Packs
from .sessions import Register
from .sessions.record import read_record
from .sessions.sweep import sweep
from .spend import SpendBook


@dataclass(frozen=True)
class Line:
    handle: str
    backend: str
    state: str
    """runs, ended, gone (nobody has noted it yet), unknown (it cannot be asked) or damaged."""
    says: str
    server: bool
    """Whether a server that runs uses it."""
    dollars: float
    notebook: str


def add_sandboxes(commands: Any, common: argparse.ArgumentParser) -> None:
    """The command line of `sandboxes`."""
    top = commands.add_parser("sandboxes", help="what runs, what it costs, and its end")
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    listed = verbs.add_parser("list", parents=[common], help="all sandboxes of this state folder")
    listed.add_argument("--json", action="store_true", help="print one JSON object")
    stop = verbs.add_parser("stop", parents=[common], help="end sandboxes; their notebooks stay")
    stop.add_argument("handles", metavar="HANDLE", nargs="*")
    stop.add_argument("--all", action="store_true", help="all that run, whoever uses them")
    swept = verbs.add_parser(
        "sweep", parents=[common], help="end what runs although no record knows of it"
    )
    swept.add_argument("--backend", metavar="NAME", action="append", help="ask only this one")
    costs = verbs.add_parser(
        "costs", parents=[common], help="what sandboxes cost, for each owner and day"
    )
    costs.add_argument(
        "--days", type=above_one, default=7, metavar="N", help="how many days back (default: 7)"
    )
    costs.add_argument("--json", action="store_true", help="print one JSON object")


async def run_sandboxes(flags: argparse.Namespace, config: Config) -> int:
    """Do what the command line says; the exit status. Raises SeerError."""
    if flags.verb == "list":
        lines = await survey(config)
        if flags.json:
            print(json.dumps({"sandboxes": [asdict(line) for line in lines]}, indent=1))
        else:
            show(lines)
        return 0
    if flags.verb == "costs":
        return costs(config, flags.days, flags.json)
    if flags.verb == "stop":
        return await stop(config, flags.handles, flags.all)
    return await sweep_all(config, flags.backend or used(config))


def folders(config: Config) -> list[Path]:
    root = config.state_dir / "sandboxes"
    return sorted(f for f in root.iterdir() if f.is_dir()) if root.is_dir() else []


async def survey(config: Config) -> list[Line]:
    """What there is, the machines asked where no server has them."""
    return list(await asyncio.gather(*(look(config, folder) for folder in folders(config))))


async def look(config: Config, folder: Path) -> Line:
    lock = Lock(folder / "lock")
    busy = not lock.take()
    lock.release()
    try:
        record = read_record(folder)
        backend, ended, path = str(record["backend"]), record["ended"], str(record["notebook"])
        kept = record["sandbox"]
    except (OSError, ValueError, KeyError) as error:
        says = f"its record cannot be read ({error}); see `seer-mcp doctor`"
        return Line(folder.name, "", "damaged", says, busy, 0.0, "")
    state, says = "runs", "used by a server" if busy else "no server uses it now; the next one will"
    if ended is not None:
        state, says = "ended", str(ended)
    elif not busy:
        try:
            if kept is None or await open_backend(backend, config).find(kept) is None:
                state, says = "gone", "it has ended, and the next server will note it"
        except SeerError as error:
            state, says = "unknown", str(error)
    spent = SpendBook(config.state_dir / "spend.jsonl", "").of(folder.name, time.time())
    return Line(folder.name, backend, state, says, busy, spent.dollars, path)


def show(lines: list[Line]) -> None:
    for line in lines:
        cost = f", {money(line.dollars)} so far" if line.dollars else ""
        print(
            f"{line.handle}  {line.backend}  {line.state} ({line.says}){cost}\n    {line.notebook}"
        )
    living = sum(line.state in ("runs", "unknown") for line in lines)
    print(f"{living} running, {len(lines) - living} not")


def costs(config: Config, days: int, as_json: bool) -> int:
    """What was spent; 1 if a part of the book could not be read."""
    book = SpendBook(config.state_dir / "spend.jsonl", "")
    found = book.by_day(days, time.time())
    if as_json:
        lines = [
            {
                "day": day,
                "owner": owner,
                "dollars": round(s.dollars, 4),
                "gpu_minutes": s.gpu_minutes,
            }
            for day, owner, s in found
        ]
        print(json.dumps({"costs": lines}, indent=1))
    else:
        for day, owner, spent in found:
            print(
                f"{day}  {owner:24}  {money(spent.dollars):>9}  {spent.gpu_minutes:,.1f} GPU-minutes"
            )
        if not found:
            print(f"nothing that costs money ran in the last {days} days")
    if damage := book.damage():
        print(f"seer-mcp: {damage}", file=sys.stderr)
    return 1 if damage else 0


async def stop(config: Config, handles: list[str], everything: bool) -> int:
    """0 if all of them have ended."""
    lines = {line.handle: line for line in await survey(config)}
    living = [h for h, line in lines.items() if line.state in ("runs", "unknown", "gone")]
    for handle in handles:
        if handle not in lines:
            raise NotFound("sandbox", handle, living)
    wanted = living if everything else handles
    if not wanted:
        print(
            "Nothing runs."
            if everything
            else "Name a sandbox, or give --all. See `seer-mcp sandboxes list`."
        )
        return 0 if everything else 2
    said = await asyncio.gather(*(stop_one(config, lines[handle]) for handle in wanted))
    for _, text in said:
        print(text)
    swept = await sweep_all(config, used(config)) if everything else 0
    return max(swept, *(code for code, _ in said))


async def stop_one(config: Config, line: Line) -> tuple[int, str]:
    """End it; the exit status and a sentence."""
    if line.state == "ended":
        return 0, f"{line.handle}: it had ended already ({line.says})"
    if line.state == "damaged":
        return 1, f"{line.handle}: {line.says}"
    folder = config.state_dir / "sandboxes" / line.handle
    try:
        if line.server:  # its server hears of it as of any other end
            kept = read_record(folder)["sandbox"]
            found = await open_backend(line.backend, config).find(kept) if kept else None
            if found is None:
                return 1, f"{line.handle}: its server is starting it; end it there"
            await found.terminate()
            return (
                0,
                f"{line.handle}: ended; its server notes it and keeps the notebook",
            )
        register = Register(replace(config, on_exit="keep"), Packs([]))
        try:
            return await register.end(folder)
        finally:
            await register.close()
    except (EndUnconfirmed, SandboxUnreachable) as error:
        return 1, str(error)


def used(config: Config) -> list[str]:
    """Backends of which this state folder has a trace."""
    found = {"local"}
    found.update(name for name in ("modal", "ssh") if (config.state_dir / name).is_dir())
    for folder in folders(config):
        try:
            found.add(str(read_record(folder)["backend"]))
        except (OSError, ValueError, KeyError):
            continue  # `list` and the doctor say so
    return sorted(found & known_backends().keys())


async def sweep_all(config: Config, backends: list[str]) -> int:
    """0 if everything could be asked, and all that had to end has ended."""
    code = 0
    for name in backends:
        try:
            told = await sweep(open_backend(name, config), config.state_dir, lambda handle: False)
        except SandboxUnreachable as error:
            print(f"{name}: {error}")
            code = 1
            continue
        for text in told:
            print(f"{name}: {text}")
            code = max(code, int(text.startswith("STILL")))
        if not told:
            print(f"{name}: nothing runs there that no record knows of")
    return code
