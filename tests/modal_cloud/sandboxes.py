"""The life of a sandbox: created, queued, scheduled, running, ended."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpclib import GRPCError, Status
from modal_proto import api_pb2

from . import ids
from .accounts import Accounts
from .box import PATH, PYTHON_FOLDER, Box, Plan
from .capacity import Capacity
from .errors import not_found, refuse
from .images import Image, Images
from .ledger import LEAST_CORES, LEAST_MIB, Entry, Ledger
from .mounts import Mounts
from .volumes import MountedVolumes, Volumes

Result = api_pb2.GenericResult
BLOCKED = api_pb2.NetworkAccess.NetworkAccessType.BLOCKED
LONGEST = 24 * 3600
SNAPSHOT_TRIES = 5


@dataclass
class Sandbox:
    id: str
    task_id: str
    version: int
    app_id: str
    definition: api_pb2.Sandbox
    tags: dict[str, str]
    env: dict[str, str] = field(repr=False)
    image: Image
    entry: Entry
    result: Result = field(default_factory=Result)
    box: Box | None = None
    volumes: MountedVolumes | None = None
    workdir: str = "/root"
    scheduled: asyncio.Event = field(default_factory=asyncio.Event)
    done: asyncio.Event = field(default_factory=asyncio.Event)
    why: str = ""
    active: float = field(default_factory=time.monotonic)
    """When something was last heard of an exec or through the router."""
    execs: dict[str, Any] = field(default_factory=dict)
    running_execs: int = 0
    stdin_index: int = 0
    life: asyncio.Task[None] | None = None
    queued: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str:
        return self.definition.name

    @property
    def gpu(self) -> api_pb2.GPUConfig:
        return self.definition.resources.gpu_config

    @property
    def gpus(self) -> int:
        return max(1, self.gpu.count) if self.gpu.gpu_type else 1

    def metadata(self) -> api_pb2.SandboxHandleMetadata:
        result = self.result if self.result.status else None
        return api_pb2.SandboxHandleMetadata(app_id=self.app_id, result=result)

    def processes(self) -> list[int]:
        """Everything in its process namespace, as this machine numbers it."""
        return self.box.processes() if self.box and not self.done.is_set() else []

    def alive(self) -> Box:
        """The running box; refuses if the sandbox has ended or is not there yet."""
        if self.done.is_set() or self.box is None:
            not_found(f"Task {self.task_id}: the sandbox is not running; it")
        self.active = time.monotonic()
        return self.box


@dataclass
class Sandboxes:
    folder: Path
    base_layer: Path
    accounts: Accounts
    images: Images
    mounts: Mounts
    volumes: Volumes
    ledger: Ledger
    capacity: Capacity
    errors: list[str]
    """Where defects of this server are told."""
    by_id: dict[str, Sandbox] = field(default_factory=dict)

    def get(self, sandbox_id: str, version: int | None = None) -> Sandbox:
        sandbox = self.by_id.get(sandbox_id)
        if sandbox is None or version not in (None, sandbox.version):
            not_found(f"Sandbox {sandbox_id}")
        return sandbox

    def of_task(self, task_id: str) -> Sandbox:
        found = [sandbox for sandbox in self.by_id.values() if sandbox.task_id == task_id]
        if not found:
            not_found(f"Task {task_id}")
        return found[0]

    def named(self, app_id: str, name: str, ended: bool = False) -> Sandbox | None:
        """The live sandbox of this name, or with `ended` the newest dead one if none is alive."""
        found = [s for s in self.by_id.values() if (s.app_id, s.name) == (app_id, name)]
        alive = [s for s in found if not s.done.is_set()]
        return (alive or (found if ended else []) or [None])[-1]

    async def create(
        self,
        version: int,
        app_id: str,
        definition: api_pb2.Sandbox,
        tags: Iterable[api_pb2.SandboxTag],
        env: dict[str, str],
    ) -> Sandbox:
        """Checks everything first: a refused create has made nothing."""
        if app_id not in self.accounts.apps:
            not_found(f"App {app_id}")
        image = self.images.get(definition.image_id)
        resources = definition.resources
        self.capacity.check(resources.gpu_config.gpu_type, resources.gpu_config.count)
        if not 0 < definition.timeout_secs <= LONGEST:
            refuse(Status.INVALID_ARGUMENT, f"timeout must be 1 to {LONGEST} seconds")
        if definition.name and self.named(app_id, definition.name):
            refuse(Status.ALREADY_EXISTS, f"Sandbox {definition.name!r} already exists in the app")
        for mount in definition.volume_mounts:
            self.volumes.get(mount.volume_id)
            if ".." in mount.sub_path.split("/"):
                refuse(Status.INVALID_ARGUMENT, f"{mount.sub_path} leaves the volume")
        for mount_id in definition.mount_ids:
            self.mounts.get(mount_id)
        sandbox = self._new(version, app_id, definition, tags, image)
        sandbox.env |= env
        self.by_id[sandbox.id] = sandbox
        self.ledger.entries.append(sandbox.entry)
        sandbox.life = asyncio.create_task(self._live(sandbox))
        sandbox.life.add_done_callback(self._check)
        return sandbox

    def _new(
        self,
        version: int,
        app_id: str,
        definition: api_pb2.Sandbox,
        tags: Iterable[api_pb2.SandboxTag],
        image: Image,
    ) -> Sandbox:
        sandbox_id, task_id = ids.sandbox(version), ids.task(version)
        resources, named = definition.resources, {tag.tag_name: tag.tag_value for tag in tags}
        entry = Entry(
            id=sandbox_id,
            name=definition.name,
            app=self.accounts.apps[app_id],
            tags=named,
            version=version,
            gpu=resources.gpu_config.gpu_type,
            gpus=resources.gpu_config.count,
            cores=max(LEAST_CORES, resources.milli_cpu / 1000),
            memory_mib=max(LEAST_MIB, resources.memory_mb),
            created=time.time(),
        )
        env = {
            "HOME": "/root",
            "LANG": "C.UTF-8",
            **image.env,
            "MODAL_SANDBOX_ID": sandbox_id,
            "MODAL_TASK_ID": task_id,
            "MODAL_IMAGE_ID": image.id,
            "MODAL_CLOUD_PROVIDER": "CLOUD_PROVIDER_LOOPBACK",
            "MODAL_REGION": "loopback",
            "OMP_NUM_THREADS": str(max(1, int(entry.cores))),
        }
        env["PATH"] = f"{PYTHON_FOLDER}:{image.env['PATH']}" if "PATH" in image.env else PATH
        sandbox = Sandbox(
            sandbox_id, task_id, version, app_id, definition, named, env, image, entry
        )
        sandbox.workdir = definition.workdir or image.workdir or "/root"
        return sandbox

    async def _live(self, sandbox: Sandbox) -> None:
        kind, count = self.capacity.kind(sandbox.gpu.gpu_type), sandbox.gpus
        taken = False
        try:
            await self.capacity.take(kind, count)
            taken = True
            try:
                await self._start(sandbox)
            except (RuntimeError, OSError, GRPCError) as error:
                self.errors.append(f"{sandbox.id} did not start: {error}")
                sandbox.why = "start failed"
                sandbox.result.status = Result.GENERIC_STATUS_INIT_FAILURE
                sandbox.result.exception = str(error)
                return
            await self._watch(sandbox)
        except asyncio.CancelledError:
            sandbox.why = sandbox.why or "unscheduled"
            sandbox.result.status = Result.GENERIC_STATUS_TERMINATED
        finally:
            if taken:
                await self.capacity.give_back(kind, count)
            await self._close(sandbox)

    async def _start(self, sandbox: Sandbox) -> None:
        folder = self.folder / sandbox.id[3:15]
        definition = sandbox.definition
        control = folder / "control"
        control.mkdir(parents=True)
        volumes = await self.volumes.mount(definition.volume_mounts, folder, control)
        sandbox.volumes = volumes
        volumes.start()
        plan = Plan(
            command=list(definition.entrypoint_args),
            env=sandbox.env,
            workdir=sandbox.workdir,
            layers=[
                *await self.mounts.layers_of(reversed(definition.mount_ids)),
                *sandbox.image.layers,
                self.base_layer,
            ],
            volumes=[mount.first() for mount in volumes.mounts],
            binds=[
                (str(control), "/__modal/control"),
                *(bind for mount in volumes.mounts for bind in mount.binds()),
            ],
            block_network=definition.block_network
            or definition.network_access.network_access_type == BLOCKED,
        )
        sandbox.box = Box(folder, plan)
        sandbox.entry.scheduled = time.time()  # from here it is billed
        await sandbox.box.start()
        sandbox.active = time.monotonic()
        sandbox.scheduled.set()

    async def _watch(self, sandbox: Sandbox) -> None:
        """Returns when the box has ended, by itself or for its timeout or idle timeout."""
        assert sandbox.box is not None
        box, definition = sandbox.box, sandbox.definition
        deadline = time.monotonic() + definition.timeout_secs
        idle = definition.idle_timeout_secs if definition.HasField("idle_timeout_secs") else 0
        while not box.ended.is_set():
            moment = time.monotonic()
            if sandbox.running_execs:
                sandbox.active = moment
            if not sandbox.why and moment >= deadline:
                sandbox.why = "timeout"
                box.kill()
            elif not sandbox.why and idle and moment >= sandbox.active + idle:
                sandbox.why = "idle"
                box.kill()
            next_look = min(1, deadline - moment, sandbox.active + (idle or LONGEST) - moment)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(box.ended.wait(), max(0.02, next_look))
        self._conclude(sandbox, box.code)

    def _conclude(self, sandbox: Sandbox, code: int | None) -> None:
        result = sandbox.result
        if sandbox.why == "timeout":
            result.status = Result.GENERIC_STATUS_TIMEOUT
        elif sandbox.why == "idle":
            result.status = Result.GENERIC_STATUS_IDLE_TIMEOUT
        elif sandbox.why:  # terminated, preempted, cloud stopped
            result.status = Result.GENERIC_STATUS_TERMINATED
            result.exception = "" if sandbox.why == "terminated" else f"Sandbox was {sandbox.why}"
        else:
            sandbox.why = "exit"
            code = 137 if code is None else code
            result.exitcode = code if code >= 0 else 128 - code
            ok = result.exitcode == 0
            result.status = Result.GENERIC_STATUS_SUCCESS if ok else Result.GENERIC_STATUS_FAILURE

    async def _close(self, sandbox: Sandbox) -> None:
        box = sandbox.box
        if box:
            box.kill()
            if box.pid:
                await box.ended.wait()
        sandbox.entry.ended = time.time()
        sandbox.entry.why = sandbox.why
        try:
            if sandbox.volumes:  # a machine that is taken away commits nothing any more
                await sandbox.volumes.stop(commit=sandbox.why != "preempted")
        finally:
            if not sandbox.result.status:
                sandbox.result.status = Result.GENERIC_STATUS_INTERNAL_FAILURE
            sandbox.execs.clear()
            sandbox.done.set()
        if box:
            await box.remove()

    def _check(self, life: asyncio.Task[None]) -> None:
        if not life.cancelled() and (error := life.exception()):
            self.errors.append("".join(traceback.format_exception(error)))

    async def snapshot(self, sandbox: Sandbox, ttl: float | None) -> Image:
        box = sandbox.alive()
        layer = self.mounts.layers / ids.new("sn")
        for _ in range(
            SNAPSHOT_TRIES
        ):  # a file that goes while it is copied is no fault of a snapshot
            shutil.rmtree(layer, ignore_errors=True)
            if await box.copy_files(layer):
                break
        else:
            refuse(Status.INTERNAL, "the sandbox's files could not be copied")
        return self.images.add_snapshot(sandbox.image, layer, ttl)

    def end(self, sandbox: Sandbox, why: str) -> None:
        """Begin to end it; `done` follows."""
        if sandbox.done.is_set():
            return
        sandbox.why = sandbox.why or why
        if sandbox.scheduled.is_set() and sandbox.box:
            sandbox.box.kill()
        elif sandbox.life:
            sandbox.life.cancel()

    async def end_all(self) -> None:
        alive = [s for s in self.by_id.values() if not s.done.is_set()]
        for sandbox in alive:
            self.end(sandbox, "cloud stopped")
        await asyncio.gather(*(sandbox.done.wait() for sandbox in alive))
