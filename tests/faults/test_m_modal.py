"""Rows M of the faults: what goes wrong at Modal, and what the bill says of it.

Each is played on a control plane of our own (tests/modal_cloud), whose ledger is the bill. `way` is how
the client makes a sandbox: one without a GPU goes another way on the wire than one with.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import modal
import pytest

from seer_mcp.backends.modal import ModalBackend, backend, sandbox
from seer_mcp.backends.modal.image import UV
from seer_mcp.environment import SandboxSpec
from seer_mcp.environment.spec import Repo
from seer_mcp.errors import BadInput, EndUnconfirmed, SandboxStartFailed, SandboxUnreachable
from seer_mcp.kernel_host.keep import GROW_SECONDS

from ..backends.contract import Bench, Box, refused, until
from ..backends.modal_ground import GPU, ROOT, ModalHarness
from ..modal_cloud.control import Controller
from ..modal_cloud.fixtures import (
    available,
    client_environment,
    forget_client,
    running_cloud,
)

pytestmark = [
    pytest.mark.anyio,
    pytest.mark.skipif(not available(), reason="the control plane's machines need root"),
]
CREATE = {"cpu": "SandboxCreateV2", "gpu": "SandboxCreate"}
TERMINATE = {"cpu": "SandboxTerminateV2", "gpu": "SandboxTerminate"}
both_ways = pytest.mark.parametrize("way", ["cpu", "gpu"])


def first(way: str) -> pytest.MarkDecorator:
    """Both ways, the other one not among the ordinary tests: what differs is tested elsewhere."""
    marks = {w: [] if w == way else [pytest.mark.slow] for w in ("cpu", "gpu")}
    return pytest.mark.parametrize("way", [pytest.param(w, marks=m) for w, m in marks.items()])


@pytest.fixture(scope="module")
def running() -> Iterator[Controller]:
    with running_cloud() as cloud, client_environment(cloud.environment):
        yield cloud.control


@pytest.fixture
def control(running: Controller) -> Iterator[Controller]:
    yield running
    running.clear()
    assert running.errors() == []


@pytest.fixture
async def bench(
    request: pytest.FixtureRequest, control: Controller, tmp_path: Path
) -> AsyncIterator[Bench]:
    """Sandboxes for one test, on its `way`; none is left behind it."""
    way = request.node.callspec.params.get("way") if hasattr(request.node, "callspec") else "cpu"
    harness = ModalHarness(control, tmp_path, GPU if way == "gpu" else None)
    made = Bench(harness)
    yield made
    control.clear()
    await made.close()
    assert harness.alive() == []


def rows(control: Controller, name: str) -> list[dict[str, Any]]:
    return [row for row in control.ledger() if row["name"] == name]


async def begin(bench: Bench, handle: str, told: list[str] | None = None, **changes: Any) -> Any:
    place = bench.harness.place(handle, "")
    report = told.append if told is not None else (lambda _: None)
    return await bench.harness.backend.start(bench.harness.spec(**changes), place, report)


# -- M01, M04: a create that fails, or whose answer is lost ---------------------------------------


FAILURES = [(s, n) for s in ("UNAVAILABLE", "INTERNAL", "DEADLINE_EXCEEDED") for n in (1, 2, 3, 6)]
ORDINARY = [
    ("cpu", "UNAVAILABLE", 1),
    ("cpu", "INTERNAL", 3),
    ("gpu", "DEADLINE_EXCEEDED", 2),
    ("gpu", "UNAVAILABLE", 6),
]


@pytest.mark.parametrize(
    ("way", "status", "times"),
    [
        pytest.param(*case, marks=[] if case in ORDINARY else [pytest.mark.slow])
        for case in [(way, *failure) for way in CREATE for failure in FAILURES]
    ],
)
async def test_m01_a_create_that_fails_a_few_times_makes_one_sandbox(
    bench: Bench, control: Controller, way: str, status: str, times: int
) -> None:
    control.fault(rpc=CREATE[way], status=status, times=times)
    made = await begin(bench, f"m01-{way}-{status[:4].lower()}-{times}")
    handle = made.record()["handle"]
    assert [row["ended"] for row in rows(control, handle)] == [None]
    await made.terminate(politely=False)
    assert [row["running"] for row in rows(control, handle)] == [False]


@both_ways
@pytest.mark.parametrize("status", ["reset", pytest.param("UNAVAILABLE", marks=[pytest.mark.slow])])
async def test_m04_a_create_whose_answer_is_lost_is_adopted(
    bench: Bench, control: Controller, way: str, status: str
) -> None:
    control.fault(rpc=CREATE[way], status=status, when="after")
    made = await begin(bench, f"m04-{way}-{status.lower()}")
    handle = made.record()["handle"]
    (row,) = rows(control, handle)
    assert row["id"] == made.record()["id"] and row["running"]
    box = Box(bench.harness, made, bench.harness.place(handle, ""), [])
    bench.started.append(box)
    assert await (await box.ready()).value("6 * 7") == 42


@first("cpu")
async def test_m04_when_no_answer_ever_comes_nothing_is_left(
    bench: Bench, control: Controller, way: str
) -> None:
    control.fault(rpc=CREATE[way], status="UNAVAILABLE", when="after", times=1)
    control.fault(rpc=CREATE[way], status="UNAVAILABLE", nth=2, times=0)
    handle = f"m04-{way}-never"
    await refused(begin(bench, handle), SandboxStartFailed, "cannot be reached")
    (row,) = rows(control, handle)
    assert row["ended"] is not None and row["seconds"] < 15


# -- M02: no machine ------------------------------------------------------------------------------


@first("gpu")
async def test_m02_no_capacity_is_said_and_nothing_is_left(
    bench: Bench, control: Controller, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = GPU if way == "gpu" else "cpu"
    control.capacity(**{kind: 0})
    monkeypatch.setattr(backend, "PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr(backend, "TOLD_SECONDS", 0.5)
    told: list[str] = []
    handle = f"m02-{way}"
    await refused(begin(bench, handle, told), SandboxStartFailed, "for 2 s", "try again later")
    assert any("so far" in line for line in told)
    (row,) = rows(control, handle)
    assert row["ended"] is not None and row["seconds"] == 0
    control.capacity(**{kind: 1})
    await asyncio.sleep(0.5)
    assert bench.harness.alive() == []


@first("cpu")
async def test_m02_a_queue_that_gives_up_is_said(
    bench: Bench, control: Controller, way: str
) -> None:
    control.capacity(patience=1, **{GPU if way == "gpu" else "cpu": 0})
    handle = f"m02-{way}-tired"
    await refused(begin(bench, handle), SandboxStartFailed, "no capacity")
    assert [row["seconds"] for row in rows(control, handle)] == [0]


@first("gpu")
async def test_m02_a_quota_is_said_and_its_pauses_are_kept(
    bench: Bench, control: Controller, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    control.fault(rpc=CREATE[way], status="RESOURCE_EXHAUSTED", times=1, message="too many GPUs")
    text = await refused(begin(bench, f"m02-{way}-quota"), SandboxStartFailed, "quota")
    assert "too many GPUs" in text and rows(control, f"m02-{way}-quota") == []
    before = control.calls().get(CREATE[way], 0)
    control.fault(rpc=CREATE[way], status="RESOURCE_EXHAUSTED", times=0, retry_after=0.5)
    monkeypatch.setattr(backend, "PATIENCE_SECONDS", 2.5)
    await refused(begin(bench, f"m02-{way}-throttled"), SandboxStartFailed, "try again later")
    assert control.calls()[CREATE[way]] - before <= 14
    assert rows(control, f"m02-{way}-throttled") == []


# -- M03: no token, a wrong one, one that may not -------------------------------------------------


@pytest.mark.parametrize("status", ["UNAUTHENTICATED", "PERMISSION_DENIED"])
async def test_m03_a_refused_token_is_answered_at_once(
    bench: Bench, control: Controller, status: str
) -> None:
    control.refuse(status=status)
    before = sum(control.calls().values())
    began = time.monotonic()
    text = await refused(begin(bench, "m03"), SandboxStartFailed, "modal token new")
    assert time.monotonic() - began < 3
    assert sum(control.calls().values()) - before <= 4, "it was asked again and again"
    assert os.environ["MODAL_TOKEN_SECRET"] not in text
    assert os.environ["MODAL_TOKEN_ID"] not in text


async def test_m03_a_wrong_token_is_answered_at_once(bench: Bench, tmp_path: Path) -> None:
    client = await modal.Client.from_credentials.aio("ak-wrong", "as-wrong-and-secret")
    wrong = ModalBackend(bench.harness.config, client)  # type: ignore[attr-defined]
    began = time.monotonic()
    start = wrong.start(bench.harness.spec(), bench.harness.place("m03-w", ""), lambda _: None)
    text = await refused(start, SandboxStartFailed, "modal token new", "did not accept")
    assert time.monotonic() - began < 3 and "as-wrong" not in text
    record = {"handle": "m03-w", "id": "sb-none"}
    await refused(wrong.find(record), SandboxUnreachable, "modal token new")
    await client.close.aio()


async def test_m03_a_missing_token_is_answered_at_once(
    control: Controller, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await asyncio.to_thread(forget_client)
    monkeypatch.delenv("MODAL_TOKEN_ID")
    monkeypatch.delenv("MODAL_TOKEN_SECRET")
    harness = ModalHarness(control, tmp_path, None)
    before = sum(control.calls().values())
    start = harness.backend.start(harness.spec(), harness.place("m03-n", ""), lambda _: None)
    await refused(start, SandboxStartFailed, "there is no Modal token", "modal token new")
    assert sum(control.calls().values()) == before


# -- M05: the server dies in a start --------------------------------------------------------------

DIES = """
import asyncio, sys
from pathlib import Path
from seer_mcp.backends.modal import ModalBackend
from seer_mcp.kernel_host.fault import arm
from tests.backends.contract import Box
from tests.backends.modal_ground import ModalHarness
harness = ModalHarness(None, Path(sys.argv[1]), sys.argv[3] or None)
arm(sys.argv[4])
async def main():
    sandbox = await harness.backend.start(harness.spec(**eval(sys.argv[5])), harness.place(sys.argv[2], ""), print)
    print("STARTED", flush=True)
    box = await Box(harness, sandbox, harness.place(sys.argv[2], ""), []).ready()
    if sys.argv[6]:
        print("RUN", (await box.submit(sys.argv[6]))[0], flush=True)
    await asyncio.sleep(3600)
