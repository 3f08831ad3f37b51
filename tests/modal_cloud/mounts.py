"""Files that clients send: stored by content, so that what is here already is not sent again."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.timestamp_pb2 import Timestamp
from grpclib import Status
from modal_proto import api_pb2

from . import ids
from .errors import not_found, refuse
from .service import Context


def now() -> Timestamp:
    stamp = Timestamp()
    stamp.FromNanoseconds(time.time_ns())
    return stamp


@dataclass
class Mount:
    id: str
    files: list[api_pb2.MountFile]
    layer: Path
    made: bool = False

    @property
    def checksum(self) -> str:
        listed = sorted((f.filename, f.sha256_hex, f.mode) for f in self.files)
        return hashlib.sha256(repr(listed).encode()).hexdigest()


@dataclass
class Mounts:
    folder: Path
    layers: Path
    block_url: str = ""
    """Where blobs are put and got over HTTP; the files' own server knows."""
    uploads: int = 0
    """Files whose content was sent."""
    uploaded_bytes: int = 0
    by_id: dict[str, Mount] = field(default_factory=dict)
    blobs: dict[str, Path] = field(default_factory=dict)
    """Large contents that were sent over HTTP, by blob id."""

    def path(self, sha256_hex: str) -> Path:
        return self.folder / sha256_hex

    def store(self, data: bytes, sha256_hex: str) -> None:
        if hashlib.sha256(data).hexdigest() != sha256_hex:
            refuse(Status.INVALID_ARGUMENT, "the data does not have the checksum it was sent with")
        self.path(sha256_hex).write_bytes(data)

    async def MountBatchedCheckExistence(
        self, request: api_pb2.MountBatchedCheckExistenceRequest, _: Context
    ) -> api_pb2.MountBatchedCheckExistenceResponse:
        missing = [one for one in request.sha256_hex_hashes if not self.path(one).exists()]
        return api_pb2.MountBatchedCheckExistenceResponse(
            missing_sha256_hex_hashes=missing, checked_at=now()
        )

    async def MountPutFile(
        self, request: api_pb2.MountPutFileRequest, _: Context
    ) -> api_pb2.MountPutFileResponse:
        if request.HasField("data"):
            self._count(len(request.data))
            self.store(request.data, request.sha256_hex)
        elif request.HasField("data_blob_id"):
            if request.data_blob_id not in self.blobs:
                not_found(f"Blob {request.data_blob_id}")
            data = self.blobs[request.data_blob_id].read_bytes()
            self._count(len(data))
            self.store(data, request.sha256_hex)
        exists = self.path(request.sha256_hex).exists()
        return api_pb2.MountPutFileResponse(exists=exists, checked_at=now())

    def _count(self, size: int) -> None:
        self.uploads += 1
        self.uploaded_bytes += size

    async def MountGetOrCreate(
        self, request: api_pb2.MountGetOrCreateRequest, _: Context
    ) -> api_pb2.MountGetOrCreateResponse:
        if request.deployment_name:
            # Modal's own client package and Python builds, which a client may add to an image.
            if request.object_creation_type:
                refuse(Status.UNIMPLEMENTED, "named mounts cannot be made here")
            mount = self._new([])
        else:
            for file in request.files:
                if not self.path(file.sha256_hex).exists():
                    refuse(Status.FAILED_PRECONDITION, f"{file.filename} was not uploaded")
            mount = self._new(list(request.files))
        metadata = api_pb2.MountHandleMetadata(content_checksum_sha256_hex=mount.checksum)
        return api_pb2.MountGetOrCreateResponse(mount_id=mount.id, handle_metadata=metadata)

    def _new(self, files: list[api_pb2.MountFile]) -> Mount:
        mount = Mount(ids.new("mo"), files, Path())
        mount.layer = self.layers / mount.checksum[:16]
        self.by_id[mount.id] = mount
        return mount

    def get(self, mount_id: str) -> Mount:
        if mount_id not in self.by_id:
            not_found(f"Mount {mount_id}")
        return self.by_id[mount_id]

    async def layers_of(self, mount_ids: Iterable[str]) -> list[Path]:
        """Folders with the files of these mounts at their places, made if they are not there yet."""
        found: list[Path] = []
        for mount in map(self.get, mount_ids):
            if not mount.layer.exists():
                await asyncio.to_thread(self._write, mount)
            found.append(mount.layer)
        return found

    def _write(self, mount: Mount) -> None:
        part = mount.layer.with_name(ids.new("part"))
        part.mkdir()
        for file in mount.files:
            place(part, file.filename, self.path(file.sha256_hex).read_bytes(), file.mode)
        try:
            part.rename(mount.layer)
        except OSError:  # another sandbox made it meanwhile
            if not mount.layer.exists():
                raise

    async def BlobCreate(
        self, request: api_pb2.BlobCreateRequest, _: Context
    ) -> api_pb2.BlobCreateResponse:
        blob_id = ids.new("bl")
        self.blobs[blob_id] = self.folder / blob_id
        return api_pb2.BlobCreateResponse(
            blob_ids=[blob_id],
            upload_urls=api_pb2.UploadUrlList(items=[f"{self.block_url}/blobs/{blob_id}"]),
        )


def place(root: Path, name: str, data: bytes, mode: int) -> None:
    """Write a file at an absolute or relative name below `root`."""
    target = root / name.lstrip("/")
    if ".." in target.parts:
        refuse(Status.INVALID_ARGUMENT, f"{name} leaves the mount")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(data)
    target.chmod((mode & 0o777) or 0o644)
