"""Tools: load a model, and find a technique."""

from __future__ import annotations

import keyword
import time
from typing import Any, Literal

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult

from ..catalogue import answer, detail, overview
from ..errors import BadInput
from ..render import Answer
from ..sessions import Register
from .answers import of_runs
from .seam import Seconds, heartbeat, owner, tool


def model_cell(model: str, variable: str, options: dict[str, str]) -> str:
    """The visible cell that loads a model; it runs anywhere the packs can be imported."""
    if not variable.isidentifier() or keyword.iskeyword(variable):
        raise BadInput("variable", variable, "it is not a Python name")
    if not model.strip() or "\0" in model:
        raise BadInput("model", model, "give a hub id, a folder, or organism:NAME")
    given = "".join(f", {name}={value!r}" for name, value in options.items() if value)
    return f"from tool_packs.models import load_model\n\n{variable} = load_model({model!r}{given})\n{variable}"


def tools(register: Register) -> list[Tool]:
    async def load_model(
        context: Context[Any, Any],
        sandbox: str,
        model: str,
        variable: str = "m",
        adapter: str = "",
        base: str = "",
        revision: str = "",
        dtype: str = "",
        device_map: str = "",
        quantization: Literal["", "4bit", "8bit"] = "",
        wait: Seconds = 45,
    ) -> CallToolResult:
        """Load a language model with a visible cell, as variable `m`. model: a hub id, a folder in
        the sandbox, or a shipped model organism ("organism:base", "organism:user_female", …).
        adapter: a PEFT adapter to put on it; base: the base of an adapter given as model. Reports
        parameters, layers, memory and time."""
        session = await register.get(sandbox, owner())
        options = {
            "adapter": adapter,
            "base": base,
            "revision": revision,
            "dtype": dtype,
            "device_map": device_map,
            "quantization": quantization,
        }
        source = model_cell(model, variable, options)
        session.check_usable(True)
        cell = session.notebook.insert("code", source)
        runs = await session.run_cells([cell])
        began = time.monotonic()
        await session.wait(runs, min(wait, register.config.max_wait), heartbeat(context))
        return (await of_runs(session, runs, time.monotonic() - began)).result()

    async def list_techniques(name: str = "", question: str = "") -> CallToolResult:
        """Interpretability techniques that can be imported in the notebook. Without arguments an
        overview; name: a pack, technique or skill, with signature, shapes, cost, controls, paper, example;
        question: what you want to know."""
        listing, skills = register.workspace(owner())
        if name and question:
            raise BadInput("name", name, "give name or question, not both")
        if name:
            text = detail(listing, name, skills)
        elif question:
            text = answer(listing, question)
        else:
            text = overview(listing, skills)
        names = [technique.full_name for _, technique in listing.techniques()]
        return Answer(text, meta={"techniques": names}).result()

    return [
        tool(load_model, "Load a model", open_world=True, core=True),
        tool(list_techniques, "List techniques", read_only=True, idempotent=True, core=True),
    ]
