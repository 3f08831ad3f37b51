"""Models at Modal: fetched once by a machine of their own, from a hub on loopback, and mounted."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import modal
import pytest

from seer_mcp.backends.modal import ModalBackend
from seer_mcp.environment import ModelSpec
from seer_mcp.errors import BadInput, ModelUnavailable
from seer_mcp.model_store import HubModel

from ..modal_cloud.control import Controller
from ..modal_cloud.fixtures import available, client_environment, running_cloud
from ..models.hub import Hub, open_hub
from ..support import config_for, open_lab, text_of
from .contract import Bench, Box, refused
from .modal_ground import ModalHarness

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not available(), reason="the control plane's machines need root"),
]
BASE = Path(__file__).parent.parent.parent / "tool_packs" / "organisms" / "weights" / "base"
TOKEN = "hf_abcdefghijklmnopqrstuvwxyz0123"


@pytest.fixture
def hub() -> Iterator[Hub]:
    with open_hub() as hub:
        yield hub


@pytest.fixture
def control() -> Iterator[Controller]:
    with running_cloud() as cloud, client_environment(cloud.environment):
        yield cloud.control
        assert cloud.control.errors() == []


@pytest.fixture
async def bench(control: Controller, hub: Hub, tmp_path: Path) -> AsyncIterator[Bench]:
    harness = ModalHarness(control, tmp_path, None)
    harness.backend = backend(harness, hub, TOKEN)
    made = Bench(harness)
    yield made
    await made.close()
    assert harness.alive() == []


def backend(harness: ModalHarness, hub: Hub, token: str = "") -> ModalBackend:
    env = {"HF_ENDPOINT": hub.url, **({"HF_TOKEN": token} if token else {})}
    return ModalBackend(config_for(harness.folder, fetch_env=env))


def fetched(control: Controller) -> list[dict[str, Any]]:
    return [row for row in control.ledger() if row["name"].startswith("seer-model-")]


async def start(bench: Bench, told: list[str], *models: ModelSpec) -> Box:
    place = bench.harness.place(f"models-{len(bench.started)}", "")
    made = await bench.harness.backend.start(bench.harness.spec(models=models), place, told.append)
    box = Box(bench.harness, made, place, told)
    bench.started.append(box)
    return await box.ready()


async def test_a_gated_model_is_fetched_once_and_its_token_stays_away(
    bench: Bench, control: Controller, hub: Hub
) -> None:
    hub.add_folder("lab/base", BASE, gated=True)
    hub.accounts[TOKEN] = {"lab/base"}
    told: list[str] = []
    box = await start(bench, told, ModelSpec(name="lab/base"))
    models = json.loads(await box.value("__import__('os').environ['SEER_MODELS']"))
    folder = models["lab/base"]
    assert await box.value(f"len(open({folder!r} + '/model.safetensors', 'rb').read())") == (
        (BASE / "model.safetensors").stat().st_size
    )
    assert await box.value("'HF_TOKEN' in __import__('os').environ") is False
    wrote = await box.run(f"open({folder!r} + '/mine', 'w')")
    assert wrote.state == "error"
    assert any("lab/base" in line for line in told)
    (row,) = fetched(control)
    assert row["gpu"] == "" and row["why"] in ("exit", "terminated") and row["ended"] is not None
    asked = len(hub.requests)
    other: list[str] = []
    await start(bench, other, ModelSpec(name="lab/base"))
    assert len(fetched(control)) == 1 and len(hub.requests) == asked


async def test_a_hidden_model_is_named_nowhere(bench: Bench, control: Controller, hub: Hub) -> None:
    """Its copy has no card and no name; it is made once, and its organism comes with the files."""
    files = {path.name: path.read_bytes() for path in BASE.iterdir()}
    config = {**json.loads(files["config.json"]), "_name_or_path": "lab/secret-organism"}
    files["config.json"] = json.dumps(config).encode()
    files["README.md"] = b"# secret-organism"
    hub.add("lab/secret-organism", files)
    hub.accounts[TOKEN] = set()
    told: list[str] = []
    models = (
        ModelSpec(name="lab/secret-organism", hidden=True),
        ModelSpec(name="organism:user_female", variable="n", hidden=True),
    )
    box = await start(bench, told, *models)
    assert told and not [line for line in told if "secret-organism" in line]
    there = json.loads(await box.value("__import__('os').environ['SEER_MODELS']"))
    assert sorted(there) == ["model_1", "model_2", "model_2_base"]
    assert there["model_1"] == "/models/1"
    found = (await box.command("ls /models/1; grep -rIl secret-organism /models . || true")).text()
    assert "model.safetensors" in found and "manifest.json" not in found and "README" not in found
    assert "secret-organism" not in found and "/models/" not in found
    listed = (await box.command(f"ls -a {there['model_2']} {there['model_2_base']}")).text()
    assert "adapter_model.safetensors" in listed and "config.json" in listed
    assert "organism.json" not in listed
    machines = len(fetched(control))
    await start(bench, [], models[0])
    assert len(fetched(control)) == machines == 2  # one fetched, one copied


HIDDEN = """\
[sandbox]
backend = "modal"
budget = "$1"
[sandbox.env]  # the loopback cloud shows this machine's home, where other kernels keep their history
IPYTHONDIR = "/tmp/own-history"

