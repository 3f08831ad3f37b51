"""The fetch program seen from this side: what it is told, and what its lines mean."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import ModelUnavailable
from . import fetch
from .fetch import big
from .names import HubModel

FETCHER = Path(fetch.__file__)


@dataclass(frozen=True)
class Manifest:
    """A model that is there as a whole: every file had the size and the digest that the hub lists."""

    name: str
    revision: str
    commit: str
    files: list[fetch.Entry]
    bytes: int
    fetched: float
    """When, in seconds since 1970."""
    tokenizer: bool
    """Whether it has files of a tokenizer."""
    base: str
    """Of an adapter: the model that it goes on, as its configuration names it. Else ""."""

    @classmethod
    def of(cls, value: dict[str, Any]) -> Manifest:
        """From the JSON of manifest.json, or of the line `done`. Raises KeyError if it is neither."""
        return cls(**{name: value[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True)
class FetchProgress:
    """How far a fetch is."""

    model: HubModel
    bytes: int
    total: int
    """0 until the hub has said what there is."""
    rate: float
    """Bytes per second, lately."""
    left: float | None
    """Seconds, at that rate."""
    file: str = ""
    waiting: bool = False
    """Whether another process does it."""
    note: str = ""
    """What happened, if this is not about how far it is."""

    def sentence(self, label: str = "") -> str:
        """One line for a person. `label` stands for a model that must not be named."""
        name = label or self.model.label
        who = "another process is fetching" if self.waiting else "fetching"
        if self.note:
            return f"fetching {name}: {self.note}" if not label else f"fetching {name}"
        if not self.total:
            return f"asking the hub for {name}"
        parts = [f"{big(self.bytes)} of {big(self.total)}"]
        if self.rate:
            parts.append(f"{big(self.rate)}/s")
        if self.left is not None and self.left < 86400:
            parts.append(f"{span(self.left)} left")
        return f"{who} {name}: {', '.join(parts)}"


def span(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def unnamed(error: ModelUnavailable, label: str) -> ModelUnavailable:
    """The failure of a hidden model, for who must not learn its name."""
    why = (
        f"{error.code} (docs/models.md tells what this means). Its name is hidden, so the whole reason is only told "
        "to who runs the server: seer-mcp models fetch says it."
    )
    return ModelUnavailable(label, error.code, why)


Report = Callable[[FetchProgress], None]


def program() -> str:
    """The source of the fetch program: one file for any Python from 3.9 that has huggingface_hub."""
    return FETCHER.read_text()


def request(model: HubModel, folder: str, token: str = "", sync: bool = False) -> bytes:
    """The line for the stdin of the fetch program. With a token in it, it goes nowhere else."""
    config = {
        "name": model.name,
        "revision": model.revision,
        "folder": folder,
        "token": token,
        "sync": sync,
    }
    return json.dumps(config).encode() + b"\n"


async def follow(lines: AsyncIterator[str], model: HubModel, report: Report) -> Manifest:
    """Read the fetch program's stdout to its end. Raises ModelUnavailable, with its code and sentence."""
    others: list[str] = []
    async for line in lines:
        try:
            said: Any = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            others.append(line.rstrip())
        elif "done" in said:
            return Manifest.of(said["done"])
        elif "failed" in said:
            raise ModelUnavailable(model.label, str(said["failed"]), str(said["error"]))
        elif "note" in said:
            report(FetchProgress(model, 0, 0, 0.0, None, note=str(said["note"])))
        elif "bytes" in said:
            names = ("bytes", "total", "rate", "left", "file")
            waiting = bool(said.get("waiting"))
            report(FetchProgress(model, *(said[name] for name in names), waiting=waiting))
    tail = f" Its last words: {' / '.join(others[-5:])}" if others else ""
    raise ModelUnavailable(
        model.label,
        "cut_off",
        f"the process that fetched it ended without a result.{tail} Start again: it goes on where it stopped.",
    )
