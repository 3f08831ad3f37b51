"""The models on this machine's disk, shared by all local sandboxes of a user."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import time
from asyncio import StreamReader
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import psutil

from ..environment import BUILTIN_PACKS, ModelSpec
from ..errors import Conflict, ModelUnavailable, NotFound, show
from ..files import Lock
from ..kernel_host.identity import MARK
from . import fetch
from .follow import FETCHER, Manifest, Report, follow, request, unnamed
from .hidden import Part, Prepared, copy_here, names_of, parts_of, with_base
from .names import MODELS_VARIABLE, HubModel, hub_model, hub_models, kernel_map

TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
LINE_LIMIT = 32 * 1024 * 1024


@dataclass(frozen=True)
class Kept:
    """A model that is on the disk, or in part."""

    model: HubModel
    commit: str
    folder: Path
    """What a kernel sees: files of the model and nothing else."""
    bytes: int
    total: int
    complete: bool
    used: float | None
    """When a sandbox was last given it."""


class ModelStore:
    """One folder per model and revision under `root`. Several processes may use it at once."""

    def __init__(self, root: Path, python: str, env: Mapping[str, str]) -> None:
        """`python` runs the fetch program and has huggingface_hub; `env` is all it gets of the environment."""
        self.root = root
        self._python = python
        self._env = {name: value for name, value in env.items() if name not in TOKENS}
        self._token = next((env[name] for name in TOKENS if env.get(name)), "")

    def _place(self, model: HubModel) -> Path:
        return self.root / model.key

    # -- what is there ------------------------------------------------------------------------

    def find(self, model: HubModel) -> Kept | None:
        return self._kept(self._place(model))

    def list(self) -> list[Kept]:
        """All models, complete or not, by name."""
        if not self.root.is_dir():
            return []
        folders = [path for path in self.root.iterdir() if path.is_dir() and not path.suffix]
        found = [self._kept(folder) for folder in folders]
        return sorted((k for k in found if k is not None), key=lambda kept: kept.model.label)

    def _kept(self, place: Path) -> Kept | None:
        whole = fetch.read_json(str(place / "manifest.json"))
        plan = whole or fetch.read_json(str(place / "plan.json"))
        if plan is None:
            return None
        # The manifest holds the branch's true name; the folder's name tells how it was asked for.
        asked = [HubModel(plan["name"], revision) for revision in ("", plan["revision"])]
        model = next((m for m in asked if m.key == place.name), asked[-1])
        entries = plan["files"]
        used = place / "used"
        return Kept(
            model,
            plan["commit"],
            place / "files",
            fetch.came(str(place), entries),
            sum(entry["size"] for entry in entries),
            whole is not None and not fetch.amiss(str(place), entries),
            used.stat().st_mtime if used.exists() else None,
        )

    def manifest(self, model: HubModel) -> Manifest | None:
        """Of a complete model; None if it is not there, or files are missing or have another size."""
        place = self._place(model)
        whole = fetch.read_json(str(place / "manifest.json"))
        if whole is None or fetch.amiss(str(place), whole["files"]):
            return None
        return Manifest.of(whole)

    def path_of(self, model: HubModel) -> Path:
        """The folder of a complete model, for a kernel; noted as used now. Raises NotFound."""
        if self.manifest(model) is None:
            known = [kept.model.label for kept in self.list() if kept.complete]
            raise NotFound("fetched model", model.label, known, "Fetch it: seer-mcp models fetch.")
        with contextlib.suppress(OSError):  # it is another user's, or read-only: no date then
            (self._place(model) / "used").touch()
        return self._place(model) / "files"

    def check(self, model: HubModel, deep: bool = False) -> list[str]:
        """What is wrong with a model, file by file; [] if nothing is. Reads all of it if `deep`."""
        place = self._place(model)
        whole = fetch.read_json(str(place / "manifest.json"))
        if whole is None:
            kept = self._kept(place)
            if kept is None:
                raise NotFound("model", model.label, [k.model.label for k in self.list()])
            return [f"{fetch.big(kept.total - kept.bytes)} are missing: its fetch did not end"]
        wrong = fetch.amiss(str(place), whole["files"], deep)
        return [f"{entry['path']} {what}" for entry, what in wrong]

    # -- fetch --------------------------------------------------------------------------------

    async def fetch(self, model: HubModel, report: Report, token: str = "") -> Manifest:
        """The model, complete; fetched if it is not there, by us or by whoever does it already.

        Raises ModelUnavailable. A fetch that is cancelled or fails goes on where it stopped next time.
        """
        if found := await asyncio.to_thread(self.manifest, model):
            return found
        try:
            process = await asyncio.create_subprocess_exec(
                self._python,
                str(FETCHER),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
                env={**self._env, "HF_HUB_DISABLE_TELEMETRY": "1", "PYTHONDONTWRITEBYTECODE": "1"},
                limit=LINE_LIMIT,
                start_new_session=True,  # an interrupt from the keyboard is for us, and ends it below
            )
        except OSError as error:
            why = f"{self._python} could not be started ({error.strerror}). Choose another with --python."
            raise ModelUnavailable(model.label, "no_client", why) from error
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(request(model, str(self._place(model)), token or self._token))
            with contextlib.suppress(ConnectionError):  # it died at once: its output says why
                await process.stdin.drain()
            process.stdin.close()
            return await follow(texts(process.stdout), model, report)
        finally:
            if process.returncode is None:
                process.kill()
            await process.wait()

    async def fetch_all(
        self,
        specs: Sequence[ModelSpec],
        report: Callable[[str], None],
        here: Path | None = None,
        token: str = "",
        copies: Path | None = None,
    ) -> Prepared:
        """What local kernels have to be told of these models (MODELS_VARIABLE), which are there then.

        Of hidden ones nameless copies are made in the folder `copies`. `report` gets a sentence about
        each second; hidden models are not named in it.
        """
        found: dict[HubModel, tuple[str, str]] = {}
        shown: set[HubModel] = set()
        bases: dict[int, str] = {}
        for number, spec in enumerate(specs, 1):
            label = f"model {number}" if spec.hidden else ""
            waiting = hub_models(spec, here)
            while waiting:
                model = waiting.pop(0)
                if not spec.hidden:
                    shown.add(model)
                try:
                    manifest = await self.fetch(
                        model, lambda p, label=label: report(p.sentence(label)), token
                    )
                except ModelUnavailable as error:
                    raise (unnamed(error, label) if label else error) from None
                found[model] = (manifest.commit, str(self.path_of(model)))
                # The base that an adapter names, where nothing else was named for it to go on.
                if manifest.base and not spec.base and model.name == spec.name:
                    bases[number] = manifest.base
                    base = hub_model(manifest.base, here=here)
                    waiting += [base] if base is not None else []
        told = kernel_map({model: found[model] for model in found if model in shown})
        hidden = [(n, spec) for n, spec in enumerate(specs, 1) if spec.hidden]
        if not hidden or copies is None:
            return Prepared(told)
        report("making copies without names")
        packs = str(BUILTIN_PACKS.parent)
        parts: list[Part] = []
        names: list[str] = []
        for number, spec in hidden:
            own = parts_of(number, spec, found, packs, bases.get(number, ""))
            own = with_base(number, own, packs)
            parts += own
            names += names_of(spec, own, bases.get(number, ""))
        made = await asyncio.to_thread(copy_here, parts, names, copies)
        return replace(made, told={**told, **made.told})

    @staticmethod
    def environment(told: Mapping[str, str]) -> dict[str, str]:
        """The variables of a kernel that was given models."""
        return {MODELS_VARIABLE: json.dumps(told)} if told else {}

    # -- remove -------------------------------------------------------------------------------

    def users(self, model: HubModel) -> list[str]:
        """Handles of living local sandboxes that were given the model."""
        folder = json.dumps(str(self._place(model) / "files"))
        found: set[str] = set()
        for process in psutil.process_iter():
            try:
                environ = process.environ()
            except (psutil.NoSuchProcess, psutil.AccessDenied):
                continue
            if folder in environ.get(MODELS_VARIABLE, ""):
                found.add(environ.get(MARK, f"process {process.pid}"))
        return sorted(found)

    def remove(self, model: HubModel, force: bool = False) -> int:
        """Delete a model; the bytes that were freed. Raises NotFound, or Conflict while it is needed."""
        place = self._place(model)
        kept = self._kept(place)
        if kept is None:
            raise NotFound("model", model.label, [k.model.label for k in self.list()])
        lock = Lock(place.with_suffix(".lock"))
        if not lock.take():
            raise Conflict(f"{model.label} is being fetched by another process. Stop that first.")
        try:
            if not force and (users := self.users(model)):
                raise Conflict(
                    f"{model.label} is used by {', '.join(map(show, users))}. Stop it first, or remove the model with "
                    "--force: what is read of it later fails."
                )
            # First what says that it is complete: cut off here, it is an unfinished fetch.
            (place / "manifest.json").unlink(missing_ok=True)
            gone = place.with_name(f"{place.name}.{os.getpid()}.{time.monotonic_ns()}.removed")
            place.rename(gone)
            for left in self.root.glob("*.removed"):  # of a removal that was cut off, too
                shutil.rmtree(left)
        finally:
            lock.release()
        return kept.bytes


async def texts(stream: StreamReader) -> AsyncIterator[str]:
    while line := await stream.readline():
        yield line.decode(errors="backslashreplace")
