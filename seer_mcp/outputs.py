"""The outputs of one cell, folded from the kernel's events as a notebook keeps them.

Streams of one name are merged, carriage returns and backspaces honoured. Text longer than
INLINE characters is kept whole in a file beside the notebook; the notebook then holds its head and
tail and says where the rest is.
"""

from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .kernel_host.fault import fault_point
from .text import Page, Screen, page, printable

INLINE = 64_000  # characters of one text that stay in the notebook
HEAD = 40_000  # of which, when it is longer: so many from its beginning
TAIL = 16_000  # and so many from its end

STREAMS = ("stdout", "stderr")
JSON_TYPE = re.compile(r"^application/(.*\+)?json$")  # nbformat's own rule

Event = dict[str, Any]
Output = dict[str, Any]
SpillPath = Callable[[int], Path]


@dataclass(frozen=True)
class Piece:
    """One readable part of a cell's outputs."""

    index: int
    kind: str
    """"stdout", "stderr", "result", "display" or "error"."""
    text: str
    """What a reader of text sees (of a long stream: nothing, it is in `file`)."""
    file: Path | None = None
    rest: str = ""
    """The unfinished last line, which is not in `file` yet."""
    images: tuple[tuple[str, str], ...] = ()
    """(MIME type, base64)."""

    def page(self, offset: int, limit: int) -> Page:
        """At most `limit` characters from `offset` on; of a stream bytes, whether it is in a file or not.

        So an offset into a stream stays right while it grows and moves into its file.
        """
        if self.kind in STREAMS and self.file is None:
            return byte_page(self.text, offset, limit)
        if self.file is None:
            return page(self.text, offset, limit)
        size = self.file.stat().st_size
        if offset >= size:
            found = byte_page(self.rest, offset - size, limit)
            following = None if found.next_offset is None else found.next_offset + size
            return Page(found.text, offset, following, size + found.total)
        found = page(self.file, offset, limit)
        after = size if found.next_offset is None and self.rest else found.next_offset
        return Page(found.text, found.offset, after, self.size)

    @property
    def size(self) -> int:
        """Characters; of a stream bytes."""
        if self.file is not None:
            return self.file.stat().st_size + len(self.rest.encode("utf-8"))
        return len(self.text.encode("utf-8")) if self.kind in STREAMS else len(self.text)


def byte_page(text: str, offset: int, limit: int) -> Page:
    """A page of a text by bytes of its UTF-8, which never splits a character."""
    data = text.encode("utf-8")
    start = min(offset, len(data))
    while start and start < len(data) and data[start] & 0xC0 == 0x80:
        start -= 1
    end = min(start + max(limit, 4), len(data))
    while end < len(data) and data[end] & 0xC0 == 0x80:
        end -= 1
    return Page(data[start:end].decode("utf-8"), start, end if end < len(data) else None, len(data))


