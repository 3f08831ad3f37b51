"""Reads tool packs: what techniques there are, what they are for, how they are called.

A pack is a module with a literal `__all__`; its techniques are the functions and classes named
there and defined in it. One of our own packs also says "Use when:" of at least one of them, which
tells it from the modules that only support packs.

Packs are read with `ast` and never imported: no line of a pack runs in this process, and torch is
not needed to list what uses it. What cannot be read safely is refused with a sentence, and all
else is listed.
"""

from __future__ import annotations

import ast
import keyword
import os
import re
import stat
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from .errors import PackError

MODULE_BYTES = 1_000_000  # of one module
FOLDER_MODULES = 200  # in one folder

# What a folder on sys.path must not hide: Python itself and what the kernel and our packs import.
_TAKEN = frozenset(sys.stdlib_module_names) | {
    *("torch", "transformers", "numpy", "tool_packs", "seer_mcp", "peft", "nnsight", "accelerate"),
    *("safetensors", "tokenizers", "huggingface_hub", "sklearn", "scipy", "matplotlib", "tqdm"),
    *("IPython", "ipykernel", "ipywidgets", "jupyter_client", "traitlets", "zmq", "pip"),
}
_IMPORTABLE = (".py", ".pyc", ".so", ".pyd")

SECTIONS = {
    "Args": "args",
    "Returns": "returns",
    "Raises": "raises",
    "Use when": "use_when",
    "Not when": "not_when",
    "Cost": "cost",
    "Controls": "controls",
    "Paper": "paper",
    "Example": "example",
}
_HEADING = re.compile(rf"({'|'.join(SECTIONS)}):[ \t]*(.*)")


def would_hide(name: str) -> bool:
    """Whether a module of this name would hide one that the kernel or our packs import."""
    return name in _TAKEN


def importable(name: str) -> bool:
    """Whether a module can be called so without hiding another."""
    plain = name.isascii() and name.isidentifier() and not name.startswith("_")
    return plain and not keyword.iskeyword(name) and not would_hide(name)


@dataclass(frozen=True)
class Technique:
    """A public function or class of a pack. A section that its docstring lacks is ""."""

    pack: str
    name: str
    signature: str  # "capture(m, text, layers='all') -> Result"
    summary: str
    import_line: str  # "from tool_packs.activations import capture"
    description: str = ""  # what its docstring says outside of all sections
    args: str = ""
    returns: str = ""
    raises: str = ""
    use_when: str = ""
    not_when: str = ""
    cost: str = ""
    controls: str = ""
    paper: str = ""
    example: str = ""

    @property
    def full_name(self) -> str:
        return f"{self.pack}.{self.name}"

    @property
    def cell(self) -> str:
        """The example as a cell that runs where `m` is loaded and nothing else is there."""
        needs_torch = re.search(r"\btorch\.", self.example) and "import torch" not in self.example
        return f"import torch\n{self.example}" if needs_torch else self.example


@dataclass(frozen=True)
class Pack:
    name: str
    summary: str
    description: str
    techniques: tuple[Technique, ...]  # in the order of __all__
    folder: Path
    builtin: bool

    @property
    def provenance(self) -> str:
        """Who speaks in this pack's texts; "" for our own."""
        return "" if self.builtin else origin(str(self.folder))


@dataclass(frozen=True)
class Listing:
    packs: tuple[Pack, ...]
    problems: tuple[str, ...]  # a sentence for each thing that was refused

    def importable(self) -> dict[str, Path]:
        """Import name -> file or folder: what a kernel must be given of these packs."""
        found: dict[str, Path] = {}
        for pack in self.packs:
            if _package(pack.folder):
                found[pack.folder.name] = pack.folder
                continue
            module = pack.folder / f"{pack.name}.py"
            found[pack.name] = module if module.is_file() else pack.folder / pack.name
            found.update({private.stem: private for private in pack.folder.glob("_*.py")})
        return found

    def techniques(self) -> Iterator[tuple[Pack, Technique]]:
        for pack in self.packs:
            for technique in pack.techniques:
                yield pack, technique


def read_packs(folders: Sequence[Path]) -> Listing:
    """Read the packs of `folders` once. See Packs."""
    return Packs(folders).read()


