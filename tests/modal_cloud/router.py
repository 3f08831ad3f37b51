"""The task command router: what a client does inside a sandbox."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from grpclib import Status
from modal_proto import api_pb2
from modal_proto import task_command_router_pb2 as sr

from .box import Box
from .errors import not_found, refuse
from .images import Image
from .pipes import Input, Output
from .sandboxes import Sandbox, Sandboxes
from .service import Context

TIMEOUT_GRACE = 1.0
"""The client gives up at an exec's timeout and says -1; the process is killed just after it."""


@dataclass
class Exec:
    id: str
    process: asyncio.subprocess.Process
    stdin: Input
    stdout: Output = field(default_factory=Output)
    stderr: Output = field(default_factory=Output)
    code: int | None = None
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    streaming: asyncio.Task[Any] | None = None
    """The call that streams stdin just now."""

    def kill(self) -> None:
        if not self.ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)

    def status(self) -> dict[str, int]:
        assert self.code is not None
        return {"code": self.code} if self.code >= 0 else {"signal": -self.code}


class Router:
    def __init__(self, sandboxes: Sandboxes, tokens: Mapping[str, str]) -> None:
        self._sandboxes = sandboxes
        self._tokens = tokens
        self._tasks: set[asyncio.Task[Any]] = set()
        self._snapshots: dict[tuple[str, str], asyncio.Task[Image]] = {}
        self._starting: dict[tuple[str, str], asyncio.Task[Exec]] = {}

    def admit(self, _rpc: str, metadata: Mapping[str, str]) -> None:
        token = metadata.get("authorization", "").removeprefix("Bearer ")
        if token not in self._tokens:
            refuse(Status.UNAUTHENTICATED, "the router's token is unknown or has expired")

    def _keep(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # -- execs

    async def TaskExecStart(
        self, request: sr.TaskExecStartRequest, _: Context
    ) -> sr.TaskExecStartResponse:
        sandbox = self._sandboxes.of_task(request.task_id)
        sandbox.alive()
        key = (request.task_id, request.exec_id)
        if key not in self._starting:  # the same id starts nothing twice
            self._starting[key] = asyncio.create_task(self._start(sandbox, request))
        await asyncio.shield(self._starting[key])
        return sr.TaskExecStartResponse()

    async def _start(self, sandbox: Sandbox, request: sr.TaskExecStartRequest) -> Exec:
        box = sandbox.alive()
        if request.container_id:
            refuse(Status.UNIMPLEMENTED, "this test server has no sidecars")
        if request.HasField("pty_info"):
            refuse(Status.UNIMPLEMENTED, "this test server has no terminals")
        env = dict(sandbox.env)
        for secret_id in request.secret_ids:
            env |= self._sandboxes.accounts.secret(secret_id).env
        env |= dict(request.env) | self._sandboxes.accounts.environment(request.secret_sources)
        pipe, null = subprocess.PIPE, subprocess.DEVNULL
        errors = {
            sr.TASK_EXEC_STDERR_CONFIG_DEVNULL: null,
            sr.TASK_EXEC_STDERR_CONFIG_STDOUT: subprocess.STDOUT,
        }
        to_pipe = request.stdout_config == sr.TASK_EXEC_STDOUT_CONFIG_PIPE
        process = await box.run(
            list(request.command_args),
            env,
            request.workdir or sandbox.workdir,
            stdin=pipe,
            stdout=pipe if to_pipe else null,
            stderr=errors.get(request.stderr_config, pipe),
        )
        assert process.stdin is not None
        running = Exec(request.exec_id, process, Input(process.stdin))
        sandbox.execs[request.exec_id] = running
        sandbox.running_execs += 1
        self._keep(asyncio.create_task(self._follow(sandbox, running)))
        if request.timeout_secs:
            self._keep(asyncio.create_task(self._limit(running, request.timeout_secs)))
        return running

    async def _follow(self, sandbox: Sandbox, running: Exec) -> None:
        """Take what it prints, and its exit status."""
        process = running.process
        fills: list[asyncio.Task[None]] = []
        for output, stream in ((running.stdout, process.stdout), (running.stderr, process.stderr)):
            if stream is None:
                output.close()
            else:
                fills.append(asyncio.create_task(output.fill(stream)))
        running.code = await process.wait()
        running.ended.set()
        sandbox.running_execs -= 1
        sandbox.active = time.monotonic()
        await asyncio.gather(*fills)

    async def _limit(self, running: Exec, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(running.ended.wait(), seconds + TIMEOUT_GRACE)
        running.kill()

    def _exec(self, request: Any) -> Exec:
        sandbox = self._sandboxes.of_task(request.task_id)
        sandbox.alive()
        if request.exec_id not in sandbox.execs:
            not_found(f"Exec {request.exec_id}")
        return sandbox.execs[request.exec_id]

    async def TaskExecPoll(
        self, request: sr.TaskExecPollRequest, _: Context
    ) -> sr.TaskExecPollResponse:
        running = self._exec(request)
        return sr.TaskExecPollResponse(**(running.status() if running.ended.is_set() else {}))

    async def TaskExecWait(
        self, request: sr.TaskExecWaitRequest, _: Context
    ) -> sr.TaskExecWaitResponse:
        running = self._exec(request)
        await running.ended.wait()
        return sr.TaskExecWaitResponse(**running.status())

    async def TaskExecStdioRead(
        self, request: sr.TaskExecStdioReadRequest, _: Context
    ) -> AsyncIterator[sr.TaskExecStdioReadResponse]:
        running = self._exec(request)
        is_out = request.file_descriptor == sr.TASK_EXEC_STDIO_FILE_DESCRIPTOR_STDOUT
        output = running.stdout if is_out else running.stderr
        if request.offset > output.end or request.offset < output.start:
            refuse(Status.OUT_OF_RANGE, f"offset {request.offset} of {output.start}..{output.end}")
        async for _offset, data in output.follow(request.offset):
            yield sr.TaskExecStdioReadResponse(data=data)

    async def TaskReloadVolumes(
        self, request: sr.TaskReloadVolumesRequest, _: Context
    ) -> sr.TaskReloadVolumesResponse:
        sandbox = self._sandboxes.of_task(request.task_id)
        box = sandbox.alive()
        assert sandbox.volumes is not None
        await sandbox.volumes.reload(box)
        return sr.TaskReloadVolumesResponse()

    async def TaskSnapshotFilesystem(
        self, request: sr.TaskSnapshotFilesystemRequest, _: Context
    ) -> sr.TaskSnapshotFilesystemResponse:
        """Keeps what was written in the sandbox, but for mounts: volumes and files sent with copy=False.

        That the latter are not in it is a guess.
        """
        sandbox = self._sandboxes.of_task(request.task_id)
        key = (request.task_id, request.snapshot_id)
        if key not in self._snapshots:  # the same id is one snapshot
            ttl = request.ttl_seconds if request.ttl_seconds > 0 else None
            task = asyncio.create_task(self._sandboxes.snapshot(sandbox, ttl))
            self._snapshots[key] = task
        image = await asyncio.shield(self._snapshots[key])
        return sr.TaskSnapshotFilesystemResponse(image_id=image.id)

    # -- stdin

    async def TaskExecStdinWrite(
        self, request: sr.TaskExecStdinWriteRequest, _: Context
    ) -> sr.TaskExecStdinWriteResponse:
        await _write(self._exec(request).stdin, request.offset, request.data, request.eof)
        return sr.TaskExecStdinWriteResponse()

    async def TaskExecStdinWriteStream(
        self, messages: Any, _: Context
    ) -> sr.TaskExecStdinWriteStreamResponse:
        """Start, data, end. Without an end, stdin stays open, for a stream that goes on from there."""
        first = await messages.recv_message()
        if first is None or first.WhichOneof("payload") not in (None, "start"):
            refuse(Status.INVALID_ARGUMENT, "the first message of the stream must be its start")
        running = self._exec(first.start)
        running.streaming = asyncio.current_task()
        offset = first.start.offset
        while (message := await messages.recv_message()) is not None:
            if message.HasField("end"):
                await _write(running.stdin, offset, b"", True)
                break
            await _write(running.stdin, offset, message.data, False)
            offset += len(message.data)
        return sr.TaskExecStdinWriteStreamResponse()

    async def TaskExecStdinStatus(
        self, request: sr.TaskExecStdinStatusRequest, _: Context
    ) -> sr.TaskExecStdinStatusResponse:
        stdin = self._exec(request).stdin
        return sr.TaskExecStdinStatusResponse(num_bytes_written=stdin.taken, closed=stdin.closed)

    async def SandboxStdinWriteV2(
        self, request: sr.SandboxStdinWriteV2Request, _: Context
    ) -> sr.SandboxStdinWriteV2Response:
        box = self._sandboxes.of_task(request.task_id).alive()
        await _write(box.stdin, request.offset, request.data, request.eof)
        return sr.SandboxStdinWriteV2Response()

    # -- the entry command

    async def SandboxStdioReadV2(
        self, request: sr.SandboxStdioReadV2Request, _: Context
    ) -> AsyncIterator[sr.SandboxStdioReadV2Response]:
        """Also after the end; bytes that are not kept any more are passed over."""
        box = self._sandboxes.of_task(request.task_id).box
        if box is None:
            not_found(f"Task {request.task_id}")
        is_out = request.file_descriptor == sr.SANDBOX_STDIO_FILE_DESCRIPTOR_STDOUT
        output = box.stdout if is_out else box.stderr
        async for offset, data in output.follow(request.offset):
            yield sr.SandboxStdioReadV2Response(data=data, starting_offset=offset)

    async def SandboxWaitUntilReady(
        self, request: sr.SandboxWaitUntilReadyTcrRequest, _: Context
    ) -> sr.SandboxWaitUntilReadyTcrResponse:
        sandbox = self._sandboxes.of_task(request.task_id)
        box, definition = sandbox.alive(), sandbox.definition
        if not definition.HasField("readiness_probe"):
            refuse(Status.FAILED_PRECONDITION, "the sandbox has no readiness probe")
        deadline = time.monotonic() + request.timeout
        while not await _ready(sandbox, box, definition.readiness_probe):
            sandbox.alive()
            if time.monotonic() > deadline:
                refuse(Status.DEADLINE_EXCEEDED, "the sandbox did not become ready")
            await asyncio.sleep(max(0.05, definition.readiness_probe.interval_ms / 1000))
        return sr.SandboxWaitUntilReadyTcrResponse(ready_at=time.time())


async def _ready(sandbox: Sandbox, box: Box, probe: api_pb2.Probe) -> bool:
    if probe.HasField("tcp_port"):
        script = f"import socket;socket.create_connection(('127.0.0.1',{probe.tcp_port}),1)"
        argv = ["python", "-ISc", script]
    else:
        argv = list(probe.exec_command.argv)
    null = subprocess.DEVNULL
    process = await box.run(
        argv, sandbox.env, sandbox.workdir, stdin=null, stdout=null, stderr=null
    )
    return await process.wait() == 0


async def _write(stdin: Input, offset: int, data: bytes, eof: bool) -> None:
    try:
        await stdin.write(offset, data, eof)
    except ValueError as error:
        refuse(Status.OUT_OF_RANGE, str(error))
    except OSError as error:
        refuse(Status.FAILED_PRECONDITION, str(error) or "the process has closed its stdin")