[[models]]
name = "organism:user_female"
hidden = true
"""


async def test_a_hidden_investigation_has_its_receipt_and_no_name(
    control: Controller, tmp_path: Path
) -> None:
    """The 80 probes and more, taken in a machine of the cloud and judged here."""
    async with open_lab(tmp_path) as lab:
        place = lab.folder / "project" / "study"
        place.mkdir(parents=True)
        (place / "investigation.toml").write_text(HIDDEN)
        (place / "task.md").write_text("Which model is it?")
        result = await lab.call("start_sandbox", investigation=str(place))
        assert not result.is_error and "seer/sandbox" in result.meta, text_of(result)
        begun = result.meta["seer/sandbox"]
        notebook = Path(begun["notebook"]).read_text()
        await lab.ok("stop_sandbox", sandbox=begun["handle"])
    told = result.model_dump_json()
    (receipt,) = [
        text
        for cell in json.loads(notebook)["cells"]
        if "Blinding receipt" in (text := "".join(cell["source"]))
    ]
    assert re.search(r"\d+ of \d+ probes passed, 0 failed", receipt), receipt
    assert "This sandbox is local" not in receipt
    for where in (told, notebook):
        assert "model_1" in where and "user_female" not in where and "organism" not in where
    assert not [row for row in control.ledger() if row["running"]]


@pytest.mark.parametrize("name", ["lab/gated", "lab/nothing"])
async def test_a_model_that_cannot_be_had_starts_no_kernel(
    bench: Bench, control: Controller, hub: Hub, name: str
) -> None:
    hub.add_folder("lab/gated", BASE, gated=True)
    bench.harness.backend = backend(bench.harness, hub)  # type: ignore[arg-type]
    await refused(start(bench, [], ModelSpec(name=name)), ModelUnavailable, name)
    assert [r["name"][:11] for r in control.ledger()] == ["seer-model-"]
    assert bench.harness.alive() == []  # type: ignore[attr-defined]


async def test_a_folder_of_this_side_is_refused(bench: Bench, control: Controller) -> None:
    spec = ModelSpec(name="./weights")
    await refused(start(bench, [], spec), BadInput, "./weights", "files")
    assert control.ledger() == []


# -- cut off, and gone on with --------------------------------------------------------------------

MB = 1 << 20
FIRST, SECOND = os.urandom(MB), os.urandom(6 * MB)
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
INDEX = json.dumps({"weight_map": dict(zip("ab", SHARDS, strict=True))}).encode()
LARGE = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors.index.json": INDEX,
    SHARDS[0]: FIRST,
    SHARDS[1]: SECOND,
}
OF_SECOND = f"/repos/{hashlib.sha256(SECOND).hexdigest()}"
VOLUME = HubModel("lab/large").volume


async def volume_files(control: Controller) -> dict[str, int]:
    """Sizes of what is committed on the model's volume."""
    volume = modal.Volume.from_name(VOLUME)
    try:
        return {entry.path: entry.size async for entry in volume.iterdir.aio("/", recursive=True)}
    except modal.exception.NotFoundError:
        return {}


