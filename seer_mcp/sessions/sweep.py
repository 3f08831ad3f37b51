"""What runs at a backend and is in nobody's hands: the machines are asked, not the records."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..backends import Backend
from ..errors import EndUnconfirmed
from ..files import Lock
from .record import read_record


async def sweep(
    backend: Backend, state_dir: Path, ours: Callable[[str], bool], owner: str = ""
) -> list[str]:
    """End what runs there under our tag and has no record that says so; a sentence for each.

    What a server of this state folder starts, uses, or could find again is left alone, and so is
    all of other state folders. Raises SandboxUnreachable if what runs cannot be told.
    """
    told: list[str] = []
    for record in await backend.sweep(owner):
        handle = str(record["handle"])
        folder = state_dir / "sandboxes" / handle
        if not handle or ours(handle) or belongs(folder):
            continue
        found = await backend.find(record)
        try:
            if found is None:
                await backend.clear(handle)
            else:
                await found.terminate()
        except EndUnconfirmed as error:
            told.append(str(error))
        else:
            told.append(f"{handle} ran although no record knew of it: it was ended.")
    return told


def belongs(folder: Path) -> bool:
    """Whether a server uses the sandbox of that folder, or its record says that it lives."""
    if not folder.is_dir():
        return False
    lock = Lock(folder / "lock")
    if not lock.take():
        return True
    try:
        return read_record(folder)["ended"] is None
    except FileNotFoundError:
        return False
    except (OSError, ValueError, KeyError):
        return True  # `seer-mcp doctor` looks after damaged records
    finally:
        lock.release()
