"""Tools: shell commands and files in the sandbox."""

from __future__ import annotations

import base64
import binascii
import time
from datetime import datetime
from typing import Any, Literal

from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult

from ..errors import BadInput, show
from ..render import TEXT_BUDGET, Answer, Part, scaled
from ..sessions import Register
from .answers import call, of_run
from .seam import Count, Seconds, heartbeat, owner, tool

PAGE_BYTES = 16_000
IMAGE_FILE_BYTES = 20_000_000
IMAGES = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".gif": "image/gif",
    ".webp": "image/webp",
}


def size(count: int) -> str:
    return (
        f"{count:,} B"
        if count < 10_000
        else f"{count / 1e3:,.0f} kB"
        if count < 1e7
        else f"{count / 1e6:,.1f} MB"
    )


def one_line(name: str) -> str:
    """A file name as it can stand in a list: one that breaks the line is quoted."""
    return name if name.isprintable() else show(name, 1000)


def tools(register: Register) -> list[Tool]:
    async def run_command(
        context: Context[Any, Any], sandbox: str, command: str, wait: Seconds = 45
    ) -> CallToolResult:
        """Run a shell command in the sandbox's folder, beside the kernel (it works while a cell
        runs). What takes longer than `wait` seconds runs on and is read with read_outputs."""
        if not command.strip() or "\0" in command:
            raise BadInput("command", command, "give a shell command")
        session = await register.get(sandbox, owner())
        run = await session.command(command)
        began = time.monotonic()
        await session.wait([run], min(wait, register.config.max_wait), heartbeat(context))
        return (await of_run(session, run, time.monotonic() - began)).result()

    async def read_file(sandbox: str, path: str, offset: Count = 0) -> CallToolResult:
        """A file in the sandbox's folder: text by pages (offset in bytes), or an image to look at."""
        session = await register.get(sandbox, owner())
        mime = next((kind for end, kind in IMAGES.items() if path.lower().endswith(end)), None)
        if mime and not offset:
            data, total = await read_whole(session, path)
            made = scaled(mime, base64.b64encode(data).decode("ascii"))
            shown = [] if isinstance(made, str) else [made]
            note = made if isinstance(made, str) else ""
            return Answer(f"{path}: {size(total)} {note}", shown, is_error=bool(note)).result()
        data, total = await session.read_file(path, offset, PAGE_BYTES)
        cut = len(data)
        if offset + cut < total:  # do not cut a character in two
            while cut > max(1, len(data) - 4) and data[cut - 1] & 0xC0 == 0x80:
                cut -= 1
            if cut and data[cut - 1] & 0xC0 == 0xC0:
                cut -= 1
            cut = cut or len(data)
        try:
            text = data[:cut].decode("utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(
                "path",
                path,
                f"it is not UTF-8 text ({size(total)}, byte {offset + error.start}); read it with run_command (xxd, …)",
            ) from error
        after = (
            f" Next: {call('read_file', sandbox=sandbox, path=path, offset=offset + cut)}."
            if offset + cut < total
            else ""
        )
        return Answer(
            f"{path}: bytes {offset:,} to {offset + cut:,} of {total:,}.{after}",
            parts=[Part(text, f"file {path}")],
            meta={"file": {"path": path, "size": total, "next": offset + cut if after else None}},
        ).result()

    async def read_whole(session: Any, path: str) -> tuple[bytes, int]:
        data = b""
        while True:
            piece, total = await session.read_file(path, len(data))
            data += piece
            if total > IMAGE_FILE_BYTES:
                raise BadInput("path", path, f"an image of {size(total)} is too large to show")
            if len(data) >= total or not piece:
                return data, total

    async def write_file(
        sandbox: str,
        path: str,
        content: str,
        encoding: Literal["text", "base64"] = "text",
        append: bool = False,
    ) -> CallToolResult:
        """Write a file in the sandbox's folder (folders are made; append adds to it)."""
        session = await register.get(sandbox, owner())
        try:
            data = (
                content.encode("utf-8")
                if encoding == "text"
                else base64.b64decode(content, validate=True)
            )
        except (binascii.Error, ValueError) as error:
            raise BadInput(
                "content", content, f"it cannot be written as {encoding}: {error}"
            ) from error
        if not path.strip():
            raise BadInput("path", path, "name a file")
        full = await session.write_file(path, data, append)
        return Answer(
            f"{path}: {'added' if append else 'wrote'} {size(len(data))} ({full}).",
            meta={"file": {"path": full}},
        ).result()

    async def list_files(sandbox: str, path: str = ".") -> CallToolResult:
        """The files of a folder in the sandbox."""
        session = await register.get(sandbox, owner())
        entries, total = await session.list_files(path)
        lines = [
            f"{size(e['size']):>10}  {datetime.fromtimestamp(e['time']):%Y-%m-%d %H:%M}"
            f"  {one_line(e['name'])}{'/' if e['folder'] else ''}"
            for e in entries
        ]
        room = TEXT_BUDGET
        shown = [line for line in lines if (room := room - len(line) - 1) > 0]
        hint = "; run_command with ls and a pattern shows a part" if total > len(shown) else ""
        more = f", {total - len(shown)} of them not shown{hint}" if hint else ""
        return Answer(
            f"{path}: {total} entries{more}",
            parts=[Part("\n".join(shown), f"folder {path}")] if shown else [],
            meta={"files": entries},
        ).result()

    return [
        tool(run_command, "Run a shell command", destructive=True, open_world=True),
        tool(read_file, "Read a file", read_only=True, idempotent=True),
        tool(write_file, "Write a file", destructive=True, idempotent=True),
        tool(list_files, "List files", read_only=True, idempotent=True),
    ]
