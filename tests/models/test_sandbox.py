"""A sandbox is given its models before its kernel starts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from seer_mcp.environment import BUILTIN_PACKS, ModelSpec, SandboxSpec
from seer_mcp.errors import Conflict, ModelUnavailable
from seer_mcp.model_store import HubModel, ModelStore
from seer_mcp.packs import Packs
from seer_mcp.sessions import Register
from tests.support import config_for, read_cells, streams

from .hub import Hub

pytestmark = pytest.mark.anyio

BASE = Path(__file__).parent.parent.parent / "tool_packs" / "organisms" / "weights" / "base"
LAYERS = json.loads((BASE / "config.json").read_text())["num_hidden_layers"]
MB = 1 << 20
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123"
CODE = (
    "import json, os\n"
    "from tool_packs.models import load_model\n"
    "m = load_model('lab/base')\n"
    "print(json.dumps([m.name, m.n_layers, 'HF_TOKEN' in os.environ]))"
)


@pytest.fixture
async def register(hub: Hub, tmp_path: Path) -> AsyncIterator[Register]:
    hub.accounts[TOKEN] = {"lab/base"}
    config = config_for(tmp_path)
    fetch_env = {**config.fetch_env, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN}
    fetch_env.pop("HF_HUB_OFFLINE", None)
    config = config_for(tmp_path, models_dir=tmp_path / "models", fetch_env=fetch_env)
    register = Register(config, Packs([BUILTIN_PACKS]))
    await register.open()
    yield register
    await register.close()


async def test_a_local_sandbox_loads_a_gated_model_that_was_fetched_for_it(
    hub: Hub, register: Register, tmp_path: Path
) -> None:
    hub.add_folder("lab/base", BASE, gated=True)
    spec = SandboxSpec(models=(ModelSpec(name="lab/base"),))
    held = hub.fault("/repos/", hold=MB)

    def report(line: str) -> None:
        if "fetching lab/base: 1." in line:  # of 4.8 MB: the start says how far it is
            held.go()

    session = await register.start("local", "box", spec, "", False, report)
    assert held.going.is_set()
    hub.fault("", -1, status=500)
    asked = len(hub.requests)
    cell = session.notebook.insert("code", CODE)
    (run,) = await session.run_cells([cell])
    await asyncio.wait_for(run.over.wait(), 60)
    await session.save()
    saved = read_cells(session.notebook.path)[-1]
    assert run.state == "complete", saved
    assert json.loads(streams(saved)) == ["lab/base", LAYERS, False]
    assert len(hub.requests) == asked
    config = register.config
    store = ModelStore(config.models_dir, config.python, config.fetch_env)
    with pytest.raises(Conflict, match=session.handle):
        store.remove(HubModel("lab/base"))
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    await session.terminate("the test is over")
    assert store.remove(HubModel("lab/base")) > 0


async def test_a_model_that_cannot_be_had_leaves_no_sandbox(
    hub: Hub, register: Register, tmp_path: Path
) -> None:
    spec = SandboxSpec(models=(ModelSpec(name="lab/none"),))
    with pytest.raises(ModelUnavailable, match="the hub has no model lab/none"):
        await register.start("local", "box", spec, "", False, print)
    assert list((tmp_path / "state" / "sandboxes").iterdir()) == []
