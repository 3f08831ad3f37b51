"""What a backend is, and which ones there are.

A backend only starts, finds and ends machines. Everything that machines have in common (the kernel
host, the link to it, packs, the lease) lives outside, so that it exists once.
"""

from __future__ import annotations

import importlib
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config import Config
from ..environment import SandboxSpec
from ..errors import NotFound

Record = dict[str, Any]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Place:
    """Where one sandbox lives on this side: its handle, its folders, what it must not write to."""

    handle: str
    state_dir: Path
    """The sandbox's own folder under the server's state: journal, logs, host."""
    runtime_dir: Path
    """A short private folder for sockets."""
    work_dir: Path
    """The kernel's working directory (local sandboxes)."""
    protected: tuple[Path, ...]
    """Files that write_file must refuse: the notebook."""
    packs: Mapping[str, Path]
    """Import name -> file or folder that the kernel can import."""


class Sandbox(Protocol):
    """A machine with a kernel host on it."""

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        """A fresh stream of JSON lines to the host. Called by the link, again after each break.

        Raises SandboxUnreachable if the host is away just now.
        """
        ...

    async def terminate(self) -> None:
        """End the machine. Idempotent; returns only when it is gone."""
        ...

    def record(self) -> Record:
        """Enough to find it again from another process; holds no secret."""
        ...

    def log(self) -> str:
        """The end of what the host wrote to its log, for error messages."""
        ...


class Backend(Protocol):
    async def start(self, spec: SandboxSpec, place: Place, report: Progress) -> Sandbox:
        """A running machine whose host answers. Raises SandboxStartFailed, with nothing left over."""
        ...

    async def find(self, record: Record) -> Sandbox | None:
        """The machine of a record, or None if it is gone. Raises SandboxUnreachable if neither can be told."""
        ...

    async def clear(self, handle: str) -> None:
        """End whatever runs under this handle; called when a start was cut off before its record."""
        ...


BACKENDS = {"local": ".local:LocalBackend"}


def open_backend(name: str, config: Config) -> Backend:
    """The backend of that name, imported only now."""
    if name not in BACKENDS:
        raise NotFound("backend", name, BACKENDS)
    module, _, attribute = BACKENDS[name].partition(":")
    return getattr(importlib.import_module(module, __package__), attribute)(config)
