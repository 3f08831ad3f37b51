"""Models on volumes: one for each model and revision, fetched once by a machine without a GPU.

The token for gated models is in that machine's environment and in no other's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import modal
import modal.exception

from ...config import Config
from ...environment import BUILTIN_PACKS, ModelSpec, SandboxSpec
from ...errors import BadInput, Conflict, ModelUnavailable
from ...model_store import (
    MODELS_VARIABLE,
    FetchProgress,
    HubModel,
    Manifest,
    Part,
    Prepared,
    copy_here,
    follow,
    hub_model,
    hub_models,
    kernel_map,
    names_of,
    parts_of,
    program,
    request,
    unnamed,
    with_base,
)
from .. import Place, Progress
from .account import ANSWER_SECONDS, APP, HANDLE, Account
from .copies import Copies
from .image import PYTHON, UV, Images
from .sandbox import THERE, Ending

HUB_CLIENT = "huggingface_hub>=1,<3"
PLACES = "/models"  # where a kernel finds them, by numbers: a path names no model
VOLUME = "/model"  # where the machine that fetches has the volume
FETCHER = "/seer/fetch"
ON_VOLUME = "volume:"  # how a folder begins that is on one
SENT = ".models"  # in the working folder: copies that came with the files
FETCH_SECONDS = 6 * 3600
CORES, MEBIBYTES = 2.0, 4096
OF_MODELS = "seer-model-"  # what volumes of models, and machines that fetch them, are called
FETCHING = ("HF_TOKEN", "HF_ENDPOINT")  # of the server's environment, for that machine


class Models:
    def __init__(self, config: Config, account: Account, images: Images) -> None:
        self._account = account
        self._here = config.project_dir
        self._env = {"HF_HUB_DISABLE_TELEMETRY": "1"}
        self._env |= config.secrets.at_hand(["HF_TOKEN"])
        self._env |= {name: value for name, value in config.fetch_env.items() if name in FETCHING}
        self._images = images
        self.ending = Ending()
        self._copies = Copies(account, images, self.ending)

    async def ready(
        self,
        spec: SandboxSpec,
        place: Place,
        tags: dict[str, str],
        app: Any,
        report: Progress,
    ) -> tuple[dict[str, Any], SandboxSpec]:
        """Volumes to mount, and the spec with what the kernel has to be told.

        Raises ModelUnavailable, or modal's errors.
        """
        found: dict[HubModel, tuple[Any, Manifest]] = {}
        shown: set[HubModel] = set()
        bases: dict[int, str] = {}
        for number, each in enumerate(spec.models, 1):
            self._check(each)
            label = f"model {number}" if each.hidden else ""
            waiting = hub_models(each, self._here)
            while waiting:
                model = waiting.pop(0)
                if not each.hidden:
                    shown.add(model)
                try:
                    if model not in found:
                        found[model] = await self._model(model, label, tags, app, report)
                except ModelUnavailable as error:
                    raise (unnamed(error, label) if label else error) from None
                manifest = found[model][1]
                # The base that an adapter names, where nothing else was named for it to go on.
                if manifest.base and not each.base and model.name == each.name:
                    bases[number] = manifest.base
                    base = hub_model(manifest.base, here=self._here)
                    waiting += [base] if base is not None else []
        volumes: dict[str, Any] = {}
        told: dict[HubModel, tuple[str, str]] = {}
        for model in (model for model in found if model in shown):
            volume, manifest = found[model]
            at = f"{PLACES}/{len(volumes) + 1}"
            volumes[at] = volume.with_mount_options(read_only=True)
            told[model] = (manifest.commit, f"{at}/files")
        names = kernel_map(told)
        files: dict[str, str] = {}
        if any(each.hidden for each in spec.models):
            report("making copies without names")
            made, mounts, files = await self._hidden(
                spec, place, found, bases, len(volumes), tags, app
            )
            place.prepared(made)
            volumes |= mounts
            names |= made.told
        env = {MODELS_VARIABLE: json.dumps(names)} if names else {}
        if files or any(each.hidden for each in spec.models):
            env |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
        changes = {"env": {**spec.env, **env}, "files": {**spec.files, **files}}
        return volumes, spec.model_copy(update=changes)

    async def _hidden(
        self,
        spec: SandboxSpec,
        place: Place,
        found: dict[HubModel, tuple[Any, Manifest]],
        bases: dict[int, str],
        mounted: int,
        tags: dict[str, str],
        app: Any,
    ) -> tuple[Prepared, dict[str, Any], dict[str, str]]:
        """Copies without names: of hub models on their volumes, of organisms sent with the files."""
        parts: list[Part] = []
        names: list[str] = []
        names_for: dict[str, list[str]] = {}
        here = str(BUILTIN_PACKS.parent)
        there = {model: ("", ON_VOLUME + model.key) for model in found}
        for number, each in enumerate(spec.models, 1):
            if each.hidden:
                base = bases.get(number, "")
                own = parts_of(number, each, there, here, base)
                if not own[0].folder.startswith(ON_VOLUME):
                    own = with_base(number, own, here)
                parts += own
                local = [part for part in own if not part.folder.startswith(ON_VOLUME)]
                names_for |= {part.alias: names_of(each, local, base) for part in own}
                names += names_for[own[0].alias]
        names = list(dict.fromkeys(names))
        by_key = {ON_VOLUME + model.key: model for model in found}
        sent = await asyncio.to_thread(
            copy_here,
            [part for part in parts if part.folder not in by_key],
            names,
            place.state_dir / "blind" / "models",
        )
        files = {f"{SENT}/{Path(folder).name}": folder for folder in set(sent.told.values())}
        told = {
            alias: f"{THERE.cwd}/{SENT}/{Path(folder).name}" for alias, folder in sent.told.items()
        }
        copies, learnt = dict(sent.copies), list(names)
        mounts: dict[str, Any] = {}
        done: dict[str, str] = {}
        for part in parts:
            model = by_key.get(part.folder)
            if model is None:
                continue
            if part.folder not in done:
                volume, _ = found[model]
                copy, known = await self._copies.made(
                    model, volume, part.alias, names_for[part.alias], tags, app
                )
                at = done[part.folder] = f"{PLACES}/{mounted + len(mounts) + 1}"
                mounts[at] = volume.with_mount_options(read_only=True, sub_path=copy)
                copies[part.alias] = known
                learnt += known["names"]
            told[part.alias] = done[part.folder]
        return Prepared(told, tuple(learnt), copies), mounts, files

    async def kept(self) -> dict[str, Manifest | None]:
        """Volumes of models, by name: what is in each; None for one whose fetch did not end."""
        client = await self._account.client()
        volumes = await modal.Volume.objects.list.aio(client=client)
        ours = {v.name: v for v in volumes if v.name and v.name.startswith(OF_MODELS)}
        manifests = await asyncio.gather(*map(manifest_of, ours.values()))
        return dict(zip(ours, manifests, strict=True))

    async def fetch(self, model: HubModel, report: Progress) -> Manifest:
        """The model on its volume, complete. Raises ModelUnavailable, or modal's errors."""
        app = await self._account.app()
        _, manifest = await self._model(model, "", {}, app, report)
        return manifest

    async def remove(self, model: HubModel) -> bool:
        """Delete its volume; whether there was one. Raises Conflict while it is fetched."""
        client = await self._account.client()
        with suppress(modal.exception.NotFoundError):
            there = await modal.Sandbox.from_name.aio(APP, model.volume, client=client)
            if await there.poll.aio() is None:
                raise Conflict(f"{model.label} is being fetched at Modal. Wait for that first.")
        try:
            await modal.Volume.objects.delete.aio(model.volume, client=client)
        except modal.exception.NotFoundError:
            return False
        return True

    def _check(self, spec: ModelSpec) -> None:
        for name in filter(None, (spec.name, spec.adapter, spec.base)):
            if name.startswith((".", "/", "~")) or (self._here / name).is_dir():
                raise BadInput(
                    "models",
                    name,
                    "it is a folder of this machine, which a sandbox at Modal does not have; send it with `files`, "
                    "or put it on the hub",
                )

    async def _model(
        self, model: HubModel, label: str, tags: dict[str, str], app: Any, report: Progress
    ) -> tuple[Any, Manifest]:
        client = await self._account.client()
        volume = modal.Volume.from_name(
            model.volume, create_if_missing=True, version=2, client=client
        )
        async with asyncio.timeout(ANSWER_SECONDS):
            await volume.hydrate.aio(client)
            manifest = await manifest_of(volume)
        if manifest is None:
            manifest = await self._fetch(model, label, volume, tags, app, report)
        return volume, manifest

    async def _fetch(
        self,
        model: HubModel,
        label: str,
        volume: Any,
        tags: dict[str, str],
        app: Any,
        report: Progress,
    ) -> Manifest:
        """By a machine of ours, or of who fetches it already: their names are the volume's."""

        def told(progress: FetchProgress) -> None:
            report(progress.sentence(label))

        report(f"fetching {label or model.label}")
        there, ours = await self._fetcher(model, volume, tags, app)
        try:
            manifest = await follow(lines_of(there), model, told)
        finally:
            if ours:  # it ends by itself; also where it was cut off, and says so to nobody
                await self.ending.end(model.volume, there)
        # What another machine committed counts, where both ended.
        return await manifest_of(volume) or manifest

    async def _fetcher(
        self, model: HubModel, volume: Any, tags: dict[str, str], app: Any
    ) -> tuple[Any, bool]:
        image = await self._images.made(
            FETCHER,
            lambda: (
                modal.Image.debian_slim(python_version=PYTHON)
                .uv_pip_install(HUB_CLIENT, uv_version=UV)
                .add_local_dir(self._images.stage_text("fetch.py", program()), FETCHER)
            ),
            app,
        )
        client = await self._account.client()
        # With the create, not by stdin: a machine whose maker has died does not wait for it.
        told = request(model, VOLUME, sync=True).decode().strip()
        while True:
            try:
                there = await modal.Sandbox.create.aio(
                    "python",
                    f"{FETCHER}/fetch.py",
                    told,
                    app=app,
                    name=model.volume,
                    tags={**tags, HANDLE: model.volume},
                    image=image,
                    secrets=[modal.Secret.from_dict({**self._env})],
                    timeout=FETCH_SECONDS,
                    cpu=(CORES, CORES),
                    memory=MEBIBYTES,
                    volumes={VOLUME: volume},
                    client=client,
                )
            except modal.exception.AlreadyExistsError:
                with suppress(modal.exception.NotFoundError):  # it has just ended: ask again
                    there = await modal.Sandbox.from_name.aio(APP, model.volume, client=client)
                    return there, False
            else:
                return there, True


async def manifest_of(volume: Any) -> Manifest | None:
    """What says that a model is whole: it is written last."""
    text = bytearray()
    with suppress(FileNotFoundError, modal.exception.NotFoundError):
        async for piece in volume.read_file.aio("manifest.json"):
            text += piece
    return Manifest.of(json.loads(text)) if text else None


async def lines_of(there: Any) -> AsyncIterator[str]:
    async for line in there.stdout:
        yield line
