"""An interface as a module for the notebook of another sandbox: the same functions, which run where the file runs."""

from __future__ import annotations

from .kinds import Choice, Fixed, Items, Kind, Named, Number, OneOf, Text
from .reading import Exposed, Interface

HEAD = """\
{doc!r}

from __future__ import annotations

from pathlib import Path as _Path

from tool_packs.scoped_client import ask as _ask

__all__ = {names!r}
_FOLDER = _Path(__file__).absolute().parent
"""

FUNCTION = """

def {function.name}{function.signature}:
    {function.description!r}
    return _ask(_FOLDER, {module!r}, {function.name!r}, {{{given}}}, torch={torch}, numeric={numeric})
"""


def module_source(name: str, interface: Interface) -> str:
    """What a notebook imports as `name`. It holds names, types and docstrings, and no code of the file."""
    doc = (
        f"{interface.description}\n\nThese functions run in a scoped sandbox; values cross as data."
    )
    parts = [HEAD.format(doc=doc.strip(), names=[*interface.functions])]
    parts += [_function(name, function) for function in interface.functions.values()]
    return "".join(parts)


def _function(module: str, function: Exposed) -> str:
    given = ", ".join(f"{p.name!r}: {p.name}" for p in function.parameters)
    torch = "Tensor" in function.signature.partition(" -> ")[2]
    numeric = _holds(function.returns, Number) and not _holds(function.returns, Text, Choice)
    return FUNCTION.format(
        function=function, module=module, given=given, torch=torch, numeric=numeric
    )


def _holds(kind: Kind, *of: type) -> bool:
    """Whether such a kind is somewhere in it."""
    if isinstance(kind, of):
        return True
    if isinstance(kind, Items | Named):
        return _holds(kind.each, *of)
    if isinstance(kind, Fixed):
        return any(_holds(each, *of) for each in kind.each)
    return isinstance(kind, OneOf) and any(_holds(each, *of) for each in kind.kinds)


def told(name: str, interface: Interface) -> str:
    """The functions for whoever reads a task: a line each."""
    lines = [
        f"- `{name}.{each.name}{each.signature}`: {each.summary}"
        for each in interface.functions.values()
    ]
    head = f"`import {name}` gives functions that run in a sandbox of their own, out of your reach:"
    return "\n".join([head, "", *lines])
