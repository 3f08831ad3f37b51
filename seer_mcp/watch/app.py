"""The live notebook beside the chat, in hosts of the MCP Apps extension: its page, and the cells that it reads."""

from __future__ import annotations

import asyncio
import json
from importlib.resources import files
from typing import Any

from ..sessions import Session
from .page import cell_html, code_style
from .source import state_of


def app_page() -> str:
    """The HTML document that a host shows: nothing is fetched by it, the host reads for it."""
    static = files("seer_mcp.watch") / "static"
    style = static.joinpath("watch.css").read_text() + code_style()
    return static.joinpath("app.html").read_text().replace("/*style*/", style)


async def cells_page(session: Session) -> str:
    """A notebook as it is now: JSON with each cell as HTML of which nothing runs."""
    text = session.redactor.text(session.notebook.text())
    page = {"name": session.name, "state": state_of(session), "live": session.ended is None}
    return await asyncio.to_thread(rendered, text, page)


def rendered(text: str, page: dict[str, Any]) -> str:
    made = (cell_html(cell, number) for number, cell in enumerate(json.loads(text)["cells"], 1))
    cells = [{"id": cell.id, "version": cell.version, "html": cell.html} for cell in made]
    return json.dumps({**page, "cells": cells})
