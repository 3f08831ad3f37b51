"""Numbers of the command line: argparse says it if one is none that fits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import TypeVar

N = TypeVar("N", int, float)


def above_zero(text: str) -> float:
    return checked(float, text, lambda value: 0 < value < math.inf, "a number above 0")


def count(text: str) -> int:
    return checked(int, text, lambda value: value >= 0, "a whole number, 0 or more")


def above_one(text: str) -> int:
    return checked(int, text, lambda value: value >= 1, "a whole number, 1 or more")


def port(text: str) -> int:
    return checked(int, text, lambda value: 1 <= value <= 65535, "a port (1 to 65535)")


def uids(text: str) -> range:
    """FIRST-LAST."""
    first, dash, last = text.partition("-")
    if not (dash and first.isdecimal() and last.isdecimal() and 1000 <= int(first) <= int(last)):
        raise argparse.ArgumentTypeError(f"{text!r} is not FIRST-LAST, two numbers from 1000 on")
    if int(last) >= 2**31 or {65534, 65535} & set(range(int(first), int(last) + 1)[:100_000]):
        raise argparse.ArgumentTypeError(f"{text!r} has numbers that mean nobody (65534, 65535)")
    return range(int(first), int(last) + 1)


def checked(kind: Callable[[str], N], text: str, fits: Callable[[N], bool], what: str) -> N:
    """A number of the command line; argparse says it if it is none that fits."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not fits(value):
        raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
    return value
