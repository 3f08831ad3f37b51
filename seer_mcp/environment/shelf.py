"""Investigations by name: those that ship with the server, and those of the operator's folders.

The shipped ones are the folders of `examples/` in a checkout; a wheel carries a copy of it inside the
package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InvestigationRefused, NotFound, SeerError
from .investigation import FILE, Investigation, read_investigation

_PACKAGE = Path(__file__).parent.parent
SHIPPED = next(
    (
        folder
        for folder in (_PACKAGE.parent / "seer_mcp_examples", _PACKAGE.parent / "examples")
        if folder.is_dir()
    ),
    _PACKAGE.parent / "examples",
)
MOST = 500  # folders that are looked into


@dataclass(frozen=True)
class Shelved:
    """An investigation that can be started by its name."""

    name: str
    title: str
    task: str
    file: Path
    variants: tuple[str, ...]
    """Other configurations beside investigation.toml: "gpu" for gpu.toml, started as NAME/gpu."""


@dataclass(frozen=True)
class Shelf:
    found: tuple[Shelved, ...]
    problems: tuple[str, ...]
    """A sentence for each folder that cannot be used."""

    def names(self) -> list[str]:
        return [each.name for each in self.found]

    def get(self, name: str) -> Shelved | None:
        return next((each for each in self.found if each.name == name), None)

    def told(self) -> str:
        """All of them, a line each."""
        lines = [
            f"{each.name}: {each.title}"
            + (
                f" (also {', '.join(f'{each.name}/{v}' for v in each.variants)})"
                * bool(each.variants)
            )
            for each in self.found
        ]
        return "\n".join([*lines, *(f"! {problem}" for problem in self.problems)])


class Investigations:
    """The folders in which investigations are found by name; the shipped ones come first."""

    def __init__(self, folders: Sequence[Path], shipped: Path = SHIPPED) -> None:
        self._folders = [shipped, *(folder.absolute() for folder in folders)]

    def read(self) -> Shelf:
        """All as they are now. A bad folder is a problem of its own and hides no other."""
        found: dict[str, Shelved] = {}
        problems: list[str] = []
        for folder in self._folders:
            if not folder.is_dir():
                problems.append(f"{folder} is no folder, so no investigations are found there.")
                continue
            here = [folder] if (folder / FILE).is_file() else sorted(folder.iterdir())[:MOST]
            for each in here:
                if not (each / FILE).is_file():
                    continue
                try:
                    one = _shelved(read_investigation(each))
                except (InvestigationRefused, OSError) as error:
                    problems.append(" ".join(str(error).split())[:400])
                    continue
                if one.name in found:
                    problems.append(
                        f"{each} is not listed: the name {one.name} is taken by {found[one.name].file.parent}; "
                        'write another name = "…".'
                    )
                    continue
                found[one.name] = one
        return Shelf(tuple(found.values()), tuple(problems))

    def file(self, asked: str) -> Path | None:
        """The file behind NAME or NAME/VARIANT; None for what is no name of these. Raises NotFound."""
        name, _, variant = asked.strip().partition("/")
        shelved = self.read().get(name)
        if shelved is None:
            return None
        if not variant:
            return shelved.file
        if variant not in shelved.variants:
            raise NotFound(
                "investigation", asked, [name, *(f"{name}/{each}" for each in shelved.variants)]
            )
        return shelved.file.with_name(f"{variant}.toml")

    def unknown(self, asked: str) -> SeerError:
        """The answer to a name that is not there: what there is."""
        shelf = self.read()
        return NotFound(
            "investigation",
            asked,
            shelf.names(),
            f"Give one of these names, or a folder with an {FILE} in it.\n{shelf.told()}",
        )


def _shelved(found: Investigation) -> Shelved:
    grader = found.grader.name if found.grader and found.grader.parent == found.folder else ""
    variants = sorted(
        file.stem for file in found.folder.glob("*.toml") if file.name not in (FILE, grader)
    )
    title = found.title or found.name
    return Shelved(found.name, title, found.task, found.file, tuple(variants))
