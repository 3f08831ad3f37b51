"""The .ipynb format: what a file must be to be opened, and how a cell is written."""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any

from .errors import NotebookUnreadable, NotFound
from .outputs import joined


def as_lines(cell: dict[str, Any]) -> dict[str, Any]:
    """The cell with its texts as lists of lines, as nbformat stores them."""
    shaped = {
        **cell,
        "source": cell["source"].splitlines(True)
        if isinstance(cell["source"], str)
        else cell["source"],
    }
    if "outputs" in cell:
        shaped["outputs"] = [_output_lines(output) for output in cell["outputs"]]
    return shaped


def _output_lines(output: dict[str, Any]) -> dict[str, Any]:
    if output["output_type"] == "stream":
        return {
            **output,
            "text": output["text"].splitlines(True)
            if isinstance(output["text"], str)
            else output["text"],
        }
    if "data" in output:
        data = {
            mime: value.splitlines(True)
            if isinstance(value, str) and mime.startswith(("text/", "image/svg"))
            else value
            for mime, value in output["data"].items()
        }
        return {**output, "data": data}
    return output


DEPTH = (
    200  # levels of nesting that are opened: what writes and checks a file has only so much stack
)


# What nbformat raises for a file that breaks its rules in a way that it does not expect.
INVALID = (
    AssertionError,
    AttributeError,
    KeyError,
    OverflowError,
    RecursionError,
    TypeError,
    ValueError,
)


def new_id() -> str:
    return secrets.token_hex(4)


def storable(source: str) -> str:
    """Source text as UTF-8 can hold it."""
    return source.encode("utf-8", "backslashreplace").decode("utf-8")


def notebook_at(given: str) -> Path:
    """The notebook that a command line names. Raises NotFound."""
    path = Path(given).absolute()
    if not path.is_file():
        raise NotFound("notebook", given, (str(each) for each in path.parent.glob("*.ipynb")))
    return path


