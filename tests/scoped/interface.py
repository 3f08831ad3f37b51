"""A small interface for tests: arithmetic, arrays, state, and functions that fail in every way."""

from __future__ import annotations

import os
import time
from typing import Literal

import numpy as np

from tool_packs.scoped import expose

SECRET = "the-marmot-sleeps-at-noon"
kept: list[str] = []


@expose
def add(a: int, b: int = 2) -> int:
    """The sum of two whole numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


@expose
def embed(text: str, scale: float = 1.0, kind: Literal["sum", "mean"] = "sum") -> np.ndarray:
    """Letter counts of a text: [26], float32."""
    counts = np.zeros(26, dtype=np.float32)
    for letter in text.lower():
        if "a" <= letter <= "z":
            counts[ord(letter) - 97] += scale
    return counts / max(len(text), 1) if kind == "mean" else counts


@expose
def cosine(a: np.ndarray, b: np.ndarray) -> float:
    """The cosine of two vectors; NaN if one is zero."""
    with np.errstate(invalid="ignore"):
        return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


@expose
def remember(text: str, tags: list[str] | None = None) -> dict[str, int | list[str]]:
    """Keep a text; how many there are, and its tags."""
    kept.append(text)
    return {"kept": len(kept), "tags": tags or []}


@expose
def echo(value: str | int | float | bool | list[str] | dict[str, str] | None) -> str:
    """The Python repr of a value, which shows what arrived."""
    return repr(value)


@expose
def fail(how: str) -> str:
    """Fail in the way that is named."""
    if how == "file":
        open("/var/lib/secret-place/weights.bin")  # noqa: SIM115
    if how == "source":
        raise ValueError(f"failed at {__file__ if '__file__' in globals() else os.getcwd()}")
    if how == "lines":
        raise RuntimeError("first line\nSECRET = second line")
    if how == "object":
        return object()  # type: ignore
    if how == "type":
        return 3  # type: ignore
    if how == "exit":
        raise SystemExit(0)
    if how == "die":
        os._exit(1)
    if how == "print":
        print(SECRET)  # noqa: T201
        return "printed"
    if how == "sleep":
        time.sleep(10_000)
    if how == "cycle":
        ring: list = []
        ring.append(ring)
        return ring  # type: ignore
    raise KeyError(how)


@expose
def zeros(rows: int, columns: int) -> np.ndarray:
    """An array of zeros."""
    return np.zeros((rows, columns))


def hidden(code: str) -> object:
    """Not exposed: runs code."""
    return eval(code)
