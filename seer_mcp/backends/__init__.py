"""What a backend is, and which ones there are.

A backend only starts, finds and ends machines. Everything that machines have in common (the kernel
host, the link to it, packs, the lease) lives outside, so that it exists once.
"""

from __future__ import annotations

import importlib
from asyncio import StreamReader, StreamWriter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from .. import plugins
from ..config import Config
from ..environment import SandboxSpec
from ..errors import NotFound
from ..model_store import Prepared
from ..money import Price

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
    owner: str = ""
    """Who started it, for sweep."""
    secrets: Mapping[str, str] = field(default_factory=dict[str, str], repr=False)
    """Values of the spec's secrets that were found on this side, by name; they go into the kernel's
    environment and nowhere else."""
    prepared: Callable[[Prepared], None] = field(default=lambda made: None, repr=False)
    """Hears of the copies of hidden models that the backend had made, before a machine starts."""


class Sandbox(Protocol):
    """A machine with a kernel host on it."""

    async def dial(self) -> tuple[StreamReader, StreamWriter]:
        """A fresh stream of JSON lines to the host. Called by the link, again after each break.

        Raises SandboxUnreachable if the host is away just now. A host that is there and does not
        answer is not noticed here: requests over the link have their own time limits.
        """
        ...

    async def put(self, local: Path, remote: str) -> None:
        """Copy a file of this side into the sandbox, of any size and content.

        `remote` is relative to the kernel's working folder, or an absolute path in it; missing
        folders are made. A file that is there is replaced as a whole, or not at all. The file is
        executable there if it is here. Raises NotFound (no such file here), BadInput (`remote` is
        a folder, leaves the sandbox's folder, or is protected), SandboxUnreachable.
        """
        ...

    async def get(self, remote: str, local: Path) -> None:
        """Copy a file of the sandbox to this side: the other way, with the same rules.

        Raises BadInput if there is no such file in the sandbox, or `local` is a folder.
        """
        ...

    async def terminate(self) -> None:
        """End the machine and all that was started on it, also what left its parent.

        Called by a session that ends, by a start that fails, and after a host died. Idempotent, by
        several callers at once too; returns only when everything is gone. Raises EndUnconfirmed if
        that could not be made sure within about a minute; then it is called again, until it can.
        """
        ...

    async def why_gone(self) -> str:
        """How a machine ended that nobody asked to: what is known of it, as a clause.

        Asked after `find` answered None. A cause that cannot be asked for now is said to be unknown.
        """
        ...

    async def snapshot(self) -> str:
        """Keep the machine's files; the id for SandboxSpec.snapshot.

        Kernel memory is not in it. Raises BadInput where there is no such thing.
        """
        ...

    def record(self) -> Record:
        """Enough to find it again from another process: JSON, small, the same for its whole life.

        Holds no secret: neither values of spec.env nor of the server's environment.
        """
        ...

    def log(self) -> str:
        """The end of what the host wrote to its log, for error messages."""
        ...


class Backend(Protocol):
    """Starts, finds and ends machines. Made once per server, with its Config."""

    @property
    def has_secrets(self) -> bool:
        """Whether it has a store of secrets, in which names may be that this side has no value of."""
        ...

    async def start(self, spec: SandboxSpec, place: Place, report: Progress) -> Sandbox:
        """A running machine whose host answers; its kernel may still be starting.

        Called by the register for start_sandbox; `report` is told what is being waited for. Raises
        BadInput (a spec that this backend cannot serve) or SandboxStartFailed with the end of the
        host's log. Then, and when it is cancelled, nothing is left over.
        """
        ...

    async def find(self, record: Record) -> Sandbox | None:
        """The machine of a record, or None if it has ended.

        Called by the next server at its start, and by the link when it cannot dial. That the
        machine is gone is an answer; raises SandboxUnreachable if neither can be told.
        """
        ...

    async def price(self, spec: SandboxSpec) -> Price | None:
        """What such a machine costs, asked before it is started; None where nothing is billed.

        Raises BadInput for a spec that this backend cannot serve.
        """
        ...

    async def clear(self, handle: str) -> None:
        """End whatever runs under this handle and free what it held.

        Called when a start was cut off before its record, and when a machine was found to have
        ended (a killed host may leave processes). A handle that nobody knows is no error.
        """
        ...

    async def sweep(self, owner: str) -> list[Record]:
        """What runs there under our tag: records of this owner's sandboxes ("": of all owners').

        Asks the machines, not the state folder, so that a sandbox whose record is lost is named as
        well; never names one of another state folder. A record is good for `find`; where `find`
        answers None only remains are left, and `clear` ends them. Called by who looks for what
        costs money or memory and is in no record.
        """
        ...

    async def left_behind(self, record: Record, local: Path) -> Path | None:
        """The journal of a sandbox whose host has ended: a file on this side, or None.

        Called by a session that lost its sandbox, to fold what nobody fetched. A backend that has
        to fetch it puts it at `local`. None is an answer: nothing was kept. Raises
        SandboxUnreachable if it cannot be told now.
        """
        ...


BACKENDS = {
    "local": ".local:LocalBackend",
    "modal": ".modal:ModalBackend",
    "ssh": ".ssh:SshBackend",
}


def known_backends() -> dict[str, str]:
    """Name -> "module:class" of ours, and of those that other installed packages bring."""
    return plugins.backends() | BACKENDS


def open_backend(name: str, config: Config) -> Backend:
    """The backend of that name, imported only now."""
    place = BACKENDS.get(name) or plugins.backends().get(name)
    if place is None:
        raise NotFound("backend", name, known_backends())
    module, _, attribute = place.partition(":")
    return getattr(importlib.import_module(module, __package__), attribute)(config)
