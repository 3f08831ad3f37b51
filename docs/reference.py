"""The pages of docs/reference/, from the code; docs/conf.py has them written for each build of the site."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tables

from seer_mcp.catalogue import detail
from seer_mcp.cli import parser
from seer_mcp.environment import BUILTIN_PACKS
from seer_mcp.packs import read_packs


def tools() -> str:
    parts = ["# Tools", "What a client sees. Every call that fails says why, with `isError: true`."]
    for tool in tables.all_tools():
        needed = tool.parameters.get("required", [])
        parts += [f"## {tool.name}", " ".join(tool.description.split())]
        rows = ["| argument | kind | default |", "| --- | --- | --- |"]
        for name, schema in tool.parameters["properties"].items():
            default = "needed" if name in needed else f"`{schema.get('default')!r}`"
            rows.append(f"| `{name}` | {kind(schema)} | {default} |")
        if len(rows) > 2:
            parts.append("\n".join(rows))
    return "\n\n".join(parts) + "\n"


def kind(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return " or ".join(f"`{value!r}`" for value in schema["enum"])
    if "anyOf" in schema:
        return " or ".join(kind(each) for each in schema["anyOf"])
    return str(schema.get("type", "any"))


def commands() -> str:
    parts = ["# Commands", "As `--help` has them."]
    for name, each in sorted(all_parsers(parser()), key=lambda pair: pair[0]):
        parts += [f"## {name}", f"```text\n{each.format_help().rstrip()}\n```"]
    return "\n\n".join(parts) + "\n"


def all_parsers(top: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield top.prog, top
    for action in top._actions:
        if isinstance(action, argparse._SubParsersAction):
            for each in dict.fromkeys(action.choices.values()):
                yield from all_parsers(each)


def techniques() -> str:
    """Each technique as `list_techniques` shows it."""
    listing = read_packs([BUILTIN_PACKS])
    parts = ["# Techniques", "The text of `list_techniques`, read from the packs' docstrings."]
    for pack in listing.packs:
        parts += [f"## {pack.name}", pack.summary]
        for technique in pack.techniques:
            shown = detail(listing, technique.full_name)
            parts += [f"### {technique.full_name}", f"````text\n{shown}\n````"]
    return "\n\n".join(parts) + "\n"


PAGES = {"tools": tools, "commands": commands, "techniques": techniques}


def write(folder: Path) -> None:
    os.environ["COLUMNS"] = "100"  # the width of --help
    folder.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (folder / f"{name}.md").write_text(page())
