"""The control plane's calls about sandboxes, of both versions."""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from grpclib import Status
from modal_proto import api_pb2

from . import ids
from .errors import not_found, refuse
from .sandboxes import Sandbox, Sandboxes
from .service import Context

PAGE = 100


class SandboxCalls:
    """Methods of version 1 are named as in the protocol; those ending in V2 share their code."""

    def __init__(self, sandboxes: Sandboxes) -> None:
        self._sandboxes = sandboxes
        self.router_url = ""
        self.deduplicate = False
        """Whether a create that is sent again with the same idempotency key is answered again. It is
        not known what Modal does with the key, so the default is the harder case for a client."""
        self.router_tokens: dict[str, str] = {}
        """Router token -> task id."""
        self.token_seconds = 3600.0
        self._created: dict[str, Sandbox] = {}

    async def SandboxCreate(
        self, request: api_pb2.SandboxCreateRequest, context: Context
    ) -> api_pb2.SandboxCreateResponse:
        sandbox = self._again(context)
        if sandbox is None:
            env: dict[str, str] = dict(request.definition.environment_variables.contents)
            for secret_id in request.definition.secret_ids:
                env |= self._sandboxes.accounts.secret(secret_id).env
            sandbox = await self._create(1, request, env, context)
        return api_pb2.SandboxCreateResponse(sandbox_id=sandbox.id, metadata=sandbox.metadata())

    async def SandboxCreateV2(
        self, request: api_pb2.SandboxCreateV2Request, context: Context
    ) -> api_pb2.SandboxCreateV2Response:
        sandbox = self._again(context)
        if sandbox is None:
            accounts = self._sandboxes.accounts
            env: dict[str, str] = dict(request.definition.environment_variables.contents)
            if not request.secret_sources:
                for secret_id in request.definition.secret_ids:
                    env |= accounts.secret(secret_id).env
            env |= accounts.environment(request.secret_sources)
            sandbox = await self._create(2, request, env, context)
        try:
            await self._placed(sandbox)
        except asyncio.CancelledError:  # the client went away or its deadline passed
            if not sandbox.scheduled.is_set():
                self._sandboxes.end(sandbox, "unscheduled")
            raise
        return api_pb2.SandboxCreateV2Response(
            sandbox_id=sandbox.id,
            task_id=sandbox.task_id,
            metadata=sandbox.metadata(),
            command_router_access=self._access(sandbox),
            sandbox_token=ids.jwt(self.token_seconds),
        )

    def _again(self, context: Context) -> Sandbox | None:
        key = context.metadata.get("x-idempotency-key", "")
        return self._created.get(key) if self.deduplicate else None

    async def _create(
        self, version: int, request: Any, env: dict[str, str], context: Context
    ) -> Sandbox:
        sandbox = await self._sandboxes.create(
            version, request.app_id, request.definition, request.tags, env
        )
        if key := context.metadata.get("x-idempotency-key"):
            self._created[key] = sandbox
        return sandbox

    async def _placed(self, sandbox: Sandbox) -> None:
        """A version 2 create answers when the sandbox has its place; it has none: nothing is left."""
        waits = [asyncio.create_task(e.wait()) for e in (sandbox.scheduled, sandbox.done)]
        try:
            patience = self._sandboxes.capacity.patience
            await asyncio.wait(waits, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if sandbox.scheduled.is_set():
            return
        if sandbox.done.is_set():
            refuse(
                Status.FAILED_PRECONDITION, sandbox.result.exception or "Sandbox already finished"
            )
        self._sandboxes.end(sandbox, "unscheduled")
        refuse(Status.RESOURCE_EXHAUSTED, "Insufficient capacity to create sandbox.")

    async def SandboxGetTaskId(
        self, request: api_pb2.SandboxGetTaskIdRequest, context: Context
    ) -> api_pb2.SandboxGetTaskIdResponse:
        sandbox = self._find(request, context)
        if request.HasField("timeout"):
            await _first(request.timeout, sandbox.scheduled, sandbox.done)
        response = api_pb2.SandboxGetTaskIdResponse()
        if sandbox.scheduled.is_set():
            response.task_id = sandbox.task_id
        if sandbox.done.is_set():
            response.task_result.CopyFrom(sandbox.result)
        elif not sandbox.scheduled.is_set():
            patience = self._sandboxes.capacity.patience
            if patience is not None and time.monotonic() > sandbox.queued + patience:
                refuse(Status.RESOURCE_EXHAUSTED, "Insufficient capacity to create sandbox.")
        return response

    def _find(self, request: Any, context: Context) -> Sandbox:
        return self._sandboxes.get(request.sandbox_id, 2 if context.rpc.endswith("V2") else 1)

    async def SandboxWait(
        self, request: api_pb2.SandboxWaitRequest, context: Context
    ) -> api_pb2.SandboxWaitResponse:
        sandbox = self._find(request, context)
        await _first(request.timeout, sandbox.done)
        result = sandbox.result if sandbox.done.is_set() else None
        return api_pb2.SandboxWaitResponse(result=result, metadata=sandbox.metadata())

    async def SandboxTerminate(
        self, request: api_pb2.SandboxTerminateRequest, context: Context
    ) -> api_pb2.SandboxTerminateResponse:
        sandbox = self._find(request, context)
        existing = sandbox.result if sandbox.done.is_set() else None
        self._sandboxes.end(sandbox, "terminated")
        return api_pb2.SandboxTerminateResponse(existing_result=existing)

    async def SandboxList(
        self, request: api_pb2.SandboxListRequest, context: Context
    ) -> api_pb2.SandboxListResponse:
        wanted = {tag.tag_name: tag.tag_value for tag in request.tags}
        versions = (1, 2) if context.rpc.endswith("V2") else (1,)
        found = [
            sandbox
            for sandbox in reversed(self._sandboxes.by_id.values())
            if sandbox.version in versions
            and (not request.app_id or sandbox.app_id == request.app_id)
            and (not request.before_timestamp or sandbox.entry.created < request.before_timestamp)
            and (request.include_finished or not sandbox.done.is_set())
            and wanted.items() <= sandbox.tags.items()
        ]
        return api_pb2.SandboxListResponse(sandboxes=map(_info, found[:PAGE]))

    async def SandboxGetFromName(
        self, request: api_pb2.SandboxGetFromNameRequest, context: Context
    ) -> api_pb2.SandboxGetFromNameResponse:
        app_id = self._sandboxes.accounts.app_named(request.app_name)
        name = request.sandbox_name
        sandbox = self._sandboxes.named(app_id, name, request.include_terminated)
        if sandbox is None or sandbox.version != (2 if context.rpc.endswith("V2") else 1):
            not_found(f"Sandbox {name!r} in app {request.app_name!r}")
        return api_pb2.SandboxGetFromNameResponse(
            sandbox_id=sandbox.id, metadata=sandbox.metadata()
        )

    async def SandboxSetName(
        self, request: api_pb2.SandboxSetNameRequest, _: Context
    ) -> api_pb2.SandboxSetNameResponse:
        sandbox = self._sandboxes.get(request.sandbox_id, 2)
        if sandbox.name != request.name:
            if sandbox.name or sandbox.done.is_set():
                refuse(Status.FAILED_PRECONDITION, "the sandbox has a name already, or has ended")
            if self._sandboxes.named(sandbox.app_id, request.name):
                refuse(Status.ALREADY_EXISTS, f"Sandbox {request.name!r} already exists")
            sandbox.definition.name = sandbox.entry.name = request.name
        return api_pb2.SandboxSetNameResponse()

    async def SandboxTagsGet(
        self, request: api_pb2.SandboxTagsGetRequest, context: Context
    ) -> api_pb2.SandboxTagsGetResponse:
        return api_pb2.SandboxTagsGetResponse(tags=_tags(self._find(request, context)))

    async def SandboxTagsSet(
        self, request: api_pb2.SandboxTagsSetRequest, context: Context
    ) -> None:
        sandbox = self._find(request, context)
        sandbox.tags.clear()  # the ledger's entry has the same object
        sandbox.tags.update({tag.tag_name: tag.tag_value for tag in request.tags})

    async def TaskGetCommandRouterAccess(
        self, request: api_pb2.TaskGetCommandRouterAccessRequest, _: Context
    ) -> api_pb2.TaskGetCommandRouterAccessResponse:
        access = self._access(self._sandboxes.of_task(request.task_id))
        return api_pb2.TaskGetCommandRouterAccessResponse(url=access.url, jwt=access.jwt)

    async def SandboxGetCommandRouterAccess(
        self, request: api_pb2.SandboxGetCommandRouterAccessRequest, _: Context
    ) -> api_pb2.SandboxGetCommandRouterAccessResponse:
        if request.sandbox_id:
            sandbox = self._sandboxes.get(request.sandbox_id, 2)
        else:
            sandbox = self._sandboxes.of_task(request.task_id)
        access = self._access(sandbox)
        return api_pb2.SandboxGetCommandRouterAccessResponse(url=access.url, jwt=access.jwt)

    def _access(self, sandbox: Sandbox) -> api_pb2.CommandRouterAccess:
        if sandbox.done.is_set() and sandbox.version == 1:
            refuse(Status.FAILED_PRECONDITION, f"Sandbox {sandbox.id} has already finished")
        token = ids.jwt(self.token_seconds, task=sandbox.task_id)
        self.router_tokens[token] = sandbox.task_id
        return api_pb2.CommandRouterAccess(url=self.router_url, jwt=token)

    async def SandboxGetLogs(
        self, request: api_pb2.SandboxGetLogsRequest, _: Context
    ) -> AsyncIterator[api_pb2.TaskLogsBatch]:
        sandbox = self._sandboxes.get(request.sandbox_id, 1)
        deadline = time.monotonic() + request.timeout
        await _first(request.timeout, sandbox.scheduled, sandbox.done)
        if sandbox.box is None:
            if sandbox.done.is_set():
                yield api_pb2.TaskLogsBatch(eof=True)
            return
        is_out = request.file_descriptor == api_pb2.FILE_DESCRIPTOR_STDOUT
        output = sandbox.box.stdout if is_out else sandbox.box.stderr
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        offset = int(request.last_entry_id or 0)
        while (left := deadline - time.monotonic()) > 0:
            await output.wait_beyond(offset, left)
            data = output.read(offset)
            offset = max(offset, output.start) + len(data)
            ends = not data and output.closed
            item = api_pb2.TaskLogs(
                data=decoder.decode(data, final=ends),
                file_descriptor=request.file_descriptor,
                timestamp=time.time(),
            )
            told = str(offset - len(decoder.getstate()[0]))
            yield api_pb2.TaskLogsBatch(
                task_id=sandbox.task_id, items=[item], entry_id=told, eof=ends
            )
            if ends:
                return

    async def SandboxStdinWrite(
        self, request: api_pb2.SandboxStdinWriteRequest, _: Context
    ) -> api_pb2.SandboxStdinWriteResponse:
        sandbox = self._sandboxes.get(request.sandbox_id, 1)
        if sandbox.done.is_set() or sandbox.box is None:
            refuse(Status.FAILED_PRECONDITION, f"Sandbox {sandbox.id} is not running")
        if request.index > sandbox.stdin_index:
            sandbox.stdin_index = request.index
            with contextlib.suppress(OSError):
                stdin = sandbox.box.stdin
                await stdin.write(stdin.taken, request.input, request.eof)
        return api_pb2.SandboxStdinWriteResponse()

    SandboxGetTaskIdV2 = SandboxGetTaskId
    SandboxWaitV2 = SandboxWait
    SandboxTerminateV2 = SandboxTerminate
    SandboxListV2 = SandboxList
    SandboxGetFromNameV2 = SandboxGetFromName
    SandboxTagsGetV2 = SandboxTagsGet
    SandboxTagsSetV2 = SandboxTagsSet


async def _first(timeout: float, *events: asyncio.Event) -> None:
    """Returns when one of the events is set, or after `timeout` seconds."""
    if any(event.is_set() for event in events) or timeout <= 0:
        return
    waits = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()


def _tags(sandbox: Sandbox) -> list[api_pb2.SandboxTag]:
    return [api_pb2.SandboxTag(tag_name=k, tag_value=v) for k, v in sandbox.tags.items()]


def _info(sandbox: Sandbox) -> api_pb2.SandboxInfo:
    entry = sandbox.entry
    task = api_pb2.TaskInfo(
        id=sandbox.task_id if entry.scheduled else "",
        enqueued_at=entry.created,
        started_at=entry.scheduled or 0,
        finished_at=entry.ended or 0,
        result=sandbox.result if sandbox.done.is_set() else None,
        sandbox_id=sandbox.id,
        gpu_config=sandbox.gpu,
    )
    return api_pb2.SandboxInfo(
        id=sandbox.id,
        created_at=entry.created,
        task_info=task,
        app_id=sandbox.app_id,
        tags=_tags(sandbox),
        name=sandbox.name,
        image_id=sandbox.image.id,
        timeout_secs=sandbox.definition.timeout_secs,
        metadata=sandbox.metadata(),
    )
