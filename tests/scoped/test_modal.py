"""Scoped sandboxes at Modal, on a control plane of ours: as tools, and for a notebook on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from mcp import Client

from seer_mcp.environment import read_scope
from seer_mcp.scoped import build_scoped_server

from ..modal_cloud.control import Controller
from ..modal_cloud.fixtures import available, client_environment, running_cloud
from ..support import config_for, open_lab, text_of

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not available(), reason="the control plane's machines need root"),
]
HERE = Path(__file__).parent
# The machine of the control plane has Python and a kernel, and no numpy.
SOURCE = '''\
from tool_packs.scoped import expose

@expose
def where(text: str) -> list[str | int]:
    """A text and how long it is, with the host's name."""
    import os
    return [text, len(text), os.environ.get("SEER_TEST_PLACE", "")]
'''
MACHINE = """\
interface = "far.py"
[sandbox]
backend = "modal"
budget = "$1"
env = { SEER_TEST_PLACE = "there" }
"""


@pytest.fixture(scope="module")
def control() -> Iterator[Controller]:
    with running_cloud() as cloud, client_environment(cloud.environment):
        yield cloud.control
        assert cloud.control.errors() == []


def billing(control: Controller) -> list[str]:
    return [row["name"] for row in control.ledger() if row["running"]]


def inside(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "far.py").write_text(SOURCE)
    (folder / "far.toml").write_text(MACHINE)
    return folder / "far.py"


async def test_a_scope_runs_in_the_cloud_and_ends_with_its_server(
    control: Controller, tmp_path: Path
) -> None:
    config = config_for(tmp_path)
    async with Client(build_scoped_server(config, read_scope(inside(tmp_path / "x")))) as client:
        result = await client.call_tool("where", {"text": "'); x("})
        assert result.structured_content == {"result": ["'); x(", 6, "there"]}, text_of(result)
    assert billing(control) == []


async def test_a_notebook_here_calls_functions_there(control: Controller, tmp_path: Path) -> None:
    async with open_lab(tmp_path) as lab:
        place = lab.folder / "project" / "asking"
        inside(place / "inside")
        (place / "investigation.toml").write_text('[scoped]\nfar = "inside/far.py"\n')
        sandbox = await lab.start(investigation=str(place))
        result = await lab.cell(sandbox, "import far\nprint(far.where('abc'))")
        assert "['abc', 3, 'there']" in text_of(result)
        told = await lab.ok("list_sandboxes")
        assert "modal, scoped, for" in told and "$" in told
        await lab.ok("stop_sandbox", sandbox=sandbox)
    assert billing(control) == []
