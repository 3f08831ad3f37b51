"""Sandboxes of both versions, through the unmodified client."""

from __future__ import annotations

import asyncio
from typing import Any

import modal
import pytest

from .box import hidden_interpreter
from .control import Controller

pytestmark = [pytest.mark.anyio, pytest.mark.slow]  # of the test server itself
VERSIONS = pytest.mark.parametrize("gpu", [None, "H100"], ids=["v2", "v1"])


async def create(app: modal.App, *argv: str, **options: Any) -> modal.Sandbox:
    return await modal.Sandbox.create.aio(*(argv or ("sleep", "60")), app=app, **options)


async def output(sandbox: modal.Sandbox, *argv: str, **options: Any) -> str:
    process = await sandbox.exec.aio(*argv, **options)
    printed, errors = await asyncio.gather(process.stdout.read.aio(), process.stderr.read.aio())
    assert await process.wait.aio() == 0, errors
    return printed


def row(cloud: Controller, sandbox: modal.Sandbox) -> dict[str, Any]:
    return next(one for one in cloud.ledger() if one["id"] == sandbox.object_id)


@VERSIONS
async def test_the_entry_command_runs_and_its_end_is_the_sandboxs(
    app: modal.App, gpu: str | None
) -> None:
    sandbox = await create(app, "bash", "-c", "echo out; echo err >&2; exit 3", gpu=gpu)
    assert await sandbox.stdout.read.aio() == "out\n"
    assert await sandbox.stderr.read.aio() == "err\n"
    await sandbox.wait.aio()
    assert sandbox.returncode == 3
    again = await modal.Sandbox.from_id.aio(sandbox.object_id)
    assert await again.poll.aio() == 3
    assert await again.stdout.read.aio() == "out\n"


@VERSIONS
async def test_stdin_of_the_entry_command(app: modal.App, gpu: str | None) -> None:
    sandbox = await create(app, "cat", gpu=gpu)
    sandbox.stdin.write("hello\n")
    await sandbox.stdin.drain.aio()
    sandbox.stdin.write("world")
    sandbox.stdin.write_eof()
    await sandbox.stdin.drain.aio()
    assert await sandbox.stdout.read.aio() == "hello\nworld"
    await sandbox.wait.aio()


@VERSIONS
async def test_terminate_kills_everything_inside(
    app: modal.App, cloud: Controller, gpu: str | None
) -> None:
    sandbox = await create(app, "bash", "-c", "setsid sleep 99 & setsid sleep 98 & wait", gpu=gpu)
    await output(sandbox, "bash", "-c", "nohup setsid sleep 97 >/dev/null 2>&1 &")
    assert len(cloud.processes(sandbox=sandbox.object_id)) >= 5
    assert await sandbox.poll.aio() is None
    assert await sandbox.terminate.aio(wait=True) == 137
    await sandbox.terminate.aio()
    assert cloud.processes(sandbox=sandbox.object_id) == []
    with pytest.raises(modal.exception.NotFoundError):
        await (await modal.Sandbox.from_id.aio(sandbox.object_id)).exec.aio("true")
    billed = row(cloud, sandbox)
    assert billed["why"] == "terminated" and billed["gpu"] == (gpu or "")


@VERSIONS
async def test_names_and_tags_find_a_sandbox_while_it_runs(app: modal.App, gpu: str | None) -> None:
    name = app.name or ""
    sandbox = await create(app, name="one", tags={"owner": "me", "kind": "x"}, gpu=gpu)
    with pytest.raises(modal.exception.AlreadyExistsError):
        await create(app, name="one", gpu=gpu)
    other = await create(app, name="two", tags={"owner": "you"}, gpu=gpu)
    assert (await modal.Sandbox.from_name.aio(name, "one")).object_id == sandbox.object_id
    assert await sandbox.get_tags.aio() == {"owner": "me", "kind": "x"}
    assert await ids(app) == {sandbox.object_id, other.object_id}
    assert await ids(app, {"owner": "me"}) == {sandbox.object_id}
    await other.set_tags.aio({"owner": "me"})
    assert len(await ids(app, {"owner": "me"})) == 2
    await sandbox.terminate.aio(wait=True)
    assert await ids(app, {"owner": "me"}) == {other.object_id}
    with pytest.raises(modal.exception.NotFoundError):
        await modal.Sandbox.from_name.aio(name, "one")
    assert (await create(app, name="one", gpu=gpu)).object_id != sandbox.object_id


