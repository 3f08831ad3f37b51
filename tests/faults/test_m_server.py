"""Rows M through the whole server: a client, tools, notebook and money, on a control plane of our own.

What the backend alone does is in test_m_modal.py. The ledger of the control plane is the bill.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from seer_mcp.money import parse_allowance
from seer_mcp.sessions import register as register_module
from seer_mcp.sessions import session as session_module
from seer_mcp.sessions import starts as starts_module

from ..modal_cloud.control import Controller
from ..modal_cloud.fixtures import RunningCloud, available, client_environment, running_cloud
from ..models.hub import open_hub
from ..support import Lab, open_lab, read_cells, streams, text_of, until
from ..team.test_tenancy import team
from .ground import Ground, raw_server, raw_start, raw_text

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not available(), reason="the control plane's machines need root"),
]
GPU = "T4"
BASE = Path(__file__).parent.parent.parent / "tool_packs" / "organisms" / "weights" / "base"


@pytest.fixture(scope="module")
def running() -> Iterator[RunningCloud]:
    with running_cloud() as cloud, client_environment(cloud.environment):
        yield cloud


@pytest.fixture
def control(running: RunningCloud) -> Iterator[Controller]:
    yield running.control
    running.control.clear()
    assert running.control.errors() == []


@pytest.fixture
async def lab(
    tmp_path: Path, control: Controller, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Lab]:
    """A server whose calls wait 5 s at most; whatever its sandboxes cost has ended with the test."""
    monkeypatch.setattr(register_module, "METER_SECONDS", 0.5)
    async with open_lab(tmp_path, max_wait=5.0) as opened:
        yield opened
    control.forgive()
    assert billing(control) == []


def billing(control: Controller, *but: str) -> list[str]:
    return [row["name"] for row in control.ledger() if row["running"] and row["name"] not in but]


def live(lab: Lab, handle: str) -> Any:
    return lab.client.server.register._held.sessions[handle]  # type: ignore[union-attr]


def seer_mcp(lab_folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "seer_mcp.cli", *arguments, "--state", str(lab_folder / "state")],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=lab_folder,
    )


async def ready(lab: Lab, handle: str, seconds: float = 40.0) -> dict[str, Any]:
    """Wait for a start that goes on in the background, as a client would."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        result = await lab.call("list_sandboxes", wait=5)
        for sandbox in result.meta["seer/sandboxes"]:
            if sandbox["handle"] == handle:
                return sandbox
        assert handle in text_of(result)
    raise AssertionError(f"{handle} was not ready in {seconds} s")


async def says(lab: Lab, text: str, seconds: float = 20.0, there: bool = True) -> str:
    """What list_sandboxes says as soon as it holds `text`, or no longer does."""
    end = time.monotonic() + seconds
    while (text in (listed := await lab.ok("list_sandboxes"))) != there:
        assert time.monotonic() < end, listed
        await asyncio.sleep(0.1)
    return listed


async def test_m_one_word_makes_a_sandbox_at_modal_and_its_cost_is_always_told(
    lab: Lab, control: Controller
) -> None:
    said = await lab.ok("start_sandbox", backend="modal", gpu=GPU, hours=2, estimate=True)
    assert (
        "≈ $" in said and "1 × T4" in said and "at most $" in said and "Nothing was started" in said
    )
    assert control.ledger() == []

    started = await lab.call("start_sandbox", backend="modal", gpu=GPU, hours=2, budget_dollars=3)
    assert not started.is_error, text_of(started)
    assert "≈ $" in text_of(started) and "at most $2.5" in text_of(started)
    handle = started.meta["seer/sandbox"]["handle"]
    assert text_of(await lab.cell(handle, "print(6 * 7)")).strip().endswith("42")
    listed = await lab.ok("list_sandboxes")
    assert "so far" in listed and "ends in" in listed and "0% of its budget of $3.00" in listed

    (row,) = [r for r in control.ledger() if r["name"] == handle]
    assert row["gpu"] == GPU and set(row["tags"]) == {"seer-owner", "seer-instance", "seer-handle"}
    path = await lab.notebook_path(handle)
    stopped = await lab.ok("stop_sandbox", sandbox=handle)
    assert "so far" in stopped and billing(control) == []
    kept = json.loads(path.read_text())["metadata"]["seer"]
    assert "so far" in kept["cost"] and "T4" in kept["price"] and kept["link"].startswith("http")
    assert "42" in streams(read_cells(path)[0])


