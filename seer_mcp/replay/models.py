"""Which models a notebook loads, read from its source; and another model in the place of one."""

from __future__ import annotations

import ast
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..errors import BadInput

OF_THE_OLD = ("name", "revision", "adapter", "base", "alias")  # of load_model, that go with a model


@dataclass(frozen=True)
class Loaded:
    """One call of load_model."""

    cell: str
    variable: str
    """What it is assigned to, or "" if that is no plain name."""
    model: str
    """What stands as its name: the text if it is a literal, else the expression."""
    options: Mapping[str, str] = field(default_factory=dict[str, str])
    """Those of its other arguments that are literals."""


def loads(cells: Sequence[tuple[str, str]]) -> list[Loaded]:
    """The calls of load_model in code cells (id, source), from the top."""
    return [
        Loaded(id, variable, _said(_model(call)), _options(call))
        for id, source in cells
        for variable, call in _calls(source)
    ]


def exchanges(wanted: Sequence[str], found: Sequence[Loaded]) -> dict[str, str]:
    """{variable: model} of what was asked for as MODEL or VARIABLE=MODEL. Raises BadInput."""
    names = [each.variable for each in found if each.variable]
    asked: dict[str, str] = {}
    for text in wanted:
        variable, sign, model = text.partition("=")
        if not (sign and variable.isidentifier()):
            variable, model = (names[0] if names else ""), text
        if not names:
            raise BadInput("model", text, "no cell of the notebook assigns load_model(…) to a name")
        if variable not in names:
            raise BadInput("model", text, f"load_model is assigned to {', '.join(names)}")
        if not model.strip():
            raise BadInput("model", text, "give a hub id, a folder or organism:NAME")
        asked[variable] = model.strip()
    return asked


def exchanged(source: str, models: Mapping[str, str]) -> str:
    """The source with other models in its calls of load_model; what is not one of them stays."""
    data = source.encode("utf-8", "surrogatepass")
    starts = [0]
    for line in data.split(b"\n"):
        starts.append(starts[-1] + len(line) + 1)
    for variable, call in reversed(_calls(source)):
        if variable not in models:
            continue
        kept = [
            ast.get_source_segment(source, each) or ""
            for each in call.keywords
            if each.arg not in OF_THE_OLD
        ]
        function = ast.get_source_segment(source, call.func)
        text = f"{function}({', '.join([repr(models[variable]), *kept])})"
        begin = starts[call.lineno - 1] + call.col_offset
        end = starts[(call.end_lineno or call.lineno) - 1] + (call.end_col_offset or 0)
        data = data[:begin] + text.encode("utf-8", "surrogatepass") + data[end:]
    return data.decode("utf-8", "surrogatepass")


def _calls(source: str) -> list[tuple[str, ast.Call]]:
    """(variable, call) in their order; none in what is no plain Python (a cell with magics, say)."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    named = {
        id(node.value): target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = [
        (named.get(id(node), ""), node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and _name(node.func) == "load_model"
    ]
    return sorted(found, key=lambda pair: (pair[1].lineno, pair[1].col_offset))


def _name(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _model(call: ast.Call) -> ast.expr | None:
    if call.args:
        return call.args[0]
    return next((each.value for each in call.keywords if each.arg == "name"), None)


def _options(call: ast.Call) -> dict[str, str]:
    return {
        each.arg: str(each.value.value)
        for each in call.keywords
        if each.arg and each.arg != "name" and isinstance(each.value, ast.Constant)
    }


def _said(value: ast.expr | None) -> str:
    if isinstance(value, ast.Constant):
        return str(value.value)
    return ast.unparse(value) if value is not None else ""