async def ids(app: modal.App, tags: dict[str, str] | None = None) -> set[str]:
    found = modal.Sandbox.list.aio(app_id=app.app_id, tags=tags)
    return {sandbox.object_id async for sandbox in found}


@VERSIONS
async def test_timeout_is_124_and_idle_timeout_an_exit_of_0(
    app: modal.App, cloud: Controller, gpu: str | None
) -> None:
    short, idle = await asyncio.gather(
        create(app, timeout=1, gpu=gpu), create(app, idle_timeout=1, gpu=gpu)
    )
    process = await idle.exec.aio("sleep", "2.5")  # counts as activity for as long as it runs
    with pytest.raises(modal.exception.SandboxTimeoutError):
        await short.wait.aio()
    assert short.returncode == 124
    await asyncio.sleep(1)
    assert await idle.poll.aio() is None
    assert await process.wait.aio() == 0
    await idle.wait.aio()
    assert idle.returncode == 0
    assert row(cloud, idle)["why"] == "idle" and row(cloud, short)["why"] == "timeout"


@VERSIONS
async def test_environment_secrets_and_workdir(app: modal.App, gpu: str | None) -> None:
    image = modal.Image.debian_slim(python_version="3.11").env({"FROM_IMAGE": "a b"})
    sandbox = await create(
        app,
        gpu=gpu,
        image=image,
        env={"FROM_ENV": "1"},
        secrets=[modal.Secret.from_dict({"FROM_SECRET": "2"})],
        workdir="/somewhere/new",
    )
    script = 'echo "$FROM_IMAGE $FROM_ENV $FROM_SECRET $PWD $MODAL_SANDBOX_ID $(hostname)"'
    told = f"a b 1 2 /somewhere/new {sandbox.object_id} modal\n"
    assert await output(sandbox, "bash", "-c", script) == told
    told = await output(
        sandbox,
        "bash",
        "-c",
        "echo $FROM_ENV $MORE $SECRET $PWD",
        env={"MORE": "3"},
        secrets=[modal.Secret.from_dict({"SECRET": "4"})],
        workdir="/tmp",
    )
    assert told == "1 3 4 /tmp\n"


async def test_a_sandbox_sees_nothing_of_the_checkout_and_python_is_on_its_path(
    app: modal.App,
) -> None:
    sandbox = await create(app)
    script = "import sys, ipykernel; print(sys.prefix); import seer_mcp"
    process = await sandbox.exec.aio("python", "-c", script)
    assert "No module named 'seer_mcp'" in await process.stderr.read.aio()
    there = await output(sandbox, "find", "/tmp", "/run", "-mindepth", "1", "-maxdepth", "1")
    kept = {"/" + "/".join(folder.parts[1:3]) for folder in hidden_interpreter()}
    assert set(there.split()) == kept  # nothing, but what leads to an interpreter that lies there


@VERSIONS
async def test_a_blocked_network_has_only_itself(app: modal.App, gpu: str | None) -> None:
    sandbox = await create(app, block_network=True, gpu=gpu)
    assert await output(sandbox, "ls", "/sys/class/net") != ""
    script = (
        "import socket as s; a = s.create_server(('127.0.0.1', 0)); "
        "s.create_connection(a.getsockname()); print([n for _, n in s.if_nameindex()])"
    )
    assert await output(sandbox, "python", "-c", script) == "['lo']\n"
