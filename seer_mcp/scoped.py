"""The MCP server of a scope: its tools are the functions of an interface file, and nothing else can be asked."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.auth.provider import TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.mcpserver import Context
from mcp.types import CallToolResult, TextContent, Tool, ToolAnnotations

from . import __version__
from .config import Config
from .environment import Investigation
from .errors import NotFound, SeerError
from .interface import Exposed, Schema
from .packs import Packs
from .plugins import pack_folders
from .server import BUILTIN_PACKS, EXIT_SECONDS, redact
from .sessions import Outcome, Register, Request, Scope
from .text import printable
from .tools.seam import characters_of, client_of, failure, heartbeat, owner

CALL = (
    "scoped:call"  # the one scope that a token needs here, and the other server's tools never take
)
DESCRIPTION = 4000  # characters of one tool's
INSTRUCTIONS = 1500
WAIT = "seconds to wait for it, at most 45"
CALL_ID = re.compile("c[0-9a-f]{16}")

STRUCTURE = """\
Each tool is a function of this interface; nothing else of its sandbox can be reached. structuredContent holds
{"result": …}. Arrays are {"shape", "dtype", "data"} with data in row-major order. A call that takes longer than 45 s
answers {"running": id}: read_result(call=id) waits for it, cancel_call(call=id) stops it. Calls run one after the
other."""


def scope_owner(found: Investigation) -> str:
    """Whose the sandbox is. No user is called so, and another file's scope is another."""
    return f"scope:{found.name}.{hashlib.sha256(str(found.file).encode()).hexdigest()[:8]}"


class ScopedServer(MCPServer[None]):
    """Answers tools/list and tools/call from the interface; it has no resources and no prompts."""

    register: Register
    scope: Scope

    async def list_tools(self) -> list[Tool]:
        """The same from the start of the server to its end."""
        return [*map(tool_of, self.scope.interface.functions.values()), *OWN_TOOLS.values()]

    @property
    def tool_names(self) -> frozenset[str]:
        return frozenset([*self.scope.interface.functions, *OWN_TOOLS])

    @property
    def ready(self) -> bool:
        return self.register.ready and self.scope.ready

    def scope_needed(self, method: str, name: str) -> str | None:
        return CALL if method == "tools/call" else None

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None = None
    ) -> CallToolResult:
        redactor = self.register.config.redactor
        function = self.scope.interface.functions.get(name)
        known = [p.name for p in function.parameters] if function else ["call", "wait"]
        with self.register.observer.call(
            name,
            arguments,
            known=frozenset(known),
            changes=True,
            owner=owner(),
            client=client_of(context),
        ) as noted:
            token = get_access_token()
            if token is not None and CALL not in token.scopes:
                answer = failure(f"{name} needs a token with the scope {CALL}.")
            elif redactor.found(arguments):
                answer = failure("Nothing was called: the arguments hold the value of a secret.")
            else:
                answer = await self._answer(name, arguments, context)
            redact(answer, redactor)
            noted.answered(answer.is_error is True, characters_of(answer))
        if noted.note:
            answer.content.append(TextContent(type="text", text=noted.note))
        return answer

    async def _answer(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None
    ) -> CallToolResult:
        beat = heartbeat(context) if context is not None else _silent
        longest = self.register.config.max_wait
        try:
            if name in self.scope.interface.functions:
                request = await self.scope.call(name, arguments, owner(), longest)
                try:
                    return shown(request, await self.scope.wait(request, longest, beat))
                except anyio.get_cancelled_exc_class():
                    self.scope.abandon(request)
                    raise
            if name not in OWN_TOOLS:
                return failure(str(NotFound("tool", name, self.tool_names)))
            if wrong := own_arguments(name, arguments):
                return failure(wrong)
            request = self.scope.find(arguments["call"], owner())
            if name == "cancel_call":
                await self.scope.cancel(request)
            seconds = min(float(arguments.get("wait", longest)), longest)
            return shown(request, await self.scope.wait(request, seconds, beat))
        except SeerError as error:
            return failure(str(error))


async def _silent(_: str) -> None:
    """Nobody asked for progress."""