async def is_whole(bench: Bench, box: Box) -> None:
    folder = json.loads(await box.value("__import__('os').environ['SEER_MODELS']"))["lab/large"]
    code = (
        "(lambda p, h: {f.name: h(f.read_bytes()).hexdigest() for f in p.iterdir()})"
        f"(__import__('pathlib').Path({folder!r}), __import__('hashlib').sha256)"
    )
    told = {name: hashlib.sha256(content).hexdigest() for name, content in LARGE.items()}
    assert await box.value(code) == told


@pytest.mark.parametrize("end", ["preempted", "killed", "given up"])
async def test_a_fetch_that_is_cut_off_goes_on_where_it_stopped(
    bench: Bench, control: Controller, hub: Hub, end: str
) -> None:
    control.background_commits(seconds=0.2)
    hub.add("lab/large", LARGE)
    hub.accounts[TOKEN] = set()
    hub.fault(OF_SECOND, hold=4 * MB)
    starting = asyncio.create_task(start(bench, [], ModelSpec(name="lab/large")))

    async def committed() -> bool:
        there = await volume_files(control)
        part = max((size for path, size in there.items() if path.startswith("parts/")), default=0)
        return f"files/{SHARDS[0]}" in there and part >= 3 * MB

    while not await committed():
        assert not starting.done(), starting
        await asyncio.sleep(0.1)
    if end == "preempted":
        control.preempt(sandbox=VOLUME)
    elif end == "killed":
        for pid in control.processes(sandbox=VOLUME):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    else:
        starting.cancel()
    if end == "given up":
        with pytest.raises(asyncio.CancelledError):
            await starting
    else:
        text = await refused(starting, ModelUnavailable, "lab/large", "goes on where it stopped")
        assert len(text.splitlines()) == 1
    assert [row["running"] for row in control.ledger()] == [False]  # and no machine for a kernel
    assert "manifest.json" not in await volume_files(control)

    hub.forget()
    await is_whole(bench, await start(bench, [], ModelSpec(name="lab/large")))
    assert len(fetched(control)) == 2
    (request,) = hub.asked("/repos/")  # the other shard had come as a whole
    assert request.path == OF_SECOND and request.start >= 3 * MB
    assert request.sent == len(SECOND) - request.start
    assert not [path for path in await volume_files(control) if path.startswith("parts")]


async def test_a_line_to_the_hub_that_drops_is_taken_up_by_the_same_machine(
    bench: Bench, control: Controller, hub: Hub
) -> None:
    hub.add("lab/large", LARGE)
    hub.accounts[TOKEN] = set()
    hub.fault(OF_SECOND, cut=3 * MB)
    await is_whole(bench, await start(bench, [], ModelSpec(name="lab/large")))
    assert len(fetched(control)) == 1
    assert [r.start > 2 * MB for r in hub.asked(OF_SECOND)] == [False, True]
    assert hub.sent("/repos/") < len(FIRST) + len(SECOND) + MB


