"""Execs: streams that can be read again, stdin that is written once, exit codes, time limits."""

from __future__ import annotations

import asyncio

import modal
import pytest

from .control import Controller
from .test_sandboxes import VERSIONS, create, output

pytestmark = pytest.mark.anyio


@VERSIONS
async def test_exit_codes_signals_and_missing_commands(app: modal.App, gpu: str | None) -> None:
    sandbox = await create(app, gpu=gpu)
    codes = {}
    for script in ("exit 7", "kill -9 $$"):
        process = await sandbox.exec.aio("bash", "-c", script)
        codes[script] = await process.wait.aio()
    assert codes == {"exit 7": 7, "kill -9 $$": 137}
    process = await sandbox.exec.aio("no-such-command")
    assert await process.wait.aio() == 127


async def test_an_exec_that_runs_too_long_is_minus_one(app: modal.App, cloud: Controller) -> None:
    sandbox = await create(app)
    process = await sandbox.exec.aio("sleep", "60", timeout=1)
    assert await process.wait.aio() == -1
    for _ in range(100):
        if len(cloud.processes(sandbox=sandbox.object_id)) == 2:  # the first process, and `sleep`
            return
        await asyncio.sleep(0.05)
    raise AssertionError("the exec is still there")


@VERSIONS
async def test_a_line_in_gives_a_line_out(app: modal.App, gpu: str | None) -> None:
    sandbox = await create(app, gpu=gpu)
    process = await sandbox.exec.aio("cat", bufsize=1)
    lines = process.stdout.__aiter__()
    for number in range(20):
        process.stdin.write(f"line {number} é\n")
        await process.stdin.drain.aio()
        assert await lines.__anext__() == f"line {number} é\n"
    process.stdin.write_eof()
    await process.stdin.drain.aio()
    assert [line async for line in lines] == []
    assert await process.wait.aio() == 0


async def test_much_output_arrives_whole_though_the_stream_breaks(
    app: modal.App, cloud: Controller
) -> None:
    sandbox = await create(app)
    cloud.fault(rpc="TaskExecStdioRead", status="reset", when="after", times=3)
    cloud.fault(rpc="TaskExecStdioRead", status="UNAVAILABLE", when="after", nth=4, times=2)
    process = await sandbox.exec.aio("python", "-c", "for i in range(300000): print(i)")
    told = await process.stdout.read.aio()
    assert told == "".join(f"{i}\n" for i in range(300000))
    assert cloud.calls()["TaskExecStdioRead"] >= 5


async def test_stdin_is_written_once_though_the_answer_is_lost(
    app: modal.App, cloud: Controller
) -> None:
    sandbox = await create(app)
    process = await sandbox.exec.aio("cat")
    cloud.fault(rpc="TaskExecStdinWrite", status="reset", when="after", times=2)
    cloud.fault(rpc="TaskExecStdinWrite", status="UNAVAILABLE", when="before", nth=3)
    process.stdin.write("once\n")
    await process.stdin.drain.aio()
    process.stdin.write("twice\n")
    process.stdin.write_eof()
    await process.stdin.drain.aio()
    assert await process.stdout.read.aio() == "once\ntwice\n"


async def test_an_exec_starts_once_though_the_answer_is_lost(
    app: modal.App, cloud: Controller
) -> None:
    sandbox = await create(app)
    cloud.fault(rpc="TaskExecStart", status="UNAVAILABLE", when="after", times=2)
    await output(sandbox, "bash", "-c", "echo started >> /tmp/log")
    assert await output(sandbox, "cat", "/tmp/log") == "started\n"


async def test_broken_connections_are_made_again(app: modal.App, cloud: Controller) -> None:
    sandbox = await create(app)
    process = await sandbox.exec.aio("bash", "-c", "echo a; read line; echo $line")
    lines = process.stdout.__aiter__()
    assert await lines.__anext__() == "a\n"
    cloud.cut()
    process.stdin.write("b\n")
    await process.stdin.drain.aio()
    assert await lines.__anext__() == "b\n"
    assert await process.wait.aio() == 0


async def test_a_token_that_is_not_known_any_more_is_renewed(
    app: modal.App, cloud: Controller
) -> None:
    sandbox = await create(app)
    cloud.router_tokens(seconds=20)  # the client renews only what is about to expire
    sandbox = await modal.Sandbox.from_id.aio(sandbox.object_id)
    assert await output(sandbox, "echo", "1") == "1\n"
    before = cloud.calls()["SandboxGetCommandRouterAccess"]
    cloud.router_tokens(seconds=3600)
    assert await output(sandbox, "echo", "2") == "2\n"
    assert cloud.calls()["SandboxGetCommandRouterAccess"] == before + 1
