"""The tests' own door to a running cloud: faults, capacity, the ledger. Plain HTTP with JSON.

`Cloud` (in another process) answers; `Controller` asks. Every public method of `Commands` can be
called on a Controller by its name, with its arguments.
"""

from __future__ import annotations

import hashlib
import json
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

from aiohttp import web
from google.protobuf.json_format import MessageToDict

if TYPE_CHECKING:
    from .cloud import Cloud


class Commands:
    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def fault(self, **fault: Any) -> None:
        """Plan one fault; the fields of faults.Fault."""
        self._cloud.faults.add(**fault)

    async def down(self, seconds: float) -> None:
        """Every call of the control plane answers UNAVAILABLE for so long."""
        self._cloud.faults.down(seconds)

    async def refuse(self, status: str = "") -> None:
        """Refuse every call: UNAUTHENTICATED, PERMISSION_DENIED; "" ends it."""
        self._cloud.accounts.refusal = status

    async def capacity(self, delay: float = 0, patience: float | None = None, **free: int) -> None:
        """How many GPUs are free by type ("cpu": sandboxes without one), and how long placing takes.

        `patience`: seconds in the queue after which the client is told RESOURCE_EXHAUSTED.
        """
        self._cloud.capacity.delay, self._cloud.capacity.patience = delay, patience
        await self._cloud.capacity.set(**free)

    async def fail_build(self, match: str, log: str, times: int = 1) -> None:
        """Builds that have a step holding `match` print `log` and fail."""
        self._cloud.images.fail(match, log, times)

    async def build_seconds(self, seconds: float) -> None:
        """How long each build step takes."""
        self._cloud.images.build_seconds = seconds

    async def forget_images(self) -> None:
        """The next build of anything is a real one."""
        self._cloud.images.cache.clear()

    async def layers(self, image: str) -> list[list[str]]:
        """The commands of each layer of an image, as its definitions came: the lowest first."""
        found: list[list[str]] = []
        while image:
            one = self._cloud.images.get(image)
            found.insert(0, one.commands)
            image = one.bases[0] if one.bases else ""
        return found

    async def definition(self, sandbox: str) -> dict[str, Any]:
        """What a create asked for, as JSON of the protocol's message, by the sandbox's id or name."""
        return MessageToDict(self._cloud.find(sandbox).definition)

    async def deduplicate(self, on: bool) -> None:
        """Whether a create sent again with the same idempotency key is answered again."""
        self._cloud.calls.deduplicate = on

    async def rates(self, on: bool) -> None:
        """Whether the workspace's prices can be asked for."""
        self._cloud.accounts.rates = on

    async def secret(self, name: str, env: dict[str, str]) -> None:
        """A secret of the workspace, as if made on the dashboard."""
        self._cloud.accounts.keep(name, env)

    async def router_tokens(self, seconds: float) -> None:
        """How long the tokens last that are given out from now on, and forget all others."""
        self._cloud.calls.token_seconds = seconds
        self._cloud.calls.router_tokens.clear()

    async def cut(self) -> None:
        """Break every connection of clients to the router and to the control plane now."""
        self._cloud.cut()

    async def preempt(self, sandbox: str) -> None:
        """Take the machine of a sandbox away (its id or name)."""
        await self._cloud.end(sandbox, "preempted")

    async def limit_volume(self, name: str, size: int | None) -> None:
        """How many bytes fit in a volume (version 2; made if it is missing): it runs full."""
        volume = self._cloud.volumes.named(name) or self._cloud.volume_calls.create(name, 2)
        volume.limit = size

    async def background_commits(self, seconds: float) -> None:
        """How often volumes commit by themselves, in sandboxes created from now on."""
        self._cloud.volumes.background_seconds = seconds

    async def ledger(self) -> list[dict[str, Any]]:
        return self._cloud.ledger.rows()

    async def calls(self) -> dict[str, int]:
        """How often each method was called so far."""
        return self._cloud.faults.calls

    async def errors(self) -> list[str]:
        """Defects of the cloud itself; a test should find none."""
        return self._cloud.faults.errors

    async def stats(self) -> dict[str, Any]:
        """Real builds, files uploaded and their bytes."""
        mounts = self._cloud.mounts
        return {
            "builds": self._cloud.images.builds,
            "uploads": mounts.uploads,
            "uploaded_bytes": mounts.uploaded_bytes,
            "faults": self._cloud.faults.listing(),
        }

    async def processes(self, sandbox: str) -> list[int]:
        """Process ids, as this machine numbers them, of everything in a sandbox; [] when it ended."""
        return self._cloud.find(sandbox).processes()

    async def forgive(self) -> None:
        """Forget all faults that are planned; sandboxes run on."""
        self._cloud.faults.clear()

    async def clear(self) -> None:
        """End all sandboxes and forget all faults and settings; the ledger, images and volumes stay."""
        await self._cloud.clear()


async def serve(cloud: Cloud) -> tuple[web.AppRunner, str]:
    """Answers commands and moves blocks of files; returns what to clean up and the address."""
    commands = Commands(cloud)

    async def command(request: web.Request) -> web.Response:
        name = request.match_info["name"]
        method = None if name.startswith("_") else getattr(commands, name, None)
        if method is None:
            return web.json_response({"error": f"there is no command {name!r}"}, status=404)
        try:
            return web.json_response({"result": await method(**await request.json())})
        except (TypeError, ValueError, LookupError) as error:
            return web.json_response({"error": str(error)}, status=400)

    app = web.Application(client_max_size=1 << 30)
    app.router.add_post("/do/{name}", command)
    files = Files(cloud)
    app.router.add_put("/blobs/{blob}", files.put_blob)
    app.router.add_put("/blocks/{block}", files.put_block)
    app.router.add_get("/files/{volume}/{path:.+}", files.get_file)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]  # type: ignore[union-attr]
    return runner, f"http://127.0.0.1:{port}"


class Files:
    """Contents that clients send and fetch over HTTP beside gRPC, as from a store of objects."""

    def __init__(self, cloud: Cloud) -> None:
        self._cloud = cloud

    async def put_blob(self, request: web.Request) -> web.Response:
        data = await request.read()
        self._cloud.mounts.blobs[request.match_info["blob"]].write_bytes(data)
        return web.Response(headers={"ETag": f'"{hashlib.md5(data).hexdigest()}"'})

    async def put_block(self, request: web.Request) -> web.Response:
        data = await request.read()
        self._cloud.mounts.uploads += 1
        self._cloud.mounts.uploaded_bytes += len(data)
        block = request.match_info["block"]
        return web.Response(body=self._cloud.volume_calls.put_block(block, data))

    async def get_file(self, request: web.Request) -> web.Response:
        volume = self._cloud.volumes.by_id.get(request.match_info["volume"])
        if volume is None:
            return web.Response(status=404)
        start, end = int(request.query["from"]), int(request.query["to"])
        with open(volume.folder / request.match_info["path"], "rb") as file:
            file.seek(start)
            return web.Response(body=file.read(end - start))


class Controller:
    """Calls the commands of a cloud in another process."""

    def __init__(self, url: str) -> None:
        self.url = url
        # This machine's proxies are not for 127.0.0.1.
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)

        def call(**arguments: Any) -> Any:
            body = json.dumps(arguments).encode()
            request = urllib.request.Request(
                f"{self.url}/do/{name}", body, {"Content-Type": "application/json"}
            )
            try:
                with self._opener.open(request, timeout=60) as answer:
                    return json.load(answer)["result"]
            except urllib.error.HTTPError as error:
                with error:
                    raise RuntimeError(f"{name}: {error.read().decode()}") from None

        return call
