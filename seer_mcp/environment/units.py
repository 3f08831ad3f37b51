"""Amounts as a person writes them: "64 GiB", "1 h 30 min", "$5". In code plain numbers."""

from __future__ import annotations

import re
from typing import Any

LEAST_MEBIBYTES = 64
_MEMORY = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(MiB|MB|M|GiB|GB|G|TiB|TB|T)\s*", re.IGNORECASE)
_MEBIBYTES = {"m": 1, "g": 1024, "t": 1024 * 1024}
_TIME = re.compile(
    r"(\d+(?:\.\d+)?)\s*(seconds?|secs?|s|minutes?|mins?|min|m|hours?|hrs?|h|days?|d)(?![a-z])",
    re.IGNORECASE,
)
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_DOLLARS = re.compile(r"\s*\$?\s*(\d+(?:\.\d+)?)\s*(?:\$|USD|dollars?)?\s*", re.IGNORECASE)


def mebibytes(value: Any) -> Any:
    """ "64 GiB" -> 65536; a number stays MiB. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found = _MEMORY.fullmatch(value)
    if found is None:
        raise ValueError('write a number with its unit: "64 GiB" or "512 MiB"')
    amount = round(float(found[1]) * _MEBIBYTES[found[2][0].lower()])
    if amount < LEAST_MEBIBYTES:
        raise ValueError(f"a kernel needs at least {LEAST_MEBIBYTES} MiB")
    return amount


def seconds(value: Any) -> Any:
    """ "1 h 30 min" -> 5400.0; a number stays seconds. Raises ValueError."""
    if not isinstance(value, str):
        return value
    parts = _TIME.findall(value)
    if not parts or _TIME.sub("", value).strip(" ,"):
        raise ValueError('write a number with its unit: "45 min", "4 h", "1 h 30 min"')
    return sum(float(number) * _SECONDS[unit[0].lower()] for number, unit in parts)


def dollars(value: Any) -> Any:
    """ "$5" -> 5.0; a number stays dollars. Raises ValueError."""
    if not isinstance(value, str):
        return value
    if "gpu" in value.lower():
        raise ValueError("this is in dollars; for the other unit write gpu_minutes = 40")
    found = _DOLLARS.fullmatch(value)
    if found is None:
        raise ValueError('write dollars: 5, 2.5 or "$5"')
    return float(found[1])
