"""An investigation is a folder: investigation.toml, task.md, and what they name.

What the file names is looked up in its folder and may not lead out of it, by no symbolic link either.
"""

from __future__ import annotations

import os
import re
import stat
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from ..errors import InterfaceRefused, InvestigationRefused, NotFound, PathRefused, nearest, show
from ..files import NAME, RESERVED, resolve_inside
from ..interface import Interface, read_interface, told
from ..packs import Packs, importable
from .skills import Skill, SkillProblem, read_skill
from .spec import ModelSpec, Repo, SandboxSettings, SandboxSpec, Strict

FILE = "investigation.toml"
TASK = "task.md"
SCRIPT = "run.py"
SKILLS = "skills"  # the folder of the sandbox
TEXT_BYTES = 1_000_000
ENTRIES = 50_000  # of one folder that is put into a sandbox
BUILTIN_PACKS = Path(__file__).parent.parent.parent / "tool_packs"
_BUILTIN = Packs([BUILTIN_PACKS])
# What a plain number in the file counts.
_UNITS = {"memory": "GiB", "idle_limit": "min", "lifetime": "min"}
_CELL = re.compile(r"^# ?%%.*$", re.MULTILINE)
_LARGEST = {"memory": 16_384.0, "idle_limit": 43_200.0, "lifetime": 43_200.0}


class InvestigationFile(Strict):
    """What investigation.toml can say."""

    name: str = ""
    """What sandboxes and notebooks are called; by default as the folder."""
    title: str = ""
    """One line for people."""
    task: str = TASK
    """The file with the task's text."""
    packs: tuple[str, ...] = ()
    """Packs that may be used: names of built-in ones, and folders of the investigation's own. By default all
    built-in ones."""
    setup: str = ""
    """A Python file whose cells (parted by lines that begin with `# %%`) begin the notebook, after the models,
    and are run at the start."""
    skills: tuple[str, ...] = ()
    """Folders with a SKILL.md: put into the sandbox under skills/, and told by list_techniques."""
    grader: str = ""
    """A Python file, or a TOML file with a fact, a rubric or a judge's instructions, that scores what
    submit_findings is given. No sandbox gets it."""
    interface: str = ""
    """A Python file with exposed functions: this configuration is the inside of a scoped sandbox
    (seer-mcp --scope)."""
    scoped: dict[str, str] = Field(default_factory=dict[str, str])
    """Functions of other sandboxes for the notebook: import name = an interface file, or a configuration that
    names one."""
    sandbox: SandboxSettings = Field(default_factory=SandboxSettings)
    """The machine: [sandbox]."""
    models: tuple[ModelSpec, ...] = ()
    """Models that are there when the kernel starts: [[models]]."""


@dataclass(frozen=True)
class Investigation:
    """What was read, with every path resolved."""

    name: str
    title: str
    folder: Path
    sandbox: SandboxSpec
    """With its models. Values of `files` are absolute paths."""
    packs: tuple[str, ...]
    """Names of built-in packs, or none for all."""
    pack_folders: tuple[Path, ...]
    task: str
    """The task's text; "" if there is no task.md."""
    grader: Path | None
    file: Path
    """The file that was read."""
    setup: tuple[str, ...] = ()
    """The first cells of its notebook, after those that load the models."""
    skills: tuple[Skill, ...] = ()
    interface: Interface | None = None
    """The functions that are all that a client gets of it."""
    scoped: dict[str, Investigation] = field(default_factory=dict[str, "Investigation"])
    """What its notebook can import of other sandboxes, by name."""

    @property
    def asked(self) -> str:
        """What it is started by: NAME, or NAME/VARIANT."""
        return self.name if self.file.name == FILE else f"{self.name}/{self.file.stem}"

    @property
    def models(self) -> tuple[ModelSpec, ...]:
        return self.sandbox.models


def read_investigation(path: Path) -> Investigation:
    """Read a folder, or its investigation.toml. Raises NotFound or InvestigationRefused."""
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise NotFound("investigation", str(path), then=f"Give a folder with an {FILE} in it.")
    parsed = _parsed(file)
    return _Resolver(file, parsed).investigation()


