"""What can cross between a client and an exposed function: data, by type, with its JSON schema.

Numbers that JSON lacks cross as the texts "NaN", "Infinity" and "-Infinity". An array of numpy or
torch is {"shape": [2, 3], "dtype": "float32", "data": [six numbers, the last index runs fastest]}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from ..errors import show

Schema = dict[str, Any]
SAFE = 2**53  # whole numbers up to here are the same in every JSON reader
NOT_FINITE = ("NaN", "Infinity", "-Infinity")
DIMENSIONS = 8
RANGES: Mapping[str, tuple[int, int]] = {
    **{f"int{bits}": (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) for bits in (8, 16, 32, 64)},
    **{f"uint{bits}": (0, 2**bits - 1) for bits in (8, 16, 32, 64)},
}
DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", *RANGES)
ARRAY_KEYS = frozenset(["shape", "dtype", "data"])


class Kind(Protocol):
    """The type of a parameter or of what a function returns."""

    def schema(self, returned: bool) -> Schema: ...

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        """What is wrong with a value that came as JSON, in a sentence about `where`; "" if nothing is."""
        ...


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    return is_whole(value) or isinstance(value, float)


def refused(where: str, value: Any, what: str) -> str:
    return f"{where} = {show(value)}: it must be {what}."


@dataclass(frozen=True)
class Text:
    def schema(self, returned: bool) -> Schema:
        return {"type": "string"}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        if not isinstance(value, str):
            return refused(where, value, "a text")
        if not value.isascii() and any("\ud800" <= c <= "\udfff" for c in value):
            return refused(where, value, "a text of whole characters (it holds half a surrogate)")
        return ""


@dataclass(frozen=True)
class Whole:
    def schema(self, returned: bool) -> Schema:
        return {"type": "integer"}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        if not is_whole(value):
            return refused(where, value, "a whole number")
        return "" if abs(value) <= SAFE else refused(where, value, "between -2**53 and 2**53")


@dataclass(frozen=True)
class Number:
    def schema(self, returned: bool) -> Schema:
        if not returned:
            return {"type": "number"}
        return {"anyOf": [{"type": "number"}, {"enum": list(NOT_FINITE)}]}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        if returned and value in NOT_FINITE:
            return ""
        if not is_number(value) or (is_whole(value) and abs(value) > SAFE):
            return refused(where, value, "a number")
        return "" if math.isfinite(value) else refused(where, value, "a finite number")


@dataclass(frozen=True)
class Truth:
    def schema(self, returned: bool) -> Schema:
        return {"type": "boolean"}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        return "" if isinstance(value, bool) else refused(where, value, "true or false")


@dataclass(frozen=True)
class Nothing:
    def schema(self, returned: bool) -> Schema:
        return {"type": "null"}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        return "" if value is None else refused(where, value, "null")


@dataclass(frozen=True)
class Choice:
    """Literal[…] of texts, whole numbers and truth values."""

    values: tuple[str | int | bool, ...]

    def schema(self, returned: bool) -> Schema:
        return {"enum": list(self.values)}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        if any(value == each and type(value) is type(each) for each in self.values):
            return ""
        return refused(where, value, f"one of {', '.join(map(repr, self.values))}")


@dataclass(frozen=True)
class Items:
    """list[X]."""

    each: Kind

    def schema(self, returned: bool) -> Schema:
        return {"type": "array", "items": self.each.schema(returned)}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        if not isinstance(value, list):
            return refused(where, value, "a list")
        said = (self.each.wrong(v, f"{where}[{i}]", returned) for i, v in enumerate(value))
        return next(filter(None, said), "")


@dataclass(frozen=True)
class Fixed:
    """tuple[X, Y]: so many, each of its own type."""

    each: tuple[Kind, ...]

    def schema(self, returned: bool) -> Schema:
        size = len(self.each)
        kinds = [kind.schema(returned) for kind in self.each]
        different = [kind for i, kind in enumerate(kinds) if kind not in kinds[:i]]
        items = different[0] if len(different) == 1 else {"anyOf": different}
        return {"type": "array", "items": items, "minItems": size, "maxItems": size}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        if not isinstance(value, list) or len(value) != len(self.each):
            return refused(where, value, f"a list of {len(self.each)}")
        pairs = enumerate(zip(self.each, value, strict=True))
        said = (kind.wrong(v, f"{where}[{i}]", returned) for i, (kind, v) in pairs)
        return next(filter(None, said), "")


@dataclass(frozen=True)
class Named:
    """dict[str, X]."""

    each: Kind

    def schema(self, returned: bool) -> Schema:
        return {"type": "object", "additionalProperties": self.each.schema(returned)}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        if not isinstance(value, dict):
            return refused(where, value, "an object of named values")
        for name, held in value.items():
            said = Text().wrong(name, f"a name in {where}", returned)
            said = said or self.each.wrong(held, f"{where}[{show(name)}]", returned)
            if said:
                return said
        return ""


@dataclass(frozen=True)
class Array:
    """An array of numpy, or a tensor of torch."""

    def schema(self, returned: bool) -> Schema:
        number: Schema = {"type": ["number", "boolean", "string"]}
        return {
            "type": "object",
            "description": "An array: data in row-major order; NaN and infinities as texts.",
            "properties": {
                "shape": {
                    "type": "array",
                    "items": {"type": "integer", "minimum": 0},
                    "maxItems": DIMENSIONS,
                },
                "dtype": {"enum": list(DTYPES)},
                "data": {"type": "array", "items": number},
            },
            "required": ["shape", "dtype", "data"],
            "additionalProperties": False,
        }

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        if not isinstance(value, dict) or value.keys() != ARRAY_KEYS:
            return refused(
                where, value, 'an array: {"shape": […], "dtype": "float32", "data": […]}'
            )
        shape, dtype, data = value["shape"], value["dtype"], value["data"]
        whole = isinstance(shape, list) and all(is_whole(n) and n >= 0 for n in shape)
        if not whole or len(shape) > DIMENSIONS:
            return refused(f"{where}.shape", shape, f"up to {DIMENSIONS} whole numbers from 0 on")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            return refused(f"{where}.dtype", dtype, f"one of {', '.join(DTYPES)}")
        size = math.prod(shape)
        if not isinstance(data, list) or len(data) != size:
            had = len(data) if isinstance(data, list) else show(data)
            return f"{where}.data has {had}: its shape {shape} needs a list of {size:,} numbers."
        for at, number in enumerate(data):
            if not fits(number, dtype):
                return refused(f"{where}.data[{at}]", number, f"a {dtype}")
        return ""


def fits(number: Any, dtype: str) -> bool:
    """Whether an array of that dtype can hold it."""
    if dtype == "bool":
        return isinstance(number, bool)
    if dtype in RANGES:
        least, most = RANGES[dtype]
        return is_whole(number) and least <= number <= most
    if is_number(number):
        return abs(number) <= SAFE if is_whole(number) else math.isfinite(number)
    return isinstance(number, str) and number in NOT_FINITE


@dataclass(frozen=True)
class OneOf:
    """X | Y."""

    kinds: tuple[Kind, ...]

    def schema(self, returned: bool) -> Schema:
        return {"anyOf": [kind.schema(returned) for kind in self.kinds]}

    def wrong(self, value: Any, where: str, returned: bool) -> str:
        said = [kind.wrong(value, where, returned) for kind in self.kinds]
        if not all(said):
            return ""
        deeper = [text for text in said if not text.startswith(f"{where} = ")]
        return deeper[0] if deeper else refused(where, value, self.described())

    def described(self) -> str:
        ends = (kind.wrong(object(), "", False).partition("it must be ")[2] for kind in self.kinds)
        return ", or ".join(end.removesuffix(".") for end in ends)
