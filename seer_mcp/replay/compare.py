"""Whether two runs of a cell came out alike: how they ended, errors, numbers, text, images."""

from __future__ import annotations

import base64
import binascii
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import SequenceMatcher
from typing import Any

from ..notebook import Cell
from ..outputs import Piece
from ..text import collapse, strip_ansi

READ = 2_000_000  # characters of one text that are compared
BY_LETTER = (
    2_000  # characters up to which the likeness of two texts is counted by letters, not lines
)
LINES = 5_000  # of longer ones, that are counted
SHOWN = 5  # differences of one cell that are said
EXCERPT = 120
SIDE = 0.1  # by which share the sides of two images may differ: labels move a border
FLOOR = 1e-3  # of the tolerance: how far numbers near zero may lie apart

# A number that stands for itself; one within a name (gpt2, model_1) is text.
NUMBER = re.compile(
    r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+(?:\.\d*)?|\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
)
# What says how long something took, how fast it was, or where it lay in memory.
TIMES = re.compile(
    r"(?<![\w.,])\d[\d,.]{0,30}(?:[eE][-+]?\d+)?\s?"
    r"(?:ns|µs|us|ms|s|secs?|seconds?|min|minutes?|h|hours?|(?:it|tok|tokens|rows|samples)/s|s/it)(?![\w/])"
    r"|\b\d\d:\d\d(?::\d\d)?\b|\b0x[0-9a-fA-F]{6,}\b"
)


@dataclass(frozen=True)
class Bounds:
    """How far apart what counts as alike may lie."""

    tolerance: float = 1e-3
    """Of numbers with a decimal point or exponent, relative; whole numbers must be the same."""
    similarity: float = 1.0
    """Of texts that differ in more than numbers, from 0 to 1 (difflib's ratio)."""


@dataclass(frozen=True)
class Difference:
    what: str
    """"state", "error", "numbers", "text" or "images"."""
    says: str
    before: str = ""
    after: str = ""


@dataclass
class Compared:
    differences: list[Difference] = field(default_factory=list[Difference])
    notes: list[str] = field(default_factory=list[str])
    """What was the same, or alike within the bounds."""

    @property
    def alike(self) -> bool:
        return not self.differences

    def differs(self, what: str, says: str, before: str = "", after: str = "") -> None:
        self.differences.append(Difference(what, says, clipped(before), clipped(after)))


def compare(before: Cell, after: Cell, bounds: Bounds, was: str, texts: bool = True) -> Compared:
    """The last runs of a cell in two notebooks, of which the first ended as `was`.

    texts=False: only how they ended.
    """
    found = Compared()
    if was != after.state:
        why = f" ({after.seer['why']})" if after.seer.get("why") else ""
        found.differs("state", f"{was} -> {after.state}{why}", was, after.state + why)
    _errors(found, before, after, bounds)
    if not texts:
        return found
    one, other = before.pieces(), after.pieces()
    for kinds in (("stdout",), ("result", "display")):  # stderr has warnings and progress bars
        _texts(found, _text(one, kinds), _text(other, kinds), bounds)
    _images(found, _images_of(one), _images_of(other))
    return found


def _errors(found: Compared, before: Cell, after: Cell, bounds: Bounds) -> None:
    one, other = _error(before), _error(after)
    if one and other and same_text(one, other, bounds).alike:
        found.notes.append(f"the same error: {clipped(one)}")
    elif one != other:
        said = [clipped(text or "no error") for text in (one, other)]
        found.differs("error", f"{said[0]} -> {said[1]}", one, other)


def _error(cell: Cell) -> str:
    outputs: Sequence[dict[str, Any]] = cell.data.get("outputs", ())
    return "; ".join(
        f"{output['ename']}: {output['evalue']}"
        for output in outputs
        if output["output_type"] == "error"
    )


def _text(pieces: Sequence[Piece], kinds: tuple[str, ...]) -> str:
    return "\n".join(_whole(piece) for piece in pieces if piece.kind in kinds)


def _whole(piece: Piece) -> str:
    text = piece.text
    if piece.file is not None:
        with piece.file.open(encoding="utf-8", errors="replace") as file:
            text = file.read(READ) + piece.rest
    return strip_ansi(collapse(text[:READ]))


def _texts(found: Compared, before: str, after: str, bounds: Bounds) -> None:
    if before == after:
        if before:
            found.notes.append("text the same")
        return
    compared = same_text(before, after, bounds)
    found.differences += compared.differences
    found.notes += compared.notes


def same_text(before: str, after: str, bounds: Bounds) -> Compared:
    """Two texts: numbers within the tolerance in lines that say the same, of all other lines their likeness."""
    found = Compared()
    one, other = (TIMES.sub("…", text).splitlines() for text in (before, after))
    if len(one) == len(other):
        same = [_words(a) == _words(b) for a, b in zip(one, other, strict=True)]
    else:
        same = [False] * max(len(one), len(other))
    _numbers(found, [(a, b) for a, b, s in zip(one, other, same, strict=False) if s], bounds)
    one, other = ([a for a, s in zip(of, same, strict=False) if not s] for of in (one, other))
    if one or other:
        _prose(found, "\n".join(one), "\n".join(other), len(same), bounds)
    return found


