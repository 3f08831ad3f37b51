"""The cells of the soak, and what is true of each: every line is counted in a file beside.

A cell prints a line and then writes its number into its own file of truth, with a system call of
its own. So a line of the truth was printed for certain, whatever happened to the kernel after.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINE = re.compile(r"line (\d+) (\d+)\b")
HEAD = re.compile(r"# run (\d+)\n")
FLOOD = 20_000
HUGE = 2_000_000
DISPLAY = 200_000

PRELUDE = """\
# run {number}
import os, time
from IPython.display import display
_f = os.open({truth!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
def _say(i, more=""):
    print("line {number}", i, more)
    os.write(_f, b"%d\\n" % i)
os.write(_f, b"begin\\n")
"""
POSTLUDE = """
os.write(_f, b"end\\n")
os.close(_f)
"""
EVER = "\ni = 20\nwhile True:\n    _say(i)\n    i += 1\n    time.sleep(0.01)"
SOME = "for i in range({lines}):\n    _say(i)\n    time.sleep({pause})"

BODIES = {
    "plain": SOME,
    "long": SOME,
    "cancel": SOME,
    "client killed": SOME,
    "exit": "for i in range(10):\n    _say(i)\nos._exit(7)",
    "flood": f"for i in range({FLOOD}):\n    _say(i, 'x' * 80)",
    "huge output": f"_say(0)\nprint('y' * {HUGE})\n_say(1)",
    "big display": (
        "_say(0)\ndisplay({'text/plain': 'big', 'text/html': 'z' * "
        f"{DISPLAY}}}, raw=True)\n_say(1)"
    ),
    "input": "_say(0)\ninput('a question')",
    "interrupt": "for i in range(20):\n    _say(i)" + EVER,
    "endless": "for i in range(20):\n    _say(i)\nwhile True: pass",
    "restart": "for i in range(20):\n    _say(i)" + EVER,
    "stop": "for i in range(20):\n    _say(i)" + EVER,
}
ENDLESS = ("interrupt", "endless", "restart", "stop")
# The states in which a run may end if nothing else happened to it.
ENDS = {
    "exit": {"kernel_died"},
    "input": {"error"},
    "interrupt": {"interrupted"},
    "endless": {"interrupted"},
    "restart": {"interrupted"},
    "stop": {"interrupted"},
}
# What may come on top when a fault of the surroundings fell into the run. None: it never arrived.
BY_FAULTS: dict[str, set[str | None]] = {
    "kernel killed": {"kernel_died", "not_run", None},
    "restarted": {"interrupted", "not_run", None},
    "server killed": {"not_run", None},
    "cancelled": {None},
    "refused": {None},
}


@dataclass
class Planned:
    """One run: what was sent, and what fell into its time."""

    number: int
    sandbox: str
    kind: str
    truth: Path
    lines: int = 10
    pause: float = 0.01
    hits: set[str] = field(default_factory=set[str])

    @property
    def source(self) -> str:
        body = BODIES[self.kind].replace("{lines}", str(self.lines))
        body = body.replace("{pause}", str(self.pause))
        prelude = PRELUDE.format(number=self.number, truth=str(self.truth))
        return prelude + body + POSTLUDE

    @property
    def allowed(self) -> set[str | None]:
        found: set[str | None] = {*ENDS.get(self.kind, {"complete"})}
        for hit in self.hits:
            found |= BY_FAULTS[hit]
        return found

    def said(self) -> list[str]:
        """What the cell itself wrote down."""
        return self.truth.read_text().split() if self.truth.exists() else []


@dataclass
class Verdict:
    """What is wrong with one run, and how many lines of it are lost."""

    problems: list[str]
    printed: int
    lost: int


def cells_by_run(notebook: dict[str, Any]) -> dict[int, list[dict[str, Any]]]:
    """The cells of a notebook as saved, by the number of the run in their source."""
    found: dict[int, list[dict[str, Any]]] = {}
    for cell in notebook["cells"]:
        if head := HEAD.match("".join(cell["source"])):
            found.setdefault(int(head[1]), []).append(cell)
    return found


def text_of_cell(path: Path, cell: dict[str, Any]) -> str:
    """All text that the notebook keeps of a cell's streams, also what lies beside it."""
    files = cell["metadata"].get("seer", {}).get("files", {})
    parts: list[str] = []
    for index, output in enumerate(cell["outputs"]):
        if output["output_type"] == "stream":
            beside = files.get(str(index))
            parts.append((path.parent / beside).read_text() if beside else "".join(output["text"]))
    return "".join(parts)


def numbers(text: str, run: int) -> list[int]:
    """The numbers of a run's lines, in the order in which they stand."""
    return [int(number) for found, number in LINE.findall(text) if int(found) == run]


def verdict(run: Planned, path: Path, cells: list[dict[str, Any]], read: str | None) -> Verdict:
    """Whether the notebook and `read`, the exact text from read_outputs, hold what the cell said."""
    said = run.said()
    true = [int(word) for word in said if word.isdigit()]
    problems: list[str] = []
    if said.count("begin") > 1:
        problems.append(f"it ran {said.count('begin')} times")
    if len(cells) != 1:
        if cells or None not in run.allowed or said:
            problems.append(f"it has {len(cells)} cells in the notebook")
        return Verdict(problems, len(true), 0 if cells else len(true))
    (cell,) = cells
    state = cell["metadata"].get("seer", {}).get("state")
    # An interrupt may come after the last line, a kill after the end of the cell.
    ended = "end" in said
    if state not in run.allowed and not (ended and state == "complete"):
        problems.append(f"its state is {state!r}")
    if state == "complete" and not ended:
        problems.append("it is complete and did not reach its end")
    if state in ("not_run", None) and said:
        problems.append(f"its state is {state!r}, and it ran")
    lost = 0
    for where, text in (("the notebook", text_of_cell(path, cell)), ("read_outputs", read)):
        if text is None:
            continue
        found = numbers(text, run.number)
        missing = sorted(set(true) - set(found))
        lost = max(lost, len(missing))
        if missing:
            problems.append(f"{where} lacks {len(missing)} lines, the first is {missing[0]}")
        if found != list(range(len(found))):
            problems.append(f"{where} has lines twice or out of order")
        if len(found) > len(true) + 1:
            problems.append(f"{where} has {len(found)} lines of {len(true)}")
        if run.kind == "huge output" and ended and f"{'y' * HUGE}\n" not in text:
            problems.append(f"{where} has not all of the long line")
    if run.kind == "big display" and ended:
        data = next((o["data"] for o in cell["outputs"] if o["output_type"] == "display_data"), {})
        if len("".join(data.get("text/html", ""))) != DISPLAY:
            problems.append("its display is not whole")
    return Verdict(problems, len(true), lost)


def notebook_at(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())