async def test_m02_a_start_that_waits_answers_in_time_and_goes_on(
    lab: Lab, control: Controller
) -> None:
    control.capacity(T4=0)
    began = time.monotonic()
    first = await lab.call("start_sandbox", backend="modal", gpu=GPU)
    assert time.monotonic() - began < 20 and not first.is_error
    handle = first.meta["seer/starting"]
    said = text_of(first)
    assert "still starting" in said and "waiting for 1 × T4" in said and "≈ $" in said
    assert "still starting" in await lab.no("create_cell", sandbox=handle, source="1")
    assert "waiting for 1 × T4" in await lab.ok("list_sandboxes", wait=0.1)
    control.capacity(T4=1)
    sandbox = await ready(lab, handle)
    assert sandbox["kernel"] == "ready"
    assert "2" in text_of(await lab.cell(handle, "1 + 1"))


async def test_m02_a_start_that_waits_is_given_up_by_stop_sandbox(
    lab: Lab, control: Controller
) -> None:
    control.capacity(T4=0)
    first = await lab.call("start_sandbox", backend="modal", gpu=GPU)
    handle = first.meta["seer/starting"]
    assert "given up" in await lab.ok("stop_sandbox", sandbox=handle)
    assert billing(control) == []
    assert sum(row["seconds"] for row in control.ledger() if row["name"] == handle) < 10
    assert "No sandbox" in await lab.no("stop_sandbox", sandbox=handle)


async def test_m06_a_start_that_fails_in_the_background_says_why(
    lab: Lab, control: Controller
) -> None:
    control.forget_images()
    control.build_seconds(seconds=6)
    control.fail_build(match="", log="E: no such package nonsense")
    first = await lab.call("start_sandbox", backend="modal")
    assert not first.is_error and "building the image" in text_of(first)
    handle = first.meta["seer/starting"]
    assert "no such package nonsense" in await says(lab, "image could not be built")
    assert "image could not be built" in await lab.no("create_cell", sandbox=handle, source="1")
    assert billing(control) == []
    control.build_seconds(seconds=0)