class Packs:
    """The packs of some folders: the first is the built-in `tool_packs`, the others are users'.

    A folder with an `__init__.py` is a package, imported by its own name; in any other one each
    module (`NAME.py` or `NAME/__init__.py`) is imported by its own.
    """

    def __init__(
        self, folders: Sequence[Path], installed: Callable[[], Sequence[Path]] = tuple
    ) -> None:
        """`installed` gives the folders of packs that other packages bring, when it is first asked."""
        self._folders = [folder.absolute() for folder in folders]
        self._installed = installed
        # For each module file: what it was when it was read, and what came of it.
        self._read: dict[Path, tuple[tuple[int, ...], Pack | str | None]] = {}

    def with_folders(self, more: Sequence[Path]) -> Packs:
        """These, and those of further folders."""
        if not more:
            return self
        both = Packs([*self._folders, *more], self._installed)
        both._read = self._read  # what was parsed is parsed for both
        return both

    def read(self) -> Listing:
        """All packs as they are now; a module that has not changed costs a stat.

        Raises nothing for a bad folder or module: those are in the listing's problems.
        """
        found: dict[str, Pack] = {}
        problems: list[str] = []
        seen: set[Path] = set()
        for index, folder in enumerate([*self._folders, *self._installed()]):
            try:
                real = folder.resolve()
                package = _package(folder)
                if real in seen:
                    continue
                seen.add(real)
                if package and index > 0:
                    _check_name(package, top_level=True)
                modules = _modules(folder, real, index > 0 and not package, problems)
            except (PackError, OSError, RuntimeError) as error:
                problems.append(
                    f"The pack folder {visible(str(folder))} is not listed: {_why(error)} "
                    "Give a folder that exists, can be read and has a name of its own."
                )
                continue
            for name, file in modules:
                try:
                    pack = self._module(file, name, folder, package, builtin=index == 0)
                    if pack and name in found:
                        taken = visible(str(found[name].folder))
                        raise PackError(
                            f"the name {name} is taken by a pack in {taken}; rename the file."
                        )
                except (PackError, OSError) as error:
                    problems.append(f"{visible(str(file))} is not listed: {_why(error)}")
                    continue
                if pack:
                    found[name] = pack
        return Listing(tuple(found.values()), tuple(problems))

    def _module(
        self, file: Path, name: str, folder: Path, package: str, builtin: bool
    ) -> Pack | None:
        status = file.stat()
        state = (status.st_mtime_ns, status.st_size, status.st_ino)
        known = self._read.get(file)
        if known is None or known[0] != state:
            outcome: Pack | str | None
            try:
                outcome = _pack(_parse(_source(file)), name, folder, package, builtin)
            except PackError as error:
                outcome = str(error)
            known = self._read[file] = (state, outcome)
        if isinstance(known[1], str):
            raise PackError(known[1])
        return known[1]


# Finding and reading files


def _package(folder: Path) -> str:
    """The name under which `folder` is imported itself; "" where its modules are on their own."""
    return folder.name if (folder / "__init__.py").is_file() else ""


def _check_name(name: str, top_level: bool) -> None:
    if top_level and would_hide(name):
        raise PackError(f"it would hide the installed module {name}; rename it.")
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise PackError("its name cannot be imported; use letters a-z, digits and underscores.")


def _modules(
    folder: Path, real: Path, top_level: bool, problems: list[str]
) -> list[tuple[str, Path]]:
    """(name, file) of each module in `folder` that may be read; a sentence for each other one.

    `top_level`: they are imported by their own names and so could hide other modules.
    """
    with os.scandir(folder) as scan:
        entries = sorted(entry.name for entry in islice(scan, 50 * FOLDER_MODULES))
    modules: list[tuple[str, Path]] = []
    for entry in entries:
        path = file = folder / entry
        name = entry.split(".")[0]
        try:
            if path.is_dir():
                name, file = entry, path / "__init__.py"
                if not file.is_file():
                    continue
            elif not entry.endswith(_IMPORTABLE):
                continue
            private = name.startswith("_") or file.suffix != ".py"
            if not private or name in _TAKEN:
                _check_name(name, top_level)
            if private:
                continue
            if not file.resolve().is_relative_to(real):
                raise PackError("it leads out of the pack folder; put a copy in its place.")
        except (PackError, OSError, RuntimeError) as error:  # RuntimeError: links in a circle
            problems.append(f"{visible(str(path))} is not listed: {_why(error)}")
            continue
        modules.append((name, file))
    if len(modules) > FOLDER_MODULES:
        problems.append(
            f"The pack folder {visible(str(folder))} holds more than {FOLDER_MODULES} modules; "
            f"only the first {FOLDER_MODULES} are listed. Split it into several folders."
        )
    return modules[:FOLDER_MODULES]


def _why(error: Exception) -> str:
    return str(error) if isinstance(error, PackError) else f"{getattr(error, 'strerror', error)}."


