"""A start whose models are hidden: names become known here, and nothing is handed over that tells them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..backends import Progress
from ..blind import HiddenNames, check_cell, failure, judge, receipt
from ..environment import Investigation, ModelSpec, Opening, SandboxSpec, read_investigation
from ..errors import BadInput, SandboxStartFailed, SeerError
from ..model_store import Prepared, names_of
from ..notebook import Cell
from ..redact import Redactor
from .session import Session

SMALL = 300_000  # bytes of a file that is read whole
HUB_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
LOGS = ("host.json", "record.json", "host.log", "kernel.log")


def refuse_what_tells(spec: SandboxSpec) -> None:
    """Raises BadInput for a sandbox with hidden models that could look their names up."""
    if not hidden(spec.models):
        return
    if not spec.blocked:
        raise BadInput(
            "network",
            list(spec.network) if isinstance(spec.network, tuple) else spec.network,
            "a hidden model can be looked up where there is a network; write network = false under [sandbox], or take "
            "`hidden` out",
        )
    if tokens := [name for name in spec.secrets if name in HUB_TOKENS]:
        raise BadInput(
            "secrets",
            tokens[0],
            "it lists what its account may read, hidden models among them; leave it out, as the server fetches "
            "models with its own",
        )


def hidden(specs: Sequence[ModelSpec]) -> list[ModelSpec]:
    return [spec for spec in specs if spec.hidden]


def hide_again(redactor: Redactor, file: Path) -> None:
    """After a restart of the server: the names are in no record, but in the investigation."""
    try:
        found = read_investigation(file)
    except SeerError:
        return  # it was changed, and its names with it
    for spec in hidden(found.models):
        redactor.hide(HiddenNames(names_of(spec)).values)


class Blinding:
    """What is hidden in one start, and whether it is."""

    def __init__(self, session: Session, logs: Redactor, spec: SandboxSpec) -> None:
        self._session = session
        self._redactors = (session.redactor, logs)
        self._models = spec.models
        self._names = HiddenNames([])
        self._copies: dict[str, dict[str, Any]] = {}
        self._folders: dict[str, dict[str, str]] = {}
        self._seconds = 0.0
        self.place = session.state_dir / "blind"
        """A folder of the sandbox on this machine: copies, and homes of programs that keep histories."""
        self.netless = spec.blocked
        """Whether the network is shut out."""
        self.said: list[str] = []
        """Progress that was told."""
        self._learn([name for each in hidden(spec.models) for name in names_of(each)])

    def _learn(self, names: Sequence[str]) -> None:
        self._known = list(dict.fromkeys([*getattr(self, "_known", ()), *names]))
        self._names = HiddenNames(self._known)
        for redactor in self._redactors:
            redactor.hide(self._names.values)

    def prepared(self, made: Prepared) -> None:
        """The copies are there: their files, and names that came to light with them."""
        self._learn(made.names)
        self._copies |= made.copies
        self._folders |= {made.told[alias]: copy["files"] for alias, copy in made.copies.items()}
        self._seconds += made.seconds

    def environment(self) -> dict[str, str]:
        """For a kernel on this machine: histories and caches of its user are not its own."""
        hub = str(self.place / "hub")
        return {
            "IPYTHONDIR": str(self.place / "ipython"),
            "HF_HOME": hub,
            "HF_HUB_CACHE": f"{hub}/hub",
            "HF_DATASETS_CACHE": f"{hub}/datasets",
            "HF_HUB_OFFLINE": "1",
            "TRANSFORMERS_OFFLINE": "1",
        }

    def without_names(self, error: BaseException) -> None:
        """What is said of a failed start is read by the client."""
        clean = self._session.redactor.text
        if isinstance(error, SeerError):
            error.args = (clean(str(error)),)
        elif isinstance(error, OSError) and isinstance(error.filename, str):
            error.filename = clean(error.filename)

    async def open_with(
        self, opening: Iterator[Opening], found: Investigation, report: Progress
    ) -> None:
        """Begin the notebook; hand the models over if every probe is passed.

        Raises SandboxStartFailed.
        """
        session = self._session
        load: Cell | None = None
        rest: list[Opening] = []
        for kind, source in opening:
            if load is not None:
                rest.append((kind, source))
                continue
            cell = session.notebook.insert(kind, source)
            load = cell if kind == "code" else None
        assert load is not None
        report("loading the hidden models")
        await self._ran(load, "could not be loaded")
        began = time.monotonic()
        report("checking that nothing tells their names")
        check = session.notebook.insert("code", check_cell(found.models))
        session.observing = True
        await self._ran(check, "could not be checked")
        session.observing = False
        local = session.backend_name == "local"
        said = await asyncio.to_thread(self._server_probes, found, await session.status(), rest)
        judged = judge(
            session.observed, said, self._names, self._folders, local=local, netless=self.netless
        )
        session.observed = None
        if judged.failed:
            raise SandboxStartFailed(session.redactor.text(failure(judged)))
        text = receipt(
            self._models,
            judged,
            self._copies,
            backend=session.backend_name,
            netless=self.netless,
            seconds=self._seconds + time.monotonic() - began,
        )
        session.notebook.insert("markdown", text)
        cells = [session.notebook.insert(kind, source) for kind, source in rest]
        if code := [cell for cell in cells if cell.kind == "code"]:
            session.opening += await session.run_cells(code)

    async def _ran(self, cell: Cell, why: str) -> None:
        (run,) = await self._session.run_cells([cell])
        self._session.opening.append(run)
        await run.over.wait()
        if run.state != "complete":
            errors = [o for o in cell.data["outputs"] if o.get("output_type") == "error"]
            told = f": {errors[-1]['ename']}: {errors[-1]['evalue']}" if errors else ""
            text = f"a hidden model {why} (the cell ended with {run.state}){told}"
            raise SandboxStartFailed(self._session.redactor.text(text)[:2000])

    def _server_probes(
        self, found: Investigation, status: dict[str, Any], rest: Sequence[Opening]
    ) -> dict[str, str]:
        """What this server says and writes about the sandbox."""
        session = self._session
        files = {name: read_small(session.state_dir / name) for name in LOGS}
        packs = [p for folder in found.pack_folders for p in folder.rglob("*") if p.is_file()]
        skills = [p for skill in found.skills for p in skill.folder.rglob("*") if p.is_file()]
        return {
            "server: handle and name": f"{session.handle} {session.name}",
            "server: notebook": session.notebook.text(),
            "server: path of the notebook": str(session.notebook.path),
            "server: status": json.dumps(status, default=str),
            "server: progress": "\n".join(self.said),
            "server: task": f"{found.title}\n{found.task}",
            "server: setup": "\n".join(source for _, source in rest),
            "server: packs and skills": "\n".join(map(read_small, [*packs, *skills])),
            **{f"server: {name}": text for name, text in files.items()},
        }


def read_small(path: Path) -> str:
    """What a small file says; "" of one that is large or not there."""
    if not path.is_file() or path.stat().st_size > SMALL:
        return ""
    return path.read_text(errors="replace")
