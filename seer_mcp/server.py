"""The MCP server: tools, resources, instructions, and the lifespan that is the register of sandboxes."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from typing import Any, Protocol
from weakref import WeakSet

import anyio
from mcp.server import MCPServer
from mcp.server.apps import APP_MIME_TYPE, Apps
from mcp.server.auth.provider import TokenVerifier
from mcp.server.auth.settings import AuthSettings
from mcp.server.connection import Connection
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.exceptions import ResourceNotFoundError, ToolError
from mcp.server.mcpserver.resources import FunctionResource
from mcp.server.mcpserver.tools import Tool
from mcp.server.subscriptions import InMemorySubscriptionBus
from mcp.shared.exceptions import MCPError
from mcp.shared.subscriptions import ResourceUpdated, ServerEvent
from mcp.types import (
    INVALID_PARAMS,
    CallToolResult,
    EmptyResult,
    GetPromptResult,
    InputRequiredResult,
    Prompt,
    Resource,
    SubscribeRequestParams,
    TextContent,
    UnsubscribeRequestParams,
)
from pydantic import ValidationError

from . import __version__, prompts
from .config import Config
from .environment import BUILTIN_PACKS
from .errors import NotFound, Refused, SeerError
from .kernel_host.fault import fault_point
from .logs import drain_stderr
from .packs import Packs
from .plugins import pack_folders
from .redact import Redactor
from .sessions import Bridges, Register, Session
from .skills import Skills
from .tools import build_tools
from .tools.seam import (
    NOTEBOOK_APP,
    argument_errors,
    changes_something,
    characters_of,
    client_of,
    failure,
    known_failure,
    lacking_scope,
    owner,
    scope_of,
    secret_given,
)

EXIT_SECONDS = 4.0
NOTICE_SECONDS = 1.0  # between two update notices of one notebook

INSTRUCTIONS = """\
seer-mcp investigates language models. It keeps an IPython kernel in a sandbox and records all in a notebook.

Begin: start_sandbox(name="my-question") gives a handle; pass it as `sandbox` to every other call.
1. load_model(sandbox, model="organism:base") or a hub id or folder: a visible cell makes it the variable `m`.
2. list_techniques() shows what can be imported (tool_packs.*); question="…" searches; name= gives signature,
   controls and a runnable example.
3. create_cell(sandbox, source) writes a cell and runs it; the answer has its id and output. Plots are images.
4. A call waits 45 s at most. A longer cell answers "running": it goes on by itself; read_outputs(sandbox, cell)
   waits for the rest, interrupt stops it.
5. Change a cell with edit_cell(run=true) rather than writing it again; write markdown cells for what you find.