def read_notebook(
    path: Path, *, as_copy: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Cells and metadata of a notebook file.

    Raises NotebookUnreadable for anything that could not be opened without losing something. A
    copy may be converted from an older format; in place, only what nbformat 4 can hold is opened.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise NotebookUnreadable(str(path), "it is not a regular file")
        raw = path.read_bytes()
    except OSError as error:
        raise NotebookUnreadable(str(path), error.strerror or str(error)) from error
    return parse_notebook(raw, path, as_copy=as_copy)


def parse_notebook(
    raw: bytes, path: Path, *, as_copy: bool = False
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What read_notebook returns and raises, of the bytes of the file `path`."""
    import nbformat
    from nbformat.validator import NotebookValidationError

    if not raw.strip():
        raise NotebookUnreadable(str(path), "the file is empty")
    try:
        data = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise NotebookUnreadable(
            str(path), f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except (ValueError, RecursionError) as error:
        raise NotebookUnreadable(
            str(path), f"it is not JSON ({error}); perhaps it was cut off"
        ) from error
    if not isinstance(data, dict) or type(data.get("nbformat")) is not int:
        raise NotebookUnreadable(str(path), "it is JSON but not a notebook (no nbformat number)")
    if type(data.get("nbformat_minor", 0)) is not int:
        raise NotebookUnreadable(str(path), "its nbformat_minor is not a whole number")
    if data["nbformat"] < 4:
        if not as_copy:
            raise NotebookUnreadable(
                str(path),
                f"it has the old format {data['nbformat']}; open it with fork=true, which converts a copy",
            )
    elif data["nbformat"] > 4:
        raise NotebookUnreadable(
            str(path), f"format {data['nbformat']} is newer than this server knows"
        )
    try:
        if data["nbformat"] < 4:
            data = json.loads(json.dumps(nbformat.convert(nbformat.from_dict(data), 4)))
        for cell in data["cells"]:
            if data.get("nbformat_minor", 0) < 5:
                cell.setdefault("id", new_id())
        data["nbformat_minor"] = 5  # as it will be written: what that cannot hold is refused
        _unique_ids(path, data["cells"], as_copy)
        if nested_deeper(data, DEPTH):
            raise NotebookUnreadable(str(path), f"it is nested deeper than {DEPTH} levels")
        json.dumps(data, ensure_ascii=False).encode("utf-8")
        nbformat.validate(data)
    except NotebookValidationError as error:
        raise NotebookUnreadable(
            str(path), f"it is not a valid notebook: {_brief(str(error))}"
        ) from error
    except UnicodeEncodeError as error:
        raise NotebookUnreadable(
            str(path), "it has half of a character (a lone surrogate), which no file can hold"
        ) from error
    except INVALID as error:
        raise NotebookUnreadable(
            str(path), f"it is not a valid notebook: {_brief(repr(error))}"
        ) from error
    if "seer" in data["metadata"]:
        data["metadata"]["seer"] = _true_to_kind(data["metadata"]["seer"], DOCUMENT_FACTS)
    for cell in data["cells"]:
        if "seer" in cell["metadata"]:
            cell["metadata"]["seer"] = _run_facts(cell["metadata"]["seer"], path)
        cell["source"] = joined(cell["source"])
        join_outputs(cell.get("outputs", []))
    return data["cells"], data["metadata"]


def join_outputs(outputs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same outputs, their texts in one piece each."""
    for output in outputs:
        if output["output_type"] == "stream":
            output["text"] = joined(output["text"])
        for mime, value in output.get("data", {}).items():
            if isinstance(value, list) and not mime.endswith("json"):
                output["data"][mime] = joined(value)
    return outputs


def _unique_ids(path: Path, cells: list[dict[str, Any]], as_copy: bool) -> None:
    seen: set[str] = set()
    for cell in cells:
        if cell["id"] in seen:
            if not as_copy:
                raise NotebookUnreadable(
                    str(path),
                    f"the cell id {cell['id']!r} occurs twice; open it with fork=true, which mends a copy",
                )
            cell["id"] = new_id()
        seen.add(cell["id"])


# What we note in a notebook, and of which kind it must be. Whoever made the file may have written
# anything there: what cannot be ours is dropped.
RUN = re.compile(r"[rc][0-9a-f]{10}")
STATES = frozenset(
    [
        "queued",
        "running",
        "complete",
        "error",
        "interrupted",
        "kernel_died",
        "sandbox_lost",
        "expired",
        "not_run",
    ]
)
DOCUMENT_FACTS: dict[str, type] = {
    "sandbox": str,
    "backend": str,
    "investigation": str,
    "environment": dict,
    "replay_of": str,
    "folded": int,
    "version": str,
    "cost": str,
    "price": str,
    "link": str,
}
RUN_FACTS: dict[str, type] = {
    "run": str,
    "digest": str,
    "state": str,
    "why": str,
    "since": int,
    "started": float,
    "seconds": float,
    "late": int,
    "damaged": int,
    "output_bytes": int,
    "dropped_bytes": int,
    "stale": bool,
    "earlier": bool,
    "files": dict,
}


def _brief(text: str) -> str:
    """The first line of an error that quotes the file, which may be of any length."""
    line = (text.splitlines() or [""])[0]
    return line if len(line) <= 300 else f"{line[:300]} …"


def nested_deeper(value: Any, depth: int) -> bool:
    """Whether there is something more than `depth` lists and objects inside one another."""
    inside = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(depth == 0 or nested_deeper(part, depth - 1) for part in inside)


def _true_to_kind(facts: Any, kinds: dict[str, type]) -> dict[str, Any]:
    if not isinstance(facts, dict):
        return {}
    return {name: facts[name] for name, kind in kinds.items() if is_kind(facts.get(name), kind)}


def is_kind(value: Any, kind: type) -> bool:
    """Whether it is one: numbers are finite, whole in JavaScript too, and not below zero."""
    if kind is int or kind is float:
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and 0 <= value < 2**53 and math.isfinite(value)
    return isinstance(value, kind)


def _run_facts(facts: Any, path: Path) -> dict[str, Any]:
    """What a cell of the notebook `path` says of its last run, as far as it can be true."""
    known = _true_to_kind(facts, RUN_FACTS)
    if not RUN.fullmatch(known.get("run", "")) or known.get("state") not in STATES:
        return {}
    if "files" in known:
        known["files"] = {
            index: name
            for index, name in known["files"].items()
            if index.isdigit() and isinstance(name, str) and _is_output_of(path, name)
        }
    return known


def _is_output_of(path: Path, name: str) -> bool:
    """Whether `name` is a file in the folder of the notebook's long outputs, and really lies there."""
    folder = path.with_name(f"{path.stem}.outputs")
    return (
        "\0" not in name
        and len(os.fsencode(Path(name).name)) <= 255
        and path.parent / name == folder / Path(name).name
        and (path.parent / name).resolve() == path.parent.resolve() / folder.name / Path(name).name
    )