async def test_m03_without_a_token_one_sentence_says_what_to_do(
    lab: Lab, control: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.refuse(status="UNAUTHENTICATED")
    began = time.monotonic()
    said = await lab.no("start_sandbox", backend="modal")
    assert time.monotonic() - began < 5 and "modal token" in said and "\n" not in said.strip()


async def test_m08_an_unconfirmed_end_is_said_in_every_answer_until_it_is_sure(
    lab: Lab, control: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seer_mcp.backends.modal import sandbox as modal_sandbox

    monkeypatch.setattr(modal_sandbox, "END_SECONDS", 1.0)
    monkeypatch.setattr(session_module, "INSIST_SECONDS", 1.0)
    handle = await lab.start(backend="modal")
    id = live(lab, handle).record()["sandbox"]["id"]
    control.fault(rpc="SandboxTerminate*", status="PERMISSION_DENIED", times=0)
    monkeypatch.setattr(modal_sandbox.ModalSandbox, "_ask_to_stop", nothing)  # the line is down too
    said = await lab.no("stop_sandbox", sandbox=handle)
    assert "STILL BILLING" in said and id in said
    assert "STILL BILLING" in await lab.no("create_cell", sandbox=handle, source="1")
    listed = await lab.ok("list_sandboxes")
    assert "STILL BILLING" in listed and "so far" in listed
    assert billing(control) == [handle]
    control.forgive()
    for _ in range(100):
        if not billing(control):
            break
        await asyncio.sleep(0.1)
    assert billing(control) == []
    assert "STILL BILLING" not in await says(lab, f"{handle}: ended")


async def test_m08_a_failed_start_that_may_still_cost_money_says_why_and_how_much(
    lab: Lab, control: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seer_mcp.backends.modal import backend as modal_backend
    from seer_mcp.backends.modal import sandbox as modal_sandbox

    monkeypatch.setattr(modal_sandbox, "END_SECONDS", 0.5)
    monkeypatch.setattr(modal_backend, "BOOT_SECONDS", 1.2)
    control.fault(rpc="TaskExecStart", status="PERMISSION_DENIED", times=0)
    control.fault(rpc="SandboxTerminate*", status="PERMISSION_DENIED", times=0)
    await lab.call("start_sandbox", backend="modal", gpu=GPU)  # perhaps not over within the call
    listed = await says(lab, "STILL BILLING")
    (handle,) = billing(control)
    said = await lab.no("create_cell", sandbox=handle, source="1")
    assert said.startswith("The sandbox did not start: "), said
    for text in (said, listed):
        assert "The sandbox did not start: " in text and "Nothing was left running" not in text
        assert f"STILL BILLING: sandbox {handle}" in text and "so far" in text
    control.forgive()
    for _ in range(100):
        if not billing(control):
            break
        await asyncio.sleep(0.1)
    assert billing(control) == []


async def nothing(self: Any) -> None:
    return


async def test_m14_a_budget_is_told_and_then_ends_its_sandbox(
    lab: Lab, control: Controller, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = await lab.start(backend="modal", gpu=GPU, budget_dollars=1)
    meter = live(lab, handle).meter
    meter.began -= 0.9 / meter.price.per_second  # as if it had run for so long
    said = text_of(await lab.cell(handle, "1 + 1"))
    assert "BUDGET: 9" in said and "at 100% it is stopped" in said
    meter.began -= 0.2 / meter.price.per_second
    for _ in range(200):
        if not billing(control):
            break
        await asyncio.sleep(0.1)
    assert billing(control) == []
    listed = await says(lab, f"{handle}: ended")
    assert "ended (the budget of this sandbox is used up" in listed


async def test_m14_what_all_sandboxes_may_cost_refuses_the_next(
    tmp_path: Path, control: Controller
) -> None:
    allowances = (parse_allowance("$1"),)  # not of a day: the hour below may begin yesterday
    async with open_lab(tmp_path, max_wait=5.0, allowances=allowances) as lab:
        handle = await lab.start(backend="modal", gpu=GPU)
        meter = live(lab, handle).meter
        meter.began -= 0.99 / meter.price.per_second
        meter.note()
        said = await lab.no("start_sandbox", backend="modal", gpu=GPU)
        assert "budget of all sandboxes" in said and "$1.00" in said
        assert "BUDGET: 99%" in await lab.ok("list_sandboxes")
        assert billing(control) == [handle]
        local = await lab.start()  # what costs nothing can be started
        assert "2" in text_of(await lab.cell(local, "1 + 1"))
    assert billing(control) == []


async def test_m14_what_one_person_may_cost_refuses_that_persons_next(
    place: Ground, control: Controller
) -> None:
    budget = {"owner_allowances": (parse_allowance("$1"),)}
    async with team(place, team_backends=("modal",), max_wait=5.0, **budget) as (server, anna, ben):
        handle = await anna.start(backend="modal", gpu=GPU)
        meter = (await server.register.get(handle, "anna")).meter
        meter.began -= 0.99 / meter.price.per_second
        meter.note()
        said = await anna.no("start_sandbox", backend="modal", gpu=GPU)
        assert "the budget of your own sandboxes is used up" in said and "$1.00" in said
        assert "--owner-budget" in said and "all sandboxes" not in said
        listed = await anna.ok("list_sandboxes")
        assert "BUDGET: 99%" in listed and "the owner's sandboxes" in listed
        second = await ben.start(backend="modal", gpu=GPU)
        assert "BUDGET" not in await ben.ok("list_sandboxes")
        assert sorted(billing(control)) == sorted([handle, second])
    assert billing(control) == []


async def test_m_the_end_is_told_before_it_comes_and_can_be_moved(
    lab: Lab, control: Controller
) -> None:
    handle = await lab.start(backend="modal", hours=0.1)
    said = text_of(await lab.cell(handle, "1 + 1"))
    assert "ENDS SOON" in said and "extend_sandbox" in said
    for short in ({"minutes": 0.01}, {"idle_minutes": 0.5}):  # over before the next call
        assert "stop_sandbox" in await lab.no("extend_sandbox", sandbox=handle, **short)
    moved = await lab.ok("extend_sandbox", sandbox=handle, minutes=40)
    assert "ends in 40 min" in moved
    assert "ENDS SOON" not in text_of(await lab.cell(handle, "1 + 1"))
    far = await lab.ok("extend_sandbox", sandbox=handle, minutes=10_000)
    assert "as far as its time limit or budget allows" in far


async def test_m_files_of_a_snapshot_are_there_again_and_variables_are_said_not_to_be(
    lab: Lab, control: Controller
) -> None:
    handle = await lab.start(backend="modal")
    await lab.cell(handle, "x = 41; open('kept.txt', 'w').write('kept')")
    said = await lab.call("snapshot_sandbox", sandbox=handle)
    assert not said.is_error, text_of(said)
    assert "does not hold the kernel's memory" in text_of(said)
    await lab.ok("stop_sandbox", sandbox=handle)
    again = await lab.call(
        "start_sandbox", backend="modal", from_snapshot=said.meta["seer/snapshot"]
    )
    assert not again.is_error and "variables are gone" in text_of(again)
    second = again.meta["seer/sandbox"]["handle"]
    answer = text_of(await lab.cell(second, "print(open('kept.txt').read(), 'x' in globals())"))
    assert "kept False" in answer
    local = await lab.start()
    assert "no snapshots" in await lab.no("snapshot_sandbox", sandbox=local)


async def test_t01_no_sandbox_is_started_from_a_snapshot_of_somebody_else(
    place: Ground, control: Controller
) -> None:
    async with team(place, team_backends=("modal",), max_wait=5.0) as (_, anna, ben):
        handle = await anna.start(backend="modal")
        made = (await anna.call("snapshot_sandbox", sandbox=handle)).meta["seer/snapshot"]
        kept = place.folder / "state" / "snapshots.jsonl"
        assert kept.stat().st_mode & 0o777 == 0o600
        with kept.open("a") as file:
            file.write('{"snapshot": "cut sho')
        never = "im-neverneverneverneve"
        theirs = await ben.no("start_sandbox", backend="modal", from_snapshot=made)
        nobodys = await ben.no("start_sandbox", backend="modal", from_snapshot=never)
        assert theirs.replace(made, "X") == nobodys.replace(never, "X")
        assert "snapshot_sandbox makes one" in theirs
        assert made in await anna.no("start_sandbox", backend="modal", from_snapshot=never)
        again = await anna.start(backend="modal", from_snapshot=made)
        assert sorted(billing(control)) == sorted([handle, again])


async def test_m05_a_server_killed_in_mid_cell_is_followed_by_the_next_one(
    place: Ground, running: RunningCloud, control: Controller
) -> None:
    env = dict(running.environment)
    with raw_server(place, "--on-exit", "keep", env=env) as server:
        handle = raw_start(server, backend="modal")
        loop = "import time\nfor i in range(400):\n    print('line', i)\n    time.sleep(0.01)"
        begun = server.call("create_cell", sandbox=handle, source=loop, wait=0.5)
        cell = begun["_meta"]["seer/run"]["cell"]
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
    assert billing(control) == [handle]
    with raw_server(place, "--on-exit", "stop", env=env) as server:
        state = "running"
        end = time.monotonic() + 60
        while state == "running" and time.monotonic() < end:
            answer = server.call("read_outputs", sandbox=handle, cell=cell)
            state = answer["_meta"]["seer/run"]["state"]
        assert state == "complete"
        listed = raw_text(server.call("list_sandboxes"))
        assert "so far" in listed and f"{handle}: modal" in listed
        assert not server.call("stop_sandbox", sandbox=handle).get("isError")
    (path,) = place.project.glob("outputs/*/*.ipynb")
    assert streams(read_cells(path)[0]).split("\n") == [*(f"line {i}" for i in range(400)), ""]
    assert billing(control) == []


# -- Modal's API is away for minutes --------------------------------------------------------------

AWAY = ["down", pytest.param("mute", marks=pytest.mark.slow)]


def go_away(control: Controller, how: str) -> None:
    """The control plane refuses every call, or takes them and never answers."""
    if how == "down":
        control.down(seconds=3600)
    else:
        for rpc in ("Sandbox*", "App*", "Image*", "Volume*", "Mount*", "Secret*", "Environment*"):
            control.fault(rpc=rpc, delay=3600, times=0)


@pytest.fixture
def hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five minutes, compressed: of what is waited for, a small part."""
    from seer_mcp.backends.modal import backend, sandbox

    for module in (backend, sandbox):
        monkeypatch.setattr(module, "ASK_SECONDS", 1.5)
    monkeypatch.setattr(backend, "ANSWER_SECONDS", 6.0)
    monkeypatch.setattr(sandbox, "END_SECONDS", 3.0)
    monkeypatch.setattr(sandbox, "POLITE_SECONDS", 1.0)
    monkeypatch.setattr(sandbox, "CLOSING_SECONDS", 2.0)
    for module in (session_module, starts_module):
        monkeypatch.setattr(module, "INSIST_SECONDS", 1.0)


@pytest.mark.parametrize("how", ["down", "mute"])
async def test_m_an_api_that_is_away_refuses_a_start_in_one_sentence(
    lab: Lab, control: Controller, hurried: None, how: str
) -> None:
    made = len(control.ledger())
    go_away(control, how)
    first = await lab.call("start_sandbox", backend="modal", gpu=GPU)
    said = text_of(first)
    if not first.is_error:
        said = await says(lab, "did not start", 90)
    assert "Modal cannot be reached" in said and "Traceback" not in said
    assert len(control.ledger()) == made
    control.forgive()
    handle = await lab.start(backend="modal", gpu=GPU)
    assert "2" in text_of(await lab.cell(handle, "1 + 1"))


@pytest.mark.parametrize("how", AWAY)
async def test_m_an_api_that_is_away_leaves_the_work_and_is_told_at_the_end(
    lab: Lab, control: Controller, hurried: None, how: str
) -> None:
    handle = await lab.start(backend="modal")
    id = live(lab, handle).record()["sandbox"]["id"]
    go_away(control, how)
    assert "2" in text_of(await lab.cell(handle, "1 + 1"))  # the line is another
    assert f"{handle}: modal" in await lab.ok("list_sandboxes")
    control.fault(rpc="Task*", status="FAILED_PRECONDITION", times=0)  # now the line is down too
    control.cut()
    began = time.monotonic()
    listed = await lab.ok("list_sandboxes")
    assert "no answer" in listed and "so far" in listed
    stopped = await lab.no("stop_sandbox", sandbox=handle)
    assert f"STILL BILLING: sandbox {handle} ({id})" in stopped and "cannot be reached" in stopped
    assert "STILL BILLING" in await lab.ok("list_sandboxes")
    assert "STILL BILLING" in await lab.no("create_cell", sandbox=handle, source="1")
    assert time.monotonic() - began < 60
    assert billing(control) == [handle]
    control.forgive()
    await until(lambda: billing(control) == [], 30)
    assert "STILL BILLING" not in await says(lab, f"{handle}: ended")


@pytest.mark.parametrize("how", AWAY)
async def test_m_an_api_that_goes_away_in_a_start_keeps_what_is_billed_in_sight(
    lab: Lab, control: Controller, hurried: None, how: str
) -> None:
    control.capacity(T4=0)
    first = await lab.call("start_sandbox", backend="modal", gpu=GPU)
    handle = first.meta["seer/starting"]
    go_away(control, how)
    control.capacity(T4=1)  # it gets its machine while nobody can be told
    await until(lambda: billing(control) == [handle], 20)
    assert "waiting for 1 × T4" in await lab.ok("list_sandboxes")
    began = time.monotonic()
    said = await lab.no("stop_sandbox", sandbox=handle)
    assert time.monotonic() - began < 45
    assert f"STILL BILLING: sandbox {handle}" in said and "cannot be reached" in said
    assert "STILL BILLING" in await lab.ok("list_sandboxes")
    control.forgive()
    await until(lambda: billing(control) == [], 30)
    listed = await says(lab, "STILL BILLING", there=False)
    assert f"{handle}: The sandbox did not start" in listed
    assert "What it had left has ended. It cost $" in listed


async def test_m_a_stop_that_takes_longer_than_a_call_may_says_so_and_goes_on(
    lab: Lab, control: Controller, hurried: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from seer_mcp.backends.modal import sandbox
    from seer_mcp.sessions import register, starts

    monkeypatch.setattr(sandbox, "END_SECONDS", 60.0)
    for module in (register, starts):
        monkeypatch.setattr(module, "STOP_SECONDS", 3.0)
    handle = await lab.start(backend="modal")
    id = live(lab, handle).record()["sandbox"]["id"]
    control.down(seconds=3600)
    began = time.monotonic()
    said = await lab.no("stop_sandbox", sandbox=handle)
    assert time.monotonic() - began < 30
    assert f"STILL BILLING: sandbox {handle} ({id})" in said and "no word" in said
    control.forgive()
    await until(lambda: billing(control) == [], 60)
    await says(lab, f"{handle}: ended")


async def test_m_a_start_outlives_an_api_that_was_away(
    lab: Lab, control: Controller, hurried: None
) -> None:
    control.capacity(T4=0)
    first = await lab.call("start_sandbox", backend="modal", gpu=GPU)
    handle = first.meta["seer/starting"]
    control.down(seconds=3600)
    control.capacity(T4=1)
    calls = sum(control.calls().values())
    await until(lambda: sum(control.calls().values()) > calls + 6, 60)  # it has asked in vain
    control.forgive()
    assert (await ready(lab, handle, 60))["kernel"] == "ready"
    assert "2" in text_of(await lab.cell(handle, "1 + 1"))


async def test_m08_a_machine_that_fetches_a_model_is_said_to_bill_until_its_end_is_confirmed(
    tmp_path: Path, control: Controller, hurried: None
) -> None:
    with open_hub() as hub:
        hub.add_folder("lab/base", BASE)
        hub.fault("/repos/", hold=1 << 20)
        fetch_env = {"HF_ENDPOINT": hub.url}
        async with open_lab(tmp_path, max_wait=5.0, fetch_env=fetch_env) as lab:
            (lab.folder / "project" / "study").mkdir()
            (lab.folder / "project" / "study" / "investigation.toml").write_text(
                '[sandbox]\nbackend = "modal"\nbudget = "$1"\n[[models]]\nname = "lab/base"\n'
            )
            first = await lab.call("start_sandbox", investigation="study")
            handle = first.meta["seer/starting"]
            await says(lab, "fetching lab/base: 1.")
            (fetcher,) = billing(control)
            control.fault(rpc="SandboxTerminate*", status="PERMISSION_DENIED", times=0)
            said = await lab.no("stop_sandbox", sandbox=handle)
            assert f"STILL BILLING: sandbox {fetcher}" in said
            tried = control.calls()["SandboxTerminateV2"]
            await until(lambda: control.calls()["SandboxTerminateV2"] > tried + 2, 30)
            assert "STILL BILLING" in await lab.ok("list_sandboxes")
            assert billing(control) == [fetcher]
            control.forgive()
            await until(lambda: billing(control) == [], 30)
            await says(lab, "STILL BILLING", there=False)


# -- the laptop sleeps ----------------------------------------------------------------------------

DOZES = """
from seer_mcp import kernel
from seer_mcp.backends.modal import sandbox
kernel.PING_SECONDS, sandbox.SILENCE_SECONDS = 0.5, 2.0
"""


def bridges(control: Controller, handle: str) -> int:
    """Commands in the sandbox that somebody's line to its host goes through."""
    found = 0
    for pid in control.processes(sandbox=handle):
        with suppress(psutil.NoSuchProcess):
            found += "kernel_host.attach" in psutil.Process(pid).cmdline()
    return found


async def test_m_a_server_that_slept_longer_than_its_line_lasts_goes_on_with_everything(
    place: Ground, running: RunningCloud, control: Controller
) -> None:
    code = (
        "import time\nopen('runs', 'a').write('x')\nfor i in range(500):\n"
        "    print('line', i, flush=True)\n    time.sleep(0.02)"
    )
    with raw_server(place, env=dict(running.environment), before=DOZES) as server:
        handle = raw_start(server, backend="modal")
        asked = server.send(
            "tools/call",
            name="create_cell",
            arguments={"sandbox": handle, "source": code, "wait": 45},
        )
        await until(lambda: bridges(control, handle) == 1)
        path = next(place.project.glob("outputs/*/*.ipynb"))
        await until(lambda: "line 3" in path.read_text(), 20)
        server.process.send_signal(signal.SIGSTOP)
        await until(lambda: bridges(control, handle) == 0, 20)  # the host hears nobody any more
        late = server.send(
            "tools/call",
            name="create_cell",
            arguments={"sandbox": handle, "source": "print(open('runs').read())", "wait": 45},
        )
        server.process.send_signal(signal.SIGCONT)
        answers = {number: server.answer(number, 60)["result"] for number in (asked, late)}
        assert not [answer for answer in answers.values() if answer.get("isError")]
        assert raw_text(answers[late]).rstrip().endswith("x")
        assert answers[asked]["_meta"]["seer/run"]["state"] == "complete"
        assert not server.call("stop_sandbox", sandbox=handle).get("isError")
    cells = read_cells(path)
    assert streams(cells[0]) == "".join(f"line {i}\n" for i in range(500))
    assert streams(cells[1]) == "x\n"
    assert billing(control) == []


async def test_m13_what_a_server_that_never_wakes_left_ends_at_its_idle_limit(
    place: Ground, running: RunningCloud, control: Controller
) -> None:
    with raw_server(place, env=dict(running.environment), before=DOZES) as server:
        handle = raw_start(server, backend="modal", idle_minutes=0.1)
        server.call("create_cell", sandbox=handle, source="print('kept')")
        server.process.send_signal(signal.SIGSTOP)
        slept = time.time()
        await until(lambda: billing(control) == [], 6 + 30)
        (row,) = [row for row in control.ledger() if row["name"] == handle]
        assert row["why"] == "exit" and row["ended"] - slept < 6 + 30
        server.process.send_signal(signal.SIGCONT)  # it wakes after all, and says so
        end = time.monotonic() + 30
        while f"{handle}: ended" not in (listed := raw_text(server.call("list_sandboxes"))):
            assert time.monotonic() < end, listed
            await asyncio.sleep(0.2)
        assert "idle" in listed
    (path,) = place.project.glob("outputs/*/*.ipynb")
    assert streams(read_cells(path)[0]) == "kept\n"


@pytest.mark.parametrize("machine", [{}, pytest.param({"gpu": GPU}, marks=pytest.mark.slow)])
async def test_m05_a_machine_of_a_start_that_its_server_did_not_survive_is_ended(
    place: Ground, running: RunningCloud, control: Controller, machine: dict[str, str]
) -> None:
    env = {**running.environment, "SEER_MCP_FAULT": "after:sandbox.created:1"}
    with raw_server(place, env=env) as server:
        asked = {"backend": "modal", "name": "half", **machine}
        server.send("tools/call", name="start_sandbox", arguments=asked)
        server.process.wait(timeout=30)
    (handle,) = billing(control)
    with raw_server(place, env=dict(running.environment)) as server:
        listed = raw_text(server.call("list_sandboxes"))
        assert billing(control) == []
        assert f"{handle}: " in listed and "its server ended before its start was over" in listed
        assert "ended by the next server" in listed and "no server was there" not in listed


async def test_m05_what_no_record_knows_of_is_swept_and_what_is_another_servers_is_not(
    tmp_path: Path, control: Controller
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    async with open_lab(there) as other, open_lab(here, on_exit="keep") as lab:
        foreign = await other.start(backend="modal", name="foreign")
        lost = await lab.start(backend="modal", name="lost")
        used = await lab.start(backend="modal", name="used")
        session = live(lab, lost)
        await session.let_go()
        session.ended = "its record is lost"
        for file in session.state_dir.iterdir():
            file.unlink()
        session.state_dir.rmdir()
        listed = seer_mcp(here, "sandboxes", "list", "--json")
        told = {s["handle"]: s for s in json.loads(listed.stdout)["sandboxes"]}
        assert told[used]["state"] == "runs" and told[used]["server"] and lost not in told

        swept = seer_mcp(here, "sandboxes", "sweep")
        assert swept.returncode == 0, swept.stdout + swept.stderr
        assert f"{lost} ran although no record knew of it" in swept.stdout
        assert sorted(billing(control)) == sorted([foreign, used])
        assert "2" in text_of(await lab.cell(used, "1 + 1"))
        assert "2" in text_of(await other.cell(foreign, "1 + 1"))

        stopped = seer_mcp(here, "sandboxes", "stop", used)
        assert stopped.returncode == 0 and "ended" in stopped.stdout
        assert billing(control) == [foreign]
        await says(lab, f"{used}: ended")
    assert billing(control) == []


async def test_m05_a_server_that_starts_ends_what_is_billed_and_in_no_record(
    tmp_path: Path, control: Controller
) -> None:
    async with open_lab(tmp_path, on_exit="keep") as lab:
        lost = await lab.start(backend="modal", name="lost")
        folder = live(lab, lost).state_dir
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    assert billing(control) == [lost]
    async with open_lab(tmp_path) as lab:
        for _ in range(100):
            if not billing(control):
                break
            await asyncio.sleep(0.1)
        assert billing(control) == []
        await says(lab, f"{lost} ran although no record knew of it")


@pytest.mark.slow
async def test_m_stop_all_ends_what_no_server_holds(tmp_path: Path, control: Controller) -> None:
    async with open_lab(tmp_path, on_exit="keep") as lab:
        handles = [await lab.start(backend="modal"), await lab.start()]
        path = await lab.notebook_path(handles[0])
        await lab.cell(handles[0], "print('before')")
    assert billing(control) == [handles[0]]
    done = seer_mcp(tmp_path, "sandboxes", "stop", "--all")
    assert done.returncode == 0, done.stdout + done.stderr
    assert all(f"{handle}: ended" in done.stdout for handle in handles)
    assert billing(control) == []
    assert json.loads(path.read_text())["metadata"]["seer"]["ended"]
    listed = json.loads(seer_mcp(tmp_path, "sandboxes", "list", "--json").stdout)["sandboxes"]
    assert [one["state"] for one in listed] == ["ended", "ended"]
    assert listed[0]["dollars"] > 0 or listed[1]["dollars"] > 0


async def test_m_an_investigation_says_what_its_sandbox_is(lab: Lab, control: Controller) -> None:
    folder = lab.folder / "project" / "puzzle"
    folder.mkdir()
    (folder / "notes.txt").write_text("look at layer 3")
    (folder / "investigation.toml").write_text(
        '[sandbox]\nbackend = "modal"\ngpu = "L4"\nbudget = "$2"\nfiles = {"notes.txt" = "notes.txt"}\n'
    )
    said = await lab.ok("start_sandbox", investigation="puzzle", estimate=True)
    assert "1 × L4" in said
    started = await lab.call("start_sandbox", investigation="puzzle", gpu=GPU)
    assert not started.is_error, text_of(started)
    handle = started.meta["seer/sandbox"]["handle"]
    assert handle.startswith("puzzle-") and "$2.00" in text_of(started)
    assert "look at layer 3" in text_of(await lab.cell(handle, "print(open('notes.txt').read())"))
    (row,) = [r for r in control.ledger() if r["name"] == handle]
    assert row["gpu"] == GPU  # what is asked for goes over what the file says


async def test_m10_a_machine_that_is_taken_away_is_said_with_how_to_start_such_a_one(
    lab: Lab, control: Controller
) -> None:
    handle = await lab.start(backend="modal", gpu=GPU)
    begun = await lab.cell(
        handle, "import time\nprint('before', flush=True)\ntime.sleep(60)", wait=1
    )
    cell = begun.meta["seer/run"]["cell"]
    control.preempt(sandbox=handle)
    await says(lab, f"{handle}: ended")
    read = await lab.call("read_outputs", sandbox=handle, cell=cell)
    text = text_of(read)
    assert read.meta["seer/run"]["state"] == "sandbox_lost"
    assert "before" in text.splitlines() and "Modal took it away" in text
    assert "host process" not in text
    path = await lab.notebook_path(handle)
    assert f"start_sandbox(notebook='{path}', backend='modal', gpu='{GPU}')" in text
    again = await lab.no("create_cell", sandbox=handle, source="1")
    assert "backend='modal'" in again and f"gpu='{GPU}'" in again
    assert streams(read_cells(path)[0]) == "before\n"
    assert billing(control) == []


@pytest.mark.slow
async def test_m_the_demo_runs_at_modal(
    tmp_path: Path, running: RunningCloud, control: Controller
) -> None:
    done = await asyncio.to_thread(
        lambda: subprocess.run(
            [sys.executable, "-m", "seer_mcp.cli", "demo", "--backend", "modal", "--json"],
            capture_output=True,
            text=True,
            timeout=400,
            cwd=tmp_path,
            env={**os.environ, **running.environment, "SEER_MCP_STATE": str(tmp_path / "state")},
        )
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["secret_recovered"] and report["control_clear"]
    assert billing(control) == []
    assert any(row["seconds"] > 1 for row in control.ledger())
