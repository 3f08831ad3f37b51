"""Volumes: named, committed in generations, mounted as an overlay over the newest one.

What a sandbox writes to a mount is its own until it is committed: by `sync MOUNT` (version 2), in the
background, or when the sandbox ends. A sandbox sees what others committed after reload_volumes.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

from modal_proto import api_pb2

from . import ids
from .box import VolumeMount
from .errors import not_found


@dataclass
class Volume:
    id: str
    name: str
    version: int
    folder: Path
    generation: int = 0
    created: float = field(default_factory=time.time)

    @property
    def newest(self) -> Path:
        return self.folder / str(self.generation)


@dataclass
class Volumes:
    folder: Path
    block_url: str = ""
    by_id: dict[str, Volume] = field(default_factory=dict)

    def get(self, volume_id: str) -> Volume:
        if volume_id not in self.by_id:
            not_found(f"Volume {volume_id}")
        return self.by_id[volume_id]

    def mount(self, mount: api_pb2.VolumeMount, folder: Path) -> VolumeMount:
        volume = self.get(mount.volume_id)
        return VolumeMount(
            mount.mount_path, volume.newest, folder / "upper", folder / "work", mount.read_only
        )

    def release(self, mounts: list[VolumeMount]) -> None:
        pass


__all__ = ["Volume", "Volumes", "ids"]