asyncio.run(main())
"""


async def server(
    folder: Path, handle: str, way: str, fault: str = "", cell: str = "", **spec: Any
) -> Any:
    """A process that starts a sandbox, as a server does, and dies at a point if told to."""
    folder.mkdir(exist_ok=True)
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        DIES,
        str(folder),
        handle,
        GPU if way == "gpu" else "",
        fault,
        repr(spec),
        cell,
        stdout=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )


@first("cpu")
@pytest.mark.parametrize(
    "point",
    [
        pytest.param("sandbox.create", marks=[pytest.mark.slow]),
        "sandbox.created",
        pytest.param("sandbox.answers", marks=[pytest.mark.slow]),
    ],
)
async def test_m05_what_a_killed_start_left_is_found_and_ended(
    bench: Bench, control: Controller, way: str, point: str, tmp_path: Path
) -> None:
    handle = f"m05-{way}-{point.rpartition('.')[2]}"
    process = await server(tmp_path / "killed", handle, way, f"after:{point}:1")
    await process.communicate()
    assert process.returncode == -signal.SIGKILL
    left = [row for row in rows(control, handle) if row["ended"] is None]
    assert len(left) == (0 if point == "sandbox.create" else 1)
    again = ModalHarness(control, tmp_path / "killed", None).backend
    assert [record["id"] for record in await again.sweep("")] == [row["id"] for row in left]
    await bench.harness.backend.clear(handle)  # another state folder: nothing of its own
    assert len([r for r in rows(control, handle) if r["ended"] is None]) == len(left)
    await again.clear(handle)
    assert [row for row in rows(control, handle) if row["ended"] is None] == []


# -- M06: what fails after the machine is there ---------------------------------------------------


AFTER_CREATE = [
    ("cpu", {"rpc": "TaskExecStart", "status": "UNAVAILABLE"}),
    ("gpu", {"rpc": "TaskExecStdioRead", "status": "", "delay": 60}),
    ("gpu", {"rpc": "TaskGetCommandRouterAccess", "status": "UNAVAILABLE"}),
    *[
        (way, {"rpc": rpc, "status": status})
        for way in CREATE
        for rpc in ("TaskExecStart", "TaskExecStdioRead")
        for status in ("INVALID_ARGUMENT", "INTERNAL", "RESOURCE_EXHAUSTED")
    ],
]


@pytest.mark.parametrize(
    ("way", "fault"),
    [
        pytest.param(*case, marks=[] if i < 2 else [pytest.mark.slow])
        for i, case in enumerate(AFTER_CREATE)
    ],
    ids=[f"{way}-{f['rpc']}-{f['status'] or 'silent'}" for way, f in AFTER_CREATE],
)
async def test_m06_what_fails_after_the_create_ends_the_machine(
    bench: Bench,
    control: Controller,
    way: str,
    fault: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "BOOT_SECONDS", 2.0)
    monkeypatch.setattr(sandbox, "DIAL_SECONDS", 1.0)
    control.fault(times=0, **fault)
    handle = f"m06-{way}-{fault['rpc'].lower()[4:]}-{fault['status'].lower()}"[:60]
    began = time.time()
    await refused(begin(bench, handle), SandboxStartFailed, "did not")
    (row,) = rows(control, handle)
    assert row["ended"] is not None and row["ended"] - began < 20
    assert row["seconds"] < 10 + 2 + 2 * 1


async def test_m06_an_upload_that_fails_makes_no_machine(bench: Bench, control: Controller) -> None:
    control.fault(rpc="MountGetOrCreate", status="INVALID_ARGUMENT", times=0)
    await refused(begin(bench, "m06-upload"), SandboxStartFailed, "Modal refused")
    assert rows(control, "m06-upload") == []


async def test_m06_an_image_that_fails_makes_no_machine_and_says_its_log(
    bench: Bench, control: Controller
) -> None:
    log = "No solution found: there is no version of no-such-thing"
    control.fail_build(match="no-such-thing", log=log)
    told: list[str] = []
    start = begin(bench, "m06-image", told, python_packages=("no-such-thing",))
    await refused(start, SandboxStartFailed, "image could not be built", log)
    assert rows(control, "m06-image") == []
    assert any(line.startswith("building the image: ") for line in told)


@first("gpu")
async def test_m06_a_start_that_is_cancelled_at_any_moment_leaves_nothing(
    bench: Bench, control: Controller, way: str
) -> None:
    control.capacity(delay=0.5)
    for i, moment in enumerate((0.1, 0.3, 0.6, 0.9, 1.2)):
        starting = asyncio.create_task(begin(bench, f"m06-{way}-cut-{i}"))
        await asyncio.sleep(moment)
        starting.cancel()
        await asyncio.wait([starting])
        if not starting.cancelled():
            await starting.result().terminate(politely=False)
        assert bench.harness.alive() == []


# -- M08: an end that does not come ---------------------------------------------------------------


@first("gpu")
async def test_m08_an_end_is_asked_for_until_it_is_confirmed(
    bench: Bench, control: Controller, way: str
) -> None:
    box = await bench.start()
    control.fault(rpc=TERMINATE[way], status="UNAVAILABLE", times=9)  # more than the client tries
    await box.link.close()
    await box.sandbox.terminate(politely=False)  # type: ignore[call-arg]
    assert control.calls()[TERMINATE[way]] >= 10
    await bench.gone(box)


@first("cpu")
async def test_m08_an_end_that_cannot_be_confirmed_is_told(
    bench: Bench, control: Controller, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "END_SECONDS", 2.0)
    box = await bench.start()
    await box.link.close()
    control.fault(rpc=TERMINATE[way], status="UNAVAILABLE", times=0)
    end = asyncio.gather(
        *(box.sandbox.terminate(politely=False) for _ in range(3))  # type: ignore[call-arg]
    )
    text = await refused(end, EndUnconfirmed, "STILL BILLING", box.record["id"])
    assert box.place.handle in text
    assert await bench.harness.backend.find(box.record) is not None
    assert [r["running"] for r in rows(control, box.place.handle)] == [True]
    control.forgive()
    await box.sandbox.terminate()
    assert [r["running"] for r in rows(control, box.place.handle)] == [False]


# -- M10: preempted -------------------------------------------------------------------------------


@first("gpu")
async def test_m10_a_machine_that_is_taken_away_is_lost_with_what_it_said_kept(
    bench: Bench, control: Controller, way: str
) -> None:
    box = await bench.start()
    (id,) = await box.submit("import time\nprint('before', flush=True)\ntime.sleep(60)")
    await box.until(lambda: "before" in box.said(id))
    control.preempt(sandbox=box.place.handle)
    await box.until(lambda: box.gone, 10)
    assert box.said(id) == "before\n" and box.ends(id) == []
    assert await bench.harness.backend.find(box.record) is None
    await refused(box.status(), SandboxUnreachable, "gone")
    (row,) = rows(control, box.place.handle)
    assert row["why"] == "preempted"
    await box.link.close()


@pytest.mark.slow
@both_ways
async def test_m10_of_what_nobody_fetched_all_but_the_last_seconds_outlives_the_machine(
    bench: Bench, control: Controller, way: str
) -> None:
    box = await bench.start()
    (id,) = await box.submit("import time\nprint('kept', flush=True)\ntime.sleep(60)")
    await box.until(lambda: "kept" in box.said(id))
    await box.link.close()
    await asyncio.sleep(GROW_SECONDS + 8)  # and until Modal commits it
    control.preempt(sandbox=box.place.handle)
    await until(lambda: rows(control, box.place.handle)[0]["ended"], 10)
    local = bench.harness.folder / "journal"
    journal = await bench.harness.backend.left_behind(box.record, local)
    assert journal is not None and '"kept\\n"' in journal.read_text()
    assert await bench.harness.backend.left_behind(box.record, local) == journal  # also again


# -- M12, M13: nobody is there --------------------------------------------------------------------


@first("cpu")
async def test_m12_an_unused_sandbox_ends_though_a_line_stays_open(
    bench: Bench, control: Controller, way: str
) -> None:
    box = await bench.start(idle_limit=2)
    began = time.monotonic()
    reader, writer = await box.sandbox.dial()
    while not box.gone:  # a line that is only kept open is no use
        writer.write(b'{"id": 1, "op": "ping"}\n')
        await asyncio.sleep(0.2)
        assert time.monotonic() - began < 2 + 30
    writer.close()
    assert reader is not None and "idle" in box.events[-1]["why"]
    (row,) = rows(control, box.place.handle)
    assert row["why"] == "exit"
    await box.link.close()


@first("gpu")
async def test_m13_a_sandbox_ends_by_itself_when_its_server_is_dead(
    bench: Bench, control: Controller, way: str, tmp_path: Path
) -> None:
    handle = f"m13-{way}"
    process = await server(tmp_path / "killed", handle, way, idle_limit=2)
    while b"STARTED" not in await process.stdout.readline():
        pass
    process.kill()
    await process.communicate()
    died = time.time()
    await until(lambda: rows(control, handle)[0]["ended"], 2 + 30)
    assert rows(control, handle)[0]["ended"] - died < 2 + 30


@first("cpu")
async def test_m13_modal_ends_a_machine_whose_host_hangs(
    bench: Bench, control: Controller, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "LONGEST_SECONDS", 5.0)
    box = await bench.start()
    async with bench.harness.frozen(box.sandbox):
        await until(lambda: rows(control, box.place.handle)[0]["ended"], 20)
        await box.until(lambda: box.gone)
    (row,) = rows(control, box.place.handle)
    assert row["why"] == "timeout" and row["seconds"] < 7
    await box.link.close()


LINES = "import time\nfor i in range(200):\n    print('line', i, flush=True)\n    time.sleep(0.01)"


@first("gpu")
@pytest.mark.parametrize("moment", [0.3, pytest.param(1.1, marks=[pytest.mark.slow])])
async def test_a_server_that_is_killed_in_mid_cell_loses_no_line(
    bench: Bench, control: Controller, way: str, moment: float, tmp_path: Path
) -> None:
    handle = f"killed-{way}-{int(moment * 10)}"
    process = await server(tmp_path / "killed", handle, way, cell=LINES)
    while not (line := await process.stdout.readline()).startswith(b"RUN "):
        pass
    await asyncio.sleep(moment)
    process.kill()
    await process.communicate()
    again = ModalHarness(control, tmp_path / "killed", None)
    (record,) = await again.backend.sweep("")
    found = await again.backend.find(record)
    assert found is not None and record["handle"] == handle
    box = Box(again, found, again.place(handle, ""), [])
    done = await box.over(line.split()[1].decode())
    assert done.text() == "".join(f"line {i}\n" for i in range(200)) and done.state == "complete"
    assert box.damage == [] and [e["n"] for e in box.events] == list(range(1, len(box.events) + 1))
    await box.end()


# -- M14: money -----------------------------------------------------------------------------------


@first("cpu")
async def test_m14_a_budget_is_a_hard_stop_that_needs_no_server(
    bench: Bench, control: Controller, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "SHORTEST_SECONDS", 1.0)
    price = await bench.harness.backend.price(bench.harness.spec())
    assert price is not None
    budget = price.dollars(8)
    box = await bench.start(budget=budget)
    await box.until(lambda: box.gone, 20)  # the host ends itself a little earlier
    (row,) = rows(control, box.place.handle)
    assert row["why"] == "exit" and row["dollars"] <= budget
    await box.link.close()


async def test_m14_a_budget_that_lasts_for_nothing_is_refused(bench: Bench) -> None:
    spec = SandboxSpec(backend="modal", gpu="H100", budget=0.001)
    place = bench.harness.place("m14-small", "")
    await refused(bench.harness.backend.start(spec, place, print), BadInput, "budget", "H100")
    await refused(bench.harness.backend.price(spec), BadInput, "budget", "H100")


@first("gpu")
async def test_m14_the_bill_agrees_with_the_estimate(
    bench: Bench, control: Controller, way: str
) -> None:
    control.rates(on=False)
    price = await bench.harness.backend.price(bench.harness.spec())
    box = await bench.start()
    (row,) = rows(control, box.place.handle)
    assert price is not None
    billed = row["dollars"] / row["seconds"]
    assert abs(billed - price.per_second) / billed < 0.02


# -- what reaches the image, and the create ------------------------------------------------------


async def test_m_a_changed_pack_or_file_builds_nothing(bench: Bench, control: Controller) -> None:
    notes = bench.harness.folder / "notes.txt"  # type: ignore[attr-defined]
    pack = next(iter(bench.harness.place("m-pack", "").packs.values()))
    builds: list[int] = []
    for number in range(2):
        notes.write_text(f"version {number}")
        pack.write_text(f"ANSWER = {number}\n")
        made = await begin(bench, f"m-pack-{number}", files={"notes.txt": str(notes)})
        await made.terminate(politely=False)
        builds.append(control.stats()["builds"])
    assert builds[0] == builds[1]


@first("gpu")
async def test_m_what_an_image_is_made_of_reaches_the_wire_in_layers(
    bench: Bench, control: Controller, way: str
) -> None:
    """What changes seldom lies below; packs and files are in none of them, but sent beside the image."""
    notes = bench.harness.folder / "notes.txt"  # type: ignore[attr-defined]
    notes.write_text("first")
    pack = next(iter(bench.harness.place("m-layers", "").packs.values()))
    repo = Repo(url="https://example.org/lab/tools.git", ref="v1.0", install=True, path="lib/tools")
    asked: dict[str, Any] = {
        "system_packages": ("tmux",),
        "python_packages": ("einops==0.8.1",),
        "repos": (repo,),
        "docker": True,
        "files": {"notes.txt": str(notes)},
    }

    async def made(number: int) -> dict[str, Any]:
        handle = f"m-layers-{way}-{number}"
        await (await begin(bench, handle, **asked)).terminate(politely=False)
        return control.definition(sandbox=handle)

    before = control.stats()["builds"]
    one = await made(1)
    layers = ["\n".join(commands) for commands in control.layers(image=one["imageId"])]
    _, system, base, packages, repos = layers
    assert all(f" {name}" in system for name in ("git", "procps", "tmux", "docker.io"))
    for layer in (base, packages):
        assert f"/uv:{UV} " in layer and "uv pip install" in layer
    assert "ipykernel" in base and "einops" not in base
    assert "einops==0.8.1" in packages and "ipykernel" not in packages
    steps = (
        f"git clone --quiet https://example.org/lab/tools.git {sandbox.THERE.cwd}/lib/tools",
        "v1.0",
        f"-e {sandbox.THERE.cwd}",
    )
    assert [repos.find(step) >= 0 for step in steps] == [True] * 3
    assert sorted(map(repos.find, steps)) == list(map(repos.find, steps))
    assert not [layer for layer in layers if "notes.txt" in layer or "/seer/code" in layer]
    assert one["experimentalOptionsV2"] == {"enable_docker": "True"}
    builds = control.stats()["builds"]

    notes.write_text("second")
    pack.write_text("ANSWER = 43\n")
    two = await made(2)
    assert control.stats()["builds"] == builds
    assert two["imageId"] == one["imageId"] and two["mountIds"] != one["mountIds"]

    asked["python_packages"] = (f"einops==0.7.{len(way)}", way)  # nobody has built that yet
    three = await made(3)
    assert control.stats()["builds"] == builds + 2  # that layer, and the one upon it
    assert control.layers(image=three["imageId"])[:3] == control.layers(image=one["imageId"])[:3]
    assert builds - before <= 5


async def test_m_docker_and_the_allowed_domains_reach_the_create(bench: Bench) -> None:
    backend_of, place = bench.harness.backend, bench.harness.place("m-arguments", "")
    assert isinstance(backend_of, ModalBackend)
    spec = SandboxSpec(backend="modal", docker=True, network=("example.org",))
    told = await backend_of._arguments(spec, place, 600.0, None, [], {})
    assert told["outbound_domain_allowlist"] == ["example.org"] and not told["block_network"]
    assert told["experimental_options"] == {"enable_docker": True}


# -- bad days -------------------------------------------------------------------------------------


@first("cpu")
async def test_an_api_that_is_away_loses_nothing(
    bench: Bench, control: Controller, way: str
) -> None:
    box = await bench.start()
    (id,) = await box.submit(
        "import time\nfor i in range(60):\n    print('line', i, flush=True)\n    time.sleep(0.05)"
    )
    await box.until(lambda: "line 5\n" in box.said(id))
    for rpc in ("TaskExecStart", "TaskExecStdioRead"):  # the machine is out of reach as well
        control.fault(rpc=rpc, status="FAILED_PRECONDITION", times=0)
    control.down(seconds=60)
    control.cut()
    with pytest.raises(SandboxUnreachable):
        await bench.harness.backend.find(box.record)
    with pytest.raises(SandboxUnreachable):
        await box.link.request("status", timeout=3)
    control.forgive()
    done = await box.over(id)
    assert done.text() == "".join(f"line {i}\n" for i in range(60))
    assert box.gone is None and await box.value("1") == 1


async def test_secrets_of_modals_store_reach_the_kernel_and_missing_ones_are_named(
    bench: Bench, control: Controller
) -> None:
    control.secret(name="STORED", env={"STORED": "kept-at-modal"})
    place = bench.harness.place("m-secrets", "", secrets={"MINE": "kept-here"})  # type: ignore[call-arg]
    spec = bench.harness.spec(secrets=("MINE", "STORED"))
    made = await bench.harness.backend.start(spec, place, lambda _: None)
    box = Box(bench.harness, made, place, [])
    bench.started.append(box)
    await box.ready()
    told = await box.value("[__import__('os').environ.get(n) for n in ('MINE', 'STORED')]")
    assert told == ["kept-here", "kept-at-modal"]
    names = await box.value("sorted(__import__('os').environ)")
    assert not [name for name in names if name.startswith("MODAL_")]
    assert "kept-here" not in json.dumps(made.record()) + json.dumps(control.ledger())
    start = begin(bench, "m-no-secret", secrets=("NOWHERE",))
    await refused(start, BadInput, "NOWHERE", "modal secret create")
    assert rows(control, "m-no-secret") == []
