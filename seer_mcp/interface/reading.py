"""Reads an interface file: which functions a scoped client may call, with which arguments.

The file is read with `ast` and never imported here: it runs in its own sandbox alone. What is exposed
is fixed by the text that was read; a later change of the file changes nothing for a running server.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InterfaceRefused, show
from .kinds import (
    Array,
    Choice,
    Fixed,
    Items,
    Kind,
    Named,
    Nothing,
    Number,
    OneOf,
    Schema,
    Text,
    Truth,
    Whole,
)

SOURCE_BYTES = 1_000_000
FUNCTIONS = 64
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
RESERVED = frozenset(["read_result", "cancel_call", "expose"])  # what a scoped server offers itself
PLAIN: dict[str, Kind] = {
    "str": Text(),
    "int": Whole(),
    "float": Number(),
    "bool": Truth(),
    "None": Nothing(),
}
ARRAYS = ("ndarray", "NDArray", "Tensor")
ALLOWED = "str, int, float, bool, None, list[…], tuple[…], dict[str, …], Literal[…], X | Y, numpy.ndarray, torch.Tensor"
_ARGUMENT = re.compile(r"(\w+)(?: \([^)]*\))?:\s*(.*)")


@dataclass(frozen=True)
class Parameter:
    name: str
    kind: Kind
    description: str = ""
    required: bool = True
    default: Any = None

    def schema(self) -> Schema:
        found = self.kind.schema(returned=False)
        if self.description:
            found["description"] = self.description
        return found if self.required else {**found, "default": self.default}


@dataclass(frozen=True)
class Exposed:
    """A function that a client may call."""

    name: str
    description: str
    parameters: tuple[Parameter, ...]
    returns: Kind
    signature: str = "()"
    """As it is written: "(text: str, layer: int = -1) -> np.ndarray"."""

    @property
    def summary(self) -> str:
        return self.description.partition("\n")[0]

    def schema(self) -> Schema:
        """Of its arguments."""
        return {
            "type": "object",
            "properties": {p.name: p.schema() for p in self.parameters},
            "required": [p.name for p in self.parameters if p.required],
            "additionalProperties": False,
        }

    def wrong(self, arguments: dict[str, Any]) -> list[str]:
        """What is wrong with the arguments of a call, in sentences."""
        known = {p.name: p for p in self.parameters}
        said = [
            f"{self.name} has no parameter {show(name)}." for name in arguments if name not in known
        ][:6]
        for name, parameter in known.items():
            if name in arguments:
                said += filter(None, [parameter.kind.wrong(arguments[name], name, returned=False)])
            elif parameter.required:
                said.append(f"{self.name} needs {name}.")
        return said


@dataclass(frozen=True)
class Interface:
    """What was read, once and for all."""

    path: Path
    source: str
    description: str
    functions: dict[str, Exposed]


def read_interface(path: Path) -> Interface:
    """Raises InterfaceRefused, with everything that is wrong with the file."""
    try:
        if not path.is_file():
            raise InterfaceRefused(str(path), ["there is no such file"])
        if path.stat().st_size > SOURCE_BYTES:
            raise InterfaceRefused(str(path), [f"it has more than {SOURCE_BYTES:,} bytes"])
        source = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InterfaceRefused(str(path), [f"it cannot be read ({error.strerror})"]) from error
    except UnicodeDecodeError as error:
        raise InterfaceRefused(str(path), ["it is not UTF-8"]) from error
    return parse_interface(source, path)


def parse_interface(source: str, path: Path) -> Interface:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise InterfaceRefused(str(path), [f"it is no Python{where} ({error})"]) from error
    problems: list[str] = []
    functions: dict[str, Exposed] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        if not any(_is_expose(mark) for mark in node.decorator_list):
            continue
        if node not in tree.body:
            problems.append(
                f"{_at(node)}: only functions at the top of the file can be exposed; move it there"
            )
        elif node.name in functions:
            problems.append(f"{_at(node)}: the name is taken by another exposed function")
        else:
            functions[node.name] = _exposed(node, problems)
    if not functions and not problems:
        problems.append(
            "it exposes nothing; write `from tool_packs.scoped import expose` and @expose above a function"
        )
    if len(functions) > FUNCTIONS:
        problems.append(f"it exposes {len(functions)} functions; {FUNCTIONS} at most")
    if problems:
        raise InterfaceRefused(str(path), problems)
    return Interface(path, source, ast.get_docstring(tree) or "", functions)


def _is_expose(mark: ast.expr) -> bool:
    if isinstance(mark, ast.Call):
        mark = mark.func
    name = mark.attr if isinstance(mark, ast.Attribute) else getattr(mark, "id", "")
    return name == "expose"


def _at(node: ast.AST) -> str:
    return f"{getattr(node, 'name', '')} (line {getattr(node, 'lineno', 0)})"


def _exposed(
    node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef, problems: list[str]
) -> Exposed:
    at = _at(node)
    if not isinstance(node, ast.FunctionDef):
        what = "a class" if isinstance(node, ast.ClassDef) else "an async function"
        problems.append(f"{at}: {what} cannot be exposed; write a plain function")
        return Exposed(node.name, "", (), Nothing())
    if not NAME.fullmatch(node.name) or node.name in RESERVED:
        problems.append(
            f"{at}: call it otherwise: up to 64 ASCII letters, digits and _, a letter first, and none of "
            f"{', '.join(sorted(RESERVED))}"
        )
    if any(isinstance(mark, ast.Call) for mark in node.decorator_list if _is_expose(mark)):
        problems.append(f"{at}: write @expose without parentheses")
    if not _is_expose(node.decorator_list[0]):
        problems.append(f"{at}: @expose must be the uppermost decorator")
    text = ast.get_docstring(node) or ""
    if not text:
        problems.append(f"{at}: it has no docstring, and the client sees nothing else of it")
    given = node.args
    if given.vararg or given.kwarg or given.posonlyargs:
        problems.append(f"{at}: *args, **kwargs and / cannot be exposed; name each parameter")
    described = _argument_texts(text)
    named = [*given.args, *given.kwonlyargs]
    missing = [None] * (len(given.args) - len(given.defaults))
    defaults = [*missing, *given.defaults, *given.kw_defaults]
    parameters: list[Parameter] = []
    for argument, default in zip(named, defaults, strict=True):
        where = f"{at}: {argument.arg}"
        if not argument.arg.isascii() or argument.arg.startswith("_"):
            problems.append(f"{where}: a parameter's name is ASCII and begins with a letter")
        kind = _kind(argument.annotation, where, problems)
        parameter = Parameter(argument.arg, kind, described.get(argument.arg, ""))
        if default is not None:
            value = _default(default, kind, where, problems)
            parameter = Parameter(argument.arg, kind, parameter.description, False, value)
        parameters.append(parameter)
    returns = _kind(node.returns, f"{at}: what it returns", problems)
    result = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    signature = f"({ast.unparse(given)}){result}"
    return Exposed(node.name, text, tuple(parameters), returns, signature)


def _argument_texts(docstring: str) -> dict[str, str]:
    """What stands of each parameter under "Args:"."""
    _, found, body = docstring.partition("\nArgs:\n")
    texts: dict[str, str] = {}
    if not found:
        return texts
    lines: list[str] = []
    for line in body.splitlines():
        if line and not line[0].isspace():
            break
        lines.append(line)
    name = ""
    for line in inspect.cleandoc("\n" + "\n".join(lines)).splitlines():
        if (begun := _ARGUMENT.fullmatch(line)) is not None:
            name = begun[1]
            texts[name] = begun[2].strip()
        elif name and line.strip():
            texts[name] += f" {line.strip()}"
    return texts


def _default(node: ast.expr, kind: Kind, where: str, problems: list[str]) -> Any:
    try:
        value = json.loads(json.dumps(ast.literal_eval(node), allow_nan=False))
    except (ValueError, TypeError, RecursionError):
        problems.append(f"{where} = {ast.unparse(node)[:60]}: its default must be written out")
        return None
    if said := kind.wrong(value, where, returned=False):
        problems.append(said.removesuffix("."))
    return value


def _kind(node: ast.expr | None, where: str, problems: list[str]) -> Kind:
    """The type of an annotation; a problem is noted for one that cannot cross."""
    if node is None:
        problems.append(f"{where} has no type; write one of {ALLOWED}")
        return Nothing()
    try:
        return _typed(node)
    except _CannotCross as error:
        problems.append(f"{where}: {error}")
        return Nothing()


class _CannotCross(Exception):
    pass


def _typed(node: ast.expr) -> Kind:
    if isinstance(node, ast.Constant):
        if node.value is None:
            return Nothing()
        if isinstance(node.value, str):
            try:
                return _typed(ast.parse(node.value, mode="eval").body)
            except (SyntaxError, RecursionError, ValueError) as error:
                raise _CannotCross(f"{show(node.value)} is no type") from error
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _one_of([node.left, node.right])
    if isinstance(node, ast.Subscript):
        return _of(_name(node.value), node)
    name = _name(node)
    if name in ARRAYS:
        return Array()
    if name in PLAIN and isinstance(node, ast.Name):
        return PLAIN[name]
    raise _CannotCross(f"{ast.unparse(node)[:80]} cannot cross as data; use {ALLOWED}")


def _name(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")


def _of(name: str, node: ast.Subscript) -> Kind:
    """NAME[…]"""
    inner = node.slice
    parts = inner.elts if isinstance(inner, ast.Tuple) else [inner]
    if name in ARRAYS:
        return Array()
    if name in ("list", "List", "Sequence") and len(parts) == 1:
        return Items(_typed(parts[0]))
    if name in ("tuple", "Tuple"):
        if len(parts) == 2 and isinstance(parts[1], ast.Constant) and parts[1].value is ...:
            return Items(_typed(parts[0]))
        return Fixed(tuple(_typed(part) for part in parts))
    if name in ("dict", "Dict", "Mapping") and len(parts) == 2 and _name(parts[0]) == "str":
        return Named(_typed(parts[1]))
    if name == "Optional" and len(parts) == 1:
        return _one_of([parts[0], ast.Constant(None)])
    if name == "Union":
        return _one_of(parts)
    if name == "Literal":
        return Choice(tuple(_literal(part) for part in parts))
    raise _CannotCross(f"{ast.unparse(node)[:80]} cannot cross as data; use {ALLOWED}")


def _literal(node: ast.expr) -> str | int | bool:
    try:
        value = ast.literal_eval(node)
    except ValueError as error:
        raise _CannotCross(f"{ast.unparse(node)[:60]} in Literal is no text or number") from error
    if not isinstance(value, str | int | bool):
        raise _CannotCross(f"{value!r} in Literal is no text, whole number or truth value")
    return value


def _one_of(parts: list[ast.expr]) -> Kind:
    kinds: list[Kind] = []
    for part in parts:
        found = _typed(part)
        kinds += found.kinds if isinstance(found, OneOf) else (found,)
    different = tuple(dict.fromkeys(kinds))
    if any(isinstance(k, Array) for k in different) and any(
        isinstance(k, Named) for k in different
    ):
        raise _CannotCross("an array and a dict look alike as data; take one of them")
    return different[0] if len(different) == 1 else OneOf(different)
