"""All parts put together: two gRPC servers and what is behind them."""

from __future__ import annotations

import asyncio
import fcntl
import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from grpclib.server import Server
from modal._utils.grpc_utils import create_channel_config, custom_detail_codec
from modal_proto.api_grpc import ModalClientBase
from modal_proto.task_command_router_grpc import TaskCommandRouterBase

from .accounts import Accounts
from .box import can_isolate, make_base_layer
from .capacity import Capacity
from .control import serve
from .faults import Faults
from .images import Images
from .ledger import Ledger
from .mounts import Mounts
from .router import Router
from .sandbox_rpc import SandboxCalls
from .sandboxes import Sandbox, Sandboxes
from .service import Service
from .volume_rpc import VolumeCalls
from .volumes import Volumes

PREFIX = "modal-cloud-"
LOCK = "lock"
SHARED = Path("/dev/shm")


def sweep() -> None:
    """Take away the folders of clouds that were killed; one that lives holds its lock."""
    for folder in Path(tempfile.gettempdir()).glob(PREFIX + "*"):
        try:
            lock = os.open(folder / LOCK, os.O_RDWR)
        except FileNotFoundError:  # it is just being made, or was never finished
            if folder.stat().st_mtime < time.time() - 60:
                remove(folder)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove(folder)
        except BlockingIOError:
            continue
        finally:
            os.close(lock)


def remove(folder: Path) -> None:
    for one in (SHARED / folder.name, folder):
        shutil.rmtree(one, ignore_errors=True)


class Cloud:
    """One control plane with its machines. `async with` runs it.

    Layers of overlays lie in /dev/shm: the kernel refuses a layer inside another one, and `/` is one.
    """

    def __init__(self) -> None:
        self.isolated = can_isolate()
        if not self.isolated:
            raise RuntimeError("sandboxes need root on Linux, for namespaces and overlays")
        sweep()
        self.folder = Path(tempfile.mkdtemp(prefix=PREFIX))
        part = self.folder / f"{LOCK}.part"  # it has its name only when it is held
        self._lock = os.open(part, os.O_RDWR | os.O_CREAT)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        part.rename(self.folder / LOCK)
        for name in ("blobs", "blocks", "s", "v"):
            (self.folder / name).mkdir()
        self.layers = SHARED / self.folder.name
        base = self.layers / "base"
        base.mkdir(parents=True)
        make_base_layer(base)
        self.faults = Faults()
        self.ledger = Ledger()
        self.accounts = Accounts("ak-" + secrets.token_hex(8), "as-" + secrets.token_hex(16))
        self.mounts = Mounts(self.folder / "blobs", self.layers)
        self.images = Images(self.mounts, self.layers)
        self.volumes = Volumes(self.folder / "v", self.faults.errors)
        self.capacity = Capacity()
        self.sandboxes = Sandboxes(
            self.folder / "s",
            base,
            self.accounts,
            self.images,
            self.mounts,
            self.volumes,
            self.ledger,
            self.capacity,
            self.faults.errors,
        )
        self.volume_calls = VolumeCalls(self.volumes, self.mounts, self.folder / "blocks")
        self.calls = SandboxCalls(self.sandboxes)
        self.router = Router(self.sandboxes, self.calls.router_tokens)
        self._servers: list[Server] = []
        self._site: Any = None
        self.url = ""
        self.control_url = ""

    async def __aenter__(self) -> Cloud:
        parts = [self.accounts, self.mounts, self.images, self.volume_calls, self.calls]
        control = Service(ModalClientBase, parts, self.faults, self.accounts.admit, True)
        router = Service(
            TaskCommandRouterBase, [self.router], self.faults, self.router.admit, False
        )
        self.url = await self._serve(control)
        self.calls.router_url = await self._serve(router)
        self._site, self.control_url = await serve(self)
        self.mounts.block_url = self.control_url
        return self

    async def _serve(self, service: Service) -> str:
        server = Server(
            [service],  # type: ignore[list-item]
            status_details_codec=custom_detail_codec,
            config=create_channel_config(),
        )
        await server.start("127.0.0.1", 0)
        self._servers.append(server)
        port = server._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
        return f"http://127.0.0.1:{port}"

    def environment(self) -> dict[str, str]:
        """What a client's process must have set to use this cloud and nothing else."""
        return {
            "MODAL_SERVER_URL": self.url,
            "MODAL_TOKEN_ID": self.accounts.token_id,
            "MODAL_TOKEN_SECRET": self.accounts.token_secret,
            "MODAL_CONFIG_PATH": "/nowhere/modal.toml",
            "MODAL_DISABLE_API_PROXY": "1",
        }

    def find(self, sandbox: str) -> Sandbox:
        """By id, or the newest of a name. Raises LookupError."""
        for one in reversed(self.sandboxes.by_id.values()):
            if sandbox in (one.id, one.name):
                return one
        raise LookupError(f"there is no sandbox {sandbox!r}")

    async def end(self, sandbox: str, why: str) -> None:
        found = self.find(sandbox)
        self.sandboxes.end(found, why)
        await found.done.wait()

    def cut(self) -> None:
        """Break every client's connections; they may connect again at once."""
        for server in self._servers:
            for handler in list(server._handlers):
                for stream in list(handler._tasks):
                    stream._transport.abort()

    async def clear(self) -> None:
        self.faults.clear()
        self.accounts.refusal, self.accounts.rates = "", True
        self.calls.deduplicate, self.calls.token_seconds = False, 3600
        self.images.failures.clear()
        self.images.build_seconds = 0
        self.capacity.free.clear()
        self.capacity.delay, self.capacity.patience = 0, None
        await self.sandboxes.end_all()

    async def __aexit__(self, *_: Any) -> None:
        await self.sandboxes.end_all()
        await self._site.cleanup()
        for server in self._servers:
            server.close()
            await server.wait_closed()
        await asyncio.to_thread(remove, self.folder)
        os.close(self._lock)
