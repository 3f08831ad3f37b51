"""`seer-mcp export` and `seer-mcp report`: notebooks for those who only read."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from ..config import Config
from ..errors import BadInput
from ..files import write_atomic
from ..ipynb import notebook_at
from .forms import FORMS, page
from .run import read_run


def add_export(commands: Any, common: argparse.ArgumentParser) -> None:
    """The command lines of `export` and `report`."""
    export = commands.add_parser(
        "export", parents=[common], help="a finished notebook as HTML, script or Markdown"
    )
    export.add_argument("notebook", metavar="NOTEBOOK", help="the .ipynb")
    export.add_argument("--to", choices=tuple(FORMS), default="html", help="default: html")
    export.add_argument(
        "--out", metavar="FILE", help="where it is written (default: beside the notebook)"
    )
    report = commands.add_parser(
        "report", parents=[common], help="several finished notebooks as one HTML page"
    )
    report.add_argument("notebooks", metavar="NOTEBOOK", nargs="+", help="the .ipynb of a run")
    report.add_argument("--out", metavar="FILE", default="report.html", help="default: report.html")
    report.add_argument("--title", metavar="TEXT", default="Runs compared", help="of the page")


def run_export(flags: argparse.Namespace, config: Config) -> int:
    """Raises SeerError."""
    path = notebook_at(flags.notebook)
    form, suffix = FORMS[flags.to]
    out = _place(flags.out or str(path.with_suffix(f".{suffix}")), [path])
    text = form(read_run(path, config.state_dir), out)
    return _written(out, config.redactor.text(text))


def run_report(flags: argparse.Namespace, config: Config) -> int:
    """Raises SeerError."""
    paths = [notebook_at(each) for each in flags.notebooks]
    out = _place(flags.out, paths)
    runs = [read_run(path, config.state_dir) for path in paths]
    made = time.strftime("%Y-%m-%d %H:%M")
    text = page("report.html", title=flags.title, runs=runs, made=made)
    return _written(out, config.redactor.text(text))


def _place(out: str, sources: list[Path]) -> Path:
    """Where it is written. Raises BadInput."""
    path = Path(out).absolute()
    if not path.parent.is_dir():
        raise BadInput("out", out, f"there is no folder {path.parent} to write it into")
    if path.is_dir():
        raise BadInput("out", out, "it is a folder; name a file")
    if path in sources or path.suffix == ".ipynb":
        raise BadInput("out", out, "it would write over a notebook; name another file")
    return path


def _written(out: Path, text: str) -> int:
    write_atomic(out, text.encode("utf-8", "backslashreplace"))
    print(f"wrote {out}")
    return 0
