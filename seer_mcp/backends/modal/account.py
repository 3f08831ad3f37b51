"""The account at Modal: its app, its rates, and what its answers mean in our words."""

from __future__ import annotations

import asyncio
import re
import time
from typing import Any

import modal
import modal.config
import modal.exception
from grpclib import GRPCError
from grpclib.exceptions import StreamTerminatedError

from ...errors import BadInput, SandboxStartFailed, SandboxUnreachable, SeerError
from ...money import TABLE, Rates, workspace_rates

APP = "seer-mcp"
# Tags of a sandbox: whose it is, which installation's, and its handle.
OWNER, INSTANCE, HANDLE = "seer-owner", "seer-instance", "seer-handle"
ASK_SECONDS = 20.0  # that one question may take; the client asks an API that is away for a minute
ANSWER_SECONDS = 60.0  # that one step of a start has where nothing is being made
RATES_SECONDS = 3.0
RATES_FOR = 3600.0
AGAIN = "or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET, and start this server anew"

# All that a call of the client can raise because of the other side, or of the line to it.
BROKEN = (modal.exception.Error, GRPCError, StreamTerminatedError, OSError, TimeoutError)
# Of these, what may be otherwise in a moment.
PASSING = (
    modal.exception.ServiceError,
    modal.exception.InternalError,
    modal.exception.ConnectionError,
    modal.exception.TimeoutError,
    StreamTerminatedError,
    OSError,
    TimeoutError,
)


class Account:
    """`client`: another one than that of the environment's token, for tests."""

    def __init__(self, client: Any = None) -> None:
        self._client = client
        self._app: Any = None
        self._asking = asyncio.Lock()
        self._rates = TABLE
        self._rates_at = -RATES_FOR

    async def client(self) -> Any:
        """Raises modal's AuthError if there is no token."""
        if self._client is None:
            self._client = await modal.Client.from_env.aio()
        return self._client

    async def app(self, create: bool = True) -> Any:
        """Our app, in which all sandboxes are. Raises NotFoundError if it is not there, nor to be made."""
        async with self._asking:
            if self._app is None:
                self._app = await modal.App.lookup.aio(
                    APP, client=await self.client(), create_if_missing=create
                )
            return self._app

    async def rates(self) -> Rates:
        """What the workspace pays, or our table where that cannot be had soon."""
        if time.monotonic() - self._rates_at > RATES_FOR:
            self._rates_at = time.monotonic()
            try:
                async with asyncio.timeout(RATES_SECONDS):
                    workspace = modal.Workspace.from_context(client=await self.client())
                    given = await workspace.billing.rates.aio()
                self._rates = workspace_rates({name: given[name] for name in given})
            except BROKEN:  # a token may be refused its rates, and the table is no guess
                self._rates = TABLE
        return self._rates


def account_keys() -> dict[str, str]:
    """The token of this machine, wherever modal's client finds it: nobody is to be shown it."""
    kept = {"MODAL_TOKEN_ID": "token_id", "MODAL_TOKEN_SECRET": "token_secret"}
    return {name: value for name, key in kept.items() if (value := modal.config.config.get(key))}


def why(error: BaseException) -> str:
    """What went wrong, as the end of a sentence. Never the text of a refused token."""
    if isinstance(error, modal.exception.AuthError):
        if "missing" in str(error).lower() or "not found" in str(error).lower():
            return f"there is no Modal token on this machine: run `modal token new`, {AGAIN}"
        return f"Modal did not accept this machine's token: run `modal token new`, {AGAIN}"
    if isinstance(error, modal.exception.PermissionDeniedError):
        return (
            "Modal's token on this machine is not allowed to do this: ask the workspace's owner, or run "
            f"`modal token new` for another workspace, {AGAIN}"
        )
    if isinstance(error, modal.exception.ResourceExhaustedError):
        return (
            f"Modal has no capacity, or the workspace's quota is used up ({said(error)}): try again later, or "
            "another type of GPU; limits are shown at modal.com/settings/usage"
        )
    if isinstance(error, modal.exception.InvalidError):
        return f"Modal refused it: {said(error)}"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be read: {error.strerror}"
    if isinstance(error, PASSING):
        return f"Modal cannot be reached ({said(error)})"
    return said(error)


def said(error: BaseException) -> str:
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).split())
    text = text if len(text) <= 300 else f"{text[:299]}…"
    return text.rstrip(".") or (
        "no answer" if isinstance(error, TimeoutError) else type(error).__name__
    )


def unreachable(handle: str, error: BaseException) -> SandboxUnreachable:
    reason = why(error)
    return SandboxUnreachable(
        f"Sandbox {handle} does not answer: {reason}. It may run on; list_sandboxes shows its state."
    )


def not_started(error: BaseException, log: str = "") -> SeerError:
    """A failed start as an error of ours."""
    if isinstance(error, SeerError):
        return error
    if isinstance(error, modal.exception.ImageBuildError):
        return SandboxStartFailed("its image could not be built", log or str(error))
    return SandboxStartFailed(why(error), log)


def no_secret(name: str) -> BadInput:
    return BadInput(
        "secrets",
        name,
        "it is neither in this server's environment or .env file, nor among the secrets of the Modal workspace; "
        f"set it here, or make it with `modal secret create {name} {name}=…`",
    )