def _numbers(found: Compared, lines: Sequence[tuple[str, str]], bounds: Bounds) -> None:
    pairs = [
        (a, number, same)
        for a, b in lines
        for number, same in zip(NUMBER.finditer(a), NUMBER.finditer(b), strict=True)
    ]
    apart = [each for each in pairs if not _near(each[1][0], each[2][0], bounds.tolerance)]
    for line, a, b in apart[:SHOWN]:
        said = f"{a[0]} -> {b[0]} in {_around(line, a.start())!r}"
        found.differs("numbers", said, a[0], b[0])
    if len(apart) > SHOWN:
        more = f"and {len(apart) - SHOWN} more; {len(apart)} of {len(pairs)} numbers differ"
        found.differs("numbers", more)
    if pairs and not apart:
        found.notes.append(f"{len(pairs)} numbers within {bounds.tolerance:g}")


def _prose(found: Compared, before: str, after: str, lines: int, bounds: Bounds) -> None:
    """Lines that differ in more than numbers; there are so many lines in all."""
    ratio = likeness(before, after)
    differing = max(len(before.splitlines()), len(after.splitlines()))
    if ratio >= bounds.similarity:
        found.notes.append(f"{differing} lines alike by {ratio:.2f}")
        return
    a, b = _first_difference(before, after)
    of = f"{differing} of {lines} lines" if lines > 1 else "its line"
    found.differs("text", f"{of}, likeness {ratio:.2f}: {clipped(a)!r} -> {clipped(b)!r}", a, b)


def likeness(before: str, after: str) -> float:
    """difflib's ratio: of letters where the texts are short, else of lines."""
    short = max(len(before), len(after)) <= BY_LETTER
    one, other = (
        (before, after) if short else (before.splitlines()[:LINES], after.splitlines()[:LINES])
    )
    return SequenceMatcher(None, one, other, autojunk=not short).ratio()


def _words(text: str) -> list[str]:
    """The text with a mark for each number, spaces not counted: they move with the width of numbers."""
    return NUMBER.sub(" \0 ", text).split()


def _near(one: str, other: str, tolerance: float) -> bool:
    if one == other:
        return True
    plain = [text.replace(",", "") for text in (one, other)]
    if all(re.fullmatch(r"[-+]?\d+", text) for text in plain):
        return plain[0].lstrip("+0") == plain[1].lstrip("+0")
    a, b = map(float, plain)
    return math.isclose(a, b, rel_tol=tolerance, abs_tol=tolerance * FLOOR)


def _around(line: str, at: int) -> str:
    """What stands around a number, and more before it than behind."""
    return line[max(0, at - EXCERPT // 2) : at + EXCERPT // 4].strip()


def _first_difference(before: str, after: str) -> tuple[str, str]:
    one, other = before.splitlines(), after.splitlines()
    for a, b in zip(one, other, strict=False):
        if _words(a) != _words(b):
            return a.strip(), b.strip()
    longer = max(one, other, key=len)[min(len(one), len(other)) :]
    rest = next((line.strip() for line in longer if line.strip()), "")
    return (rest, "(nothing)") if len(one) > len(other) else ("(nothing)", rest)


def clipped(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= EXCERPT else f"{line[:EXCERPT]}…"


# -- images -----------------------------------------------------------------------------------


def _images_of(pieces: Sequence[Piece]) -> list[tuple[str, str]]:
    return [image for piece in pieces for image in piece.images]


def _images(
    found: Compared, before: Sequence[tuple[str, str]], after: Sequence[tuple[str, str]]
) -> None:
    if len(before) != len(after):
        said = [f"{len(images)} image{'s' * (len(images) != 1)}" for images in (before, after)]
        found.differs("images", f"{said[0]} -> {said[1]}", *said)
        return
    for number, (a, b) in enumerate(zip(before, after, strict=True), 1):
        one, other = measured(*a), measured(*b)
        if not _of_one_size(one, other):
            said = f"image {number}: {_named(one)} -> {_named(other)}"
            found.differs("images", said, _named(one), _named(other))
    if before and not any(d.what == "images" for d in found.differences):
        same = sum(a == b for a, b in zip(before, after, strict=True))
        found.notes.append(f"{len(before)} of {len(before)} images there ({same} to the byte)")


Measured = tuple[str, int, int]  # kind, width, height; 0 for what is no image


def measured(kind: str, encoded: str) -> Measured:
    """What an image of a notebook is; its pixels are not compared."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            return kind, image.width, image.height
    except (
        UnidentifiedImageError,
        OSError,
        ValueError,
        binascii.Error,
        Image.DecompressionBombError,
    ):
        return kind, 0, 0


def _of_one_size(one: Measured, other: Measured) -> bool:
    def near(a: int, b: int) -> bool:
        return abs(a - b) <= SIDE * max(a, b)

    return one[0] == other[0] and near(one[1], other[1]) and near(one[2], other[2])


def _named(image: Measured) -> str:
    kind, width, height = image
    return f"{kind.removeprefix('image/')} {width}x{height}" if width else f"{kind} that is broken"