def read_scope(path: Path) -> Investigation:
    """What a scoped sandbox is made of: an interface file, or a configuration that names one.

    The machine of NAME.py is that of NAME.toml beside it, or a local one without models. Raises
    NotFound, InterfaceRefused or InvestigationRefused.
    """
    if path.suffix == ".py" and not path.with_suffix(".toml").is_file():
        interface = read_interface(path)
        name = re.sub(r"[^a-z0-9_-]+", "-", path.stem.lower()).strip("-_")[:40] or "scope"
        return Investigation(
            name,
            "",
            path.parent.resolve(),
            SandboxSpec(),
            (),
            (),
            interface.description,
            None,
            path.resolve(),
            interface=interface,
        )
    file = path.with_suffix(".toml") if path.suffix == ".py" else path
    found = read_investigation(file)
    if found.interface is None:
        raise InvestigationRefused(
            str(found.file), ['it names no interface; write interface = "FILE.py" above [sandbox]']
        )
    if path.suffix == ".py" and found.interface.path != path.resolve():
        raise InvestigationRefused(
            str(found.file), [f"its interface is {found.interface.path.name}, not {path.name}"]
        )
    return found


def _parsed(file: Path) -> InvestigationFile:
    text = _text(file, "")
    if isinstance(text, _Problem):
        raise InvestigationRefused(str(file), [text.says])
    try:
        given = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvestigationRefused(str(file), [f"it is no TOML: {error}"]) from error
    except RecursionError as error:
        raise InvestigationRefused(str(file), ["it is nested too deep"]) from error
    problems = _plain_numbers(given)
    try:
        parsed = InvestigationFile.model_validate(given)
    except ValidationError as error:
        raise InvestigationRefused(str(file), [*problems, *_sentences(error)]) from None
    if problems:
        raise InvestigationRefused(str(file), problems)
    return parsed


@dataclass(frozen=True)
class _Problem:
    says: str


def _text(file: Path, key: str) -> str | _Problem:
    """A small text file."""
    before = f"{key}: " if key else ""
    try:
        if file.stat().st_size > TEXT_BYTES:
            return _Problem(f"{before}{file.name} has more than {TEXT_BYTES:,} bytes")
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        return _Problem(f"{before}{file.name} cannot be read ({error.strerror})")
    except UnicodeDecodeError:
        return _Problem(f"{before}{file.name} is not UTF-8")


def _plain_numbers(given: dict[str, Any]) -> list[str]:
    """Give plain numbers of [sandbox] their unit; what is too large to be meant so."""
    sandbox = given.get("sandbox")
    if not isinstance(sandbox, dict):
        return []
    problems: list[str] = []
    for key, unit in _UNITS.items():
        value = sandbox.get(key)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if value > _LARGEST[key]:
            problems.append(
                f"sandbox.{key} = {value}: a plain number counts {unit}; write the unit that you mean, "
                f'as in "{value} {"MiB" if unit == "GiB" else "s"}"'
            )
            del sandbox[key]
        else:
            sandbox[key] = f"{value} {unit}" if value > 0 else value
    return problems


# -- sentences --------------------------------------------------------------------------------

_MODELS: dict[tuple[str, ...], type[BaseModel]] = {
    (): InvestigationFile,
    ("sandbox",): SandboxSettings,
    ("sandbox", "repos"): Repo,
    ("models",): ModelSpec,
}


def _sentences(error: ValidationError) -> list[str]:
    """What is wrong, by key, with the value and what is allowed."""
    told: list[str] = []
    for problem in error.errors():
        parts = tuple(problem["loc"])
        if problem["type"] == "extra_forbidden":
            told.append(_unknown_key(parts))
        elif problem["type"] == "missing":
            told.append(f"{_key(parts[:-1])} needs {parts[-1]}")
        else:
            context = problem.get("ctx", {})
            why = str(context["error"]) if "error" in context else problem["msg"]
            private = (
                "env" in parts or "URL must not" in why or parts == ("models",)
            )  # it may hold a key, or the name of a hidden model
            value = "" if private or not parts else f" = {show(problem['input'])}"
            told.append(f"{_key(parts)}{value}: {why[0].lower()}{why[1:]}")
    return told


def _key(parts: tuple[Any, ...]) -> str:
    """sandbox.repos[0].url"""
    text = ""
    for part in parts:
        if isinstance(part, int):
            text += f"[{part}]"
        elif part != "[key]":
            text += f".{part}" if text else str(part)
    return text or "the file"


def _unknown_key(parts: tuple[Any, ...]) -> str:
    *above, key = parts
    path = tuple(part for part in above if isinstance(part, str))
    known = list(_MODELS[path].model_fields)
    where = f"[{_key(tuple(above))}]" if above else "the file"
    if not above and key in SandboxSettings.model_fields:
        return f"{key} belongs into [sandbox]"
    if path == ("sandbox",) and key in InvestigationFile.model_fields:
        return f"{key} stands outside of [sandbox]" + (": [[models]]" if key == "models" else "")
    return (
        f"{where} has no key {show(str(key))}.{nearest(str(key), known)} Known: {', '.join(known)}"
    )


# -- paths ------------------------------------------------------------------------------------


