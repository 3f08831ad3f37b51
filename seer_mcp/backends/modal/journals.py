"""Journals outlive their machines on a volume: one for each installation, a folder for each sandbox."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import modal
import modal.exception

from ...files import private_dir

KEEP = "/seer/keep"  # where a sandbox sees its folder; it sees no other's


def kept_as(handle: str) -> str:
    """The folder of a sandbox on the volume."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", handle)


class Journals:
    def __init__(self, instance: str) -> None:
        self.name = f"seer-mcp-journals-{instance}"
        self._volume: Any = None

    async def mount(self, handle: str, client: Any) -> dict[str, Any]:
        """What to mount so that this sandbox can keep its journal."""
        if self._volume is None:
            volume = modal.Volume.from_name(
                self.name, create_if_missing=True, version=2, client=client
            )
            await volume.hydrate.aio(client)
            self._volume = volume
        return {KEEP: self._volume.with_mount_options(sub_path=kept_as(handle))}

    def forget(self) -> None:
        """Look for the volume anew the next time: somebody deleted it."""
        self._volume = None

    async def fetch(self, name: str, folder: str, local: Path, client: Any) -> Path | None:
        """Bring a journal to `local`, and take it off the volume; None if none was kept.

        A call that was cut off leaves the journal on one of both sides, whole.
        """
        volume = modal.Volume.from_name(name, version=2, client=client)
        part = private_dir(local.parent) / f".{local.name}.part"
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
