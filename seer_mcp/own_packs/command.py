"""`seer-mcp packs`: begin a pack, check one."""

from __future__ import annotations

import argparse
import asyncio
import json
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import BadInput
from .check import of_examples, of_texts
from .new import begin


def add_packs(commands: Any, common: argparse.ArgumentParser) -> None:
    packs = commands.add_parser("packs", help="begin a tool pack of your own, or check one")
    verbs = packs.add_subparsers(dest="verb", metavar="VERB", required=True)
    new = verbs.add_parser("new", help="write a technique that runs, and its tests, to begin with")
    new.add_argument("name", metavar="NAME", help="of the module, as in my_lens")
    new.add_argument(
        "--in", dest="folder", type=Path, default=Path("packs"), help="the folder (default: packs)"
    )
    check = verbs.add_parser(
        "check", parents=[common], help="read what a pack says of itself and run its examples"
    )
    check.add_argument("folder", type=Path, help="the pack folder")
    check.add_argument(
        "--no-run", action="store_true", help="only read; start no sandbox for the examples"
    )
    check.add_argument("--json", action="store_true", help="print one JSON object")


def begin_pack(flags: argparse.Namespace) -> int:
    """`packs new`. Raises SeerError."""
    folder = flags.folder.absolute()
    made = begin(folder, flags.name)
    print("\n".join(f"wrote {path}" for path in made))
    print(f"check it: seer-mcp packs check {folder}\nuse it:   seer-mcp --packs {folder}")
    return 0


def check_packs(flags: argparse.Namespace, config: Config) -> int:
    """`packs check`: 1 if a pack lacks something, else 0. Raises SeerError."""
    folder = flags.folder.absolute()
    if not folder.is_dir():
        raise BadInput("folder", str(folder), "there is no such folder")
    packs, faults = of_texts(folder)
    if not flags.no_run and packs:
        faults += asyncio.run(of_examples(config, folder, packs))
    techniques = [t.full_name for pack in packs for t in pack.techniques]
    if flags.json:
        told = {"techniques": techniques, "faults": [vars(fault) for fault in faults]}
        print(json.dumps(told, indent=1))
    else:
        for fault in faults:
            print(fault)
        ran = "" if flags.no_run else ", examples run"
        print(f"{len(techniques)} techniques in {len(packs)} packs{ran}: {len(faults)} faults")
    return 1 if faults else 0