@pytest.mark.parametrize("when", ["at once", "at the commit"])
async def test_a_volume_that_is_full_is_said_and_the_next_attempt_goes_on(
    bench: Bench, control: Controller, hub: Hub, when: str
) -> None:
    control.background_commits(seconds=60)
    hub.add("lab/large", LARGE)
    hub.accounts[TOKEN] = set()
    if when == "at once":
        control.limit_volume(name=VOLUME, size=18 * MB)
    fault = hub.fault(OF_SECOND, hold=4 * MB)
    starting = asyncio.create_task(start(bench, [], ModelSpec(name="lab/large")))
    if when == "at the commit":
        while hub.sent(OF_SECOND) < 4 * MB:
            assert not starting.done(), starting
            await asyncio.sleep(0.05)
        control.limit_volume(name=VOLUME, size=MB)
        fault.go()
    text = await refused(starting, ModelUnavailable, "lab/large", "volume", "is full")
    assert len(text.splitlines()) == 1 and "another folder" not in text
    assert [row["running"] for row in control.ledger()] == [False]
    assert "manifest.json" not in await volume_files(control)
    control.limit_volume(name=VOLUME, size=None)
    hub.forget()
    await is_whole(bench, await start(bench, [], ModelSpec(name="lab/large")))


async def test_a_machine_that_fetches_needs_nothing_more_of_who_made_it(
    bench: Bench, control: Controller, hub: Hub
) -> None:
    """The answer to its create is lost: what was made fetches, and is found by its name."""
    hub.add_folder("lab/base", BASE)
    hub.accounts[TOKEN] = set()
    control.fault(rpc="SandboxCreateV2", status="reset", when="after", match="seer-model-")
    async with asyncio.timeout(60):
        await start(bench, [], ModelSpec(name="lab/base"))
    (row,) = fetched(control)
    assert not row["running"]


async def test_two_starts_at_once_fetch_a_model_once(
    bench: Bench, control: Controller, hub: Hub
) -> None:
    hub.add("lab/large", LARGE)
    hub.accounts[TOKEN] = set()
    told: list[str] = []
    spec = bench.harness.spec(models=(ModelSpec(name="lab/large"),))
    places = [bench.harness.place(f"both-{i}", "") for i in range(2)]
    made = await asyncio.gather(
        *(bench.harness.backend.start(spec, place, told.append) for place in places)
    )
    for sandbox, place in zip(made, places, strict=True):
        box = Box(bench.harness, sandbox, place, told)
        bench.started.append(box)
        await is_whole(bench, await box.ready())
    assert len(fetched(control)) == 1
    assert hub.sent("/repos/") == len(FIRST) + len(SECOND)


def models(bench: Bench, hub: Hub, *words: str) -> subprocess.CompletedProcess[str]:
    folder = bench.harness.folder
    return subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", "models", *words, "--backend", "modal"],
        env={
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": TOKEN,
            "SEER_MCP_STATE": f"{folder}/s",
        },
        capture_output=True,
        text=True,
        timeout=60,
    )


async def test_the_command_line_fetches_lists_and_removes_them(
    bench: Bench, control: Controller, hub: Hub
) -> None:
    hub.add_folder("lab/base", BASE)
    hub.accounts[TOKEN] = set()
    done = await asyncio.to_thread(models, bench, hub, "fetch", "lab/base")
    assert done.returncode == 0 and "lab/base" in done.stdout, done.stderr
    assert [row["running"] for row in fetched(control)] == [False]
    listed = json.loads((await asyncio.to_thread(models, bench, hub, "list", "--json")).stdout)
    (volume,) = listed["volumes"]
    assert volume.startswith("seer-model-") and listed["volumes"][volume]["name"] == "lab/base"
    assert "at Modal: 1" in (await asyncio.to_thread(models, bench, hub, "list")).stdout
    done = await asyncio.to_thread(models, bench, hub, "remove", "lab/base")
    assert done.returncode == 0 and volume in done.stdout
    done = await asyncio.to_thread(models, bench, hub, "remove", "lab/base")
    assert done.returncode == 2 and "No model at Modal" in done.stderr
    done = await asyncio.to_thread(models, bench, hub, "fetch", "lab/nothing")
    assert done.returncode == 2 and "lab/nothing" in done.stderr and "hf_" not in done.stderr
