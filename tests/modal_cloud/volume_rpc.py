"""The control plane's calls about volumes, of both versions, and the blocks of their files."""

from __future__ import annotations

import hashlib
import itertools
import shutil
import stat
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from grpclib import Status
from modal_proto import api_pb2

from . import ids
from .accounts import ANONYMOUS, CREATE, CREATE_NEW
from .errors import not_found, refuse
from .generations import Volume, remove, replace
from .mounts import Mounts
from .service import Context
from .volumes import Volumes

BLOCK = 8 << 20
TYPES = (
    (stat.S_ISDIR, api_pb2.FileEntry.DIRECTORY),
    (stat.S_ISLNK, api_pb2.FileEntry.SYMLINK),
    (stat.S_ISREG, api_pb2.FileEntry.FILE),
    (stat.S_ISFIFO, api_pb2.FileEntry.FIFO),
    (stat.S_ISSOCK, api_pb2.FileEntry.SOCKET),
)


class VolumeCalls:
    def __init__(self, volumes: Volumes, mounts: Mounts, blocks: Path) -> None:
        self._volumes = volumes
        self._mounts = mounts
        self.blocks = blocks
        """Contents that were sent, by their sha256."""

    async def VolumeGetOrCreate(
        self, request: api_pb2.VolumeGetOrCreateRequest, _: Context
    ) -> api_pb2.VolumeGetOrCreateResponse:
        kind, name = request.object_creation_type, request.deployment_name
        volume = None if kind in ANONYMOUS else self._volumes.named(name)
        if volume and kind == CREATE_NEW:
            refuse(Status.ALREADY_EXISTS, f"Volume {name!r} exists")
        if volume is None:
            if kind not in (CREATE, CREATE_NEW, *ANONYMOUS):
                not_found(f"Volume {name!r}")
            volume = self.create(name, request.version or 1)
        return api_pb2.VolumeGetOrCreateResponse(
            volume_id=volume.id, version=volume.version, metadata=_metadata(volume)
        )

    def create(self, name: str, version: int) -> Volume:
        volume_id = ids.new("vo")
        volume = Volume(volume_id, name, version, self._volumes.folder / volume_id)
        volume.newest.mkdir(parents=True)
        self._volumes.by_id[volume_id] = volume
        return volume

    async def VolumeGetById(
        self, request: api_pb2.VolumeGetByIdRequest, _: Context
    ) -> api_pb2.VolumeGetByIdResponse:
        volume = self._volumes.get(request.volume_id)
        return api_pb2.VolumeGetByIdResponse(volume_id=volume.id, metadata=_metadata(volume))

    async def VolumeHeartbeat(self, request: api_pb2.VolumeHeartbeatRequest, _: Context) -> None:
        self._volumes.get(request.volume_id)

    async def VolumeList(
        self, request: api_pb2.VolumeListRequest, _: Context
    ) -> api_pb2.VolumeListResponse:
        before = request.pagination.created_before
        named = [one for one in self._volumes.by_id.values() if one.name]
        items = [
            api_pb2.VolumeListItem(
                label=one.name, volume_id=one.id, created_at=one.created, metadata=_metadata(one)
            )
            for one in sorted(named, key=lambda one: -one.created)
            if not before or one.created < before
        ]
        return api_pb2.VolumeListResponse(items=items[: request.pagination.max_objects or None])

    async def VolumeDelete(self, request: api_pb2.VolumeDeleteRequest, _: Context) -> None:
        self._volumes.remove(self._volumes.get(request.volume_id))

    async def VolumeRename(self, request: api_pb2.VolumeRenameRequest, _: Context) -> None:
        volume = self._volumes.get(request.volume_id)
        if self._volumes.named(request.name):
            refuse(Status.ALREADY_EXISTS, f"Volume {request.name!r} exists")
        volume.name = request.name

    async def VolumeCommit(self, request: api_pb2.VolumeCommitRequest, _: Context) -> None:
        self._outside(request.volume_id)

    async def VolumeReload(self, request: api_pb2.VolumeReloadRequest, _: Context) -> None:
        self._outside(request.volume_id)

    def _outside(self, volume_id: str) -> None:
        self._volumes.get(volume_id)
        refuse(Status.FAILED_PRECONDITION, "this can only be called inside a container")

    # -- files

    def _at(self, volume: Volume, path: str) -> Path:
        """A path of the newest commit. Refuses one that leaves the volume or is not there."""
        parts = [part for part in PurePosixPath(path).parts if part != "/"]
        if ".." in parts:
            refuse(Status.INVALID_ARGUMENT, f"{path} leaves the volume")
        target = volume.newest.joinpath(*parts)
        if not target.exists() and not target.is_symlink():
            not_found(f"{path!r} in volume {volume.name!r}")
        return target

    async def VolumeListFiles(self, request: Any, _: Context) -> AsyncIterator[Any]:
        yield api_pb2.VolumeListFilesResponse(entries=self._entries(request))

    async def VolumeListFiles2(self, request: Any, _: Context) -> AsyncIterator[Any]:
        yield api_pb2.VolumeListFiles2Response(entries=self._entries(request))

    def _entries(self, request: Any) -> Iterator[api_pb2.FileEntry]:
        volume = self._volumes.get(request.volume_id)
        top = self._at(volume, request.path)
        if not top.is_dir() or top.is_symlink():
            found = [top]
        else:
            found = sorted(top.rglob("*") if request.recursive else top.iterdir())
        for path in found:
            info = path.lstat()
            kinds = (kind for test, kind in TYPES if test(info.st_mode))
            yield api_pb2.FileEntry(
                path=path.relative_to(volume.newest).as_posix(),
                type=next(kinds, api_pb2.FileEntry.UNSPECIFIED),
                mtime=int(info.st_mtime),
                size=info.st_size,
            )

    async def VolumeGetFile2(
        self, request: api_pb2.VolumeGetFile2Request, _: Context
    ) -> api_pb2.VolumeGetFile2Response:
        volume = self._volumes.get(request.volume_id)
        path = self._at(volume, request.path)
        if not path.is_file():
            refuse(Status.INVALID_ARGUMENT, f"{request.path} is not a file")
        size = path.stat().st_size
        end = min(size, request.start + request.len) if request.len else size
        name = quote(f"{volume.id}/{path.relative_to(volume.folder).as_posix()}")
        edges = [request.start, *range((request.start // BLOCK + 1) * BLOCK, end, BLOCK), end]
        spans = itertools.pairwise(edges) if end > request.start else ()
        return api_pb2.VolumeGetFile2Response(
            get_urls=[f"{self._mounts.block_url}/files/{name}?from={a}&to={b}" for a, b in spans],
            size=size,
            start=request.start,
            len=max(0, end - request.start),
        )

    async def VolumePutFiles2(
        self, request: api_pb2.VolumePutFiles2Request, _: Context
    ) -> api_pb2.VolumePutFiles2Response:
        volume = self._volumes.get(request.volume_id)
        missing = [
            api_pb2.VolumePutFiles2Response.MissingBlock(
                file_index=f, block_index=b, put_url=f"{self._mounts.block_url}/blocks/{name}"
            )
            for f, file in enumerate(request.files)
            for b, block in enumerate(file.blocks)
            if not (self.blocks / (name := block.contents_sha256.hex())).exists()
        ]
        if missing:
            return api_pb2.VolumePutFiles2Response(missing_blocks=missing)
        contents = {
            file.path: (lambda file=file: self._content(file), file.mode) for file in request.files
        }
        await self._put(volume, contents, request.disallow_overwrite_existing_files)
        return api_pb2.VolumePutFiles2Response()

    def _content(self, file: api_pb2.VolumePutFiles2Request.File) -> bytes:
        """Its blocks, each filled up: the zeros at the end of a block are not sent."""
        parts: list[bytes] = []
        for number, block in enumerate(file.blocks):
            size = min(BLOCK, file.size - number * BLOCK)
            data = (self.blocks / block.contents_sha256.hex()).read_bytes()
            parts.append(data.ljust(size, b"\0"))
        return b"".join(parts)

    def put_block(self, name: str, data: bytes) -> bytes:
        if hashlib.sha256(data).hexdigest() != name:
            raise ValueError("the block does not have the checksum it was announced with")
        (self.blocks / name).write_bytes(data)
        return name.encode()

    async def VolumePutFiles(self, request: api_pb2.VolumePutFilesRequest, _: Context) -> None:
        volume = self._volumes.get(request.volume_id)
        contents = {
            file.filename: (self._mounts.path(file.sha256_hex).read_bytes, file.mode)
            for file in request.files
        }
        await self._put(volume, contents, request.disallow_overwrite_existing_files)

    async def _put(
        self,
        volume: Volume,
        contents: dict[str, tuple[Callable[[], bytes], int]],
        careful: bool,
    ) -> None:
        for name in contents:
            target = volume.newest / name.lstrip("/")
            if ".." in target.parts:
                refuse(Status.INVALID_ARGUMENT, f"{name} leaves the volume")
            if target.is_dir() or (careful and target.exists()):
                refuse(Status.ALREADY_EXISTS, f"{name}: already exists")

        def apply(generation: Path) -> None:
            for name, (read, mode) in contents.items():
                replace(generation / name.lstrip("/"), read(), mode)

        await self._change(volume, apply)

    async def _change(self, volume: Volume, apply: Callable[[Path], None]) -> None:
        try:
            await volume.change(apply)
        except OSError as error:
            refuse(Status.RESOURCE_EXHAUSTED, str(error))

    async def VolumeRemoveFile(self, request: Any, _: Context) -> None:
        volume = self._volumes.get(request.volume_id)
        target = self._at(volume, request.path)
        if target.is_dir() and not target.is_symlink() and not request.recursive:
            refuse(Status.INVALID_ARGUMENT, f"{request.path} is a directory")
        name = target.relative_to(volume.newest)
        await self._change(volume, lambda generation: remove(generation / name))

    VolumeRemoveFile2 = VolumeRemoveFile

    async def VolumeCopyFiles(self, request: Any, _: Context) -> None:
        volume = self._volumes.get(request.volume_id)
        names = [self._at(volume, path).relative_to(volume.newest) for path in request.src_paths]
        target = PurePosixPath(request.dst_path.lstrip("/"))

        def apply(generation: Path) -> None:
            into = (generation / target).is_dir()
            for name in names:
                place = generation / target / name.name if into else generation / target
                place.parent.mkdir(parents=True, exist_ok=True)
                if (generation / name).is_dir():
                    shutil.copytree(generation / name, place, dirs_exist_ok=True)
                else:
                    replace(place, (generation / name).read_bytes())

        await self._change(volume, apply)

    VolumeCopyFiles2 = VolumeCopyFiles


def _metadata(volume: Volume) -> api_pb2.VolumeMetadata:
    info = api_pb2.CreationInfo(created_at=volume.created, created_by="tests")
    return api_pb2.VolumeMetadata(version=volume.version, name=volume.name, creation_info=info)
