"""Starts, finds and ends sandboxes at Modal."""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import modal
import modal.exception

from ...config import Config
from ...environment import SandboxSpec
from ...errors import BadInput, EndUnconfirmed, SandboxStartFailed, SandboxUnreachable
from ...kernel_host.fault import fault_point
from ...kernel_host.identity import GIVEN
from ...money import (
    SHORTEST_SECONDS,
    Price,
    cores_of,
    duration,
    estimate,
    hard_stop,
    mebibytes_of,
)
from .. import Place, Progress, Record, hosting
from .account import (
    ANSWER_SECONDS,
    APP,
    ASK_SECONDS,
    BROKEN,
    HANDLE,
    INSTANCE,
    OWNER,
    PASSING,
    Account,
    account_keys,
    no_secret,
    not_started,
    said,
    unreachable,
    why,
)
from .image import FILES, Images
from .journals import KEEP, Journals, kept_as
from .models import OF_MODELS, Models
from .sandbox import ENV, PYTHON, THERE, ModalSandbox

DIGEST = "sha."
NAME = re.compile(r"[A-Za-z0-9._-]{1,63}")  # what may be a name or a tag at Modal
LONGEST_SECONDS = 24 * 3600.0  # Modal's own limit
GRACE_SECONDS = 30.0  # that a host ends before its machine is ended
MORE_SECONDS = 3600.0  # by which a lifetime can be extended: the host holds it, Modal that and this
ROOM_MIB = 512  # above what is asked for: the kernel host's own
PROCESSES = 1 << 20  # no limit of ours
PATIENCE_SECONDS = 20 * 60.0  # for a machine with that GPU to be free
BOOT_SECONDS = 300.0  # for a container to start: its image may be large and the machine new
TOLD_SECONDS = 5.0
TRIES = 3  # of a create, beside the client's own
ABANDON_SECONDS = 3.0  # for the answer to a create that is given up
LACKING = {
    "python": "the image has one interpreter, of this server's own version",
    "host": "that is for ssh",
    "processes": "Modal sets no such limit",
}


