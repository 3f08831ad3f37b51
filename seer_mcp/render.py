"""What a cell put out, as a client's model should see it: within a budget, with a way to the rest."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

from mcp.types import CallToolResult, ContentBlock, ImageContent, TextContent

from .errors import BadInput
from .outputs import Piece
from .text import printable, strip_ansi, tidy_traceback, visible

TEXT_BUDGET = 20_000  # characters of a result
ERROR_BUDGET = 8_000  # of which a traceback may take so many
IMAGES = 4
IMAGE_SIDE = 1200  # pixels of the longer side
IMAGE_BYTES = 300_000
ANSWER_BYTES = 640_000  # of all images of a result: an HTTP client refuses an event above 1 MiB


@dataclass(frozen=True)
class Part:
    """One text block of a result."""

    text: str
    source: str = ""
    """Where the text comes from ("output of cell 3f2a"), or "" if the words are the server's."""


@dataclass
class Answer:
    """A tool's result while it is put together.

    The server's words and what comes from elsewhere (outputs, files, notebooks) stand in blocks of
    their own, so that nothing a cell prints can pass for an answer of the server.
    """

    text: str
    images: list[ImageContent] = field(default_factory=list[ImageContent])
    parts: list[Part] = field(default_factory=list[Part])
    """Further text blocks, to the character."""
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    is_error: bool = False

    def result(self) -> CallToolResult:
        content: list[ContentBlock] = []
        for part in (Part(self.text), *self.parts):
            meta = {"seer/source": part.source} if part.source else None
            content.append(TextContent(type="text", text=printable(part.text), _meta=meta))
        content.extend(self.images)
        meta = {f"seer/{key}": value for key, value in self.meta.items()}
        return CallToolResult(content=content, is_error=self.is_error, _meta=meta or None)


def digest(pieces: list[Piece], budget: int, how_to_read_on: str) -> str:
    """All text of the pieces, or head and tail of it within `budget` characters.

    `how_to_read_on` may contain {cursor}, where the part that was left out begins.
    """
    ready = [as_shown(piece) for piece in pieces]
    sizes = [piece.size for piece in ready]
    if sum(sizes) <= budget:
        return joined_blocks([(piece, piece.page(0, budget + 1).text) for piece in ready])
    sentence_room = len(how_to_read_on) + 120
    head_room = (budget - sentence_room) * 6 // 10
    tail_room = budget - sentence_room - head_room
    head, cut, offset = head_of(ready, head_room)
    tail: list[tuple[Piece, str]] = []
    tail_chars = 0
    for at in range(len(ready) - 1, -1, -1):
        piece = ready[at]
        begin = max(piece.size - tail_room, 0, offset if at == cut else 0)
        if at < cut or tail_room <= 0:
            break
        text = last_of(piece, begin)
        tail.insert(0, (piece, text))
        tail_chars += len(text)
        tail_room -= len(text) + LABEL
        if begin > 0:
            break
    left_out = sum(sizes) - sum(len(text) for _, text in head) - tail_chars
    cursor = f"{ready[cut].index}:{offset}"
    gap = f"… about {max(left_out, 0):,} characters left out; {how_to_read_on.format(cursor=cursor)} …"
    return f"{joined_blocks(head)}\n{gap}\n{joined_blocks(tail)}"


def head_of(pieces: list[Piece], room: int) -> tuple[list[tuple[Piece, str]], int, int]:
    """The beginning of the pieces, and where it ends: in which piece, at which offset."""
    head: list[tuple[Piece, str]] = []
    for at, piece in enumerate(pieces):
        if room <= 0:
            return head, at, 0
        found = piece.page(0, room)
        head.append((piece, found.text))
        room -= len(found.text) + LABEL
        if found.next_offset is not None:
            # A traceback is shown in short: its pages count from its whole text.
            return head, at, 0 if piece.kind == "error" else found.next_offset
    return head, len(pieces) - 1, pieces[-1].size


LABEL = 12  # characters that a label and a line break may add