def _source(file: Path) -> str:
    # NONBLOCK: a pipe named like a module must not stop us. resolve: links were checked above.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    with os.fdopen(os.open(file.resolve(), flags), "rb") as module:
        if not stat.S_ISREG(os.fstat(module.fileno()).st_mode):
            raise PackError("it is not a regular file; put a plain Python file in its place.")
        content = module.read(MODULE_BYTES + 1)
    if len(content) > MODULE_BYTES:
        raise PackError(
            f"it is larger than {MODULE_BYTES:,} bytes; keep data in files of their own."
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PackError(f"it is not UTF-8 (byte {error.start}); save it as UTF-8.") from error


def _parse(source: str) -> ast.Module:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "\d" in a docstring
            return ast.parse(source)
    except SyntaxError as error:
        where = f" in line {error.lineno}" if error.lineno else ""
        raise PackError(f"{visible(error.msg)}{where}; mend the syntax.") from error
    except (ValueError, RecursionError, MemoryError) as error:
        raise PackError(
            f"Python cannot parse it ({type(error).__name__}); use simpler expressions."
        ) from error


# From a module's tree to a Pack

_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _pack(tree: ast.Module, name: str, folder: Path, package: str, builtin: bool) -> Pack | None:
    """The pack in `tree`; None for a module that only supports others."""
    names = _public_names(tree)
    if not names:
        return None
    defined = {node.name: node for node in tree.body if isinstance(node, _Definition)}
    summary, description = _docstring(tree)
    module = f"{package}.{name}" if package else name
    techniques = tuple(
        _technique(defined[public], name, module) for public in names if public in defined
    )
    if not techniques:
        raise PackError("it defines nothing that its __all__ names; define the techniques in it.")
    if builtin and not any(technique.use_when for technique in techniques):
        return None  # our own support modules have an __all__ too, users need not write "Use when"
    return Pack(name, summary, description, techniques, folder, builtin)


def _public_names(tree: ast.Module) -> list[str]:
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.Assign):
            targets = node.targets
        elif isinstance(node, ast.AnnAssign | ast.AugAssign):
            targets = [node.target]
        else:
            continue
        if not any(isinstance(target, ast.Name) and target.id == "__all__" for target in targets):
            continue
        values = node.value.elts if isinstance(node.value, ast.List | ast.Tuple) else None
        texts = [v.value for v in values or () if isinstance(v, ast.Constant)]
        names = [text for text in texts if isinstance(text, str)]
        if isinstance(node, ast.AugAssign) or values is None or len(names) != len(values):
            raise PackError(
                f'__all__ in line {node.lineno} is computed; write it out: __all__ = ["name", …].'
            )
    return list(dict.fromkeys(names))


def _technique(node: _Definition, pack: str, module: str) -> Technique:
    summary, body = _docstring(node)
    try:
        signature = visible(_signature(node))
    except RecursionError as error:
        raise PackError(
            f"the signature of {visible(node.name)} is nested too deeply; simplify it."
        ) from error
    name = visible(node.name)
    line = f"from {module} import {name}"
    return Technique(pack, name, signature, summary, line, **_sections(body))


def _signature(node: _Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return f"{node.name}({_constructor(node)})"
    before = "async " if isinstance(node, ast.AsyncFunctionDef) else ""
    after = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"{before}{node.name}({ast.unparse(node.args)}){after}"


def _constructor(node: ast.ClassDef) -> str:
    """What a class is called with: its __init__ without self, or its fields if a dataclass."""
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and member.name == "__init__":
            args = member.args
            (args.posonlyargs or args.args)[:1] = []
            return ast.unparse(args)
    marks = " ".join(ast.unparse(mark) for mark in (*node.decorator_list, *node.bases))
    if "dataclass" not in marks and "NamedTuple" not in marks:
        return ""
    fields = (member for member in node.body if isinstance(member, ast.AnnAssign))
    return ", ".join(ast.unparse(field) for field in fields)


def _docstring(node: ast.Module | _Definition) -> tuple[str, str]:
    """Its first line, and the rest."""
    summary, _, body = visible(ast.get_docstring(node) or "").partition("\n")
    return summary.strip(), body.strip("\n")


def _sections(body: str) -> dict[str, str]:
    """The text under each heading; "description" is all that stands outside."""
    lines: dict[str, list[str]] = {key: [] for key in ("description", *SECTIONS.values())}
    section = "description"
    for line in body.split("\n"):
        heading = _HEADING.fullmatch(line)
        if heading:
            section = SECTIONS[heading[1]]
            lines[section].append(heading[2])
            continue
        if line[:1].strip():  # not indented: the section is over
            section = "description"
        lines[section].append(line)
    return {key: _dedent(found) for key, found in lines.items()}


def _dedent(lines: list[str]) -> str:
    """Without the margin of the indented lines; text beside the heading has none."""
    margins = [len(line) - len(line.lstrip()) for line in lines if line[:1] == " " and line.strip()]
    margin = min(margins, default=0)
    return "\n".join(line[margin:] if line[:1] == " " else line for line in lines).strip("\n ")


# What a reader would not see: controls, bidi and zero-width marks, blank letters, and variation
# selectors, which can carry any message.
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
_BLANK = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\U000e0100-\U000e01ef]"
)


def origin(folder: str) -> str:
    return f"from the pack folder {visible(folder)}"


def visible(text: str) -> str:
    """`text` with every character that a reader would not see written as an escape."""
    return re.sub(r"[^\n\t -~]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if unicodedata.category(character) not in _HIDDEN and not _BLANK.match(character):
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