def own_arguments(name: str, arguments: dict[str, Any]) -> str:
    """What is wrong with the arguments of read_result or cancel_call, or ""."""
    known = OWN_TOOLS[name].input_schema["properties"]
    if unknown := [each for each in arguments if each not in known]:
        return f"{name} has no parameter {ascii(unknown[0])[:80]}. Parameters: {', '.join(known)}."
    call, wait = arguments.get("call"), arguments.get("wait", 0)
    if not isinstance(call, str) or not CALL_ID.fullmatch(call):
        return f"{name} needs call: the id that a running call was answered with."
    if not isinstance(wait, int | float) or isinstance(wait, bool) or not 0 <= wait < 1e6:
        return f"wait = {ascii(wait)[:80]}: it must be a number of seconds."
    return ""


def shown(request: Request, outcome: Outcome) -> CallToolResult:
    """A call's outcome as a client reads it: as text, and the same as structured content."""
    if outcome.state == "failed":
        note = f"\n{outcome.note}" if outcome.note else ""
        return failure(f"{outcome.error}{note}")
    if outcome.state == "running":
        answer: dict[str, Any] = {"running": request.id}
        said = (
            f"{request.function.name} is {request.run.state} and goes on by itself. "
            f"Next: read_result(call='{request.id}') waits for it, cancel_call(call='{request.id}') stops it."
        )
    else:
        answer = {"result": outcome.value}
        said = json.dumps(outcome.value, ensure_ascii=False)
    if outcome.note:
        answer["note"] = outcome.note
        said = f"{said}\n{outcome.note}"
    text = TextContent(type="text", text=printable(said))
    return CallToolResult(content=[text], structured_content=answer)


def tool_of(function: Exposed) -> Tool:
    return Tool(
        name=function.name,
        description=printable(function.description)[:DESCRIPTION],
        input_schema=function.schema(),
        output_schema=answer_schema(function.returns.schema(returned=True)),
        annotations=ToolAnnotations(open_world_hint=False),
    )


def answer_schema(result: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {
            "result": result,
            "running": {"type": "string", "description": "id for read_result; no result yet"},
            "note": {"type": "string"},
        },
        "additionalProperties": False,
    }


def _own_tool(name: str, description: str, wait: bool, read_only: bool) -> Tool:
    properties: Schema = {
        "call": {"type": "string", "description": "id of a call that was running"}
    }
    if wait:
        properties["wait"] = {"type": "number", "minimum": 0, "description": WAIT}
    return Tool(
        name=name,
        description=description,
        input_schema={
            "type": "object",
            "properties": properties,
            "required": ["call"],
            "additionalProperties": False,
        },
        output_schema=answer_schema({}),
        annotations=ToolAnnotations(
            read_only_hint=read_only,
            destructive_hint=not read_only,
            idempotent_hint=True,
            open_world_hint=False,
        ),
    )


OWN_TOOLS = {
    "read_result": _own_tool(
        "read_result", "The result of a call that was still running; waits for it.", True, True
    ),
    "cancel_call": _own_tool("cancel_call", "Stop a call of yours that is running.", False, False),
}


def build_scoped_server(
    config: Config,
    found: Investigation,
    *,
    token_verifier: TokenVerifier | None = None,
    auth: AuthSettings | None = None,
) -> ScopedServer:
    """The server of one interface (read_scope reads it). Its sandbox begins and ends with the server."""
    mine = scope_owner(found)
    register = Register(
        replace(config, on_exit="stop", team=False),
        Packs([BUILTIN_PACKS, *config.packs], pack_folders),
        only=mine,
    )
    scope = Scope(register, found, mine)

    @asynccontextmanager
    async def lifespan(_: MCPServer[None]) -> AsyncGenerator[None]:
        await register.open()
        async with anyio.create_task_group() as group:
            group.start_soon(scope.open)
            try:
                yield None
            finally:
                group.cancel_scope.cancel()
                with anyio.CancelScope(shield=True), anyio.move_on_after(EXIT_SECONDS):
                    await scope.close()
                    await register.close()

    description = scope.interface.description.strip()
    server = ScopedServer(
        "seer-mcp-scope",
        title=f"seer scope: {found.title or found.name}",
        instructions=f"{printable(description)[:INSTRUCTIONS]}\n\n{STRUCTURE}".strip(),
        version=__version__,
        lifespan=lifespan,
        token_verifier=token_verifier,
        auth=auth,
        subscriptions=False,
        log_level="WARNING",
    )
    server.register, server.scope = register, scope
    return server