def last_of(piece: Piece, begin: int) -> str:
    text, offset = "", begin
    while True:
        found = piece.page(offset, 1_000_000)
        text += found.text
        if found.next_offset is None:
            return text
        offset = found.next_offset


def as_shown(piece: Piece) -> Piece:
    """The piece, a traceback in short."""
    if piece.kind != "error":
        return piece
    return Piece(piece.index, piece.kind, tidy_traceback(piece.text, ERROR_BUDGET))


def joined_blocks(blocks: list[tuple[Piece, str]]) -> str:
    parts: list[str] = []
    for piece, text in blocks:
        if not text:
            continue
        if parts and not parts[-1].endswith("\n"):
            parts.append("\n")
        if piece.kind == "stderr":
            parts.append("[stderr] ")
        parts.append(strip_ansi(text))
    return visible("".join(parts).rstrip("\n"))


@dataclass(frozen=True)
class ExactPage:
    text: str
    next: str | None
    total: int
    end: str
    """The cursor behind the last text there is: of a run that goes on, more may come there."""


def exact_page(pieces: list[Piece], cursor: str, limit: int) -> ExactPage:
    """The text from a cursor "output:offset" on, to the character; and the next cursor."""
    index, offset = parsed_cursor(cursor)
    wanted = [piece for piece in pieces if piece.index >= index]
    total = sum(piece.size for piece in pieces)
    end = f"{pieces[-1].index}:{pieces[-1].size}" if wanted else cursor
    parts: list[str] = []
    room = limit
    for piece in wanted:
        begin = offset if piece.index == index else 0
        if room <= 0:
            return ExactPage("".join(parts), f"{piece.index}:{begin}", total, end)
        found = piece.page(begin, room)
        parts.append(found.text)
        room -= len(found.text)
        while found.next_offset is not None and room > 0:
            found = piece.page(found.next_offset, room)
            parts.append(found.text)
            room -= len(found.text)
        if found.next_offset is not None:
            return ExactPage("".join(parts), f"{piece.index}:{found.next_offset}", total, end)
    return ExactPage("".join(parts), None, total, end)


def parsed_cursor(cursor: str) -> tuple[int, int]:
    index, _, offset = cursor.partition(":")
    if (
        not (index.isascii() and index.isdigit() and offset.isascii() and offset.isdigit())
        or len(cursor) > 30
    ):
        raise BadInput(
            "cursor", cursor, 'use one from an earlier answer, or "0:0" for the beginning'
        )
    return int(index), int(offset)


def images_of(pieces: list[Piece]) -> list[tuple[str, str]]:
    return [image for piece in pieces for image in piece.images]


def scaled(
    mime: str, data: str, side: int = IMAGE_SIDE, limit: int = IMAGE_BYTES
) -> ImageContent | str:
    """An image small enough to send (at most `limit` bytes), or a sentence on why there is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        raw = base64.b64decode(data)
        with Image.open(io.BytesIO(raw)) as image:
            if len(raw) <= limit and max(image.size) <= side:
                return ImageContent(type="image", data=data, mime_type=mime)
            image.load()
            picture = image.convert(
                "RGBA" if "A" in image.getbands() or image.mode == "P" else "RGB"
            )
    except (ValueError, OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        return f"[an image that cannot be shown: {error}]"
    picture.thumbnail((side, side))
    encoded = _encoded(picture, "PNG")
    if len(encoded) <= limit:
        return _content(encoded, "image/png")
    flat = Image.new("RGB", picture.size, "white")
    flat.paste(picture, mask=picture.getchannel("A") if picture.mode == "RGBA" else None)
    while True:
        for quality in (85, 70, 50, 30):
            encoded = _encoded(flat, "JPEG", quality=quality)
            if len(encoded) <= limit:
                return _content(encoded, "image/jpeg")
        flat.thumbnail((max(flat.size) * 3 // 4, max(flat.size) * 3 // 4))


def _encoded(picture: Any, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _content(data: bytes, mime: str) -> ImageContent:
    return ImageContent(type="image", data=base64.b64encode(data).decode("ascii"), mime_type=mime)
