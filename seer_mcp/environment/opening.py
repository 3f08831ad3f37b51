"""What a notebook of an investigation begins with: the task, its models, its own first cells."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Literal

from ..interface import Interface
from .investigation import Investigation
from .spec import ModelSpec

Opening = tuple[Literal["markdown", "code"], str]


def opening_cells(found: Investigation) -> Iterator[Opening]:
    """The cells in their order; those of code are run when the sandbox is ready."""
    heading = f"# {found.title or found.name}"
    yield "markdown", f"{heading}\n\n{found.task.strip()}" if found.task.strip() else heading
    if found.models:
        yield "code", model_cell(found.models)
    for source in found.setup:
        yield "code", source
    if found.interface is not None:
        yield "code", found.interface.source
        yield "code", check_cell(found.interface)


def check_cell(interface: Interface) -> str:
    """Fails if what ran is not what was read."""
    functions = {f.name: [p.name for p in f.parameters] for f in interface.functions.values()}
    return f"import tool_packs.scoped as seer_scoped\n\nseer_scoped.check({json.dumps(functions)})"


def model_cell(models: tuple[ModelSpec, ...]) -> str:
    """Loads every model into its variable; a hidden one by a name that says nothing."""
    lines = ["from tool_packs.models import load_model", ""]
    for number, spec in enumerate(models, 1):
        options: dict[str, str] = {}
        if spec.hidden:
            name = hidden_name(number)
            options = {
                key: hidden_name(number, key) for key in ("adapter", "base") if getattr(spec, key)
            }
            options["alias"] = name
        else:
            name = spec.name
            options = {
                key: value
                for key in ("revision", "adapter", "base")
                if (value := getattr(spec, key))
            }
        if spec.dtype in ("int8", "int4"):
            options["quantization"] = {"int8": "8bit", "int4": "4bit"}[spec.dtype]
        elif spec.dtype:
            options["dtype"] = spec.dtype
        given = "".join(f", {key}={json.dumps(value)}" for key, value in options.items())
        lines.append(f"{spec.variable} = load_model({json.dumps(name)}{given})")
    shown = ", ".join(spec.variable for spec in models)
    return "\n".join([*lines, f"print({shown}, sep='\\n\\n')"])


def hidden_name(number: int, part: str = "") -> str:
    """What a kernel knows a hidden model by, or its adapter or base."""
    return f"model_{number}_{part}" if part else f"model_{number}"