class Spill:
    """The whole text of a long stream, in a file.

    What the disk does not take (it is full) waits in memory, at most what a run may put out, and
    is written once there is room. The file always holds a beginning of the text.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.trouble: OSError | None = None
        """Why the last write failed, or None."""
        self._waiting: deque[bytes] = deque()
        self._made = False

    def add(self, text: str) -> None:
        self._waiting.append(text.encode("utf-8"))
        self.flush()

    def flush(self) -> bool:
        """Write what waits; whether nothing waits any more."""
        try:
            while self._waiting:
                fault_point("spill.write")
                self._write(self._waiting[0])
                self._waiting.popleft()
                fault_point("spill.written")
        except OSError as error:
            self.trouble = error
            return False
        self.trouble = None
        return True

    def _write(self, data: bytes) -> None:
        """All of it or nothing."""
        if not self._made:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab" if self._made else "wb", buffering=0) as file:
            self._made = True
            before = file.seek(0, 2)
            done = 0
            try:
                while done < len(data):
                    done += file.write(data[done:]) or 0
            except OSError:
                file.truncate(before)
                raise

    def waiting(self) -> str:
        return b"".join(self._waiting).decode("utf-8")

    @property
    def begun(self) -> bool:
        return self._made


class Stream:
    """One merged stream while it may still grow."""

    def __init__(self, name: str, spill: Callable[[], Path]) -> None:
        self.name = name
        self._spill = spill
        self._screen = Screen()
        self._done = ""  # finished lines, while they fit inline
        self._tail = ""
        self._length = 0
        self.file: Spill | None = None

    def feed(self, text: str) -> None:
        self._screen.feed(text)
        if new := self._screen.take():
            self._add(new)

    def _add(self, new: str) -> None:
        self._length += len(new)
        if self.file is None:
            self._done += new
            if len(self._done) <= INLINE:
                return
            self.file = Spill(self._spill())
            new = self._done
        self.file.add(new)
        self._tail = (self._tail + new)[-TAIL:]
        self._done = self._done[:HEAD]

    def close(self) -> None:
        """The run is over: the unfinished line goes where the rest is."""
        pending = self._screen.pending()
        if self.file is None and self._length + len(pending) <= INLINE:
            return
        if pending:
            self._screen.feed("\n")
            self._add(self._screen.take()[:-1])  # the line break was ours

    def output(self) -> Output:
        pending = self._screen.pending()
        whole = self._length + len(pending)
        if self.file is None and whole <= INLINE:
            return {"output_type": "stream", "name": self.name, "text": self._done + pending}
        head = (self._done + pending)[:HEAD]
        tail = ((self._tail or self._done) + pending)[-TAIL:]
        path = self.file.path if self.file else None
        where = f"; all of it: {path.parent.name}/{path.name}" if path else ""
        gap = f"\n… {whole - len(head) - len(tail):,} of {whole:,} characters left out here{where} …\n"
        return {"output_type": "stream", "name": self.name, "text": head + gap + tail}

    def piece(self, index: int) -> Piece:
        pending = self._screen.pending()
        if self.file is None:
            return Piece(index, self.name, self._done + pending)
        rest = self.file.waiting() + pending
        if not self.file.begun:
            return Piece(index, self.name, rest)
        return Piece(index, self.name, "", self.file.path, rest)


class Outputs:
    """A cell's outputs. `items` is what goes into the notebook."""

    def __init__(
        self,
        spill_path: SpillPath,
        stored: list[Output] | None = None,
        files: dict[str, Path] | None = None,
    ) -> None:
        self._spill_path = spill_path
        self._items: list[Stream | Output] = list(stored or [])
        self._files = dict(files or {})  # index -> file, for stored streams
        self._clear_next = False

    def fold(self, event: Event) -> None:
        """Take one event: stream, display, result, error, clear or capped."""
        kind = event["type"]
        if kind == "clear":
            self._clear_next = bool(event["wait"])
            if not self._clear_next:
                self._clear()
            return
        if self._clear_next:
            self._clear()
        if kind == "stream":
            self._stream(event["name"], event["text"])
        elif kind in ("display", "result"):
            metadata = dict(event["metadata"])
            if event.get("display_id"):
                metadata["seer"] = {"display_id": event["display_id"]}
            output: Output = {
                "output_type": "display_data" if kind == "display" else "execute_result",
                "data": bundle(event["data"]),
                "metadata": metadata,
            }
            if kind == "result":
                output["execution_count"] = event["count"]
            self._items.append(output)
        elif kind == "error":
            self._items.append(
                {
                    "output_type": "error",
                    "ename": str(event["ename"]),
                    "evalue": str(event["evalue"]),
                    "traceback": [str(line) for line in event["traceback"]],
                }
            )
        elif kind == "capped":
            self._stream(
                "stderr", f"\n[output beyond {event['cap']:,} bytes of this run is not kept]\n"
            )

    def shows(self, display: str) -> bool:
        """Whether displays of that id are among them."""
        return any(isinstance(item, dict) and display_id(item) == display for item in self._items)

    def update(self, event: Event) -> bool:
        """Replace the displays of the event's display_id; whether there were any."""
        found = False
        for item in self._items:
            if isinstance(item, dict) and display_id(item) == event["display_id"]:
                item["data"] = bundle(event["data"])
                item["metadata"] = {
                    **event["metadata"],
                    "seer": {"display_id": event["display_id"]},
                }
                found = True
        return found

    def close(self) -> None:
        for item in self._items:
            if isinstance(item, Stream):
                item.close()

    def items(self) -> list[Output]:
        return [item.output() if isinstance(item, Stream) else item for item in self._items]

    def files(self) -> dict[str, Path]:
        """Index of a long stream -> the file that holds all of it."""
        live = {
            str(i): s.file.path
            for i, s in enumerate(self._items)
            if isinstance(s, Stream) and s.file
        }
        return {**self._files, **live}

    def flush(self) -> OSError | None:
        """Write what waits for room on the disk; why some of it still waits, or None."""
        spills = [s.file for s in self._items if isinstance(s, Stream) and s.file]
        behind = [spill.trouble for spill in spills if spill.trouble and not spill.flush()]
        return behind[0] if behind else None

    def behind(self) -> bool:
        """Whether some of it waits for room on the disk."""
        return any(isinstance(s, Stream) and s.file and s.file.trouble for s in self._items)

    def pieces(self) -> list[Piece]:
        found: list[Piece] = []
        for index, item in enumerate(self._items):
            if isinstance(item, Stream):
                found.append(item.piece(index))
            elif str(index) in self._files and self._files[str(index)].exists():
                found.append(Piece(index, item["name"], "", self._files[str(index)]))
            else:
                found.append(as_piece(index, item))
        return found

    def _stream(self, name: str, text: str) -> None:
        last = self._items[-1] if self._items else None
        if not (isinstance(last, Stream) and last.name == name) and text.startswith("\r"):
            # A progress bar goes on where it was, although the other stream spoke in between.
            last = next((s for s in reversed(self._trailing_streams()) if s.name == name), last)
        if isinstance(last, Stream) and last.name == name:
            last.feed(text)
            return
        index = len(self._items)
        stream = Stream(name, lambda: self._spill_path(index))
        if (
            isinstance(last, dict)
            and last.get("name") == name
            and str(index - 1) not in self._files
        ):
            index -= 1  # a stored stream that goes on
            stream.feed(last["text"])
            self._items.pop()
        stream.feed(text)
        self._items.append(stream)

    def _trailing_streams(self) -> list[Stream]:
        streams: list[Stream] = []
        for item in reversed(self._items):
            if not isinstance(item, Stream):
                break
            streams.insert(0, item)
        return streams

    def _clear(self) -> None:
        for file in self.files().values():
            try:
                file.unlink(missing_ok=True)
            except OSError:
                continue  # a disk that takes nothing keeps an old file: no run names it any more
        self._items.clear()
        self._files.clear()
        self._clear_next = False


