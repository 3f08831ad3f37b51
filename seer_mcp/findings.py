"""What an investigator concludes: a cell in the notebook, and a record beside it that programs can read.

Neither knows whether it is right: what a grader says goes to the operator's side (grading.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .errors import BadInput, SeerError, show
from .files import write_atomic
from .merge import outputs_digest
from .notebook import UNFINISHED, Cell, Notebook

CELLS = 50  # that one submission can name
LINE_CHARACTERS = 100


@dataclass(frozen=True)
class Shown:
    """A cell that a claim rests on, as it was when the claim was made."""

    cell: str
    run: str
    says: str
    """Its first line."""
    source_sha256: str
    outputs_digest: str


@dataclass(frozen=True)
class Findings:
    claim: str
    answer: str
    """The claim in the form that the task asks for: a word, a number."""
    confidence: float
    evidence: tuple[Shown, ...]
    controls: tuple[Shown, ...]
    limits: str
    """What was not tried, or what would have shown it wrong."""

    def markdown(self, number: int, closing: str = "") -> str:
        """The cell that says it to a person; it ends with `closing`."""
        parts = [f"## Findings {number}", self.claim.strip()]
        if self.answer:
            parts.append(f"**Answer:** {self.answer.strip()}")
        parts.append(f"**Confidence:** {self.confidence:.0%}")
        parts.append(_listed("Evidence", self.evidence))
        parts.append(
            _listed("Controls", self.controls) if self.controls else "**Controls:** none was named."
        )
        limits = self.limits.strip() or "nothing was said."
        parts.append(f"**Not tried, or what would have shown this wrong:** {limits}")
        if closing:
            parts.append(closing)
        return "\n\n".join(parts)


def shown(notebook: Notebook, argument: str, ids: Sequence[str]) -> tuple[Shown, ...]:
    """The cells named. Raises NotFound, or BadInput for one whose output shows nothing."""
    if len(ids) > CELLS:
        raise BadInput(argument, f"{len(ids)} cells", f"name the {CELLS} that matter most")
    cells = {cell.id: cell for cell in map(notebook.cell, ids)}
    for cell in cells.values():
        if why := _why_not(cell):
            raise BadInput(argument, cell.id, why)
    return tuple(map(_shown, cells.values()))


def is_findings(source: str) -> bool:
    """Whether that is the text of a cell that says findings."""
    return re.match(r"## Findings \d+\n", source) is not None


def record_path(notebook: Path) -> Path:
    return notebook.with_name(f"{notebook.stem}.findings.json")


def read_record(path: Path) -> list[dict[str, Any]]:
    """The submissions in a record, none if there is none. Raises SeerError for what is no record."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["submissions"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, type(error).__name__) from error
    if not isinstance(found, list):
        raise _unreadable(path, "its submissions are no list")
    return found


def written(
    path: Path, findings: Findings, before: Sequence[dict[str, Any]], **facts: Any
) -> dict[str, Any]:
    """Add a submission to the record, atomically; what was added. Raises SeerError."""
    added = {"number": len(before) + 1, **facts, **asdict(findings)}
    record = {"format": 1, "submissions": [*before, added]}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    try:
        write_atomic(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise SeerError(
            f"The findings stand in the notebook, but the record {path} could not be written ({error.strerror}). "
            "Once that is mended, delete the cell and submit again."
        ) from error
    return added


def _why_not(cell: Cell) -> str:
    """Why a cell cannot carry a claim; "" if it can."""
    if cell.kind != "code":
        return f"it is a {cell.kind} cell; name code cells, whose output shows it"
    if cell.state in UNFINISHED:
        return f"it is {cell.state}; wait for it with read_outputs"
    if cell.state != "complete":
        return f"its state is {show(cell.state)}; name cells that ran to their end"
    if cell.seer.get("stale"):
        return "it was edited since it ran; run it again first"
    return ""


def _shown(cell: Cell) -> Shown:
    first = next((line.strip() for line in cell.source.splitlines() if line.strip()), "")
    return Shown(
        cell.id,
        cell.seer.get("run", ""),
        first[:LINE_CHARACTERS],
        hashlib.sha256(cell.source.encode("utf-8", "surrogatepass")).hexdigest(),
        outputs_digest(cell.data),
    )


def _listed(title: str, cells: Sequence[Shown]) -> str:
    lines = [f"- cell `{cell.cell}`: `{cell.says.replace('`', chr(39))}`" for cell in cells]
    return "\n".join([f"**{title}:**", "", *lines])


def _unreadable(path: Path, why: str) -> SeerError:
    return SeerError(
        f"The record of findings {path} cannot be read ({why}), so nothing was added to it. Move it away and submit "
        "again; the findings submitted before stand in the notebook."
    )
