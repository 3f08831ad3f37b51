"""What a pack lacks: in its texts, read without importing it; and in its examples, run in a real kernel."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ..config import Config
from ..environment import BUILTIN_PACKS, SandboxSpec
from ..packs import Pack, Packs, Technique
from ..sessions import Register
from ..text import strip_ansi

NEEDED = {
    "returns": "Returns",
    "use_when": "Use when",
    "not_when": "Not when",
    "cost": "Cost",
    "controls": "Controls",
    "paper": "Paper",
    "example": "Example",
}
PAPER = re.compile(r"\b\d{4}\.\d{4,5}\b|https?://|\b(19|20)\d\d\b|^n/a", re.I)
SHAPE = re.compile(r"\[[^\]]*\]")
RUN_SECONDS = 300.0
LOAD = 'from tool_packs.models import load_model\nm = load_model("organism:base")'


@dataclass(frozen=True)
class Fault:
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}"


def of_texts(folder: Path) -> tuple[list[Pack], list[Fault]]:
    """The packs of a folder, and what their texts lack."""
    listing = Packs([BUILTIN_PACKS, folder]).read()
    faults = [Fault(str(folder), problem) for problem in listing.problems if str(folder) in problem]
    packs = [pack for pack in listing.packs if pack.folder == folder]
    if not packs and not faults:
        faults.append(
            Fault(str(folder), "no pack: give a module an __all__ that names its functions")
        )
    for pack in packs:
        if not pack.summary:
            faults.append(Fault(pack.name, "the module has no docstring: say what it is about"))
        for technique in pack.techniques:
            faults += [Fault(technique.full_name, what) for what in lacking(technique)]
    return packs, faults


def lacking(technique: Technique) -> list[str]:
    found: list[str] = []
    if not technique.summary:
        found.append("no docstring: its first line is the question that it answers")
    found += [
        f'its docstring has no "{heading}:"'
        for key, heading in NEEDED.items()
        if not getattr(technique, key)
    ]
    if technique.returns and not SHAPE.search(technique.returns):
        found.append('"Returns:" gives no shapes, as in scores [prompt, layer]')
    if technique.paper and not PAPER.search(technique.paper):
        found.append('"Paper:" names none: an arXiv id, a link, author and year, or n/a')
    arguments = re.search(r"\((.*)\)", technique.signature, re.S)
    names = re.findall(r"(\w+)\s*(?=:|=|,|$)", arguments[1]) if arguments else []
    if len(names) > 1 and not technique.args:
        found.append('its docstring has no "Args:"')
    if technique.example:
        try:
            ast.parse(technique.example)
        except SyntaxError as error:
            found.append(f'its "Example:" is no Python: {error.msg} in line {error.lineno}')
    return found


async def of_examples(config: Config, folder: Path, packs: list[Pack]) -> list[Fault]:
    """Run each example where a client would: in a local sandbox whose `m` is a small trained model."""
    faults: list[Fault] = []
    with TemporaryDirectory(prefix="seer-mcp-packs-") as scratch:
        away = Path(scratch)
        own = replace(
            config,
            project_dir=away,
            outputs_dir=away / "outputs",
            state_dir=away / "state",
            packs=(folder,),
            on_exit="stop",
        )
        register = Register(own, Packs([BUILTIN_PACKS, folder]))
        await register.open()
        try:
            await run_examples(register, packs, faults)
        finally:
            await register.close()
    return faults


async def run_examples(register: Register, packs: list[Pack], faults: list[Fault]) -> None:
    spec = SandboxSpec(idle_limit=RUN_SECONDS)
    session = await register.start("packs", "packs", spec, "", False, lambda text: None)

    async def silent(text: str) -> None:
        return

    async def run(where: str, source: str) -> bool:
        (made,) = await session.run_cells([session.notebook.insert("code", source)])
        done = await session.wait([made], RUN_SECONDS, silent)
        if done and made.state == "complete":
            return True
        why = session.last_line(made) if done else f"still running after {RUN_SECONDS:.0f} s"
        faults.append(Fault(where, f"its example does not run: {strip_ansi(made.why or why)}"))
        return False

    if not await run("organism:base", LOAD):
        return
    for pack in packs:
        for technique in pack.techniques:
            if technique.example:
                await run(technique.full_name, technique.cell)
