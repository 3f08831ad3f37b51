"""Journals outlive their machines on a volume: one for each owner, with a folder for each sandbox."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import Any

import modal
import modal.exception

KEEP = "/seer/keep"  # where a sandbox has the volume of its owner


def kept_as(handle: str) -> str:
    """The folder of a sandbox on the volume."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", handle)


class Journals:
    def __init__(self, instance: str) -> None:
        self._instance = instance
        self._volumes: dict[str, Any] = {}

    def name(self, owner: str) -> str:
        """The volume of an owner: nobody's sandbox sees what another's said."""
        whose = hashlib.sha256(owner.encode()).hexdigest()[:12]
        return f"seer-mcp-journals-{self._instance}-{whose}"

    async def volume(self, owner: str, client: Any) -> Any:
        name = self.name(owner)
        if name not in self._volumes:
            volume = modal.Volume.from_name(name, create_if_missing=True, version=2, client=client)
            await volume.hydrate.aio(client)
            self._volumes[name] = volume
        return self._volumes[name]

    def forget(self) -> None:
        """Look for the volumes anew the next time: somebody deleted one."""
        self._volumes.clear()

    async def fetch(self, name: str, folder: str, local: Path, client: Any) -> Path | None:
        """Bring a journal to `local`, and take it off the volume; None if none was kept.

        A call that was cut off leaves the journal on one of both sides, whole.
        """
        volume = modal.Volume.from_name(name, version=2, client=client)
        local.parent.mkdir(parents=True, exist_ok=True)
        part = local.parent / f".{local.name}.part"
        try:
            with open(part, "wb", opener=private) as file:
                async for piece in volume.read_file.aio(f"{folder}/journal.jsonl"):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        except (FileNotFoundError, modal.exception.NotFoundError):
            part.unlink(missing_ok=True)
            return local if local.exists() else None
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        os.replace(part, local)
        try:
            await volume.remove_file.aio(folder, recursive=True)
        except (FileNotFoundError, modal.exception.NotFoundError):
            pass  # another call of ours was quicker
        return local


def private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
