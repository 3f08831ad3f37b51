"""Images: a build cache by definition, build logs, failures on demand. Nothing is installed.

A sandbox sees this machine's files and Python whatever its image says; of a build step only ENV,
WORKDIR and COPY of a sent file have an effect. That pip or apt would have succeeded is not shown.
"""

from __future__ import annotations

import asyncio
import hashlib
import shlex
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modal_proto import api_pb2

from . import ids
from .errors import not_found
from .mounts import Mounts
from .service import Context

SUCCESS = api_pb2.GenericResult.GENERIC_STATUS_SUCCESS
FAILURE = api_pb2.GenericResult.GENERIC_STATUS_FAILURE


@dataclass
class Failure:
    """Makes builds fail that have a command holding `match`."""

    match: str
    log: str
    times: int = 1


@dataclass
class Image:
    id: str
    key: str
    commands: list[str]
    env: dict[str, str]
    workdir: str
    layers: list[Path]
    """Over the base layer, the top first."""
    log: list[str] = field(default_factory=list)
    result: api_pb2.GenericResult = field(default_factory=api_pb2.GenericResult)
    grown: asyncio.Condition = field(default_factory=asyncio.Condition)
    created: float = field(default_factory=time.time)
    expires: float | None = None
    snapshot: bool = False
    bases: list[str] = field(default_factory=list)

    def metadata(self) -> api_pb2.ImageMetadata:
        return api_pb2.ImageMetadata(
            python_version_info=sys.version, workdir=self.workdir, image_builder_version="2025.06"
        )


@dataclass
class Images:
    mounts: Mounts
    folder: Path
    build_seconds: float = 0.0
    """How long each build step takes."""
    failures: list[Failure] = field(default_factory=list)
    builds: int = 0
    """Builds that were really carried out, not found in the cache."""
    by_id: dict[str, Image] = field(default_factory=dict)
    cache: dict[str, str] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    def fail(self, match: str, log: str, times: int) -> None:
        self.failures.append(Failure(match, log, times))

    def get(self, image_id: str) -> Image:
        image = self.by_id.get(image_id)
        if image is None or (image.expires and image.expires < time.time()):
            not_found(f"Image {image_id}")
        return image

    async def ImageFromId(
        self, request: api_pb2.ImageFromIdRequest, _: Context
    ) -> api_pb2.ImageFromIdResponse:
        image = self.get(request.image_id)
        return api_pb2.ImageFromIdResponse(image_id=image.id, metadata=image.metadata())

    async def ImageGetOrCreate(
        self, request: api_pb2.ImageGetOrCreateRequest, _: Context
    ) -> api_pb2.ImageGetOrCreateResponse:
        definition = request.image
        key = self._key(definition, request.builder_version)
        image = self.by_id.get(self.cache.get(key, ""))
        again = request.force_build or request.ignore_cache
        if image is None or image.result.status == FAILURE or (again and image.result.status):
            image = await self._new(definition, key)
            task = asyncio.create_task(self._build(image))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if not image.result.status:
            return api_pb2.ImageGetOrCreateResponse(image_id=image.id)
        return api_pb2.ImageGetOrCreateResponse(
            image_id=image.id, result=image.result, metadata=image.metadata()
        )

    def _key(self, definition: api_pb2.Image, builder_version: str) -> str:
        """The same for the same steps on the same base with the same files, whatever their ids."""
        stable = api_pb2.Image()
        stable.CopyFrom(definition)
        stable.ClearField("secret_ids")
        for base in stable.base_images:
            base.image_id = self.get(base.image_id).key
        if stable.context_mount_id:
            stable.context_mount_id = self.mounts.get(stable.context_mount_id).checksum
        text = stable.SerializeToString(deterministic=True) + builder_version.encode()
        return hashlib.sha256(text).hexdigest()

    async def _new(self, definition: api_pb2.Image, key: str) -> Image:
        bases = [self.get(base.image_id) for base in definition.base_images]
        image = Image(
            ids.new("im"),
            key,
            list(definition.dockerfile_commands),
            {name: value for base in bases for name, value in base.env.items()},
            bases[-1].workdir if bases else "/root",
            [layer for base in bases for layer in base.layers],
            bases=[base.id for base in bases],
        )
        for command in image.commands:
            word, _, rest = command.strip().partition(" ")
            if word.upper() == "ENV":
                pairs = (pair.partition("=") for pair in shlex.split(rest))
                image.env |= {name: value for name, _, value in pairs}
            elif word.upper() == "WORKDIR":
                image.workdir = rest.strip()
            elif word.upper() == "COPY" and definition.context_mount_id:
                image.layers.insert(0, await self._copied(definition.context_mount_id, rest))
        self.by_id[image.id] = image
        self.cache[key] = image.id
        return image

    async def _copied(self, mount_id: str, arguments: str) -> Path:
        """A layer with the mount's files below the target of `COPY . TARGET`."""
        (source,) = await self.mounts.layers_of([mount_id])
        layer = self.folder / ids.new("co")
        target = layer / arguments.split()[-1].lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        copy = await asyncio.create_subprocess_exec("cp", "-a", str(source), str(target))
        if await copy.wait():
            raise OSError(f"could not copy {source} to {target}")
        return layer

    async def _build(self, image: Image) -> None:
        self.builds += 1
        await self._say(image, f"Building image {image.id}\n")
        for number, command in enumerate(image.commands):
            await self._say(image, f"\n=> Step {number}: {command}\n")
            await asyncio.sleep(self.build_seconds)
            failure = next((f for f in self.failures if f.match in command), None)
            if failure:
                failure.times -= 1
                if failure.times <= 0:
                    self.failures.remove(failure)
                await self._say(image, failure.log + "\n")
                await self._finish(image, FAILURE)
                return
        await self._say(image, "Saving image...\nImage saved, took 0.00s\n")
        await self._finish(image, SUCCESS)

    async def _say(self, image: Image, line: str) -> None:
        async with image.grown:
            image.log.append(line)
            image.grown.notify_all()

    async def _finish(self, image: Image, status: Any) -> None:
        async with image.grown:
            image.result.status = status
            image.grown.notify_all()

    async def ImageJoinStreaming(
        self, request: api_pb2.ImageJoinStreamingRequest, _: Context
    ) -> AsyncIterator[api_pb2.ImageJoinStreamingResponse]:
        image = self.get(request.image_id)
        told = int(request.last_entry_id or 0)
        deadline = time.monotonic() + request.timeout
        while True:
            async with image.grown:
                while len(image.log) <= told and not image.result.status:
                    left = deadline - time.monotonic()
                    try:
                        async with asyncio.timeout(max(0, left)):
                            await image.grown.wait()
                    except TimeoutError:
                        return
            fresh, finished = image.log[told:], bool(image.result.status)
            if fresh:
                told += len(fresh)
                logs = [api_pb2.TaskLogs(data=line, timestamp=time.time()) for line in fresh]
                yield api_pb2.ImageJoinStreamingResponse(task_logs=logs, entry_id=str(told))
            elif finished:
                yield api_pb2.ImageJoinStreamingResponse(
                    result=image.result, entry_id=str(told), eof=True, metadata=image.metadata()
                )
                return

    def add_snapshot(self, base: Image, layer: Path, ttl: float | None) -> Image:
        """An image of a sandbox's files: what it wrote, over what it was made from."""
        image = Image(
            ids.new("im"), ids.new("key"), [], dict(base.env), base.workdir, list(base.layers)
        )
        image.layers.insert(0, layer)
        image.result.status = SUCCESS
        image.snapshot = True
        image.expires = time.time() + ttl if ttl else None
        self.by_id[image.id] = image
        return image