class ModalBackend:
    """`client`: another one of modal's than that of the environment's token, for tests."""

    has_secrets = True

    def __init__(self, config: Config, client: Any = None) -> None:
        self._config = config
        config.redactor.know(account_keys())
        self._instance = hosting.instance_of(config)
        self._account = Account(client)
        self._images = Images(config.state_dir / "modal")
        self._journals = Journals(self._instance)
        self.models = Models(config, self._account, self._images)

    # -- start ----------------------------------------------------------------------------------

    async def start(self, spec: SandboxSpec, place: Place, report: Progress) -> ModalSandbox:
        """Raises EndUnconfirmed as well, where a failed start may have left a machine: clear() then."""
        lasts = self._lasts(spec, await self._priced(spec))
        try:
            report("asking Modal for its app")
            async with asyncio.timeout(ANSWER_SECONDS):
                app = await self._account.app()
                secrets = await self._secrets(spec, place)
            tags = self._tags(place.owner, place.handle)
            volumes, spec = await self.models.ready(spec, place, tags, app, report)
            report("looking for the image")
            image, name = await self._images.ready(spec, place, app, report)
            async with asyncio.timeout(ANSWER_SECONDS):
                arguments = await self._arguments(spec, place, lasts, image, secrets, volumes)
        except BROKEN as error:
            raise not_started(error, getattr(error, "log", "")) from error
        sandbox = await self._create(spec, place, app, arguments, name, report)
        fault_point("sandbox.created")
        try:
            await self._boot(sandbox, report)
            fault_point("sandbox.answers")
        except BaseException as error:
            try:
                await asyncio.shield(sandbox.terminate(politely=False))
            except EndUnconfirmed as unsure:
                raise unsure from await self._failed(sandbox, error)
            raise await self._failed(sandbox, error) from error
        return sandbox

    async def _secrets(self, spec: SandboxSpec, place: Place) -> list[Any]:
        """Those that this side does not know, from Modal's own store. Raises BadInput."""
        found: list[Any] = []
        client = await self._account.client()
        for name in spec.secrets:
            if name not in place.secrets:
                try:
                    secret = modal.Secret.from_name(name, client=client)
                    await secret.hydrate.aio(client)
                except (modal.exception.NotFoundError, modal.exception.InvalidError) as error:
                    raise no_secret(name) from error
                found.append(secret)
        return found

    async def _arguments(
        self,
        spec: SandboxSpec,
        place: Place,
        lasts: float,
        image: Any,
        secrets: list[Any],
        volumes: dict[str, Any],
    ) -> dict[str, Any]:
        """What Modal's create is told. Everything has a name there by which it is found again."""
        config = hosting.host_config(
            self._config,
            spec,
            place,
            hosting.There(
                THERE.directory,
                THERE.runtime,
                THERE.cwd,
                THERE.packs,
                [f"{THERE.cwd}/{path.name}" for path in place.protected],
            ),
            # Whoever takes too much is ended alone, before the machine is; nothing else is limited.
            limits={
                "means": "watch",
                "memory": spec.memory,
                "processes": PROCESSES,
                "groups": [],
            }
            if spec.memory
            else None,
            keep=f"{KEEP}/{kept_as(place.handle)}",
            lasts=lasts - min(GRACE_SECONDS, lasts / 4),
            files=FILES if spec.files else "",
        )
        environment = {**ENV, GIVEN: json.dumps(config), **place.secrets}
        cores, memory = cores_of(spec), mebibytes_of(spec)
        domains = list(spec.network) if isinstance(spec.network, tuple) and spec.network else None
        client = await self._account.client()
        return {
            "name": sandbox_name(place.handle),
            "tags": self._tags(place.owner, place.handle),
            "image": image,
            "secrets": [modal.Secret.from_dict({**environment}), *secrets],
            "timeout": max(1, math.floor(lasts)),
            "gpu": gpu_of(spec),
            # The limit as well: what is used beyond what is asked for is billed.
            "cpu": (cores, cores),
            "memory": (memory, memory + ROOM_MIB),
            "block_network": spec.blocked,
            "outbound_domain_allowlist": domains,
            "volumes": {KEEP: await self._journals.volume(tag(place.owner), client), **volumes},
            "experimental_options": {"enable_docker": True} if spec.docker else None,
            "client": client,
        }

    def _tags(self, owner: str, handle: str) -> dict[str, str]:
        return {INSTANCE: self._instance, OWNER: tag(owner), HANDLE: sandbox_name(handle)}

    async def _create(
        self,
        spec: SandboxSpec,
        place: Place,
        app: Any,
        arguments: dict[str, Any],
        image: str,
        report: Progress,
    ) -> ModalSandbox:
        """One sandbox of this handle, however often it had to be asked for."""
        fault_point("sandbox.create")
        creating = asyncio.create_task(self._ask(app, arguments))
        try:
            async with telling(report, f"waiting for {machine(spec)}"):
                async with asyncio.timeout(PATIENCE_SECONDS):
                    there = await asyncio.shield(creating)
            record = await self._record(arguments["tags"], place.handle, there.object_id)
            return ModalSandbox({**record, "since": time.time()}, there)
        except BaseException as error:
            if isinstance(error, (modal.exception.NotFoundError, modal.exception.InvalidError)):
                self._images.forget(image)  # what it needs was removed there meanwhile
                self._journals.forget()
            await asyncio.shield(self._abandon(creating, place.handle))
            if isinstance(error, TimeoutError):
                raise SandboxStartFailed(
                    f"Modal had no {machine(spec)} for {duration(PATIENCE_SECONDS)}; try again later, or another type"
                ) from error
            if isinstance(error, BROKEN):
                raise not_started(error) from error
            raise

    async def _ask(self, app: Any, arguments: dict[str, Any]) -> Any:
        """Asking again is safe: the name is unique, so what was made by a lost request is found."""
        for attempt in range(TRIES):
            try:
                return await modal.Sandbox.create.aio(*PYTHON, "kernel_host", app=app, **arguments)
            except modal.exception.AlreadyExistsError as error:
                found = await self._by_name(arguments["name"], arguments["tags"])
                if found is None:
                    raise SandboxStartFailed(
                        f"a sandbox named {arguments['name']} runs already, and is not ours; try again"
                    ) from error
                return found
            except PASSING:
                if attempt == TRIES - 1:
                    raise
                await asyncio.sleep(0.5 * 2**attempt)
        raise AssertionError("unreachable")

    async def _abandon(self, creating: asyncio.Task[Any], handle: str) -> None:
        """Nothing of a create that is given up runs on. Raises EndUnconfirmed if that is not sure.

        A request that is on its way may still be carried out: its answer is waited for, or the
        machine found by its name.
        """
        end = time.monotonic() + ABANDON_SECONDS
        while not creating.done() and time.monotonic() < end:
            with suppress(*BROKEN):
                async with asyncio.timeout(ABANDON_SECONDS):
                    if await self._by_name(sandbox_name(handle), {INSTANCE: self._instance}):
                        break
            await asyncio.wait([creating], timeout=0.25)
        if not creating.done():
            # The client ends what it may have made before it lets go, for as long as that takes.
            creating.cancel()
            creating.add_done_callback(lambda done: done.cancelled() or done.exception())
            await asyncio.wait([creating], timeout=ABANDON_SECONDS)
        if not creating.done():
            await self._clear(handle, sure=False)
        elif not creating.cancelled() and creating.exception() is None:
            record = {"handle": handle, "id": creating.result().object_id}
            await ModalSandbox(record, creating.result()).terminate(politely=False)
        else:
            await self._clear(handle, sure=not_begun(creating))

    async def _boot(self, sandbox: ModalSandbox, report: Progress) -> None:
        """Wait until the host answers. Raises SandboxStartFailed if it ends, or is too slow."""
        end = time.monotonic() + BOOT_SECONDS
        async with telling(report, "the machine is there; waiting for its kernel host"):
            while True:
                try:
                    await sandbox.await_host(min(hosting.START_SECONDS, end - time.monotonic()))
                    return
                except SandboxUnreachable:
                    if (code := await sandbox.ended()) is not None:
                        raise SandboxStartFailed(f"the kernel host ended with {code}") from None
                    if time.monotonic() > end - 1:
                        raise SandboxStartFailed(
                            f"the kernel host did not answer in {duration(BOOT_SECONDS)}"
                        ) from None
                await asyncio.sleep(0.1)

    async def _failed(self, sandbox: ModalSandbox, error: BaseException) -> BaseException:
        """A failure to start, with the end of the host's log where there is one."""
        if isinstance(error, SandboxStartFailed):
            log = await sandbox.read_log()
            reason = (
                str(error).removeprefix("The sandbox did not start: ").partition(". Nothing")[0]
            )
            if "No module named" in log:
                reason += "; its image needs ipykernel and jupyter_client"
            return SandboxStartFailed(reason, log)
        return not_started(error) if isinstance(error, BROKEN) else error

    # -- what it costs --------------------------------------------------------------------------

    async def price(self, spec: SandboxSpec) -> Price | None:
        price = await self._priced(spec)
        self._lasts(spec, price)
        return price

    async def _priced(self, spec: SandboxSpec) -> Price:
        hosting.refuse(spec, "modal", LACKING)
        return estimate(spec, await self._account.rates())

    def _lasts(self, spec: SandboxSpec, price: Price) -> float:
        """Seconds after which Modal ends it, whatever becomes of us."""
        lifetime = spec.lifetime + MORE_SECONDS if spec.lifetime else None
        budget = spec.limit()
        lasts = hard_stop(price, lifetime, budget, LONGEST_SECONDS) or LONGEST_SECONDS
        if budget and lasts < SHORTEST_SECONDS:
            raise BadInput(
                "budget",
                str(budget),
                f"that lasts {duration(lasts)} at {price.sentence()}; give more, or ask for a smaller machine",
            )
        return lasts

    # -- find, end ------------------------------------------------------------------------------

    async def find(self, record: Record) -> ModalSandbox | None:
        try:
            async with asyncio.timeout(ASK_SECONDS):
                there = await modal.Sandbox.from_id.aio(
                    record["id"], client=await self._account.client()
                )
        except (modal.exception.NotFoundError, modal.exception.InvalidError):
            return None
        except BROKEN as error:
            raise unreachable(record["handle"], error) from error
        return ModalSandbox(record, there) if there.returncode is None else None

    async def clear(self, handle: str) -> None:
        """Raises EndUnconfirmed if something may run under this handle and Modal cannot be asked."""
        await self._clear(handle, sure=False)
        await self.models.ending.again()

    async def _clear(self, handle: str, sure: bool) -> None:
        """`sure`: nothing was asked for, so that an API that cannot be reached has nothing of ours."""
        try:
            async with asyncio.timeout(ASK_SECONDS):
                there = await self._by_name(sandbox_name(handle), {INSTANCE: self._instance})
        except BROKEN as error:
            if sure:
                return
            raise EndUnconfirmed(handle, sandbox_name(handle), why(error)) from error
        if there is not None:
            record = {"handle": handle, "id": there.object_id}
            await ModalSandbox(record, there).terminate(politely=False)

    async def _by_name(self, name: str, tags: dict[str, str]) -> Any:
        """The sandbox of that name that runs, if it has these tags."""
        try:
            there = await modal.Sandbox.from_name.aio(
                APP, name, client=await self._account.client()
            )
            has = await there.get_tags.aio()
        except modal.exception.NotFoundError:
            return None
        return there if tags.items() <= has.items() else None

    async def sweep(self, owner: str) -> list[Record]:
        tags = {INSTANCE: self._instance, **({OWNER: tag(owner)} if owner else {})}
        found: list[Record] = []
        try:
            app = await self._account.app(create=False)
            async for there in modal.Sandbox.list.aio(
                app_id=app.app_id, tags=tags, client=await self._account.client()
            ):
                with suppress(modal.exception.NotFoundError):  # it ended meanwhile
                    has = await there.get_tags.aio()
                    if has.get(HANDLE, "").startswith(OF_MODELS):
                        continue  # it fetches a model for whoever needs it, and ends itself
                    found.append(await self._record(has, has.get(HANDLE, ""), there.object_id))
        except modal.exception.NotFoundError:
            return []  # nothing was ever started
        except BROKEN as error:
            raise SandboxUnreachable(f"What runs at Modal cannot be told: {why(error)}.") from error
        return found

    async def left_behind(self, record: Record, local: Path) -> Path | None:
        name, folder = record["volume"], kept_as(record["handle"])
        try:
            client = await self._account.client()
            async with asyncio.timeout(10 * ASK_SECONDS):
                return await self._journals.fetch(name, folder, local, client)
        except BROKEN as error:
            raise SandboxUnreachable(
                f"The journal of sandbox {record['handle']} cannot be fetched now: {said(error)}."
            ) from error

    async def _record(self, tags: Mapping[str, str], handle: str, id: str) -> Record:
        app = await self._account.app()
        return {
            "handle": handle,
            "id": id,
            "app": APP,
            "volume": self._journals.name(tags.get(OWNER, "")),
            "link": await app.get_dashboard_url.aio(),
        }


