"""A client's settings: read whole, changed in one place, never half written, never spoiled."""

from __future__ import annotations

import json
import shutil
import stat
import time
from collections.abc import MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import ParseError

from ..errors import BadInput
from ..files import write_atomic
from .targets import Entry

Document = MutableMapping[str, Any]


@dataclass(frozen=True)
class Written:
    path: Path
    changed: bool
    backup: Path | None
    """None where there was nothing to keep."""


def fragment(key: str, name: str, entry: Entry, toml: bool) -> str:
    """The entry alone, as it stands in a file that holds nothing else."""
    return dumped({key: {name: entry}}, toml)


def dumped(document: Document, toml: bool) -> str:
    if toml:
        return tomlkit.dumps(document)
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def read(path: Path, toml: bool) -> Document:
    """The document of a file, empty if there is none. Raises BadInput for one that cannot be read whole."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        text = ""
    except UnicodeDecodeError as error:
        raise unreadable(path, "it is not UTF-8") from error
    if toml:
        try:
            return tomlkit.parse(text)
        except ParseError as error:
            raise unreadable(path, f"it is no TOML: {error}") from error
    try:
        document = json.loads(text) if text.strip() else {}
    except json.JSONDecodeError as error:
        why = f"it is no plain JSON: {error.msg} in line {error.lineno}"
        raise unreadable(path, why) from error
    if not isinstance(document, dict):
        raise unreadable(path, "it does not hold a JSON object")
    return document


def unreadable(path: Path, why: str) -> BadInput:
    return BadInput(
        "settings",
        str(path),
        f"{why}. It was left as it is: mend it, or add by hand what --print shows",
    )


def same_server(old: object, new: Entry) -> bool:
    """Whether an entry that is there is an earlier one of ours."""
    if not isinstance(old, MutableMapping):
        return False
    words = [str(old.get("command", "")), *map(str, old.get("args") or ()), str(old.get("url", ""))]
    return old == new or any("seer-mcp" in word or "seer_mcp" in word for word in words)


def put(
    path: Path, key: str, name: str, entry: Entry, toml: bool, replace: bool = False
) -> Written:
    """Write `entry` as server `name`; all else in the file stays. The file before is kept beside it.

    Raises BadInput, and changes nothing, for a file that cannot be read, or where `name` is another server
    and not `replace`.
    """
    real = path.resolve()  # a link into somebody's dotfiles stays a link
    document = read(real, toml)
    servers = document.setdefault(key, tomlkit.table(is_super_table=True) if toml else {})
    if not isinstance(servers, MutableMapping):
        raise unreadable(real, f"its {key!r} holds no servers")
    old = servers.get(name)
    if old == entry:
        return Written(path, False, None)
    if old is not None and not replace and not same_server(old, entry):
        raise BadInput(
            "name", name, f"{real} has another server of this name; --name OTHER, or --replace it"
        )
    servers[name] = entry
    backup = None
    mode = 0o600
    if real.exists():
        backup = real.with_name(f"{real.name}.before-seer-mcp-{time.strftime('%Y%m%d-%H%M%S')}")
        shutil.copy2(real, backup)
        mode = stat.S_IMODE(real.stat().st_mode)
    real.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(real, dumped(document, toml).encode(), mode=mode, what="settings")
    return Written(path, True, backup)
