"""Pages of the docs that several benchmarks write: each replaces its own section and nothing else."""

from __future__ import annotations

import platform
import time
from pathlib import Path

import psutil


def replace_section(page: Path, name: str, text: str) -> None:
    """Put `text` between the markers of section `name`; raises ValueError if the page has none."""
    begin, end = f"<!-- {name}: generated -->", f"<!-- end of {name} -->"
    before, found, rest = page.read_text().partition(begin)
    _, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page} has no section between {begin!r} and {end!r}")
    page.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}")


def machine() -> str:
    """The date and what the figures depend on, in one line."""
    memory = round(psutil.virtual_memory().total / 2**30)
    return (
        f"{time.strftime('%Y-%m-%d', time.gmtime())}, {psutil.cpu_count()} cores, {memory} GiB of "
        f"memory, {platform.system()}, Python {platform.python_version()}"
    )