def sandbox_name(handle: str) -> str:
    """A handle as Modal takes it for a name: itself, or a digest if it is too long for one."""
    return handle if NAME.fullmatch(handle) else digest(handle)


def tag(owner: str) -> str:
    """An owner as Modal takes it for a tag. No two share one."""
    plain = NAME.fullmatch(owner) and not owner.startswith(DIGEST)
    return owner if plain else digest(owner)


def digest(text: str) -> str:
    return DIGEST + hashlib.sha256(text.encode()).hexdigest()[:40]


def gpu_of(spec: SandboxSpec) -> str | None:
    if spec.gpu is None:
        return None
    return spec.gpu if spec.gpu_count == 1 else f"{spec.gpu}:{spec.gpu_count}"


def machine(spec: SandboxSpec) -> str:
    """1 × A100-80GB, or a machine without a GPU."""
    return f"{spec.gpu_count} × {spec.gpu}" if spec.gpu else "a machine"


def not_begun(creating: asyncio.Task[Any]) -> bool:
    """Whether a create failed before anything could be asked of Modal."""
    return not creating.cancelled() and isinstance(
        creating.exception(), (modal.exception.AuthError, modal.exception.PermissionDeniedError)
    )


@asynccontextmanager
async def telling(report: Progress, what: str) -> AsyncGenerator[None]:
    """Say what is waited for, and every few seconds for how long."""
    began = time.monotonic()
    report(what)

    async def repeat() -> None:
        while True:
            await asyncio.sleep(TOLD_SECONDS)
            report(f"{what} ({duration(time.monotonic() - began)} so far)")

    task = asyncio.create_task(repeat())
    try:
        yield
    finally:
        task.cancel()
