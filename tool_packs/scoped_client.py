"""The outside of a scoped sandbox, in a notebook: what a module written by the server calls (see docs/scoped.md).

A request lies in a file of the kernel's folder, and its number is shown to the server over the channel that
every output takes; the answer comes as a file beside it. No network is needed, and nothing but the functions
that are exposed there can be asked for.
"""

from __future__ import annotations

import json
import os
import secrets
import time
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .errors import PackError
from .scoped import DTYPES, NOT_FINITE, decoded, encoded

__all__ = ["ScopedError", "ScopedSilent", "ask"]

MIME = "application/vnd.seer.asked+json"
FOLDER = ".scoped"
SILENCE = 90.0  # seconds without a sign of the server, which gives one every 15
NUMBERS = 200_000  # of one array
LONGEST_PAUSE = 0.05


class ScopedError(PackError, RuntimeError):
    """What the function raised there, as a sentence; or why it was not called."""


class ScopedSilent(ScopedError):
    """No server answers."""


def ask(
    folder: Path,
    scope: str,
    function: str,
    arguments: dict[str, Any],
    *,
    torch: bool,
    numeric: bool,
) -> Any:
    """Call a function of a scoped sandbox and wait for what it returns.

    Arrays come as numpy; with `torch` as tensors, where torch is installed. `numeric`: a
    text "NaN" or "Infinity" is a number, because the function returns no texts.

    Raises ScopedError.
    """
    given = {name: encoded(value, NUMBERS) for name, value in arguments.items()}
    place = folder / FOLDER
    place.mkdir(mode=0o700, exist_ok=True)
    number = secrets.token_hex(8)
    question, reply = place / f"{number}.ask", place / f"{number}.answer"
    text = json.dumps({"scope": scope, "function": function, "arguments": given})
    part = place / f"{number}.part"
    part.write_text(text)
    os.replace(part, question)
    try:
        _show({"ask": number})
        answer = _answer(reply)
    except BaseException:
        _show({"cancel": number})
        raise
    finally:
        question.unlink(missing_ok=True)
        reply.unlink(missing_ok=True)
    if note := answer.get("note"):
        warnings.warn(str(note), stacklevel=3)
    if "error" in answer:
        raise ScopedError(str(answer["error"]))
    return restored(answer.get("value"), torch, numeric)


def _show(said: dict[str, str]) -> None:
    from IPython.display import publish_display_data

    publish_display_data({MIME: said, "text/plain": ""})


def _answer(reply: Path) -> dict[str, Any]:
    pause, heard, last = 0.005, time.monotonic(), 0
    while time.monotonic() - heard < SILENCE:
        try:
            changed = reply.stat().st_mtime_ns
        except FileNotFoundError:
            changed = 0
        if changed != last:
            last, heard = changed, time.monotonic()
            answer: dict[str, Any] = json.loads(reply.read_text())
            if "running" not in answer:
                return answer
        time.sleep(pause)
        pause = min(pause * 1.2, LONGEST_PAUSE)
    raise ScopedSilent(
        f"No server answered for {SILENCE:.0f} s. These functions work while the server that started this "
        "sandbox, or the one that found it again, runs; call again then."
    )


def restored(value: Any, torch: bool, numeric: bool) -> Any:
    """Data with its arrays and numbers made whole."""
    if isinstance(value, list):
        return [restored(held, torch, numeric) for held in value]
    if numeric and isinstance(value, str) and value in NOT_FINITE:
        return float(value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"shape", "dtype", "data"} and value["dtype"] in DTYPES:
        if torch and find_spec("torch"):
            from torch import Tensor as kind
        else:
            from numpy import ndarray as kind
        return decoded(value, kind)
    return {name: restored(held, torch, numeric) for name, held in value.items()}
