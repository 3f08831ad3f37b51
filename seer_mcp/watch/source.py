"""Where the pages get what they show: from a running server, or from what servers left on the disk."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from ..config import Config
from ..errors import NotFound, PathRefused, SandboxUnavailable
from ..files import resolve_inside
from ..money import duration
from ..notebook import UNFINISHED
from ..sessions import Register, Session
from ..sessions.record import read_record

HISTORY = 200
BUTTONS = frozenset(["page_interrupt", "page_stop", "page_share", "page_unshare"])
"""As log, audit and figures name them, beside the tools."""


@dataclass(frozen=True)
class Card:
    """One sandbox as the list shows it."""

    handle: str
    name: str
    owner: str
    backend: str
    state: str
    """running, idle, starting, ended, or what is wrong."""
    detail: str
    """Cost, time left, warnings; "" if there is nothing to say."""
    notebook: Path | None
    created: float
    live: bool
    mine: bool
    shared: bool
    gpu: str = ""
    """As "2 x H100"; "" without one."""


class Source(Protocol):
    """What the pages ask. `owner` is who looks."""

    async def cards(self, owner: str) -> list[Card]:
        """Sandboxes that may be seen, the newest first."""
        ...

    async def card(self, handle: str, owner: str) -> Card:
        """One of them. Raises NotFound, the same for what is not there and what may not be seen."""
        ...

    def home(self, owner: str) -> Path:
        """The folder with the owner's notebooks."""
        ...

    @property
    def acts(self) -> bool:
        """Whether it can interrupt and stop."""
        ...

    async def interrupt(self, handle: str, owner: str) -> None: ...

    async def stop(self, handle: str, owner: str) -> None: ...

    async def share(self, handle: str, owner: str, shared: bool) -> None: ...


class ServerSource:
    """The sandboxes of the server in this process."""

    acts = True

    def __init__(self, register: Register) -> None:
        self._register = register

    async def cards(self, owner: str) -> list[Card]:
        sessions, _ = await self._register.list(owner)
        starting = [
            Card(
                s.handle,
                s.name,
                s.owner,
                s.backend,
                "starting",
                s.report,
                None,
                s.began,
                True,
                True,
                False,
            )
            for s in self._register.starts(owner)
            if not s.over.is_set()
        ]
        shared = self._register.shared(owner)
        cards = [*starting, *(self._shown(s, owner) for s in [*sessions, *shared])]
        return sorted(cards, key=lambda card: -card.created)

    async def card(self, handle: str, owner: str) -> Card:
        return self._shown(await self._register.readable(handle, owner), owner)

    def home(self, owner: str) -> Path:
        return self._register.config.home(owner).outputs

    async def interrupt(self, handle: str, owner: str) -> None:
        with self._noted("page_interrupt", handle, owner):
            await (await self._register.get(handle, owner)).interrupt("", True)

    async def stop(self, handle: str, owner: str) -> None:
        with self._noted("page_stop", handle, owner):
            await self._register.stop(await self._register.get(handle, owner))

    async def share(self, handle: str, owner: str, shared: bool) -> None:
        with self._noted("page_share" if shared else "page_unshare", handle, owner):
            self._register.share(await self._register.get(handle, owner), shared)

    @contextmanager
    def _noted(self, button: str, handle: str, owner: str) -> Generator[None]:
        """In log and audit, as a call of a tool is."""
        with self._register.observer.call(
            button,
            {"sandbox": handle},
            known=frozenset(["sandbox"]),
            changes=True,
            owner=owner,
            client="watch page",
        ) as call:
            yield
            call.answered(False, 0)

    def _shown(self, session: Session, owner: str) -> Card:
        said: list[str] = []
        if session.meter is not None:
            said.append(session.meter.so_far())
        if session.ended is None and (left := session.lease.left()) is not None:
            said.append(f"ends in {duration(left)} at the latest")
        said += session.warnings()
        if session.ended is not None:
            said.insert(0, session.ended)
        return Card(
            session.handle,
            session.name,
            session.owner,
            session.backend_name,
            state_of(session),
            "; ".join(said),
            session.notebook.path,
            session.created,
            session.ended is None,
            session.owner == owner,
            session.shared,
            gpu_in(session.notebook.metadata),
        )


