"""What a finished notebook says of itself: its title, what it was made with, what it cost, how to run it again."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .outputs import joined

HEADING = re.compile(r"^#{1,6}\s+(.+?)\s*#*\s*$", re.MULTILINE)
TITLE_CHARACTERS = 200
PACKAGES = 40  # that are named
NOTHING_BILLED = "nothing was billed"


def title(cells: Sequence[Mapping[str, Any]], path: Path) -> str:
    """The first heading of a notebook, else the name of its file."""
    for cell in cells:
        if cell["cell_type"] == "markdown" and (found := HEADING.search(joined(cell["source"]))):
            return found[1][:TITLE_CHARACTERS]
    return path.stem


def task(cells: Sequence[Mapping[str, Any]]) -> str:
    """The Markdown with which a notebook begins, without its title."""
    texts: list[str] = []
    for cell in cells:
        if cell["cell_type"] != "markdown":
            break
        texts.append(joined(cell["source"]))
    return HEADING.sub("", "\n\n".join(texts), count=1).strip()


def facts(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the server noted in a notebook; of a file from anywhere, as far as it can be ours."""
    found = metadata.get("seer")
    return found if isinstance(found, dict) else {}


def made_with(noted: Mapping[str, Any]) -> str:
    """Versions and machine, in a line; "" if nothing is known."""
    found = noted.get("environment")
    if not isinstance(found, dict):
        return ""
    packages = found.get("packages")
    named = [("seer-mcp", found.get("seer-mcp")), ("Python", found.get("python"))]
    named += list(packages.items())[:PACKAGES] if isinstance(packages, dict) else []
    parts = [f"{name} {version}" for name, version in named if isinstance(version, str)]
    where = [str(found[key]) for key in ("gpu", "machine") if isinstance(found.get(key), str)]
    backend = noted.get("backend")
    place = f"on {', '.join(where)}" if where else ""
    sandbox = f"in a sandbox of the backend {backend}" if isinstance(backend, str) else ""
    return " ".join(part for part in (", ".join(parts), place, sandbox) if part)


def cost(noted: Mapping[str, Any]) -> str:
    found = noted.get("cost")
    return found if isinstance(found, str) and found else NOTHING_BILLED


def run_again(path: Path) -> str:
    """The command that runs it once more."""
    return f"seer-mcp replay {shlex.quote(path.name)}"


def closing(path: Path, noted: Mapping[str, Any]) -> str:
    """The lines with which the cell of the findings ends."""
    made = made_with(noted)
    parts = [f"**Made with:** {made}"] if made else []
    parts += [f"**Cost:** {cost(noted)}", f"**Run it again:** `{run_again(path)}`"]
    return "\n\n".join(parts)
