"""Where the protocol meets us: strict arguments, our errors as results, who calls, progress."""

from __future__ import annotations

import difflib
import time
from collections.abc import Awaitable, Callable
from typing import Annotated, Any

from mcp.server.auth.middleware.auth_context import get_access_token
from mcp.server.mcpserver import Context
from mcp.server.mcpserver.tools import Tool
from mcp.types import CallToolResult, ImageContent, TextContent, ToolAnnotations
from pydantic import Field, ValidationError

from ..errors import SeerError, show
from ..render import Answer
from ..text import printable

LOCAL_OWNER = "local"
NOTEBOOK_APP = "ui://seer/notebook.html"
"""What a host of MCP Apps shows for a tool of a notebook (server.py)."""
# Tools whose call runs code that the caller chose, or puts it where it will be run.
RUN_CODE = frozenset(
    ["create_cell", "run_cell", "edit_cell", "load_model", "run_command", "write_file"]
)
ERROR_CHARACTERS = 8000

Heartbeat = Callable[[str], Awaitable[None]]

# NaN is no time to wait for, and what counts bytes is no larger than a file can be.
Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Minutes = Annotated[float, Field(ge=0, le=525_600, allow_inf_nan=False)]
Hours = Annotated[float, Field(ge=0, le=8_760, allow_inf_nan=False)]
Dollars = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Gigabytes = Annotated[float, Field(ge=0, le=2**20, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=2**53)]


def owner() -> str:
    """Who calls: the subject of the token, or the one user of a local server."""
    token = get_access_token()
    return LOCAL_OWNER if token is None else (token.subject or token.client_id)


def scope_of(made: Tool) -> str:
    """The scope that a token needs to call it."""
    if made.name in RUN_CODE:
        return "code:run"
    return "sandboxes:write" if changes_something(made) else "sandboxes:read"


def lacking_scope(made: Tool) -> str:
    """What is wrong if the caller's token has not the scope; "" if it has, or no token is needed."""
    token, needed = get_access_token(), scope_of(made)
    if token is None or needed in token.scopes:
        return ""
    return f"{made.name} needs a token with the scope {needed}; this one has {', '.join(token.scopes) or 'none'}."


def tool(
    fn: Callable[..., Awaitable[CallToolResult]],
    title: str,
    *,
    read_only: bool = False,
    destructive: bool = False,
    idempotent: bool = False,
    open_world: bool = False,
    core: bool = False,
    app: bool = False,
) -> Tool:
    """A tool with all four annotations; its docstring is what the agent reads. `app`: hosts that can show the
    live notebook beside its result."""
    meta = {"anthropic/alwaysLoad": True} if core else {}
    shown = {"ui": {"resourceUri": NOTEBOOK_APP}} if app else {}
    return Tool.from_function(
        fn,
        title=title,
        description=" ".join((fn.__doc__ or "").split()),
        annotations=ToolAnnotations(
            read_only_hint=read_only,
            destructive_hint=destructive,
            idempotent_hint=idempotent,
            open_world_hint=open_world,
        ),
        meta={**meta, **shown} or None,
        structured_output=False,
    )


def strict(made: Tool) -> Tool:
    """Refuse unknown arguments, and say so in the schema; drop the schema's idle words."""
    model = made.fn_metadata.arg_model
    model.model_config["extra"] = "forbid"
    model.model_rebuild(force=True)
    schema = {
        key: value for key, value in made.parameters.items() if key not in ("title", "description")
    }
    schema["properties"] = {
        name: {k: v for k, v in described.items() if k != "title"}
        for name, described in made.parameters.get("properties", {}).items()
    }
    schema["additionalProperties"] = False
    made.parameters = schema
    return made


def failure(text: str) -> CallToolResult:
    """Our "no": one clear text, marked as an error."""
    clipped = (
        text if len(text) <= ERROR_CHARACTERS else text[: ERROR_CHARACTERS - 20] + " … (shortened)"
    )
    return Answer(printable(clipped), is_error=True).result()


def secret_given(names: list[str]) -> str:
    """A call that would write the value of a secret into a notebook or file."""
    listed = ", ".join(names)
    return (
        f"Nothing was done: the arguments hold the value of {listed}, which must not get into a notebook or file. "
        "Let the code read it from its environment variable of that name instead: a sandbox that was started with "
        "the secret has it."
    )


def argument_errors(made: Tool, error: ValidationError) -> str:
    """What is wrong with the arguments, in sentences that name them."""
    known = list(made.parameters["properties"])
    sentences: list[str] = []
    for problem in error.errors()[:6]:
        name = ".".join(str(part) for part in problem["loc"])
        if problem["type"] == "extra_forbidden":
            close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]}?" if close else ""
            sentences.append(f"{made.name} has no parameter {show(name)}.{hint}")
        elif problem["type"] == "missing":
            sentences.append(f"{made.name} needs {name}.")
        else:
            sentences.append(f"{name} = {show(repr(problem['input']))}: {problem['msg']}.")
    return f"{' '.join(sentences)} Parameters of {made.name}: {', '.join(known)}."


def known_failure(error: BaseException) -> SeerError | OSError | None:
    """What is behind the SDK's exception: an error of ours, or what the system refused us.

    An OSError without a number is none of the system's: it stays unexpected.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SeerError) or (isinstance(cause, OSError) and cause.errno):
            return cause
        cause = cause.__cause__
    return None


def changes_something(made: Tool) -> bool:
    """Whether a call runs or changes something: then it belongs into the audit."""
    return not (made.annotations and made.annotations.read_only_hint)


def client_of(context: Context[Any, Any] | None) -> str | None:
    """The client's name and version, as it gave them."""
    try:
        said = context.session.client_params if context is not None else None
    except ValueError:  # outside of a request
        return None
    if said is None:
        return None
    return printable(f"{said.client_info.name} {said.client_info.version}")[:80]


def characters_of(result: CallToolResult) -> int:
    """The size of an answer: characters of text, and of images as they are sent."""
    size = 0
    for block in result.content:
        if isinstance(block, TextContent):
            size += len(block.text)
        elif isinstance(block, ImageContent):
            size += len(block.data)
    return size


def heartbeat(context: Context[Any, Any]) -> Heartbeat:
    """Progress with the last line of output in it, for clients that asked for it."""
    began = time.monotonic()

    async def beat(message: str) -> None:
        await context.report_progress(time.monotonic() - began, None, printable(message))

    return beat