Work like a scientist: behaviour first, then internals; every effect next to its control (random direction of equal
norm, control adapter); state numbers, and what would have shown you wrong.
Variables live in the kernel until restart_kernel; the notebook stays on disk when the sandbox is gone.
list_sandboxes gives lost handles back. stop_sandbox when you are done.
"""


class SeerServer(MCPServer[None]):
    """MCPServer with strict arguments, our errors as plain results, and notebooks as resources."""

    register: Register

    async def call_tool(
        self, name: str, arguments: dict[str, Any], context: Context[None, Any] | None = None
    ) -> CallToolResult | InputRequiredResult:
        tool = self._tool_manager.get_tool(name)
        with self.register.observer.call(
            name,
            arguments,
            known=frozenset(tool.parameters["properties"] if tool else ()),
            changes=tool is not None and changes_something(tool),
            owner=owner(),
            client=client_of(context),
        ) as call:
            if tool is not None and (lacking := lacking_scope(tool)):
                answer = failure(lacking)
            elif named := self.register.config.redactor.found(arguments):
                answer = failure(secret_given(named))
            else:
                answer = await self._answer(tool, name, arguments, context)
            if isinstance(answer, CallToolResult):
                redact(answer, self.register.redactor_of(owner(), arguments, answer.meta))
                call.answered(answer.is_error is True, characters_of(answer))
        if call.note and isinstance(answer, CallToolResult):
            answer.content.append(TextContent(type="text", text=call.note))
        return answer

    async def _answer(
        self,
        tool: Tool | None,
        name: str,
        arguments: dict[str, Any],
        context: Context[None, Any] | None,
    ) -> CallToolResult | InputRequiredResult:
        if tool is None:
            known = [t.name for t in self._tool_manager.list_tools()]
            return failure(str(NotFound("tool", name, known)))
        try:
            answer = await super().call_tool(name, arguments, context)
            fault_point("answer")
            return answer
        except ToolError as error:
            if isinstance(error.__cause__, ValidationError):
                return failure(argument_errors(tool, error.__cause__))
            known = known_failure(error)
            if known is None:
                raise ToolError(self.register.config.redactor.text(str(error))) from error
            if isinstance(known, OSError):  # no tool expected it: the log says where it came from
                self.register.observer.refused(name, known)
                known = Refused(known)
            return failure(str(known))

    async def list_prompts(self) -> list[Prompt]:
        """Read anew each time: the operator may put an investigation there while the server runs."""
        return await asyncio.to_thread(prompts.listed, self.register.shelf)

    async def get_prompt(
        self,
        name: str,
        arguments: dict[str, Any] | None = None,
        context: Context[None, Any] | None = None,
    ) -> GetPromptResult:
        try:
            return await asyncio.to_thread(prompts.rendered, self.register.shelf, name, arguments)
        except SeerError as error:
            raise MCPError(INVALID_PARAMS, str(error)) from error

    @property
    def ready(self) -> bool:
        return self.register.ready

    @property
    def tool_names(self) -> frozenset[str]:
        return frozenset(tool.name for tool in self._tool_manager.list_tools())

    def scope_needed(self, method: str, name: str) -> str | None:
        """The scope that a request needs; None for those that any token may make."""
        if method != "tools/call":
            return "sandboxes:read" if method.startswith(("resources/", "skills/")) else None
        tool = self._tool_manager.get_tool(name)
        return None if tool is None else scope_of(tool)  # what is not there is said to everybody

    def on_request(self, method: str, params: type[Any], handler: Any) -> None:
        """Serve a method for which MCPServer has no decorator."""
        self._lowlevel_server.add_request_handler(method, params, handler)

    async def list_resources(self) -> list[Resource]:
        sessions, _ = await self.register.list(owner())
        notebooks = [
            Resource(
                uri=notebook_uri(session),
                name=session.notebook.path.name,
                title=f"Notebook of sandbox {session.handle}",
                mime_type="application/x-ipynb+json",
            )
            for session in sessions
        ]
        return [*await super().list_resources(), *notebooks]


def redact(answer: CallToolResult, redactor: Redactor) -> None:
    """Take values of secrets out of an answer: the last guard, behind that of outputs and logs."""
    for block in answer.content:
        if isinstance(block, TextContent):
            block.text = redactor.text(block.text)
    answer.structured_content = redactor.value(answer.structured_content)
    answer.meta = redactor.value(answer.meta)


def notebook_uri(session: Session) -> str:
    return f"seer://sandboxes/{session.handle}/notebook"


def build_server(
    config: Config, *, token_verifier: TokenVerifier | None = None, auth: AuthSettings | None = None
) -> SeerServer:
    """The whole server for one Config; runs over stdio, HTTP, or in memory."""
    packs = Packs([BUILTIN_PACKS, *config.packs], pack_folders)
    register = Register(config, packs)
    bus = OwnersBus(register)
    bridges = Bridges(register)
    skills = Skills(register)

    @asynccontextmanager
    async def lifespan(_: MCPServer[None]) -> AsyncGenerator[None]:
        await register.open()
        try:
            yield None
        finally:
            with anyio.CancelScope(shield=True), anyio.move_on_after(EXIT_SECONDS):
                await bridges.close()
                await register.close()

    server = SeerServer(
        "seer-mcp",
        title="seer: investigate a language model",
        instructions=INSTRUCTIONS,
        version=__version__,
        tools=build_tools(register),
        lifespan=lifespan,
        subscriptions=bus,
        extensions=[skills, notebook_app()],
        token_verifier=token_verifier,
        auth=auth,
        log_level="WARNING",
    )
    server.register = register
    add_resources(server, register)
    add_skill_files(server, skills)
    add_notices(server, register, bus)
    return server


def notebook_app() -> Apps:
    """The live notebook as a page for hosts of MCP Apps; to others the tools' texts are all there is."""

    def page() -> str:
        from .watch.app import app_page  # a server without such a host does without its libraries

        return app_page()

    apps = Apps()
    apps.add_resource(
        FunctionResource(
            uri=NOTEBOOK_APP,
            name="notebook.html",
            title="The notebook as it grows",
            mime_type=APP_MIME_TYPE,
            fn=page,
        )
    )
    return apps


def add_resources(server: MCPServer[None], register: Register) -> None:
    @server.resource(
        prompts.METHODOLOGY_URI, title=prompts.METHODOLOGY_TITLE, mime_type="text/markdown"
    )
    def methodology() -> str:
        """Explore before you exploit, controls, checkpoints, honest conclusions."""
        return prompts.methodology()

    @server.resource("seer://sandboxes/{handle}/notebook", mime_type="application/x-ipynb+json")
    async def notebook(handle: str) -> str:
        """The notebook of a sandbox, as it is now."""
        session = await _found(register, handle)
        return session.redactor.text(session.notebook.text())

    @server.resource("seer://sandboxes/{handle}/page", mime_type="application/json")
    async def page(handle: str) -> str:
        """The cells of a notebook as HTML that can be shown without running anything of it."""
        from .watch.app import cells_page

        return await cells_page(await _found(register, handle))

    @server.resource("seer://sandboxes/{handle}/cells/{cell}", mime_type="application/json")
    async def cell(handle: str, cell: str) -> str:
        """One cell of a notebook with its outputs."""
        try:
            session = await _found(register, handle)
            return session.redactor.text(session.notebook.cell(cell).json())
        except NotFound as error:
            raise ResourceNotFoundError(str(error)) from error


