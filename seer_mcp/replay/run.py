"""Run the cells of a finished notebook again in a fresh sandbox, into a copy of it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..config import Config
from ..environment import BUILTIN_PACKS, Investigation, ModelSpec, SandboxSpec, read_investigation
from ..errors import BadInput, SeerError
from ..findings import is_findings
from ..ipynb import read_notebook
from ..notebook import UNFINISHED, Cell, Notebook
from ..packs import Packs
from ..plugins import pack_folders
from ..sessions import Bridges, Register, Session
from .compare import Bounds, Compared, compare
from .models import Loaded, exchanged, exchanges, loads

OWNER = "replay"
NAME_CHARACTERS = 24  # of the notebook's name, that its sandbox is called by
NEVER = ("not run", "not_run", "")


@dataclass(frozen=True)
class Wanted:
    """What is to be run again, and how."""

    notebook: Path
    models: tuple[str, ...] = ()
    """MODEL, or VARIABLE=MODEL."""
    backend: str = ""
    gpu: str = ""
    investigation: str = ""
    """Whose sandbox it needs; by default that of the notebook."""
    cell_seconds: float = 3600.0
    """How long one cell may run."""
    bounds: Bounds = field(default_factory=Bounds)


@dataclass
class Step:
    """One code cell, run again."""

    number: int
    """Its place among all cells, from 1."""
    cell: str
    says: str
    before: str
    after: str = ""
    seconds_before: float | None = None
    seconds_after: float | None = None
    compared: Compared = field(default_factory=Compared)

    @property
    def verdict(self) -> str:
        if self.before in NEVER and not self.after:
            return "left"
        return "alike" if self.compared.alike else "differs"


@dataclass
class Replay:
    """What came of it."""

    original: Path
    notebook: Path
    backend: str
    exchanged: dict[str, tuple[str, str]]
    """Variable: the model before, and the one that it was run on."""
    steps: list[Step] = field(default_factory=list[Step])
    notes: list[str] = field(default_factory=list[str])
    cost: str = ""
    stopped: str = ""
    """Why it did not reach the end, or ""."""

    @property
    def alike(self) -> bool:
        return not self.stopped and all(step.verdict != "differs" for step in self.steps)

    def count(self, verdict: str) -> int:
        return sum(step.verdict == verdict for step in self.steps)


Told = Callable[[str], None]


class Stopped(Exception):
    """Why no further cell can be run."""


async def replayed(
    config: Config, wanted: Wanted, halt: asyncio.Event, tell: Told, done: Callable[[Step], None]
) -> Replay:
    """Run it again; whatever happens, its sandbox has ended then. Raises SeerError.

    `halt`: set by whoever wants it to end early; what runs is interrupted. `tell` hears what is waited for,
    `done` each cell.
    """
    path = wanted.notebook
    cells, metadata = read_notebook(path, as_copy=True)
    before = Notebook(path, cells, metadata)
    code = [cell for cell in before.cells if cell.kind == "code"]
    if all(cell.state in NEVER and not cell.execution_count for cell in code):
        raise BadInput("notebook", str(path), "none of its cells was ever run")
    found = loads([(cell.id, cell.source) for cell in code])
    models = exchanges(wanted.models, found)
    home = path.parent.parent if path.parent.name == path.stem else path.parent
    config = replace(
        config,
        outputs_dir=home,
        notebook_roots=(*config.notebook_roots, path.parent),
        on_exit="stop",
    )
    register = Register(config, Packs([BUILTIN_PACKS, *config.packs], pack_folders), only=OWNER)
    bridges = Bridges(register)
    await register.open()
    try:
        session = await _unless(halt, _started(register, wanted, before, models, tell))
        result = Replay(path, session.notebook.path, session.backend_name, _said(found, models))
        result.notes += _of_the_order(before)
        again = Again(session, before, result, wanted, halt, done)
        again.prepare(models)
        await again.run()
        await again.close()
        return result
    finally:
        await bridges.close()
        await register.close()


async def _unless(halt: asyncio.Event, start: Coroutine[Any, Any, Session]) -> Session:
    """The sandbox when it is ready. Raises SeerError after a halt: its start was given up."""
    starting = asyncio.create_task(start)
    halted = asyncio.create_task(halt.wait())
    try:
        await asyncio.wait({starting, halted}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            return starting.result()
        starting.cancel()
        await asyncio.wait({starting})
        raise SeerError("It was interrupted before its sandbox was ready. Nothing of it runs.")
    finally:
        halted.cancel()


async def _started(
    register: Register, wanted: Wanted, before: Notebook, models: Mapping[str, str], tell: Told
) -> Session:
    named = wanted.investigation or before.metadata.get("seer", {}).get("investigation", "")
    try:
        if named and Path(named).exists():
            found = read_investigation(Path(named))
        else:
            found = register.investigation(named, OWNER) if named else None
    except SeerError as error:
        raise BadInput(
            "investigation",
            named,
            f"the notebook was made for it, and it cannot be used here ({error}); name its folder with "
            "--investigation, or that of another one",
        ) from error
    spec = _spec(wanted, found, models)
    stem = "".join(c if c.isascii() and c.isalnum() else "-" for c in before.path.stem.lower())
    name = f"{stem[:NAME_CHARACTERS].strip('-') or 'notebook'}-replay"
    start = await register.begin(OWNER, name, spec, str(before.path), True, found)
    return await start.wait(None, tell)


def _spec(wanted: Wanted, found: Investigation | None, models: Mapping[str, str]) -> SandboxSpec:
    spec = found.sandbox if found is not None else SandboxSpec()
    changes: dict[str, Any] = {}
    if wanted.backend:
        changes["backend"] = wanted.backend
    if wanted.gpu:
        changes["gpu"] = wanted.gpu
    if models:  # behind the hidden ones of the investigation, which are known by their places
        kept = [each for each in spec.models if each.variable not in models or each.hidden]
        names = {each.variable for each in kept}
        others = [
            ModelSpec(
                name=model, variable=f"{variable}_exchanged" if variable in names else variable
            )
            for variable, model in models.items()
        ]
        changes["models"] = (*kept, *others)
    given = {key: getattr(spec, key) for key in SandboxSpec.model_fields}
    return SandboxSpec.model_validate({**given, **changes})


def _said(found: Sequence[Loaded], models: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    first = {each.variable: each.model for each in reversed(found)}
    return {variable: (first[variable], model) for variable, model in models.items()}


def _of_the_order(before: Notebook) -> list[str]:
    """What is to be known of a notebook whose cells were not run once each from the top."""
    counts = [cell.execution_count for cell in before.cells if cell.execution_count]
    notes: list[str] = []
    if counts != sorted(counts):
        notes.append("its cells were run in another order at first; here they run from the top")
    if stale := [cell.id for cell in before.cells if cell.seer.get("stale")]:
        notes.append(
            f"edited since they ran, so that their outputs are of other code: {', '.join(stale)}"
        )
    return notes


class Again:
    """The cells of a notebook in a sandbox, one by one."""

    def __init__(
        self,
        session: Session,
        before: Notebook,
        result: Replay,
        wanted: Wanted,
        halt: asyncio.Event,
        done: Callable[[Step], None],
    ) -> None:
        self._session = session
        self._before = before
        self._result = result
        self._wanted = wanted
        self._halt = halt
        self._done = done
        self._exchanged: set[str] = set()

    def prepare(self, models: Mapping[str, str]) -> None:
        """Exchange the models, and mark conclusions as those of the other run."""
        notebook = self._session.notebook
        for cell in notebook.cells:
            if cell.kind == "code" and models:
                if (source := exchanged(cell.source, models)) != cell.source:
                    notebook.rewrite(cell, source)
                    self._exchanged.add(cell.id)
            elif is_findings(cell.source):
                quoted = "\n".join(f"> {line}".rstrip() for line in cell.source.splitlines())
                said = f"*From {self._before.path.name}, not from the run above:*"
                notebook.rewrite(cell, f"{said}\n\n{quoted}")
        facts = notebook.metadata.get("seer", {})
        notebook.metadata["seer"] = {**facts, "replay_of": self._before.path.name}
        notebook.changed()

    async def run(self) -> None:
        """Each cell that was run; after one that cannot be, no other."""
        for number, cell in enumerate(self._before.cells, 1):
            if cell.kind != "code":
                continue
            said = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
            step = Step(number, cell.id, said[:80], _state(cell))
            step.seconds_before = cell.seer.get("seconds")
            self._result.steps.append(step)
            if step.before not in NEVER:
                await self._step(step, cell)
            self._done(step)

    async def _step(self, step: Step, before: Cell) -> None:
        after = self._session.notebook.cell(before.id)
        if not self._result.stopped:
            try:
                await self._ran(after)
            except Stopped as why:
                self._result.stopped = str(why)
            except SeerError as error:  # the kernel, or the machine, is gone
                self._result.stopped = str(error)
                step.after = "not_run"
                step.compared.differs("state", f"{step.before} -> not run: {error}")
                return
        else:
            step.after = "not_run"
            step.compared.differs("state", f"{step.before} -> not run: the replay ended before it")
            return
        step.after, step.seconds_after = after.state, after.seer.get("seconds")
        step.compared = compare(
            before, after, self._wanted.bounds, step.before, before.id not in self._exchanged
        )
        if before.id in self._exchanged:
            step.compared.notes.append("loads another model, so what it says is not compared")
        if after.state in ("kernel_died", "sandbox_lost", "expired") and not self._result.stopped:
            self._result.stopped = (
                f"cell {after.id}: {after.state} ({after.seer.get('why') or 'no reason is known'})"
            )

    async def _ran(self, cell: Cell) -> None:
        """Run it and wait for its end. Raises Stopped when it was not let end, and what run_cells does."""
        (run,) = await self._session.run_cells([cell])
        limit = self._wanted.cell_seconds
        over = asyncio.ensure_future(run.over.wait())
        halted = asyncio.ensure_future(self._halt.wait())
        try:
            await asyncio.wait({over, halted}, timeout=limit, return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                await self._session.save()
                return
        finally:
            over.cancel()
            halted.cancel()
        why = (
            "it was interrupted"
            if self._halt.is_set()
            else f"cell {cell.id} ran for more than {limit:g} s"
        )
        _, did, _ = await self._session.interrupt(run.id, True)
        raise Stopped(why if did else f"{why}, and did not heed the interrupt")

    async def close(self) -> None:
        """End the sandbox; write what came out below the notebook."""
        session, result = self._session, self._result
        if session.ended is None:
            await session.terminate("the replay is over")
        if session.meter is not None:
            result.cost = session.meter.so_far()
        session.notebook.insert("markdown", summary(result))
        await session.notebook.save()


def _state(cell: Cell) -> str:
    """How it ended; of a notebook of another program, by its outputs."""
    if cell.seer.get("state") in UNFINISHED:
        return "not_run"
    if cell.seer.get("state"):
        return cell.state
    if not cell.execution_count:
        return "not run"
    failed = any(output["output_type"] == "error" for output in cell.data.get("outputs", ()))
    return "error" if failed else "complete"


def summary(result: Replay) -> str:
    """The cell that ends the new notebook."""
    day = time.strftime("%Y-%m-%d")
    parts = [f"## Replay of {result.original.name}, {day}"]
    parts += [
        f"`{v}`: `{old}` was exchanged for `{new}`." for v, (old, new) in result.exchanged.items()
    ]
    total = len(result.steps) - result.count("left")
    parts.append(
        f"{result.count('alike')} of {total} cells came out alike, {result.count('differs')} did not."
    )
    if result.stopped:
        parts.append(f"**It did not reach the end:** {result.stopped}")
    parts += [f"Note: {note}." for note in result.notes]
    rows = [
        f"| {step.number} | `{step.cell}` | {difference.what} | {difference.says.replace('|', chr(0x2502))} |"
        for step in result.steps
        for difference in step.compared.differences
    ]
    if rows:
        parts.append(
            "\n".join(["| cell | id | what | before -> now |", "|---|---|---|---|", *rows])
        )
    return "\n\n".join(parts)
