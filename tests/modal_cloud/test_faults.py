"""What goes wrong on purpose, and the bill: the tools that tests of the backend use."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from typing import Any

import modal
import psutil
import pytest
from modal.exception import (
    AlreadyExistsError,
    AuthError,
    ImageBuildError,
    NotFoundError,
    PermissionDeniedError,
    ResourceExhaustedError,
    ServiceError,
    UnimplementedError,
)

from .control import Controller
from .fixtures import ROOT, RunningCloud, client_environment, running_cloud
from .test_sandboxes import VERSIONS, create, ids, output, row

pytestmark = [pytest.mark.anyio, pytest.mark.slow]  # of the test server itself
CREATE = {None: "SandboxCreateV2", "H100": "SandboxCreate"}


@VERSIONS
async def test_a_create_that_is_refused_thrice_makes_one_sandbox(
    app: modal.App, cloud: Controller, gpu: str | None
) -> None:
    cloud.fault(rpc=CREATE[gpu], status="UNAVAILABLE", times=2)
    cloud.fault(rpc=CREATE[gpu], status="INTERNAL", nth=1)
    sandbox = await create(app, name="one", gpu=gpu)
    assert await ids(app) == {sandbox.object_id}


@VERSIONS
async def test_a_create_whose_answer_is_lost_exists(
    app: modal.App, cloud: Controller, gpu: str | None
) -> None:
    cloud.fault(rpc=CREATE[gpu], status="reset", when="after")
    with pytest.raises(AlreadyExistsError):
        await create(app, name="one", gpu=gpu)
    sandbox = await modal.Sandbox.from_name.aio(app.name or "", "one")
    assert await ids(app) == {sandbox.object_id}
    cloud.deduplicate(on=True)
    cloud.fault(rpc=CREATE[gpu], status="reset", when="after")
    other = await create(app, name="two", gpu=gpu)
    assert await ids(app) == {sandbox.object_id, other.object_id}


@VERSIONS
async def test_resource_exhausted_is_waited_for_only_if_the_server_says_so(
    app: modal.App, cloud: Controller, gpu: str | None
) -> None:
    cloud.fault(rpc=CREATE[gpu], status="RESOURCE_EXHAUSTED", message="quota of 1 GPU")
    with pytest.raises(ResourceExhaustedError, match="quota of 1 GPU"):
        await create(app, gpu=gpu)
    assert await ids(app) == set()
    cloud.fault(rpc=CREATE[gpu], status="RESOURCE_EXHAUSTED", retry_after=0.3, times=2)
    before = time.monotonic()
    sandbox = await create(app, gpu=gpu)
    assert time.monotonic() - before >= 0.6
    assert await ids(app) == {sandbox.object_id}


async def test_no_gpu_is_free_and_the_client_gives_up(app: modal.App, cloud: Controller) -> None:
    cloud.capacity(H100=0)
    starting = asyncio.create_task(create(app, gpu="H100", name="queued"))
    await asyncio.sleep(0.8)
    (queued,) = await ids(app)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting
    for _ in range(40):
        if await ids(app) == set():
            break
        await asyncio.sleep(0.05)
    billed = next(one for one in cloud.ledger() if one["id"] == queued)
    assert (billed["seconds"], billed["why"]) == (0, "terminated")


@VERSIONS
async def test_too_long_in_the_queue(app: modal.App, cloud: Controller, gpu: str | None) -> None:
    cloud.capacity(patience=0.3, H100=0, cpu=0)
    with pytest.raises(ResourceExhaustedError):
        await create(app, gpu=gpu)
    cloud.capacity(H100=1, cpu=1)
    first = await create(app, gpu=gpu)
    waiting = asyncio.create_task(create(app, gpu=gpu))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await first.terminate.aio()
    assert await (await waiting).poll.aio() is None


async def test_a_gpu_that_does_not_exist(app: modal.App) -> None:
    with pytest.raises(modal.exception.InvalidError, match="H1000"):
        await create(app, gpu="H1000")
    with pytest.raises(modal.exception.InvalidError, match="9 GPUs"):
        await create(app, gpu="H100:9")


async def test_builds_are_cached_logged_and_fail(
    app: modal.App, cloud: Controller, capsys: Any
) -> None:
    image = modal.Image.debian_slim(python_version="3.11").uv_pip_install("no-such-package-x")
    cloud.forget_images()
    cloud.fail_build(match="no-such-package-x", log="error: no-such-package-x was not found")
    with modal.enable_output(), pytest.raises(ImageBuildError):
        await create(app, image=image)
    assert "error: no-such-package-x was not found" in capsys.readouterr().out
    before = cloud.stats()["builds"]
    definition = modal.Image.debian_slim(python_version="3.11").uv_pip_install("no-such-package-x")
    await create(app, image=definition)
    assert cloud.stats()["builds"] == before + 1
    again = modal.Image.debian_slim(python_version="3.11").uv_pip_install("no-such-package-x")
    await create(app, image=again)
    assert cloud.stats()["builds"] == before + 1


@VERSIONS
async def test_a_machine_is_taken_away(app: modal.App, cloud: Controller, gpu: str | None) -> None:
    sandbox = await create(app, name="mine", gpu=gpu)
    process = await sandbox.exec.aio("sleep", "60")
    cloud.preempt(sandbox="mine")
    assert await sandbox.poll.aio() == 137
    with pytest.raises(NotFoundError):
        await process.wait.aio()
    assert row(cloud, sandbox)["why"] == "preempted"


async def test_the_control_plane_is_down_and_sandboxes_live_on(
    app: modal.App, cloud: Controller
) -> None:
    sandbox = await create(app)
    process = await sandbox.exec.aio("cat")
    cloud.down(seconds=60)
    with pytest.raises(ServiceError):
        await sandbox.poll.aio()
    process.stdin.write_eof()
    await process.stdin.drain.aio()
    assert await process.wait.aio() == 0  # the router is not the control plane
    cloud.clear()
    assert await sandbox.poll.aio() == 137


async def test_a_terminate_that_fails(app: modal.App, cloud: Controller) -> None:
    sandbox = await create(app)
    cloud.fault(rpc="SandboxTerminateV2", status="UNAVAILABLE", times=0)
    with pytest.raises(ServiceError):
        await sandbox.terminate.aio()
    assert await sandbox.poll.aio() is None
    assert row(cloud, sandbox)["running"]


async def test_a_call_can_be_slow_and_a_plan_must_make_sense(
    app: modal.App, cloud: Controller
) -> None:
    sandbox = await create(app)
    cloud.fault(rpc="SandboxWait*", delay=0.5, match=sandbox.object_id)
    before = time.monotonic()
    assert await sandbox.poll.aio() is None
    assert time.monotonic() - before >= 0.5
    assert [fault["done"] for fault in cloud.stats()["faults"]] == [1]
    for wrong in ({"status": "NOPE"}, {"when": "during"}, {"color": "red"}):
        with pytest.raises(RuntimeError):
            cloud.fault(rpc="SandboxCreate", **wrong)
    with pytest.raises(RuntimeError, match="no command"):
        cloud.nonsense()


async def test_tokens(app: modal.App, cloud: Controller, running: RunningCloud) -> None:
    cloud.refuse(status="PERMISSION_DENIED")
    with pytest.raises(PermissionDeniedError):
        await create(app)
    cloud.refuse()
    wrong = running.environment | {"MODAL_TOKEN_SECRET": "as-wrong"}
    with client_environment(wrong), pytest.raises(AuthError):
        await modal.App.lookup.aio("any", create_if_missing=True)
    assert (await modal.App.lookup.aio(app.name or "")).app_id == app.app_id


async def test_the_ledger_has_seconds_and_dollars(app: modal.App, cloud: Controller) -> None:
    options: dict[str, Any] = {"gpu": "A100-80GB:2", "cpu": 8, "memory": 65536, "tags": {"a": "b"}}
    sandbox = await create(app, name="dear", **options)
    await asyncio.sleep(0.5)
    await sandbox.terminate.aio(wait=True)
    billed = row(cloud, sandbox)
    assert (billed["name"], billed["app"], billed["tags"]) == ("dear", app.name, {"a": "b"})
    assert (billed["gpu"], billed["gpus"], billed["cores"], billed["memory_mib"]) == (
        "A100-80GB",
        2,
        8,
        65536,
    )
    assert 0.5 <= billed["seconds"] < 20
    rate = 2 * 0.000694 + 8 * 0.00003942 + 64 * 0.0000067
    assert billed["dollars"] == pytest.approx(billed["seconds"] * rate)
    assert billed["created"] <= billed["scheduled"] < billed["ended"]


async def test_prices_and_what_is_not_here(app: modal.App, cloud: Controller) -> None:
    rates = await modal.Workspace.from_context().billing.rates.aio()
    assert float(rates["gpu_h100"]) == 0.001097
    cloud.rates(on=False)
    with pytest.raises(UnimplementedError):
        await modal.Workspace.from_context().billing.rates.aio()
    sandbox = await create(app)
    with pytest.raises(UnimplementedError, match="SandboxCreateConnectTokenV2"):
        await sandbox.create_connect_token.aio()


async def test_secrets_by_name(app: modal.App, cloud: Controller) -> None:
    cloud.secret(name="from-the-dashboard", env={"HF_TOKEN": "x"})
    secret = modal.Secret.from_name("from-the-dashboard", required_keys=["HF_TOKEN"])
    sandbox = await create(app, secrets=[secret])
    assert await output(sandbox, "printenv", "HF_TOKEN") == "x\n"
    with pytest.raises(NotFoundError):
        await create(app, secrets=[modal.Secret.from_name("no-such-secret")])
    assert len(await ids(app)) == 1


async def test_a_readiness_probe(app: modal.App) -> None:
    probe = modal.Probe.with_exec("test", "-e", "/tmp/ready")
    sandbox = await create(
        app, "bash", "-c", "sleep 0.5; touch /tmp/ready; sleep 60", readiness_probe=probe
    )
    await sandbox.wait_until_ready.aio(timeout=20)
    assert await output(sandbox, "ls", "/tmp/ready") == "/tmp/ready\n"


async def test_nothing_is_left_when_the_cloud_is_killed(app: modal.App) -> None:
    with running_cloud() as own, client_environment(own.environment):
        inner = await modal.App.lookup.aio("own", create_if_missing=True)
        volume = modal.Volume.from_name("v", create_if_missing=True, version=2)
        sandbox = await create(inner, volumes={"/vol": volume}, block_network=True)
        await sandbox.exec.aio("bash", "-c", "setsid sleep 61 & sleep 62")
        inside = own.control.processes(sandbox=sandbox.object_id)
        assert len(inside) >= 3
        own.process.send_signal(signal.SIGKILL)
        own.process.wait()
        for _ in range(200):
            if not any(psutil.pid_exists(pid) for pid in inside):
                break
            await asyncio.sleep(0.05)
        assert not [pid for pid in inside if psutil.pid_exists(pid)]
        with open("/proc/mounts") as mounts:
            assert "modal-cloud-" not in mounts.read()
    first = await modal.App.lookup.aio(app.name or "")  # this process's client is there again
    assert await (await create(first)).poll.aio() is None


async def test_it_runs_by_hand() -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.modal_cloud"], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = [process.stdout.readline() for _ in range(6)]
    process.terminate()
    assert process.wait(30) == 0
    names = [line.split()[1].split("=")[0] for line in lines[:5]]
    assert {"MODAL_SERVER_URL", "MODAL_TOKEN_ID", "MODAL_TOKEN_SECRET"} <= set(names)
    assert lines[5].startswith("# control: http://127.0.0.1:")
    process.stdout.close()