def add_skill_files(server: MCPServer[None], skills: Skills) -> None:
    @server.resource("skill://{+path}", mime_type="text/markdown")
    async def skill_file(path: str) -> str:
        """A file of a skill: how to investigate, or all about a pack or a technique."""
        text = await asyncio.to_thread(skills.read, f"skill://{path}")
        if text is None:
            raise ResourceNotFoundError(f"there is no skill file skill://{path[:200]}")
        return text


class OwnersBus(InMemorySubscriptionBus):
    """Tells of notebooks only those who may read them."""

    def __init__(self, register: Register) -> None:
        super().__init__()
        self._register = register

    def subscribe(self, listener: Callable[[ServerEvent], None]) -> Callable[[], None]:
        who = owner()

        def hear(event: ServerEvent) -> None:
            if not isinstance(event, ResourceUpdated) or self._register.may_read(event.uri, who):
                listener(event)

        return super().subscribe(hear)


async def _found(register: Register, handle: str) -> Session:
    try:
        return await register.readable(handle, owner())
    except SeerError as error:
        raise ResourceNotFoundError(str(error)) from error


def add_notices(server: SeerServer, register: Register, bus: InMemorySubscriptionBus) -> None:
    """Update notices for notebooks and cells, about one a second, in both protocol eras."""
    # 2025: which connections asked for which URI, by owner. One that is gone drops out by itself. (A
    # context's session is made anew for each request; the connection behind it is what stays.)
    subscribers: dict[str, dict[str, WeakSet[Connection]]] = {}
    changed: dict[str, float] = {}
    pending: set[str] = set()
    tasks: set[asyncio.Task[None]] = set()

    async def subscribe(context: Any, params: SubscribeRequestParams) -> EmptyResult:
        theirs = subscribers.setdefault(str(params.uri), {}).setdefault(owner(), WeakSet())
        theirs.add(context.session._connection)
        return EmptyResult()

    async def unsubscribe(context: Any, params: UnsubscribeRequestParams) -> EmptyResult:
        theirs = subscribers.get(str(params.uri), {}).get(owner(), WeakSet())
        theirs.discard(context.session._connection)
        return EmptyResult()

    async def announce(uri: str) -> None:
        await asyncio.sleep(max(0.0, changed[uri] + NOTICE_SECONDS - time.monotonic()))
        changed[uri] = now = time.monotonic()
        for old in [u for u, when in changed.items() if when + NOTICE_SECONDS < now]:
            if old not in pending:
                del changed[old]
        await bus.publish(ResourceUpdated(uri=uri))
        for who, connections in list(subscribers.get(uri, {}).items()):
            if register.may_read(uri, who):
                for connection in list(connections):
                    await connection.send_resource_updated(uri)

    def soon(uri: str) -> None:
        if uri in pending:
            return
        pending.add(uri)
        changed.setdefault(uri, 0.0)
        task = asyncio.create_task(announce(uri))
        tasks.add(task)

        def done(finished: asyncio.Task[None]) -> None:
            tasks.discard(finished)
            pending.discard(uri)

        task.add_done_callback(done)

    def on_change(session: Session, cell: str) -> None:
        soon(notebook_uri(session))
        if cell:
            soon(f"seer://sandboxes/{session.handle}/cells/{cell}")

    register.heard(on_change)
    server.on_request("resources/subscribe", SubscribeRequestParams, subscribe)
    server.on_request("resources/unsubscribe", UnsubscribeRequestParams, unsubscribe)


class Stdio(Protocol):
    """A server that can be served over stdio."""

    register: Register

    async def run_stdio_async(self) -> None: ...


async def serve_stdio(server: Stdio) -> None:
    """Serve one client over stdin and stdout until it closes them or a signal comes; then exit."""
    async with anyio.create_task_group() as group:

        async def until_told() -> None:
            with anyio.open_signal_receiver(
                signal.SIGTERM, signal.SIGINT, signal.SIGHUP
            ) as signals:
                async for _ in signals:
                    group.cancel_scope.cancel()
                    # The thread that reads stdin cannot be cancelled, so the group may never end.
                    # What has to be written is written once the register is closed.
                    with anyio.CancelScope(shield=True), anyio.move_on_after(EXIT_SECONDS):
                        await server.register.closed.wait()
                    drain_stderr()
                    os._exit(0)

        group.start_soon(until_told)
        await server.run_stdio_async()
        group.cancel_scope.cancel()
    drain_stderr()
    os._exit(0)
