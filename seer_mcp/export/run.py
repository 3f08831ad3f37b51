"""What is told of one finished notebook: read from its file, its findings, the grades and the audit."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import about
from ..errors import SeerError
from ..findings import read_record, record_path
from ..grading import kept
from ..ipynb import read_notebook
from ..outputs import as_piece
from ..replay.models import Loaded, loads
from ..watch.page import CellHtml, cell_html, markdown_html

PLOTS = 40  # of one notebook


@dataclass(frozen=True)
class Plot:
    cell: str
    kind: str
    data: str
    """base64."""


@dataclass(frozen=True)
class Submission:
    number: int
    claim: str
    answer: str
    confidence: float | None
    evidence: tuple[str, ...]
    controls: tuple[str, ...]
    limits: str
    grade: str
    """The score, why there is none, or ""."""


@dataclass(frozen=True)
class Run:
    """A notebook, and what is known of how it was made."""

    path: Path
    title: str
    cells: Sequence[dict[str, Any]]
    task: str
    models: Sequence[Loaded]
    made_with: str
    cost: str
    investigation: str
    replay_of: str
    ran: int
    """Code cells that were run, …"""
    failed: int
    """… those of them that did not end well, …"""
    seconds: float
    """… and how long they took."""
    calls: int | None
    """Calls that changed or ran something; None if the audit knows nothing of it."""
    findings: Sequence[Submission]
    plots: Sequence[Plot]
    more_plots: int
    trouble: str
    """What could not be read, or ""."""

    @property
    def run_again(self) -> str:
        return about.run_again(self.path)

    @property
    def task_html(self) -> str:
        return markdown_html(self.task)

    @property
    def html(self) -> list[CellHtml]:
        return [cell_html(cell, number) for number, cell in enumerate(self.cells, 1)]

    def model_lines(self) -> list[str]:
        """Each model that it loads, in a line."""
        return [
            " ".join(
                [f"{each.variable or '(unnamed)'}:", each.model]
                + [f"{name}={value}" for name, value in each.options.items() if name != "alias"]
                + ["(its name was hidden)" if "alias" in each.options else ""]
            ).strip()
            for each in self.models
        ]


def read_run(path: Path, state_dir: Path) -> Run:
    """Raises NotebookUnreadable; what else cannot be read is told."""
    cells, metadata = read_notebook(path, as_copy=True)
    noted = about.facts(metadata)
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    runs = [facts for cell in code if (facts := _run(cell)) is not None]
    handle = str(noted.get("sandbox", ""))
    trouble = ""
    try:
        record = read_record(record_path(path))
    except SeerError as error:
        record, trouble = [], str(error)
    plots = list(_plots(code))
    return Run(
        path=path,
        title=about.title(cells, path),
        cells=cells,
        task=about.task(cells),
        models=loads([(cell["id"], cell["source"]) for cell in code]),
        made_with=about.made_with(noted),
        cost=about.cost(noted),
        investigation=str(noted.get("investigation", "")),
        replay_of=str(noted.get("replay_of", "")),
        ran=len(runs),
        failed=sum(facts.get("state", "complete") != "complete" for facts in runs),
        seconds=sum(float(facts.get("seconds", 0)) for facts in runs),
        calls=_calls(state_dir, handle) if handle and not noted.get("replay_of") else None,
        findings=_submissions(record, _grades(state_dir, path, handle)),
        plots=plots[:PLOTS],
        more_plots=max(0, len(plots) - PLOTS),
        trouble=trouble,
    )


def _run(cell: dict[str, Any]) -> dict[str, Any] | None:
    """What is known of the last run of a code cell; None if it was never run."""
    noted = about.facts(cell["metadata"])
    if noted.get("run"):
        return dict(noted) if noted.get("state") != "not_run" else None
    return {} if cell.get("execution_count") else None


def _plots(code: Sequence[dict[str, Any]]) -> list[Plot]:
    return [
        Plot(cell["id"], kind, data)
        for cell in code
        for index, output in enumerate(cell["outputs"])
        if "data" in output
        for kind, data in as_piece(index, output).images
    ]


def _grades(state_dir: Path, path: Path, handle: str) -> dict[int, str]:
    """Of each submission's number what a grader said."""
    return {
        int(one["number"]): f"{one['score']:.2f}" if one["score"] is not None else "not graded"
        for one in kept(state_dir)[0]
        if one.get("sandbox") == handle and Path(str(one.get("notebook"))).name == path.name
    }


def _submissions(record: Sequence[Any], grades: dict[int, str]) -> list[Submission]:
    found: list[Submission] = []
    for number, one in enumerate((each for each in record if isinstance(each, dict)), 1):
        confidence = one.get("confidence")
        found.append(
            Submission(
                number,
                str(one.get("claim", "")),
                str(one.get("answer", "")),
                float(confidence) if isinstance(confidence, (int, float)) else None,
                _named(one.get("evidence")),
                _named(one.get("controls")),
                str(one.get("limits", "")),
                grades.get(number, ""),
            )
        )
    return found


def _named(cells: Any) -> tuple[str, ...]:
    if not isinstance(cells, list):
        return ()
    return tuple(str(each.get("cell", "")) for each in cells if isinstance(each, dict))


def _calls(state_dir: Path, handle: str) -> int | None:
    """How many calls the audit has of a sandbox, its start among them."""
    begun, named = 0, f'"{handle}"'
    try:
        with (state_dir / "audit.jsonl").open(encoding="utf-8", errors="replace") as file:
            for line in file:
                if named not in line:
                    continue
                try:
                    event = json.loads(line)
                    begun += event["event"] == "call" and event["arguments"]["sandbox"] == handle
                    begun += event["event"] == "sandbox" and event["did"] == "started"
                except (ValueError, KeyError, TypeError):
                    continue
    except OSError:
        return None
    return begun or None
