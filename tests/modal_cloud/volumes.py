"""Volumes as sandboxes have them: mounted over the newest commit, committed, reloaded.

What a sandbox writes to a mount is its own until it is committed: by `sync MOUNT` (version 2), in the
background every few seconds, or when the sandbox ends (not when its machine is taken away). It sees
what others committed after reload_volumes. How often Modal commits in the background is a guess.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import traceback
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpclib import Status
from modal_proto import api_pb2

from .box import Box, VolumeMount
from .errors import not_found, refuse
from .generations import Overlay, Volume


@dataclass
class Mounted:
    """A volume at its place in one sandbox. `folder` is its own: an upper and a work folder for each
    time that it was mounted, numbered."""

    volume: Volume
    path: str
    folder: Path
    read_only: bool
    background: bool
    sub_path: str = ""
    """The folder of the volume that is mounted, with no slash around it; "" for all of it."""
    limited: bool = False
    times: int = 0
    overlay: Overlay = field(init=False)

    def __post_init__(self) -> None:
        self.next()

    def next(self) -> None:
        self.times += 1
        self.overlay = Overlay(self.folder / f"{self.times}/upper", self.lower)
        self.overlay.upper.mkdir(parents=True)
        (self.folder / f"{self.times}/work").mkdir()

    @property
    def lower(self) -> Path:
        return self.volume.newest / self.sub_path

    @property
    def hidden(self) -> str:
        """Where its parts are inside the sandbox, for mounting it again."""
        return f"/__modal/volumes/{self.volume.id}"

    def first(self) -> VolumeMount:
        return VolumeMount(
            self.path,
            self.overlay.lower,
            self.overlay.upper,
            self.folder / f"{self.times}/work",
            self.read_only,
        )

    def again(self) -> list[str]:
        """The mount command inside the sandbox."""
        lower = f"{self.hidden}/commits/{self.volume.generation}/{self.sub_path}"
        own = f"{self.hidden}/own/{self.times}"
        layers = f"lowerdir={lower},upperdir={own}/upper,workdir={own}/work"
        options = f"{layers},redirect_dir=on,volatile"
        read_only = ["-r"] if self.read_only else []
        return ["mount", *read_only, "-t", "overlay", "volume", "-o", options, self.path]

    def binds(self) -> list[tuple[str, str]]:
        return [
            (str(self.volume.folder), f"{self.hidden}/commits"),
            (str(self.folder), f"{self.hidden}/own"),
        ]

    async def commit(self) -> None:
        """Raises OSError if the volume is full."""
        if self.read_only:
            return
        overlay = self.overlay
        changes = await asyncio.to_thread(overlay.fresh)
        if changes:
            await self.volume.change(lambda newest: overlay.apply(changes, newest / self.sub_path))
            overlay.note(changes)


class MountedVolumes:
    """All volumes of one sandbox, and what commits them while it runs."""

    def __init__(
        self, mounts: Iterable[Mounted], control: Path, every: float, errors: list[str]
    ) -> None:
        self.mounts = list(mounts)
        self._control = control
        self._every = every
        self._errors = errors
        self._tasks: list[asyncio.Task[None]] = []
        self._requests = -1

    def start(self) -> None:
        """Commits in the background, and answers `sync` in the sandbox."""
        if self.mounts:
            self._run(self._in_background())
        name = self._control / "requests"
        os.mkfifo(name)
        self._requests = os.open(name, os.O_RDWR | os.O_NONBLOCK)
        asyncio.get_running_loop().add_reader(self._requests, self._hear)

    def _hear(self) -> None:
        for line in os.read(self._requests, 65536).splitlines():
            self._run(self._sync(**json.loads(line)))

    def _run(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._check)

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()):
            self._errors.append("volumes: " + "".join(traceback.format_exception(error)))

    async def _sync(self, answer: str, paths: list[str]) -> None:
        refused = ""
        for mount in self.mounts:
            if mount.volume.version == 2 and (not paths or mount.path in paths):
                try:
                    await mount.commit()
                except OSError as error:
                    refused = f"error syncing '{mount.path}': {error.strerror}"
        part = self._control / f"{answer}.part"
        part.write_text(refused)
        part.rename(self._control / answer)

    async def _in_background(self) -> None:
        while True:
            await asyncio.sleep(self._every)
            for mount in self.mounts:
                if mount.background:
                    with contextlib.suppress(OSError):  # full: `sync` says so to who asks
                        await mount.commit()

    async def stop(self, commit: bool) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._requests >= 0:
            asyncio.get_running_loop().remove_reader(self._requests)
            os.close(self._requests)
        for mount in self.mounts:
            if commit and mount.background:
                with contextlib.suppress(OSError):
                    await mount.commit()
            if mount.limited:
                await asyncio.to_thread(_umount, mount.folder)

    async def reload(self, box: Box) -> None:
        """See what others committed. Refuses if files of a volume are open in the sandbox."""
        null = subprocess.DEVNULL
        for mount in self.mounts:
            await mount.commit()
            unmount = await box.run(
                ["umount", mount.path], os.environ.copy(), "/", stdin=null, stdout=null, stderr=null
            )
            if await unmount.wait():
                refuse(
                    Status.FAILED_PRECONDITION,
                    f"there are open files preventing the operation: {mount.path}",
                )
            mount.next()
            again = await box.run(
                mount.again(), os.environ.copy(), "/", stdin=null, stdout=null, stderr=null
            )
            if await again.wait():
                refuse(Status.INTERNAL, f"{mount.path} could not be mounted again")


@dataclass
class Volumes:
    folder: Path
    errors: list[str]
    """Where defects of this server are told."""
    background_seconds: float = 5.0
    by_id: dict[str, Volume] = field(default_factory=dict)

    def get(self, volume_id: str) -> Volume:
        if volume_id not in self.by_id:
            not_found(f"Volume {volume_id}")
        return self.by_id[volume_id]

    def named(self, name: str) -> Volume | None:
        return next((volume for volume in self.by_id.values() if volume.name == name), None)

    async def mount(
        self, wanted: Iterable[api_pb2.VolumeMount], folder: Path, control: Path
    ) -> MountedVolumes:
        mounts = [await self._mount(mount, folder / f"v{n}") for n, mount in enumerate(wanted)]
        return MountedVolumes(mounts, control, self.background_seconds, self.errors)

    async def _mount(self, mount: api_pb2.VolumeMount, folder: Path) -> Mounted:
        volume = self.get(mount.volume_id)
        folder.mkdir(parents=True)
        sub_path = mount.sub_path.strip("/")
        if not (volume.newest / sub_path).is_dir():  # made when the container starts
            await volume.change(lambda newest: (newest / sub_path).mkdir(parents=True))
        if volume.limit is not None:
            size = f"size={volume.limit}"
            subprocess.run(["mount", "-t", "tmpfs", "-o", size, "limited", folder], check=True)
        return Mounted(
            volume,
            mount.mount_path.rstrip("/"),
            folder,
            mount.read_only,
            mount.allow_background_commits,
            sub_path,
            volume.limit is not None,
        )

    def remove(self, volume: Volume) -> None:
        del self.by_id[volume.id]
        shutil.rmtree(volume.folder, ignore_errors=True)


def _umount(folder: Path) -> None:
    subprocess.run(["umount", "-l", folder], check=True)