class _Resolver:
    """Looks up what a file names, and gathers what is wrong with it."""

    def __init__(self, file: Path, parsed: InvestigationFile) -> None:
        self._file = file
        self._parsed = parsed
        self._folder = file.parent.resolve()
        self._problems: list[str] = []

    def investigation(self) -> Investigation:
        parsed = self._parsed
        name = self._name()
        grader = self._grader()
        scoped = self._scoped()
        inside = [
            path for s in scoped.values() if s.interface for path in (s.file, s.interface.path)
        ]
        kept_back = {
            file: why
            for file, why in (
                (grader, "the grader"),
                (self._file.resolve(), "the investigation itself"),
                *((other, "a configuration") for other in self._folder.glob("*.toml")),
                (self._folder / SCRIPT, "the scripted investigator, which knows the answer"),
                (self._folder / ".env", "values of secrets"),
                *((path, "the inside of a scoped sandbox") for path in inside),
            )
            if file is not None
        }
        files = {
            target: str(found)
            for target, value in parsed.sandbox.files.items()
            if (found := self._to_put(f"sandbox.files.{target}", value, kept_back))
        }
        packs, folders = self._packs()
        skills = self._skills(kept_back)
        files |= {f"{SKILLS}/{skill.name}": str(skill.folder) for skill in skills}
        setup = self._setup()
        models = tuple(self._model(i, model) for i, model in enumerate(parsed.models))
        spec: SandboxSpec | None = None
        try:
            settings = {key: getattr(parsed.sandbox, key) for key in SandboxSettings.model_fields}
            if any(
                model.hidden for model in models
            ):  # where there is a network it can be looked up
                settings["network"] = settings["network"] if self._says("network") else False
            spec = SandboxSpec.model_validate({**settings, "files": files, "models": models})
        except ValidationError as error:
            self._problems += _sentences(error)
        interface = self._interface()
        task = self._task() if interface is None else interface.description
        task += "".join(
            f"\n\n{told(name, s.interface)}" for name, s in scoped.items() if s.interface
        )
        if self._problems or spec is None:
            raise InvestigationRefused(str(self._file), self._problems)
        return Investigation(
            name,
            parsed.title,
            self._folder,
            spec,
            packs,
            folders,
            task,
            grader,
            self._file.resolve(),
            setup,
            skills,
            interface,
            scoped,
        )

    def _says(self, key: str) -> bool:
        return key in self._parsed.sandbox.model_fields_set

    def _name(self) -> str:
        if given := self._parsed.name:
            if not NAME.fullmatch(given) or given in RESERVED:
                self._problems.append(
                    f"name = {show(given)}: 1 to 40 of a-z, 0-9, '-' and '_'; first and last a letter or digit"
                )
            return given
        return (
            re.sub(r"[^a-z0-9_-]+", "-", self._folder.name.lower()).strip("-_")[:40]
            or "investigation"
        )

    def _inside(self, key: str, value: str) -> Path | None:
        """The existing file or folder that a value names."""
        try:
            found = resolve_inside(key, value, self._folder, [self._folder])
        except PathRefused:
            self._problems.append(
                f"{key} = {show(value)}: name something in the investigation's folder; links may not lead out of it"
            )
            return None
        if not found.exists():
            self._problems.append(f"{key} = {show(value)}: there is no such file in {self._folder}")
            return None
        return found

    def _grader(self) -> Path | None:
        if not self._parsed.grader:
            return None
        found = self._inside("grader", self._parsed.grader)
        if found is not None and (found.suffix not in (".py", ".toml") or not found.is_file()):
            self._problems.append(
                f"grader = {show(self._parsed.grader)}: it must be a Python file or a TOML file"
            )
        return found

    def _setup(self) -> tuple[str, ...]:
        if not self._parsed.setup or (found := self._inside("setup", self._parsed.setup)) is None:
            return ()
        text = _text(found, "setup")
        if isinstance(text, _Problem):
            self._problems.append(text.says)
            return ()
        cells = (cell.strip() for cell in _CELL.split(text))
        return tuple(cell for cell in cells if cell)

    def _scoped(self) -> dict[str, Investigation]:
        found: dict[str, Investigation] = {}
        for name, value in self._parsed.scoped.items():
            key = f"scoped.{name}"
            path = self._inside(key, value)
            if not importable(name):
                self._problems.append(
                    f"{key}: {show(name)} cannot be imported; choose another name"
                )
            elif f"{name}.py" in self._parsed.sandbox.files:
                self._problems.append(f"{key}: sandbox.files has a {name}.py; choose another name")
            elif path is None:
                continue
            elif path == self._file.resolve() or (
                path.suffix == ".toml" and path.is_file() and _parsed(path).scoped
            ):
                self._problems.append(
                    f"{key} = {show(value)}: it names scoped sandboxes of its own"
                )
            else:
                try:
                    found[name] = read_scope(path)
                except (InvestigationRefused, NotFound) as error:
                    self._problems.append(f"{key} = {show(value)}: {error}")
        return found

    def _interface(self) -> Interface | None:
        if not (given := self._parsed.interface) or not (found := self._inside("interface", given)):
            return None
        try:
            return read_interface(found)
        except InterfaceRefused as error:
            self._problems += [f"{found.name}: {problem}" for problem in error.problems]
            return None

    def _skills(self, kept_back: dict[Path, str]) -> tuple[Skill, ...]:
        skills: dict[str, Skill] = {}
        for at, value in enumerate(self._parsed.skills):
            found = self._to_put(f"skills[{at}]", value, kept_back)
            if found is None:
                continue
            try:
                skill = read_skill(found)
                if skill.name in skills:
                    raise SkillProblem(f"the name {skill.name} is taken by another skill")
            except SkillProblem as problem:
                self._problems.append(f"skills[{at}] = {show(value)}: {problem}")
            else:
                skills[skill.name] = skill
        return tuple(skills.values())

    def _task(self) -> str:
        named = "task" in self._parsed.model_fields_set
        if not named and not os.path.lexists(self._folder / TASK):
            return ""
        found = self._inside("task", self._parsed.task)
        if found is None:
            return ""
        text = _text(found, "task")
        if isinstance(text, _Problem):
            self._problems.append(text.says)
            return ""
        return text

    def _packs(self) -> tuple[tuple[str, ...], tuple[Path, ...]]:
        names: list[str] = []
        folders: list[Path] = []
        known = {pack.name for pack in _BUILTIN.read().packs} if self._parsed.packs else set[str]()
        for at, value in enumerate(self._parsed.packs):
            if value in known:
                names.append(value)
            elif "/" not in value and not (self._folder / value).is_dir():
                self._problems.append(
                    f"packs[{at}] = {show(value)}: neither a built-in pack nor a folder here.{nearest(value, known)} "
                    f"Built in: {', '.join(sorted(known))}"
                )
            elif found := self._inside(f"packs[{at}]", value):
                if found.is_dir():
                    folders.append(found)
                else:
                    self._problems.append(
                        f"packs[{at}] = {show(value)}: name the folder of the pack"
                    )
        return tuple(names), tuple(folders)

    def _model(self, at: int, model: ModelSpec) -> ModelSpec:
        """Folders that begin with ./ are the investigation's."""
        changes: dict[str, str] = {}
        for key in ("name", "adapter", "base"):
            value: str = getattr(model, key)
            if not value.startswith(("./", "../")):
                continue
            before = len(self._problems)
            if found := self._inside(f"models[{at}].{key}", value):
                changes[key] = str(found)
            elif model.hidden:  # the client reads it
                self._problems[before:] = [
                    f"models[{at}].{key}: there is no such folder in that of the investigation (its name is hidden)"
                ]
        return model.model_copy(update=changes)

    def _to_put(self, key: str, value: str, kept_back: dict[Path, str]) -> Path | None:
        """What may go into a sandbox: a file or folder in which nothing leads out of the investigation."""
        found = self._inside(key, value)
        if found is None:
            return None
        for file, why in kept_back.items():
            if file.exists() and file.resolve().is_relative_to(found):
                self._problems.append(
                    f"{key} = {show(value)}: it would put {file.name} into the sandbox ({why}); name what is needed"
                )
                return None
        for count, entry in enumerate(_entries(found)):
            real = Path(os.path.realpath(entry))
            if count >= ENTRIES:
                wrong = f"has more than {ENTRIES:,} files; make it an archive"
            elif not real.is_relative_to(self._folder) or real in kept_back:
                wrong = f"holds a link that leads out: {entry.relative_to(self._folder)}"
            elif entry.is_symlink() and not real.exists():
                wrong = f"holds a link that leads nowhere: {entry.relative_to(self._folder)}"
            elif not (stat.S_ISREG(mode := real.stat().st_mode) or stat.S_ISDIR(mode)):
                wrong = f"holds what is no file: {entry.relative_to(self._folder)}"
            else:
                continue
            self._problems.append(f"{key} = {show(value)}: it {wrong}")
            return None
        return found


def _entries(path: Path) -> Iterator[Path]:
    """The path itself, and all that lies in it if it is a folder; links are not followed."""
    yield path
    if path.is_dir():
        for folder, folders, names in os.walk(path):
            yield from (Path(folder) / name for name in folders + names)
