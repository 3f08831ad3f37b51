"""A finished notebook in another form: HTML, a Python script, Markdown."""

from __future__ import annotations

import ast
import base64
import binascii
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from .. import about
from ..outputs import as_piece, joined
from ..text import collapse, printable, strip_ansi, visible
from ..watch.page import style
from .run import Run

SHOWN_CHARACTERS = 60_000  # of one output; the notebook has all
KINDS = {"image/png": "png", "image/jpeg": "jpg", "image/gif": "gif", "image/webp": "webp"}
FENCE = re.compile(r"`{3,}")

Form = Callable[[Run, Path], str]


def page(name: str, **given: Any) -> str:
    """A page that needs nothing else, and in which nothing runs."""
    templates = Environment(
        loader=PackageLoader("seer_mcp.export"), autoescape=True, undefined=StrictUndefined
    )
    return templates.get_template(name).render(style=style(), **given)


def as_html(run: Run, out: Path) -> str:
    return page("notebook.html", run=run)


# -- script -----------------------------------------------------------------------------------


def as_script(run: Run, out: Path) -> str:
    """Cells parted by `# %%`, as editors know them. What did not run to its end is a comment."""
    parts = [commented("\n".join([run.title, "", *_told(run)]))]
    for cell in run.cells:
        source = cell["source"]
        if cell["cell_type"] != "code":
            parts.append(f"# %% [markdown]\n{commented(source)}")
        elif why := _not_run(cell):
            parts.append(f"# %% {cell['id']}: {why}\n{commented(source)}")
        else:
            parts.append(f"# %% {cell['id']}\n{source}")
    return "\n\n".join(parts) + "\n"


def commented(text: str) -> str:
    return "\n".join(f"# {line}".rstrip() for line in text.splitlines())


def _not_run(cell: dict[str, Any]) -> str:
    """Why a cell is no part of a script that runs; "" if it is."""
    noted = about.facts(cell["metadata"])
    state = noted.get("state") or ("complete" if cell.get("execution_count") else "not_run")
    if state != "complete":
        return "it was never run" if state == "not_run" else f"it ended with {state}"
    try:
        ast.parse(cell["source"])
    except (SyntaxError, ValueError, RecursionError):
        return "it is for IPython, no plain Python"
    return ""


# -- Markdown ---------------------------------------------------------------------------------


def as_markdown(run: Run, out: Path) -> str:
    """Images are written into a folder beside it; outputs stand in fences, so that none is markup."""
    parts = ["\n".join(f"> {line}  " for line in "\n".join(_told(run)).splitlines())]
    for cell in run.cells:
        if cell["cell_type"] != "code":
            parts.append(cell["source"])
            continue
        parts.append(fenced(cell["source"], "python"))
        parts += [part for output in _outputs(cell, out) if (part := output)]
    return "\n\n".join(part for part in parts if part.strip()) + "\n"


def _told(run: Run) -> list[str]:
    """What a reader has to know of a notebook that is none any more."""
    lines = [f"Made with: {run.made_with}"] if run.made_with else []
    lines += [f"Model {line}" for line in run.model_lines()]
    lines += [f"Replay of: {run.replay_of}"] if run.replay_of else []
    return [*lines, f"Cost: {run.cost}", f"Run it again: {run.run_again}"]


def _outputs(cell: dict[str, Any], out: Path) -> list[str]:
    parts: list[str] = []
    for index, output in enumerate(cell["outputs"]):
        piece = as_piece(index, output)
        for kind, data in piece.images:
            folder = out.with_name(f"{out.stem}_files")
            name = f"{cell['id']}-{index}.{KINDS[kind]}"
            try:
                image = base64.b64decode(data)
            except (binascii.Error, ValueError):
                parts.append("*(an image that cannot be read)*")
                continue
            folder.mkdir(exist_ok=True)
            (folder / name).write_bytes(image)
            parts.append(f"![output of cell {cell['id']}](<{folder.name}/{name}>)")
        text = visible(printable(strip_ansi(collapse(joined(piece.text)))))
        if text.strip() and not piece.images:
            parts.append(fenced(text[:SHOWN_CHARACTERS], "text"))
    return parts


def fenced(text: str, kind: str) -> str:
    """In a fence that nothing in the text can close."""
    longest = max((len(run) for run in FENCE.findall(text)), default=2)
    fence = "`" * (longest + 1)
    return f"{fence}{kind}\n{text.rstrip()}\n{fence}"


FORMS: dict[str, tuple[Form, str]] = {
    "html": (as_html, "html"),
    "script": (as_script, "py"),
    "markdown": (as_markdown, "md"),
}