def bundle(data: dict[str, Any]) -> dict[str, Any]:
    """A MIME bundle as nbformat allows it: only JSON types may hold something other than text."""
    return {
        mime: value if isinstance(value, str) or JSON_TYPE.search(mime) else json.dumps(value)
        for mime, value in data.items()
    }


def display_id(output: Output) -> str | None:
    ours = output.get("metadata", {}).get("seer")
    return ours.get("display_id") if isinstance(ours, dict) else None


def as_piece(index: int, output: Output) -> Piece:
    """A stored output as text and images. HTML and scripts are never passed on."""
    kind = output["output_type"]
    if kind == "stream":
        return Piece(index, output["name"], joined(output["text"]))
    if kind == "error":
        trace = "\n".join(output["traceback"]) or f"{output['ename']}: {output['evalue']}"
        return Piece(index, "error", trace)
    data: dict[str, Any] = output["data"]
    images = tuple(
        (mime, joined(data[mime]).replace("\n", ""))
        for mime in ("image/png", "image/jpeg", "image/gif", "image/webp")
        if mime in data
    )[:1]
    text = next(
        (
            joined(data[mime])
            for mime in ("text/markdown", "text/plain", "text/latex")
            if mime in data
        ),
        "",
    )
    if not text and not images:
        text = f"[{', '.join(sorted(data)) or 'empty output'}: kept in the notebook, not shown as text]"
    return Piece(
        index, "result" if kind == "execute_result" else "display", printable(text), images=images
    )


def joined(text: str | list[str]) -> str:
    return text if isinstance(text, str) else "".join(text)
