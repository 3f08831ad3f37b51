"""A notebook as HTML that a browser can show without running anything of it."""

from __future__ import annotations

import hashlib
import html
import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers.python import PythonLexer

from ..text import collapse, printable, strip_ansi, visible

IMAGES = ("image/png", "image/jpeg", "image/gif", "image/webp")
SHOWN_CHARACTERS = 60_000  # of one output; the file has all
SHOWN_SOURCE = 200_000
IMAGE_CHARACTERS = 8_000_000
STATES = {
    "complete": "done",
    "error": "failed",
    "running": "running",
    "queued": "queued",
    "interrupted": "interrupted",
}


@dataclass(frozen=True)
class CellHtml:
    id: str
    html: str

    @property
    def version(self) -> str:
        return hashlib.sha256(self.html.encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def _markdown() -> MarkdownIt:
    # No HTML of the notebook's own, no images (they would tell a foreign server who reads), and
    # links only to what markdown-it takes for harmless.
    return MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")


@lru_cache(maxsize=1)
def _code() -> tuple[Any, Any]:
    return PythonLexer(), HtmlFormatter(nowrap=True)


def code_style() -> str:
    """Colours of code, light and dark."""
    light = HtmlFormatter(style="default").get_style_defs(".source")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".source")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"


def style() -> str:
    """All of the pages' CSS."""
    sheet = files("seer_mcp.watch") / "static" / "watch.css"
    return sheet.read_text(encoding="utf-8") + code_style()


def markdown_html(text: str) -> str:
    """Markdown of a notebook, without markup of its own."""
    return _markdown().render(shown(text, SHOWN_SOURCE))


def read_cells(path: Path) -> list[CellHtml]:
    """The cells of a notebook file. Raises OSError or ValueError."""
    found = json.loads(path.read_bytes())
    cells = found.get("cells") if isinstance(found, dict) else None
    if not isinstance(cells, list):
        raise ValueError(f"{path.name} is no notebook")
    return [
        cell_html(cell, number) for number, cell in enumerate(cells, 1) if isinstance(cell, dict)
    ]


def cell_html(cell: dict[str, Any], number: int) -> CellHtml:
    id = str(cell.get("id") or f"cell-{number}")
    source = shown(joined(cell.get("source")), SHOWN_SOURCE)
    if cell.get("cell_type") != "code":
        body = f'<div class="markdown">{markdown_html(source)}</div>'
        return CellHtml(
            id, f'<article class="cell text" id="{attribute(id)}" tabindex="0">{body}</article>'
        )
    lexer, formatter = _code()
    coloured = highlight(source, lexer, formatter)
    facts = (cell.get("metadata") or {}).get("seer") or {}
    state = str(facts.get("state") or "")
    seconds = facts.get("seconds")
    took = f" in {seconds:.1f} s" if isinstance(seconds, (int, float)) else ""
    outputs = "".join(
        output_html(output) for output in cell.get("outputs") or [] if isinstance(output, dict)
    )
    label = f"{STATES.get(state, state)}{took}"
    head = (
        f'<header><span class="count">[{html.escape(str(cell.get("execution_count") or " "))}]</span> '
        f'<span class="state {attribute(STATES.get(state, "other"))}">{html.escape(label)}</span></header>'
    )
    body = f'<pre class="source"><code>{coloured}</code></pre><div class="outputs">{outputs}</div>'
    return CellHtml(
        id,
        f'<article class="cell code" id="{attribute(id)}" tabindex="0" aria-label="cell {attribute(id)}">'
        f"{head}{body}</article>",
    )


def output_html(output: dict[str, Any]) -> str:
    kind = output.get("output_type")
    if kind == "stream":
        name = "stderr" if output.get("name") == "stderr" else "stdout"
        text = text_html(joined(output.get("text")))
        return (
            f'<pre class="{name}">{text}</pre>' if text.strip() else ""
        )  # as after a progress bar
    if kind == "error":
        lines = output.get("traceback") or [f"{output.get('ename')}: {output.get('evalue')}"]
        return f'<pre class="error">{text_html(chr(10).join(map(str, lines)))}</pre>'
    data = output.get("data")
    if not isinstance(data, dict):
        return ""
    text = joined(data.get("text/plain"))
    for mime in IMAGES:
        picture = "".join(joined(data.get(mime)).split())
        if picture and len(picture) <= IMAGE_CHARACTERS and picture.isascii():
            words = attribute(text[:200]) or "figure"
            return f'<img src="data:{mime};base64,{attribute(picture)}" alt="{words}">'
    if "text/markdown" in data:
        return f'<div class="markdown">{_markdown().render(shown(joined(data["text/markdown"])))}</div>'
    # HTML and what else a browser would run is shown as its text.
    return f'<pre class="result">{text_html(text)}</pre>' if text else ""


def text_html(text: str) -> str:
    return html.escape(shown(visible(printable(strip_ansi(collapse(text))))))


def shown(text: str, limit: int = SHOWN_CHARACTERS) -> str:
    if len(text) <= limit:
        return text
    half = limit // 2
    return f"{text[:half]}\n… {len(text) - limit:,} characters are left out here …\n{text[-half:]}"


def joined(text: Any) -> str:
    return "".join(map(str, text)) if isinstance(text, list) else str(text or "")


def attribute(text: str) -> str:
    return html.escape(text, quote=True)
