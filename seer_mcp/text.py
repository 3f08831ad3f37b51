"""Terminal text as a reader should see it: folded, stripped, clipped and paged.

Everything here is linear in the length of its input, whatever the input is.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass
from pathlib import Path

# An escape sequence, whole. Bounded repeats: a sequence that never ends must not hold back text.
_STRING = r"[\]PX^_][^\x00-\x1f]{0,2048}"  # OSC, DCS, SOS, PM, APC: a payload up to its terminator
_CSI = r"\[[0-?]{0,64}[ -/]{0,8}"
_ESCAPE = rf"\x1b(?:{_CSI}[@-~]|{_STRING}(?:\x07|\x1b\\)|[ -/]{{1,8}}[0-~]|[0-OQ-WYZ\\`-~])"
# An escape sequence that the next characters may complete.
_OPEN = rf"\x1b(?:{_CSI}|{_STRING}\x1b?|[ -/]{{1,8}})?\Z"

_TOKEN = re.compile(rf"\r+|\x08+|(?P<escape>{_ESCAPE})|(?P<open>{_OPEN})|\x1b")
_STRIP = re.compile(rf"{_ESCAPE}|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_MOVE = re.compile(r"\n|\x1b\[(\d{0,4})A")
_CLIMB = 200  # lines, as many as any terminal has
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def strip_ansi(text: str) -> str:
    """`text` without escape sequences and control characters; newlines and tabs stay."""
    return _STRIP.sub("", text)


def printable(text: str) -> str:
    r"""`text` as any UTF-8 channel can carry it and any reader can see it.

    Lone surrogates and control characters become backslash escapes (`\ud800`, `\x00`); newlines
    and tabs stay. Whoever wants colours dropped calls strip_ansi first.
    """
    return _UNPRINTABLE.sub(_escaped, text)


def _escaped(found: re.Match[str]) -> str:
    code = ord(found[0])
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


# Characters that show nothing, or turn round what is shown: direction overrides, zero widths, tags.
# Joiners and direction marks stay: scripts and emoji need them.
_HIDDEN = re.compile("[\u200b\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\U000e0000-\U000e007f]")
HIDDEN_SHOWN = 200


def visible(text: str) -> str:
    r"""`text` with hidden characters as escapes (`\u202e`); after the first 200 of them as \ufffd."""
    if _HIDDEN.search(text) is None:
        return text
    count = itertools.count()
    return _HIDDEN.sub(
        lambda found: _long_escape(found[0]) if next(count) < HIDDEN_SHOWN else "\ufffd", text
    )


def _long_escape(character: str) -> str:
    code = ord(character)
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _Line:
    """One line of a terminal that is being written. One code point fills one cell."""

    __slots__ = ("_cells", "_cursor", "_open", "_parts", "_returned")

    def __init__(self) -> None:
        # While nothing was overwritten: the text as it came, escape sequences and all.
        self._parts: list[str] = []
        self._returned = False  # a \r came; only a character after it overwrites anything
        # From the first overwriting on: the cells as UTF-32, replaced in place at the cursor.
        self._cells: bytearray | None = None
        self._cursor = 0
        self._open = ""  # the beginning of an escape sequence that is not complete yet

    def feed(self, text: str) -> None:
        """Write `text`, which holds no newline."""
        if self._cells is None:
            if not self._returned and "\r" not in text and "\b" not in text:
                self._parts.append(text)
                return
            if "\b" not in text:
                ended = text.rstrip("\r")
                if not ended or not (self._returned or "\r" in ended):
                    self._parts.append(ended)
                    self._returned = self._returned or ended != text
                    return
            plain, self._parts = "".join(self._parts), []
            self._cells = bytearray()
            self._write(plain + "\r" if self._returned else plain)
        self._write(text)

    def text(self) -> str:
        """The line as it stands; the beginning of an escape sequence comes last, as it is."""
        if self._cells is not None:
            return self._cells.decode("utf-32-le", "surrogatepass") + self._open
        self._parts = ["".join(self._parts)]
        return self._parts[0]

    def end(self) -> str:
        """The line as it stays, now that a newline came."""
        if self._open:
            self._write("\r")  # the sequence is broken off: what there is of it is text
        return self.text()

    def _write(self, text: str) -> None:
        text, self._open = self._open + text, ""
        at = 0
        for token in _TOKEN.finditer(text):
            self._put(text[at : token.start()])
            at = token.end()
            if token["open"] is not None:
                self._open = token[0]
            elif token["escape"] is not None:
                self._erase(token[0])
            elif token[0][0] == "\r":
                self._cursor = 0
            elif token[0][0] == "\b":
                self._cursor = max(0, self._cursor - len(token[0]))
        self._put(text[at:])

    def _put(self, text: str) -> None:
        if not text or self._cells is None:
            return
        start, self._cursor = self._cursor, self._cursor + len(text)
        self._cells[4 * start : 4 * self._cursor] = text.encode("utf-32-le", "surrogatepass")

    def _erase(self, escape: str) -> None:
        """Obey "erase to the end of the line" and "erase the line"; pass over all else."""
        # A terminal leaves the cursor where it is in an erased line. Everyone sends \r with it, and
        # blanks up to the cursor would cost its column each time: so start anew.
        if self._cells is None:
            return
        if escape in ("\x1b[K", "\x1b[0K"):
            del self._cells[4 * self._cursor :]
        elif escape == "\x1b[2K":
            self._cells.clear()
            self._cursor = 0


class Screen:
    r"""Folds terminal output into lines while it arrives.

    `\r` goes back to the start of the line and what follows overwrites ("abc\rX" is "Xbc"), `\r\n`
    is a newline, `\b` steps back, `\x1b[K` and `\x1b[2K` erase. Where the input is cut into chunks
    makes no difference. Escape sequences stay, without width, in a line that nothing overwrote; a
    line that was overwritten holds none.

    Finished lines are given away by take() and never change after; so cursor-up is not obeyed
    here (see collapse). One code point is one cell, a wide or combining character too.
    """

    def __init__(self) -> None:
        self._finished: list[str] = []
        self._line = _Line()

    def feed(self, chunk: str) -> None:
        """Write `chunk`. Costs its length, however long the current line already is."""
        if "\r\n" in chunk:
            chunk = chunk.replace("\r\n", "\n")
        if "\r" not in chunk and "\b" not in chunk:
            whole, newline, chunk = chunk.rpartition("\n")
            if newline:
                first, newline, rest = whole.partition("\n")
                self._finish(first)
                if newline:
                    self._finished += [rest, "\n"]
        else:
            *lines, chunk = chunk.split("\n")
            for line in lines:
                self._finish(line)
        if chunk:
            self._line.feed(chunk)

    def _finish(self, end: str) -> None:
        self._line.feed(end)
        self._finished += [self._line.end(), "\n"]
        self._line = _Line()

    def take(self) -> str:
        """The lines finished since the last take, each with its newline."""
        lines, self._finished = "".join(self._finished), []
        return lines

    def pending(self) -> str:
        """The unfinished line as a terminal would show it now."""
        return self._line.text()


def collapse(text: str) -> str:
    r"""All of `text` as a terminal would show it at the end, progress bars in their last state.

    What Screen does, and cursor-up (`\x1b[A`, `\x1b[3A`) as well: nested tqdm bars write below and
    climb back. Within reason: after a climb writing goes on at the start of that line, as tqdm and
    rich do by a `\r`; nothing climbs further than 200 lines above the lowest one; other cursor
    movements are passed over.
    """
    if "\x1b[" not in text or not any(found[0] != "\n" for found in _MOVE.finditer(text)):
        screen = Screen()
        screen.feed(text)
        return screen.take() + screen.pending()
    above: list[str] = []  # lines that can no longer be reached
    rows, row, at = [_Line()], 0, 0
    for move in _MOVE.finditer(text):
        rows[row].feed(text[at : move.start()])
        at = move.end()
        if move[0] == "\n":
            row += 1
        else:
            row = max(0, len(rows) - 1 - _CLIMB, row - max(1, int(move[1] or 1)))
        if row < len(rows):
            rows[row].feed("\r")
            continue
        rows.append(_Line())
        if row >= 2 * _CLIMB:
            above += [line.text() for line in rows[:_CLIMB]]
            del rows[:_CLIMB]
            row -= _CLIMB
    rows[row].feed(text[at:])
    return "\n".join([*above, *(line.text() for line in rows)])


@dataclass(frozen=True)
class Clipped:
    """`text` is original[:next_offset], a sentence, and original[next_offset + omitted_chars:]."""

    text: str
    omitted_lines: int  # newlines among what was left out
    omitted_chars: int
    next_offset: int | None  # where the omitted part begins in the original; None: all is there


def head_and_tail(text: str, budget: int, cursor_hint: str = "") -> Clipped:
    """The first 60 % and the last 40 % of `text` in at most `budget` characters.

    Cut at line borders where that leaves at least half of either part, within the line else.
    `cursor_hint` follows the sentence in the middle and tells how to read the rest; "{offset}" in
    it becomes next_offset. Where not even the sentence fits, only the beginning is returned.
    """
    if budget < 0:
        raise ValueError(f"budget = {budget}: a number of characters, 0 or more")
    if len(text) <= budget:
        return Clipped(text, 0, 0, None)

    # No number in the sentence can be larger than these, so no sentence can be longer.
    lines = text.count("\n")
    room = budget - len(_omission(max(2, lines), len(text), len(text), cursor_hint)) - 2
    if room < 0:
        return Clipped(text[:budget], text.count("\n", budget), len(text) - budget, budget)
    head = _border_before(text, room * 6 // 10)
    tail = _border_after(text, len(text) - (room - room * 6 // 10))

    lines = text.count("\n", head, tail)
    sentence = _omission(lines, tail - head, head, cursor_hint)
    before = "" if head == 0 or text[head - 1] == "\n" else "\n"
    after = "\n" if tail < len(text) else ""
    whole = f"{text[:head]}{before}{sentence}{after}{text[tail:]}"
    return Clipped(whole, lines, tail - head, head)


def _omission(lines: int, characters: int, offset: int, hint: str) -> str:
    size = f"{characters:,} character{'' if characters == 1 else 's'}"
    if lines:
        size = f"{lines:,} line{'' if lines == 1 else 's'} ({size})"
    hint = hint.replace("{offset}", str(offset))
    return f"… {size} omitted …{' ' if hint else ''}{hint}"


def _border_before(text: str, end: int) -> int:
    border = text.rfind("\n", 0, end) + 1
    return border if 2 * border >= end else end


def _border_after(text: str, start: int) -> int:
    border = text.find("\n", max(0, start - 1)) + 1
    return border if border and 2 * (len(text) - border) >= len(text) - start else start


@dataclass(frozen=True)
class Page:
    """A piece of a text. `offset`, `next_offset` and `total` are characters of a str, bytes of a
    file; all pages from 0 on, joined, are the original."""

    text: str
    offset: int  # where this page begins
    next_offset: int | None  # the offset to ask for next; None: this was the end
    total: int


def page(source: str | Path, offset: int, limit: int) -> Page:
    """At most `limit` characters of a str, or bytes of a UTF-8 file, from `offset` on.

    A page of a file never splits a character: it may be up to 3 bytes shorter, or longer where
    `limit` is less than one character; an offset within a character goes back to its beginning.
    Only the page itself is read. Bytes that are not UTF-8 come as lone surrogates
    (surrogateescape), so that encoding gives the file's bytes again; show them with printable().
    Raises OSError for a file that cannot be read, ValueError for a negative offset or no limit.
    """
    if offset < 0 or limit < 1:
        raise ValueError(f"offset = {offset} must be 0 or more, limit = {limit} 1 or more")
    if isinstance(source, str):
        offset = min(offset, len(source))
        end = min(offset + limit, len(source))
        return Page(source[offset:end], offset, end if end < len(source) else None, len(source))

    with source.open("rb") as file:
        total = file.seek(0, 2)
        offset = min(offset, total)
        file.seek(max(0, offset - 3))
        before = file.read(offset - file.tell())
        data = file.read(min(limit, total - offset) + 3)  # 3: to see a character that is cut
    back = _begun(before, data[:3])
    offset, data = offset - back, before[len(before) - back :] + data
    end = _character_border(data, min(limit, total - offset))
    more = offset + end < total
    text = data[:end].decode("utf-8", "surrogateescape")
    return Page(text, offset, offset + end if more else None, total)


def _begun(before: bytes, after: bytes) -> int:
    """How many of the last bytes of `before` belong to a character that ends in `after`."""
    for back in range(1, len(before) + 1):
        for more in range(1, len(after) + 1):
            try:
                if len((before[-back:] + after[:more]).decode("utf-8")) == 1:
                    return back
            except UnicodeDecodeError:
                continue
    return 0


def _character_border(data: bytes, end: int) -> int:
    """The border between characters at or before `end`, or else the first one after it.

    A border is any place before a byte that continues nothing. Four continuation bytes in a row
    are no character, so they can be cut anywhere.
    """

    def border(at: int) -> bool:
        return at >= len(data) or data[at] & 0xC0 != 0x80

    for at in range(end, max(0, end - 4), -1):
        if border(at):
            return at
    if end >= 4:
        return end
    return next((at for at in range(end, 4) if border(at)), min(4, len(data)))


_RULER = re.compile(r"^[-─═]{60,}\n", re.MULTILINE)
_FRAME = re.compile(r'^(?:Cell In\[|File |  File ")', re.MULTILINE)
_ERROR = re.compile(r"^[A-Za-z_][\w.]*(?::|$)", re.MULTILINE)
_TITLE = re.compile(r"^(\S+) {3,}(Traceback \(most recent call last\))$", re.MULTILINE)


def tidy_traceback(text: str, budget: int = 8000) -> str:
    """A traceback, Python's or IPython's, in at most `budget` characters.

    No colours and no dashed rulers. What does not fit is left out of the middle: kept are the
    final error, as many of the last frames as fit, and the first one, which is the caller's own
    cell, where it is short.
    """
    text = _TITLE.sub(r"\1  \2", _RULER.sub("", strip_ansi(text)))
    if len(text) <= budget:
        return text
    frames = [found.start() for found in _FRAME.finditer(text)]
    if not frames:
        return head_and_tail(text, budget).text

    # The error after the last frame; in a very long message its beginning counts most.
    found = _ERROR.search(text, text.find("\n", frames[-1]) + 1)
    error = found.start() if found else len(text)
    message = head_and_tail(text[error:], budget // 2).text
    begin = next((end for end in (*frames[1:2], frames[0]) if end <= budget // 4), 0)
    room = budget - begin - len(message) - len(f"… {len(frames):,} frames omitted …\n") - 1
    if room < 0:
        return head_and_tail(text, budget).text
    last = next((at for at in frames if at >= begin and error - at <= room), frames[-1])
    omitted = sum(begin <= at < last for at in frames)
    gap = f"… {omitted:,} frame{'' if omitted == 1 else 's'} omitted …\n" if omitted else ""
    body = head_and_tail(text[last:error], room).text  # the last frame alone may be too long
    between = "" if body.endswith("\n") else "\n"
    return f"{text[:begin]}{gap}{body}{between}{message}"
