"""Other installed packages bring packs and backends by entry points; none is imported to be found."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from seer_mcp import plugins

from .support import Lab, open_lab, text_of

pytestmark = pytest.mark.anyio

POINTS = """[seer_mcp.packs]
lab = lab_packs
inside = lab_packs.inner
gone = not_installed_anywhere

[seer_mcp.backends]
lab = lab_backend:LabBackend
local = lab_backend:Never
"""
PACK = '''"""Packs of a lab."""
__all__ = ["double"]


def double(x):
    """What is twice as much?

    Use when:
        You have half.
    """
    return 2 * x
'''
BACKEND = """from seer_mcp.backends.local import LocalBackend


class LabBackend(LocalBackend):
    pass
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A distribution in a folder of its own on sys.path."""
    site = tmp_path / "site"
    info = site / "lab_tools-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lab-tools\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(POINTS)
    packs = site / "lab_packs"
    packs.mkdir()
    (packs / "__init__.py").write_text("raise RuntimeError('imported by the server')\n")
    (packs / "arithmetic.py").write_text(PACK)
    (site / "lab_backend.py").write_text(BACKEND)
    monkeypatch.syspath_prepend(str(site))
    for found in (plugins.pack_folders, plugins.backends):
        found.cache_clear()
    yield packs
    for found in (plugins.pack_folders, plugins.backends):
        found.cache_clear()
    sys.modules.pop("lab_backend", None)


@pytest.fixture
async def lab(installed: Path, tmp_path: Path):
    (installed / "__init__.py").write_text("")  # a kernel imports it, and only a kernel
    async with open_lab(tmp_path) as opened:
        yield opened


def test_folders_are_found_without_an_import(installed: Path) -> None:
    assert plugins.pack_folders() == (installed,)
    assert "lab_packs" not in sys.modules


async def test_a_pack_is_listed_and_importable(lab: Lab) -> None:
    said = await lab.ok("list_techniques", name="arithmetic.double")
    assert "What is twice as much?" in said and "from the pack folder" in said
    handle = await lab.start()
    source = "from lab_packs.arithmetic import double\ndouble(21)"
    assert text_of(await lab.cell(handle, source)).endswith("42")


async def test_a_backend_is_used_by_its_name_and_ours_stay_ours(lab: Lab) -> None:
    handle = await lab.start(backend="lab")
    assert text_of(await lab.cell(handle, "6 * 7")).endswith("42")
    assert "lab, up" in await lab.ok("list_sandboxes")
    await lab.ok("stop_sandbox", sandbox=handle)
    assert text_of(await lab.cell(await lab.start(), "6 * 7")).endswith(
        "42"
    )  # not lab_backend:Never
    said = await lab.no("start_sandbox", backend="labs")
    assert "Did you mean 'lab'?" in said


def test_without_any_nothing_is_searched_at_the_start(tmp_path: Path) -> None:
    source = (
        "import sys, seer_mcp.server\n"
        "from seer_mcp import plugins\n"
        "print(plugins.pack_folders.cache_info().currsize)"
    )
    done = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout.strip() == "0"