def state_of(session: Session) -> str:
    """running while a cell is, ended, or what its kernel is."""
    if session.ended is not None:
        return "ended"
    busy = any(cell.state in UNFINISHED for cell in session.notebook.cells)
    return "running" if busy else session.kernel_state


class FolderSource:
    """What is on the disk, for one person: sandboxes of servers that may be running, or gone."""

    acts = False

    def __init__(self, config: Config) -> None:
        self._config = config

    async def cards(self, owner: str) -> list[Card]:
        return sorted(self._read(), key=lambda card: -card.created)

    async def card(self, handle: str, owner: str) -> Card:
        for card in self._read():
            if card.handle == handle:
                return card
        raise NotFound("sandbox", handle, [])

    def home(self, owner: str) -> Path:
        return self._config.outputs_dir

    async def interrupt(self, handle: str, owner: str) -> None:
        raise SandboxUnavailable("It belongs to the server that runs it: interrupt it there.")

    async def stop(self, handle: str, owner: str) -> None:
        raise SandboxUnavailable("It belongs to the server that runs it: stop it there.")

    async def share(self, handle: str, owner: str, shared: bool) -> None:
        raise SandboxUnavailable("Notebooks are shared at a team's server.")

    def _read(self) -> Iterator[Card]:
        folder = self._config.state_dir / "sandboxes"
        for each in sorted(folder.iterdir()) if folder.is_dir() else ():
            try:
                record = read_record(each)
                path = Path(str(record["notebook"]))
                ended = record.get("ended")
                noted = metadata_of(path)
                state = "ended" if ended else busy_state(path)
                yield Card(
                    str(record["handle"]),
                    str(record["name"]),
                    str(record["owner"]),
                    str(record["backend"]),
                    state,
                    str(ended or cost_in(noted)),
                    path,
                    float(record["created"]),
                    not ended,
                    True,
                    False,
                    gpu_in(noted),
                )
            except (OSError, ValueError, KeyError, TypeError, LookupError):
                continue  # `seer-mcp doctor` tells of what cannot be read


def busy_state(path: Path) -> str:
    try:
        cells = json.loads(path.read_bytes())["cells"]
        states = {(cell.get("metadata") or {}).get("seer", {}).get("state") for cell in cells}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "idle"
    return "running" if states & {"running", "queued"} else "idle"


def metadata_of(path: Path) -> Any:
    """Of a notebook; {} of a file that is none."""
    try:
        return json.loads(path.read_bytes())["metadata"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def cost_in(metadata: Any) -> str:
    try:
        return str(metadata["seer"].get("cost", ""))
    except (KeyError, TypeError, AttributeError):
        return ""


def gpu_in(metadata: Any) -> str:
    try:
        return str(metadata["seer"]["environment"].get("gpu", ""))
    except (KeyError, TypeError, AttributeError):
        return ""


def finished(home: Path, live: set[Path]) -> list[tuple[str, float]]:
    """Notebooks in a folder that no live sandbox writes: path within it, and when it was last written."""
    found = [
        (p, p.stat().st_mtime) for p in home.glob("*/*.ipynb") if p not in live and p.is_file()
    ]
    newest = sorted(found, key=lambda pair: -pair[1])[:HISTORY]
    return [(str(path.relative_to(home)), when) for path, when in newest]


def notebook_in(home: Path, path: str) -> Path:
    """A notebook of the history. Raises NotFound."""
    try:
        found = resolve_inside("notebook", path, home, [home])
    except PathRefused:
        raise NotFound("notebook", path, []) from None
    # As deep as those that are listed: what is deeper is the kernels'.
    listed = found.parent.parent == Path(os.path.realpath(home))
    if found.suffix != ".ipynb" or not listed or not found.is_file():
        raise NotFound("notebook", path, [])
    return found


def day(moment: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
