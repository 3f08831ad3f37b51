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
import difflib
import keyword
import math
import os
import re
import stat
import sys
import unicodedata
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from seer_mcp.errors import BadInput, NotFound, PackError

MODULE_BYTES = 1_000_000  # of one module
FOLDER_MODULES = 200  # in one folder
OVERVIEW_BYTES = 4_000
DETAIL_CHARACTERS = 16_000

# What a folder on sys.path must not hide: Python itself and what the kernel and our packs import.
_TAKEN = frozenset(sys.stdlib_module_names) | {
    *("torch", "transformers", "numpy", "tool_packs", "seer_mcp", "peft", "nnsight", "accelerate"),
    *("safetensors", "tokenizers", "huggingface_hub", "sklearn", "scipy", "matplotlib", "tqdm"),
    *("IPython", "ipykernel", "ipywidgets", "jupyter_client", "traitlets", "zmq", "pip"),
}
_IMPORTABLE = (".py", ".pyc", ".so", ".pyd")

_SECTIONS = {
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
_HEADING = re.compile(rf"({'|'.join(_SECTIONS)}):[ \t]*(.*)")


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
        return "" if self.builtin else _origin(str(self.folder))


@dataclass(frozen=True)
class Listing:
    packs: tuple[Pack, ...]
    problems: tuple[str, ...]  # a sentence for each thing that was refused

    def techniques(self) -> Iterator[tuple[Pack, Technique]]:
        for pack in self.packs:
            for technique in pack.techniques:
                yield pack, technique


def read_packs(folders: Sequence[Path]) -> Listing:
    """Read the packs of `folders` once. See Packs."""
    return Packs(folders).read()


def import_root(folder: Path) -> Path:
    """The folder to append to sys.path so that the import lines of `folder`'s packs work.

    Append, never put first: then nothing in it can hide what is installed.
    """
    return folder.parent if _package(folder) else folder


class Packs:
    """The packs of some folders: the first is the built-in `tool_packs`, the others are users'.

    A folder with an `__init__.py` is a package, imported by its own name; in any other one each
    module (`NAME.py` or `NAME/__init__.py`) is imported by its own.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = [folder.absolute() for folder in folders]
        # For each module file: what it was when it was read, and what came of it.
        self._read: dict[Path, tuple[tuple[int, ...], Pack | str | None]] = {}

    def read(self) -> Listing:
        """All packs as they are now; a module that has not changed costs a stat.

        Raises nothing for a bad folder or module: those are in the listing's problems.
        """
        found: dict[str, Pack] = {}
        problems: list[str] = []
        seen: set[Path] = set()
        for index, folder in enumerate(self._folders):
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
                    f"The pack folder {_visible(str(folder))} is not listed: {_why(error)} "
                    "Give a folder that exists, can be read and has a name of its own."
                )
                continue
            for name, file in modules:
                try:
                    pack = self._module(file, name, folder, package, builtin=index == 0)
                    if pack and name in found:
                        taken = _visible(str(found[name].folder))
                        raise PackError(
                            f"the name {name} is taken by a pack in {taken}; rename the file."
                        )
                except (PackError, OSError) as error:
                    problems.append(f"{_visible(str(file))} is not listed: {_why(error)}")
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
    if top_level and name in _TAKEN:
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
            problems.append(f"{_visible(str(path))} is not listed: {_why(error)}")
            continue
        modules.append((name, file))
    if len(modules) > FOLDER_MODULES:
        problems.append(
            f"The pack folder {_visible(str(folder))} holds more than {FOLDER_MODULES} modules; "
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
        raise PackError(f"{_visible(error.msg)}{where}; mend the syntax.") from error
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
        signature = _visible(_signature(node))
    except RecursionError as error:
        raise PackError(
            f"the signature of {_visible(node.name)} is nested too deeply; simplify it."
        ) from error
    name = _visible(node.name)
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
    summary, _, body = _visible(ast.get_docstring(node) or "").partition("\n")
    return summary.strip(), body.strip("\n")


def _sections(body: str) -> dict[str, str]:
    """The text under each heading; "description" is all that stands outside."""
    lines: dict[str, list[str]] = {key: [] for key in ("description", *_SECTIONS.values())}
    section = "description"
    for line in body.split("\n"):
        heading = _HEADING.fullmatch(line)
        if heading:
            section = _SECTIONS[heading[1]]
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


def _origin(folder: str) -> str:
    return f"from the pack folder {_visible(folder)}"


def _visible(text: str) -> str:
    """`text` with every character that a reader would not see written as an escape."""
    return re.sub(r"[^\n\t -~]", _escaped, text)


def _escaped(found: re.Match[str]) -> str:
    character = found[0]
    if unicodedata.category(character) not in _HIDDEN and not _BLANK.match(character):
        return character
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


# What a reader gets


def overview(listing: Listing) -> str:
    """A line for each pack and each technique, in less than 4 kB however many there are."""
    problems = [f"! {_shorten(problem, 200)}" for problem in listing.problems[:3]]
    if len(listing.problems) > 3:
        problems.append(f"! {len(listing.problems) - 3} more files or folders are not listed")
    for width in (100, 80, 60, 50, 40, 30, 20, 12, 0):
        lines: list[str] = []
        for pack in listing.packs:
            origin = "" if pack.builtin else f" [{_shorten(_origin(pack.folder.name), 60)}]"
            lines.append(_line(f"{pack.name}{origin}", pack.summary, width))
            lines += (f"  {_line(t.name, t.summary, width)}" for t in pack.techniques)
        text = "\n".join([*lines, *problems])
        if len(text.encode()) < OVERVIEW_BYTES:
            return text or "There are no packs."
    # Not even the names fit: the packs alone, as many as do.
    room = OVERVIEW_BYTES - 100 - sum(len(problem.encode()) + 1 for problem in problems)
    lines = []
    for pack in listing.packs:
        line = f"{_shorten(pack.name, 60)}: {len(pack.techniques)} techniques"
        room -= len(line.encode()) + 1
        if room < 0:
            break
        lines.append(line)
    if len(lines) < len(listing.packs):
        lines.append(f"… and {len(listing.packs) - len(lines)} more packs")
    return "\n".join([*lines, "Name a pack to see its techniques.", *problems])


def _line(name: str, summary: str, width: int) -> str:
    return f"{name}: {_shorten(summary, width)}" if summary and width else name


def _shorten(text: str, width: int) -> str:
    if len(text) <= width:
        return text
    cut = text[: width - 1]
    return f"{cut.rpartition(' ')[0] or cut}…"


def detail(listing: Listing, name: str) -> str:
    """All about the pack, `pack.technique` or technique called `name`.

    Raises NotFound with the nearest names, BadInput when several packs have that technique.
    """
    wanted = name.strip().removeprefix("tool_packs.")
    for pack in listing.packs:
        if pack.name == wanted:
            return _bounded(_pack_detail(pack))
    full = [(p, t) for p, t in listing.techniques() if t.full_name == wanted]
    found = full or [(p, t) for p, t in listing.techniques() if t.name == wanted]
    if len(found) == 1:
        return _bounded(_technique_detail(*found[0]))
    if found:
        several = ", ".join(technique.full_name for _, technique in found)
        raise BadInput("name", name, f"several packs have this technique; name one: {several}.")

    known = {pack.name: pack.name for pack in listing.packs}
    for _, technique in listing.techniques():
        known[technique.full_name] = technique.full_name
        known.setdefault(technique.name, technique.full_name)
    close = difflib.get_close_matches(wanted[:100], list(known), n=6, cutoff=0.5)
    near = dict.fromkeys(known[key] for key in close)
    raise NotFound("pack or technique", name, near or [pack.name for pack in listing.packs])


def _pack_detail(pack: Pack) -> str:
    parts = [f"{pack.name}: {pack.summary}", pack.provenance, pack.description]
    for technique in pack.techniques:
        lines = [technique.signature, f"    {technique.summary}"]
        if technique.use_when:
            lines.append(_indent(f"Use when: {technique.use_when}"))
        parts.append("\n".join(lines))
    if pack.techniques:
        example = next((t for t in pack.techniques if t.use_when), pack.techniques[0])
        parts.append(f"{example.import_line}\nAll about one: {example.full_name}")
    return "\n\n".join(part for part in parts if part)


def _technique_detail(pack: Pack, technique: Technique) -> str:
    parts = [
        f"{technique.full_name}: {technique.summary}",
        pack.provenance,
        f"{technique.import_line}\n{technique.signature}",
        technique.description,
    ]
    for heading, field in _SECTIONS.items():
        text = getattr(technique, field)
        if text:
            parts.append(f"{heading}:\n{_indent(text)}")
    return "\n\n".join(part for part in parts if part)


def _indent(text: str) -> str:
    return "\n".join(f"    {line}" if line else "" for line in text.split("\n"))


def _bounded(text: str) -> str:
    if len(text) <= DETAIL_CHARACTERS:
        return text
    left_out = len(text) - DETAIL_CHARACTERS
    return f"{text[:DETAIL_CHARACTERS]}\n… {left_out:,} characters omitted; the file has them …"


# Search

_STOP_WORDS = """
a an and any are as at be been but by can could did do does for from had has have how i if in into
is it its me model models my no not of on one or should so some something than that the their them
then there these they thing this to use used want was we were what when where whether which who why
will with would you your
"""
_STOP = frozenset(_STOP_WORDS.split())
_ENDINGS = (
    *(("ies", "i"), ("ied", "i"), ("ing", ""), ("ed", ""), ("al", ""), ("es", "")),
    *(("ss", "ss"), ("us", "us"), ("is", "is"), ("as", "as"), ("s", "")),
)


def search(listing: Listing, question: str, limit: int = 8) -> list[Technique]:
    """The techniques whose texts answer to the words of `question`, best first; may be empty.

    BM25 over stemmed words; the name, the summary and "Use when" weigh most.
    """
    techniques = list(listing.techniques())
    texts = [_weighted_words(pack, technique) for pack, technique in techniques]
    mean = sum(words.total() for words in texts) / max(1, len(texts))
    asked = set(_words(question[:2000]))
    scores = [0.0] * len(texts)
    for word in asked:
        having = sum(word in words for words in texts)
        rarity = math.log(1 + (len(texts) - having + 0.5) / (having + 0.5))
        for index, words in enumerate(texts):
            often = words[word]
            if often:
                length = 0.25 + 0.75 * words.total() / mean
                scores[index] += rarity * often * 2.2 / (often + 1.2 * length)
    ranked = sorted((i for i, score in enumerate(scores) if score), key=lambda i: -scores[i])
    return [techniques[i][1] for i in ranked[:limit]]


def answer(listing: Listing, question: str) -> str:
    """What search found, as text; when it found nothing, what to do next."""
    found = search(listing, question)
    if not found:
        names = ", ".join(pack.name for pack in listing.packs) or "none"
        return (
            "No technique speaks of this. Ask again in other words (what you want to know, or what "
            f"you suspect), look at a pack ({_shorten(names, 600)}), or write it in plain PyTorch."
        )
    packs = {pack.name: pack for pack in listing.packs}
    lines: list[str] = []
    for technique in found:
        origin = packs[technique.pack].provenance
        lines.append(f"{technique.full_name}: {_shorten(technique.summary, 200)}")
        lines += (
            f"    {_shorten(' '.join(text.split()), 300)}"
            for text in (origin, technique.signature, technique.use_when)
            if text
        )
    return "\n".join(lines)


def _weighted_words(pack: Pack, technique: Technique) -> Counter[str]:
    words: Counter[str] = Counter()
    for text, weight in (
        (technique.name, 3),
        (technique.summary, 3),
        (technique.use_when, 3),
        (f"{pack.name} {pack.summary}", 1),
        (technique.description, 1),
        (technique.args, 1),
        (technique.returns, 1),
        (technique.controls, 1),
        (technique.example, 1),
    ):
        for word in _words(text):
            words[word] += weight
    return words


def _words(text: str) -> list[str]:
    words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", text).casefold())
    return [_stem(word) for word in words if word not in _STOP]


def _stem(word: str) -> str:
    """Light: deny, denies, denied and denial meet; know and knew do not."""
    for ending, instead in _ENDINGS:
        if word.endswith(ending) and len(word) - len(ending) >= 3 - len(instead):
            word = word.removesuffix(ending) + instead
            break
    if len(word) > 3 and word[-1] == word[-2] and word[-1] in "bdgmnprt":  # stopped, stop
        word = word[:-1]
    if len(word) > 3 and word[-1] in "ey":
        word = word[:-1] + ("i" if word[-1] == "y" else "")
    return word
