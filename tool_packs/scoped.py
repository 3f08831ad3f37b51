"""The inside of a scoped sandbox: functions that may be called from outside, and how data crosses.

    from tool_packs.scoped import expose

    @expose
    def embed(text: str, layer: int = -1) -> "np.ndarray":
        '''Mean of the residual stream over the tokens of a text: [width].'''

A server with `--scope` offers such functions, and nothing else, to its clients. Arguments and results are
JSON; an array of numpy or torch is {"shape": [2, 3], "dtype": "float32", "data": [six numbers]}, NaN and
infinities are the texts "NaN", "Infinity", "-Infinity". A plain `import` of this module changes nothing.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from .errors import PackError

__all__ = ["CannotCross", "call", "check", "decoded", "encoded", "expose"]

MIME = "application/vnd.seer.scoped+json"
NUMBERS = 20_000  # of one array
CHARACTERS = 400_000  # of a result as JSON
SENTENCE = 500  # characters of an error
DEPTH = 40
NOT_FINITE = ("NaN", "Infinity", "-Infinity")
# Digits after which a decimal number is read back as the very same.
DIGITS = {"float16": 5, "bfloat16": 4, "float32": 9, "float64": 17}
DTYPES = (*DIGITS, "bool", *(f"{u}int{bits}" for u in ("", "u") for bits in (8, 16, 32, 64)))
# What tells of the machine: paths, and where objects lie in memory.
_PATH = re.compile(r"(?:file://|~|[A-Za-z]:)?(?:[\\/][\w.@+-][^\s\\/'\":,;()<>\[\]]*){2,}[\\/]?")
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")

Function = TypeVar("Function", bound=Callable[..., Any])
_exposed: dict[str, Callable[..., Any]] = {}


class CannotCross(PackError, TypeError):
    """A value that is no data, or too much of it."""


def expose(function: Function) -> Function:
    """Let clients call a function. It needs a docstring and a type for each parameter and the result."""
    _exposed[function.__name__] = function
    return function


def check(parameters: Mapping[str, Sequence[str]]) -> None:
    """Whether the functions are here with these parameters. Raises CannotCross (the server runs this)."""
    for name, wanted in parameters.items():
        function = _exposed.get(name)
        if function is None:
            raise CannotCross(f"{name} was not exposed when the file ran: is its @expose reached?")
        if [*inspect.signature(function).parameters] != [*wanted]:
            raise CannotCross(f"{name} has other parameters than in the file: {', '.join(wanted)}")
        try:
            typing.get_type_hints(function)
        except NameError as error:
            raise CannotCross(
                f"a type of {name} is not there when the file runs: {error}"
            ) from error


def call(name: str, arguments: str, numbers: int = NUMBERS, characters: int = CHARACTERS) -> None:
    """Call an exposed function with JSON and show what it returns as JSON (the server runs this).

    An exception becomes a sentence; its traceback goes to stderr, which only the operator reads.
    """
    from IPython.display import publish_display_data

    try:
        answer, shown = _answer(name, json.loads(arguments), numbers, characters)
    except (Exception, SystemExit) as error:  # noqa: BLE001 (whatever a function raises becomes a sentence)
        traceback.print_exc()
        answer = {"error": sentence(error)}
        shown = answer["error"]
    publish_display_data({MIME: answer, "text/plain": f"{name}: {shown}"})


def _answer(
    name: str, arguments: dict[str, Any], numbers: int, characters: int
) -> tuple[dict[str, Any], str]:
    function = _exposed[name]
    hints = typing.get_type_hints(function)
    given = {key: decoded(value, hints.get(key, Any)) for key, value in arguments.items()}
    value = function(**given)
    try:
        answer = {"value": encoded(value, numbers)}
        size = len(json.dumps(answer))
    except CannotCross as error:
        raise CannotCross(f"{name} returned {error}") from error
    if size > characters:
        raise CannotCross(
            f"{name} returned {size:,} characters of data, and at most {characters:,} can cross; ask for less"
        )
    shape = getattr(value, "shape", None)
    return answer, type(value).__name__ + ("" if shape is None else f" {list(shape)}")


def sentence(error: BaseException) -> str:
    """An exception in one line that tells nothing of the machine."""
    text = str(error).strip().splitlines()
    said = _ADDRESS.sub("", _PATH.sub("(a path)", text[0] if text else ""))
    kind = "" if isinstance(error, CannotCross) else type(error).__name__
    whole = ": ".join(part for part in (kind, said) if part)
    return whole if len(whole) <= SENTENCE else f"{whole[: SENTENCE - 1]}…"


# -- from values to data ----------------------------------------------------------------------


def encoded(value: Any, numbers: int = NUMBERS, depth: int = 0) -> Any:
    """A value as JSON holds it. Raises CannotCross: '… a Foo, which is no data; …'."""
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return finite(float(value))
    if depth > DEPTH:
        raise CannotCross(f"something nested deeper than {DEPTH} levels, which cannot cross")
    if _is_array(value):
        return _array(value, numbers)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        if odd := next((key for key in value if not isinstance(key, str)), None):
            raise CannotCross(f"a dict with a key {odd!r}, which cannot cross; keys must be texts")
        return {str(key): encoded(held, numbers, depth + 1) for key, held in value.items()}
    if isinstance(value, (list, tuple)):
        return [encoded(held, numbers, depth + 1) for held in value]
    raise CannotCross(
        f"something of type {type(value).__name__}, which is no data; return texts, numbers, lists, dicts or arrays"
    )


def finite(number: float) -> Any:
    if math.isfinite(number):
        return number
    return "NaN" if math.isnan(number) else "Infinity" if number > 0 else "-Infinity"


def _is_array(value: Any) -> bool:
    numpy, torch = sys.modules.get("numpy"), sys.modules.get("torch")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return True
    return torch is not None and isinstance(value, torch.Tensor)


def _array(value: Any, numbers: int) -> Any:
    shape = [int(n) for n in value.shape]
    if math.prod(shape) > numbers:
        raise CannotCross(
            f"an array of shape {shape}, which is {math.prod(shape):,} numbers, and at most {numbers:,} can cross; "
            "ask for less: a slice, a mean, the largest"
        )
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype not in DTYPES:
        raise CannotCross(f"an array of {dtype}, which cannot cross; use {', '.join(DTYPES)}")
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if dtype == "bfloat16" else value
    data: list[Any] = value.reshape(-1).tolist()
    if dtype in DIGITS:
        digits = DIGITS[dtype]
        data = [finite(float(f"{number:.{digits}g}")) for number in data]
    if not isinstance(value, sys.modules["numpy"].generic if "numpy" in sys.modules else ()):
        return {"shape": shape, "dtype": dtype, "data": data}
    return data[0]  # a scalar of numpy is a number


# -- from data to values ----------------------------------------------------------------------


def decoded(value: Any, kind: Any) -> Any:
    """The argument for a parameter of a type; the server has checked that it fits."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return _first(value, inner)
    if origin is typing.Annotated:
        return decoded(value, inner[0])
    if (library := _library(kind)) and isinstance(value, dict):
        return _as_array(value, library)
    if isinstance(value, list) and inner:
        if origin is tuple:
            kinds = [inner[0]] * len(value) if inner[-1] is ... else inner
            return tuple(decoded(held, of) for held, of in zip(value, kinds, strict=True))
        return [decoded(held, inner[0]) for held in value]
    if isinstance(value, dict) and len(inner) == 2:
        return {key: decoded(held, inner[1]) for key, held in value.items()}
    if kind is float and isinstance(value, int):
        return float(value)
    return value


def _first(value: Any, kinds: Iterable[Any]) -> Any:
    """The value as the first type of a union that takes its form."""
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if isinstance(value, dict) and (_library(kind) or origin is dict):
            return decoded(value, kind)
        if isinstance(value, list) and origin in (list, tuple, Sequence):
            return decoded(value, kind)
    return value


def _library(kind: Any) -> str:
    """ "torch" or "numpy" for a type of arrays, else ""."""
    kind = typing.get_origin(kind) or kind
    module = str(getattr(kind, "__module__", ""))
    if getattr(kind, "__name__", "") in ("ndarray", "Tensor"):
        return "torch" if module.startswith("torch") else "numpy"
    return ""


def _as_array(value: dict[str, Any], library: str) -> Any:
    dtype, shape = value["dtype"], value["shape"]
    data = [float(number) if number in NOT_FINITE else number for number in value["data"]]
    if library == "torch" or dtype == "bfloat16":
        import torch

        return torch.tensor(data, dtype=getattr(torch, dtype)).reshape(shape)
    import numpy

    return numpy.array(data, dtype=dtype).reshape(shape)
